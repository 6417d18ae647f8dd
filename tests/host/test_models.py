"""Model nodes: every layout and preset in a real rollout, prompts over time, and what a file or a plan is said to take."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from pathlib import Path

import comfy.sd
import folder_paths
import numpy as np
import pytest
import torch
from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive, AnchorEMA, AnchorMemory, AnchorStatic
from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_pack.adastate_core.schedules.schedule import Schedule
from adastate_pack.adastate_core.weights.presets import PRESETS
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host.checkpoint_wishes import WEIGHT_DTYPES
from conftest import NODES, PACK, HostNode, random_wan
from safetensors.torch import save_file

AUTO = {"steps": 0, "shift": 0.0, "chunk_frames": 0, "window_frames": -1, "positions": "auto"}


@contextlib.contextmanager
def first_folder(folder, kind):
    """An empty folder that the host looks into first for models of this kind."""
    folder.mkdir()
    paths = folder_paths.folder_names_and_paths[kind][0]
    paths.insert(0, str(folder))
    folder_paths.filename_list_cache.clear()
    yield folder
    paths.remove(str(folder))
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def models(folders):
    with first_folder(Path(folders) / "models", "diffusion_models") as folder:
        yield folder


def written(models, name, content, metadata=None):
    """A file in the models folder that the host's lists know."""
    path = models / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({key: value.clone() for key, value in content.items()}, path, metadata=metadata)
    else:
        torch.save(content, path)
    folder_paths.filename_list_cache.clear()
    return name


def load(file, weight_dtype="default", **more):
    return HostNode("AdaStateLoadModel")(file=file, weight_dtype=weight_dtype, **more).args[0]


def hosts_own(file, weight_dtype="default"):
    import nodes

    return nodes.UNETLoader().load_unet(file, weight_dtype)[0]


def report_of(output):
    return json.loads(output.args[2])


def latents_of(output):
    return output.args[0]["samples"]


def renamed(state, prefix, infix=""):
    """A state dict under a trainer's names."""
    return {prefix + name.replace(".self_attn", f".{infix}self_attn"): value for name, value in state.items()}


LAYOUTS = {
    "plain.safetensors": lambda s, o: s,
    "hosts_prefix.safetensors": lambda s, o: renamed(s, "model.diffusion_model."),
    "model_prefix.safetensors": lambda s, o: renamed(s, "model."),
    "flat_ema.safetensors": lambda s, o: renamed(s, "generator_ema.model.") | renamed(o, "generator.model."),
    "three.pt": lambda s, o: {
        "generator": renamed(o, "model."), "generator_ema": renamed(s, "model."), "critic": renamed(o, "model."),
    },
    "generator.pt": lambda s, o: {"generator": renamed(s, "model."), "critic": renamed(o, "model.")},
    "fsdp.pt": lambda s, o: {
        "generator_ema": renamed(s, "model._fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
    },
    "compiled.pth": lambda s, o: {"generator": renamed(s, "_orig_mod.model.")},
    "plain.ckpt": lambda s, o: s,
}  # fmt: skip


@pytest.fixture
def plain(models, wan_state, rollout):
    """The latents of the host's own loader on the plain file."""
    return latents_of(rollout(model=hosts_own(written(models, "reference.safetensors", wan_state))))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_latents_of_the_hosts_loader(models, wan_state, rollout, plain, name):
    file = written(models, name, LAYOUTS[name](wan_state, random_wan(seed=4)))
    assert HostNode("AdaStateLoadModel").validate(file=file) is True
    assert torch.equal(latents_of(rollout(model=load(file))), plain)


@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_weight_dtypes_are_the_hosts(models, wan_state, rollout, weight_dtype):
    file = written(models, "plain.safetensors", wan_state)
    model = load(file, weight_dtype)
    weight = model.model.diffusion_model.blocks[0].self_attn.q.weight
    assert weight.dtype == WEIGHT_DTYPES[weight_dtype].get("dtype", torch.float32)
    if weight_dtype.startswith(("default", "fp8")):
        theirs = hosts_own(file, weight_dtype)
        assert torch.equal(latents_of(rollout(model=model, length=9)), latents_of(rollout(model=theirs, length=9)))
    with pytest.raises(ValueError, match="weight_dtype is 'int4'; it must be one of default, fp32"):
        load(file, "int4")


def test_a_new_file_is_listed_and_the_packs_own_is(models, wan_state, node, rollout):
    def listed():
        return NODES["AdaStateLoadModel"].INPUT_TYPES()["required"]["file"][1]["options"]

    assert "adastate_demo.safetensors" in listed() and "new.pt" not in listed()
    written(models, "new.pt", {"generator": renamed(wan_state, "model.")})
    assert "new.pt" in listed()
    (models / "notes.txt").write_text("no model")
    folder_paths.filename_list_cache.clear()
    assert "notes.txt" not in listed()
    demo = load("adastate_demo.safetensors")
    words = {"terrain": "meadow", "pace": "slow", "balloon": "gold", "lantern": "lantern"}
    inputs = AUTO | {"positive": node("AdaStateDemoPrompt")(**words).args[0], "width": 64, "height": 64, "length": 21}
    ours, theirs = rollout(model=demo, **inputs), rollout(model=hosts_own("adastate_demo.safetensors"), **inputs)
    assert torch.equal(latents_of(ours), latents_of(theirs))
    assert report_of(ours)["settings"] == report_of(theirs)["settings"] and report_of(ours)["warnings"] == []
    ignored = report_of(rollout(model=load("adastate_demo.safetensors", preset="none"), **inputs))
    assert (
        ignored["settings"]["anchor"] == {"kind": "none"} and "says nothing of being causal" in ignored["warnings"][0]
    )


@pytest.mark.parametrize("name", ["", "gone.safetensors", "../gone.safetensors", "/etc/passwd", "folder.safetensors"])
def test_files_that_are_not_listed(models, name):
    (models / "folder.safetensors").mkdir()
    folder_paths.filename_list_cache.clear()
    for node_id in ("AdaStateLoadModel", "AdaStateInspectCheckpoint"):
        reason = HostNode(node_id).validate(file=name)
        assert (
            "no file is chosen" in reason if not name else "is not among the files in models/diffusion_models" in reason
        )
        assert HostNode(node_id).validate(file=None) is True
        inputs = {"weight_dtype": "default"} if node_id == "AdaStateLoadModel" else {}
        with pytest.raises(ValueError, match="no file is chosen|is not among the files"):  # a linked name
            HostNode(node_id)(file=name, **inputs)


def test_the_list_of_an_empty_folder(models, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda kind: [])
    assert NODES["AdaStateLoadModel"].INPUT_TYPES()["required"]["file"][1]["options"] == [""]
    assert "put a causal Wan checkpoint into models/diffusion_models" in HostNode("AdaStateLoadModel").validate(file="")


def test_a_changed_file_is_loaded_again(models, wan_state):
    file = written(models, "a.safetensors", wan_state)
    fingerprint = NODES["AdaStateLoadModel"].fingerprint_inputs
    before = fingerprint(file=file, weight_dtype="default")
    assert before == fingerprint(file=file, weight_dtype="default") != fingerprint(file=file, weight_dtype="bf16")
    os.utime(models / file, ns=(1, 1))
    assert fingerprint(file=file, weight_dtype="default") != before


NAMED = {
    "self_forcing_dmd.safetensors": "self_forcing",
    "framewise/causal_forcing.safetensors": "causal_forcing_frame",
    "Wan2_1-LongLive-1.3B.safetensors": "longlive",
    "rolling_forcing_dmd.safetensors": "rolling_forcing",
    "framewise-1step.safetensors": "causal_forcing_frame_1step",
    "wan_1.3b_adastate.safetensors": "adastate",
    "AdaState-alpha4.safetensors": "adastate_long",
}


@pytest.mark.parametrize("name", NAMED)
def test_a_preset_by_name_is_what_the_rollout_does(models, wan_state, rollout, name):
    preset = PRESETS[NAMED[name]]
    out = report_of(rollout(model=load(written(models, name, wan_state)), length=9, **AUTO))
    settings = out["settings"]
    assert settings["preset"] == preset.name and settings["anchor"] == preset.anchor.describe()
    for number in ("chunk_frames", "window_frames", "positions"):
        assert settings[number] == getattr(preset, number)
    shifted = [5 * t / (1000 + 4 * t) for t in preset.timesteps]
    assert settings["sigmas"] == pytest.approx(shifted)
    first = [5 * t / (1000 + 4 * t) for t in preset.first_timesteps]
    assert settings.get("first_sigmas", []) == pytest.approx(first) and out["warnings"] == []


def test_where_auto_looks(models, wan_state, rollout):
    def used(name, content, metadata=None, **more):
        return report_of(rollout(model=load(written(models, name, content, metadata), **more), length=5, **AUTO))

    wish = {"steps": 3, "shift": 4.0, "chunk_frames": 2, "window_frames": 5, "positions": "fixed"}
    own = used("longlive.safetensors", wan_state, {"adastate": json.dumps(wish)})
    assert wish.items() <= own["settings"].items() and "preset" not in own["settings"]
    trainers = used("model.pt", {"generator": renamed(wan_state, "model.")})
    assert trainers["settings"]["preset"] == "self_forcing"
    ours = used("adastate_1.3b.pt", {"generator": renamed(wan_state, "model.")})
    assert ours["settings"]["preset"] == "adastate" and ours["settings"]["positions"] == "fixed"
    said = {"steps": 2, "window_frames": 4, "positions": "packed", "state_frames": 2}
    wins = used("adastate.safetensors", wan_state, {"adastate": json.dumps(said)})["settings"]
    assert "preset" not in wins and wins["positions"] == "packed" and wins["anchor"]["state_frames"] == 2
    unknown = used("model.safetensors", wan_state)
    assert "preset" not in unknown["settings"] and "says nothing of being causal" in unknown["warnings"][0]
    asked = used("longlive.safetensors", wan_state, preset="memrope")
    assert asked["settings"]["preset"] == "memrope" and asked["settings"]["anchor"]["kind"] == "memory"
    none = used("longlive.safetensors", wan_state, preset="none")
    assert "preset" not in none["settings"] and none["settings"]["window_frames"] == 3
    with pytest.raises(ValueError, match="preset is 'best'; it must be one of auto, self_forcing"):
        used("longlive.safetensors", wan_state, preset="best")
    named = used("x.safetensors", wan_state, {"adastate": json.dumps({"preset": "longlive", "window_frames": 4})})
    assert named["settings"]["window_frames"] == 4 and named["settings"]["anchor"] == AnchorStatic(3).describe()
    assert named["settings"]["positions"] == "absolute"
    senseless = {
        "steps": "many", "shift": math.nan, "chunk_frames": -1, "window_frames": True, "positions": ["packed"], "preset": [1],
    }  # fmt: skip
    fallback = used("y.safetensors", wan_state, {"adastate": json.dumps(senseless)})["settings"]
    assert {
        "steps": 4,
        "shift": 5.0,
        "chunk_frames": 3,
        "window_frames": 3,
        "positions": "packed",
    }.items() <= fallback.items()


def test_a_number_or_an_anchor_of_the_rollout_wins(rollout, model, node):
    out = node("AdaStateModelPreset")(model=model, preset="longlive")
    preset, text = out.args
    assert text == PRESETS["longlive"].describe() and out.ui.as_dict()["text"] == (text,)
    asked = {"steps": 2, "shift": 3.0, "chunk_frames": 2, "window_frames": 4, "positions": "fixed"}
    settings = report_of(rollout(model=preset, length=9, **asked))["settings"]
    assert asked.items() <= settings.items()
    assert settings["sigmas"] == list(Schedule.shifted(2, 3.0).sigmas)
    for anchor in (AnchorAdaptive(1), AnchorEMA(2, 0.9), AnchorMemory(1)):
        settings = report_of(rollout(model=preset, length=9, anchor=anchor, **AUTO))["settings"]
        assert settings["anchor"] == anchor.describe()
        assert settings["positions"] == ("fixed" if anchor.state_frames else "packed")
    settings = report_of(rollout(model=preset, length=9, anchor=Anchor(), **AUTO))["settings"]
    assert settings["anchor"] == {"kind": "none"} and settings["positions"] == "absolute"


def test_a_state_with_packed_positions_goes_on_under_auto(rollout):
    """A hidden state's positions are fixed where nothing else is said; a state of before, when they were packed, goes on so."""
    anchor = AnchorAdaptive(1)
    auto = AUTO | {"anchor": anchor}
    assert report_of(rollout(length=9, **auto))["settings"]["positions"] == "fixed"
    before = rollout(length=9, **(auto | {"positions": "packed"})).args[1]
    whole = rollout(length=21, **(auto | {"positions": "packed"})).args[0]["samples"]
    gone_on = rollout(length=21, resume=before, **auto)
    assert report_of(gone_on)["settings"]["positions"] == "packed"
    assert torch.equal(gone_on.args[0]["samples"], whole)


def test_a_preset_leaves_lora_and_model_as_they_are(rollout, model, node):
    delta = {
        f"diffusion_model.blocks.{i}.self_attn.q.weight": ("diff", (torch.randn(128, 128) * 0.05,)) for i in (0, 1)
    }
    with_lora = model.clone()
    with_lora.add_patches(delta)
    preset = node("AdaStateModelPreset")(model=with_lora, preset="infinity_rope").args[0]
    same = {"anchor": AnchorStatic(1), "window_frames": 2, "length": 21}
    expected = latents_of(rollout(model=with_lora, **same))
    assert not torch.equal(expected, latents_of(rollout(**same)))
    assert torch.equal(latents_of(rollout(model=preset, length=21, window_frames=-1)), expected)
    clone = preset.clone()
    clone.add_patches(delta)
    assert report_of(rollout(model=clone, length=5, **AUTO))["settings"]["preset"] == "infinity_rope"
    assert "preset" not in report_of(rollout(model=with_lora, length=5, **AUTO))["settings"]


def test_a_video_longer_than_a_preset_is_made_for(rollout, model, node):
    preset = node("AdaStateModelPreset")(model=model, preset="causal_forcing_frame_1step").args[0]
    settings = AUTO | {"width": 16, "height": 16}
    warnings = report_of(rollout(model=preset, length=85, **settings))["warnings"]
    assert len(warnings) == 1 and "was made for 21 latent frames (81 pictures) and 22 were asked for" in warnings[0]
    assert report_of(rollout(model=preset, length=81, **settings))["warnings"] == []
    assert report_of(rollout(model=preset, length=85, anchor=AnchorStatic(1), **settings))["warnings"] == []
    longlive = node("AdaStateModelPreset")(model=model, preset="longlive").args[0]
    for positions, length, warned in (
        ("auto", 961, True),
        ("auto", 957, False),
        ("packed", 961, False),
        ("packed", 0, False),
    ):
        text = node("AdaStatePlan")(model=longlive, width=16, height=16, length=length, positions=positions).args[0]
        assert ("957 pictures" in text and "set positions to packed" in text) is warned


@torch.no_grad()
def core_rollout(model, positive, spec_options, schedule, frames, prompts=None, seed=5, settings=None):
    """The latents of the core's own rollout on the host's model, without the node; and the forwards that it took."""
    host = adapter.HostModel(model, positive[0][0], 1)
    numbers = {"chunk_frames": 3, "window_frames": 3, "anchor": Anchor(), "positions": "packed"} | spec_options
    spec = RolloutSpec(host.geometry, 1, 4, 4, dtype=host.dtype, **numbers)
    host.load(spec.plan(16))
    rollout = Rollout(host, spec, Settings(seed, schedule), text_tokens=16, prompts=prompts)
    latents = torch.cat([chunk.latents for chunk in rollout.chunks(frames)], 2)
    return adapter.to_vae_space(model, latents)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if not preset.driven_by_sound])
def test_each_preset_is_the_core_with_its_settings(rollout, model, positive, node, name):
    preset = PRESETS[name]
    given = node("AdaStateModelPreset")(model=model, preset=name).args[0]
    frames = {1: 4, 3: 9, 8: 17}[preset.chunk_frames]
    if preset.restart_frames:
        frames = preset.restart_frames + 2
    out = latents_of(rollout(model=given, length=4 * frames - 3, **AUTO))
    lists = [[5 * t / (1000 + 4 * t) for t in steps] for steps in (preset.timesteps, preset.first_timesteps)]
    told = ()
    if name == "causvid":
        lists, told = [[8 * u / (1 + 7 * u) for u in (1.0, 0.28, 0.12)], []], (1000.0, 757.0, 522.0)
    if name == "krea_14b":
        lists, told = [[1.0, 0.9375, 5 / 6, 0.625, 0.005 / 1.004], []], (1000.0, 937.5, 2500 / 3, 625.0, 0.0)
    options = {
        "chunk_frames": preset.chunk_frames, "window_frames": preset.window_frames, "anchor": preset.anchor,
        "positions": preset.positions, "blocks": preset.blocks, "restart_frames": preset.restart_frames,
        "overlap_frames": preset.overlap_frames, "shares_window": preset.shares_window,
        "one_pass_recache": preset.one_pass_recache, "remade": preset.remade,
        "ending": "as published" if preset.shares_window else "open",
    }  # fmt: skip
    if name.startswith("longlive2"):  # as the published scheduler's set_timesteps has it
        even = np.linspace(np.float32(0.999), 0, len(preset.timesteps) + 1, dtype=np.float64)[:-1]
        levels = 5 * even / (1 + 4 * even)
        lists, told = [levels.astype(np.float32).tolist(), []], tuple((1000 * levels).astype(np.int64).tolist())
        assert list(told) == [999, 937, 833, 624] or list(told) == [999, 833]
    sampler = "unipc" if name.startswith("longlive2") else "renoising"
    schedule = Schedule(tuple(lists[0]), first_sigmas=tuple(lists[1]), told=told, sampler=sampler)
    torch.testing.assert_close(out, core_rollout(model, positive, options, schedule, frames), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["rolling_forcing", "causal_forcing_frame_1step", "self_forcing", "krea_14b"])
def test_progress_ends_where_it_says(rollout, model, node, progress_told, name):
    given = node("AdaStateModelPreset")(model=model, preset=name).args[0]
    rollout(model=given, length=33, **AUTO)
    chunks = {"rolling_forcing": 3, "causal_forcing_frame_1step": 9, "self_forcing": 3, "krea_14b": 3}[name]
    passes = {"rolling_forcing": 4 + 2 * chunks, "causal_forcing_frame_1step": 5 + 2 * (chunks - 1)}.get(
        name, 5 * chunks
    )
    passes += 2 if name == "krea_14b" else 0  # five of a chunk, and one over the past of all but the first
    assert [told[:2] for told in progress_told] == [(i + 1, passes) for i in range(passes)]


def test_rolling_forcing_refuses_what_does_not_go_with_it(rollout, model, node):
    given = node("AdaStateModelPreset")(model=model, preset="rolling_forcing").args[0]
    with pytest.raises(ValueError, match="5 chunks denoised together have no single hidden state"):
        rollout(model=given, anchor=AnchorAdaptive(1), **AUTO)
    settings = report_of(rollout(model=given, length=21, **(AUTO | {"steps": 3})))["settings"]
    assert settings["steps"] == 3 and len(settings["sigmas"]) == 3


def test_the_page_of_presets_says_what_they_are():
    """To renew the table: copy the expected lines that the failure shows."""
    head = "| preset | system | steps | shift | chunk | window | anchor | positions | made for |"
    rows = [head, "| --- " * 9 + "|"]
    for preset in PRESETS.values():
        numbers = [f"{value:g}" for key, value in preset.anchor.describe().items() if key != "kind"]
        anchor = " ".join([preset.anchor.kind, *([f"({', '.join(numbers)})"] if numbers else [])])
        steps = ", ".join(f"{t:g}" for t in preset.timesteps)
        made_for = f"{4 * preset.trained_frames - 3} pictures" if preset.longer else "any length"
        cells = [
            preset.name, f"{preset.title} ({preset.source})", steps, f"{preset.shift:g}" if preset.warp else "none",
            f"{preset.chunk_frames}", f"{preset.window_frames}", anchor, preset.positions, made_for,
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    text = (PACK / "web" / "docs" / "AdaStateModelPreset.md").read_text()
    assert "\n".join(rows) in text, "\n" + "\n".join(rows)


@pytest.fixture
def loras(folders):
    with first_folder(Path(folders) / "loras", "loras") as folder:
        yield folder


def test_longlives_lora_rolls_out_like_weights_with_the_update_added(models, loras, wan_state, rollout, node):
    """Rank 8 on every linear layer of the blocks, in the layout of its lora.pt; added by hand on the other side."""
    generator = torch.Generator().manual_seed(3)
    lora, merged = {}, dict(wan_state)
    for name, weight in wan_state.items():
        if name.startswith("blocks.") and name.endswith(".weight") and weight.ndim == 2:
            down, up = (
                torch.randn(shape, generator=generator) * 0.05 for shape in ((8, weight.shape[1]), (weight.shape[0], 8))
            )
            module = f"base_model.model.{name.removesuffix('.weight')}"
            lora |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
            merged[name] = weight + 0.5 * (up @ down)
    torch.save({"generator_lora": lora, "step": 1}, loras / "lora.pt")
    folder_paths.filename_list_cache.clear()
    load_lora = node("AdaStateLoadLora")
    assert load_lora.validate(file="lora.pt") is True
    base = load(written(models, "base.pt", {"generator": renamed(wan_state, "model.")}), preset="longlive")
    with_lora = load_lora(model=base, file="lora.pt", strength=0.5).args[0]
    ours = rollout(model=with_lora, length=33, **AUTO)
    theirs = rollout(model=load(written(models, "merged.safetensors", merged), preset="longlive"), length=33, **AUTO)
    plain = rollout(model=base, length=33, **AUTO)
    assert report_of(ours)["settings"]["preset"] == "longlive"
    torch.testing.assert_close(latents_of(ours), latents_of(theirs), atol=1e-4, rtol=0)
    assert (latents_of(ours) - latents_of(plain)).abs().max() > 1e-2


def test_a_lora_that_does_not_fit_is_refused(loras, wan_state, model, node):
    load_lora = node("AdaStateLoadLora")
    assert "'gone.pt' is not among the files in models/loras" in load_lora.validate(file="gone.pt")
    pair = {"blocks.7.ffn.0.lora_A.weight": torch.zeros(2, 128), "blocks.7.ffn.0.lora_B.weight": torch.zeros(192, 2)}
    save_file(pair, loras / "other.safetensors")
    folder_paths.filename_list_cache.clear()
    with pytest.raises(
        ValueError, match="other.safetensors is a LoRA of another model: this one has no blocks.7.ffn.0"
    ):
        load_lora(model=model, file="other.safetensors")
    save_file(wan_state, loras / "whole.safetensors")
    folder_paths.filename_list_cache.clear()
    with pytest.raises(ValueError, match="whole.safetensors is no LoRA"):
        load_lora(model=model, file="whole.safetensors")


CAUSAL = {"config": json.dumps({"transformer": {"causal_ar": True}})}


def test_a_file_for_the_hosts_own_causal_class_rolls_out_like_any_other(models, wan_state, rollout, positive):
    """Newer hosts load it as a class of their own, with the same weights; older ones do not read the entry."""
    import comfy.supported_models
    import comfy_extras.nodes_custom_sampler as host

    file = written(models, "causal_forcing.safetensors", wan_state, CAUSAL)
    ours, theirs = load(file, preset="none"), hosts_own(file)
    newer = hasattr(comfy.supported_models, "WAN21_CausalAR_T2V")
    assert type(theirs.model.model_config).__name__ == ("WAN21_CausalAR_T2V" if newer else "WAN21_T2V")
    assert type(ours.model.model_config).__name__ == "WAN21_T2V"

    @torch.no_grad()
    def run(model):
        inputs = {"width": 64, "height": 64, "length": 21}
        sigmas = torch.tensor([1.0, 0.8, 0.0])
        sampler = HostNode("AdaStateSampler")(chunk_frames=3, window_frames=3, positions="packed").args[0]
        latent = {"samples": torch.zeros(1, 16, 6, 4, 4)}
        guider, noise = host.BasicGuider.execute(model, positive).args[0], host.RandomNoise.execute(5).args[0]
        sampled = host.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]
        plan = json.loads(HostNode("AdaStatePlan")(model=model, **inputs).args[1])["plan_bytes"]
        out = rollout(model=model, anchor=AnchorAdaptive(1), **AUTO)
        again = rollout(model=model, **AUTO)
        assert torch.equal(latents_of(again), latents_of(rollout(model=model, **AUTO)))
        return [latents_of(out), latents_of(again), sampled], plan, report_of(out)["settings"]

    (mine, plan, settings), (others, their_plan, their_settings) = run(ours), run(theirs)
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
    assert (plan, settings) == (their_plan, their_settings)
    text = HostNode("AdaStateInspectCheckpoint")(file=file).args[0]
    assert "Wan 2.1 text to video" in text and "Causal-Forcing" in text


LEFT_OUT = {
    "an encoder of sound": ({"audio.encoder.weight": (3, 3), "audio.out.weight": (3,)}, "2 weights .*: 2 of audio"),
    "image attention": (
        {f"blocks.{i}.cross_attn.k_img.weight": (128, 128) for i in (0, 1)}, "2 weights .*: 2 of blocks' cross_attn.k_img",
    ),
    "a reference": ({"ref_conv.weight": (128, 16, 2, 2)}, "1 weight .*: 1 of ref_conv"),
}  # fmt: skip


def test_what_a_models_file_holds_besides_is_counted_where_it_is_seen(models, wan_state, rollout, caplog):
    plain = latents_of(rollout(model=load(written(models, "plain.safetensors", wan_state)), length=5))
    for which, (shapes, words) in LEFT_OUT.items():
        extra = {name: torch.ones(shape) for name, shape in shapes.items()}
        file = written(models, "a.safetensors", wan_state | extra)
        out = HostNode("AdaStateLoadModel")(file=file, weight_dtype="default")
        text = out.ui.as_dict()["text"][0]
        assert re.fullmatch(f"a.safetensors holds {words}", text) and text in caplog.text, which
        assert text in HostNode("AdaStateInspectCheckpoint")(file=file).args[0]
        made = rollout(model=out.args[0], length=5)
        assert text in report_of(made)["warnings"] and torch.equal(latents_of(made), plain)
    assert HostNode("AdaStateLoadModel")(file="plain.safetensors", weight_dtype="default").ui is None


def test_other_models_of_a_trainers_file_are_named_by_the_inspection(models, wan_state):
    content = {
        "generator": wan_state,
        "generator_ema": {},
        "critic": wan_state,
        "optimizer": {"state": {0: 1}},
        "step": 3,
    }
    file = written(models, "a.pt", content)
    assert (
        "not taken, beside its generator: critic, optimizer" in HostNode("AdaStateInspectCheckpoint")(file=file).args[0]
    )
    flat = {f"{part}.{name}": value for part in ("generator_ema", "critic") for name, value in wan_state.items()}
    file = written(models, "a.safetensors", flat)
    text = HostNode("AdaStateInspectCheckpoint")(file=file).args[0]
    assert "not taken, beside its generator_ema: critic" in text


OTHER_KINDS = {
    "a VACE model": ({"vace_patch_embedding.weight": (4,), "vace_blocks.0.x": (2,)}, "is a Wan VACE model .*2 weights such as"),
    "a broken VACE model": ({"vace_patch_embedding.weight": ()}, "is a Wan VACE model .*1 weights such as vace_patch"),
    "VACE blocks alone": ({"vace_blocks.7.before_proj.weight": (2, 2)}, "is a Wan VACE model"),
    "image to video": ({"img_emb.proj.0.bias": (4,), "img_emb.emb_pos": ()}, "is a Wan image-to-video model"),
    "a camera": ({"control_adapter.conv.weight": (4,)}, "is a Wan camera control model"),
    "sound": ({"audio_proj.audio_proj_glob_1.layer.weight": (4,)}, "is a Wan model that is driven by sound in another way"),
    "the rest of S2V": ({"audio_injector.injector.0.q.weight": (4,)}, "is what is left of a Wan 2.2 S2V model: .*1 of its"),
    "S2V without its mask": (
        {"casual_audio_encoder.encoder.final_linear.weight": (128, 128)}, "does not fit together: trainable_cond_mask.weight is",
    ),
    "faces": ({"face_adapter.fuser_blocks.0.k_norm.weight": (4,)}, "is a Wan Animate model"),
    "poses": ({"patch_embedding_pose.weight": (4,)}, "is a Wan model that is driven by poses"),
    "a LoRA too": ({"blocks.0.ffn.0.lora_A.weight": (4, 128)}, "holds a model and 1 weights of a LoRA beside it"),
    "peft, not merged": ({"blocks.0.ffn.0.base_layer.weight": (4, 128)}, "was saved with a LoRA still apart"),
}  # fmt: skip


def test_another_kind_of_wan_model_is_refused_before_it_is_loaded(models, wan_state, monkeypatch):
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda *a, **k: pytest.fail("loaded"))
    for shapes, words in OTHER_KINDS.values():
        file = written(models, "a.safetensors", wan_state | {n: torch.ones(shape) for n, shape in shapes.items()})
        for run in (load, lambda file: HostNode("AdaStateInspectCheckpoint")(file=file)):
            with pytest.raises(ValueError, match=f"^a.safetensors {words}") as error:
                run(file)
            assert "\n" not in str(error.value)


def test_a_weight_that_is_there_twice_is_refused(models, wan_state):
    twice = renamed(wan_state, "model.") | {"blocks.1.ffn.0.weight": wan_state["blocks.1.ffn.0.weight"] + 1}
    file = written(models, "a.pt", twice)
    with pytest.raises(
        ValueError, match="a.pt holds blocks.1.ffn.0.weight twice, as it is and under model., and nothing says"
    ):
        load(file)
    twice = renamed(wan_state, "module.") | {"_orig_mod.blocks.1.ffn.0.weight": wan_state["blocks.1.ffn.0.weight"]}
    with pytest.raises(
        ValueError, match="twice, as _orig_mod.blocks.1.ffn.0.weight and as module.blocks.1.ffn.0.weight"
    ):
        load(written(models, "b.safetensors", twice))


def test_what_the_host_raises_at_a_file_is_one_sentence(models, wan_state, monkeypatch):
    file = written(models, "a.safetensors", wan_state)
    for fault in (
        IndexError("tuple index out of range"),
        AttributeError("'NoneType' object"),
        AssertionError(),
        KeyError("x"),
    ):

        def fail(*args, fault=fault, **options):
            raise fault

        monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", fail)
        with pytest.raises(
            ValueError, match="a.safetensors is laid out like a Wan .* the host cannot load it"
        ) as error:
            load(file)
        assert "tuple" not in str(error.value) and "NoneType" not in str(error.value)


def test_scales_that_the_host_would_drop_are_refused(models, wan_state):
    fp8 = {
        name: value.to(torch.float8_e4m3fn) if name.endswith("ffn.0.weight") else value
        for name, value in wan_state.items()
    }
    fp8 |= {f"blocks.{i}.ffn.0.scale_weight": torch.tensor(2.0) for i in (0, 1)}
    file = written(models, "a.safetensors", fp8)
    for read in (load, lambda file: HostNode("AdaStateInspectCheckpoint")(file=file)):
        with pytest.raises(
            ValueError, match=r"a.safetensors holds 2 scales of quantised weights \(such as .*without the mark"
        ):
            read(file)
    out = HostNode("AdaStateLoadModel")(
        file=written(models, "b.safetensors", fp8 | {"scaled_fp8": torch.tensor([], dtype=torch.float8_e4m3fn)}),
        weight_dtype="default",
    )
    assert out.ui is None


def test_settings_of_a_file_that_make_no_sense_are_said(models, wan_state, rollout):
    own = {"steps": 0, "preset": "longlife", "state_frames": 99, "window_frames": 4}
    file = written(models, "x.safetensors", wan_state, {"adastate": json.dumps(own)})
    report = report_of(rollout(model=load(file), length=5, **AUTO))
    words = "the checkpoint's own settings say steps 0, preset 'longlife', state_frames 99, which makes no sense here"
    assert [each.startswith(words) for each in report["warnings"]] == [True]
    assert words in HostNode("AdaStateInspectCheckpoint")(file=file).args[0]
