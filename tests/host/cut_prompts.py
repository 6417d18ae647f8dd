"""Prompts that are cut short, run by the host's own executor: how they ended, and what they left in the process.

Models come from nodes that give what they were told; everything else of a graph are the pack's own nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import execution
import pytest
import torch
from adastate_pack.nodes.host import live_runs
from conftest import NODES
from test_links import given, node, taker

import nodes as host_nodes

ROLLOUT, PROMPT_ID = "5", "cut"


class NewerInterrupt(BaseException):
    """An interrupt that is no Exception, as that of newer hosts."""


@dataclass(frozen=True)
class Ended:
    """How a prompt ended: success, interrupted or error, and of an error its class and what the host shows of it."""

    how: str
    kind: str = ""
    message: str = ""
    outputs: dict[str, Any] | None = None


class Prompts:
    """One executor of the host's, with its cache, and nodes that give models. `taken`: what the newest prompt's Take nodes got, by
    slot."""

    def __init__(self, patch: pytest.MonkeyPatch, **models: tuple[str, Any]) -> None:
        """`models`: by the class that gives it, the type and the value."""
        self.taken: dict[int, Any] = {}
        classes = NODES | {name: given(kind, value) for name, (kind, value) in models.items()}
        for name, each in (classes | {"Take": taker(self.taken)}).items():
            patch.setitem(host_nodes.NODE_CLASS_MAPPINGS, name, each)
        server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda event, data, sid=None: None)
        self.executor = execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0})

    def __call__(self, graph: dict[str, dict], prompt_id: str = PROMPT_ID) -> Ended:
        """Run a graph, which has to be one that the host accepts."""
        valid, error, outputs, errors = asyncio.run(execution.validate_prompt(prompt_id, graph, None))
        assert valid, (error, errors)
        self.taken.clear()
        try:
            self.executor.execute(graph, prompt_id, {}, outputs)
        except NewerInterrupt:  # which this host does not know for one
            return Ended("interrupted")
        told = dict(self.executor.status_messages)
        if self.executor.success:
            return Ended("success", outputs=self.executor.history_result["outputs"])
        if "execution_interrupted" in told:
            return Ended("interrupted")
        failed = told["execution_error"]
        return Ended("error", failed["exception_type"], failed["exception_message"].strip())

    def nothing(self) -> None:
        """A prompt of nothing, so that the executor's cache holds no output of the one before."""
        assert self({"1": node("GivenNothing"), "2": node("Take", value=["1", 0], slot=0)}).how == "success"


def stop() -> None:
    """What POST /adastate/stop does to the rollout under way."""
    run = live_runs.find(PROMPT_ID, ROLLOUT)
    if run is not None and run.running:
        run.stop()


def interrupt() -> None:
    """What POST /interrupt does."""
    comfy.model_management.interrupt_current_processing(True)


def newer_interrupt() -> None:
    raise NewerInterrupt


class Looks:
    """Every time that the host looks whether it was interrupted, which is in every layer of a model, and in every step of
    progress: `came` counts them, and before number `at` `do` is called."""

    def __init__(self, at: int | None = None, do: Any = None) -> None:
        self.came, self.at, self.do = 0, at, do

    def install(self, patch: pytest.MonkeyPatch) -> None:
        original = comfy.model_management.throw_exception_if_processing_interrupted

        def look() -> None:
            number, self.came = self.came, self.came + 1
            if number == self.at:
                self.do()
            original()

        patch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", look)


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes of all tensors that the garbage collector knows, threads by name, open files."""

    tensors: int
    threads: tuple[str, ...]
    files: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        storages = {}
        for each in gc.get_objects():
            if issubclass(type(each), torch.Tensor) and each.device.type != "meta":
                with contextlib.suppress(Exception):  # a tensor that has no storage of its own
                    storages[each.untyped_storage()._cdata] = each.untyped_storage().nbytes()
        files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        return cls(sum(storages.values()), tuple(sorted(t.name for t in threading.enumerate())), files)

    def more_than(self, before: Held) -> list[str]:
        """What is held that was not before, in sentences."""
        bad = []
        if self.tensors > before.tensors:
            bad.append(f"{self.tensors - before.tensors} bytes of tensors are still held")
        if self.threads != before.threads:
            bad.append(f"the threads are {self.threads} and were {before.threads}")
        if self.files > before.files:
            bad.append(f"{self.files} files are open and {before.files} were")
        return bad


@contextlib.contextmanager
def patched(*installed: Any) -> Iterator[None]:
    """Within it each of these is installed."""
    with pytest.MonkeyPatch.context() as patch:
        for each in installed:
            each.install(patch)
        yield
