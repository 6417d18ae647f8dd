"""The systems side by side on tiny random weights: measures against other ways to get them, going on after a kill, the page."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from tiny_denoiser import tiny_codec_file, tiny_denoiser

from adastate_core.measure.metrics import measure_video
from adastate_core.weights.presets import preset
from training import compare_systems
from training.bare_model import load_codec
from training.compare_systems import Comparison, table
from training.contenders import Contender
from training.evaluate import evaluation_scenes
from training.kept_streams import read_kept, write_kept
from training.run import Run, read_config
from training.sheets import decoded

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "training" / "configs" / "compare_systems.toml"
CODEC = tiny_codec_file()
DEMO_CODEC = str(ROOT / "models" / "vae" / "adastate_demo_vae.safetensors")
SYSTEMS = ("self_forcing", "rolling_forcing", "adastate")
FILES = ("true_renders", *SYSTEMS)
STREAMS = 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(tiny_denoiser().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def measured(weights, tmp_path_factory) -> Path:
    """A folder with the page and what it is made of, measured in one run."""
    folder = tmp_path_factory.mktemp("systems")
    compare(configured(folder, weights))
    return folder


def configured(folder: Path, weights: Path, same: str = "causal_forcing", **numbers) -> Path:
    """A config of 6 and 12 latents, 21 and 45 pictures, in segments of 6 latents."""
    values = {
        "folder": str(folder), "scratch": str(folder / "scratch"), "seed": 1, "steps": 0, "codec": CODEC,
        "weights": str(weights), "trained_with": "adastate", "scenes_seed": 42_000_000, "streams": STREAMS,
        "segment_latents": 6, "latents": [6, 12], "drawn": 1,
    }  # fmt: skip
    lines = [f"{name} = {json.dumps(value)}" for name, value in (values | numbers).items()]
    lines += ["[systems]", f"others = {json.dumps(SYSTEMS[:-1])}", 'state = ["adastate"]']
    lines += ["[same]", f'{same} = "self_forcing"']
    config = folder / "config.toml"
    config.write_text("\n".join(lines))
    return config


def compare(config: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["compare_systems", "--config", str(config), "--threads", "1"])
        compare_systems.main()


def kept(folder: Path, name: str) -> dict:
    return read_kept(folder / f"{name}.json.gz")["streams"]


def latents_of(folder: Path, name: str, stream: int) -> torch.Tensor:
    return torch.load(folder / "scratch" / f"{name}_{stream}.pt", weights_only=True)["latents"]


def test_the_adaptive_system_is_the_contender_that_the_card_compares(measured, weights):
    """Its latents, by the other way that leads to them."""
    one = Contender("a", str(weights), {"kind": "adaptive", "state_frames": 1}, 3, "fixed")
    scene = evaluation_scenes(STREAMS, 42_000_000)[1]
    [theirs] = one.rolled_out([scene], 2, 12, [range(12)])
    assert torch.equal(latents_of(measured, "adastate", 1), theirs[0])


@torch.no_grad()
@pytest.mark.parametrize("name", SYSTEMS)
def test_measures_are_those_of_the_whole_video(measured, name):
    """Drift, displacement, seam and sharpness of one stream, by the node's measures of its pictures in bytes."""
    codec, latents = load_codec(CODEC), latents_of(measured, name, 0)
    # the late segment is decoded over three latents before it, nine pictures
    video = torch.cat([decoded(codec, latents[:, :6]), decoded(codec, latents[:, 3:])[9:]])
    pictures = list((video * 255).round().byte().numpy())
    assert len(pictures) == 45
    chunk, true = 4 * preset(name).chunk_frames, true_pictures(range(6, 12))
    for segment, start, stop in (("1 s", 0, 21), ("3 s", 21, 45)):
        row = kept(measured, name)["0"][segment]
        node = measure_video(pictures[:stop])["chunks"]
        assert row["drift, dE"] == pytest.approx(node[-1]["drift"], abs=0.05)
        assert row["displacement, px a frame"] == pytest.approx(mean_displacement(pictures[start:stop]), rel=1e-4)
        assert row["seam"] == pytest.approx(seam(pictures, start, stop, chunk), rel=0.02)
    assert row["sharpness, of the true"] == pytest.approx(steps(pictures[21:]) / steps(true), rel=0.02)


def mean_displacement(pictures: list[numpy.ndarray]) -> float:
    """The node's, of pictures taken for one chunk."""
    [chunk] = measure_video(pictures, chunk_frames=1000)["chunks"]
    return chunk["displacement"]


def seam(pictures: list[numpy.ndarray], start: int, stop: int, chunk: int) -> float:
    """Motion into the first picture of every chunk over that into all others, of pictures `start` to `stop` of a whole video."""
    borders = range(chunk - 3, len(pictures), chunk)
    moved = {i: numpy.abs(pictures[i].astype(float) - pictures[i - 1]).mean() for i in range(start + 1, stop)}
    inside = [value for i, value in moved.items() if i not in borders]
    return numpy.mean([value for i, value in moved.items() if i in borders]) / numpy.mean(inside)


def steps(pictures: list[numpy.ndarray]) -> float:
    """The mean step from a pixel to its neighbours."""
    video = numpy.stack(pictures).astype(float)
    return (numpy.abs(numpy.diff(video, axis=1)).mean() + numpy.abs(numpy.diff(video, axis=2)).mean()) / 2


def true_pictures(frames: range) -> list[numpy.ndarray]:
    true = compare_systems.true_segment(load_codec(CODEC), evaluation_scenes(1, 42_000_000)[0], frames)
    return list((true * 255).round().byte().numpy())


def test_true_renders_are_what_they_are_measured_against(weights, tmp_path):
    """Through the demo's own codec: another shows nothing that moves as the world does."""
    config = read_config(configured(tmp_path, weights, streams=1, codec=DEMO_CODEC))
    Comparison(Run(config, tmp_path, False)).measure("true renders", 0)
    for rows in kept(tmp_path, "true_renders").values():
        for row in rows.values():
            assert row["sharpness, of the true"] == row["motion, of the true"] == 1
            assert row["flow error, px a frame"] < 0.1 and row["displacement, px a frame"] > 0


def test_a_killed_run_goes_on_with_the_next_stream_of_the_next_system(measured, weights, tmp_path, monkeypatch):
    config = configured(tmp_path, weights, streams=1)
    command = [sys.executable, "-m", "training.compare_systems", "--config", str(config), "--threads", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "rolling_forcing.json.gz").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {
        (name, stream) for name in FILES if (tmp_path / f"{name}.json.gz").exists() for stream in kept(tmp_path, name)
    }
    assert ("rolling_forcing", "0") in done and len(done) < len(FILES)
    again, measure = [], Comparison.measure

    def counted(comparison: Comparison, name: str, stream: int) -> None:
        again.append((name.replace(" ", "_"), str(stream)))
        measure(comparison, name, stream)

    monkeypatch.setattr(Comparison, "measure", counted)
    compare(config)
    assert again == [one for one in ((name, "0") for name in FILES) if one not in done]
    for name in FILES:
        assert kept(tmp_path, name) == {"0": kept(measured, name)["0"]}
    assert (tmp_path / "systems.md").is_file()


def test_figures_of_other_rules_are_refused(measured, weights, tmp_path):
    for name in FILES:
        (tmp_path / f"{name}.json.gz").write_bytes((measured / f"{name}.json.gz").read_bytes())

    def looked_at(config: Path) -> Comparison:
        return Comparison(Run(read_config(config), tmp_path, False))

    assert "\n".join(table(looked_at(configured(tmp_path, weights)))) + "\n" == (measured / "systems.md").read_text()
    with pytest.raises(ValueError, match=r"true_renders\.json\.gz was measured by other rules .* delete it"):
        looked_at(configured(tmp_path, weights, scenes_seed=7))
    file = tmp_path / "adastate.json.gz"
    write_kept(file, json.dumps(read_kept(file)).replace('"window_frames": 3', '"window_frames": 4'))
    with pytest.raises(ValueError, match=r"adastate\.json\.gz was measured by other rules"):
        looked_at(configured(tmp_path, weights))
    file.unlink()
    with pytest.raises(ValueError, match="causvid does not have the rules of self_forcing"):
        looked_at(configured(tmp_path, weights, "causvid"))


def test_the_page_says_whose_the_weights_are_and_shows_every_system_at_every_time(measured):
    text = (measured / "systems.md").read_text()
    assert "These weights were trained with one of them, AdaState (arXiv 2605.30349)" in text
    told = [tuple(line.split(" | ")[:2]) for line in text.splitlines() if re.match(r"\| .* \| \d s \|", line)]
    titles = ["Self-Forcing; Causal-Forcing, chunk-wise", "Rolling Forcing", "AdaState"]
    rows = [(f"| {title}", at) for title in ("true renders", *titles) for at in ("1 s", "3 s")]
    assert told == rows + [row for row in rows[2:] if row[0] != "| AdaState"]
    cells = {line.split(" | ")[0]: line.split(" | ")[2] for line in text.splitlines() if " | 3 s | " in line}
    drifts = [kept(measured, "rolling_forcing")[stream]["3 s"]["drift, dE"] for stream in ("0", "1")]
    own = [kept(measured, "adastate")[stream]["3 s"]["drift, dE"] for stream in ("0", "1")]
    # the difference stands below the means, under the same title
    assert re.sub(r"\*| \(.*", "", cells["| Rolling Forcing"]) == f"{(sum(own) - sum(drifts)) / 2:+.2f}"
    assert f"| {sum(drifts) / 2:.2f} ({min(drifts):.2f} to {max(drifts):.2f}) |" in text
    assert "- AdaState (preset *adastate*): the steps of training; noise levels 1, 0.9375, 0.8333, 0.625" in text
    assert "- Rolling Forcing (preset *rolling_forcing*): other steps than in training; noise levels 1, 0.9524" in text
    assert sorted(path.name for path in (measured / "scratch").glob("*.png")) == ["sheet_1_s_0.png", "sheet_3_s_0.png"]


def test_the_committed_page_is_that_of_the_committed_figures(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = read_config(CONFIG)
    comparison = Comparison(Run(config, Path(config["folder"]), False))
    text = (comparison.folder / "systems.md").read_text()
    assert text == "\n".join(table(comparison)) + "\n"
    assert len(comparison.systems) == 11 and all(
        len(kept.streams) == config["streams"] for kept in comparison.found.values()
    )


def test_the_demos_weights_were_trained_by_the_rules_that_the_page_says():
    config = read_config(CONFIG)
    own = preset(config["trained_with"])
    with safe_open(ROOT / config["weights"], "pt") as file:
        asked = json.loads(file.metadata()["adastate"])
    rules = own.settings() | {"state_frames": own.anchor.state_frames}
    assert {name: rules[name] for name in asked if name in rules} == {
        n: v for n, v in asked.items() if n != "fingerprints"
    }
