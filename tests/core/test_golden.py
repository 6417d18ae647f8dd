"""Files of older versions still load and go on as they did, or are refused in the sentence that their manifest names."""

from __future__ import annotations

import json
from typing import Any

import av
import pytest
import torch
from golden import assert_same_latents, entries, taken_or_refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_video_sink import decoded, moving
from tiny_model import TinyModel

from adastate_core.absorption.saved import load_solution, solution_from
from adastate_core.absorption.settings import settings_from
from adastate_core.anchors import anchor_from
from adastate_core.cache.specs import layer_from as LayerPlan
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.rollout import ModelGeometry, Rollout, RolloutSpec, Settings
from adastate_core.schedules.schedule import Schedule
from adastate_core.states.state_file import load_state
from adastate_core.video.sink import VideoSink


def spec_from(described: dict[str, Any]) -> RolloutSpec:
    """The spec that a manifest describes."""
    layers, absorption = described["layers"], described["absorption"]
    parts = {
        "geometry": ModelGeometry(**described["geometry"]),
        "anchor": anchor_from(described["anchor"]),
        "dtype": getattr(torch, described["dtype"]),
        "layers": None if layers is None else tuple(LayerPlan(**one) for one in layers),
        "absorption": None if absorption is None else settings_from(absorption),
    }
    return RolloutSpec(**(described | parts))


def context(seed: int) -> torch.Tensor:
    return torch.randn(1, 5, TinyModel.TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def rollout_of(entry: dict[str, Any], **inputs: Any) -> Rollout:
    """The rollout that a manifest's entry describes."""
    spec, prompts = spec_from(entry["spec"]), None
    if "prompts" in entry:
        changes = [PromptChange(one["frame"], context(one["seed"]), one["transition"]) for one in entry["prompts"]]
        prompts = PromptPlan(changes, spec.chunk_frames)
    settings = Settings(entry["seed"], Schedule(tuple(entry["sigmas"])))
    keep = entry["keep_latents"]
    return Rollout(TinyModel(), spec, settings, keep_latents=keep, prompts=prompts, **inputs)


def go_on(entry: dict[str, Any], expected: dict[str, torch.Tensor], **inputs: Any) -> Rollout:
    """Roll on to the entry's length, and compare what comes with what was recorded."""
    rollout, rounding = rollout_of(entry, **inputs), (entry.get("rounding"), entry["spec"]["dtype"] == "float32")
    found = torch.cat([chunk.latents for chunk in rollout.chunks(entry["length"])], 2)
    assert_same_latents(found, expected["latents"], *rounding)
    for name, held in (("hidden", rollout.snapshot().hidden), ("kept", rollout.kept_latents)):
        assert (held is None) == (name not in expected), name
        if held is not None:
            assert_same_latents(held, expected[name], *rounding)
    return rollout


def assert_same_measurements(found: list[dict[str, Any]], expected: list[dict[str, Any]], rounded: bool) -> None:
    """The absorption's monitor as recorded; of caches that round only the residuals, and those nearly."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        near = pytest.approx(other["residual"], rel=0.05 if rounded else 1e-3)
        assert one["residual"] == near and (one["frame"], one["layer"]) == (other["frame"], other["layer"])
        if not rounded:
            assert one["refreshed"] == other["refreshed"]
            assert one["discrepancy"] == pytest.approx(other["discrepancy"], rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("golden", entries("states"))
def test_a_state_goes_on(golden):
    folder, entry = golden
    with taken_or_refused(entry):
        state = load_state(folder / entry["state"])
        assert (state.emitted, state.latents is not None) == (entry["stop"], entry["keep_latents"])
        rollout = go_on(entry, load_file(folder / entry["expected"]), state=state)
        absorber = rollout.absorber
        assert (absorber is None) == ("absorption" not in entry)
        if absorber is not None:
            report, told = absorber.report(), entry["absorption"]
            assert state.absorption["phase"] == told["phases"][0]
            assert (report["phase"], report["layers"]) == (told["phases"][1], told["layers"])
            assert_same_measurements(report["monitor"], told["monitor"], "rounding" in entry)


@torch.no_grad()
@pytest.mark.parametrize("golden", entries("absorptions"))
def test_an_absorption_drives_a_rollout(golden):
    folder, entry = golden
    with taken_or_refused(entry):
        settings, belongs_to, saved = load_solution(folder / entry["absorption"])
        spec = spec_from(entry["spec"])
        assert settings == spec.absorption and belongs_to == entry["belongs_to"]
        geometry = spec.geometry
        width = geometry.heads * geometry.head_dim
        solution = solution_from(saved, settings, geometry.layers, width, geometry.heads)
        rollout = go_on(entry, load_file(folder / entry["expected"]), solution=solution)
        assert rollout.absorber.report()["phase"] == "switched"


def assert_pictures_near(found: list[torch.Tensor], expected: torch.Tensor) -> None:
    """uint8 [T, H, W, 3]; decoders agree, but ways to turn their colours into RGB round differently."""
    assert len(found) == len(expected)
    assert (torch.stack(found).int() - expected.int()).abs().max() <= 3


@pytest.mark.parametrize("golden", entries("videos"))
def test_a_video_plays(golden):
    folder, entry = golden
    expected = load_file(folder / entry["expected"])["frames"][: entry["frames"]]
    assert_pictures_near(decoded(folder / entry["video"]), expected)
    assert (expected.float() - moving(entry["frames"], size=entry["width"]).float()).abs().mean() < 6
    with av.open(str(folder / entry["video"])) as container:
        assert container.streams.video[0].average_rate == entry["fps"]
        told = {name: container.metadata[name] for name in entry["metadata"]}
        told["workflow"] = json.loads(told["workflow"])
    assert told == entry["metadata"]
    assert (b"moof" in (folder / entry["video"]).read_bytes()) != entry["finished"]


@pytest.mark.parametrize("golden", entries("videos"))
def test_a_video_can_be_joined_to(golden, tmp_path):
    folder, entry = golden
    before, numbers = 9, {name: entry[name] for name in ("width", "height", "fps", "quality")}
    with taken_or_refused(entry):
        with VideoSink(tmp_path / "a.mp4", **numbers, prefix=folder / entry["video"], prefix_frames=before) as sink:
            sink.write(moving(12, before, entry["width"]))
        frames = decoded(tmp_path / "a.mp4")
        assert_pictures_near(frames[:before], load_file(folder / entry["expected"])["frames"][:before])
        added = moving(12, before, entry["width"]).float()
        assert (torch.stack(frames[before:]).float() - added).abs().mean() < 6


def named(kind: str, name: str) -> tuple[Any, dict[str, Any]]:
    return next(one.values[0] for one in entries(kind) if one.values[0][1]["name"] == name)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["none_packed", "rolling_3", "absorption_switched", "int8_gpu_none", "bfloat16", "keep_latents"]
)
def test_the_comparison_sees_what_a_state_holds(name, tmp_path):
    """A state that goes on otherwise does not pass for the one that was recorded."""
    folder, entry = named("states", name)
    expected = load_file(folder / entry["expected"])
    with safe_open(folder / entry["state"], "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    values = tensors["cache.1.values"]
    changed = tensors | {"cache.1.values": (values.float() * 0.9).to(values.dtype)}
    save_file(changed, tmp_path / "changed.safetensors", metadata=metadata)
    with pytest.raises(AssertionError):
        go_on(entry, expected, state=load_state(tmp_path / "changed.safetensors"))
    state = load_state(folder / entry["state"])
    with pytest.raises(AssertionError):
        go_on(entry | {"seed": entry["seed"] + 1}, expected, state=state)
    short = tmp_path / "short.safetensors"
    save_file({k: v[:, :, 1:].contiguous() for k, v in expected.items()}, short)
    with pytest.raises(AssertionError):
        go_on(entry, load_file(short), state=state)


def test_a_file_that_a_manifest_calls_refused_has_to_be(tmp_path):
    folder, entry = named("states", "none_packed")
    cut = tmp_path / entry["state"]
    cut.write_bytes((folder / entry["state"]).read_bytes()[:-9])
    told = entry | {"refused": "cannot be read as a rollout state"}
    with taken_or_refused(told):
        load_state(cut)
    with pytest.raises(pytest.fail.Exception), taken_or_refused(told):
        load_state(folder / entry["state"])
    with pytest.raises(ValueError, match="cannot be read"), taken_or_refused(entry):
        load_state(cut)
