"""Six hundred calls of the pack's routes that no page makes: answered or refused, and the server goes on."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from route_fuzz import a_call, ask, check_answer


@pytest.mark.parametrize("seed", [1, 2])
def test_no_call_breaks_a_route(client, seed):
    seen: Counter[int] = Counter()
    for number in range(300):
        what, sent, whole = a_call(random.Random(1_000_003 * seed + number))
        status, body = ask(client.server.port, sent, whole)
        assert status or not whole, (seed, number, what)
        check_answer(f"{seed} {number} {what}", status, body)
        seen[status] += 1
    assert seen[200] > 5 and seen[400] > 15, seen
    assert client.server.request("/adastate/timeline", {"text": "0s a\n5s b"})["grammar"] == "lines"
