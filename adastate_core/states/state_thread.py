"""Writing beside a rollout: a thread for what is written now, and none when nothing is."""

from __future__ import annotations

import threading
from collections.abc import Callable

NAME = "adastate states"


class StateThread:
    """Runs one piece of work after the other, each in a thread that ends with it: never two at a time, and none is left behind.

    Work is expected to deal with its own failures. What it raises all the same (an interrupt) is raised by the next `look`,
    `run` or `wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether work is under way."""
        return self._thread is not None and self._thread.is_alive()

    def look(self) -> None:
        """Raise what the work before raised, if that is over."""
        if not self.busy:
            self.wait()

    def run(self, work: Callable[[], None]) -> None:
        """Wait for the work before, then start this. Where no thread can be started, do it here."""
        self.wait()
        thread = threading.Thread(target=self._guarded, args=(work,), name=NAME, daemon=True)
        try:
            thread.start()
        except Exception:  # noqa: BLE001  the system has no thread for us
            work()
        else:
            self._thread = thread

    def wait(self) -> None:
        """Until no work is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  told in the rollout's thread
            self._raised = error
