"""JSON and YAML that somebody else wrote: read, or a few words for why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parsed(text: str | bytes) -> Any:
    """JSON. ValueError, a few words such as "expecting value at character 0", for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(_fault(error)) from error


def read_text(path: Path) -> str:
    """A whole file of UTF-8, with or without a mark at its beginning. ValueError, a few words, where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise ValueError(_fault(error)) from error


def read_yaml_table(path: Path) -> dict[str, Any]:
    """Names and values of a YAML file, none of an empty one. ValueError, a few words, for anything else."""
    import yaml

    text = read_text(path)
    try:
        found = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"no YAML at line {mark.line + 1}" if mark else "no YAML") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError("no table of names and values")
    return found


def _fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.lower()} at character {error.pos}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, OSError):
        return str(error.strerror or error).lower()
    return "not UTF-8" if isinstance(error, UnicodeError) else "a number has too many digits"
