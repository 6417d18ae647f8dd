"""Pure tensor functions that a compiler makes one kernel each, and the plain way where it does not.

    fused = Fused({"gate": gate}, *compiler_for(device))
    fused.prepare("gate", *examples)      # while the model loads: compiles for arguments of these shapes, or says why not
    out = fused("gate", *arguments)       # compiled if it was prepared for such arguments, else the plain function

Compiled and plain give other last bits, so `way` says which of them a run goes; nothing is ever compiled by a call.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

log = logging.getLogger("adastate")

COMPILED, PLAIN = WAYS = ("compiled", "plain")
# "0" turns compiling off
SWITCH = "ADASTATE_COMPILE"
# where torch keeps what it compiled, if anyone says so
CACHE = "TORCHINDUCTOR_CACHE_DIR"

Function = Callable[..., Any]
Compiler = Callable[[Function], Function]

# what was compiled in this process: every run of the same sizes finds it again
_MADE: dict[Hashable, Function] = {}


def inductor(function: Function) -> Function:
    """`function` compiled by torch, as one graph and for the shapes that it is first called with.

    Kernels are chosen by rule, not by timing them, so the same machine gives the same bits every time.
    """
    config = importlib.import_module("torch._inductor.config")
    options = {"deterministic": True} if hasattr(config, "deterministic") else {}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def compiler_for(device: torch.device) -> tuple[Compiler | None, str]:
    """(what compiles for `device`, "") or (None, why nothing does)."""
    if os.environ.get(SWITCH, "").strip() == "0":
        return None, f"{SWITCH} is 0"
    if device.type != "cuda":
        return None, f"the model runs on {device.type}, and only for CUDA anything is compiled"
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed, which torch compiles with"
    return inductor, ""


class Fused:
    """Named pure functions that go one way together, compiled or plain.

    A function takes tensors, numbers, tuples of these and None. It may write to tensors that it is given, if doing so again
    changes nothing. Functions are told apart by their own identity, so they have to be a module's own, no closures.
    """

    def __init__(
        self,
        functions: Mapping[str, Function],
        compiler: Compiler | None = None,
        why: str = "",
        folder: Path | None = None,
    ) -> None:
        """`compiler`: None for the plain way, of which `why` says why. `folder`: where what is compiled is kept for the next
        start, unless torch was told another place."""
        self.functions, self.why = dict(functions), why
        self._compiler, self._folder = compiler, folder
        self._ready: dict[Hashable, Function] = {}

    @property
    def way(self) -> str:
        """One of WAYS: how what was prepared is run."""
        return PLAIN if self._compiler is None else COMPILED

    def prepare(self, name: str, *arguments: Any) -> None:
        """Compile a function for arguments of these shapes, by running it on them. If the compiler fails, a warning says so once
        and all functions are plain from then on; torch.cuda.OutOfMemoryError passes through."""
        if self._compiler is None or (key := _key(name, arguments)) in self._ready:
            return
        made = (self.functions[name], self._compiler, key)
        try:
            with _kept_in(self._folder):
                function = _MADE.get(made) or self._compiler(_copy(self.functions[name]))
                function(*arguments)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            self._fail(name, error)
            return
        _MADE[made] = self._ready[key] = function

    def prepared(self, name: str, *arguments: Any) -> bool:
        """Whether a call with such arguments runs what was compiled."""
        return self._compiler is not None and _key(name, arguments) in self._ready

    def __call__(self, name: str, *arguments: Any) -> Any:
        if self._compiler is not None:
            function = self._ready.get(_key(name, arguments))
            if function is not None:
                try:
                    return function(*arguments)
                except torch.cuda.OutOfMemoryError:
                    raise
                except Exception as error:
                    self._fail(name, error)
        return self.functions[name](*arguments)

    def go_plain(self, why: str) -> None:
        """From now on every function is the plain one."""
        self._compiler, self.why = None, why
        self._ready.clear()

    def _fail(self, name: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no words'}"
        self.go_plain(f"{name} could not be compiled ({reason})")
        log.warning(
            "%s; it all goes the plain way, which is slower. %s=0 in the environment turns compiling off.",
            self.why,
            SWITCH,
        )


def _copy(function: Function) -> Function:
    """The same function with code of its own: torch looks compiled code up by the code object, and tries one after the other of
    all shapes that it knows for it."""
    if not isinstance(function, FunctionType):
        return function
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _key(name: str, arguments: tuple[Any, ...]) -> Hashable:
    """What compiled code depends on beside the numbers in its tensors."""
    return name, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(_form, arguments)


def _form(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_form, value)) if isinstance(value, tuple) else value


@contextmanager
def _kept_in(folder: Path | None) -> Iterator[None]:
    """While it is entered torch keeps what it compiles in `folder`; a place that the user chose stays."""
    before = os.environ.get(CACHE)
    chosen = before is not None and Path(before).parent != Path(tempfile.gettempdir())
    if folder is None or chosen:
        yield
        return
    os.environ[CACHE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(CACHE, None)
        else:
            os.environ[CACHE] = before
