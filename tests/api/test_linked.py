"""Outputs that are linked after a run, over HTTP: they are never empty, and what is kept is not made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import report_of, workflow
from safetensors import safe_open
from safetensors.torch import load_file

STATE, LATENT, VIDEO = 1, 0, 3


def graph(name: str, *linked: int, node: str = "5", **changes) -> dict:
    """long_video in a short form, its rollout under the id `node`, with these outputs linked to nodes that keep them."""
    changes = {"n4__keep_state": False, "n4__filename_prefix": f"linked/{name}"} | changes
    prompt = workflow("long_video", n5__length=57, n5__keep_latents=True, **changes)
    savers = {
        STATE: ("AdaStateSaveState", "state", {"filename_prefix": f"linked/{name}"}),
        LATENT: ("SaveLatent", "samples", {"filename_prefix": f"linked/{name}"}),
        VIDEO: ("SaveVideo", "video", {"filename_prefix": f"linked/{name}_copy", "format": "auto", "codec": "auto"}),
    }
    for slot in linked:
        kind, socket, inputs = savers[slot]
        prompt[f"2{slot}"] = {"class_type": kind, "inputs": inputs | {socket: [node, slot]}}
    prompt[node] = prompt.pop("5")
    return prompt


def saved(client, outputs: dict, slot: int) -> dict[str, torch.Tensor]:
    """The tensors that the node behind an output has saved; of a state without the names of its files."""
    shown = outputs[f"2{slot}"]
    if slot == STATE:
        name = shown["text"][0].splitlines()[0].removesuffix(" [output]")
    else:
        name = "linked/" + shown["latents"][0]["filename"]
    return load_file(client.output / name)


def videos(client, name: str) -> list[Path]:
    return sorted((client.output / "linked").glob(f"{name}_0*.mp4"))


@pytest.mark.parametrize("slot", [STATE, LATENT])
def test_an_output_that_is_linked_after_the_run_is_made_by_running_again(client, slot):
    name = f"later{slot}"
    straight = saved(client, client.run(graph(f"straight{slot}", slot)), slot)
    report = report_of(client.run(graph(name)))
    assert set(report["not_made"]) == {"LATENT", "STATE"} and report["state_bytes"] is None
    outputs = client.run(graph(name, slot))
    made = saved(client, outputs, slot)
    assert made.keys() == straight.keys() and all(torch.equal(made[key], straight[key]) for key in straight)
    assert ("STATE" if slot == STATE else "LATENT") not in report_of(outputs).get("not_made", {})
    assert len(videos(client, name)) == 2
    client.run(graph(name))  # unlinked again: replayed
    client.run(graph(name, slot))
    assert len(videos(client, name)) == 2


def test_a_video_that_is_linked_after_the_run_is_the_one_that_is_there(client):
    client.run(graph("video"))
    outputs = client.run(graph("video", VIDEO))
    [copy] = outputs[f"2{VIDEO}"]["images"]
    assert (client.output / copy["subfolder"] / copy["filename"]).stat().st_size and len(videos(client, "video")) == 1


def test_from_a_kept_state_nothing_is_made_again_inside_a_subgraph_too(client):
    straight = saved(client, client.run(graph("whole", STATE)), STATE)
    client.run(graph("kept", node="7:5", n4__keep_state=True))
    kept = sorted((client.output / "linked").iterdir())
    outputs = client.run(graph("kept", STATE, LATENT, node="7:5", n4__keep_state=True))
    assert [path for path in kept if not path.exists()] == [] and len(videos(client, "kept")) == 1
    made = saved(client, outputs, STATE)
    assert made.keys() == straight.keys() and all(torch.equal(made[key], straight[key]) for key in straight)
    assert "nothing was made again" in report_of(outputs, "7:5")["warnings"][-1]
    with safe_open(client.output / "linked" / outputs[f"2{LATENT}"]["latents"][0]["filename"], "pt") as file:
        assert file.get_tensor("latent_tensor").shape[2] == 15


def test_another_model_begins_at_the_start(client):
    inputs = {"n4__keep_state": True}
    client.run(graph("other", **inputs))
    other = graph("other", STATE, **inputs)
    other["3"]["inputs"]["terrain"] = "desert"
    client.run(other)
    assert len(videos(client, "other")) == 2


def test_an_output_that_only_a_node_that_is_not_run_takes_is_made(client):
    prompt = graph("idle")
    prompt["30"] = {
        "class_type": "AdaStateDecodeState",
        "inputs": {"state": ["5", STATE], "vae": ["2", 0], "latent_space": "auto"},
    }
    report = report_of(client.run(prompt))
    assert set(report["not_made"]) == {"LATENT"} and report["state_bytes"]
