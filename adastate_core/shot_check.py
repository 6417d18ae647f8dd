"""Which rollouts can have shots (shots.py), and whether a state's are whole."""

from __future__ import annotations

from collections.abc import Sequence

from .prompts.plan import PromptPlan
from .spec import RolloutSpec


def refusal(spec: RolloutSpec) -> str:
    """Why a rollout can have no shots, in a sentence; "" if it can."""
    frames = spec.chunk_frames
    others = {
        f"the {spec.anchor.kind} anchor, which chooses what stays by itself": spec.anchor.selects,
        f"{spec.blocks} chunks denoised together": spec.blocks > 1,
        "a past that is made anew before every chunk": spec.remade,
        "restarts, which count time from 0 again": spec.restart_frames,
    }
    if found := [name for name, there in others.items() if there]:
        return (
            f"a shot keeps its first chunk in the window, which does not go with {' and '.join(found)}; choose another transition "
            "than shot, such as cut, or remove the other"
        )
    windows = [spec.window_frames, *(layer.window_frames for layer in spec.layers or ())]
    if min(windows) <= frames:
        return (
            f"window_frames is {min(windows)}, and a shot keeps its first chunk of {frames} latent frames there, beside the newest "
            f"frames: set window_frames to {frames + 1} or more (best {2 * frames}), or choose another transition than shot"
        )
    return ""


def check_shots(spec: RolloutSpec, prompts: PromptPlan | None) -> None:
    """ValueError, in a sentence, if a prompt begins a shot and the rollout can have none."""
    if prompts is not None and prompts.shots and (why := refusal(spec)):
        raise ValueError(why)


def damage(shots: Sequence[int], spec: RolloutSpec, next_frame: int, next_chunk: int) -> str:
    """Why `shots` cannot be those of a rollout that has generated so many chunks up to `next_frame`, a phrase; "" if they can."""
    first, frames = next_frame - next_chunk * spec.chunk_frames, spec.chunk_frames
    if any(a >= b for a, b in zip(shots, shots[1:], strict=False)):
        return "not first frames of shots in their order"
    if shots and not max(first, 1) <= shots[0] <= shots[-1] < next_frame:
        return f"not first frames of shots from {max(first, 1)} to {next_frame - 1}"
    if any((shot - first) % frames for shot in shots):
        return f"not frames with which a chunk begins, which are {first} and every {frames} after it"
    return "there although its settings allow none" if shots and refusal(spec) else ""
