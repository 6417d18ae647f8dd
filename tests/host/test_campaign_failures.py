"""Memory that is not there, disks that take nothing, clocks that go wrong: a sentence is said, memory is back, finished files stay.

Prompts go through the host's own executor. See tests/core/campaign.py for what a trial is; sites within files, videos and torch
operations of one streamed run are also those of `run.py faults`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import sys
import time
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adastate_pack.adastate_core.rollout import Rollout
from bit_equal import decoded
from conftest import random_wan
from safetensors.torch import save_file
from sounds import siren
from test_campaign_interrupts import Bench, bench, in_its_folders, of_a_disk, require, settings_of, untold  # noqa: F401
from test_links import LATENT, node

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))
from cut_prompts import Held, patched
from cut_rollouts import ROLLOUT, SETTINGS, SIDE, Settings
from faults.injector import Injector
from file_faults import Faults

# as an allocator of a card's, Python's, and torch's on the CPU say it
NO_MEMORY = (
    lambda why: torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB ({why})"),
    MemoryError,
    lambda why: RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes ({why})"),
)
NO_DISK = (
    lambda why: OSError(errno.ENOSPC, "No space left on device"),
    lambda why: OSError(errno.EDQUOT, "Disk quota exceeded"),
    lambda why: OSError(errno.EIO, "Input/output error"),
)


def read_only(why: str) -> OSError:
    return OSError(errno.EROFS, "Read-only file system")


def failing(at: int, kind: Any) -> Injector:
    """The `at`-th torch operation fails as `kind` says."""
    mode = Injector(lambda number, operation: number == at)
    mode.kind = kind
    return mode


def test_no_memory_at_a_torch_operation_of_a_streamed_run(bench, campaign):  # noqa: F811
    for trial in campaign("out of memory at a torch operation of a streamed run", full=120, sample=1):
        with trial:
            name = settings_of(trial)
            at, kind = trial.chance.randrange(bench.whole(name).operations), trial.chance.choice(NO_MEMORY)
            require(bench.cut(name, mode=failing(at, kind), fails=True), name, f"operation {at}")


def test_a_disk_that_takes_nothing_at_a_file_operation_of_a_streamed_run(bench, campaign):  # noqa: F811
    for trial in campaign("disk full, over quota or broken at a file operation of a streamed run", full=120, sample=1):
        with trial:
            name = settings_of(trial)
            place = trial.chance.choice(bench.whole(name).disk)
            faults = Faults(bench.out, place, kinds=(trial.chance.choice(NO_DISK),))
            require(bench.cut(name, faults, fails=True), name, f"{place}, {faults.failed}")


BEGINNING = {"width": SIDE, "height": SIDE, "frames": 9, "crop": "center", "fps": 0.0}
LOADED = {"file": "tiny.safetensors", "weight_dtype": "default", "preset": "auto"}
# graphs whose failure leaves what was made until then, in a file that plays
JOINED, RENDERED = "Load Rollout State, and a run that is joined", "Render Video"


class Nodes:
    """Graphs of the other nodes, on what a rollout has left in the folders."""

    def __init__(self, bench: Bench) -> None:  # noqa: F811
        self.bench = bench
        plain = SETTINGS["plain"].graph("made/take", keep_state=True)
        absorbed = SETTINGS["absorption"].graph("made/absorbed", keep_state=True)
        for graph in (plain, absorbed):
            graph["say"] = node("Take", value=[ROLLOUT, 2], slot=2)
            assert bench.prompts(graph).how == "success"
        self.report = bench.prompts.taken[2]
        state, video = "made/{}_00001_.state.safetensors [output]", "made/take_00001_.mkv [output]"
        self.state = {"s": node("AdaStateLoadState", file=state.format("take"))}
        self.absorbed = {"s": node("AdaStateLoadState", file=state.format("absorbed"))}
        self.video = {"v": node("LoadVideo", file=video)}
        with wave.open(str(bench.out.parent / "input" / "voice.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes((siren(16_000, 2.0).T * 32767).round().astype("<i2").tobytes())
        self.counts: dict[str, tuple[int, list[tuple[str, int]]]] = {}

    def graphs(self) -> dict[str, dict[str, dict]]:
        vae, latent = {"3": node("GivenVae")}, {"l": node("GivenLatent")}
        prefix = {"filename_prefix": "other/file"}
        video = {"fps": 16.0, "codec": "h264", "quality": 18}

        def taken(graph: dict[str, dict], name: str) -> dict[str, dict]:
            return graph | {"take": node("Take", value=[name, 0], slot=0)}

        return {
            "Streaming VAE Decode": taken(vae | latent | {"d": node("AdaStateDecode", latent=["l", 0], vae=["3", 0])}, "d"),
            RENDERED: taken(
                vae | latent | {"d": node("AdaStateRenderVideo", latent=["l", 0], vae=["3", 0], **video, **prefix)}, "d"
            ),
            "Save Rollout State": self.state | {"d": node("AdaStateSaveState", state=["s", 0], **prefix)},
            "Save Absorption": self.absorbed | {"d": node("AdaStateSaveAbsorption", state=["s", 0], **prefix)},
            "Video Metrics": taken(self.video | {"d": node("AdaStateVideoMetrics", video=["v", 0])}, "d"),
            "Compare Videos": taken(
                self.video | {"d": node("AdaStateCompare", video_a=["v", 0], video_b=["v", 0], labels="A, B")}, "d"
            ),
            "Continue Video": taken(
                vae | self.video | {"d": node("AdaStateContinueVideo", vae=["3", 0], video=["v", 0], **BEGINNING)}, "d"
            ),
            "Load Sound": taken({"d": node("AdaStateLoadSound", file="voice.wav")}, "d"),
            "Demo Sound and Demo Ear": taken(
                {"s": node("AdaStateDemoSound", seconds=2.0, seed=1), "d": node("AdaStateDemoEar", audio=["s", 0])}, "d"
            ),
            "Load Causal Video Model": taken({"d": node("AdaStateLoadModel", **LOADED)}, "d"),
            "Inspect Checkpoint": taken({"d": node("AdaStateInspectCheckpoint", file=LOADED["file"])}, "d"),
            JOINED: Settings({"length": 45}).graph("other/file", self.state["s"]["inputs"]["file"], join=True),
            "Absorption Report": taken({"r": node("GivenReport"), "d": node("AdaStateAbsorptionReport", report=["r", 0])}, "d"),
        }  # fmt: skip

    def count(self, name: str) -> tuple[int, list[tuple[str, int]]]:
        """Torch operations and file operations of a graph in which nothing fails."""
        if name not in self.counts:
            mode, faults = Injector(lambda number, operation: False), Faults(self.bench.out.parent)
            self.bench.prompts.nothing()
            with patched(faults), mode:
                ended = self.bench.prompts(self.graphs()[name])
            assert ended.how == "success", (name, ended.message)
            self.counts[name] = len(mode.operations), of_a_disk(faults)
        return self.counts[name]

    def fail(self, name: str, *installed: Any, mode: Any = None, may_pass: bool = True) -> list[str]:
        """What is not as it should be when a graph fails; nothing if it is."""
        self.bench.prompts.nothing()
        kept, before = self.kept(), Held.now()
        with patched(*installed), mode or patched():
            ended = self.bench.prompts(self.graphs()[name])
        if mode is not None:
            mode.held = None
        bad = untold(ended.message) if ended.how == "error" else []
        bad += [] if may_pass or ended.how == "error" else ["it returned"]
        self.bench.prompts.nothing()
        bad += Held.now().more_than(before)
        made = self.kept()
        bad += [f"{path.name} was changed" for path in kept if made.get(path) != kept[path]]
        left = made.keys() - kept.keys() if ended.how == "error" else set()
        if name in (JOINED, RENDERED):
            videos = [path for path in left if path.suffix in (".mp4", ".mkv")]
            bad += [f"{path.name} was left and shows nothing" for path in videos if not list(decoded(path))]
        else:
            bad += [f"{path.name} was left" for path in left]
        again = self.bench.prompts(self.graphs()[name])
        return bad if again.how == "success" else [*bad, f"the next prompt ended with {again.message}"]

    def kept(self) -> dict[Path, str]:
        files = [
            each for kind in ("output", "temp") for each in (self.bench.out.parent / kind).rglob("*") if each.is_file()
        ]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def others(bench):  # noqa: F811
    """The other nodes' graphs."""
    import comfy_extras.nodes_video as video
    import folder_paths
    from test_links import given

    import nodes as host_nodes

    with pytest.MonkeyPatch.context() as patch:
        for kind in ("output", "temp", "input"):
            getattr(folder_paths, f"set_{kind}_directory")(str(bench.out.parent / kind))
        patch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "LoadVideo", video.LoadVideo)
        models = bench.out.parent / "models"
        models.mkdir()
        save_file(random_wan(), models / LOADED["file"])
        _, endings = folder_paths.folder_names_and_paths["diffusion_models"]
        patch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(models)], endings))
        folder_paths.filename_list_cache.clear()
        made = Nodes(bench)
        latents = {"samples": bench.whole("plain").latents.clone()}
        patch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "GivenLatent", given("LATENT", latents))
        patch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "GivenReport", given("STRING", made.report))
        yield made


def test_no_memory_in_the_other_nodes(others, campaign):
    for trial in campaign("out of memory at a torch operation of the other nodes", full=130, sample=1):
        with trial:
            name = list(others.graphs())[trial.number % len(others.graphs())]
            operations, _ = others.count(name)
            if operations:
                mode = failing(trial.chance.randrange(operations), trial.chance.choice(NO_MEMORY))
                require(others.fail(name, mode=mode), name, "out of memory")


def test_a_disk_that_takes_nothing_in_the_other_nodes(others, campaign):
    for trial in campaign("disk full, over quota or broken at a file operation of the other nodes", full=130, sample=1):
        with trial:
            name = list(others.graphs())[trial.number % len(others.graphs())]
            if places := others.count(name)[1]:
                faults = Faults(
                    others.bench.out.parent, trial.chance.choice(places), kinds=(trial.chance.choice(NO_DISK),)
                )
                bad = others.fail(name, faults)
                if str(faults.failed).startswith("decode"):  # another run's order: no disk speaks there
                    bad = [what for what in bad if not what.startswith("it said")]
                require(bad, name, str(faults.failed))


class ReadOnly(Faults):
    """A folder that lies on a disk that is mounted read-only: everything that would change it fails."""

    CHANGES = ("replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir", "truncate", "open", "write", "thread")

    def point(self, name: str) -> None:
        if name.split()[0] in ("replace", "rename", "link", "mkdir", "rmdir", "truncate") or ".tmp" in name:
            raise read_only(name)


def test_a_folder_that_is_read_only_is_told_before_anything_is_made(bench, campaign, monkeypatch):  # noqa: F811
    rolled, chunks = [], Rollout._next
    monkeypatch.setattr(Rollout, "_next", lambda *args: rolled.append(1) or chunks(*args))
    for trial in campaign("a read-only folder of a streamed run", full=24, sample=1):
        with trial:
            name = settings_of(trial)
            bench.prompts.nothing()
            rolled.clear()
            with patched(ReadOnly(bench.out)):
                ended = bench.prompts(SETTINGS[name].graph(f"readonly{trial.number}/take"))
            assert ended.how == "error" and untold(ended.message) == [], ended
            assert not rolled, f"{name}: {len(rolled)} chunks were made before it was said that {ended.message}"
            assert "Read-only" in ended.message


TIMED = ("seconds", "seconds_all", "seconds_per_chunk", "fps", "speed", "autosave")


class Clock:
    """A clock that stands still, runs, and jumps ahead and back, in all modules of the pack."""

    def __init__(self, chance: Any) -> None:
        self.chance, self.now = chance, 1000.0

    def read(self) -> float:
        self.now += self.chance.choice((0.0, 0.0, 1e-9, 0.01, 0.01, 1.0, -0.5, -3600.0, 3600.0, 1e8, -1e8))
        return self.now

    def install(self, patch: pytest.MonkeyPatch) -> None:
        clocks = dict.fromkeys(("time", "monotonic", "perf_counter"), self.read)
        stand_in = SimpleNamespace(**vars(time) | clocks)
        for name, module in list(sys.modules.items()):
            if name.startswith("adastate_pack") and getattr(module, "time", None) is time:
                patch.setattr(module, "time", stand_in)


def negative(told: Any, path: str = "report") -> list[str]:
    """Numbers of a report that are below nothing, or none."""
    if isinstance(told, dict):
        return [bad for key, value in told.items() for bad in negative(value, f"{path}.{key}")]
    if isinstance(told, float) and (told < 0 or not math.isfinite(told)):
        return [f"{path} is {told}"]
    return []


def test_a_clock_that_goes_wrong(bench, campaign):  # noqa: F811
    for trial in campaign("a clock that jumps ahead and back and stands still", full=60, sample=1):
        with trial:
            name = settings_of(trial)
            whole = bench.whole(name)
            graph = SETTINGS[name].graph(f"clock{trial.number}/take", autosave_seconds=1.0)
            graph["say"] = node("Take", value=[ROLLOUT, 2], slot=2)
            with patched(Clock(trial.chance)):
                ended = bench.prompts(graph)
            assert ended.how == "success", ended
            assert torch.equal(bench.prompts.taken[LATENT]["samples"], whole.latents)
            told = json.loads(bench.prompts.taken[2])
            assert not negative({key: told[key] for key in TIMED})
            trial.saw(autosaves=told["autosave"]["count"])
