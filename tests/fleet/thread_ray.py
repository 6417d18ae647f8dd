"""What the driver asks of Ray, played with threads of this process: for tests in which no process has to die."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import ray

exceptions = ray.exceptions


class _Method:
    def __init__(self, pool: concurrent.futures.Executor, method: Any) -> None:
        self._pool, self._method = pool, method

    def options(self, **_: Any) -> _Method:
        """As it is: a thread does not die."""
        return self

    def remote(self, *given: Any) -> concurrent.futures.Future:
        return self._pool.submit(self._method, *given)


class Actor:
    """Calls an object's methods in threads, as an actor with as many does."""

    def __init__(self, held: Any) -> None:
        self._held, self._pool = held, concurrent.futures.ThreadPoolExecutor(4)

    def end(self) -> None:
        """The worker's host dies, so that no thread waits for it any more."""
        if self._held._host is not None:
            self._held._host.end()

    def __getattr__(self, name: str) -> _Method:
        return _Method(self._pool, getattr(self._held, name))


def wait(refs: list[Any], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
    """As ray.wait; at once when the first one is there."""
    when = concurrent.futures.FIRST_COMPLETED
    done, left = concurrent.futures.wait(refs, timeout, return_when=when)
    return [ref for ref in refs if ref in done], [ref for ref in refs if ref in left]


def get(ref: concurrent.futures.Future) -> Any:
    """As ray.get: what a method raised is inside a RayTaskError."""
    try:
        return ref.result()
    except Exception as error:
        raise exceptions.RayTaskError("method", "traceback", error) from error
