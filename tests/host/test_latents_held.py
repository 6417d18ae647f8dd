"""How often a rollout's latents lie in host memory: the pack's promise is that nobody pays for outputs that nobody takes."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH, HEIGHT, FRAMES = 48, 32, 240  # latents [1, 16, 240, 4, 6]; no other tensor here has this shape
WHOLE = 16 * FRAMES * (HEIGHT // 8) * (WIDTH // 8) * 4


class Latents(TorchDispatchMode):
    """Most bytes of latents that were alive at once. Storages are counted as long as a tensor that was made here uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._alive = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 5 and out.shape[3:] == (HEIGHT // 8, WIDTH // 8):
            storage = out.untyped_storage()
            self._alive.append((weakref.ref(out), storage.data_ptr(), storage.nbytes()))
            self.most = max(self.most, self.bytes())
        return out

    def bytes(self) -> int:
        self._alive = [each for each in self._alive if each[0]() is not None]
        return sum({pointer: count for _, pointer, count in self._alive}.values())


@pytest.fixture
def measured(rollout):
    """(the result, most latents alive at once, those alive at the end), in whole videos."""

    def run(**inputs):
        with Latents() as latents:
            result = rollout(width=WIDTH, height=HEIGHT, length=4 * FRAMES - 3, steps=1, window_frames=0, **inputs)
        return result, latents.most / WHOLE, latents.bytes() / WHOLE

    return run


@pytest.mark.parametrize("keep_latents", [True, False])
def test_all_outputs_of_a_rollout_hold_its_latents_twice_at_most(measured, keep_latents):
    result, most, left = measured(keep_latents=keep_latents)
    latent, state = result.args[0]["samples"], result.args[1]
    assert latent.shape[2] == FRAMES and (state.latents is None) != keep_latents
    assert 1 < most < 2.15, most
    assert left < (2.1 if keep_latents else 1.1), left
