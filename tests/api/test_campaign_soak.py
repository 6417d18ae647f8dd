"""A long run with autosaves, watched over the socket: it holds no more at its end than early on."""

from __future__ import annotations

import threading
import time
import uuid
from pathlib import Path
from statistics import mode

import av
import pytest
from conftest import Client, report_of, workflow

from tools.host_client import Events
from tools.host_memory import Held, held, newest_run, slope

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
EVERY = 20  # chunks from one sample to the next, at least
MOST = 1.0  # KiB a chunk that the upper end of the interval may say


class Watcher:
    """A page's socket that is read all the time, by a thread; counts what came by kind, for a `with` block."""

    def __init__(self, port: int) -> None:
        self.name, self.counts = uuid.uuid4().hex, dict[str, int]()
        self._events, self._closing = Events(port, self.name), threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        while not self._closing.is_set():
            for message in self._events.read(timeout=0.5):
                self.counts[message["type"]] = self.counts.get(message["type"], 0) + 1

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._thread.join()
        self._events.close()


def tiny(chunks: int, prefix: str, **changes: object) -> dict:
    """The shipped long video of so many chunks, as small and fast as it gets, a state saved as often as 1 % of the time allows."""
    return workflow(
        "long_video",
        n4__filename_prefix=f"soak/{prefix}",
        n4__autosave_seconds=0.01,
        **{"n5__length": 12 * chunks - 3, "n5__width": 16, "n5__height": 16, "n5__steps": 1} | changes,
    )


def sampled(client: Client, prompt: dict, since: int) -> tuple[list[Held], dict, dict[str, int]]:
    """Run it and watch it; what the server held from chunk `since` on and at the end, its entry, and the messages that came."""
    samples: list[Held] = []
    with Watcher(client.server.port) as page:
        job = client.server.request("/prompt", {"prompt": prompt, "client_id": page.name})["prompt_id"]
        while not (entry := client.server.request(f"/history/{job}").get(job)):
            run = newest_run(client.server)
            done = run["newest"]["chunk"] + 1 if run and run["prompt_id"] == job and run["newest"] else 0
            if done >= max(since, samples[-1].chunks + EVERY if samples else 0):
                samples.append(held(client.server, done))
            client.server.check_alive()
            time.sleep(0.25)
        assert entry["status"]["status_str"] == "success", entry["status"]
        return samples, entry, page.counts


def usual(samples: list[Held]) -> tuple[int, int]:
    """The handles and threads that most of these have."""
    return mode(each.handles for each in samples), mode(each.threads for each in samples)


def soak(client: Client, trial, chunks: int, since: int, **changes: object) -> None:
    """One run; its memory from chunk `since` on, and its handles and threads."""
    samples, entry, counts = sampled(client, tiny(chunks, f"{chunks}", **changes), since)
    report = report_of(entry["outputs"])
    names = [key.removeprefix("n5__") for key in changes]
    assert report["chunks"] == chunks and counts["adastate.chunk"] == chunks, (report["chunks"], counts, names)
    assert counts["adastate.pictures"] > 0 and report["autosave"]["count"] > 3
    file = entry["outputs"]["5"]["images"][0]
    with av.open(str(client.folder_of(file) / file["filename"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == report["frames"]
    done = [each.chunks for each in samples]
    resident, half = slope(done, [each.resident for each in samples])
    anonymous, _ = slope(done, [each.anonymous for each in samples])
    # the usual of thirty samples: one may fall into an autosave or a request, which have a thread or a file open
    first, last = (usual(some) for some in (samples[:30], samples[-30:]))
    trial.saw(
        samples=len(samples),
        KiB_a_chunk=round(resident, 4),
        upper_end=round(resident + half, 4),
        KiB_a_chunk_anonymous=round(anonymous, 4),
        MiB_at_the_end=samples[-1].resident // 1024,
        handles=last[0],
        threads=last[1],
        autosaves=report["autosave"]["count"],
    )
    assert resident + half < MOST, f"{resident:.3f} +- {half:.3f} KiB a chunk: {samples[:: max(1, len(samples) // 20)]}"
    assert last == first, (first, last)


def test_soak(campaign, client):
    for trial in campaign("10,000 chunks to a video file, watched, with autosaves", full=1, sample=0):
        with trial:
            soak(client, trial, 10_000, 500)
