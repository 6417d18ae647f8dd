"""Every layout in which causal Wan files are passed around, made small, and files that mean harm."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct

import pytest
import torch
from safetensors.torch import save_file

from adastate_core.weights.checkpoints import geometry_of, open_checkpoint, own_metadata, plain_name

WIDTH, FEED_FORWARD, LAYERS = 128, 192, 2


def wan_shapes(width: int, feed_forward: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Every weight of a Wan 2.1 text-to-video transformer, by hand."""
    shapes = {
        "patch_embedding.weight": (width, 16, 1, 2, 2), "patch_embedding.bias": (width,),
        "text_embedding.0.weight": (width, 4096), "text_embedding.0.bias": (width,),
        "text_embedding.2.weight": (width, width), "text_embedding.2.bias": (width,),
        "time_embedding.0.weight": (width, 256), "time_embedding.0.bias": (width,),
        "time_embedding.2.weight": (width, width), "time_embedding.2.bias": (width,),
        "time_projection.1.weight": (6 * width, width), "time_projection.1.bias": (6 * width,),
        "head.head.weight": (64, width), "head.head.bias": (64,), "head.modulation": (1, 2, width),
    }  # fmt: skip
    for i in range(layers):
        block = {"modulation": (1, 6, width), "norm3.weight": (width,), "norm3.bias": (width,)}
        for kind in ("self_attn", "cross_attn"):
            for n in "qkvo":
                block |= {f"{kind}.{n}.weight": (width, width), f"{kind}.{n}.bias": (width,)}
            block |= {f"{kind}.norm_q.weight": (width,), f"{kind}.norm_k.weight": (width,)}
        block |= {"ffn.0.weight": (feed_forward, width), "ffn.0.bias": (feed_forward,)}
        block |= {"ffn.2.weight": (width, feed_forward), "ffn.2.bias": (width,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes


def weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The weights of a tiny Wan 2.1 transformer that tell its sizes, by Wan's own names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = wan_shapes(WIDTH, FEED_FORWARD, LAYERS)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def renamed(prefix: str, infix: str = "", seed: int = 0) -> dict[str, torch.Tensor]:
    """The same under a trainer's names: a prefix on all, an infix behind the block's number."""
    return {
        prefix + (name if not infix else name.replace(".self_attn", f".{infix}self_attn")): value
        for name, value in weights(seed).items()
    }


LAYOUTS = {
    "plain": lambda: weights(),
    "the host's prefix": lambda: renamed("model.diffusion_model."),
    "half the host's prefix": lambda: renamed("diffusion_model."),
    "flat generator_ema beside others": lambda: renamed("generator_ema.model.") | renamed("generator.model.", seed=5),
    "flat generator": lambda: renamed("generator.") | {"critic.blocks.0.ffn.0.weight": torch.zeros(2)},
    "FSDP": lambda: renamed("model._fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
    "compiled": lambda: renamed("_orig_mod.model."),
}
NESTED = {
    "Self-Forcing": lambda: {
        "generator": renamed("model.", seed=5), "generator_ema": renamed("model."), "critic": renamed("model.", seed=6),
    },
    "Self-Forcing, FSDP": lambda: {"generator_ema": renamed("model._fsdp_wrapped_module.", "_checkpoint_wrapped_module.")},
    "generator only": lambda: {"generator": renamed("model."), "step": 5},
    "state_dict": lambda: {"state_dict": renamed("model.")},
    "twice": lambda: {"model": {"state_dict": renamed("")}},
    "plain": lambda: weights(),
}  # fmt: skip


def check(path) -> None:
    found, expected = open_checkpoint(path), weights()
    assert dict(found.tensors()).keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.tensors())
    assert found.nbytes == sum(t.nbytes for t in expected.values())
    geometry = found.geometry
    assert (geometry.width, geometry.feed_forward, geometry.layers, geometry.heads) == (WIDTH, FEED_FORWARD, LAYERS, 1)
    assert (geometry.in_channels, geometry.text_channels) == (16, 4096)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_safetensors_layouts(layout, tmp_path):
    save_file(layout(), tmp_path / "a.safetensors")
    check(tmp_path / "a.safetensors")


@pytest.mark.parametrize("layout", NESTED.values(), ids=NESTED.keys())
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_torch_layouts(layout, suffix, tmp_path):
    torch.save(layout(), tmp_path / f"a{suffix}")
    check(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_every_number_format_keeps_its_own(dtype, tmp_path):
    save_file(weights(dtype=dtype), tmp_path / "a.safetensors")
    found = open_checkpoint(tmp_path / "a.safetensors")
    assert set(found.dtypes.values()) == {dtype} and found.geometry.layers == LAYERS


def test_our_own_metadata_is_read_and_others_is_not_trusted(tmp_path):
    for text, expected in ((json.dumps({"steps": 4}), {"steps": 4}), ("[1]", {}), ("{", {}), ("[" * 99999, {})):
        save_file(weights(), tmp_path / "a.safetensors", metadata={"adastate": text})
        assert own_metadata(open_checkpoint(tmp_path / "a.safetensors")) == expected


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.model.diffusion_model.blocks.0.x", "blocks.0.x"),
        ("module.model._orig_mod.head.head.weight", "head.head.weight"),
        ("modulation", "modulation"),
        ("model_x.weight", "model_x.weight"),
    ],
)
def test_names(name, plain):
    assert plain_name(name) == plain


def without(name: str) -> dict[str, torch.Tensor]:
    return {n: t for n, t in weights().items() if not n.startswith(name)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (without("patch_embedding"), "is not a Wan transformer: it has no patch_embedding.weight"),
        (without("blocks.0"), "is not a Wan transformer: it has no blocks.0.ffn.0.weight"),
        (without("blocks.1.self_attn.k"), "does not fit together: blocks.1.self_attn.k.weight is missing"),
        (weights() | {"blocks.1.ffn.2.weight": torch.zeros(3, 3)}, "blocks.1.ffn.2.weight is \\[3, 3\\] and should be"),
        (weights() | {"blocks.3.ffn.0.weight": torch.zeros(3, 3)}, "has 3 layers up to 3, and layer 2 is missing"),
        (weights() | {"patch_embedding.weight": torch.zeros(130, 16, 1, 2, 2)}, "a width of 130"),
        (without("blocks.1.modulation"), "does not fit together: blocks.1.modulation is missing"),
        (without("time_projection.1.bias"), "does not fit together: time_projection.1.bias is missing"),
        (
            weights() | {"head.head.weight": torch.zeros(48, WIDTH)},
            "head.head.weight is \\[48, 128\\] and should be \\[64",
        ),
        (weights() | {"patch_embedding.weight": torch.zeros(4)}, "its patch_embedding.weight is \\[4\\]"),
        (weights() | {"blocks.0.ffn.0.weight": torch.zeros(())}, "its blocks.0.ffn.0.weight is \\[\\]"),
        (weights() | {"patch_embedding.weight": torch.zeros(0, 16, 1, 2, 2)}, "its patch_embedding.weight is \\[0, 16"),
    ],
)
def test_wrong_weights_are_refused_by_name(content, words, tmp_path):
    save_file(content, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=f"bad.safetensors .*{words}|bad.safetensors {words}"):
        _ = open_checkpoint(tmp_path / "bad.safetensors").geometry


class Harm:
    """Runs a command when it is unpickled the trusting way."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"generator": {"model.x": Harm(str(mark))}}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Harm(str(mark))))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=f"{name} (is a pickle with more than tensors|cannot be read)"):
            open_checkpoint(tmp_path / name)
    assert not mark.exists()


def with_header(header: object, data: int = 0) -> bytes:
    """A safetensors file of this header and so many bytes of weights."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def test_metadata_that_is_none_does_not_matter(tmp_path):
    for metadata in (3, ["adastate"], {"adastate": 4}):
        (tmp_path / "a.safetensors").write_bytes(with_header({"__metadata__": metadata}))
        assert own_metadata(open_checkpoint(tmp_path / "a.safetensors")) == {}


def test_broken_files_are_refused_in_one_sentence(tmp_path):
    save_file(weights(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    torch.save(weights(), tmp_path / "whole.pt")
    packed = (tmp_path / "whole.pt").read_bytes()
    header = struct.pack("<Q", 2**40) + b"{}"
    broken = {
        "cut.safetensors": whole[: len(whole) // 2],
        "empty.safetensors": b"",
        "huge_header.safetensors": header,
        "not_json.safetensors": struct.pack("<Q", 4) + b"{{{{",
        "a_list.safetensors": with_header([1, 2]),
        "no_sizes.safetensors": with_header({"x": {"dtype": "F32"}}),
        "overlapping.safetensors": with_header(
            {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "xy"}, 8
        ),
        "too_big.safetensors": with_header({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}}, 8),
        "negative.safetensors": with_header({"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, 8),
        "odd_format.safetensors": with_header({"x": {"dtype": "F7", "shape": [8], "data_offsets": [0, 8]}}, 8),
        "odd_name.safetensors": with_header({"x": {"dtype": [1], "shape": [8], "data_offsets": [0, 8]}}, 8),
        "more_bytes.safetensors": whole + b"0",
        "cut.pt": packed[: len(packed) // 2],
        "empty.pt": b"",
        "text.pt": b"hello",
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            open_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="gone.safetensors cannot be read"):
        open_checkpoint(tmp_path / "gone.safetensors")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="none.pt holds no weights"):
        open_checkpoint(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt holds a list and not named weights"):
        open_checkpoint(tmp_path / "list.pt")


def test_public_sizes_have_their_names():
    for width, feed_forward, name, heads in ((1536, 8960, "1.3B", 12), (5120, 13824, "14B", 40)):
        geometry = geometry_of(wan_shapes(width, feed_forward, 1))
        assert (geometry.parameters, geometry.heads) == (name, heads)


def test_torch_files_that_are_odd_inside(tmp_path):
    inside: dict = {}
    inside["model"] = inside
    one_number = torch.zeros(1).expand(2**40, 2**20)
    odd = {
        "itself.pt": (inside, "only models inside models"),
        "stretched.pt": ({"blocks.0.x": one_number}, "holds blocks.0.x as something else than a plain tensor"),
        "sparse.pt": (
            {"blocks.0.x": torch.eye(3).to_sparse()},
            "holds blocks.0.x as something else than a plain tensor",
        ),
        "numbered.pt": ({1: torch.zeros(2)}, "is not a Wan transformer"),
    }
    for name, (content, words) in odd.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} .*{words}") as error:
            _ = open_checkpoint(tmp_path / name).geometry
        assert "\n" not in str(error.value)
    torch.save({name: torch.nn.Parameter(t) for name, t in weights().items()}, tmp_path / "PARAMETERS.PT")
    check(tmp_path / "PARAMETERS.PT")


def test_any_bytes_are_read_or_refused_in_one_sentence(tmp_path):
    """Each file is a whole one with some bytes changed where its names and numbers stand."""
    torch.save({"generator": {"step": 1, "model.x": torch.zeros(2)}}, tmp_path / "whole.pt")
    save_file({"x": torch.zeros(2)}, tmp_path / "whole.safetensors")
    generator = random.Random(0)
    refusals = 0
    for suffix in (".pt", ".safetensors"):
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(generator.randint(1, 6)):
                content[generator.randrange(len(content) if suffix != ".pt" else 400)] = generator.randrange(256)
            path = tmp_path / f"changed{suffix}"
            path.write_bytes(content)
            try:
                open_checkpoint(path)
            except ValueError as error:
                refusals += 1
                assert str(error).startswith(path.name) and "\n" not in str(error)
    assert refusals > 100
