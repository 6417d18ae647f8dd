"""Files that mean harm where a running server looks for them: each prompt is answered with a sentence, and the server lives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_of
from hostile import headers, manifests, media, pickles, timelines
from hostile.cell import MEGABYTES, check
from mutations import mutated
from safetensors.torch import load_file, save

GOLDEN = ROOT / "tests" / "golden" / "91e434f"
DEMO = "adastate_demo.safetensors"
SHOWN = {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}


@pytest.fixture(scope="module")
def demo_weights():
    return load_file(ROOT / "models" / "diffusion_models" / DEMO)


@pytest.fixture
def lay(client) -> Callable[[str, str, bytes], Path]:
    """Put a file into one of the server's folders."""

    def put(folder: str, name: str, data: bytes) -> Path:
        path = client.folder / "base" / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path.parent)  # else a list of files of the same second is taken for new
        return path

    return put


def looked_into(file: str) -> dict:
    """A model's file: what it is, and what a rollout of it takes."""
    return {
        "1": {"class_type": "AdaStateLoadModel", "inputs": {"file": file, "weight_dtype": "default", "preset": "auto"}},
        "2": {"class_type": "AdaStatePlan", "inputs": {"model": ["1", 0], "width": 64, "height": 64, "length": 33}},
        "3": {
            "class_type": "AdaStateInspectCheckpoint",
            "inputs": {"file": file, "width": 64, "height": 64, "length": 33},
        },
    }


def of_node(class_type: str, **inputs) -> dict:
    """A node whose first output is shown."""
    return {"1": {"class_type": class_type, "inputs": inputs}, "2": SHOWN}


def a_model(chance, lay, weights):
    whole = save(weights, {"adastate": json.dumps({"steps": 2, "shift": 5.0, "chunk_frames": 3, "window_frames": 3})})
    data, what = headers.hostile(whole, chance)
    return looked_into(lay("models/diffusion_models", "h.safetensors", data).name), what


def a_torch_file(chance, lay, weights):
    canary = lay("models/diffusion_models", "none", b"").with_name("canary")
    small = {name: weight for name, weight in weights.items() if weight.numel() < 2000}
    data, what = pickles.hostile(small, canary, chance)
    return looked_into(lay("models/diffusion_models", "h.pt", data).name), what


def a_lora(chance, lay, weights):
    name = "blocks.0.self_attn.q"
    width = weights[f"{name}.weight"].shape[0]
    pair = {
        f"diffusion_model.{name}.lora_{side}.weight": torch.zeros(size)
        for side, size in (("A", (4, width)), ("B", (width, 4)))
    }
    data, what = headers.hostile(save(pair | {f"diffusion_model.{name}.alpha": torch.tensor(4.0)}), chance)
    file = lay("models/loras", "h.safetensors", data).name
    prompt = looked_into(DEMO) | {
        "3": {"class_type": "AdaStateLoadLora", "inputs": {"model": ["1", 0], "file": file, "strength": 1.0}}
    }
    prompt["2"]["inputs"]["model"] = ["3", 0]
    return prompt, what


def a_saved(kind: str, chance, lay):
    target = lay("input", f"h.{kind}.safetensors", b"")
    what = mutated(chance.choice(sorted(GOLDEN.glob(f"*.{kind}.safetensors"))), target, chance)
    node = {"state": "AdaStateLoadState", "absorption": "AdaStateLoadAbsorption"}[kind]
    return of_node(node, file=target.name, **({"chunk": -1} if kind == "state" else {})), what


def a_timeline(chance, lay, weights):
    text, what = timelines.hostile(chance)
    return of_node("AdaStateDemoTimeline", text=text.encode("utf-8", "replace").decode()), what


def a_video(chance, lay, weights):
    ending, form, codec, pixels = chance.choice(media.VIDEOS)
    data, what = media.hostile_video(ending, media.video(form, codec, pixels), chance)
    prompt = of_node("AdaStateVideoMetrics", video=["3", 0])
    prompt["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}}
    prompt["3"] = {"class_type": "LoadVideo", "inputs": {"file": lay("input", f"h.{ending}", data).name}}
    return prompt, what


def a_sound(chance, lay, weights):
    ending, form, codec = chance.choice([one for one in media.SOUNDS if one[0] not in ("mka", "opus")])
    data, what = media.hostile_sound(ending, media.sound(form, codec), chance)
    prompt = of_node("AdaStateAudio", audio=["3", 0], fps=16.0, offset=0.0)
    prompt["3"] = {"class_type": "AdaStateLoadSound", "inputs": {"file": lay("input", f"h.{ending}", data).name}}
    return prompt, what


def a_manifest(chance, lay, weights):
    """A preset of the user's folder, and a report that is plotted."""
    folder = lay("user/adastate/presets", "none", b"").parent
    path, what = manifests.preset(folder, chance)
    path.rename(folder / "mine.toml")
    data, more = manifests.hostile_json(
        manifests.REPORT | {"absorption": {"layers": [{"layer": 0, "error": 0.5}]}}, chance
    )
    prompt = of_node("AdaStateAbsorptionReport", report=["3", 0])
    prompt["3"] = {"class_type": "PrimitiveString", "inputs": {"value": data.decode("utf-8", "replace")[:200_000]}}
    return prompt, f"{what}; {more}"


KINDS = {
    "safetensors": a_model, "torch file": a_torch_file, "LoRA": a_lora, "timeline": a_timeline, "video": a_video, "sound": a_sound,
    "state": lambda chance, lay, weights: a_saved("state", chance, lay),
    "absorption": lambda chance, lay, weights: a_saved("absorption", chance, lay), "manifest": a_manifest,
}  # fmt: skip


def said_by(client, prompt: dict) -> list[tuple[str, str]]:
    """(node type, sentence) of all that a prompt was refused with, or failed with; none where it went through."""
    answer = client.server.request("/prompt", {"prompt": prompt})
    refused = answer.get("node_errors") or {}
    said = [(one["class_type"], each["details"]) for one in refused.values() for each in one["errors"]]
    assert said or "error" not in answer, answer
    if "prompt_id" in answer and (error := error_of(client.wait(answer["prompt_id"], 120))):
        said.append((error["node_type"], error["exception_message"].strip()))
    return said


def memory_of(client) -> float:
    """The most megabytes that the server has had so far."""
    status = Path(f"/proc/{client.server.process.pid}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def test_hostile_files_on_a_server(campaign, client, lay, demo_weights):
    client.server.request("/object_info")
    for trial in campaign("hostile files of all kinds, on a running server", full=200, sample=9):
        with trial:
            kind = list(KINDS)[(trial.number * 9 + 8) // 200]
            before = memory_of(client)
            prompt, what = KINDS[kind](trial.chance, lay, demo_weights)
            for node_type, text in said_by(client, prompt):
                if node_type.startswith("AdaState"):  # the host's own loaders have their own words
                    check("user", text, (), f"{kind}: {what}")
            client.server.check_alive()
            assert "AdaStatePlan" in client.server.request("/object_info/AdaStatePlan"), f"{kind}: {what}"
            assert not list((client.folder / "base").rglob("canary")), f"{kind}: {what}"
            grown = memory_of(client) - before
            assert grown < MEGABYTES, f"{kind}: {what}: {grown:.0f} MB"
            trial.saw(MB=round(grown))
