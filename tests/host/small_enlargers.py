"""Tiny random models in the formats of the hosts' own loaders, and what they make of a whole video at once."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch


def random_state(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights small enough that pictures stay between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in module.state_dict().items():
        fan = value[0].numel() if value.ndim > 1 else 100
        state[name] = 0.5 * torch.randn(value.shape, generator=generator) / fan**0.5
    return state


def upscaler_state(kind: str = "compact", seed: int = 0) -> dict[str, torch.Tensor]:
    """A file of Load Upscale Model: `compact` enlarges twice, `esrgan` four times."""
    if kind == "compact":
        from spandrel.architectures.Compact import Compact

        return random_state(Compact(num_feat=4, num_conv=1, upscale=2), seed)
    from spandrel.architectures.ESRGAN import ESRGAN

    return random_state(ESRGAN(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=4), seed)


def load_upscaler(folder: Path, kind: str = "compact", seed: int = 0):
    """UPSCALE_MODEL of a file of random weights, through the host's own loader."""
    import folder_paths
    from comfy_extras.nodes_upscale_model import UpscaleModelLoader

    path = folder / f"{kind}_{seed}.pth"
    torch.save(upscaler_state(kind, seed), path)
    folder_paths.add_model_folder_path("upscale_models", str(folder))
    return UpscaleModelLoader.execute(path.name).args[0]


class Interpolator(torch.nn.Module):
    """A model with the interface that newer hosts' frame interpolation models have (comfy_extras/frame_interpolation_models):
    features of each picture, and in-betweens of two at a time between 0 and 1. `passes` are the times that it was asked for."""

    pad_align = 24

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.encode = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.mix = torch.nn.Conv2d(15, 3, 3, padding=1)
        self.load_state_dict(random_state(self, seed))
        self.passes: list[float] = []

    def get_dtype(self) -> torch.dtype:
        return self.encode.weight.dtype

    def memory_used_forward(self, shape, dtype) -> int:
        return 300 * shape[1] * shape[2] * dtype.itemsize

    def extract_features(self, picture):
        return self.encode(picture)

    def forward(self, before, after, timestep=0.5, cache=None):
        assert before.shape[2] % self.pad_align == before.shape[3] % self.pad_align == 0
        self.passes.append(float(timestep.flatten()[0]))
        first, second = (cache or {}).get("img0"), (cache or {}).get("img1")
        first = self.extract_features(before) if first is None else first
        second = self.extract_features(after) if second is None else second
        time = timestep.expand(len(before), 1, *before.shape[2:])
        mixed = self.mix(torch.cat([before, after, first, second, time], 1))
        return torch.lerp(before, after, time) + mixed


class FlowOnce(Interpolator):
    """The kind that makes all in-betweens of a pair in one call. `fails`: it is out of memory in that many calls."""

    fails = 0

    def forward_multi_timestep(self, before, after, times, cache=None):
        if self.fails:
            self.fails -= 1
            raise torch.cuda.OutOfMemoryError("out of memory")
        made = [self(before, after, torch.full((1, 1, *before.shape[2:]), time), cache) for time in times]
        return torch.cat(made)


def interpolator(kind: type[Interpolator] = Interpolator, seed: int = 0):
    """INTERP_MODEL as newer hosts' Load Frame Interpolation Model gives it."""
    model = kind(seed).eval()
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())


@torch.no_grad()
def enlarged(pictures: torch.Tensor, upscaler=None, interp=None, multiplier: int = 2) -> torch.Tensor:
    """The slow way: the host's own Upscale Image (using Model) on a whole decoded video [t, H, W, 3], then the in-betweens of all
    neighbours, each from two padded pictures alone."""
    from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel

    if upscaler is not None:
        pictures = ImageUpscaleWithModel.execute(upscaler, pictures).args[0]
    if interp is None:
        return pictures
    model, (height, width), made = interp.model, pictures.shape[1:3], [pictures[:1]]
    down, right = -height % model.pad_align, -width % model.pad_align
    padded = torch.nn.functional.pad(pictures.movedim(-1, 1), (0, right, 0, down), mode="reflect")
    for before, after, own in zip(padded, padded[1:], pictures[1:], strict=False):
        for step in range(1, multiplier):
            time = torch.full((1, 1, *padded.shape[2:]), step / multiplier)
            one = model(before[None], after[None], time)[:, :, :height, :width]
            made.append(one.clamp(0, 1).movedim(1, -1))
        made.append(own[None])
    return torch.cat(made)
