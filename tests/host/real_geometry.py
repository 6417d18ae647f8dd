"""The host's Wan at a real model's exact shapes on CUDA's stand-in, as a rollout runs it: for counting operations.

    with on_fake_cuda("1.3B") as (host, counted):
        rollout = rollout_of(host, counted)
        next(rollout.chunks(6))

Nothing is computed and no weights are there. The attention kernel is the device's own and counts as one operation, and so does a
function that is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.taesd.taehv
import comfy.utils
import torch
from adastate_pack.adastate_core import fused
from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive
from adastate_pack.adastate_core.attention.cached import CachedAttention
from adastate_pack.adastate_core.geometry import WAN21, WAN22, LatentSpace
from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_pack.adastate_core.schedules.schedule import Schedule
from adastate_pack.nodes.host import fast_vae, fusing
from adastate_pack.nodes.host.model import HostModel
from counted_ops import CountedOps
from fake_cuda import fake_cuda
from torch._subclasses.fake_tensor import FakeTensor

# width, feed-forward width, layers
MODELS = {"1.3B": (1536, 8960, 30), "5B": (3072, 14336, 30), "14B": (5120, 13824, 40), "S2V 14B": (5120, 13824, 40)}
TEXT = 512


def patcher_of(model: str, device: torch.device, layers: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A MODEL of weights in `dtype` that are shapes alone on `device`, through the host's own loader."""
    width, feed_forward, depth = MODELS[model]
    channels = WAN22.channels if model == "5B" else WAN21.channels
    network = comfy.ldm.wan.model.WanModel_S2V if model.startswith("S2V") else comfy.ldm.wan.model.WanModel
    with torch.device("meta"):
        shapes = network(
            model_type="t2v", dim=width, ffn_dim=feed_forward, num_heads=width // 128, num_layers=layers or depth,
            in_dim=channels, out_dim=channels, operations=comfy.ops.disable_weight_init, device="meta", dtype=torch.bfloat16,
        ).state_dict()  # fmt: skip
    state = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in shapes.items()}
    with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):  # which fake tensors do not know
        # the operations of a GPU that computes in bf16, which the CPU of this machine may not
        options = {"dtype": torch.bfloat16, "custom_operations": comfy.ops.disable_weight_init}
        patcher = comfy.sd.load_diffusion_model_state_dict(state, options)
    for module in patcher.model.diffusion_model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = torch.nn.Parameter(there, requires_grad=False)
    patcher.load_device = device
    patcher.model.manual_cast_dtype = None
    patcher.model_options.pop("manual_cast_dtype", None)
    return patcher


def vae_of(device: torch.device) -> Any:
    """The full Wan 2.1 VAE in bf16, shapes alone on `device`, through the host's own loader."""
    numbers = {"dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    with torch.device("meta"):
        shapes = comfy.ldm.wan.vae.WanVAE(**numbers, temperal_downsample=[False, True, True]).state_dict()
    return _vae({name: torch.empty(value.shape, dtype=torch.bfloat16) for name, value in shapes.items()}, device)


def vae_2_2_of(device: torch.device) -> Any:
    """The full Wan 2.2 VAE, in the same way."""
    numbers = {
        "dim": 160,
        "dec_dim": 256,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
    }
    with torch.device("meta"):
        shapes = comfy.ldm.wan.vae2_2.WanVAE(**numbers, temperal_downsample=[False, True, True]).state_dict()
    return _vae({name: torch.empty(value.shape, dtype=torch.bfloat16) for name, value in shapes.items()}, device)


def tiny_vae_of(device: torch.device, space: LatentSpace = WAN21) -> Any:
    """The tiny one of a latent space, in the same way."""
    with torch.device("meta"):
        shapes = comfy.taesd.taehv.TAEHV(latent_channels=space.channels).state_dict()
    return _vae({name: torch.empty(value.shape, dtype=torch.bfloat16) for name, value in shapes.items()}, device)


def _vae(state: dict[str, torch.Tensor], device: torch.device) -> Any:
    with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):  # which fake tensors do not know
        vae = comfy.sd.VAE(sd=state, device=device, dtype=torch.bfloat16)
    for module in vae.first_stage_model.modules():
        for store in (module._parameters, module._buffers):
            for name, value in list(store.items()):
                if value is not None:
                    there = torch.empty(value.shape, dtype=torch.bfloat16, device=device)
                    store[name] = torch.nn.Parameter(there, False) if store is module._parameters else there
    return vae


@contextmanager
def on_any_card() -> Iterator[torch.device]:
    """CUDA's stand-in with room for everything, for the node that plans: what the host says of a card with its own attention, and
    the pack of one with a compiler."""
    with ExitStack() as stack:
        device, _ = stack.enter_context(fake_cuda())
        stack.enter_context(torch.no_grad())
        for owner, name, value in (
            (comfy.model_management, "get_free_memory", lambda *_, **__: 2**50),
            (comfy.model_management, "pytorch_attention_flash_attention", lambda: True),
            (fast_vae, "compiler_for", lambda device: (lambda function: function, "")),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield device


@contextmanager
def on_fake_cuda(
    model: str = "1.3B", layers: int | None = None, way: str = fused.PLAIN
) -> Iterator[tuple[HostModel, CountedOps]]:
    """A loaded HostModel and the count of what is done, its blocks `way` "plain" or "compiled".

    A forward is the part "pass", its blocks "block/0", "block/1", ..., what rotates in them one by one "rotated" of these."""
    with ExitStack() as stack:
        device, _ = stack.enter_context(fake_cuda())
        stack.enter_context(torch.no_grad())
        counted = stack.enter_context(CountedOps())
        compiler = (counted.one, "") if way == fused.COMPILED else (None, "the plain way is counted")
        for owner, name, value in (
            (fusing, "compiler_for", lambda device: compiler),
            (fusing, "_PLAIN_TENSORS", (*fusing._PLAIN_TENSORS, FakeTensor)),
            (fused, "_MADE", {}),
            (comfy.ldm.wan.model, "optimized_attention", counted.one(_attention, "attention")),
            (CachedAttention, "_rotated", counted.within("rotated", CachedAttention._rotated)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        patcher = patcher_of(model, device, layers)
        host = HostModel(patcher, torch.empty(1, TEXT, 4096), 1)
        host._context = host._context.to(device=device, dtype=host.dtype)
        wan = host.patcher.model.diffusion_model
        for path, patch in host.patcher.object_patches.items():
            comfy.utils.set_attr(host.patcher.model, path, patch)
        for i, block in enumerate(wan.blocks):
            block.forward = counted.within(f"block/{i}", block.forward)
        host.velocity = counted.within("pass", host.velocity)
        yield host, counted


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
    return torch.empty_like(q)


def rollout_of(
    host: HostModel, counted: CountedOps, anchor: Anchor | None = None, window: int = 3, chunk: int = 3, **more: Any
) -> Rollout:
    """A rollout at 832x480 of 4 steps a chunk, with its parts: "step" (a noisy pass), "clean", "rotation" and "commit"."""
    anchor = AnchorAdaptive(1) if anchor is None else anchor
    steps = more.pop("steps", 4)
    spec = RolloutSpec(
        geometry=host.geometry, batch=1, height=60, width=104, chunk_frames=chunk, window_frames=window, anchor=anchor,
        **({"positions": "packed", "dtype": host.dtype} | more),
    )  # fmt: skip
    host.fuse(spec, spec.plan(TEXT))
    rollout = Rollout(host, spec, Settings(0, Schedule.shifted(steps, 5.0)), text_tokens=TEXT)
    passes, past = rollout._passes, rollout.past
    passes.noisy, passes.clean = counted.within("step", passes.noisy), counted.within("clean", passes.clean)
    past.place, past.commit_chunk = counted.within("rotation", past.place), counted.within("commit", past.commit_chunk)
    return rollout


def steady_chunk(host: HostModel, counted: CountedOps, rollout: Rollout, given_chunks: int = 2) -> str:
    """Roll out until the cache is full and every table is made, then one chunk more; the name of that one's part.

    `given_chunks` fill the window with a pass each, and one more is made before the one that counts."""
    frames = rollout.spec.chunk_frames
    given = torch.empty(1, 16, given_chunks * frames, rollout.spec.height, rollout.spec.width)
    chunks = rollout.chunks((given_chunks + 3) * frames, given)
    for _ in range(given_chunks + 1):
        next(chunks)
    with counted.part("steady"):
        next(chunks)
    return "steady"
