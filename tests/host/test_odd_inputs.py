"""What a prompt's JSON may hold at any input of any node: the host or the node says it in a sentence, and nothing breaks."""

from __future__ import annotations

import asyncio
import json
import math
import re

import execution
import pytest
from adastate_pack.nodes import self_test_node
from conftest import NODES, PACK, HostNode

import nodes

WORDS = "a cat, " * 30_000
ODD = [
    None, "abc", "", {}, [], [1], ["1"], ["1", 0, 0], ["nope", 0], ["1", 99], ["1", "0"], [1, 0], ["1", -9], ["1", None], True,
    math.nan, math.inf, -math.inf, -0.0, 0, -1, 1e308, 10**400, -(10**400), "9" * 5000, WORDS, "\ud800", "\x00", "a\nb", {"a": 1},
    {"__value__": [1]}, {"__value__": None}, {"__type__": "x"}, [[["1", 0]]], "nan", "1e400", "0x10", "\u0661",
]  # fmt: skip
# what only Python and torch say, in what the pack says
RAW = re.compile(
    r"\b(TypeError|KeyError|AttributeError|IndexError|RecursionError|OverflowError|NoneType|Traceback|subscriptable|unhashable|"
    r"object has no|not supported between|positional argument|codec can't)\b"
)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The host knows the pack's nodes, as a server does."""
    for name, node in NODES.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
    # the self test runs whole rollouts, whatever is odd about its input
    monkeypatch.setattr(self_test_node, "all_checks", lambda speed: [])


def steps() -> dict[str, tuple[dict, str]]:
    """For each node an API workflow that has it, or one of itself alone, and its number there."""
    found: dict[str, tuple[dict, str]] = {}
    for path in sorted((PACK / "workflows" / "api").glob("*.json")):
        prompt = json.loads(path.read_text())
        for number, step in prompt.items():
            if step["class_type"] in NODES:
                found.setdefault(step["class_type"], (prompt, number))
    for name, node in NODES.items():
        inputs = {
            each.id: each.default for each in node.define_schema().inputs if getattr(each, "default", None) is not None
        }
        found.setdefault(name, ({"1": {"class_type": name, "inputs": inputs}}, "1"))
    return found


STEPS = steps()


def validated(prompt: dict, number: str) -> list[dict]:
    """The host's errors of one step of a prompt; what breaks the host itself is its own to say."""
    try:
        return asyncio.run(execution.validate_inputs("p", prompt, number, {}))[1]
    except Exception as error:  # noqa: BLE001
        return [{"type": "exception_during_validation", "details": str(error)}]


@pytest.mark.parametrize("node_id", STEPS)
@pytest.mark.sampled(3)
def test_odd_json_is_answered_in_a_sentence(node_id, folders):
    prompt, number = STEPS[node_id]
    schema = NODES[node_id].define_schema()
    tried = refused = 0
    for each in schema.inputs:
        for value in ODD:
            inputs = dict(prompt[number]["inputs"]) | {each.id: value}
            inputs = {name: one for name, one in inputs.items() if name == each.id or not isinstance(one, list)}
            changed = prompt | {number: {"class_type": node_id, "inputs": dict(inputs)}}
            errors = validated(changed, number)
            for error in errors:
                if error["type"] == "custom_validation_failed":
                    said = error["details"].partition(" - ")[2]
                    assert said and not RAW.search(said) and "\n" not in said and len(said) < 600, (
                        each.id,
                        value,
                        said,
                    )
                    said.encode()
            tried += 1
            refused += bool(errors)
            if isinstance(value, list) or [e for e in errors if e["type"] != "required_input_missing"]:
                continue
            # the host let it pass: then the node says it when it runs, if it is not as good as any other value
            given = changed[number]["inputs"]
            given = {i.id: given.get(i.id) for i in schema.inputs if i.id in given or not i.optional}
            try:
                HostNode(node_id)(**given)
            except ValueError as error:
                assert not RAW.search(str(error)) and "\n" not in str(error), (each.id, value, error)
            except OSError:  # a file of a name that no folder has
                assert each.id in ("file", "filename_prefix"), (each.id, value)
    assert tried == len(ODD) * len(schema.inputs) and (refused or not schema.inputs)
