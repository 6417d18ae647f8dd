"""A pytest plugin for layers that start servers: run.py, stopped, ends what it started with SIGTERM, and then servers are to be
stopped as after Ctrl-C. Without it pytest is gone at once, and what it started stays."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
