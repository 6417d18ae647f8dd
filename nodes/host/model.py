"""The host's loaded Wan model as a rollout's CausalModel: checked, patched on a clone, loaded with room for the cache."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.latent_formats
import comfy.ldm.wan.model
import comfy.model_management
import torch

from ...adastate_core.attention.cached import CachedAttention
from ...adastate_core.attention.fused_blocks import FusedBlocks, PassForm
from ...adastate_core.attention.wan import (
    SESSION,
    TEXT_KEY,
    block_forward,
    cross_attention_forward,
    self_attention_forward,
)
from ...adastate_core.cache.byte_plan import CachePlan
from ...adastate_core.families.family import Family
from ...adastate_core.families.known import family_of
from ...adastate_core.geometry import WAN21, LatentSpace, ModelGeometry
from ...adastate_core.rollout import RolloutState
from ...adastate_core.schedules.schedule import timesteps
from ...adastate_core.spec import RolloutSpec
from . import fusing
from .feed_forward import feed_forward
from .pass_memory import MOST_BYTES, PassMemory

# numbers of the contexts that were ever set: never one twice, as an address may be
_CONTEXTS = itertools.count()
_FRAMES_AT_ONCE = 8  # latent frames


def geometry_of(patcher: Any) -> ModelGeometry:
    """Layers, heads, channels and latent space of the host's Wan model."""
    wan, space = patcher.model.diffusion_model, space_of(patcher)
    return ModelGeometry(
        channels=space.channels,
        layers=len(wan.blocks),
        heads=wan.num_heads,
        head_dim=wan.dim // wan.num_heads,
        patch=wan.patch_size[1],
        space=space,
    )


def space_of(patcher: Any) -> LatentSpace:
    """The latent space that a MODEL works in. ValueError for one that no rollout drives."""
    return family_of_model(patcher).space


def family_of_model(patcher: Any) -> Family:
    """The family of a MODEL. ValueError for one that no rollout drives (refusals.check_model says more)."""
    config = type(patcher.model.model_config).__name__
    if (family := family_of(config)) is None:
        raise ValueError(f"the model is a {config}, which no rollout drives")
    return family


def compute_dtype(patcher: Any) -> torch.dtype:
    """The dtype that activations, and with them the cache, will have."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def fingerprint(patcher: Any) -> str:
    """A short hash of small weights (norms, modulations) as they were loaded, without LoRA patches.

    Taken after rounding to bfloat16, so a bf16 checkpoint has one fingerprint in bf16 and fp32; loading it in fp16 or
    fp8 rounds otherwise and gives another.
    """
    wan = patcher.model.diffusion_model
    last = len(wan.blocks) - 1
    names = ["head.modulation"]
    for i in sorted({0, last // 2, last}):
        names += [f"blocks.{i}.modulation", f"blocks.{i}.self_attn.norm_k.weight", f"blocks.{i}.norm3.weight"]
    digest = hashlib.sha256()
    state = {name.replace("_orig_mod.", ""): weight for name, weight in wan.named_parameters()}
    for name in names:
        backup = patcher.backup.get(f"diffusion_model.{name}")
        weight = state[name] if backup is None else backup.weight
        values = weight.detach().flatten()[:256].float().cpu().to(torch.bfloat16).view(torch.int16)
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]


def prompt_digest(context: torch.Tensor) -> str:
    """Tells one prompt's embeddings from another's."""
    return hashlib.sha256(context.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]


def to_model_space(patcher: Any, latents: torch.Tensor) -> torch.Tensor:
    """VAE-space latents (a LATENT's samples) to the model's."""
    return patcher.model.process_latent_in(latents)


def to_vae_space(patcher: Any, latents: torch.Tensor) -> torch.Tensor:
    """The model's latents [B, C, T, h, w] to VAE space, on the host's output device.

    Long ones go some frames at a time, since the host's arithmetic holds two more copies of what it is given."""
    device, frames = comfy.model_management.intermediate_device(), latents.shape[2]
    if frames <= _FRAMES_AT_ONCE:
        return patcher.model.process_latent_out(latents).to(device)
    out = None
    for first in range(0, frames, _FRAMES_AT_ONCE):
        part = patcher.model.process_latent_out(latents[:, :, first : first + _FRAMES_AT_ONCE])
        if out is None:
            out = part.new_empty((*part.shape[:2], frames, *part.shape[3:]), device=device)
        out[:, :, first : first + _FRAMES_AT_ONCE] = part
    return out


def available_bytes(patcher: Any) -> int:
    """What the host could free on the model's device without the model's own weights: free, plus all it has loaded."""
    device = patcher.load_device
    free = comfy.model_management.get_free_memory(device)
    # the host's list keeps entries of models that nobody holds any more, until it loads the next one
    loaded = sum(
        entry.model_loaded_memory()
        for entry in comfy.model_management.current_loaded_models
        if entry.device == device and entry.model is not None
    )
    return int(free + loaded)


def free_host_bytes() -> int:
    """Host memory that the host takes for free."""
    return int(comfy.model_management.get_free_memory(torch.device("cpu")))


def forward_bytes(patcher: Any, plan: CachePlan) -> int:
    """What the largest forward of the model takes beside its weights, by the host's own estimate."""
    channels, patch = space_of(patcher).channels, patcher.model.diffusion_model.patch_size[1]
    rows = plan.tokens * patch**2
    return int(patcher.memory_required([plan.batch, channels, plan.pass_frames, rows, 1]))


def check_memory(plan: CachePlan, available: int) -> None:
    """ValueError, naming the window that would fit, if `plan` needs more than `available` bytes."""
    if plan.total_bytes <= available:
        return
    gib = 2**30
    low, high = -1, max(layer.window_frames for layer in plan.layers)
    while high - low > 1:
        middle = (low + high) // 2
        if plan.with_window(middle).total_bytes <= available:
            low = middle
        else:
            high = middle
    batch = _batch_that_fits(plan, available)
    found = [f"window_frames {low}"] if low >= 0 else []
    found += [f"batch_size {batch}"] if batch else []
    fitting = (
        f"{' or '.join(found)} would fit"
        if found
        else "no window would fit: use a smaller picture, batch or chunk_frames"
    )
    if plan.absorption_bytes > plan.kv_bytes:
        fitting += (
            f"; the absorption's statistics alone take {plan.absorption_bytes / gib:.2f} GiB: scope head needs far less"
        )
    if not plan.expands:
        fitting += "; cache_dtype fp8 or int8, or cache_device host memory, takes less"
    raise ValueError(
        f"the rollout's caches need {plan.total_bytes / gib:.2f} GiB and {available / gib:.2f} GiB are free; {fitting}"
    )


def _batch_that_fits(plan: CachePlan, available: int) -> int:
    """The largest smaller batch with which `plan` takes at most `available` bytes; 0: none does."""
    return next((n for n in range(plan.batch - 1, 0, -1) if plan.with_batch(n).total_bytes <= available), 0)


def check_host_memory(plan: CachePlan, device: torch.device) -> None:
    """ValueError if what `plan` keeps in host memory is more than is free there. For a CUDA `device` it is page-locked, and
    counted as torch rounds it."""
    if not plan.host_bytes:
        return
    free = free_host_bytes()
    needed = plan.locked_bytes if device.type == "cuda" else plan.host_bytes
    if needed > free:
        raise ValueError(
            f"cache_device host memory needs {needed / 2**30:.2f} GiB of host memory and {free / 2**30:.2f} GiB are "
            "free; use a smaller window_frames, cache_dtype fp8 or int8, or cache_device gpu"
        )


class HostModel:
    """A CausalModel on the host's own model. `load` before use; holds no cache, so nothing outlives a run."""

    def __init__(self, patcher: Any, context: torch.Tensor, batch: int) -> None:
        self._batch, self._text_width = batch, patcher.model.diffusion_model.text_dim
        self.check_context(context)
        self.geometry, self.device = geometry_of(patcher), patcher.load_device
        self.memory = PassMemory(self.device)
        self._block_reasons = fusing.block_reasons(patcher)
        self.patcher = self._prepared(patcher)
        self.dtype = compute_dtype(patcher)
        self._context = context.expand(batch, -1, -1)
        self._given_context = context
        self._text_key = (next(_CONTEXTS), patcher.patches_uuid)
        self._options = dict(self.patcher.model_options.get("transformer_options", {}))
        self._seen = self._options
        self._loaded: int | None = None
        # which blocks use compiled functions, once that is known
        self.fused_blocks: FusedBlocks | None = None

    def _prepared(self, patcher: Any) -> Any:
        """The patcher to load: a patched clone."""
        return _patched(patcher, self.memory)

    def check_context(self, context: torch.Tensor) -> None:
        """ValueError unless the model can read these text embeddings for every item of its batch."""
        if context.shape[0] not in (1, self._batch):
            raise ValueError(
                f"positive holds a batch of {context.shape[0]} prompts for batch_size {self._batch}; give one"
            )
        if context.shape[-1] != self._text_width:
            raise ValueError(
                f"positive has {context.shape[-1]} channels and the model reads {self._text_width}: encode the prompt with "
                "umt5-xxl (CLIP type wan), or with AdaState's Demo Prompt for the demo model"
            )

    def load(
        self, plan: CachePlan, others: Sequence[Any] = (), working_bytes: int = 0, caches_are_there: bool = False
    ) -> None:
        """Load the weights, leaving room for the caches, unless they are there, one forward's activations and `working_bytes`."""
        caches = 0 if caches_are_there else plan.total_bytes
        needed = caches + forward_bytes(self.patcher, plan) + working_bytes + MOST_BYTES
        comfy.model_management.load_models_gpu([self.patcher, *others], memory_required=needed)
        self._context = self._context.to(device=self.device, dtype=self.dtype)
        if self.device.type == "cuda" and self._loaded is None:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._loaded = torch.cuda.memory_allocated(self.device)

    def fuse(
        self,
        spec: RolloutSpec,
        plan: CachePlan,
        state: RolloutState | None = None,
        told: Callable[[int, int], None] = lambda done, total: None,
        inside: bool = False,
    ) -> str | None:
        """After `load`: compile what the passes of a rollout need, going on from `state` the way that it was made. `told` hears
        before each function (done, of how many), and may raise to cancel. `inside`: given frames stand inside its first chunk. A
        sentence if the state cannot be gone on with bit for bit."""
        self.fused_blocks = fusing.fused_blocks(self.patcher, self._block_reasons, self.dtype, self.device, state)
        fusing.compile_blocks(self.fused_blocks, self.patcher, plan, self._forms(spec, inside), told)
        return fusing.other_bits(self.fused_blocks, state)

    def _forms(self, spec: RolloutSpec, inside: bool) -> Sequence[PassForm]:
        """The forms of its passes."""
        return spec.pass_forms(inside)

    def peak_bytes(self) -> int | None:
        """The most bytes that were allocated on the device since `load`, beyond what was there then; None where nobody counts."""
        if self._loaded is None:
            return None
        return max(0, torch.cuda.max_memory_allocated(self.device) - self._loaded)

    def kernel(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        """The host's attention as its Wan calls it, with whatever back end and override the user chose."""
        # looked up at every call: packs put another back end into that module
        attention = comfy.ldm.wan.model.optimized_attention
        return attention(q, k, v, heads=heads, transformer_options=self._seen)

    def set_context(self, context: torch.Tensor) -> None:
        """The text embeddings [1 or B, n, text_dim] of the passes that follow; their keys and values are made anew."""
        if context is self._given_context:
            return
        self._given_context = context
        self._context = context.expand(self._batch, -1, -1).to(device=self.device, dtype=self.dtype)
        self._text_key = (next(_CONTEXTS), self._text_key[1])

    def velocity(self, x: torch.Tensor, timestep: float | Sequence[float], attention: CachedAttention) -> torch.Tensor:
        """One forward of [B, C, frames, h, w] at one timestep, or with one for every frame; float32.

        A timestep that all frames share is given once an item: the modulations then broadcast over the tokens.
        """
        wan = self.patcher.model.diffusion_model
        times = timesteps(timestep, x, torch.device("cpu") if self.memory.serves(wan) else x.device)
        level = timestep if isinstance(timestep, int | float) else max(timestep)
        # an attention override is shown what the host shows it during a pass, and nothing of the pass outlives it
        self._seen = self._options | self._own(attention, level)
        told = timestep if isinstance(timestep, int | float) else tuple(timestep)
        try:
            with self.memory.during(self._time_key(told, x.shape[2]), self._text_key):
                out = self._forward(wan, x.to(self.dtype), times)
        finally:
            self._seen = self._options
        return out.float()

    def _own(self, session: Any, level: float) -> dict[str, Any]:
        """What a pass of `session` puts into the options."""
        return {
            SESSION: session,
            TEXT_KEY: self._text_key,
            "cond_or_uncond": [0],
            "sigmas": torch.tensor([level / 1000.0]),
        }

    def _time_key(self, told: float | tuple[float, ...], frames: int) -> Hashable:
        """Passes with this in common have one time embedding."""
        return told

    def _forward(self, wan: Any, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The host's forward over latents in its dtype, with the options that it is shown."""
        return wan.forward_orig(x, times, self._context, freqs=None, transformer_options=self._seen)


def _patched(patcher: Any, memory: PassMemory) -> Any:
    """A clone whose forwards look for a session and, without one, call the originals; the embeddings' look into
    `memory`."""
    clone = patcher.clone()
    for _, make, name in _replaced(patcher, memory):
        path = f"diffusion_model.{name}.forward"
        clone.add_object_patch(path, make(patcher.get_model_object(path)))
    return clone


def _replaced(
    patcher: Any, memory: PassMemory | None
) -> Iterator[tuple[torch.nn.Module, Callable[[Callable], Callable], str]]:
    """Every module of the model whose forward is replaced, what makes the new forward out of the original one, and its name: all
    attentions, blocks that may use compiled functions, and what looks into `memory`."""
    wan, hindrance = patcher.model.diffusion_model, fusing.norm_hindrance
    fuses = fusing.compiles(patcher.load_device)
    for i, block in enumerate(wan.blocks):
        own = partial(self_attention_forward, block.self_attn, i, hindrance=hindrance)
        yield block.self_attn, own, f"blocks.{i}.self_attn"
        yield block.cross_attn, partial(cross_attention_forward, block.cross_attn, i), f"blocks.{i}.cross_attn"
        if fuses and fusing.block_reason(patcher, i) is None:
            yield block, partial(block_forward, block, i, hindrance=hindrance, feed_forward=feed_forward), f"blocks.{i}"
    for name, make in () if memory is None else memory.forwards(patcher):
        yield getattr(wan, name), make, name


@contextmanager
def attention_in_place(patcher: Any, memory: PassMemory | None = None) -> Iterator[None]:
    """Within it the forwards of a model that is loaded already look for a session, and into `memory`, if there is one; after
    it none is left.

    Nothing is cloned or loaded again, and the host's own object patches are not touched.
    """
    before: list[tuple[torch.nn.Module, bool, Any]] = []
    try:
        for module, make, _ in _replaced(patcher, memory):
            original = module.forward
            before.append((module, "forward" in vars(module), original))
            module.forward = make(original)
        yield
    finally:
        for module, was_set, original in before:
            if was_set:
                module.forward = original
            else:
                del module.forward


def wan_to_vae_space(latents: torch.Tensor, space: LatentSpace = WAN21) -> torch.Tensor:
    """Latents of a model's space to VAE space without a model at hand."""
    return getattr(comfy.latent_formats, space.latent_format)().process_out(latents)
