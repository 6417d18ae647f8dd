"""What docs/extending.md shows works as it stands: its pack, its sampler and its preset, and what goes wrong is said."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from faults.others import load_pack
from tiny_model import TinyModel

from adastate_core import anchors, extend
from adastate_core.anchors import Anchor, AnchorStatic
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.schedules import solvers
from adastate_core.schedules.noise import noise
from adastate_core.schedules.schedule import Schedule
from adastate_core.states.state_file import load_state, save_state
from adastate_core.weights import presets
from adastate_core.weights.preset_file import read_preset
from adastate_core.weights.presets import Preset

DOCS = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def block(holding: str, kind: str = "python") -> str:
    """The one block of code of the page with these words in it."""
    found = [
        one for one in re.findall(rf"```{kind}\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S) if holding in one
    ]
    assert len(found) == 1
    return found[0]


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a test registers is forgotten after it."""
    tables = (anchors.KINDS, anchors.EXAMPLES, presets.PRESETS, solvers.SAMPLERS)
    kept = [dict(table) for table in tables]
    monkeypatch.setitem(sys.modules, "adastate", extend)
    yield
    for table, before in zip(tables, kept, strict=True):
        table.clear()
        table.update(before)


@pytest.fixture
def pack(tmp_path) -> Path:
    """The page's pack on disk."""
    folder = tmp_path / "bookmarks.pack"
    folder.mkdir()
    (folder / "policy.py").write_text(block("class AnchorBookmarks"))
    (folder / "__init__.py").write_text(block("def adastate_register"))
    return folder


def bookmarks(pack: Path) -> type[Anchor]:
    load_pack(pack).adastate_register()
    return anchors.KINDS["bookmarks"]


def spec(anchor: Anchor, **changed) -> RolloutSpec:
    settings = dict(chunk_frames=3, window_frames=3, positions="packed", dtype=torch.float32)
    return RolloutSpec(TinyModel().geometry, 1, 4, 6, anchor=anchor, **(settings | changed))


def latents(of: RolloutSpec, settings: Settings, frames: int = 24, state=None) -> tuple[torch.Tensor, Rollout]:
    rollout = Rollout(TinyModel(), of, settings, state=state)
    return torch.cat([chunk.latents for chunk in rollout.chunks(frames)], 2), rollout


SETTINGS = Settings(7, Schedule.shifted(2, 5.0))


def test_the_pages_policy_keeps_what_it_says(pack):
    policy = bookmarks(pack)(2, 6)
    _, rollout = latents(spec(policy), SETTINGS)  # frames 0 to 20 have left the window
    layer = rollout.cache.layers[0]
    assert {slot: entry.frame for slot, entry in layer.anchor.items()} == {0: 12, 1: 18}


@pytest.mark.parametrize("stored", [{}, {"cache_dtype": "int8"}, {"cache_device": "host memory"}], ids=str)
def test_its_plan_its_state_and_its_bits(pack, tmp_path, stored):
    policy = bookmarks(pack)(2, 6)
    whole, rollout = latents(spec(policy, **stored), SETTINGS)
    plan = spec(policy, **stored).plan()
    assert (rollout.cache.nbytes, rollout.cache.host_nbytes) == (plan.kv_bytes, plan.host_bytes)
    assert plan.layers[0].anchor_frames == 2

    first, half = latents(spec(policy, **stored), SETTINGS, 13)
    state = load_state(save_state(half.snapshot(), tmp_path / "a.state.safetensors"))
    rest, _ = latents(spec(policy, **stored), SETTINGS, 24, state)
    assert torch.equal(torch.cat([first, rest], 2), whole)


def test_its_state_is_refused_by_name_where_the_pack_is_not(pack, tmp_path):
    _, rollout = latents(spec(bookmarks(pack)()), SETTINGS, 12)
    path = save_state(rollout.snapshot(), tmp_path / "a.state.safetensors")
    del anchors.KINDS["bookmarks"]
    with pytest.raises(ValueError, match=r"^a\.state\.safetensors .*'bookmarks' is not known.*install the pack"):
        load_state(path)


def test_it_meets_the_packs_own_tests(pack):
    """Pairs and fault injection find it by the folder's name alone."""
    folder = Path(__file__).parent
    environment = os.environ | {"ADASTATE_PACKS": str(pack), "ADASTATE_CASES": "all"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "test_pairs.py",
        "test_faults.py",
        "-k",
        "bookmarks",
    ]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed is not None, done.stdout[-3000:]
    assert int(passed[1]) >= 12


def test_the_pages_sampler_is_the_arithmetic_that_it_says():
    exec(compile(block("class Straight"), "extending.md", "exec"), {"__name__": "other_pack"})
    steps = Schedule.shifted(3, 5.0)
    of = spec(Anchor(), window_frames=0)
    got, _ = latents(of, Settings(7, replace(steps, sampler="straight")), 3)

    model, seen = TinyModel(), []
    velocity = model.velocity
    model.velocity = lambda x, t, attention: seen.append((x.clone(), velocity(x, t, attention))) or seen[-1][1]
    rollout = Rollout(model, of, Settings(7, replace(steps, sampler="straight")))
    list(rollout.chunks(3))
    x = noise(7, 0, 0, (1, model.geometry.channels, 3, 4, 6))
    for i, (sigma, below) in enumerate(zip(steps.sigmas, (*steps.sigmas[1:], 0.0), strict=True)):
        torch.testing.assert_close(seen[i][0], x)
        x = x + (below - sigma) * seen[i][1]
    torch.testing.assert_close(got, x)
    assert not torch.allclose(got, latents(of, Settings(7, steps), 3)[0])
    torch.testing.assert_close(got, latents(of, Settings(7, replace(steps, sampler="euler")), 3)[0])
    with pytest.raises(ValueError, match="the sampler euler is known already"):
        extend.register(lambda sigmas, noises: None, name="euler")


def test_a_sampler_is_refused_where_chunks_are_denoised_together():
    extend.register(lambda sigmas, noises: None, name="mine")
    steps = replace(Schedule.shifted(3, 5.0), sampler="mine")
    with pytest.raises(ValueError, match="the sampler mine does not go with 3 chunks denoised together"):
        Rollout(TinyModel(), spec(Anchor(), blocks=3), Settings(7, steps))


def test_the_pages_preset(tmp_path):
    path = tmp_path / "my_system.toml"
    path.write_text(block("my.?system", "toml"))
    one = extend.register(read_preset(path))
    assert (one.name, one.window_frames, one.anchor) == ("my_system", 6, AnchorStatic(3))
    assert presets.recognised("checkpoints/My-System_v2.safetensors") == "my_system"
    assert presets.recognised("self_forcing_dmd.pt") == "self_forcing"
    assert one.schedule == presets.preset("self_forcing").schedule


WRONG = {
    "not TOML": ("title = ", "is not TOML"),
    "a stranger": ('titel = "x"', "titel is no field of a preset; they are name, title"),
    "a text": ('chunk_frames = "3"', "chunk_frames is '3', not int"),
    "a boolean": ("window_frames = true", "window_frames is True, not int"),
    "a number": ("timesteps = 1000.0", "timesteps is 1000.0, not a list"),
    "a list of texts": ('timesteps = ["a"]', "not a list of float"),
    "no steps": ("timesteps = []", "sigma list is empty"),
    "a step": ("timesteps = [2000.0]", "each must lie in"),
    "not falling": ("timesteps = [250.0, 500.0]", "fall strictly"),
    "infinity": ("shift = inf", "shift is inf"),
    "too many": ("chunk_frames = 65", "between 1 and 64"),
    "positions": ('positions = "left"', "must be one of"),
    "an anchor": ('anchor = "static"', "not a table"),
    "an anchor's kind": ('anchor = { kind = "mine" }', "'mine' is not known"),
    "an anchor's field": ('anchor = { kind = "static", sinks = 3 }', "other fields than its kind"),
    "an anchor's number": ('anchor = { kind = "static", sink_frames = 0 }', "at least 1 latent frame"),
    "the pack's own": ('name = "longlive"', "the pack's own"),
    "a name": ('name = "../up"', "no preset with a name"),
    "a pattern": ('names = ["("]', "no pattern"),
    "a space": ('space = "Wan 3"', "must be one of Wan 2.1, Wan 2.2"),
    "a start": ('start = "behind"', "must be one of before, inside"),
    "a preset in it": ("cached = 1", "cached is no field of a preset"),
    "a sampler": ('sampler = "mine"', "must be one of renoising"),
    "another encoding": (b'title = "\xff"', "is not TOML"),
    "deep": ("x = " + "[" * 3000, "is not TOML"),
    "large": ("# " + "x" * (1 << 16), "larger than"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_preset_that_is_none_says_why(name, tmp_path):
    text, why = WRONG[name]
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        extend.register(read_preset(path))
    assert why in str(caught.value) and "\n" not in str(caught.value)


@dataclass(frozen=True)
class Taken(Anchor):
    kind: ClassVar[str] = "static"


@dataclass(frozen=True)
class Absolute(Anchor):
    kind: ClassVar[str] = "absolute_one"
    takes_evicted: ClassVar[bool] = True


class Plain(Anchor):
    kind: ClassVar[str] = "plain"


REFUSED = {
    "taken": (Taken, "which AnchorStatic has"),
    "evicted": (Absolute, "say relative_only"),
    "no dataclass of its own": (Plain, "must be a frozen dataclass"),
    "no policy": (3, "cannot be registered"),
    "a sampler without a name": (print, "cannot be registered"),
    "an own preset": (Preset("krea_14b", "mine", "mine"), "the pack's own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_registered_says_why(name):
    thing, why = REFUSED[name]
    with pytest.raises(ValueError, match=why):
        extend.register(thing)


def test_a_pack_that_is_loaded_again_takes_its_kind_again(pack):
    module = load_pack(pack)
    module.adastate_register()
    first = anchors.KINDS["bookmarks"]
    importlib.reload(sys.modules[f"{module.__name__}.policy"])
    assert anchors.KINDS["bookmarks"] is not first


def test_the_page_says_what_a_policy_can_do():
    """Its tables name every method and property that a policy of another pack may define, and every verb of a layer."""
    page = textwrap.dedent(DOCS.read_text(encoding="utf-8"))
    for name in ("check", "slot_of", "evicted", "state_committed", "committed", "bystander"):
        assert f"| `{name}(" in page and callable(getattr(Anchor, name))
    for name in ("frames", "relative_only", "takes_evicted", "blends", "replay_frames", "kind"):
        assert f"| `{name}` |" in page and hasattr(Anchor, name)
    verbs = [name for name in vars(extend.LayerView) if not name.startswith("_") and name != "window_frames"]
    assert verbs and all(f"`{verb}`" in page for verb in verbs)
