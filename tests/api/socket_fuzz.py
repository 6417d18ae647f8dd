"""Seeded things that are done to the host's websocket and no page does: ids forged, shared and left out, flags and frames that mean
nothing, connections that go in mid run. Each leaves the server as it was; who heard what is looked at by whoever calls."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import socket
import time
import urllib.parse
from typing import Any

from conftest import workflow
from watched_server import SOONEST, Listener, Watched

FLAGS: list[Any] = [
    {"supports_preview_metadata": True}, {"supports_preview_metadata": "no"}, {"supports_preview_metadata": None}, {}, [], None, 5,
    "abc", [1], {"a": {"b": [[]]}}, {"": ""}, {"supports_preview_metadata": {"a": 1}}, {"x" * 9999: 1}, True, 1e400, 10**400,
]  # fmt: skip
TEXTS = [
    b"", b"{", b"null", b"[]", b'"feature_flags"', b"[1", b"NaN", b"\xff\xfe", b'{"type": 5}', b'{"type": ["feature_flags"]}',
    b'{"type": "adastate.stop"}', b'{"type": "adastate.chunk", "data": {}}', b"[" * 9000, b"9" * 9000, b"\x00" * 99, b"a" * 70_000,
    b'{"type": "executing", "data": {"node": "5"}}', b'{"type": "feature_flags"}', b'{"data": {}}', b'{"type": "\\ud800"}',
]  # fmt: skip
IDS = [
    "", "owner2", "Owner", "owner ", " owner", "owner\0", "../owner", "x" * 6000, "None", "null", "0", "true", "\ud83d", "\u0665",
    "*", "owner,stranger", "' or 1=1", "%00", "__class__", "owner/", "[]", "{}",
]  # fmt: skip


def frame(
    opcode: int, payload: bytes = b"", masked: bool = True, fin: bool = True, rsv: int = 0, length: int | None = None
) -> bytes:
    """A websocket frame (RFC 6455); a mask of zeros changes nothing. `length` is what its head says, if not the truth."""
    size = len(payload) if length is None else length
    head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    mask = 0x80 if masked else 0
    if size < 126:
        head += bytes([mask | size])
    elif size < 2**16:
        head += bytes([mask | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([mask | 127]) + size.to_bytes(8, "big")
    return head + (b"\0\0\0\0" if masked else b"") + payload


def connected(port: int, query: str, key: bool = True, version: str = "13", method: str = "GET") -> socket.socket:
    """A connection that has asked for a websocket, whatever the answer was."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    word = base64.b64encode(random.randbytes(16)).decode()
    head = f"{method} /ws{query} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    head += f"Sec-WebSocket-Key: {word}\r\n" if key else ""
    connection.sendall((head + f"Sec-WebSocket-Version: {version}\r\n\r\n").encode("utf-8", "surrogatepass"))
    return connection


def quietly(connection: socket.socket, sent: bytes, chance: random.Random) -> None:
    """Send, read a little, hang up: what the server does with it is up to it."""
    with contextlib.suppress(OSError):
        connection.sendall(sent)
        connection.settimeout(chance.choice([0.01, 0.01, 0.1]))
        connection.recv(1 << 16)
    with contextlib.suppress(OSError):
        if chance.random() < 0.3:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()


def small_run(chance: random.Random, chunks: int = 2) -> dict[str, Any]:
    """A streamed rollout that takes part of a second."""
    changes = {
        "n5__length": 12 * chunks - 3,
        "n5__width": 32,
        "n5__height": 32,
        "n5__steps": 1,
        "n4__keep_state": False,
    }
    return workflow("long_video", **changes, n5__seed=chance.randrange(2**32), n4__filename_prefix="met/run")


def of_owner(world: Watched, chance: random.Random, client: str = "owner", chunks: int = 2) -> str:
    status, answer = world.queue({"prompt": small_run(chance, chunks), "client_id": client})
    assert status == 200, answer
    return answer["prompt_id"]


def done(world: Watched, prompt_id: str) -> None:
    """It ran to its end, whoever listened."""
    entry = world.entry(prompt_id, SOONEST)
    assert entry["status"]["status_str"] == "success", (prompt_id, entry["status"])


def heard_by(listener: Listener, prompt_id: str, seconds: float = SOONEST) -> set[str]:
    """The kinds of messages about a prompt, once its last one has come, or none for so long."""
    kinds: set[str] = set()
    end = time.monotonic() + seconds
    while "adastate.end" not in kinds and time.monotonic() < end:
        for kind, prompt in listener.take():
            assert prompt in (None, prompt_id), (kind, prompt, prompt_id)
            kinds.add(kind)
        time.sleep(0.02)
    return kinds


# ---- what is done


def garbage(world: Watched, chance: random.Random) -> str:
    """Frames that no protocol knows, and too much of those that it knows."""
    frames = [
        frame(chance.randrange(16), random.Random(chance.random()).randbytes(chance.choice([0, 1, 125, 126, 9000]))),
        frame(1, chance.choice(TEXTS)), frame(2, b"\0" * chance.choice([0, 4, 70_000])), frame(1, b"a", masked=False),
        frame(1, b"a", rsv=chance.randrange(1, 8)), frame(1, b"a", length=2**63 - 1), frame(1, b"a", length=5_000_000),
        frame(1, b"a", fin=False), frame(0, b"a"), frame(9, b"p" * 125) * 50, frame(9, b"p" * 9000), frame(8, b"\x03"),
        frame(8, chance.choice([0, 999, 1000, 1005, 4999, 65535]).to_bytes(2, "big") + b"\xff"), frame(10, b"x"), b"\x00" * 40,
        frame(1, b"{" + b" " * 5_000_000), b"GET / HTTP/1.1\r\n\r\n",
    ]  # fmt: skip
    sent = chance.sample(frames, chance.choice([1, 1, 2, 5]))
    quietly(connected(world.port, f"?clientId=g{chance.randrange(3)}"), b"".join(sent), chance)
    return f"garbage {[each[:12] for each in sent]}"


def odd_hands(world: Watched, chance: random.Random) -> str:
    """Handshakes that are none."""
    query = chance.choice(
        ["", "?", "?clientId", "?clientId=a&clientId=owner2", "?clientId[]=owner", "?clientId=%ff", "?" + "a=1&" * 900]
    )
    method, version = chance.choice(["GET", "POST", "HEAD", "PUT"]), chance.choice(["13", "13", "0", "99", "a", ""])
    key = chance.random() < 0.7
    quietly(connected(world.port, query, key, version, method), b"", chance)
    return f"handshake {method} {query[:40]} {version!r} {key}"


def odd_id(world: Watched, chance: random.Random) -> str:
    """A clientId that nearly is another's, or none at all; a prompt runs for the owner meanwhile, or for that id."""
    name = chance.choice(IDS)
    listener = Listener(world.port, urllib.parse.quote(name, errors="surrogatepass"))
    try:
        if chance.random() < 0.1:
            done(world, of_owner(world, chance))
            heard = [kind for kind, _ in listener.take() if kind != "status"]
            assert not heard, (name, heard)
    finally:
        listener.close()
    return f"clientId {name[:20]!r}"


def flags(world: Watched, chance: random.Random) -> str:
    """Feature flags that are none; the prompt of that client runs all the same."""
    given = chance.choice(FLAGS)
    client = f"flags{chance.randrange(1000)}"
    connection = connected(world.port, f"?clientId={client}")
    try:
        connection.sendall(
            frame(1, json.dumps({"type": "feature_flags", "data": given}).encode()) * chance.choice([1, 2])
        )
        if chance.random() < 0.2:
            done(world, of_owner(world, chance, client, 1))
    finally:
        quietly(connection, frame(8), chance)
    return f"flags {str(given)[:40]}"


def twins(world: Watched, chance: random.Random) -> str:
    """One clientId on two sockets: the newer one hears of its prompt, the older one nothing more, whoever goes first."""
    client = f"twin{chance.randrange(10**6)}"
    first, second = Listener(world.port, client), Listener(world.port, client)
    try:
        if chance.random() < 0.25:
            prompt_id = of_owner(world, chance, client)
            kinds = heard_by(second, prompt_id)
            assert {"adastate.chunk", "adastate.pictures", "adastate.end", "executing"} <= kinds, kinds
            assert {kind for kind, _ in first.take()} <= {"status"}
            done(world, prompt_id)
    finally:
        for each in chance.sample([first, second], 2):
            each.close()
    return "one clientId on two sockets"


def leaves(world: Watched, chance: random.Random) -> str:
    """A client goes in mid run, and perhaps comes back: the run ends as it would have."""
    client, back = f"gone{chance.randrange(10**6)}", chance.random() < 0.5
    listener = Listener(world.port, client)
    prompt_id = of_owner(world, chance, client)
    time.sleep(chance.uniform(0, 0.5))
    listener.close()
    again = Listener(world.port, client) if back else None
    done(world, prompt_id)
    if again is not None:
        assert all(prompt in (None, prompt_id) for _, prompt in again.take())
        again.close()
    return f"left in mid run, {'and came back' if back else 'for good'}"


def strays(world: Watched, chance: random.Random) -> str:
    """Routes with ids that are nobody's, of another node, or no longer under way, while the owner's prompt runs."""
    prompt_id = of_owner(world, chance) if chance.random() < 0.1 else "none"
    for _ in range(4):
        name = urllib.parse.quote(chance.choice([prompt_id, prompt_id[:-1] or "x", prompt_id.upper(), "0", *IDS]) or "x", safe="",
                                  errors="surrogatepass")  # fmt: skip
        node = chance.choice(["4", "6", "0", "-1", "05", "5.0", "%20"])
        status, got = world.ask("GET", f"/adastate/runs/{name}/{node}")
        assert status == 404 and b"pictures" not in got, (name, node, got[:200])
        status, got = world.ask("POST", "/adastate/stop", json.dumps({"prompt_id": name, "node_id": node}).encode())
        assert status == 404, (name, node, got[:200])
    status, got = world.ask(
        "GET", f"/adastate/runs?client_id={urllib.parse.quote(chance.choice(IDS[1:]), errors='surrogatepass')}"
    )
    assert status == 200 and json.loads(got) == {"runs": []}, got[:200]
    if prompt_id != "none":
        done(world, prompt_id)
    return "ids that are nobody's"


WAYS = [garbage] * 6 + [odd_hands] * 3 + [odd_id] * 3 + [flags] * 3 + [twins] * 2 + [leaves] * 2 + [strays] * 3


def a_meeting(world: Watched, chance: random.Random) -> str:
    """One of them; what was done."""
    return chance.choice(WAYS)(world, chance)
