"""What a chunk leaves in the memory of the process when it is in the video file, counted: what malloc has given out and not got
back, and Python's own small objects. The run of 10,000 chunks on a server is the same part's in tests/api."""

from __future__ import annotations

import ctypes
import gc
import sys

import pytest
import torch

from adastate_core.video.encoder import CODECS
from adastate_core.video.sink import VideoSink
from tools.host_memory import slope

FRAMES = 12  # of a chunk
MOST = 120.0  # bytes a chunk; a table of frames takes forty of each, or 480, and what is under way of a frame is some noise


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2; `used` and `mapped` are the bytes that are given out."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("a", "b", "c", "d", "mapped", "e", "f", "used", "g", "h")]


def given_out() -> int:
    """Bytes that malloc has given out, of all its arenas; AttributeError where it is not glibc's (2.33 or newer)."""
    call = ctypes.CDLL(None).mallinfo2
    call.restype = MallInfo
    gc.collect()
    info = call()
    return info.used + info.mapped


def has_glibc() -> bool:
    try:
        return given_out() > 0
    except (AttributeError, OSError, TypeError):
        return False


@pytest.mark.skipif(not has_glibc(), reason="only glibc counts what it has given out")
def test_a_growing_video_keeps_nothing_of_its_frames(campaign, tmp_path):
    codecs = ["h264", *(codec for codec in CODECS if codec != "h264")]
    for trial in campaign("160 chunks to a video file of each codec, counted", full=len(codecs), sample=1):
        with trial:
            codec = codecs[trial.number]
            side = max(32, CODECS[codec].least_side)
            frames = torch.rand(FRAMES, side, side, 3, generator=torch.Generator().manual_seed(trial.number))
            frames = frames.mul(255).byte() if CODECS[codec].takes == "bytes" else frames
            with VideoSink(tmp_path / f"a{CODECS[codec].suffix}", side, side, 16, codec) as sink:
                samples = []
                gc.freeze()  # what the suite has made before is not looked through every time
                for chunk in range(160):
                    sink.write(frames)
                    if chunk >= 60 and chunk % 5 == 0:
                        samples.append((chunk, given_out(), sys.getallocatedblocks()))
                gc.unfreeze()
                chunks, grown, blocks = zip(*samples, strict=True)
                most = sum(slope(chunks, grown))
                trial.saw(bytes_a_chunk=most, objects_a_chunk=sum(slope(chunks, blocks)))
                # the index of a Matroska file is written at its end: 40 bytes of each keyframe, and it is never rewritten
                index = 40 * FRAMES if CODECS[codec].container == "matroska" else 0
                assert most < MOST + index, (
                    f"{codec}: {most:.1f} bytes a chunk: {list(zip(chunks, grown, strict=True))[::4]}"
                )
