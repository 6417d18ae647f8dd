"""The folders of a run's frames in the host's output folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import folder_paths

from ...adastate_core.files.whole_file import sync_folder
from ...adastate_core.states.disk_room import free_bytes
from ...adastate_core.video.frame_folder import read_sequence
from ...adastate_core.video.frame_formats import FRAME_FORMATS
from .output_files import Target, numbered, require_alone, telling

# what a page shows as a picture
_SHOWN = (".png", ".webp")


class NewFolders:
    """The folders of one run's frames, one an ending (".frames", "b0.frames"): fresh, empty ones of one number, made at once, so
    that no other server takes it. `remove` takes them away again with all that is in them. ValueError for a prefix that cannot be
    used, OSError if the folder takes none."""

    named = True

    def __init__(self, prefix: str, endings: list[str], width: int = 0, height: int = 0) -> None:
        self.targets: list[Target] = []
        for targets in numbered(prefix, endings, width, height, "output"):
            try:
                self._make(targets)
            except FileExistsError:
                self.remove()
                continue
            except BaseException:
                self.remove()
                raise
            return

    def _make(self, targets: list[Target]) -> None:
        self.targets = []
        for target in targets:
            with telling(target.path):
                os.mkdir(target.path)
            self.targets.append(target)
            sync_folder(target.path.parent)
        require_alone(targets)

    @property
    def paths(self) -> list[Path]:
        return [target.path for target in self.targets]

    def name(self) -> None:
        """They have their names."""

    def forget(self) -> None:
        """They have no other names."""

    def remove(self) -> None:
        for path in self.paths:
            with contextlib.suppress(OSError):
                shutil.rmtree(path)


def shown_frames(folders: list[Target]) -> dict[str, Any]:
    """What the host's page is told of frames: an animation, or the last picture, of the first folder that a page can show."""
    for folder in folders:
        about = read_sequence(folder.path)
        if about is None or FRAME_FORMATS[about.format].suffix not in _SHOWN:
            continue
        names = [entry.name for entry in os.scandir(folder.path) if entry.name.endswith(_SHOWN)]
        last = max(names, key=lambda name: (len(name), name), default=None)  # six digits, or more
        if last is not None:
            pictures = [{"filename": last, "subfolder": folder.name, "type": folder.kind}]
            return {"images": pictures, "animated": (FRAME_FORMATS[about.format].animated,)}
    return {}


def output_room() -> int | None:
    """Bytes that the disk of the output folder has left for us; None where it does not say."""
    return free_bytes(Path(folder_paths.get_output_directory()))
