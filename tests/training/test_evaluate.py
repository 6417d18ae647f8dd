"""The comparison on tiny random weights: what is the same comes out the same, and what is known is found."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_denoiser import tiny_codec_file, tiny_denoiser

from training import evaluate
from training.bare_model import load_codec
from training.codec import encode_clip
from training.contenders import Contender
from training.evaluate import evaluation_scenes, interval
from training.recall import COLOURS, ColourJudge, encoded, exchanged, lantern_scenes
from training.world import CHUNK_LATENTS

CODEC = tiny_codec_file()
DEMO_CODEC = str(Path(__file__).resolve().parents[2] / "models" / "vae" / "adastate_demo_vae.safetensors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    model = tiny_denoiser()
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(model.state_dict(), path)
    return str(path)


def contender(weights: str, kind: str, **numbers) -> dict:
    window = 4 if kind == "none" else 3
    return {"weights": weights, "anchor": {"kind": kind} | numbers, "window_frames": window}


def toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


def test_the_comparison_of_a_model_with_itself_finds_nothing(weights, monkeypatch, tmp_path):
    entries = {
        "one": contender(weights, "adaptive", state_frames=1),
        "the same": contender(weights, "adaptive", state_frames=1),
        "other": contender(weights, "none"),
    }
    config = {
        "folder": str(tmp_path), "scratch": str(tmp_path), "seed": 1, "steps": 0,
        "codec": CODEC, "horizon_latents": 6, "scenes_seed": 40_000_000,
        "recall_streams": 2, "recall_gap": 1, "rollouts": [[[1, 2], 2]],
        "compared": [["one", "the same", "other"]],
    }  # fmt: skip
    lines = [f"{name} = {toml(value)}" for name, value in config.items()]
    for name, entry in entries.items():
        lines += ["[[contenders]]", f"name = {json.dumps(name)}"] + [f"{k} = {toml(v)}" for k, v in entry.items()]
    (tmp_path / "config.toml").write_text("\n".join(lines))
    monkeypatch.setattr("sys.argv", ["evaluate", "--config", str(tmp_path / "config.toml"), "--threads", "1"])
    evaluate.main()
    text = (tmp_path / "comparison.md").read_text()
    same = [line for line in text.splitlines() if line.startswith("| the same | ") and "+0.00" in line]
    assert len(same) == 2 and all("**" not in line for line in same)
    one, again, other = (json.loads((tmp_path / f"{n}_2x_2.json").read_text()) for n in ("one", "the_same", "other"))
    assert json.dumps(one) == json.dumps(again) != json.dumps(other)
    recalled = json.loads((tmp_path / "one_recall.json").read_text())
    assert recalled["own"].keys() == {"0", "1"} and "swapped anchor: donor" in recalled
    assert json.loads((tmp_path / "other_recall.json").read_text()).keys() == {"own"}
    assert "A + W + F = 7" in text and len(list(tmp_path.glob("one_2x_*.png"))) == 2

    def never(*_arguments):
        raise AssertionError("what is in the folder is not computed again")

    monkeypatch.setattr(Contender, "rolled_out", never)
    evaluate.main()
    assert (tmp_path / "comparison.md").read_text() == text


def test_contenders_see_the_same_content_noise(weights):
    scenes, keep = evaluation_scenes(1, 5), [range(0, 3), range(3, 6)]
    first = [
        Contender("a", **contender(weights, kind, **numbers)).rolled_out(scenes, 1, 6, keep)
        for kind, numbers in (("adaptive", {"state_frames": 1}), ("none", {}), ("static", {"sink_frames": 1}))
    ]
    assert torch.equal(first[1][0], first[2][0]), "without a past there is no anchor to differ in"
    assert not torch.allclose(first[1][1], first[2][1])
    assert not torch.allclose(first[0][0], first[1][0]), "a state is there from the first chunk on"


def test_the_judge_knows_true_lanterns_and_neighbours_differ():
    encoder = partial(encode_clip, load_codec(DEMO_CODEC))
    known = encoded(lantern_scenes(8, 7, 2), 2, encoder)
    asked = encoded(lantern_scenes(8, 900, 2), 2, encoder)
    shown = slice(CHUNK_LATENTS, 2 * CHUNK_LATENTS)
    judge = ColourJudge(known[0][:, :, shown], known[2])
    assert torch.equal(judge(asked[0][:, :, shown]), asked[2])
    assert (asked[2] != asked[2].roll(1)).all() and set(asked[2].tolist()) == set(range(len(COLOURS)))


@torch.no_grad()
def test_an_exchanged_past_comes_back(weights):
    student = Contender("a", **contender(weights, "adaptive", state_frames=1)).student()
    clips = torch.randn(2, 16, 3, 4, 4)
    session = student.session(clips)
    session.place()
    words = torch.zeros(2, 4, dtype=torch.long)
    student.velocity(torch.randn(2, 16, 4, 4, 4), torch.zeros(2), student.context(words), session)
    session.commit(3)
    before = session.layers[0].anchor[0].key
    with exchanged(session, "anchor"):
        assert torch.equal(session.layers[0].anchor[0].key, before.flip(0))
    assert session.layers[0].anchor[0].key is before


def test_intervals_hold_the_mean_and_leave_out_what_could_not_be_told():
    mean, low, high = interval([1.0, 2.0, 3.0, math.nan])
    assert mean == 2.0 and 1.0 <= low < 2.0 < high <= 3.0
    assert all(math.isnan(v) for v in interval([math.nan]))
