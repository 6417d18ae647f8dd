"""Files that mean harm, through the core's doors: states, absorptions, manifests of batches and of what lies beside videos."""

from __future__ import annotations

import json
import os
import socket
import time
from fractions import Fraction
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from hostile import manifests
from hostile.cell import check, tried
from hostile.damage import damaged
from mutations import mutated
from state_cases import CASES, go_on, made
from test_mutated_files import solutions

from adastate_core.absorption.saved import load_solution, save_solution, solution_from
from adastate_core.states.state_file import load_state, save_state, state_chunk
from adastate_core.video.frame_folder import FrameFolder, FrameSequence, frame_name, missing_frame, read_sequence
from adastate_core.weights.preset_file import read_preset
from fleet.going_on import begun, kept_frames, report_of, reports
from fleet.graph import course_of
from fleet.manifest import read_manifest
from fleet.reading import read_yaml_table
from fleet.results import Books, Lines, OneDriver

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
_BOTH = ("static", "adaptive", "deep", "int8", "switched", "watched", "full_vae", "remade", "own_level", "shots")


@cache
def whole_state(name: str) -> Path:
    return save_state(made(name)[1], Path(mkdtemp()) / f"{name}.whole")


@cache
def whole_absorptions() -> dict[str, tuple[Path, object]]:
    folder = Path(mkdtemp())
    return {
        name: (save_solution(solution, spec.absorption, {"model": "a"}, folder / f"{name}.whole"), spec)
        for name, spec, solution in solutions()
    }


def harmed(whole: Path, target: Path, chance) -> str:
    """By structure, by bytes, or both; half of them without checksums, as files of before."""
    what = mutated(whole, target, chance) if chance.random() < 0.6 else "bytes"
    if what == "bytes":
        target.write_bytes(whole.read_bytes())
    if what == "bytes" or chance.random() < 0.15:
        data, how = damaged(target.read_bytes(), chance, head=0.8)
        target.write_bytes(data)
        what += f" {how}"
    return what


def test_hostile_states(campaign, tmp_path):
    for trial in campaign("hostile states", full=200, sample=6):
        with trial:
            chance = trial.chance
            name = chance.choice(_BOTH if trial.number % 2 else sorted(CASES))
            target = tmp_path / "m.state.safetensors"
            what = f"{name}: {harmed(whole_state(name), target, chance)}"

            def door(target=target, name=name) -> None:
                kept_frames(target.parent, ".")
                state = load_state(target)
                assert state_chunk(target) == state.next_chunk
                spec = made(name)[0]
                if not spec.differences(state.spec):
                    list(go_on(spec, state).chunks(state.emitted + 3))

            seen = tried(door, tmp_path, what, (target.name,))
            trial.saw(seconds=round(seen.seconds, 2), MB=round(seen.megabytes))


def test_hostile_absorptions(campaign, tmp_path):
    for trial in campaign("hostile absorptions", full=200, sample=6):
        with trial:
            name = trial.chance.choice(sorted(whole_absorptions()))
            (whole, spec), target = whole_absorptions()[name], tmp_path / "m.absorption.safetensors"
            what = f"{name}: {harmed(whole, target, trial.chance)}"

            def door(spec=spec, target=target) -> None:
                settings, belongs_to, state = load_solution(target)
                assert isinstance(belongs_to.get("solved_for", {}), dict)
                sizes, told = spec.geometry, ""
                try:
                    solution_from(state, settings, sizes.layers, sizes.heads * sizes.head_dim, sizes.heads)
                except ValueError as error:  # the node puts the file's name in front
                    told = f"{target.name}: {error}"
                if told:
                    raise ValueError(told)

            seen = tried(door, tmp_path, what, (target.name,))
            trial.saw(seconds=round(seen.seconds, 2), MB=round(seen.megabytes))


def _table(folder: Path, chance):
    path, what = manifests.table(folder, chance)
    return (
        what,
        lambda: [(row.graph, course_of(row.graph)) for row in read_manifest(path)],
        ("t.jsonl", "t.csv", "w.json"),
    )


def _preset(folder: Path, chance):
    path, what = manifests.preset(folder, chance)
    return what, lambda: read_preset(path).settings(), (path.name,)


def _books(folder: Path, chance):
    manifest = folder / "t.jsonl"
    (folder / "w.json").write_text(json.dumps(manifests.WORKFLOW))
    manifest.write_text('{"name": "a", "workflow": "w.json"}\n{"name": "b", "workflow": "w.json"}')
    rows, own = read_manifest(manifest), folder / "books"

    def write(place: Path) -> None:
        made_books = Books(place)
        for row in rows:
            made_books.begin(row, "w0", "cpu", 1)
        made_books.result({"name": "a", "outcome": "finished", "digest": rows[0].digest, "seconds": 3.0})

    own.mkdir()
    what = manifests.books(own, chance, write)

    def door() -> None:
        read = Books(own)
        read.take_records([{"name": "b", "outcome": "failed"}])
        assert len(read.unfinished(rows)) <= 2
        for row in rows:
            folder_name = read.folder_of(row)
            assert folder_name.startswith(row.name) and "/" not in folder_name
        Lines(own / "results.jsonl").read()

    return what, door, ()


def _driver(folder: Path, chance):
    """The file by which a driver holds a batch's folder. One that says nothing is taken over from once it is old."""
    what = manifests.lied(
        {"machine": socket.gethostname(), "pid": 2**22 + 5, "id": "ab"}, folder / "driver.json", chance
    )
    os.utime(folder / "driver.json", (1, 1))

    def door() -> None:
        with OneDriver(folder):
            pass

    return what, door, ()


def _environment(folder: Path, chance):
    """A runtime environment in YAML, for a fleet's workers."""
    path = folder / "env.yaml"
    what = manifests.lied({"env_vars": {"A": "1"}, "working_dir": "a"}, path, chance)
    if chance.random() < 0.3:
        path.write_bytes(
            chance.choice(
                [b"a: &a [*a]", b"!!python/object/apply:os.system [true]", b"- a\n- b", b"\xff", b"a: [", b"5: 6"]
            )
        )

    def door() -> None:
        try:
            read_yaml_table(path)
        except ValueError as error:  # the caller puts the file's name in front
            raise ValueError(f"env.yaml cannot be read as a runtime environment: {error}") from error

    return what, door, ("env.yaml",)


def _report(folder: Path, chance):
    own = folder / "row"
    own.mkdir()
    what = manifests.lied(manifests.REPORT, own / "a.report.json", chance)
    graph = manifests.WORKFLOW

    def door() -> None:
        list(reports(own))
        report_of(own, "x")
        begun(graph, course_of(graph), folder, "row")

    return what, door, ()


def _sequence(folder: Path, chance):
    own = folder / "old.frames"
    own.mkdir()
    what = manifests.lied(manifests.SEQUENCE, own / "sequence.json", chance)
    for number in range(3):
        (own / frame_name(number, "png")).write_bytes(b"a picture")
    wanted = FrameSequence("new", "png", 16, 16, str(Fraction(16)), 0)

    def door() -> None:
        told = read_sequence(own)
        if told is None or told.refused(wanted):
            return
        if (missing := missing_frame(own, told, 3)) == "":
            (folder / "new.frames").mkdir()
            FrameFolder(folder / "new.frames", wanted, {}, own, 3).close()
        assert len(missing) < 300

    return what, door, ()


def test_hostile_manifests(campaign, tmp_path):
    kinds = (_table, _table, _preset, _preset, _books, _driver, _environment, _report, _sequence)
    for trial in campaign("hostile manifests: tables, workflows, presets, books, reports, frames", full=200, sample=9):
        with trial:
            folder = tmp_path / str(trial.number)
            folder.mkdir()
            kind = kinds[trial.number % len(kinds)]
            what, door, names = kind(folder, trial.chance)
            seen = tried(door, folder, f"{kind.__name__} {what}", names)
            trial.saw(seconds=round(seen.seconds, 2), MB=round(seen.megabytes))


def test_the_cell_sees_what_no_file_may_bring_about(tmp_path):
    import os

    def grow() -> None:
        torch.ones(2**29 + 2**27).sum()  # 2.5 GB

    def fails(door) -> str:
        with pytest.raises(AssertionError) as told:
            tried(door, tmp_path, "a door", ("f.mp4",))
        return str(told.value)

    tried(lambda: None, tmp_path, "a door")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hostile.cell.SECONDS", 0.2)
        patch.setattr("hostile.cell.PATIENCE", 500)
        assert "SIGPROF" in fails(lambda: [None for _ in iter(int, 1)])
        patch.setattr("hostile.cell.PATIENCE", 5)
        assert "SIGALRM" in fails(lambda: time.sleep(99))
    assert "SIGSEGV" in fails(lambda: os.kill(os.getpid(), 11))
    assert "os.system" in fails(lambda: os.system("true"))
    assert "no file may bring about" in fails(lambda: (tmp_path.parent / "outside").write_text("a"))
    assert "MB" in fails(grow)
    (tmp_path / "inside").write_text("a")
    assert "KeyError" in fails(lambda: {}["f.mp4"])
    with pytest.raises(AssertionError):
        check("ValueError", "f.mp4 gave a TypeError", ("f.mp4",), "")
