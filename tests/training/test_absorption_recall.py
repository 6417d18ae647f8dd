"""Recall after absorption on tiny random weights: going on after a kill, the shared warm-up, the controls, 8 bits, the choice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_denoiser import tiny_codec_file, tiny_denoiser
from torch import nn

from training import absorption_recall, layer_check_table, recall_table
from training.absorption_recall import Recall
from training.checked_models import CheckedModel, check
from training.eight_bits import EightBitLinear
from training.kept_streams import Kept, read_kept
from training.layer_check import rank_correlation, smallest
from training.returning_lantern import colours_of, teacher_file
from training.run import Run, read_config
from training.sheets import decoded

ROOT = Path(__file__).resolve().parents[2]
CODEC = tiny_codec_file()
CHECK = """
[check]
scenes_seed = 44_000_000
seed = 2
chunks = 2
[[check.models]]
name = "the teacher"
streams = 1
closed_streams = 1
[plots]
"two" = ["full history", "absorbed, every layer"]
"""
ROWS = """
[shown]
returning = { before = [1, 3], asked = [5] }
[absorption]
ratio = 0.5
warmup_frames = 12
local_window_frames = 1
sink_frames = 0
select = "sensitivity"
[[rows]]
name = "full history"
[[rows]]
name = "nothing switched"
absorption = { ratio = 0.0 }
[[rows]]
name = "dropped, every layer"
absorption = { ratio = 1.0, absorb = false }
[[rows]]
name = "absorbed, every layer"
absorption = { ratio = 1.0 }
[[rows]]
name = "put in"
absorption = { ratio = 1.0 }
donor = "absorbed, every layer"
[[rows]]
name = "8 bits"
eight_bits = true
streams = 1
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(tiny_denoiser().state_dict(), path)
    return path


def configured(folder: Path, weights: Path) -> Path:
    folder.mkdir(exist_ok=True)
    values = {
        "folder": str(folder / "results"), "scratch": str(folder / "scratch"), "weights": str(weights), "codec": CODEC, "seed": 1,
        "steps": 0, "scenes_seed": 43_000_000, "streams": 2, "together": 2, "sampler_steps": 2, "shift": 5.0, "window_frames": 9,
        "chunks": 6, "judge_streams": 4, "pictured": 1, "file": "config.toml",
        "near": [["full history", "absorbed, every layer"]],
    }  # fmt: skip
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    lines.append(CHECK)
    config = folder / "config.toml"
    config.write_text("\n".join(lines) + ROWS)
    return config


def measure(config: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["absorption_recall", "--config", str(config), "--threads", "1"])
        absorption_recall.main()


@pytest.fixture(scope="module")
def measured(weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recall")
    measure(configured(folder, weights))
    return folder


@pytest.fixture(scope="module")
def recall(measured) -> Recall:
    config = read_config(measured / "config.toml")
    return Recall(Run(config, Path(config["folder"]), False))


def streams(folder: Path, name: str) -> dict:
    return read_kept(folder / "results" / f"{name}.json.gz")["streams"]


def latents(folder: Path, name: str, stream: int) -> torch.Tensor:
    return torch.load(folder / "scratch" / f"{name}_{stream}_latents.pt", weights_only=True)["values"]["latents"]


def test_a_run_that_was_cut_goes_on_to_the_same_page(measured, weights, tmp_path, monkeypatch):
    config, keep, times = configured(tmp_path, weights), Kept.keep, []

    def cut(self: Kept, stream: int, found: dict) -> None:
        times.append(stream)
        if len(times) == 4:
            raise KeyboardInterrupt
        keep(self, stream, found)

    monkeypatch.setattr(Kept, "keep", cut)
    with pytest.raises(KeyboardInterrupt):
        measure(config)
    assert times == [0, 0, 0, 0] and not (tmp_path / "results" / "recall.md").exists()
    measure(config)
    for name in ("recall.md", "absorbed_every_layer.json.gz", "put_in.json.gz", "check_the_teacher.json.gz"):
        assert (tmp_path / "results" / name).read_bytes() == (measured / "results" / name).read_bytes()


def test_rows_that_share_a_warm_up_are_the_rows_rolled_out_alone(measured, recall):
    """And what switches nothing is the full history, what drops is not, and a correction of another stream is another video."""
    full, absorbed = (
        next(r for r in recall.rows if r.name == name) for name in ("full history", "absorbed, every layer")
    )
    scene = recall.scenes["returning"][1]
    with torch.no_grad():
        alone = recall.roller(absorbed).gone_on(absorbed, scene, 1, absorbed.settings(recall.config))[0]
        plain = recall.roller(full).gone_on(full, scene, 1, None)[0]
    assert torch.equal(alone, latents(measured, "absorbed_every_layer", 1))
    torch.testing.assert_close(plain, latents(measured, "full_history", 1), atol=1e-3, rtol=1e-3)
    assert torch.equal(latents(measured, "full_history", 1), latents(measured, "nothing_switched", 1))
    after = {name: latents(measured, name, 1)[:, 12:] for name in ("full_history", "dropped_every_layer", "put_in")}
    assert not torch.allclose(after["full_history"], after["dropped_every_layer"], atol=1e-3)
    assert not torch.allclose(after["put_in"], alone[:, 12:], atol=1e-5)


def test_another_streams_correction_is_that_streams(measured):
    """The control says whose colour came by the same judge, and leaves a stream out that has no neighbour of another colour."""
    own = [streams(measured, "absorbed_every_layer")[str(i)] for i in (0, 1)]
    put = [streams(measured, "put_in")[str(i)] for i in (0, 1)]
    if own[0]["own"] == own[1]["own"]:
        assert all("left_out" in one for one in put)
    else:
        assert [one["donor"] for one in put] == [own[1]["own"], own[0]["own"]]
        assert [one["layers"] for one in put] == [[0, 1], [0, 1]]


def test_a_figure_is_what_the_latents_say(measured, recall):
    kept, made = streams(measured, "dropped_every_layer")["0"], latents(measured, "dropped_every_layer", 0)
    full = latents(measured, "full_history", 0)
    assert kept["came"] == colours_of(recall.judge, made, [5]) and kept["recall"] == float(
        kept["came"] == [kept["own"]]
    )
    assert kept["to_full"][5] == pytest.approx((made - full)[:, 15:18].square().mean().item(), rel=1e-5)
    assert max(kept["to_full"][:4]) < 1e-10
    assert list(streams(measured, "8_bits")) == ["0"]


def test_pictures_are_those_of_the_latents_that_were_kept(measured, recall):
    """They lie by themselves: to look again, where latents are gone, changes nothing of what was measured before."""
    kept = streams(measured, "pictures_full_history")
    assert list(kept) == ["0"] and list(streams(measured, "pictures_8_bits")) == ["0"]
    video = decoded(recall.codec, latents(measured, "full_history", 0))
    series = kept["0"]["sharpness by chunk"]
    own = 0.5 * (video.diff(dim=2).abs().mean((1, 2, 3)) + video.diff(dim=1).abs().mean((1, 2, 3)))
    assert len(series) == 2 and series[-1] == pytest.approx(own[-12:].mean().item(), rel=2e-2)
    assert 0 < kept["0"]["temporal flickering"] < 1
    before = (measured / "results" / "full_history.json.gz").read_bytes()
    (measured / "scratch" / "full_history_0_latents.pt").unlink()
    (measured / "results" / "pictures_full_history.json.gz").unlink()
    with torch.no_grad():
        again = Recall(Run(recall.config, measured / "results", False))
        again.look(again.rows[:1], 0)
    for name in ("sharpness by chunk", "sky by chunk"):
        assert again.pictures["full history"].streams["0"][name] == pytest.approx(kept["0"][name], rel=1e-3)
    assert (measured / "results" / "full_history.json.gz").read_bytes() == before


def test_quality_over_time_is_drawn(measured):
    with Image.open(measured / "results" / "over_time.png") as picture:
        assert len(picture.convert("L").getcolors()) > 10


def test_both_loops_of_a_layer_alone_begin_alike_and_then_part(measured):
    """The first chunk behind the switch has the full history's past in both. One comes from a trial, one from a real switch."""
    found = read_kept(measured / "results" / "check_the_teacher.json.gz")["streams"]["0"]
    for way in ("dropped", "corrected"):
        opened, closed = torch.tensor(found[f"open {way}"]), torch.tensor(found[way])
        assert opened.shape == closed.shape == (2, 2) and (opened[:, 0] > 1e-9).all()
        torch.testing.assert_close(opened[:, 0], closed[:, 0], rtol=3e-4, atol=0)
        assert ((opened[:, 1] - closed[:, 1]).abs() > 1e-3 * closed[:, 1]).all()
    assert found["sensitivity"] != found["uncorrected sensitivity"] and found["moved"] > 0


def test_history_moves_a_sharpened_random_model(weights, tmp_path):
    settings = {"warmup_frames": 12, "local_window_frames": 1, "sink_frames": 0, "ratio": 0.5}
    config = {
        "absorption": settings, "sampler_steps": 2, "shift": 5.0, "window_frames": 9, "judge_streams": 4, "scenes_seed": 1,
        "check": {"scenes_seed": 44_000_000, "seed": 2, "chunks": 1},
    }  # fmt: skip
    moved = {}
    for name, scales in (("plain", {"norms": 1.0, "output": 1.0}), ("sharp", {"norms": 2.0, "output": 8.0})):
        one = CheckedModel(name, 1, 0, seed=5, sharpened=scales, lanterns=False)
        with torch.no_grad():
            moved[name] = check(one, config, weights, "", None, tmp_path)[0]["moved"]
    assert moved["sharp"] > 4 * moved["plain"] and moved["sharp"] > 0.01


def test_agreement_is_told_of_both_choices():
    stream = {
        "moved": 0.1, "recall": 1.0, "dropped, recall": [1.0, 0.0, 1.0], "corrected, recall": [1.0, 1.0, 1.0],
        "sensitivity": [1.0, 3.0, 2.0], "chosen": [0], "uncorrected sensitivity": [3.0, 1.0, 2.0], "uncorrected chosen": [1],
        **{name: [[1.0], [3.0], [2.0]] for name in ("open dropped", "open corrected", "dropped", "corrected")},
    }  # fmt: skip
    lines = layer_check_table.check_lines("it", [stream])
    found = next(line for line in lines if line.startswith("| open loop, dropped, all chunks"))
    assert found.endswith("| 1 | 1.00 | 1 of 1 | 1.00, the same layers | -1.00 | 0 of 1 | -1.00, other layers |")
    assert any(
        "Layer 1 carries the lantern" in line and "100% tried corrected, 0% tried uncorrected" in line for line in lines
    )


def test_measurements_of_other_rules_are_refused(measured):
    config = read_config(measured / "config.toml") | {"shift": 3.0}
    with pytest.raises(ValueError, match="full_history.json.gz was measured by other rules"):
        Recall(Run(config, Path(config["folder"]), False))


def test_without_history_the_teacher_is_asked_for(tmp_path):
    with pytest.raises(SystemExit, match=r"has no git history that holds it.*--weights FILE"):
        teacher_file(tmp_path / "teacher.safetensors", tmp_path)


@pytest.mark.parametrize("width", [96, 2048])
def test_eight_bits_are_those_of_whole_number_arithmetic(width):
    torch.manual_seed(0)
    linear, x = nn.Linear(width, 8), torch.randn(2, 3, width)
    weight, activations = linear.weight.detach(), x.double()
    scales = weight.abs().amax(1) / 127, (x.abs().amax(-1) / 127)
    whole = (weight / scales[0][:, None]).round().long(), (x / scales[1][..., None]).round().long()
    expected = (whole[1] @ whole[0].T).double() * scales[1][..., None].double() * scales[
        0
    ].double() + linear.bias.double()
    made = EightBitLinear(linear)(x).double()
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-6)
    plain = activations @ weight.double().T + linear.bias.detach().double()
    assert 1e-4 < (made - plain).norm() / plain.norm() < 2e-2


def test_agreement_of_orders():
    assert rank_correlation([1.0, 5.0, 3.0], [10.0, 30.0, 20.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 5.0, 3.0], [30.0, 10.0, 20.0]) == pytest.approx(-1)
    assert smallest([3.0, 0.5, 9.0, 1.0], 2) == [1, 3]


def test_few_streams_without_a_loss_are_not_called_near_lossless(recall, monkeypatch):
    """Equal values have a bootstrap interval without width; what so few streams cannot rule out is told instead."""
    told = {}
    for count in (12, 100):
        monkeypatch.setattr(recall_table, "paired", lambda *_, count=count: [0.0] * count)
        told[count] = recall_table.verdicts(recall)[0]
    assert "a loss in 26% of all" in told[12] and told[100].endswith("100 streams: near-lossless.")
    monkeypatch.setattr(recall_table, "paired", lambda *_: [0.0, 0.0, 0.2] * 40)
    assert "the interval is not below" in recall_table.verdicts(recall)[0]
