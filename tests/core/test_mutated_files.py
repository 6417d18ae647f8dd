"""Files that were damaged by chance: each is refused in one sentence with its name, or is a file that goes on."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from mutations import mutated
from state_cases import CASES, go_on, made

from adastate_core.absorption.saved import load_solution, save_solution, solution_from
from adastate_core.states.state_file import load_state, save_state, state_chunk

STATES, ABSORPTIONS = 150, 150
# what only Python says, and what says nothing
RAW = re.compile(
    r"\b(TypeError|KeyError|ValueError|IndexError|RecursionError|AttributeError|JSONDecodeError|RuntimeError|OverflowError|"
    r"NoneType|Traceback|subscriptable|unhashable|positional|NotImplemented|object is|unsupported operand|codec can't)\b"
)


def check_sentence(text: str, name: str, what: str) -> None:
    assert text.startswith(name) and "\n" not in text and len(text) < 500 and not RAW.search(text), (what, text)
    text.encode()  # it is sent to a page as UTF-8


def solutions() -> list[tuple[str, object, object]]:
    """(name, spec, solution) of an absorption of each kind."""
    found = []
    for name in ("switched", "lowrank"):
        spec, _ = made(name)
        rollout = go_on(spec)
        list(rollout.chunks(16))
        found.append((name, spec, rollout.absorber.solution))
    return found


def run_states(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Damage `count` states; how many were refused and how many went on."""
    whole = {name: save_state(made(name)[1], folder / f"{name}.whole") for name in CASES}
    seen = {"refused": 0, "went on": 0}
    for number in range(count):
        chance = random.Random(seed * 1_000_003 + number)
        name = chance.choice(sorted(CASES))
        target = folder / "m.state.safetensors"
        what = f"{number} {name}: {mutated(whole[name], target, chance)}"
        try:
            state = load_state(target)
        except ValueError as error:
            check_sentence(str(error), target.name, what)
            seen["refused"] += 1
            continue
        assert state_chunk(target) == state.next_chunk, what
        spec = made(name)[0]
        if spec.differences(state.spec):
            seen["went on"] += 1  # a whole state of another rollout, which the node says
            continue
        frames = sum(chunk.latents.shape[2] for chunk in go_on(spec, state).chunks(state.emitted + 5))
        assert frames >= 5, what
        seen["went on"] += 1
    return seen


def run_absorptions(folder: Path, count: int, seed: int) -> dict[str, int]:
    """The same of absorptions; one that loads meets its model as the node does."""
    kinds = solutions()
    whole = {
        name: save_solution(
            solution, spec.absorption, {"model": "a", "solved_for": {"seed": 7}}, folder / f"{name}.whole"
        )
        for name, spec, solution in kinds
    }
    seen = {"refused": 0, "went on": 0}
    for number in range(count):
        chance = random.Random(seed * 1_000_003 + number)
        name, spec, _ = chance.choice(kinds)
        target = folder / "m.absorption.safetensors"
        what = f"{number} {name}: {mutated(whole[name], target, chance)}"
        try:
            settings, belongs_to, state = load_solution(target)
        except ValueError as error:
            check_sentence(str(error), target.name, what)
            seen["refused"] += 1
            continue
        assert isinstance(belongs_to.get("solved_for", {}), dict), what
        geometry = spec.geometry
        try:
            solution = solution_from(
                state, settings, geometry.layers, geometry.heads * geometry.head_dim, geometry.heads
            )
        except ValueError as error:
            check_sentence(f"{target.name}: {error}", target.name, what)
            seen["refused"] += 1
            continue
        assert len(solution.chosen) == settings.layers(geometry.layers), what
        seen["went on"] += 1
    return seen


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_damaged_states_are_refused_with_their_name_or_go_on(tmp_path, seed):
    seen = run_states(tmp_path, STATES // 3, seed)
    assert seen["refused"] > STATES // 6 and sum(seen.values()) == STATES // 3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_damaged_absorptions_are_refused_with_their_name_or_are_whole(tmp_path, seed):
    seen = run_absorptions(tmp_path, ABSORPTIONS // 3, seed)
    assert seen["refused"] > ABSORPTIONS // 6 and sum(seen.values()) == ABSORPTIONS // 3
