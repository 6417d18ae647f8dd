"""Which passes' keys and values the past of a chunk is.

"clean": each finished chunk has a clean pass of its own, and what that cached is the past of all steps (Self-Forcing and its kin).
"own level": a step sees what the same step made of the chunks before, at its own noise level; there is a window for each step, and
no clean pass (LiveAvatar). "last level": all steps see what the last one made, in a single window; no clean pass either.
"""

from __future__ import annotations

from typing import Any, Protocol

CLEAN, OWN_LEVEL, LAST_LEVEL = HISTORIES = ("clean", "own level", "last level")


class Numbers(Protocol):
    """What is checked of a rollout (RolloutSpec)."""

    history: str
    windows: int
    blocks: int
    restart_frames: int
    remade: str
    absorption: Any
    anchor: Any


def check_history(rollout: Numbers) -> None:
    """ValueError, in a sentence, for a rollout whose other settings do not go with its history."""
    if rollout.windows < 1 or (rollout.windows > 1 and rollout.history != OWN_LEVEL):
        raise ValueError(
            f"windows is {rollout.windows} with history {rollout.history}; only own level has more than one"
        )
    if rollout.history == CLEAN:
        return
    others = {
        f"{rollout.blocks} chunks denoised together": rollout.blocks > 1,
        "restarts, which cache frames again": rollout.restart_frames,
        "a past that is made anew before every chunk": rollout.remade,
        "the adaptive anchor, whose state a clean pass caches": rollout.anchor.state_frames,
        "absorption, which follows one window": rollout.absorption is not None and rollout.history == OWN_LEVEL,
    }
    if found := [name for name, there in others.items() if there]:
        raise ValueError(
            f"history {rollout.history} does not go with {' and '.join(found)}; remove it, or set the history to "
            f"{CLEAN if rollout.history == LAST_LEVEL else f'{LAST_LEVEL} or {CLEAN}'}"
        )


def check_recaches(history: str, recaches: bool) -> None:
    """ValueError if prompts change by recaches and the rollout has no clean pass to make one with."""
    if recaches and history != CLEAN:
        raise ValueError(
            f"a recache makes the window again by clean passes, and with history {history} there are none; choose another "
            "transition, such as cut"
        )
