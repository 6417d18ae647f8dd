"""Streams whose lantern comes back in a colour that no condition tells, and the causal teacher that they are rolled out with."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from adastate_core.files.whole_file import whole_file
from adastate_core.prompts.demo_words import prompt
from adastate_core.prompts.plan import PromptChange, PromptPlan

from .codec import encode_clip
from .recall import DOWN, SHOWN, UP, ColourJudge, encoded, lantern_scenes
from .world import CHUNK_LATENTS, Scene

# version 1 of the shipped weights: the causal teacher that the adaptive state was distilled from
COMMIT, SHIPPED = "8560367", "models/diffusion_models/adastate_demo.safetensors"
ROOT = Path(__file__).resolve().parents[1]


def teacher_file(path: Path, root: Path = ROOT) -> Path:
    """`path`; if there is nothing, the teacher's weights come there out of the git history of `root`. SystemExit without one."""
    if path.exists():
        return path
    command = ["git", "-C", str(root), "show", f"{COMMIT}:{SHIPPED}"]
    try:
        shown = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        shown = None
    if shown is None or shown.returncode or not shown.stdout:
        raise SystemExit(
            f"The teacher is version 1 of {SHIPPED} (commit {COMMIT}), and {root} has no git history that holds it; run this in a "
            "whole clone of the repository, or name the file with --weights FILE."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(shown.stdout)
    return path


def returning_scenes(count: int, seed: int, chunks: int, shown: Iterable[int]) -> list[Scene]:
    """Scenes whose lantern is up in the chunks `shown` alone."""
    states = tuple(UP if i in set(shown) else DOWN for i in range(chunks))
    return [Scene.draw(torch.Generator().manual_seed(seed + i), chunks, states) for i in range(count)]


def plan_of(scene: Scene, chunks: int) -> PromptPlan:
    """The words of each chunk; only the text changes. Chunks with the same words share a tensor."""
    contexts = {word: prompt(scene.words(0) | {"lantern": word}) for word in (UP, DOWN)}
    words = [scene.words(i)["lantern"] for i in range(chunks)]
    changes = [i for i in range(chunks) if i == 0 or words[i] != words[i - 1]]
    return PromptPlan([PromptChange(i * CHUNK_LATENTS, contexts[words[i]], "cut") for i in changes], CHUNK_LATENTS)


def judge_of(codec: nn.Module, streams: int, seed: int) -> ColourJudge:
    """Learnt from the true pictures of `streams` scenes, through the codec."""
    latents, _, colours = encoded(lantern_scenes(streams, seed, SHOWN + 1), SHOWN + 1, partial(encode_clip, codec))
    return ColourJudge(latents[:, :, SHOWN * CHUNK_LATENTS :], colours)


def chunk_of(latents: torch.Tensor, chunk: int) -> torch.Tensor:
    """[16, 3, h, w] of [16, T, h, w]."""
    return latents[:, chunk * CHUNK_LATENTS : (chunk + 1) * CHUNK_LATENTS]


def colours_of(judge: ColourJudge, latents: torch.Tensor, chunks: Iterable[int]) -> list[int]:
    """The colour numbers of the lantern in those chunks of [16, T, h, w]."""
    return judge(torch.stack([chunk_of(latents, chunk) for chunk in chunks])).tolist()
