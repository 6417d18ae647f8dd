"""Where the chunks of Rolling Forcing's window lie: a new one's noise is made on the CPU, the others are on the device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from adastate_core.schedules.noise import noise
from adastate_core.schedules.rolling import Block, advanced, joined, under_way

SIGMAS, SHAPE = (1.0, 0.6, 0.3), (1, 4, 3, 4, 6)


@pytest.mark.parametrize("resumed", [False, True])
def test_passes_on_a_device_join_new_noise_and_kept_chunks(resumed):
    """Fake tensors know their device and refuse two in one operation, as real ones do; from the start and from a state."""
    with FakeTensorMode():
        device, blocks = torch.device("cuda", 0), ()
        if resumed:
            blocks = under_way(torch.zeros(1, 4, 6, 4, 6), 4, 3, len(SIGMAS))
        for _ in range(4):
            first = blocks[0].chunk if blocks else 4
            blocks = (*blocks, Block(first + len(blocks), 0, noise(7, first + len(blocks), 0, SHAPE)))
            x, timesteps, levels = joined(blocks, SIGMAS, device)
            assert x.shape[2] == len(timesteps) == len(levels) == 3 * len(blocks)
            x0 = x - levels * torch.ones_like(x)
            finished, blocks = advanced(blocks, x0, SIGMAS, lambda chunk: 7)
            assert x0.device == device and all(block.x.device == device for block in blocks)
        assert finished.shape == SHAPE and finished.device == device
