"""A tiny random Wan 2.2 S2V as a MODEL, and what it hears as the pack's node gives it: what the tests of sound share."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from conftest import HostNode
from tiny_s2v import SIZES, features, tiny_s2v


def drawn(seed: int, *shape: int) -> torch.Tensor:
    """Gaussian numbers, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return tiny_s2v(*SIZES["one block"])


@pytest.fixture(scope="module")
def talker(state):
    """A MODEL as Load Diffusion Model gives it."""
    return comfy.sd.load_diffusion_model_state_dict(dict(state))


def track(seconds: float, **more):
    """What Audio Encoder Encode would hear in so many seconds, through AdaState Audio; `more` are that node's inputs."""
    layers = features(seconds)
    encoded = {"encoded_audio": layers[-1], "encoded_audio_all_layers": layers, "audio_samples": int(16000 * seconds)}
    return HostNode("AdaStateAudio")(encoded=encoded, **more).args[0]
