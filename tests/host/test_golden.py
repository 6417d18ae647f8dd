"""What older versions saved through the nodes: prompts are still accepted, states and absorptions go on as they did."""

from __future__ import annotations

import asyncio
import copy
import importlib
import json
import os
import shutil
from pathlib import Path

import av
import folder_paths
import pytest
import torch
from adastate_pack.nodes.host.output_files import add_own_models
from conftest import NODES, HostNode
from golden import FOLDER, assert_same_latents, entries, taken_or_refused
from golden_models import host_inputs
from safetensors.torch import load_file, save_file

import nodes as host_nodes

PROMPTS = sorted((FOLDER / "api").glob("*.json"))


def frames_of(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


@pytest.fixture(scope="module")
def known_nodes():
    """The host's extra nodes and the pack's, as a server has them."""
    import execution

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.environ["COMFYUI_PATH"])  # its package `utils`; the host puts comfy/utils.py in front
        importlib.import_module("server")
        asyncio.run(host_nodes.init_builtin_extra_nodes())
        add_own_models()
        for name, node in NODES.items():
            patch.setitem(host_nodes.NODE_CLASS_MAPPINGS, name, node)
        yield lambda prompt: asyncio.run(execution.validate_prompt("test", prompt, None))


def test_there_are_all_prompts():
    assert len(PROMPTS) >= 24


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_a_prompt_of_before_is_accepted(known_nodes, path):
    prompt = json.loads(path.read_text(encoding="utf-8"))
    valid, error, outputs, errors = known_nodes(prompt)
    assert valid and not errors, (error, errors)
    assert outputs


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
@pytest.mark.sampled(4)
def test_the_check_sees_inputs_that_are_gone(known_nodes, path):
    """Without any one of its required inputs, or with a word for a number, no node of ours passes."""
    prompt = json.loads(path.read_text(encoding="utf-8"))
    for number, one in prompt.items():
        if not one["class_type"].startswith("AdaState"):
            continue
        required = NODES[one["class_type"]].INPUT_TYPES()["required"]
        for name in required.keys() & one["inputs"].keys():
            changed = copy.deepcopy(prompt)
            del changed[number]["inputs"][name]
            assert known_nodes(changed)[3][number]["errors"], (number, name)


def put_back(folder: Path, entry: dict, state: Path) -> str:
    """An entry's state and videos where they were saved in the output folder; the state's name for the loader."""
    output = Path(folder_paths.get_output_directory())
    for file, golden in entry["videos"].items():
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / golden, output / file)
    shutil.copy(state, output / "golden.state.safetensors")
    return "golden.state.safetensors [output]"


def go_on(folder: Path, entry: dict, state: Path) -> None:
    """Load, go on and join; compare latents and frames with what was recorded."""
    expected = load_file(folder / entry["expected"])
    name = put_back(folder, entry, state)
    assert HostNode("AdaStateLoadState").validate(file=name) is True
    loaded = HostNode("AdaStateLoadState")(file=name).args[0]
    inputs = host_inputs(HostNode, entry)
    out = HostNode("AdaStateRollout")(**inputs, length=entry["length"], resume=loaded).args
    if "latents" in expected:
        assert_same_latents(out[0]["samples"], expected["latents"], None)
    torch.testing.assert_close(out[1].pending, expected["pending"], atol=1e-4, rtol=1e-4)
    files = out[1].stream.get("files", [])
    assert len(files) == len(entry["videos"]) and not set(files) & set(entry["videos"])
    for i, (old, new) in enumerate(zip(entry["videos"], files, strict=True)):
        before, after = (frames_of(Path(folder_paths.get_output_directory()) / file) for file in (old, new))
        assert len(before) == entry["stop"] and torch.equal(after[: entry["stop"]], before)
        added = after[entry["stop"] :]
        assert added.shape == expected[f"pictures.{i}"].shape
        # encoders may differ by version, so not to the bit
        assert (added.float() - expected[f"pictures.{i}"].float()).abs().mean((1, 2, 3)).max() < 2


@pytest.mark.parametrize("golden", entries("host_states"))
def test_a_state_goes_on_through_the_nodes(golden):
    folder, entry = golden
    with taken_or_refused(entry):
        go_on(folder, entry, folder / entry["state"])


@pytest.mark.parametrize("golden", entries("host_absorptions"))
def test_a_saved_absorption_is_taken_by_the_nodes(golden):
    folder, entry = golden
    file = Path(folder_paths.get_output_directory()) / entry["nodes"]["absorption"]["inputs"]["file"].split(" [")[0]
    shutil.copy(folder / entry["file"], file)
    with taken_or_refused(entry):
        out = HostNode("AdaStateRollout")(**host_inputs(HostNode, entry), length=entry["length"]).args
        assert_same_latents(out[0]["samples"], load_file(folder / entry["expected"])["latents"], None)
        report = json.loads(out[2])
        assert report["absorption"]["phase"] == "switched" and len(report["warnings"]) == entry["warnings"]


@pytest.mark.parametrize("part", ["cache.0.values", "stream."])
@pytest.mark.parametrize("golden", [one for one in entries("host_states") if one.values[0][1]["videos"]])
def test_the_comparison_sees_what_a_state_holds(golden, part, tmp_path):
    """Other values in a state give another video."""
    from safetensors import safe_open

    folder, entry = golden
    with safe_open(folder / entry["state"], "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    names = [name for name in tensors if name.startswith(part)]
    changed = {name: tensors[name] * 0.5 if name in names else tensors[name] for name in tensors}
    save_file(changed, tmp_path / "a.safetensors", metadata=metadata)
    assert names
    with pytest.raises(AssertionError):
        go_on(folder, entry, tmp_path / "a.safetensors")
