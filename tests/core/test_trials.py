"""The plugin that gives out the campaign's trials: what is tried again, what is kept of it, which ones the suite runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from campaign import Books, Campaign

HERE = str(Path(__file__).resolve().parent)

PART = """
import os, pytest
def test_numbers(campaign):
    for trial in campaign("any number", full=6, sample=2):
        with trial:
            trial.saw(number=trial.number)
            if str(trial.number) == os.environ.get("KILLED"):
                os.kill(os.getpid(), 9)
            assert trial.number != 3 or "MENDED" in os.environ, "it is three"
def test_words(campaign):
    for trial in campaign("any word", full=2, sample=1):
        with trial:
            pass
"""


@pytest.fixture
def books(tmp_path):
    """What the part's trials left, as the next process finds it."""
    return lambda seed=0: Books(tmp_path / "kept" / "part.jsonl", seed)


def tried(campaign: Campaign, held=lambda trial: True, full: int = 5, kind: str = "a thing") -> list[int]:
    """The numbers that are given out; those for which `held` is false fail."""
    numbers = []
    for trial in campaign(kind, full=full, sample=2):
        numbers.append(trial.number)
        with trial:
            assert held(trial)
    return numbers


def test_it_goes_on_where_it_was_stopped_and_tries_again_what_failed(books):
    for trial in Campaign(books(), 0)("a thing", full=5, sample=1):
        if trial.number == 3:
            break
        with trial:
            assert trial.number != 1, "one"
    assert tried(Campaign(books(), 0), lambda trial: trial.number != 4) == [1, 3, 4]
    assert tried(Campaign(books(), 0)) == [4] and tried(Campaign(books(), 0)) == []
    assert tried(Campaign(books(1), 1)) == [0, 1, 2, 3, 4], "another seed's are others"
    assert tried(Campaign(books(), 0), kind="another thing", full=2) == [0, 1]


def test_the_last_word_on_a_trial_counts(books):
    tried(Campaign(books(), 0))
    file = books().path
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, json.dumps(json.loads(lines[2]) | {"held": False})]) + "\n")
    assert tried(Campaign(books(), 0)) == [2]


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_line_that_a_kill_cut_short_is_tried_again_and_spoils_no_other(books, cut):
    """Also one that lacks nothing but its end."""
    tried(Campaign(books(), 0), full=3)
    file, whole = books().path, books().path.read_bytes()
    last = whole.rindex(b'{"kind"')
    file.write_bytes(whole[: last + cut] if cut > 0 else whole[:cut])
    assert tried(Campaign(books(), 0), full=4) == ([2, 3] if cut > 0 else [3])
    assert tried(Campaign(books(), 0), full=4) == []


def test_each_trial_has_its_own_luck_the_same_every_time(books):
    def luck(seed: int) -> dict[int, float]:
        return {trial.number: trial.chance.random() for trial in Campaign(None, seed)("a thing", full=9, sample=9)}

    assert luck(0) == luck(0) and len({*luck(0).values(), *luck(1).values()}) == 18
    [alone] = Campaign(books(), 0, "a thing 7")("a thing", full=9, sample=1)
    assert alone.chance.random() == luck(0)[7] and not list(Campaign(None, 0, "a thing 9")("a thing", full=9, sample=1))
    assert not list(Campaign(None, 0, "another 7")("a thing", full=9, sample=1))


def test_the_suite_runs_a_sample_that_is_spread():
    def numbers(full: int, sample: int) -> list[int]:
        return [trial.number for trial in Campaign(None, 0)("a thing", full=full, sample=sample)]

    assert numbers(200, 4) == [0, 50, 100, 150] and numbers(3, 3) == numbers(3, 8) == [0, 1, 2] and numbers(9, 0) == []


@pytest.mark.parametrize("what", ["raises nothing", "an assertion", "an error of a sentence"])
def test_a_failure_is_kept_with_its_words_and_all_fail_at_the_end(books, what):
    kept = books()
    for trial in Campaign(kept, 0)("a thing", full=2, sample=1):
        with trial:
            if what == "raises nothing":
                with pytest.raises(KeyError):
                    pass
            assert what != "an assertion", "it is one"
            raise OSError(5, "the disk is gone")
    lines = [json.loads(line) for line in kept.path.read_text().splitlines()]
    words = {"raises nothing": "DID NOT RAISE", "an assertion": "AssertionError: it is one"}.get(
        what, "the disk is gone"
    )
    assert [line["held"] for line in lines] == [False] * 2 and all(words in line["why"] for line in lines)
    assert len(kept.broken) == 2 and kept.broken[1].startswith("a thing 1: ")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, pytest.skip.Exception])
def test_what_ends_the_whole_test_is_no_word_on_the_trial(books, stop):
    with pytest.raises(stop):
        for trial in Campaign(books(), 0)("a thing", full=2, sample=1):
            with trial:
                raise stop
    assert tried(Campaign(books(), 0), full=2) == [0, 1]


def test_in_the_suite_a_failure_says_which_trial_it_was():
    for trial in Campaign(None, 4)("a thing", full=2, sample=1):
        with pytest.raises(AssertionError) as caught, trial:
            raise AssertionError("no")
        assert caught.value.__notes__ == ["campaign: seed 4, 'a thing', trial 0"]


def test_figures_of_numpy_are_kept_and_what_is_none_is_refused(books):
    for trial in Campaign(books(), 0)("a thing", full=2, sample=1):
        with trial:
            trial.saw(a=3, b=np.float32(0.5), c=np.int64(7))
            trial.saw(d="x" if trial.number else 1)
    lines = [json.loads(line) for line in books().path.read_text().splitlines()]
    assert lines[0]["seen"] == {"a": 3, "b": 0.5, "c": 7, "d": 1} and [line["held"] for line in lines] == [True, False]


@pytest.mark.parametrize("kind", ["a|b", "a\nb"])
def test_a_name_that_no_row_can_hold_is_refused(kind):
    with pytest.raises(ValueError, match="a row of the table cannot hold"):
        next(iter(Campaign(None, 0)(kind, full=1, sample=1)))


def test_a_whole_part_is_killed_goes_on_fails_at_its_end_and_holds_when_mended(tmp_path):
    (tmp_path / "test_campaign_part.py").write_text(PART)

    def run(**more: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-p", "campaign", "-p", "no:cacheprovider", "-q"]
        env = {key: value for key, value in os.environ.items() if not key.startswith("ADASTATE_")}
        env |= {"PYTHONPATH": HERE, "ADASTATE_CAMPAIGN_KINDS": str(tmp_path / "kinds")} | more
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout

    def told() -> list[int]:
        lines = [json.loads(line) for line in (tmp_path / "books" / "part.jsonl").read_text().splitlines()]
        return [line["number"] for line in lines if line["kind"] == "any number"]

    code, said = run()  # as in the suite: 0 and 3
    assert code == 1 and "campaign: seed 0, 'any number', trial 3" in said and not (tmp_path / "books").exists()
    kept = {"ADASTATE_CAMPAIGN": str(tmp_path / "books")}
    assert run(**kept, KILLED="2")[0] == -9 and told() == [0, 1]
    code, said = run(**kept)
    assert code == 1 and "1 trials did not hold" in said and "any number 3: AssertionError: it is three" in said
    assert run(**kept, MENDED="1")[0] == 0 and told() == [0, 1, 2, 3, 4, 5, 3]
    assert run(ADASTATE_CAMPAIGN_ONLY="any number 4")[0] == 0 and run(ADASTATE_CAMPAIGN_ONLY="any number 3")[0] == 1
    kinds = {line for line in (tmp_path / "kinds").read_text().splitlines()}
    assert kinds == {'["any number", 6]', '["any word", 2]'}
