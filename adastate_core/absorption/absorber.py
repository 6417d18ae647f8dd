"""The absorption of one run, as it follows the past: warm up while collecting, solve and switch at once, then watch.

    absorber.start_chunk()                       # before a chunk; attention then asks `absorber.corrections` in every pass
    absorber.joins(), absorber.moved()           # with the chunk's commit; from then on the rows of the chunk count
    absorber.catch_up(next_frame)                # after the commit: what is due is solved, switched, measured

`catch_up` makes all new things aside and takes them over at once; then the cache's layers get their new buffers, one after the
other. So it may fail, and is then called again: in this run, or in the run that goes on from its state. Everything public about
ISPA and what is this pack's own choice: docs/design-notes.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..anchors import Anchor
from ..cache.host_copies import HostCopies, frame_block_bytes
from ..cache.kv_cache import KVCache
from ..cache.phases import Phase
from ..cache.slots import LayerSlots
from ..rope import Rope
from .absorbed_phases import NOTHING, SWITCHED, WARMING, Absorbed, switched_layers, watched_of
from .collector import Collector
from .corrections import Corrections
from .host_history import HostHistory
from .items import Collectors, apart, together
from .prior import Prior, check_named
from .sensitivity import Again, changes_without
from .settings import AbsorptionSettings, blocks_of
from .solve import Correction, Fit, Solution, fit, residual
from .told import how_chosen, residuals_told, switch_told
from .warm_up import Learning, why_switched

# how many measurements are kept; when there are more, those of every second instant are forgotten
MOST_WATCHED = 2048


def choose(
    fits: dict[int, Fit], settings: AbsorptionSettings, layers: int, changes: Mapping[int, float] | None = None
) -> tuple[int, ...]:
    """The K layers that absorb best by `settings.select`; ties go to the lower index. `changes`: by layer, how much the picture
    changes without its history. Where all layers are chosen, nothing is asked of `changes`."""
    scores = {
        "residual": lambda layer: fits[layer].residual,
        "discrepancy": lambda layer: fits[layer].discrepancy,
        "explained": lambda layer: -fits[layer].explained,
        "sensitivity": lambda layer: (changes or {}).get(layer, 0.0),
        "saved": lambda layer: (*settings.saved_layers, *fits).index(layer),
    }
    score = scores[settings.select]
    return tuple(sorted(sorted(fits, key=lambda layer: (score(layer), layer))[: settings.layers(layers)]))


class Absorber:
    """Mutable, private to one run, like the cache that it shrinks."""

    def __init__(
        self,
        settings: AbsorptionSettings,
        cache: KVCache,
        anchor: Anchor,
        rope: Rope,
        solution: Solution | None = None,
        prior: Prior | None = None,
    ) -> None:
        """`solution`: one that was made before for the same model, prompt and seed. Nothing is collected if it is given. `prior`:
        the one that the settings name; ValueError for another, or none where something is solved."""
        if solution is None or settings.refresh != "never" or prior is not None:
            check_named(settings, prior)
        self.settings, self.cache, self.anchor = settings, cache, anchor
        pinned = settings.pinned(anchor.frames) if anchor.state_frames else settings.sink_frames
        self.corrections = Corrections(settings, cache, pinned, rope)
        self.prior, self.learning = prior, Learning()
        self.ends = Absorbed(settings, anchor, cache.plan.chunk_frames).ends(cache.plan)
        self.phase = WARMING if settings.layers(len(cache.layers)) and not self.ends.never else NOTHING
        # copied, because solving anew changes the fits, and the given ones belong to the caller
        self.solution = None if solution is None else replace(solution, fits=dict(solution.fits))
        self._given = solution is not None
        # each item has statistics and a correction of its own; in states of earlier packs all have one
        self.items = cache.plan.batch
        # makes a pass again that has been made, for the choice of layers (sensitivity.py); whoever makes passes gives it
        self.again: Again | None = None
        self.full_window = max((layer.window_frames for layer in cache.plan.layers), default=0)
        self.collector = self._collector(range(len(cache.layers)))
        self.watched: list[dict[str, Any]] = []
        # residuals of the watched layers at the switch, one an item; drift is counted from these
        self.first_residuals: dict[int, tuple[float, ...]] = {}
        self.seconds = 0.0
        # the prompt and seed of this run, and those of the run that solved
        self.origin: dict[str, Any] = {}
        self.solved_for: dict[str, Any] = {}
        # for the report: the first frame after the switch, why then, and how the ridges were chosen
        self.switched_at: int | None = None
        self.why = self.how = ""
        self.chunks_since = 0
        # whether the chunks collected wait to be measured
        self.due = False

    def _collector(self, layers: Iterable[int]) -> Collectors:
        blocks, layers = blocks_of(self.settings, self.cache.heads), tuple(layers)
        width, device, apart = self.cache.plan.width, self.cache.device, self.settings.apart
        return Collectors([Collector(layers, width, blocks, device, apart) for _ in range(self.items)])

    def resume_collecting(self, items: int, state: dict[str, Any]) -> None:
        """Go on with the statistics of `state`, of so many items: its batch, or one for all of them."""
        self.items = items
        self.collector = self._collector(self.collector.layers)
        self.collector.restore(state)

    @property
    def histories(self) -> dict[int, HostHistory]:
        """What watched layers have lost, by layer."""
        return self.corrections.histories

    @property
    def _rank(self) -> int | None:
        return self.settings.rank if self.settings.scope == "lowrank" else None

    def _prior_of(self, layer: int) -> torch.Tensor | None:
        return None if self.prior is None else self.prior.matrix(layer, self.cache.device)

    def _fit(self, collector: Collector, layer: int) -> Fit:
        """A layer's fit on what one item, or all of them, collected."""
        parts = (sums[layer] for sums in (collector.seen, collector.held_out))
        ridges = self.settings.ridges(collector.chunks)
        return fit(*parts, ridges, self._rank, collector.between[layer], self._prior_of(layer))

    def start_chunk(self) -> None:
        """Decide what this chunk collects, and forget what an unfinished one left."""
        self.collector.start_chunk()
        if self.phase == WARMING:
            collects = not self._given and bool(self.corrections.parts(self.cache.layers[0], 0)[1])
        else:
            left = self.settings.monitor_chunks - self.chunks_since % self.settings.monitor_chunks
            due = left <= self.settings.measured_chunks
            collects = due and any(len(history) for history in self.histories.values())
        self.corrections.collector = self.collector if collects else None

    def stand_aside(self) -> None:
        """The passes that follow are not a chunk's: nothing is collected from them."""
        self.corrections.collector = None

    def joins(self) -> list[tuple[int, Callable[[], None]]]:
        """(layer, write) for each layer. The write makes the rows of the chunk under way count, and may be run again."""
        return self.collector.joins() if self.corrections.collector is not None else []

    def moved(self) -> None:
        """The chunk is part of the past."""
        collected = self.corrections.collector is not None
        if collected:
            self.collector.close_chunk()
        if self.phase == SWITCHED:
            self.chunks_since += 1
            self.due = collected and self.chunks_since % self.settings.monitor_chunks == 0
        self.corrections.collector = None

    def flushed(self, keep: int) -> None:
        """The full window holds only its `keep` newest frames now. Older frames are no longer history."""
        for layer, history in self.histories.items():
            history.flush(max(0, keep - len(self.cache.layers[layer].window)))

    def mark(self) -> dict[int, Any]:
        """What a transition may change, for `rewind`."""
        return {layer: history.mark() for layer, history in self.histories.items()}

    def rewind(self, mark: dict[int, Any]) -> None:
        for layer, kept in mark.items():
            self.histories[layer].rewind(kept)

    def catch_up(self, next_frame: int, look: object = None) -> None:
        """Solve, switch or measure if that is due. `next_frame` is the index of the next chunk's first frame. `look` is not used:
        everything that is needed was collected while the chunks were made."""
        if self.phase == WARMING and self._over(next_frame):
            self._solve(next_frame)
        elif self.due:
            self._measure(next_frame)

    def _over(self, next_frame: int) -> bool:
        """Whether the warm-up ends here."""
        stopped = False
        if self.settings.switch == "learned" and not self._given:
            self.learning.measure(next_frame, self.collector, self.settings, self._rank, self._prior_of)
            stopped = self.learning.stopped and next_frame >= self.ends.earliest
        return stopped or next_frame >= self.ends.latest

    def _solve(self, next_frame: int) -> None:
        """Fit every layer, choose, and switch the chosen ones at one instant."""
        start = time.perf_counter()
        if self.solution is None and not self.collector.chunks:
            self.find_nothing()
            return
        solution = self._solved() if self.solution is None else self.solution
        pinned = len(self.cache.layers[0].first_of(self.corrections.pinned))
        switch = self._switch(solution, pinned, moved=True)
        collector = self._collecting_on(switch.histories)
        self.switched_at, self.why = next_frame, why_switched(self.settings, self.ends, self.learning)
        self.how = how_chosen(self.settings, 0 if self._given else self.collector.chunks)
        self.collector, self.solved_for = collector, dict(self.origin)
        self._take(solution, switch)
        self.seconds = max(0.0, time.perf_counter() - start)
        self.cache.fit()

    def _solved(self) -> Solution:
        """The fits of all layers, and which are chosen."""
        fits = {i: together([self._fit(one, i) for one in self.collector.each]) for i in self.collector.layers}
        changes = (
            changes_without(self.corrections, self.again, fits, self._on_device)
            if self.settings.selection_passes(len(self.cache.layers))
            else {}
        )
        chosen = choose(fits, self.settings, len(self.cache.layers), changes)
        fits = {i: f if i in chosen else replace(f, correction=None) for i, f in fits.items()}
        return Solution(chosen, fits, changes)

    def passes_due(self, frames: int) -> int:
        """How many passes the choice of layers will take once `frames` latent frames are made; 0 if it is made already, or nothing
        is collected until then."""
        ends = any(phase.name == SWITCHED for phase in self.cache.plan.phases)
        due = self.phase == WARMING and ends and frames >= self.ends.earliest and not self._given
        return self.settings.selection_passes(len(self.cache.layers)) if due else 0

    def find_nothing(self) -> None:
        """There is nothing to absorb: every layer has its whole window from now on."""
        self.phase = NOTHING
        self.cache.enter(Phase(NOTHING, self.cache.plan.layers))
        self.cache.fit()

    def _switch(self, solution: Solution, pinned: int, moved: bool) -> _Switch:
        """What the switch to a solution needs. If `moved`, histories hold what the watched layers are about to lose; else they are
        empty, to be restored."""
        chosen = solution.chosen
        layers = switched_layers(self.cache.plan.layers, chosen, self.settings, pinned)
        made = _Switch(Phase(SWITCHED, layers))
        for i in chosen:
            made.standing[i] = self._on_device(solution.fits[i].correction)
        copies = HostCopies(self.cache.device, frame_block_bytes(self.cache.plan))
        for i in watched_of(chosen, self.settings):
            made.histories[i] = HostHistory(max(0, self.full_window - layers[i].ring_frames), copies)
            if moved:
                self._remember(made.histories[i], self.cache.layers[i])
        return made

    def _take(self, solution: Solution, made: _Switch) -> None:
        """From here on the chosen layers are small, although their buffers are still to be made."""
        self.solution, self.phase = solution, SWITCHED
        self.cache.enter(made.phase)
        for i, history in made.histories.items():
            self.cache.layers[i].on_evict = history.push
        self.corrections.switched, self.corrections.histories = True, made.histories
        self.corrections.standing = {i: one for i, one in made.standing.items() if one is not None}

    def resume_switched(self, pinned: int, chunks_since: int, watched: list[dict[str, Any]]) -> None:
        """Go to where a run stood that had switched. Caches and histories are empty, to be restored."""
        self._take(self.solution, self._switch(self.solution, pinned, moved=False))
        self.cache.fit()
        self.collector = self._collector(self.histories)
        self.chunks_since, self.watched = chunks_since, watched

    def _on_device(self, correction: Correction) -> Correction | None:
        """As attention applies it; None for one that does nothing."""
        if not bool(correction.whole().any()) and not bool(correction.constant.any()):
            return None
        return correction.to(self.cache.device, self.cache.plan.dtype)

    def _remember(self, history: HostHistory, layer: LayerSlots) -> None:
        """Copy what the layer is about to lose."""
        for part in self.corrections.parts(layer, 0)[1]:
            for index in range(part.start, part.stop):
                layer.hand_over(index - layer.window_start, history.push)()

    def _measure(self, next_frame: int) -> None:
        """Measure the residuals of the corrections on the newest chunk. Take better corrections if the settings ask for them."""
        entries, firsts, anew = [], dict(self.first_residuals), {}
        for i in self.collector.layers if self.collector.chunks else ():
            before = apart(self.solution.fits[i], self.items)
            first = firsts.setdefault(i, tuple(one.residual for one in before))
            found = [self._measured(i, j, one, first[j]) for j, one in enumerate(before)]
            better = [new for _, _, new in found]
            if any(new is not None for new in better):
                taken = together([new or old for new, old in zip(better, before, strict=True)])
                anew[i] = taken, self._on_device(taken.correction)
            now, discrepancy = (sum(one[k] for one in found) / len(found) for k in (0, 1))
            entry = {"frame": next_frame, "layer": i, "residual": now, "solved_at": self.solution.fits[i].residual}
            entry |= {"refreshed": i in anew, "discrepancy": discrepancy}
            own = {"items": [one[0] for one in found]} if len(found) > 1 else {}
            entries.append(entry | own)
        collector = self._collecting_on(self.histories)
        for i, (better, standing) in anew.items():
            self.solution.fits[i] = better
            if standing is None:
                self.corrections.standing.pop(i, None)
            else:
                self.corrections.standing[i] = standing
        self.watched, self.first_residuals = _bounded(self.watched + entries), firsts
        self.collector, self.due = collector, False

    def _measured(self, layer: int, item: int, old: Fit, first: float) -> tuple[float, float, Fit | None]:
        """(residual, discrepancy, a better fit or None) of one item of a layer on the newest chunk; `first` is its residual at the
        switch."""
        parts = self.collector.each[item]
        seen, newest = parts.seen[layer], parts.held_out[layer]
        whole = newest.merged(seen) if parts.chunks == 1 else newest
        now = residual(whole, old.correction)
        discrepancy = float(whole.missing_energy) / max(float(whole.full_energy), 1e-30)
        wanted = self.settings.refresh == "always" or now > self.settings.drift * first
        asked = self.settings.refresh != "never" and wanted
        return now, discrepancy, self._refresh(layer, parts, old) if asked else None

    def _collecting_on(self, layers: Iterable[int]) -> Collectors:
        """The collector for later measurements. If corrections are solved anew, it has all rows collected so far, else none."""
        if self.settings.refresh != "never" and self.collector.chunks:
            return self.collector.of(layers)
        return self._collector(layers)

    def _refresh(self, layer: int, parts: Collector, old: Fit) -> Fit | None:
        """A layer solved anew for one item; None if the `old` fit does as well on the rows held out."""
        new = self._fit(parts, layer)
        return None if residual(parts.held_out[layer], old.correction) <= new.residual else new

    def _bytes(self) -> dict[str, Any]:
        """Keys and values on the device without absorption, now, and at most; the shares of the cache that absorption gave back now
        and at the peak, wherever the cache lies."""
        cache, plain = self.cache, self.cache.plan.plain
        whole = max(1, plain.kv_bytes + plain.host_bytes)
        return {
            "kv_bytes_before": plain.kv_bytes,
            "kv_bytes_after": cache.nbytes,
            "kv_bytes_peak": cache.peak_nbytes,
            "freed_share": round(1 - (cache.nbytes + cache.host_nbytes) / whole, 4),
            "freed_share_at_peak": round(1 - (cache.peak_nbytes + cache.peak_host_nbytes) / whole, 4),
        }

    def report(self) -> dict[str, Any]:
        """JSON-able: phase, chosen layers and how they were chosen, residuals by layer, bytes, seconds of solve and switch, what
        was watched. Of a batch, residuals are the items' means and the ridge is their largest; `items` are their own."""
        fits = {} if self.solution is None else self.solution.fits
        changes = {} if self.solution is None else self.solution.changes
        return {
            "phase": self.phase,
            "layers": list(self.solution.chosen) if self.solution and self.phase == SWITCHED else [],
            "collected_chunks": self.collector.chunks if self.phase == WARMING else None,
            **self._bytes(),
            "correction_bytes": sum(one.nbytes for one in self.corrections.standing.values()),
            "history_bytes_in_host_memory": sum(history.nbytes for history in self.histories.values()),
            "solve_seconds": round(self.seconds, 4),
            "select": self.settings.select,
            "selection_passes": self.settings.selection_passes(len(self.cache.layers)) if changes else 0,
            "residuals": residuals_told(fits, changes),
            "switch": switch_told(self.settings, self.ends, self.cache.plan, self.switched_at, self.why, self.learning),
            "ridge_chosen": self.how,
            "prior": self.settings.prior or None,
            "monitor": list(self.watched),
        }


@dataclass
class _Switch:
    """What a switch makes of the cache, and by layer what comes with it."""

    phase: Phase
    standing: dict[int, Correction | None] = field(default_factory=dict)
    histories: dict[int, HostHistory] = field(default_factory=dict)


def _bounded(watched: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_WATCHED measurements, spread over the run, the newest among them."""
    if len(watched) <= MOST_WATCHED:
        return watched
    kept = set(sorted({entry["frame"] for entry in watched})[::-2])
    return [entry for entry in watched if entry["frame"] in kept]
