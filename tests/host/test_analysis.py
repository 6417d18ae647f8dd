"""The nodes that measure, in a real host."""

from __future__ import annotations

import json
import sys

import av
import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive
from adastate_pack.adastate_core.measure.compare import METERS, frame_meters
from adastate_pack.adastate_core.video.sink import VideoSink


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


def test_attention_share_of_the_past_over_chunks(node, model, positive):
    share, inputs = (
        node("AdaStateAttentionShare"),
        dict(width=32, height=32, windows="3", seed=1, anchor=AnchorAdaptive(1)),
    )
    everything = json.loads(share(model=model, positive=positive, **inputs).args[1])[0]
    out = share(model=model, positive=positive, **inputs, share_of="past", chunks=2)
    [entry] = json.loads(out.args[1])
    assert entry["labels"] == ["anchor 0", "past -3", "past -2", "past -1"] and sum(entry["share"]) == pytest.approx(
        1.0
    )
    by_layer = [[value / sum(layer[:4]) for value in layer[:4]] for layer in everything["by_layer"]]
    assert entry["by_layer"] == [pytest.approx(layer) for layer in by_layer]
    assert [len(chunk["labels"]) for chunk in entry["by_chunk"]] == [0, 4]
    assert entry["by_chunk"][1]["share"] == entry["share"] and out.args[0].shape[2] == 1400
    first = json.loads(share(model=model, positive=positive, **inputs, share_of="past", chunks=1).args[1])
    assert first[0]["labels"] == []


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"chunks": 257, "windows": "3"}, "chunks is 257; it must be between 0 and 256"),
        ({"share_of": "most", "windows": "3"}, "share_of is 'most'; it must be one of all, past"),
        ({"windows": "3, x"}, "windows is '3, x'; give one to 8 window sizes"),
        ({"windows": ""}, "windows is ''"),
        ({"windows": "0"}, "windows is '0'"),
        ({"windows": "3", "width": 40}, "width is 40; it must be a multiple of 16, at least 16: try"),
    ],
)
def test_attention_share_says_what_is_wrong(node, inputs, reason):
    assert node("AdaStateAttentionShare").validate(**inputs).startswith(reason)


def video(path, frames: int, level: int, fps: int = 16, size: int = 32, sound=None):
    from adastate_pack.nodes.host.api import InputImpl

    generator = torch.Generator().manual_seed(level)
    noise = torch.randint(0, 60, (1, size, size, 3), generator=generator)
    pictures = torch.cat([(noise + level + i).clamp(0, 255) for i in range(frames)]).to(torch.uint8)
    with VideoSink(path, size, size, fps, sound=sound) as sink:
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


def test_a_file_of_chained_clips_climbs_in_numbers_and_in_the_plot(node, folders):
    """Five clips of another model: each adds 3 levels of red and a twelfth more contrast, and jumps where it begins."""
    from adastate_pack.nodes.host.api import InputImpl

    ramp = torch.linspace(-30, 30, 64)
    clips = []
    for clip in range(5):
        still = 120 + (1 + clip / 12) * ramp + 6 * clip
        moving = torch.stack([still.roll(i) for i in range(16)])  # one pixel a picture
        colours = torch.stack([moving + 3 * clip, moving, moving], -1)
        clips.append(colours[:, None].expand(-1, 64, -1, -1))
    with VideoSink(folders / "chain.mp4", 64, 64, 16, quality=8) as sink:
        sink.write(torch.cat(clips).round().clamp(0, 255).to(torch.uint8))
    out = node("AdaStateVideoMetrics")(video=InputImpl.VideoFromFile(str(folders / "chain.mp4")), clip_frames=16)
    found = json.loads(out.args[1])
    rows = found["chunks"]
    assert [row["first_picture"] for row in rows] == [0, 16, 32, 48, 64] and found["clip_frames"] == 16
    for name in ("drift", "colour", "contrast"):
        values = [row[name] for row in rows]
        assert values == sorted(values) and values[-1] > 1.2 * values[1], name
    for clip, row in enumerate(rows):
        spread = float((ramp * (1 + clip / 12)).std(correction=0)) / 255
        assert row["contrast"] == pytest.approx(spread, rel=0.03) and (row["seam"] is None) == (clip == 0)
        assert clip == 0 or row["seam"] > 1.5 and row["seam_colour"] > 1
    assert found["per_clip"]["contrast"] == pytest.approx(float(ramp.std(correction=0)) / 255 / 12, rel=0.05)
    line = drawn(out.args[0][0], "#30638e")[: out.args[0].shape[1] // 4]
    columns = torch.nonzero(line.any(0))[:, 0]
    heights = torch.tensor([float(torch.nonzero(line[:, x])[:, 0].float().mean()) for x in columns])
    assert heights[0] - heights[-1] > 60 and float(torch.corrcoef(torch.stack([columns, heights]))[0, 1]) < -0.98
    plain = node("AdaStateVideoMetrics")(video=InputImpl.VideoFromFile(str(folders / "chain.mp4")))
    assert plain.args[0].shape[1] < out.args[0].shape[1], "a panel for the seams"


def drawn(image: torch.Tensor, colour: str) -> torch.Tensor:
    """[h, w] where a picture has just this colour, without the letters at its left edge."""
    wanted = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    found = (image - wanted).abs().amax(-1) < 0.02
    found[:, :90] = False
    return found


def test_video_metrics_reads_a_long_video_a_picture_at_a_time(node, folders, monkeypatch):
    import weakref

    from adastate_pack.nodes import metrics_node as metrics

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
    said = metrics.validate(clip_frames=0, first_clip_frames=81)
    assert said.startswith("first_clip_frames is 81 and clip_frames 0; give what each later clip adds")


def left_in(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_files_that_are_no_videos_are_refused_in_a_sentence_and_nothing_is_left(node, folders, monkeypatch):
    from adastate_pack.nodes.host.api import InputImpl

    good = video(folders / "good.mp4", 12, 20)
    (folders / "input").mkdir(exist_ok=True)
    whole = (folders / "good.mp4").read_bytes()
    files = {
        "text.mp4": b"no video " * 50,
        "empty.mp4": b"",
        "cut.mp4": whole[:200],
        "noise.mkv": bytes(range(256)) * 8,
        "list.m3u8": f"#EXTM3U\n#EXTINF:1,\n{folders / 'good.mp4'}\n#EXT-X-ENDLIST\n".encode(),
        "concat.mp4": b"ffconcat version 1.0\nfile good.mp4\n",
    }
    # Nothing of the host's own opening either: it would follow a list.
    for name in ("get_frame_count", "get_duration", "get_dimensions", "get_components"):
        monkeypatch.setattr(InputImpl.VideoFromFile, name, lambda self: pytest.fail("the host opened the file"))
    for name, data in files.items():
        path = folders / "input" / name
        path.write_bytes(data)
        bad = InputImpl.VideoFromFile(str(path))
        calls = [
            ("the video", lambda bad=bad: node("AdaStateVideoMetrics")(video=bad)),
            ("video_a", lambda bad=bad: node("AdaStateCompare")(video_a=bad, video_b=bad, labels="")),
        ]
        for what, call in calls:
            with pytest.raises(
                ValueError, match=f"{what} (cannot be read|has no).*{name}.*; connect a VIDEO"
            ) as raised:
                call()
            assert str(folders) not in str(raised.value) and "Errno" not in str(raised.value)
    monkeypatch.undo()
    bad = InputImpl.VideoFromFile(str(folders / "input" / "text.mp4"))
    with pytest.raises(ValueError, match=r"reference cannot be read: text\.mp4 holds text"):
        node("AdaStateVideoMetrics")(video=good, reference=bad)
    with pytest.raises(ValueError, match=r"video_b cannot be read: text\.mp4 holds text"):
        node("AdaStateCompare")(video_a=good, video_b=bad, labels="a, b")


@pytest.mark.parametrize("kind", ["error", "interrupt", "disk"])
def test_a_comparison_that_ends_early_leaves_no_file(node, folders, monkeypatch, kind):
    import comfy.model_management
    from adastate_pack.nodes import analysis

    temp = folders / "temp"
    before = left_in(temp) if temp.exists() else []
    failures = {
        "error": RuntimeError("made up"),
        "interrupt": comfy.model_management.InterruptProcessingException(),
        "disk": OSError(28, "No space left on device"),
    }

    def fail(*inputs):
        raise failures[kind]

    owner, name = (analysis.Progress, "step") if kind == "interrupt" else (analysis.VideoSink, "write")
    good = video(folders / "good.mp4", 12, 20)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(type(failures[kind])):
        node("AdaStateCompare")(video_a=good, video_b=good, labels="a, b")
    assert (left_in(temp) if temp.exists() else []) == before


def memory(frames: int, level: float = 0.25, audio: dict | None = None):
    from fractions import Fraction

    from adastate_pack.nodes.host.api import InputImpl
    from comfy_api.latest import Types

    images = torch.full((frames, 33, 35, 3), level)
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, audio=audio, frame_rate=Fraction(16)))


def test_videos_in_memory_are_measured_as_they_are(node, folders, monkeypatch):
    """Sides that H.264 does not take, and levels that it would not keep."""
    from adastate_pack.nodes.host.api import InputImpl

    first, second = memory(9, 64 / 255), memory(9, 65 / 255)
    monkeypatch.setattr(InputImpl.VideoFromComponents, "save_to", lambda *i, **m: pytest.fail("encoded"))
    found = json.loads(node("AdaStateVideoMetrics")(video=first, reference=second).args[1])
    assert found["size"] == [35, 33] and found["chunks"][0]["psnr"] == pytest.approx(20 * 2.40654, abs=0.01)
    numbers = json.loads(node("AdaStateCompare")(video_a=first, video_b=second, labels="").args[1])
    assert [entry["frames"] for entry in numbers] == [9, 9]


def test_of_a_cut_video_the_part_alone_counts(node, folders):
    """As newer hosts cut a file: from a second on, for some; the file is still whole."""
    from adastate_pack.nodes.host.api import InputImpl

    class Cut(InputImpl.VideoFromFile):
        def get_active_trim_window(self) -> tuple[float, float]:
            return 1.0, 0.75

    video(folders / "a.mp4", 40, 20)
    cut = Cut(str(folders / "a.mp4"))
    assert json.loads(node("AdaStateVideoMetrics")(video=cut).args[1])["pictures"] == 12
    numbers = json.loads(node("AdaStateCompare")(video_a=cut, video_b=cut, labels="").args[1])
    assert [entry["frames"] for entry in numbers] == [12, 12]


def test_dense_flow_is_asked_for_and_needs_opencv(node, folders, monkeypatch):
    clip = video(folders / "a.mp4", 12, 20)
    assert "flow" not in json.loads(node("AdaStateVideoMetrics")(video=clip).args[1])["chunks"][0]
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="dense flow needs OpenCV"):
        node("AdaStateVideoMetrics")(video=clip, dense_flow=True)
    monkeypatch.undo()
    pytest.importorskip("cv2", reason="OpenCV is no requirement of the pack")
    out = node("AdaStateVideoMetrics")(video=clip, dense_flow=True)
    rows = json.loads(out.args[1])["chunks"]
    assert {"flow", "flow_top", "camera_motion", "object_motion"} <= set(rows[0])
    assert out.args[0].shape[1] > node("AdaStateVideoMetrics")(video=clip).args[0].shape[1], "a panel more"
