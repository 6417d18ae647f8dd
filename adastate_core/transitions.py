"""What a change of the prompt, or a restart, does to the past before the next chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .passes import Passes
from .past import Mark, Past
from .prompts.plan import PromptPlan

# how many past frames a flush leaves beside the anchor, and the position at which a rope cut puts its chunk (Infinity-RoPE's)
FLUSH_FRAMES = 2
CUT_POSITION = 45


@contextlib.contextmanager
def before_chunk(past: Past, passes: Passes, prompts: PromptPlan | None) -> Iterator[None]:
    """Prepare the past for the next chunk, which is made inside. If the preparation or the chunk fails, the past is again what it
    was before."""
    first, change = past.now.next_frame, _Change(past, passes, prompts)
    try:
        change.make()
    except BaseException:
        change.undo()
        raise
    try:
        yield
    except BaseException:
        if not past.committing and past.now.next_frame == first:
            change.undo()
        raise


class _Change:
    """The change before one chunk. `mark` is the past before the change, or None while nothing was changed."""

    def __init__(self, past: Past, passes: Passes, prompts: PromptPlan | None) -> None:
        self.past, self.passes, self.prompts = past, passes, prompts
        self.mark: Mark | None = None

    def make(self) -> None:
        """Restart, or change the prompt and do to the cache what the transition says."""
        past, spec = self.past, self.past.spec
        frame, before = past.now.next_frame, past.now.before
        past.jump = 0
        if frame and spec.clip(frame) != spec.clip(before):
            self._set_prompt(frame)
            self._commit_again(spec.overlap_frames)
        transition = self.prompts.transition(frame, before) if self.prompts else ""
        self._set_prompt(frame)
        if transition == "recache":
            self._commit_again(spec.recent_frames)
        elif transition == "flush":
            self._take_mark()
            past.flush(FLUSH_FRAMES)
        elif transition == "rope cut":
            past.jump = max(CUT_POSITION - past.layout().content, CUT_POSITION - spec.chunk_frames)

    def undo(self) -> None:
        """Go back to the mark. A failure here is not raised, because the error that led here is; the past's next user finishes
        the undoing."""
        if self.mark is not None:
            with contextlib.suppress(Exception):
                self.past.rewind(self.mark)

    def _set_prompt(self, frame: int) -> None:
        if self.prompts is not None:
            self.passes.model.set_context(self.prompts.context(frame))

    def _take_mark(self) -> None:
        self.mark = self.mark or self.past.mark()

    def _commit_again(self, frames: int) -> None:
        """Empty the window and commit the newest `frames` latents once more, in passes of F. The anchor stays as it is.

        Frames that the anchor holds are left out. The hidden state, unless it is frozen, is committed again with the others.
        """
        past, now, anchor = self.past, self.past.now, self.past.spec.anchor
        end, held = now.next_frame, now.recent.shape[2]
        first = end - min(frames, held)
        while first < end and anchor.slot_of(first) is not None:
            first += 1
        again = now.recent[:, :, held - (end - first) :]
        hidden = now.recent[:, :, :0] if now.hidden is None else now.hidden
        self._take_mark()
        past.flush(0)
        past.go_back(first)
        for content in again.split(past.spec.chunk_frames, dim=2) if first < end else ():
            past.start_chunk(told=False)
            self.passes.clean(torch.cat([hidden, content], 2), content.shape[2])
            past.commit_again(content.shape[2], anchor.bystander(end))
