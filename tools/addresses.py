"""The pack's addresses, in one place: whose repository it is, who publishes it, where its pictures are.

    python -m tools.addresses     # write them into pyproject.toml

The two names below are the setting; all else follows from them. Neither has been made yet (CONTRIBUTING.md lists what is to be
made). A test holds pyproject.toml and CONTRIBUTING.md to them. Standard library only.
"""

from __future__ import annotations

import re
import sys

from tools.setup_host import ROOT

ORGANISATION = "comfyui-adastate"  # on github.com
PUBLISHER = "adastate"  # on registry.comfy.org

NAME = "ComfyUI-AdaState"
REPOSITORY = f"https://github.com/{ORGANISATION}/{NAME}"
_PICTURES = f"https://raw.githubusercontent.com/{ORGANISATION}/{NAME}/main/docs/images"

# the keys of pyproject.toml that hold an address
ADDRESSES = {
    "Repository": REPOSITORY,
    "Documentation": f"{REPOSITORY}#readme",
    '"Bug Tracker"': f"{REPOSITORY}/issues",
    "PublisherId": PUBLISHER,
    "Icon": f"{_PICTURES}/icon.png",
    "Banner": f"{_PICTURES}/banner.png",
}
# what somebody has to make before the pack can be published: what it is, and where
TO_BE_MADE = {
    "the organisation": f"https://github.com/{ORGANISATION}",
    "the repository": REPOSITORY,
    "the publisher": f"https://registry.comfy.org/publishers/{PUBLISHER}",
    "the icon": ADDRESSES["Icon"],
    "the banner": ADDRESSES["Banner"],
}


def written(project: str) -> str:
    """The text of pyproject.toml with these addresses. ValueError for a key that it does not have exactly once."""
    for key, address in ADDRESSES.items():
        project, count = re.subn(rf"(?m)^{re.escape(key)} = \".*\"$", lambda _: f'{key} = "{address}"', project)  # noqa: B023
        if count != 1:
            raise ValueError(f"pyproject.toml has {key} {count} times; it must be there once")
    return project


def main() -> int:
    """Write them, and say what is to be made."""
    path = ROOT / "pyproject.toml"
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
    for what, address in TO_BE_MADE.items():
        sys.stdout.write(f"{what}: {address}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
