"""A run that is steered while it is under way: what it can be asked, what waits, and what came of it.

Whoever asks (host/steer_route.py) is answered at once. What is asked is done by the run's own thread between two chunks: it becomes
an entry of the run's timeline at the next chunk's first frame, so that the same graph with that timeline makes the same video.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..adastate_core.anchors import AnchorAdaptive
from ..adastate_core.prompts.steered import holds_from, seconds_of, written
from ..adastate_core.prompts.values import TimedText
from ..adastate_core.rollout import Chunk, Rollout
from ..adastate_core.shot_check import refusal
from ..adastate_core.states.steered_check import MOST_STEERED
from ..adastate_core.video.frame_formats import FRAME_FORMATS
from ..adastate_core.video.page_locked import Landed
from .course import Course
from .host.live_runs import LiveRun
from .host.progress import check_interrupt
from .host.safely import Interrupted
from .host.steer_wishes import Refused, Wish
from .preflight import Prepared
from .report import UnderWay

log = logging.getLogger("adastate")
MOST_WAITING, MOST_DONE, MOST_CHANGES = 64, 100, 1000
_SHOWN_WORDS = 500  # characters of a prompt that are told again of each change; the timeline has all
NO_WORDS = "positive is no timeline: connect Prompt Timeline, with live on, to give new words while the video is made"
NO_SEED = "chunks that are denoised together have begun with their noise; give {seed} in the timeline's text before the run instead"
NO_PAUSE = "a pause keeps a state beside the video, and this run has no stream: connect Stream To Video"
NO_HISTORY = "this run keeps no history to go back to: set history_chunks on Stream To Video"
NO_UNABSORBING = "what an absorption has forgotten does not come back: redo the video from a kept state instead"
NO_SHORTER_ANIMATION = "an animation cannot lose its last frames: write single frames, or a video"
NOTHING_KEPT = "no state is kept yet to go back to: the first one is after {} chunks"
NO_CHUNK = "there was no chunk left to make when it was asked"
STOPPED = "the run was stopped before another chunk was made"
ENDED = "the run ended before another chunk was made"
NOT_ALONE = (
    "the video was steered while it was made, so these inputs alone do not make it: the report says under steering what does. "
    "Queued again as they are, they make a video that is not steered"
)
ENDING = "the run is ending; what is asked now would come too late"


@dataclass
class Asked:
    """A wish that waits, then what came of it. `encoding`: what has to be done before its words can be read, in a thread if it is a
    Future. `frame`: the latent frame from which it holds."""

    number: int
    wish: Wish
    arrived: float
    encoding: Future[None] | Callable[[], None] | None = None
    at: float | None = None
    frame: int | None = None
    error: str | None = None
    shown: float | None = None
    taken_back: dict[str, Any] | None = None

    @property
    def ready(self) -> bool:
        return not isinstance(self.encoding, Future) or self.encoding.done()

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        more = {} if self.taken_back is None else {"taken_back": self.taken_back}
        more |= {} if self.error is None else {"error": self.error}
        told = self.wish.told()
        told |= {"prompt": told["prompt"][:_SHOWN_WORDS]} if "prompt" in told else {}
        return {"id": self.number, "at": self.at} | told | more | {"seconds_to_picture": self.shown}


class Steering:
    """What is asked of one run. `ask` and `describe` are called by any thread, the others by the run's."""

    def __init__(self, job: Prepared, view: LiveRun, run: UnderWay) -> None:
        self.job, self.view, self.run = job, view, run
        self.course = Course.of(job.request.positive)
        self._lock = threading.RLock()
        self._waiting: deque[Asked] = deque()
        self._done: deque[Asked] = deque(maxlen=MOST_DONE)
        self._unseen: list[Asked] = []
        self._count, self._closed = 0, ""
        self._thread: ThreadPoolExecutor | None = None
        resume = job.request.resume
        self._record = list(resume.steered.get("changes", [])) if resume is not None else []
        anchor = job.spec.anchor
        self._strength = anchor.strength if isinstance(anchor, AnchorAdaptive) else None
        self._seed = job.request.seed
        self.used = False
        # of every change that was made: the frame from which it holds, and what was before
        self._changes: list[tuple[int, Course, int]] = []
        self._changed = False  # whether there were any, once the run is over
        # how many latents had left after each chunk, and the kept states: (after how many chunks, seconds of video)
        self._ends = array("q")  # 8 bytes a chunk
        self._kept: list[tuple[int, float]] = []
        self._last: dict[str, Any] | None = None  # what `describe` says from the end on
        self._told = self.describe()  # that the run has begun is told with it

    # ---- asked by any thread

    def can(self) -> dict[str, str | None]:
        """Of each thing that may be asked: None, or why this run cannot do it, in a sentence."""
        spec, source = self.job.spec, self.course.prompts.source
        return {
            "prompt": NO_WORDS if source is None else source.refused,
            "seed": NO_SEED if spec.blocks > 1 else None,
            "strength": None
            if isinstance(spec.anchor, AnchorAdaptive)
            else f"strength is the adaptive anchor's, and this run has the {spec.anchor.kind} anchor",
            "pause": None if self.job.request.stream else NO_PAUSE,
            "take_back": self._no_way_back(),
        }

    def _no_way_back(self) -> str | None:
        """Why the run cannot go back to an earlier chunk, or None."""
        stream = self.job.request.stream
        if stream is None or not stream.history_chunks:
            return NO_HISTORY
        if self.job.spec.absorption is not None:
            return NO_UNABSORBING
        if any(FRAME_FORMATS[frames.format].animated for frames in stream.frames):
            return NO_SHORTER_ANIMATION
        return None if self._kept else NOTHING_KEPT.format(stream.history_chunks)

    def describe(self) -> dict[str, Any]:
        """JSON-able: how the run stands, what waits and what was done."""
        with self._lock:
            if self._last is not None:
                return self._last
            return {
                "can": self.can(),
                "strength": self._strength,
                "seed": self._seed,
                "back_to": [seconds for _, seconds in self._kept],
                "waiting": [asked.number for asked in self._waiting],
                "done": [asked.describe() for asked in self._done],
                "timeline": self.course.text,
            }

    def report(self) -> dict[str, Any]:
        """JSON-able: what of it belongs into the run's report; nothing where nothing was asked."""
        told = self.describe()
        return {"steering": {"timeline": told["timeline"], "done": told["done"]}} if self.used else {}

    def notes(self) -> list[str]:
        """For the report of a run that is over: that its inputs alone do not make its video."""
        return [NOT_ALONE] if self._changed else []

    def ask(self, wish: Wish, arrived: float | None = None) -> int:
        """Have it done between two chunks; its number. Refused, in a sentence, where it cannot be. `arrived`: when it was asked, by
        time.perf_counter."""
        arrived = time.perf_counter() if arrived is None else arrived
        with self._lock:
            self._check(wish)
            self._count, self.used = self._count + 1, True
            asked = Asked(self._count, wish, arrived)
            if wish.prompt is not None:
                asked.encoding = self._encoding(wish.prompt, wish.transition)
            self._waiting.append(asked)
        self._tell()
        return asked.number

    def _check(self, wish: Wish) -> None:
        if self._closed:
            raise Refused(ENDING)
        for name, reason in self.can().items():
            if getattr(wish, name) not in (None, False) and reason is not None:
                raise Refused(reason)
        if len(self._waiting) >= MOST_WAITING:
            raise Refused(f"{MOST_WAITING} changes wait already; ask again after the next chunk", 429)
        if wish.told() and self._count >= MOST_CHANGES:
            raise Refused(
                f"this run was changed {MOST_CHANGES} times; pause it, and go on from its state with its timeline"
            )
        if wish.prompt is None:
            return
        source = self.course.prompts.source
        entry = TimedText(1.0, wish.prompt, wish.transition or source.change.transition, seed=wish.seed)
        try:
            source.check(wish.prompt)
            written([TimedText(0.0, "x"), entry])
        except ValueError as error:
            raise Refused(f"the prompt cannot be an entry of a timeline: {error}", 400) from None
        if entry.transition == "shot" and (why := refusal(self.job.spec)):
            raise Refused(why, 400)

    def _encoding(self, words: str, transition: str | None) -> Future[None] | Callable[[], None] | None:
        source = self.course.prompts.source
        encode = source.encoding(words, transition)
        if encode is None or not source.beside:
            return encode
        self._thread = self._thread or ThreadPoolExecutor(1, "adastate-words")
        return self._thread.submit(_quietly, encode)

    # ---- the run's thread

    def between(self, rollout: Rollout) -> None:
        """A chunk is finished: do what waits, unless none follows. A pause becomes the view's stop. What an interrupt brings is
        raised."""
        self._ends.append(rollout.emitted)
        self._now(rollout)
        if self._may_change(rollout):
            for asked in self._taken():
                self._do(asked, rollout)
            self._now(rollout)
        self._tell()

    def _may_change(self, rollout: Rollout) -> bool:
        """Whether another chunk is generated, and an entry at its first frame leaves all before as they were."""
        frame, most = rollout.next_frame, self.job.latent_length
        return rollout.emitted > 0 and self.job.spec.chunk_frames / 2 <= frame < most

    def _taken(self) -> list[Asked]:
        """What is ready, in the order in which it was asked; with a pause all before it."""
        with self._lock:
            paused = next((i for i, asked in enumerate(self._waiting) if asked.wish.pause), None)
            taken = []
            while self._waiting and (self._waiting[0].ready or paused is not None and len(taken) <= paused):
                taken.append(self._waiting.popleft())
            for i, asked in enumerate(taken):
                later = [other.wish.told().keys() for other in taken[i + 1 :]]
                own = asked.wish.told().keys() - {"transition"}
                if own and own <= set().union(*later):
                    asked.error = "something that was asked later took its place before a chunk was made"
            return taken

    def _do(self, asked: Asked, rollout: Rollout) -> None:
        try:
            if asked.wish.take_back is not None:
                self._take_back(asked, rollout)
            if asked.wish.told() and asked.error is None:
                if not asked.ready:
                    raise ValueError("the run was paused before its words were encoded")
                self._encoded(asked)
                self._change(asked, rollout)
            if asked.wish.pause:
                self.view.pause()
                asked.at = seconds_of(rollout.next_frame, self.job.fps, self.job.space.temporal_stride)
        except Interrupted:
            asked.error = ENDED
            raise
        except Exception as error:  # noqa: BLE001  the run goes on as it was, and says why
            log.warning("a change of a run could not be made: %s", error)
            asked.error = str(error) or type(error).__name__
        finally:
            with self._lock:
                self._done.append(asked)

    def _encoded(self, asked: Asked) -> None:
        """Have its words encoded. Where that takes the model's device, the model is loaded again afterwards."""
        if isinstance(asked.encoding, Future):
            asked.encoding.result()
        elif asked.encoding is not None:
            try:
                asked.encoding()
            finally:
                self.job.load_again()

    def _change(self, asked: Asked, rollout: Rollout) -> None:
        """Put it into the timeline at the next chunk. ValueError, in a sentence, with all as it was, if that cannot be."""
        job, wish, frame = self.job, asked.wish, rollout.next_frame
        seconds = seconds_of(frame, job.fps, job.space.temporal_stride)
        if wish.prompt is not None and wish.transition is None:
            wish = asked.wish = replace(wish, transition=self.course.prompts.source.change.transition)
        before = self.course
        course = before.with_entry(
            seconds, wish, lambda entry: holds_from(job.latent_frame(entry.seconds), frame, job.spec.chunk_frames)
        )
        job.steer(course.prompts)
        rollout.steer(job.prompts)
        with self._lock:
            self._changes.append((frame, before, len(self._record)))
            self.course, asked.at, asked.frame = course, seconds, frame
            self._record.append({"at": seconds, "frame": frame} | wish.told())
            if asked not in self._unseen:
                self._unseen.append(asked)
        self._remember(rollout)

    def _remember(self, rollout: Rollout) -> None:
        """Have the states from now on say how the video was steered."""
        changes = self._record[-MOST_STEERED:]
        rollout.steered = {"timeline": self.course.text, "changes": changes} if changes else {}

    def _take_back(self, asked: Asked, rollout: Rollout) -> None:
        """Go back to the newest kept state at or before the second that is asked for; changes from there on are undone. ValueError,
        in a sentence, with all as it was, if there is none; what else fails is raised, with all as it was, too."""
        job, run = self.job, self.run
        now = job.space.pictures(rollout.emitted) / job.fps
        asked_for = max(0.0, now - asked.wish.take_back)
        chunk, seconds = next(((c, s) for c, s in reversed(self._kept) if s <= asked_for), (None, 0.0))
        if chunk is None:
            earliest = f"the earliest is at {self._kept[0][1]:g} s" if self._kept else "there is none"
            raise ValueError(f"no state is kept at or before {asked_for:g} s to go back to: {earliest}")
        state = run.output.go_back(rollout, chunk, check_interrupt)
        self._ends = array("q", (end for end in self._ends if end <= state.emitted))
        run.made.go_back(len(self._ends), state.emitted - self._first_frame)
        self.view.went_back(run.made.count)
        frame = rollout.next_frame
        undone = next((i for i, change in enumerate(self._changes) if change[0] >= frame), None)
        with self._lock:
            if undone is not None:
                _, self.course, count = self._changes[undone]
                del self._changes[undone:], self._record[count:]
            self._unseen = [other for other in self._unseen if other.frame < frame] + [asked]
            asked.at, asked.frame, asked.taken_back = seconds, frame, {"to": seconds, "chunk": chunk}
        if undone is not None:
            job.steer(self.course.prompts)
            rollout.steer(job.prompts)
        self._remember(rollout)

    @property
    def _first_frame(self) -> int:
        """Latent frames that there were before the run."""
        resume = self.job.request.resume
        return 0 if resume is None else resume.emitted

    def _now(self, rollout: Rollout) -> None:
        """Note what holds for the next chunk."""
        plan, frame, output = self.job.prompts, rollout.next_frame, self.run.output
        kept = output.states.history.kept if output and output.states and output.states.history else []
        second = {chunk: self.job.space.pictures(rollout.frames_after(chunk)) / self.job.fps for chunk in kept}
        self._kept = [(chunk, second[chunk]) for chunk in kept]
        if plan is not None:
            self._seed = plan.seed(frame, self.job.request.seed)
        if plan is not None and self._strength is not None:
            self._strength = plan.strength(frame, self.job.spec.anchor.strength)

    def shown(self, chunk: Chunk, pictures: Landed | None) -> None:
        """A chunk was decoded: how long those waited whose first picture is in it."""
        end = chunk.first_frame + chunk.latents.shape[2]
        seen = [asked for asked in self._unseen if asked.frame < end]
        if not seen or pictures is None:
            return
        pictures.wait()
        now = time.perf_counter()
        with self._lock:
            for asked in seen:
                asked.shown = round(max(0.0, now - asked.arrived), 3)
                self._unseen.remove(asked)

    def over(self, whole: bool) -> None:
        """No chunk follows: what waits is answered, and nothing more is taken. `whole`: the video has its length."""
        with self._lock:
            self._closed = NO_CHUNK if whole else STOPPED if self.view.stopped else ENDED
            while self._waiting:
                asked = self._waiting.popleft()
                asked.error = self._closed
                self._done.append(asked)
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._tell()
        self._let_go()

    def _let_go(self) -> None:
        """Whoever watched still asks what was done; models, latents and text encoder do not stay alive for it."""
        with self._lock:
            self._last = self.describe()
            self._done.clear()
            self._unseen.clear()
            self._changed = bool(self._changes)
            self._changes.clear()
            self.job = self.run = self.course = None

    def _tell(self) -> None:
        """Tell whoever watches, if anything has changed."""
        told = self.describe()
        with self._lock:
            if told == self._told:
                return
            self._told = told
        self.view.steered(told)


def _quietly(encode: Callable[[], None]) -> None:
    with torch.inference_mode():
        encode()
