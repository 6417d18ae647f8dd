"""The host's folders: where videos and states are written and found, and what is embedded in them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from ...adastate_core.files.whole_file import Unnamed, not_written, reserve, sync_way
from .api import io, ui
from .listing import listed
from .names import ABSORPTION_SUFFIX, BESIDE_VIDEO, STATE_SUFFIX, VIDEO_SUFFIX, check_name, check_names, inside

PACK = Path(__file__).resolve().parents[2]
_MOST_NAME = 79  # characters of a text's name in a PNG


def add_own_models() -> None:
    """Put the pack's models/ on the host's search paths, so that the standard loaders list the demo weights."""
    for kind in ("diffusion_models", "loras", "vae"):
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


def target_of(path: Path) -> Target:
    """A file that lies in the output folder, as the host's pages address it."""
    subfolder = Path(os.path.relpath(path.parent, folder_paths.get_output_directory())).as_posix()
    return Target(path, "" if subfolder == "." else subfolder, "output")


class NewVideos:
    """The videos of one run, one an ending (".mp4", "b0.mp4"): fresh ones of one number in the host's output folder.

    They grow at `paths`, which are hidden and their own, and take their names when something is in them: a process that is
    killed before leaves nothing that looks like a video. (On a file system without links they have their names at once.)
    `targets` are their names, which `name` may count up while `named` is False. ValueError for a prefix that cannot be used,
    OSError if the folder takes no file.
    """

    def __init__(self, prefix: str, endings: list[str], width: int = 0, height: int = 0) -> None:
        self._numbers = numbered(prefix, endings, width, height, "output")
        self.targets, self.named = next(self._numbers), False
        self._files: list[Unnamed] = []
        try:
            for target in self.targets:
                with telling(target.path):
                    self._files.append(Unnamed(target.path.parent))
            self.paths = [file.path for file in self._files]
            if not all(file.has_links for file in self._files):
                self.name()
        except BaseException:
            self.forget()
            raise

    def name(self) -> None:
        """Give the files their names, of the first number that nobody has; `paths` are the same then. OSError otherwise."""
        while not self.named:
            given: list[tuple[Unnamed, Path]] = []
            try:
                for file, target in zip(self._files, self.targets, strict=True):
                    with telling(target.path):
                        file.name(target.path)
                    given.append((file, target.path))
                require_alone(self.targets)
                self.named = True
            except BaseException as error:
                for file, path in given:
                    file.unname(path)
                if not isinstance(error, FileExistsError):
                    raise
                self.targets = next(self._numbers)
        self.paths = [target.path for target in self.targets]
        self.forget()

    def forget(self) -> None:
        """Remove the hidden names, and with them the files that have no other; Windows keeps one while it is written to."""
        for file in self._files:
            file.discard()

    def remove(self) -> None:
        """Remove the files, named or not; one that something holds stays."""
        self.forget()
        if self.named:
            _remove([target.path for target in self.targets])


def require_alone(targets: list[Target]) -> None:
    """FileExistsError if something came to lie beside new files that would be taken for theirs: another server, which ended
    before its video had a name, may have left a report of this number since names were looked for. Each looks after it has
    taken its own name, so one of the two sees the other."""
    for target in targets:
        for end in BESIDE_VIDEO:
            stem, own = target.path.name.removesuffix(end), target.path.name.endswith(end)
            others = [target.path.with_name(stem + other) for other in BESIDE_VIDEO if other != end]
            if own and any(os.path.lexists(other) for other in others):
                raise FileExistsError(target.path.name)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """An OSError within says which file it was for; that the name is taken is said as it is."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise not_written(path.name, error) from error


def new_files(prefix: str, suffixes: list[str], width: int = 0, height: int = 0, kind: str = "output") -> list[Target]:
    """Fresh files of one number under the host's output or temp folder, numbered as the host's own savers do.

    They are created at once, so that two writers do not get the same number, be they of one run or of two servers that
    share the folder. ValueError for a prefix that cannot be used, OSError, naming the file, if the folder takes none.
    """
    for targets in numbered(prefix, suffixes, width, height, kind):
        made: list[Path] = []
        try:
            for target in targets:
                with telling(target.path):
                    reserve(target.path)
                made.append(target.path)
            require_alone(targets)
            return targets
        except BaseException as error:
            _remove(made)
            if not isinstance(error, FileExistsError):
                raise
    raise AssertionError("numbers do not end")


def numbered(prefix: str, suffixes: list[str], width: int, height: int, kind: str) -> Iterator[list[Target]]:
    """Names of one number that nobody has yet, number after number; their folder is made.

    A number is taken as well where something lies that would belong to the file: a state of another video, its history.
    """
    root = folder_paths.get_temp_directory() if kind == "temp" else folder_paths.get_output_directory()
    _check(root, prefix, suffixes, width, height)
    with telling(Path(root) / prefix):
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
        Path(folder).mkdir(parents=True, exist_ok=True)
        sync_way(Path(folder), Path(root))
    for number in itertools.count(counter):
        start = f"{name}_{number:05}_"
        paths = [Path(folder) / f"{start}{suffix}" for suffix in suffixes]
        for path in paths:
            check_name(path, prefix)
        if not any(os.path.lexists(path) for path in (*paths, *_belonging(Path(folder), start, suffixes))):
            yield [Target(path, subfolder, kind) for path in paths]


def _belonging(folder: Path, start: str, suffixes: list[str]) -> list[Path]:
    """What would be taken for a part of new files: beside a video its state, its history, its report, and the other way."""
    stems = {start + suffix.removesuffix(end) for suffix in suffixes for end in BESIDE_VIDEO if suffix.endswith(end)}
    return [folder / f"{stem}{end}" for stem in stems for end in BESIDE_VIDEO]


def new_file(prefix: str, suffix: str, width: int = 0, height: int = 0, kind: str = "output") -> Target:
    """One fresh file, as `new_files`."""
    return new_files(prefix, [suffix], width, height, kind)[0]


def video_endings(batch: int, suffix: str = VIDEO_SUFFIX) -> list[str]:
    """What follows the number in the names of a run's videos, or of its folders of frames."""
    return [suffix] if batch == 1 else [f"b{item}{suffix}" for item in range(batch)]


def _check(root: str, prefix: str, endings: list[str], width: int = 0, height: int = 0) -> None:
    """ValueError unless files of all `endings` can be made of a prefix, by this host's own rule for links too."""
    path = check_names(root, prefix, endings, width, height)
    leads_out = not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(root))
    if leads_out and not _writes_through_links():
        raise ValueError(
            f"{prefix!r} leads out of the host's folder through a link, and this ComfyUI writes nothing there; give a name in the "
            "folder itself (what lies behind the link is listed and loads)"
        )
    _check_writable(path.parent, prefix)


def _check_writable(folder: Path, prefix: str) -> None:
    """ValueError if the system says that nothing can be written to a folder, or to where it would be made: a disk that is mounted
    read-only, a folder of another user's. It is asked before models are loaded; whoever writes is told all the same."""
    there = next((each for each in (folder, *folder.parents) if each.is_dir()), None)
    if there is not None and not os.access(there, os.W_OK):
        raise ValueError(
            f"{prefix!r} cannot be written: the folder {there.name!r} is read-only, or its disk is, or it is another user's; "
            "make it writable, or start ComfyUI with another folder"
        )


@functools.cache
def _writes_through_links() -> bool:
    """Whether the host gives names behind a link that leads out of the folder: newer ones do not. Tried once, beside its own
    folders; where no link can be made, none has to be followed."""
    with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as root:
        try:
            os.symlink(there, os.path.join(root, "link"))
        except OSError:
            return True
        try:
            folder_paths.get_save_image_path("link/name", root)
        except Exception:  # noqa: BLE001  the host raises a bare one
            return False
        return True


def check_prefix(prefix: str, suffix: str, kind: str = "output") -> str | None:
    """Why a filename prefix cannot be used for files of this suffix, or None. Beside an output video lies its state."""
    endings = BESIDE_VIDEO if suffix == VIDEO_SUFFIX and kind == "output" else [suffix]
    root = folder_paths.get_temp_directory() if kind == "temp" else folder_paths.get_output_directory()
    try:
        _check(root, prefix, endings)
    except ValueError as error:
        return str(error)
    return None


def check_video_prefix(prefix: str, batch: int, width: int, height: int) -> None:
    """ValueError unless the names of a run's videos and of all that lies beside them can be made of `prefix`."""
    stems = [ending.removesuffix(VIDEO_SUFFIX) for ending in video_endings(batch)]
    endings = [f"{stem}{end}" for stem in stems for end in BESIDE_VIDEO]
    try:
        _check(folder_paths.get_output_directory(), prefix, endings, width, height)
    except ValueError as error:
        raise ValueError(f"filename_prefix {error}") from error


def saved_files(suffix: str) -> list[str]:
    """All files with this suffix in the output and input folders and in what is linked there, newest first, as
    'name [output]' or 'name'."""
    found: list[tuple[float, str]] = []
    for root, mark in ((folder_paths.get_output_directory(), " [output]"), (folder_paths.get_input_directory(), "")):
        found += [(time, name + mark) for time, name in listed(root, suffix, (STATE_SUFFIX, ABSORPTION_SUFFIX))]
    return [name for _, name in sorted(found, reverse=True)]


def output_file(relative: str) -> Path:
    """A file of the output folder by its relative name. ValueError if it lies outside."""
    return inside(folder_paths.get_output_directory(), relative)


def saved_path(name: str, what: str) -> Path:
    """The file that a name of `saved_files` stands for. ValueError, naming `what`, if it lies outside or is not there."""
    plain, root = folder_paths.annotated_filepath(name)
    folder = root or folder_paths.get_input_directory()
    for each in dict.fromkeys(
        (plain, plain.strip())
    ):  # a name may begin with a space, and one that was typed have one more
        if (path := inside(folder, each)).is_file():
            return path
    raise ValueError(f"there is no {what} {name!r}; press r to refresh the list, or save one first")


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
    taken that meanwhile; its name as `saved_files` lists it. OSError, naming the file, if the disk does not take it."""
    for (target,) in numbered(prefix, [suffix], 0, 0, "output"):
        with contextlib.suppress(FileExistsError), telling(target.path):
            write(target.path)
            return f"{target.name} [output]"
    raise AssertionError("numbers do not end")


def save_metadata(hidden: Any) -> dict[str, Any]:
    """What the host's own savers embed: the workflow and the prompt, unless the host runs with --disable-metadata. A page may send
    anything beside a prompt; what a file cannot hold of it is left out."""
    if args.disable_metadata:
        return {}
    sent = hidden.extra_pnginfo if isinstance(hidden.extra_pnginfo, Mapping) else {}
    metadata = {
        name: _whole(value) for name, value in sent.items() if name.isprintable() and 0 < len(name) <= _MOST_NAME
    }
    if hidden.prompt is not None:
        metadata["prompt"] = hidden.prompt
    return metadata


def _whole(value: Any) -> Any:
    """A text without halves of UTF-16 pairs, which no file's text can hold; anything else, which is embedded as JSON, as it is."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
