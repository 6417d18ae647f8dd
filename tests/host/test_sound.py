"""Sound through the nodes: in every file of a run, in step with its pictures, however the run comes about; what is told before."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import numpy
import pytest
import torch
from adastate_pack.adastate_core.audio.placed import PlacedSound
from adastate_pack.adastate_core.audio.track import AudioTrack, Sound
from adastate_pack.nodes.host.steer_wishes import Wish
from conftest import NODES
from test_analysis import memory, video
from test_links import ran  # noqa: F401  a fixture
from test_reports import stop_after
from test_steering import script  # noqa: F401  a fixture

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))
from small_enlargers import interpolator
from sounds import around, click_time, lag, played, siren

RATE, FPS = 16_000, 16.0
STEP = 2.0**-23


def audio(seconds: float = 3.0, seed: int = 0, rate: int = RATE, channels: int = 1) -> dict:
    """AUDIO as the host's nodes give it."""
    return {"waveform": torch.from_numpy(siren(rate, seconds, channels, seed))[None], "sample_rate": rate}


def require_in_step(path: Path, heard: dict, frames: int, start: float = 0.0, fps: float = FPS) -> None:
    found, rate = played(path)
    with av.open(str(path)) as container:
        assert sum(packet.dts is not None for packet in container.demux(video=0)) == frames
    wanted = around(heard["waveform"][0].double().numpy(), rate, start, found.shape[1])
    assert rate == heard["sample_rate"] and 0 <= found.shape[1] / rate - frames / fps < 1024 / rate + 0.001
    if path.suffix == ".mp4":
        assert lag(found[0], wanted[0]) == 0 and numpy.abs(found - wanted).mean() < 0.02
    else:
        assert numpy.abs(found - wanted).max() <= STEP


def warnings_of(out) -> list[str]:
    return json.loads(out.args[2])["warnings"]


@pytest.fixture
def rollout(rollout):
    return lambda **inputs: rollout(**({"steps": 1, "keep_latents": False} | inputs))


def test_a_rollouts_file_carries_the_sound(rollout, stream, folders):
    out = rollout(length=45, stream=stream(audio=audio(45 / 16)))
    path = folders / "output" / "take_00001_.mp4"
    require_in_step(path, audio(), 45)
    assert abs(click_time(played(path)[0][0], RATE, 1.37) - 1.37) < 1 / FPS
    assert not any("sound" in one for one in warnings_of(out))
    components = out.args[3].get_components()
    assert components.images.shape[0] == 45 and components.audio["sample_rate"] == RATE


def test_samples_that_are_no_numbers_cost_no_video(rollout, stream, folders):
    """As a damaged file of floats has them: FFmpeg's encoder of AAC ends at them."""
    heard = audio(1.0)
    for place, value in enumerate((float("nan"), float("inf"), -float("inf"), 3e38, -1e30)):
        heard["waveform"][0, 0, 100 + 900 * place] = value
    rollout(length=9, stream=stream(audio=heard))
    found, _ = played(folders / "output" / "take_00001_.mp4")
    assert numpy.isfinite(found).all() and found.shape[1] > 0.5 * RATE


@pytest.mark.parametrize("codec", ["h264", "ffv1"])
def test_a_resume_writes_its_part_and_a_join_all_of_it(rollout, stream, folders, codec):
    heard, out, suffix = audio(), folders / "output", ".mp4" if codec == "h264" else ".mkv"
    settings = {"codec": codec, "audio": heard}
    whole = rollout(length=45, stream=stream(filename_prefix="whole", **settings))
    first = rollout(length=21, stream=stream(filename_prefix="part", **settings))
    rollout(length=45, resume=first.args[1], stream=stream(filename_prefix="part", **settings))
    joined = rollout(length=45, resume=first.args[1], stream=stream(filename_prefix="part", join=True, **settings))
    require_in_step(out / f"whole_00001_{suffix}", heard, 45)
    require_in_step(out / f"part_00002_{suffix}", heard, 24, 21 / FPS)
    require_in_step(out / f"part_00003_{suffix}", heard, 45)
    rest = rollout(length=57, resume=joined.args[1], stream=stream(filename_prefix="part", join=True, **settings))
    require_in_step(out / f"part_00004_{suffix}", heard, 57)
    assert all(warnings_of(joined) == warnings_of(one) for one in (whole,)) and len(warnings_of(rest)) == 2
    silent = rollout(length=45, resume=first.args[1], stream=stream(filename_prefix="part", join=True, codec=codec))
    assert any("part_00001_" in one and "carries sound and this run has none" in one for one in warnings_of(silent))


def test_a_part_that_was_resumed_alone_is_joined_to_at_its_place(rollout, stream, folders):
    """The joined file begins in the middle of the video, and so does its sound."""
    heard = audio()
    first = rollout(length=21, stream=stream(audio=heard))
    second = rollout(length=33, resume=first.args[1], stream=stream(audio=heard))
    rollout(length=45, resume=second.args[1], stream=stream(audio=heard, join=True))
    require_in_step(folders / "output" / "take_00003_.mp4", heard, 24, 21 / FPS)


def test_an_interrupted_run_is_gone_on_with(rollout, stream, folders, monkeypatch, node):
    """Its state lies beside the file, which was finished at its end."""
    heard = audio()
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        out = rollout(length=57, stream=stream(audio=heard))
    assert json.loads(out.args[2])["ended"] == "stopped"
    require_in_step(folders / "output" / "take_00001_.mp4", heard, 21)
    state = node("AdaStateLoadState")(file="take_00001_.state.safetensors [output]").args[0]
    rollout(length=45, resume=state, stream=stream(audio=heard, join=True))
    require_in_step(folders / "output" / "take_00002_.mp4", heard, 45)


def test_every_file_of_a_batch_carries_it(rollout, stream, folders):
    heard = audio()
    first = rollout(length=21, batch_size=2, stream=stream(audio=heard, codec="ffv1"))
    rollout(length=33, batch_size=2, resume=first.args[1], stream=stream(audio=heard, codec="ffv1", join=True))
    for item in ("b0", "b1"):
        for number, frames in ((1, 21), (2, 33)):
            require_in_step(folders / "output" / f"take_0000{number}_{item}.mkv", heard, frames)


def test_the_frames_of_the_same_run_have_it_beside_them(rollout, stream, node, folders):
    heard, out = audio(channels=2), folders / "output"
    inputs = {"filename_prefix": "stills", "format": "png", "fps": FPS, "preview": False}
    both = node("AdaStateStreamFrames")(stream=stream(audio=heard), **inputs).args[0]
    first = rollout(length=21, stream=both)
    rollout(length=33, resume=first.args[1], stream=both.joined())
    for number, frames in ((1, 21), (2, 33)):
        require_in_step(out / f"take_0000{number}_.mp4", heard, frames)
        found, rate = played(out / f"stills_0000{number}_.frames" / "sound.wav")
        assert found.shape == (2, round(frames / FPS * rate))
        assert numpy.abs(found - around(heard["waveform"][0].double().numpy(), rate, 0, found.shape[1])).max() <= STEP


def test_frames_alone_have_it_beside_them_too(rollout, vae, node, folders):
    heard = audio()
    inputs = {"filename_prefix": "moving", "format": "webp", "fps": FPS, "preview": False, "autosave_seconds": 0.0}
    rollout(length=21, stream=node("AdaStateStreamFrames")(vae=vae, audio=heard, **inputs).args[0])
    found, rate = played(folders / "output" / "moving_00001_.frames" / "sound.wav")
    assert found.shape == (1, 21 * rate // 16)
    assert numpy.abs(found - around(heard["waveform"][0].double().numpy(), rate, 0, found.shape[1])).max() <= STEP


def test_enlarged_files_keep_step(rollout, stream, folders):
    heard = audio()
    with torch.no_grad():
        made = stream(audio=heard, codec="ffv1", interp_model=interpolator(), frame_multiplier=3)
        first = rollout(length=21, stream=made)
        rollout(length=33, resume=first.args[1], stream=made.joined())
        rollout(length=33, resume=first.args[1], stream=made)
    out = folders / "output"
    require_in_step(out / "take_00001_.mkv", heard, 61, fps=48)
    require_in_step(out / "take_00002_.mkv", heard, 97, fps=48)
    require_in_step(out / "take_00003_.mkv", heard, 36, 61 / 48, fps=48)


@pytest.mark.parametrize("codec", ["h264", "ffv1"])
def test_a_run_that_goes_back_keeps_step(rollout, stream, script, folders, codec):  # noqa: F811
    heard = audio(7.0)
    script.at(4, Wish(take_back=1.0))
    out = rollout(length=69, stream=stream(audio=heard, codec=codec, history_chunks=2))
    assert json.loads(out.args[2])["steering"]["done"][0]["taken_back"] == {"to": 21 / 16, "chunk": 2}
    require_in_step(next((folders / "output").glob("take_00001_.m*")), heard, 69)


def test_a_video_without_an_end_is_silent_behind_the_sound(rollout, stream, folders, monkeypatch):
    stop_after(monkeypatch, 4)
    out = rollout(length=0, stream=stream(audio=audio(1.5)))
    require_in_step(folders / "output" / "take_00001_.mp4", audio(1.5), 45)
    assert any("the video has no end: it is silent from 1.5 s on" in one for one in warnings_of(out))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (10.0, "the sound lasts 10 s, and the video 2.0625 s: the last 7.94 s of the sound are cut off"),
        (1.0, "the sound lasts 1 s, and the video 2.0625 s: its last 1.06 s are silent"),
        (2.05, ""),
        (1.82, ""),
        (2.3, ""),
        (1.8, "the sound lasts 1.8 s, and the video 2.0625 s: its last 0.262 s are silent"),
    ],
)
def test_another_length_is_told_before_anything_is_made(model, rollout, stream, node, caplog, seconds, words, folders):
    made = stream(audio=audio(seconds))
    plan = node("AdaStatePlan")(model=model, width=32, height=32, length=33, stream=made).args
    assert [one for one in json.loads(plan[1])["warnings"] if "sound" in one] == ([words] if words else [])
    caplog.clear()
    out = rollout(length=33, stream=made)
    assert [one for one in warnings_of(out) if "sound" in one] == ([words] if words else [])
    assert (words in [each.getMessage() for each in caplog.records]) == bool(words)
    require_in_step(folders / "output" / "take_00001_.mp4", audio(seconds), 33)


def test_an_offset_of_the_track_that_drives_a_run_is_that_of_its_file(rollout, stream, folders):
    """What whoever has a track asks of a stream; one with a sound of its own keeps that."""
    heard, other = audio(4.0), audio(4.0, seed=7)
    track = Sound(heard["waveform"][0], RATE)
    rollout(length=33, stream=stream().carrying(track, 0.75))
    require_in_step(folders / "output" / "take_00001_.mp4", heard, 33, 0.75)
    rollout(length=33, stream=stream(audio=other).carrying(track, 0.75))
    require_in_step(folders / "output" / "take_00002_.mp4", other, 33)
    with pytest.raises(ValueError, match="the sound lasts 4 s and offset is 5, so nothing of it is left"):
        rollout(length=33, stream=stream().carrying(track, 5.0))


def test_render_video_carries_it(vae, node, folders):
    latents = torch.randn(1, 16, 5, 4, 4, generator=torch.Generator().manual_seed(2))
    inputs = {"filename_prefix": "a", "fps": FPS, "codec": "h264", "quality": 18, "audio": audio()}
    video = node("AdaStateRenderVideo")(latent={"samples": latents}, vae=vae, **inputs).args[0]
    require_in_step(Path(video.get_stream_source()), audio(), 17)


def test_the_nodes_of_sound(node, folders):
    heard = node("AdaStateDemoSound")(seconds=2.0, seed=3).args[0]
    assert heard["waveform"].shape == (1, 1, 32_000) and heard["sample_rate"] == 16_000
    encoded = node("AdaStateDemoEar")(audio=heard).args[0]
    layers = encoded["encoded_audio_all_layers"]
    assert len(layers) == 25 and layers[0].shape == (1, 99, 1024) and all(layer is layers[0] for layer in layers)
    assert encoded["encoded_audio"].shape == (1, 99, 1024) and encoded["audio_samples"] == 32_000
    track = node("AdaStateAudio")(audio=heard, encoded=encoded, fps=16.0, offset=0.5).args[0]
    assert isinstance(track, AudioTrack) and (track.fps, track.offset, track.seconds) == (16.0, 0.5, 2.0)
    assert track.frames(16.0) == 24 and track.layers[0] is layers[0]
    alone = node("AdaStateAudio")(encoded=encoded, fps=0.0, offset=0.0).args[0]
    assert alone.sound is None and alone.seconds == 99 / 50


def test_what_is_no_sound_is_refused_in_a_sentence(node, stream, folders):
    ask = node("AdaStateAudio")
    with pytest.raises(ValueError, match="neither audio nor encoded is connected; connect the sound"):
        ask(fps=0.0, offset=0.0)
    with pytest.raises(ValueError, match="offset is 9 and the sound lasts 3 s, so nothing of it is left; give less"):
        ask(audio=audio(), fps=0.0, offset=9.0)
    for bad, words in (
        ({"waveform": torch.zeros(2, 1, 9), "sample_rate": 9000}, "holds 2 sounds at once; connect one of them"),
        ({"waveform": torch.zeros(1, 9), "sample_rate": 9000}, r"has a waveform \[1, 9\]; it must be"),
        ({"waveform": torch.zeros(1, 1, 0), "sample_rate": 9000}, "has no sample in it; connect a sound that lasts"),
        ({"waveform": torch.zeros(1, 1, 9), "sample_rate": 0}, "has a sample_rate of 0; it must be"),
        ({"waveform": torch.zeros(1, 1, 9), "sample_rate": 9}, "has a sample_rate of 9; it must be"),
        (7, "audio is 7; it must be an AUDIO: connect Load Audio"),
    ):
        for take in (lambda audio: ask(audio=audio, fps=0.0, offset=0.0), lambda audio: stream(audio=audio)):
            with pytest.raises(ValueError, match=words):
                take(bad)
    with pytest.raises(ValueError, match="encoded holds no features; connect Audio Encoder Encode"):
        ask(encoded={"encoded_audio_all_layers": ()}, fps=0.0, offset=0.0)
    with pytest.raises(ValueError, match="audio is connected beside stream; connect it to the node"):
        node("AdaStateStreamFrames")(
            stream=stream(), filename_prefix="a", format="png", fps=FPS, preview=False, audio=audio()
        )
    with pytest.raises(ValueError, match="the ear needs at least 0.025 s"):
        node("AdaStateDemoEar")(audio=audio(0.01))


def test_whole_numbers_are_sounds_too(node):
    """As the host's own reader of videos gives them for 16 bits."""
    values = torch.tensor([[[0, 16384, -32768, 32767]]], dtype=torch.int16)
    track = node("AdaStateAudio")(audio={"waveform": values, "sample_rate": 4000}, fps=0.0, offset=0.0).args[0]
    assert track.sound.waveform.tolist() == [[0.0, 0.5, -1.0, 32767 / 32768]]


def test_a_sound_is_loaded_from_the_input_folder_and_from_nowhere_else(node, folders):
    load, out = node("AdaStateLoadSound"), folders / "input"
    with av.open(str(out / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((siren(RATE) * 32767).astype(numpy.int16), format="s16", layout="mono")
        frame.sample_rate = RATE
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert NODES["AdaStateLoadSound"].define_schema().inputs[0].options == ["a.wav"]
    found = load(file="a.wav").args[0]
    assert found["sample_rate"] == RATE and (found["waveform"][0] - torch.from_numpy(siren(RATE))).abs().max() < 1e-4
    (folders / "b.wav").write_bytes((out / "a.wav").read_bytes())
    for name in ("../b.wav", str(folders / "b.wav"), "none.wav"):
        assert load.validate(file=name) is not True
        with pytest.raises(ValueError, match="no sound file|does not name a file inside"):
            load(file=name)
    before = NODES["AdaStateLoadSound"].fingerprint_inputs(file="a.wav")
    (out / "a.wav").write_bytes(b"no")
    assert NODES["AdaStateLoadSound"].fingerprint_inputs(file="a.wav") != before
    with pytest.raises(ValueError, match="a.wav cannot be read"):
        load(file="a.wav")


def test_a_comparison_has_the_sound_of_its_first_video(node, folders):
    """Of a file, of the part of one that counts, and of what lies in memory; the others are not heard."""
    compare, heard = node("AdaStateCompare"), audio(3.0)
    sounding = video(folders / "a.mp4", 40, 20, sound=PlacedSound(Sound(heard["waveform"][0], RATE)))
    silent = video(folders / "b.mp4", 40, 150)

    class Cut(type(sounding)):
        def get_active_trim_window(self) -> tuple[float, float]:
            return 1.0, 0.75

    cut = Cut(str(folders / "a.mp4"))
    for first, frames, start in ((sounding, 40, 0.0), (memory(40, audio=heard), 40, 0.0), (cut, 40, 1.0)):
        made = Path(compare(video_a=first, video_b=silent, labels="").args[0].get_stream_source())
        wanted = heard if first is not cut else {**heard, "waveform": heard["waveform"][..., : round(1.75 * RATE)]}
        require_in_step(made, wanted, frames, start)
    for first in (silent, memory(40), memory(40, audio=audio() | {"waveform": torch.zeros(2, 1, 9)})):
        made = compare(video_a=first, video_b=sounding, labels="").args[0].get_stream_source()
        with av.open(made) as container:
            assert not container.streams.audio
