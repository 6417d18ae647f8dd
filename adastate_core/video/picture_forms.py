"""The forms in which a sink takes pictures, from the least to the most that it can tell apart.

bytes     uint8, 0..255, cut off and not rounded, as the host's own savers do it
integers  uint16, 0..65535, cut off; divided by 257 they are the very bytes that the floats would give
float     float32, 0..1 and as they were decoded

Pictures are made in the deepest form that a sink asks for where they were decoded; sinks of less are given less. Every step is
one IEEE operation an element, so the values are the same on any device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

VALUE_BYTES = {"bytes": 1, "integers": 2, "float": 4}
FORMS = tuple(VALUE_BYTES)
_STEPS = 257  # of 16 bits in one of 8: 65535 / 255


def deepest(takes: Iterable[str]) -> str:
    """The form that holds all that sinks of these forms take; bytes for none. ValueError for a form that is not known."""
    found = list(takes)
    for form in found:
        if form not in FORMS:
            raise ValueError(f"a sink takes {form!r}; a sink may take {', '.join(FORMS)}")
    return max(found, key=FORMS.index, default=FORMS[0])


def in_form(pictures: torch.Tensor, form: str) -> torch.Tensor:
    """[..., 3] float in 0..1 as `form`, on the same device."""
    if form == "float":
        return pictures.float()
    if form == "integers":
        return (pictures.float() * 65535).clamp(0, 65535).to(torch.uint16)
    return (pictures.float() * 255).clamp(0, 255).to(torch.uint8)


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    """[..., 3] in any of the forms to uint8 on the CPU."""
    if pictures.is_floating_point():
        return in_form(pictures, "bytes").cpu()
    if pictures.dtype == torch.uint8:
        return pictures.cpu()
    return torch.from_numpy((pictures.cpu().numpy() // _STEPS).astype("uint8"))


def reduced(pictures: torch.Tensor, takes: str) -> torch.Tensor:
    """Pictures on the CPU, in a form at least as deep as `takes`, as `takes`."""
    if takes == "bytes":
        return to_bytes(pictures)
    if takes == "integers" and pictures.is_floating_point():
        return in_form(pictures, takes)
    return pictures
