"""Frames of a served rollout: fetched by number, and gone on from after the server was killed."""

from __future__ import annotations

import io
import json
import time
import urllib.parse
import urllib.request

from conftest import report_of, workflow
from PIL import Image


def fetched(client, name: str, folder: str) -> bytes:
    query = urllib.parse.urlencode({"filename": name, "subfolder": folder, "type": "output"})
    with urllib.request.urlopen(f"http://127.0.0.1:{client.server.port}/view?{query}") as answer:
        return answer.read()


def test_frames_are_fetched_by_number_and_open_the_graph(client):
    prompt = workflow("stream_to_frames", n5__length=33, n6__filename_prefix="api/take")
    outputs = client.run(prompt)
    report = report_of(outputs)
    assert report["frame_folders"] == ["api/take_00001_.frames"] and len(report["videos"]) == 1
    with Image.open(io.BytesIO(fetched(client, "000032.png", report["frame_folders"][0]))) as image:
        image.load()
        assert image.size == (64, 64) and json.loads(image.text["prompt"])["6"]["class_type"] == "AdaStateStreamFrames"


def test_kill_9_leaves_whole_frames_and_a_state_that_makes_the_sequence_whole(client):
    names = {"n6__filename_prefix": "api/killed", "n6__format": "png", "n4__filename_prefix": "api/killed_video"}
    client.queue(workflow("stream_to_frames", n5__length=4001, n4__autosave_seconds=0.2, **names))
    folder, video = client.output / "api" / "killed_00001_.frames", client.output / "api" / "killed_video_00001_.mp4"
    state, end = video.with_suffix(".state.safetensors"), time.monotonic() + 120
    while not state.is_file() or len(list(folder.glob("*.png"))) < 57:
        assert time.monotonic() < end, "no frames"
        time.sleep(0.1)
    client.kill()
    left = sorted(folder.glob("*.png"))
    assert [path.name for path in left] == [f"{number:06}.png" for number in range(len(left))]
    for path in left:
        with Image.open(path) as image:
            image.load()
    client.start()
    length = 4 * ((len(left) + 3) // 4) + 25
    resumed = workflow(
        "stream_to_frames", n5__length=length, n5__resume=["7", 0], n4__join=True, n6__join=True, **names
    )
    resumed["7"] = {"class_type": "AdaStateLoadState", "inputs": {"file": f"api/{state.name} [output]"}}
    whole = client.output / report_of(client.run(resumed))["frame_folders"][0]
    straight = workflow("stream_to_frames", n5__length=length, **names)
    other = client.output / report_of(client.run(straight))["frame_folders"][0]
    for number in range(length):
        with Image.open(whole / f"{number:06}.png") as one, Image.open(other / f"{number:06}.png") as two:
            assert one.tobytes() == two.tobytes(), number
    assert not list(folder.parent.glob(".*")), "what the killed server left is swept"
