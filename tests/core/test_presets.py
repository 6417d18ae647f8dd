"""Which preset a file speaks for, by its name and its latent space together; LongLive 2.0's levels as its scheduler has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_checkpoints import wan_shapes

from adastate_core.geometry import WAN21, WAN22
from adastate_core.weights.file_kind import CheckpointError
from adastate_core.weights.presets import PRESETS, recognised
from adastate_core.weights.wan_weights import geometry_of

TOLD = {
    "longlive2_5b": ([999, 937, 833, 624], [0.99979985, 0.93726546, 0.83305538, 0.62468737]),
    "longlive2_5b_2step": ([999, 833], [0.99979985, 0.83305538]),
}


@pytest.mark.parametrize("name", TOLD)
def test_levels_and_timesteps_are_those_of_the_published_scheduler(name):
    """Its 1000 training levels, evenly taken, shifted by 5 and rounded, with numpy as there."""
    training = (1 - np.linspace(1, 1 / 1000, 1000)[::-1]).astype(np.float32)
    even = np.linspace(training[0].item(), training[-1].item(), len(TOLD[name][0]) + 1)[:-1]
    shifted = 5.0 * even / (1 + 4.0 * even)
    schedule = PRESETS[name].schedule
    assert list(schedule.sigmas) == shifted.astype(np.float32).tolist()
    assert list(schedule.told) == torch.from_numpy(shifted * 1000).to(torch.int64).tolist() == TOLD[name][0]
    assert schedule.sigmas == pytest.approx(TOLD[name][1], abs=1e-8) and schedule.sampler == "unipc"


OF_48 = {
    "LongLive-2.0-5B/model_bf16.pt": "longlive2_5b",
    "LongLive-2.0-5B-NVFP4-S4/model_te.pt": "longlive2_5b",
    "longlive2_step4.pt": "longlive2_5b",
    "longlive2.0_12steps.pt": "longlive2_5b",
    "LongLive-2.0-5B-NVFP4-S2/model_te.pt": "longlive2_5b_2step",
    "longlive2_5b_2step_bf16.safetensors": "longlive2_5b_2step",
    "longlive-2.0-5b_nvfp4_2Step.pt": "longlive2_5b_2step",
    "2-step/longlive2.pt": "longlive2_5b_2step",
    "self_forcing_5b.pt": "",
    "model.pt": "",
}


def test_a_name_is_looked_for_among_the_presets_of_the_files_latent_space():
    for path, name in OF_48.items():
        assert recognised(path, "generator", WAN22) == name, path
        assert recognised(path, "generator") == ("longlive" if "onglive" in path.lower() else "self_forcing"), path
    assert recognised("model.pt", "generator", WAN22, "longlive_generator_merged_lora") == "longlive2_5b"
    assert recognised("S2/model.pt", "generator", WAN21, "other") == "self_forcing"


def of_channels(inside: int, out: int) -> dict[str, tuple[int, ...]]:
    width = 128
    head = {"head.head.weight": (4 * out, width), "head.head.bias": (4 * out,)}
    return wan_shapes(width, 64, 1) | head | {"patch_embedding.weight": (width, inside, 1, 2, 2)}


def test_the_head_says_whose_latents_a_model_makes():
    assert geometry_of(of_channels(16, 16)).space == geometry_of(of_channels(36, 16)).space == WAN21
    five = geometry_of(of_channels(48, 48))
    assert (five.space, five.in_channels) == (WAN22, 48)
    assert geometry_of(wan_shapes(3072, 14336, 1)).parameters == "5B"
    for out in (12, 32):
        with pytest.raises(CheckpointError, match=r"should be \[64, 128\] \(Wan 2.1\) or \[192, 128\] \(Wan 2.2\)$"):
            geometry_of(of_channels(48, out))
