"""STATE and LATENT are made where they are linked. Linking one afterwards never replays an empty output, and costs as little as the
states that are kept allow."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
import torch
from adastate_pack.adastate_core.past import Past
from adastate_pack.adastate_core.rollout import Rollout
from adastate_pack.nodes import job
from adastate_pack.nodes.host import links, rerun
from comfy_execution.graph import DynamicPrompt
from comfy_execution.progress import reset_progress_state
from comfy_execution.utils import CurrentNodeContext

pytestmark = pytest.mark.usefixtures("execute")  # the host knows the nodes
LATENT, STATE, REPORT, VIDEO = range(4)
DEMAND = frozenset((LATENT, STATE))
LENGTH = 57  # five chunks of three latent frames


def given(kind: str, value, mark: list[str] | None = None) -> type:
    """A node without inputs that gives `value`; its fingerprint is the newest of `mark`."""

    class Given:
        RETURN_TYPES, FUNCTION, CATEGORY = (kind,), "give", "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def give(self):
            return (value,)

    if mark:
        Given.IS_CHANGED = classmethod(lambda cls: mark[-1])
    return Given


def taker(taken: dict[int, object]) -> type:
    """A node that takes any output, is an output node, and keeps what it was given."""

    class Take:
        RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "take", "test", True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"value": ("*", {}), "slot": ("INT", {})}}

        @classmethod
        def VALIDATE_INPUTS(cls, input_types):
            return True

        def take(self, value, slot):
            taken[slot] = value
            return ()

    return Take


class Loop:
    """As nodes that repeat parts of the graph: it is given the graph, and may link to any node of it."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "loop", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "hidden": {"graph": "DYNPROMPT"}}

    def loop(self, graph):
        return ()


class Ran:
    """Prompts with one rollout, executed by the host; `rolled` counts the rollouts that really ran, `chunks` their chunks."""

    def __init__(self, execute, monkeypatch, model, positive, vae) -> None:
        import nodes

        self.execute, self.taken, self.marks = execute, {}, ["one"]
        classes = {
            "GivenModel": given("MODEL", model, self.marks), "GivenPositive": given("CONDITIONING", positive),
            "GivenVae": given("VAE", vae), "Take": taker(self.taken), "Loop": Loop,
        }  # fmt: skip
        for name, each in classes.items():
            monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, each)
        self.rolled, self.chunks = 0, 0
        chunks, emit = Rollout.chunks, Rollout._emit

        def counted(rollout, *args):
            self.rolled += 1
            return chunks(rollout, *args)

        def emitted(rollout, *args):
            self.chunks += 1
            return emit(rollout, *args)

        monkeypatch.setattr(Rollout, "chunks", counted)
        monkeypatch.setattr(Rollout, "_emit", emitted)

    def __call__(self, *linked: int, stream: dict | None = None, more: dict | None = None, **inputs):
        """What was taken of these outputs, by their index, and the report; some hosts show none of what they replay."""
        prompt = {
            "1": {"class_type": "GivenModel", "inputs": {}},
            "2": {"class_type": "GivenPositive", "inputs": {}},
            "5": {"class_type": "AdaStateRollout", "inputs": {
                "model": ["1", 0], "positive": ["2", 0], "width": 32, "height": 32, "length": LENGTH, "batch_size": 1, "seed": 5,
                "steps": 1, "shift": 5.0, "chunk_frames": 3, "window_frames": 3, "positions": "packed",
            } | inputs},
        }  # fmt: skip
        if stream is not None:
            prompt["3"] = {"class_type": "GivenVae", "inputs": {}}
            settings = {"filename_prefix": "take", "fps": 16.0, "codec": "h264", "quality": 18, "preview": False}
            settings |= {"autosave_seconds": 0.0}
            prompt["4"] = {"class_type": "AdaStateStreamOutput", "inputs": {"vae": ["3", 0]} | settings | stream}
            prompt["5"]["inputs"]["stream"] = ["4", 0]
        for slot in linked:
            prompt[f"9:{slot}"] = {"class_type": "Take", "inputs": {"value": ["5", slot], "slot": slot}}
        self.taken.clear()
        shown = self.execute(prompt | (more or {}))
        return [self.taken[slot] for slot in linked if slot in self.taken], json.loads(
            shown["5"]["adastate_report"][0]
        ) if "5" in shown else {}


@pytest.fixture
def ran(execute, monkeypatch, model, positive, vae):
    return Ran(execute, monkeypatch, model, positive, vae)


def tensors_of(state) -> dict[str, torch.Tensor]:
    found = {
        name: getattr(state, name) for name in ("pending", "hidden", "latents", "recent", "noisy", "given")
    } | state.stream
    for i, layer in enumerate(state.cache):
        found |= {f"{i}.{name}": tensor for name, tensor in layer.tensors.items()}
    return {name: each for name, each in found.items() if isinstance(each, torch.Tensor)}


def same_states(one, other) -> None:
    assert (one.next_frame, one.next_chunk, one.emitted) == (other.next_frame, other.next_chunk, other.emitted)
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys() and len(first) > 5
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def frames_of(video) -> torch.Tensor:
    with av.open(str(video)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def videos(folders) -> list[Path]:
    return sorted((folders / "output").glob("*.mp4"))


# ---- which are linked


def under_way(prompt: dict, prompt_id: str = "p") -> DynamicPrompt:
    graph = DynamicPrompt(prompt)
    reset_progress_state(prompt_id, graph)
    return graph


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def test_links_are_found_through_subgraphs_and_to_nodes_that_do_not_run():
    under_way(
        {
            "7:5": node("AdaStateRollout", seed=1),
            "5": node("AdaStateRollout", resume=["7:5", 1], width=["7:5", 2]),
            "12:3:4": node("PreviewAny", source=["7:5", 3.0]),
            "6": node("PreviewAny", source="7:5"),
            "8": node("PreviewAny", source=["7", 0], other=["7:5", 0, 0]),
        }
    )
    assert links.linked_slots("p", "7:5") == {1, 2, 3}
    assert links.linked_slots("p", "5") == frozenset()


def test_what_cannot_be_known_counts_as_linked(monkeypatch):
    import nodes

    graph = under_way({"5": node("AdaStateRollout"), "6": node("PreviewAny", source="text")})
    assert links.linked_slots("p", "5") == frozenset()
    assert links.linked_slots("another", "5") is None and links.linked_slots("p", "7") is None
    graph.add_ephemeral_node("5.0.0.1", node("AdaStateRollout"), "5", "5")
    graph.add_ephemeral_node("5.0.0.2", node("PreviewAny", source=["5", 1]), "5", "5")
    assert links.linked_slots("p", "5.0.0.1") is None and links.linked_slots("p", "5") == {1}
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Loop of a pack", Loop)
    under_way({"5": node("AdaStateRollout"), "6": node("Loop of a pack")})
    assert links.linked_slots("p", "5") is None
    monkeypatch.setattr(links, "get_progress_state", None)
    assert links.linked_slots("p", "5") is None and links.fed_by("p", "5") is None


def test_what_feeds_a_node_is_told_apart_by_widgets_links_and_fingerprints():
    def digest(**changes) -> str | None:
        prompt = {
            "1": node("Load", file="a"), "2": node("Change", model=["1", 0]), "5": node("AdaStateRollout", model=["2", 0], seed=1),
            "6": node("PreviewAny", source=["5", 1]),
        }  # fmt: skip
        prompt["1"] |= changes.pop("one", {})
        prompt["5"]["inputs"] |= changes
        prompt["5"]["is_changed"] = ["a word of its own"]
        under_way(prompt)
        return links.fed_by("p", "5")

    same = digest()
    assert same and digest() == same
    others = [
        digest(seed=2),
        digest(model=["2", 1]),
        digest(one=node("Load", file="b")),
        digest(one={"is_changed": ["b"]}),
    ]
    others += [digest(one=node("Load of another kind", file="a")), digest(model=["1", 0])]
    assert len({same, *others}) == 7 and None not in others
    assert digest(one={"is_changed": float("nan")}) is None and digest(one={"is_changed": [object()]}) is None
    assert digest(model=["nobody", 0]) is None


# ---- fingerprints


class Asking:
    """A node that is asked for its fingerprint and runs, in prompts of one id."""

    def __init__(self, linked: set[int] = frozenset(), place: str = "5", **inputs) -> None:
        takers = {str(10 + slot): node("PreviewAny", source=[place, slot]) for slot in linked}
        under_way({place: node("AdaStateRollout"), **takers})
        with CurrentNodeContext("p", place, 0):
            self.place = rerun.executing()
            self.word = rerun.fingerprint({"test": id(Asking), **inputs}, DEMAND)

    def runs(self, outputs: set[int] | None = None, files: tuple = (), short: bool = False) -> None:
        made = rerun.linked_outputs(self.place, DEMAND) if outputs is None else frozenset(outputs)
        rerun.finished(self.place, list(files), short, made)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(rerun, "_queued", rerun._Recent())
    monkeypatch.setattr(rerun, "_results", rerun._Recent())


def test_fewer_links_are_replayed_and_more_are_not():
    first = Asking({STATE, VIDEO})
    first.runs()
    assert Asking({STATE}).word == Asking().word == Asking({VIDEO, REPORT}).word == first.word
    both = Asking({STATE, LATENT})
    assert both.word != first.word
    both.runs()
    assert Asking({LATENT}).word == Asking({STATE}).word == Asking().word == both.word


def test_a_word_stands_for_the_outputs_that_all_its_results_have():
    """What is before the node may change, and the fingerprint is not told: one word has results of several upstreams."""
    first = Asking({STATE})
    first.runs()
    again = Asking()
    assert again.word == first.word
    again.runs()  # of another model, so it was no replay
    assert Asking().word == first.word
    assert Asking({STATE}).word != first.word


def test_an_output_that_could_not_be_made_is_not_replayed():
    first = Asking({STATE, LATENT})
    first.runs(outputs={LATENT})
    assert Asking({LATENT}).word == first.word != Asking({LATENT, STATE}).word


def test_a_list_with_a_short_item_is_not_replayed_and_no_item_takes_anothers_files(tmp_path):
    file = tmp_path / "a.mp4"
    file.touch()
    first = Asking()
    first.runs(short=True)
    first.runs(files=[file])
    second = Asking()
    assert second.word != first.word
    second.runs(files=[file])
    second.runs(files=[file])
    third = Asking({STATE})
    assert third.word != second.word and rerun.take_kept_files(third.place) == ()


def test_files_are_given_once_to_a_node_that_runs_for_more_outputs(tmp_path):
    file = tmp_path / "a.mp4"
    file.touch()
    Asking().runs(files=[file])
    same = Asking()
    assert rerun.take_kept_files(same.place) == ()
    more = Asking({LATENT})
    assert rerun.take_kept_files(more.place) == (file,) and rerun.take_kept_files(more.place) == ()
    assert rerun.take_kept_files(None) == () and rerun.take_kept_files(rerun.Place("p", "unheard of")) == ()


def test_all_outputs_are_made_where_no_fingerprint_guards_them():
    assert rerun.linked_outputs(None, DEMAND) == DEMAND == rerun.linked_outputs(rerun.Place("p", "5"), DEMAND)


# ---- runs


@pytest.mark.parametrize("slot", [STATE, LATENT])
def test_an_output_that_is_linked_after_the_run_is_made_then(ran, slot):
    [straight], _ = ran(slot)
    ran.marks.append("another model")  # so that nothing of this is used again
    taken, report = ran()
    assert taken == [] and set(report["not_made"]) == {"LATENT", "STATE"} and report["state_bytes"] is None
    assert "runs again from the newest state that is kept" in report["not_made"]["STATE"]
    before = ran.rolled
    [value], report = ran(slot)
    assert ran.rolled == before + 1 and ("LATENT", "STATE")[slot] not in report["not_made"]
    if slot == STATE:
        same_states(value, straight)
        assert report["state_bytes"] == value.nbytes
    else:
        assert torch.equal(value["samples"], straight["samples"])
    for again in ((), (slot,), (slot, REPORT), ()):
        ran(*again)
    assert ran.rolled == before + 1


def test_a_video_is_a_path_so_linking_it_afterwards_runs_nothing(ran, folders):
    ran(stream={})
    [video], _ = ran(VIDEO, stream={})
    assert ran.rolled == 1 and [video.get_stream_source()] == [str(path) for path in videos(folders)]


def test_the_latent_that_a_stream_lets_go_is_no_reason_to_run_again(ran):
    _, report = ran(stream={}, keep_latents=False)
    assert "keep_latents is off" in report["not_made"]["LATENT"]
    taken, _ = ran(LATENT, stream={}, keep_latents=False)
    assert taken == [] and ran.rolled == 1


def test_beside_a_loop_everything_is_made(ran):
    _, report = ran(more={"8": node("Loop")})
    assert "not_made" not in report and report["state_bytes"]


@pytest.mark.parametrize("kept_by", [{"history_chunks": 2}, {"keep_state": True}], ids=str)
@pytest.mark.parametrize("keep_latents", [True, False])
@pytest.mark.sampled(2)
def test_nothing_is_rolled_out_where_the_state_at_the_end_is_kept(ran, folders, keep_latents, kept_by):
    inputs = {"stream": {"filename_prefix": "in/take"} | kept_by, "keep_latents": keep_latents}
    slots = (STATE, LATENT, VIDEO) if keep_latents else (STATE, VIDEO)
    straight, _ = ran(*slots, **inputs)
    ran.marks.append("another model")
    _, first = ran(**inputs)
    before, files = ran.rolled, sorted((folders / "output").rglob("*"))
    taken, report = ran(*slots, **inputs)
    assert ran.rolled == before and sorted((folders / "output").rglob("*")) == files
    same_states(taken[0], straight[0])
    assert Path(taken[-1].get_stream_source()).name == "take_00002_.mp4"
    if keep_latents:
        assert torch.equal(taken[1]["samples"], straight[1]["samples"])
    assert report["videos"] == first["videos"] == ["in/take_00002_.mp4"] and report["state"] == first["state"]
    assert report["frames"] == LENGTH and report["state_bytes"] == taken[0].nbytes
    assert "state kept with in/take_00002_.mp4, and nothing was made again" in report["warnings"][-1]
    ran(*slots, **inputs)
    assert ran.rolled == before


def test_without_its_report_too(ran, folders):
    ran(stream={"history_chunks": 9})
    (folders / "output" / "take_00001_.report.json").unlink()
    [state], report = ran(STATE, stream={"history_chunks": 9})
    assert ran.rolled == 1 and state.emitted == 15
    assert (report["ended"], report["videos"], report["length"]) == ("whole", ["take_00001_.mp4"], LENGTH)
    assert report["kv_bytes_planned"]


@pytest.mark.parametrize("damage", ["gone", "cut", "another's"])
def test_from_the_newest_state_that_is_good_the_rest_is_made_and_joined(ran, folders, damage):
    inputs = {"stream": {"history_chunks": 2}}
    straight, _ = ran(STATE, LATENT, VIDEO, **inputs)
    ran.marks.append("another model")
    ran(**inputs)
    end = folders / "output" / "take_00002_.state.safetensors"
    if damage == "gone":
        end.unlink()
    else:
        data = (folders / "output" / "take_00001_.state.safetensors").read_bytes()
        end.write_bytes(data if damage == "another's" else data[:-9])
    before = ran.chunks
    taken, report = ran(STATE, LATENT, VIDEO, **inputs)
    assert ran.chunks == before + 1  # after chunk 4 of 5
    same_states(taken[0], straight[0])
    assert torch.equal(taken[1]["samples"], straight[1]["samples"])
    frames, whole = (frames_of(one[2].get_stream_source()) for one in (taken, straight))
    # one encoder's to its last picture, which it knew to be none; what follows is another encoder's
    assert frames.shape == whole.shape and torch.equal(frames[:44], whole[:44])
    assert (frames[44:].int() - whole[44:].int()).abs().float().mean() < 3
    assert report["frames_total"] == LENGTH and "went on from the state kept after 45 frames" in " ".join(
        report["warnings"]
    )


def test_a_run_that_was_stopped_goes_on_from_its_last_state(ran, monkeypatch):
    [straight], _ = ran(STATE, stream={})
    ran.marks.append("another model")
    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "_time_is_up", property(lambda self: True))
        _, report = ran(stream={})
    assert report["ended"] == "stopped" and report["frames_total"] == 9
    before = ran.chunks
    [state], report = ran(STATE, stream={})
    assert report["ended"] == "whole" and ran.chunks == before + 4
    same_states(state, straight)


@pytest.mark.parametrize("change", ["model", "stream", "video", "no state"])
@pytest.mark.sampled(2)
def test_from_the_start_where_anything_else_has_changed(ran, folders, change):
    inputs = {"history_chunks": 2}
    ran(stream=inputs)
    if change == "model":
        ran.marks.append("another file")
    elif change == "stream":
        inputs["quality"] = 20
    elif change == "video":
        (folders / "output" / "take_00001_.mp4").unlink()
    else:
        for path in (folders / "output").rglob("*.state.safetensors"):
            path.unlink()
    before = ran.chunks
    [state], report = ran(STATE, stream=inputs)
    assert ran.chunks == before + 5 and report["videos"] != [] and state.emitted == 15
    assert not any("more outputs are linked" in sentence for sentence in report["warnings"])


def test_a_state_that_memory_lacked_for_is_made_by_the_next_run(ran, monkeypatch):
    def snapshot(past, stream=None):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Past, "snapshot", snapshot)
        taken, report = ran(STATE)
    assert taken == [] and "STATE could not be made" in " ".join(report["warnings"])
    [state], _ = ran(STATE)
    assert state.emitted == 15 and ran.rolled == 2
