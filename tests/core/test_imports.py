"""How the pack's modules know each other: no circle, counting imports inside functions and those for types alone."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def modules() -> dict[str, Path]:
    """The pack's modules by dotted name."""
    files = [file for room in ("adastate_core", "nodes") for file in sorted((ROOT / room).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a module imports, wherever in it."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            below = {f"{source}.{alias.name}" for alias in node.names}
            found |= (below & set(known)) or ({source} & set(known))
            if not below <= set(known):
                found |= {source} & set(known)
    return found - {name}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(name, file, known) for name, file in known.items()}


def circles(of: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(one: str) -> None:
        index[one] = low[one] = len(index)
        stack.append(one)
        for other in of[one]:
            if other not in index:
                visit(other)
                low[one] = min(low[one], low[other])
            elif other in stack:
                low[one] = min(low[one], index[other])
        if low[one] == index[one]:
            at = stack.index(one)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for one in of:
        if one not in index:
            visit(one)
    return found


def test_a_circle_would_be_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_circle():
    assert circles(graph()) == []


def test_arrows_go_one_way():
    """The core knows no node, a node's adapter to the host knows no node, and the host is known to the adapter alone."""
    for name, others in graph().items():
        if name.startswith("adastate_core"):
            assert not [other for other in others if other.startswith("nodes")], name
        if name.startswith("nodes.host"):
            assert not [other for other in others if other.startswith("nodes.") and "nodes.host" not in other], name
    hosts = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "server", "execution")
    for name, file in modules().items():
        if not name.startswith("nodes.host"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert not [one for one in names if one.split(".")[0] in hosts], name


def room(name: str) -> str:
    """The folder of a module of the core, or the module where it lies in none."""
    return ".".join(name.split(".")[:2])


def test_no_circle_of_rooms():
    rooms: dict[str, set[str]] = {}
    for name, others in graph().items():
        if name.startswith("adastate_core."):
            rooms.setdefault(room(name), set()).update({room(o) for o in others if o != "adastate_core"} - {room(name)})
    for others in list(rooms.values()):
        for other in others:
            rooms.setdefault(other, set())
    assert circles(rooms) == []


def test_no_two_modules_share_a_name():
    names = [name.split(".")[-1] for name, file in modules().items() if file.name != "__init__.py"]
    assert len(names) == len(set(names))
