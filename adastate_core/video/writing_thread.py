"""Work that is done in order in a thread beside whoever gives it, at most two pieces behind."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

log = logging.getLogger("adastate")
Item = TypeVar("Item")
_LOOKS = 1.0  # seconds between two looks, while there is nothing to do, whether the process is ending


class WritingThread(Generic[Item]):
    """Calls `work` with the items that it is given, in order: one may be under way and one waits, a third waits to be given.

    After an item whose work failed nothing more is done; whoever waits is told by that very exception. The thread is no daemon:
    it starts with the first item and ends with `end`, or when the process ends and nothing is left. Where none can be started,
    items are worked on by whoever gives them.
    """

    def __init__(self, work: Callable[[Item], None], name: str) -> None:
        self._work, self._name = work, name
        self._changed = threading.Condition()
        self._left: deque[Item] = deque()
        self._thread: threading.Thread | None = None
        # no thread works, so whoever waits does
        self._alone, self._ending = False, False
        self.failure: BaseException | None = None

    @property
    def left(self) -> list[Item]:
        """What was given and is not done, oldest first; after a failure the item that failed and those behind it."""
        with self._changed:
            return list(self._left)

    @property
    def runs(self) -> bool:
        """Whether there is a thread that has not ended."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, most: int) -> None:
        """Until at most `most` items are left. Raises what an item's work has raised."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or self._alone or len(self._left) <= most)
        while self._alone and self.failure is None and len(self._left) > most:
            self._do()
        if self.failure is not None:
            raise self.failure

    def give(self, item: Item) -> None:
        """Have an item worked on, once no more than one is left. Raises what an item's work has raised; the item was taken only if
        it is among `left` then."""
        self.wait(1)
        self._start()
        with self._changed:
            self._left.append(item)
            self._changed.notify_all()
        if self._alone:
            self.wait(0)

    def end(self) -> None:
        """Wait until what was given is done, or has failed, and the thread with it."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def _start(self) -> None:
        if self._thread is not None or self._alone:
            return
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=False)
        try:
            self._thread.start()
        except Exception as error:  # noqa: BLE001  a system that has no more threads
            self._thread, self._alone = None, True
            log.warning("%s could not be started, so frames are encoded between two chunks: %s", self._name, error)
        except BaseException:
            self._ending = True  # it may have started all the same
            raise

    def _run(self) -> None:
        while self._comes():
            self._do()

    def _comes(self) -> bool:
        """Wait for an item; False when none will come."""
        with self._changed:
            while not self._left and not self._ending and threading.main_thread().is_alive():
                self._changed.wait(_LOOKS)
            if self._left and self.failure is None:
                return True
            self._alone = True
            self._changed.notify_all()
            return False

    def _do(self) -> None:
        """The oldest item's work."""
        try:
            self._work(self._left[0])
        except BaseException as error:  # noqa: BLE001  whoever waits raises it
            failure = error
        else:
            failure = None
        with self._changed:
            if failure is None:
                self._left.popleft()
            self.failure = failure
            self._changed.notify_all()
