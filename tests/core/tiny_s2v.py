"""Files of Wan 2.2 S2V in small: random weights under every name of the public files, and in their shapes.

The host makes its WanModel_S2V of them (width, feed-forward and blocks are read from the file; the rest is fixed there). Values are
of a size at which each part shows in what the model makes: sound, reference, motion, text and what is attended to of the past.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

# what no file says: widths of words, timesteps and sound, hidden states of the ear, injectors, patch, latent channels
TEXT, TIME, SOUND, EAR_LAYERS, INJECTORS, CHANNELS = 4096, 256, 1024, 25, 12, 16
PATCH = (1, 2, 2)
# the blocks behind which sound comes in, as far as there are so many
INJECTED_BLOCKS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)

# sizes of the tests: (width, blocks); in the first two injectors are used, in the second one
SIZES = {"five blocks": (256, 5), "one block": (128, 1)}

# what the parts are multiplied with, by what their names hold; the first that fits
_LOUD = {
    "self_attn.o.": 4.0, "injector.injector.": 1.5, "injector_adain_layers.": 1.5, "trainable_cond_mask": 8.0,
    "padding_tokens": 10.0, "frame_packer.": 1.5, "cond_encoder.bias": 5.0,
}  # fmt: skip


def shapes(dim: int = 256, layers: int = 5, ffn: int = 64, injectors: int = INJECTORS) -> dict[str, tuple[int, ...]]:
    """The names of a file of this size, each with its shape."""
    found: dict[str, tuple[int, ...]] = {}

    def part(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def attention(name: str) -> None:
        for each in "qkvo":
            part(f"{name}.{each}", dim, dim)
        for each in ("norm_q", "norm_k"):
            part(f"{name}.{each}", dim, bias=False)

    part("patch_embedding", dim, CHANNELS, *PATCH)
    for name, width in (("text_embedding", TEXT), ("time_embedding", TIME)):
        part(f"{name}.0", dim, width)
        part(f"{name}.2", dim, dim)
    part("time_projection.1", 6 * dim, dim)
    for i in range(layers):
        found[f"blocks.{i}.modulation"] = (1, 6, dim)
        for name in ("self_attn", "cross_attn"):
            attention(f"blocks.{i}.{name}")
        part(f"blocks.{i}.norm3", dim)
        part(f"blocks.{i}.ffn.0", ffn, dim)
        part(f"blocks.{i}.ffn.2", dim, ffn)
    found["head.modulation"] = (1, 2, dim)
    part("head.head", CHANNELS * 4, dim)

    part("trainable_cond_mask", 3, dim, bias=False)
    part("cond_encoder", dim, CHANNELS, *PATCH)
    ear = "casual_audio_encoder"  # as the files spell it
    found[f"{ear}.weights"] = (1, EAR_LAYERS, 1, 1)
    found[f"{ear}.encoder.padding_tokens"] = (1, 1, 1, dim)
    for name, out, into in (
        ("conv1_local", dim, SOUND), ("conv1_global", dim // 4, SOUND), ("conv2", dim // 2, dim // 4), ("conv3", dim, dim // 2),
    ):  # fmt: skip
        part(f"{ear}.encoder.{name}.conv", out, into, 3)
    part(f"{ear}.encoder.final_linear", dim, dim)
    for i in range(injectors):
        attention(f"audio_injector.injector.{i}")
        part(f"audio_injector.injector_adain_layers.{i}.linear", 2 * dim, dim)
    for name, kernel in (("proj", PATCH), ("proj_2x", (2, 4, 4)), ("proj_4x", (4, 8, 8))):
        part(f"frame_packer.{name}", dim, CHANNELS, *kernel)
    return found


def tiny_s2v(
    dim: int = 256, layers: int = 5, seed: int = 0, scale: float = 1.0, ffn: int = 64, injectors: int = INJECTORS
) -> dict[str, torch.Tensor]:
    """A random state dict, float32, the same at every call.

    `scale` multiplies what sound, reference and motion add. With fewer `injectors` than a real file has the host leaves the others
    as they are: only for files where the blocks that they belong to are not there.
    """
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(dim, layers, ffn, injectors).items():
        drawn = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            sharp = 1.5 if name.endswith(("norm_q.weight", "norm_k.weight")) else 1.0
            state[name] = sharp * (1 + 0.1 * drawn)
        elif name == "casual_audio_encoder.weights":  # the sum of their silu is what the encoder divides by
            state[name] = 1 + 0.5 * drawn
        else:
            fan = drawn[0].numel() if len(shape) > 1 and "modulation" not in name and "tokens" not in name else 100
            loud = next((factor for part, factor in _LOUD.items() if part in name), 1.0)
            own = scale if loud != 1.0 and "self_attn" not in name else 1.0
            state[name] = own * loud * drawn / fan**0.5
    return state


def write_tiny_s2v(path: Path, state: dict[str, torch.Tensor] | None = None, **metadata: str) -> Path:
    """The file of a state dict (None: the default one) with what its header says."""
    save_file(tiny_s2v() if state is None else state, path, metadata={k: str(v) for k, v in metadata.items()} or None)
    return path


def features(seconds: float, seed: int = 0, layers: int = EAR_LAYERS) -> tuple[torch.Tensor, ...]:
    """What an ear would give of so many seconds: [1, T, 1024] for each of its hidden states, 50 a second as wav2vec2 counts them.

    They change from one to the next, and slowly, too, as speech does.
    """
    length = (int(16000 * seconds) - 400) // 320 + 1
    generator = torch.Generator().manual_seed(seed)
    quick = torch.randn(layers, length, SOUND, generator=generator)
    slow = torch.randn(layers, length // 10 + 2, SOUND, generator=generator).repeat_interleave(10, 1)[:, :length]
    return tuple((0.7 * quick + 0.7 * slow).unsqueeze(1).unbind(0))
