"""What every node of the pack is: its widgets are held to its own schema, wherever a value comes from.

The host compares min and max of an input only where validate_inputs does not take it by name, options on some of its versions
only, and NaN and what comes through a link never. Here all of it is compared when a prompt is queued, and again, links known,
when the node runs. Then what comes through a socket is compared too (sockets.py): of a prompt's JSON that may be anything. When
it is queued that is not asked, since the host would name the node's sockets in every answer about a widget.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...adastate_core.prompts.timeline import LONGEST_TEXT
from .api import io
from .sockets import socket_fault

ON_DISK = ("file",)  # combos that list what lies on disk: their nodes look there themselves
LONGEST_WORDS = LONGEST_TEXT  # characters of a text of many lines
LONGEST_LINE = 1_000  # of any other, and of a choice
_PLAIN = {"int", "float", "str", "bool"}
_MOST_CHARACTERS = 40  # of a value in a sentence
_MOST_BITS = 64
_HALF = re.compile("[\ud800-\udfff]")
_KINDS = (io.Int.Input, io.Float.Input, io.Combo.Input, io.String.Input, io.Boolean.Input)


class Node(io.ComfyNode):
    """A node whose `execute` raises ValueError for what its schema or its `check` refuses, and is queued only without."""

    @classmethod
    def check(cls) -> str | None:
        """What the schema cannot say, in a sentence, or None.

        A node that has something to say takes inputs by name, each with a default; they have the type of their widget, and
        their range is compared afterwards, so that a better sentence than the range's goes first. What is linked is None when
        a prompt is queued.
        """
        return None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        execute = cls.__dict__.get("execute")
        if execute is None or hasattr(execute.__func__, "holds"):  # the host clones classes for every call
            return
        inputs = functools.partial(_inputs, cls)  # each time anew: lists such as the presets change while the host runs
        cls.validate_inputs = classmethod(_asked(cls, execute.__func__, inputs))
        cls.execute = classmethod(_held(execute.__func__, inputs))


@dataclass(frozen=True)
class _Inputs:
    """A node's inputs by name: those that have a widget, and those that take links alone."""

    widgets: dict[str, Any]
    sockets: dict[str, Any]


def _inputs(node: type[Node]) -> _Inputs:
    inputs = _Inputs({}, {})
    for each in node.define_schema().inputs:
        has_widget = isinstance(each, _KINDS) and not getattr(each, "force_input", None)
        (inputs.widgets if has_widget else inputs.sockets)[each.id] = each
    return inputs


def _asked(node: type[Node], execute: Callable[..., Any], inputs: Callable[[], _Inputs]) -> Callable[..., Any]:
    """validate_inputs with the names that are compared: the host repeats its answer for every input that it takes."""

    def validate_inputs(cls: type[Node], **given: Any) -> bool | str:
        """True, or what is wrong; linked inputs arrive as None and pass."""
        return _fault(cls, inputs().widgets, given) or True

    taken = list(inspect.signature(execute).parameters.values())[1:]
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in taken):
        names = [parameter.name for parameter in taken if parameter.annotation in _PLAIN]
        names += [name for name in inspect.signature(node.check).parameters if name not in names]
        keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        validate_inputs.__signature__ = inspect.Signature([keyword(name) for name in ("cls", *names)])
    return validate_inputs


def _held(execute: Callable[..., Any], inputs: Callable[[], _Inputs]) -> Callable[..., Any]:
    """`execute` with its inputs compared first, and numbers of other libraries made plain ones."""
    signature = inspect.signature(execute)
    rest = next((each.name for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD), "")

    @functools.wraps(execute)
    def held(cls: type[Node], *args: Any, **kwargs: Any) -> Any:
        arguments = dict(signature.bind(cls, *args, **kwargs).arguments)
        arguments.pop("cls")
        given = arguments.pop(rest, {}) | arguments
        widgets, sockets = inputs().widgets, inputs().sockets
        for name, value in given.items():
            if value is None and name in widgets:
                raise ValueError(f"{name} is empty; {_accepted(widgets[name])}")
        reason = _fault(cls, widgets, given) or _socket_fault(sockets, given) or _unconnected(sockets, given)
        if reason:
            raise ValueError(reason)
        try:
            return execute(cls, **{name: _plain(widgets.get(name), value) for name, value in given.items()})
        except BaseException as error:
            _give_back(error)
            raise

    held.holds = True
    return held


def _give_back(error: BaseException) -> None:
    """Clear what the frames of a failure held: the host keeps its traceback until Python's collector comes by, and after a failure
    for want of memory that is what the next node lacks."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            left += [one.__cause__, one.__context__]


def _socket_fault(sockets: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """Of the first socket through which something else came than it takes."""
    for name, socket in sockets.items():
        if given.get(name) is not None and (wanted := socket_fault(socket.get_io_type(), given[name])):
            return f"{name} is {shown(given[name])}; {wanted}"
    return None


def _unconnected(sockets: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """Of the first socket that has to be connected and that nothing came through; of a CLIP the node knows more to say."""
    for name, socket in sockets.items():
        types = socket.get_io_type()
        if (
            given.get(name) is None
            and not socket.optional
            and types != "CLIP"
            and (wanted := socket_fault(types, None))
        ):
            return f"{name} is empty; {wanted}"
    return None


def _fault(node: type[Node], widgets: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """The first thing wrong: a type or length, a range, what the node itself finds; of what it looks at, its own sentence first."""
    known = [(name, given[name], widget) for name, widget in widgets.items() if given.get(name) is not None]
    for name, value, widget in known:
        if not _has_type(value, widget):
            return f"{name} is {shown(value)}; {_accepted(widget)}"
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            return _out_of_range(name, value, widget)
        if isinstance(value, str) and len(value) > (most := LONGEST_WORDS if _lines(widget) else LONGEST_LINE):
            return f"{name} has {len(value)} characters; it may have {most}: shorten it"
        if isinstance(value, str) and (half := _HALF.search(value)):
            return f"{name} has half a UTF-16 pair as its character {half.start() + 1}; delete it, or write the character again"
    names = inspect.signature(node.check).parameters
    ranges = {name: _out_of_range(name, value, widget) for name, value, widget in known}
    if reason := next((said for name, said in ranges.items() if said and name not in names), None):
        return reason
    own = node.check(**{name: _plain(widgets.get(name), given[name]) for name in names if name in given})
    return own or next(filter(None, ranges.values()), None)


def _has_type(value: Any, widget: Any) -> bool:
    try:
        if isinstance(widget, io.Int.Input):
            return not isinstance(value, str) and operator.index(value) is not None
        if isinstance(widget, io.Float.Input):
            return not isinstance(value, str) and math.isfinite(float(value))
        if isinstance(widget, io.Boolean.Input):
            return not isinstance(value, str) and value in (0, 1)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of many numbers
        return False
    return isinstance(value, str)


def _plain(widget: Any, value: Any) -> Any:
    """A number as an int or float; anything else as it is."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(widget, io.Int.Input):
        return operator.index(value)
    return float(value) if isinstance(widget, io.Float.Input) and not isinstance(value, int) else value


def _lines(widget: Any) -> bool:
    return isinstance(widget, io.String.Input) and bool(widget.multiline)


def _out_of_range(name: str, value: Any, widget: Any) -> str | None:
    if isinstance(widget, io.Combo.Input):
        return None if name in ON_DISK or value in widget.options else f"{name} is {shown(value)}; {_accepted(widget)}"
    if isinstance(widget, (io.Int.Input, io.Float.Input)) and not widget.min <= value <= widget.max:
        return f"{name} is {shown(value)}; it must be between {widget.min:g} and {_number(widget.max)}"
    return None


def _accepted(widget: Any) -> str:
    if isinstance(widget, io.Combo.Input) and widget.id in ON_DISK:
        return "it must be the name of a file of the list"
    if isinstance(widget, io.Combo.Input):
        return f"it must be one of {', '.join(map(str, widget.options))}"
    if isinstance(widget, io.String.Input):
        return "it must be a text"
    if isinstance(widget, io.Boolean.Input):
        return "it must be on or off"
    kind = "whole number" if isinstance(widget, io.Int.Input) else "number"
    return f"it must be a {kind} between {widget.min:g} and {_number(widget.max)}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def shown(value: Any) -> str:
    """A value for a sentence, short however large it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 2 * _MOST_BITS:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (str, int, float)):
        return repr(value[:_MOST_CHARACTERS] if isinstance(value, str) else value)
    return "nothing" if value is None else f"a {type(value).__name__}"
