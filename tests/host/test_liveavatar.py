"""Wan 2.2 S2V through the nodes, on files of the exact format, against the loops of tests/core/slow_liveavatar.py."""
# ruff: noqa: F811  fixtures that are imported

from __future__ import annotations

import re

import av
import comfy.sd
import comfy.utils
import numpy
import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive, AnchorStatic
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host.codec import HostDecoder
from adastate_pack.nodes.host.made_models import random_tiny_vae, random_vae
from rounded import error, held_as
from slow_liveavatar import LiveAvatar, Plain
from slow_s2v import SlowS2V
from talkers import drawn, state, talker, track  # noqa: F401  fixtures
from test_models import AUTO, latents_of, load, models, report_of  # noqa: F401
from test_models import written as written_file
from test_prompt_rollout import context, timeline
from tiny_s2v import features

SIDE, H, SEED = 64, 8, 5
CHUNKS, SECONDS = 6, 2.4  # the sound ends in the last chunk


def latent():
    """What somebody's picture is as a LATENT."""
    return {"samples": drawn(3, 1, 16, 1, H, H)}


@pytest.fixture
def made(talker, positive, node):
    """The rollout node on the tiny S2V model, with everything at auto; `preset` "" leaves Model Preset out."""

    held = []  # as the host holds what a node has given

    def call(length=4 * 3 * CHUNKS - 3, preset="liveavatar", **inputs):
        model = inputs.pop("model", talker)
        model = node("AdaStateModelPreset")(model=model, preset=preset).args[0] if preset else model
        held.append(model)
        given = {
            "model": model, "positive": positive, "width": SIDE, "height": SIDE, "length": length, "batch_size": 1, "seed": SEED,
            **AUTO, "audio": track(SECONDS), "reference": latent(),
        }  # fmt: skip
        return node("AdaStateRollout")(**(given | inputs))

    return call


def by_the_loop(state, model, positive, kind=LiveAvatar, seconds=SECONDS, **numbers):
    slow = SlowS2V(state)
    reference = adapter.to_model_space(model, latent()["samples"])
    given = {"heard": slow.folded(features(seconds)), "reference": reference, "seed": SEED, "h": H, "w": H}
    return kind(slow, positive[0][0], **(given | numbers))


def rolled(talker, loop, chunks=CHUNKS):
    return adapter.to_vae_space(talker, loop.roll(chunks).float())


def worst(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


# what is asked of the node, what of the loop
MODES = {
    "one": ({}, {}),
    "two": ({"batch_size": 2}, {"batch": 2}),
    "one window": ({"preset": "liveavatar_one_window"}, {"one_history": True}),
    "another seed, a sink, a longer window": (
        {"seed": 11, "anchor": AnchorStatic(3), "window_frames": 12}, {"seed": 11, "sink": 3, "ring": 15},
    ),
    "later in the sound": ({"audio_offset": 0.52}, {"first_picture": 13}),
    "host memory": ({"cache_device": "host memory"}, {}),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.sampled(3)
def test_the_preset_through_the_nodes_is_its_loop(made, state, talker, positive, mode):
    """Until the ring has rolled over and the picture has been replaced; in one go, and stopped and gone on with twice."""
    asked, numbers = MODES[mode]
    asked = dict(asked)
    asked["audio"] = track(SECONDS, offset=asked.pop("audio_offset", 0.0))
    out = made(**asked)
    ours, report = latents_of(out), report_of(out)
    with torch.inference_mode():
        theirs = rolled(talker, by_the_loop(state, talker, positive, **numbers))
    assert worst(ours, theirs) < 1e-4
    assert report["kv_bytes_used"] == report["kv_bytes_planned"] and report["video_fps"] == 25.0
    first = made(length=29, **asked)
    second = made(length=53, resume=first.args[1], **(asked | {"reference": None}))
    rest = made(resume=second.args[1], **(asked | {"reference": None}))
    assert torch.equal(latents_of(rest), ours)
    again = made(length=53, resume=first.args[1], **(asked | {"reference": None}))
    assert torch.equal(latents_of(again), latents_of(second))


def test_files_of_the_exact_format_are_known_by_what_they_say(made, state, talker, positive, models):  # noqa: F811
    """LiveAvatar's by its name; one of the pack's own by its header; and a file without the injectors of blocks that it has not."""
    few = {
        name: value for name, value in state.items() if not re.search(r"injector\w*\.(1|2|3|4|5|6|7|8|9|10|11)\.", name)
    }
    assert len(few) == 75
    said = {
        "adastate": '{"chunk_frames": 2, "window_frames": 4, "steps": 2, "shift": 5.0, "anchor": null, "positions": "packed"}'
    }
    named = load(written_file(models, "LiveAvatar_merged.safetensors", few))
    ours = latents_of(made(model=named, preset="", length=33))
    with torch.inference_mode():
        assert worst(ours, rolled(talker, by_the_loop(state, talker, positive), 3)) < 1e-4
        own = load(written_file(models, "mine.safetensors", state, said))
        out = made(model=own, preset="", length=29)
        loop = by_the_loop(state, talker, positive, Plain, F=2)
        theirs = loop.roll(8, [1.0, 5 / 6], W=4)["latents"]
        assert worst(latents_of(out), adapter.to_vae_space(talker, theirs.float())) < 1e-4
    assert report_of(out)["video_fps"] == 16.0


# what is asked of the node in the plain way, and of the loop
PLAIN = {
    "none": ({}, {}),
    "static, absolute, two videos": (
        {"anchor": AnchorStatic(2), "positions": "absolute", "batch_size": 2}, {"anchor": "static", "A": 2, "mode": "absolute"},
    ),
    "adaptive": ({"anchor": AnchorAdaptive(1)}, {"anchor": "adaptive", "A": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.sampled(2)
def test_the_plain_way_is_its_loop(made, state, talker, positive, name):
    """The pack's ordinary rollout with sound and a picture, in one go and in pieces."""
    asked, numbers = PLAIN[name]
    asked = {
        "preset": "",
        "steps": 2,
        "shift": 5.0,
        "chunk_frames": 3,
        "window_frames": 3,
        "positions": "packed",
    } | asked
    ours = latents_of(made(length=45, **asked))
    states = int("anchor" in asked and asked["anchor"].state_frames)
    with torch.inference_mode():
        loop = by_the_loop(state, talker, positive, Plain, states=states, batch=asked.get("batch_size", 1))
        theirs = loop.roll(12, [1.0, 5 / 6], W=3, **numbers)["latents"].float()
        assert worst(ours, adapter.to_vae_space(talker, theirs)) < 1e-4
    first = made(length=21, **asked)
    rest = made(length=45, resume=first.args[1], **(asked | {"reference": None}))
    assert torch.equal(latents_of(rest), ours)


@pytest.mark.parametrize("cache_dtype", ["fp8", "int8"])
@pytest.mark.sampled(2)
def test_eight_bits_are_the_loop_that_rounds(made, state, talker, positive, cache_dtype):
    """By the bound of tests/core/test_kv_storage.py, over three videos at once."""
    out = made(cache_dtype=cache_dtype, batch_size=3)
    ours, report = latents_of(out), report_of(out)
    with torch.inference_mode():
        exact = rolled(talker, by_the_loop(state, talker, positive, batch=3))
        theirs = rolled(talker, by_the_loop(state, talker, positive, batch=3, hold=held_as(cache_dtype, 1)))
    errors = sorted(error(one, other) for one, other in zip(ours, theirs, strict=True))
    assert errors[0] < 1e-4 and errors[-1] < error(exact, theirs) / 2, errors
    assert report["kv_bytes_used"] == report["kv_bytes_planned"]


def test_a_state_goes_through_a_file_and_words_that_change(made, state, talker, node):
    """Words change before and behind the chunk with which the picture is replaced; what is saved is what is gone on with."""
    prompts = timeline((0.0, context(1), "cut"), (24 / 25, context(2), "cut"), (60 / 25, context(3), "cut"))

    def before_chunk(loop):
        loop.context = context(1 if loop.f < 6 else 2 if loop.f < 15 else 3)

    ours = latents_of(made(positive=prompts))
    with torch.inference_mode():
        loop = by_the_loop(state, talker, [[context(1), {}]], before_chunk=before_chunk)
        assert worst(ours, rolled(talker, loop)) < 1e-4
    half = made(positive=prompts, length=41)
    name = node("AdaStateSaveState")(state=half.args[1], filename_prefix="half").args[0]
    read = node("AdaStateLoadState")(file=name).args[0]
    assert torch.equal(latents_of(made(positive=prompts, resume=read, reference=None)), ours)


def click(at, seconds=SECONDS, rate=16000):
    wave = torch.zeros(1, 1, int(seconds * rate))
    wave[..., int(at * rate) : int(at * rate) + 40] = 0.9
    return {"waveform": wave, "sample_rate": rate}


def heard_click(path):
    """When a file's click is heard, in seconds."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        pieces = [(float(f.pts * f.time_base), numpy.abs(f.to_ndarray()).reshape(-1)) for f in container.decode(stream)]
        begin, loudest = max(pieces, key=lambda piece: piece[1].max())
        return begin + int(loudest.argmax()) / stream.codec_context.sample_rate


@torch.no_grad()
@pytest.mark.parametrize("make", [random_vae, random_tiny_vae])
def test_a_decoder_that_has_seen_a_still_goes_on_from_it(make):
    """However the video's latents are split, and moved to another run; of the first one's four pictures the last is shown."""
    vae, still, video = make(), drawn(1, 1, 16, 1, 4, 4).expand(-1, -1, 7, -1, -1), drawn(2, 1, 16, 4, 4, 4)
    whole = vae.decode(torch.cat([still, video], 2))[0][28:]
    for split in ([1] * 4, [1, 3]):
        decoder = HostDecoder(vae)
        decoder.warm(still)
        parts = []
        for part in video.split(split, 2):
            parts.append(decoder.step(part)[0])
            other = HostDecoder(vae)
            other.restore(decoder.snapshot())
            decoder = other
        # the tiny one computes in half precision, in which the host's whole decode rounds a value here and there in another way
        assert float((torch.cat(parts) - whole).abs().mean()) < 1e-6


def test_a_picture_is_encoded_and_the_stream_shows_it_from_a_still_on(
    made, state, talker, positive, stream, vae, written, folders
):
    """The decoder has seen the still picture before the video, whose first latent frame is one picture; the file's sound is as much
    later as its pictures are ahead. In one go, and joined to a first part."""
    picture = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(4))
    given = {"reference": picture, "audio": track(SECONDS, audio=click(0.6)), "length": 53}
    out = made(stream=stream(fps=0.0), **given)
    with torch.inference_mode():
        large = comfy.utils.common_upscale(picture.movedim(-1, 1), SIDE, SIDE, "lanczos", "center").movedim(1, -1)
        still = vae.encode(large.expand(5, -1, -1, -1))[:, :, 1:]
        loop = by_the_loop(state, talker, positive, reference=adapter.to_model_space(talker, still))
        assert worst(latents_of(out), rolled(talker, loop, 5)[:, :, :14]) < 1e-4
        whole = vae.decode(torch.cat([still.expand(-1, -1, 7, -1, -1), latents_of(out)], 2))[0]
    shown = torch.cat([one.reshape(-1, SIDE, SIDE, 3) for one in written])
    assert len(shown) == 53 and torch.allclose(shown / 255, whole[28:], atol=1.01 / 255)
    assert heard_click(folders / "output" / report_of(out)["files"][0]) == pytest.approx(0.6 - 3 / 25, abs=0.005)
    written.clear()
    first = made(stream=stream(fps=0.0, filename_prefix="part"), **(given | {"length": 29}))
    rest = made(
        stream=stream(fps=0.0, filename_prefix="rest", join=True), resume=first.args[1], **(given | {"reference": None})
    )
    assert torch.equal(torch.cat([one.reshape(-1, SIDE, SIDE, 3) for one in written]), shown)
    assert heard_click(folders / "output" / report_of(rest)["files"][0]) == pytest.approx(0.6 - 3 / 25, abs=0.005)
