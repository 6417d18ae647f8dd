"""Seeded calls of the pack's routes that no page makes: methods, paths, queries, headers, codes, bodies whole and in chunks."""

from __future__ import annotations

import gzip
import json
import random
import re
import socket
import zlib
from typing import Any

PATHS = ["/adastate/timeline", "/adastate/stop", "/adastate/runs", "/adastate/runs/{}/{}", "/api/adastate/timeline"]
PATHS += ["/api/adastate/stop", "/api/adastate/runs", "/adastate", "/adastate/runs/{}", "/adastate/nothing"]
PATHS += ["/adastate/steer", "/adastate/steer", "/api/adastate/steer", "/api/adastate/runs/{}/{}"]
PATHS += [
    "/extensions/ComfyUI-AdaState/js/{}",
    "/extensions/ComfyUI-AdaState/{}/{}",
]  # what the host serves of the pack's page
METHODS = ["POST"] * 8 + ["GET"] * 5 + ["PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "post"]
NAMES = [
    "a",
    "5",
    "..",
    "%2e%2e",
    "%00",
    "%ff",
    "%F0%9F%98%80",
    "a" * 3000,
    "%ED%A0%80",
    "a%2Fb",
    "'",
    "<b>",
    "%0d%0aX: 1",
]
QUERIES = [
    "",
    "?client_id=a",
    "?client_id=%00",
    "?client_id=" + "x" * 4000,
    "?client_id=%ff&page=1",
    "?page=1",
    "?client_id=a&page=1",
]
QUERIES += [
    "?client_id=%ED%A0%80&page=1",
    "?client_id&client_id=1&page",
    "?%&=&&&",
    "?client_id[]=1",
    "?" + "a=1&" * 900,
]
KINDS = ["application/json"] * 6 + [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "",
]
KINDS += [
    f"application/json; charset={name}"
    for name in ("utf-8", "klingon", "utf-16", "utf-7", "idna", "rot13", "zlib", "base64")
]
KINDS += [
    "application/json; charset=",
    'application/json; charset="',
    "a/b; charset=utf-8; charset=klingon",
    ";;;",
    "x" * 2000,
]
PACKED = ["", "", "", "", "gzip", "deflate", "br", "identity", "gzip, gzip", "nothing", "\u00e9"]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 16, 2**63, 10**400, 1e308, -1e308, 0.5, -0.0, "", "abc", "0", "a" * 3000, "\ud800", "\x00", [],
    [1], {}, {"a": 1}, [[[]]], [{}], [None], {"seconds": 0, "text": "a"}, "0s a\n5s b", "[5s: a]", "a [5s] | b", "0:00 a\n0:05 b",
    "5 seconds: a", "\u0665s a", "0s {soft} a", "0s a\n0.01s b",
]  # fmt: skip
FIELDS = [
    "text",
    "entries",
    "fps",
    "duration",
    "words",
    "grammar",
    "prompt_id",
    "node_id",
    "shared",
    "seconds",
    "transition",
    "",
    "prompt",
    "seed",
    "strength",
    "pause",
    "take_back",
]
STEERS: list[dict[str, Any]] = [
    {"prompt": "snow, lantern"}, {"prompt": "city", "transition": "soft"}, {"seed": 5}, {"strength": 0.5}, {"take_back": 0.3},
    {"prompt": "a" * 20_001}, {"prompt": "nothing of the demo's"}, {"transition": "cut"}, {"seed": 2**64 - 1}, {"take_back": 9e5},
    {"pause": True, "seed": 1}, {"pause": 1}, {"take_back": 1e-9, "prompt": "meadow", "seed": 3}, {"pause": True}, {},
]  # fmt: skip
RAW = [
    b"", b"{", b"[" * 50_000, b'{"text":' * 5_000, b"null", b"NaN", b'{"text": "a", "fps": NaN}', b"\xff\xfe{\x00}\x00",
    b"\x00" * 99, b'{"prompt_id":' + b"9" * 5000 + b',"node_id":1}', b'{"text":"a","fps":' + b"1" * 5000 + b"}", b"\xef\xbb\xbf{}",
    b'"\\ud800"',
    b'{"text":"\\ud800"}', b'{"text":"a","text":5}', b'{"entries":[' + b"{}," * 9000 + b"{}]}", b'{"text":"a","duration":Infinity}',
    b'{"entries":[{"seconds":1' + b"0" * 400 + b',"text":"a"}]}', b'{"text":"0s a\\n5s b","fps":1e308}', b"[1e999]", b"\xc3\x28",
    b'{"prompt_id": {}, "node_id": []}', b"a" * 300_000, b'{"text": "' + b"a" * 250_000 + b'"}',
]  # fmt: skip
# what only Python says
PYTHON = re.compile(
    r"\b(Traceback|TypeError|KeyError|ValueError|RecursionError|AttributeError|OverflowError|JSONDecodeError|UnicodeDecodeError|"
    r"NoneType|Expecting value|object has no|codec can't)\b"
)


def a_body(chance: random.Random, live: tuple[str, str] | None = None) -> bytes:
    """Bytes that may be JSON, and JSON that may be what a route asks for, of the run `live` (prompt_id, node_id) if any."""
    if chance.random() < 0.3:
        return chance.choice(RAW)
    if live is not None and chance.random() < 0.5:
        names = dict(zip(("prompt_id", "node_id"), live, strict=True))
        more = chance.choice(STEERS) | ({chance.choice(FIELDS): chance.choice(VALUES)} if chance.random() < 0.4 else {})
        return json.dumps(more | names).encode()
    body: Any = {chance.choice(FIELDS): chance.choice(VALUES) for _ in range(chance.randrange(6))}
    if chance.random() < 0.4:
        names = ("seconds", "text", "transition", "line")
        rows = [
            {name: chance.choice([*VALUES, i, "a", "cut"]) for name in names if chance.random() < 0.8}
            for i in range(chance.randrange(4))
        ]
        body["entries"] = chance.choice([rows, rows, [*rows, 5], rows * 40])
    if chance.random() < 0.1:
        body = chance.choice([[body], str(body), None])
    return json.dumps(body).encode()


def a_call(chance: random.Random, live: tuple[str, str] | None = None) -> tuple[str, bytes, bool]:
    """(what it is, the bytes of a request that closes its connection, whether they are all that its headers say); `live` is the
    (prompt_id, node_id) of a run under way."""
    path, method = chance.choice(PATHS), chance.choice(METHODS)
    names = [chance.choice(NAMES) for _ in range(path.count("{}"))]
    if live is not None and "runs" in path and chance.random() < 0.5:
        names = list(live)[: len(names)]
    path = path.format(*names) + chance.choice(QUERIES)
    body = a_body(chance, live) if method not in ("GET", "HEAD") or chance.random() < 0.2 else b""
    whole = True
    packed, kind = chance.choice(PACKED), chance.choice(KINDS)
    if packed == "gzip" and chance.random() < 0.7:
        body = gzip.compress(body)
    elif packed == "deflate" and chance.random() < 0.7:
        body = zlib.compress(body)
    headers = ["Host: 127.0.0.1", "Connection: close"]
    headers += [f"Content-Type: {kind}"] if kind else []
    headers += [f"Content-Encoding: {packed}"] if packed else []
    if chance.random() < 0.25:
        headers.append("Transfer-Encoding: chunked")
        sizes = sorted(chance.randrange(len(body) + 1) for _ in range(chance.randrange(4)))
        parts = [body[a:b] for a, b in zip([0, *sizes], [*sizes, len(body)], strict=True) if b > a]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
        end = chance.choice([b"0\r\n\r\n"] * 6 + [b"zz\r\n", b""])
        body, whole = body + end, end.startswith(b"0")
    elif chance.random() < 0.93:
        headers.append(f"Content-Length: {len(body)}")
    else:
        headers.append(f"Content-Length: {chance.choice(['-1', 'abc', '9' * 30, '0', '1', ''])}")
        whole = False
    if chance.random() < 0.05:
        headers += chance.choice(
            [["X: " + "a" * 9000], ["Expect: 100-continue"], ["Expect: nothing"], ["Cookie: \x01"], ["Range: bytes=0-"]]
        )
    head = f"{method} {path} HTTP/1.1\r\n" + "\r\n".join(headers) + "\r\n\r\n"
    return f"{method} {path[:60]} {headers[2:]} {body[:80]!r}", head.encode("utf-8", "surrogatepass") + body, whole


def ask(port: int, sent: bytes, whole: bool) -> tuple[int, bytes]:
    """(status, body) of the answer; (0, b"") where the server closed the connection without one, as it does for what is cut."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        got = b""
        try:
            connection.sendall(sent)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                got += part
        except OSError:  # it need not read all of what is too long
            pass
    head, _, body = got.partition(b"\r\n\r\n")
    return (int(head.split()[1]), body) if head.startswith(b"HTTP/1.") else (0, b"")


def check_answer(what: str, status: int, body: bytes) -> None:
    """No failure of the server, and nothing that only Python says."""
    assert status < 500, (what, status, body[:300])
    assert not PYTHON.search(body.decode(errors="replace")), (what, status, body[:300])
