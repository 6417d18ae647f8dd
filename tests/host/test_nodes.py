"""The contract of the nodes: ids, sockets, order, tooltips, ranges; states; refusals before anything is loaded."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive, AnchorStatic
from adastate_pack.nodes.host import api
from conftest import NODES, PACK, random_wan
from safetensors.torch import save_file

CONTRACT = {
    "AdaStateAnchorNone": ([], ["ADASTATE_ANCHOR"]),
    "AdaStateAnchorStatic": (["sink_frames"], ["ADASTATE_ANCHOR"]),
    "AdaStateAnchorEMA": (["sink_frames", "decay"], ["ADASTATE_ANCHOR"]),
    "AdaStateAnchorMemory": (["sink_frames", "long_rate?", "short_rate?"], ["ADASTATE_ANCHOR"]),
    "AdaStateAnchorReplay": (["first_frames"], ["ADASTATE_ANCHOR"]),
    "AdaStateAnchorAdaptive": (
        ["state_frames", "state_after_past?", "strength?", "freeze_seconds?", "reset_seconds?"],
        ["ADASTATE_ANCHOR"],
    ),
    "AdaStateAnchorDeep": (["sink_frames", "recent_frames", "budget_frames", "shift_selected?"], ["ADASTATE_ANCHOR"]),
    "AdaStateLoadModel": (["file", "weight_dtype", "preset?"], ["MODEL"]),
    "AdaStateLoadLora": (["model", "file", "strength?"], ["MODEL"]),
    "AdaStateModelPreset": (["model", "preset", "ending?", "keep_first_frame?", "sampler?"], ["MODEL", "STRING"]),
    "AdaStateInspectCheckpoint": (["file", "width?", "height?", "length?"], ["STRING"]),
    "AdaStatePlan": (
        [
            "model", "width", "height", "length", "batch_size?", "chunk_frames?", "window_frames?", "positions?", "anchor?",
            "vae?", "absorption?", "cache_dtype?", "cache_device?", "start_latent?", "stream?", "audio?", "reference?",
        ],
        ["STRING", "STRING"],
    ),
    "AdaStateRollout": (
        [
            "model", "positive", "width", "height", "length", "batch_size", "seed", "steps", "shift", "chunk_frames",
            "window_frames", "positions", "anchor?", "absorption?", "sigmas?", "start_latent?", "resume?", "stream?",
            "keep_latents?", "cache_dtype?", "cache_device?", "max_seconds?", "start_mode?", "audio?", "reference?",
        ],
        ["LATENT", "ADASTATE_STATE", "STRING", "VIDEO"],
    ),
    "AdaStateSampler": (["chunk_frames", "window_frames", "positions", "anchor?"], ["SAMPLER"]),
    "AdaStateNoise": (["seed", "chunk_frames"], ["NOISE"]),
    "AdaStateStreamOutput": (
        ["vae", "filename_prefix", "fps", "codec", "quality", "preview", "autosave_seconds?", "join?", "latent_space?",
         "history_chunks?", "history_states?", "keep_state?", "upscale_model?", "interp_model?", "frame_multiplier?",
         "upscale_by?", "audio?"],
        ["ADASTATE_STREAM"],
    ),
    "AdaStateStreamFrames": (
        ["filename_prefix", "format", "fps", "preview", "vae?", "stream?", "join?", "autosave_seconds?", "latent_space?",
         "history_chunks?", "history_states?", "keep_state?", "upscale_model?", "interp_model?", "frame_multiplier?",
         "upscale_by?", "audio?"],
        ["ADASTATE_STREAM"],
    ),
    "AdaStateDecode": (["latent", "vae", "frames_per_call?", "latent_space?"], ["IMAGE"]),
    "AdaStateRenderVideo": (["latent", "vae", "filename_prefix", "fps", "codec", "quality", "latent_space?", "audio?"], ["VIDEO"]),
    "AdaStateSaveState": (["state", "filename_prefix"], ["STRING"]),
    "AdaStateLoadState": (["file", "chunk?"], ["ADASTATE_STATE"]),
    "AdaStateContinueVideo": (
        ["vae", "width", "height", "frames", "crop", "video?", "image?", "fps?", "upscale_method?", "area?"],
        ["LATENT", "IMAGE", "INT"],
    ),
    "AdaStateDecodeState": (["state", "vae", "latent_space?"], ["IMAGE"]),
    "AdaStateAttentionShare": (
        ["model", "positive", "width", "height", "windows", "seed", "anchor?", "share_of?", "chunks?"],
        ["IMAGE", "STRING"],
    ),
    "AdaStateVideoMetrics": (
        ["video", "reference?", "chunk_frames?", "every?", "dense_flow?", "clip_frames?", "first_clip_frames?"],
        ["IMAGE", "STRING"],
    ),
    "AdaStateCompare": (["video_a", "video_b", "video_c?", "video_d?", "labels"], ["VIDEO", "STRING"]),
    "AdaStateSelfTest": (["speed?"], ["STRING"]),
    "AdaStateAbsorption": (
        [
            "ratio", "warmup_frames", "local_window_frames", "sink_frames", "ridge", "scope", "rank", "select", "absorb",
            "schedule", "monitor_layers?", "monitor_chunks?", "drift?", "saved_layers?", "prior?", "switch?",
            "budget_gib?", "most_warmup_frames?",
        ],
        ["ADASTATE_ABSORPTION"],
    ),
    "AdaStateSaveAbsorption": (["state", "filename_prefix", "save_as?", "prior?"], ["STRING"]),
    "AdaStateLoadAbsorption": (["file"], ["ADASTATE_ABSORPTION"]),
    "AdaStateAbsorptionReport": (["report"], ["IMAGE", "STRING"]),
    "AdaStateDemoPrompt": (["terrain", "pace", "balloon", "lantern"], ["CONDITIONING"]),
    "AdaStatePromptTimeline": (
        ["clip", "text", "shared?", "transition?", "blend_chunks?", "blend?", "duration?", "live?"],
        ["ADASTATE_PROMPTS", "STRING"],
    ),
    "AdaStatePromptAt": (
        ["positive", "seconds", "transition", "prompts?", "blend_chunks?", "blend?"],
        ["ADASTATE_PROMPTS"],
    ),
    "AdaStateAudio": (["audio?", "encoded?", "fps", "offset"], ["ADASTATE_AUDIO"]),
    "AdaStateLoadSound": (["file"], ["AUDIO"]),
    "AdaStateDemoEar": (["audio"], ["AUDIO_ENCODER_OUTPUT"]),
    "AdaStateDemoSound": (["seconds", "seed"], ["AUDIO"]),
    "AdaStateDemoTimeline": (["text", "transition?", "blend_chunks?", "blend?"], ["ADASTATE_PROMPTS", "STRING"]),
}  # fmt: skip


def test_ids_inputs_order_and_outputs_are_the_contract():
    assert set(NODES) == set(CONTRACT)
    for node_id, (inputs, outputs) in CONTRACT.items():
        schema = NODES[node_id].define_schema()
        schema.validate()
        assert [i.id + ("?" if i.optional else "") for i in schema.inputs] == inputs, node_id
        assert [o.io_type for o in schema.outputs] == outputs, node_id
        assert schema.category.startswith("AdaState") and schema.description and schema.display_name


def test_every_input_and_output_says_what_it_is():
    for node in NODES.values():
        schema = node.define_schema()
        for socket in [*schema.inputs, *schema.outputs]:
            assert socket.tooltip and socket.tooltip.endswith("."), (schema.node_id, socket.id)
        for number in (i for i in schema.inputs if i.io_type in ("INT", "FLOAT")):
            assert number.min is not None and number.max is not None and number.default is not None
        page = (PACK / "web" / "docs" / f"{schema.node_id}.md").read_text()
        assert page.startswith(f"# {schema.display_name}\n")
        shown = [*(i.id for i in schema.inputs), *(o.display_name.removeprefix("ADASTATE_") for o in schema.outputs)]
        assert [name for name in shown if f"**{name}**" not in page] == [], schema.node_id


def test_output_nodes():
    output = {node_id for node_id, node in NODES.items() if node.define_schema().is_output_node}
    texts = {"AdaStateInspectCheckpoint", "AdaStatePlan", "AdaStateSelfTest"}
    assert output == {"AdaStateRollout", "AdaStateSaveState", "AdaStateSaveAbsorption"} | texts


def test_keywords_that_this_host_does_not_know_are_dropped():
    assert api.schema(node_id="X", from_the_future=True).node_id == "X"
    made = api.widget(api.io.Int, "n", default=1, from_the_future=True)
    assert made.default == 1
    with pytest.raises(TypeError):
        api.io.Schema(node_id="X", from_the_future=True)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"width": 100}, "width is 100; it must be a multiple of 16, at least 16: try 96"),
        ({"height": 8}, "height is 8"),
        ({"length": -2}, "length is -2; it must be between -1 and 16777216"),
        ({"length": 2**30}, "length is 1073741824; it must be between -1 and"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"steps": -1}, "steps is -1"),
        ({"shift": -0.5}, "shift is -0.5"),
        ({"chunk_frames": -1}, "chunk_frames is -1"),
        ({"window_frames": -2}, "window_frames is -2; it must be between -1 and 4096"),
        ({"positions": "sideways"}, "positions is 'sideways'; it must be one of auto, packed, fixed, absolute"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_numbers_are_said_before_anything_is_loaded(node, inputs, message):
    good = {
        "width": 64, "height": 64, "length": 81, "batch_size": 1, "steps": 0, "shift": 0.0, "chunk_frames": 0,
        "window_frames": -1, "positions": "auto",
    }  # fmt: skip
    assert node("AdaStateRollout").validate(**good) is True
    assert message in node("AdaStateRollout").validate(**(good | inputs))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"filename_prefix": "../../escape"}, "does not name a file inside the host's folder"),
        ({"filename_prefix": "/etc/passwd"}, "does not name a file inside the host's folder"),
        ({"filename_prefix": ""}, "does not name a file inside the host's folder"),
        ({"fps": 0.5}, "fps is 0.5; it must be 0 or between 1 and 240"),
        ({"codec": "gif"}, "codec is 'gif'; it must be one of h264"),
        ({"quality": 99}, "quality is 99"),
        ({"autosave_seconds": -1.0}, "autosave_seconds is -1.0"),
        ({"history_chunks": -1}, "history_chunks is -1; it must be between 0 and"),
        ({"history_states": 0}, "history_states is 0; it must be between 1 and 1024"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_stream_settings(node, inputs, message):
    good = {"filename_prefix": "a/b", "fps": 16.0, "codec": "h264", "quality": 18, "autosave_seconds": 60.0}
    assert node("AdaStateStreamOutput").validate(**good) is True
    assert message in node("AdaStateStreamOutput").validate(**(good | inputs))
    if not inputs.keys() & {"autosave_seconds", "history_chunks", "history_states"}:
        good.pop("autosave_seconds")
        assert message in node("AdaStateRenderVideo").validate(**(good | inputs))


def test_bad_anchors_and_words(node):
    assert "sink_frames is 0" in node("AdaStateAnchorStatic").validate(sink_frames=0)
    assert "decay is 1.5" in node("AdaStateAnchorEMA").validate(sink_frames=3, decay=1.5)
    assert "state_frames is 0" in node("AdaStateAnchorAdaptive").validate(state_frames=0)
    assert node("AdaStateAnchorEMA").validate(sink_frames=3, decay=0.9) is True
    words = {"terrain": "meadow", "pace": "slow", "balloon": "gold", "lantern": "lantern"}
    assert node("AdaStateDemoPrompt").validate(**words) is True
    assert "terrain is 'moon'; the demo model knows meadow" in node("AdaStateDemoPrompt").validate(
        **(words | {"terrain": "moon"})
    )
    assert "lantern is 'any'" in node("AdaStateDemoPrompt").validate(**(words | {"lantern": "any"}))


def test_adaptive_and_ema_refuse_absolute_positions(rollout):
    with pytest.raises(ValueError, match="positions is 'absolute' with the adaptive anchor"):
        rollout(positions="absolute", anchor=AnchorAdaptive(1))


def test_the_demo_prompt_gives_one_token_a_word(node):
    words = {"terrain": "meadow", "pace": "slow", "balloon": "gold", "lantern": "lantern"}
    context = node("AdaStateDemoPrompt")(**words).args[0][0][0]
    assert context.shape == (1, 4, 4096)
    fewer = node("AdaStateDemoPrompt")(**(words | {"terrain": "any"})).args[0][0][0]
    assert torch.equal(fewer, context[:, 1:])


def test_saving_and_loading_a_state(node, rollout, folders):
    state = rollout(anchor=AnchorStatic(2), length=25).args[1]
    name = node("AdaStateSaveState")(state=state, filename_prefix="states/a").args[0]
    assert name == "states/a_00001_.state.safetensors [output]"
    from adastate_pack.nodes.host.output_files import STATE_SUFFIX, saved_files

    assert saved_files(STATE_SUFFIX) == [name]
    loader = node("AdaStateLoadState")
    assert loader.validate(file=name) is True
    again = loader(file=name).args[0]
    assert again.emitted == state.emitted == 7
    a, b = (rollout(anchor=AnchorStatic(2), length=49, resume=s).args[0]["samples"] for s in (state, again))
    whole = rollout(anchor=AnchorStatic(2), length=49).args[0]["samples"]
    assert torch.equal(a, b) and torch.equal(a, whole)


@pytest.mark.parametrize("name", ["missing.state.safetensors", "../secret", "/etc/passwd", "", "../../x [output]"])
def test_states_that_cannot_be_loaded(node, name):
    reason = node("AdaStateLoadState").validate(file=name)
    assert isinstance(reason, str) and ("no state file" in reason or "inside the host's folder" in reason)


def test_a_foreign_safetensors_is_not_a_state(node, folders):
    save_file({"x": torch.zeros(2)}, folders / "input" / "weights.state.safetensors")
    with pytest.raises(ValueError, match="not a rollout state"):
        node("AdaStateLoadState")(file="weights.state.safetensors")


def test_a_resume_with_other_settings_names_each_difference(rollout):
    state = rollout(length=25).args[1]
    with pytest.raises(ValueError) as refusal:
        rollout(length=49, resume=state, window_frames=6, width=48, anchor=AnchorStatic(1))
    assert all(
        word in str(refusal.value)
        for word in ("window_frames is 3", "width is 32 in the state and 48 here", "anchor is")
    )
    import comfy.sd

    other = comfy.sd.load_diffusion_model_state_dict(random_wan(seed=8))
    with pytest.raises(ValueError, match="model is another checkpoint"):
        rollout(length=49, resume=state, model=other)
    with pytest.raises(ValueError, match="holds 25 frames and length is 25"):
        rollout(length=25, resume=state)


def test_seed_prompt_and_steps_may_change_on_resume(rollout, positive):
    state = rollout(length=25).args[1]
    other = [[positive[0][0] * 0.5, {}]]
    out = rollout(length=49, resume=state, seed=99, steps=3, shift=3.0, positive=other)
    assert out.args[0]["samples"].shape[2] == 13


def test_start_latents(rollout):
    start = torch.randn(1, 16, 5, 4, 4)
    out = rollout(start_latent={"samples": start}, length=45).args[0]["samples"]
    torch.testing.assert_close(out[:, :, :5], start, atol=1e-5, rtol=1e-5)
    two = rollout(start_latent={"samples": start[:, :, :1]}, length=21, batch_size=2).args[0]["samples"]
    torch.testing.assert_close(two[1, :, :1], start[0, :, :1], atol=1e-5, rtol=1e-5)
    for bad, message in [
        (torch.zeros(1, 16, 4, 4), "must be a Wan 2.1 video latent"),
        (torch.zeros(3, 16, 1, 4, 4), "must be a Wan 2.1 video latent"),
        (torch.zeros(1, 16, 0, 4, 4), "must be a Wan 2.1 video latent"),
        (torch.zeros(1, 16, 1, 8, 4), "start_latent is 32x64 and the rollout 32x32"),
        (torch.zeros(1, 16, 20, 4, 4), "start_latent holds 77 frames of length 45"),
    ]:
        with pytest.raises(ValueError, match=message):
            rollout(start_latent={"samples": bad}, length=45)
    state = rollout(length=21).args[1]
    with pytest.raises(ValueError, match="both resume and start_latent"):
        rollout(start_latent={"samples": start}, resume=state, length=45)


def test_linked_sizes_are_checked_too(rollout):
    """A number that comes through a link is not known to validate_inputs."""
    with pytest.raises(ValueError, match="width is 100; it must be a multiple of 16"):
        rollout(width=100)


def test_a_dangling_link_among_the_states_does_not_hide_the_others(folders):
    from adastate_pack.nodes.host.output_files import STATE_SUFFIX, saved_files

    (folders / "output" / "gone.state.safetensors").symlink_to(folders / "nowhere")
    (folders / "output" / "here.state.safetensors").touch()
    assert saved_files(STATE_SUFFIX) == ["here.state.safetensors [output]"]


def test_sigmas_beat_steps_and_shift(rollout):
    sigmas = torch.tensor([1.0, 5 / 6, 0.0])
    a = rollout(sigmas=sigmas, steps=9, shift=1.0)
    b = rollout(steps=2, shift=5.0)
    torch.testing.assert_close(a.args[0]["samples"], b.args[0]["samples"], atol=1e-4, rtol=1e-4)
    assert "sigmas is connected" in a.args[2]
    with pytest.raises(ValueError, match="they must fall strictly"):
        rollout(sigmas=torch.tensor([0.5, 0.8, 0.0]))


def test_auto_values_are_the_checkpoints_or_the_fallback(rollout, model, folders, wan_state):
    import folder_paths
    from adastate_pack.nodes.host.model import fingerprint

    auto = {"steps": 0, "shift": 0.0, "chunk_frames": 0, "window_frames": -1, "positions": "auto", "length": 21}
    report = json.loads(rollout(**auto).args[2])
    expected = {"steps": 4, "shift": 5.0, "chunk_frames": 3, "window_frames": 3, "positions": "packed"}
    assert {name: report["settings"][name] for name in expected} == expected
    assert "says nothing of being causal" in report["warnings"][0]
    wish = {"steps": 3, "shift": 4.0, "chunk_frames": 2, "window_frames": 5, "positions": "fixed"}
    models = Path(folders) / "models"
    models.mkdir()
    (models / "broken.safetensors").write_bytes(b"nothing")
    metadata = {"adastate": json.dumps(wish | {"fingerprints": [fingerprint(model)]})}
    save_file(wan_state, models / "tiny.safetensors", metadata=metadata)
    paths = folder_paths.folder_names_and_paths["diffusion_models"][0]
    paths.insert(0, str(models))
    folder_paths.filename_list_cache.clear()
    try:
        report = json.loads(rollout(**auto).args[2])
        assert {name: report["settings"][name] for name in wish} == wish and report["warnings"] == []
        report = json.loads(rollout(**(auto | {"window_frames": 0, "steps": 1})).args[2])
        assert report["settings"]["window_frames"] == 0 and report["settings"]["steps"] == 1
        assert report["settings"]["anchor"] == {"kind": "none"}
        for frames, kind in ((2, "adaptive"), (17, "none"), ("2", "none"), (True, "none")):
            stated = wish | {"state_frames": frames, "fingerprints": [fingerprint(model)]}
            save_file(wan_state, models / "tiny.safetensors", metadata={"adastate": json.dumps(stated)})
            report = json.loads(rollout(**auto).args[2])
            assert report["settings"]["anchor"]["kind"] == kind, frames
        stated["state_frames"] = 2
        save_file(wan_state, models / "tiny.safetensors", metadata={"adastate": json.dumps(stated)})
        assert json.loads(rollout(**auto, anchor=Anchor()).args[2])["settings"]["anchor"] == {"kind": "none"}
    finally:
        paths.remove(str(models))
        folder_paths.filename_list_cache.clear()


def test_the_hidden_state_is_decoded_or_its_absence_explained(rollout, node, vae):
    state = rollout(anchor=AnchorAdaptive(2), batch_size=2, length=21).args[1]
    pictures = node("AdaStateDecodeState")(state=state, vae=vae).args[0]
    assert pictures.shape == (4, 32, 32, 3)
    plain = rollout(length=21).args[1]
    with pytest.raises(ValueError, match="ran with the none anchor, which has no hidden state"):
        node("AdaStateDecodeState")(state=plain, vae=vae)


def test_a_state_is_immutable_and_short_in_words(rollout):
    state = rollout(length=25).args[1]
    assert len(repr(state)) < 100 and "25 frames" in repr(state)
    tensors = [t for layer in state.cache for t in layer.tensors.values()]
    before = [t.clone() for t in tensors]
    rollout(length=49, resume=state)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    with pytest.raises(AttributeError):
        state.emitted = 3


def test_without_a_stream_video_is_blocked_with_words(rollout):
    out = rollout(length=21)
    assert "Stream To Video" in out.args[3].message
    assert out.args[0]["samples"].shape == (1, 16, 6, 4, 4)


def test_progress_and_previews(rollout, vae, node, monkeypatch, progress_told):
    from comfy.cli_args import LatentPreviewMethod, args

    def previews():
        """The sizes of the previews since the last time."""
        sizes = [preview[1].size for _, _, preview in progress_told if preview]
        progress_told.clear()
        return sizes

    rollout(length=33, steps=2)
    assert [told[:2] for told in progress_told] == [(i + 1, 9) for i in range(9)]
    assert previews() == []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    rollout(length=33)
    assert previews() == [(4, 4)] * 3
    settings = {"vae": vae, "filename_prefix": "a", "fps": 16.0, "codec": "h264", "quality": 18}
    rollout(length=33, stream=node("AdaStateStreamOutput")(**settings, preview=True).args[0])
    assert previews() == [(32, 32)] * 3
    rollout(length=33, stream=node("AdaStateStreamOutput")(**settings, preview=False).args[0])
    assert previews() == []


@pytest.mark.parametrize("name", sorted(NODES))
def test_a_node_that_shows_something_says_so_where_the_host_knows_the_word(name):
    """Such a host shows it again when the node is not run again, as after a reload of the page."""
    schema = NODES[name].define_schema()
    shows = "ui=" in inspect.getsource(inspect.unwrap(NODES[name].execute.__func__))
    found = getattr(schema, "has_intermediate_output", None)
    assert found in (None, shows and not schema.is_output_node)  # every host shows an output's own again
    assert (found is None) == ("has_intermediate_output" not in inspect.signature(api.io.Schema).parameters)


def test_the_standard_loaders_list_and_load_the_demo_weights(node):
    import nodes as host_nodes

    assert "adastate_demo_vae.safetensors" in host_nodes.VAELoader.INPUT_TYPES()["required"]["vae_name"][0]
    assert "adastate_demo.safetensors" in host_nodes.UNETLoader.INPUT_TYPES()["required"]["unet_name"][0]
    (demo,) = host_nodes.UNETLoader().load_unet("adastate_demo.safetensors", "default")
    (vae,) = host_nodes.VAELoader().load_vae("adastate_demo_vae.safetensors")
    words = {"terrain": "meadow", "pace": "slow", "balloon": "gold", "lantern": "lantern"}
    positive = node("AdaStateDemoPrompt")(**words).args[0]
    out = node("AdaStateRollout")(
        model=demo, positive=positive, width=64, height=64, length=21, batch_size=1, seed=1, steps=0, shift=0.0,
        chunk_frames=0, window_frames=-1, positions="auto",
    )  # fmt: skip
    assert json.loads(out.args[2])["warnings"] == []
    assert node("AdaStateDecode")(latent=out.args[0], vae=vae).args[0].shape == (21, 64, 64, 3)
