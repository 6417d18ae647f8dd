"""AdaState Sampler through the host's own doors: SamplerCustomAdvanced, SamplerCustom, its guiders and noises."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import pytest
import slow_rollout as slow
import torch
from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive, AnchorEMA, AnchorStatic
from adastate_pack.nodes.host import model as adapter
from comfy_extras import nodes_custom_sampler as host
from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo
from conftest import random_wan
from test_model import SlowHost, loaded

SIGMAS = torch.tensor([1.0, 5 / 6, 0.0])


class PackNoise:
    """A NOISE with the rollout's content noise, chunk by chunk, written out a second time."""

    def __init__(self, seed: int = 5, frames: int = 3) -> None:
        self.seed, self.frames = seed, frames

    def generate_noise(self, latent):
        b, c, t, h, w = latent["samples"].shape
        chunks = [slow.gaussian(self.seed, k, 0, (b, c, self.frames, h, w)) for k in range(-(-t // self.frames))]
        return torch.cat(chunks, 2)[:, :, :t]


def empty(length: int = 45, batch: int = 1) -> dict:
    return EmptyHunyuanLatentVideo.execute(32, 32, length, batch).args[0]


@pytest.fixture
def sample(node, model, positive):
    """SamplerCustomAdvanced with AdaState Sampler and small defaults; what is given wins. Returns its two LATENTs."""

    def call(guider=None, noise=None, sigmas=SIGMAS, latent=None, sampler=None, **settings):
        settings = {"chunk_frames": 3, "window_frames": 3, "positions": "packed"} | settings
        sampler = sampler or node("AdaStateSampler")(**settings).args[0]
        guider = guider or host.BasicGuider.execute(model, positive).args[0]
        with torch.inference_mode():
            out = host.SamplerCustomAdvanced.execute(noise or PackNoise(), guider, sampler, sigmas, latent or empty())
        return out.args[0]["samples"], out.args[1]["samples"]

    return call


def cfg_guider(model, positive, cfg=1.0):
    return host.CFGGuider.execute(model, positive, [[positive[0][0] * -1, {}]], cfg).args[0]


@pytest.mark.parametrize(
    "anchor", [Anchor(), AnchorStatic(2), AnchorEMA(2, 0.5), AnchorAdaptive(2)], ids=lambda a: a.kind
)
@pytest.mark.parametrize("guider", ["basic", "cfg"])
def test_the_sampler_is_the_rollout(sample, rollout, model, positive, anchor, guider):
    """41 frames are 11 latents: past eviction, and the last chunk is cut."""
    made = sample(anchor=anchor, latent=empty(41), guider=cfg_guider(model, positive) if guider == "cfg" else None)
    expected = rollout(anchor=anchor, length=41, sigmas=SIGMAS).args[0]["samples"]
    assert expected.shape == (1, 16, 11, 4, 4)
    for latents in made:
        assert torch.equal(latents, expected)


@pytest.mark.parametrize("noise", ["random", "none"])
@torch.no_grad()
def test_chunks_start_from_the_hosts_noise(sample, model, positive, monkeypatch, noise):
    """Against the slow rollout: the first step of the content has the NOISE's frames, all else the pack's noise."""
    source = host.RandomNoise.execute(7).args[0] if noise == "random" else host.DisableNoise.execute().args[0]
    seed = 7 if noise == "random" else 0
    latents, _ = sample(noise=source, latent=empty(41), anchor=AnchorAdaptive(1))
    frames = source.generate_noise(empty(41))
    own = slow.gaussian

    def gaussian(seed, chunk, step, shape, suffix=""):
        drawn = own(seed, chunk, step, shape, suffix)
        if step or suffix:
            return drawn
        theirs = frames[:, :, 3 * chunk : 3 * chunk + 3]
        return torch.cat([theirs, drawn[:, :, theirs.shape[2] :]], 2)

    monkeypatch.setattr(slow, "gaussian", gaussian)
    wan, _ = loaded(model, positive, anchor=AnchorAdaptive(1))
    result = slow.slow_rollout(
        SlowHost(wan), batch=1, h=4, w=4, F=3, W=3, seed=seed, sigmas=SIGMAS[:2].tolist(), length=11, anchor="adaptive",
        A=1, S=1,
    )  # fmt: skip
    expected = adapter.to_vae_space(model, result["latents"][:, :, :11])
    torch.testing.assert_close(latents, expected, atol=2e-3, rtol=1e-3)


def test_the_noise_node_is_the_rollouts(sample, rollout, node):
    noise = node("AdaStateNoise")(seed=5, chunk_frames=2).args[0]
    assert noise.seed == 5
    assert torch.equal(noise.generate_noise(empty(41, 2)), PackNoise(5, 2).generate_noise(empty(41, 2)))
    latents, _ = sample(noise=noise, latent=empty(29, 2), chunk_frames=2)
    expected = rollout(length=29, batch_size=2, chunk_frames=2, sigmas=SIGMAS).args[0]["samples"]
    assert torch.equal(latents, expected)
    with pytest.raises(ValueError, match="for video latents"):
        noise.generate_noise({"samples": torch.zeros(1, 4, 8, 8)})


def test_auto_values_are_the_rollouts(sample, rollout):
    latents, _ = sample(chunk_frames=0, window_frames=-1, positions="auto")
    auto = {"chunk_frames": 0, "window_frames": -1, "positions": "auto"}
    assert torch.equal(latents, rollout(length=45, sigmas=SIGMAS, **auto).args[0]["samples"])


def test_the_plain_custom_sampler_takes_it_too(sample, node, model, positive):
    sampler = node("AdaStateSampler")(chunk_frames=3, window_frames=3, positions="fixed").args[0]
    with torch.inference_mode():
        out = host.SamplerCustom.execute(model, True, 9, 1.0, positive, [], sampler, SIGMAS, empty(21))
    expected, _ = sample(sampler=sampler, noise=host.RandomNoise.execute(9).args[0], latent=empty(21))
    assert torch.equal(out.args[0]["samples"], expected)


def test_a_lora_and_the_models_own_options_act(sample, rollout, model):
    """The guider's patcher has weights patched already; the rollout loads a clone of its own."""
    patched = model.clone()
    patched.add_patches(
        {f"diffusion_model.blocks.1.self_attn.{n}.weight": ("diff", (torch.randn(128, 128) / 20,)) for n in "kvo"}
    )
    guider = host.BasicGuider.execute(patched, [[torch.ones(1, 5, 4096), {}]]).args[0]
    with_lora, _ = sample(guider=guider, latent=empty(29))
    expected = rollout(model=patched, positive=[[torch.ones(1, 5, 4096), {}]], length=29, sigmas=SIGMAS).args[0][
        "samples"
    ]
    assert torch.equal(with_lora, expected)
    guider = host.BasicGuider.execute(model, [[torch.ones(1, 5, 4096), {}]]).args[0]
    assert not torch.allclose(sample(guider=guider, latent=empty(29))[0], with_lora, atol=1e-2)


def traces(model) -> tuple:
    """All that a patch could leave on the model."""
    wan = model.model.diffusion_model
    attentions = [a for block in wan.blocks for a in (block.self_attn, block.cross_attn)]
    return [dict(vars(a)) for a in attentions], dict(model.object_patches), dict(model.object_patches_backup)


@pytest.mark.parametrize("how", ["done", "interrupt", "error"])
def test_the_model_is_as_before(sample, model, monkeypatch, interrupt, how):
    euler = host.KSamplerSelect.execute("euler").args[0]

    def plain():
        return sample(sampler=euler, latent=empty(9))[0]

    before, marks = plain(), traces(model)
    original, calls = adapter.HostModel.velocity, []

    def velocity(self, x, timestep, attention):
        calls.append(timestep)
        assert "self_attention_forward" in model.model.diffusion_model.blocks[0].self_attn.forward.__qualname__
        if len(calls) == 4 and how == "error":
            raise torch.cuda.OutOfMemoryError("out of memory")
        out = original(self, x, timestep, attention)
        if len(calls) == 4 and how == "interrupt":  # after the pass: the host's own layers look for it in the next one
            comfy.model_management.interrupt_current_processing()
        return out

    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    if how == "done":
        sample()
    else:
        with pytest.raises(interrupt if how == "interrupt" else torch.cuda.OutOfMemoryError):
            sample()
        assert len(calls) == 4
    assert traces(model) == marks
    assert torch.equal(plain(), before)


def test_it_may_follow_and_precede_a_rollout(sample, rollout):
    """The rollout's patch outlives its clone until the host loads another patcher of the same model."""
    first = rollout(length=21, sigmas=SIGMAS).args[0]["samples"]
    assert torch.equal(sample(latent=empty(21))[0], first)
    assert torch.equal(rollout(length=21, sigmas=SIGMAS).args[0]["samples"], first)


def test_weights_offloaded_by_the_host_run(sample, model, monkeypatch):
    expected, _ = sample()
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NO_VRAM)
    latents, _ = sample()
    assert model.model.model_lowvram
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    comfy.model_management.unload_all_models()


def test_progress_counts_every_pass_and_previews_are_whole(sample, monkeypatch, progress_told):
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    sample(latent=empty(29))
    assert [told[:2] for told in progress_told] == [(i + 1, 9) for i in range(9)]
    assert all(told[2][1].size == (4, 4) for told in progress_told)


def test_the_callback_sees_the_whole_latent_grow(sample, model, positive):
    guider, seen = host.BasicGuider.execute(model, positive).args[0], []

    def callback(step, x0, x, total):
        seen.append((step, total, x0.shape, int((x0.flatten(3) != 0).any(-1)[0, 0].sum())))

    plain = guider.sample
    guider.sample = lambda *a, **k: plain(*a, **(k | {"callback": callback}))
    latents, _ = sample(guider=guider, latent=empty(29, 2), anchor=AnchorAdaptive(1))
    shape = (2, 16, 8, 4, 4)
    assert latents.shape == shape
    assert seen == [(i, 9, shape, min(8, 3 + 3 * (i // 3))) for i in range(9)]


def refused(sample, message, **inputs):
    with pytest.raises(ValueError, match=message):
        sample(**inputs)


def test_guiders_with_more_than_one_prompt_are_refused(sample, model, positive):
    refused(
        sample,
        "cfg is 3; the rollout's cache holds the keys and values of one prompt",
        guider=cfg_guider(model, positive, 3.0),
    )
    dual = host.DualCFGGuider.execute(model, positive, positive, positive, 1.0, 1.0, "regular").args[0]
    refused(sample, "the guider is a Guider_DualCFG", guider=dual)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mask": torch.ones(1, 4, 4)}, "a mask"),
        ({"start_percent": 0.2}, "a timestep range"),
        ({"reference_latents": [torch.zeros(1, 16, 1, 4, 4)]}, "reference latents"),
        ({"time_dim_concat": torch.zeros(1, 16, 1, 4, 4)}, "reference frames"),
        ({"strength": 0.5}, "strength 0.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_conditioning_that_cannot_be_honoured_is_refused(sample, model, positive, extra, message):
    guider = host.BasicGuider.execute(model, [[positive[0][0], extra]]).args[0]
    refused(sample, message, guider=guider)


def test_prompts_of_the_wrong_shape_are_refused(sample, model, positive):
    for prompt, message in (
        (positive * 2, "holds 2 conditioning entries"),
        ([], "holds 0 conditioning entries"),
        ([[None, {}]], "holds no text embeddings"),
        ([[torch.zeros(1, 5, 768), {}]], "has 768 channels"),
    ):
        refused(sample, message, guider=host.BasicGuider.execute(model, prompt).args[0])


def test_latents_that_are_not_empty_are_refused(sample):
    refused(sample, "carries a noise mask", latent=empty() | {"noise_mask": torch.ones(1, 1, 12, 4, 4)})
    refused(sample, "start_latent of AdaState Rollout", latent={"samples": torch.ones(1, 16, 3, 4, 4)})
    refused(
        sample,
        "width is 40; this model needs multiples of 16: try 32 or 48",
        latent={"samples": torch.zeros(1, 16, 3, 4, 5)},
    )
    refused(sample, "they must fall strictly", sigmas=torch.tensor([0.5, 0.8, 0.0]))
    refused(sample, "needs at least one value", sigmas=torch.tensor([0.0]))
    refused(sample, "'absolute' with the adaptive anchor", positions="absolute", anchor=AnchorAdaptive(1))


def test_models_that_cannot_be_driven_are_refused(sample, model, positive, monkeypatch):
    wrapped = model.clone()
    wrapped.set_model_unet_function_wrapper(lambda apply, args: None)
    refused(sample, "a UNet wrapper", guider=host.BasicGuider.execute(wrapped, positive).args[0])
    wide = comfy.sd.load_diffusion_model_state_dict(random_wan(in_dim=32))
    refused(sample, "32 input channels", guider=host.BasicGuider.execute(wide, positive).args[0])
    config = type("WAN21_I2V", (type(model.model.model_config),), {})
    monkeypatch.setattr(model.model.model_config, "__class__", config)
    refused(sample, "the model is a WAN21_I2V")


def test_the_hosts_own_causal_class_is_taken(sample, model, monkeypatch):
    expected, _ = sample()
    config = type("WAN21_CausalAR_T2V", (type(model.model.model_config),), {})
    monkeypatch.setattr(model.model.model_config, "__class__", config)
    assert torch.equal(sample()[0], expected)


def test_a_plan_that_does_not_fit_is_refused_before_it_is_allocated(sample, monkeypatch):
    made = []
    monkeypatch.setattr("adastate_pack.nodes.sampler_nodes.Rollout", lambda *a, **k: made.append(a))
    monkeypatch.setattr(adapter, "available_bytes", lambda patcher: 200_000)
    refused(sample, r"GiB are free; window_frames \d+ would fit", window_frames=1000)
    assert not made


def test_the_host_leaves_room_for_the_caches(sample, monkeypatch):
    """What the host is asked to keep free beside the weights covers the cache that is then allocated."""
    asked, made = [], []
    load, cache = comfy.model_management.load_models_gpu, adapter.HostModel.velocity

    def record(models, memory_required=0, **more):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **more)

    def velocity(self, x, timestep, attention):
        made.append(attention.cache.nbytes + attention.cache.text_nbytes)
        return cache(self, x, timestep, attention)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", record)
    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    sample(window_frames=12)
    assert len(asked) == 2 and asked[1] >= max(made) > 0


def test_linked_numbers_are_checked(node):
    sampler = node("AdaStateSampler")
    assert sampler.validate(chunk_frames=0, window_frames=-1, positions="auto") is True
    assert "window_frames is -2" in sampler.validate(window_frames=-2)
    assert "must be one of auto" in sampler.validate(positions="odd")
    with pytest.raises(ValueError, match="chunk_frames is -1; it must be between 0 and 64"):
        sampler(chunk_frames=-1, window_frames=3, positions="auto")
    with pytest.raises(ValueError, match="chunk_frames is 0; it must be between 1 and 64"):
        node("AdaStateNoise")(seed=1, chunk_frames=0)


def test_something_else_than_a_guider_is_refused(sample, node):
    sampler = node("AdaStateSampler")(chunk_frames=3, window_frames=3, positions="packed").args[0]
    with pytest.raises(ValueError, match="the guider is a SimpleNamespace"):
        sampler.sample(SimpleNamespace(model_patcher=None), SIGMAS, {}, None, torch.zeros(1, 16, 3, 4, 4))
