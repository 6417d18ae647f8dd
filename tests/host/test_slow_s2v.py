"""The slow model of tests/core/slow_s2v.py is the host's: its own WanModel_S2V, its own forward, its own alignment of sound."""

from __future__ import annotations

import comfy.ldm.wan.model
import comfy.sd
import pytest
import torch
from slow_s2v import MOTION_FRAMES, SlowS2V, at_pictures, attention, grid, turned
from tiny_s2v import SIZES, features, tiny_s2v

H, W, FRAMES = 8, 16, 3


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(dim, position):
    """The host's embedding of timesteps, in float64: in its float32 an angle of 1000 is 3e-5 off, and all that follows with it."""
    angle = position.double()[:, None] * 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], 1).float()


def even(first, size, count):
    """As the host spreads the tokens of the frames before: not cut to whole numbers."""
    return [first + (size - 1) * i / (count - 1) if count > 1 else first for i in range(count)]


def joined(slow, x, told, context, sound, reference, motion):
    """The host's forward: all that it is given in one sequence, in which everything attends to everything."""
    extra, n = [], x.shape[2]
    rows, columns = H // 2, W // 2
    at = [grid(range(n), range(rows), range(columns))]
    own = (
        slow.patches("patch_embedding", x.double())
        + slow.w["trainable_cond_mask.weight"][0]
        + slow.w["cond_encoder.bias"]
    )
    if reference is not None:
        tokens, _ = slow.conditions(reference, drawn(0, len(x), 16, MOTION_FRAMES, H, W) if motion is None else motion)
        places = [
            grid([30], range(rows), range(columns)), grid([-1], range(rows), range(columns)),
            grid([-3], even(0, rows, rows // 2), even(0, columns, columns // 2)),
            grid([-19, -18, -17, -16], even(0, rows, rows // 4), even(0, columns, columns // 4)),
        ]  # fmt: skip
        kept = rows * columns if motion is None else tokens.shape[1]
        extra, at = [tokens[:, :kept]], [*at, torch.cat(places)[:kept]]
    at, length = torch.cat(at), own.shape[1]
    tokens = torch.cat([own, *extra], 1)
    times = torch.zeros(len(x), tokens.shape[1], dtype=torch.float64)
    times[:, :length] = told.double().repeat_interleave(length // n, 1)
    e, six = slow.time(times)

    def attend(layer, q, k, v):
        return attention(turned(q, at, slow.heads), turned(k, at, slow.heads), v, slow.heads)

    words = slow.words(context)
    for i in range(slow.layers):
        tokens = slow.block(i, tokens, six, words, attend)
        if sound is not None:
            tokens = torch.cat([slow.inject(i, tokens[:, :length], sound), tokens[:, length:]], 1)
    return slow.head(tokens[:, :length], e[:, :length], x.shape)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("given", ["nothing", "sound", "sound, reference", "all"])
def test_a_pass_is_the_hosts(size, given, monkeypatch):
    monkeypatch.setattr(comfy.ldm.wan.model, "sinusoidal_embedding_1d", exact)
    state = tiny_s2v(*size)
    module, slow = comfy.sd.load_diffusion_model_state_dict(dict(state)).model.diffusion_model, SlowS2V(state)
    x, context = drawn(1, 2, 16, FRAMES, H, W), drawn(2, 1, 7, 4096)
    told = torch.tensor([[857.6923, 602.1506, 0.0], [8.92857, 1000.0, 250.0]])
    heard = features(1.0)
    pictures = [at_pictures(layer[0].double(), 16, 4 * FRAMES).float() for layer in heard]
    own = {"control_video": torch.zeros_like(x)}
    sound = reference = motion = None
    if "nothing" not in given:
        sound = slow.hears(at_pictures(slow.folded(heard), 16, 4 * FRAMES))
        own["audio_embed"] = torch.stack(pictures).transpose(1, 2)[None].expand(2, -1, -1, -1)
    if "reference" in given or given == "all":
        own["reference_latent"] = reference = drawn(3, 2, 16, 1, H, W)
    if given == "all":
        own["reference_motion"] = motion = drawn(4, 2, 16, MOTION_FRAMES, H, W)
    with torch.inference_mode():
        theirs = module(x, told, context.expand(2, -1, -1), **own)
        ours = joined(slow, x, told, context, sound, reference, motion)
    assert float((ours - theirs).abs().max()) < 1e-5
