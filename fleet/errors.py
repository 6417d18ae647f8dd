"""What a user of the fleet can cause, and what a host can do to a row."""

from __future__ import annotations


class FleetError(Exception):
    """Something that the user has to change; its text is for them, `code` is the exit status."""

    def __init__(self, text: str, code: int = 2) -> None:
        super().__init__(text)
        self.code = code


class HostLost(Exception):
    """A host does not answer any more, or has forgotten a prompt; the text says which and what was seen last."""


class Refused(Exception):
    """A host did not take a prompt; the text says why, node by node."""
