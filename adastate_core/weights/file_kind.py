"""What a file of weights is by its first bytes, so that what is none is refused in words that say what to do about it."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

from .pickle_size import TooMuch, check_pickle

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_LOOKED_AT = 512  # bytes
_AGAIN = "download it again"
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_PACKED = {
    b"\x1f\x8b": "gzip", b"\xfd7zXZ\x00": "xz", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
}  # fmt: skip
_NAME_LETTERS = 120
_MOST_PICKLE = 2**28  # bytes; that of a model of 14B has some 100,000


class CheckpointError(ValueError):
    """A file that is no checkpoint, in one sentence that names it."""


def unreadable(path: Path, reason: str) -> CheckpointError:
    """The sentence that all files share that hold no weights."""
    return CheckpointError(f"{path.name} cannot be read as a checkpoint: {reason}")


def shown_name(name: object) -> str:
    """A name out of a file for a sentence: on one line and short, whatever the file holds."""
    text = str(name)[: 2 * _NAME_LETTERS]
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _NAME_LETTERS else text[:_NAME_LETTERS] + "..."


def check_kind(path: Path) -> None:
    """CheckpointError where the first bytes, or a torch file's table of contents, show that `path` cannot be read."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise unreadable(path, "it is a folder or a device and no file; choose the file in it that holds the weights")
    with path.open("rb") as file:
        head = file.read(_LOOKED_AT)
    is_torch, is_zip = path.suffix.lower() in TORCH_SUFFIXES, head.startswith(b"PK\x03\x04")
    # first of all: the length that a safetensors file begins with may look like anything
    is_safetensors = head[8:9] == b"{" and head[6:8] == b"\0\0"
    if not is_safetensors and (reason := _other(head, path.stat().st_size)):
        raise unreadable(path, reason)
    if is_torch and is_zip and not is_safetensors:
        _check_zip(path)
    elif is_torch and is_safetensors:
        raise unreadable(path, "it is a safetensors file under another name; rename it to end in .safetensors")
    elif is_torch:
        raise unreadable(path, f"it is no torch file and no file of weights that is known here; {_AGAIN}")
    elif is_zip and not is_safetensors:
        raise unreadable(path, "it is a torch file or a zip archive under another name; rename it to end in .pt")


def _other(head: bytes, size: int) -> str:
    """What a file is by its first bytes, and what to do, where it is neither a torch file of today nor safetensors."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return f"it is empty (0 bytes); {_AGAIN}"
    if not any(head):
        return f"it begins with zeros only, as a download that has not ended does; {_AGAIN}"
    if start.startswith(b"version https://git-lfs"):
        return (
            f"it is a git-lfs pointer, a text of {size} bytes that stands for the weights; run git lfs pull in its folder, or "
            "download the file itself"
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return f"it is a web page that was saved under this name and no weights; {_AGAIN} from the page of the file"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file; load it with a GGUF loader and choose its system with Model Preset"
    if name := next((name for magic, name in _PACKED.items() if head.startswith(magic)), None):
        return f"it is a packed archive ({name}); unpack it and choose the file of weights that is in it"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it and choose the file of weights that is in it"
    if head[:1] == b"\x80":
        if _LEGACY in head[:32]:
            return (
                "it is in torch's file format from before version 1.6, which is not read here; where you trust it, load it "
                "with torch.load and save it again with torch.save, or as safetensors"
            )
        return (
            "it is a pickle that torch.save did not write, which may run code and is not read; take a safetensors file"
        )
    if start.startswith((b"{", b"[")) and _is_text(head):
        return (
            "it is a text in JSON (an index or settings) and no weights; choose the file of weights that lies beside it"
        )
    if _is_text(head):
        return f"it is a text of {size} bytes and no weights; {_AGAIN}"
    return ""


def _is_text(head: bytes) -> bool:
    return not any(byte < 9 or 13 < byte < 32 or byte == 127 for byte in head)


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except Exception as error:  # a damaged table of contents raises whatever its numbers lead to
        raise unreadable(path, f"its end is missing or damaged, so the download was cut short; {_AGAIN}") from error
    _check_parts(path, parts)
    _check_pickles(path, [part for part in parts if part.filename.endswith("data.pkl")])


def _check_parts(path: Path, parts: list[zipfile.ZipInfo]) -> None:
    """CheckpointError for an archive that is none of torch's, by its table of contents."""
    names = [part.filename for part in parts]
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        raise unreadable(path, "it is a TorchScript program and no plain weights; take a safetensors file")
    if not any(name.endswith("data.pkl") for name in names):
        raise unreadable(
            path, "it is a zip archive that torch.save did not write; unpack it and choose the weights in it"
        )
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise unreadable(path, "a zip program has packed it again; unpack the original, or download the file again")


def _check_pickles(path: Path, parts: list[zipfile.ZipInfo]) -> None:
    """CheckpointError for a pickle that cannot be read to its end, or would take far more than its size to read."""
    for part in parts:
        if part.file_size > _MOST_PICKLE:
            raise unreadable(path, f"its table of weights has {part.file_size} bytes, which is more than any; {_AGAIN}")
        try:
            with zipfile.ZipFile(path) as archive:
                check_pickle(archive.read(part))
        except TooMuch as error:
            raise unreadable(path, f"{error}, as one made to harm; take a safetensors file") from error
        except Exception as error:  # as above
            raise unreadable(path, f"its table of weights is damaged; {_AGAIN}") from error
