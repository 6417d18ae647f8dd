"""Wan 2.2's VAE and its tiny one, decoded call by call: the host's own whole decode, its cache as planned, moved and begun anew."""

from __future__ import annotations

import pytest
import tiny_5b
import torch
from adastate_pack.adastate_core import fused
from adastate_pack.nodes.host import codec, fast_vae
from adastate_pack.nodes.host.codec import HostDecoder
from comfy.latent_formats import Wan22
from conftest import HostNode


@pytest.fixture(scope="module")
def vae():
    return tiny_5b.loaded_vae()


@pytest.fixture(scope="module")
def tiny():
    return tiny_5b.loaded_tiny_vae()


def latents(frames: int, batch: int = 1, side: int = 4) -> torch.Tensor:
    return torch.randn(batch, 48, frames, side, side, generator=torch.Generator().manual_seed(2))


def tensors_of(decoder: HostDecoder) -> dict[str, torch.Tensor]:
    return {name: value for name, value in decoder.snapshot().items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
@pytest.mark.parametrize("split", [[6], [1, 1, 1, 1, 1, 1], [2, 3, 1]], ids=str)
def test_any_split_decodes_to_the_bits_of_one_whole_decode(vae, split):
    z = latents(6)
    decoder = HostDecoder(vae)
    parts = [decoder.step(part)[0] for part in z.split(split, dim=2)]
    assert [len(part) for part in parts] == [4 * n - (3 if i == 0 else 0) for i, n in enumerate(split)]
    assert torch.equal(torch.cat(parts), vae.decode(z)[0])


@torch.no_grad()
@pytest.mark.parametrize(("width", "dec_width"), [(4, 4), (4, 12), (8, 8)])
def test_the_cache_is_what_was_planned_whatever_the_width(width, dec_width):
    """By the formula's two constants: three widths of the decoder, one of them not the encoder's."""
    decoder = HostDecoder(tiny_5b.loaded_vae(width=width, dec_width=dec_width))
    sizes = [(decoder.step(latents(1, 2)), decoder.nbytes)[1] for _ in range(5)]
    assert sizes[2] == sizes[-1] == decoder.cache_bytes(2, 4, 4) == (1784 * dec_width + 96) * 16 * 2 * 4


@torch.no_grad()
def test_the_cache_moves_goes_back_and_survives_a_failure(vae, monkeypatch):
    z = latents(6)
    whole, first, second = vae.decode(z), HostDecoder(vae), HostDecoder(vae)
    head = first.step(z[:, :, :2])
    mark, saved = first.mark(), first.snapshot()
    assert saved["vae_markers"] == [], "both upsamplers have left their first call behind"
    with monkeypatch.context() as patch:
        patch.setattr(type(first.stream.codec.decoder.head[2]), "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            first.step(z[:, :, 2:])
    rest = first.step(z[:, :, 2:])
    assert torch.equal(torch.cat([head, rest], 1), whole)
    first.rewind(mark)
    second.restore(saved)
    for decoder in (first, second):
        assert torch.equal(decoder.step(z[:, :, 2:]), rest)
    one = HostDecoder(vae)
    one.step(z[:, :, :1])
    assert one.snapshot()["vae_markers"] == [11, 18]
    second.restore(one.snapshot())
    assert torch.equal(second.step(z[:, :, 1:]), whole[:, 1:])


@torch.no_grad()
def test_a_decoder_that_begins_anew_stands_where_the_whole_one_does(vae):
    """Calls of 10 latents behind a first one, which begin at the same latents however many were skipped."""
    seen = -(-HostDecoder(vae).reach // 10) * 10 + 1
    z = latents(seen + 30, side=1)
    whole = HostDecoder(vae, 10)
    whole.step(z[:, :, :-10])
    for skipped, same in ((20, True), (seen + 9, False)):
        anew = HostDecoder(vae, 10)
        anew.skip(skipped)
        anew.step(z[:, :, skipped:-10])
        one, other = tensors_of(whole), tensors_of(anew)
        assert one.keys() == other.keys() and len(one) == 32
        assert all(torch.equal(one[name], other[name]) for name in one) == same
        mark = whole.mark()
        assert torch.equal(whole.step(z[:, :, -10:]), anew.step(z[:, :, -10:])) == same
        whole.rewind(mark)


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_pictures_are_encoded_and_kept_as_the_host_does(vae, monkeypatch, in_place):
    """Newer hosts make pictures of the decoder's output in its own place."""
    if in_place:
        monkeypatch.setattr(vae, "process_output", lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0))
    pictures = torch.rand(5, 32, 64, 3, generator=torch.Generator().manual_seed(1))
    assert codec.encode(vae, pictures).shape == (1, 48, 2, 2, 4)
    assert torch.equal(codec.encode_alone(vae, pictures[:1]), vae.encode(pictures[:1]))
    decoder, z = HostDecoder(vae), latents(3)
    decoder.keep_pictures_of([1, 2])
    made = decoder.step(z)
    assert torch.equal(made, HostDecoder(vae).step(z))
    assert torch.equal(decoder.kept_pictures[1], made[:, 4]) and torch.equal(decoder.kept_pictures[2], made[:, 8])
    assert decoder.working_bytes(1, 4, 4) > vae.memory_used_decode((1, 48, 1, 4, 4), torch.float32)
    assert decoder.encoding_bytes(4, 4) == vae.memory_used_encode((1, 3, 1, 64, 64), torch.float32)


@torch.no_grad()
def test_the_tiny_one_is_the_hosts_and_is_fed_what_it_is_told(tiny):
    z = latents(4, 2, side=2)
    whole = tiny.decode(z).clamp(0, 1)
    assert whole.shape == (2, 13, 32, 32, 3) and whole.std() > 0.05
    for split, count in (([4], 1), ([1, 2, 1], 3)):
        decoder = HostDecoder(tiny, count)
        parts = [decoder.step(part) for part in z.split(split, dim=2)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
        assert decoder.nbytes == decoder.cache_bytes(2, 2, 2) == 5376 * 4 * 2 * 4
    # lighttaew2_2 takes VAE Decode's latents, taew2_2 the model's
    normalised = HostNode("AdaStateDecode")(latent={"samples": z}, vae=tiny, latent_space="model").args[0]
    expected = tiny.decode(Wan22().process_in(z)).clamp(0, 1).flatten(0, 1)
    torch.testing.assert_close(normalised, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "side", "compiles"), [(1, 4, False), (2, 3, True)])
def test_the_fast_way_is_near_it_and_has_the_same_bits_however_it_is_split(vae, batch, side, compiles, monkeypatch):
    """`compiles`: the CPU as a device that does, where all that a decode calls is made while it is loaded."""
    made, z, plain = [], latents(7, batch, side), vae.decode(latents(7, batch, side))
    if compiles:
        monkeypatch.setattr(fused, "_MADE", {})
        monkeypatch.setattr(fast_vae, "compiler_for", lambda device: (lambda one: (made.append(one), one)[1], ""))
    decoder = HostDecoder(vae, fast=True)
    assert (decoder.way, decoder.why_plain) == ("fast", "")
    decoder.load(z.shape)
    assert bool(made) == compiles
    made.clear()
    whole = decoder.step(z)
    assert whole.shape == plain.shape and plain.std() > 0.05 and 0 < (whole - plain).abs().max() < 1e-4
    assert not made and decoder.nbytes == decoder.cache_bytes(batch, side, side)
    other, last = HostDecoder(vae, fast=True), HostDecoder(vae, fast=True)
    parts = [other.step(part) for part in z[:, :, :4].split([1, 3], dim=2)]
    last.restore(other.snapshot())
    assert torch.equal(torch.cat([*parts, last.step(z[:, :, 4:])], 1), whole)
    del decoder, other, last
    assert torch.equal(vae.decode(z), plain)
