"""States and absorptions on disk: they come back whole, and whatever is not whole is refused in one sentence."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from state_cases import CASES, go_on, made

from adastate_core.absorption.saved import load_solution, save_solution, solution_from
from adastate_core.rollout import RolloutState
from adastate_core.states.state_file import load_state, save_state, state_chunk

EVERY = pytest.mark.parametrize("name", CASES)
BELONGS = {"model": "a", "solved_for": {"seed": 7, "prompt": "b"}}
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


@pytest.fixture
def written(tmp_path, name) -> Path:
    return save_state(made(name)[1], tmp_path / f"{name}.state.safetensors")


def parts_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], str]:
    """A file's tensors and texts as the safetensors library reads them, and the name of the text that is its header."""
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()
    return load_file(path), texts, "state" if "state" in texts else "absorption"


def changed(path: Path, change: Change) -> Path:
    """The file as a pack before would have written it, without checksums, after `change`."""
    tensors, texts, name = parts_of(path)
    header = json.loads(texts[name])
    change(tensors, header)
    old = path.with_name(f"old.{name}.safetensors")
    save_file(tensors, old, metadata={"format": texts["format"], "version": "1", name: json.dumps(header)})
    return old


def load(path: Path) -> Any:
    """As the nodes do: an absorption meets its model too."""
    if parts_of_name(path) == "state":
        return load_state(path)
    settings, _, state = load_solution(path)
    spec = made("switched")[0]
    return solution_from(state, settings, 2, 24, spec.geometry.heads)


def parts_of_name(path: Path) -> str:
    return "absorption" if "absorption" in path.name else "state"


def refusal(path: Path, named: bool = True) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    text = str(caught.value)
    assert (text.startswith(path.name) or not named) and "\n" not in text and len(text) < 400, text
    return text


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            if a.ndim
            else torch.equal(a, b)
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def as_tables(state: RolloutState) -> list[Any]:
    names = (
        "next_frame",
        "next_chunk",
        "emitted",
        "pending",
        "hidden",
        "latents",
        "recent",
        "noisy",
        "stream",
        "absorption",
        "shots",
    )
    return [[getattr(state, name) for name in names], [vars(layer) for layer in state.cache]]


@EVERY
def test_a_state_comes_back_bit_for_bit_and_goes_on(written, name):
    spec, state = made(name)
    loaded = load_state(written)
    assert same(as_tables(loaded), as_tables(state)) and state_chunk(written) == state.next_chunk
    length = state.emitted + 5
    expected, found = (torch.cat([c.latents for c in go_on(spec, s).chunks(length)], 2) for s in (state, loaded))
    assert torch.equal(expected, found)


@EVERY
def test_a_state_of_before_without_checksums_comes_back_too(written, name):
    old = changed(written, lambda tensors, header: None)
    assert same(as_tables(load_state(old)), as_tables(load_state(written)))


@EVERY
def test_the_library_reads_what_is_written(written, name):
    _, state = made(name)
    with safe_open(written, framework="pt") as file:
        assert file.metadata()["format"] == "adastate.rollout" and file.metadata()["version"] == "2"
        assert torch.equal(file.get_tensor("pending"), state.pending)
        for i, layer in enumerate(state.cache):
            for key, tensor in layer.tensors.items():
                assert same(file.get_tensor(f"cache.{i}.{key}"), tensor)


def test_dtypes_and_shapes_of_every_kind_are_read_by_the_library(tmp_path):
    from adastate_core.files.tensor_file import DTYPES, TensorFile, write_tensors

    tensors = {f"{d}": (torch.arange(24).reshape(2, 3, 4) % 2).to(d) for d in DTYPES.values()}
    tensors |= {"none": torch.zeros(2, 0, 3), "one": torch.tensor(1.5), "turned": torch.randn(3, 4).half().T}
    tensors |= {"part": torch.randn(8)[1:4], 'name with " and \u00e4': torch.ones(1)}
    path = write_tensors(tmp_path / "a.safetensors", tensors, {"b": "c\n\u00e4"})
    with open(path, "rb") as file:
        own = TensorFile(file).read(checked=True)
    for read in (own, load_file(path)):
        assert read.keys() == tensors.keys()
        assert all(read[n].dtype == t.dtype and torch.equal(read[n].float(), t.float()) for n, t in tensors.items())


def flips(data: bytes, header: int, count: int, seed: int) -> Iterator[bytes]:
    """The file with one bit turned, in its header and beyond."""
    chance = random.Random(seed)
    for i in range(count):
        place = chance.randrange(8 + header) if i % 2 else chance.randrange(8 + header, len(data))
        turned = bytearray(data)
        turned[place] ^= 1 << chance.randrange(8)
        yield bytes(turned)


@EVERY
def test_a_flipped_bit_is_seen(written, name):
    data = written.read_bytes()
    for turned in flips(data, int.from_bytes(data[:8], "little"), 80, seed=len(name)):
        written.write_bytes(turned)
        refusal(written)


def test_a_flipped_bit_of_an_absorption_is_seen(absorption):
    data = absorption.read_bytes()
    for turned in flips(data, int.from_bytes(data[:8], "little"), 400, seed=5):
        absorption.write_bytes(turned)
        refusal(absorption)


def test_every_bit_of_a_header_counts(tmp_path):
    path = save_state(made("none")[1], tmp_path / "a.state.safetensors")
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for place in range(0, end, 3):
        turned = bytearray(data)
        turned[place] ^= 1 << place % 8
        path.write_bytes(turned)
        refusal(path)
        if place % 4 == 0:
            with pytest.raises(ValueError, match="^a.state.safetensors"):
                state_chunk(path)


@EVERY
def test_a_file_that_is_cut_off_or_has_grown_is_refused(written, name):
    data = written.read_bytes()
    chance = random.Random(len(name))
    for end in [0, 1, 7, 8, 9, len(data) - 1, *(chance.randrange(len(data)) for _ in range(12))]:
        written.write_bytes(data[:end])
        assert "cannot be read" in refusal(written)
    for more in (b"\0", data):
        written.write_bytes(data + more)
        assert "cut off or has grown" in refusal(written)


def test_lost_checksums_are_refused(tmp_path):
    """A file that has lost them is not taken for one of before."""
    path = save_state(made("none")[1], tmp_path / "a.state.safetensors")
    tensors, texts, _ = parts_of(path)
    for without in (("checksums",), ()):
        whole = path.read_bytes()
        while path.read_bytes() == whole:  # the library's order of texts is random, and now and then ours
            save_file(tensors, path, metadata={key: value for key, value in texts.items() if key not in without})
        assert "checksum" in refusal(path)


# what a state of before may do without: what came in later, what need not be there, and what only the decoder can miss
MAY_MISS = re.compile(r"recent|noisy|given|latents|stream\.(vae_feature_4|taehv_memory_2)")


def is_copy(name: str, key: str) -> bool:
    """Whether it is the un-rotated copy of keys that are all un-rotated, which is made anew."""
    if not key.endswith(".raw"):
        return False
    layer = made(name)[1].cache[int(key.split(".")[1])]
    held, keys = len(layer.ring_slots), layer.tensors["keys"]
    raw_itself = all(position is None for position in layer.positions[len(layer.anchor_slots) :])
    return raw_itself and torch.equal(keys[:, keys.shape[1] - held :], layer.tensors["raw"])


def tensor_changes(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Damages of one tensor."""
    yield "missing", None
    yield "of integers", torch.zeros(tensor.shape, dtype=torch.int32)
    yield "of another dtype", tensor.float().to(torch.float16 if tensor.dtype != torch.float16 else torch.bfloat16)
    yield "of another shape", tensor[None]
    if tensor.ndim and tensor.shape[-1] > 1 and name != "pending":
        yield "cut", tensor[..., :-1].contiguous()
    if tensor.is_floating_point() and tensor.numel():
        for bad in (float("nan"), float("inf"), -float("inf")):
            if tensor.dtype == torch.float8_e4m3fn and bad == bad:
                continue
            spoilt = tensor.float().clone()
            spoilt.view(-1)[spoilt.numel() // 2] = bad
            yield str(bad), spoilt.to(tensor.dtype)
    if name.endswith("scales"):
        yield "zero", torch.zeros_like(tensor)


@pytest.mark.parametrize("name", [*CASES, "absorption"])
def test_each_tensor_is_held_to_its_name_dtype_shape_and_to_numbers(tmp_path, name, request):
    path = request.getfixturevalue("absorption") if name == "absorption" else None
    path = path or save_state(made(name)[1], tmp_path / f"{name}.state.safetensors")
    tensors, _, _ = parts_of(path)
    for key, tensor in tensors.items():
        for what, other in tensor_changes(key, tensor):

            def change(tensors, header, key=key, other=other):
                if other is None:
                    del tensors[key]
                else:
                    tensors[key] = other

            # a past that is made anew is made of what is recent, and a first chunk that frames stand in has them
            lacking = MAY_MISS.fullmatch(key) and (name, key) not in (("remade", "recent"), ("inside", "given"))
            if other is None and (lacking or is_copy(name, key)):
                load(changed(path, change))
                continue
            text = refusal(changed(path, change), named=name != "absorption")
            # of a missing one the sentence names the next, of one of another dtype whichever is not as the first
            close = (
                key.rsplit("_" if "stream" in key else ".", 1)[0] if what in ("missing", "of another dtype") else key
            )
            assert close in text, (what, text)

        def renamed(tensors, header, key=key):
            tensors[f"{key}x"] = tensors.pop(key)

        refusal(changed(path, renamed), named=name != "absorption")

    def added(tensors, header):
        tensors["cache.0.more"] = torch.zeros(1)

    assert "cache.0.more" in refusal(changed(path, added))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every number, text, switch and empty thing of a header, by its path. What a prompt was is anyone's."""
    if path and path[-1] in ("solved_for", "belongs_to"):
        return
    if isinstance(value, dict | list) and value:
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, (*path, key))
    else:
        yield path, value


def others(value: Any) -> list[Any]:
    """What no field that holds `value` may hold."""
    if isinstance(value, bool):
        return [1, 0, "true", None, [True]]
    if isinstance(value, int | float):
        more = [] if isinstance(value, float) else [value + 0.5, float(value) if value else 0.5]
        return [True, False, "x", str(value), 10**30, 2**64, float("nan"), float("inf"), [value], {}, *more]
    if isinstance(value, str):
        return [True, 5, None if value != "None" else [], [value], {}]
    return [True, 1.5, "x", {} if isinstance(value, list) else [1]]


def put(header: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        header = header[key]
    header[path[-1]] = value


# None stands for a choice there, and any number for a place in time
MAY_BE_NONE, MAY_BE_ANYWHERE = ("ridge",), ("positions",)


@pytest.mark.parametrize("name", [*CASES, "absorption"])
@pytest.mark.sampled(2)
def test_each_field_of_a_header_is_held_to_its_type_and_range(tmp_path, name, request):
    path = request.getfixturevalue("absorption") if name == "absorption" else None
    path = path or save_state(made(name)[1], tmp_path / f"{name}.state.safetensors")
    _, texts, kind = parts_of(path)
    header = json.loads(texts[kind])
    seen = set()
    for place, value in leaves(header):
        alike = tuple(0 if isinstance(key, int) else key for key in place)
        if alike in seen:  # the first of a list stands for all
            continue
        seen.add(alike)
        for bad in others(value):
            if bad is None and place[-1] in MAY_BE_NONE:
                continue
            if place[-2:-1] == MAY_BE_ANYWHERE and type(bad) is float and bad - bad == 0:
                continue
            text = refusal(changed(path, lambda _, header, place=place, bad=bad: put(header, place, bad)))
            field = next(key for key in reversed(place) if isinstance(key, str))
            assert field in text or repr(bad) in ("nan", "inf"), (place, bad, text)


@EVERY
def test_counters_have_to_agree(written, name):
    spec, state = made(name)
    fields = ["next_frame", "emitted"]
    cases = [(field, getattr(state, field) + by) for field in fields for by in (-1, 1)]
    cases += [
        ("next_chunk", state.next_chunk + max(1, state.next_frame)),
        ("next_frame", -1),
        ("emitted", -1),
        ("next_chunk", -1),
    ]
    for field, value in cases:
        text = refusal(changed(written, lambda _, header, f=field, v=value: header.__setitem__(f, v)))
        assert field in text or "next_frame" in text


def cut_frames(value: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([value] * 4, 2)[:, :, :count].contiguous()


def test_more_chunks_under_way_than_steps_are_refused(tmp_path):
    path = save_state(made("rolling")[1], tmp_path / "a.state.safetensors")
    for frames in (7, 9, 4, 1):
        text = refusal(changed(path, lambda t, _, n=frames: t.__setitem__("noisy", cut_frames(t["noisy"], n))))
        assert f"noisy is {frames} latent frames" in text
    spec, state = made("rolling")
    with pytest.raises(ValueError, match="9 latent frames"):
        go_on(spec, replace(state, noisy=cut_frames(state.noisy, 9)))


def test_latents_of_another_length_are_refused(tmp_path):
    path = save_state(made("adaptive")[1], tmp_path / "a.state.safetensors")
    for key, frames in (("recent", 1), ("latents", 3), ("hidden", 1), ("pending", 4)):
        text = refusal(changed(path, lambda t, _, k=key, n=frames: t.__setitem__(k, cut_frames(t[k], n))))
        assert key in text


def test_layers_of_one_plan_hold_the_same_frames(tmp_path):
    """A commit that was torn between two layers, as packs before could save it."""
    spec, state = made("none")
    first = state.cache[0]
    moved = replace(first, frames=tuple(frame - 1 for frame in first.frames))
    path = save_state(replace(state, cache=(moved, *state.cache[1:])), tmp_path / "a.state.safetensors")
    assert "cache.1 holds other frames than cache.0" in refusal(path)


@pytest.mark.parametrize("where", ["", "spec", "spec.geometry", "cache.0", "stream", "absorption", "spec.absorption"])
def test_unknown_and_missing_fields_are_named(tmp_path, where):
    path = save_state(made("watched")[1], tmp_path / "a.state.safetensors")
    _, texts, _ = parts_of(path)

    def at(header):
        for key in where.split(".") if where else ():
            header = header[int(key) if key.isdigit() else key]
        return header

    text = refusal(changed(path, lambda _, header: at(header).__setitem__("mood", 1)))
    assert f"{where}.mood".lstrip(".") in text
    if where == "spec.absorption":
        return  # what came in later has its default
    optional = {
        "blocks",
        "restart_frames",
        "overlap_frames",
        "cache_dtype",
        "pinned",
        "first_residuals",
        "solved_for",
        "due",
        "switched_at",
        "why",
        "how",
    }
    for key in set(at(json.loads(texts["state"]))) - optional:
        assert key.split(".")[0] in refusal(changed(path, lambda _, header, key=key: at(header).pop(key)))


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"next_chunk": NaN}',
        "null",
        "[]",
        '"x"',
        "",
        "{",
        '{"spec": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:20],
)
def test_hostile_headers_are_refused(tmp_path, text):
    path = tmp_path / "a.state.safetensors"
    metadata = {"format": "adastate.rollout", "version": "1", "state": text}
    save_file({"pending": torch.zeros(1)}, path, metadata=metadata)
    refusal(path)
    with pytest.raises(ValueError, match="^a.state.safetensors"):
        state_chunk(path)


@pytest.mark.parametrize(
    "table",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "more": 1}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": 5, "__metadata__": {}},
        {"__metadata__": {"format": 5}},
        {"__metadata__": []},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_tables_are_refused(tmp_path, table):
    path = tmp_path / "a.state.safetensors"
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    refusal(path)


@pytest.fixture
def absorption(tmp_path) -> Path:
    spec, _ = made("switched")
    rollout = go_on(spec)
    list(rollout.chunks(16))
    solution = rollout.absorber.solution
    return save_solution(solution, spec.absorption, copy.deepcopy(BELONGS), tmp_path / "a.absorption.safetensors")


def test_an_absorption_comes_back_and_of_before_too(absorption):
    for path in (absorption, changed(absorption, lambda tensors, header: None)):
        settings, belongs_to, state = load_solution(path)
        assert belongs_to == BELONGS and settings == made("switched")[0].absorption
        tensors = load_file(absorption)
        assert {n for n, t in state.items() if isinstance(t, torch.Tensor)} == set(tensors)
        assert all(torch.equal(state[n], t) for n, t in tensors.items())


def test_a_state_holds_what_was_watched_as_it_was():
    spec, state = made("watched")
    before = copy.deepcopy(state.absorption["watched"])
    list(go_on(spec, state).chunks(state.emitted + 12))
    assert before and state.absorption["watched"] == before
    rollout = go_on(spec)
    list(rollout.chunks(24))
    state = rollout.snapshot()
    watched = list(state.absorption["watched"])
    list(rollout.chunks(36))
    assert state.absorption["watched"] == watched and rollout.absorber.watched != watched


def test_a_state_of_numbers_that_are_none_is_not_written_over_a_good_one(tmp_path):
    state = made("none")[1]
    path = save_state(state, tmp_path / "a.state.safetensors")
    first = replace(state.cache[0], positions=(float("nan"),) * len(state.cache[0].positions))
    with pytest.raises(ValueError):
        save_state(replace(state, cache=(first, *state.cache[1:])), path)
    assert same(as_tables(load_state(path)), as_tables(state)) and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_state_says_which_layers_were_compiled_and_one_that_does_not_was_plain(tmp_path):
    _, state = made("none")
    plain = save_state(state, tmp_path / "plain.state.safetensors")
    assert "compiled_layers" not in parts_of(plain)[1]["state"] and load_state(plain).compiled_layers == ()
    path = save_state(replace(state, compiled_layers=(0, 1)), tmp_path / "compiled.state.safetensors")
    assert load_state(path).compiled_layers == (0, 1)


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [2], [-1], [True], ["0"], 1, None, {"0": 1}])
def test_compiled_layers_are_layers_of_the_model(tmp_path, layers):
    _, state = made("none")
    path = save_state(replace(state, compiled_layers=(0, 1)), tmp_path / "one.state.safetensors")
    assert "compiled_layers" in refusal(changed(path, lambda tensors, header: header.update(compiled_layers=layers)))
