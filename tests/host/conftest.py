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

pytest_plugins = ["sampled", "campaign"]
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


@pytest.fixture(scope="session")
def interrupt():
    """The host's interrupt: an Exception on some hosts, a BaseException on others."""
    import comfy.model_management

    return comfy.model_management.InterruptProcessingException


@pytest.fixture
def progress_told(monkeypatch):
    """(value, total, preview) of every update that a node makes. Hosts that leave most of them out are kept from it."""
    import comfy.utils

    told = []
    for name in ("PROGRESS_THROTTLE_MIN_INTERVAL", "PROGRESS_THROTTLE_MIN_PERCENT"):
        if hasattr(comfy.utils, name):
            monkeypatch.setattr(comfy.utils, name, 0.0)
    monkeypatch.setattr(
        comfy.utils,
        "PROGRESS_BAR_HOOK",
        lambda value, total, preview, node_id=None: told.append((value, total, preview)),
    )
    return told


@pytest.fixture
def execute(monkeypatch):
    """The host's own validation and one executor, with its cache, on prompts of the API: `execute(prompt)` gives the
    outputs by node, `execute.check(prompt)` whether it is valid and the details of what is not."""
    import comfy_extras.nodes_preview_any
    import execution

    import nodes

    for name, each in {**NODES, **comfy_extras.nodes_preview_any.NODE_CLASS_MAPPINGS}.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, each)
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda event, data, sid=None: None)
    # what the hosts' own main.py gives: the newer ones want all three
    executor = execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0})

    def validated(prompt):
        valid, error, outputs, errors = asyncio.run(execution.validate_prompt("test", prompt, None))
        details = [each["details"] for one in errors.values() for each in one["errors"]]
        return valid, " ".join([*details, (error or {}).get("details", "")]), outputs

    def run(prompt):
        valid, details, outputs = validated(prompt)
        assert valid, details
        executor.execute(prompt, "test", {}, outputs)
        assert executor.success, executor.status_messages
        return executor.history_result["outputs"]

    run.check = lambda prompt: validated(prompt)[:2]
    return run


@pytest.fixture(autouse=True)
def every_autosave():
    """Autosaves as often as autosave_seconds says: whatever they cost, and the chunk waits for the one before.

    A test that wants them as they are calls `every_autosave.undo()`.
    """
    from adastate_pack.adastate_core.states import spacing
    from adastate_pack.adastate_core.states.state_thread import StateThread

    patch = pytest.MonkeyPatch()
    patch.setattr(spacing, "SHARE", float("inf"))
    run = StateThread.run
    patch.setattr(
        StateThread, "run", lambda thread, work: (run(thread, work), thread._thread and thread._thread.join())
    )
    yield patch
    patch.undo()


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


@pytest.fixture
def stream(vae, node):
    """What Stream To Video gives a rollout, with small defaults and no autosaves on the way; inputs given win."""

    def make(**inputs):
        defaults = {
            "vae": vae, "filename_prefix": "take", "fps": 16.0, "codec": "h264", "quality": 18, "preview": False,
            "autosave_seconds": 0.0,
        }  # fmt: skip
        return node("AdaStateStreamOutput")(**(defaults | inputs)).args[0]

    return make


@pytest.fixture
def written(monkeypatch):
    """The pictures that go to files, before the encoder."""
    from adastate_pack.nodes import stream as stream_nodes

    pictures, original = [], stream_nodes.VideoSink.write

    def write(self, frames):
        pictures.append(frames.clone())
        return original(self, frames)

    monkeypatch.setattr(stream_nodes.VideoSink, "write", write)
    return pictures
