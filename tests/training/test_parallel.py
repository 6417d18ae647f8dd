"""Two processes under torch's launcher give the losses and the weights of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_denoiser import tiny_denoiser

from training.parallel import Workers

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "seed": 1, "lr": 1e-3, "warmup": 0.1, "decay_from": 0.5, "ema": 0.9, "shift": 5.0, "full_noise": 0.3,
    "blur_share": 0.5, "blur_most": 0.2, "drop_words": 0.1, "log_every": 1, "evaluate_every": 10, "window_frames": 3,
    "positions": "fixed", "window_gradient": True, "state_gradient": 7,
    "anchor": {"kind": "adaptive", "state_frames": 1},
}  # fmt: skip
CODEC = str(ROOT / "models" / "vae" / "adastate_demo_vae.safetensors")
ROLLED = ("recurrence", "distribution_matching")
STAGES = {
    "recurrence": {"steps": 4, "batch": 4, "lora_rank": 4},
    "score_model": {"steps": 4, "batch": 4},
    "denoiser": {"steps": 4, "batch": 4, "first_chunk_weight": 2.0, "windows": [3, 6], "sinks": [0, 1]},
    "distribution_matching": {
        "steps": 6, "batch": 4, "latent_size": [4, 4], "chunk_frames": 3, "rollout_steps": 2, "alpha": 2.0,
        "normalise_weights": True, "guidance": 1.0, "critic_alone": 2, "student_every": 2, "critic_lr": 1e-3, "log_every": 2,
        "recurrence_weight": 1.0, "recurrence_batch": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A tiny model and a few random clips, as the stages before would leave them."""
    folder = tmp_path_factory.mktemp("data")
    model = tiny_denoiser(seed=0)
    torch.save(model.state_dict(), folder / "model.pt")
    clips = {"latents": torch.randn(8, 16, 12, 4, 4).half(), "words": torch.zeros(8, 4, 4, dtype=torch.long)}
    save_file(clips, folder / "clips.safetensors")
    return folder


def toml(values: dict) -> str:
    plain = [f"{name} = {json.dumps(value)}" for name, value in values.items() if not isinstance(value, dict)]
    tables = [f"[{name}]\n{toml(value)}" for name, value in values.items() if isinstance(value, dict)]
    return "\n".join([*plain, *tables])


def run(stage: str, folder: Path, data: Path, processes: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The stage's log and weights, trained by so many processes."""
    clips, model = str(data / "clips.safetensors"), str(data / "model.pt")
    config = COMMON | STAGES[stage] | {"folder": str(folder), "train": clips, "held_out": clips}
    if stage in ROLLED:
        config["codec"] = CODEC
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(toml(config | {"start_from": model, "teacher": model}))
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, "-m", f"training.{stage}", "--config", str(folder / "config.toml"), "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert (folder / "curves.png").stat().st_size > 1000
    assert lines.pop()["peak_mib"] > 100
    sheets = sorted(path.name for path in folder.glob("sheet_*.png"))
    assert sheets == ([f"sheet_{config['steps']:06d}.png"] if stage in ROLLED else [])
    assert (folder / "lora.safetensors").exists() == ("lora_rank" in config)
    return lines, torch.load(folder / "model.pt", weights_only=True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.sampled(2)
def test_two_processes_are_one(stage, data, tmp_path):
    alone, weights = run(stage, tmp_path / "one", data, 1)
    together, others = run(stage, tmp_path / "two", data, 2)
    logged = STAGES[stage]["steps"] // STAGES[stage].get("log_every", 1)
    assert len(alone) == len(together) >= logged
    assert stage != "distribution_matching" or {"loss", "kept", "critic"} <= alone[-1].keys()
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys() and len(a) > 2
        for name in a.keys() - {"seconds", "returns", "held_returns"}:  # those are means of uneven parts
            assert a[name] == pytest.approx(b[name], rel=2e-3), (a["step"], name)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, atol=3e-4, rtol=1e-2)


def test_a_batch_that_cannot_be_shared_evenly_is_refused():
    workers = Workers()
    workers.world = 3
    with pytest.raises(ValueError, match="batch is 8; it must be a multiple of the 3 processes"):
        workers.share(torch.zeros(8))
