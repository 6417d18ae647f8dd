"""Host-memory caches and snapshots on a GPU that does nothing before somebody waits for it: the latents and states of one that
does all at once, and the CPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_no_double_device as others
import test_transitions as transitions
import torch
from late_device import LateDevice, Stream
from no_double_device import model_on
from systems_fast import spec_of
from test_rollout import ANCHORS
from tiny_model import TinyModel

from adastate_core.anchors import AnchorAdaptive, AnchorMemory, AnchorReplay
from adastate_core.cache import host_copies
from adastate_core.cache.host_copies import HostCopies, block_bytes, frame_block_bytes
from adastate_core.cache.stored import StoredLayer
from adastate_core.cache.workspace import Workspace
from adastate_core.rollout import NonFiniteError, Rollout, Settings
from adastate_core.schedules.schedule import Schedule

HOST = "host memory"
KINDS = ("model", "fp8", "int8")
KEPT = {
    "none": ANCHORS["none"],
    "static": ANCHORS["static1"],
    "ema": ANCHORS["ema2"],
    "memory": AnchorMemory(2, long_rate=0.3, short_rate=0.6),
    "replay": AnchorReplay(9),
    "adaptive": ANCHORS["adaptive2"],
    "adaptive, slower": AnchorAdaptive(1, strength=0.5),
}
# (chunk, pass) before which it is given up; at the second attempt no table of rotations has to be waited for any more
STOPS = [(3, 0), (3, 0), (4, 2), (4, 0)]
TWO_STEPS = Schedule((1.0, 0.6))


def model():
    """Of 3 layers: the third lands where the first one's frames are in use."""
    return TinyModel(layers=3)


class Stop(Exception):
    pass


def rolled(make, lengths, every_chunk=False, stops=()):
    """Latents, and tensors of the states: after every length, from which another rollout goes on, or `every_chunk`.

    `make(state, on_step)`. A rollout that is stopped before a pass of `stops` gives a state and goes on as it is."""
    left, pieces, states, state = list(stops), [], [], None

    def stop(chunk, step, steps, x0):
        if (chunk, step) in left:
            left.remove((chunk, step))
            raise Stop

    for length in lengths:
        rollout = make(state, stop)
        while rollout.emitted < length:
            try:
                for chunk in rollout.chunks(length):
                    pieces.append(chunk.latents.clone())
                    if every_chunk:
                        states.append(tensors_of(rollout.snapshot()))
            except Stop:
                states.append(tensors_of(rollout.snapshot()))
        state = rollout.snapshot()
        states.append(tensors_of(state))
    assert not left
    return torch.cat(pieces, 2), states


def tensors_of(state):
    """As they are now: nothing that lands later may change them."""
    kept = [state.pending, state.hidden, state.recent, state.noisy]
    kept += [t for layer in state.cache for t in layer.tensors.values()]
    kept += [t for t in state.absorption.values() if isinstance(t, torch.Tensor)]
    return [t.clone() for t in kept if t is not None]


def on(when, make, **how):
    """`rolled` on the device; `make(model, state, on_step)`."""
    with LateDevice(when) as late:
        placed = model_on(late.device, model())
        out = rolled(lambda state, stop: make(placed, state, stop), **how)
        late.synchronize()
        assert late.from_host and late.to_host
    return out


def same(found, expected):
    """Whether latents and states are the same bits."""
    (latents, states), (others_latents, others_states) = found, expected
    pairs = zip(states, others_states, strict=True)
    return torch.equal(latents, others_latents) and all(
        torch.equal(a.float(), b.float()) for one, other in pairs for a, b in zip(one, other, strict=True)
    )


def check(make, near, **how):
    at_once = on("at once", make, **how)
    expected, _ = rolled(lambda state, stop: make(model(), state, stop), **how)
    torch.testing.assert_close(at_once[0], expected, **near)
    for when in ("late", "early"):
        assert same(on(when, make, **how), at_once), when


def near_of(cache_dtype):
    return others.NEAR if cache_dtype == "model" else others.NEAR_CODES


def test_the_stand_in_is_late():
    with LateDevice("late") as late:
        x, host = torch.ones(2, device=late.device), torch.zeros(2).pin_memory()
        host.copy_(x, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        assert host.tolist() == [0, 0]
        event.synchronize()
        assert host.tolist() == [1, 1]
        y = host.to(late.device, non_blocking=True) + x
        host.fill_(5)
        assert y.cpu().tolist() == [6, 6]
        side = torch.cuda.Stream(late.device)
        x.mul_(3)
        with torch.cuda.stream(side):
            host.copy_(x, non_blocking=True)
        side.synchronize()
        assert host.tolist() == [1, 1]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            host.copy_(x, non_blocking=True)
        side.synchronize()
        assert host.tolist() == [3, 3]
        assert x.mul_(2).cpu().tolist() == [6, 6] and float(x.sum()) == 12


def stored(name, cache_dtype="model", transition=None, **changed):
    """`make` of a rollout of a preset over a cache in host memory."""
    changed = dict(cache_dtype=cache_dtype, cache_device=HOST) | changed
    plan = transitions.plan_of(transitions.rows_of(transition), 3) if transition else None

    def make(model, state, stop):
        spec = spec_of(name, model, **changed)
        return Rollout(model, spec, Settings(7, TWO_STEPS), state=state, on_step=stop, prompts=plan)

    return make


def absorbed(scope="head", name="static1", cache_dtype="model", solution=None):
    spec = others.absorbed_spec(scope, "always", name, "packed", cache_dtype, HOST)

    def make(model, state, stop):
        spec_here = replace(spec, geometry=model.geometry)
        return Rollout(model, spec_here, Settings(7, TWO_STEPS), state=state, on_step=stop, solution=solution)

    return make


# two of the three kinds for every anchor, in turns
IN_HOST_MEMORY = [(name, KINDS[(i + j) % len(KINDS)]) for i, name in enumerate(KEPT) for j in (0, 1)]


@pytest.mark.parametrize(("name", "cache_dtype"), IN_HOST_MEMORY)
@pytest.mark.sampled(4)
def test_anchors(name, cache_dtype):
    """A snapshot in the middle that another rollout goes on from, or one after every chunk."""
    every_chunk = (list(KEPT).index(name) + KINDS.index(cache_dtype)) % 2 == 1
    make = stored("self_forcing", cache_dtype, anchor=KEPT[name], window_frames=6, positions="packed")
    check(make, near_of(cache_dtype), lengths=(15,) if every_chunk else (9, 15), every_chunk=every_chunk)


@pytest.mark.parametrize(
    ("name", "transition", "cache_dtype"),
    [
        ("longlive", "recache", "model"), ("longlive", "flush", "fp8"), ("memrope", "recache", "int8"),
        ("memrope", "flush", "model"), ("infinity_rope", "flush", "int8"),
    ],
)  # fmt: skip
@pytest.mark.sampled(3)
def test_transitions(name, transition, cache_dtype):
    """Undone where the chunk is interrupted, and made again."""
    check(stored(name, cache_dtype, transition), near_of(cache_dtype), lengths=(18,), stops=STOPS)


@pytest.mark.parametrize(
    ("scope", "name", "cache_dtype", "every_chunk"),
    [("head", "static1", "model", True), ("layer", "ema2", "int8", False), ("head", "adaptive2", "model", False)],
)
@pytest.mark.sampled(3)
def test_absorption(scope, name, cache_dtype, every_chunk):
    """Caches that shrink, and the monitor's history of what leaves them."""
    near = others.NEAR_CODES if cache_dtype == "int8" else dict(atol=5e-4, rtol=5e-4)
    lengths = (18,) if every_chunk else (15, 18)
    check(absorbed(scope, name, cache_dtype), near, lengths=lengths, every_chunk=every_chunk)


def without_settling(method, owner=StoredLayer):
    """StoredLayer's `method` without the wait in it."""

    def change(patch):
        whole, settle, inside = getattr(owner, method), Workspace.settle, []

        def changed(self, *numbers):
            inside.append(None)
            try:
                return whole(self, *numbers)
            finally:
                inside.pop()

        patch.setattr(owner, method, changed)
        patch.setattr(Workspace, "settle", lambda self: None if inside else settle(self))

    return change


def without(wait, first):
    """No `wait` of the first stream, or of the others."""

    def change(patch):
        whole = getattr(Stream, wait)

        def changed(self, other):
            if (self is self.gpu.streams[0]) is not first:
                whole(self, other)

        patch.setattr(Stream, wait, changed)

    return change


def solved():
    rollout = absorbed()(model(), None, None)
    list(rollout.chunks(15))
    return rollout.absorber.solution


def without_landing(patch):
    """Copies are taken on before anybody waited for them."""
    patch.setattr(host_copies._Stage, "settle", unwaited(host_copies._Stage.settle))


def unwaited(settle):
    def changed(stage):
        stage.landed = type("Over", (), {"synchronize": lambda event: None})()
        settle(stage)
        stage.landed = torch.cuda.Event()

    return changed


def on_device(name="self_forcing", **changed):
    """`make` of a rollout over a cache on the device."""
    return stored(name, cache_device="gpu", **changed)


class Grown(Rollout):
    """Has room for 9 frames at first. Its windows grow when more are asked for, right after a commit."""

    def chunks(self, length, given=None):
        if self.emitted < 9:
            yield from super().chunks(9, given)
        yield from super().chunks(length)


def grown():
    def make(model, state, stop):
        spec = spec_of("self_forcing", model, cache_device=HOST, window_frames=30, positions="packed")
        return Grown(model, spec, Settings(7, TWO_STEPS), state=state, on_step=stop, length=9)

    return make


EMA = dict(anchor=KEPT["ema"], window_frames=6, positions="packed")
MISSING = {
    "snapshot": (without_settling("snapshot"), lambda: stored("self_forcing", **EMA), dict(lengths=(9, 12))),
    "an undo": (
        without_settling("_anchor_buffers"),
        lambda: stored("longlive", transition="recache", anchor=KEPT["adaptive"], window_frames=6, positions="packed"),
        dict(lengths=(18,), stops=STOPS),
    ),
    "resized": (without_settling("give_up", Workspace), grown, dict(lengths=(15,))),
    "a pass begins": (without("wait_stream", first=False), lambda: stored("self_forcing", **EMA), dict(lengths=(24,))),
    "landed": (without("wait_event", first=True), lambda: stored("self_forcing", **EMA), dict(lengths=(24,))),
    "a copy lands": (without_landing, lambda: on_device(**EMA), dict(lengths=(9, 12))),
    "a frame lands": (without_landing, lambda: absorbed(solution=solved()), dict(lengths=(15,))),
    "used": (without("wait_event", first=False), lambda: stored("self_forcing", **EMA), dict(lengths=(24,))),
}  # fmt: skip


@pytest.mark.parametrize("wait", MISSING)
@pytest.mark.sampled(3)
def test_a_wait_that_is_missing_gives_other_bits(wait):
    change, made, how = MISSING[wait]
    make, wrong = made(), []
    right = on("at once", make, **how)
    for when in ("late", "early"):
        with pytest.MonkeyPatch.context() as patch:
            change(patch)
            try:
                wrong.append(not same(on(when, make, **how), right))
            except NonFiniteError:
                wrong.append(True)
    assert any(wrong)


# the third kind of each
ON_DEVICE = [(name, KINDS[(i + 2) % len(KINDS)]) for i, name in enumerate(KEPT)]


@pytest.mark.parametrize(("name", "cache_dtype"), ON_DEVICE)
@pytest.mark.sampled(4)
def test_snapshots_of_a_cache_on_the_device(name, cache_dtype):
    """A rollout goes on from the one in the middle."""
    check(
        on_device(cache_dtype=cache_dtype, anchor=KEPT[name], window_frames=6, positions="packed"),
        near_of(cache_dtype), lengths=(9, 15),
    )  # fmt: skip


def test_a_deep_sink_on_the_device():
    check(on_device("deep_forcing"), others.NEAR, lengths=(24, 30))


@pytest.mark.parametrize(("block", "copies"), [(None, 3), (2000, None), (8, 0)])
@pytest.mark.parametrize("cache_dtype", KINDS)
@pytest.mark.sampled(3)
def test_a_snapshot_is_one_copy_a_layer(cache_dtype, block, copies, monkeypatch):
    """Whatever a block takes, the bits are those of frames that are copied one by one; a frame that fits into none is copied
    alone. What the run does afterwards does not change them."""
    if block is not None:
        monkeypatch.setattr(host_copies, "MOST_BLOCK", block)
    with LateDevice("late") as late:
        make = on_device(cache_dtype=cache_dtype, **EMA)
        rollout = make(model_on(late.device, model()), None, None)
        list(rollout.chunks(12))
        late.synchronize()
        before, locked = late.to_host, len(late.locked)
        state = rollout.snapshot()
        made = late.to_host - before
        assert copies is None or made == copies
        assert block != 2000 or made > 3
        assert len(late.locked) - locked <= 2
        expected = [one_by_one(layer) for layer in rollout.cache.layers]
        kept = tensors_of(state)
        list(rollout.chunks(18))
        late.synchronize()
    for layer, slow in zip(state.cache, expected, strict=True):
        assert layer.tensors.keys() == slow.keys()
        for name, tensor in layer.tensors.items():
            assert tensor.dtype == slow[name].dtype and tensor.is_contiguous()
            assert torch.equal(tensor.float(), slow[name].float()), name
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors_of(state), strict=True))


def one_by_one(layer):
    """What a snapshot holds of a layer with an anchor that blends, frame by frame."""
    rings, anchors = (*layer.pinned, *layer.window), tuple(layer.anchor)
    stacked = lambda frames: torch.stack([frame.cpu() for frame in frames], 1)  # noqa: E731
    if isinstance(layer, StoredLayer):
        store, order = layer.store, [layer.first_ring + ring for ring in rings]
        made = {name: stacked(store.codes[j, i] for j in order) for i, name in enumerate(("keys", "values"))}
        if store.scales is not None:
            made["scales"] = stacked(store.scales[j].transpose(0, 1) for j in order)
        blends = {f"blend_{name}": store.blend[:, i].unbind(0) for i, name in enumerate(("keys", "values"))}
    else:
        order = [layer.anchor_index(slot) for slot in anchors] + [layer.window_start + ring for ring in rings]
        made = {name: stacked(t[:, j] for j in order) for name, t in (("keys", layer.k), ("values", layer.v))}
        if layer.raw is not None:
            made["raw"] = stacked(layer.raw[:, ring] for ring in rings)
        blends = {"blend_keys": layer.blend_k.unbind(1), "blend_values": layer.blend_v.unbind(1)}
    return made | {name: stacked(frames) for name, frames in blends.items()}


@pytest.mark.parametrize("refused", ["page-locked memory", "room on the device"])
def test_a_snapshot_where_there_is_no_room(refused, monkeypatch):
    """The same bits, copied the slow way."""
    make = on_device(**EMA)
    right = on("at once", make, lengths=(9, 12))
    with LateDevice("late") as late:
        rollout = make(model_on(late.device, model()), None, None)
        list(rollout.chunks(9))
        if refused == "page-locked memory":
            empty = torch.empty

            def no_lock(*shape, pin_memory=False, **more):
                if pin_memory:
                    raise RuntimeError("CUDA error: out of memory")
                return empty(*shape, **more)

            monkeypatch.setattr(host_copies.torch, "empty", no_lock)
        else:
            monkeypatch.setattr(host_copies, "_room", lambda size, device: None)
        before = late.to_host
        found = tensors_of(rollout.snapshot())
        monkeypatch.undo()
        assert late.to_host == before
    assert all(torch.equal(a, b) for a, b in zip(found, right[1][0], strict=True))


def test_a_block_is_a_power_of_two_that_takes_a_layer(monkeypatch):
    plan = spec_of("self_forcing", model(), **EMA).plan()
    layer = {name: size for name, size in plan.layers[0].bytes(plan).items() if name != "current"}
    size = block_bytes(plan)
    assert sum(layer.values()) <= size < 4 * sum(layer.values()) and size.bit_count() == 1
    assert frame_block_bytes(plan) >= 2 * plan.frame_bytes
    monkeypatch.setattr(host_copies, "MOST_BLOCK", 1 << 10)
    assert block_bytes(plan) == 1 << 10
    host = spec_of("self_forcing", model(), cache_device=HOST, **EMA).plan()
    assert block_bytes(host) == host_copies.staging_bytes(host) == 0


def test_frames_that_left_are_copied_while_the_run_goes_on():
    """A history of 40 frames, most of them through both buffers, each in another place of memory."""
    from adastate_core.absorption.host_history import HostHistory

    with LateDevice("late") as late:
        history = HostHistory(40, HostCopies(late.device, 1 << 12))
        source, wanted = torch.zeros(2, 4, 8, device=late.device), []
        for frame in range(50):
            source.copy_(torch.full((2, 4, 8), float(frame)))
            remember = history.push(frame, None, source, source * 2)
            source.fill_(-1)
            if frame != 7:  # its commit was given up
                remember()
                wanted.append(frame)
        kept = list(history.mark())
    assert [one.frame for one in kept] == wanted[-40:]
    assert all((one.key == one.frame).all() and (one.value == 2 * one.frame).all() for one in kept)
