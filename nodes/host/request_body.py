"""JSON that a page sends: bounded before it is read, read off the event loop, and refused in a sentence where it is none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

MOST_BYTES = 4 * 2**20
_UTF8 = ("utf-8", "utf8", "us-ascii", "ascii")
# One at a time: whoever asks a thousand times waits, and neither the loop nor a rollout beside it does.
_WORKER = ThreadPoolExecutor(1, "adastate-routes")
_Answer = TypeVar("_Answer")


class BodyError(ValueError):
    """A body that cannot be answered, with the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


async def off_loop(work: Callable[..., _Answer], *arguments: Any) -> _Answer:
    """What `work` returns, computed in a thread of the routes' own."""
    return await asyncio.get_running_loop().run_in_executor(_WORKER, work, *arguments)


async def read_bytes(request: web.Request, most: int = MOST_BYTES) -> bytes:
    """The body, at most `most` bytes once unpacked; BodyError for a longer one, for one cut short, and for other encodings."""
    try:
        charset = (request.charset or "utf-8").lower()
    except ValueError:
        charset = "unreadable"
    if charset not in _UTF8:
        raise BodyError(f"charset is {charset[:40]!r}; send JSON as utf-8")
    if (request.content_length or 0) > most:
        raise BodyError(f"the body has {request.content_length} bytes; at most {most} are read", 413)
    body = bytearray()
    try:
        async for part in request.content.iter_any():
            body += part
            if len(body) > most:
                raise BodyError(f"the body has more than {most} bytes; no more are read", 413)
    except (ClientError, web.HTTPException, web.RequestPayloadError, HttpProcessingError, OSError) as error:
        raise BodyError("the body cannot be unpacked, or is cut off; send plain JSON") from error
    return bytes(body)


def parse_json(body: bytes, wanted: str) -> Any:
    """The value of a JSON body; BodyError, saying `wanted`, for one that is none, nested too deeply or with too long numbers."""
    try:
        return json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BodyError(wanted) from error
