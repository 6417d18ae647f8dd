"""What a pickle would take to read, found without reading it: pickles that are small and never end, or end the process.

A pickle names what it made before, so forty tuples of two can stand for 2^40; as a key of a dictionary they are hashed one by one,
and a tuple nested some ten thousand times overflows the C stack. torch.load keeps what a pickle may call, not how large it grows.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass

MOST_PARTS, DEEPEST, MOST_COMMANDS = 10_000_000, 100, 4_000_000
_GETS, _PUTS = {"GET", "BINGET", "LONG_BINGET"}, {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}


@dataclass(frozen=True)
class _Made:
    """Something on a pickle's stack: how many parts a walk through it meets, and how deep they lie."""

    parts: int = 1
    depth: int = 0


_PLAIN, _MARK = _Made(), _Made(0)


def check_pickle(data: bytes) -> None:
    """ValueError, a phrase, for a pickle that is cut or damaged, or has more than MOST_COMMANDS, or makes tuples
    of more than MOST_PARTS or deeper than DEEPEST. Its commands are followed on a stack of sizes; nothing is made or called."""
    stack: list[_Made] = []
    memo: dict[int, _Made] = {}
    try:
        for count, (command, argument, _) in enumerate(pickletools.genops(data)):
            if count > MOST_COMMANDS:
                raise TooMuch(f"its pickle has more than {MOST_COMMANDS} commands, and that of a model some 100,000")
            _step(command, argument, stack, memo)
    except (IndexError, KeyError) as error:
        raise ValueError("its pickle is damaged") from error
    except ValueError as error:
        if isinstance(error, TooMuch):
            raise
        raise ValueError("its pickle is cut off or damaged") from error


class TooMuch(ValueError):
    """A pickle that stands for more than it is."""


def _step(command: pickletools.OpcodeInfo, argument: object, stack: list[_Made], memo: dict[int, _Made]) -> None:
    name = command.name
    if name in _GETS:
        stack.append(memo[int(argument)])
    elif name in _PUTS:
        memo[len(memo) if argument is None else int(argument)] = stack[-1]
    elif name == "MARK":
        stack.append(_MARK)
    else:
        taken = _taken(command, stack)
        if name in _TUPLES:
            stack.append(_tuple_of(taken))
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD", "ADDITEMS"):
            stack.append(taken[0])
        else:
            stack += [_PLAIN] * len(command.stack_after)


def _taken(command: pickletools.OpcodeInfo, stack: list[_Made]) -> list[_Made]:
    """What a command takes from the stack, without the mark."""
    wanted = command.stack_before
    if pickletools.markobject not in wanted:
        taken = stack[len(stack) - len(wanted) :] if wanted else []
        if len(taken) < len(wanted):
            raise IndexError
        del stack[len(stack) - len(wanted) :]
        return taken
    at = next((i for i in reversed(range(len(stack))) if stack[i] is _MARK), -1)
    before = wanted.index(pickletools.markobject)
    if at < before:
        raise IndexError
    taken = stack[at - before : at] + stack[at + 1 :]
    del stack[at - before :]
    return taken


def _tuple_of(parts: list[_Made]) -> _Made:
    made = _Made(1 + sum(part.parts for part in parts), 1 + max((part.depth for part in parts), default=0))
    if made.parts > MOST_PARTS or made.depth > DEEPEST:
        raise TooMuch("its pickle stands for far more than it is")
    return made
