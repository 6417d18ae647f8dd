"""One chunk of one combination: an operation of it fails, and what is left goes on to the bits of the uninterrupted run.

What holds after a failure: `snapshot()` gives the state before the chunk, or the one behind it with the chunk's latents
pending. Going on from it, with the same rollout, with a new one and through a file, gives the latents of the
uninterrupted run, each once, and ends in the same state. Only where one copy fails twice may `snapshot()` be refused, by
the name of the layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_talking import TinyTalking

from adastate_core.given import INSIDE
from adastate_core.rollout import Rollout, RolloutState
from adastate_core.states.state_file import load_state, save_state

from .combinations import FRAMES, Combination
from .injector import INJECTED, InjectedMemory, Injector, Operation, again, at, chosen, kind_of, watching

# an operation fails before it ran, or after it; its copy fails a second time; an operation of the snapshot fails as well
MODES = ("before", "after", "twice", "snapshot too")
GOOD, WRONG, UNREADABLE, REFUSED = "good", "wrong", "unreadable", "refused"
CLOCKS = {"seconds"}  # the fields of a state that a clock decides


@dataclass(frozen=True)
class Outcome:
    """What an injection left: one of the four words, and why."""

    verdict: str
    why: str = ""


def flat(value: Any, path: str = "") -> dict[str, object]:
    """A state as {path: a value that equals another's only if they are the same bit for bit}."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous()
        digest = hashlib.blake2b(data.flatten().view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
        return {path: (str(data.dtype), tuple(data.shape), digest)}
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        out: dict[str, object] = {path: len(value)}
        for name, one in value.items():
            if name not in CLOCKS:
                out |= flat(one, f"{path}.{name}")
        return out
    return {path: repr(value)}


def difference(found: Mapping[str, object], expected: Mapping[str, object], unread: str | None = None) -> str:
    """The first place where two states differ, or nothing; places that end in `unread` are passed over."""
    places = (name for name in (*expected, *found) if not unread or not name.endswith(unread))
    return next((name for name in places if found.get(name) != expected.get(name)), "")


def waiting(rollout: Rollout, given: torch.Tensor) -> list[torch.Tensor]:
    """Give a rollout the frames that its first chunk has inside, and interrupt that chunk before its first pass: no latents."""

    def stop(*_: object) -> None:
        raise InterruptedError

    rollout.on_step = stop
    with contextlib.suppress(InterruptedError):
        next(rollout.chunks(given.shape[2] + 1, given, INSIDE))
    rollout.on_step = None
    return []


class Trial:
    """A combination, run up to its chunk, and uninterrupted for two chunks more."""

    def __init__(self, combination: Combination, seed: int = 0) -> None:
        """ValueError if the combination is refused."""
        self.combination, self.seed = combination, seed
        self.spec, self.settings = combination.spec(TinyTalking()), combination.settings()
        self.model = TinyTalking()
        start = combination.chunk * FRAMES
        self.length = start + 2 * FRAMES
        whole = Rollout(
            self.model, self.spec, self.settings, keep_latents=True, prompts=combination.prompts(),
            reference=combination.picture(self.model),
        )  # fmt: skip
        given = combination.start_latents(self.model)
        latents = [chunk.latents for chunk in self._until(whole, start)] if given is None else waiting(whole, given)
        self.before = whole.snapshot()
        latents += [chunk.latents for chunk in whole.chunks(self.length)]
        self.reference = torch.cat(latents, 2)[:, :, start:]
        self.end = flat(whole.snapshot())
        # a deep layer's rotated keys are made again from its raw ones when they are read, and are anything until then
        self.unread = ".tensors.keys" if combination.anchor == "deep" else None
        self._known: dict[tuple, Outcome] = {}
        self.model.forget()
        rollout = self.rollout()
        with watching() as watched:
            next(rollout.chunks(self.length))
        self.operations: list[Operation] = watched.operations
        with watching() as watched:
            rollout.snapshot()
        self.looks = len(watched.operations)

    def _until(self, rollout: Rollout, frames: int) -> Any:
        for chunk in rollout.chunks(self.length):
            yield chunk
            if rollout.emitted >= frames:
                return

    def rollout(self, state: RolloutState | None = None, model: TinyTalking | None = None) -> Rollout:
        """A new run from a state, the one before the chunk if none is given."""
        return Rollout(
            model or self.model, self.spec, self.settings, state=state or self.before, keep_latents=True,
            prompts=self.combination.prompts(),
        )  # fmt: skip

    def injections(self) -> list[tuple[str, int]]:
        """Every (mode, n). An operation that writes nothing leaves the same whether it fails before or after it ran, and
        has no copy that could fail twice."""
        every = range(len(self.operations))
        writing = [n for n in every if self.operations[n].writes is not None]
        return [("before", n) for n in every] + [(mode, n) for mode in MODES[1:] for n in writing]

    def run(self, mode: str, n: int) -> Outcome:
        """Fail the n-th operation of the chunk."""
        self.model.forget()
        rollout = self.rollout()
        kind = InjectedMemory if mode == "twice" else kind_of(self.seed, self.combination.name, mode, n)
        injector = at(n, kind, late=mode == "after")
        latents: list[torch.Tensor] = []
        try:
            with injector:
                latents.append(next(rollout.chunks(self.length)).latents)
        except INJECTED:
            pass
        except Exception as error:  # noqa: BLE001
            return Outcome(UNREADABLE, f"the chunk ended with {type(error).__name__}: {error}")
        if injector.failed is None:
            return Outcome(WRONG, f"the chunk had only {len(injector.operations)} operations this time")
        if mode == "twice":
            return self._failing_again(rollout, injector, latents)
        if mode == "snapshot too":
            try:
                with at(chosen(self.looks, self.seed, self.combination.name, n), kind):
                    rollout.snapshot()
            except INJECTED:
                pass
            except Exception as error:  # noqa: BLE001
                if "layer" not in str(error):
                    return Outcome(UNREADABLE, f"the failing snapshot ended with {type(error).__name__}: {error}")
        return self._judged(rollout, latents)

    def _failing_again(self, rollout: Rollout, injector: Injector, latents: list[torch.Tensor]) -> Outcome:
        """The copy that failed fails once more, in whoever makes it next: the snapshot, or the chunk made again."""
        second, refusal = again(injector.failed.writes), ""
        with second:
            try:
                rollout.snapshot()
            except Exception as error:  # noqa: BLE001
                if "layer" not in str(error):
                    return Outcome(UNREADABLE, f"the second failure: {type(error).__name__}: {error}")
                refusal = str(error)
            if second.failed is None:
                try:
                    for chunk in rollout.chunks(self.length):
                        latents.append(chunk.latents)
                except INJECTED:
                    pass
                except Exception as error:  # noqa: BLE001
                    if "layer" not in str(error):
                        return Outcome(UNREADABLE, f"going on: {type(error).__name__}: {error}")
                    refusal = str(error)
        outcome = self._judged(rollout, latents)
        return Outcome(REFUSED, refusal) if refusal and outcome.verdict == GOOD else outcome

    def _judged(self, rollout: Rollout, latents: list[torch.Tensor]) -> Outcome:
        """Go on in each of the ways. `latents` have left already."""
        try:
            state = rollout.snapshot()
        except Exception as error:  # noqa: BLE001
            return Outcome(UNREADABLE, f"snapshot: {type(error).__name__}: {error}")
        taken = flat(state)
        left = sum(part.shape[2] for part in latents)
        if state.emitted != self.before.emitted + left:
            return Outcome(
                WRONG, f"{state.emitted} latents count as emitted, and {self.before.emitted + left} have left"
            )
        outcome = self._known.get(key := (left, *sorted(taken.items())))
        if outcome is None:
            outcome = self._known[key] = self._resumed(state, latents)
        if outcome.verdict != GOOD:
            return outcome
        outcome = self._goes_on(rollout, latents, "the same rollout")
        if outcome.verdict == GOOD and (place := difference(flat(state), taken)):
            return Outcome(WRONG, f"the state that was taken changed later at {place}")
        return outcome

    def _resumed(self, state: RolloutState, latents: list[torch.Tensor]) -> Outcome:
        """With a new rollout, and with one from a file, each with a model that has seen nothing."""
        try:
            rollout = self.rollout(state, TinyTalking())
        except Exception as error:  # noqa: BLE001
            return Outcome(UNREADABLE, f"a new rollout: {type(error).__name__}: {error}")
        outcome = self._goes_on(rollout, latents, "a new rollout")
        if outcome.verdict != GOOD:
            return outcome
        with tempfile.TemporaryDirectory(prefix="faults-", dir=_memory()) as folder:
            try:
                loaded = load_state(save_state(state, Path(folder) / "state.safetensors"))
                rollout = self.rollout(loaded, TinyTalking())
            except Exception as error:  # noqa: BLE001
                return Outcome(UNREADABLE, f"the file: {type(error).__name__}: {error}")
        return self._goes_on(rollout, latents, "from the file")

    def _goes_on(self, rollout: Rollout, latents: list[torch.Tensor], how: str) -> Outcome:
        """Run to the end; the latents with those that left before are compared with the whole, and the state with its end."""
        try:
            rest = [chunk.latents for chunk in rollout.chunks(self.length)] if rollout.emitted < self.length else []
            end = flat(rollout.snapshot())
        except Exception as error:  # noqa: BLE001
            return Outcome(UNREADABLE, f"{how}: {type(error).__name__}: {error}")
        found = torch.cat([*latents, *rest], 2)
        if found.shape != self.reference.shape:
            return Outcome(WRONG, f"{how}: {found.shape[2]} latents came where {self.reference.shape[2]} are due")
        if not torch.equal(found, self.reference):
            return Outcome(WRONG, f"{how}: latents differ by up to {(found - self.reference).abs().max():.3g}")
        if place := difference(end, self.end, self.unread):
            return Outcome(WRONG, f"{how}: the latents are right, but the state after them differs at {place}")
        return Outcome(GOOD)


def _memory() -> str | None:
    """A folder in memory for files of a moment, where the system has one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
