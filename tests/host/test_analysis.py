"""The nodes that measure, in a real host."""

from __future__ import annotations

import json

import av
import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive
from adastate_pack.adastate_core.video_compare import METERS, frame_meters
from adastate_pack.adastate_core.video_sink import VideoSink


def test_attention_share_plots_and_counts_every_frame(node, model, positive):
    share = node("AdaStateAttentionShare")
    out = share(
        model=model, positive=positive, width=32, height=32, windows="3 6", seed=1, anchor=AnchorAdaptive(1)
    )  # fmt: skip
    image, table = out.args[0], json.loads(out.args[1])
    assert image.ndim == 4 and image.shape[-1] == 3 and 0 <= float(image.min()) < float(image.max()) <= 1
    assert [entry["window_frames"] for entry in table] == [3, 6]
    for entry in table:
        window = [f"past {i}" for i in range(-entry["window_frames"], 0)]
        assert entry["labels"] == ["anchor 0", *window, "state 0", "current 0", "current 1", "current 2"]
        assert sum(entry["share"]) == pytest.approx(1.0) and len(entry["by_layer"]) == 2
        assert min(entry["share"]) > 0


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"windows": "3, x"}, "windows is '3, x'; give one to 8 window sizes"),
        ({"windows": ""}, "windows is ''"),
        ({"windows": "0"}, "windows is '0'"),
        ({"windows": "3", "width": 40}, "width is 40; it must be a multiple of 16, at least 16: try"),
    ],
)
def test_attention_share_says_what_is_wrong(node, inputs, reason):
    assert node("AdaStateAttentionShare").validate(**inputs).startswith(reason)


def video(path, frames: int, level: int, fps: int = 16, size: int = 32):
    from adastate_pack.nodes.host.api import InputImpl

    generator = torch.Generator().manual_seed(level)
    noise = torch.randint(0, 60, (1, size, size, 3), generator=generator)
    pictures = torch.cat([(noise + level + i).clamp(0, 255) for i in range(frames)]).to(torch.uint8)
    with VideoSink(path, size, size, fps) as sink:
        sink.write(pictures)
    return InputImpl.VideoFromFile(str(path))


def test_compare_makes_one_video_of_several(node, folders):
    first, second = video(folders / "a.mp4", 20, 20), video(folders / "b.mp4", 12, 150)
    third = video(folders / "c.mp4", 40, 90, fps=32)
    out = node("AdaStateCompare")(video_a=first, video_b=second, video_c=third, labels="dark, bright")
    source = out.args[0].get_stream_source()
    with av.open(source) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 16
    assert len(frames) == 20, "the longest, at the first one's rate: the third has twice the frames for the same time"
    height, width = frames[0].shape[:2]
    assert width > 3 * 190 and height > 192
    dark, bright = frames[5][60:160, 20:180], frames[5][60:160, 220:370]
    assert abs(float(dark.mean()) - 55) < 8 and abs(float(bright.mean()) - 185) < 8
    held = frames[19][60:160, 220:370].mean() - frames[11][60:160, 220:370].mean()
    assert abs(float(held)) < 2, "a video that has ended stays at its last frame"
    numbers = json.loads(out.args[1])
    assert [entry["label"] for entry in numbers] == ["dark", "bright", ""]
    assert [entry["frames"] for entry in numbers] == [20, 12, 40] and len(numbers[0]["motion"]) == 2
    assert numbers[0]["motion"][0] == pytest.approx(15 / 16 / 255, rel=0.3), "every frame one level up but the first"


def test_meters_are_what_they_say():
    import numpy

    flat = numpy.full((8, 8, 3), 100, numpy.uint8)
    assert frame_meters(flat, None) == {name: pytest.approx(0.0, abs=1e-6) for name in METERS}
    stripes = flat.copy()
    stripes[:, ::2] = 151
    meters = frame_meters(stripes, flat)
    assert meters["sharpness"] == pytest.approx(0.5 * 0.2) and meters["contrast"] == pytest.approx(0.1)
    assert meters["motion"] == pytest.approx(0.1) and meters["colour"] == pytest.approx(0, abs=1e-6)
    red = numpy.zeros((8, 8, 3), numpy.uint8)
    red[..., 0] = 255
    assert frame_meters(red, None)["colour"] == pytest.approx((0.701 + 2 * 0.299) / 3, abs=1e-3)


def test_video_metrics_plots_and_measures_chunks(node, folders):
    first, second = video(folders / "a.mp4", 33, 20), video(folders / "b.mp4", 20, 40)
    out = node("AdaStateVideoMetrics")(video=first, reference=second)
    image, found = out.args[0], json.loads(out.args[1])
    assert image.ndim == 4 and image.shape[-1] == 3 and 0 <= float(image.min()) < float(image.max()) <= 1
    assert [chunk["first_picture"] for chunk in found["chunks"]] == [0, 9, 21]
    assert found["pictures"] == 33 and found["compared"] == 20 and found["size"] == [32, 32]
    drifts = [chunk["drift"] for chunk in found["chunks"]]
    assert 0 == drifts[0] < drifts[1] < drifts[2], "a level up with every picture"
    assert 16 < found["chunks"][0]["psnr"] < 22 and "psnr" not in found["chunks"][2]
    alone = node("AdaStateVideoMetrics")(video=first, chunk_frames=8, every=4)
    assert alone.args[0].shape[1] < image.shape[1], "no panel for a reference that is not there"
    assert json.loads(alone.args[1])["pictures"] == 9


def test_video_metrics_reads_a_long_video_a_picture_at_a_time(node, folders, monkeypatch):
    import weakref

    from adastate_pack.nodes import metrics

    alive, most, plain = set(), [0], metrics.read_pictures

    def counted(*arguments):
        for number, picture in enumerate(plain(*arguments)):
            alive.add(number)
            most[0] = max(most[0], len(alive))
            weakref.finalize(picture, alive.discard, number)
            yield picture
            del picture

    monkeypatch.setattr(metrics, "read_pictures", counted)
    for frames in (20, 200):
        out = node("AdaStateVideoMetrics")(video=video(folders / f"{frames}.mp4", frames, 20))
        assert json.loads(out.args[1])["pictures"] == frames and most[0] <= 3


def test_video_metrics_says_what_is_wrong(node, folders):
    metrics = node("AdaStateVideoMetrics")
    assert metrics.validate(chunk_frames=12, every=1) is True
    assert metrics.validate(chunk_frames=0).startswith(
        "chunk_frames is 0; it must be a number of pictures between 1 and"
    )
    assert metrics.validate(every=0).startswith("every is 0; it must be a number of pictures between 1 and")
    first, other = video(folders / "a.mp4", 12, 20), video(folders / "b.mp4", 12, 20, size=48)
    with pytest.raises(ValueError, match="reference is 48x48 and the video 32x32; both must have the same size"):
        metrics(video=first, reference=other)
    with pytest.raises(ValueError, match="every is 5000"):
        metrics(video=first, every=5000)
