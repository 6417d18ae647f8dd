"""Why a text that a stranger wrote cannot be read, in words that help."""

from __future__ import annotations

import json


def text_fault(error: Exception) -> str:
    """What `error`, from reading JSON or TOML, says to whoever wrote the text: a few words. Of long numbers, other encodings and
    depth Python's own words help nobody."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.lower()} at character {error.pos}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeError):
        return "not UTF-8"
    if type(error) is ValueError:
        return "a number has too many digits"
    return str(error)
