"""How far each contender comes in the journey, and what its anchor has to do with it: tables and a figure over time.

    python3 run.py train journey_table --config training/configs/journey/table.toml

Streams begin with a true first chunk, so that speed, landscape and hour are there to be read. Contenders share scenes and content
noise, and differences are taken stream by stream, with 95 % bootstrap intervals over streams. Attention is measured in streams that
begin with noise. What is measured is kept stream by stream in the run's folder, and not measured again as long as the weights are
the same or gone.
"""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from pathlib import Path

import torch
from PIL import Image

from adastate_core.files.whole_file import whole_file
from adastate_core.geometry import WAN21

from .bare_model import load_codec, read_weights
from .contenders import Contender
from .evaluate import differences, interval, rolled_table
from .journey_streams import (
    ANCHOR_SERIES,
    BORDERS,
    COLUMNS,
    CONTENT_ERROR,
    DAYS,
    DISTANCE,
    LIKE,
    STATE_ERROR,
    Rolled,
    Streams,
    scenes_of,
    shares,
)
from .kept_streams import ENDING, Kept
from .run import Run, log
from .sheets import draw_sheet
from .small_pictures import write_figure, write_picture
from .world import CHUNK_LATENTS

TRUE = "true renders"
CONTEXT, ALL = "of the context", "of all"
# how far a stream is from its own truth, to whichever side
DISTANCE_OFF, DAY_OFF = "distance, off by", "day, off by"
SHOWN = (DISTANCE, DISTANCE_OFF, BORDERS, DAYS, DAY_OFF, *COLUMNS[3:])


def digest_of(contender: Contender | None) -> str | None:
    """Of the weights in bf16, as they are handed on, and the LoRA on them; None if they are gone. The world's own pictures have an
    empty one."""
    if contender is None:
        return ""
    if not all(Path(file).exists() for file in (contender.weights, contender.lora) if file):
        return None
    digest = hashlib.sha256()
    for name, value in sorted(read_weights(contender.weights).items()):
        digest.update(name.encode() + value.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    if contender.lora:
        digest.update(Path(contender.lora).read_bytes())
    return digest.hexdigest()[:16]


class Table:
    """All contenders of a config, and what is to be measured of them."""

    def __init__(self, run: Run) -> None:
        self.run, self.folder, self.config = run, run.folder, run.config
        self.count, self.lengths = self.config["streams"], self.config["lengths"]
        self.scratch = Path(self.config["scratch"])
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.streams = Streams(load_codec(self.config["codec"]), self.config, self.count, self.lengths)
        self.contenders: dict[str, Contender | None] = {TRUE: None}
        self.contenders |= {entry["name"]: Contender(**entry) for entry in self.config["contenders"]}
        self.kept = {name: self._kept(name, contender) for name, contender in self.contenders.items()}

    def _kept(self, name: str, contender: Contender | None) -> Kept:
        asked = ("seed", "scenes_seed", "lengths", "horizon_latents", "given_latents")
        rules = {key: self.config[key] for key in asked}
        if contender is not None:
            rules |= {
                "anchor": contender.anchor, "window_frames": contender.window_frames, "positions": contender.positions,
                "steps": contender.steps, "shift": contender.shift,
            } | ({"lora": contender.lora} if contender.lora else {})  # fmt: skip
        file = f"{name}_{max(self.lengths)}x{ENDING}".replace(" ", "_")
        return Kept(self.folder / file, rules, digest_of(contender))

    def sheet(self, name: str, stream: int) -> Path:
        """Where pictures of a contender's stream are drawn."""
        return self.scratch / f"{name}_{max(self.lengths)}x_{stream}.png".replace(" ", "_")

    def _rolled(self, name: str, contender: Contender) -> Rolled:
        """All streams of a contender; from the scratch folder if the same weights made them."""
        path, kept = self.scratch / f"{name}_{max(self.lengths)}x.pt".replace(" ", "_"), self.kept[name]
        same = [kept.rules, kept.weights, self.count]
        if path.exists() and (made := torch.load(path, weights_only=True))["of"] == json.dumps(same):
            return Rolled(made["latents"], made["hidden"])
        log.info("%s: %d streams of %d latent frames", name, self.count, self.streams.latents)
        rolled = self.streams.rolled(contender)
        with whole_file(path) as file:
            torch.save({"of": json.dumps(same), "latents": rolled.latents, "hidden": rolled.hidden}, file)
        return rolled

    def measure(self, name: str) -> None:
        """What of a contender is not measured yet."""
        contender, kept = self.contenders[name], self.kept[name]
        left = [i for i in range(self.count) if "stretches" not in kept.streams.get(str(i), {})]
        rolled = self._rolled(name, contender) if contender and left else None
        for stream in left:
            one = None if rolled is None else rolled.of(stream)
            first = contender is not None and contender.anchor["kind"] == "static"
            measured, video = self.streams.measured(one, first, stream)
            kept.keep(stream, measured)
            self.run.stop_if_asked()
            if stream < self.config["drawn"]:
                draw_sheet([video], self.sheet(name, stream))
            log.info(
                "%s, stream %d: %s",
                name,
                stream,
                {s: round(row[COLUMNS[0]], 2) for s, row in measured["stretches"].items()},
            )
        if contender is None or not self.config["share_streams"]:
            return
        chunks = self.streams.latents // CHUNK_LATENTS
        scenes = scenes_of(self.config["share_streams"], self.config["scenes_seed"])
        for stream, scene in enumerate(scenes):
            if "shares" not in kept.streams[str(stream)]:
                kept.keep(stream, {"shares": shares(contender, scene, self.config["seed"] + stream, chunks)})

    def results(self) -> dict[str, dict[str, list[dict[str, float]]]]:
        """Contender -> stretch -> columns of every stream, and those that follow from them."""
        rows = {name: kept.all(self.count, "stretches") for name, kept in self.kept.items()}
        return {
            name: {f"{n}x": [with_errors(row[f"{n}x"]) for row in each] for n in self.lengths}
            for name, each in rows.items()
        }

    def series(self, name: str, what: str) -> torch.Tensor:
        """[streams, chunks] float64."""
        return torch.tensor([one[what] for one in self.kept[name].all(self.count, "series")], dtype=torch.float64)

    def on_anchor(self, name: str, of: str) -> torch.Tensor:
        """[streams, chunks] share of attention on the anchor; 0 where there is none."""
        found = self.kept[name].all(self.config["share_streams"], "shares")
        totals = [[sum(v for k, v in chunk.items() if k.startswith("anchor")) for chunk in one[of]] for one in found]
        return torch.tensor(totals, dtype=torch.float64)


def with_errors(row: dict[str, float]) -> dict[str, float]:
    """A stretch's columns, and by how much distance and day miss the truth."""
    return row | {DISTANCE_OFF: abs(row[DISTANCE] - 1), DAY_OFF: abs(row[DAYS] - 1)}


def cell(values: torch.Tensor | list[float], digits: int = 2) -> str:
    """Mean and interval; a dash where nothing can be told."""
    mean, low, high = interval(values.tolist() if isinstance(values, torch.Tensor) else values)
    return "-" if math.isnan(mean) else f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def rows_of(titles: list[str], rows: list[list[str]]) -> list[str]:
    """A table."""
    return ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]


def share_lines(table: Table) -> list[str]:
    """Attention on the anchor at every length's end, and by place in the cache in the last chunk."""
    names = [name for name, contender in table.contenders.items() if contender is not None]
    chunks = {n: n * table.streams.horizon // CHUNK_LATENTS - 1 for n in table.lengths}
    rows = [
        [name, of, *(cell(table.on_anchor(name, of)[:, chunk], 3) for chunk in chunks.values())]
        for name in names
        for of in (CONTEXT, ALL)
    ]
    lines = rows_of(["share on the anchor", "counted", *(f"{n}x" for n in chunks)], rows)
    lines += ["", f"By place, in the last chunk of {max(table.lengths)}x:", ""]
    last = {
        name: [one[ALL][-1] for one in table.kept[name].all(table.config["share_streams"], "shares")] for name in names
    }
    places = list(dict.fromkeys(place for each in last.values() for one in each for place in one))
    rows = [
        [name, *(cell([one.get(place, math.nan) for one in each], 3) for place in places)]
        for name, each in last.items()
    ]
    return lines + rows_of(["of all", *places], rows)


def error_lines(table: Table) -> list[str]:
    """Errors of content and state against the truth, by chunk of the first two horizons, in what was in view at the start."""
    most = min(max(table.lengths), 2) * table.streams.horizon // CHUNK_LATENTS
    rows = []
    for name, contender in table.contenders.items():
        for what in (CONTENT_ERROR, STATE_ERROR) if contender else ():
            errors = table.series(name, what)[:, :most]
            if not errors.isnan().all():
                rows.append([name, what, *(cell(errors[:, i], 1) for i in range(most))])
    told = "Chunk 0 is given: its error is the codec's, and the state's there that of the chunk's last latent, decoded alone."
    return [told, "", *rows_of(["contender", "what", *(f"chunk {i}" for i in range(most))], rows)]


def opening(table: Table) -> list[str]:
    """What was done, in a paragraph, and the command."""
    config, given = table.config, WAN21.pictures(table.streams.given)
    spans = ", ".join(f"{n}x is {WAN21.pictures(n * table.streams.horizon) / WAN21.fps:.0f} s" for n in table.lengths)
    text = (
        f"{table.count} streams of the journey (training/journey.py), each from its own true first chunk ({given} pictures); "
        f"{spans}. *Distance*, *borders* and *day* are counted from there to the end of the stretch, all others in its last one. "
        "*Of the true*: over what the stream's own scene does; *off by*: how far that is from 1, to either side. *Still in the "
        "first region*: pictures whose middle shows the "
        "kind of ground that the first picture's does. *Like the first picture*: correlation of the landscape, place by place. "
        "*Anchor's picture*: the first picture, or the state that a chunk has read, decoded; keys and values that are blended have "
        "none. Distances dE are in Lab. Means with 95 % bootstrap intervals over streams; differences stream by stream, with equal "
        f"content noise, in bold where clear of zero. {config['about']}"
    )
    command = f"python3 run.py train journey_table --config training/configs/journey/{config['page']}.toml"
    return [*textwrap.wrap(text, 130), "", f"`{command}` makes this page."]


def page(table: Table) -> list[str]:
    """The whole page."""
    results = table.results()
    lines = [f"# {table.config['title']}", "", *opening(table), "", *rolled_table(results, [], SHOWN)]
    for reference, *others in table.config["compared"]:
        lines += differences(results, reference, others, SHOWN)
    if table.config["share_streams"]:
        lines += ["", f"## Attention, {table.config['share_streams']} free streams", "", *share_lines(table)]
    lines += ["", "## Error against the truth, dE, of what was in view at the start", "", *error_lines(table), ""]
    lines = [line.replace("nan (nan to nan)", "-").replace("+nan (+nan to +nan)", "-") for line in lines]
    told = [c for c in table.contenders.values() if c is not None]
    return lines + [f"- {c.name}: {c.weights}, {c.steps} steps, {c.anchor}; A + W + F = {c.frames}" for c in told]


def draw(table: Table, path: Path) -> None:
    """Distance, likeness to the first picture, the anchor's picture to the present, and the share on the anchor, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {
        "distance, pixels": "distance",
        "likeness to the first picture": LIKE,
        "anchor's picture to the present, dE": ANCHOR_SERIES,
    }
    figure, panels = pyplot.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for number, (name, contender) in enumerate(table.contenders.items()):
        style = {"color": "black" if contender is None else f"C{(number - 1) % 10}", "linewidth": 1.2, "label": name}
        style["linestyle"] = "--" if number > 10 else "-"
        for panel, what in zip(panels, shown.values(), strict=False):
            values = table.series(name, what).nanmean(0)
            seconds = (torch.arange(len(values)) + 1) * WAN21.temporal_stride * CHUNK_LATENTS / WAN21.fps
            panel.plot(seconds, values, **style)
        if contender is not None and table.config["share_streams"]:
            panels[3].plot(seconds, table.on_anchor(name, CONTEXT).mean(0), **style)
    for panel, title in zip(panels, (*shown, "attention on the anchor, of the context"), strict=True):
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlabel("seconds", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    write_figure(figure, path)


def draw_streams(table: Table, path: Path) -> None:
    """The sheets of the contenders that the config's `pictured` names, stream by stream below each other; nothing where what they
    are made of is gone."""
    names, streams = table.config["pictured"], range(table.config["pictured_streams"])
    files = [[table.sheet(name, stream) for name in names] for stream in streams]
    if not all(file.exists() for each in files for file in each):
        log.info("%s is left as it is: its sheets were drawn on another machine", path)
        return
    groups = [[Image.open(file) for file in each] for each in files]
    width, gap = groups[0][0].width, 12
    height = sum(one.height for group in groups for one in group) + gap * (len(groups) - 1)
    whole, top = Image.new("RGB", (width, height), "white"), 0
    for group in groups:
        for one in group:
            whole.paste(one, (0, top))
            top += one.height
        top += gap
    write_picture(whole, path)


@torch.no_grad()
def main() -> None:
    run = Run.from_arguments("How far contenders come in the journey.")
    table = Table(run)
    for name in table.contenders:
        table.measure(name)
    text = "\n".join(page(table))
    with whole_file(run.folder / f"{run.config['page']}.md") as file:
        file.write((text + "\n").encode())
    draw(table, run.folder / f"{run.config['page']}.png")
    if run.config.get("pictured"):
        draw_streams(table, run.folder / f"{run.config['page']}_streams.png")
    log.info("%s", text)


if __name__ == "__main__":
    main()
