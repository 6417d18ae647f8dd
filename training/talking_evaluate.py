"""The talking demo, 7: do its pictures follow sound that they never heard, and the picture that they are given?

    python3 run.py train talking_evaluate --config training/configs/talking_evaluate.toml

Every stream is rolled out with its own sound, with another stream's and in silence; balloon and lantern are measured in the decoded
pictures against loudness and pitch as they were meant. True clips through the codec are measured in the same way: the ceiling.
What has been rolled out is kept in the run's folder and not made again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

import torch

from adastate_core.audio.demo_ear import RATE, codes
from adastate_core.decode.wan_vae import pictures_of
from adastate_core.geometry import WAN21
from adastate_core.measure.metrics import sharpness
from adastate_core.schedules.schedule import Schedule

from . import measures
from .bare_model import load_codec
from .codec import encode_clip
from .evaluate import LEAD, interval, true_segment
from .latents import word_numbers
from .run import Run, log
from .sheets import decoded, draw_sheet
from .talking_latents import still_latents
from .talking_measures import balloon_radius, follows, lantern_height, lantern_right
from .talking_model import load_talking
from .talking_rollout import rolled_out, seeded_noise
from .talking_world import TalkingScene
from .texts import Texts
from .world import CHUNK_LATENTS, FPS, render

# the control: how much later in the sound the pictures are looked for
SHIFT = 3 * FPS
# frames of the first chunk, which has no past and is not measured
FIRST = 13
Row = dict[str, float]
SOUNDS = ("own", "another", "silence")
# of true clips: what the size of a balloon that keeps still seems to vary, by sky and codec
STILL = "size varies in silence, px"
# what may be left open by the words, for the picture to decide
OPEN = {"terrain": 0, "balloon": 2}


@dataclass(frozen=True)
class Segment:
    """Latents that are measured, and the numbers of their pictures."""

    name: str
    latents: range

    @property
    def pictures(self) -> range:
        return range(WAN21.pictures(self.latents.start) if self.latents.start else 0, WAN21.pictures(self.latents.stop))

    @property
    def measured(self) -> slice:
        """Of its pictures."""
        return slice(0 if self.latents.start else FIRST, None)


def seen(video: torch.Tensor, scene: TalkingScene, other: TalkingScene, segment: Segment) -> Row:
    """What one stream's pictures of a segment show; `other` is the scene whose sound is another's to it."""
    video, frames = video[segment.measured], torch.tensor(segment.pictures)[segment.measured]
    radius, height = balloon_radius(video, scene), -lantern_height(video)
    told = {"own": scene.truth(frames), "another": other.truth(frames), "later": scene.truth(frames + SHIFT)}
    row = {f"size, {name}": follows(radius, truth["loudness"]) for name, truth in told.items()}
    row |= {f"height, {name}": follows(height, truth["pitch"]) for name, truth in told.items()}
    return row | {
        "size varies, px": radius.std().item(),
        "height varies, px": height[~height.isnan()].std().item(),
        "no balloon": (radius < 2).float().mean().item(),
        "lantern in its colour": lantern_right(video, scene.lantern_colour).float().mean().item(),
        "terrain right": measures.terrain_right(video, scene).float().mean().item(),
        "flow error, px a frame": measures.flow_error(video, scene).mean().item(),
        "day's speed": measures.clock_rate(video),
        "sharpness, 1000 x": 1000 * sharpness(video).mean().item(),
    }


class Talking:
    """Scenes with voices, the codec and the model."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        config = run.config
        self.codec, horizon = load_codec(config["codec"]), config["horizon_latents"]
        self.segments = [Segment(f"{n}x", range((n - 1) * horizon, n * horizon)) for n in config["lengths"]]
        self.chunks = max(config["lengths"]) * horizon // CHUNK_LATENTS
        longer = self.chunks + SHIFT // (4 * CHUNK_LATENTS) + 1
        self.scenes = [TalkingScene.drawn(config["scenes_seed"] + i, longer, up=True) for i in range(config["scenes"])]
        self.model = load_talking(config["weights"])

    def heard(self, sound: str) -> torch.Tensor:
        """[scenes, T50, 12]: what the ear hears."""
        waves = torch.cat([scene.waveform for scene in self.scenes])
        waves = {"own": waves, "another": waves.roll(1, 0), "silence": torch.zeros_like(waves)}[sound]
        return codes(waves, RATE)

    def latents(
        self, sound: str, seed: int, chunks: int, open_slots: tuple[str, ...] = (), picture: int = 0
    ) -> torch.Tensor:
        """Rollouts of all scenes [scenes, 16, T, h, w]; each is referred to the first picture of the scene `picture` before it."""
        encoder, texts = partial(encode_clip, self.codec), Texts()
        pictures = [render(scene, torch.arange(1))[0] for scene in self.scenes]
        stills = torch.stack([still_latents(encoder, one) for one in pictures]).roll(picture, 0)
        words = torch.stack([word_numbers(scene, chunks) for scene in self.scenes])
        kept = tuple(i for i in range(words.shape[2]) if i not in [OPEN[slot] for slot in open_slots])
        contexts = [texts.context(words[:, i], kept) for i in range(chunks)]
        size = (len(stills), 16, CHUNK_LATENTS, *stills.shape[-2:])
        schedule = Schedule.shifted(self.config["rollout_steps"], self.config["shift"])
        noise = seeded_noise(seed, size)
        return rolled_out(
            self.model, contexts, self.heard(sound), stills, noise, schedule, self.config["window_frames"]
        )

    def rows(self, sound: str, seed: int) -> dict[str, list[Row]]:
        """Segment -> a row for every stream, of rollouts with a `sound`; from the folder if they are there."""
        file = self.run.folder / f"{sound}_{seed}.json"
        if file.exists():
            return json.loads(file.read_text())
        latents = self.latents(sound, seed, self.chunks)
        rows: dict[str, list[Row]] = {}
        for segment in self.segments:
            start = max(0, segment.latents.start - LEAD)
            lead = pictures_of(segment.latents.start - start)
            videos = [decoded(self.codec, one[:, start : segment.latents.stop])[lead:] for one in latents]
            draw_sheet(videos[:8], self.run.folder / f"{sound}_{seed}_{segment.name}.png")
            rows[segment.name] = [self.row(i, video, segment) for i, video in enumerate(videos)]
        file.write_text(json.dumps(rows))
        return rows

    def row(self, number: int, video: torch.Tensor, segment: Segment) -> Row:
        return seen(video, self.scenes[number], self.scenes[number - 1], segment)

    def true_rows(self) -> dict[str, list[Row]]:
        """As `rows`, of the world's own pictures through the codec."""
        file = self.run.folder / "true.json"
        if not file.exists():
            rows: dict[str, list[Row]] = {}
            for segment in self.segments:
                videos = (true_segment(self.codec, scene, segment.latents) for scene in self.scenes)
                rows[segment.name] = [self.row(i, video, segment) for i, video in enumerate(videos)]
                for scene, row in zip(self.scenes, rows[segment.name], strict=True):
                    still = true_segment(self.codec, scene.hushed(), segment.latents)[segment.measured]
                    row[STILL] = balloon_radius(still, scene).std().item()
            file.write_text(json.dumps(rows))
        return json.loads(file.read_text())

    def pictures_decide(self, seed: int) -> dict[str, Row]:
        """Shares of frames whose terrain and lantern are the reference's, with words that leave the terrain open; the reference
        is the scene's own first picture, or that of another scene."""
        file = self.run.folder / f"picture_{seed}.json"
        if not file.exists():
            shares = {}
            for name, shift in (("own picture", 0), ("another's picture", 1)):
                latents = self.latents(
                    "own", seed, self.config["horizon_latents"] // CHUNK_LATENTS, ("terrain",), shift
                )
                rows = []
                for i, one in enumerate(latents):
                    video, scene = decoded(self.codec, one)[FIRST:], self.scenes[i - shift]
                    rows.append(
                        {
                            "terrain": measures.terrain_right(video, scene).float().mean().item(),
                            "lantern": lantern_right(video, scene.lantern_colour).float().mean().item(),
                        }
                    )
                shares[name] = {key: [row[key] for row in rows] for key in rows[0]}
            file.write_text(json.dumps(shares))
        return json.loads(file.read_text())


def heading(config: dict) -> str:
    """Markdown: what the tables below are of."""
    streams, lengths = config["scenes"] * len(config["seeds"]), " and ".join(f"{n}x" for n in config["lengths"])
    return f"""# The talking demo: do its pictures follow its sound?

Made by `python3 run.py train talking_evaluate`: {config["scenes"]} scenes and voices that were in no clip, seeds
{", ".join(map(str, config["seeds"]))} ({streams} streams), rolled out in {config["rollout_steps"]} steps a chunk with the file's
weights. {lengths}: the last {config["horizon_latents"]} latent frames of a rollout that many times as long; the first chunk of all,
which has no past, is left out. Size is the balloon's radius and follows loudness, height is the lantern's and follows pitch:
Pearson's correlation over the pictures of a stream, then the mean over streams with its 95 % interval (bootstrap). *another*:
with the sound of another stream; *later*: with its own sound {SHIFT // FPS} s later. True clips are the world's own pictures
through the codec: the ceiling.
"""


def cell(values: list[float]) -> str:
    """A mean with its interval."""
    mean, low, high = interval(values)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def table(true: dict[str, list[Row]], rows: dict[str, dict[str, list[Row]]]) -> str:
    """Markdown: of every segment, true clips beside rollouts with each sound."""
    lines = []
    for segment, of_true in true.items():
        lines += [
            f"### {segment}",
            "",
            "| | true clips | own sound | another's sound | silence |",
            "| --- | --- | --- | --- | --- |",
        ]
        for key in (key for key in of_true[0] if key != STILL):
            columns = [of_true, *(rows[sound][segment] for sound in SOUNDS)]
            lines.append(f"| {key} | " + " | ".join(cell([row[key] for row in column]) for column in columns) + " |")
        lines.append("")
    return "\n".join(lines)


def bars(true: dict[str, list[Row]], rows: dict[str, dict[str, list[Row]]]) -> str:
    """Markdown: how rollouts stand to what was asked of the demo, by the means of each segment."""
    lines = ["### What was asked", "", "| | asked | " + " | ".join(true) + " |", "| --- | --- |" + " --- |" * len(true)]

    def average(some: list[Row], key: str) -> float:
        return interval([row[key] for row in some])[0]

    for what in ("size", "height"):
        own = {name: (average(rows["own"][name], f"{what}, own"), average(true[name], f"{what}, own")) for name in true}
        found = (f"{ours:.2f}, {ours / theirs:.2f}" for ours, theirs in own.values())
        lines.append(
            f"| {what} follows its own sound; of the true clips' | >= .78, or >= .90 | " + " | ".join(found) + " |"
        )
        for control in ("another", "later"):
            key = f"{what}, {control}"
            found = (f"{average(rows['own'][name], key) - average(true[name], key):+.2f}" for name in true)
            lines.append(f"| {key}: off the true clips' | within .15 | " + " | ".join(found) + " |")
        key = f"{what} varies, px"
        found = (f"{average(rows['silence'][name], key) / average(rows['own'][name], key):.2f}" for name in true)
        lines.append(f"| {what} varies in silence, of that with sound | <= .33 | " + " | ".join(found) + " |")
    return "\n".join([*lines, *silences(true, rows), "", ""])


def silences(true: dict[str, list[Row]], rows: dict[str, dict[str, list[Row]]]) -> list[str]:
    """Markdown: the size in silence once more, in the median stream and against balloons that keep perfectly still."""
    key, told = "size varies, px", []
    for name in true:
        silent, own = ([row[key] for row in rows[sound][name]] for sound in ("silence", "own"))
        still = mean([row[STILL] for row in true[name]])
        less = [max(0.0, mean(values) ** 2 - still**2) ** 0.5 for values in (silent, own)]
        told.append((median(silent) / median(own), still / mean([row[key] for row in true[name]]), less[0] / less[1]))
    words = (
        "size varies in silence: the median stream",
        "the same of true clips, whose balloons keep still: what the measure sees in them",
        "size varies in silence, of that with sound: means, that taken off (in squares)",
    )
    cells = (" | ".join(f"{value:.2f}" for value in values) for values in zip(*told, strict=True))
    return [f"| {what} | | {found} |" for what, found in zip(words, cells, strict=True)]


def main() -> None:
    run = Run.from_arguments("Measure whether the talking demo follows its sound and its picture.")
    with torch.no_grad():
        talking = Talking(run)
        true = talking.true_rows()
        log.info("true clips: size follows %s", cell([row["size, own"] for row in true["1x"]]))
        rows: dict[str, dict[str, list[Row]]] = {}
        for sound in SOUNDS:
            rows[sound] = {segment.name: [] for segment in talking.segments}
            for seed in run.config["seeds"]:
                for name, some in talking.rows(sound, seed).items():
                    rows[sound][name] += some
                log.info(
                    "%s sound, seed %d: size follows %s",
                    sound,
                    seed,
                    cell([row["size, own"] for row in rows[sound]["1x"]]),
                )
        pictures = picture_table([talking.pictures_decide(seed) for seed in run.config["seeds"]])
        (run.folder / "talking.md").write_text(
            "\n".join([heading(run.config), bars(true, rows), table(true, rows), pictures])
        )
    run.workers.leave()


def picture_table(shares: list[dict[str, dict[str, list[float]]]]) -> str:
    """Markdown: of frames whose words leave the terrain open, how many have terrain and lantern of the reference."""
    lines = [
        "### Words leave the terrain open",
        "",
        "| reference | its terrain | its lantern's colour |",
        "| --- | --- | --- |",
    ]
    for name in shares[0]:
        columns = (cell([value for one in shares for value in one[name][key]]) for key in ("terrain", "lantern"))
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
