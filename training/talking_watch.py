"""Watch a talking video with its own sound: the balloon's size and the lantern's height beside what the file lets one hear.

    python3 run.py train talking_watch --video FILE.mp4 --balloon crimson [--out training/results/talking/ten_minutes.png]

Nothing but the file is read: sizes are measured in its decoded pictures, loudness and pitch in its decoded sound. A table
beside the plot says, minute by minute, how closely the one follows the other, at which lag best, and how late tones are seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import matplotlib
import torch

from adastate_core.audio.demo_ear import RATE, at_16_khz, loudness_and_pitch
from adastate_core.prompts.demo_words import VOCABULARY
from adastate_core.video.sound_file import read_sound

from .talking_measures import balloon_radius, follows, lantern_height
from .talking_world import at_frames, followed
from .world import FPS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LAGS = range(-6, 7)
_BATCH = 512  # pictures in memory at a time
_SHOWN = 8.0  # seconds of a close-up


def pictures(path: Path) -> Iterator[torch.Tensor]:
    """The video's pictures, [n, H, W, 3] in 0..1, some hundred at a time."""
    with av.open(str(path)) as container:
        held = []
        for frame in container.decode(video=0):
            held.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if len(held) == _BATCH:
                yield torch.stack(held).float() / 255
                held = []
        if held:
            yield torch.stack(held).float() / 255


def rate_of(path: Path) -> float:
    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate)


def watched(path: Path, balloon: str) -> dict[str, Any]:
    """`size` and `height` [T] in pixels, `loudness` and `pitch` [T] as heard at each picture, `wave` [N] at 16 kHz, `fps`."""
    scene = SimpleNamespace(balloon=balloon)
    parts = [(balloon_radius(some, scene), -lantern_height(some)) for some in pictures(path)]
    size, height = (torch.cat(each) for each in zip(*parts, strict=True))
    sound = read_sound(path)
    loudness, pitch, voiced = (one[0] for one in loudness_and_pitch(sound.waveform[None], sound.rate))
    fps = rate_of(path)
    frames = torch.arange(len(size)).double() * FPS / fps
    # where nobody speaks the lantern stays where the last tone left it
    held = pitch.clone()
    for i in range(1, len(held)):
        if not voiced[i] > 0.5:
            held[i] = held[i - 1]
    return {
        "size": size, "height": height, "loudness": at_frames(loudness, frames), "pitch": at_frames(followed(held), frames),
        "wave": at_16_khz(sound.waveform.mean(0, keepdim=True), sound.rate)[0], "fps": fps,
    }  # fmt: skip


def lagged(seen: torch.Tensor, told: torch.Tensor, lag: int) -> float:
    """How closely pictures follow what was heard `lag` pictures before them."""
    return follows(seen[max(0, lag) : len(seen) + min(0, lag)], told[max(0, -lag) : len(told) - max(0, lag)])


def half_way(track: torch.Tensor, first: int, last: int) -> float | None:
    """Where between `first` and `last` a track is half-way up from its value at `first` to its largest, in fractions of a picture;
    None where it does not rise."""
    part = track[first:last].double()
    middle = (part[0] + part.max()) / 2
    above = (part > middle).nonzero()
    if part.max() - part[0] < 0.1 * (track.max() - track.min()) or not len(above):
        return None
    i = int(above[0])
    return first + i - float((part[i] - middle) / (part[i] - part[i - 1]))


def onsets(found: dict[str, Any]) -> list[float]:
    """Pictures by which the balloon's growing is later than the loudness's, for every tone after half a second of silence."""
    loudness, quiet, within = found["loudness"], round(0.5 * found["fps"]), 8
    starts = [
        i for i in range(quiet, len(loudness) - within)
        if loudness[i] >= 0.05 and bool((loudness[i - quiet : i] < 0.05).all())
    ]  # fmt: skip
    pairs = [(half_way(found["size"], i - 2, i + within), half_way(loudness, i - 2, i + within)) for i in starts]
    return [seen - heard for seen, heard in pairs if seen is not None and heard is not None]


def table(found: dict[str, Any]) -> str:
    """Markdown: correlations by minute and by lag."""
    minute, count = round(60 * found["fps"]), len(found["size"])
    lines = ["| minute | size follows loudness | height follows pitch | no balloon |", "| --- | --- | --- | --- |"]
    spans = [(f"{n + 1}", slice(n * minute, (n + 1) * minute)) for n in range(-(-count // minute))]
    for name, span in [*spans, ("all", slice(0, count))]:
        size, height = found["size"][span], found["height"][span]
        if len(size) < found["fps"]:
            continue
        told = follows(size, found["loudness"][span]), follows(height, found["pitch"][span])
        lines.append(f"| {name} | {told[0]:.2f} | {told[1]:.2f} | {float((size < 2).float().mean()):.3f} |")
    lines += [
        "",
        "| pictures later than the sound | " + " | ".join(str(lag) for lag in LAGS) + " |",
        "| --- |" + " --- |" * len(LAGS),
    ]
    lines.append(
        "| size | " + " | ".join(f"{lagged(found['size'], found['loudness'], lag):.2f}" for lag in LAGS) + " |"
    )
    late = torch.tensor(onsets(found))
    if len(late):
        low, middle, high = late.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        near = float((late.abs() <= 1).float().mean())
        lines += [
            "",
            f"{len(late)} tones come after half a second of silence. The balloon is half-way to its size {middle:+.2f} pictures",
            f"later than the loudness (half of them between {low:+.2f} and {high:+.2f}); within one picture in {near:.2f} of them.",
        ]
    return "\n".join([*lines, ""])


def draw(found: dict[str, Any], path: Path) -> None:
    """Waveform and balloon: all of it, and close-ups near its beginning, middle and end."""
    fps, count = found["fps"], len(found["size"])
    seconds = count / fps
    starts = [max(0.0, min(seconds - _SHOWN, at)) for at in (seconds * 0.02, seconds * 0.5, seconds - _SHOWN)]
    figure, axes = plt.subplots(4, 1, figsize=(14, 12), constrained_layout=True)
    for axis, (start, length) in zip(axes, [(0.0, seconds), *((start, _SHOWN) for start in starts)], strict=True):
        wave = found["wave"][int(start * RATE) : int((start + length) * RATE)]
        step = max(1, len(wave) // 20_000)
        axis.plot(start + torch.arange(len(wave))[::step] / RATE, wave[::step], color="0.75", linewidth=0.5)
        axis.set_ylabel("waveform")
        axis.set_xlim(start, start + length)
        beside = axis.twinx()
        first, last = int(start * fps), min(count, int((start + length) * fps))
        times = (torch.arange(first, last) + 0.5) / fps
        beside.plot(
            times,
            found["size"][first:last],
            color="C3",
            linewidth=0.6 if length > 60 else 1.5,
            label="balloon's radius, px",
        )
        if length <= 60:
            low, high = found["size"].quantile(0.02), found["size"].quantile(0.98)
            beside.plot(
                times, low + (high - low) * found["loudness"][first:last], "--", color="C0", label="loudness, scaled"
            )
        beside.set_ylim(0, 14)
        beside.legend(loc="upper right")
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--video", type=Path, required=True)
    parser.add_argument("--balloon", choices=VOCABULARY["balloon"], default="crimson")
    parser.add_argument("--out", type=Path, default=Path("training/results/talking/watched.png"))
    arguments = parser.parse_args()
    found = watched(arguments.video, arguments.balloon)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    draw(found, arguments.out)
    length = len(found["size"]) / found["fps"]
    heading = (
        f"# A talking video of {length:.0f} s, watched with its own sound\n\nMade by `run.py train talking_watch`.\n\n"
    )
    arguments.out.with_suffix(".md").write_text(heading + table(found))


if __name__ == "__main__":
    main()
