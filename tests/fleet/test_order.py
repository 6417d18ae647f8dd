"""Which row a worker gets: against a plain search over all rows, and by what the order promises."""

from __future__ import annotations

import random

from tables import rows_of

from fleet.order import Needs, Order

ANY = lambda needs: True  # noqa: E731


def model(name: str) -> dict:
    return {"1.unet_name": name}


def test_the_longest_come_first_and_a_model_stays_on_its_worker(tmp_path):
    rows = rows_of(
        tmp_path, *({"5.length": n} | model(m) for m in ("a", "b") for n in ((9, 33, 21) if m == "a" else (97, 5)))
    )
    order = Order(rows)
    taken = [(worker, order.take(worker, ANY)) for worker in ("x", "y", "x", "y", "x", "y")]
    named = [(worker, row and (row.graph["1"]["inputs"]["unet_name"], row.frames)) for worker, row in taken]
    # b has the most work, so x begins with it; y takes the other model; when b is used up x helps with a
    assert named == [
        ("x", ("b", 97)),
        ("y", ("a", 33)),
        ("x", ("b", 5)),
        ("y", ("a", 21)),
        ("x", ("a", 9)),
        ("y", None),
    ]
    assert len(order) == 0


def test_every_row_is_taken_once_whatever_happens(tmp_path):
    drawn = random.Random(3)
    rows = rows_of(
        tmp_path, *({"5.length": drawn.randrange(1, 99)} | model(str(drawn.randrange(9))) for _ in range(200))
    )
    order, left, finished = Order(rows), len(rows), []
    while len(order):
        worker = drawn.randrange(5)
        if drawn.random() < 0.1:
            order.leave(worker)
        row = order.take(worker, lambda needs, worker=worker: needs.avoid != worker)
        if row is not None and drawn.random() < 0.3 and left < 900:
            order.put_again(row, Needs(avoid=worker))
            left += 1
        elif row is not None:
            finished.append(row.name)
    assert sorted(finished) == sorted(row.name for row in rows)


def test_with_one_model_the_longest_row_left_is_always_next(tmp_path):
    drawn = random.Random(1)
    rows = rows_of(tmp_path, *({"5.length": drawn.randrange(1, 999)} for _ in range(100)))
    order = Order(rows)
    taken = [order.take(number % 3, ANY).frames for number in range(100)]
    assert taken == sorted((row.frames for row in rows), reverse=True)


def test_a_row_that_waits_again_is_next_for_whom_it_suits(tmp_path):
    rows = rows_of(tmp_path, {"5.length": 99}, {"5.length": 9})
    order = Order(rows)
    lost = order.take("x", ANY)
    order.put_again(lost, Needs(avoid="x"))
    assert order.take("x", lambda needs: needs.avoid != "x").frames == 9
    assert order.take("x", lambda needs: needs.avoid != "x") is None and len(order) == 1
    assert order.take("y", lambda needs: needs.avoid != "y") is lost and len(order) == 0


def test_ten_thousand_rows_of_as_many_models_take_no_square_time(tmp_path):
    """The work is counted, not timed: so many comparisons of rows' models a row."""
    small, large = (_takes(tmp_path, count) for count in (500, 4000))
    assert large < 3 * small


def _takes(folder, count: int) -> float:
    """Steps of Python a row that taking all of them needs."""
    import sys

    rows = rows_of(folder / str(count), *(model(str(n)) for n in range(count)))
    order, steps = Order(rows), 0

    def step(*_):
        nonlocal steps
        steps += 1
        return step

    sys.settrace(step)
    try:
        while order.take("x", ANY) is not None:
            pass
    finally:
        sys.settrace(None)
    return steps / count
