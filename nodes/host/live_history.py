"""What a page that comes late can ask for: the numbers and thumbnails of at most 240 chunks, and the newest pictures."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

MOST_CHUNKS = 240
NEWEST_PICTURES = 24
_PICTURES = ("thumbnail", "hidden")


class History:
    """Bounded: when it is full every second chunk is dropped, so that what stays is spread over the whole run."""

    def __init__(self, most: int = MOST_CHUNKS) -> None:
        self.outcome: str | None = None
        self._most, self._stride = most, 1
        self._chunks: dict[int, dict[str, Any]] = {}
        self._pictures: deque[dict[str, Any]] = deque(maxlen=NEWEST_PICTURES)
        self._lock = threading.Lock()

    @property
    def newest(self) -> dict[str, Any] | None:
        """The numbers of the newest chunk, without its thumbnails."""
        with self._lock:
            if not self._chunks:
                return None
            return {key: value for key, value in self._chunks[max(self._chunks)].items() if key not in _PICTURES}

    def add(self, numbers: dict[str, Any]) -> None:
        """Numbers of a chunk; `numbers["chunk"]` counts from 0."""
        with self._lock:
            entry = self._chunks.setdefault(numbers["chunk"], {})
            entry |= numbers
            self._thin()

    def add_pictures(self, chunk: int, pictures: list[dict[str, Any]], hidden: str | None = None) -> None:
        """Pictures {"frame", "url"} of a chunk; the last one is its thumbnail. `hidden` is one of its hidden state."""
        with self._lock:
            if hidden and chunk in self._chunks:
                self._chunks[chunk]["hidden"] = hidden
            if pictures and chunk in self._chunks:
                self._chunks[chunk]["thumbnail"] = pictures[-1]["url"]
            self._pictures.extend({"chunk": chunk} | picture for picture in pictures)

    def drop_from(self, chunk: int) -> None:
        """Forget the chunks from number `chunk` on, and their pictures."""
        with self._lock:
            self._chunks = {number: told for number, told in self._chunks.items() if number < chunk}
            kept = [picture for picture in self._pictures if picture["chunk"] < chunk]
            self._pictures = deque(kept, maxlen=NEWEST_PICTURES)

    def _thin(self) -> None:
        """The newest chunk always stays; the one it follows goes if its number is not among those that are kept."""
        newest = max(self._chunks)
        while True:
            for chunk in [n for n in self._chunks if n % self._stride and n != newest]:
                del self._chunks[chunk]
            if len(self._chunks) <= self._most:
                return
            self._stride *= 2

    def describe(self) -> dict[str, Any]:
        """JSON-able: `chunks` in order, each with a `thumbnail` and a `hidden` if there are, and the newest `pictures`."""
        with self._lock:
            return {
                "chunks": [dict(self._chunks[n]) for n in sorted(self._chunks)],
                "pictures": list(self._pictures),
            }
