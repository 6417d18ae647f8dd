"""Where two features meet (pair_cases.py): any cut and resume of a rollout equals the whole, bit for bit.

pytest test_pairs.py -m quick     # the first few of a random order
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from faults.trial import difference, flat
from pair_cases import AMONG, GIVEN, GOES, QUICK, WORDS, Pair, cases, excluded, refusals, values
from tiny_talking import TinyTalking

from adastate_core.history import HISTORIES
from adastate_core.rollout import Rollout, RolloutState
from adastate_core.states.state_file import load_state, save_state


class Interrupt(Exception):
    pass


class Interruptible(TinyTalking):
    """Raises in the middle of the forward with which `left` reaches 0."""

    left: int | None = None

    def velocity(self, x, timestep, attention):
        if self.left is None:
            return super().velocity(x, timestep, attention)
        self.left -= 1
        return super().velocity(x, timestep, _Broken(attention) if self.left == 0 else attention)


class _Broken:
    """Its first layer attends, and no other."""

    def __init__(self, attention) -> None:
        self.attention = attention

    def attend(self, layer, *qkv):
        if layer:
            raise Interrupt
        return self.attention.attend(layer, *qkv)


class Run:
    """One video of a combination, in as many rollouts as it takes; its latents and what it ended with."""

    def __init__(self, case: Pair, device: str, folder=None) -> None:
        self.case, self.device, self.folder, self.model = case, device, folder, Interruptible()
        self.parts: list[torch.Tensor] = []
        self.given = case.start_latents(self.model)
        self.rollout = self._rollout(None)

    def _rollout(self, state: RolloutState | None) -> Rollout:
        return Rollout(
            self.model, self.case.spec(self.model, self.device), self.case.settings(), state=state,
            keep_latents=self.case.latents == "kept", prompts=self.case.prompts(), reference=self.case.picture(self.model),
        )  # fmt: skip

    @property
    def left(self) -> int:
        return sum(part.shape[2] for part in self.parts)

    def until(self, frames: int) -> Run:
        """Let latents out until there are `frames`; no fewer than a chunk where start latents need a longer video."""
        given, self.given = self.given, None
        length = self.case.length if given is not None and frames <= given.shape[2] else frames
        for chunk in self.rollout.chunks(length, given, self.case.stands) if self.left < frames else ():
            assert chunk.first_frame == self.left
            self.parts.append(chunk.latents)
            if self.left >= frames:
                break
        return self

    def resume(self, state: RolloutState) -> Run:
        """Go on from a state as the combination says: with a model that has seen nothing, maybe on another device."""
        if self.case.resume == "from a file":
            state = load_state(save_state(state, self.folder / "state.safetensors"))
        other = Run(self.case, self.case.devices()[1], self.folder)
        other.parts, other.given, other.rollout = list(self.parts), None, other._rollout(state)
        return other

    def latents(self) -> torch.Tensor:
        return torch.cat(self.parts, 2)

    def end(self) -> tuple[RolloutState, dict[str, object]]:
        """The state, and what the absorption reports but for its clock and the peak, which are of one run."""
        absorber = self.rollout.absorber
        report = {} if absorber is None else absorber.report()
        for of_one_run in ("solve_seconds", "kv_bytes_peak", "freed_share_at_peak"):
            report.pop(of_one_run, None)
        return self.rollout.snapshot(), report


def placed_as(state: RolloutState, other: RolloutState, run: Run) -> RolloutState:
    """`state` with those raw keys rotated that `other` holds at a position: a cache in host memory keeps keys raw, but takes
    an anchor of a device that had no raw copy of it as it is."""
    rope, heads, layers = run.rollout.past.rope, run.rollout.cache.heads, []
    for mine, theirs in zip(state.cache, other.cache, strict=True):
        keys, positions = mine.tensors["keys"].clone(), list(mine.positions)
        for i, (here, there) in enumerate(zip(mine.positions, theirs.positions, strict=True)):
            if here is None and there is not None:
                key = keys[:, i].unflatten(-1, (heads, -1))
                keys[:, i], positions[i] = rope.rotate(key, rope.turn([None], [there])).flatten(2), there
        layers.append(replace(mine, positions=tuple(positions), tensors=mine.tensors | {"keys": keys}))
    return replace(state, cache=tuple(layers))


def unplaced(state: RolloutState) -> RolloutState:
    """Without the rotated keys and their positions, which a chunk under way moves."""
    return replace(
        state,
        cache=tuple(
            replace(layer, positions=(), tensors={n: t for n, t in layer.tensors.items() if n != "keys"})
            for layer in state.cache
        ),
    )


class Whole:
    """What every way has to give: the uninterrupted run's latents, and its end with the cache on either device."""

    def __init__(self, case: Pair) -> None:
        self.case = case
        runs = {device: Run(case, device).until(case.length) for device in dict.fromkeys(case.devices())}
        self.latents = runs[case.devices()[0]].latents()
        self.ends = {device: run.end() for device, run in runs.items()}
        for run in runs.values():
            assert torch.equal(run.latents(), self.latents), "the cache's device changes the bits"
        # a deep layer's rotated keys are made again from its raw ones when they are read, and are anything until then
        self.unread = ".tensors.keys" if case.anchor == "deep" else None

    def equals(self, run: Run, how: str) -> None:
        found = run.latents()
        assert found.shape == self.latents.shape, f"{how}: {found.shape[2]} latents of {self.latents.shape[2]}"
        assert torch.equal(found, self.latents), f"{how}: off by {(found - self.latents).abs().max():.3g}"
        (state, report), (expected, expected_report) = run.end(), self.ends[run.device]
        if self.case.device == GOES and self.case.storage == "model":
            expected = placed_as(expected, state, run)
        place = difference(flat((state, report)), flat((expected, expected_report)), self.unread)
        assert not place, f"{how}: the latents are right, and the state after them differs at {place}"


def interrupted(run: Run, second: bool) -> Run:
    """Run to where the combination has its first or its `second` interrupt; the first of a chunk's is the transition's."""
    case, luck = run.case, run.case.luck("interrupt")
    steps = len(case.settings().schedule.sigmas) if case.blocks == "1" else 1
    if case.interrupt == "in a chunk":
        passes = steps + (case.talks not in HISTORIES[1:])  # a clean one besides
        stops = (case.chunk, luck.randrange(passes)), (luck.randrange(1, case.chunk + 2), luck.randrange(passes))
        run.rollout.on_step = lambda chunk, step, *_: _raise() if (chunk, step) == stops[second] else None
    elif case.interrupt == "in the transition":
        # the passes of a recache or a restart come first, and no step is told of them
        run.until(case.start).model.left = 1 + second
    elif second:  # AMONG: in the middle of the first or second pass over them, or before the second one
        run.model.left = luck.choice((1, 2))
    else:
        told = itertools.count()
        run.rollout.on_step = lambda *_: _raise() if next(told) == 1 else None
    with pytest.raises(Interrupt):
        run.until(case.length)
    run.rollout.on_step, run.model.left = None, None
    return run


def _raise() -> None:
    raise Interrupt


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Very many tiny operations: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def marked() -> list:
    """All combinations, of which the first few of a random order are of the quick tier."""
    quick = cases()[:QUICK]
    return [pytest.param(one, id=one.name, marks=[pytest.mark.quick] if one in quick else []) for one in cases()]


@pytest.mark.parametrize("case", marked())
@pytest.mark.sampled(2)
def test_any_cut_and_resume_equals_the_whole(case, tmp_path):
    whole, run = Whole(case), Run(case, case.devices()[0], tmp_path)
    for cut in case.cuts():
        state = run.until(cut).rollout.snapshot()
        assert state.emitted == run.left
        run = run.resume(state)
    whole.equals(run.until(case.length), f"cut at {case.cuts()}")
    for second in (False, True) if case.interrupt != "none" else ():
        run = interrupted(Run(case, case.devices()[0], tmp_path), second)
        state = run.rollout.snapshot()
        assert state.emitted == run.left
        assert case.interrupt != AMONG or (state.given is not None and state.next_frame < GIVEN)
        if state.emitted:
            calm = Run(case, run.device).until(state.emitted).rollout.snapshot()
            left, calm = unplaced(state), unplaced(calm)
            if (
                state.again
            ):  # frames were being committed again: what is cached of them is made anew before the next chunk
                left, calm = (replace(one, cache=(), again=0, absorption={}) for one in (left, calm))
            place = difference(flat(left), flat(calm))
            assert not place, f"what the interrupt left differs from the state before the chunk at {place}"
        taken, resumed = flat(state), run.resume(state)
        whole.equals(run.until(case.length), "the interrupted rollout itself")
        assert not difference(flat(state), taken), "a state that was taken changed later"
        whole.equals(resumed.until(case.length), "another rollout after the interrupt")


@pytest.mark.parametrize(("case", "sides"), refusals(), ids=str)
def test_what_does_not_go_together_is_refused_by_both_names(case, sides):
    with pytest.raises(ValueError) as caught:
        for device in case.devices():
            case.spec(TinyTalking(), device)
    for side in sides:
        assert WORDS[side] in str(caught.value)


def test_every_pair_of_values_is_in_a_combination():
    held = [{(name, getattr(one, name)) for name, _ in values()} for one in cases()]
    for a, b in itertools.combinations(values(), 2):
        if a[0] != b[0]:
            assert any({a, b} <= one for one in held) != excluded(a, b), (a, b)
    assert QUICK < len(held) < 80
    assert len({one.name for one in cases()}) == len(held)


@pytest.mark.parametrize("absorption", ["warming", "switching", "switched"])
def test_absorption_is_where_its_name_says(absorption):
    for case in [one for one in cases() if one.absorption == absorption][:4]:
        run, phases = Run(case, case.devices()[0]), []
        for frames in (case.start - 3, case.start, case.start + 3, case.length):
            phases.append(run.until(frames).rollout.absorber.report()["phase"])
        expected = {"warming": (2, 3), "switching": (1, 2), "switched": (0, 1)}[absorption]
        assert phases.count("warming") in expected and phases[-1] == "switched", (case.name, phases)
        if absorption == "switched" and case.transition != "flush":
            assert run.rollout.absorber.report()["monitor"], case.name
