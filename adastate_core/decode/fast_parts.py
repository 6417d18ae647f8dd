"""What stands in for the forwards of a Wan VAE's layers in the fast way: the same sums, with less moved between them.

Pictures and weights lie with their channels last from one end to the other, which is how both cuDNN and oneDNN compute. A
convolution pads its pictures itself and is given one concatenation with the frames before it; a norm and the SiLU behind it are
one function; doubling the frames is one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

from ..fused import Fused
from .wan_vae import FIRST_CALL_MARKER

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """[B, C, (T,) H, W] with its channels last in memory: itself, if they are already."""
    return x.contiguous(memory_format=_LAST[x.ndim])


class Conv:
    """In the place of a convolution's forward: over pictures, or a causal one over frames, which is given the frames before.

    On a CPU it is oneDNN's, whatever the picture's size; elsewhere the module's own. A module that casts its weights as it runs is
    left to do so.
    """

    def __init__(
        self,
        module: nn.Module,
        padding: tuple[int, ...],
        casts: Callable[[nn.Module], bool],
        at_every: Callable[[], None],
    ) -> None:
        """`padding` is (rows, columns), or (frames before, rows, columns) for a causal one. `casts`: whether a module casts its
        weights as it runs. `at_every` is called before each convolution: it may raise, to interrupt."""
        self._module, self._casts, self._at_every = module, casts, at_every
        self._past = padding[0] if len(padding) == 3 else 0
        # what the module's own `padding` has to be while this stands in for it
        self.padding = (0, *padding[1:]) if len(padding) == 3 else padding
        self._weight: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it keeps beside the module's own, once it is ready."""
        weight = self._module.weight
        return 0 if _one_pixel(weight) else weight.numel() * weight.element_size()

    def ready(self) -> None:
        """Take the weights, which were brought to their device."""
        self._weight = None if self._casts(self._module) else channels_last(self._module.weight.detach())

    def __call__(
        self,
        x: torch.Tensor,
        cache_x: torch.Tensor | None = None,
        cache_list: list[Any] | None = None,
        cache_idx: int | None = None,
    ) -> torch.Tensor:
        """[B, C, (T,) H, W] behind the frames before it: `cache_x`, or the entry of a list, which is taken out."""
        if cache_list is not None:
            cache_x, cache_list[cache_idx] = cache_list[cache_idx], None
        x, module, weight = channels_last(_behind(x, cache_x, self._past)), self._module, self._weight
        if weight is None:  # of a causal convolution its class's base is the plain one
            kind = type(module).__mro__[1] if x.ndim == 5 else type(module)
            return kind.forward(module, x)
        self._at_every()
        if x.device.type == "cpu":
            return torch.mkldnn_convolution(
                x, weight, module.bias, self.padding, module.stride, module.dilation, module.groups
            )
        return module._conv_forward(x, weight, module.bias)


class Norm:
    """In the place of a norm's forward: one of norm_silu.FUNCTIONS, of pixels in rows.

    While `preparing` is set, what is called is compiled first, and `preparing` called.
    """

    def __init__(self, module: nn.Module, fused: Fused, name: str) -> None:
        self._module, self._fused, self._name = module, fused, name
        self.preparing: Callable[[], None] | None = None
        self._gain: torch.Tensor | None = None

    def ready(self) -> None:
        """Take gamma, which was brought to its device."""
        self._gain = self._module.gamma.detach().float().flatten() * self._module.scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        pixels = channels_last(x).movedim(1, -1)
        rows = pixels.reshape(-1, x.shape[1])
        if self.preparing is not None:
            self.preparing()
            self._fused.prepare(self._name, rows, self._gain)
        return self._fused(self._name, rows, self._gain).view(pixels.shape).movedim(-1, 1)


class Nothing:
    """In the place of a forward whose work is done by the layer before."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Attention:
    """In the place of the attention over a picture's pixels: `kernel` of [B, 1, pixels, C], on views of what it is given.

    `instead` is called, as the block calls it, where there is not enough memory.
    """

    def __init__(self, kernel: Callable[..., torch.Tensor], instead: Callable[..., torch.Tensor]) -> None:
        self._kernel, self._instead = kernel, instead

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = [x.movedim(1, -1).flatten(1, 2)[:, None] for x in (q, k, v)]
        try:
            return self._kernel(*rows)[:, 0].unflatten(1, q.shape[2:]).movedim(-1, 1)
        except torch.OutOfMemoryError:
            return self._instead(q, k, v)


class Residual:
    """In the place of a residual block's forward: what its convolutions saw last is kept without a copy where it can be."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(
        self, x: torch.Tensor, feat_cache: list[Any] | None = None, feat_idx: list[int] | None = None, **_: Any
    ) -> torch.Tensor:
        inner = x
        for layer in self._module.residual:
            if feat_cache is None or not isinstance(layer, nn.Conv3d):
                inner = layer(inner)
                continue
            at, held = feat_idx[0], feat_cache[feat_idx[0]]
            feat_idx[0] += 1
            feat_cache[at] = _newest(inner, held)
            inner = layer(inner, held)
        return inner.add_(self._module.shortcut(x))


class Upsample:
    """In the place of an upsampling's forward: of pictures, with that of frames before it where the module has a `time_conv`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(
        self, x: torch.Tensor, feat_cache: list[Any] | None = None, feat_idx: list[int] | None = None, **_: Any
    ) -> torch.Tensor:
        batch, pictures = x.shape[0], None
        if feat_cache is not None and hasattr(self._module, "time_conv"):
            pictures = self._doubled(x, feat_cache, feat_idx[0])
            feat_idx[0] += 1
        if pictures is None:
            pictures = x.transpose(1, 2).flatten(0, 1)
        return self._module.resample(pictures).unflatten(0, (batch, -1)).transpose(1, 2)

    def _doubled(self, x: torch.Tensor, cache: list[Any], at: int) -> torch.Tensor | None:
        """Twice as many pictures [B 2T, C, H, W]; None for a video's first frame, which stays one."""
        held = cache[at]
        if held is None:
            cache[at] = FIRST_CALL_MARKER
            return None
        held = held if isinstance(held, torch.Tensor) else None
        made = self._module.time_conv(x, held)
        cache[at] = _newest(x, held)
        # [B, 2C, T, H, W] holds two frames of C channels for each that came in
        pairs = made.unflatten(1, (2, -1)).permute(0, 3, 1, 4, 5, 2)
        return pairs.reshape(-1, *pairs.shape[3:]).movedim(-1, 1)


class UpBlock:
    """In the place of the forward of a block of Wan 2.2's VAE: what its layers make and, if it upsamples, beside that its input,
    each pixel repeated over time and place (modules/vae2_2.py, DupUp3D), which is added in place."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # (in time, row, column) of each repetition, and the input's channels there, None where they are the output's
        self._places = [] if module.avg_shortcut is None else list(_places(module.avg_shortcut))

    def __call__(
        self,
        x: torch.Tensor,
        feat_cache: list[Any] | None = None,
        feat_idx: list[int] | None = None,
        first_chunk: bool = False,
    ) -> torch.Tensor:
        made = x
        for layer in self._module.upsamples:
            made = layer(made, feat_cache, feat_idx)
        if not self._places:
            return made
        beside, made, pixels = self._module.avg_shortcut, channels_last(made), channels_last(x).movedim(1, -1)
        # a video's first frame stays one: the last of its repetitions
        left_out = beside.factor_t - 1 if first_chunk else 0
        side, parts = beside.factor_s, made.movedim(1, -1)
        parts = parts.unflatten(3, (-1, side)).unflatten(2, (-1, side)).unflatten(1, (-1, beside.factor_t - left_out))
        for (time, row, column), channels in self._places:
            if time >= left_out:
                part = pixels if channels is None else pixels.index_select(-1, channels.to(pixels.device))
                parts[:, :, time - left_out, :, row, :, column].add_(part)
        return made


def _places(beside: nn.Module) -> Iterator[tuple[tuple[int, int, int], torch.Tensor | None]]:
    """Of a DupUp3D, whose output channels by time, row and column are the input's, each `repeats` times."""
    times, side, wide = beside.factor_t, beside.factor_s, beside.out_channels
    places = list(product(range(times), range(side), range(side)))
    for number, place in enumerate(places):
        channels = [(output * len(places) + number) // beside.repeats for output in range(wide)]
        yield place, None if channels == list(range(beside.in_channels)) else torch.tensor(channels)


def _newest(x: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
    """The last two frames of what was `held` and [B, C, T, H, W] behind it; one where there is no other."""
    if x.shape[2] > 2:
        return x[:, :, -2:].clone()
    return x if held is None or x.shape[2] == 2 else torch.cat([held[:, :, -1:], x], dim=2)


def _behind(x: torch.Tensor, held: torch.Tensor | None, past: int) -> torch.Tensor:
    """[B, C, T, H, W] behind the `past` frames before it: the held ones, and zeros where there are fewer."""
    if not past:
        return x
    before = [] if held is None else [held]
    if missing := past - (0 if held is None else held.shape[2]):
        before.insert(0, x.new_zeros((x.shape[0], missing, *x.shape[3:], x.shape[1])).movedim(-1, 1))
    return torch.cat([*before, x], dim=2)


def _one_pixel(weight: torch.Tensor) -> bool:
    return weight[0, 0].numel() == 1
