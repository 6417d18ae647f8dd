"""The tiny VAE (TAEHV) as the host loads it, through every node that takes a vae: splits, spaces, stop and resume."""

from __future__ import annotations

import json

import comfy.sd
import folder_paths
import pytest
import torch
from adastate_pack.adastate_core.states.state_file import load_state
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host.codec import HostDecoder
from comfy.latent_formats import Wan21
from comfy.taesd.taehv import TAEHV
from conftest import NODES
from safetensors.torch import save_file

import nodes as host_nodes

# What the host multiplies the latents of a file by that it takes for Hunyuan's.
HUNYUAN_SCALE = 0.476986
FILE = {"filename_prefix": "a", "fps": 16.0, "codec": "h264", "quality": 18}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Random weights in the layout of taew2_1 and lighttaew2_1, with pictures that use 0..1 and beyond."""
    generator, state = torch.Generator().manual_seed(4), {}
    for name, value in TAEHV(latent_channels=16).state_dict().items():
        fan = value[0].numel() if value.ndim > 1 else 100
        state[name] = torch.randn(value.shape, generator=generator) * (1.5 / fan) ** 0.5
    state["decoder.22.weight"] *= 0.3  # the rest amplifies rounding with the pictures
    state["decoder.22.bias"] = torch.tensor([0.4, 0.5, 0.6])
    return state


@pytest.fixture(scope="module")
def tiny(weights, tmp_path_factory):
    """The host's VAE of a file in vae_approx, through its Load VAE node."""
    made, folder = {}, tmp_path_factory.mktemp("vae_approx")

    def load(dtype: torch.dtype, patch: pytest.MonkeyPatch):
        if dtype not in made:
            path = folder / "lighttaew2_1.safetensors"
            save_file({name: value.to(dtype) for name, value in weights.items()}, path)
            known = folder_paths.folder_names_and_paths["vae_approx"]
            patch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(folder)], known[1]))
            made[dtype] = host_nodes.VAELoader().load_vae(path.name)[0]
            made[dtype].first_stage_model.show_progress_bar = False
        return made[dtype]

    return load


@pytest.fixture
def light(tiny, monkeypatch):
    """A float32 file, as lighttaew2_1 is."""
    return tiny(torch.float32, monkeypatch)


@pytest.fixture
def original(tiny, monkeypatch):
    """A float16 file, as taew2_1 is."""
    return tiny(torch.float16, monkeypatch)


@pytest.fixture
def small_rollout(rollout):
    """As small as a rollout can be: the tiny VAE is not small on one core."""
    return lambda **inputs: rollout(**({"width": 16, "height": 16} | inputs))


@pytest.fixture
def stream(light, stream):
    defaults = {"vae": light, "filename_prefix": "a", "preview": True, "autosave_seconds": 60.0}
    return lambda **inputs: stream(**(defaults | inputs))


def latents(frames: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, frames, 2, 2, generator=torch.Generator().manual_seed(2))


def normalised(z: torch.Tensor) -> torch.Tensor:
    wan = Wan21()
    return (z - wan.latents_mean) / wan.latents_std


@torch.no_grad()
def host_pictures(vae, z: torch.Tensor, space: str) -> torch.Tensor:
    """What the host's own whole decode makes, its rescaling undone; it does not clamp."""
    if space == "model":
        z = normalised(z)
    if vae.first_stage_model.latent_format is not None:
        z = z / HUNYUAN_SCALE
    return vae.decode(z).clamp(0, 1)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def in_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures * 255).round()


@torch.no_grad()
def test_any_split_is_the_hosts_whole_decode(light):
    z = latents(5, batch=2)
    whole = host_pictures(light, z, "vae")
    assert whole.shape == (2, 17, 16, 16, 3)
    assert whole.std() > 0.1 and (whole == 1).any()
    for split, frames_per_call in (([5], 1), ([1] * 5, 1), ([1, 3, 1], 1), ([2, 3], 3)):
        decoder = HostDecoder(light, frames_per_call)
        parts = [decoder.step(part) for part in z.split(split, dim=2)]
        assert [p.shape[1] for p in parts] == [4 * n - (3 if i == 0 else 0) for i, n in enumerate(split)]
        same(torch.cat(parts, 1), whole)


@torch.no_grad()
@pytest.mark.parametrize(
    ("file", "asked", "fed"),
    [
        ("light", "auto", "vae"),
        ("light", "vae", "vae"),
        ("light", "model", "model"),
        ("original", "auto", "model"),
        ("original", "model", "model"),
        ("original", "vae", "vae"),
    ],
)
def test_each_file_is_fed_the_space_it_was_made_for(request, node, file, asked, fed):
    vae, z = request.getfixturevalue(file), latents(2)
    ours = node("AdaStateDecode")(latent={"samples": z}, vae=vae, latent_space=asked).args[0]
    same(ours, host_pictures(vae, z, fed)[0])
    assert not torch.allclose(ours, host_pictures(vae, z, "vae" if fed == "model" else "model")[0], atol=0.05)


def test_a_bfloat16_file_is_fed_vae_space(weights):
    sd = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    assert not HostDecoder(comfy.sd.VAE(sd=sd)).model_space


def test_the_nodes_that_decode_a_latent(light, node):
    z = latents(3, batch=2)
    pictures = node("AdaStateDecode")(latent={"samples": z}, vae=light, frames_per_call=2).args[0]
    same(pictures, host_pictures(light, z, "vae").flatten(0, 1))
    for space in ("vae", "model"):
        video = node("AdaStateRenderVideo")(latent={"samples": z}, vae=light, **FILE, latent_space=space).args[0]
        images = video.get_components().images
        assert images.shape == (18, 16, 16, 3)
        distance = [(images - host_pictures(light, z, s).flatten(0, 1)).abs().mean() for s in ("vae", "model")]
        assert distance.index(min(distance)) == ("vae", "model").index(space)


def test_a_hidden_state_is_decoded(small_rollout, light, node):
    from adastate_pack.adastate_core.anchors import AnchorAdaptive

    state = small_rollout(length=21, anchor=AnchorAdaptive(2)).args[1]
    pictures = node("AdaStateDecodeState")(state=state, vae=light, latent_space="model").args[0]
    assert pictures.shape == (2, 16, 16, 3)
    z = Wan21().process_out(state.hidden)
    for i in range(2):
        same(pictures[i], host_pictures(light, z[:, :, i : i + 1], "model")[0, 0])


def test_a_stream_writes_the_pictures_and_keeps_to_its_plan(small_rollout, stream, light, written):
    ran = small_rollout(length=33, stream=stream())
    expected = host_pictures(light, ran.args[0]["samples"], "vae")[0]
    assert (torch.cat(written).float() - in_bytes(expected)).abs().max() <= 1
    report = json.loads(ran.args[2])
    decoder = HostDecoder(light)
    with torch.no_grad():
        decoder.step(latents(2))
    assert report["plan_bytes"]["vae_cache"] == decoder.stream.nbytes == 5376 * 2 * 2 * 4
    assert report["decoder"] == "a tiny VAE, VAE-space latents"


def test_stopped_saved_and_resumed_it_writes_what_one_run_writes(small_rollout, stream, written, folders, monkeypatch):
    small_rollout(length=33, stream=stream(), keep_latents=False)
    whole = torch.cat(written)
    written.clear()
    velocity, calls = adapter.HostModel.velocity, []

    def stop(self, x, timestep, attention):
        calls.append(1)
        if len(calls) == 5:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return velocity(self, x, timestep, attention)

    monkeypatch.setattr(adapter.HostModel, "velocity", stop)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        small_rollout(length=33, stream=stream(filename_prefix="cut"), keep_latents=False)
    monkeypatch.setattr(adapter.HostModel, "velocity", velocity)
    state = load_state(folders / "output" / "cut_00001_.state.safetensors")
    assert state.emitted == 3 and state.stream["vae_kind"] == "taehv"
    small_rollout(length=33, stream=stream(filename_prefix="cut"), resume=state, keep_latents=False)
    assert torch.equal(torch.cat(written), whole)


def test_a_stream_changes_its_kind_of_vae_only_with_kept_latents(small_rollout, stream, vae, light, written):
    for first, second, names in (
        (vae, light, "decoded by a full Wan 2.1 VAE and the vae connected is a tiny VAE"),
        (light, vae, "decoded by a tiny VAE and the vae connected is a full Wan 2.1 VAE"),
    ):
        state = small_rollout(length=9, stream=stream(vae=first), keep_latents=False).args[1]
        with pytest.raises(ValueError, match=names):
            small_rollout(length=21, stream=stream(vae=second), resume=state)
        with pytest.raises(ValueError, match=names):
            HostDecoder(second).restore(state.stream)
        kept = small_rollout(length=9, stream=stream(vae=first), keep_latents=True).args[1]
        written.clear()
        rest = small_rollout(length=21, stream=stream(vae=second), resume=kept, keep_latents=True)
        with torch.no_grad():
            expected = second.decode(rest.args[0]["samples"])[0, 9:].clamp(0, 1)
        assert (torch.cat(written).float() - in_bytes(expected)).abs().max() <= 1


def test_a_full_vae_refuses_model_space(small_rollout, stream, vae, node):
    message = "latent_space is model, but a full Wan VAE takes VAE-space latents; choose auto"
    with pytest.raises(ValueError, match=message):
        small_rollout(stream=stream(vae=vae, latent_space="model"))
    for name, more in (("AdaStateDecode", {}), ("AdaStateRenderVideo", FILE)):
        with pytest.raises(ValueError, match=message):
            node(name)(latent={"samples": latents(2)}, vae=vae, latent_space="model", **more)
    for space in ("auto", "vae"):
        ours = node("AdaStateDecode")(latent={"samples": latents(2)}, vae=vae, latent_space=space).args[0]
        with torch.no_grad():
            assert torch.equal(ours, vae.decode(latents(2))[0])


def test_other_tiny_vaes_and_spaces_are_refused(light, node):
    other = comfy.sd.VAE(sd=TAEHV(latent_channels=32).state_dict())
    with pytest.raises(ValueError, match="the vae is a TAEHV with 32 channels; streaming decode needs a Wan 2.1 VAE"):
        node("AdaStateDecode")(latent={"samples": latents(2)}, vae=other)
    with pytest.raises(ValueError, match="latent_space is 'pixel'; it must be one of auto, vae, model"):
        HostDecoder(light, latent_space="pixel")


def test_the_input_is_the_same_on_every_node():
    for name in ("AdaStateStreamOutput", "AdaStateDecode", "AdaStateRenderVideo", "AdaStateDecodeState"):
        found = next(i for i in NODES[name].define_schema().inputs if i.id == "latent_space")
        assert (found.options, found.default, found.optional) == (["auto", "vae", "model"], "auto", True)


@torch.no_grad()
@pytest.mark.parametrize("file", ["light", "original"])
def test_a_decoder_that_begins_anew_stands_where_the_whole_one_does(request, file):
    decoder = HostDecoder(request.getfixturevalue(file))
    z = torch.randn(1, 16, 24, 4, 4, generator=torch.Generator().manual_seed(3))
    for frame in range(20):
        decoder.step(z[:, :, frame : frame + 1])
    assert decoder.reach <= 12
    for count, same in ((decoder.reach, True), (2, False)):
        anew = HostDecoder(decoder.vae)
        anew.skip(20 - count)
        for frame in range(20 - count, 20):
            anew.step(z[:, :, frame : frame + 1])
        one, other = decoder.snapshot(), anew.snapshot()
        tensors = [name for name, value in one.items() if isinstance(value, torch.Tensor)]
        assert one.keys() == other.keys() and len(tensors) == 9 and one["vae_latents_seen"] == other["vae_latents_seen"]
        assert all(torch.equal(one[name], other[name]) for name in tensors) == same
