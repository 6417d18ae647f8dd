"""A decoder that carries something and sinks that keep what they are given, for streams without a VAE and without a file."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from adastate_core.video.frame_writer import NAME
from adastate_core.video.picture_forms import in_form

BATCH, CHUNK, HEIGHT, WIDTH = 2, 3, 4, 6


class TinyDecoder:
    """Pictures of a latent [B, 3, n, h, w]: one for the first, 4 for each later one, which depend on all latents before."""

    def __init__(self, device: torch.device | str = "cpu", nbytes: int = 0) -> None:
        self.device, self.nbytes = torch.device(device), nbytes
        self.memory, self.seen = torch.zeros(BATCH, 3, HEIGHT, WIDTH).to(self.device), 0
        self.calls = 0

    def step(self, latents: torch.Tensor, takes: str) -> torch.Tensor:
        self.calls += 1
        made = []
        for latent in latents.to(self.device).unbind(2):
            self.memory = self.memory * 0.75 + latent
            made += [torch.sigmoid(self.memory + i) for i in range(4 if self.seen else 1)]
            self.seen += 1
        return in_form(torch.stack(made, 1).movedim(2, -1), takes)

    def mark(self):
        return self.memory, self.seen

    def rewind(self, mark) -> None:
        self.memory, self.seen = mark

    def snapshot(self):
        return {"memory": self.memory.cpu().clone(), "seen": self.seen}

    def restore(self, saved) -> None:
        self.memory, self.seen = saved["memory"].to(self.device), saved["seen"]


class ListSink:
    """Keeps what it is given. `gate` is waited for before a chunk is written; chunk `fails` (from 0) raises `error`."""

    def __init__(self, takes: str = "bytes", fails: int | None = None, error: BaseException | None = None) -> None:
        self.path, self.takes, self.frames, self.warning = Path("list"), takes, 0, ""
        self.fails, self.error = fails, error
        self.gate, self.chunks, self.ended = threading.Event(), [], ""
        self.threads: set[str] = set()
        self.gate.set()

    def write(self, pictures: torch.Tensor) -> None:
        self.gate.wait(20)
        self.threads.add(threading.current_thread().name)
        if len(self.chunks) == self.fails:
            raise self.error
        self.chunks.append(pictures.clone())

    def sync(self) -> None:
        pass

    def stop(self) -> None:
        self.ended = "stopped"

    def close(self) -> None:
        self.ended = "closed"

    @property
    def pictures(self) -> torch.Tensor:
        return torch.cat(self.chunks)


def chunks(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Latents [B, 3, CHUNK, h, w], the same for every call."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, 3, CHUNK, HEIGHT, WIDTH, generator=generator) for _ in range(count)]


def decoded(latents: list[torch.Tensor]) -> torch.Tensor:
    """All pictures [B, t, h, w, 3] as floats, of one decoder after another."""
    decoder = TinyDecoder()
    return torch.cat([decoder.step(chunk, "float") for chunk in latents], 1)


def writers() -> list[threading.Thread]:
    """The threads that write."""
    return [thread for thread in threading.enumerate() if thread.name == NAME]
