"""Copying finished rows to an address, with fsspec's own local and in-memory file systems."""

from __future__ import annotations

import json

import fsspec
import pytest

from fleet.errors import FleetError
from fleet.store import RECORD, Store, is_address


def test_a_row_is_finished_once_its_record_is_there(tmp_path):
    video = tmp_path / "v1_00001_.mp4"
    video.write_bytes(bytes(range(256)) * 99)
    store = Store(f"file://{tmp_path}/far/batch/")
    store.check()
    (address,) = store.put("v1", [video])
    assert address == f"file://{tmp_path}/far/batch/v1/v1_00001_.mp4" and store.finished() == []
    with fsspec.open(address) as file:
        assert file.read() == video.read_bytes()
    store.finish("v1", {"name": "v1", "digest": "d", "files": [address]})
    assert Store(f"file://{tmp_path}/far/batch").finished() == [{"name": "v1", "digest": "d", "files": [address]}]
    assert json.loads((tmp_path / "far" / "batch" / "v1" / RECORD).read_text())["name"] == "v1"


def test_a_folder_of_frames_arrives_with_all_in_it(tmp_path):
    frames = tmp_path / "v1_00001_"
    (frames / "more").mkdir(parents=True)
    for number in range(3):
        (frames / f"{number:06}.png").write_bytes(bytes([number]))
    (frames / "more" / "x").write_bytes(b"x")
    (address,) = Store(f"file://{tmp_path}/far").put("v1", [frames])
    there = tmp_path / "far" / "v1" / "v1_00001_"
    assert address == f"file://{there}" and (there / "more" / "x").read_bytes() == b"x"
    assert [(there / f"{number:06}.png").read_bytes() for number in range(3)] == [b"\0", b"\1", b"\2"]


def test_a_file_that_did_not_arrive_whole_is_told(tmp_path, monkeypatch):
    video = tmp_path / "v.mp4"
    video.write_bytes(b"12345")
    store = Store("memory://half")
    monkeypatch.setattr(type(store._files), "put_file", lambda self, here, there: self.pipe_file(there, b"123"))
    with pytest.raises(OSError, match="v.mp4 has 5 bytes, and 3 of them arrived at memory://half"):
        store.put("v1", [video])


def test_a_record_that_is_none_makes_no_row_finished(tmp_path):
    store = Store(f"file://{tmp_path}")
    for name, text in (("a", "["), ("b", "[]"), ("c", '{"name": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECORD).write_text(text)
    assert store.finished() == []


def test_an_address_that_cannot_be_used_is_told(tmp_path):
    with pytest.raises(FleetError, match="nonsense://x cannot be used"):
        Store("nonsense://x")
    (tmp_path / "file").touch()
    with pytest.raises(FleetError, match="nothing can be written to file://.*/file/below"):
        Store(f"file://{tmp_path}/file/below").check()


def test_what_is_an_address():
    assert is_address("s3://bucket/x") and not is_address("/a/b") and not is_address("results")
