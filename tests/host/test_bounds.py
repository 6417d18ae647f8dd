"""What every node's schema says is held: when a prompt is queued, over HTTP's own conversion, and when a link's value comes."""

from __future__ import annotations

import inspect
import json
import math
import re

import numpy
import pytest
import torch
from adastate_pack.adastate_core.schedules.schedule import MOST_SIGMAS, Schedule
from adastate_pack.nodes.host.api import io
from conftest import NODES, PACK, HostNode

NUMBERS = (io.Int.Input, io.Float.Input)
WIDGETS = (*NUMBERS, io.Combo.Input, io.String.Input, io.Boolean.Input)
# at the ends of these another input says more
BOUND_BY_OTHERS = ("seconds", "budget_frames", "recent_frames", "sink_frames", "first_clip_frames")
# what a widget's own default does not answer for
STAND_INS = {"file": None, "filename_prefix": "a/b", "budget_frames": 192}


def inputs_of(node_id: str, *kinds: type) -> list:
    inputs = [i for i in NODES[node_id].define_schema().inputs if isinstance(i, kinds)]
    return [i for i in inputs if not i.force_input]


def defaults(node_id: str) -> dict:
    """Every widget of a node at its default."""
    default = {i.id: i.options[0] if isinstance(i, io.Combo.Input) else i.default for i in inputs_of(node_id, *WIDGETS)}
    return {name: STAND_INS.get(name, value) for name, value in default.items()}


def run_refusal(node_id: str, name: str, value: object) -> str:
    """What a node says when it is run with a value that came through a link."""
    linked = defaults(node_id) | {name: value}
    linked |= {i.id: None for i in NODES[node_id].define_schema().inputs if i.id not in linked}
    linked |= {"file": "a.state.safetensors"} if "file" in linked else {}
    with pytest.raises(ValueError) as refusal:
        HostNode(node_id)(**linked)
    return str(refusal.value)


def below(number: object) -> float:
    return number.min - 1 if isinstance(number, io.Int.Input) else number.min - max(1e-3, abs(number.min) * 1e-6)


def above(number: object) -> float:
    return number.max + 1 if isinstance(number, io.Int.Input) else number.max + max(1e-3, abs(number.max) * 1e-6)


EVERY_NUMBER = [(node_id, i.id) for node_id in NODES for i in inputs_of(node_id, *NUMBERS)]
EVERY_CHOICE = [(node_id, i.id) for node_id in NODES for i in inputs_of(node_id, io.Combo.Input) if i.id != "file"]
EVERY_TEXT = [(node_id, i.id) for node_id in NODES for i in inputs_of(node_id, io.String.Input)]


@pytest.fixture(autouse=True)
def saved(folders):
    """A file for Load Rollout State to find."""
    (folders / "input" / "a.state.safetensors").touch()


def check_both(node_id: str, name: str, value: object, *words: str) -> str:
    """Refused when queued and when run, by the same sentence, which comes back."""
    reason = HostNode(node_id).validate(**(defaults(node_id) | {name: value}))
    assert isinstance(reason, str), (node_id, name, value)
    assert reason.startswith(name) and len(reason) < 400 and all(word in reason for word in words), reason
    assert run_refusal(node_id, name, value) == reason
    return reason


@pytest.mark.parametrize(("node_id", "name"), EVERY_NUMBER, ids=lambda word: word.removeprefix("AdaState"))
@pytest.mark.sampled(2)
def test_every_number_is_held_to_its_range(node_id, name):
    number = next(i for i in inputs_of(node_id, *NUMBERS) if i.id == name)
    whole = isinstance(number, io.Int.Input)
    for value in (below(number), above(number), 2**2000 if whole else 1e300):
        said = check_both(node_id, name, value, "a number of 2001 bits" if value == 2**2000 else f"{value}")
        assert any(words in said for words in ("must be", "must lie", "needs at least 1")), said
    for value in (math.nan, math.inf, -math.inf, "abc", "12", *((2.5,) if whole else ()), [1], {}, torch.zeros(2)):
        check_both(node_id, name, value, "number between" if "pictures" not in name else "", "must be")
    for value in (number.min, number.max):
        given = HostNode(node_id).validate(**(defaults(node_id) | {name: value}))
        assert given is True or name in BOUND_BY_OTHERS and name in given, given


@pytest.mark.parametrize(("node_id", "name"), EVERY_CHOICE, ids=lambda word: word.removeprefix("AdaState"))
def test_every_choice_is_one_of_its_options(node_id, name):
    options = next(i for i in inputs_of(node_id, io.Combo.Input) if i.id == name).options
    for option in options:
        assert HostNode(node_id).validate(**(defaults(node_id) | {name: option})) is True
    for value in ("sideways", "", options[0] + " ", 3, math.nan):
        check_both(node_id, name, value, *options)


@pytest.mark.parametrize(("node_id", "name"), EVERY_TEXT, ids=lambda word: word.removeprefix("AdaState"))
def test_every_text_ends_somewhere(node_id, name):
    reason = HostNode(node_id).validate(**(defaults(node_id) | {name: "a" * 10**7}))
    assert isinstance(reason, str) and len(reason) < 400, reason
    assert run_refusal(node_id, name, "a" * 10**7)
    check_both(node_id, name, 5, "it must be a text")


def test_the_host_hands_every_widget_to_be_compared():
    """The host asks validate_inputs about the inputs that it takes, and nothing else compares NaN or a choice."""
    for node_id, node in NODES.items():
        spec = inspect.getfullargspec(node.validate_inputs)
        names = {i.id for i in inputs_of(node_id, *WIDGETS)}
        assert spec.varkw or names <= set(spec.args), (node_id, names - set(spec.args))
        sockets = {i.id for i in node.define_schema().inputs} - names
        assert spec.varkw is None or not sockets, node_id
        assert sockets & set(spec.args) <= {"prompts", "report"}


EVERY_SOCKET = [
    (node_id, i.id)
    for node_id, node in NODES.items()
    for i in node.define_schema().inputs
    if not isinstance(i, WIDGETS) or i.force_input
]


@pytest.mark.parametrize(("node_id", "name"), EVERY_SOCKET, ids=lambda word: word.removeprefix("AdaState"))
@pytest.mark.sampled(2)
def test_every_socket_takes_its_kind_alone(node_id, name):
    """A prompt's JSON may hold anything where a link belongs, and the host compares the types of links alone."""
    socket = next(i for i in NODES[node_id].define_schema().inputs if i.id == name)
    text = socket.get_io_type() == "STRING"
    odd = [
        5,
        0,
        -0.0,
        math.nan,
        1e300,
        10**400,
        True,
        {},
        {"samples": 1},
        {"a": []},
        [1],
        [[1, {}]],
        (),
        object(),
        b"a",
    ]
    odd += [] if text else ["abc", "", "a" * 10**6, "\ud800"]
    for value in odd:
        if socket.get_io_type().startswith("CONDITIONING") and value == ():
            continue  # of none at all the rollout says how many it takes
        if "file" in defaults(node_id):
            continue  # of a file that is not there its node says so first
        reason = run_refusal(node_id, name, value)
        assert reason.startswith(f"{name} is ") and len(reason) < 250 and "\n" not in reason, (value, reason)
        assert "it must be" in reason and ": connect " in reason
        reason.encode()
    if not socket.optional and "file" not in defaults(node_id) and name != "clip":
        assert re.match(r"\w+ is empty; it must be \w+ .*: connect ", run_refusal(node_id, name, None))


@pytest.mark.parametrize(("node_id", "name"), EVERY_TEXT, ids=lambda word: word.removeprefix("AdaState"))
def test_half_a_utf16_pair_is_refused(node_id, name):
    reason = HostNode(node_id).validate(**(defaults(node_id) | {name: "a\ud83d b"}))
    assert f"{name} has half a UTF-16 pair as its character 2" in reason
    reason.encode()
    assert run_refusal(node_id, name, "a\ud83d b") == reason


def test_what_is_linked_passes_until_it_is_known():
    for node_id in NODES:
        assert HostNode(node_id).validate(**dict.fromkeys(defaults(node_id))) is True, node_id


def test_numbers_of_other_libraries_become_plain_ones():
    anchor = HostNode("AdaStateAnchorEMA")(sink_frames=numpy.int64(2), decay=numpy.float32(0.5)).args[0]
    assert type(anchor.sink_frames) is int and type(anchor.decay) is float and anchor.decay == 0.5
    assert HostNode("AdaStateAnchorStatic")(sink_frames=torch.tensor(2)).args[0].sink_frames == 2


def test_the_shipped_prompts_are_within_all_bounds():
    seen = 0
    for path in sorted((PACK / "workflows" / "api").glob("*.json")):
        for number, step in json.loads(path.read_text()).items():
            if step["class_type"] not in NODES:
                continue
            linked = {name: None if isinstance(value, list) else value for name, value in step["inputs"].items()}
            if step["class_type"] in ("AdaStateLoadState", "AdaStateLoadAbsorption"):
                linked["file"] = None  # made by another of these prompts
            assert HostNode(step["class_type"]).validate(**linked) is True, (path.name, number)
            seen += 1
    assert seen > 100


def test_sigmas_end_somewhere(rollout):
    most = torch.linspace(1, 0, MOST_SIGMAS + 1)
    assert len(Schedule.from_sigmas(most).sigmas) == MOST_SIGMAS
    with pytest.raises(ValueError, match=f"there are {MOST_SIGMAS + 2} sigmas; a chunk takes at most {MOST_SIGMAS}"):
        rollout(sigmas=torch.linspace(1, 0, MOST_SIGMAS + 2))
    with pytest.raises(ValueError, match="sigmas have the shape"):
        rollout(sigmas=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"sigmas are \[nan\]; they must fall strictly"):
        rollout(sigmas=torch.tensor([math.nan, 0.0]))
