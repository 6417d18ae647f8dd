"""The fast way to decode on the host's own VAE: how near it is to VAE Decode, its own bits, states, and what keeps a VAE plain."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import comfy.ldm.wan.vae as wan
import comfy.model_management
import comfy.sd
import pytest
import torch
from adastate_pack.adastate_core import fused
from adastate_pack.adastate_core.decode.fast_parts import Conv
from adastate_pack.adastate_core.decode.wan_vae import VaeStream
from adastate_pack.adastate_core.states.state_file import load_state, save_state
from adastate_pack.adastate_core.video.picture_forms import in_form
from adastate_pack.nodes.host import fast_vae
from adastate_pack.nodes.host.codec import HostDecoder
from conftest import random_vae
from torch import nn

FILE = {"filename_prefix": "take", "fps": 16.0, "codec": "h264", "quality": 18}
# Of pictures in 0..1, where a step of 8 bits is 4e-3. A VAE of random weights and few channels makes the most of a rounding.
BOUND = 1e-4


def latents(frames: int, batch: int = 1, rows: int = 4, columns: int = 4) -> torch.Tensor:
    return torch.randn(batch, 16, frames, rows, columns, generator=torch.Generator().manual_seed(2))


def decoded(decoder: HostDecoder, z: torch.Tensor, split: list[int]) -> torch.Tensor:
    return torch.cat([decoder.step(part) for part in z.split(split, dim=2)], 1)


@pytest.fixture
def fresh():
    return comfy.sd.VAE(sd=random_vae())


@pytest.fixture
def stream(fresh, stream):
    return lambda **inputs: stream(**({"vae": fresh, "preview": True, "autosave_seconds": 60.0} | inputs))


def in_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return in_form(pictures, "bytes")


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "rows", "columns", "width"), [(1, 4, 4, 4), (2, 3, 5, 4), (1, 1, 1, 2), (1, 6, 4, 8)]
)
def test_it_is_near_the_hosts_whole_decode(batch, rows, columns, width):
    vae = comfy.sd.VAE(sd=random_vae(dim=width))
    decoder, z = HostDecoder(vae, fast=True), latents(9, batch, rows, columns)
    assert (decoder.way, decoder.why_plain) == ("fast", "")
    pictures, whole = decoded(decoder, z, [1, 3, 3, 2]), vae.decode(z)
    assert pictures.shape == whole.shape and whole.std() > 0.05
    assert 0 < (pictures - whole).abs().max() < BOUND


@torch.no_grad()
def test_it_is_as_exact_as_the_plain_way(fresh):
    """Both against the host's modules in float64."""
    z, width = latents(7), 4
    exact = wan.WanVAE(
        dim=width, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    )
    exact.load_state_dict(random_vae(dim=width))
    truth = ((VaeStream(exact.double()).step(z.double()) + 1) / 2).clamp(0, 1)
    fast, plain = (
        (HostDecoder(fresh, fast=fast).step(z) - truth).abs().double().pow(2).mean().sqrt() for fast in (True, False)
    )
    assert 0 < fast < 2 * plain


@torch.no_grad()
def test_any_split_decodes_to_the_same_bits(fresh):
    z = latents(7, batch=2)
    whole = decoded(HostDecoder(fresh, fast=True), z, [7])
    for split in ([1] * 7, [1, 3, 3], [3, 3, 1], [2, 5]):
        assert torch.equal(decoded(HostDecoder(fresh, fast=True), z, split), whole)


@torch.no_grad()
def test_several_latents_a_call_are_exact_to_rounding(fresh):
    z = latents(8)
    for count in (2, 3, 7):
        pictures = decoded(HostDecoder(fresh, count, fast=True), z, [8])
        assert (pictures - fresh.decode(z)).abs().max() < BOUND


@torch.no_grad()
def test_its_cache_is_what_was_planned_and_moves_to_another_run(fresh):
    z = latents(8)
    for cut in (1, 2, 3):
        first, second = HostDecoder(fresh, fast=True), HostDecoder(fresh, fast=True)
        first.step(z[:, :, :cut])
        saved = first.snapshot()
        assert saved["vae_way"] == "fast"
        reference = first.step(z[:, :, cut:])
        assert first.nbytes == first.cache_bytes(1, 4, 4)
        second.restore(json.loads(json.dumps({k: v for k, v in saved.items() if not torch.is_tensor(v)})) | saved)
        assert torch.equal(second.step(z[:, :, cut:]), reference)


@torch.no_grad()
def test_the_vae_itself_keeps_its_bits(fresh, node):
    """Before, between and after steps of a stream, which go on as if nothing had been between them."""
    z = latents(5)
    before, whole = fresh.decode(z), decoded(HostDecoder(fresh, fast=True), z, [5])
    decoder, parts = HostDecoder(fresh, fast=True), []
    plain = HostDecoder(fresh)
    for frame in z.split(1, dim=2):
        parts.append(decoder.step(frame))
        assert isinstance(fresh.first_stage_model.conv2.forward, Conv)
        seen = sum(part.shape[1] for part in parts)
        assert torch.equal(plain.step(frame), before[:, seen - parts[-1].shape[1] : seen])
        assert torch.equal(fresh.decode(z), before) and not fast_vae.stood_in(fresh)
        assert torch.equal(node("AdaStateDecode")(latent={"samples": z}, vae=fresh).args[0], before[0])
    assert torch.equal(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_nothing_of_it_outlives_its_decoder(fresh):
    modules = {name: module.forward for name, module in fresh.first_stage_model.named_modules()}
    paddings = {n: m.padding for n, m in fresh.first_stage_model.named_modules() if isinstance(m, nn.Conv3d)}
    decoder = HostDecoder(fresh, fast=True)
    decoder.step(latents(2))
    assert fast_vae.stood_in(fresh)
    del decoder
    assert not fast_vae.stood_in(fresh)
    for name, module in fresh.first_stage_model.named_modules():
        assert module.forward == modules[name] and getattr(module, "padding", None) == paddings.get(
            name, getattr(module, "padding", None)
        )


def test_a_stream_a_rendered_video_and_its_preview_go_it(rollout, stream, fresh, node, written, monkeypatch):
    ways, step = [], HostDecoder.step

    def watched(self, z, *takes):
        ways.append(self.way)
        return step(self, z, *takes)

    monkeypatch.setattr(HostDecoder, "step", watched)
    out = rollout(length=33, stream=stream())
    z = out.args[0]["samples"]
    assert set(ways) == {"fast"} and json.loads(out.args[2])["decoder_way"] == "fast"
    with torch.no_grad():
        whole = in_bytes(fresh.decode(z)[0])
    assert (torch.cat(written).int() - whole.int()).abs().max() <= 1
    streamed = torch.cat(written)
    written.clear(), ways.clear()
    node("AdaStateRenderVideo")(latent={"samples": z}, vae=fresh, **FILE)
    assert set(ways) == {"fast"} and torch.equal(torch.cat(written), streamed)
    ways.clear()
    node("AdaStateDecode")(latent={"samples": z}, vae=fresh)
    assert set(ways) == {"plain"}


def test_a_state_goes_on_the_way_that_made_it(rollout, stream, fresh, written, folders):
    """From a file, for the fast way and for a state that says no way, as older versions made it."""
    made = {}
    for way in ("fast", "plain"):
        written.clear()
        first = rollout(length=21, stream=stream(), keep_latents=False)
        state = first.args[1]
        assert state.stream["vae_way"] == "fast"
        if way == "plain":
            with torch.no_grad():
                plain = HostDecoder(fresh)
                plain.step(rollout(length=21).args[0]["samples"])
            del state.stream["vae_way"]
            state.stream.update(plain.snapshot())
        path = save_state(state, folders / "output" / f"{way}.state.safetensors")
        written.clear()
        out = rollout(length=45, stream=stream(), resume=load_state(path), keep_latents=False)
        report = json.loads(out.args[2])
        assert report["decoder_way"].split(":")[0] == way and out.args[1].stream.get("vae_way", "plain") == way
        assert not [w for w in report["warnings"] if "bits" in w]
        made[way] = torch.cat(written)
    z = rollout(length=45).args[0]["samples"]
    for way, fast in (("fast", True), ("plain", False)):
        with torch.no_grad():
            expected = in_bytes(decoded(HostDecoder(fresh, fast=fast), z, [12])[0, 21:])
        assert torch.equal(made[way], expected)


def test_a_state_whose_way_cannot_be_gone_goes_on_with_a_warning(rollout, stream, fresh, written, monkeypatch):
    state = rollout(length=21, stream=stream(), keep_latents=False).args[1]
    monkeypatch.setattr(fast_vae.torch.backends.mkldnn, "is_available", lambda: False)
    fast_vae._no_onednn.cache_clear()
    written.clear()
    try:
        out = rollout(length=45, stream=stream(), resume=state, keep_latents=False)
    finally:
        fast_vae._no_onednn.cache_clear()
    report = json.loads(out.args[2])
    [warning] = [w for w in report["warnings"] if "fast way" in w]
    assert "goes on the plain way (torch has no oneDNN here)" in warning and "last bits" in warning
    assert report["decoder_way"] == "plain: torch has no oneDNN here"
    with torch.no_grad():
        whole = in_bytes(fresh.decode(rollout(length=45).args[0]["samples"])[0, 21:])
    assert (torch.cat(written).int() - whole.int()).abs().max() <= 1


def test_a_state_that_names_another_way_is_damaged(rollout, stream, folders):
    state = rollout(length=21, stream=stream()).args[1]
    state.stream["vae_way"] = "sideways"
    path = save_state(state, folders / "output" / "a.state.safetensors")
    with pytest.raises(ValueError, match="stream.vae_way is sideways, not one of plain, fast"):
        load_state(path)


class Other(wan.CausalConv3d):
    pass


def _replaced(vae):
    vae.first_stage_model.decoder.conv1.__class__ = Other


def _object_patch(vae):
    vae.patcher.add_object_patch("decoder.middle.0.forward", lambda x: x)


def _forward(vae):
    vae.first_stage_model.decoder.upsamples[3].forward = lambda *a: None


def _norm(vae):
    vae.first_stage_model.decoder.head[0].bias = nn.Parameter(torch.zeros(4, 1, 1, 1))


def _stride(vae):
    vae.first_stage_model.decoder.conv1.stride = (1, 2, 2)


def _padding(vae):
    vae.first_stage_model.decoder.conv1._padding = 4


def _weights(vae):
    vae.first_stage_model.decoder.conv1.weight_function = [lambda w: w]


def _wrapped(vae):
    vae.first_stage_model.decoder = nn.Sequential(vae.first_stage_model.decoder)


def _activation(vae):
    vae.first_stage_model.decoder.head[1] = nn.Identity()


def _half(vae):
    vae.vae_dtype = torch.bfloat16


def _device(vae):
    vae.device = torch.device("mps")


REASONS = {
    _replaced: "the VAE's decoder.conv1 is a Other, which is not known",
    _object_patch: "the VAE's decoder.middle.0 is patched",
    _forward: "the VAE's decoder.upsamples.3 is patched",
    _norm: "the VAE's decoder.head.0 is a norm with a bias",
    _stride: "the VAE's decoder.conv1 is a convolution with groups, strides",
    _padding: "the VAE's decoder.conv1 is a causal convolution that pads otherwise",
    _weights: "the VAE's decoder.conv1 has weights that are patched as it runs",
    _wrapped: "the VAE is of a class that is not known",
    _activation: "the VAE's decoder.head has a norm without SiLU behind it",
    _half: "the VAE runs in bfloat16 on cpu",
    _device: "the VAE runs in float32 on mps",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_what_keeps_a_vae_plain(fresh, change):
    assert fast_vae.why_not(fresh) == ""
    change(fresh)
    decoder = HostDecoder(fresh, fast=True)
    assert decoder.way == "plain" and decoder.patcher is fresh.patcher
    assert decoder.why_plain.startswith(REASONS[change])


def test_without_onednn_or_a_compiler_it_is_plain(fresh, monkeypatch):
    def fails(*_):
        raise RuntimeError("could not create a primitive")

    fast_vae._no_onednn.cache_clear()
    monkeypatch.setattr(fast_vae.torch, "mkldnn_convolution", fails)
    assert "oneDNN's convolution fails here (could not create a primitive)" in HostDecoder(fresh, fast=True).why_plain
    monkeypatch.undo()
    fast_vae._no_onednn.cache_clear()
    monkeypatch.setenv(fused.SWITCH, "0")
    cuda = SimpleNamespace(**vars(fresh) | {"device": torch.device("cuda")})
    assert fast_vae.why_not(cuda) == f"{fused.SWITCH} is 0"


@pytest.fixture
def compiled(monkeypatch):
    """The CPU as a device that compiles, with a compiler of the test's own."""

    def use(compiler):
        monkeypatch.setattr(fused, "_MADE", {})
        monkeypatch.setattr(fast_vae, "compiler_for", lambda device: (compiler, ""))

    return use


@torch.no_grad()
def test_a_failing_compiler_means_one_warning_and_the_plain_way(fresh, compiled, caplog, rollout, stream, written):
    def fails(function):
        raise RuntimeError("no such register")

    compiled(fails)
    with caplog.at_level(logging.WARNING, "adastate"):
        out = rollout(length=33, stream=stream())
    report = json.loads(out.args[2])
    [warning] = [w for w in report["warnings"] if "plain way" in w]
    assert "other last bits: norm" in warning and "no such register" in warning
    assert len([m for m in caplog.messages if "could not be compiled" in m]) == 1
    assert report["decoder_way"].startswith("plain: norm") and "vae_way" not in out.args[1].stream
    assert torch.equal(torch.cat(written), in_bytes(fresh.decode(out.args[0]["samples"])[0]))


@torch.no_grad()
def test_all_that_a_decode_calls_was_compiled_while_it_was_loaded(fresh, compiled):
    made, run = [], []

    def compiler(function):
        made.append(function)
        return lambda *arguments: (run.append(1), function(*arguments))[1]

    compiled(compiler)
    for count in (1, 3):
        decoder, z = HostDecoder(fresh, count, fast=True), latents(9)
        decoder.load(z.shape)
        made.clear(), run.clear()
        pictures = decoded(decoder, z, [1, 3, 3, 2])
        calls = -(-1 // count) + -(-3 // count) * 2 + -(-2 // count)
        assert not made and len(run) >= 30 * calls
        assert (pictures - fresh.decode(z)).abs().max() < BOUND


@torch.no_grad()
def test_compiling_is_told_and_can_be_cancelled(rollout, stream, compiled, progress_told, interrupt, folders):
    made = []

    def compiler(function):
        made.append(function)
        if len(made) == 3:
            comfy.model_management.interrupt_current_processing(True)
        return function

    compiled(compiler)
    with pytest.raises(interrupt):
        rollout(length=33, stream=stream())
    assert len(made) == 3 and not list((folders / "output").rglob("*.mp4"))
    values = [(value, total) for value, total, _ in progress_told]
    assert values[:3] == [(1, 60), (2, 60), (3, 60)] and len(values) < 60


@torch.no_grad()
def test_what_was_compiled_and_then_fails_sends_it_the_plain_way(fresh, compiled):
    running = []

    def compiler(function):
        def call(*arguments):
            if len(running) > 1:
                raise RuntimeError("the driver is gone")
            return function(*arguments)

        return call

    compiled(compiler)
    decoder, z = HostDecoder(fresh, fast=True), latents(6)
    head = decoder.step(z[:, :, :2])
    running += [1, 1]
    rest = [decoder.step(part) for part in z[:, :, 2:].split(1, dim=2)]
    assert decoder.way == "plain" and "the driver is gone" in decoder.why_plain
    assert (torch.cat([head, *rest], 1) - fresh.decode(z)).abs().max() < BOUND
    assert not fast_vae.stood_in(fresh)


def test_it_is_interrupted_between_two_convolutions(fresh, interrupt):
    decoder = HostDecoder(fresh, fast=True)
    with torch.no_grad():
        decoder.step(latents(2))
        comfy.model_management.interrupt_current_processing(True)
        with pytest.raises(interrupt):
            decoder.step(latents(2))
        assert decoder.stream.latents_seen == 2


@torch.no_grad()
def test_weights_that_are_cast_as_they_run_are_left_to_the_host(fresh):
    """As a VAE that does not fit the device is run."""
    z, module = latents(4), fresh.first_stage_model.decoder.conv1
    expected = decoded(HostDecoder(fresh, fast=True), z, [4])
    module.comfy_cast_weights = True
    assert (decoded(HostDecoder(fresh, fast=True), z, [4]) - expected).abs().max() < BOUND


@torch.no_grad()
def test_the_weights_that_lie_beside_the_vae_are_planned(fresh):
    fast, plain = HostDecoder(fresh, fast=True), HostDecoder(fresh)
    more = fast.working_bytes(1, 4, 4) - plain.working_bytes(1, 4, 4)
    fast.step(latents(1))
    kept = {
        part._weight.untyped_storage().data_ptr(): part._weight.nbytes
        for part in fast._fast._parts.values()
        if isinstance(part, Conv) and part._weight.data_ptr() != part._module.weight.data_ptr()
    }
    assert 0 < sum(kept.values()) == more


@torch.no_grad()
def test_a_tiny_vae_takes_three_latents_a_call_on_cuda_alone(monkeypatch):
    from comfy.taesd.taehv import TAEHV

    generator = torch.Generator().manual_seed(4)
    weights = {name: torch.zeros_like(value) for name, value in TAEHV(latent_channels=16).state_dict().items()}
    for value in weights.values():
        fan = value[0].numel() if value.ndim > 1 else 100
        value.normal_(generator=generator).mul_((1.5 / fan) ** 0.5)
    weights["decoder.22.weight"] *= 0.3  # the rest amplifies rounding with the pictures
    tiny = comfy.sd.VAE(sd=weights)
    assert HostDecoder(tiny, fast=True).why_plain == "a tiny VAE on cpu is no faster with more latents a call"
    monkeypatch.setattr(tiny, "device", torch.device("cuda"))
    decoder = HostDecoder(tiny, fast=True)
    assert (decoder.way, decoder.latents_a_call) == ("fast", 3)
    monkeypatch.setattr(tiny, "device", torch.device("cpu"))
    z = latents(6, rows=2, columns=2)
    pictures = decoded(decoder, z, [3, 3])
    saved = decoder.snapshot()
    assert saved["vae_way"] == "fast" and HostDecoder(tiny).latents_a_call == 1
    torch.testing.assert_close(pictures, decoded(HostDecoder(tiny), z, [3, 3]), atol=BOUND, rtol=0)
    del saved["vae_way"]
    assert decoder.go_on(saved) == [] and (decoder.way, decoder.latents_a_call) == ("plain", 1)
