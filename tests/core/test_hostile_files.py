"""What the campaign of hostile files found, one after the other: each is refused in a sentence, at once, with little memory."""

from __future__ import annotations

import io
import itertools
import json
import struct
import time
from fractions import Fraction

import av
import pytest
import torch
from hostile import headers, media, pickles
from hostile.cell import PYTHONISMS, tried
from hostile.damage import boxes
from safetensors.torch import save

from adastate_core.prompts.timeline import parse_timeline
from adastate_core.video import frames as video_frames
from adastate_core.video.animation import GrowingAnimation, _blocks
from adastate_core.video.frame_folder import read_sequence
from adastate_core.video.frames import FileClip, UnreadableVideo, opened_alone
from adastate_core.video.join import Prefix
from adastate_core.video.sink import VideoSink
from adastate_core.video.sound_file import read_sound
from adastate_core.video.sound_track import EarlierSound
from adastate_core.weights.checkpoints import MOST_WEIGHTS, open_checkpoint
from adastate_core.weights.pickle_size import TooMuch, check_pickle
from adastate_core.weights.preset_file import read_preset
from fleet.errors import FleetError
from fleet.manifest import read_manifest
from fleet.reading import read_yaml_table
from fleet.results import Lines, runs

LAUGHS = b"\x80\x02)q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(40)) + b"}h\x28K\x01s."
DEEP = b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s."


def refused(call, *arguments) -> str:
    with pytest.raises((ValueError, FleetError)) as told:
        call(*arguments)
    text = str(told.value)
    assert not PYTHONISMS.search(text), text
    return text


def own_video(path, sound=None, frames: int = 12):
    with VideoSink(path, 32, 32, 16, sound=sound) as sink:
        sink.write((torch.rand(frames, 32, 32, 3, generator=torch.Generator().manual_seed(1)) * 255).byte())
    return path


# ---- weights


@pytest.mark.parametrize("program", [LAUGHS, DEEP], ids=["hashing it never ends", "hashing it overflows the stack"])
def test_a_pickle_that_stands_for_far_more_than_it_is(tmp_path, program):
    path = tmp_path / "w.pt"
    whole = pickles.saved({"a": torch.zeros(2)})
    path.write_bytes(pickles.rewritten(whole, lambda name, data: program if name.endswith("data.pkl") else data))
    seen = tried(lambda: open_checkpoint(path), tmp_path, "w.pt", ("w.pt",))
    assert "stands for far more than it is" in seen.told and seen.seconds < 5


def test_pickles_of_trainers_pass(tmp_path):
    shared = torch.zeros(3)
    for content in (
        {"a": shared, "b": shared, "deep": [[[({"c": (1, (2,))},)]]]},
        [torch.zeros(0)] * 2000,
        {},
        ("x",) * 9,
    ):
        whole = pickles.saved(content)
        pickles.rewritten(whole, lambda name, data: check_pickle(data) or data if name.endswith("data.pkl") else data)


@pytest.mark.parametrize(
    "data", [b"", b".", b"\x80\x02(.", b"\x80\x020.", b"h\x05.", b"\x80\x02]t.", b"\x8a\x05.", b"t."]
)
def test_a_pickle_that_is_damaged(data):
    if data not in (b".", b"\x80\x02(."):
        assert "damaged" in refused(check_pickle, data)
    with pytest.raises(TooMuch):
        check_pickle(LAUGHS)


def test_a_header_of_very_many_names(tmp_path):
    header, data = headers.split(save({"a": torch.zeros(1)}))
    header |= {f"x{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(MOST_WEIGHTS)}
    (tmp_path / "w.safetensors").write_bytes(headers.joined(header, data))
    assert f"it names {MOST_WEIGHTS + 1} weights" in refused(open_checkpoint, tmp_path / "w.safetensors")


# ---- sounds


@pytest.mark.parametrize("rate", [0, 1, 999, 2_000_000, 2**31 - 1])
def test_a_sound_of_a_rate_that_none_has(tmp_path, rate):
    form = struct.pack("<HHIIHH", 1, 1, rate, rate % 2**32, 1, 8)
    wav = (
        b"RIFF"
        + struct.pack("<I", 9036)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", 9000)
    )
    (tmp_path / "a.wav").write_bytes(wav + bytes(9000))
    assert refused(read_sound, tmp_path / "a.wav").startswith("a.wav ")


def test_silence_of_few_bytes_that_lasts_for_hours(tmp_path):
    class Long:
        def choice(self, choices):
            return choices[-1]

    data, _ = media._long_flac(Long())
    (tmp_path / "a.flac").write_bytes(data * 3)
    seen = tried(lambda: read_sound(tmp_path / "a.flac"), tmp_path, "a.flac", ("a.flac",))
    assert "which so few bytes cannot" in seen.told and seen.megabytes < 1500


def test_a_sound_that_begins_months_after_its_file(tmp_path):
    class Late:
        def choice(self, choices):
            return choices[-1]

    (tmp_path / "a.mkv").write_bytes(media._late(Late())[0])
    seen = tried(lambda: read_sound(tmp_path / "a.mkv"), tmp_path, "a.mkv", ("a.mkv",))
    assert "which so few bytes cannot" in seen.told and seen.megabytes < 300


# ---- videos


def test_an_own_video_whose_frames_are_damaged_is_not_joined_to(tmp_path):
    path = own_video(tmp_path / "own.mp4")
    data = bytearray(path.read_bytes())
    begin = next(begin for begin, _, kind in boxes(bytes(data)) if kind == b"mdat")
    data[begin + 8 : begin + 12] = b"\xff\xff\xff\xff"  # how long the first of its units is
    path.write_bytes(bytes(data))
    text = refused(lambda: VideoSink(tmp_path / "new.mp4", 32, 32, 16, prefix=path, prefix_frames=12))
    assert text.startswith("own.mp4 cannot be joined to: it ") and text.endswith("or turn join off")


@pytest.mark.parametrize("kind", ["list", "concat", "dash", "sdp", "nothing", "text"])
def test_a_list_in_the_place_of_an_own_video_leads_nowhere(tmp_path, kind):
    path = tmp_path / "own.mp4"
    other = own_video(tmp_path / "other.mp4")
    path.write_bytes(media._FALSE[kind]().replace(b"/etc/passwd", str(other).encode()))
    assert "it is damaged" in refused(lambda: VideoSink(tmp_path / "new.mp4", 32, 32, 16, prefix=path, prefix_frames=3))
    assert EarlierSound(path).form is None
    with pytest.raises(av.error.FFmpegError):
        opened_alone(path)


def test_frames_without_times_are_not_joined_to(tmp_path):
    """As a raw stream of H.264 has them."""
    path, out = tmp_path / "own.mp4", io.BytesIO()
    with av.open(str(own_video(tmp_path / "a.mp4"))) as source, av.open(out, "w", format="h264") as target:
        stream = target.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    path.write_bytes(out.getvalue())
    refused(lambda: VideoSink(tmp_path / "new.mp4", 32, 32, 16, prefix=path, prefix_frames=3))
    assert Prefix._in_time(None, 0, av.Packet(b"a"), None) is False


def test_a_picture_may_not_be_larger_than_memory(tmp_path, monkeypatch):
    path = tmp_path / "a.gif"
    path.write_bytes(media.large_gif(12_000))
    assert "is 12000x12000, and a picture may have" in refused(FileClip, path)
    whole = tmp_path / "a.mkv"
    whole.write_bytes(media.video("matroska", "libx264", "yuv420p"))
    assert FileClip(whole).first().size == (32, 32)
    monkeypatch.setattr(video_frames, "MOST_PIXELS", 1000)
    with pytest.raises(UnreadableVideo):
        FileClip(whole)


def test_an_animation_that_is_none_or_says_to_be_longer_than_it_is(tmp_path):
    lies = b"RIFF\xff\xff\xff\xffWEBPANMF\xf0\xff\xff\xffabc"
    for number, (data, said) in enumerate(
        [(b"no picture", "cannot be joined to: it is no WebP"), (lies, "holds 0 frames of the 3")]
    ):
        old = tmp_path / "old.webp"
        old.write_bytes(data)
        growing = GrowingAnimation(tmp_path / f"{number}.webp", 32, 32, Fraction(16))
        seen = tried(lambda growing=growing, old=old: list(growing.copy(old, 3)), tmp_path, said, ("old.webp",))
        growing.close()
        assert said in seen.told and seen.megabytes < 100


def test_the_blocks_of_a_webp_that_says_more_than_it_holds_end_where_it_does():
    """At the end of the file an endless row of empty blocks began: power cuts found it."""
    file = io.BytesIO(b"RIFF" + (2**31).to_bytes(4, "little") + b"WEBP" + b"ANMF\4\0\0\0abcd")
    assert list(itertools.islice(_blocks(file), 5)) == [(b"ANMF", b"abcd")]


def test_a_rate_of_nothing_is_none(tmp_path):
    path = tmp_path / "a.y4m"
    path.write_bytes(media._FALSE["y4m of a slow rate"]())
    assert FileClip(path).rate == 16


# ---- texts


def test_many_blank_lines_take_no_time():
    """Each looked through all behind it: 200,000 characters took minutes."""
    text, began = "0:00 a\n" + " \n" * 96_000, time.process_time()
    assert parse_timeline(text)[0].text == "a"
    assert time.process_time() - began < 15


@pytest.mark.parametrize("data", [b"\xff\xfe{\0", b"[" * 30_000, b"9" * 5000, b"{", b"\xc3\x28"])
def test_texts_that_cannot_be_read_are_told_in_words(tmp_path, data):
    (tmp_path / "sequence.json").write_bytes(data)
    assert read_sequence(tmp_path) is None
    (tmp_path / "p.toml").write_bytes(b"shift = " + data)
    assert refused(read_preset, tmp_path / "p.toml").startswith("p.toml is not TOML (")
    (tmp_path / "results.jsonl").write_bytes(data + b'\n{"name": "a"}\n')
    assert Lines(tmp_path / "results.jsonl").read() == [{"name": "a"}]
    for table, workflow in ((data, b"{}"), (json.dumps({"name": "a", "workflow": "w.json"}).encode(), data)):
        (tmp_path / "t.jsonl").write_bytes(table)
        (tmp_path / "w.json").write_bytes(workflow)
        text = refused(read_manifest, tmp_path / "t.jsonl")
        assert text.startswith("t.jsonl ") and str(tmp_path) not in text


def test_what_is_no_table_of_yaml(tmp_path):
    path = tmp_path / "env.yaml"
    for data in (
        b"- a",
        b"5: 6",
        b"a: [",
        b"\xff",
        b"[" * 5000,
        b"!!python/object/apply:os.system [true]",
        b"a: &a [*a, *b]",
    ):
        path.write_bytes(data)
        refused(read_yaml_table, path)
    for data, found in ((b"", {}), (b"env_vars: {A: '1'}", {"env_vars": {"A": "1"}})):
        path.write_bytes(data)
        assert read_yaml_table(path) == found


def test_no_process_has_such_a_number():
    assert not any(runs(number) for number in (0, -1, 2**31, 10**400)) and runs(1)
