"""A real ComfyUI in this process, on the CPU, with the pack loaded as the host loads it: under a name of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

PACK = Path(__file__).resolve().parents[2]


def _load_host() -> None:
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.exit("COMFYUI_PATH is not set: run `python3 run.py test host`", returncode=2)
    sys.path.insert(0, path)
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()


def _load_pack():
    spec = importlib.util.spec_from_file_location(
        "adastate_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["adastate_pack"] = module
    spec.loader.exec_module(module)
    return module


_load_host()
_pack = _load_pack()
_extension = asyncio.run(_pack.comfy_entrypoint())
NODES = {node.define_schema().node_id: node for node in asyncio.run(_extension.get_node_list())}


class HostNode:
    """A node called as the host calls it: on a locked clone with hidden values."""

    def __init__(self, node_id: str) -> None:
        self.node = NODES[node_id]

    def __call__(self, **inputs):
        hidden = SimpleNamespace(prompt=None, extra_pnginfo=None, unique_id="1", dynprompt=None)
        clone = self.node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        clone.hidden = hidden
        with torch.inference_mode():
            return clone.execute(**inputs)

    def validate(self, **inputs):
        return self.node.validate_inputs(**inputs)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Output, temp and input folders of this test's own."""
    import folder_paths

    for kind in ("output", "temp", "input"):
        (tmp_path / kind).mkdir()
        getattr(folder_paths, f"set_{kind}_directory")(str(tmp_path / kind))
    return tmp_path


@pytest.fixture
def node():
    return HostNode


def random_wan(
    seed: int = 0, layers: int = 2, dim: int = 128, ffn: int = 64, in_dim: int = 16
) -> dict[str, torch.Tensor]:
    """The state dict of a random tiny Wan 2.1 t2v model in the format of its public checkpoints."""
    import comfy.ops
    from comfy.ldm.wan.model import WanModel

    model = WanModel(
        model_type="t2v", dim=dim, ffn_dim=ffn, num_heads=dim // 128, num_layers=layers, in_dim=in_dim, out_dim=16,
        operations=comfy.ops.disable_weight_init, device="cpu", dtype=torch.float32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        if "norm" in name and name.endswith("weight"):
            state[name] = 1 + 0.1 * torch.randn(value.shape, generator=generator)
        else:
            fan = value[0].numel() if value.ndim > 1 else 100
            state[name] = torch.randn(value.shape, generator=generator) / fan**0.5
    return state


def random_vae(seed: int = 0, dim: int = 4) -> dict[str, torch.Tensor]:
    """The state dict of a random tiny Wan 2.1 VAE."""
    from comfy.ldm.wan.vae import WanVAE

    vae = WanVAE(dim=dim, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in vae.state_dict().items():
        if name.endswith("gamma"):
            state[name] = torch.ones_like(value)
        else:
            fan = value[0].numel() if value.ndim > 1 else 100
            state[name] = torch.randn(value.shape, generator=generator) / fan**0.5
    return state


@pytest.fixture(scope="session")
def wan_state():
    return random_wan()


@pytest.fixture
def model(wan_state):
    """A MODEL as Load Diffusion Model gives it."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict({k: v.clone() for k, v in wan_state.items()})


@pytest.fixture(scope="session")
def vae():
    import comfy.sd

    return comfy.sd.VAE(sd=random_vae())


@pytest.fixture
def positive():
    return [[torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(1)), {}]]


@pytest.fixture
def rollout(model, positive):
    """The rollout node with small defaults; inputs given win."""

    def call(**inputs):
        defaults = {
            "model": model, "positive": positive, "width": 32, "height": 32, "length": 33, "batch_size": 1, "seed": 5,
            "steps": 2, "shift": 5.0, "chunk_frames": 3, "window_frames": 3, "positions": "packed",
        }  # fmt: skip
        return HostNode("AdaStateRollout")(**(defaults | inputs))

    return call
