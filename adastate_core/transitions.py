"""What a change of the prompt, or a restart, does to the past before the next chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from .anchors import Anchor
from .cache.one_pass import OnePass
from .passes import Passes
from .past import Past
from .prompts.plan import PromptPlan
from .remade import Renewed, past_latents
from .undo import Undo

# how many past frames a flush leaves beside the anchor, and the position at which a rope cut puts its chunk (Infinity-RoPE's)
FLUSH_FRAMES = 2
CUT_POSITION = 45


@contextlib.contextmanager
def before_chunk(
    past: Past, passes: Passes, prompts: PromptPlan | None, renewed: Renewed | None = None, steps: int = 0
) -> Iterator[None]:
    """Prepare the past for the next chunk, which is made inside. If the preparation or the chunk fails, the past is again what it
    was before; where the preparation was to make the window again, it is empty instead, and `past.now.again` says what is due.
    `renewed` encodes the frame anew with which a past begins that is made anew (remade.py), and the passes that make it are the
    first of the chunk's `steps`."""
    first, change = past.now.next_frame, _Change(past, passes, prompts, renewed, steps)
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
    finally:
        past.forget_mark()


class _Change:
    """The change before one chunk. `mark` is the past before the change, or None while nothing was changed."""

    def __init__(
        self, past: Past, passes: Passes, prompts: PromptPlan | None, renewed: Renewed | None, steps: int
    ) -> None:
        self.past, self.passes, self.prompts, self.renewed, self.steps = past, passes, prompts, renewed, steps
        self.mark: Undo | None = None

    def make(self) -> None:
        """Restart, or make good what was cut; then change the prompt and do to the cache what the transition says."""
        past, spec = self.past, self.past.spec
        frame, before, again = past.now.next_frame, past.now.before, past.now.again
        past.jump, past.opens_shot = 0, False
        transition = self.prompts.transition(frame, before) if self.prompts else ""
        if spec.remade:
            # the past was made under the words of its newest chunk, and a recache puts it under the new ones
            self._set_words(frame if transition == "recache" else before)
            self._remake()
        self._set_words(frame)
        if frame and spec.clip(frame) != spec.clip(before):
            self._commit_again(spec.overlap_frames)
        elif again and transition != "recache" and not spec.remade:
            self._recache(again)
        if transition == "recache" and not spec.remade:
            self._recache(spec.recent_frames)
        elif transition == "flush":
            self._take_mark()
            past.flush(FLUSH_FRAMES)
        elif transition == "rope cut":
            past.jump = max(CUT_POSITION - past.layout().content, CUT_POSITION - spec.chunk_frames)
        past.opens_shot = transition == "shot"

    def undo(self) -> None:
        """Go back to the mark. A failure here is not raised, because the error that led here is; the past's next user finishes
        the undoing."""
        self.past.opens_shot = False
        if self.mark is not None:
            with contextlib.suppress(Exception):
                self.past.rewind(self.mark)

    def _set_words(self, frame: int) -> None:
        """The words of the chunk from `frame` on."""
        if self.prompts is not None:
            self.passes.model.set_context(self.prompts.context(frame))

    def _take_mark(self) -> None:
        self.mark = self.mark or self.past.mark()

    def _recache(self, frames: int) -> None:
        """Make the window again from the newest `frames` latents, in one pass where the system does so."""
        now, one_pass = self.past.now, self.past.spec.one_pass(self.past.now.next_frame)
        if one_pass is None or one_pass.frames > now.recent.shape[2]:
            self._commit_again(frames)
        else:
            self._in_one_pass(one_pass)

    def _in_one_pass(self, one_pass: OnePass) -> None:
        """Make window and, as long as the pass reaches back to frame 0, anchor again by one pass over frames that all see each
        other."""
        past, recent = self.past, self.past.now.recent
        one_pass = replace(one_pass, pin=past.pin(one_pass.end))
        self._take_mark()
        past.empty(min(past.spec.recent_frames, recent.shape[2]), anchor_too=bool(one_pass.anchored))
        if one_pass.anchored:
            past.empty_anchor()
        past.go_back(one_pass.first)
        past.start_chunk(told=False)
        self.passes.one_pass(recent[:, :, -one_pass.frames :], one_pass)
        past.commit_one_pass(one_pass)

    def _commit_again(self, frames: int) -> None:
        """Empty the window and commit the newest `frames` latents once more, in passes of F. The anchor stays as it is.

        Frames that the anchor holds are left out. The hidden state, unless it is frozen, is committed again with the others.
        """
        past, now, anchor = self.past, self.past.now, self.past.spec.anchor
        end, held = now.next_frame, now.recent.shape[2]
        frames = min(frames, held)
        first = end - frames
        while first < end and anchor.slot_of(first) is not None:
            first += 1
        again, bystander = now.recent[:, :, held - (end - first) :], anchor.bystander(end)
        hidden = now.recent[:, :, :0] if now.hidden is None else now.hidden
        self._take_mark()
        past.empty(frames, anchor_too=type(bystander) is not Anchor)
        self._pass_again(again, hidden, bystander)

    def _remake(self) -> None:
        """Make the window anew, which is empty, of the latents that remade.py says."""
        past, now = self.past, self.past.now
        content, nothing = past_latents(past.spec, now, self.renewed), now.recent[:, :, :0]
        if not content.shape[2]:
            return
        self._take_mark()
        past.empty(content.shape[2], anchor_too=False)
        self._pass_again(content, nothing, past.spec.anchor, told=True)

    def _pass_again(self, again: torch.Tensor, hidden: torch.Tensor, anchor: Anchor, told: bool = False) -> None:
        """Clean passes over the newest latents, F frames each behind the `hidden` state, whose keys enter the window. `told`: they
        are the chunk's own first passes."""
        past, frames = self.past, self.past.spec.chunk_frames
        past.go_back(past.now.next_frame - again.shape[2])
        for number, content in enumerate(again.split(frames, dim=2) if again.shape[2] else ()):
            if told:
                self.passes.checkpoint(number, self.steps, None)
            past.start_chunk(told=False)
            self.passes.clean(torch.cat([hidden, content], 2), content.shape[2])
            past.commit_again(content.shape[2], anchor)
