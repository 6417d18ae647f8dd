"""Wan 2.2 S2V for training: the host's own model class, and its forward in parts that gradients pass through.

The host's audio injector writes into its input, which autograd refuses; here it adds. Reference and motion tokens are a sequence
of their own, as the rollout runs them once before its first chunk (adastate_core/families/wan22_s2v.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from adastate_core.audio.demo_ear import vectors
from adastate_core.audio.resampling import frame_features

from .host_models import use_host
from .teacher_forcing import KEY, attended, install
from .world import FPS

# blocks after which the host's class injects sound, as far as a model has them
INJECTED = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
# parts that a text model does not have; they are trained at a rate of their own
AUDIO_PARTS = ("casual_audio_encoder.", "audio_injector.", "trainable_cond_mask.", "cond_encoder.", "frame_packer.")
# what stays as it begins: the pack gives no control video, and the far motion tokens of a still picture tell nothing new
_UNTRAINED = ("cond_encoder.", "frame_packer.proj_4x.weight", "casual_audio_encoder.weights")
# Injectors' queries are this large, and stay so. With larger ones the first thing learnt was to look at the padding token alone,
# which shuts the sound out for good.
_QUERIES, _QUERY_SIZE = ".norm_q.weight", 0.1


def sizes_of(weights: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """Layers, width and feed-forward width of a Wan transformer."""
    layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    return layers, weights["patch_embedding.weight"].shape[0], weights["blocks.0.ffn.0.weight"].shape[0]


def build_talking(weights: dict[str, torch.Tensor], layers: int, dim: int, ffn_dim: int) -> nn.Module:
    """The host's S2V network with `weights`: those of a whole S2V model, or of a text model, to which the rest is added such
    that sound and reference change nothing yet."""
    use_host()
    import comfy.ops
    from comfy.ldm.wan.model import WanModel_S2V

    model = WanModel_S2V(
        dim=dim, ffn_dim=ffn_dim, num_heads=dim // 128, num_layers=layers, in_dim=16, out_dim=16,
        audio_inject_layers=[i for i in INJECTED if i < layers],
        operations=comfy.ops.disable_weight_init, device="cpu", dtype=torch.float32,
    )  # fmt: skip
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(not name.startswith(AUDIO_PARTS) for name in missing):
        raise ValueError(f"the weights do not fit an S2V model of {layers} layers: {(unexpected or missing)[0]}")
    if missing:
        _begin(model)
    for name, parameter in model.named_parameters():
        fixed = name.startswith("audio_injector.") and name.endswith(_QUERIES)
        parameter.requires_grad_(not (fixed or name.startswith(_UNTRAINED)))
    return model


def load_talking(path: str) -> nn.Module:
    """The S2V model of a stage's `model.pt` or of an exported file, or a text model with what S2V adds to it; float32."""
    weights = torch.load(path, weights_only=True) if path.endswith(".pt") else _plain(load_file(path))
    model = build_talking({name: value.float() for name, value in weights.items()}, *sizes_of(weights))
    install(model)
    return model


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a file with or without scaled linears, in float32."""
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".scale_weight")}
    tensors.pop("scaled_fp8", None)
    weights = {name: value.float() for name, value in tensors.items()}
    for name, scale in scales.items():
        weights[name.removesuffix("scale_weight") + "weight"] *= scale
    return weights


@torch.no_grad()
def _begin(model: nn.Module) -> None:
    """First values of the parts that a text model has not."""
    for name, parameter in model.named_parameters():
        if not name.startswith(AUDIO_PARTS):
            continue
        if ".norm_" in name or name == "casual_audio_encoder.weights":
            parameter.fill_(_QUERY_SIZE if name.endswith(_QUERIES) else 1.0)
        elif name.endswith("bias") or "adain" in name or ".o." in name or name.startswith("cond_encoder"):
            parameter.zero_()
        elif name.endswith("padding_tokens") or name.startswith("trainable_cond_mask"):
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1))
    model.trainable_cond_mask.weight[0] = 0
    patch, packer = model.patch_embedding, model.frame_packer
    packer.proj.weight.copy_(patch.weight)
    wider = patch.weight.repeat_interleave(2, -1).repeat_interleave(2, -2)
    packer.proj_2x.weight.copy_(wider.expand(-1, -1, 2, -1, -1) / 8)
    packer.proj_4x.weight.zero_()
    for projection in (packer.proj, packer.proj_2x, packer.proj_4x):
        projection.bias.copy_(patch.bias)


@dataclass(frozen=True)
class Sound:
    """What the injectors take for T latent frames: `local` [B, T, 5, D] and `whole` [B, T, D]."""

    local: torch.Tensor
    whole: torch.Tensor

    def frames(self, first: int, count: int) -> Sound:
        part = slice(first, first + count)
        return Sound(self.local[:, part], self.whole[:, part])

    def twice(self) -> Sound:
        """For the same frames given twice, one after another."""
        return Sound(self.local.repeat(1, 2, 1, 1), self.whole.repeat(1, 2, 1))


def sound_of(model: nn.Module, codes: torch.Tensor, frames: int) -> Sound:
    """What the ear heard [B, T50, 12] (demo_ear.codes) as the model takes it in for the first `frames` latents.

    As the host aligns it: a latent reads its pictures' features and those of up to eight frames before, from the sound's
    beginning on.
    """
    heard = torch.stack([frame_features(one, FPS, 4 * frames) for one in codes.float()])
    features = (heard @ vectors()).to(next(model.parameters()))
    whole, local = model.casual_audio_encoder.encoder(features)
    return Sound(local, whole[:, :, 0])


def tokens_of(model: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, 16, T, h, w] of the picture to be made, as tokens [B, T * P, D]."""
    return _patched(model.patch_embedding, latents) + model.trainable_cond_mask.weight[0]


def condition_tokens(model: nn.Module, reference: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    """Pictures' latents [B, 16, 1, h, w] as tokens [B, 2.5 P, D]: the reference, then motion that stands still at `motion`,
    near (1 frame), farther (2 frames at half size) and far (16 frames at a quarter)."""
    packer, mask = model.frame_packer, model.trainable_cond_mask.weight
    parts = [_patched(model.patch_embedding, reference) + mask[1]]
    for projection, frames in ((packer.proj, 1), (packer.proj_2x, 2), (packer.proj_4x, 16)):
        parts.append(_patched(projection, motion.expand(-1, -1, frames, -1, -1)) + mask[2])
    return torch.cat(parts, 1)


def _patched(projection: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    return projection(latents).flatten(2).transpose(1, 2)


def through_blocks(
    model: nn.Module,
    x: torch.Tensor,
    times: torch.Tensor,
    context: torch.Tensor,
    attention: Any,
    sound: Sound | None = None,
    silent: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens x [B, N, D] through all blocks, and their time embedding [B, G, D].

    `times` [B, G] are timesteps of G equal parts of x, `context` [B, n, 4096], `attention` what the blocks attend by
    (teacher_forcing.install). `sound` reaches all but the first `silent` tokens.
    """
    from comfy.ldm.wan.model import sinusoidal_embedding_1d

    e = model.time_embedding(sinusoidal_embedding_1d(model.freq_dim, times.flatten()).to(x)).view(*times.shape, -1)
    modulation = model.time_projection(e).unflatten(2, (6, model.dim))
    context = model.text_embedding(context.to(x).expand(len(x), -1, -1))
    for i, block in enumerate(model.blocks):
        x = block(x, e=modulation, freqs=None, context=context, transformer_options={KEY: attention})
        if sound is not None:
            x = (
                torch.cat([x[:, :silent], injected(model, i, x[:, silent:], sound)], 1)
                if silent
                else injected(model, i, x, sound)
            )
    return x, e


def injected(model: nn.Module, block: int, x: torch.Tensor, sound: Sound) -> torch.Tensor:
    """Tokens [B, copies * T * P, D] after `block`, each with the sound of its frame where the model has an injector there;
    `sound` is that of all copies' frames, in a row."""
    injector = model.audio_injector
    number = injector.injected_block_id.get(block)
    if number is None:
        return x
    tokens = x.unflatten(1, (sound.local.shape[1], -1))
    toned = injector.injector_adain_layers[number](tokens.flatten(0, 1), temb=sound.whole.flatten(0, 1))
    attention = injector.injector[number]
    heard = attention.o(attended(*projected(attention, toned, sound.local.flatten(0, 1))))
    return x + heard.view_as(x)


def projected(module: nn.Module, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """An attention module's queries of x and keys, normed both, and values of the context, [B, N, heads, head_dim] each."""
    parts = (module.norm_q(module.q(x)), module.norm_k(module.k(context)), module.v(context))
    return tuple(t.unflatten(-1, (module.num_heads, -1)) for t in parts)


def velocity_of(model: nn.Module, x: torch.Tensor, e: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The last block's tokens [B, T * P, D] and their time embedding as a velocity of `shape` [B, 16, T, h, w]."""
    grid = (shape[2], shape[3] // 2, shape[4] // 2)
    return model.unpatchify(model.head(x, e), grid)
