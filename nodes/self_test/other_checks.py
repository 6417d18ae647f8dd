"""Decoders against the host's own, and what one exact block of Wan 2.1 1.3B takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ...adastate_core.decode.ways import FAST
from ..builder import Request
from ..host import made_models as made
from ..host.codec import HostDecoder
from ..host.model import available_bytes, forward_bytes
from ..host.progress import check_interrupt
from ..job import Job
from .bench import SEED, Beat, Bench, way_of_blocks
from .outcome import Outcome, judged

LATENTS, CHUNK = 7, 3
HALF_A_BYTE = 0.5 / 255
# what is timed: Wan's own size, a quarter of it where there is no GPU; no more passes or seconds than these
SIZE, SMALLER = (832, 480), (416, 240)
TEXT_TOKENS, BLOCKS = 512, 30
MOST_PASSES, MOST_SECONDS = 5, 12.0


def decode(bench: Bench, make: Callable[[], Any]) -> Outcome:
    """A latent chunk by chunk through the streaming decoder, both ways, against the host's decode of the whole."""
    vae = make()
    latents = torch.randn(1, 16, LATENTS, 6, 8, generator=torch.Generator().manual_seed(5))
    whole = _frames(vae.decode(latents)).clamp(0, 1)
    found = []
    for fast in (False, True):
        decoder = HostDecoder(vae, fast=fast)
        decoder.load(latents.shape)
        if fast and decoder.way != FAST:
            found.append((True, f"not the fast way: {decoder.why_plain}"))
            continue
        found.append(_compared(_streamed(decoder, latents), whole, f"the {decoder.way} way"))
    found.append((True, f"in {str(vae.vae_dtype).removeprefix('torch.')}"))
    return judged(found)


def _streamed(decoder: HostDecoder, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [t, H, W, 3] in 0..1 on the CPU."""
    parts = []
    for first in range(0, LATENTS, CHUNK):
        check_interrupt()
        parts.append(decoder.step(latents[:, :, first : first + CHUNK]).cpu())
    return torch.cat(parts, 1)[0].clamp(0, 1)


def _compared(streamed: torch.Tensor, whole: torch.Tensor, way: str) -> tuple[bool, str]:
    if streamed.shape != whole.shape:
        return False, f"{way}: pictures {tuple(streamed.shape)}, the host's {tuple(whole.shape)}"
    apart = float((streamed - whole).abs().max())
    if not apart:
        return True, f"{way}: the host's decode to the bit"
    return apart < HALF_A_BYTE, f"{way}: at most {255 * apart:.3f} of 255 from the host's decode"


def _frames(pictures: torch.Tensor) -> torch.Tensor:
    """What the host's decode gives, [1, t, H, W, 3] or [t, H, W, 3], as the latter on the CPU."""
    pictures = pictures.cpu().float()
    return pictures[0] if pictures.ndim == 5 else pictures


def block_of_1_3b(bench: Bench) -> Outcome:
    """Seconds of one pass of one block, and the bytes that a rollout of it takes."""
    on_gpu = bench.device.type != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    width, height = SIZE if on_gpu else SMALLER
    model = made.loaded(made.random_weights(made.ONE_BLOCK, dtype), dtype)
    context = torch.randn(1, TEXT_TOKENS, 4096, generator=torch.Generator().manual_seed(2))
    start = {"samples": torch.zeros(1, 16, CHUNK, height // 8, width // 8)}
    request = Request(
        model=model, positive=[[context, {}]], width=width, height=height, length=77, seed=SEED, chunk_frames=CHUNK,
        window_frames=CHUNK, start_latent=start, keep_latents=False,
    )  # fmt: skip
    job = Job(request)
    rollout = job.rollout(Beat())
    clock = _Clock(bench.device)
    handles = clock.watch(job.model.patcher.model.diffusion_model.blocks[0])
    rollout.on_step = lambda chunk, step, steps, x0: clock.before()
    try:
        for _ in rollout.chunks(job.latent_length, job.given):
            pass
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    asked = f"{width}x{height}, {CHUNK} frames on a window of {CHUNK}, {str(dtype).removeprefix('torch.')}"
    return judged([(True, f"{clock.told()}; {asked}, {way_of_blocks(job)}"), *_memory(job, rollout)])


class _Enough(Exception):
    """So many passes were timed."""


class _Clock:
    """Seconds of a block in each of its passes. The first one has no window to read and the second reads it for the first time:
    neither counts."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.started = device, [], 0.0
        self._asked = time.perf_counter()

    def watch(self, block: torch.nn.Module) -> list[Any]:
        """Hooks around a block."""
        return [block.register_forward_pre_hook(self._enter), block.register_forward_hook(self._leave)]

    def before(self) -> None:
        """Before each pass: let an interrupt through, and end when there are enough."""
        check_interrupt()
        late = time.perf_counter() - self._asked > MOST_SECONDS
        if len(self.seconds) >= (3 if late else 2 + MOST_PASSES):
            raise _Enough

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _enter(self, *_: Any) -> None:
        self._wait()
        self.started = time.perf_counter()

    def _leave(self, *_: Any) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self.started)

    def told(self) -> str:
        """The median, and what it makes of all blocks."""
        middle = statistics.median(self.seconds[2:])
        return f"{middle:.4f} s a pass (median of {len(self.seconds) - 2}), {BLOCKS * middle:.2f} s for all {BLOCKS} blocks"


def _memory(job: Job, rollout: Any) -> list[tuple[bool, str]]:
    """Bytes of keys and values against the plan, and on CUDA all that was allocated against plan and forward."""
    used, mib = rollout.cache.peak_nbytes, 2**20
    found = [(used <= job.plan.kv_bytes, f"keys and values {used:,} of {job.plan.kv_bytes:,} bytes planned")]
    peak = job.model.peak_bytes()
    if peak is not None:
        forward = forward_bytes(job.request.model, job.plan)
        most = job.plan.total_bytes + forward
        words = (
            f"{peak / mib:.0f} MiB at the peak, {job.plan.total_bytes / mib:.0f} planned and {forward / mib:.0f} for the "
            f"forward by the host, {available_bytes(job.request.model) / mib:.0f} to be had"
        )
        found.append((peak <= most, words))
    return found
