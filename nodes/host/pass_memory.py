"""What the passes of a run would compute again and again, computed once: the embedding of a timestep with the modulations made
of it, and that of the text, which nothing reads any more once its keys and values are there.

The host's Wan calls three modules for them before its blocks. A `PassMemory` gives each a forward that looks here first while one
of its own passes is under way, and that is the original one at any other time.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.ldm.wan.model import WanModel

Forward = Callable[..., torch.Tensor]

OF_TIME = ("time_embedding", "time_projection")
OF_TEXT = "text_embedding"
MOST_BYTES = 1 << 24


class PassMemory:
    """One run's. What belongs to a timestep takes at most `most_bytes`, that used longest ago goes first; of the text, one
    prompt's embedding is held."""

    def __init__(self, device: torch.device, most_bytes: int = MOST_BYTES) -> None:
        self.device, self.most_bytes = device, most_bytes
        self._pass: tuple[Hashable, Hashable] | None = None
        self._kept: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._text: tuple[Hashable, torch.Tensor] | None = None
        self._forwards: dict[str, Forward] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what belongs to timesteps."""
        return sum(t.nbytes for t in self._kept.values())

    def forwards(self, patcher: Any) -> Iterator[tuple[str, Callable[[Forward], Forward]]]:
        """The name of each module of a MODEL that is asked here first, and what makes its forward of the one that it has. None of
        a model that has a pass of its own."""
        wan = patcher.model.diffusion_model
        if type(wan) is WanModel:
            for name in (*OF_TIME, OF_TEXT):
                yield name, lambda original, name=name: self._forward(name, original)

    def serves(self, wan: torch.nn.Module) -> bool:
        """Whether the modules of the timestep have the forwards that were made here. They then take it on the CPU too."""
        made = (self._forwards.get(name) for name in OF_TIME)
        return all(
            one is not None and vars(getattr(wan, name)).get("forward") is one
            for name, one in zip(OF_TIME, made, strict=True)
        )

    @contextmanager
    def during(self, timestep: Hashable, text: Hashable) -> Iterator[None]:
        """A pass at `timestep` with the prompt `text`, by name."""
        self._pass = timestep, text
        try:
            yield
        finally:
            self._pass = None

    def _forward(self, name: str, original: Forward) -> Forward:
        # the host leaves the forward in the model until it loads another clone of it: it must not keep a run's tensors alive
        held = weakref.ref(self)

        def forward(x: torch.Tensor) -> torch.Tensor:
            memory = held()
            if memory is None or memory._pass is None:
                return original(x)
            timestep, text = memory._pass
            if name == OF_TEXT:
                return memory._of_text(text, lambda: original(x))
            return memory._of_time((name, timestep), lambda: original(x.to(memory.device)))

        self._forwards[name] = forward
        return forward

    def _of_text(self, text: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._text is None or self._text[0] != text:
            self._text = None
            self._text = text, make()
        return self._text[1]

    def _of_time(self, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        made = self._kept.pop(key, None)
        if made is None:
            made = make()
            if made.nbytes > self.most_bytes:
                return made
            while self._kept and self.nbytes + made.nbytes > self.most_bytes:
                self._kept.popitem(last=False)
        self._kept[key] = made
        return made
