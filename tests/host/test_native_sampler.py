"""Beside the host's own causal sampler, on hosts that have it (ComfyUI 0.21 and newer): the same weights, noise and steps."""

from __future__ import annotations

import json

import comfy.sd
import pytest
import torch
from comfy_extras import nodes_custom_sampler as host

ar_video = pytest.importorskip("comfy_extras.nodes_ar_video", reason="this host has no SamplerARVideo")
LENGTH, FRAMES = 45, 12  # of the video, of its latents: four chunks of three


@pytest.fixture
def sample(wan_state, positive):
    """SamplerCustomAdvanced with one step, so that the NOISE is all the noise there is; returns its LATENT."""

    def call(sampler, metadata=None) -> torch.Tensor:
        model = comfy.sd.load_diffusion_model_state_dict(
            {k: v.clone() for k, v in wan_state.items()}, metadata=metadata
        )
        guider, noise = host.BasicGuider.execute(model, positive).args[0], host.RandomNoise.execute(7).args[0]
        latent = ar_video.EmptyARVideoLatent.execute(32, 32, LENGTH, 1).args[0]
        with torch.inference_mode():
            out = host.SamplerCustomAdvanced.execute(noise, guider, sampler, torch.tensor([1.0, 0.0]), latent)
        return out.args[0]["samples"]

    return call


@pytest.mark.parametrize(("window", "same"), [(FRAMES - 3, True), (3, False)])
def test_with_the_whole_clip_as_its_window_the_sampler_is_the_hosts(sample, node, window, same):
    causal = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    theirs = sample(ar_video.SamplerARVideo.execute(3).args[0], causal)
    ours = sample(node("AdaStateSampler")(chunk_frames=3, window_frames=window, positions="absolute").args[0])
    assert theirs.shape == ours.shape == (1, 16, FRAMES, 4, 4)
    off = (theirs - ours).abs().amax(dim=(0, 1, 3, 4)).split(3)
    assert max(float(chunk.max()) for chunk in off[:2]) < 1e-4  # two chunks fit into any window
    assert (max(float(chunk.max()) for chunk in off[2:]) < 1e-4) is same
