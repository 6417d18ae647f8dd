"""What a filename prefix may be: inside the host's folder, of characters that a file can be served with, and short enough
for the longest name that will be made of it."""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections.abc import Iterable
from pathlib import Path

STATE_SUFFIX = ".state.safetensors"
ABSORPTION_SUFFIX = ".absorption.safetensors"
VIDEO_SUFFIX = ".mp4"
# what may come to lie under one name: videos, a folder of frames, the last state, the states kept on the way, the report
FRAMES_SUFFIX = ".frames"
BESIDE_VIDEO = (VIDEO_SUFFIX, ".mov", ".mkv", FRAMES_SUFFIX, STATE_SUFFIX, ".history", ".report.json")
_NUMBER = "_00001_"
_MOST_NAME = 255  # bytes; on Windows it is UTF-16 units, of which a name never has more than bytes
_MOST_PATH = 4095
_MOST_SHOWN = 40
_WINDOWS = os.name == "nt"
_REFUSED_BY_WINDOWS = re.compile(r'[<>:"|?*]')
_DEVICES = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", re.IGNORECASE)


def inside(root: Path | str, relative: str) -> Path:
    """`relative` under `root`; ValueError if it lies outside or names no file. Links inside the folder are the user's own."""
    base = Path(os.path.abspath(root))
    path = Path(os.path.abspath(base / relative)) if "\0" not in relative else base
    if not relative or not path.is_relative_to(base) or path == base:
        raise ValueError(
            f"{_shown(relative)} does not name a file inside the host's folder; give a plain name like video/take"
        )
    return path


def expanded(prefix: str, width: int = 0, height: int = 0) -> str:
    """A prefix with the host's %tokens% filled in, as its savers do it."""
    now = time.localtime()
    values = {"width": str(width), "height": str(height), "year": str(now.tm_year)}
    parts = {"month": now.tm_mon, "day": now.tm_mday, "hour": now.tm_hour, "minute": now.tm_min, "second": now.tm_sec}
    values |= {name: f"{value:02}" for name, value in parts.items()}
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", value)
    return prefix


def check_names(root: Path | str, prefix: str, endings: Iterable[str], width: int = 0, height: int = 0) -> Path:
    """The path that a prefix stands for under `root`; ValueError unless files of all `endings` can be made of it.

    An ending is what follows the number in a name, such as "b0.mp4".
    """
    _check_characters(prefix)
    path = inside(root, expanded(prefix, width, height))
    above = Path(os.path.abspath(root))
    for folder in path.relative_to(above).parts[:-1]:
        _check_length(prefix, folder, above)
        above /= folder
        if os.path.lexists(above) and not above.is_dir():
            raise ValueError(f"{_shown(prefix)} needs a folder {_shown(folder)}, and that is a file; give another name")
    longest = max(endings, key=lambda ending: len(ending.encode()))
    _check_length(prefix, f"{path.name}{_NUMBER}{longest}", path.parent)
    return path


def check_name(path: Path, prefix: str) -> None:
    """ValueError if a name of a known number is too long."""
    _check_length(prefix, path.name, path.parent)


def _check_characters(prefix: str) -> None:
    for character in prefix:
        kind = unicodedata.category(character)
        if kind == "Cs":
            raise ValueError(
                f"{_shown(prefix)} holds {ascii(character)}, half of a character, which no file's name can; type it again"
            )
        if kind == "Cc" and character != "\0":
            raise ValueError(
                f"{_shown(prefix)} holds {ascii(character)}, a control character (a line break, a tab); give a name of one "
                "line like video/take"
            )
    if not _WINDOWS:
        return
    for part in re.split(r"[/\\]", prefix):
        plain = part not in (".", "..")
        if _REFUSED_BY_WINDOWS.search(part) or plain and (_DEVICES.fullmatch(part) or part != part.rstrip(". ")):
            raise ValueError(
                f'{_shown(prefix)} holds {_shown(part)}, which Windows takes for no name; leave out <>:"|?*, names like CON, '
                "and a dot or a space at the end"
            )


def _check_length(prefix: str, name: str, folder: Path) -> None:
    size, most = len(os.fsencode(name)), _most_bytes(folder)
    if size > most:
        raise ValueError(
            f"{_shown(prefix)} makes a name of {size} bytes, ending in {name[-32:]}, and a name may have {most}; shorten it by "
            f"{size - most} bytes (a letter beyond English takes 2 to 4)"
        )
    if not _WINDOWS and len(os.fsencode(folder / name)) > _MOST_PATH:
        raise ValueError(f"{_shown(prefix)} makes a path of more than {_MOST_PATH} bytes; use fewer or shorter folders")


def _most_bytes(folder: Path) -> int:
    """How many bytes a name may have in `folder`, or in the nearest one above that is there: 255, or fewer."""
    for each in (folder, *folder.parents):
        try:
            return min(_MOST_NAME, os.pathconf(each, "PC_NAME_MAX"))
        except AttributeError:  # Windows
            break
        except (OSError, ValueError):
            continue
    return _MOST_NAME


def _shown(text: str) -> str:
    """A name in a sentence: short, on one line."""
    return repr(text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "...")
