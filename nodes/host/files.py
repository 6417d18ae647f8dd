"""The host's folders: where videos and states are written and found, and what is embedded in them."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from ...adastate_core.files.whole_file import reserve
from .api import io, ui

PACK = Path(__file__).resolve().parents[2]
STATE_SUFFIX = ".state.safetensors"
ABSORPTION_SUFFIX = ".absorption.safetensors"


def add_own_models() -> None:
    """Put the pack's models/ on the host's search paths, so that the standard loaders list the demo weights."""
    for kind in ("diffusion_models", "vae"):
        folder_paths.add_model_folder_path(kind, str(PACK / "models" / kind))


@dataclass(frozen=True)
class Target:
    """A file to be written: its path and how the host's pages address it."""

    path: Path
    subfolder: str
    kind: str

    @property
    def name(self) -> str:
        """The path relative to its folder."""
        return f"{self.subfolder}/{self.path.name}".lstrip("/")

    def result(self) -> ui.SavedResult:
        return ui.SavedResult(self.path.name, self.subfolder, io.FolderType(self.kind))


def new_files(prefix: str, suffixes: list[str], width: int = 0, height: int = 0, kind: str = "output") -> list[Target]:
    """Fresh files of one number under the host's output or temp folder, numbered as the host's own savers do.

    They are created at once, so that two writers do not get the same number, be they of one run or of two servers that
    share the folder. ValueError for a prefix that leads outside.
    """
    for targets in _numbered(prefix, suffixes, width, height, kind):
        made: list[Path] = []
        try:
            for target in targets:
                reserve(target.path)
                made.append(target.path)
            return targets
        except BaseException as error:
            for path in made:
                path.unlink(missing_ok=True)
            if not isinstance(error, FileExistsError):
                raise
    raise AssertionError("numbers do not end")


def _numbered(prefix: str, suffixes: list[str], width: int, height: int, kind: str) -> Iterator[list[Target]]:
    """Names of one number that nobody has yet, number after number; their folder is made."""
    root = folder_paths.get_temp_directory() if kind == "temp" else folder_paths.get_output_directory()
    _inside(Path(root), prefix)
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in itertools.count(counter):
        paths = [Path(folder) / f"{name}_{number:05}_{suffix}" for suffix in suffixes]
        if not any(os.path.lexists(path) for path in paths):
            yield [Target(path, subfolder, kind) for path in paths]


def new_file(prefix: str, suffix: str, width: int = 0, height: int = 0, kind: str = "output") -> Target:
    """One fresh file, as `new_files`."""
    return new_files(prefix, [suffix], width, height, kind)[0]


def check_prefix(prefix: str) -> str | None:
    """Why a filename prefix cannot be used, or None."""
    try:
        _inside(Path(folder_paths.get_output_directory()), prefix)
    except ValueError as error:
        return str(error)
    return None


def _inside(root: Path, relative: str) -> Path:
    base = Path(os.path.abspath(root))
    path = Path(os.path.abspath(base / relative))  # links inside the folder are the user's own
    if not relative or "\0" in relative or len(relative) > 200 or not path.is_relative_to(base) or path == base:
        raise ValueError(
            f"{relative!r} does not name a file inside the host's folder; give a plain name like video/take"
        )
    return path


def saved_files(suffix: str) -> list[str]:
    """All files with this suffix in the output and input folders, newest first, as 'name [output]' or 'name'."""
    found: list[tuple[float, str]] = []
    for root, mark in ((folder_paths.get_output_directory(), " [output]"), (folder_paths.get_input_directory(), "")):
        for path in Path(root).rglob(f"*{suffix}"):
            with contextlib.suppress(OSError):  # a dangling link, a file that is just being replaced
                found.append((path.stat().st_mtime, path.relative_to(root).as_posix() + mark))
    return [name for _, name in sorted(found, reverse=True)]


def output_file(relative: str) -> Path:
    """A file of the output folder by its relative name. ValueError if it lies outside."""
    return _inside(Path(folder_paths.get_output_directory()), relative)


def saved_path(name: str, what: str) -> Path:
    """The file that a name of `saved_files` stands for. ValueError, naming `what`, if it lies outside or is not there."""
    plain, root = folder_paths.annotated_filepath(name)
    path = _inside(Path(root or folder_paths.get_input_directory()), plain.strip())
    if not path.is_file():
        raise ValueError(f"there is no {what} {name!r}; press r to refresh the list, or save one first")
    return path


def check_saved(name: str | None, what: str) -> str | None:
    """Why `name` stands for no saved file, or None; a linked name arrives as None and passes."""
    try:
        if name is not None:
            saved_path(name, what)
    except ValueError as error:
        return str(error)
    return None


def saved_fingerprint(name: str, what: str) -> str:
    """Changes when the file that `name` stands for does."""
    return fingerprint(saved_path(name, what))


def fingerprint(path: Path) -> str:
    """Changes when the file does."""
    return f"{path.name}:{path.stat().st_mtime_ns}:{path.stat().st_size}"


def write_new(prefix: str, suffix: str, write: Callable[[Path], object]) -> str:
    """A fresh output file made by `write`, which gives it its name last and raises FileExistsError if another server has
    taken that meanwhile; its name as `saved_files` lists it."""
    for (target,) in _numbered(prefix, [suffix], 0, 0, "output"):
        with contextlib.suppress(FileExistsError):
            write(target.path)
            return f"{target.name} [output]"
    raise AssertionError("numbers do not end")


def save_metadata(hidden: Any) -> dict[str, Any]:
    """What the host's own savers embed: the workflow and the prompt, unless the host runs with --disable-metadata."""
    if args.disable_metadata:
        return {}
    metadata = dict(hidden.extra_pnginfo or {})
    if hidden.prompt is not None:
        metadata["prompt"] = hidden.prompt
    return metadata
