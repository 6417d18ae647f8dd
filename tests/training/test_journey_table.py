"""The journey's page on tiny random weights: what is the same comes out the same, and what is kept is not measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_denoiser import tiny_denoiser

from training import journey_table
from training.handover import rewritten
from training.journey_streams import DAYS, DISTANCE, Streams
from training.kept_streams import read_kept

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "training" / "configs" / "journey" / "table_teacher.toml"
ANCHORS = {
    "adaptive": ({"kind": "adaptive", "state_frames": 1}, 3),
    "the same": ({"kind": "adaptive", "state_frames": 1}, 3),
    "static": ({"kind": "static", "sink_frames": 1}, 3),
    "EMA": ({"kind": "ema", "sink_frames": 1, "decay": 0.999}, 3),
}


def toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("journey")
    torch.save(tiny_denoiser().state_dict(), path / "model.pt")
    values = {
        "like": str(TEACHER), "folder": str(path / "out"), "scratch": str(path / "scratch"), "horizon_latents": 3, "streams": 2,
        "lengths": [2, 3], "share_streams": 1, "drawn": 1, "compared": [["adaptive", "the same", "static", "EMA"]],
        "pictured": ["true renders", "adaptive"], "pictured_streams": 1,
    }  # fmt: skip
    lines = [f"{name} = {toml(value)}" for name, value in values.items()]
    for name, (anchor, window) in ANCHORS.items():
        entry = {"name": name, "weights": str(path / "model.pt"), "anchor": anchor, "window_frames": window}
        lines += ["[[contenders]]"] + [f"{k} = {toml(v)}" for k, v in entry.items()]
    (path / "config.toml").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        make(patch, path)
    return path


def make(patch: pytest.MonkeyPatch, path: Path) -> str:
    patch.setattr("sys.argv", ["journey_table", "--config", str(path / "config.toml"), "--threads", "1"])
    patch.chdir(ROOT)
    journey_table.main()
    return (path / "out" / "table_teacher.md").read_text()


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.float32)


def kept(folder: Path, name: str) -> dict:
    return read_kept(folder / "out" / f"{name}_3x.json.gz")["streams"]


def test_the_page_has_every_part_and_the_same_is_the_same(folder):
    text = (folder / "out" / "table_teacher.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| the same | ") and "+0.00" in line]
    assert len(rows) == 2 and all("**" not in row for row in rows)
    true = next(line for line in text.splitlines() if line.startswith("| true renders | 3x"))
    assert all(part.strip().startswith(("1.0", "0.9")) for part in true.split("|")[11:13]), "motion and sharpness"
    assert "| static | of the context |" in text and "| adaptive | state's error, dE |" in text and "nan" not in text
    assert (folder / "out" / "table_teacher.png").stat().st_size > 10_000
    assert len(list((folder / "scratch").glob("adaptive_3x_*.png"))) == 1
    sheets = [Image.open(folder / "scratch" / f"{name}_3x_0.png") for name in ("true_renders", "adaptive")]
    streams = Image.open(folder / "out" / "table_teacher_streams.png")
    rows = [
        streams.crop((0, top, one.width, top + one.height))
        for one, top in zip(sheets, (0, sheets[0].height), strict=True)
    ]
    for number, row in enumerate(rows):
        apart = [float((pixels(row) - pixels(one)).abs().mean()) for one in sheets]
        assert apart[number] < min(6, apart[1 - number] / 2), "one below the other, in 256 colours"


def test_distance_and_day_are_off_to_either_side():
    rows = [journey_table.with_errors({DISTANCE: distance, DAYS: 1.25}) for distance in (0.5, 1.5)]
    assert [row[journey_table.DISTANCE_OFF] for row in rows] == [0.5, 0.5] and rows[0][journey_table.DAY_OFF] == 0.25


def test_anchors_are_what_they_show(folder):
    static, adaptive, ema = (kept(folder, name)["0"] for name in ("static", "adaptive", "EMA"))
    series = static["series"]
    assert series["anchor's picture, dE"] == series["to the first picture, dE"]
    own = adaptive["series"]
    assert own["anchor's picture, dE"] != own["to the first picture, dE"] and min(own["state's error, dE"]) > 0
    blended = ema["series"]["anchor's picture, dE"]
    assert json.dumps(blended) == json.dumps([float("nan")] * 3), "blended keys and values have no picture"
    codec = [one["content's error, dE"][0] for one in (series, own, ema["series"])]
    assert max(codec) - min(codec) < 1e-4 and codec[0] < 8, "the first chunk is given"


def test_shares_are_of_all_and_of_the_context(folder):
    found = kept(folder, "adaptive")["0"]["shares"]
    assert len(found["of all"]) == 3 and found["of the context"][0] == {}
    last, context = found["of all"][-1], found["of the context"][-1]
    assert sum(last.values()) == pytest.approx(1, abs=1e-4)
    assert sum(context.values()) == pytest.approx(1, abs=1e-4)
    assert set(context) == {name for name in last if name.startswith(("anchor", "past"))}
    assert context["anchor 0"] == pytest.approx(last["anchor 0"] / sum(last[name] for name in context), rel=0.05)


def test_nothing_is_measured_twice_nor_by_other_weights(folder, monkeypatch):
    def never(*_arguments):
        raise AssertionError("what is in the folder is not measured again")

    text = (folder / "out" / "table_teacher.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(Streams, "measured", never)
        assert make(patch, folder) == text
        weights = (folder / "model.pt").read_bytes()
        rewritten(folder / "model.pt", folder / "model.pt", torch.bfloat16)
        assert make(patch, folder) == text, "handed on, they are the same weights"
        (folder / "model.pt").unlink()
        assert make(patch, folder) == text, "the weights may be gone"
        torch.save(tiny_denoiser(4).state_dict(), folder / "model.pt")
        with pytest.raises(ValueError, match="measured by other rules or weights"):
            make(patch, folder)
        (folder / "model.pt").write_bytes(weights)
