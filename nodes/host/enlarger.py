"""The host's upscale and frame interpolation models, one picture at a time, as its own nodes use them.

UPSCALE_MODEL is what Load Upscale Model gives: a spandrel descriptor. Newer hosts put its model patcher beside it (`patcher`).
Where there is none it gets one here, in the same place, so that the host's memory management knows it. INTERP_MODEL, of newer
hosts alone (nodes_frame_interpolation.py), is a model patcher. Its model gives `extract_features(picture)` and
`model(before, after, timestep=, cache=)`, some also `forward_multi_timestep`; it says what that takes (`memory_used_forward`) and
of what the sides must be multiples (`pad_align`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.ldm.common_dit
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from ...adastate_core.video.enlarging import SINGLY, TILE
from .progress import check_interrupt, soft_empty_cache

LARGEST_TILE, LEAST_TILE, OVERLAP = 512, 128, 32
# the host's estimate of what a value of a tile takes while it is enlarged, for each step of scale
_WORKING_VALUES = 384
_SAMPLES = 16  # weights of each tensor that tell one model from another


def check_upscaler(model: Any) -> None:
    """ValueError, naming what was given, unless `model` makes RGB pictures of RGB pictures, as large or larger."""
    channels = getattr(model, "input_channels", 3), getattr(model, "output_channels", 3)
    name = type(getattr(model, "model", None)).__name__
    if channels != (3, 3):
        raise ValueError(
            f"the upscale_model ({name}) makes {channels[1]} channels of {channels[0]}; it must make 3 of 3 (RGB): load another one"
        )
    if not isinstance(model.scale, int) or model.scale < 1:
        raise ValueError(
            f"the upscale_model ({name}) enlarges by {model.scale!r}; it must be a whole number of 1 or more"
        )


def check_interpolator(model: Any) -> None:
    """ValueError, naming what was given, unless `model` is used as the host's own frame interpolation models are."""
    missing = [name for name in ("extract_features", "memory_used_forward") if not hasattr(model.model, name)]
    if missing:
        raise ValueError(
            f"the interp_model is a {type(model.model).__name__}, which has no {missing[0]}; connect Load Frame Interpolation Model"
        )


def describe_model(model: Any, scale: int | None = None) -> str:
    """A model's class, scale, and a short hash of its weights' names, shapes and of some of their values."""
    module, digest = model.model, hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        values = weight.detach().flatten()[:_SAMPLES].float().cpu().to(torch.bfloat16).view(torch.int16)
        digest.update(values.numpy().tobytes())
    times = "" if scale is None else f" {scale}x"
    return f"{type(module).__name__}{times} {digest.hexdigest()[:12]}"


class HostEnlarger:
    """An Enlarger (core) of the host's models; at least one is given.

    `target`: the size of the enlarged pictures, where it is not the upscaler's own.
    """

    def __init__(
        self, upscaler: Any, interpolator: Any, multiplier: int, decoded: tuple[int, int], target: tuple[int, int]
    ) -> None:
        """ValueError for models that cannot be used so. `decoded`: width and height of what is to be enlarged."""
        self.upscaler, self.interpolator, self.multiplier = upscaler, interpolator, multiplier
        self._decoded, self._target = decoded, target
        self._tile, self._singly = LARGEST_TILE, False
        # (the newest picture, its features): the next in-betweens' first
        self._newest: tuple[torch.Tensor, Any] | None = None
        # patchers of models that a rollout uses at the same time: loading ours again must not cost theirs
        self.beside: list[Any] = []
        # called after each picture that was enlarged; it may raise
        self.told: Callable[[], None] = check_interrupt
        if upscaler is not None:
            check_upscaler(upscaler)
        if interpolator is not None:
            check_interpolator(interpolator)
        self.device = comfy.model_management.get_torch_device()

    def size(self, width: int, height: int) -> tuple[int, int]:
        return self._target

    @property
    def patchers(self) -> list[Any]:
        """The model patchers, to load beside others."""
        upscaler = [] if self.upscaler is None else [_patcher_of(self.upscaler)]
        return upscaler + ([] if self.interpolator is None else [self.interpolator])

    @property
    def weight_bytes(self) -> int:
        return sum(int(patcher.model_size()) for patcher in self.patchers)

    @property
    def working_bytes(self) -> int:
        """What the larger of both takes on the device beside its weights, by the host's reckoning; they take turns."""
        return max(self._upscaling_bytes, self._interpolating_bytes)

    @property
    def _upscaling_bytes(self) -> int:
        if self.upscaler is None:
            return 0
        (width, height), scale = self._decoded, self.upscaler.scale
        tile = 3 * min(LARGEST_TILE, width) * min(LARGEST_TILE, height) * scale * _WORKING_VALUES
        # beside the tile the picture, the enlarged one, its weights, and what is made of both
        return 4 * (tile + 3 * width * height * (1 + 4 * scale**2))

    @property
    def _interpolating_bytes(self) -> int:
        if self.interpolator is None:
            return 0
        width, height = self._target
        return int(self.interpolator.model.memory_used_forward((2, height, width, 3), self.interpolator.model_dtype()))

    def enlarge(self, picture: torch.Tensor) -> torch.Tensor:
        large = picture.float() if self.upscaler is None else self._upscaled(picture)
        self.told()
        return large

    def _upscaled(self, picture: torch.Tensor) -> torch.Tensor:
        self._on_device()
        # as the host's node has pictures in memory: sums may come in another order else
        given = picture[None].to(device=self.device, dtype=torch.float32).contiguous().movedim(-1, 1)
        large = self._tiled(given).clamp(0, 1)
        width, height = self._target
        if large.shape[2:] != (height, width):
            large = large if large.device.type in ("cpu", "cuda") else large.cpu()  # others have no such filter
            large = torch.nn.functional.interpolate(large, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        return large[0].movedim(0, -1)

    def _tiled(self, given: torch.Tensor) -> torch.Tensor:
        """[1, 3, h, w] enlarged in tiles, in smaller ones from now on where memory does not do, as the host's node."""
        while True:
            try:
                return comfy.utils.tiled_scale(
                    given,
                    lambda tile: self.upscaler(tile.float()),
                    tile_x=self._tile,
                    tile_y=self._tile,
                    overlap=OVERLAP,
                    upscale_amount=self.upscaler.scale,
                    output_device=self.device,
                    pbar=_Interruptible(),
                )
            except Exception as error:  # noqa: BLE001  all but out of memory is raised
                if not _no_memory(error) or self._tile // 2 < LEAST_TILE:
                    raise
            self._tile //= 2
            soft_empty_cache()

    def _on_device(self) -> None:
        """Bring the upscaler to its device if it is not there: the host's own node of 0.3.75 moves it away behind our back."""
        if _all_on(self.upscaler.model, self.device):
            return
        self._load_again(self._upscaling_bytes)
        if not _all_on(self.upscaler.model, self.device):
            self.upscaler.model.to(self.device)

    def _load_again(self, working_bytes: int) -> None:
        comfy.model_management.load_models_gpu([*self.beside, *self.patchers], memory_required=working_bytes)

    def between(self, before: torch.Tensor, after: torch.Tensor) -> Iterator[torch.Tensor]:
        features = self._newest[1] if self._newest is not None and self._newest[0] is before else None
        height, width = before.shape[:2]
        times = [step / self.multiplier for step in range(1, self.multiplier)]
        if features is None and not _all_on(self.interpolator.model, self.interpolator.load_device):
            self._load_again(self._interpolating_bytes)
        first, second = self._padded(before), self._padded(after)
        model = self.interpolator.model
        cache = {"img0": model.extract_features(first) if features is None else features}
        cache["img1"] = model.extract_features(second)
        for made in self._made(first, second, times, cache):
            yield made[0, :, :height, :width].float().clamp(0, 1).movedim(0, -1)
        self._newest = after, cache["img1"]

    def _made(
        self, first: torch.Tensor, second: torch.Tensor, times: list[float], cache: dict[str, Any]
    ) -> Iterator[torch.Tensor]:
        """The in-betweens [1, 3, h, w] of two padded pictures: all at once where the model has a way for that, else singly."""
        model = self.interpolator.model
        at_once = getattr(model, "forward_multi_timestep", None)
        check_interrupt()
        if at_once is not None and not self._singly:
            try:
                yield from at_once(first, second, times, cache=dict(cache)).split(1)
                return
            except Exception as error:  # noqa: BLE001  all but out of memory is raised
                if not _no_memory(error):
                    raise
            self._singly = True
            soft_empty_cache()
        for time in times:
            check_interrupt()
            place = torch.full((1, 1, *first.shape[2:]), time, device=first.device, dtype=first.dtype)
            yield model(first, second, timestep=place, cache=dict(cache))

    def _padded(self, picture: torch.Tensor) -> torch.Tensor:
        """[H, W, 3] as the model takes it: [1, 3, h, w], its sides multiples of what the model says."""
        patcher, align = self.interpolator, int(getattr(self.interpolator.model, "pad_align", 1))
        given = picture.movedim(-1, 0)[None].to(device=patcher.load_device, dtype=patcher.model_dtype()).contiguous()
        if align <= 1:
            return given
        fits = all(-side % align < side for side in given.shape[2:])
        mode = "reflect" if fits else "replicate"
        return comfy.ldm.common_dit.pad_to_patch_size(given, (align, align), padding_mode=mode)

    def rest(self) -> None:
        self._newest = None

    def describe(self) -> list[str]:
        """What makes the pictures larger, and what the in-betweens: empty for none."""
        upscaler = "" if self.upscaler is None else describe_model(self.upscaler, self.upscaler.scale)
        return [upscaler, "" if self.interpolator is None else describe_model(self.interpolator)]

    def snapshot(self) -> dict[str, Any]:
        """The tile, where memory made it smaller, and that in-betweens are made singly."""
        smaller = {TILE: self._tile} if self._tile < LARGEST_TILE else {}
        return smaller | ({SINGLY: True} if self._singly else {})

    def restore(self, saved: Mapping[str, Any]) -> None:
        self._tile, self._singly = saved.get(TILE, LARGEST_TILE), saved.get(SINGLY, False)


class _Interruptible:
    """What the host's tiling tells of each tile, instead of the node's progress bar."""

    def update(self, count: int) -> None:
        check_interrupt()


def _patcher_of(upscaler: Any) -> Any:
    """Its model patcher. It lives as long as the descriptor, since the host lists what it has loaded by it."""
    if getattr(upscaler, "patcher", None) is None:
        device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
        upscaler.patcher = comfy.model_patcher.ModelPatcher(upscaler.model, device, offload)
    return upscaler.patcher


def _all_on(module: torch.nn.Module, device: torch.device) -> bool:
    weights = [*module.parameters(), *module.buffers()]
    return all(weight.device.type == device.type for weight in weights)


def _no_memory(error: Exception) -> bool:
    """Whether the host takes it for being out of memory."""
    tells = getattr(comfy.model_management, "raise_non_oom", None)
    if tells is None:
        return isinstance(error, comfy.model_management.OOM_EXCEPTION)
    try:
        tells(error)
    except Exception:  # noqa: BLE001  it raises what is something else
        return False
    return True
