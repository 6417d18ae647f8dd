"""AdaState Self Test: all is well on this machine, and each fault that is put in is named by the lines that it touches."""

from __future__ import annotations

import gc
import getpass
import re
import weakref
from functools import partial
from pathlib import Path

import comfy.ldm.wan.model
import comfy.model_management
import pytest
import torch
from adastate_pack.adastate_core.cache import byte_plan, eight_bits
from adastate_pack.adastate_core.cache import stored as stored_cache
from adastate_pack.adastate_core.decode import wan_vae
from adastate_pack.adastate_core.rope import Rope
from adastate_pack.adastate_core.weights.presets import OWN_PRESETS
from adastate_pack.nodes import self_test_node
from adastate_pack.nodes.host import made_models as made
from adastate_pack.nodes.host import made_speech as speech
from adastate_pack.nodes.host.speech_model import SpeechModel
from adastate_pack.nodes.self_test import all_checks as listed
from adastate_pack.nodes.self_test import bench as benches
from adastate_pack.nodes.self_test import other_checks, outcome, rollout_checks
from adastate_pack.nodes.self_test.bench import Bench, distance

# a line of each kind; what they are of is on the help page
FEW = (
    "attention in float32", "rotation", "numbers in int8", "preset longlive", "preset liveavatar", "preset adastate",
    "interrupt, adastate", "past in int8", "past in host memory", "decode, full VAE",
)  # fmt: skip


@pytest.fixture
def verdicts():
    """Runs the lines named and gives what is not ok, by name."""

    def run(names=FEW):
        checks = [check for check in listed.all_checks() if check.name in names]
        assert len(checks) == len(names)
        with torch.inference_mode():
            rows = list(outcome.run_checks(checks, Bench()))
        return {row.name: row.outcome for row in rows if row.outcome.verdict != outcome.OK}

    return run


def test_everything_is_ok_here_and_nothing_of_the_user_is_told(node, folders, progress_told):
    text = node("AdaStateSelfTest")(speed=False).args[0]
    lines = text.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][2:]
    assert [row for row in rows if row[1] != "ok"] == []
    count = len(rows)
    assert re.fullmatch(rf"AdaState Self Test: {count} of {count} ok, \d+ s", lines[0])
    assert count == len(listed.all_checks(speed=False)) == len({row[0] for row in rows})
    assert {row[0].removeprefix("preset ") for row in rows if row[0].startswith("preset ")} == set(OWN_PRESETS)
    assert f"torch {torch.__version__}" in text and "device: " in text and "pack 0." in text
    for word in (str(Path.home()), str(folders), str(made.PACK)):
        assert word not in text
    assert [(value, total) for value, total, _ in progress_told] == [(i + 1, count) for i in range(count)]
    assert [path for path in folders.rglob("*") if path.is_file()] == []


def test_the_tiny_model_reads_its_past():
    """Else a cache that is wrong would not show: without its anchor a rollout is far more than the bound away."""
    with torch.inference_mode():
        bench = Bench()
        request, _ = benches.long_enough(bench.request("longlive"))
        other, _ = benches.long_enough(bench.request("self_forcing"))
        own = benches.rolled(bench, request)
        plain = benches.rolled(bench, benches.replace(other, length=request.length, window_frames=6))
    assert distance(own.latents, plain.latents) > 50 * rollout_checks.FLOAT_APART


def test_the_tiny_model_that_hears_does_so_and_shows_its_picture(caplog):
    with torch.inference_mode():
        bench = Bench()
        request, frames = benches.long_enough(bench.request("liveavatar"))
        own = benches.rolled(bench, request)
        for changed in (
            {"audio": speech.made_track(benches.SOUND_SECONDS, 1)},
            {"reference": speech.made_reference(1)},
        ):
            other = benches.rolled(bench, benches.replace(request, **changed))
            assert distance(own.latents, other.latents) > 20 * rollout_checks.FLOAT_APART, changed
    assert frames > own.rollout.spec.reference.rolls_at and caplog.messages == []


def test_rollouts_go_two_chunks_past_eviction():
    with torch.inference_mode():
        bench, lengths = Bench(), {}
        for name in OWN_PRESETS:
            request, frames = benches.long_enough(bench.request(name))
            spec = benches.Job(request).spec
            held = spec.anchor.frames - spec.anchor.state_frames + spec.window_frames
            made_before = frames - (2 + spec.blocks - 1) * spec.chunk_frames
            assert held < made_before <= max(held, spec.restart_frames) + spec.chunk_frames
            lengths[name] = frames
    assert lengths["self_forcing"] == 27 and lengths["causal_forcing_frame"] == 23 and lengths["causvid"] == 30


def goes_deaf(monkeypatch):
    original = SpeechModel.hear

    def broken(model, *given):
        original(model, *given)
        model._encoded = tuple(0 * one for one in model._encoded)

    monkeypatch.setattr(SpeechModel, "hear", broken)


def drops_a_key(monkeypatch):
    original = comfy.ldm.wan.model.optimized_attention

    def broken(q, k, v, heads, **more):
        return original(q, k[:, 1:].contiguous(), v[:, 1:].contiguous(), heads=heads, **more)

    monkeypatch.setattr(comfy.ldm.wan.model, "optimized_attention", broken)


def turns_too_far(monkeypatch):
    original = Rope.turned
    monkeypatch.setattr(Rope, "turned", staticmethod(lambda x, turn: original(original(x, turn), turn)))


def forgets_scales(monkeypatch):
    original = eight_bits.unpack

    def broken(packed, scale, heads, out):
        original(packed, None if scale is None else 1.5 * scale, heads, out)

    for module in (eight_bits, stored_cache):
        if hasattr(module, "unpack"):
            monkeypatch.setattr(module, "unpack", broken)
    monkeypatch.setattr("adastate_pack.nodes.self_test.kernel_checks.unpack", broken)


def forgets_frames(monkeypatch):
    monkeypatch.setattr(wan_vae, "_kept", lambda old, new: new * 0 if isinstance(new, torch.Tensor) else new)


def plans_too_little(monkeypatch):
    original = byte_plan.CachePlan.kv_bytes.fget
    monkeypatch.setattr(byte_plan.CachePlan, "kv_bytes", property(lambda plan: original(plan) - 8))


def loses_a_saved_frame(monkeypatch):
    original = rollout_checks.load_state

    def broken(path):
        state = original(path)
        state.cache[0].tensors["values"].zero_()
        return state

    monkeypatch.setattr(rollout_checks, "load_state", broken)


def breaks_down(monkeypatch):
    def broken(*_):
        raise RuntimeError(
            f"CUDA error: no kernel image in {Path.home() / 'secret' / 'kernels.so'} for {getpass.getuser()}"
        )

    monkeypatch.setattr(wan_vae.VaeStream, "step", broken)


FAULTS = {
    goes_deaf: {"preset liveavatar"},
    drops_a_key: {"attention in float32", "preset longlive", "preset liveavatar", "preset adastate"},
    turns_too_far: {"rotation"},
    forgets_scales: {"numbers in int8", "past in int8"},
    forgets_frames: {"decode, full VAE"},
    plans_too_little: {
        "preset longlive",
        "preset liveavatar",
        "preset adastate",
        "past in int8",
        "past in host memory",
    },
    loses_a_saved_frame: {"preset longlive", "preset liveavatar", "preset adastate", "past in host memory"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.sampled(6)
def test_a_fault_is_named_by_its_lines_alone(verdicts, monkeypatch, fault):
    fault(monkeypatch)
    found = verdicts()
    assert set(found) == FAULTS[fault], found
    assert {each.verdict for each in found.values()} == {outcome.DIFFERS}
    for each in found.values():
        assert re.search(r"\d", each.seen), "by how much"


def test_a_failure_is_a_sentence_and_the_next_line_still_runs(verdicts, monkeypatch):
    breaks_down(monkeypatch)
    found = verdicts(("decode, demo's VAE", "decode, full VAE", "decode, tiny VAE"))
    assert set(found) == {"decode, demo's VAE", "decode, full VAE"}
    for each in found.values():
        assert each.verdict == outcome.FAILED
        assert each.seen.startswith("RuntimeError: CUDA error: no kernel image in <path> for ")
        assert "secret" not in each.seen and str(Path.home()) not in each.seen


def test_sentences_lose_paths_and_the_users_name(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "miriam")
    cases = {
        "cannot open '/home/miriam/my films/a.mp4': no space": "cannot open '<path> films/a.mp4': no space",
        r"C:\Users\miriam\x.pt is damaged": "<path> is damaged",
        "~/ComfyUI/out is full": "<path> is full",
        r"\\server\share\x, gone": "<path>, gone",
        "of miriam and 3/4 of 12 KiB/s at a/b": "of <user> and 3/4 of 12 KiB/s at a/b",
    }
    for text, expected in cases.items():
        assert outcome.without_user(text) == expected


def test_an_interrupt_of_the_users_ends_it(interrupt, monkeypatch):
    monkeypatch.setattr(self_test_node, "free_memory", lambda: None)
    started = []

    def check(bench, first):
        started.append(first)
        if not first:
            comfy.model_management.interrupt_current_processing(True)
        return rollout_checks.preset(bench, "adastate")

    checks = [outcome.Check("a", partial(check, first=True)), outcome.Check("b", partial(check, first=False))]
    with torch.inference_mode(), pytest.raises(interrupt):
        list(outcome.run_checks([*checks, checks[0]], Bench()))
    assert started == [True, False]


def test_an_interrupt_that_is_not_its_own_is_not_taken_for_the_checks(interrupt, monkeypatch):
    bench = Bench()
    with torch.inference_mode():
        request, _ = benches.long_enough(bench.request("adastate"))
        comfy.model_management.interrupt_current_processing(True)
        with pytest.raises(interrupt):
            rollout_checks._interrupted(bench, request, 3)


def test_nothing_of_it_stays(node, monkeypatch):
    models = []
    original = made.loaded
    monkeypatch.setattr(made, "loaded", lambda *given: models.append(weakref.ref(m := original(*given))) or m)
    few = [check for check in listed.all_checks(False) if check.name in ("preset adastate", "demo model")]
    monkeypatch.setattr(self_test_node, "all_checks", lambda speed: few)
    assert "2 of 2 ok" in node("AdaStateSelfTest")(speed=False).args[0]
    gc.collect()
    assert models and [ref for ref in models if ref() is not None] == []


def test_the_block_is_of_1_3b_and_its_seconds_are_told(monkeypatch):
    assert (made.ONE_BLOCK.width, made.ONE_BLOCK.feed_forward, made.ONE_BLOCK.layers) == (1536, 8960, 1)
    with torch.device("meta"):
        module = made.ONE_BLOCK.module("meta", torch.float32)
    attention = 4 * (1536**2 + 1536) + 2 * 1536  # with its two norms
    ffn = 2 * 1536 * 8960 + 8960 + 1536
    assert sum(p.numel() for p in module.blocks[0].parameters()) == 2 * attention + ffn + (2 + 6) * 1536
    monkeypatch.setattr(made, "ONE_BLOCK", made.TINY)
    monkeypatch.setattr(other_checks, "SMALLER", (64, 48))
    with torch.inference_mode():
        found = other_checks.block_of_1_3b(Bench())
    assert found.verdict == outcome.OK
    seconds, count, all_blocks = re.match(
        r"([\d.]+) s a pass \(median of (\d)\), ([\d.]+) s for all 30", found.seen
    ).groups()
    assert float(seconds) > 0 and int(count) == other_checks.MOST_PASSES
    assert float(all_blocks) == pytest.approx(30 * float(seconds), abs=0.005 + 30 * 0.00005 + 1e-9)  # both rounded
    assert "64x48, 3 frames on a window of 3, float32" in found.seen


def test_a_table_is_markdown_that_a_bar_does_not_break():
    rows = [
        outcome.Row("a", outcome.Outcome("ok", "1 | 2"), 0.4),
        outcome.Row("b", outcome.Outcome("failed", "x"), 1.0),
    ]
    assert outcome.table(["v"], rows).splitlines() == [
        "AdaState Self Test: 1 of 2 ok, 1 s", "v", "", "| check | result | what was seen |", "| ----- | ------ | --- |",
        "| a     | ok     | 1 / 2 |", "| b     | failed | x |",
    ]  # fmt: skip
