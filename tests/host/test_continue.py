"""Starting from pictures, from the end of a video, and from another rollout's latents."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from adastate_pack.adastate_core.geometry import WAN21
from adastate_pack.adastate_core.video import tail as video_tail
from adastate_pack.adastate_core.video.colour import rgb
from adastate_pack.nodes.host import codec
from adastate_pack.nodes.host import model as host_model
from adastate_pack.nodes.host import pictures as host_pictures
from adastate_pack.nodes.host.api import InputImpl


def write_video(path: Path, frames: int, rate: int = 16, width: int = 48, height: int = 32) -> torch.Tensor:
    """A video at next to no loss; its frames float32 in 0..1 as they are read again."""
    generator = np.random.default_rng(3)
    picture = generator.integers(0, 255, (height, width, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"qp": "1", "g": "10", "bf": "2"}
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * i, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        again = [rgb(frame) for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(again)) / 255.0


@pytest.fixture
def go_on(vae, node):
    def call(**inputs):
        defaults = {"vae": vae, "width": 48, "height": 32, "frames": 13, "crop": "center"}
        return node("AdaStateContinueVideo")(**(defaults | inputs)).args

    return call


def encoded(vae, frames: torch.Tensor) -> torch.Tensor:
    """By hand: the VAE's own encoder on [n, H, W, 3], without the host's loading and moving."""
    with torch.no_grad():
        return vae.first_stage_model.encode(frames.movedim(-1, 0)[None] * 2 - 1)


def test_the_end_of_a_video_becomes_a_latent(go_on, vae, folders):
    whole = write_video(folders / "a.mp4", 50)
    video = InputImpl.VideoFromFile(str(folders / "a.mp4"))
    latent, images, count = go_on(video=video)
    assert torch.equal(images, whole[-13:]) and count == 13
    assert latent["samples"].shape == (1, 16, 4, 4, 6)
    torch.testing.assert_close(latent["samples"], encoded(vae, whole[-13:]))


def quarters(path: Path, width: int, frames: int = 6, turn: bool = False) -> Path:
    """A video of four colours; `turn`: with a display matrix that turns it a quarter clockwise."""
    picture = np.array([[[200, 40, 40], [40, 200, 40]], [[40, 40, 200], [180, 180, 180]]], np.uint8)
    picture = picture.repeat(16, 0).repeat(width // 2, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, 32, "yuv420p", {"qp": "1"}
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    if turn:
        data = bytearray(path.read_bytes())
        at = data.index(b"tkhd") + 4
        at += 52 if data[at] else 40
        data[at : at + 20] = b"".join((n * 65536 % 2**32).to_bytes(4, "big") for n in (0, 1, 0, -1, 0))
        path.write_bytes(bytes(data))
    return path


def middles(pictures: torch.Tensor) -> torch.Tensor:
    """The colours in the middle of the quarters of [n, H, W, 3]."""
    height, width = pictures.shape[1:3]
    return pictures[:, height // 4 :: height // 2, width // 4 :: width // 2]


@pytest.mark.parametrize("width", [30, 32, 34, 50, 64])
def test_colours_do_not_depend_on_the_width(go_on, folders, width):
    """Newer hosts decode in float, padded to multiples of 32; the pack's own reading is the same at every width."""
    video = InputImpl.VideoFromFile(str(quarters(folders / "a.mp4", width)))
    found = host_pictures.video_tail(video, 5)
    assert found.shape == (5, 32, width, 3) and torch.equal(found, (found * 255).round() / 255)
    wide = host_pictures.video_tail(InputImpl.VideoFromFile(str(quarters(folders / "b.mp4", 64))), 5)
    assert torch.equal(middles(found), middles(wide))
    host = video.get_components().images[-5:]
    assert float((middles(found) - middles(host)).abs().max()) < 3.5 / 255


def test_a_phones_video_stands_upright_and_only_its_end_is_held(go_on, folders, monkeypatch):
    path = str(quarters(folders / "a.mp4", 64, 200, turn=True))
    monkeypatch.setattr(InputImpl.VideoFromFile, "get_components", lambda self: pytest.fail("all of it was read"))
    found = host_pictures.video_tail(InputImpl.VideoFromFile(path), 5)
    assert found.shape == (5, 64, 32, 3)
    expected = torch.tensor([[[40, 40, 200], [200, 40, 40]], [[180, 180, 180], [40, 200, 40]]]) / 255
    assert float((middles(found) - expected).abs().max()) < 12 / 255
    images = go_on(video=InputImpl.VideoFromFile(path), width=32, height=64)[1]
    assert torch.equal(images[-5:], found)


@pytest.mark.parametrize(("asked", "there", "taken"), [(1, 9, 1), (4, 9, 1), (15, 50, 13), (17, 9, 9), (81, 12, 9)])
def test_frames_come_as_4n_plus_1_from_the_end(go_on, folders, asked, there, taken):
    whole = write_video(folders / "a.mp4", there)
    for inputs in ({"video": InputImpl.VideoFromFile(str(folders / "a.mp4"))}, {"image": whole}):
        latent, images, count = go_on(frames=asked, **inputs)
        assert torch.equal(images, whole[-taken:]) and count == taken
        assert latent["samples"].shape[2] == (taken - 1) // 4 + 1


def test_frames_keep_their_pace_or_come_as_they_are(go_on, folders):
    whole = write_video(folders / "a.mp4", 60, rate=48)
    video = InputImpl.VideoFromFile(str(folders / "a.mp4"))
    assert torch.equal(go_on(video=video, frames=9)[1], whole[[35, 38, 41, 44, 47, 50, 53, 56, 59]])
    assert torch.equal(go_on(video=video, frames=9, fps=0)[1], whole[-9:])
    slower = go_on(video=video, frames=5, fps=96)[1]
    assert torch.equal(slower, whole[[57, 57, 58, 58, 59]])


def test_a_video_in_memory_is_not_encoded_on_the_way(go_on, monkeypatch):
    from comfy_api.latest import Types

    frames = torch.rand(30, 32, 48, 3)
    video = InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, audio=None, frame_rate=Fraction(32)))
    monkeypatch.setattr(type(video), "save_to", lambda *inputs, **more: pytest.fail("encoded"))
    assert torch.equal(go_on(video=video, frames=5)[1], frames[[21, 23, 25, 27, 29]])
    assert torch.equal(go_on(video=video, frames=5, fps=0)[1], frames[-5:])


def test_of_a_file_the_whole_is_never_read_into_memory(go_on, folders, monkeypatch):
    whole = write_video(folders / "a.mp4", 400)
    video = InputImpl.VideoFromFile(str(folders / "a.mp4"))
    monkeypatch.setattr(type(video), "get_components", lambda self: pytest.fail("all of it was read"))
    original, decoded = video_tail.decoded, []

    def counted(*inputs):
        for time, frame in original(*inputs):
            decoded.append(time)
            yield time, frame

    monkeypatch.setattr(video_tail, "decoded", counted)
    assert torch.equal(go_on(video=video)[1], whole[-13:])
    assert 26 <= len(decoded) <= 60


class Cut(InputImpl.VideoFromFile):
    """A file cut as newer hosts cut it: from a second on, for some seconds; the source is still all of it."""

    def get_active_trim_window(self) -> tuple[float, float]:
        return 1.0, 1.5


class Private(InputImpl.VideoFromFile):
    """The same on hosts that kept it to themselves; from the end."""


class Cropped(InputImpl.VideoFromFile):
    """A host that shows less of each frame than the file has."""

    def get_dimensions(self) -> tuple[int, int]:
        return 32, 32

    def get_components(self):
        components = super().get_components()
        components.images = components.images[:, :, 8:40]
        return components


def test_what_a_host_cuts_off_is_not_taken(go_on, folders):
    whole = write_video(folders / "a.mp4", 64)
    path = str(folders / "a.mp4")
    assert torch.equal(go_on(video=Cut(path), frames=5)[1], whole[35:40])
    private = Private(path)
    private._VideoFromFile__start_time, private._VideoFromFile__duration = -3.0, 1.0
    assert torch.equal(go_on(video=private, frames=5)[1], whole[27:32])
    cropped = Cropped(path)
    assert torch.equal(go_on(video=cropped, frames=5, width=32)[1], cropped.get_components().images[-5:])


# a picture's shape, the size asked for, the area: the size that is made
SHAPES = [
    ((1920, 1080), (0, 0), "832x480", (832, 464)),
    ((768, 768), (0, 0), "832x480", (624, 624)),
    ((3024, 4032), (0, 0), "832x480", (544, 720)),
    ((832, 480), (0, 0), "832x480", (832, 480)),
    ((1920, 1080), (0, 0), "1280x720", (1280, 720)),
    ((300, 200), (0, 0), "64x64", (80, 48)),
    ((1600, 896), (0, 0), "64x64", (80, 48)),
    ((20, 4000), (0, 0), "64x64", (16, 896)),
    ((4, 8000), (0, 0), "1280x720", (16, 8192)),
    ((300, 200), (96, 0), "832x480", (96, 64)),
    ((300, 200), (0, 96), "832x480", (144, 96)),
    ((300, 200), (48, 32), "832x480", (48, 32)),
]


@pytest.mark.parametrize(("shape", "asked", "area", "expected"), SHAPES)
def test_a_size_of_0_follows_the_shape_of_the_picture(go_on, monkeypatch, shape, asked, area, expected):
    """The nearest shape in steps of 16, without more pixels than the area; nothing is stretched, and no bar is added."""
    monkeypatch.setattr(codec, "encode", lambda vae, pictures: pictures)
    across, down = torch.arange(shape[0]) / shape[0], torch.arange(shape[1]) / shape[1]
    ramps = torch.stack(torch.broadcast_tensors(across, down[:, None], torch.ones(())), -1)[None]
    images = go_on(image=ramps, width=asked[0], height=asked[1], area=area, upscale_method="bilinear")[1]
    assert tuple(images.shape[1:3]) == expected[::-1] and float(images[..., 2].min()) > 0.99
    if min(expected) < 32:
        return
    steps = [
        float(images[0, ..., c].diff(dim=d).median()) * side for c, d, side in ((0, 1, shape[0]), (1, 0, shape[1]))
    ]
    assert steps[0] == pytest.approx(steps[1], rel=0.01), "as many of its pixels across as down"


@pytest.mark.parametrize(
    ("pixels", "cut", "used"), [(832 * 480, 0.035, 0.95), (1280 * 720, 0.025, 0.96), (4096, 0.17, 0.7)]
)
def test_little_is_cut_off_and_no_shape_has_more_pixels(pixels, cut, used):
    for width, height in torch.randint(600, 1200, (300, 2), generator=torch.Generator().manual_seed(0)).tolist():
        found = WAN21.size_like(width, height, pixels)
        assert used * pixels <= found[0] * found[1] <= pixels and not any(side % 16 for side in found)
        kept = min(found[0] * height / (found[1] * width), found[1] * width / (found[0] * height))
        assert kept > 1 - cut and WAN21.size_like(height, width, pixels) == found[::-1], (width, height, found)


def test_a_rollout_takes_the_size_of_its_picture_or_of_its_state(go_on, rollout, node, model, monkeypatch):
    latent = go_on(image=torch.rand(1, 100, 150, 3), width=0, height=32)[0]
    given = rollout(width=48, height=32, length=21, start_latent=latent)
    taken = rollout(width=0, height=0, length=21, start_latent=latent)
    assert torch.equal(taken.args[0]["samples"], given.args[0]["samples"])
    report = json.loads(taken.args[2])
    assert (report["width"], report["height"]) == (48, 32)
    onward = [rollout(width=w, height=h, length=33, resume=taken.args[1]).args[0] for w, h in ((0, 0), (48, 0))]
    assert torch.equal(onward[0]["samples"], onward[1]["samples"])
    plan = node("AdaStatePlan")
    monkeypatch.setattr(host_model, "available_bytes", lambda *_: 2**34)  # the text says it, and it changes meanwhile
    text, numbers = plan(model=model, width=0, height=0, length=21, start_latent=latent).args
    assert text == plan(model=model, width=48, height=32, length=21).args[0] and "planned for 48x32 and 21" in text
    assert json.loads(numbers)["width"] == 48
    loaded = lambda *inputs, **more: pytest.fail("a model was loaded")  # noqa: E731
    monkeypatch.setattr("comfy.model_management.load_models_gpu", loaded)
    odd = {"samples": torch.zeros(1, 16, 1, 5, 6)}
    for inputs, words in (
        ({"width": 0, "height": 0}, "width is 0, which stands for that of the picture in start_latent, and nothing is"),
        ({"width": 32, "height": 0}, "height is 0, which stands"),
        (
            {"width": 0, "height": 0, "start_latent": odd},
            "start_latent is 48x40, and the sides of a video are multiples of 16",
        ),
        ({"width": 64, "height": 0, "start_latent": latent}, "start_latent is 48x32 and the rollout 64x32"),
    ):
        with pytest.raises(ValueError, match=words):
            rollout(length=21, **inputs)
        if "64x32" not in words:
            with pytest.raises(ValueError, match=words):
                plan(model=model, length=21, **inputs)


@pytest.mark.parametrize("crop", ["center", "disabled"])
@pytest.mark.parametrize("method", host_pictures.SCALERS)
def test_scaling_is_the_hosts(go_on, node, crop, method):
    import nodes as host_nodes

    image = torch.rand(5, 40, 120, 3)
    images = go_on(image=image, crop=crop, upscale_method=method)[1]
    assert torch.equal(images, host_nodes.ImageScale().upscale(image, method, 48, 32, crop)[0])
    narrow = image[:, :, 30:90] if crop == "center" else image
    torch.testing.assert_close(images, host_nodes.ImageScale().upscale(narrow, method, 48, 32, "disabled")[0])
    alpha = torch.cat([image, torch.zeros_like(image[..., :1])], -1)
    assert torch.equal(go_on(image=alpha, crop=crop, upscale_method=method)[1], images)


def test_what_cannot_be_gone_on_from_is_said_in_a_sentence(go_on, node, vae, folders):
    image = torch.rand(5, 32, 48, 3)
    write_video(folders / "a.mp4", 3)
    video = InputImpl.VideoFromFile(str(folders / "a.mp4"))
    (folders / "bad.mp4").write_text("no video")
    other = type("VAE", (), {"first_stage_model": torch.nn.Identity(), "latent_channels": 4})()
    tiny = type("VAE", (), {"first_stage_model": type("TAEHV", (), {})(), "latent_channels": 16})()
    for inputs, message in [
        ({}, "neither video nor image is connected"),
        ({"image": image, "video": video}, "both video and image are connected"),
        ({"image": image, "vae": other}, "the vae is a Identity"),
        ({"image": image, "vae": tiny}, "the vae is a tiny VAE, which decodes only"),
        ({"image": image[:0]}, "image holds no picture"),
        ({"image": image, "width": 100}, "width is 100; it must be a multiple of 16"),
        ({"image": image, "width": -16, "height": 0}, "width is -16; it must be a multiple of 16"),
        ({"video": InputImpl.VideoFromFile(str(folders / "bad.mp4"))}, "the video cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            go_on(**inputs)
    good = {"width": 48, "height": 32, "frames": 13, "crop": "center", "fps": 16.0, "upscale_method": "lanczos"}
    assert node("AdaStateContinueVideo").validate(**good) is True
    for name, value in (("frames", 0), ("frames", 2000), ("crop", "left"), ("fps", 0.5), ("upscale_method", "magic")):
        assert f"{name} is {value!r}" in node("AdaStateContinueVideo").validate(**(good | {name: value}))


def test_a_vae_that_makes_another_number_of_frames_is_refused(go_on, vae, monkeypatch):
    monkeypatch.setattr(type(vae), "encode", lambda self, pixels: torch.zeros(5, 16, 1, 4, 6))
    with pytest.raises(ValueError, match=r"made a latent \[5, 16, 1, 4, 6\] of 5 frames, where a Wan 2.1 VAE makes 2"):
        go_on(image=torch.rand(5, 32, 48, 3))


def test_a_rollout_goes_on_from_a_streamed_video(go_on, rollout, node, vae, folders):
    stream = node("AdaStateStreamOutput")(
        vae=vae, filename_prefix="a", fps=16.0, codec="h264", quality=1, preview=False, autosave_seconds=0.0
    ).args[0]
    video = rollout(length=33, stream=stream).args[3]
    latent, images, count = go_on(video=video, width=32, frames=9)
    with av.open(str(folders / "output" / "a_00001_.mp4")) as container:
        last = [torch.from_numpy(rgb(frame)) / 255.0 for frame in container.decode(video=0)][-9:]
    assert torch.equal(images, torch.stack(last))
    out = rollout(length=count + 12, start_latent=latent, seed=6).args[0]["samples"]
    torch.testing.assert_close(out[:, :, :3], latent["samples"], atol=1e-5, rtol=1e-5)
    assert out.shape[2] == 6 and bool(out[:, :, 3:].isfinite().all())


def test_latents_of_one_rollout_start_another_without_being_encoded_again(rollout, vae, monkeypatch):
    import comfy_extras.nodes_post_processing  # noqa: F401  newer hosts: it and the next import each other, in this order
    from comfy_extras.nodes_latent import LatentCut

    first = rollout(length=33).args[0]
    monkeypatch.setattr(type(vae), "encode", lambda *inputs: pytest.fail("encoded again"))
    cut = LatentCut.execute(first, "t", -4, 4).args[0]
    assert torch.equal(cut["samples"], first["samples"][:, :, -4:])
    second = rollout(length=37, start_latent=cut, seed=8).args[0]["samples"]
    torch.testing.assert_close(second[:, :, :4], first["samples"][:, :, -4:], atol=1e-5, rtol=1e-5)
    assert second.shape[2] == 10
    by_hand = rollout(length=37, start_latent={"samples": first["samples"][:, :, 5:9].clone()}, seed=8).args[0][
        "samples"
    ]
    assert torch.equal(second, by_hand)
