"""Four steps by regression, for one anchor or for several in turn, and the LoRA that comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_denoiser import tiny_denoiser

from adastate_core.schedules.schedule import Schedule
from training import export_lora, few_step
from training.few_step import on_path
from training.loop import drawn_clips
from training.lora import apply_lora, train_towards
from training.recurrence import ClipRecurrence, Draws
from training.run import read_config

ADAPTIVE = '{ kind = "adaptive", state_frames = 1 }'
STATIC = '{ kind = "static", sink_frames = 1 }'
CLIPS, CHUNKS, STEPS = 6, 3, 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder in which a LoRA was trained for two anchors, on paths of their own."""
    folder = tmp_path_factory.mktemp("few_step")
    base, tuned = tiny_denoiser(0), tiny_denoiser(1)
    torch.save(base.state_dict(), folder / "base.pt")
    torch.save(tuned.state_dict(), folder / "tuned.pt")
    generator = torch.Generator().manual_seed(5)
    clips = {
        "latents": torch.randn(CLIPS, 16, 3 * CHUNKS, 4, 4, generator=generator).half(),
        "words": torch.zeros(CLIPS, CHUNKS, 4, dtype=torch.long),
    }
    save_file(clips, folder / "clips.safetensors")
    for name in ("adaptive", "static"):
        (folder / name).mkdir()
        solved = torch.randn(CLIPS, 5, 16, 3 * CHUNKS, 4, 4, generator=generator).half()
        save_file({"clips": torch.arange(CLIPS), "trajectories": solved}, folder / name / "part_00000.safetensors")
    text = f"""
folder = "{folder / "run"}"
train = "{folder / "clips.safetensors"}"
held_out = "{folder / "clips.safetensors"}"
start_from = "{folder / "base.pt"}"
lora_towards = "{folder / "tuned.pt"}"
lora_rank = 4
trajectories = "{folder / "adaptive"}"
anchor = {ADAPTIVE}
seed = 1
steps = {STEPS}
batch = 2
lr = 1e-2
warmup = 0.05
decay_from = 0.5
ema = 0.9
window_frames = 1
positions = "fixed"
window_gradient = true
state_gradient = 3
shift = 5.0
rollout_steps = 4
full_noise = 0.3
blur_share = 0.5
blur_most = 0.2
drop_words = 0.0
log_every = 1
evaluate_every = {STEPS}

[[also]]
anchor = {STATIC}
trajectories = "{folder / "static"}"
"""
    (folder / "config.toml").write_text(text)
    run(few_step, folder / "config.toml")
    return folder


def run(stage, config: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [stage.__name__, "--config", str(config), "--threads", "1"])
        stage.main()


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def test_steps_go_through_the_anchors_in_turn_each_on_its_own_paths(trained):
    """The first step's loss by hand: the seed says whose turn it is, and nothing is trained yet."""
    config = read_config(trained / "config.toml")
    seed = config["seed"] * 1_000_003
    name = ("adaptive", "static")[seed % 2]
    own = config if name == "adaptive" else config | config["also"][0]
    model = tiny_denoiser(0)
    train_towards(model, tiny_denoiser(1).state_dict(), config["lora_rank"])
    generator = torch.Generator().manual_seed(seed)
    index = drawn_clips(CLIPS, config["batch"], generator)
    solved = load_file(trained / name / "part_00000.safetensors")["trajectories"][index].float()
    sigmas = torch.tensor(Schedule.shifted(config["rollout_steps"], config["shift"]).sigmas)
    noisy, wanted, sigma = on_path(solved, sigmas, generator)
    clips = load_file(trained / "clips.safetensors")
    student = ClipRecurrence(model, own)
    draws = student.draws(clips["latents"][index].float(), config, seed)
    draws = Draws(**(vars(draws) | {"content": solved[:, 0], "sigma": sigma}))
    errors = student(clips["latents"][index].float(), clips["words"][index], draws, (noisy, wanted))
    assert logged(trained)[0]["loss"] == pytest.approx(errors.mean().item(), rel=1e-4)


def test_every_anchor_is_evaluated_by_itself(trained):
    held = next(line for line in logged(trained) if "held_later" in line)
    assert {"held_later_static", "held_first_static"} <= held.keys()
    assert held["held_later"] != held["held_later_static"]


def test_the_exported_lora_is_the_trained_one_and_says_how_it_is_rolled_out(trained):
    (trained / "export.toml").write_text(
        f'folder = "{trained / "loras"}"\nseed = 0\nlora = "{trained / "run" / "lora.safetensors"}"\n'
        'file = "a.safetensors"\n[rollout]\nsteps = 4\nwindow_frames = 1\n'
    )
    run(export_lora, trained / "export.toml")
    path = trained / "loras" / "a.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["adastate"]) == {"steps": 4, "window_frames": 1}
    model = tiny_denoiser(0)
    apply_lora(model, str(path))
    whole = torch.load(trained / "run" / "model.pt", weights_only=True)
    base = tiny_denoiser(0).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, whole[name], atol=5e-3, rtol=5e-2, msg=name)
    assert sum(not torch.equal(value, base[name]) for name, value in model.state_dict().items()) > 10
