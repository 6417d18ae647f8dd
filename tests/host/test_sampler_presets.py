"""AdaState Sampler makes what AdaState Rollout makes for every preset, or refuses the preset by name.

A sampler is given its noise levels by the host, so "the same" means the same in two ways:
- the same SIGMAS is connected to both nodes: equal to the last bit, whatever the list is;
- the sampler has the preset's own list and the rollout has everything at auto: equal but for the rounding of a SIGMAS to
  float32, also where the preset has other steps for its first chunk, which both nodes then take.
"""

from __future__ import annotations

import json
import logging

import pytest
import torch
from adastate_pack.adastate_core.weights.presets import PRESETS
from adastate_pack.nodes.host import model as adapter
from comfy_extras import nodes_custom_sampler as host
from comfy_extras import nodes_model_advanced
from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo
from conftest import HostNode

REFUSED = {"causvid": "CausVid.*starts afresh every 21 latent frames", "rolling_forcing": "denoises 5 chunks together"}
AUTO = {"chunk_frames": 0, "window_frames": -1, "positions": "auto"}
# 25 latent frames: beyond most presets' anchor and window, and the last chunk of 3 is cut
PICTURES, LATENTS = 97, 25


def with_preset(model, name):
    return HostNode("AdaStateModelPreset")(model=model, preset=name).args[0]


def own_sigmas(name):
    return torch.tensor([*PRESETS[name].schedule.sigmas, 0.0])


def sampled(model, positive, name, sigmas, callback=None):
    sampler = HostNode("AdaStateSampler")(**AUTO).args[0]
    noise = HostNode("AdaStateNoise")(seed=5, chunk_frames=PRESETS[name].chunk_frames).args[0]
    guider = host.BasicGuider.execute(model, positive).args[0]
    if callback is not None:
        plain = guider.sample
        guider.sample = lambda *a, **k: plain(*a, **(k | {"callback": callback}))
    latent = EmptyHunyuanLatentVideo.execute(32, 32, PICTURES, 1).args[0]
    with torch.inference_mode():
        return host.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]


def rolled(rollout, model, **more):
    return rollout(**({"model": model, "length": PICTURES, "steps": 0, "shift": 0.0} | AUTO | more))


@pytest.fixture
def levels(monkeypatch):
    """The noise levels of all passes, in order."""
    seen, original = [], adapter.HostModel.velocity

    def velocity(self, x, timestep, attention):
        seen.append(timestep)
        return original(self, x, timestep, attention)

    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    return seen


@pytest.mark.parametrize(
    "name", [name for name, one in PRESETS.items() if not (name in REFUSED or one.driven_by_sound)]
)
@pytest.mark.sampled(2)
def test_the_sampler_makes_what_the_rollout_makes(rollout, model, positive, name):
    given, sigmas = with_preset(model, name), own_sigmas(name)
    made = sampled(given, positive, name, sigmas)
    assert made.shape == (1, 16, LATENTS, 4, 4)
    assert torch.equal(made, rolled(rollout, given, sigmas=sigmas).args[0]["samples"])
    torch.testing.assert_close(made, rolled(rollout, given).args[0]["samples"], atol=1e-5, rtol=1e-5)
    other = torch.tensor([1.0, 0.7, 0.3, 0.0])
    made = sampled(given, positive, name, other)
    assert torch.equal(made, rolled(rollout, given, sigmas=other).args[0]["samples"])


@pytest.mark.parametrize("name", REFUSED)
def test_presets_of_more_than_one_chunk_after_the_other_are_refused(rollout, model, positive, monkeypatch, name):
    given, sigmas = with_preset(model, name), own_sigmas(name)
    rolled(rollout, given)
    made = []
    monkeypatch.setattr("adastate_pack.nodes.sampler_nodes.Rollout", lambda *a, **k: made.append(a))
    for levels in (sigmas, torch.tensor([1.0, 0.5, 0.0])):
        with pytest.raises(ValueError, match=f"{REFUSED[name]}.*use AdaState Rollout"):
            sampled(given, positive, name, levels)
    assert not made


def test_every_preset_is_one_or_the_other():
    """A preset with blocks or restarts that is new here has to be refused too."""
    assert set(REFUSED) == {name for name, preset in PRESETS.items() if preset.blocks > 1 or preset.restart_frames}


@pytest.mark.parametrize("door", ["rollout", "sampler"])
@pytest.mark.parametrize("name", ["causal_forcing_frame_2step", "causal_forcing_frame_1step"])
def test_the_first_chunks_own_steps(rollout, model, positive, levels, caplog, door, name):
    """With the preset's own list, also as the host's scheduler makes it; another list holds for every chunk, and is told."""
    given, preset = with_preset(model, name), PRESETS[name]
    shifted = nodes_model_advanced.ModelSamplingSD3().patch(given, 5.0)[0]
    scheduled = host.BasicScheduler.execute(shifted, "simple", len(preset.timesteps), 1.0).args[0]
    first, every = preset.schedule.first_sigmas, preset.schedule.sigmas

    def run(sigmas):
        levels.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "adastate"):
            if door == "sampler":
                steps = []
                sampled(given, positive, name, sigmas, lambda step, x0, x, total: steps.append((step, total)))
                assert steps == [(i, len(levels)) for i in range(len(levels))]
                return [level / 1000 for level in levels], caplog.text
            report = json.loads(rolled(rollout, given, sigmas=sigmas).args[2])
            return [level / 1000 for level in levels], str(report["warnings"])

    for sigmas in (own_sigmas(name), scheduled):
        seen, told = run(sigmas)
        assert seen == pytest.approx([*first, 0.0, *((*every, 0.0) * (LATENTS - 1))], abs=1e-3)
        assert "steps for the first chunk" not in told
    seen, told = run(torch.tensor([1.0, 0.6, 0.0]))
    assert seen == pytest.approx([1.0, 0.6, 0.0] * LATENTS, abs=1e-6)
    assert f"sigmas is not the list of {preset.title}, so its 4 steps for the first chunk are not used" in told
