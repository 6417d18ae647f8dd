"""LongLive 2.0's presets through the nodes, with everything at auto, against the loop of tests/core/slow_longlive2.py."""

from __future__ import annotations

import json

import folder_paths
import pytest
import tiny_5b
import torch
from adastate_pack.adastate_core.prompts import demo_words
from adastate_pack.adastate_core.prompts.values import PromptAt, Prompts
from adastate_pack.adastate_core.rollout import Rollout
from adastate_pack.adastate_core.weights.presets import PRESETS
from adastate_pack.nodes.host import model as adapter
from conftest import PACK
from PIL import Image
from safetensors.torch import save_file
from slow_longlive2 import LONGLIVE2
from test_models import AUTO, latents_of, report_of
from test_prompt_rollout import context
from test_published import Bare

FPS = 24.0
# (frame, whether a shot begins); the second shot is of one chunk
CHANGES = ((24, True), (32, True), (56, False))


def timeline():
    """Words that change at those frames, in seconds of the model's rate; a shot's first chunk has its own."""
    rows = [
        PromptAt(
            4 * frame / FPS,
            [[context(2 + i), {}]],
            "shot" if shot else "cut",
            opening=[[context(12 + i), {}]] if shot else None,
        )
        for i, (frame, shot) in enumerate(CHANGES)
    ]
    return Prompts((PromptAt(0.0, [[context(1), {}]], "cut"), *rows))


def before_chunk(loop):
    """The same words to a loop."""
    i, (frame, shot) = max((i, one) for i, one in enumerate([(0, False), *CHANGES]) if one[0] <= loop.f)
    loop.model.set_context(context(1 + i + 10 * (shot and frame == loop.f)))


@pytest.mark.parametrize(("name", "positions"), zip(LONGLIVE2, ("auto", "packed"), strict=True))
def test_a_preset_through_the_nodes_is_its_loop(rollout, node, name, positions):
    """A picture inside the first chunk and shots, on a tiny model of the exact format: in one go, and stopped and gone on with."""
    model, chunks = tiny_5b.loaded_model(), PRESETS[name].compared_chunks
    given = node("AdaStateModelPreset")(model=model, preset=name).args[0]
    picture = torch.randn(1, 48, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    asked = {
        "model": given, "positive": timeline(), "width": 64, "height": 64, **AUTO, "positions": positions,
    }  # fmt: skip

    def made(upto, **more):
        return rollout(length=4 * upto * 8 - 3, **asked, **more)

    out = made(chunks, start_latent={"samples": picture})
    ours, report = latents_of(out), report_of(out)
    assert report["warnings"] == [] and report["kv_bytes_used"] == report["kv_bytes_planned"]
    numbers = {
        "cuts": [frame for frame, shot in CHANGES if shot], "picture": adapter.to_model_space(model, picture),
        "before_chunk": before_chunk, "packed": positions == "packed",
    }  # fmt: skip
    with torch.inference_mode():
        bare = Bare(model, [[context(1), {}]])
        slow = LONGLIVE2[name](bare, seed=5, h=4, w=4, **numbers).roll(chunks)
        theirs = adapter.to_vae_space(model, slow)
    assert float((ours - theirs).abs().max()) < 1e-4
    first = made(chunks // 3, start_latent={"samples": picture})
    rest = made(chunks, resume=first.args[1])
    assert torch.equal(latents_of(rest), ours)


def words(**slots):
    """A prompt of the demo's words."""
    return demo_words.prompt(demo_words.DEFAULTS | slots)


@pytest.mark.parametrize("name", LONGLIVE2)
def test_the_shipped_workflow_on_files_of_the_exact_format_is_the_loop(execute, folders, monkeypatch, name):
    """workflows/api/system_longlive2.json as it is, but for the names of its files: its picture, its three shots, its length."""
    graph = json.loads((PACK / "workflows" / "api" / "system_longlive2.json").read_text(encoding="utf-8"))
    files = [path.name for path in tiny_5b.write_files(folders)]
    save_file(tiny_5b.model_state(), folders / files[0])  # the loop has these weights to the bit
    for kind in ("diffusion_models", "vae"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folders)], {".safetensors"}))
    Image.radial_gradient("L").resize((80, 48)).convert("RGB").save(folders / "input" / "example.png")
    graph["1"]["inputs"]["file"], graph["2"]["inputs"]["vae_name"] = files[:2]
    graph["4"]["inputs"]["preset"] = name
    seen, chunks = [], Rollout.chunks

    def watched(rollout, length, given, start):
        seen.append(given)
        for chunk in chunks(rollout, length, given, start):
            seen.append(chunk.latents)
            yield chunk

    monkeypatch.setattr(Rollout, "chunks", watched)
    with tiny_5b.narrow_vae_class():
        report = json.loads(execute(graph)["6"]["adastate_report"][0])
    (picture, *ours), model = seen, tiny_5b.loaded_model()
    assert report["warnings"] == [] and report["kv_bytes_used"] == report["kv_bytes_planned"]
    assert (report["frames"], report["video_fps"], report["settings"]["start_mode"]) == (
        381,
        24.0,
        "inside the first chunk",
    )
    # each at its middle has words that begin at 7 s or 13 s, latent frames 42 and 78
    texts = {0: words(balloon="crimson", pace="steady"), 40: words(terrain="desert", pace="fast", balloon="crimson")}
    texts[80] = words(terrain="snow", pace="slow", balloon="crimson", lantern="lantern")

    def say(loop):
        loop.model.set_context(texts[max(frame for frame in texts if frame <= loop.f)])

    with torch.inference_mode():
        bare = Bare(model, [[texts[0], {}]])
        numbers = {"cuts": [40, 80], "picture": picture, "before_chunk": say, "packed": False}
        slow = LONGLIVE2[name](bare, seed=7, h=picture.shape[3], w=picture.shape[4], **numbers).roll(12)
    assert float((torch.cat(ours, 2) - slow).abs().max()) < 1e-4
