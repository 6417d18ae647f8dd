"""The nodes for prompts over time: encoding, chains, refusals before a run, and the host's own validation and execution."""

from __future__ import annotations

import math

import pytest
import torch
from adastate_pack.adastate_core.prompts.values import Prompts
from conftest import NODES


class Encoder:
    """The host's two methods of a CLIP: a text's embedding is its length and its letters' sum; it counts its calls."""

    def __init__(self):
        self.texts = []

    def tokenize(self, text):
        return {"t5": text}

    def encode_from_tokens_scheduled(self, tokens):
        self.texts.append(tokens["t5"])
        return [
            [torch.tensor([[[float(len(tokens["t5"])), float(sum(map(ord, tokens["t5"])))]]]), {"pooled_output": None}]
        ]


@pytest.fixture
def encoder():
    return Encoder()


def test_a_timeline_encodes_each_text_once(node, encoder):
    out = node("AdaStatePromptTimeline")(
        clip=encoder,
        text="a [5s] | b [2s {cut}] | a",
        shared="film:",
        transition="soft",
        blend_chunks=5,
        blend="spherical",
    )
    prompts, listing = out.args
    assert isinstance(prompts, Prompts) and encoder.texts == ["film: a", "film: b"]
    assert [(e.seconds, e.text, e.transition, e.chunks, e.blend) for e in prompts.entries] == [
        (0.0, "film: a", "soft", 5, "spherical"),
        (5.0, "film: b", "cut", 5, "spherical"),
        (7.0, "film: a", "soft", 5, "spherical"),
    ]
    for entry in prompts.entries:
        expected = Encoder().encode_from_tokens_scheduled({"t5": entry.text})[0][0]
        assert torch.equal(entry.conditioning[0][0], expected)
    assert prompts.entries[0].conditioning is prompts.entries[2].conditioning
    assert listing == "0:00 film: a\n0:05 {cut} film: b\n0:07 {soft} film: a"


def test_a_shot_is_encoded_twice(node, encoder):
    """With the sentence for its first chunk, and without for those behind; one without words begins under those that hold."""
    out = node("AdaStatePromptTimeline")(
        clip=encoder,
        text="a [5s {shot}] | The scene transitions. b [2s {shot}] | c [1s {cut}] | [{shot, seed 7}]",
        shared="film:",
    )
    prompts, listing = out.args
    assert encoder.texts == [
        "film: a",
        "film: b",
        "The scene transitions. film: b",
        "film: c",
        "The scene transitions. film: c",
    ]
    told = [
        [entry.text] + [words and words[0][0] for words in (entry.conditioning, entry.opening)]
        for entry in prompts.entries
    ]
    for (text, later, first), opens in zip(told, (False, True, False, True), strict=True):
        assert torch.equal(later, encoder.encode_from_tokens_scheduled({"t5": text})[0][0])
        sentence = encoder.encode_from_tokens_scheduled({"t5": f"The scene transitions. {text}"})[0][0]
        assert torch.equal(first, sentence) if opens else first is None
    assert listing.splitlines()[1:] == ["0:05 {shot} film: b", "0:07 {cut} film: c", "0:08 {shot, seed 7} film: c"]

    demo = node("AdaStateDemoTimeline")(text="snow [5s] | [2s {shot}] | city [{shot}]").args[0]
    at = node("AdaStatePromptAt")(positive=[[torch.zeros(1, 1, 8), {}]], seconds=0.0, transition="shot").args[0]
    assert [entry.opening for entry in (*demo.entries, *at.entries)] == [None] * 4
    assert torch.equal(demo.entries[1].conditioning[0][0], demo.entries[0].conditioning[0][0])
    assert [entry.transition for entry in demo.entries[1:]] == ["shot", "shot"]


def test_defaults_are_enough(node, encoder):
    for given in NODES["AdaStatePromptTimeline"].define_schema().inputs:
        if given.id in ("text", "shared"):
            assert given.dynamic_prompts is False and given.multiline
    default = next(i.default for i in NODES["AdaStatePromptTimeline"].define_schema().inputs if i.id == "text")
    assert node("AdaStatePromptTimeline").validate(text=default) is True
    prompts = node("AdaStatePromptTimeline")(clip=encoder, text=default).args[0]
    assert len(prompts.entries) == 2 and prompts.entries[1].transition == "recache"


def test_a_missing_encoder_and_an_interrupt(node, encoder):
    with pytest.raises(ValueError, match="clip is empty"):
        node("AdaStatePromptTimeline")(clip=None, text="a")
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        node("AdaStatePromptTimeline")(clip=encoder, text="a [5s] | b")
    assert encoder.texts == ["a"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "0:00 a\n0:05"}, "line 2, column 1: the prompt here is empty"),
        ({"text": ""}, "line 1, column 1: there is no prompt"),
        (
            {"text": "a", "transition": "zoom"},
            "transition is 'zoom'; it must be one of cut, recache, flush, rope cut, soft, shot",
        ),
        ({"text": "a", "blend": "cubic"}, "blend is 'cubic'"),
        ({"text": "a", "blend_chunks": 0}, "blend_chunks is 0"),
        ({"text": None, "blend_chunks": 0}, "blend_chunks is 0"),
        (
            {"text": "a [9s] | b", "duration": 5.0},
            "line 1, column 10: this prompt begins at 9s, and the video ends at 5s",
        ),
        ({"text": "a | b"}, "says no length"),
        ({"text": "a", "duration": math.nan}, "duration is nan"),
    ],
)
def test_bad_timelines_are_said_before_a_run(node, inputs, message):
    assert message in node("AdaStatePromptTimeline").validate(**inputs)
    if inputs["text"] is not None and "duration" not in inputs and inputs["text"] != "a | b":
        assert isinstance(node("AdaStateDemoTimeline").validate(**inputs), str)


def test_linked_inputs_pass_and_a_duration_shares(node, encoder):
    linked = dict.fromkeys(("text", "shared", "transition", "blend_chunks", "blend", "duration"))
    assert node("AdaStatePromptTimeline").validate(**linked) is True
    assert node("AdaStatePromptTimeline").validate(text="a | b", duration=4.0) is True
    prompts = node("AdaStatePromptTimeline")(clip=encoder, text="a | b", duration=4.0).args[0]
    assert [e.seconds for e in prompts.entries] == [0.0, 2.0]


def test_a_chain_in_any_order(node):
    at, (a, b, c) = node("AdaStatePromptAt"), ([[torch.zeros(1, n, 8), {}]] for n in (1, 2, 3))
    first = at(positive=a, seconds=0.0, transition="cut").args[0]
    third = at(positive=c, seconds=8.0, transition="soft", prompts=first, blend_chunks=2, blend="spherical").args[0]
    whole = at(positive=b, seconds=2, transition="flush", prompts=third).args[0]
    assert [(e.seconds, e.conditioning, e.transition) for e in whole.entries] == [
        (0.0, a, "cut"), (2.0, b, "flush"), (8.0, c, "soft"),
    ]  # fmt: skip
    assert len(first.entries) == 1 and len(third.entries) == 2
    with pytest.raises(ValueError, match="there is a prompt at 8s already"):
        at(positive=b, seconds=8.0, transition="cut", prompts=whole)
    with pytest.raises(ValueError, match="seconds is 3 and prompts is not connected"):
        at(positive=a, seconds=3.0, transition="cut")


def test_a_chain_has_to_begin_at_zero(node):
    at = node("AdaStatePromptAt")
    assert "the first prompt of a chain begins at 0" in at.validate(seconds=3.0, transition="cut")
    assert at.validate(seconds=0.0, transition="cut") is True
    assert at.validate(seconds=3.0, transition="cut", prompts=None) is True
    assert at.validate(seconds=None, transition=None) is True
    assert "seconds is nan" in at.validate(seconds=math.nan, transition="cut", prompts=None)
    assert "transition is 'zoom'" in at.validate(seconds=0.0, transition="zoom")


def test_the_demos_timeline_is_its_prompts(node):
    prompts, listing = node("AdaStateDemoTimeline")(
        text="0s snow, lantern\n5s {soft} any pace gold balloon", blend_chunks=4
    ).args
    single = node("AdaStateDemoPrompt")
    for entry, words in zip(
        prompts.entries,
        (
            {"terrain": "snow", "pace": "steady", "balloon": "crimson", "lantern": "lantern"},
            {"terrain": "snow", "pace": "any", "balloon": "gold", "lantern": "lantern"},
        ),
        strict=True,
    ):
        assert torch.equal(entry.conditioning[0][0], single(**words).args[0][0][0])
    assert [(e.transition, e.chunks) for e in prompts.entries] == [("recache", 4), ("soft", 4)]
    assert listing.splitlines()[1] == "0:05 {soft} snow terrain, any pace, gold balloon, lantern"
    again = node("AdaStateDemoTimeline")(text=listing).args[0]
    assert [e.text for e in again.entries] == [e.text for e in prompts.entries]


def shown(**nodes):
    """A prompt of the API whose last node's second output is shown as text."""
    last = list(nodes)[-1]
    output = len(NODES[nodes[last]["class_type"]].RETURN_TYPES) - 1
    return {**nodes, "preview": {"class_type": "PreviewAny", "inputs": {"source": [last, output]}}}


def demo(text, **inputs):
    return {"class_type": "AdaStateDemoTimeline", "inputs": {"text": text, **inputs}}


def test_the_host_runs_a_demo_timeline(execute):
    outputs = execute(shown(t=demo("snow [5s] | city [#]")))
    assert outputs["preview"]["text"][0] == (
        "0:00 snow terrain, steady pace, crimson balloon, no lantern\n"
        "0:05 {rope cut} city terrain, steady pace, crimson balloon, no lantern"
    )


def test_the_host_refuses_what_is_no_timeline(execute):
    for inputs, message in (
        (
            {"text": "0:00 snow\n0:05 moon"},
            "line 2, column 6: found 'moon'; the demo model knows meadow, desert, snow, city",
        ),
        ({"text": "snow [5s: city"}, "line 1, column 6: the bracket is not closed"),
        ({"text": "snow", "transition": "zoom"}, "transition is 'zoom'"),
        ({"text": "snow", "blend_chunks": 1000}, "blend_chunks is 1000"),
    ):
        valid, details = execute.check(shown(t=demo(**inputs)))
        assert not valid and message in details


def test_the_host_tells_a_connected_chain_from_none(execute):
    words = {"terrain": "snow", "pace": "slow", "balloon": "gold", "lantern": "lantern"}
    words = {"class_type": "AdaStateDemoPrompt", "inputs": words}

    def at(**inputs):
        return {"class_type": "AdaStatePromptAt", "inputs": {"positive": ["w", 0], "transition": "cut", **inputs}}

    assert execute.check(shown(w=words, a=at(seconds=0.0), b=at(seconds=4.0, prompts=["a", 0])))[0]
    outputs = execute(shown(w=words, a=at(seconds=0.0), b=at(seconds=4.0, prompts=["a", 0])))
    assert "Prompts(entries=(PromptAt(seconds=0.0" in outputs["preview"]["text"][0]
    valid, details = execute.check(shown(w=words, a=at(seconds=4.0)))
    assert not valid and "the first prompt of a chain begins at 0" in details
    valid, details = execute.check(shown(w=words, a=at(seconds=0.0), b=at(seconds=-4.0, prompts=["a", 0])))
    assert not valid and "seconds is -4.0; it must be between 0 and" in details
