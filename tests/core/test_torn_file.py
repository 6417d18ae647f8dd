"""Growing videos whose end a power cut tore: their fragments until then are read, whatever lies behind."""

from __future__ import annotations

import random
from pathlib import Path

import av
import pytest
import torch
from test_video_sink import decoded, growing, moving, pictures_of

from adastate_core.video.frames import opened_alone
from adastate_core.video.torn_file import Beginning, whole_fragments

SYNCED = 12


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> tuple[bytes, int, list[torch.Tensor]]:
    """A file as it grew, how long it was when a dozen frames had been asked onto the disk, and its frames."""
    path = tmp_path_factory.mktemp("grown") / "a.mp4"
    sink = growing(path)
    sink.write(moving(SYNCED))
    safe = len(path.read_bytes())
    sink.write(moving(40, start=SYNCED))
    data = path.read_bytes()
    frames = decoded(path)
    sink.close()
    return data, safe, frames


def read(path: Path) -> list[torch.Tensor]:
    with opened_alone(path) as container:
        container.streams.video[0].codec_context.options = {"err_detect": "explode"}
        made = []
        try:
            made.extend(pictures_of(frame) for frame in container.decode(video=0))
        except av.error.FFmpegError:  # a frame's own bytes, behind what is sure
            pass
        return made


def test_what_was_on_the_disk_is_read_whatever_is_left_of_what_was_not(grown, tmp_path):
    data, safe, frames = grown
    refused = 0
    for seed in range(200):
        luck, torn = random.Random(seed), bytearray(data)
        for start in range(safe, len(data), 512):
            if luck.random() < 0.5:
                torn[start : start + 512] = bytes(len(torn[start : start + 512]))
        path = tmp_path / "torn.mp4"
        path.write_bytes(torn[: luck.randint(safe, len(torn))])
        try:
            decoded(path)
        except (av.error.InvalidDataError, av.error.EOFError):
            refused += 1
        found = read(path)
        assert len(found) >= SYNCED - 1  # the newest one is kept back until the next
        assert all(map(torch.equal, found[: SYNCED - 1], frames))
    assert refused > 20  # FFmpeg alone does not even open many of them


def test_a_file_that_does_not_grow_in_fragments_has_none(grown, tmp_path):
    sink = growing(tmp_path / "a.mp4")
    sink.write(moving(12))
    path = sink.close()
    assert whole_fragments(path) == 0
    path.write_bytes(bytes(4000))
    with pytest.raises(av.error.InvalidDataError):
        opened_alone(path)
    nested = b"".join(size.to_bytes(4, "big") + b"moof" for size in range(80_000, 7, -8))
    for data in (nested, b"", b"\0" * 100, b"\0\0\0\1moof", grown[0][:200], b"\xff" * 64):
        (tmp_path / "b.mp4").write_bytes(data)
        assert whole_fragments(tmp_path / "b.mp4") == 0


def test_a_whole_file_is_whole_and_a_cut_one_ends_with_a_fragment(grown, tmp_path):
    data, safe, _ = grown
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    assert whole_fragments(path) == len(data)
    ends = set()
    for size in range(safe, safe + 3000, 37):
        path.write_bytes(data[:size])
        ends.add(end := whole_fragments(path))
        assert safe <= end <= size
    assert len(ends) > 3


def test_a_beginning_reads_as_the_file_does(grown, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(grown[0])
    with Beginning(path, 1000) as file:
        assert file.read() == grown[0][:1000] and file.read(5) == b"" and file.seek(-10, 2) == 990
        assert file.read(100) == grown[0][990:1000] and file.seek(5) == 5 and file.read(3) == grown[0][5:8]
