"""What is shown: a bar's numbers and a line a worker, on a terminal and without one."""

from __future__ import annotations

import io

from rich.console import Console

from fleet import progress
from fleet.progress import Seen, Shown


def seen() -> Seen:
    found = Seen(frames=400, rows=4, done=100, finished=1, bad=1)
    found.under_way = {"worker 0": [("lake", 50.4, 100)], "worker 10": [], "worker 2": []}
    found.waits = {"worker 2": "starts"}
    return found


def test_a_line_a_worker_in_their_order():
    assert seen().lines() == ["worker 0: lake 50 of 100 frames", "worker 2: starts", "worker 10: waits"]
    assert seen().now == 150.4


def test_without_a_terminal_a_line_now_and_then(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    found = seen()
    with Shown(found) as shown:
        shown.update()
        clock[0] += 5
        shown.update()
        found.done, clock[0] = 200, clock[0] + 15
        shown.update()
        shown.say("a sentence")
    first, second, said = capsys.readouterr().out.splitlines()
    assert first.startswith("[0 s] 150 of 400 frames; 1 of 4 rows finished, 1 not; worker 0: lake 50 of 100 frames")
    assert second.startswith("[20 s] 250 of 400 frames, 5.0 frames/s, 30 s left;") and said == "a sentence"


def test_on_a_terminal_one_bar_and_the_workers_below_it(monkeypatch):
    drawn = io.StringIO()
    monkeypatch.setattr(
        progress, "Console", lambda **_: Console(file=drawn, force_terminal=True, width=120, height=30, _environ={})
    )
    with Shown(seen()) as shown:
        shown.update()
        shown.say("a sentence")
    text = drawn.getvalue()
    assert "150 of 400 frames" in text and "frames/s, 1 of 4 rows finished, 1 not" in text
    assert text.rindex("worker 0: lake 50 of 100 frames") < text.rindex("worker 10: waits") and "a sentence" in text


def test_quiet_says_nothing(capsys):
    with Shown(seen(), quiet=True) as shown:
        shown.update()
        shown.say("a sentence")
    assert capsys.readouterr().out == ""
