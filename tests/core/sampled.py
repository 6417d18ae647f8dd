"""A pytest plugin: of tests with very many alike cases the suite runs a sample; `run.py test --all-cases` runs them all.

`@pytest.mark.sampled(n)` on a parametrized test keeps every n-th of its cases, beginning with the one whose number the environment
variable ADASTATE_CASES holds (0 without it, counted round), so that another number runs others. "all" keeps all. A mark beside it,
`offset`, moves one test's sample against another's where two walk the same list.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

WISH = os.environ.get("ADASTATE_CASES", "0")


def kept(number: int, n: int, offset: int = 0, wish: str = WISH) -> bool:
    """Whether the case of this number, from 0, is in a sample of every n-th. ValueError for a wish that is no whole number."""
    return wish == "all" or (number - offset - int(wish)) % n == 0


def pytest_configure(config) -> None:
    config.addinivalue_line(
        "markers", "sampled(n, offset=0): the suite runs every n-th case, see tests/core/sampled.py"
    )


@pytest.hookimpl(trylast=True)  # of those that -k leaves
def pytest_collection_modifyitems(config, items) -> None:
    cases = Counter(_test_of(item) for item in items)
    seen, out, left = Counter(), [], []
    for item in items:
        mark, name = item.get_closest_marker("sampled"), _test_of(item)
        runs = mark is None or cases[name] == 1 or kept(seen[name], *mark.args, **mark.kwargs)
        (left if runs else out).append(item)
        seen[name] += 1
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = left


def _test_of(item) -> tuple:
    """What is the same for all cases of a test."""
    return item.path, getattr(item, "originalname", item.name)
