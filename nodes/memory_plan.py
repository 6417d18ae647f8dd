"""What a rollout will take in all: of the device, of host memory and of the disk, by name. What it took: the same at its peak."""

from __future__ import annotations

from dataclasses import dataclass

from ..adastate_core.cache.byte_plan import HOST, CachePlan
from ..adastate_core.cache.working_bytes import locked
from ..adastate_core.rollout import Rollout
from ..adastate_core.spec import RolloutSpec
from ..adastate_core.states.renewed_pictures import picture_bytes
from ..adastate_core.states.state_size import most_file_bytes, most_state_bytes


@dataclass(frozen=True)
class Beside:
    """What lies beside a rollout's caches. `keeps`: latent frames that are kept for LATENT or a state. `states`: whether states are
    taken. `streams`: whether frames go to a video, of `pictures` a chunk with `picture_bytes` each, all items together.
    `decoder_bytes`: what a decode takes beside its cache. `forward_bytes`: the host's own estimate of a forward.

    Where a stream is enlarged, `pictures` and `picture_bytes` are those of the files. On the device `enlarging_bytes` are the
    models' weights and what enlarging takes beyond a decode, since the two take turns; in host memory `enlarging_host_bytes` are
    single pictures on the way, and `held_bytes` what a state keeps of it."""

    forward_bytes: int
    keeps: int = 0
    states: bool = False
    streams: bool = False
    pictures: int = 0
    picture_bytes: int = 0
    decoder_bytes: int = 0
    enlarging_bytes: int = 0
    enlarging_host_bytes: int = 0
    held_bytes: int = 0


def memory_plan(spec: RolloutSpec, plan: CachePlan, beside: Beside, on_cuda: bool) -> dict[str, dict[str, int]]:
    """Bytes by place (`device`, `host`, `disk`) and name; what is 0 is left out. Names of `device` are those of `plan.bytes()`, and
    `host_forward`, `decoder` and `enlarging`; what the host estimates is in these alone."""
    sizes = plan.bytes()
    device = {name: size for name, size in sizes.items() if not name.startswith(HOST)}
    device |= {"host_forward": beside.forward_bytes, "decoder": beside.decoder_bytes}
    device |= {"enlarging": beside.enlarging_bytes}
    host = {name.removeprefix(HOST): size for name, size in sizes.items() if name.startswith(HOST)}
    if on_cuda:  # page-locked, as torch rounds it: layers in host memory, a state's way out, a chunk's noise
        host = {"page_locked": plan.locked_bytes}
    chunk = beside.pictures * beside.picture_bytes
    host |= {
        "latents": (spec.recent_frames + spec.chunk_frames * spec.blocks) * plan.latent_frame_bytes,
        "kept_latents": beside.keeps * plan.latent_frame_bytes,
        # enlarged ones are put together in plain memory
        "pictures": 2 * (locked(chunk) if on_cuda and not beside.enlarging_bytes else chunk) if beside.streams else 0,
        "renewed_pictures": picture_bytes(spec) if beside.streams else 0,
        "enlarging": beside.enlarging_host_bytes,
        "state": most_state_bytes(spec, plan) + beside.held_bytes if beside.states else 0,
    }
    disk = {"state": most_file_bytes(spec, plan, beside.keeps) + beside.held_bytes if beside.states else 0}
    places = {"device": device, "host": host, "disk": disk}
    return {place: {name: size for name, size in names.items() if size} for place, names in places.items()}


def host_shortage(planned: dict[str, dict[str, int]], free: int) -> list[str]:
    """A sentence where host memory will not do for all that is planned; the rollout itself goes on without a state."""
    needed, state = sum(planned["host"].values()), planned["host"].get("state", 0)
    if needed <= free or not state:
        return []
    gib = 2**30
    return [
        f"a state of this rollout takes {state / gib:.2f} GiB of host memory, {needed / gib:.2f} GiB with all else, and "
        f"{free / gib:.2f} GiB are free: it may not be possible to save one; use a smaller window_frames or turn keep_latents off"
    ]


def peak_report(rollout: Rollout, device_peak: int | None) -> dict[str, int]:
    """What was counted at the peak: `device`, all that was allocated since the models were loaded (where the device counts), and
    keys and values, `kv` there and `host_kv` in host memory."""
    counted = dict(zip(("kv", "host_kv"), rollout.past.peak_nbytes, strict=True))
    return counted if device_peak is None else {"device": device_peak} | counted
