"""What is kept and made of a running rollout: bounded history, a thread that drops what is late, changed fingerprints."""

from __future__ import annotations

import base64
import io
import threading
import time
from types import SimpleNamespace

import comfy.ops
import latent_preview
import pytest
import torch
from adastate_pack.nodes.host import live_runs as live
from adastate_pack.nodes.host import rerun
from adastate_pack.nodes.host import server as host_server
from adastate_pack.nodes.host.live_history import History
from adastate_pack.nodes.host.live_pictures import Encoder, spread
from adastate_pack.nodes.host.progress import Progress
from comfy_execution.utils import CurrentNodeContext
from PIL import Image

ALL = frozenset((0, 1))  # the outputs that are made on demand


def facts(chunk: int) -> dict:
    return {"chunk": chunk, "first_frame": 12 * chunk}


@pytest.mark.parametrize("count", [5, 240, 241, 5000])
def test_history_is_bounded_and_spread_over_the_whole_run(count):
    history = History()
    for chunk in range(count):
        history.add(facts(chunk))
        history.add_pictures(chunk, [{"frame": 12 * chunk, "url": f"data:{chunk}"}])
    told = history.describe()
    numbers = [entry["chunk"] for entry in told["chunks"]]
    assert len(numbers) == min(count, len(numbers)) <= 240 and len(numbers) > min(count, 240) / 2 - 1
    assert numbers[0] == 0 and numbers[-1] == count - 1 and len(told["pictures"]) <= 24
    steps = {b - a for a, b in zip(numbers[:-1], numbers[1:-1], strict=False)}
    assert len(steps) <= 1
    assert all(entry["thumbnail"] == f"data:{entry['chunk']}" for entry in told["chunks"])


def test_a_late_chunk_gives_way_to_a_newer_one_and_the_end_comes_last():
    busy, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    shown, pictured = [], []

    def show(told: dict, meters: dict | None) -> None:
        shown.append((told["chunk"], meters is not None))
        if told["chunk"] == 0:
            busy.set()
            go_on.wait(10)

    encoder = Encoder(show, lambda chunk, pictures, _: pictured.append((chunk, [p["frame"] for p in pictures])))
    frames = torch.rand(12, 16, 16, 3)
    encoder.offer(facts(0), frames)
    assert busy.wait(10)
    for chunk in (1, 2, 3):
        encoder.offer(facts(chunk), frames)
    encoder.close(ended.set)
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(10)
    assert shown == [(0, True), (1, False), (2, False), (3, True)]
    assert pictured[0] == (0, [2, 5, 8, 11])


def test_frames_that_cannot_be_shown_do_not_end_the_thread():
    ended, shown = threading.Event(), []
    encoder = Encoder(lambda told, meters: shown.append((told["chunk"], meters)), lambda *_: None)
    encoder.offer(facts(0), torch.rand(2, 2))
    encoder.close(ended.set)
    assert ended.wait(10) and shown == [(0, None)]


def test_spread_takes_the_last_and_no_more_than_there_are():
    assert spread(12, 4) == [2, 5, 8, 11] and spread(3, 12) == [0, 1, 2] and spread(9, 1) == [8] and spread(9, 0) == []


def test_a_fingerprint_changes_once_for_a_short_or_deleted_result(tmp_path):
    def asked(node: str = "5", **inputs) -> str:
        with CurrentNodeContext("prompt", node, 0):
            return rerun.fingerprint({"seed": 1} | inputs, ALL)

    place, file = rerun.Place("prompt", "5"), tmp_path / "video.mp4"
    file.touch()
    first = asked()
    assert first and len({first, asked(seed=2), asked("6")}) == 3
    first = asked()
    rerun.finished(place, [file], short=True, outputs=ALL)
    second = asked()
    assert second != first and asked() == second
    rerun.finished(place, [file], short=False, outputs=ALL)
    assert asked() == second == asked()
    file.unlink()
    gone = asked()
    assert gone not in (first, second) and asked() == gone


def test_a_rollout_outside_the_executor_is_neither_listed_nor_shown():
    assert rerun.executing() is None and rerun.fingerprint({"seed": 1}, ALL) == ""
    listed = live.runs()
    with live.live_run() as (run, _):
        assert not run.watched and live.runs() == listed


def test_a_run_can_be_found_and_stopped_while_it_runs():
    with CurrentNodeContext("prompt", "7", 0), live.live_run() as (run, end):
        assert live.find("prompt", "7") is run and not run.stopped
        run.stop()
        end.short = True
        assert run.stopped and run.summary()["stopping"]
    assert live.find("prompt", "7") is None and run.history.outcome == "stopped"


def test_a_stopped_rollout_returns_what_there_is(rollout, monkeypatch):
    monkeypatch.setattr(live.LiveRun, "chunk", lambda run, *_: None)
    monkeypatch.setattr(live.LiveRun, "watched", property(lambda run: run.stop() or False))
    short = rollout(length=33).args
    monkeypatch.undo()
    whole = rollout(length=33).args
    made = short[0]["samples"]
    assert made.shape[2] == 3 and made.equal(whole[0]["samples"][:, :, :3])
    assert '"stopped": {\n  "frame": 9,\n  "of": 33' in short[2]
    resumed = rollout(length=33, resume=short[1]).args
    assert resumed[0]["samples"].equal(whole[0]["samples"])


def test_a_hidden_state_is_shown_beside_its_chunk():
    ended, shown = threading.Event(), []
    encoder = Encoder(lambda *_: None, lambda *told: shown.append(told))
    encoder.offer(facts(0), torch.rand(4, 16, 16, 3), torch.rand(8, 12, 3))
    encoder.close(ended.set)
    assert ended.wait(10)
    [(chunk, pictures, hidden)] = shown
    image = Image.open(io.BytesIO(base64.b64decode(hidden.partition(",")[2])))
    assert (chunk, image.size, len(pictures)) == (0, (12, 8), 4)
    history = History()
    history.add(facts(0))
    history.add_pictures(0, pictures, hidden)
    assert history.describe()["chunks"][0]["hidden"] == hidden and "hidden" not in history.newest


def test_pictures_of_a_hidden_state_keep_to_their_share_of_the_time():
    run, made = live.LiveRun(None), []

    def draw() -> torch.Tensor:
        time.sleep(0.02)
        made.append(1)
        return torch.zeros(2, 2, 3)

    assert run.hidden_state(draw) is not None
    assert run.hidden_state(draw) is None and len(made) == 1  # 0.02 s of a run that has lasted no longer
    run._asked -= 100
    assert run.hidden_state(draw) is not None
    run._asked -= 100
    assert run.hidden_state(lambda: 1 / 0) is None
    made.clear()
    run._asked -= 3600  # an hour that nobody watched
    while run.hidden_state(draw) is not None:
        pass
    assert 1 <= len(made) <= 6


def test_an_interrupt_in_the_picture_of_a_hidden_state_is_not_lost():
    """The host asks for interrupts in every layer, a decoder's too, and asks once: whoever catches it has to raise it."""
    import comfy.model_management as management

    layer = comfy.ops.manual_cast.Linear(2, 2)
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        live.LiveRun(None).hidden_state(lambda: layer(torch.zeros(1, 2)))
    management.throw_exception_if_processing_interrupted()


def test_the_list_of_pages_ends_somewhere_and_forgets_those_that_left(monkeypatch):
    """A page that is open stays, whatever opens beside it; those that closed do not pile up."""
    server = SimpleNamespace(sockets={"mine": object()}, client_id="mine")
    monkeypatch.setattr(live, "prompt_server", lambda: server)
    monkeypatch.setattr(live, "_pages", {})
    live.page_opened("mine")
    for number in range(5000):
        live.page_opened(f"gone {number}")
    assert len(live._pages) < 40
    assert live.LiveRun(rerun.Place("p", "1")).has_page
    live.page_opened("about to open its socket")
    server.sockets["about to open its socket"] = object()
    server.client_id = "about to open its socket"
    assert live.LiveRun(rerun.Place("p", "1")).has_page
    server.sockets |= {f"open {number}": object() for number in range(3 * live.MOST_PAGES)}
    for name in server.sockets:
        live.page_opened(name)
    assert len(live._pages) <= live.MOST_PAGES
    server.client_id = name
    assert live.LiveRun(rerun.Place("p", "1")).has_page


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ({"workflow": {"id": "drawn", "nodes": []}}, "drawn"), ({"workflow": {"id": 7}}, "7"), ({"workflow": {"id": [1]}}, ""),
        ({"workflow": "abc"}, ""), ({"workflow": [1]}, ""), ({"workflow": None}, ""),
        ("abc", ""), ([1, 2], ""), (5, ""), (None, ""), ({"workflow": {"id": "x" * 9_999}}, "x" * 200),
    ],
)  # fmt: skip
def test_a_run_is_listed_whatever_was_sent_beside_its_prompt(info, name):
    with live.live_run(SimpleNamespace(extra_pnginfo=info)) as (run, _):
        assert run.workflow == name


@pytest.mark.parametrize(("client", "shown"), [("mine", 1), ("", 1), (None, 0)])
def test_a_prompt_without_a_client_shows_no_picture(monkeypatch, progress_told, client, shown):
    """The host sends the picture of such a prompt to every socket that is open."""
    picture = torch.zeros(8, 8, 3)
    monkeypatch.setattr(host_server, "prompt_server", lambda: SimpleNamespace(client_id=client))
    previewer = SimpleNamespace(decode_latent_to_preview_image=lambda form, latents: (form, "latents", 8))
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *_: previewer)
    patcher = SimpleNamespace(load_device="cpu", model=SimpleNamespace(latent_format=None))
    bar = Progress(4)
    bar.step()
    bar.preview(picture)
    bar.preview_latent(patcher, torch.zeros(1, 4, 1, 2, 2))
    pictures = [preview for _, _, preview in progress_told if preview is not None]
    assert len(pictures) == 2 * shown and len(progress_told) == 1 + 2 * shown


def test_where_no_server_is_pictures_go_to_whoever_asked(monkeypatch, progress_told):
    monkeypatch.setattr(host_server, "prompt_server", lambda: None)
    Progress(4).preview(torch.zeros(8, 8, 3))
    assert progress_told[0][2] is not None
