"""Deep Forcing's anchor against a slow twin that holds lists of tokens, each with its own place."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from slow_rollout import gaussian
from test_rollout import SCHEDULE, W_PIXELS, H, roll, spec_for
from tiny_model import TinyModel

from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.anchors import Anchor, AnchorDeep, AnchorStatic, anchor_from
from adastate_core.measure.attention_share import measure_share
from adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_core.rollout import Rollout, Settings
from adastate_core.states.state_file import load_state, save_state
from adastate_core.weights.presets import preset, recognised

HEADS, COLUMNS = 2, W_PIXELS // 2
P = H // 2 * COLUMNS


@dataclass
class Token:
    """One cached token of one layer and batch item: raw key and value [width]."""

    frame: int
    number: int
    key: torch.Tensor
    value: torch.Tensor
    chosen: bool = False


def turned(x: torch.Tensor, times: list[float], numbers: list[int]) -> torch.Tensor:
    """x [N, width] of tokens at `times` in the places `numbers` of their frames, pair by pair, in float64."""
    heads = x.double().unflatten(-1, (HEADS, -1)).clone()
    d = heads.shape[-1]
    side = 2 * (d // 6)
    start = 0
    rows, columns = [n // COLUMNS for n in numbers], [n % COLUMNS for n in numbers]
    for width, at in ((d - 2 * side, times), (side, rows), (side, columns)):
        for j in range(width // 2):
            angle = torch.tensor(at).double()[:, None] * 10000.0 ** (-2 * j / width)
            a, b = heads[..., start + 2 * j].clone(), heads[..., start + 2 * j + 1].clone()
            heads[..., start + 2 * j] = a * angle.cos() - b * angle.sin()
            heads[..., start + 2 * j + 1] = a * angle.sin() + b * angle.cos()
        start += width
    return heads.flatten(1)


def turned_keys(tokens: list[Token], times: list[float]) -> torch.Tensor:
    return turned(torch.stack([t.key for t in tokens]), times, [t.number for t in tokens])


class SlowDeep:
    """Sink, chosen tokens and frames of every layer and item as lists of tokens, oldest first."""

    def __init__(self, layers: int, batch: int, anchor: AnchorDeep, F: int, W: int) -> None:
        self.anchor, self.F, self.W = anchor, F, W
        self.sink = {(i, b): [] for i in range(layers) for b in range(batch)}
        self.home = {place: [] for place in self.sink}
        self.queries = {place: [] for place in self.sink}  # raw [P, width] of clean passes, a frame each
        self.seen: dict[int, tuple[torch.Tensor, ...]] = {}
        self.first = self.jump = self.choices = 0
        self.clean = False

    def start(self, first_frame: int, jump: int = 0) -> None:
        self.first, self.jump, self.fresh = first_frame, jump, set(self.sink)

    def places(self, tokens: list[Token], sink: int, content: float) -> list[float]:
        """Times of what lies beside the sink: frame after frame in a row, chosen tokens first."""
        row = [sink + i // P for i in range(len(tokens))]
        if self.anchor.shift_selected:
            return row
        return [content - (self.first - t.frame) if t.chosen else at for t, at in zip(tokens, row, strict=True)]

    def choose(self, place, queries: torch.Tensor) -> None:
        home, sink = self.home[place], len(self.sink[place]) // P
        recent = (self.anchor.recent_frames - self.F) * P
        content = sink + len(home) // P + self.jump
        at = self.places(home, sink, content)
        asking = list(zip(queries.split(P), range(content, content + len(queries) // P), strict=True))
        if recent:
            past = self.queries[place][-recent // P :]
            asking += list(zip(past, range(sink + (len(home) - recent) // P, sink + len(home) // P), strict=True))
        asking = torch.cat([turned(q, [time] * P, list(range(P))) for q, time in asking])
        candidates = range(len(home) - recent)
        asked = turned_keys(home[: len(candidates)], at[: len(candidates)])
        scores = (asking @ asked.T).sum(0).tolist()
        wanted = (self.anchor.budget_frames - self.anchor.sink_frames - self.anchor.recent_frames) * P
        best = sorted(sorted(candidates, key=lambda i: (-scores[i], i))[:wanted])
        self.home[place] = [replace(home[i], chosen=True) for i in best] + home[len(home) - recent :]
        self.choices += 1

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.seen[layer] = (q, k, v)
        outs = []
        for b in range(len(q)):
            place = (layer, b)
            if place in self.fresh and len(self.home[place]) > self.W * P:
                self.choose(place, q[b])
            self.fresh.discard(place)
            past, sink = self.sink[place] + self.home[place], len(self.sink[place]) // P
            content = len(past) // P + self.jump
            at = [i // P for i in range(sink * P)] + self.places(self.home[place], sink, content)
            own = range(len(q[b]))
            now = ([content + i // P for i in own], [i % P for i in own])
            queries, keys = turned(q[b], *now), turned(k[b], *now)
            values = v[b].double()
            if past:
                keys = torch.cat([turned_keys(past, at), keys])
                values = torch.cat([torch.stack([t.value for t in past]).double(), values])
            parts = zip(*(t.unflatten(-1, (HEADS, -1)).unbind(1) for t in (queries, keys, values)), strict=True)
            outs.append(torch.cat([(x @ y.T / math.sqrt(y.shape[1])).softmax(-1) @ z for x, y, z in parts], -1).float())
        return torch.stack(outs)

    def keep(self, frames: int, to_sink: bool = True) -> None:
        for place in self.sink:
            q, k, v = (t[place[1]] for t in self.seen[place[0]])
            for i in range(frames):
                frame = self.first + i
                tokens = [Token(frame, n, k[i * P + n].clone(), v[i * P + n].clone()) for n in range(P)]
                (self.sink if to_sink and frame < self.anchor.sink_frames else self.home)[place].extend(tokens)
                self.queries[place].append(q[i * P : (i + 1) * P].clone())


def slow_deep(model, anchor, *, F, W, length, batch=1, seed=7, given=None, flush=None, cut=None, recache=None):
    """Latents [B, C, >= length, h, w], and how often each layer and item has chosen. `flush`, `cut` and `recache` are the
    first frames of chunks before which a prompt's transition happens."""
    deep = SlowDeep(model.geometry.layers, batch, anchor, F, W)
    out = [] if given is None else list(given.split(F, 2))
    f = 0
    for part in out:
        deep.start(f)
        model.velocity(part, 0.0, deep)
        deep.keep(part.shape[2])
        f += part.shape[2]
    k = 0
    while f < length:
        if f == flush:
            deep.home = {
                place: [t for t in home if t.frame >= f - 2 and not t.chosen] for place, home in deep.home.items()
            }
        if f == recache:
            deep.home = {place: [] for place in deep.home}
            latents = torch.cat(out, 2)
            first = max(anchor.sink_frames, f - (anchor.sink_frames + W + F))
            for part in latents[:, :, first:].split(F, 2):
                deep.start(first)
                model.velocity(part, 0.0, deep)
                deep.keep(part.shape[2], to_sink=False)
                first += part.shape[2]
        jump = 0
        if f == cut:
            home = len(deep.home[0, 0]) // P
            home = home if home <= W else anchor.budget_frames - anchor.sink_frames - F
            jump = max(45 - anchor.sink_frames - home, 45 - F)
        deep.start(f, jump)
        shape = (batch, model.geometry.channels, F, H, W_PIXELS)
        x = gaussian(seed, k, 0, shape)
        for j, sigma in enumerate(SCHEDULE.sigmas):
            x0 = x - sigma * model.velocity(x, 1000 * sigma, deep)
            if j + 1 < len(SCHEDULE.sigmas):
                later = SCHEDULE.sigmas[j + 1]
                x = (1 - later) * x0 + later * gaussian(seed, k, j + 1, shape)
        model.velocity(x0, 0.0, deep)
        deep.keep(F)
        out.append(x0)
        f, k = f + F, k + 1
    return torch.cat(out, 2), deep.choices / len(deep.sink)


CASES = {
    "chunks": (AnchorDeep(3, 4, 8), 3, 5, 2),
    "wider": (AnchorDeep(2, 3, 7), 3, 4, 1),
    "own times": (AnchorDeep(3, 4, 8, shift_selected=False, most_choices=0), 3, 3, 2),
    "the authors' code": (AnchorDeep(3, 4, 8, shift_selected=False, most_choices=2), 3, 3, 2),
    "sink within a chunk": (AnchorDeep(4, 2, 8), 2, 5, 1),
    "frame by frame": (AnchorDeep(2, 3, 6), 1, 3, 2),
    "nothing chosen": (AnchorDeep(2, 4, 6), 3, 2, 1),
    "no recent past": (AnchorDeep(3, 3, 8), 3, 3, 1),
}


def deep_spec(anchor, F, W, batch=1, **more):
    return spec_for(TinyModel(), batch=batch, F=F, W=W, anchor=anchor, **more)


# held to a loop of its own in test_published.py
TWINS = {name: case for name, case in CASES.items() if name != "the authors' code"}


@pytest.mark.parametrize(("anchor", "F", "W", "batch"), TWINS.values(), ids=TWINS)
def test_equals_the_slow_rollout(anchor, F, W, batch):
    length = 9 * F + 1
    fast, _, _ = roll(TinyModel(), deep_spec(anchor, F, W, batch), length)
    slow, choices = slow_deep(TinyModel(), anchor, F=F, W=W, batch=batch, length=length)
    assert choices >= 3
    torch.testing.assert_close(fast, slow[:, :, :length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frames", [1, 8, 11])
def test_given_frames_choose_too(frames):
    """The last pass over given frames is shorter than a chunk; after 9 of 11 it is due to choose."""
    anchor, given = (
        AnchorDeep(2, 4, 8),
        torch.randn(1, 4, frames, H, W_PIXELS, generator=torch.Generator().manual_seed(3)),
    )
    fast, _, _ = roll(TinyModel(), deep_spec(anchor, 3, 4), frames + 9, given=given)
    slow, choices = slow_deep(TinyModel(), anchor, F=3, W=4, length=frames + 9, given=given)
    assert choices >= 1
    torch.testing.assert_close(fast, slow[:, :, : frames + 9], atol=1e-4, rtol=1e-4)


class WithText(TinyModel):
    def set_context(self, context: torch.Tensor) -> None:
        """The text changes nothing: what is seen is what its change does to the cache."""


def prompted(transition: str, frame: int, length: int, state=None):
    changes = [PromptChange(0, torch.zeros(1, 1, 1)), PromptChange(frame, torch.ones(1, 1, 1), transition)]
    spec, model = deep_spec(AnchorDeep(3, 4, 8), 3, 5), WithText()
    rollout = Rollout(model, spec, Settings(7, SCHEDULE), state=state, prompts=PromptPlan(changes, 3))
    return torch.cat([chunk.latents for chunk in rollout.chunks(length)], 2), rollout


@pytest.mark.parametrize("frame", [12, 15])
@pytest.mark.parametrize(("transition", "name"), [("flush", "flush"), ("rope cut", "cut"), ("recache", "recache")])
def test_a_prompt_that_changes(transition, name, frame):
    """Frame 15 begins a chunk that is due to choose, frame 12 one that is not."""
    fast, _ = prompted(transition, frame, 24)
    slow, _ = slow_deep(TinyModel(), AnchorDeep(3, 4, 8), F=3, W=5, length=24, **{name: frame})
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    first, rollout = prompted(transition, frame, frame)
    rest, _ = prompted(transition, frame, 24, state=rollout.snapshot())
    assert torch.equal(torch.cat([first, rest], 2), fast)


GOING_ON = [
    (case, torch.float32) for case in ("chunks", "own times", "the authors' code", "frame by frame", "no recent past")
]


@pytest.mark.parametrize(("case", "dtype"), [*GOING_ON, ("chunks", torch.bfloat16)])
def test_going_on_after_any_chunk_gives_the_same_bits(case, dtype, tmp_path):
    anchor, F, W, batch = CASES[case]
    model, spec = TinyModel(), deep_spec(anchor, F, W, batch, dtype=dtype)
    length = 10 * F
    rollout, states, chunks = Rollout(model, spec, Settings(7, SCHEDULE)), [], []
    for chunk in rollout.chunks(length):
        chunks.append(chunk.latents)
        states.append(save_state(rollout.snapshot(), tmp_path / f"{len(states)}.safetensors"))
    whole = torch.cat(chunks, 2)
    for i, path in enumerate(states[:-1]):
        end = min(length, (i + 4) * F)
        rest, _, _ = roll(model, spec, end, state=load_state(path))
        assert torch.equal(rest, whole[:, :, (i + 1) * F : end]), i


@pytest.mark.parametrize("stop_at", [(4, 1), (5, 1), (5, 2)])
def test_an_interrupt_undoes_a_choice(stop_at):
    """Chunk 5 chooses: its first pass has, the snapshot has not; another seed then chooses by its own queries."""
    model, spec = TinyModel(), deep_spec(AnchorDeep(3, 4, 8), 3, 5)

    class Stop(Exception):
        pass

    def stop(chunk, step, steps, x0):
        if (chunk, step) == stop_at:
            raise Stop

    stopped = Rollout(model, spec, Settings(7, SCHEDULE), on_step=stop)
    with pytest.raises(Stop):
        list(stopped.chunks(30))
    _, calm, _ = roll(model, spec, stop_at[0] * 3)
    expected, _, _ = roll(model, spec, 30, seed=8, state=calm.snapshot())
    found, _, _ = roll(model, spec, 30, seed=8, state=stopped.snapshot())
    assert torch.equal(found, expected)
    stopped.on_step = None
    again = torch.cat([chunk.latents for chunk in stopped.chunks(30)], 2)
    whole, _, _ = roll(model, spec, 30)
    assert torch.equal(again, whole[:, :, stop_at[0] * 3 :])


@pytest.mark.parametrize(("anchor", "F", "W", "batch"), CASES.values(), ids=CASES.keys())
def test_bytes_are_what_the_plan_said(anchor, F, W, batch):
    spec = deep_spec(anchor, F, W, batch, dtype=torch.bfloat16)
    planned = spec.plan()
    rollout = Rollout(TinyModel(), spec, Settings(0, SCHEDULE))
    pointers = [layer.k.data_ptr() for layer in rollout.cache]
    sizes = [rollout.cache.nbytes for _ in rollout.chunks(9 * F)]
    assert set(sizes) == {planned.kv_bytes}
    assert pointers == [layer.k.data_ptr() for layer in rollout.cache]
    sizes = rollout.cache.bytes()
    assert {name: planned.bytes()[name] for name in sizes} == sizes
    layer = rollout.cache.layers[0]
    held = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in held) * 2 == planned.kv_bytes


def test_what_a_pass_reads():
    """The paper's numbers: 21 frames at most, cut to 16 by the first chunk that would read more, then every second one."""
    spec = deep_spec(AnchorDeep(), 3, 8)
    rollout = Rollout(TinyModel(), spec, Settings(7, SCHEDULE))
    read: list[int] = []
    rollout.attention.observe = lambda layer, q, keys, clean: read.append(keys.shape[1] // P)
    for _ in rollout.chunks(36):
        pass
    passes = 2 * (len(SCHEDULE.sigmas) + 1)
    assert read[::passes] == [3, 6, 9, 12, 15, 18, 21, 16, 19, 16, 19, 16]
    assert all(len(set(read[i : i + passes])) == 1 for i in range(0, len(read), passes))


def test_equal_scores_keep_the_oldest():
    """Queries of zero make every score the same."""

    class Blank(TinyModel):
        def __init__(self):
            super().__init__()
            for block in self.blocks:
                block.q.weight.zero_()
                block.q.bias.zero_()

    _, rollout, _ = roll(Blank(), deep_spec(AnchorDeep(3, 4, 8), 3, 3), 15)
    for layer in rollout.cache:
        assert layer.ids.flatten().tolist() == list(range(3 * P, 4 * P))


@pytest.mark.parametrize("chunks", [3, 4, 5])
def test_shares_name_chosen_tokens(chunks):
    rollout = Rollout(TinyModel(), deep_spec(AnchorDeep(3, 4, 8), 3, 3), Settings(7, SCHEDULE))
    share = measure_share(rollout, chunks)
    assert ("anchor 3" in share.labels) == (chunks > 3)
    assert len(share.labels) == len(set(share.labels)) and abs(sum(share.mean) - 1) < 1e-6


REFUSALS = [
    ({"positions": "fixed"}, "positions is 'fixed', but the deep anchor"),
    ({"positions": "absolute"}, "positions is 'absolute' with the deep anchor"),
    ({"cache_dtype": "int8"}, "cache_dtype is 'int8'"),
    ({"cache_device": "host memory"}, "cache_device 'host memory'"),
    ({"absorption": AbsorptionSettings()}, "does not go with absorption"),
    ({"blocks": 2}, "does not go with chunks denoised together"),
    ({"F": 5, "W": 9}, "recent_frames is 4 and counts the chunk of 5"),
    ({"W": 1}, "window_frames is 1, but the deep anchor's budget of 8 latent frames needs at least 2"),
]


@pytest.mark.parametrize(("numbers", "message"), REFUSALS, ids=[m for _, m in REFUSALS])
def test_refusals(numbers, message):
    with pytest.raises(ValueError, match=message):
        spec_for(TinyModel(), **({"anchor": AnchorDeep(3, 4, 8)} | numbers))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0,), "sink_frames is 0"),
        ((10, 0), "recent_frames is 0"),
        ((10, 4, 13), "at least 14"),
        ((10, 4, 16, False, -1), "most_choices is -1"),
    ],
)
def test_numbers_of_the_anchor(numbers, message):
    with pytest.raises(ValueError, match=message):
        AnchorDeep(*numbers)


def test_a_damaged_state_is_refused():
    model, spec = TinyModel(), deep_spec(AnchorDeep(3, 4, 8), 3, 3)
    _, rollout, _ = roll(model, spec, 15)
    state = rollout.snapshot()
    layer = state.cache[0]
    damaged = [
        replace(layer, ring_slots=tuple(i + 1 for i in layer.ring_slots)),
        replace(layer, frames=layer.frames[:-1]),
        replace(layer, anchor_slots=layer.anchor_slots[::-1]),
        replace(layer, tensors=layer.tensors | {"ids": layer.tensors["ids"].float()}),
        replace(layer, tensors=layer.tensors | {"queries": layer.tensors["queries"][:, :0]}),
        replace(layer, tensors={name: t for name, t in layer.tensors.items() if name != "raw"}),
    ]
    for bad in damaged:
        with pytest.raises(ValueError, match="damaged"):
            roll(model, spec, 18, state=replace(state, cache=(bad, *state.cache[1:])))
    with pytest.raises(ValueError, match="anchor is"):
        roll(model, deep_spec(AnchorDeep(3, 4, 8, False), 3, 3), 18, state=state)


def test_a_state_without_shift_of_before_goes_on_by_its_own_rule_or_is_refused():
    """Earlier versions described it without `most_choices`, chose without limit and left the sink where it was."""
    model, before, now = TinyModel(), AnchorDeep(3, 4, 8, False, most_choices=0), AnchorDeep(3, 4, 8, False)
    described = {name: value for name, value in before.describe().items() if name != "most_choices"}
    assert anchor_from(described) == before and anchor_from(now.describe()) == now
    _, rollout, _ = roll(model, deep_spec(before, 3, 3), 15)
    whole, _, _ = roll(model, deep_spec(before, 3, 3), 21)
    state = rollout.snapshot()
    state = replace(state, spec=state.spec | {"anchor": described})
    rest, _, _ = roll(model, deep_spec(anchor_from(described), 3, 3), 21, state=state)
    assert torch.equal(rest, whole[:, :, 15:])
    with pytest.raises(
        ValueError, match="an earlier version of the pack saved the state, which without shift_selected"
    ):
        roll(model, deep_spec(now, 3, 3), 18, state=state)


def test_the_preset():
    found = preset("deep_forcing")
    assert (
        found.anchor == AnchorDeep(10, 4, 16) and found.anchor.frames + found.window_frames + found.chunk_frames == 21
    )
    assert anchor_from(found.anchor.describe()) == found.anchor
    for name in ("models/Deep-Forcing_1.3B.safetensors", "wan_deepforcing.pt", "self_forcing_deep_sink.pt"):
        assert recognised(name) == "deep_forcing"
    assert recognised("self_forcing_dmd.pt") == "self_forcing"
    for anchor in (Anchor(), AnchorStatic(3)):
        assert "selection" not in deep_spec(anchor, 3, 3).plan().bytes()
