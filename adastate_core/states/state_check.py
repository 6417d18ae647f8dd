"""Whether a state from a file is whole, and is one of the rollout that its own settings describe.

Its settings give back the spec, and the spec every tensor's name, shape and dtype; a rollout takes no state of another spec
(RolloutSpec.differences). So a damage is found, and told with the file's name, before anything runs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from ..absorption.absorbed_phases import small_layer
from ..absorption.check import check_absorption, settings_of
from ..anchors import KINDS, Anchor, unknown_kind
from ..cache.byte_plan import CACHE_DTYPES, CachePlan, LayerSpec
from ..cache.deep import DeepSpec
from ..cache.eight_bits import CODES
from ..cache.rotated import RotatedSpec
from ..cache.specs import FIELDS_OF_BEFORE, layer_from
from ..decode.carried_check import carried
from ..decode.tiny_vae import KIND as TINY
from ..decode.wan_vae import FEATURES
from ..decode.ways import WAY, WAYS
from ..files.header_check import Damage, Fields, Tensors, Unreadable, number, shown
from ..geometry import SPACES, WAN21, ModelGeometry
from ..given import INSIDE
from ..history import HISTORIES, OWN_LEVEL
from ..reference import ReferenceRule
from ..rope import POSITION_MODES
from ..schedules.schedule import MOST_SIGMAS
from ..shot_check import damage
from ..spec import ENDINGS, REMADE, RolloutSpec
from .enlarged_check import check_enlarged
from .renewed_pictures import check_pictures
from .steered_check import check_steered

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
# pictures of a decoder's layers are so many times as wide and high as the latent
_SCALES = (1, 2, 4, 8)


def check_state(header: Fields, tensors: Tensors, before: bool) -> None:
    """Damage unless `header` and `tensors` are all that a whole state has, and nothing else.

    `before`: of the format before, in which parts that came in later may be missing.
    """
    spec = spec_of(header.inner("spec"), before)
    next_frame, next_chunk, emitted = (header.whole(name) for name in ("next_frame", "next_chunk", "emitted"))
    if next_chunk * spec.chunk_frames > next_frame:
        raise Damage(
            f"next_chunk is {next_chunk}, more chunks of {spec.chunk_frames} than next_frame, {next_frame}, counts"
        )
    _check_latents(spec, tensors, next_frame, emitted, before)
    if tensors.has("given") and next_chunk:
        raise Damage(f"given is there although {next_chunk} chunks were generated")
    if header.has("start"):
        _check_inside(header, tensors, spec, next_frame)
    again = _again_of(header, tensors)
    if header.has("after") and not 0 < header.whole("after") <= (most := spec.blocks * spec.chunk_frames):
        raise Damage(
            f"after is {header.whole('after')}, not 1 to {most} latent frames that were finished in a smaller window"
        )
    _check_compiled(header, spec.geometry.layers)
    _check_shots(header, spec, next_frame, next_chunk)
    absorption = header.inner("absorption") if not before or header.has("absorption") else Fields({}, "absorption")
    plan = spec.plan()
    chosen, pinned = check_absorption(absorption, tensors, spec.absorption, plan, spec.anchor)
    layers = header.listed("cache")
    count = len(plan.layers)
    # one cache after the other where noise levels have their own, which absorption does not go with
    several = spec.history == OWN_LEVEL
    wrong = len(layers) != count * spec.windows if several else len(layers) % count
    if not layers or wrong or (spec.absorption is not None and len(layers) != count):
        raise Damage(f"cache has {len(layers)} layers, and the settings' model {count}")
    books: dict[tuple[int, LayerSpec], Any] = {}
    for i, entry in enumerate(layers):
        layer = plan.layers[i % count]
        if i in chosen:
            layer = small_layer(layer, spec.absorption, pinned)
        book = _Book.of(Fields(entry, f"cache.{i}"), layer, next_frame, before)
        _check_layer(book, spec, plan, layer, tensors, i, next_frame)
        if again and len(book.rings) > book.pinned:
            raise Damage(
                f"again is {again}, which says that windows are empty, and cache.{i} holds {len(book.rings) - book.pinned} frames"
            )
        # a noise level's own cache begins anew where the clean passes' is made again
        if (other := books.setdefault((i // count, layer), (i, book.entries)))[1] != book.entries:
            raise Damage(f"cache.{i} holds other frames than cache.{other[0]}, which has the same place for them")
    check_stream(header.inner("stream"), tensors, spec, emitted, next_frame)
    if header.has("steered"):
        check_steered(header.inner("steered"))
    header.done()
    tensors.done()


def _again_of(header: Fields, tensors: Tensors) -> int:
    """How many of the newest latents have to be committed again; a state that does not say so has a whole window."""
    if not header.has("again"):
        return 0
    again, recent = header.whole("again", 1), tensors.tensors.get("recent")
    held = recent.shape[2] if isinstance(recent, torch.Tensor) and recent.ndim == 5 else 0
    if again > held:
        raise Damage(f"again is {again}, more latent frames than recent holds, {held}")
    return again


def _check_inside(header: Fields, tensors: Tensors, spec: RolloutSpec, next_frame: int) -> None:
    """Start latents that stand inside the first chunk; a state that does not say so has them before it, if it has any."""
    start, given = header.text("start", (INSIDE,)), tensors.tensors.get("given")
    if given is None:
        raise Damage(f"start is {start}, but given is missing")
    if next_frame:
        raise Damage(f"start is {start}, but next_frame is {next_frame}, which is not the first chunk's")
    try:
        spec.check_inside(given.shape[2])
    except ValueError as error:
        raise Damage(f"start is {start}, which cannot be ({error})") from error


def _check_compiled(header: Fields, count: int) -> None:
    """The layers that went through compiled functions; a state that does not say so was made the plain way."""
    layers = header.wholes("compiled_layers", 0, count - 1) if header.has("compiled_layers") else None
    if layers is not None and (not layers or layers != sorted(set(layers))):
        raise Damage(f"compiled_layers are {shown(list(layers))}, not layers of {count} in their order, each once")


def _check_shots(header: Fields, spec: RolloutSpec, next_frame: int, next_chunk: int) -> None:
    """The first frames of the video's shots; a state that does not say so has none."""
    if not header.has("shots"):
        return
    shots = header.wholes("shots", 1)
    if why := damage(shots, spec, next_frame, next_chunk) if shots else "no frames at all":
        raise Damage(f"shots are {shown(shots)}, {why}")


def spec_of(described: Fields, before: bool) -> RolloutSpec:
    """The spec that `RolloutSpec.describe` described. `before`: what was not there from the beginning may be missing."""

    def later(name: str, value: Any, take: Any) -> Any:
        return value if before and not described.has(name) else take(name)

    inner = described.inner("geometry")
    geometry = {name: inner.whole(name, 1, 10**6) for name in ("channels", "layers", "heads", "head_dim", "patch")}
    space = SPACES[inner.text("space", SPACES)] if inner.has("space") else WAN21
    inner.done()
    settings, layers = later("absorption", None, described.any), described.any("layers")
    values = {
        **{name: described.whole(name, 1, 10**6) for name in ("batch", "height", "width", "chunk_frames")},
        "window_frames": described.whole("window_frames"),
        "anchor": _anchor_of(described.inner("anchor")),
        "positions": described.text("positions", POSITION_MODES),
        "dtype": _DTYPES[described.text("dtype", _DTYPES)],
        "model": described.text("model"),
        "layers": None
        if layers is None
        else tuple(_layer_of(described, i, e) for i, e in enumerate(described.listed("layers"))),
        "absorption": None if settings is None else settings_of(described.inner("absorption")),
        "blocks": later("blocks", 1, lambda name: described.whole(name, 1)),
        "restart_frames": later("restart_frames", 0, described.whole),
        "overlap_frames": later("overlap_frames", 0, described.whole),
        "cache_dtype": later("cache_dtype", "model", lambda name: described.text(name, CACHE_DTYPES)),
    }
    if described.has("shares_window"):
        values["shares_window"] = described.yes_no("shares_window")
    if described.has("ending"):
        values["ending"] = described.text("ending", ENDINGS)
    if described.has("remade"):
        values["remade"] = described.text("remade", REMADE)
    if described.has("history"):
        values["history"] = described.text("history", HISTORIES)
        values["windows"] = described.whole("windows", 1, MOST_SIGMAS)
    if described.has("reference"):
        values["reference"] = _reference_of(described.inner("reference"))
    described.done()
    try:
        return RolloutSpec(ModelGeometry(**geometry, space=space), **values)
    except ValueError as error:
        raise Damage(f"its settings do not go together ({error})") from error


def _typed(values: Fields, kind: type) -> dict[str, Any]:
    """The fields of a dataclass of numbers and switches; those that are missing have their default."""
    takes = {"int": values.whole, "float": values.number, "bool": values.yes_no, "str": values.text}
    found = {
        one.name: takes[getattr(one.type, "__name__", one.type)](one.name)
        for one in fields(kind)
        if values.has(one.name)
    }
    values.done()
    return found


def _anchor_of(described: Fields) -> Anchor:
    name = described.text("kind")
    if name not in KINDS:
        raise Unreadable(unknown_kind(name))
    kind = KINDS[name]
    try:
        return kind.described(_typed(described, kind))
    except ValueError as error:
        raise Damage(f"spec.anchor does not go together ({error})") from error


def _reference_of(described: Fields) -> ReferenceRule:
    try:
        return ReferenceRule(**_typed(described, ReferenceRule))
    except ValueError as error:
        raise Damage(f"spec.reference does not go together ({error})") from error


def _layer_of(described: Fields, index: int, entry: Any) -> LayerSpec:
    path = f"{described.path('layers')}[{index}]"
    values = Fields(entry, path)
    for name, neutral in FIELDS_OF_BEFORE.items():
        if values.has(name) and values.any(name) != neutral:
            raise Damage(f"{path}.{name} is {shown(values.any(name))}, but a deep sink's layers are never given")
    try:
        return layer_from(**_typed(values, RotatedSpec))
    except TypeError as error:
        raise Damage(f"{path} is not whole ({error})") from error


def _check_latents(spec: RolloutSpec, tensors: Tensors, next_frame: int, emitted: int, before: bool) -> None:
    """All that are latents, [B, C, n, h, w] float32, and how many of them there are."""

    def take(name: str, frames: int | None) -> int:
        shape = (spec.batch, spec.geometry.channels, frames, spec.height, spec.width)
        return tensors.take(name, shape, torch.float32).shape[2]

    pending = take("pending", None)
    if emitted + pending != next_frame:
        raise Damage(f"next_frame is {next_frame}, not emitted, {emitted}, and pending, {pending}, together")
    if spec.anchor.state_frames and next_frame:
        take("hidden", spec.anchor.state_frames)
    if tensors.has("latents"):
        take("latents", emitted)
    if not before or tensors.has("recent"):
        take("recent", min(spec.recent_frames, next_frame))
    if tensors.has("given"):
        take("given", None)
    if spec.first_kept and next_frame:
        take("first", 1)
    if spec.reference is not None:
        take("reference", 1)
    if spec.blocks > 1 and tensors.has("noisy"):
        frames = take("noisy", None)
        if frames % spec.chunk_frames or frames > (spec.blocks - 1) * spec.chunk_frames:
            raise Damage(
                f"noisy is {frames} latent frames, not whole chunks of {spec.chunk_frames} and at most {spec.blocks - 1} of them, "
                "one a step that is left"
            )


@dataclass(frozen=True)
class _Book:
    """Which frames a layer holds, and where."""

    anchors: tuple[int, ...]
    rings: tuple[int, ...]
    frames: tuple[int, ...]
    positions: tuple[float | None, ...]
    pinned: int

    @property
    def entries(self) -> tuple[Any, ...]:
        """What layers of one plan have in common."""
        return self.anchors, self.rings, self.frames, self.pinned

    @staticmethod
    def of(entry: Fields, layer: LayerSpec, next_frame: int, before: bool) -> _Book:
        """Damage unless a layer of this plan can hold it."""
        anchors, rings, frames = (tuple(entry.wholes(n)) for n in ("anchor_slots", "ring_slots", "frames"))
        positions = tuple(
            None if one is None else number(f"{entry.path('positions')}[{i}]", one)
            for i, one in enumerate(entry.listed("positions"))
        )
        pinned = entry.whole("pinned") if not before or entry.has("pinned") else 0
        entry.done()
        where, held, most = entry.where, len(rings), layer.ring_frames
        first = rings[0] if rings and isinstance(layer, DeepSpec) else 0
        if sorted(anchors) != list(range(len(anchors))) or len(anchors) > layer.anchor_frames:
            raise Damage(f"{where}.anchor_slots are {list(anchors)}, not the first of {layer.anchor_frames}")
        if sorted(rings) != list(range(first, first + held)) or first + held > most:
            raise Damage(f"{where}.ring_slots are {shown(list(rings))}, not the first of {most}")
        if pinned != layer.pinned_frames or pinned > held or rings[:pinned] != tuple(range(pinned)):
            raise Damage(
                f"{where}.pinned is {pinned}, which its ring_slots or the settings, {layer.pinned_frames}, contradict"
            )
        if not len(frames) == len(positions) == len(anchors) + held:
            raise Damage(
                f"{where} has {len(frames)} frames and {len(positions)} positions for {len(anchors) + held} slots"
            )
        kept = frames[len(anchors) :]
        if list(kept) != sorted(set(kept)) or any(frame >= next_frame for frame in kept):
            raise Damage(
                f"{where}.frames are {shown(list(kept))} in the window, not frames before {next_frame} in their order"
            )
        if any(frame >= max(next_frame, layer.anchor_frames) for frame in frames):
            raise Damage(f"{where}.frames are {shown(list(frames))}, not frames before {next_frame}")
        return _Book(anchors, rings, frames, positions, pinned)


def _check_layer(
    book: _Book, spec: RolloutSpec, plan: CachePlan, layer: LayerSpec, tensors: Tensors, index: int, next_frame: int
) -> None:
    """All tensors of a layer's cache (LayerSnapshot says which there are), each frame [B, n, P, width]."""

    def take(name: str, *shape: int, dtype: torch.dtype = torch.float32, positive: bool = False) -> torch.Tensor:
        return tensors.take(f"cache.{index}.{name}", (plan.batch, *shape), dtype, positive)

    frame, anchors, held = (plan.tokens, plan.width), len(book.anchors), len(book.rings)
    eight, blends = plan.cache_dtype in CODES, bool(layer.blend_frames)
    for name in ("replay_keys", "replay_values") if layer.replay_frames else ():
        take(name, layer.replay_frames, *frame, dtype=plan.dtype)
    for name in ("blend_keys", "blend_values") if blends else ():
        take(name, layer.blend_frames, *frame)
    if isinstance(layer, DeepSpec):
        _check_deep(book, spec, plan, layer, take, next_frame)
        return
    count = anchors + held
    if eight and blends:
        count = held
    elif blends and anchors:  # in host memory the anchor is in the blend tensors alone
        keys = tensors.tensors.get(f"cache.{index}.keys")
        stored = isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[1] == held
        count = held if stored else count
    stored = CODES[plan.cache_dtype][0] if eight else plan.dtype
    for name in ("keys", "values"):
        take(name, count, *frame, dtype=stored)
    if eight:
        take("scales", count, 2, plan.heads, positive=True)
    elif isinstance(layer, RotatedSpec) and layer.keep_raw:
        # keys that are stored as they are, un-rotated, have no raw copy beside them
        rotated = any(p is not None for p in book.positions[anchors:])
        if rotated or tensors.has(f"cache.{index}.raw"):
            take("raw", held, *frame, dtype=plan.dtype)


def _check_deep(book: _Book, spec: RolloutSpec, plan: CachePlan, layer: DeepSpec, take: Any, next_frame: int) -> None:
    """A deep sink's (cache/deep.py): chosen tokens lie between the sink and the window's frames."""
    most = layer.chosen_frames
    chosen = book.rings[0] if book.rings else 0
    if chosen not in (0, most) or list(book.anchors) != sorted(book.anchors) or list(book.rings) != sorted(book.rings):
        raise Damage(f"a layer of cache has ring_slots {shown(list(book.rings))}, which do not begin at 0 or {most}")
    count, frame = chosen + len(book.rings), (plan.tokens, plan.width)
    for name in ("keys", "values"):
        take(name, len(book.anchors) + count, *frame, dtype=plan.dtype)
    take("raw", count, *frame, dtype=plan.dtype)
    take("queries", layer.query_frames, plan.width)
    ids = take("ids", most * plan.tokens, dtype=torch.int64)
    if layer.selection.most_choices:
        counts = take("counts", most * plan.tokens, dtype=torch.int64)
        if chosen and counts.numel() and not 1 <= int(counts.min()) <= int(counts.max()) <= next_frame:
            raise Damage(f"a layer's counts are not how often a token was chosen in {next_frame} frames")
    if chosen and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < next_frame * plan.tokens:
        raise Damage(f"a layer's ids count tokens beyond the {next_frame} frames that there are")


def check_stream(stream: Fields, tensors: Tensors, spec: RolloutSpec, emitted: int, next_frame: int) -> None:
    """What a state keeps of its files and of its decoder's cache; there may be none of either."""
    if stream.has("files"):
        names, counts = stream.listed("files"), stream.wholes("file_frames")
        if not all(isinstance(name, str) for name in names):
            raise Damage(f"stream.files are {shown(names)}, not names")
        if names and len(counts) != len(names):
            raise Damage(f"stream.file_frames are {len(counts)} numbers for {len(names)} files")
    if stream.has("frame_folders"):
        folders = stream.listed("frame_folders")
        if not all(isinstance(name, str) for name in folders):
            raise Damage(f"stream.frame_folders are {shown(folders)}, not names")
    if stream.has("frames_written"):
        stream.whole("frames_written")
    if stream.has("run_id"):
        stream.text("run_id")
    check_pictures(stream, tensors, spec, next_frame)
    check_enlarged(stream, tensors, spec)
    if stream.has("vae_latents_seen"):
        seen = stream.whole("vae_latents_seen")
        if seen != emitted:
            raise Damage(
                f"stream.vae_latents_seen is {seen}, and emitted {emitted}: its decoder's cache is another frame's"
            )
        tiny = stream.has("vae_kind")
        if tiny:
            stream.text("vae_kind", [TINY])
        if stream.has(WAY):
            stream.text(WAY, WAYS)
        _check_decoder(stream, tensors, spec, seen, "taehv_memory_" if tiny else "vae_feature_", 4 if tiny else 5)
    stream.done()


def _check_decoder(stream: Fields, tensors: Tensors, spec: RolloutSpec, seen: int, prefix: str, dims: int) -> None:
    """What a decoder carries: of a full VAE [B, c, 1 or 2, s h, s w] and marks in their place, of a tiny one [B, c, s h, s w]."""
    marks = stream.wholes("vae_markers", 0, FEATURES - 1) if dims == 5 else []
    if len(marks) != len(set(marks)):
        raise Damage(f"stream.vae_markers are {shown(list(marks))}, not each once")
    found = carried(tensors.tensors, f"stream.{prefix}", dims, seen, marks)
    sizes = [(spec.height * scale, spec.width * scale) for scale in _SCALES]
    for i, tensor in found.items():
        size = tuple(tensor.shape[-2:]) if tuple(tensor.shape[-2:]) in sizes else sizes[0]
        frames = ((tensor.shape[2] if tensor.shape[2] in (1, 2) else 2),) if dims == 5 else ()
        tensors.take(f"stream.{prefix}{i}", (spec.batch, None, *frames, *size), tensor.dtype)
