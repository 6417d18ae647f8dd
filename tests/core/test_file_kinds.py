"""What people have in place of weights: each is told in one sentence that says what the file is, and no code in it runs."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save
from test_checkpoints import Harm, weights, with_header

from adastate_core.weights.checkpoints import CheckpointError, open_checkpoint
from adastate_core.weights.lora_file import open_lora

SMALL = {"model.blocks.0.self_attn.q.weight": torch.ones(2, 2)}


def torch_file(content, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def repacked(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return stream.getvalue()


def archive(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as file:
            file.writestr("model.safetensors", b"0")
    else:
        with tarfile.open(fileobj=stream, mode="w") as file:
            file.addfile(tarfile.TarInfo("model.safetensors"))
    return stream.getvalue()


def script() -> bytes:
    with zipfile.ZipFile(stream := io.BytesIO(), "w") as file:
        for name in ("a/data.pkl", "a/constants.pkl", "a/code/__torch__.py"):
            file.writestr(name, b"0")
    return stream.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
KINDS = {
    "legacy.pt": (
        torch_file(SMALL, _use_new_zipfile_serialization=False),
        "torch's file format from before version 1.6",
    ),
    "pointer.pt": (POINTER, "a git-lfs pointer, a text of 63 bytes"),
    "pointer.safetensors": (POINTER, "a git-lfs pointer, .* run git lfs pull"),
    "page.safetensors": (PAGE, "a web page"),
    "page.pth": (PAGE, "a web page"),
    "none.ckpt": (b"", r"it is empty \(0 bytes\)"),
    "none.safetensors": (b"", r"it is empty \(0 bytes\)"),
    "reserved.safetensors": (bytes(4096), "begins with zeros only"),
    "index.safetensors": (json.dumps({"metadata": {}, "weight_map": {}}).encode(), "a text in JSON"),
    "words.bin": (b"Repository not found, or you have no access", "a text of 43 bytes and no weights"),
    "quantised.safetensors": (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file; load it with a GGUF loader"),
    "packed.pt": (gzip.compress(b"weights"), r"a packed archive \(gzip\); unpack it"),
    "seven.safetensors": (b"7z\xbc\xaf\x27\x1c" + bytes(50), r"a packed archive \(7z\)"),
    "tar.pt": (archive("tar"), "a tar archive"),
    "zip.pt": (archive("zip"), "a zip archive that torch.save did not write"),
    "again.pt": (repacked(torch_file(SMALL)), "a zip program has packed it again"),
    "script.pt": (script(), "a TorchScript program"),
    "pickle.pt": (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    "half.pt": (torch_file(SMALL)[:-40], "the download was cut short"),
    "half.safetensors": (save(SMALL)[:-3], "it has 13 bytes of weights and should have 16"),
    "other.pt": (save(SMALL), "a safetensors file under another name; rename it to end in .safetensors"),
    "other.safetensors": (torch_file(SMALL), "under another name; rename it to end in .pt"),
    "noise.pt": (bytes(range(1, 200)), "no torch file"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_file_is_is_said(name, tmp_path):
    content, words = KINDS[name]
    (tmp_path / name).write_bytes(content)
    for read in (open_checkpoint, open_lora):
        with pytest.raises(
            CheckpointError, match=f"^{re.escape(name)} cannot be read as a checkpoint: .*{words}"
        ) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_places_that_hold_no_file(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "gone.pt")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, words in (
        ("folder.safetensors", "a folder"),
        ("pipe.safetensors", "no file"),
        ("link.pt", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=f"^{name} cannot be read as a checkpoint: .*{words}") as error:
            open_checkpoint(tmp_path / name)
        assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("length", [0x80, 0x1F, ord("R"), ord("G"), ord("B"), ord("P"), ord("<"), ord("v")])
def test_the_length_that_a_safetensors_file_begins_with_is_no_kind(length, tmp_path):
    """Its lowest byte may be the first one of a pickle, a gzip or a text."""
    whole = save(SMALL)
    header = whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]].rstrip()
    header += b" " * ((length - len(header)) % 256)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + whole[-16:])
    assert list(open_checkpoint(tmp_path / "a.safetensors").shapes) == ["blocks.0.self_attn.q.weight"]


OTHER = {"blocks.0.ffn.0.weight": torch.zeros(3)}
NESTED = {
    "an empty average": {"generator_ema": {}, "generator": SMALL},
    "an average's numbers": {"ema": {"decay": 0.9, "updates": torch.tensor(5)}, "model": SMALL},
    "an average that is None": {"generator_ema": None, "generator": SMALL},
    "a step that is a tensor": {"step": torch.tensor(3), "generator": SMALL, "critic": OTHER},
    "an empty average, flat below": {"state_dict": {"step": torch.tensor(3), "generator_ema": {}, "generator": SMALL}},
    "beside an optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "model": SMALL, "epoch": 3},
}


@pytest.mark.parametrize("which", NESTED)
def test_the_part_with_weights_is_taken(which, tmp_path):
    torch.save(NESTED[which], tmp_path / "a.pt")
    found = open_checkpoint(tmp_path / "a.pt")
    assert (
        torch.equal(dict(found.tensors())["blocks.0.self_attn.q.weight"], torch.ones(2, 2)) and len(found.shapes) == 1
    )
    assert {"critic", "optimizer"}.intersection(NESTED[which]) <= set(found.beside)


def test_models_inside_models_end(tmp_path):
    inside: dict = {}
    inside |= dict.fromkeys(("generator_ema", "ema", "generator", "model_ema", "model", "state_dict"), inside)
    torch.save(inside, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="a.pt holds no weights, only models inside models"):
        open_checkpoint(tmp_path / "a.pt")


def test_parts_and_layouts_of_a_model_are_named(tmp_path):
    part, rest = "model-00002-of-00003.safetensors", {"blocks.7.ffn.0.weight": torch.zeros(2, 2)}
    for name, content, words in (
        (part, rest, "is part 2 of 3 of a model"),
        (
            "diffusers.safetensors",
            {"blocks.0.attn1.to_q.weight": torch.zeros(2, 2)},
            "is a Wan model in the layout of diffusers",
        ),
    ):
        (tmp_path / name).write_bytes(save(content))
        with pytest.raises(CheckpointError, match=f"^{name} {words}"):
            _ = open_checkpoint(tmp_path / name).geometry


def test_odd_headers_take_no_time_and_names_stay_on_one_line(tmp_path):
    long = "x" * 100_000
    for header, words in (
        ({"x": {"dtype": "F32", "shape": [10**4000] * 5000, "data_offsets": [0, 8]}}, "another size than its shape"),
        ({"x": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}, "another size than its shape"),
        ({"x": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}, "does not say where x lies"),
        ({"x": 5}, "does not say where x lies"),
        ({"a\nb": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}, r"holds a\?b in a number format"),
        ({long: 5}, r"where x{120}\.\.\. lies"),
        ([], "its header names no weights|no safetensors file"),
    ):
        (tmp_path / "a.safetensors").write_bytes(with_header(header))
        with pytest.raises(CheckpointError, match=f"^a.safetensors .*{words}") as error:
            open_checkpoint(tmp_path / "a.safetensors")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def mutants(seed: int, count: int):
    """(name, bytes): whole files of models and LoRAs with bytes changed, cut, repeated, moved, or names and numbers replaced."""
    generator = random.Random(seed)
    small = {name: value[:4, :4].clone() if value.ndim == 2 else value for name, value in weights().items()}
    lora = {
        f"diffusion_model.blocks.0.self_attn.q.{part}": torch.ones(4, 4) for part in ("lora_A.weight", "lora_B.weight")
    }
    lora["lora_unet_blocks_0_ffn_0.alpha"] = torch.tensor(2.0)
    sources = [(".safetensors", save(small)), (".safetensors", save(lora)), (".pt", torch_file({"generator": small})),
               (".pt", torch_file({"generator_lora": lora, "step": 3}))]  # fmt: skip
    words = [
        b"[" * 50,
        b"null",
        b'"dtype"',
        b"F32",
        b"1e999",
        b"-1",
        b"\xff\xfe",
        b"cos\nsystem\n",
        b"blocks",
        b"}",
        b"9" * 30,
    ]
    for index in range(count):
        suffix, content = sources[index % len(sources)]
        near = min(len(content), 8000)  # names and numbers stand there
        content = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            at, how = generator.randrange(near), generator.randrange(6)
            if how == 0:
                content[at] = generator.randrange(256)
            elif how == 1:
                del content[at : at + generator.randint(1, 400)]
            elif how == 2:
                word = generator.choice(words)
                content[at : at + len(word)] = word
            elif how == 3:
                content[at:at] = generator.choice(words)
            elif how == 4:
                content[-generator.randint(1, 300) :] = generator.randbytes(generator.randint(0, 50))
            else:
                other = generator.randrange(near)
                content[at : at + 40], content[other : other + 40] = content[other : other + 40], content[at : at + 40]
        yield f"{'model' if index % 4 in (0, 2) else 'lora'}{suffix}", bytes(content)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_changed_files_are_read_or_refused_in_one_sentence(tmp_path, seed=0, count=120):
    """More by hand: `python -c "from test_file_kinds import *; ..."` with another seed and count."""
    refused = 0
    for name, content in mutants(seed, count):
        path = tmp_path / name
        path.write_bytes(content)
        for read in (open_checkpoint, open_lora):
            try:
                found = read(path)
                if read is open_checkpoint:
                    _ = found.geometry, found.unused()
                else:
                    found.check({key: tuple(value.shape) for key, value in weights().items()})
                list(found.tensors())
            except ValueError as error:
                refused += 1
                text = str(error)
                assert text.startswith(name) and "\n" not in text and len(text) < 600, text
                assert str(tmp_path) not in text and "Traceback" not in text
                assert not re.search(
                    r"NoneType|unhashable|not subscriptable|expected \d+ arg|PytorchStream|mmap", text
                ), text
    assert refused > count


def test_code_in_any_of_the_kinds_is_not_run(tmp_path):
    mark = tmp_path / "ran"
    harm = {"generator": SMALL | {"x": Harm(str(mark))}}
    for name, content in (
        ("a.pt", torch_file(harm)),
        ("b.pt", torch_file(harm, _use_new_zipfile_serialization=False)),
        ("c.bin", pickle.dumps(harm)),
        ("d.safetensors", pickle.dumps(harm)),
        ("e.safetensors", torch_file(harm)),
    ):
        (tmp_path / name).write_bytes(content)
        for read in (open_checkpoint, open_lora):
            with pytest.raises(CheckpointError, match=f"^{name} "):
                read(tmp_path / name)
    assert not mark.exists()
