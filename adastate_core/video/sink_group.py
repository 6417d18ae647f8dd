"""Several sinks that are given the same pictures, as one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from .frame_writer import Sink
from .picture_forms import deepest, reduced


class SinkGroup:
    """Writes each picture to every sink, in the form that it takes; `path` and `frames` are the first one's."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        """ValueError for a sink that takes what is no form."""
        self.sinks, self.takes = list(sinks), deepest(sink.takes for sink in sinks)

    @property
    def path(self) -> Path:
        return self.sinks[0].path

    @property
    def frames(self) -> int:
        return self.sinks[0].frames

    @property
    def warning(self) -> str:
        return "; ".join(sink.warning for sink in self.sinks if sink.warning)

    def write(self, pictures: torch.Tensor) -> None:
        for sink in self.sinks:
            sink.write(reduced(pictures, sink.takes))

    def sync(self) -> None:
        for sink in self.sinks:
            sink.sync()

    def stop(self) -> None:
        """End all, whatever happens to one of them; what went wrong first is raised."""
        with contextlib.ExitStack() as stack:
            for sink in reversed(self.sinks):
                stack.callback(sink.stop)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
