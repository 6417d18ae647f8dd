"""A system of one's own as a TOML file: the fields of a Preset, and its anchor as a table with a `kind`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..anchors import Anchor, anchor_from
from ..audio.driving import ALIGNMENTS
from ..bounds import BOUNDS
from ..files.text_fault import text_fault
from ..geometry import SPACES
from ..given import BEFORE, STARTS
from ..history import HISTORIES
from ..rope import POSITION_MODES
from .presets import Preset

MOST_BYTES = 1 << 16


def read_preset(path: Path) -> Preset:
    """The preset that a file describes; its `name` is the file's where it gives none. ValueError, in a sentence that names
    the file, for one that describes none. OSError if it cannot be read."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        raise ValueError(f"{path.name} cannot be read: presets as TOML need Python 3.11 or newer") from None
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {MOST_BYTES} bytes, which no preset is")
    try:
        table = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not TOML ({text_fault(error)})") from error
    try:
        return preset_from({"name": path.stem, **table})
    except ValueError as error:
        raise ValueError(f"{path.name} is no preset: {error}") from error


def preset_from(table: dict[str, Any]) -> Preset:
    """The preset of a table of its fields; `title` and `source` may be left out. ValueError, a phrase, for anything else."""
    table = {"title": table.get("name"), "source": "a file of the user's", **table}
    known = {
        one.name: one for one in fields(Preset) if one.name != "cached"
    }  # a preset in a preset, which no text needs
    if strangers := [name for name in table if name not in known]:
        raise ValueError(f"{strangers[0]} is no field of a preset; they are {', '.join(known)}")
    values = {name: _value(name, str(known[name].type), value) for name, value in table.items()}
    if missing := [n for n, one in known.items() if one.default is one.default_factory is MISSING and n not in values]:
        raise ValueError(f"it has no {missing[0]}")
    _check_bounds(values)
    return Preset(**values)


def _value(name: str, kind: str, value: Any) -> Any:
    """A field as the dataclass has it. ValueError where it is of another type."""
    if kind == "Anchor":
        return _anchor(value)
    if kind == "LatentSpace":
        if not isinstance(value, str) or value not in SPACES:
            raise ValueError(f"{name} is {value!r:.60}; it must be one of {', '.join(SPACES)}")
        return SPACES[value]
    plain = {"str": str, "bool": bool, "int": int, "float": float}
    one = kind.removeprefix("tuple[").removesuffix(", ...]")
    several = one != kind
    if several and not isinstance(value, list):
        raise ValueError(f"{name} is {value!r:.60}, not a list")
    for entry in value if several else [value]:
        sound = type(entry) in (int, float) if one == "float" else type(entry) is plain[one]
        if not sound or (isinstance(entry, float) and not abs(entry) < 1e9):
            raise ValueError(f"{name} is {value!r:.60}, not {'a list of ' if several else ''}{one}")
    if one == "float":
        return tuple(map(float, value)) if several else float(value)
    return tuple(value) if several else value


def _anchor(value: Any) -> Anchor:
    if not isinstance(value, dict):
        raise ValueError(f'anchor is {value!r:.60}, not a table such as {{ kind = "static", sink_frames = 3 }}')
    try:
        return anchor_from(value)
    except TypeError as error:
        raise ValueError(f"anchor has other fields than its kind ({error})") from error


def _check_bounds(values: dict[str, Any]) -> None:
    """What a rollout takes, so that a preset fails here and not in it."""
    for name, value in values.items():
        if (bound := BOUNDS.get(name)) is not None and not bound.holds(value):
            raise ValueError(f"{name} is {value}; it must be between {bound.least:g} and {bound.most:g}")
    if values.get("positions", "packed") not in POSITION_MODES:
        raise ValueError(f"positions is {values['positions']!r}; it must be one of {', '.join(POSITION_MODES)}")
    if values.get("start", BEFORE) not in STARTS:
        raise ValueError(f"start is {values['start']!r:.60}; it must be one of {', '.join(STARTS)}")
    for name, options in (("history", HISTORIES), ("audio", ALIGNMENTS)):
        if values.get(name, options[0]) not in options:
            raise ValueError(f"{name} is {values[name]!r:.60}; it must be one of {', '.join(options)}")
    if not 0 <= values.get("reference_rolls", 0) <= 10**6:
        raise ValueError(f"reference_rolls is {values['reference_rolls']}; it must be a latent frame, or 0 for never")
    if any(not 0 < level <= 1 for level in values.get("levels", ())):
        raise ValueError(f"levels are {list(values['levels'])}; each must lie in (0, 1]")
    for name in ("timesteps", "first_timesteps"):
        if any(not 0 < t <= 1000 for t in values.get(name, ())):
            raise ValueError(f"{name} are {list(values[name])}; each must lie in (0, 1000]")
