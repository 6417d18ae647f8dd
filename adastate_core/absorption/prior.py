"""What the corrections of a checkpoint have in common: a prior, fitted on a few videos, that another video's fit is drawn towards.

A prior holds sums, not a solution, so that more videos can join: by layer G and C, each video's about its own means, since the
constant of a correction is the video's own. M0 = (G + lambda I)^-1 C at PRIOR_RIDGE; solve.py draws M towards it. It belongs to a
checkpoint, to how that is rolled out, and to what a layer keeps.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch

from ..files.header_check import Damage, Fields, Tensors, Unreadable, refusal, shown
from ..files.tensor_file import TensorFile, parsed, write_tensors
from .collector import KINDS
from .moments import FIELDS, Moments
from .settings import AbsorptionSettings, blocks_of
from .solve import centred, ridged, solving_device

FORMAT, VERSION = "adastate.absorption-prior", "1"
PRIOR_RIDGE = 0.1
# what has to be as it was in the runs of a prior; sizes and batch need not, since a correction is of channels
BELONGS = ("model", "geometry", "chunk_frames", "window_frames", "anchor", "positions")
_KEPT = ("local_window_frames", "sink_frames")
_FINGERPRINT = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Prior:
    """`grams` and `crosses`: by layer, [blocks, c, c] float32. `runs`: prompt, seed and rows of each video. `belongs_to`: BELONGS
    of a spec's description, with the frames that a switched layer keeps and the number of blocks."""

    belongs_to: dict[str, Any]
    runs: tuple[dict[str, Any], ...]
    grams: Mapping[int, torch.Tensor] = field(repr=False)
    crosses: Mapping[int, torch.Tensor] = field(repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of what it holds."""
        found = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            found.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def matrix(self, layer: int, device: torch.device) -> torch.Tensor:
        """M0 [blocks, c, c] of a layer in float64, where `device` can solve."""
        place = solving_device(device)
        gram, cross = (sums[layer].to(place, torch.float64) for sums in (self.grams, self.crosses))
        return ridged(gram, cross, PRIOR_RIDGE)

    def joined(self, other: Prior) -> Prior:
        """Of the runs of both. ValueError if they belong to other rollouts, or a run is in both."""
        if reasons := _differences(self.belongs_to, other.belongs_to):
            raise ValueError(f"this run cannot join the prior: {'; '.join(reasons)}")
        for run in other.runs:
            if any(run["seed"] is not None and _same(run, mine) for mine in self.runs):
                raise ValueError(
                    f"the prior already holds a run of this prompt and seed {run['seed']}; give it another video"
                )
        sums = (
            {i: mine[i] + theirs[i] for i in mine} for mine, theirs in zip(self._sums(), other._sums(), strict=True)
        )
        return Prior(self.belongs_to, (*self.runs, *other.runs), *sums)

    def check(self, spec: Mapping[str, Any], settings: AbsorptionSettings) -> None:
        """ValueError, with every reason, if a rollout that `spec` describes cannot be drawn towards it."""
        if reasons := _differences(self.belongs_to, _belongs(spec, settings)):
            raise ValueError(f"the prior belongs to other rollouts: {'; '.join(reasons)}")

    def save(self, path: Path | str, new: bool = False) -> Path:
        """Write it. `new`: FileExistsError if there is a file already."""
        header = {"belongs_to": self.belongs_to, "runs": list(self.runs)}
        texts = {"format": FORMAT, "version": VERSION, "prior": json.dumps(header, allow_nan=False)}
        return write_tensors(path, self._tensors(), texts, new)

    def _sums(self) -> tuple[Mapping[int, torch.Tensor], Mapping[int, torch.Tensor]]:
        return self.grams, self.crosses

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{kind}.{i}": tensor
            for kind, sums in zip(("gram", "cross"), self._sums(), strict=True)
            for i, tensor in sums.items()
        }


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return (one["prompt"], one["seed"]) == (other["prompt"], other["seed"])


def _belongs(spec: Mapping[str, Any], settings: AbsorptionSettings) -> dict[str, Any]:
    kept = {name: getattr(settings, name) for name in _KEPT}
    return {name: spec[name] for name in BELONGS} | kept | {"blocks": blocks_of(settings, spec["geometry"]["heads"])}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    said = {"model": "model is another checkpoint", "blocks": "scope head and the others have priors of their own"}
    return [
        said.get(name, f"{name} was {shown(there.get(name))} and is {shown(value)}")
        for name, value in here.items()
        if there.get(name) != value
    ]


def prior_of(spec: Mapping[str, Any], settings: AbsorptionSettings, absorption: Mapping[str, Any]) -> Prior:
    """The prior of one run: of the statistics in its state's `absorption`, which has not switched yet. ValueError without any."""
    if absorption.get("phase") != "warming" or not absorption.get("collector.chunks"):
        raise ValueError(
            "a prior is made of what a rollout collects until it switches, and this one has "
            + ("switched already" if absorption.get("phase") == "switched" else "collected nothing")
            + ": give ISPA Cache Absorption a warmup_frames beyond the video's length, and a local_window_frames well below it"
        )
    items = absorption.get("items", 1)
    grams, crosses, rows = {}, {}, 0
    for i in range(spec["geometry"]["layers"]):
        parts = [
            Moments(*(absorption[f"collector.{kind}.{i}.{name}"] for name in FIELDS))
            for kind in KINDS
            if f"collector.{kind}.{i}.{FIELDS[0]}" in absorption
        ]
        whole = reduce(Moments.merged, parts)
        each = [whole] if items == 1 else [Moments(*(getattr(whole, n)[item] for n in FIELDS)) for item in range(items)]
        sums = [centred(one)[:2] for one in each]
        rows = int(whole.rows.sum())
        grams[i], crosses[i] = (sum(one[k] for one in sums).float() for k in (0, 1))
    origin = absorption.get("origin", {})
    run = {"prompt": str(origin.get("prompt", "")), "seed": origin.get("seed"), "rows": rows}
    return Prior(_belongs(spec, settings), (run,), grams, crosses)


def is_prior(path: Path | str) -> bool:
    """Whether a file says that it is one; False for what cannot be read."""
    try:
        with open(path, "rb") as file:
            return TensorFile(file).texts.get("format") == FORMAT
    except (OSError, MemoryError, Damage):
        return False


def load_prior(path: Path | str) -> Prior:
    """A prior from a file. ValueError, naming file and field, for anything else."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            opened = TensorFile(file)
            texts = Fields(opened.texts, "metadata")
            if opened.texts.get("format") != FORMAT or opened.texts.get("version") != VERSION:
                raise Unreadable(f"it is not a prior of this pack's format version {VERSION}")
            for name in ("format", "version", "checksums"):
                texts.text(name)
            header = Fields(parsed(texts.text("prior")))
            texts.done()
            return _checked(header, Tensors(opened.read(checked=True)))
    except (OSError, MemoryError, Damage) as error:
        raise refusal(path.name, error, "saved prior") from error


def _checked(header: Fields, tensors: Tensors) -> Prior:
    """The prior of a stranger's header and tensors; Damage for what is not one."""
    belongs, runs = header.inner("belongs_to"), []
    geometry = belongs.inner("geometry")
    layers, heads, head_dim = (geometry.whole(name, 1, 10**6) for name in ("layers", "heads", "head_dim"))
    for name in (*BELONGS, *_KEPT):
        belongs.any(name)
    blocks = belongs.whole("blocks", 1, heads)
    if blocks not in (1, heads):
        raise Damage(f"belongs_to.blocks is {blocks}, not 1 or the {heads} heads")
    belongs.done()
    for i, entry in enumerate(header.listed("runs")):
        run = Fields(entry, f"runs[{i}]")
        seed = run.any("seed") if run.values.get("seed", 0) is None else run.whole("seed", 0, 2**64 - 1)
        runs.append({"prompt": run.text("prompt"), "seed": seed, "rows": run.whole("rows", 0, 2**60)})
        run.done()
    header.done()
    sums: dict[str, dict[int, torch.Tensor]] = {"gram": {}, "cross": {}}
    size = heads * head_dim // blocks
    for kind, found in sums.items():
        for i in range(layers):
            found[i] = tensors.take(f"{kind}.{i}", (blocks, size, size), torch.float32)
            if kind == "gram" and bool((found[i].diagonal(dim1=-2, dim2=-1) < 0).any()):
                raise Damage(f"gram.{i} has a diagonal below 0, which sums of squares never have")
    tensors.done()
    return Prior(belongs.values, tuple(runs), sums["gram"], sums["cross"])


def check_named(settings: AbsorptionSettings, prior: Prior | None) -> None:
    """ValueError unless `prior` is the one that the settings name."""
    if settings.prior and not _FINGERPRINT.fullmatch(settings.prior):
        raise ValueError(
            f"prior is {shown(settings.prior)}; it must be the fingerprint of a prior, 16 hexadecimal digits"
        )
    if settings.prior != (prior.fingerprint if prior is not None else ""):
        there = "no prior is given" if prior is None else f"the one that is given is {prior.fingerprint}"
        raise ValueError(
            f"the absorption's prior is {settings.prior or 'none'}, and {there}: load that prior and connect it to prior of ISPA "
            "Cache Absorption"
        )


def with_prior(settings: AbsorptionSettings, prior: Prior) -> AbsorptionSettings:
    """The settings that name this prior."""
    return replace(settings, prior=prior.fingerprint)
