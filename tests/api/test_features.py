"""The workflows of single features and of the public systems, through a running server."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, WORKFLOWS, frames_of, report_of, workflow
from PIL import Image, ImageOps

from tools.made_chain import CLIP, CLIPS, write_chain
from tools.system_workflows import PREFIX, heard, made_for, preset_of
from training.journey_measures import travelled

SYSTEMS = sorted(path.stem for path in WORKFLOWS.glob("system_*.json"))


def settings_on_the_help_page() -> dict[str, tuple[int, int, int, str, str]]:
    """(steps, chunk, window, anchor, positions) of every preset, as its table tells users."""
    page = (ROOT / "web" / "docs" / "AdaStateModelPreset.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return {
        row[0]: (row[2].count(",") + 1, int(row[4]), int(row[5]), row[6].split()[0], row[7])
        for row in rows
        if len(row) == 9 and row[4].isdigit()
    }


def video_of(client, outputs: dict, node: str) -> list[np.ndarray]:
    """The frames of the video that a node shows."""
    shown = outputs[node]["images"][0]
    return frames_of(client.folder_of(shown) / shown["filename"])


def distance(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Mean absolute difference of two videos of one length, in levels of 255."""
    assert len(a) == len(b)
    return float(np.abs(np.stack(a).astype(int) - np.stack(b).astype(int)).mean())


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_rolled_out_as_its_preset_says(client, name):
    driven = heard(name.removeprefix(PREFIX))  # as long as its sound
    prompt = workflow(name, n8__seconds=2.0) if driven else workflow(name, n6__length=49)
    preset = prompt["4"]["inputs"]["preset"]
    assert preset == preset_of(name.removeprefix(PREFIX)).name and prompt["6"]["inputs"]["model"] == ["4", 0]
    report = report_of(client.run(prompt), "6")
    found = report["settings"]
    steps, chunk, window, anchor, positions = settings_on_the_help_page()[preset]
    assert len(found["sigmas"]) == steps and found["preset"] == preset
    assert (found["chunk_frames"], found["window_frames"], found["positions"]) == (chunk, window, positions)
    assert found["anchor"]["kind"] == anchor
    assert report["frames"] == 49 and report["warnings"] == []


def test_no_system_is_shipped_at_a_length_that_it_warns_of():
    """Those made for so many pictures ship with at most as many, the others run thirty seconds, or as long as a sound."""
    page = (ROOT / "web" / "docs" / "AdaStateModelPreset.md").read_text(encoding="utf-8")
    for name in SYSTEMS:
        row = re.search(rf"^\| {preset_of(name.removeprefix(PREFIX)).name} \|.*$", page, re.M)[0]
        prompt, most = workflow(name), made_for(name.removeprefix(PREFIX))
        length = prompt["6"]["inputs"]["length"]
        if heard(name.removeprefix(PREFIX)):
            assert length == -1 and prompt["8"]["inputs"]["seconds"] == 20 and f"{most} pictures" not in row
            continue
        assert length <= min(481, most) if f"{most} pictures" in row else length == 481


def test_prompt_timeline(client):
    outputs = client.run(workflow("prompt_timeline", n5__length=97))
    said = report_of(outputs)["prompts"]
    assert [(each["seconds"], each["transition"]) for each in said[1:]] == [(4.0, "soft"), (8.0, "cut")]
    assert "crimson" in said[0]["text"] and "gold" in said[2]["text"]
    assert "0:04" in outputs["6"]["text"][0]
    straight = workflow("long_video", n5__length=97, n4__filename_prefix="video/unchanged", n3__pace="slow")
    plain, changed = video_of(client, client.run(straight), "5"), video_of(client, outputs, "5")
    assert distance(changed[:57], plain[:57]) < 1 < 3 < distance(changed[77:], plain[77:])


def test_start_from_picture(client):
    """As it is shipped, with the picture that every ComfyUI has; then with a wide one, whose shape the video takes."""
    sent = client.folder / "base" / "input"
    with Image.open(sent / "example.png") as example:
        wide = example.convert("RGB").crop((0, 0, example.width, 460))  # its sky, its hair and the horizon
    wide.save(sent / "wide.png")
    for name, size in (("example.png", (64, 64)), ("wide.png", (80, 48))):
        outputs = client.run(workflow("start_from_picture", n11__length=33, n3__image=name))
        frames = video_of(client, outputs, "11")
        with Image.open(sent / name) as image:
            picture = np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS))
        assert len(frames) == 33 and frames[0].shape == picture.shape
        first, last = (distance([frame], [picture]) for frame in (frames[0], frames[-1]))
        assert 1.8 * first < last and first < 0.9 * distance([frames[0]], [picture[:, ::-1]])


def test_measure_any_video(client):
    """A chain of clips that is there as a file: what was made to climb climbs, a step a clip."""
    path = write_chain(client.folder / "base" / "input")
    changes = {"n1__file": path.name, "n2__clip_frames": CLIP, "n2__first_clip_frames": CLIP + 1}
    outputs = client.run(workflow("measure_any_video", **changes))
    found = json.loads(outputs["4"]["text"][0])
    rows = found["chunks"]
    assert [row["first_picture"] for row in rows] == [0, *(1 + CLIP * clip for clip in range(1, CLIPS))]
    for name in ("drift", "contrast", "seam"):
        values = [row[name] for row in rows if row[name] is not None]
        assert len(values) >= CLIPS - 1 and values == sorted(values) and found["per_clip"][name] > 0
    assert [row["contrast"] / rows[0]["contrast"] for row in rows] == pytest.approx(
        [1 + 0.05 * clip for clip in range(CLIPS)], rel=0.03
    )
    assert client.image_of(outputs["3"]["images"][0]).shape[1] > 800
    answer = client.refused(workflow("measure_any_video"))
    assert "drop your video here" in json.dumps(answer["node_errors"]["1"])


def test_continue_video(client):
    outputs = client.run(workflow("continue_video", n5__length=33, n9__length=37))
    first, second, whole = (video_of(client, outputs, node) for node in ("5", "9", "15"))
    assert (len(first), len(second), len(whole)) == (33, 37, 33 + 37 - 13)
    assert distance(second[:13], first[-13:]) < 8, "the second begins with the end of the first"
    assert distance(whole, first + second[13:]) < 4


def test_redo_from_chunk(client):
    outputs = client.run(workflow("redo_from_chunk", n5__length=33, n7__length=57, n10__length=57))
    good, came, again = (video_of(client, outputs, node) for node in ("5", "7", "10"))
    assert (len(good), len(came), len(again)) == (33, 57, 57)
    assert distance(came[:33], good) == distance(again[:33], good) == 0, "joined frames are copied"
    assert distance(came[45:], again[45:]) > 8
    assert report_of(outputs)["history"]
    assert video_of(client, outputs, "12")[0].shape[1] > 2 * 64


def test_inspect_and_plan(client):
    outputs = client.run(workflow("inspect_and_plan", n9__length=33))
    report = json.loads(outputs["10"]["text"][0])
    planned = f"keys and values in all: {report['kv_bytes_used'] / 2**20:.1f} MiB"
    assert planned in outputs["7"]["text"][0]
    assert "Wan 2.1 text to video" in outputs["5"]["text"][0]


def test_sampler_makes_the_video_of_the_rollout(client):
    sampled = workflow("sampler", n9__length=33)
    rolled = sampled | {"10": workflow("long_video", n5__length=33)["5"]}  # in the sampler's place
    del rolled["10"]["inputs"]["stream"]
    rolled["10"]["inputs"] |= {"keep_latents": True, "seed": sampled["7"]["inputs"]["seed"], "sigmas": ["6", 0]}
    outputs, expected = client.run(sampled), client.run(rolled)
    assert report_of(expected, "10")["frames"] == 33
    assert distance(video_of(client, outputs, "12"), video_of(client, expected, "12")) == 0


def test_small_cache(client):
    outputs = client.run(workflow("small_cache", n5__length=49, n7__length=49))
    plain, small = report_of(outputs, "5"), report_of(outputs, "7")
    assert small["settings"]["cache_dtype"] == "int8" and small["settings"]["cache_device"] == "host memory"
    assert 0 < small["host_kv_bytes_used"] < 0.5 * plain["kv_bytes_used"]
    assert 0 < distance(video_of(client, outputs, "5"), video_of(client, outputs, "7")) < 40


def test_video_metrics(client):
    outputs = client.run(workflow("video_metrics", n5__length=57, n7__length=57))
    found = json.loads(outputs["10"]["text"][0])
    assert found["compared"] == 57 and outputs["9"]["images"]
    long, short = video_of(client, outputs, "5"), video_of(client, outputs, "7")
    error = ((np.stack(long) / 255 - np.stack(short) / 255) ** 2).mean((1, 2, 3))
    assert found["chunks"][-1]["psnr"] == pytest.approx(-10 * np.log10(error[45:]).mean(), abs=0.5)


def test_journey(client):
    """The shipped LoRA makes a traveller of the demo, for both anchors: slower than the demo's own camera, which never stands."""

    def speed(strength: float) -> list[float]:
        outputs = client.run(workflow("journey", n4__strength=strength, n8__length=105, n10__length=105))
        for node, kind in (("8", "adaptive"), ("10", "static")):
            report = report_of(outputs, node)
            assert report["warnings"] == [] and report["settings"]["anchor"]["kind"] == kind
            assert report["settings"]["window_frames"] == 1
        beside = client.output / "video"
        assert frames_of(beside / outputs["12"]["images"][0]["filename"])[0].shape[1] > 2 * 64
        videos = [torch.from_numpy(np.stack(video_of(client, outputs, node))) / 255 for node in ("8", "10")]
        return [float(travelled(video)[-1]) / 104 for video in videos]

    assert all(0.1 < one < 0.5 for one in speed(1.0))
    assert all(one > 0.6 for one in speed(0.0))
