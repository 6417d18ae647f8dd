"""`run.py campaign`: which parts it runs and how, and the table that it writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import run
from tools import campaign
from tools.setup_host import Host

PAGE = f"# Words\n\n{campaign.BEGIN}\n| part | what was tried |\n| --- | --- |\n{campaign.END}\n\nMore | words.\n"


@pytest.fixture
def parts(tmp_path, monkeypatch) -> list[str]:
    """Three files of two parts, a page, and a cache; the list is of the pytest processes that are started, which keep nothing."""
    for name in ("core/test_campaign_kills.py", "api/test_campaign_kills.py", "core/test_campaign_files.py"):
        (path := tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "tests" / "core" / "test_campaign.py").write_text("")
    started: list[str] = []

    def layer(layer: run.Layer, host: Host, arguments: list[str]) -> tuple[bool, tuple[int, int, int], str]:
        started.append(f"{layer.folder}/{layer.files[0]}")
        return "broken" not in os.environ.get("ADASTATE_CAMPAIGN_ONLY", ""), (1, 0, 0), ""

    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(run, "run_layer", layer)
    monkeypatch.setattr(run, "ensure_ready", lambda modules: Host(tmp_path, Path("python")))
    monkeypatch.setattr(campaign, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in [name for name in os.environ if name.startswith("ADASTATE_")]:
        del os.environ[name]
    campaign.PAGE.write_text(PAGE)
    return started


def line(number: int, held: bool = True, kind: str = "a kill", seed: int = 0, **seen: float) -> str:
    return json.dumps({"kind": kind, "number": number, "seed": seed, "held": held, "seconds": 1.5, "seen": seen})


def keep(folder: Path, part: str, *lines: str) -> Path:
    (path := folder / "cache" / "campaign" / f"{part}.jsonl").parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(each + "\n" for each in lines))
    return path


def test_all_parts_run_or_those_that_are_named(parts, tmp_path):
    both = ["api/test_campaign_kills.py", "core/test_campaign_kills.py"]
    assert run.main(["campaign"]) == 0 and parts == [*both, "core/test_campaign_files.py"]
    parts.clear()
    assert run.main(["campaign", "kills", "--seed", "3"]) == 0 and parts == both
    assert os.environ["ADASTATE_CAMPAIGN"] == str(tmp_path / "cache" / "campaign")
    assert os.environ["ADASTATE_CAMPAIGN_SEED"] == "3" and "ADASTATE_CAMPAIGN_ONLY" not in os.environ


def test_an_unknown_part_is_named_with_those_there_are(parts, capsys):
    assert run.main(["campaign", "kils"]) == 2 and parts == []
    assert "There is no part kils; there are: kills, files." in capsys.readouterr().out


def test_one_trial_alone_leaves_books_and_table_as_they_are(parts, tmp_path, monkeypatch, capsys):
    books = keep(tmp_path, "kills", line(0))
    asked = lambda *only: run.main(["campaign", "kills", "--fresh", "--only", *only])  # noqa: E731
    layer = run.run_layer

    def tells(*arguments: object) -> tuple:
        with Path(os.environ["ADASTATE_CAMPAIGN_KINDS"]).open("a") as file:
            file.write('["a kill", 5]\n["a broken one", 5]\n')
        return layer(*arguments)

    monkeypatch.setattr(run, "run_layer", tells)
    assert asked("a kill 4") == 0 and "ADASTATE_CAMPAIGN" not in os.environ
    assert os.environ["ADASTATE_CAMPAIGN_ONLY"] == "a kill 4" and asked("a broken one 1") == 1
    assert books.is_file() and campaign.PAGE.read_text() == PAGE
    capsys.readouterr()
    assert asked("a kill 5") == 2 and "There is no trial 5 of 'a kill'; there are 0 to 4." in capsys.readouterr().out
    assert asked("a fall 0") == 2
    assert (
        "There is no kind of trials 'a fall' in what ran; there are: 'a kill', 'a broken one'"
        in capsys.readouterr().out
    )
    parts.clear()
    for words in ("a kill", "7", "a kill x", " 7"):
        assert asked(words) == 2 and "it takes a trial as a failure names it" in capsys.readouterr().out
    assert parts == []


def test_fresh_forgets_what_a_part_left(parts, tmp_path):
    kills, files = keep(tmp_path, "kills", line(0)), keep(tmp_path, "files", line(0))
    assert run.main(["campaign", "kills"]) == 0 and kills.is_file()
    assert run.main(["campaign", "kills", "--fresh"]) == 0 and not kills.exists() and files.is_file()


def test_a_part_that_fails_fails_the_command_and_the_others_run(parts, tmp_path, monkeypatch):
    layer = run.run_layer
    monkeypatch.setattr(run, "run_layer", lambda *arguments: (len(parts) > 0, *layer(*arguments)[1:]))
    keep(tmp_path, "kills", line(0))
    assert run.main(["campaign"]) == 1 and len(parts) == 3
    assert "| kills | a kill | 1 | 1 |" in campaign.PAGE.read_text()


def test_a_parts_lines_are_replaced_and_those_of_others_stay(parts, tmp_path):
    keep(tmp_path, "kills", line(0, frames=3), line(1, False, frames=1234567), line(0, kind="a fall"))
    keep(tmp_path, "files", line(0, kind="a file"))
    assert run.main(["campaign"]) == 0
    keep(tmp_path, "kills", line(0), line(1))
    keep(tmp_path, "files")
    assert "| kills | a kill | 2 | 1 | 3 s | frames 3 to 1,234,567 |\n| kills | a fall |" in campaign.PAGE.read_text()
    assert run.main(["campaign", "kills"]) == 0
    page = campaign.PAGE.read_text()
    head, rule, *rows = [row for row in page.splitlines() if row.startswith("| ")]
    assert (
        head == "| part | what was tried | tried | held | time | seen |"
        and rule == "| --- | --- | --- | --- | --- | --- |"
    )
    assert rows == [
        "| files | a file | 1 | 1 | 2 s |  |",
        "| kills | a kill | 2 | 2 | 3 s |  |",
    ]
    before, after = PAGE.split(campaign.BEGIN)[0], PAGE.split(campaign.END)[1]
    assert page.startswith(before) and page.endswith(after)
    again = campaign.written(page, "kills", rows[1:])
    assert again == page, "written anew it is the same"


def test_the_last_word_on_a_trial_counts_and_other_seeds_and_cut_lines_do_not():
    lines = [line(0, False, a=1), line(1), line(0, a=4), line(2, seed=1), line(7)[:-20]]
    assert campaign.rows("kills", lines, 0) == ["| kills | a kill | 2 | 2 | 4 s | a 1 to 4 |"]
    assert campaign.rows("kills", lines[:2], 0) == ["| kills | a kill | 2 | 1 | 3 s | a 1 |"]


def test_a_page_without_the_tables_marks_is_refused():
    with pytest.raises(ValueError, match="lacks the marks"):
        campaign.written("# Words", "kills", [])


def test_the_repositorys_own_page_and_parts():
    page = (run.ROOT / "docs" / "campaign.md").read_text(encoding="utf-8")
    assert campaign.written(page, "no part", []) == page
    assert {path.parent.name for paths in campaign.parts(run.ROOT / "tests").values() for path in paths} <= {
        "core",
        "host",
        "api",
    }
