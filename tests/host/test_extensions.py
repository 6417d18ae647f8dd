"""What others add: hooks of packs in any order, and presets as TOML in the user's folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import folder_paths
import pytest
import torch
from adastate_pack.adastate_core import extend
from adastate_pack.adastate_core.families.wan21 import WAN21_TEXT
from adastate_pack.adastate_core.geometry import ModelGeometry
from adastate_pack.adastate_core.schedules.solvers import SAMPLERS
from adastate_pack.adastate_core.weights.presets import PRESETS, Preset
from adastate_pack.nodes.builder import Asked, Subject, build
from adastate_pack.nodes.host import pack_hooks as extensions
from conftest import NODES, HostNode

TEXT = 'title = "Mine"\nwindow_frames = {window}\npositions = "packed"\n'


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """The user's folder of presets; what it gave is forgotten afterwards."""
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    folder = tmp_path / "adastate" / "presets"
    folder.mkdir(parents=True)
    before = dict(PRESETS)
    yield folder
    for file in folder.iterdir():
        file.unlink()
    extensions.preset_names()
    assert before == PRESETS


def listed() -> list[str]:
    return next(i for i in NODES["AdaStateModelPreset"].define_schema().inputs if i.id == "preset").options


def test_a_file_is_a_preset_until_it_goes(presets, model, rollout):
    (presets / "mine.toml").write_text(TEXT.format(window=4))
    assert "mine" in listed()
    shown = HostNode("AdaStateModelPreset")(model=model, preset="mine")
    out = rollout(model=shown.args[0], window_frames=-1, chunk_frames=0, steps=1, shift=5.0, length=13)
    assert '"preset": "mine"' in out.args[2] and '"window_frames": 4' in out.args[2]
    (presets / "mine.toml").write_text(TEXT.format(window=5) + "# longer")
    assert "mine" in listed() and PRESETS["mine"].window_frames == 5
    (presets / "mine.toml").unlink()
    assert "mine" not in listed()


def test_what_is_no_preset_is_left_out_and_told(presets, caplog):
    (presets / "good.toml").write_text(TEXT.format(window=4))
    (presets / "bad.toml").write_text("window_frames = -1")
    (presets / "other.toml").write_text('name = "good"')
    (presets / "longlive.toml").write_text(TEXT.format(window=4))
    names = listed()
    assert "good" in names and "bad" not in names and PRESETS["good"].window_frames == 4
    for words in ("bad.toml is no preset: window_frames is -1", "other.toml has the name good", "the preset longlive"):
        assert words in caplog.text


def a_pack(name: str, hook) -> ModuleType:
    module = ModuleType(name)
    module.adastate_register = hook
    return module


def test_hooks_are_called_once_whichever_pack_came_first(monkeypatch, caplog):
    assert sys.modules["adastate"] is extend
    called = []

    def fails() -> None:
        called.append("fails")
        raise RuntimeError("no")

    monkeypatch.setitem(sys.modules, "a_pack_that_fails", a_pack("a_pack_that_fails", fails))
    monkeypatch.setitem(sys.modules, "a_pack", a_pack("a_pack", lambda: called.append("first")))
    extensions.call_packs()
    monkeypatch.setitem(sys.modules, "a_later_pack", a_pack("a_later_pack", lambda: called.append("second")))
    extensions.call_packs()
    assert sorted(called) == ["fails", "first", "second"]
    assert "a_pack_that_fails" in caplog.text


def test_a_family_that_names_its_samplers_refuses_others(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", lambda sigmas, noises: None)
    monkeypatch.setitem(PRESETS, "with_mine", Preset("with_mine", "Mine", "mine", sampler="mine"))
    family = replace(WAN21_TEXT, samplers=("renoising",))
    subject = Subject(
        geometry=ModelGeometry(16, 2, 1, 128), dtype=torch.float32, wishes={"preset": "with_mine"}, family=family
    )
    asked = Asked(height=4, width=4, fps=16.0)
    with pytest.raises(ValueError, match="the sampler is mine, and Wan 2.1 text to video takes renoising"):
        build(subject, asked)
    assert build(replace(subject, family=WAN21_TEXT), asked).schedule.sampler == "mine"
