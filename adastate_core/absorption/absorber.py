"""The absorption of one run: warm up with full attention while collecting, solve and switch at once, then correct.

    absorber.start_chunk()                       # before a chunk
    out = absorber.attend(layer, q, ...)         # in every layer of every pass
    absorber.finish_chunk(next_frame)            # after its commit; this is where layers are switched

Everything public about ISPA and what is this pack's own choice: docs/design-notes.md.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from ..anchors import Anchor
from ..attention_lse import Part, attend_part, merge, rows
from ..cache_plan import CachePlan
from ..kv_cache import KVCache
from ..layer_slots import LayerSlots
from ..rope import Layout, Rope
from .collector import Collector
from .host_history import HostHistory
from .moments import Moments
from .settings import AbsorptionSettings
from .solve import Correction, Fit, Solution, fit, residual

# measurements that are kept; beyond that every second instant is forgotten
MOST_WATCHED = 2048
PHASES = ("warming", "switched", "nothing to absorb")


def blocks_of(settings: AbsorptionSettings, heads: int) -> int:
    """Blocks of the statistics: one a head, or one for the layer."""
    return heads if settings.scope == "head" else 1


def absorption_bytes(settings: AbsorptionSettings, plan: CachePlan, heads: int) -> int:
    """The most that statistics and corrections take on the device: those seen, held out and of the chunk under way."""
    if not settings.layers(len(plan.layers)):
        return 0
    return 3 * len(plan.layers) * Moments.nbytes_of(plan.width, blocks_of(settings, heads))


def choose(fits: dict[int, Fit], settings: AbsorptionSettings, layers: int) -> tuple[int, ...]:
    """The K layers that absorb best by `settings.select`; ties go to the lower index."""
    scores = {
        "residual": lambda one: one.residual,
        "discrepancy": lambda one: one.discrepancy,
        "explained": lambda one: -one.explained,
    }
    score = scores[settings.select]
    return tuple(sorted(sorted(fits, key=lambda layer: (score(fits[layer]), layer))[: settings.layers(layers)]))


class Absorber:
    """Mutable, private to one run, like the cache that it shrinks."""

    def __init__(
        self, settings: AbsorptionSettings, cache: KVCache, anchor: Anchor, rope: Rope, solution: Solution | None = None
    ) -> None:
        """`solution`: one made before for the same model, prompt and seed; then nothing is collected."""
        self.settings, self.cache, self.anchor, self.rope = settings, cache, anchor, rope
        self.phase = PHASES[0] if settings.layers(len(cache.layers)) else PHASES[2]
        self.solution, self._given = solution, solution is not None
        self.device, self.heads = cache.device, cache.heads
        self.full_window = max((layer.window_frames for layer in cache.plan.layers), default=0)
        self.collector = self._collector(range(len(cache.layers)))
        self.corrections: dict[int, Correction] = {}
        self.histories: dict[int, HostHistory] = {}
        self.watched: list[dict[str, Any]] = []
        # of the layers that are watched, when they were switched: what drift is counted from
        self.first_residuals: dict[int, float] = {}
        self.seconds = 0.0
        # the prompt and seed of this run, and those of the run that solved
        self.origin: dict[str, Any] = {}
        self.solved_for: dict[str, Any] = {}
        self.bytes_before = self.bytes_after = cache.nbytes
        self._collecting = False
        self.chunks_since = 0

    def _collector(self, layers: Any) -> Collector:
        return Collector(layers, self.cache.plan.width, blocks_of(self.settings, self.heads), self.device)

    @property
    def pinned(self) -> int:
        """The video's first frames that the switched layers keep in their window for good: those below this index."""
        pinned = self.settings.pinned(self.anchor.frames)
        return pinned if self.anchor.state_frames else self.settings.sink_frames

    @property
    def _rank(self) -> int | None:
        return self.settings.rank if self.settings.scope == "lowrank" else None

    def start_chunk(self) -> None:
        """Decide what this chunk collects, and forget what an unfinished one left."""
        self.collector.start_chunk()
        if self.phase == PHASES[0]:
            self._collecting = not self._given and bool(self._parts(self.cache.layers[0], 0)[1])
        else:
            left = self.settings.monitor_chunks - self.chunks_since % self.settings.monitor_chunks
            due = left <= self.settings.measured_chunks
            self._collecting = due and any(len(history) for history in self.histories.values())

    def _parts(self, layer: LayerSlots, current_frames: int) -> tuple[list[slice], list[slice]]:
        return layer.parts(current_frames, self.settings.local_window_frames, self.pinned)

    def attend(self, layer: int, q: torch.Tensor, current_frames: int, layout: Layout) -> torch.Tensor | None:
        """This layer's output if it is the absorption's to make, else None. q [B, N, width] rotated, as keys are."""
        if self.phase == PHASES[0]:
            return self._collect(layer, q, current_frames) if self._collecting else None
        if self._collecting and layer in self.histories and len(self.histories[layer]):
            local = self._local(layer, q, self._parts(self.cache.layers[layer], current_frames)[0])
            past = self.histories[layer].read(layout, self.rope, self.heads, self.device)
            full = merge(local, attend_part(q, *past, self.heads))
            self.collector.add(layer, rows(local), rows(full))
        return None

    def correct(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        """What a layer's attention gave, with what it can no longer see put back; as it was for other layers."""
        correction = self.corrections.get(layer)
        return out if correction is None else correction.apply(out)

    def _local(self, layer: int, q: torch.Tensor, slots: list[slice]) -> Part:
        cache = self.cache.layers[layer]
        return reduce(merge, [attend_part(q, *cache.read_slots(part), self.heads) for part in slots])

    def _collect(self, layer: int, q: torch.Tensor, current_frames: int) -> torch.Tensor:
        """Full attention, made of both parts; the rows of both go into the statistics."""
        near, far = self._parts(self.cache.layers[layer], current_frames)
        local = self._local(layer, q, near)
        full = merge(local, self._local(layer, q, far))
        self.collector.add(layer, rows(local), rows(full))
        return rows(full)

    def finish_chunk(self, next_frame: int) -> None:
        """The chunk is committed, and `next_frame` the index of the next one's first frame."""
        if self.phase == PHASES[0]:
            self.collector.finish_chunk()
            if next_frame >= self.settings.warmup_frames:
                self._solve()
        elif self.phase == PHASES[1]:
            if self._collecting:
                self.collector.finish_chunk()
            self.chunks_since += 1
            if self._collecting and self.chunks_since % self.settings.monitor_chunks == 0:
                self._measure(next_frame)
        self._collecting = False

    def _solve(self) -> None:
        """Fit every layer, choose, and switch the chosen ones at one instant."""
        start = time.perf_counter()
        if self.solution is None:
            if not self.collector.chunks:
                self.phase = PHASES[2]
                return
            ridges, parts = self.settings.ridges, self.collector
            fits = {i: fit(parts.seen[i], parts.held_out[i], ridges, self._rank) for i in parts.layers}
            chosen = choose(fits, self.settings, len(self.cache.layers))
            self.solution = Solution(
                chosen, {i: f if i in chosen else replace(f, correction=None) for i, f in fits.items()}
            )
        self.solved_for = dict(self.origin)
        held = self.cache.layers[0]
        self._switch(sum(slot.frame < self.pinned for slot in held.window.values()), moved=True)
        self._collect_on()
        self.seconds = time.perf_counter() - start

    def _switch(self, pinned: int, moved: bool) -> None:
        """Give the chosen layers their small caches, with what they keep (`moved`) or empty, to be restored."""
        self.phase, chosen = PHASES[1], self.solution.chosen
        wanted = len(chosen) if self.settings.monitor_layers < 0 else self.settings.monitor_layers
        watched = chosen[:: max(1, len(chosen) // wanted)][:wanted] if wanted else ()
        plans = list(self.cache.plan.layers)
        for i in chosen:
            plans[i] = self._small_plan(i, pinned)
        self.cache.plan = replace(self.cache.plan, layers=tuple(plans))
        for i in chosen:
            old = self.cache.layers[i]
            if i in watched:
                self.histories[i] = HostHistory(max(0, self.full_window - plans[i].ring_frames))
                if moved:
                    self._remember(i, old)
            self.cache.layers[i] = old.shrunk(plans[i]) if moved else old.empty(plans[i])
            if i in watched:
                self.cache.layers[i].on_evict = self.histories[i].push
            self._set_correction(i, self.solution.fits[i].correction)
        self.cache.fit()
        self.bytes_after = self.cache.nbytes

    def resume_switched(self, pinned: int, chunks_since: int, watched: list[dict[str, Any]]) -> None:
        """Stand where a run stood that had switched; caches and histories are empty and to be restored."""
        self._switch(pinned, moved=False)
        self.collector = self._collector(self.histories)
        self.chunks_since, self.watched = chunks_since, watched

    def _small_plan(self, layer: int, pinned: int) -> Any:
        old, local = self.cache.plan.layers[layer], self.settings.local_window_frames
        window = min(local, old.window_frames)
        return replace(old, window_frames=window, pinned_frames=pinned, keep_raw=old.keep_raw and window + pinned > 0)

    def _set_correction(self, layer: int, correction: Correction) -> None:
        if bool(correction.whole().any()) or bool(correction.constant.any()):
            self.corrections[layer] = correction.to(self.device, self.cache.plan.dtype)
        else:
            self.corrections.pop(layer, None)

    def _remember(self, layer: int, cache: LayerSlots) -> None:
        """Copy what the layer is about to lose."""
        for part in self._parts(cache, 0)[1]:
            for index in range(part.start, part.stop):
                cache.hand_over(index - cache.window_start, self.histories[layer].push)

    def _measure(self, next_frame: int) -> None:
        """Residuals of the corrections on the chunk that has just been made, and better ones where they are asked for."""
        parts = self.collector
        for i in parts.seen:
            old, newest = self.solution.fits[i], parts.held_out[i]
            if parts.chunks == 1:
                newest = newest.copy()
                newest.merge(parts.seen[i])
            now = residual(newest, old.correction)
            first = self.first_residuals.setdefault(i, old.residual)
            entry = {"frame": next_frame, "layer": i, "residual": now, "solved_at": old.residual, "refreshed": False}
            entry["discrepancy"] = float(newest.missing_energy) / max(float(newest.full_energy), 1e-30)
            wanted = self.settings.refresh == "always" or now > self.settings.drift * first
            if self.settings.refresh != "never" and wanted:
                entry["refreshed"] = self._refresh(i)
            self.watched.append(entry)
        if len(self.watched) > MOST_WATCHED:
            kept = set(sorted({entry["frame"] for entry in self.watched})[::-2])
            self.watched = [entry for entry in self.watched if entry["frame"] in kept]
        self._collect_on()

    def _collect_on(self) -> None:
        """What later measurements start from: all that was collected if corrections are solved anew, else nothing."""
        if self.settings.refresh != "never" and self.collector.chunks:
            self.collector.keep(self.histories)
        else:
            self.collector = self._collector(self.histories)

    def _refresh(self, layer: int) -> bool:
        """Solve a layer anew; False if what it has does as well on the rows held out."""
        seen, held_out = self.collector.seen[layer], self.collector.held_out[layer]
        new = fit(seen, held_out, self.settings.ridges, self._rank)
        if residual(held_out, self.solution.fits[layer].correction) <= new.residual:
            return False
        self.solution.fits[layer] = new
        self._set_correction(layer, new.correction)
        return True

    def report(self) -> dict[str, Any]:
        """JSON-able: phase, chosen layers, residuals by layer, bytes, seconds of solve and switch, what was watched."""
        fits = {} if self.solution is None else self.solution.fits
        return {
            "phase": self.phase,
            "layers": list(self.solution.chosen) if self.solution and self.phase == PHASES[1] else [],
            "collected_chunks": self.collector.chunks if self.phase == PHASES[0] else None,
            "kv_bytes_before": self.bytes_before,
            "kv_bytes_after": self.bytes_after,
            "correction_bytes": sum(one.nbytes for one in self.corrections.values()),
            "history_bytes_in_host_memory": sum(history.nbytes for history in self.histories.values()),
            "solve_seconds": round(self.seconds, 4),
            "residuals": [
                {"layer": i, "before": one.discrepancy, "after": one.residual, "ridge": str(one.ridge)}
                for i, one in sorted(fits.items())
            ],
            "monitor": self.watched,
        }
