"""What is done beside a rollout and must not end it: previews, states, reports. Interrupts pass."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import comfy.model_management

from .progress import soft_empty_cache

log = logging.getLogger("adastate")
Interrupted = comfy.model_management.InterruptProcessingException
Made = TypeVar("Made")
_LONGEST = 200


def attempt(what: str, make: Callable[[], Made], again: bool = False) -> tuple[Made | None, str]:
    """(what `make` gives, "") or, where that failed, (None, why in a few words); the failure is logged under `what`.

    `again`: try a second time after memory was given back. Whatever is an interrupt is raised.
    """
    for left in (again, False):
        try:
            return make(), ""
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001
            why = reason(error)
        log.error("%s: %s%s", what, why, "; trying once more" if left else "")
        if not left:
            break
        free_memory()
    return None, why


@contextlib.contextmanager
def at_the_end(what: str) -> Iterator[None]:
    """For what is done after a run, in its `finally`: where the run has failed, or was interrupted, and this fails too,
    or is interrupted, it is logged and the first failure goes on. After a run that went well it is raised."""
    first = sys.exc_info()[1]
    try:
        yield
    except BaseException as error:
        if first is None:
            raise
        log.error("%s, after %s: %s", what, type(first).__name__, reason(error))


def free_memory() -> None:
    """Give back what memory nothing uses; it never fails."""
    try:
        gc.collect()
        soft_empty_cache()
    except Interrupted:
        raise
    except Exception as error:  # noqa: BLE001  a device that has failed says so here too
        log.warning("memory could not be given back: %s", reason(error))


def reason(error: BaseException, longest: int = _LONGEST) -> str:
    """The first line of what an exception says, or its name."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0][:longest] if lines else type(error).__name__
