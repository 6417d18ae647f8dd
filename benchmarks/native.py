"""Roll the same weights out with the host's own causal sampler (SamplerARVideo) and with this pack, chunk by chunk in turns.

    COMFYUI_PATH=... python3 run.py bench native
    COMFYUI_PATH=... python benchmarks/native.py --chunks 4 --rounds 2 --width 64 --height 64      # to see that it runs

SamplerARVideo is in ComfyUI from 0.21 on; other hosts get a sentence. The host's sampler keeps keys and values of the whole
clip. The pack does the same with a window as long as the clip, and the latents of both are compared: the pack is given the
host's noise. Its adaptive state with a window of one chunk is the third.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import host as bench
from host import add_geometry, interval, load_pack, random_weights, synchronise, table_lines, write_table

STEPS, SHIFT, CHUNK, PASSES, SEED = 4, 5.0, 3, 5, 7
NATIVE, FULL, ADAPTIVE = "host's sampler", "pack, full history", "pack, adaptive state"
SHOWN = (1, 2, 3, 6, 9, 15, 21, 27)
LENGTHS = (81, 321, 961, 9601)  # video frames: 5 s, 20 s, a minute, ten minutes
CAN = [
    ("Is there without an installation, kept by the host's makers", "yes", "no"),
    (
        "Takes part in what other packs wrap around the model's call (model function wrapper, APPLY_MODEL)",
        "yes",
        "refused",
    ),
    ("Sees the whole clip at every chunk", "yes, always", "if the window is as long"),
    ("Memory and time a chunk whatever the length", "no: both grow with the clip", "yes"),
    ("Length must be known when it starts", "yes: the cache is allocated for it", "no: a state goes on"),
    ("Negative prompt, guidance", "no: torch's error, for its cache has no place for a second pass", "refused"),
    ("Starts from a picture", "yes (ARVideoI2V)", "yes, and from the end of a video"),
    ("Prompts that change on the way", "no: the text's keys are made once", "yes"),
    ("Anchors, relative positions, the rules of other systems", "no", "yes"),
    ("Stop and keep, autosave, resume bit for bit", "no: an interrupt loses the clip", "yes"),
    ("Frames while it runs", "a preview of the noise's estimate", "decoded, written, previewed"),
    ("Another attention (attention override of the MODEL)", "not asked", "asked"),
]


class NativeChunks:
    """The host's sampler as an iterator of chunks: it runs in a thread of its own, which waits after every clean pass."""

    def __init__(self, patcher: Any, context: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> None:
        import comfy.patcher_extension

        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._passes, self._ended, self._failed = 0, False, None
        self.latents: torch.Tensor | None = None  # of the whole clip, once all chunks are made
        self.cache_bytes = 0
        self._patcher = patcher.clone()
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        self._patcher.add_wrapper_with_key(kind, "adastate_bench", self._after_pass)
        work = (context, noise, sigmas)
        self._thread = threading.Thread(target=self._run, args=work, daemon=True)
        self._thread.start()

    def _run(self, context: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> None:
        from comfy_extras.nodes_ar_video import SamplerARVideo
        from comfy_extras.nodes_custom_sampler import Guider_Basic

        self._turn.acquire()
        try:
            guider = Guider_Basic(self._patcher)
            guider.set_conds([[context, {}]])
            sampler = SamplerARVideo.execute(CHUNK).args[0]
            with torch.inference_mode():
                self.latents = guider.sample(
                    noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=SEED
                )
        except BaseException as error:  # shown where the chunks are asked for
            self._failed = error
        self._ended = True
        self._done.release()

    def _after_pass(self, executor: Callable, *inputs: Any, **more: Any) -> torch.Tensor:
        """Around every pass: hand over after the last one of a chunk."""
        out = executor(*inputs, **more)
        self._passes += 1
        if self._passes % PASSES == 0:
            state = inputs[5]["ar_state"]
            kept = [cache[name] for cache in state["kv_caches"] for name in ("k", "v")]
            self.cache_bytes = sum(tensor.nbytes for tensor in kept)
            self._done.release()
            self._turn.acquire()
        return out

    def __next__(self) -> None:
        """One more chunk is made, its clean pass included."""
        self._turn.release()
        self._done.acquire()
        if self._failed is not None:
            raise self._failed

    def finish(self) -> torch.Tensor:
        """The clip's latents [1, 16, T, h, w] in the model's space."""
        while not self._ended:
            next(self)
        self._thread.join()
        return self._patcher.model.process_latent_in(self.latents)


def native_noises(first: torch.Tensor) -> type:
    """A schedule that draws as the host's sampler does: the clip's noise, then by seed + 1000 chunks + steps."""
    from adastate_pack.adastate_core.schedules import schedule

    class NativeNoise(schedule.Schedule):
        def solver(self, chunk: int, noises: torch.Tensor) -> schedule.Solver:
            noises = noises.clone()
            noises[0] = first[:, :, chunk * CHUNK : (chunk + 1) * CHUNK]
            for step in range(1, len(noises)):
                torch.manual_seed(SEED + chunk * 1000 + step - 1)
                noises[step] = torch.randn_like(noises[step])
            return schedule.Renoising(self.for_chunk(chunk), noises)

    return NativeNoise


def pack_rollout(host: Any, clip: torch.Tensor, adaptive: bool, text_tokens: int) -> Any:
    """A Rollout of the pack: with the whole clip as its window and the host's noise, or with the adaptive state."""
    from adastate_pack.adastate_core.anchors import Anchor, AnchorAdaptive
    from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
    from adastate_pack.adastate_core.schedules.schedule import Schedule

    frames, rows, columns = clip.shape[2:]
    window, anchor = (CHUNK, AnchorAdaptive(1)) if adaptive else (frames - CHUNK, Anchor())
    positions = "packed" if adaptive else "absolute"
    spec = RolloutSpec(host.geometry, 1, rows, columns, CHUNK, window, anchor, positions, host.dtype)
    schedule = Schedule.shifted(STEPS, SHIFT)
    if not adaptive:
        schedule = native_noises(clip.to(host.device))(schedule.sigmas)
    host.load(spec.plan(text_tokens))
    return Rollout(host, spec, Settings(SEED, schedule), text_tokens=text_tokens)


def one_round(
    models: tuple[Any, Any], context: torch.Tensor, clip: torch.Tensor, chunks: int, backwards: bool
) -> tuple[dict[str, list[float]], dict[str, int], list[float]]:
    """Seconds of every chunk, bytes of the caches, and by how much the latents of the two full histories differ by chunk."""
    from adastate_pack.adastate_core.schedules.schedule import Schedule
    from adastate_pack.nodes.host.model import HostModel

    causal, plain = models
    sigmas = torch.tensor([*Schedule.shifted(STEPS, SHIFT).sigmas, 0.0])
    native = NativeChunks(causal, context, clip, sigmas)
    hosts = {name: HostModel(plain, context, 1) for name in (FULL, ADAPTIVE)}
    rollouts = {name: pack_rollout(host, clip, name == ADAPTIVE, context.shape[1]) for name, host in hosts.items()}
    streams: dict[str, Iterator[Any]] = {name: each.chunks(clip.shape[2]) for name, each in rollouts.items()}
    streams[NATIVE] = native
    seconds: dict[str, list[float]] = {name: [] for name in (NATIVE, FULL, ADAPTIVE)}
    made = []
    for chunk in range(chunks):
        for name in list(seconds)[:: -1 if (chunk + backwards) % 2 else 1]:
            synchronise()
            begun = time.perf_counter()
            out = next(streams[name])
            synchronise()
            seconds[name].append(time.perf_counter() - begun)
            if name == FULL:
                made.append(out.latents)
    whole = native.finish().to(made[0].device)
    off = [float((a - b).abs().max()) for a, b in zip(whole.split(CHUNK, dim=2), made, strict=True)]
    sizes = {name: each.cache.nbytes for name, each in rollouts.items()} | {NATIVE: native.cache_bytes}
    return seconds, sizes, off


def cache_table(width: int, height: int, text_tokens: int = 512) -> list[str]:
    """Bytes of keys and values by length for the published sizes in bf16, as the host's sampler asks for them and as planned."""
    import comfy.ops
    from adastate_pack.adastate_core.anchors import AnchorAdaptive
    from adastate_pack.adastate_core.rollout import ModelGeometry, RolloutSpec
    from comfy.ldm.wan.ar_model import CausalWanModel

    rows = []
    for name in ("1.3b", "14b"):
        size, feed_forward, depth = bench.GEOMETRIES[name]
        with torch.device("meta"):
            model = CausalWanModel(
                dim=size, ffn_dim=feed_forward, num_heads=size // 128, num_layers=depth,
                operations=comfy.ops.disable_weight_init, device="meta", dtype=torch.bfloat16,
            )  # fmt: skip
        tokens = (height // 16) * (width // 16)
        geometry = ModelGeometry(16, depth, size // 128, 128)
        spec = RolloutSpec(
            geometry, 1, height // 8, width // 8, CHUNK, CHUNK, AnchorAdaptive(1), "packed", torch.bfloat16
        )
        ours = spec.plan(text_tokens).kv_bytes
        for length in LENGTHS:
            caches = model.init_kv_caches(1, ((length - 1) // 4 + 1) * tokens, torch.device("meta"), torch.bfloat16)
            theirs = sum(cache[part].nbytes for cache in caches for part in ("k", "v"))
            rows.append([name, str(length), f"{theirs / 2**30:.1f} GiB", f"{ours / 2**30:.1f} GiB"])
    return table_lines(["model", "video frames", NATIVE, f"{ADAPTIVE}, window {CHUNK}"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_geometry(parser)
    parser.set_defaults(width=256, height=256)
    parser.add_argument("--chunks", type=int, default=27, help="of 3 latent frames, 12 video frames; at least 2")
    parser.add_argument("--rounds", type=int, default=6, help="whole clips; six and more have an interval")
    arguments = parser.parse_args()
    load_pack()
    if importlib.util.find_spec("comfy_extras.nodes_ar_video") is None:
        print(
            "This ComfyUI has no SamplerARVideo, so there is nothing to measure beside; ComfyUI 0.21 and newer have it."
        )
        return
    with torch.inference_mode():
        measure(arguments)


def load_models(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The same weights as the host's causal class, which its sampler wants, and as its plain one."""
    import comfy.sd

    weights = random_weights(arguments.model, arguments.layers)
    causal = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    load = comfy.sd.load_diffusion_model_state_dict
    return load(dict(weights), metadata=causal), load(dict(weights))


def measure(arguments: argparse.Namespace) -> None:
    models, chunks = load_models(arguments), max(2, arguments.chunks)
    shape = (1, 16, chunks * CHUNK, arguments.height // 8, arguments.width // 8)
    luck = torch.Generator().manual_seed(SEED)
    context = torch.randn(1, 512 if arguments.model != "demo" else 4, 4096, generator=luck)
    clip = torch.randn(shape, generator=luck)
    one_round(models, context, clip[:, :, : 2 * CHUNK], 2, False)  # warms up
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(one_round(models, context, clip, chunks, bool(number % 2)))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
    report(arguments, chunks, rounds)


def report(arguments: argparse.Namespace, chunks: int, rounds: list[tuple]) -> None:
    times = {name: [each[0][name] for each in rounds] for name in (NATIVE, FULL, ADAPTIVE)}
    sizes, off = rounds[-1][1], [max(of) for of in zip(*(each[2] for each in rounds), strict=True)]
    rows = []
    for chunk in [shown for shown in SHOWN if shown < chunks] + [chunks]:
        row = [str(chunk), str(12 * chunk - 3)]
        for name, seconds in times.items():
            row.append(cell([of[chunk - 1] for of in seconds], [of[chunk - 1] for of in times[NATIVE]], name == NATIVE))
        rows.append(row)
    whole = {name: [sum(of) for of in seconds] for name, seconds in times.items()}
    rows.append(["all", str(12 * chunks - 3), *(total(whole[name], whole[NATIVE], name == NATIVE) for name in times)])
    rows.append(["KV cache", "", *(f"{sizes[name] / 2**20:.1f} MiB" for name in times)])
    write_table(
        f"native-{arguments.model}",
        f"Beside the host's own causal sampler, {arguments.model} geometry, {arguments.width}x{arguments.height}",
        ["chunk", "video frames so far", *times],
        rows,
        [
            f"Milliseconds a chunk, medians of {len(rounds)} clips; the ratio is to the host's sampler at the same chunk, with "
            "the interval that holds such a median in 95 of 100 cases (from six clips on). The three take turns at every "
            "chunk, in an order that goes back and forth.",
            f"The same random weights, prompt and sigmas ({STEPS} steps, shift {SHIFT:.0f}, and a clean pass); chunks of "
            f"{CHUNK} latent frames. Decoding is left out.",
            "Full history is the same computation: with the host's noise the pack's latents differ by at most "
            f"{max(off):.1e} over the clip, {off[0]:.1e} in the first chunk (their standard deviation is about 1).",
            "The host's sampler allocates the whole clip's keys and values at the start.",
        ],
        [
            "Keys and values by length, bf16, 832x480 (what each allocates, no run):", "", *cache_table(832, 480), "",
            "What either can do:", "", *table_lines(["", NATIVE, "this pack"], [list(line) for line in CAN]), "",
        ],
    )  # fmt: skip


def cell(seconds: list[float], reference: list[float], alone: bool) -> str:
    """`123.4` or `123.4 (x 1.02, 1.00 to 1.05)`."""
    text = f"{1000 * statistics.median(seconds):.1f}"
    return text if alone else f"{text} ({ratio(seconds, reference)})"


def total(seconds: list[float], reference: list[float], alone: bool) -> str:
    """Of whole clips: `123.4 s` or with the ratio."""
    text = f"{statistics.median(seconds):.1f} s"
    return text if alone else f"{text} ({ratio(seconds, reference)})"


def ratio(seconds: list[float], reference: list[float]) -> str:
    """The median of the ratios of pairs, with its interval where there are enough."""
    ratios = sorted(a / b for a, b in zip(seconds, reference, strict=True))
    low, high = interval(ratios)
    return f"x {statistics.median(ratios):.3f}" + (f", {low:.3f} to {high:.3f}" if len(ratios) >= 6 else "")


if __name__ == "__main__":
    main()
