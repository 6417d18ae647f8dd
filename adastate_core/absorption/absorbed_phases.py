"""The phases of a cache whose layers lose their history: what is allocated during the warm-up, and once some layers are switched.

During the warm-up no layer can hold more frames than are made until it ends. So long windows are allocated only afterwards, when
the switched layers have given back what they do not need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..anchors import Anchor
from ..cache.byte_plan import CachePlan, LayerSpec
from ..cache.phases import Phase
from .moments import Moments
from .settings import PHASES, AbsorptionSettings, blocks_of
from .warm_up import GIB, Ends, cache_bytes, ends_of

WARMING, SWITCHED, NOTHING = PHASES


def small_layer(layer: LayerSpec, settings: AbsorptionSettings, pinned: int) -> LayerSpec:
    """A layer once it has been switched and keeps `pinned` first frames of its window."""
    return layer.small(min(settings.local_window_frames, layer.window_frames), pinned)


def watched_of(chosen: tuple[int, ...], settings: AbsorptionSettings) -> tuple[int, ...]:
    """Those of the switched layers that keep their history, evenly spread."""
    wanted = len(chosen) if settings.monitor_layers < 0 else settings.monitor_layers
    return chosen[:: max(1, len(chosen) // wanted)][:wanted] if wanted else ()


def switched_layers(
    layers: tuple[LayerSpec, ...], chosen: Iterable[int], settings: AbsorptionSettings, pinned: int
) -> tuple[LayerSpec, ...]:
    """All layers once the chosen ones are small."""
    small = set(chosen)
    return tuple(small_layer(one, settings, pinned) if i in small else one for i, one in enumerate(layers))


def sets_of(settings: AbsorptionSettings) -> int:
    """How many statistics there are of a layer: those seen, between if a chunk lies apart, held out, and of the chunk under way."""
    return 4 if settings.apart else 3


@dataclass(frozen=True)
class Standing:
    """Where the absorption of a state stands: its phase, the layers that are switched, how many frames of the window they pin,
    whether anything was collected, and whether all items of a batch share their statistics, as in states of earlier packs."""

    phase: str
    chosen: tuple[int, ...] = ()
    pinned: int = 0
    collected: bool = False
    shared: bool = False

    @staticmethod
    def of(state: Mapping[str, Any], layers: int) -> Standing | None:
        """From a state's entries; None for entries that are none. A rollout that goes on from them says what is wrong with them."""
        phase, chosen, pinned = state.get("phase"), state.get("solution.chosen", ()), state.get("pinned", 0)
        sound = isinstance(chosen, list | tuple) and all(type(i) is int and 0 <= i < layers for i in chosen)
        if phase not in PHASES or not sound or type(pinned) is not int or pinned < 0:
            return None
        return Standing(phase, tuple(chosen), pinned, bool(state.get("collector.chunks")), "items" not in state)


@dataclass(frozen=True)
class Absorbed:
    """An absorption by its numbers: what it makes of the phases of a rollout's plan."""

    settings: AbsorptionSettings
    anchor: Anchor
    chunk_frames: int

    def phases(
        self, plan: CachePlan, chosen: tuple[int, ...] | None = None, standing: Standing | None = None, made: int = 0
    ) -> tuple[Phase, ...]:
        """The phases of `plan`. `chosen`: the layers of a correction that was solved before. `standing`: where the state stands
        that is gone on from, after which `made` frames are there.

        Where nobody knows yet which layers will be switched, they are those that give back least.
        """
        items = 1 if standing is not None and standing.shared else plan.batch
        if standing is not None and standing.phase == SWITCHED:
            layers = switched_layers(plan.layers, standing.chosen, self.settings, standing.pinned)
            return (Phase(SWITCHED, layers, None, items * self._after(plan, standing.chosen, True)),)
        ends = self.ends(plan)
        phases = self._until(plan, ends, chosen, standing, made)
        self._check_budget(replace(plan, phases=phases), ends)
        return phases

    def ends(self, plan: CachePlan) -> Ends:
        """When the warm-up of a run of `plan` ends. It is the same for a correction that was solved before."""

        def planned(whole: CachePlan, frames: int) -> CachePlan:
            return replace(whole, phases=self._until(whole, Ends(frames, frames)))

        return ends_of(self.settings, plan, self.chunk_frames, planned)

    def _until(
        self,
        plan: CachePlan,
        ends: Ends,
        chosen: tuple[int, ...] | None = None,
        standing: Standing | None = None,
        made: int = 0,
    ) -> tuple[Phase, ...]:
        """The phases of a warm-up that ends so."""
        settings, whole = self.settings, Phase(NOTHING, plan.layers)
        items = 1 if standing is not None and standing.shared else plan.batch
        given = chosen is not None
        # the first frame of the last chunk that is collected lies here or later
        last = max(0, ends.earliest - self.chunk_frames)
        sure = given or (standing is not None and standing.collected) or self.has_history(plan, last)
        never = ends.never or not (sure or self.has_history(plan, ends.latest - 1))
        if not settings.layers(len(plan.layers)) or never or (standing is not None and standing.phase == NOTHING):
            return (whole,)
        most = max(ends.latest + self.chunk_frames - 1, made)
        statistics = 0 if given else sets_of(settings) * items * len(plan.layers) * self._statistics(plan)
        warm = Phase(WARMING, plan.layers, most, statistics)
        if plan.frames is not None and plan.frames < ends.earliest:
            return (warm,)
        if not sure:
            return warm, whole
        # they come until all are there, and later leave the window one after the other
        pinned = self.pinned_of(plan, min(max(ends.earliest, self.first_frames), ends.latest))
        chosen = self._cheapest(plan, pinned) if chosen is None else chosen
        layers = switched_layers(plan.layers, chosen, settings, pinned)
        return warm, Phase(SWITCHED, layers, None, items * self._after(plan, chosen, given))

    def _check_budget(self, plan: CachePlan, ends: Ends) -> None:
        """ValueError if even the shortest warm-up of a video of known length takes more than the budget."""
        settings = self.settings
        if settings.switch != "memory" or plan.frames is None or ends.never or ends.latest > settings.warmup_frames:
            return
        if (taken := cache_bytes(plan)) > settings.budget_gib * GIB:
            raise ValueError(
                f"the budget is {settings.budget_gib:g} GiB, and with the least warm-up, {settings.warmup_frames} latent frames, "
                f"cache and statistics take {taken / GIB:.4g} GiB: give a larger budget_gib or ratio, or a smaller window_frames"
            )

    @property
    def first_frames(self) -> int:
        """A switched layer keeps the frames of its window whose index in the video is below this number."""
        adaptive = bool(self.anchor.state_frames)
        return self.settings.pinned(self.anchor.frames) if adaptive else self.settings.sink_frames

    def _window(self, plan: CachePlan, frames: int) -> list[int]:
        """What the first layer's window holds once `frames` have been made."""
        ring = [f for f in range(frames) if self.anchor.slot_of(f) is None]
        return ring[max(0, len(ring) - plan.layers[0].window_frames) :]

    def has_history(self, plan: CachePlan, frames: int) -> bool:
        """Whether a chunk that begins at `frames` sees more than the local part."""
        ring = self._window(plan, frames)
        newest = set(ring[max(0, len(ring) - self.settings.local_window_frames) :])
        return any(f not in newest and f >= self.first_frames for f in ring)

    def pinned_of(self, plan: CachePlan, frames: int) -> int:
        """How many frames of its window a layer pins that is switched when `frames` have been made."""
        return sum(f < self.first_frames for f in self._window(plan, frames))

    def _cheapest(self, plan: CachePlan, pinned: int) -> tuple[int, ...]:
        """The layers that give back least, as many as are switched."""

        def freed(i: int) -> int:
            layer = plan.layers[i]
            small = small_layer(layer, self.settings, pinned)
            return sum(layer.cut(plan.frames).bytes(plan).values()) - sum(small.cut(plan.frames).bytes(plan).values())

        every = sorted(range(len(plan.layers)), key=lambda i: (freed(i), i))
        return tuple(sorted(every[: self.settings.layers(len(plan.layers))]))

    def _statistics(self, plan: CachePlan) -> int:
        """Bytes of one layer's statistics of one item."""
        return Moments.nbytes_of(plan.width, blocks_of(self.settings, plan.heads))

    def _after(self, plan: CachePlan, chosen: tuple[int, ...], given: bool) -> int:
        """Bytes since the switch, of one item: the corrections as attention applies them, in float32 as solved unless they
        were `given`, and the statistics of the layers that are watched."""
        settings, blocks = self.settings, blocks_of(self.settings, plan.heads)
        size = plan.width // blocks
        low = settings.scope == "lowrank" and settings.rank < size
        numbers = plan.width + (2 * size * settings.rank if low else blocks * size * size)
        same = plan.dtype.itemsize == 4  # then both are one tensor
        each = numbers * ((0 if given or same else 4) + plan.dtype.itemsize)
        return len(chosen) * each + sets_of(settings) * len(watched_of(chosen, settings)) * self._statistics(plan)
