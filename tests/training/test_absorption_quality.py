"""Quality of absorbed rollouts on tiny random weights: what is the same measures as the same, and only after the switch differs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_denoiser import tiny_codec_file, tiny_denoiser

from training import absorption_quality
from training.absorption_quality import chunk_flicker, nearness
from training.kept_streams import read_kept, write_kept

CODEC = tiny_codec_file()
ENTRY = 'weights = "{weights}"\nanchor = {{ kind = "none" }}\nwindow_frames = 9\npositions = "packed"\n'
SWITCH = "warmup_frames = 12, local_window_frames = 1, monitor_layers = -1, monitor_chunks = 1"
ABSORPTIONS = {
    "full": "",
    "nobody": f"absorption = {{ ratio = 0.0, {SWITCH} }}",
    "no absorb": f"absorption = {{ ratio = 1.0, absorb = false, {SWITCH} }}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("quality")
    torch.save(tiny_denoiser().state_dict(), made / "model.pt")
    measure(made, "plain")
    return made


def measure(folder: Path, name: str, more: str = "", contenders=None) -> None:
    """Run the stage into folder/name, with all contenders or some of them."""
    text = (
        f'folder = "{folder / name}"\nscratch = "{folder / name}"\nseed = 1\nsteps = 0\ncodec = "{CODEC}"\n'
        f"scenes_seed = 41000000\nstreams = 2\nsegment_latents = 4\nlatents = [12, 18]\n{more}\n"
    )
    for contender, absorption in (contenders or ABSORPTIONS).items():
        entry = ENTRY.format(weights=folder / "model.pt")
        text += f'[[contenders]]\nname = "{contender}"\n{entry}{absorption}\n'
    config = folder / f"{name}.toml"
    config.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["absorption_quality", "--config", str(config), "--threads", "1"])
        absorption_quality.main()


def found(folder: Path, name: str) -> dict[str, dict]:
    """What the stage kept, by contender."""
    return {n: read_kept(folder / name / f"{n.replace(' ', '_')}.json.gz") for n in ABSORPTIONS}


def test_what_switches_nothing_equals_full_history_and_what_switches_differs_only_afterwards(folder):
    measured = found(folder, "plain")
    for name in ("full", "nobody"):
        for rows in measured[name]["rows"].values():
            for row in rows:
                assert row["PSNR to full, dB"] == 100
                assert row["SSIM to full"] == pytest.approx(1, abs=1e-5)
    cut = measured["no absorb"]
    before, after = (cut["rows"][s][0]["PSNR to full, dB"] for s in ("3 s", "4 s"))
    assert before == 100 and after < 60
    assert cut["reports"][0]["layers"] == [0, 1]
    assert {e["residual"] == e["discrepancy"] for e in cut["reports"][0]["monitor"]} == {True}
    table = (folder / "plain" / "quality.md").read_text()
    told = [line.split(" | ")[:2] for line in table.splitlines() if line.startswith("| ")][2:]
    assert told == [["| full", "3 s"], ["| full", "4 s"], ["| no absorb", "4 s"]] and "balloon found" in table
    assert (folder / "plain" / "quality.png").stat().st_size > 1000


def test_other_words_from_a_frame_on_change_only_what_follows(folder):
    measure(folder, "changed", "change_at = 15", {name: ABSORPTIONS[name] for name in ("full", "no absorb")})
    one, other = (torch.load(folder / f / "full_0.pt", weights_only=True)["latents"] for f in ("plain", "changed"))
    assert torch.equal(one[:, :, :15], other[:, :, :15])
    assert not torch.allclose(one[:, :, 15:], other[:, :, 15:], atol=1e-3)


def test_measurements_are_not_made_twice(folder):
    kept = folder / "plain" / "no_absorb.json.gz"
    before = kept.read_bytes()
    write_kept(kept, json.dumps(read_kept(kept)).replace('"layers": [0, 1]', '"layers": [7]'))
    measure(folder, "plain")
    assert found(folder, "plain")["no absorb"]["reports"][0]["layers"] == [7]
    kept.write_bytes(before)


def test_differences_are_taken_stream_by_stream():
    rows = {name: {"rows": {"4 s": [{"PSNR to full, dB": p, "SSIM to full": 0.5} for p in psnr]}} for name, psnr in
            {"a": (20.0, 30.0), "b": (19.0, 28.0), "same": (100.0, 100.0)}.items()}  # fmt: skip
    lines = absorption_quality.differences(rows, [["a", "b"], ["same", "same"]])
    assert lines[2:] == ["| a, minus b | 4 s | +1.50 (+1.00 to +2.00) | +0.00 (+0.00 to +0.00) |"]


def test_flicker_is_the_share_of_motion_at_the_chunks_rate():
    moves = torch.zeros(121)
    moves[::12] = 1.0
    ever = torch.rand(121, generator=torch.Generator().manual_seed(0))

    def video(jumps: torch.Tensor) -> torch.Tensor:
        return jumps.cumsum(0).remainder(2).sub(1).abs()[:, None, None, None].expand(-1, 8, 8, 3)

    assert chunk_flicker(video(moves)) > 0.95
    assert chunk_flicker(video(ever)) < 0.5


def test_nearness_of_known_noise():
    full = torch.full((3, 16, 16, 3), 0.5)
    noise, similar = nearness(full + 0.1, full)
    assert noise.tolist() == pytest.approx([-20 * math.log10(0.1)] * 3, abs=1e-3)
    assert nearness(full, full)[1].tolist() == pytest.approx([1.0] * 3)
    assert similar.max() < 1
