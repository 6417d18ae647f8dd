"""Seeded prompts that nobody means: nodes of the pack linked to each other and to the host's, right and wrong, and the shipped
workflows with something damaged. All of them small, so that what the host takes is run within a second."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hostile.json_values import VALUES, damage_header

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
PACK = "AdaState"
RUN_ONE_OF = (
    5  # workflows, which would nearly all run whatever is wrong with them; the others lack an input and are refused
)
BUILT_ONE_OF = 4  # graphs, of which a third would run
MARK = "adzz"  # in every name of a file that a prompt asks for
OUTSIDE = [
    "../{}", "../../../../../../../../tmp/{}", "/tmp/{}", "/{}", "C:\\{}", "C:/{}", "\\\\host\\{}", "..\\..\\{}", "{}\0x",
    "{}/../../{}", "~/{}", "$HOME/{}", "./.././../{}", "....//{}", "%2e%2e/{}", "\uff0e\uff0e/{}", "file:///tmp/{}",
    "../{} [output]", "/tmp/{} [input]", "../../../../etc/passwd [input]", "/etc/passwd", "concat:/etc/passwd|/tmp/{}", "pipe:1",
    "%date:../../../%{}", "%width%/../../{}", "../output2/{}", "input/../../{}", "../temp/{}", "custom_nodes/../../{}",
]  # fmt: skip
NAMES = [
    "{}" * 90, "{}/" * 200, "{}\ud800", "{}\n{}", "CON", "nul.txt", "{}. ", "%date:yyyy-MM-dd%/{}", "%year%-%month%/{}",
    "%width%x%height%_{}", "%KSampler.seed%{}", "%5.filename_prefix%{}", "", ".", "..", "/", " ", "{}:stream", "{}|x", "`{}`",
    "-{}", "--{}", "\u00e9" * 200, "\u202e{}", "{} [output]", "{} [temp]", "{}_%05d", "%s%n{}", "\x1b[31m{}", "{}/{}", "{}\u0000",
    "{}.mp4", "{}.state.safetensors", "{}_00001_", "{}\t", "\ufffe{}", "{}//{}", "\U0001f600{}", "%%{}", "{}%", "%{}%",
]  # fmt: skip
SCALARS: list[Any] = [*VALUES, "../x", [1, 2, 3], [[1, 2]], ["a", "b"], {"__value__": [1, 2]}, {"__value__": None}, "0s a\n5s b",
                      -(2**63), 2**64, -0.5, 1e-9, "True", "\x00", [None, 0], {"__type__": 1}]  # fmt: skip
# What decides how long a run takes stays small, or is refused.
SIZES: dict[str, list[Any]] = {
    "width": [32] * 8 + [16, 48, 64, 0, 8, 33, 8192 + 16],
    "height": [32] * 8 + [16, 48, 64, 0, 8, 33, -16],
    "length": [1, 5, 5, 5, 9, 13, 21, 2, -1, 2**24 + 1],
    "batch_size": [1] * 8 + [2, 0, 65],
    "frames": [1, 5, 9, 13],
    "steps": [1, 1, 1, 2, 0, 101],
    "seconds": [0.1, 0.5, 2.0],
    "amount": [1, 2],
    "index": [0, 1],
    "chunks": [1, 2],
    "scale_by": [1.0, 2.0],
    "upscale_by": [0.0, 0.0, 0.0, 2.0],
    "keep_state": [False, False, False, True],
    "autosave_seconds": [60.0, 60.0, 0.0],
    "max_seconds": [0.0, 0.0, 0.2],
    "every": [1, 7],
    "windows": ["3, 6", "3", "", "a", "3, 6, 9, 12"],
    "rank": [1, 4, 4096],
    "duration": [0.0, 5.0, 360000.0],
}
HOSTS = (
    "EmptyHunyuanLatentVideo EmptyImage ImageScale UNETLoader VAELoader LoadImage LoadVideo ModelSamplingSD3 BasicGuider "
    "BasicScheduler SamplerCustomAdvanced RandomNoise KSamplerSelect ConditioningCombine ConditioningConcat "
    "ConditioningZeroOut LatentCut ImageFromBatch SplitSigmas VAEDecode VAEEncode EmptyLatentImage GetVideoComponents ImageBatch "
    "ConditioningAverage LatentAdd CFGGuider LatentBatch RepeatLatentBatch SetLatentNoiseMask ScaleROPE ConditioningSetMask "
    "ImageScaleBy FreeU EasyCache "
    "WanContextWindowsManual CreateVideo RebatchImages RebatchLatents KarrasScheduler SkipLayerGuidanceDiT "
    "StringConcatenate PrimitiveInt PrimitiveFloat PrimitiveString PrimitiveBoolean"
).split()
SHOWING = ["PreviewAny"] * 3 + ["PreviewImage", "SaveVideo"]  # the host's outputs
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
HIDDEN = (
    "unique_id",
    "prompt",
    "extra_pnginfo",
    "dynprompt",
    "auth_token_comfy_org",
    "cls",
    "self",
    "hidden",
    "kwargs",
)
IDS = [
    "../{}",
    "",
    " ",
    "a:b",
    "5.0",
    "\ud800{}",
    "{}" * 90,
    "\x00",
    "__proto__",
    "-1",
    "'{}'",
    "\u0665",
    "5 ",
    "{}\n",
    "/{}/{}",
]
# what a page sends beside a prompt, and what none does
INFOS: list[Any] = [
    {"workflow": {"id": "a", "nodes": []}}, {"workflow": {"id": [1]}}, {"workflow": "abc"}, {"workflow": [1]}, {"workflow": None},
    {"workflow": {"id": "x" * 9_999}}, "abc", [1, 2], 5, True, [], {}, {"prompt": 3}, {"a": float("nan")}, {"": {"": [[]]}},
    {"\ud800": "\ud800"}, {"workflow": {"id": "\ud800"}}, {"x" * 300: 1}, {"a\0b": "a\0b"}, {"workflow": 10**400}, ["ab", "cd"],
]  # fmt: skip


def named(chance: random.Random, number: int) -> str:
    """A name for a file, of those that lead out of the folder, that no system takes, and plain ones."""
    mark = f"{MARK}{number}"
    return chance.choice([*OUTSIDE, *NAMES, *["{}", "{}/{}"] * 8]).replace("{}", mark)


@dataclass
class Growing:
    """A graph that grows from its outputs to what feeds them."""

    info: dict[str, Any]  # the host's /object_info
    chance: random.Random
    number: int
    wrong: float  # how often a link goes where it does not fit
    graph: dict[str, Any] = field(default_factory=dict)
    whole: list[str] = field(
        default_factory=list
    )  # nodes that have all their inputs: to link to others would make a circle

    def of_pack(self) -> list[str]:
        return [
            name for name in self.info if name.startswith(PACK) and name != "AdaStateSelfTest"
        ]  # which takes minutes

    def pool(self) -> list[str]:
        return [*self.of_pack(), *(kind for kind in HOSTS if kind in self.info)]

    def grow(self, kind: str, depth: int = 0) -> str:
        """A node of this class with all that feeds it; its id."""
        name = str(len(self.graph) + 1)
        inputs: dict[str, Any] = {}
        self.graph[name] = {"class_type": kind, "inputs": inputs}
        asked = self.info[kind]["input"]
        for each, spec in asked.get("required", {}).items():
            inputs[each] = self.fed(kind, each, spec, depth)
        for each, spec in asked.get("optional", {}).items():
            if self.chance.random() < ((0.15 if self.can_be_made(spec[0]) else 0.01) if self.is_socket(spec) else 0.5):
                inputs[each] = self.fed(kind, each, spec, depth)
        self.whole.append(name)
        return name

    @staticmethod
    def is_socket(spec: list[Any]) -> bool:
        return not isinstance(spec[0], list) and spec[0] not in WIDGETS

    def fed(self, kind: str, name: str, spec: list[Any], depth: int) -> Any:
        if self.is_socket(spec):
            return self.link(spec[0], depth)
        if kind.startswith(PACK) and depth < 4 and self.chance.random() < 0.03:
            return self.link(spec[0] if isinstance(spec[0], str) else "STRING", depth)
        return self.value(name, spec)

    def value(self, name: str, spec: list[Any]) -> Any:
        """For a widget: mostly what fits it."""
        chance, options = self.chance, spec[1] if len(spec) > 1 else {}
        if name == "filename_prefix":
            return named(chance, self.number)
        if name in SIZES:
            return chance.choice(SIZES[name])
        choices = spec[0] if isinstance(spec[0], list) else options.get("options", [])
        if choices:
            return chance.choice(choices)
        fitting = options.get("default", {"INT": 1, "FLOAT": 1.0, "BOOLEAN": True}.get(spec[0], "a"))
        if spec[0] in ("INT", "FLOAT") and chance.random() < 0.3:
            return chance.choice([options.get("min", 0), options.get("max", 1), fitting, 1, 2])
        return not fitting if spec[0] == "BOOLEAN" and chance.random() < 0.5 else fitting

    def link(self, types: str, depth: int) -> list[Any]:
        """To an output of one of these types, of a node that is there or a new one; now and then to any other."""
        wanted = set(types.split(","))
        wrong = self.chance.random() < self.wrong
        there = [
            [node, slot]
            for node in self.whole
            for slot, kind in enumerate(self.outputs(node))
            if wrong or kind in wanted
        ]
        if there and (depth > 5 or wrong or self.chance.random() < 0.4):
            return self.chance.choice(there)
        makers = [kind for kind in self.pool() if wrong or wanted & set(self.made_by(kind))]
        if depth > 4:
            makers = [
                kind
                for kind in makers
                if not any(map(self.is_socket, self.info[kind]["input"].get("required", {}).values()))
            ]
        if not makers:
            return self.chance.choice(there) if there else [self.grow("PrimitiveString", depth + 1), 0]
        kind = self.chance.choice(makers)
        node = self.grow(kind, depth + 1)
        slots = [slot for slot, each in enumerate(self.outputs(node)) if each in wanted] or [0]
        return [node, self.chance.choice(slots)]

    def outputs(self, node: str) -> list[str]:
        return self.made_by(self.graph[node]["class_type"])

    def made_by(self, kind: str) -> list[str]:
        return list(map(str, self.info.get(kind, {"output": []})["output"]))

    def can_be_made(self, types: str) -> bool:
        return any(set(types.split(",")) & set(self.made_by(kind)) for kind in self.pool())


def built(info: dict[str, Any], chance: random.Random, number: int) -> dict[str, Any]:
    """A graph of one or two outputs and what feeds them."""
    growing = Growing(info, chance, number, wrong=chance.choice([0, 0, 0.02, 0.2]))
    outputs = [kind for kind in growing.of_pack() if info[kind]["output_node"]]
    for _ in range(chance.choice([1, 1, 1, 2])):
        growing.grow(chance.choice([*outputs, "AdaStateRollout", "AdaStateRollout", *SHOWING]))
    return growing.graph


def shipped(chance: random.Random, number: int) -> dict[str, Any]:
    """A workflow of the pack, made small."""
    path = chance.choice(sorted(WORKFLOWS.glob("*.json")))
    graph = json.loads(path.read_text(encoding="utf-8"))
    for node in graph.values():
        inputs = node["inputs"]
        for name in inputs.keys() & {"width", "height"}:
            inputs[name] = 32
        for name, small in (("length", 5), ("steps", 1), ("keep_state", False), ("clip_frames", 0)):
            if name in inputs:
                inputs[name] = small
        if "filename_prefix" in inputs:
            inputs["filename_prefix"] = f"{MARK}{number}"
        if "seed" in inputs:
            inputs["seed"] = number
    return graph


def has_circle(graph: Any) -> bool:
    """Whether the links of a prompt lead from a node back to it."""
    if not isinstance(graph, dict):
        return False
    sources = {}
    for name, node in graph.items():
        inputs = node.get("inputs") if isinstance(node, dict) else None
        values = inputs.values() if isinstance(inputs, dict) else []
        sources[name] = {str(value[0]) for value in values if isinstance(value, list) and len(value) == 2}
    while free := [name for name, feeds in sources.items() if not feeds & sources.keys()]:
        for name in free:
            del sources[name]
    return bool(sources)


def _widgets(graph: dict[str, Any], chance: random.Random) -> tuple[dict[str, Any], str] | None:
    """The inputs of a node, of the pack if there is one, and the name of one of them."""
    own = [node for node in graph.values() if node["class_type"].startswith(PACK)] or list(graph.values())
    inputs = chance.choice(own)["inputs"]
    return (inputs, chance.choice(list(inputs))) if inputs else None


def spoil(graph: dict[str, Any], chance: random.Random, number: int) -> str:
    """One thing of a graph is made wrong, in place; what it was."""
    ways = (
        ["scalar"] * 6 + ["name"] * 3 + ["link"] * 4 + ["lost", "lost", "hidden", "class", "id", "id", "mark", "circle"]
    )
    how = chance.choice(ways)
    node, place = chance.choice(list(graph.values())), _widgets(graph, chance)
    inputs, name = place or (node["inputs"], "width")
    if how == "scalar":
        inputs[name] = copy.deepcopy(chance.choice(SCALARS))
    elif how == "name":
        texts = [
            (n["inputs"], key) for n in graph.values() for key, value in n["inputs"].items() if isinstance(value, str)
        ]
        inputs, name = chance.choice(texts) if texts else (inputs, name)
        inputs[name] = named(chance, number)
    elif how == "link":
        was, other = inputs.get(name), chance.choice(list(graph))
        inputs[name] = [other, chance.choice([0, 1, 99, -1, 2**63, 0.0, 1.5, True, "0", None])]
        if chance.random() < 0.3:
            inputs[name][0] = chance.choice(["999", "", None, 5, "\ud800"])
        if has_circle(graph):  # of these there are enough: the host takes seconds to refuse one
            inputs[name] = was
    elif how == "lost":
        inputs.pop(name, None)
    elif how == "hidden":
        inputs[chance.choice(HIDDEN)] = copy.deepcopy(chance.choice([*SCALARS, {"1": {}}]))
    elif how == "class":
        node["class_type"] = chance.choice(
            ["", "NoSuchNode", 5, None, "AdaStateRollout", "AdaStateStreamOutput", "PreviewAny"]
        )
    elif how == "id":
        old, new = chance.choice(list(graph)), chance.choice(IDS).replace("{}", MARK)
        graph[new] = graph.pop(old)
        for value in (value for each in graph.values() for value in each["inputs"].values()):
            if isinstance(value, list) and value and value[0] == old:
                value[0] = new
    elif how == "mark":
        node[chance.choice(["is_changed", "_meta", "inputs2", "mode"])] = copy.deepcopy(chance.choice(SCALARS))
    elif chance.random() < 0.3:
        one, other = chance.choice(list(graph)), chance.choice(list(graph))
        if graph[one]["inputs"] and graph[other]["inputs"]:
            graph[one]["inputs"][chance.choice(list(graph[one]["inputs"]))] = [other, 0]
            graph[other]["inputs"][chance.choice(list(graph[other]["inputs"]))] = [one, 0]
    return f"{how} {name[:20]!r}"


def lose(graph: dict[str, Any], info: dict[str, Any], chance: random.Random) -> str:
    """A required input of every output goes, so that nothing of it runs; what went."""
    lost = []
    for node in graph.values():
        known = info.get(node["class_type"]) if isinstance(node["class_type"], str) else None
        if known is not None and known["output_node"] and (required := list(known["input"].get("required", {}))):
            lost.append(chance.choice(required))
            node["inputs"].pop(lost[-1], None)
    return f"lost {lost}"


def give_inputs(graph: dict[str, Any]) -> None:
    """To nodes that lost the object of their inputs: a host that has taken a prompt with such a node runs nothing any more."""
    for node in graph.values():
        if isinstance(node, dict) and not isinstance(node.get("inputs"), dict):
            node["inputs"] = {}


def around(body: dict[str, Any], chance: random.Random, number: int, owner: str) -> str:
    """What stands beside a prompt: whose it is, what is embedded, which id it has; what it was. A client_id that is a list or an
    object is not among it: the host itself goes down at its first message to one."""
    told = ""
    whose = chance.random()
    if whose < 0.6:
        body["client_id"] = owner
    elif whose < 0.75:
        body["client_id"] = chance.choice(
            [None, "", 5, True, 0.5, "nobody", "\ud800", "x" * 5000, f"{owner} ", owner.upper()]
        )
        told += f" client {str(body['client_id'])[:20]!r}"
    if chance.random() < 0.2:
        info = copy.deepcopy(chance.choice(INFOS))
        body["extra_data"] = {"extra_pnginfo": info}
        told += f" info {str(info)[:40]!r}"
    if chance.random() < 0.1:
        body["prompt_id"] = f"{chance.choice(IDS).replace('{}', MARK)}{number}"
        told += " prompt_id"
    if chance.random() < 0.03:
        name, value = chance.choice([("partial_execution_targets", ["5", 5, None]), ("partial_execution_targets", []), ("front", 1),
                                     ("extra_data", "abc"), ("extra_data", None), ("number", "abc"), ("number", -1),
                                     ("extra_data", {"client_id": owner}), ("partial_execution_targets", 5)])  # fmt: skip
        body[name] = value
        told += f" {name}"
    return told


def a_prompt(
    info: dict[str, Any], chance: random.Random, number: int, owner: str, of_shipped: bool
) -> tuple[str, dict[str, Any]]:
    """(what it is, the body for POST /prompt)."""
    graph = shipped(chance, number) if of_shipped else built(info, chance, number)
    told = [chance.choice(list(graph.values()))["class_type"]]
    for _ in range(chance.choice([0, 1, 1, 2, 3] if of_shipped else [0, 0, 1, 1, 2])):
        told.append(spoil(graph, chance, number))
        if not all(isinstance(each["class_type"], str) for each in graph.values()):
            break
    if of_shipped and number % RUN_ONE_OF:
        told.append(lose(graph, info, chance))
    if of_shipped and chance.random() < 0.25:
        told.append(damage_header(graph, chance))
        if number % 100:
            give_inputs(graph)
    elif not of_shipped and number % BUILT_ONE_OF:
        told.append(lose(graph, info, random.Random(number)))
    body: dict[str, Any] = {"prompt": graph}
    told.append(around(body, chance, number, owner))
    return "; ".join(told), body
