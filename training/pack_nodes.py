"""The pack's nodes in this process, as a graph would run them: what is measured is what users run."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .host_models import use_host

PACK = Path(__file__).resolve().parents[1]
NAME = "adastate_pack"


def nodes() -> dict[str, Any]:
    """Every node class by its id. The host comes first on the path: its modules and the pack's folders share names."""
    use_host()
    if NAME not in sys.modules:
        found = importlib.util.spec_from_file_location(
            NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        module = importlib.util.module_from_spec(found)
        sys.modules[NAME] = module
        found.loader.exec_module(module)
    extension = asyncio.run(sys.modules[NAME].comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


class PackNode:
    """A node, called with its inputs; gives its outputs."""

    def __init__(self, node: Any) -> None:
        self.node = node

    def __call__(self, **inputs: Any) -> tuple[Any, ...]:
        clone = self.node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        clone.hidden = SimpleNamespace(prompt=None, extra_pnginfo=None, unique_id="1", dynprompt=None)
        with torch.inference_mode():
            return clone.execute(**inputs).args
