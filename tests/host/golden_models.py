"""The tiny models in the host's formats that golden files were made with; imports nothing of the pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sd
import torch
from comfy.ldm.wan.vae import WanVAE
from comfy.taesd.taehv import TAEHV
from golden import exact_numbers, exact_weights


def golden_model(wan_state: dict[str, torch.Tensor]) -> Any:
    """A MODEL with the names and shapes of `wan_state`."""
    weights = exact_weights(wan_state, seed=10)
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})


def golden_vae(kind: str) -> Any:
    """The VAE, "full" (2 channels wide) or "tiny"."""
    if kind == "tiny":
        weights = exact_weights(TAEHV(latent_channels=16).state_dict(), seed=20)
        weights["decoder.22.bias"] = torch.tensor([0.4, 0.5, 0.6])
        made = comfy.sd.VAE(sd=weights)
        made.first_stage_model.show_progress_bar = False
        return made
    shape = dict(dim=2, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True])
    return comfy.sd.VAE(sd=exact_weights(WanVAE(**shape).state_dict(), seed=30))


def host_inputs(node: Callable[[str], Callable[..., Any]], entry: dict[str, Any]) -> dict[str, Any]:
    """What the rollout node is given for an entry of the manifest, but length and resume; `node` calls a node by its id."""
    from conftest import random_wan

    inputs = entry["inputs"] | {
        "model": golden_model(random_wan()),
        "positive": [[exact_numbers((1, 5, 4096), 40), {}]],
    }
    for name, before in entry["nodes"].items():
        more = {"vae": golden_vae(entry["vae"])} if name == "stream" else {}
        inputs[name] = node(before["node"])(**before["inputs"], **more).args[0]
    return inputs
