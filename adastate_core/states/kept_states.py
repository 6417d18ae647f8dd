"""States kept while a rollout runs, beside its video: points to go back to and to make the rest again from.

`<video>.history/chunk_000012.state.safetensors` is the state after 12 generated chunks. Kept are the multiples of a step
in chunks; when that would be more than the most allowed, the step doubles and every other one goes. So the points stay
spread evenly over the whole video, and the disk holds a bounded number of them.
"""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path

from ..files.whole_file import sync_folder
from ..rollout import RolloutState
from .state_file import save_state, state_chunk

log = logging.getLogger("adastate")
SUFFIX = ".state.safetensors"
FOLDER = ".history"
_NAME = re.compile(r"chunk_([0-9]{6,9})\.state\.safetensors")


def history_folder(state: Path) -> Path:
    """The folder of the history that a state file belongs to: the one it lies in, else the one beside it."""
    if _NAME.fullmatch(state.name) and state.parent.name.endswith(FOLDER):
        return state.parent
    return state.with_name(state.name.removesuffix(SUFFIX) + FOLDER)


def kept_states(folder: Path) -> dict[int, Path]:
    """The states in a history's folder by the number of chunks, which their names tell; all else there is passed over."""
    found = {}
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if (match := _NAME.fullmatch(path.name)) and path.is_file():
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def state_at(file: Path, chunk: int) -> Path:
    """The state after `chunk` generated chunks, or the nearest one before, of the rollout that the state `file` is of.

    ValueError, listing what is kept, where there is none, and for a file that is not what its name says.
    """
    folder = history_folder(file)
    found = kept_states(folder)
    end = folder.with_name(folder.name.removesuffix(FOLDER) + SUFFIX)
    own = None
    with contextlib.suppress(ValueError):  # the last state may be missing or broken; the history is good without it
        own = state_chunk(end)
    if own is not None:
        found.setdefault(own, end)
    earlier = [number for number in found if number <= chunk]
    if not earlier:
        kept = f"those after chunks {', '.join(map(str, sorted(found)))} are" if found else "none is"
        raise ValueError(
            f"no state of {end.name.removesuffix(SUFFIX)} at or before chunk {chunk} is kept, {kept}; give a later chunk, or "
            "set history_chunks on Stream To Video before the run"
        )
    path = found[max(earlier)]
    if path != end and (really := state_chunk(path)) != max(earlier):
        raise ValueError(f"{path.name} holds the state after chunk {really}; rename it back, or choose another chunk")
    return path


class StateHistory:
    """The history that one run writes: a state every `every` chunks, `most` at most."""

    def __init__(self, folder: Path, every: int, most: int) -> None:
        if every < 1 or most < 1:
            raise ValueError(f"a history keeps at least 1 state every 1 or more chunks, not {most} every {every}")
        self.folder, self.step, self.most = folder, every, most
        self._kept: dict[int, Path] = {}
        self.left: list[Path] = []  # states that could not be removed

    @property
    def kept(self) -> list[int]:
        """Chunks after which a state is kept, ascending."""
        return sorted(self._kept)

    def wants(self, chunk: int) -> bool:
        """Whether the state after `chunk` generated chunks is one to keep."""
        return chunk > 0 and chunk not in self._kept and chunk % self._step_with_room() == 0

    def keep(self, state: RolloutState) -> None:
        """Write a state that was wanted; those that have to make room go first, so there are never more than `most`.

        The only one there is goes last. A crash leaves whole files only. OSError if the disk does not take it.
        """
        self.tidy()
        self.step = self._step_with_room()
        going = {chunk: path for chunk, path in self._kept.items() if chunk % self.step}
        last = len(going) == len(self._kept)  # the only one stays until the new one is there
        if not last:
            self._remove(going)
        if not self.folder.is_dir():
            self.folder.mkdir(exist_ok=True)
            sync_folder(self.folder.parent)
        name = f"chunk_{state.next_chunk:06}{SUFFIX}"
        self._kept[state.next_chunk] = save_state(state, self.folder / name, beside=self.folder.parent)
        if last:
            self._remove(going)

    def at(self, chunk: int) -> Path:
        """The state after `chunk` chunks, which is kept."""
        return self._kept[chunk]

    def go_back(self, chunk: int) -> None:
        """The rollout goes on from the state after `chunk` chunks: those behind go. No power cut brings them back, since the video
        is theirs no more."""
        self._remove({number: path for number, path in self._kept.items() if number > chunk})
        sync_folder(self.folder)

    def _remove(self, going: dict[int, Path]) -> None:
        for chunk, path in going.items():
            self._kept.pop(chunk)
            self.left.append(path)
        self.tidy()

    def tidy(self) -> None:
        """Remove what had to make room; what another program holds is left, and tried again with the next state."""
        for path in self.left.copy():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s could not be removed (%s); it is tried again", path.name, error.strerror or error)
            else:
                self.left.remove(path)

    def _step_with_room(self) -> int:
        step = self.step
        while sum(chunk % step == 0 for chunk in self._kept) >= self.most:
            step *= 2
        return step
