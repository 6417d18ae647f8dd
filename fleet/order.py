"""Which row is next: the longest first, rows that share a model on one worker, rows that go on before all others."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from .manifest import Row


@dataclass(frozen=True)
class Needs:
    """What a row that waits again asks of its worker. `avoid`: the worker that it was lost on. `device`: the kind that it has to
    be, or empty. `above`: bytes of memory of a worker that it did not fit on."""

    avoid: Hashable = None
    device: str = ""
    above: int = -1


class Order:
    """Rows that wait. Taking one costs the same however many there are: O(log n), and O(number of workers) for a change of
    model."""

    def __init__(self, rows: list[Row]) -> None:
        self._groups: dict[str, list[Row]] = defaultdict(list)
        self._work: dict[str, int] = defaultdict(int)
        self._again: dict[Needs, deque[Row]] = {}
        self._held: dict[Hashable, str] = {}  # the model that a worker has
        self._on: dict[str, int] = defaultdict(int)  # how many workers have a model
        for row in sorted(rows, key=lambda row: (row.work, -row.line)):
            self._groups[row.model].append(row)
            self._work[row.model] += row.work
        # models that no worker has had yet, the most work first
        self._fresh = [(-work, model) for model, work in self._work.items()]
        heapq.heapify(self._fresh)
        self._count = len(rows)

    def __len__(self) -> int:
        return self._count

    def put_again(self, row: Row, needs: Needs) -> None:
        """A row that was taken waits again."""
        self._again.setdefault(needs, deque()).append(row)
        self._count += 1

    def waiting_for(self) -> list[tuple[Needs, int]]:
        """What rows that wait again ask for, and how many do."""
        return [(needs, len(rows)) for needs, rows in self._again.items() if rows]

    def take_all(self, wanted: Callable[[Needs], bool]) -> list[Row]:
        """All rows that wait again and ask for something."""
        found = [row for needs in [*self._again] if wanted(needs) for row in self._again.pop(needs)]
        self._count -= len(found)
        return found

    def take(self, worker: Hashable, suits: Callable[[Needs], bool]) -> Row | None:
        """The next row for a worker; `suits` says whether it is what a row that waits again asks for."""
        for needs, rows in self._again.items():
            if rows and suits(needs):
                self._count -= 1
                row = rows.popleft()
                if not rows:
                    del self._again[needs]
                return row
        model = self._model_for(worker)
        if model is None:
            return None
        row = self._groups[model].pop()
        self._work[model] -= row.work
        self._count -= 1
        return row

    def leave(self, worker: Hashable) -> None:
        """A worker is gone; what it held is nobody's."""
        model = self._held.pop(worker, None)
        if model is not None:
            self._on[model] -= 1
            if not self._on[model] and self._groups[model]:
                heapq.heappush(self._fresh, (-self._work[model], model))

    def _model_for(self, worker: Hashable) -> str | None:
        """The model that a worker has while there are rows of it; else one that nobody has; else that with the most work for each
        worker that has it."""
        held = self._held.get(worker)
        if held is not None and self._groups[held]:
            return held
        self.leave(worker)
        model = None
        while self._fresh and model is None:
            _, found = heapq.heappop(self._fresh)
            model = found if self._groups[found] and not self._on[found] else None
        if model is None:
            shared = [each for each in set(self._held.values()) if self._groups[each]]
            model = max(shared, key=lambda each: (self._work[each] / (self._on[each] + 1), each), default=None)
        if model is not None:
            self._held[worker] = model
            self._on[model] += 1
        return model
