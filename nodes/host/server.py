"""The host's server, where there is one."""

from __future__ import annotations

import sys
from typing import Any


def prompt_server() -> Any:
    """The host's server, or None in a process that has none."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def has_client() -> bool:
    """Whether somebody's client is shown the prompt under way. Of one that was queued without a client_id the host sends what is
    shown to every socket that is open, where nobody asked for it. Without a server there is no socket."""
    server = prompt_server()
    return server is None or getattr(server, "client_id", None) is not None
