"""The table: what a row says, and that every faulty line is told before anything is begun."""

from __future__ import annotations

import json

import pytest
from tables import LONG, rows_of, table

from fleet.errors import FleetError
from fleet.manifest import read_manifest


def refusal(path) -> str:
    with pytest.raises(FleetError) as told:
        read_manifest(path)
    return str(told.value)


def test_values_are_set_and_the_workflow_stays_as_it_is(tmp_path):
    first, second = rows_of(tmp_path, {"5.seed": 11, "5.length": 97, "4.codec": "ffv1"}, {})
    inputs = json.loads(LONG.read_text())["5"]["inputs"]
    assert first.graph["5"]["inputs"] == inputs | {"seed": 11, "length": 97}
    assert first.graph["4"]["inputs"]["codec"] == "ffv1" and second.graph["5"]["inputs"] == inputs
    assert (first.frames, second.frames) == (97, 513) and first.work == 97 * 64 * 64
    assert first.model == second.model and first.digest != second.digest


def test_a_csv_means_the_same_as_jsonl(tmp_path):
    (tmp_path / "a.csv").write_text(
        f"name,workflow,5.seed,5.length,3.balloon,4.join,5.width\nv1,{LONG},11,97,crimson,TRUE,\n"
    )
    (row,) = read_manifest(tmp_path / "a.csv")
    same = {"5.seed": 11, "5.length": 97, "3.balloon": "crimson", "4.join": True}
    assert row.graph == rows_of(tmp_path, same)[0].graph and row.digest == rows_of(tmp_path, same)[0].digest


def test_text_stays_text_in_a_csv(tmp_path):
    (tmp_path / "a.csv").write_text(f'name,workflow,3.balloon\n007,{LONG},"12, ""x"""\n')
    (row,) = read_manifest(tmp_path / "a.csv")
    assert row.name == "007" and row.values == {"3.balloon": '12, "x"'}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"name": "../up"}, "its name is '../up'; a name has up to 100 letters"),
        ({"name": ""}, "its name is ''"),
        ({"name": "a/b"}, "its name is 'a/b'"),
        ({"name": "ends."}, "its name is 'ends.'"),
        ({"name": None}, "its name is missing"),
        ({"workflow": "absent.json"}, "there is no workflow absent.json; its path counts from the table's folder"),
        ({"workflow": 3}, "it names no workflow"),
        ({"9.seed": 1}, "9.seed: long_video.json has no node 9; it has 1, 2, 3, 4, 5"),
        ({"seed": 1}, "'seed' says no place; columns are name, workflow, and NODE.INPUT such as 5.seed"),
        ({"5.seed": "one"}, '5.seed is "one"; it must be a number, as 7 is'),
        ({"5.length": True}, "5.length is true; it must be a number, as 513 is"),
        ({"4.join": 1}, "4.join is 1; it must be a switch (true or false), as false is"),
        ({"4.codec": 4}, '4.codec is 4; it must be a text, as "h264" is'),
        ({"5.length": 0}, "5.length is 0, a video without an end; give a length, or 5.max_seconds"),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path, row, told):
    said = refusal(table(tmp_path, [{}, row]))
    assert said.startswith("batch.jsonl was not begun:\nline 2: ") and told in said


def test_all_bad_lines_are_told_at_once_and_at_most_twenty(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"name": "x"\n\n[1]\n' + '{"name": "y"}\n' * 30)
    said = refusal(path).splitlines()
    assert said[1].startswith("line 1: it is not JSON") and said[2] == "line 3: it must be a JSON object, {...}"
    assert len(said) == 22 and said[-1] == "and 12 more"


def test_a_name_is_given_once(tmp_path):
    assert "line 2: the name 'V1' is that of line 1" in refusal(table(tmp_path, [{}, {"name": "V1"}]))


@pytest.mark.parametrize(
    ("text", "told"),
    [("{}", "is not a workflow in API form"), ('{"nodes": []}', "save it with Export (API)"), ("[", "cannot be read")],
)
def test_a_file_that_is_no_workflow_is_told(tmp_path, text, told):
    (tmp_path / "w.json").write_text(text)
    assert told in refusal(table(tmp_path, [{"workflow": "w.json"}]))


def test_a_csv_row_with_too_many_or_too_few_cells_is_told(tmp_path):
    (tmp_path / "a.csv").write_text(f"name,workflow\na,{LONG},3\nb\n")
    assert refusal(tmp_path / "a.csv").count("it must have 2 cells, as the first line has") == 2


@pytest.mark.parametrize(("name", "text"), [("a.txt", "x"), ("a.jsonl", "\n"), ("a.csv", "name,workflow\n")])
def test_a_table_without_rows_or_of_another_kind_is_told(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert refusal(tmp_path / name).startswith(name)
