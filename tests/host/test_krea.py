"""Krea Realtime through the nodes: its published loop, with the picture that is encoded anew; and what does not go with it."""

from __future__ import annotations

import pytest
import torch
from adastate_pack.adastate_core.absorption.settings import AbsorptionSettings
from adastate_pack.adastate_core.anchors import Anchor, AnchorStatic
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.adastate_core.weights.presets import PRESETS
from adastate_pack.nodes.absorption_request import AbsorptionRequest
from adastate_pack.nodes.host import codec
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host.output_files import output_file
from published_loops import KreaRealtime
from test_models import AUTO, latents_of, report_of
from test_prompt_rollout import context, timeline
from test_published import Bare
from test_stream import stream  # noqa: F401
from test_tiny_vae import light, tiny, weights  # noqa: F401

CHUNKS = 6
LENGTH = 12 * CHUNKS - 3


def pictures_long(chunks):
    return 12 * chunks - 3


@pytest.fixture
def krea(rollout, model, node):
    """The rollout node with everything at auto; `keep_first_frame` is the preset node's."""

    def make(keep_first_frame=False, **inputs):
        given = node("AdaStateModelPreset")(model=model, preset="krea_14b", keep_first_frame=keep_first_frame).args[0]
        return rollout(**({"model": given, "length": LENGTH, **AUTO} | inputs))

    return make


def encodes_by(model, vae):
    """What KreaRealtime calls: all pictures decoded at once, and the frame's last one through VAE Encode."""

    def encoded(latents, frame):
        pictures = vae.decode(adapter.to_vae_space(model, latents))
        lone = [vae.encode(each[4 * frame : 4 * frame + 1]) for each in pictures]
        return adapter.to_model_space(model, torch.cat(lone))

    return encoded


@pytest.fixture
def published(model, positive):
    def make(chunks=CHUNKS, seed=5, **numbers):
        with torch.inference_mode():
            loop = KreaRealtime(Bare(model, positive, numbers.get("batch", 1)), seed=seed, h=4, w=4, **numbers)
            return adapter.to_vae_space(model, loop.roll(chunks))

    return make


def worst(ours, theirs):
    return [float((a - b).abs().max()) for a, b in zip(ours.split(3, 2), theirs.split(3, 2), strict=True)]


def test_a_stream_is_the_published_loop_that_encodes_anew(krea, model, vae, stream, published):  # noqa: F811
    chunks = PRESETS["krea_14b"].compared_chunks
    out = krea(length=pictures_long(chunks), stream=stream())
    ours, theirs = latents_of(out), published(chunks, encoded=encodes_by(model, vae))
    assert max(differences := worst(ours, theirs)) < 1e-4, differences
    report = report_of(out)
    assert report["past"] == {"made_anew": "newest", "encoded_anew": chunks - 2, "latents_taken": 0}
    assert not any("encodes that frame's picture anew" in each for each in report["warnings"])
    # and from the third chunk on it is another video than with latents
    without = worst(ours[:, :, : 3 * CHUNKS], latents_of(krea()))
    assert max(without[:2]) == 0 and without[2] > 1e-3


def saved_state(out):
    return load_state(output_file(report_of(out)["videos"][0]).with_suffix(".state.safetensors"))


@pytest.mark.parametrize("keep", [True, False])
def test_a_stream_goes_on_bit_for_bit(krea, stream, keep):  # noqa: F811
    """From files, after each of the first chunks and with latents pending; with kept latents and without."""
    whole = krea(stream=stream(filename_prefix="video/whole"), keep_latents=True)
    expected, state, parts = latents_of(whole), None, []
    for length in (9, 21, 29, 33, 57, LENGTH):
        out = krea(length=length, stream=stream(keep_state=True), resume=state, keep_latents=keep)
        if keep:
            assert torch.equal(latents_of(out), expected[:, :, : (length + 3) // 4])
        state = saved_state(out)
        parts.append(report_of(out)["past"])
    assert torch.equal(state.recent, whole.args[1].recent)
    assert sum(part["encoded_anew"] for part in parts) == CHUNKS - 2 and not any(
        part["latents_taken"] for part in parts
    )


def test_a_state_holds_no_keys_and_little_else(krea, stream):  # noqa: F811
    out = krea(stream=stream(keep_state=True), keep_latents=False)
    state, planned = saved_state(out), report_of(out)["memory_planned"]
    assert not any(layer.nbytes for layer in state.cache) and state.again == 3
    pending = 3 * 16 * 4 * 4 * 4  # latents that there may be
    assert state.nbytes <= planned["host"]["state"] <= state.nbytes + pending
    assert state.nbytes <= planned["disk"]["state"]
    pictures = state.stream["renewed_pictures"]
    assert state.stream["renewed_frames"] == [3 * CHUNKS - 3] and pictures.shape == (1, 1, 32, 32, 3)
    assert state.first.shape == (1, 16, 1, 4, 4) and state.recent.shape[2] == 6


def test_keep_first_frame_needs_no_vae(krea, stream, published):  # noqa: F811
    """Another video than that of the newest frames, the published loop's, with a stream and without."""
    out = krea(keep_first_frame=True)
    theirs = published(keep_first_frame=True)
    assert max(differences := worst(latents_of(out), theirs)) < 1e-4, differences
    assert worst(latents_of(krea()), theirs)[2] > 1e-3
    assert report_of(out)["past"] == {"made_anew": "first", "encoded_anew": 0, "latents_taken": 0}
    assert not any("encoded anew" in each for each in report_of(out)["warnings"])
    assert torch.equal(latents_of(krea(keep_first_frame=True, stream=stream())), latents_of(out))
    first = krea(keep_first_frame=True, length=33)
    assert torch.equal(latents_of(krea(keep_first_frame=True, resume=first.args[1])), latents_of(out))
    with pytest.raises(ValueError, match="made anew before every chunk and begins with the first frame in the state"):
        krea(resume=first.args[1])


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("rolling_forcing", "Rolling Forcing denoises chunks together and caches"),
        ("self_forcing", "Self-Forcing caches"),
    ],
)
def test_keep_first_frame_is_refused_where_the_past_is_cached(model, node, preset, said):
    with pytest.raises(
        ValueError, match=f"keep_first_frame is on, and {said} its past from chunk to chunk; turn it off"
    ):
        node("AdaStateModelPreset")(model=model, preset=preset, keep_first_frame=True)


def test_two_videos_at_once(krea, model, vae, stream, published):  # noqa: F811
    ours = latents_of(krea(batch_size=2, stream=stream()))
    with torch.inference_mode():
        theirs = published(batch=2, encoded=encodes_by(model, vae))
    assert max(differences := worst(ours, theirs)) < 1e-4, differences
    assert not torch.equal(ours[0], ours[1])


def test_a_tiny_vae_cannot_encode_so_latents_are_taken(krea, stream, light):  # noqa: F811
    out = krea(stream=stream(vae=light))
    report = report_of(out)
    assert report["past"] == {"made_anew": "newest", "encoded_anew": 0, "latents_taken": CHUNKS - 2}
    assert any("takes a stream (Stream To Video) with a full VAE" in each for each in report["warnings"])
    assert torch.equal(latents_of(out), latents_of(krea()))


def test_a_state_without_pictures_gets_them_of_its_latents(krea, stream, model, vae, published):  # noqa: F811
    """Made without a stream, gone on with in one: from there on pictures are encoded anew, of latents that are decoded again."""
    first = krea(length=33)
    out = krea(resume=first.args[1], stream=stream())
    assert report_of(out)["past"] == {"made_anew": "newest", "encoded_anew": CHUNKS - 3, "latents_taken": 0}
    encoded = encodes_by(model, vae)
    theirs = published(
        encoded=lambda latents, frame: encoded(latents, frame) if frame > 3 else latents[:, :, frame : frame + 1]
    )
    assert max(differences := worst(latents_of(out), theirs)) < 1e-4, differences


def test_lone_pictures_have_the_bits_of_vae_encode(vae):
    pictures = torch.rand(2, 32, 48, 3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.cat([vae.encode(picture[None]) for picture in pictures])
        assert torch.equal(codec.encode_alone(vae, pictures), expected)


def test_a_picture_that_cannot_be_encoded_loses_nothing(krea, stream, monkeypatch):  # noqa: F811
    """The run fails before its next chunk; the state that it leaves holds the picture, and goes on bit for bit."""
    expected = krea(stream=stream(filename_prefix="video/whole"))
    real, calls = codec.encode_alone, []

    def failing(vae, pictures):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no memory for a picture")
        return real(vae, pictures)

    monkeypatch.setattr("adastate_pack.nodes.renewal.encode_alone", failing)
    with pytest.raises(RuntimeError, match="no memory for a picture"):
        krea(stream=stream(filename_prefix="video/broken"))
    state = load_state(next(output_file("video").glob("broken*.state.safetensors")))
    assert state.next_frame == 9 and state.stream["renewed_frames"] == [6]
    rest = krea(resume=state, stream=stream(join=True))
    assert torch.equal(latents_of(rest), latents_of(expected))


def test_not_finite_pictures_are_told(vae, monkeypatch):
    monkeypatch.setattr(vae, "process_input", lambda image: image * float("nan"))
    with pytest.raises(codec.NonFinitePicturesError, match="for a picture that it encodes anew"):
        codec.encode_alone(vae, torch.rand(1, 32, 32, 3))


WITHOUT = {
    "an anchor": (dict(anchor=AnchorStatic(3)), "this anchor"),
    "absolute positions": (dict(positions="absolute"), "absolute positions"),
    "absorption": (dict(absorption=AbsorptionRequest(AbsorptionSettings(warmup_frames=12))), "absorption"),
}


@pytest.mark.parametrize(("inputs", "said"), WITHOUT.values(), ids=WITHOUT)
def test_what_does_not_go_with_it_is_rolled_out_as_before(krea, rollout, inputs, said):
    """With a cached past, window 18 and four steps, and says so; the bits of the same numbers without a preset."""
    out = krea(**inputs)
    report = report_of(out)
    assert "past" not in report and report["settings"]["window_frames"] == 18 and report["settings"]["steps"] == 4
    assert any(
        each.startswith(f"{said} and a past that is made anew before every chunk do not") for each in report["warnings"]
    )
    numbers = dict(steps=4, shift=5.0, chunk_frames=3, window_frames=18, positions="absolute", length=LENGTH)
    assert torch.equal(latents_of(out), latents_of(rollout(**(numbers | inputs))))


def test_no_anchor_connected_on_purpose_is_the_published_rule(krea):
    assert torch.equal(latents_of(krea(anchor=Anchor())), latents_of(krea()))


def test_a_state_of_before_goes_on_as_it_began(krea, rollout):
    """It names a window of 18 frames that were cached, and no more; at auto it goes on so."""
    numbers = dict(steps=4, shift=5.0, chunk_frames=3, window_frames=18, positions="absolute")
    whole = latents_of(rollout(length=LENGTH, **numbers))
    state = rollout(length=33, **numbers).args[1]
    assert "remade" not in state.spec
    out = krea(resume=state)
    assert torch.equal(latents_of(out), whole)
    assert any("published rule was built in; it goes on so" in each for each in report_of(out)["warnings"])


def test_a_list_of_noise_levels_that_is_not_its_own_is_told(krea):
    out = krea(sigmas=torch.tensor([1.0, 0.9375, 0.8333, 0.625, 0.0]))
    assert any("so the model is told these noise levels" in each for each in report_of(out)["warnings"])
    own = krea(sigmas=torch.tensor([1.0, 0.9375, 0.8333, 0.625, 0.005, 0.0]))
    assert not any("so the model is told these" in each for each in report_of(own)["warnings"])


@pytest.mark.parametrize("transition", ["cut", "recache"])
def test_words_that_change(krea, published, transition):
    """At the chunk from latent frame 9 on, 2.25 s into the video: behind its past, or in front of it; also from a state."""
    prompts = timeline((0, context(1), "cut"), (2.25, context(2), transition))
    out = krea(positive=prompts)
    words = ((0, context(1)), (9, context(2)))
    theirs = published(words=words, words_first=transition == "recache")
    assert max(differences := worst(latents_of(out), theirs)) < 1e-4, differences
    first = krea(positive=prompts, length=33)
    assert torch.equal(latents_of(krea(positive=prompts, resume=first.args[1])), latents_of(out))


def test_what_encoding_takes_is_planned(krea, stream, vae):  # noqa: F811
    """The host's reckoning for one picture, where that is more than a decode takes; and the picture itself."""
    memory = report_of(krea(stream=stream()))["memory_planned"]
    assert memory["host"]["renewed_pictures"] == 3 * 4 * 32 * 32
    encoding = vae.memory_used_encode((1, 3, 1, 32, 32), vae.vae_dtype)
    assert memory["device"]["decoder"] >= encoding > 0
    first = report_of(krea(stream=stream(), keep_first_frame=True))["memory_planned"]
    assert "renewed_pictures" not in first["host"] and first["device"]["decoder"] <= memory["device"]["decoder"]
