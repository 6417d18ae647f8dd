"""benchmarks/gpu.py in its small size: every section runs, one that fails leaves the others, nothing is kept as if measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import PACK

COMMAND = [sys.executable, str(PACK / "benchmarks" / "gpu.py")]
TITLES = (
    "The machine", "A noisy pass", "A chunk", "Decoding 3 latents", "End to end", "The first pictures",
    "Beside a full-length cache", "Absorption", "Memory over time", "Speed and drift", "14b",
)  # fmt: skip


def run(*options: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, env=environment)


def test_every_section_runs_in_the_small_size(tmp_path):
    kept = PACK / "benchmarks" / "results" / "gpu.md"
    before = kept.read_text() if kept.exists() else None
    done = run("--tiny", "--folder", str(tmp_path), "--minutes", "60")
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "gpu.md").read_text()
    assert [title for title in TITLES if f"## {title}" not in text] == []
    assert "Failed:" not in text and "Not run:" not in text and "says nothing about speed" in text
    assert (tmp_path / "gpu-memory.png").read_bytes().startswith(b"\x89PNG")
    assert (kept.read_text() if kept.exists() else None) == before
    if not torch.cuda.is_available():
        # compiled blocks are a GPU's, and so are some attentions; a table's head names them all the same
        rows = [line for line in text.splitlines() if "| fused |" in line and not line.startswith("| what |")]
        fused = [line for line in rows if "not offered" not in line]
        assert not fused and "not offered" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_nothing_is_measured():
    done = run()
    assert done.returncode == 0 and "no CUDA device" in done.stdout


def test_what_is_tried_is_not_kept_as_a_result():
    done = run("--tiny")
    assert done.returncode == 2 and "--folder" in done.stderr


@pytest.fixture
def gpu(monkeypatch):
    """The command as a module."""
    monkeypatch.syspath_prepend(str(PACK / "benchmarks"))
    import gpu

    yield gpu
    for name in ("gpu", "host", "rollout", *(one for one in sys.modules if one.startswith("on_gpu"))):
        sys.modules.pop(name, None)


def test_a_section_that_fails_leaves_the_others(gpu, monkeypatch):
    def fails(bench):
        raise RuntimeError("out of memory\nand more")

    def lacks(bench):
        raise gpu.NotOffered("there is no such card")

    def works(bench):
        return gpu.Section("Works", ["what"], [["it"]], ["a note"])

    monkeypatch.setattr(gpu, "sections", lambda: {"fails": fails, "lacks": lacks, "works": works})
    bench = gpu.Bench(gpu.TINY, time.monotonic() + 60)
    text = "\n".join(gpu.report(bench, []))
    assert "Failed: RuntimeError: out of memory" in text and "and more" not in text
    assert "Not offered: there is no such card." in text and "| it |" in text and "- a note" in text
    assert "Failed" not in "\n".join(gpu.report(bench, ["works"]))
    bench.until = time.monotonic()
    assert "\n".join(gpu.report(bench, [])).count("Not run: the time was used up") == 3


def test_the_roofline_counts_what_a_chunk_multiplies(gpu):
    """Against operations counted by torch, over a whole chunk but for patches, head and embeddings."""
    from on_gpu.chunks import flop
    from torch.utils.flop_counter import FlopCounterMode

    bench = gpu.Bench(gpu.TINY, time.monotonic() + 60)
    from adastate_pack.adastate_core.anchors import Anchor

    spec = bench.spec(Anchor(), 3)
    with torch.no_grad():
        rollout = bench.rollout(spec)
        chunks = rollout.chunks(100)
        next(chunks), next(chunks), next(chunks)
        with FlopCounterMode(display=False) as counted:
            next(chunks)
    assert counted.get_total_flops() == pytest.approx(flop(bench, spec), rel=0.05)
