"""Sound of a served rollout: loaded from the input folder, in the files that a killed server leaves, and whole after a join."""

from __future__ import annotations

import sys
import time
import wave
from pathlib import Path

import av
import numpy
from conftest import frames_of, report_of, workflow

from adastate_core.audio.demo_tones import tones

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))
from sounds import click_time, lag, played, siren

RATE, FPS = 44_100, 16


def test_kill_9_leaves_frames_with_their_sound_and_a_join_goes_on_in_step(client):
    heard = siren(RATE, 60.0, 2)
    with wave.open(str(client.folder / "base" / "input" / "song.wav"), "wb") as file:
        file.setparams((2, 2, RATE, 0, "NONE", ""))
        file.writeframes((heard.T * 32767).round().astype("<i2").tobytes())
    names = {"n6__filename_prefix": "sound/still", "n6__format": "png", "n4__filename_prefix": "sound/take"}

    def prompt(**more):
        made = workflow("stream_to_frames", n4__audio=["30", 0], n4__autosave_seconds=0.2, **names, **more)
        return made | {"30": {"class_type": "AdaStateLoadSound", "inputs": {"file": "song.wav"}}}

    client.queue(prompt(n5__length=4001))
    video, folder = client.output / "sound" / "take_00001_.mp4", client.output / "sound" / "still_00001_.frames"
    state, end = video.with_suffix(".state.safetensors"), time.monotonic() + 120
    while not state.is_file() or len(list(folder.glob("*.png"))) < 57:
        assert time.monotonic() < end, "no frames"
        time.sleep(0.1)
    client.kill()
    with av.open(str(video)) as container:
        frames = sum(packet.dts is not None for packet in container.demux(video=0))
    found, rate = played(video)
    assert frames >= 45 and rate == RATE and found.shape[1] / rate > (frames - 1) / FPS - 1024 / rate
    assert lag(found[0], heard[0]) == 0
    client.start()
    length = 4 * ((len(list(folder.glob("*.png"))) + 3) // 4) + 25
    resumed = prompt(n5__length=length, n5__resume=["7", 0], n4__join=True, n6__join=True)
    resumed["7"] = {"class_type": "AdaStateLoadState", "inputs": {"file": f"sound/{state.name} [output]"}}
    report = report_of(client.run(resumed))
    assert any(f"the sound lasts 60 s, and the video {length / FPS:.6g} s" in one for one in report["warnings"])
    whole, rate = played(client.output / report["videos"][0])
    assert 0 <= whole.shape[1] / rate - length / FPS < 1024 / rate and lag(whole[0], heard[0]) == 0
    for click in (0.7, 1.37, 2.03, 2.6):
        assert abs(click_time(whole[0], rate, click) - click) < 1 / FPS
    beside, rate = played(client.output / report["frame_folders"][0] / "sound.wav")
    assert beside.shape == (2, round(length / FPS * rate))
    assert numpy.abs(beside - heard[:, : beside.shape[1]]).max() < 1e-4


def test_a_balloon_that_talks(client):
    """As shipped, but of three seconds: as long as the sound, which the file carries and which moves the picture."""
    videos = []
    for seed, reference in ((3, 7), (4, 7), (3, 8)):
        outputs = client.run(workflow("talking_balloon", n8__seconds=3.0, n8__seed=seed, n5__seed=reference))
        report = report_of(outputs, "12")
        assert (report["frames"], report["video_fps"], report["warnings"]) == (49, 16.0, [])
        found, rate = played(client.output / report["videos"][0])
        wanted = tones(3.0, seed)[0][0, 0].numpy()
        assert rate == 16_000 and 0 <= found.shape[1] / rate - 49 / 16 < 1024 / rate
        assert lag(found[0], wanted) == 0 and numpy.abs(found[0, 48_000:]).max() < 0.01
        if not videos:  # a picture that was shown is not shown again
            assert client.image_of(outputs["7"]["images"][0]).shape == (64, 64, 3)
        videos.append(numpy.stack(frames_of(client.output / report["videos"][0])).astype(int))
    for other in videos[1:]:  # another voice, another picture that is shown
        assert numpy.abs(other - videos[0]).mean() > 1
