"""Every codec through the nodes: names, resume, join, what a page is told, and refusals."""

from __future__ import annotations

import json

import av
import numpy
import pytest
import torch
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.video.encoder import CODECS
from adastate_pack.nodes.host.codec import HostDecoder

OTHERS = [name for name in CODECS if name != "h264"]
SIZE = {"width": 96, "height": 96, "steps": 1}  # the least that every encoder takes and makes the same of twice


@pytest.fixture
def stream(stream):
    return lambda **inputs: stream(**({"filename_prefix": "video/take"} | inputs))


def frames_of(path) -> numpy.ndarray:
    with av.open(str(path)) as container:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("codec", OTHERS)
@pytest.mark.sampled(4)
def test_resume_join_and_names(rollout, stream, folders, codec, node):
    """A run that is gone on from, joined, is the video of one run; its files lie under one name whatever the ending."""
    out, suffix = folders / "output" / "video", CODECS[codec].suffix
    whole = rollout(**SIZE, length=45, stream=stream(codec=codec))
    first = rollout(**SIZE, length=33, stream=stream(codec=codec, keep_state=True, history_chunks=2))
    told = json.loads(first.args[2])
    assert told["videos"] == [f"video/take_00002_{suffix}"]
    assert told["state"] == "video/take_00002_.state.safetensors [output]"
    assert sorted(path.name for path in out.iterdir() if "00002" in path.name) == sorted(
        [
            "take_00002_.history",
            f"take_00002_{suffix}",
            "take_00002_.report.json",
            "take_00002_.state.safetensors",
        ]
    )
    kept = load_state(out / "take_00002_.history" / "chunk_000002.state.safetensors")
    for state in (load_state(out / "take_00002_.state.safetensors"), kept):
        joined = rollout(**SIZE, length=45, resume=state, stream=stream(codec=codec, join=True))
        assert not [each for each in json.loads(joined.args[2])["warnings"] if "rewritten" in each]
        one, other = (frames_of(each.args[3].get_stream_source()) for each in (whole, joined))
        assert one.shape == other.shape == (45, 96, 96, 3) and numpy.abs(one.astype(float) - other).mean() < 1
    with pytest.raises(ValueError, match=f"was made with codec {codec} and codec is h264; use the same codec"):
        rollout(**SIZE, length=45, resume=kept, stream=stream(join=True))
    latent, pictures, count = node("AdaStateContinueVideo")(
        vae=stream().vae, width=96, height=96, frames=5, crop="center", video=whole.args[3]
    ).args
    assert count == 5 and len(pictures) == 5


@pytest.mark.parametrize("codec", [name for name in OTHERS if CODECS[name].takes == "float"])
def test_deep_codecs_get_the_decoders_own_values(rollout, stream, vae, codec):
    result = rollout(**SIZE, length=9, stream=stream(codec=codec, quality=1))
    with torch.no_grad():
        floats = HostDecoder(vae, fast=True).step(result.args[0]["samples"])[0].numpy()
    with av.open(str(result.args[3].get_stream_source())) as container:
        assert container.streams.video[0].codec_context.pix_fmt == CODECS[codec].pixels
        if codec == "ffv1":
            for frame, picture in zip(container.decode(video=0), floats, strict=True):
                planes = [numpy.frombuffer(p, "<u2").reshape(96, -1)[:, :96] for p in frame.planes]
                codes = numpy.stack([planes[2], planes[0], planes[1]], -1)
                assert numpy.abs(codes - picture.astype(float) * 65535).max() <= 0.5


def test_what_a_page_is_told(rollout, stream):
    assert "adastate_video" not in rollout(**SIZE, length=9, stream=stream()).ui
    for codec in OTHERS:
        shown = rollout(**SIZE, length=9, stream=stream(codec=codec)).ui
        assert shown["adastate_video"] == [{"codec": codec, "mime": CODECS[codec].mime}] and shown["images"]


def test_sizes_that_an_encoder_does_not_take_are_refused_before_anything_is_written(rollout, stream, folders):
    if "av1" in CODECS:
        with pytest.raises(ValueError, match="the video is 32x32; AV1 needs sides of 64 or more: choose another codec"):
            rollout(length=9, stream=stream(codec="av1"))
    assert not list((folders / "output").iterdir())


def test_render_video_has_them_too(rollout, node, vae):
    latent = rollout(**SIZE, length=9).args[0]
    for codec in OTHERS:
        video = node("AdaStateRenderVideo")(
            latent=latent, vae=vae, filename_prefix="a", fps=16.0, codec=codec, quality=18
        ).args[0]
        assert str(video.get_stream_source()).endswith(CODECS[codec].suffix)
        assert len(frames_of(video.get_stream_source())) == 9
