"""Make tests/golden/<commit>: files as a version of the pack writes them, and what that version goes on to from them.

    python tools/make_golden.py CHECKOUT

CHECKOUT is a clean checkout of commit 91e434f: everything is imported from there, and another commit is refused. Everything
comes from seeds and a tiny random model. The half that needs the host wants COMFYUI_PATH set; it runs in a process of its own,
because the pack's folder `nodes` and a module of the host have one name. A later change of format has a generator of its own.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMIT = "91e434f"
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
FOLDER = GOLDEN / COMMIT
SEED, SIZE = 7, (4, 4)


def check_commit(checkout: Path) -> None:
    """End unless `checkout` stands at COMMIT without changes."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", checkout, *arguments], capture_output=True, text=True, check=True).stdout

    at = git("rev-parse", "HEAD").strip()
    if not at.startswith(COMMIT) or git("status", "--porcelain", "--untracked-files=no").strip():
        sys.exit(f"{checkout} is at {at[:7]} or has changes; these files are made by a clean checkout of {COMMIT}")


def save_tensors(name: str, **tensors: Any) -> str:
    """Write tensors under a name in FOLDER; gives the name."""
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in tensors.items() if value is not None}, FOLDER / name)
    return name


# ---- rollouts of the core


def rollout_cases() -> dict[str, dict[str, Any]]:
    """By name: `spec` (changes to a plain one), and what else differs: sigmas, prompts, given, keep, stop, length."""
    from adastate_core import anchors as a
    from adastate_core.absorption.settings import AbsorptionSettings as Absorption
    from adastate_core.cache.rotated import RotatedSpec as LayerPlan

    def case(*, stop: int = 12, length: int = 24, **more: Any) -> dict[str, Any]:
        other = {name: more.pop(name) for name in ("sigmas", "prompts", "given", "keep") if name in more}
        return {"spec": more, "stop": stop, "length": length, **other}

    absorbing = dict(warmup_frames=12, local_window_frames=3, sink_frames=1)
    watched = dict(monitor_layers=-1, monitor_chunks=2, refresh="always")
    deep = dict(sink_frames=3, recent_frames=4, budget_frames=9)
    behind = a.AnchorAdaptive(2, state_after_past=True, freeze_frame=15, reset_frames=9)
    three = (1.0, 0.8, 0.5)
    cases = {
        "none_packed": case(window_frames=6, stop=9, length=21),
        "none_fixed": case(window_frames=5, positions="fixed"),
        "none_absolute": case(window_frames=4, positions="absolute"),
        "static_packed": case(anchor=a.AnchorStatic(3), window_frames=4),
        "static_fixed": case(anchor=a.AnchorStatic(1), positions="fixed"),
        "static_absolute": case(anchor=a.AnchorStatic(4), positions="absolute", window_frames=6),
        "ema_packed": case(anchor=a.AnchorEMA(3, 0.6)),
        "ema_fixed": case(anchor=a.AnchorEMA(2, 0.9), positions="fixed", window_frames=5),
        "memory": case(anchor=a.AnchorMemory(2, 0.05, 0.3), window_frames=4),
        "memory_nothing_left_yet": case(anchor=a.AnchorMemory(1), window_frames=5, stop=6),
        "replay": case(anchor=a.AnchorReplay(6), window_frames=6, stop=15, length=27),
        "adaptive_packed": case(anchor=a.AnchorAdaptive(1)),
        "adaptive_fixed_strength": case(anchor=a.AnchorAdaptive(2, strength=0.4), positions="fixed", window_frames=4),
        "adaptive_behind_freeze_reset": case(anchor=behind, window_frames=4),
        "deep": case(anchor=a.AnchorDeep(**deep), window_frames=6, stop=15, length=27),
        "deep_chooses_next": case(anchor=a.AnchorDeep(**deep), window_frames=6, stop=18, length=27),
        "deep_unshifted_chooses_next": case(anchor=a.AnchorDeep(**deep, shift_selected=False), window_frames=6),
        "chunks_of_one": case(anchor=a.AnchorStatic(1), chunk_frames=1, window_frames=4, stop=7, length=13),
        "no_window": case(anchor=a.AnchorStatic(2), window_frames=0),
        "layers_differ": case(layers=(LayerPlan(0, 3), LayerPlan(0, 6, keep_raw=True)), window_frames=6),
        "batch_2": case(anchor=a.AnchorStatic(2), batch=2, window_frames=4),
        "pending": case(anchor=a.AnchorAdaptive(1), stop=10, length=20),
        "given": case(anchor=a.AnchorStatic(3), given=4, stop=11, length=20),
        "given_only": case(anchor=a.AnchorAdaptive(1), given=5, stop=6, length=17),
        "keep_latents": case(anchor=a.AnchorEMA(1, 0.9), keep=True, stop=10, length=19),
        "given_keep_latents": case(given=4, keep=True, window_frames=5, stop=11, length=20),
        "restart": case(window_frames=6, restart_frames=9, overlap_frames=3, stop=12, length=27),
        "restart_next": case(anchor=a.AnchorAdaptive(1), restart_frames=9, overlap_frames=3, stop=9, length=21),
        "rolling_2": case(blocks=2, window_frames=6),
        "rolling_3": case(anchor=a.AnchorStatic(3), blocks=3, sigmas=three, window_frames=3, stop=10),
        "rolling_batch_2": case(blocks=2, batch=2, window_frames=3, stop=6, length=15),
        "prompts_recache_next": case(prompts=[(0, 1, "cut"), (12, 2, "recache")], window_frames=6),
        "prompts_soft_under_way": case(prompts=[(0, 1, "cut"), (9, 2, "soft"), (18, 3, "flush")], window_frames=6),
        "prompts_rope_cut": case(prompts=[(0, 1, "cut"), (6, 2, "rope cut"), (12, 3, "rope cut")], window_frames=6),
        "absorption_warming": case(absorption=Absorption(**absorbing), window_frames=30, stop=6),
        "absorption_at_the_switch": case(absorption=Absorption(**absorbing), window_frames=30),
        "absorption_switched": case(absorption=Absorption(**absorbing), window_frames=30, stop=15),
        "absorption_layer_static": case(
            absorption=Absorption(**absorbing, scope="layer", ratio=1.0), anchor=a.AnchorStatic(1), window_frames=18, stop=18
        ),
        "absorption_lowrank_fixed": case(
            absorption=Absorption(**absorbing, scope="lowrank", rank=4), positions="fixed", window_frames=18, stop=15
        ),
        "absorption_refresh_collecting": case(
            absorption=Absorption(**absorbing | watched | {"monitor_chunks": 3}), window_frames=20, stop=24, length=36
        ),
        "absorption_watched_adaptive": case(
            absorption=Absorption(**absorbing | watched | {"refresh": "never"}, select="explained"),
            anchor=a.AnchorAdaptive(1), window_frames=20, stop=18, length=27,
        ),
        "absorption_nothing": case(absorption=Absorption(**absorbing | {"warmup_frames": 3}), window_frames=20, stop=6),
        "absorption_ratio_0": case(absorption=Absorption(**absorbing, ratio=0.0), anchor=a.AnchorEMA(1, 0.9)),
    }  # fmt: skip
    stored = dict(batch=3, height=2, stop=9, length=15)
    for dtype, device, anchor in (
        ("model", "host memory", a.Anchor()),
        ("model", "host memory", a.AnchorEMA(2, 0.6)),
        ("fp8", "gpu", a.AnchorStatic(3)),
        ("fp8", "host memory", a.AnchorAdaptive(1)),
        ("fp8", "host memory", a.AnchorEMA(2, 0.6)),
        ("int8", "gpu", a.Anchor()),
        ("int8", "gpu", a.AnchorMemory(1, 0.05, 0.3)),
        ("int8", "host memory", a.AnchorStatic(2)),
        ("int8", "host memory", a.AnchorReplay(6)),
        ("fp8", "gpu", a.AnchorAdaptive(1, strength=0.5)),
    ):
        name = f"{dtype}_{device.split()[0]}_{anchor.kind}" + (
            "_strength" if getattr(anchor, "strength", 1) < 1 else ""
        )
        window = 6 if anchor.kind == "replay" else 4
        cases[name] = case(cache_dtype=dtype, cache_device=device, anchor=anchor, window_frames=window, **stored)
    import torch

    cases["bfloat16"] = case(dtype=torch.bfloat16, anchor=a.AnchorEMA(2, 0.6), window_frames=4, **stored)
    refreshed = Absorption(**absorbing | watched)
    cases["int8_host_absorption"] = case(
        cache_dtype="int8",
        cache_device="host memory",
        absorption=refreshed,
        window_frames=15,
        batch=2,
        height=2,
        stop=15,
        length=24,
    )
    cases["fp8_rolling"] = case(cache_dtype="fp8", blocks=2, window_frames=6, **stored)
    return cases


def rollout_of(one: dict[str, Any], state: Any = None, solution: Any = None, **changed: Any) -> Any:
    """The rollout of a case."""
    import torch
    from tiny_model import TinyModel

    from adastate_core.anchors import Anchor
    from adastate_core.prompts.plan import PromptChange, PromptPlan
    from adastate_core.rollout import Rollout, RolloutSpec, Settings
    from adastate_core.schedules.schedule import Schedule

    model = TinyModel()
    plain = dict(
        geometry=model.geometry, batch=1, height=SIZE[0], width=SIZE[1], chunk_frames=3, window_frames=3, anchor=Anchor(),
        positions="packed", dtype=torch.float32, model="tiny",
    )  # fmt: skip
    spec = RolloutSpec(**(plain | one["spec"] | changed))
    schedule = Schedule(one["sigmas"]) if "sigmas" in one else Schedule.shifted(2, 5.0)
    prompts = None
    if "prompts" in one:
        changes = [PromptChange(frame, context(seed), kind) for frame, seed, kind in one["prompts"]]
        prompts = PromptPlan(changes, spec.chunk_frames)
    keep = one.get("keep", False)
    return Rollout(model, spec, Settings(SEED, schedule), state, keep, solution=solution, prompts=prompts)


def context(seed: int) -> Any:
    """Text embeddings [1, 5, 8] of a seed."""
    import torch

    return torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed))


def given_frames(one: dict[str, Any]) -> Any:
    """Start latents of a case, or None."""
    import torch

    if "given" not in one:
        return None
    return torch.randn(1, 4, one["given"], *SIZE, generator=torch.Generator().manual_seed(3))


def latents(chunks: Any) -> Any:
    import torch

    return torch.cat([chunk.latents for chunk in chunks], 2)


def description(rollout: Any, one: dict[str, Any]) -> dict[str, Any]:
    """What a test needs to build this rollout, JSON-able."""
    schedule = rollout.settings.schedule
    described = {
        "spec": rollout.spec.describe() | {"cache_device": rollout.spec.cache_device},
        "seed": SEED,
        "sigmas": schedule.sigmas,
        "keep_latents": one.get("keep", False),
        "stop": one["stop"],
        "length": one["length"],
    }
    if "prompts" in one:
        described["prompts"] = [dict(frame=f, seed=s, transition=t) for f, s, t in one["prompts"]]
    return described


def rounding(one: dict[str, Any], found: Any) -> float | None:
    """By how much the rollout differs from one with its cache in float32, relative; None if it has that."""
    import torch

    if one["spec"].get("dtype") is None and one["spec"].get("cache_dtype", "model") == "model":
        return None
    exact = rollout_of(one, dtype=torch.float32, cache_dtype="model", cache_device="gpu")
    theirs = latents(exact.chunks(one["length"]))[:, :, one["stop"] :]
    return float((found - theirs).norm() / theirs.norm())


def make_states() -> list[dict[str, Any]]:
    """Each case up to `stop`, its state, and what going on from the file to `length` gives."""
    from adastate_core.states.state_file import load_state, save_state

    entries = []
    for name, one in rollout_cases().items():
        first = rollout_of(one)
        list(first.chunks(one["stop"], given_frames(one)))
        path = save_state(first.snapshot(), FOLDER / f"{name}.state.safetensors")
        rest = rollout_of(one, load_state(path))
        found = latents(rest.chunks(one["length"]))
        end = rest.snapshot()
        expected = save_tensors(
            f"{name}.expected.safetensors", latents=found, hidden=end.hidden, kept=rest.kept_latents
        )
        entry = {"name": name, "state": path.name, "expected": expected} | description(rest, one)
        if (rounded := rounding(one, found)) is not None:
            entry["rounding"] = rounded
        if first.attention.absorber is not None:
            phases = [run.attention.absorber.report()["phase"] for run in (first, rest)]
            report = rest.attention.absorber.report()
            entry["absorption"] = {"phases": phases, "layers": report["layers"], "monitor": report["monitor"]}
        entries.append(entry)
    return entries


def make_absorption() -> list[dict[str, Any]]:
    """A saved absorption, and a whole rollout that is given it."""
    from adastate_core.absorption.saved import save_solution

    cases = rollout_cases()
    entries = []
    for name in ("absorption_switched", "absorption_layer_static", "absorption_lowrank_fixed"):
        one = cases[name]
        solved = rollout_of(one)
        list(solved.chunks(one["stop"]))
        solution = solved.attention.absorber.solution
        name = f"{name}.absorption.safetensors"
        path = save_solution(solution, solved.spec.absorption, {"model": "tiny", "seed": SEED}, FOLDER / name)
        driven = rollout_of(one, solution=solution)
        found = latents(driven.chunks(one["length"]))
        expected = save_tensors(f"{path.name.split('.')[0]}.driven.safetensors", latents=found)
        entry = {"name": path.name.split(".")[0], "absorption": path.name, "expected": expected}
        entries.append(entry | description(driven, one) | {"belongs_to": {"model": "tiny", "seed": SEED}})
    return entries


def make_videos() -> list[dict[str, Any]]:
    """A finished video, and the same one growing, as a kill before its end would leave it."""
    import av
    import torch
    from test_video_sink import moving

    from adastate_core.video.sink import VideoSink

    def decoded(path: Path) -> Any:
        with av.open(str(path)) as container:
            return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])

    path, numbers = FOLDER / "finished.mp4", {"width": 32, "height": 32, "fps": 16, "quality": 18}
    metadata = {"workflow": {"nodes": [1, "ä"]}, "prompt": "p"}
    with VideoSink(path, **numbers, metadata=metadata) as sink:
        for start, count in ((0, 9), (9, 6)):
            sink.write(moving(count, start, 32))
        data = path.read_bytes()
    (FOLDER / "growing.mp4").write_bytes(data)
    expected = save_tensors("videos.expected.safetensors", frames=decoded(path))
    entries = []
    for name in ("finished", "growing"):
        entry = {"name": name, "video": f"{name}.mp4", "expected": expected, "metadata": metadata} | numbers
        entries.append(entry | {"frames": len(decoded(FOLDER / f"{name}.mp4")), "finished": name == "finished"})
    return entries


# ---- rollouts through the nodes


def host_cases() -> dict[str, dict[str, Any]]:
    """By name: inputs of the rollout node, the nodes before it with theirs, and the lengths before and after the cut."""
    small = dict(
        width=32, height=16, batch_size=1, seed=5, steps=2, shift=5.0, chunk_frames=3, window_frames=3, positions="packed",
        keep_latents=False,
    )  # fmt: skip
    file = dict(filename_prefix="video/take", fps=16.0, codec="h264", quality=1, preview=False, autosave_seconds=0.0)
    warm = dict(
        ratio=0.5, warmup_frames=12, local_window_frames=3, sink_frames=1, ridge="auto", scope="lowrank", rank=8,
        select="residual", absorb=True, schedule="once",
    )  # fmt: skip
    adaptive = {"node": "AdaStateAnchorAdaptive", "inputs": {"state_frames": 1}}
    stream = {"node": "AdaStateStreamOutput", "inputs": file | {"join": True}}
    absorption = {"node": "AdaStateAbsorption", "inputs": warm}
    return {
        "stream": {"inputs": small, "nodes": {"anchor": adaptive, "stream": stream}, "vae": "full", "stop": 33, "length": 49},
        "stream_batch_2": {
            "inputs": small | {"width": 16, "batch_size": 2}, "nodes": {"stream": stream}, "vae": "full", "stop": 21,
            "length": 41,
        },
        "stream_tiny_vae": {
            "inputs": small | {"width": 16, "keep_latents": True}, "nodes": {"stream": stream}, "vae": "tiny", "stop": 21,
            "length": 41,
        },
        "host_absorption": {
            "inputs": small | {"window_frames": 14}, "nodes": {"absorption": absorption}, "stop": 49, "length": 73,
        },
    }  # fmt: skip


def make_host(folder: Path) -> dict[str, Any]:
    """Rollouts through the nodes: state, video and absorption as the nodes write them, and what goes on from them."""
    import av
    import folder_paths
    import torch
    from conftest import HostNode
    from golden_models import host_inputs

    def decoded(path: Path) -> Any:
        with av.open(str(path)) as container:
            return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])

    def kept(name: str, written: str) -> str:
        shutil.copy(folder / written.removesuffix(" [output]"), FOLDER / name)
        return name

    folder_paths.set_output_directory(str(folder))
    entries, absorptions = [], []
    for name, one in host_cases().items():
        entry = {"name": name} | one
        roll, stop, length = HostNode("AdaStateRollout"), one["stop"], one["length"]
        first = roll(**host_inputs(HostNode, entry), length=stop).args
        written = HostNode("AdaStateSaveState")(state=first[1], filename_prefix=name).args[0]
        entry["state"] = kept(f"{name}.state.safetensors", written)
        files = first[1].stream.get("files", [])
        entry["videos"] = {file: kept(f"{name}.{i}.mp4", file) for i, file in enumerate(files)}
        state = HostNode("AdaStateLoadState")(file=written).args[0]
        rest = roll(**host_inputs(HostNode, entry), length=length, resume=state).args
        pictures = [decoded(folder / file)[stop:] for file in rest[1].stream.get("files", [])]
        recorded = {f"pictures.{i}": one for i, one in enumerate(pictures)}
        if not files or one["inputs"]["keep_latents"]:
            recorded["latents"] = rest[0]["samples"]
        entry["expected"] = save_tensors(f"{name}.expected.safetensors", **recorded, pending=rest[1].pending)
        entries.append(entry)
        if "absorption" in one["nodes"]:
            written = HostNode("AdaStateSaveAbsorption")(state=first[1], filename_prefix=name).args[0]
            load = {"node": "AdaStateLoadAbsorption", "inputs": {"file": written}}
            driven = (
                {"name": f"{name}_driven"}
                | one
                | {"nodes": {"absorption": load}, "file": f"{name}.absorption.safetensors"}
            )
            kept(driven["file"], written)
            found = roll(**host_inputs(HostNode, driven), length=length).args
            driven["expected"] = save_tensors(f"{name}.driven.safetensors", latents=found[0]["samples"])
            driven["warnings"] = len(json.loads(found[2])["warnings"])
            absorptions.append(driven)
    return {"host_states": entries, "host_absorptions": absorptions}


# ---- all of it


def manifest_text(made: dict[str, Any]) -> str:
    """JSON with a line for each entry."""
    parts = []
    for name, value in made.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in value) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: list[str]) -> None:
    """The core's half here, the host's in a process of its own."""
    checkout = Path(arguments[-1]).resolve()
    check_commit(checkout)
    sys.dont_write_bytecode = True
    import torch

    torch.set_grad_enabled(False)
    manifest, tests = FOLDER / "manifest.json", checkout / "tests"
    if "--host" in arguments:
        sys.path[:0] = [str(tests / "host"), str(tests / "core")]
        sys.path += [str(ROOT / "tests" / "host"), str(ROOT / "tests" / "core")]
        importlib.import_module("conftest")  # loads the host and the pack
        with tempfile.TemporaryDirectory() as folder:
            made = json.loads(manifest.read_text(encoding="utf-8")) | make_host(Path(folder))
        manifest.write_text(manifest_text(made), encoding="utf-8")
        return
    sys.path[:0] = [str(checkout), str(tests / "core")]
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    made = {"made_by": COMMIT, "torch": torch.__version__, "states": make_states()}
    made |= {"absorptions": make_absorption(), "videos": make_videos()}
    manifest.write_text(manifest_text(made), encoding="utf-8")
    shutil.rmtree(GOLDEN / "api", ignore_errors=True)
    shutil.copytree(checkout / "workflows" / "api", GOLDEN / "api")
    subprocess.run([sys.executable, __file__, "--host", checkout], check=True)
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    sys.stdout.write(f"{GOLDEN}: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes\n")


if __name__ == "__main__":
    main(sys.argv[1:])
