"""The holder of functions that are compiled or plain: what it compiles and when, and what happens when that fails."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs_compiler import needs_compiler

from adastate_core import fused as module
from adastate_core.fused import CACHE, COMPILED, PLAIN, SWITCH, Fused, compiler_for, inductor

ROOT = Path(__file__).resolve().parents[2]


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


@pytest.fixture(autouse=True)
def nothing_made(monkeypatch):
    monkeypatch.setattr(module, "_MADE", {})


class Compiler:
    """Gives functions that note how often they are called, and fails where it is told to."""

    def __init__(self, making: BaseException | None = None, running: BaseException | None = None) -> None:
        self.making, self.running, self.made, self.calls = making, running, 0, 0

    def __call__(self, function):
        if self.making is not None:
            raise self.making
        self.made += 1

        def run(*arguments):
            self.calls += 1
            if self.running is not None and self.calls > 1:
                raise self.running
            return function(*arguments)

        return run


def test_only_what_was_prepared_is_compiled():
    compiler, x = Compiler(), torch.ones(2, 3)
    fused = Fused({"doubled": doubled, "halved": halved}, compiler)
    assert fused.way == COMPILED and not fused.prepared("doubled", x)
    fused.prepare("doubled", x)
    fused.prepare("doubled", torch.zeros(2, 3))
    assert (compiler.made, compiler.calls) == (1, 1) and fused.prepared("doubled", x)
    assert torch.equal(fused("doubled", x), 2 * x) and compiler.calls == 2
    others = [torch.ones(3, 3), torch.ones(3, 2).T, x.double()]
    for other in others:
        assert not fused.prepared("doubled", other) and torch.equal(fused("doubled", other), 2 * other)
    assert torch.equal(fused("halved", x), x / 2)
    with torch.inference_mode():
        fused("doubled", x)
    assert compiler.calls == 2


def test_what_was_compiled_serves_the_next_run():
    compiler, x = Compiler(), torch.ones(2, 3)
    for _ in range(2):
        Fused({"doubled": doubled}, compiler).prepare("doubled", x)
    assert compiler.made == 1


@pytest.mark.parametrize("moment", ["making", "running"])
def test_a_failing_compiler_means_one_warning_and_the_plain_way(caplog, moment):
    compiler, x = Compiler(**{moment: RuntimeError("no such register\nand more")}), torch.ones(2, 3)
    fused = Fused({"doubled": doubled, "halved": halved}, compiler)
    with caplog.at_level(logging.WARNING, "adastate"):
        for name in ("doubled", "halved"):
            fused.prepare(name, x)
        for _ in range(2):
            assert torch.equal(fused("doubled", x), 2 * x) and torch.equal(fused("halved", x), x / 2)
    assert fused.way == PLAIN and "could not be compiled (RuntimeError: no such register)" in fused.why
    assert len(caplog.messages) == 1 and "slower" in caplog.messages[0] and SWITCH in caplog.messages[0]


@pytest.mark.parametrize("moment", ["making", "running"])
def test_no_memory_is_no_failure_of_the_compiler(moment):
    compiler, x = Compiler(**{moment: torch.cuda.OutOfMemoryError("CUDA out of memory")}), torch.ones(2, 3)
    fused = Fused({"doubled": doubled}, compiler)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fused.prepare("doubled", x)
        fused("doubled", x)
    assert fused.way == COMPILED


def test_without_a_compiler_all_is_plain():
    fused, x = Fused({"doubled": doubled}, why="nobody wants it"), torch.ones(2)
    fused.prepare("doubled", x)
    assert (fused.way, fused.why, fused.prepared("doubled", x)) == (PLAIN, "nobody wants it", False)
    assert torch.equal(fused("doubled", x), 2 * x)


def test_compiling_is_for_cuda_alone_and_can_be_turned_off(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert compiler_for(cpu)[0] is None and "only for CUDA" in compiler_for(cpu)[1]
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv(SWITCH, raising=False)
    assert compiler_for(cuda) == (inductor, "")
    monkeypatch.setenv(SWITCH, "0")
    assert compiler_for(cuda) == (None, "ADASTATE_COMPILE is 0")
    monkeypatch.delenv(SWITCH)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert compiler_for(cuda)[0] is None and "Triton" in compiler_for(cuda)[1]


def test_a_place_that_the_user_chose_for_torch_stays(monkeypatch, tmp_path):
    seen = []
    for before, expected in ((None, "own"), (str(tmp_path / "chosen"), "chosen")):
        monkeypatch.delenv(CACHE, raising=False) if before is None else monkeypatch.setenv(CACHE, before)
        fused = Fused(
            {"doubled": doubled}, lambda f: lambda *a: seen.append(os.environ.get(CACHE)), folder=tmp_path / "own"
        )
        fused.prepare("doubled", torch.ones(2))
        assert seen.pop() == str(tmp_path / expected) and os.environ.get(CACHE) == before


START = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from adastate_core.attention import block
from adastate_core.fused import Fused, inductor
from torch._dynamo.utils import counters
fused = Fused(block.FUNCTIONS, inductor, folder=Path(sys.argv[2]))
x, e = torch.ones(1, 6, 8), torch.ones(1, 1, 6, 8)
fused.prepare("gate", x, x, e[0], e)
assert fused.way == "compiled", fused.why
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


@needs_compiler
def test_what_is_compiled_is_on_disk_for_the_next_start(tmp_path):
    def start() -> str:
        environment = {k: v for k, v in os.environ.items() if k != CACHE} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", START, str(ROOT), str(tmp_path / "kept")]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    assert (start(), start()) == ("1 0", "0 1")
