"""The absorption of one run, as it follows the past: warm up while collecting, solve and switch at once, then watch.

    absorber.start_chunk()                       # before a chunk; attention then asks `absorber.corrections` in every pass
    absorber.joins(), absorber.moved()           # with the chunk's commit; from then on the rows of the chunk count
    absorber.catch_up(next_frame)                # after the commit: what is due is solved, switched, measured

`catch_up` makes all new things aside and takes them over at once. So it may fail, and is then called again: in this run, or in the
run that goes on from its state. Everything public about ISPA and what is this pack's own choice: docs/design-notes.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..anchors import Anchor
from ..cache.byte_plan import CachePlan, LayerSpec
from ..cache.kv_cache import KVCache
from ..cache.slots import LayerSlots
from ..rope import Rope
from .collector import Collector
from .corrections import Corrections
from .host_history import HostHistory
from .moments import Moments
from .settings import AbsorptionSettings, blocks_of
from .solve import Correction, Fit, Solution, fit, residual

# how many measurements are kept; when there are more, those of every second instant are forgotten
MOST_WATCHED = 2048
PHASES = ("warming", "switched", "nothing to absorb")


def choose(fits: dict[int, Fit], settings: AbsorptionSettings, layers: int) -> tuple[int, ...]:
    """The K layers that absorb best by `settings.select`; ties go to the lower index."""
    scores = {
        "residual": lambda one: one.residual,
        "discrepancy": lambda one: one.discrepancy,
        "explained": lambda one: -one.explained,
    }
    score = scores[settings.select]
    return tuple(sorted(sorted(fits, key=lambda layer: (score(fits[layer]), layer))[: settings.layers(layers)]))


def small_layer(layer: LayerSpec, settings: AbsorptionSettings, pinned: int) -> LayerSpec:
    """A layer once it has been switched and keeps `pinned` first frames of its window."""
    return layer.small(min(settings.local_window_frames, layer.window_frames), pinned)


def watched_of(chosen: tuple[int, ...], settings: AbsorptionSettings) -> tuple[int, ...]:
    """Those of the switched layers that keep their history, evenly spread."""
    wanted = len(chosen) if settings.monitor_layers < 0 else settings.monitor_layers
    return chosen[:: max(1, len(chosen) // wanted)][:wanted] if wanted else ()


class Absorber:
    """Mutable, private to one run, like the cache that it shrinks."""

    def __init__(
        self, settings: AbsorptionSettings, cache: KVCache, anchor: Anchor, rope: Rope, solution: Solution | None = None
    ) -> None:
        """`solution`: one that was made before for the same model, prompt and seed. Nothing is collected if it is given."""
        self.settings, self.cache, self.anchor = settings, cache, anchor
        pinned = settings.pinned(anchor.frames) if anchor.state_frames else settings.sink_frames
        self.corrections = Corrections(settings, cache, pinned, rope)
        self.phase = PHASES[0] if settings.layers(len(cache.layers)) else PHASES[2]
        # copied, because solving anew changes the fits, and the given ones belong to the caller
        self.solution = None if solution is None else Solution(solution.chosen, dict(solution.fits))
        self._given = solution is not None
        self.full_window = max((layer.window_frames for layer in cache.plan.layers), default=0)
        self.collector = self._collector(range(len(cache.layers)))
        self.watched: list[dict[str, Any]] = []
        # residuals of the watched layers at the switch; drift is counted from these
        self.first_residuals: dict[int, float] = {}
        self.seconds = 0.0
        # the prompt and seed of this run, and those of the run that solved
        self.origin: dict[str, Any] = {}
        self.solved_for: dict[str, Any] = {}
        self.bytes_before = self.bytes_after = cache.nbytes
        self.chunks_since = 0
        # whether the chunks collected wait to be measured
        self.due = False

    def _collector(self, layers: Iterable[int]) -> Collector:
        blocks = blocks_of(self.settings, self.cache.heads)
        return Collector(layers, self.cache.plan.width, blocks, self.cache.device)

    @property
    def histories(self) -> dict[int, HostHistory]:
        """What watched layers have lost, by layer."""
        return self.corrections.histories

    @property
    def _rank(self) -> int | None:
        return self.settings.rank if self.settings.scope == "lowrank" else None

    def start_chunk(self) -> None:
        """Decide what this chunk collects, and forget what an unfinished one left."""
        self.collector.start_chunk()
        if self.phase == PHASES[0]:
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
        if self.phase == PHASES[1]:
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
        if self.phase == PHASES[0] and next_frame >= self.settings.warmup_frames:
            self._solve()
        elif self.due:
            self._measure(next_frame)

    def _solve(self) -> None:
        """Fit every layer, choose, and switch the chosen ones at one instant."""
        start = time.perf_counter()
        solution = self.solution
        if solution is None:
            if not self.collector.chunks:
                self.phase = PHASES[2]
                return
            seen, held_out, ridges = self.collector.seen, self.collector.held_out, self.settings.ridges
            fits = {i: fit(seen[i], held_out[i], ridges, self._rank) for i in self.collector.layers}
            chosen = choose(fits, self.settings, len(self.cache.layers))
            kept = {i: f if i in chosen else replace(f, correction=None) for i, f in fits.items()}
            solution = Solution(chosen, kept)
        first = self.cache.layers[0].window.values()
        switch = self._switch(solution, sum(slot.frame < self.corrections.pinned for slot in first), moved=True)
        collector = self._collecting_on(switch.histories)
        self.collector, self.solved_for = collector, dict(self.origin)
        self._take(solution, switch)
        self.seconds = time.perf_counter() - start

    def _switch(self, solution: Solution, pinned: int, moved: bool) -> _Switch:
        """The small caches of the chosen layers. If `moved`, they hold the frames that the layers keep; else they are empty, to be
        restored."""
        chosen = solution.chosen
        watched = watched_of(chosen, self.settings)
        plans = list(self.cache.plan.layers)
        for i in chosen:
            plans[i] = small_layer(plans[i], self.settings, pinned)
        made = _Switch(replace(self.cache.plan, layers=tuple(plans)))
        for i in chosen:
            old = self.cache.layers[i]
            made.layers[i] = old.shrunk(plans[i]) if moved else old.empty(plans[i])
            made.standing[i] = self._on_device(solution.fits[i].correction)
            if i in watched:
                history = HostHistory(max(0, self.full_window - plans[i].ring_frames))
                if moved:
                    self._remember(history, old)
                made.histories[i] = history
                made.layers[i].on_evict = history.push
        return made

    def _take(self, solution: Solution, made: _Switch) -> None:
        """From here on the chosen layers are small."""
        self.solution, self.phase = solution, PHASES[1]
        self.cache.plan = made.plan
        for i, layer in made.layers.items():
            self.cache.layers[i] = layer
        self.corrections.switched, self.corrections.histories = True, made.histories
        self.corrections.standing = {i: one for i, one in made.standing.items() if one is not None}
        self.bytes_after = made.plan.kv_bytes
        self.cache.fit()

    def resume_switched(self, pinned: int, chunks_since: int, watched: list[dict[str, Any]]) -> None:
        """Go to where a run stood that had switched. Caches and histories are empty, to be restored."""
        self._take(self.solution, self._switch(self.solution, pinned, moved=False))
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
        parts, entries, firsts, anew = self.collector, [], dict(self.first_residuals), {}
        for i, seen in parts.seen.items():
            old, newest = self.solution.fits[i], parts.held_out[i]
            whole = newest.merged(seen) if parts.chunks == 1 else newest
            now = residual(whole, old.correction)
            first = firsts.setdefault(i, old.residual)
            discrepancy = float(whole.missing_energy) / max(float(whole.full_energy), 1e-30)
            wanted = self.settings.refresh == "always" or now > self.settings.drift * first
            better = self._refresh(i, seen, newest) if self.settings.refresh != "never" and wanted else None
            if better is not None:
                anew[i] = better, self._on_device(better.correction)
            entry = {"frame": next_frame, "layer": i, "residual": now, "solved_at": old.residual}
            entries.append(entry | {"refreshed": better is not None, "discrepancy": discrepancy})
        collector = self._collecting_on(self.histories)
        for i, (better, standing) in anew.items():
            self.solution.fits[i] = better
            if standing is None:
                self.corrections.standing.pop(i, None)
            else:
                self.corrections.standing[i] = standing
        self.watched, self.first_residuals = _bounded(self.watched + entries), firsts
        self.collector, self.due = collector, False

    def _collecting_on(self, layers: Iterable[int]) -> Collector:
        """The collector for later measurements. If corrections are solved anew, it has all rows collected so far, else none."""
        if self.settings.refresh != "never" and self.collector.chunks:
            return self.collector.of(layers)
        return self._collector(layers)

    def _refresh(self, layer: int, seen: Moments, held_out: Moments) -> Fit | None:
        """A layer solved anew; None if what it has does as well on the rows held out."""
        new = fit(seen, held_out, self.settings.ridges, self._rank)
        return None if residual(held_out, self.solution.fits[layer].correction) <= new.residual else new

    def report(self) -> dict[str, Any]:
        """JSON-able: phase, chosen layers, residuals by layer, bytes, seconds of solve and switch, what was watched."""
        fits = {} if self.solution is None else self.solution.fits
        return {
            "phase": self.phase,
            "layers": list(self.solution.chosen) if self.solution and self.phase == PHASES[1] else [],
            "collected_chunks": self.collector.chunks if self.phase == PHASES[0] else None,
            "kv_bytes_before": self.bytes_before,
            "kv_bytes_after": self.bytes_after,
            "correction_bytes": sum(one.nbytes for one in self.corrections.standing.values()),
            "history_bytes_in_host_memory": sum(history.nbytes for history in self.histories.values()),
            "solve_seconds": round(self.seconds, 4),
            "residuals": [
                {"layer": i, "before": one.discrepancy, "after": one.residual, "ridge": str(one.ridge)}
                for i, one in sorted(fits.items())
            ],
            "monitor": list(self.watched),
        }


@dataclass
class _Switch:
    """What a switch puts in place of the old caches, by layer."""

    plan: CachePlan
    layers: dict[int, LayerSlots] = field(default_factory=dict)
    standing: dict[int, Correction | None] = field(default_factory=dict)
    histories: dict[int, HostHistory] = field(default_factory=dict)


def _bounded(watched: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MOST_WATCHED measurements, spread over the run, the newest among them."""
    if len(watched) <= MOST_WATCHED:
        return watched
    kept = set(sorted({entry["frame"] for entry in watched})[::-2])
    return [entry for entry in watched if entry["frame"] in kept]
