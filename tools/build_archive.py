"""Build the archive that the registry would get: the files git knows, less those of .comfyignore.

python -m tools.build_archive [node.zip]

The same files always give the same bytes. Standard library only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say


def pattern_expression(pattern: str) -> re.Pattern[str]:
    """A gitignore pattern (without its `!`) as an expression that fits the whole path of an ignored file or folder."""
    body = pattern.rstrip("/")
    anchored = "/" in body
    parts = []
    for piece in re.findall(r"\*\*/|/\*\*$|\*|\?|\[!?\]?[^]]*\]|\\.|.", body.removeprefix("/")):
        if piece == "**/":
            parts.append("(?:.*/)?")
        elif piece == "/**":
            parts.append("/.*")
        elif piece == "*":
            parts.append("[^/]*")
        elif piece == "?":
            parts.append("[^/]")
        elif piece.startswith("[") and len(piece) > 1:
            parts.append(piece.replace("[!", "[^"))
        else:
            parts.append(re.escape(piece[-1]))
    # a folder's pattern needs something inside it: only files are asked about
    inside = "/.+" if pattern.endswith("/") else "(?:/.+)?"
    return re.compile(("" if anchored else "(?:.*/)?") + "".join(parts) + inside, re.DOTALL)


def kept(paths: Iterable[str], ignore_lines: Iterable[str]) -> list[str]:
    """The paths that no line of an ignore file takes out; the last line that fits decides, `!` brings back."""
    rules = []
    for line in map(str.strip, ignore_lines):
        if line and not line.startswith("#"):
            rules.append((line.startswith("!"), pattern_expression(line.removeprefix("!"))))

    def ignored(path: str) -> bool:
        return not next((back for back, rule in reversed(rules) if rule.fullmatch(path)), True)

    return [path for path in paths if not ignored(path)]


def repository_files(root: Path = ROOT) -> list[str]:
    """What git tracks; where there is no git, all files but those of hidden folders and caches."""
    done = None
    if (root / ".git").exists():
        done = subprocess.run(["git", "-C", root, "ls-files", "-z"], capture_output=True, text=True, check=False)
    if done is not None and done.returncode == 0:
        names = [name for name in done.stdout.split("\0") if name]
    else:
        names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        names = [name for name in names if not re.search(r"(^|/)(\.(?!github/)[^/]+|__pycache__|output)/", name)]
    return sorted(name for name in names if (root / name).is_file())


def archive_files(root: Path = ROOT) -> list[str]:
    """The paths that go into the archive."""
    return kept(repository_files(root), (root / ".comfyignore").read_text(encoding="utf-8").splitlines())


def build(target: Path, root: Path = ROOT) -> list[str]:
    """Write the archive; returns the paths in it."""
    names = archive_files(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, _FIRST_DATE)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, (root / name).read_bytes())
    return names


def main(arguments: list[str]) -> None:
    """Build it and say what is in it."""
    target = Path(arguments[0]) if arguments else ROOT / ".cache" / "node.zip"
    names = build(target)
    sizes: dict[str, int] = {}
    for name in names:
        top = name.split("/")[0]
        sizes[top] = sizes.get(top, 0) + (ROOT / name).stat().st_size
    for top, size in sorted(sizes.items(), key=lambda item: -item[1]):
        sys.stdout.write(f"{size / 1e6:9.3f} MB  {top}\n")
    sys.stdout.write(
        f"{target}: {len(names)} files, {target.stat().st_size / 1e6:.2f} MB of {sum(sizes.values()) / 1e6:.2f}\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
