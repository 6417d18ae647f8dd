"""Numbers in a timeline: how they are written, which chunk has which, and a timeline that is changed on the way.

semantics: Seed and strength over time
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from slow_changes import Adaptive
from slow_systems import RollingForcing, SelfForcing
from systems_fast import latents_of, rollout_of
from test_systems import assert_frames_equal, in_pieces
from tiny_model import TinyModel

from adastate_core.anchors import AnchorAdaptive
from adastate_core.files.header_check import Damage, Fields
from adastate_core.prompts.plan import NumberChange, PromptChange, PromptPlan
from adastate_core.prompts.shot_words import Words, words_over
from adastate_core.prompts.steered import changed, holds_from, seconds_of, written
from adastate_core.prompts.values import (
    GRAMMARS,
    TRANSITIONS,
    PromptAt,
    Prompts,
    TimedText,
    TimelineError,
    format_timeline,
    listing,
    parse_timeline,
)
from adastate_core.states.state_file import load_state, save_state
from adastate_core.states.steered_check import check_steered

READ = (
    TimedText(0.0, "a", seed=3),
    TimedText(2.0, "", seed=2**64 - 1, strength=0.5),
    TimedText(5.0, "b\nc", "rope cut", strength=0.25, seed=0),
)


@pytest.mark.parametrize(
    "text",
    [
        "0s {seed 3} a\n2s {strength 0.5, seed 18446744073709551615}\n5s {Rope-Cut, SEED 0, strength .25}: b\nc",
        "[0s {seed 3}: a] [2s {seed 18446744073709551615 ,strength 0.50}:] [0:05 {strength 0.25, rope cut, seed  0}: b\nc]",
        "a [2s {seed 3}] | [3s {seed 18446744073709551615, strength 0.5}] | b\nc [{seed 0, rope cut, strength 0.25}]",
    ],
)
def test_numbers_stand_in_the_braces_of_every_form(text):
    assert parse_timeline(text) == READ
    shared = parse_timeline(text, shared="film {} film")
    assert [entry.text for entry in shared] == ["film a film", "", "film b\nc film"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("seed -1", "the seed is '-1'; a seed is a whole number between 0 and 18446744073709551615"),
        ("seed 18446744073709551616", "the seed is"),
        ("seed \u0661", "the seed is"),
        ("strength 0", "the strength is '0'; a strength is a number above 0 and at most 1"),
        ("strength 1.01", "the strength is"),
        ("strength 1e-3", "the strength is"),
        ("seed 1, seed 2", "found a second seed"),
        ("cut, soft", "found a second transition"),
        ("cut,", "there is no transition ''"),
        ("seed7", "there is no transition 'seed7'; known are {cut}"),
    ],
)
def test_what_is_no_number_is_refused_where_it_stands(options, message):
    with pytest.raises(TimelineError, match="line 2, column 4: ") as told:
        parse_timeline(f"0s a\n5s {{{options}}} b")
    assert message in str(told.value)


def test_words_may_be_left_out_only_where_a_number_is_set():
    for text in ("0s a\n5s {cut}", "0s a\n5s {cut, seed 7}", "0s a\n5s"):
        with pytest.raises(TimelineError, match="line 2, column 1: the prompt here is empty"):
            parse_timeline(text)
    with pytest.raises(TimelineError, match="the first prompt has no words"):
        parse_timeline("0s {seed 7}\n5s a")
    prompts = Prompts(
        (PromptAt(0.0, "x", text="a", seed=3), PromptAt(2.0, None, strength=0.5), PromptAt(5.0, "y", text="b"))
    )
    assert listing(prompts) == "0:00 {seed 3} a\n0:02 {strength 0.5}\n0:05 {recache} b"
    assert [entry.text for entry in prompts.worded] == ["a", "b"]


def test_a_shot_may_stand_without_words_in_every_form():
    read = (
        TimedText(0.0, "a"),
        TimedText(2.0, "", "shot"),
        TimedText(5.0, "", "shot", seed=7, strength=0.5),
        TimedText(9.0, "b"),
    )
    for text in (
        "0s a\n2s {shot}\n5s {Shot, seed 7, strength .5}\n9s b",
        "a [2s {shot}:] [5s {seed 7, shot, strength 0.5}:] [9s: b]",
        "a [2s] | [3s {shot}] | [4s {shot, seed 7, strength 0.5}] | b",
    ):
        assert parse_timeline(text) == read
    for grammar in GRAMMARS:
        assert parse_timeline(format_timeline(read, grammar)) == read
    with pytest.raises(TimelineError, match="the first prompt has no words"):
        parse_timeline("0s {shot}\n5s a")


@pytest.mark.parametrize(
    ("text", "shared", "transition", "words"),
    [
        ("a [5s] | b [{shot}]", "", "recache", [("a", ""), ("b", "The scene transitions. b")]),
        ("a [5s {shot}] | b [2s] | [1s {seed 7}] | [{shot}]", "film {}!", "shot",
         [("film a!", ""), ("film b!", "The scene transitions. film b!"), ("", ""), ("film b!", "The scene transitions. film b!")]),
        ("a [5s] | The scene transitions. b [{shot}]", "film:", "cut",
         [("film: a", ""), ("film: b", "The scene transitions. film: b")]),
        ("a [5s] | The scene transitions. b [{cut}]", "", "shot", [("a", ""), ("The scene transitions. b", "")]),
        ("a [5s] | The scene transitions. [{shot}]", "", "cut", [("a", ""), ("The scene transitions.", "")]),
        ("The scene transitions. a [5s] | [{shot}]", "", "cut",
         [("The scene transitions. a", ""), ("The scene transitions. a", "The scene transitions. a")]),
        ("a [5s] | The scene transitions.slowly [{shot}]", "", "cut",
         [("a", ""), ("The scene transitions.slowly", "The scene transitions. The scene transitions.slowly")]),
    ],
)  # fmt: skip
def test_a_shots_first_chunk_says_that_the_scene_changes(text, shared, transition, words):
    """Once, in front of all; the words that hold afterwards do without."""
    assert words_over(parse_timeline(text), shared, transition) == [Words(*each) for each in words]


def any_entries(chance: random.Random, spread: int = 1) -> list[TimedText]:
    """Entries as somebody may write them, at frames of 4 pictures at 16 fps, the first with words."""
    frames, made = [0, *sorted(chance.sample(range(1, 40 * spread), chance.randrange(6)))], []
    for number, frame in enumerate(frames):
        seed = chance.choice([None, chance.randrange(2**64), chance.randrange(9)])
        strength = chance.choice([None, chance.random() or 1.0, 1.0, 0.01])
        words = number == 0 or (seed, strength) == (None, None) or chance.random() < 0.6
        text = chance.choice(["a", "b {c}", "d, e\nf", "(g:1.2)"]) if words else ""
        change = chance.choice([None, *TRANSITIONS] if words else [None, None, "shot"])
        made.append(TimedText(frame / 4, text, change, seed=seed, strength=strength))
    return made


def test_what_is_written_is_read_as_it_was():
    chance, count = random.Random(5), 0
    for _ in range(300):
        entries = any_entries(chance)
        for grammar in GRAMMARS:
            try:
                text = format_timeline(entries, grammar)
            except ValueError:  # words in braces behind a time without any
                assert any("{" in entry.text for entry in entries)
            else:
                assert parse_timeline(text) == tuple(entries)
                count += 1
    assert count > 600


def held(entries, frame, F):
    """(words, where they began, seed, strength) of the chunk from latent frame `frame` on, one entry after another."""
    words, begun, seed, strength = "", 0, None, None
    for entry in entries:
        if entry.seconds * 4 < frame + F / 2:
            seed = seed if entry.seed is None else entry.seed
            strength = strength if entry.strength is None else entry.strength
            if entry.text or entry.transition == "shot":
                words, begun = (entry.text or words[0], entry.transition), entry.seconds
    return words, begun, seed, strength


@pytest.mark.parametrize("F", [1, 3, 4])
def test_a_change_holds_from_its_chunk_on_until_an_entry_says_otherwise(F):
    """Every chunk before has what it had; those from there on what was asked, or what a later entry sets."""
    chance = random.Random(F)
    for _ in range(300):
        before, chunk = any_entries(chance), chance.randrange(1, 12)
        frame = chunk * F
        seed, strength = chance.choice([(7, None), (None, 0.5), (9, 0.75), (None, None)])
        asked = "asked" if (seed, strength) == (None, None) else chance.choice(["", "asked"])
        new = TimedText(frame / 4, asked, "soft" if asked else None, seed=seed, strength=strength)
        after = changed(before, new, lambda e, frame=frame: holds_from(round(e.seconds * 4), frame, F))
        assert parse_timeline(written(after)) == after
        for first in range(0, 45, F):
            was, now = held(before, first, F), held(after, first, F)
            if first < frame:
                assert now == was
                continue
            later = [e for e in before if frame + F / 2 <= e.seconds * 4 < first + F / 2]
            words = ("asked", "soft")
            for entry in later:
                if entry.text or entry.transition == "shot":
                    words = (entry.text or words[0], entry.transition)
            assert now[0] == (words if asked else was[0])
            for own, value, then, name in ((2, seed, was[2], "seed"), (3, strength, was[3], "strength")):
                set_later = [getattr(e, name) for e in later if getattr(e, name) is not None]
                assert now[own] == (set_later[-1] if set_later else then if value is None else value)


@pytest.mark.parametrize("fps", [1.0, 7.0, 12.5, 15.0, 16.0, 23.976, 24000 / 1001, 59.94, 240.0])
def test_a_frame_is_found_again_by_its_second(fps):
    for frame in [*range(400), 9_999, 80_001]:
        seconds = seconds_of(frame, fps, 4)
        text = f"0s a\n{seconds_text(seconds)} {{seed 1}}" if frame else "0s a"
        assert round(parse_timeline(text)[-1].seconds * fps / 4) == frame


def seconds_text(seconds: float) -> str:
    return format_timeline([TimedText(0.0, "x"), TimedText(seconds, "y")], "lines").split("\n")[1].split()[0]


ROWS = [(0, 11, 0.6), (5, None, 0.3), (6, 2**64 - 1, None), (11, 7, 1.0), (15, 5, 0.25)]


class Numbered:
    """A slow loop whose seed and strength are looked up by the middle of each chunk."""

    def numbers(self, first):
        for frame, seed, strength in ROWS:
            if frame < first + self.frames / 2:
                self.seed = self.seed if seed is None else seed
                self.strength = getattr(self, "strength", 1.0) if strength is None else strength

    def noise(self, chunk, step):
        self.numbers(chunk * self.frames)
        return super().noise(chunk, step)


class NumberedAdaptive(Numbered, Adaptive):
    def moved(self, old, to):
        self.numbers(self.start)
        return super().moved(old, to)


class NumberedForcing(Numbered, SelfForcing):
    pass


class NumberedRolling(Numbered, RollingForcing):
    pass


def plan(F, rows=ROWS):
    words = PromptChange(0, torch.zeros(1, 1, TinyModel().text[0].in_features))
    return PromptPlan([words], F, [NumberChange(*row) for row in rows])


def own(begin):
    """An adaptive rollout; where the anchor begins with strength 1 nothing of its slots is kept in float32."""
    numbers = dict(anchor=AnchorAdaptive(2, strength=begin), window_frames=6, restart_frames=0, overlap_frames=0)
    return "causvid", numbers, NumberedAdaptive, dict(S=2, W=6)


@pytest.mark.parametrize(
    ("name", "numbers", "loop", "theirs"),
    [
        own(1.0),
        own(0.8),
        ("self_forcing", {}, NumberedForcing, {}),
        ("rolling_forcing", dict(window_frames=3, shares_window=False), NumberedRolling, {}),
    ],
    ids=["adaptive", "adaptive, blended", "self forcing", "rolling"],
)
def test_each_chunk_has_the_seed_and_strength_of_its_middle(name, numbers, loop, theirs, tmp_path):
    length = 24
    context = torch.zeros(1, 1, TinyModel().text[0].in_features)
    whole = latents_of(rollout_of(name, TinyModel(), prompts=plan(3), **numbers), length)
    slow = loop(TinyModel(), prompts=lambda own: own.model.set_context(context), **theirs)
    assert_frames_equal(whole, slow.roll(length // 3 + 4)[:, :, :length])  # in the open ending more are under way

    def make(state):
        return rollout_of(name, TinyModel(), state=state, prompts=plan(3), **numbers)

    assert torch.equal(in_pieces(make, [3, 7, 9, 15, 18, length], tmp_path), whole)


@pytest.mark.parametrize(
    "storage",
    [dict(cache_device="host memory"), dict(cache_dtype="int8"), dict(cache_dtype="int8", cache_device="host memory")],
)
def test_a_stored_anchor_moves_as_one_on_the_device_does(storage, tmp_path):
    """Of a strength that begins with 1: as on the device to rounding, 8 bits to theirs, and from a file to the bit."""
    name, numbers, _, _ = own(1.0)
    plain = latents_of(rollout_of(name, TinyModel(), prompts=plan(3), **numbers), 18)

    def make(state):
        return rollout_of(name, TinyModel(), state=state, prompts=plan(3), **numbers, **storage)

    stored = latents_of(make(None), 18)
    torch.testing.assert_close(stored, plain, atol=0.15 if "cache_dtype" in storage else 1e-4, rtol=0)
    still = latents_of(
        rollout_of(name, TinyModel(), prompts=plan(3, [row[:2] for row in ROWS]), **numbers, **storage), 18
    )
    assert not torch.allclose(stored, still, atol=1e-3)
    assert torch.equal(in_pieces(make, [3, 7, 12, 18], tmp_path), stored)


def test_noise_that_was_drawn_ahead_is_drawn_again():
    """A seed that comes between two chunks is that of the plan that says so from the beginning."""
    told = latents_of(rollout_of("self_forcing", TinyModel(), prompts=plan(3, [(6, 99, None)])), 12)
    rollout, parts = rollout_of("self_forcing", TinyModel(), prompts=plan(3, [])), []
    for chunk in rollout.chunks(12):
        parts.append(chunk.latents)
        if rollout.next_frame == 6:
            rollout.steer(plan(3, [(6, 99, None)]))
    assert torch.equal(torch.cat(parts, 2), told)


STEERED = {
    "timeline": "0s a\n5s {soft, seed 3} b",
    "changes": [
        {"at": 5.0, "frame": 20, "prompt": "b", "transition": "soft", "seed": 2**64 - 1},
        {"at": 6.0, "frame": 24, "strength": 0.5},
    ],
}


def test_a_state_remembers_how_it_was_steered(tmp_path):
    rollout = rollout_of("self_forcing", TinyModel())
    latents_of(rollout, 6)
    assert rollout.snapshot().steered == {}
    rollout.steered = STEERED
    state = load_state(save_state(rollout.snapshot(), tmp_path / "state.safetensors"))
    assert state.steered == STEERED
    assert rollout_of("self_forcing", TinyModel(), state=state).snapshot().steered == STEERED
    torn = replace(state, steered={"timeline": "a", "changes": [{"at": 1, "frame": 4, "seed": 2**64}]})
    with pytest.raises(
        ValueError, match="steered.changes.0..seed is 18446744073709551616, not a whole number of at most"
    ):
        load_state(save_state(torn, tmp_path / "torn.state.safetensors"))


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"timeline": 3, "changes": []},
        {"timeline": "a" * 200_001, "changes": []},
        {"timeline": None, "changes": {}},
        {"timeline": None, "changes": [{}] * 1001},
        {"timeline": None, "changes": [[1]]},
        {"timeline": None, "changes": [{"frame": 4}]},
        {"timeline": None, "changes": [{"at": -1, "frame": 4}]},
        {"timeline": None, "changes": [{"at": 1, "frame": 4, "transition": "zoom"}]},
        {"timeline": None, "changes": [{"at": 1, "frame": 4, "strength": 1.5}]},
        {"timeline": None, "changes": [{"at": 1, "frame": 4, "mood": 1}]},
        {"timeline": None, "changes": [], "more": 1},
    ],
)
def test_what_is_no_memory_of_steering_is_refused(damaged):
    with pytest.raises(Damage, match="steered"):
        check_steered(Fields(damaged, "steered"))
    check_steered(Fields(STEERED, "steered"))
