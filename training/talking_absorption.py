"""The talking demo, 8: does it still follow its sound where half the layers forget their history (as ISPA's figure 6 asks)?

    python3 run.py train talking_absorption --config training/configs/talking_absorption.toml

Every row of the table is rolled out by the pack's own nodes, stream by stream with one sound, picture and noise for all rows: the
full history, half the layers without theirs (corrected, and not), and a shorter history for all layers in as many bytes. Streams
that were measured are kept in the run's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from adastate_core.audio.demo_ear import RATE
from adastate_core.decode.wan_vae import pictures_of

from .codec import encode_clip
from .evaluate import LEAD
from .kept_streams import ENDING, Kept
from .latents import word_numbers
from .pack_nodes import PackNode, nodes
from .run import Run, log
from .sheets import decoded, draw_sheet
from .table_cells import cell
from .talking_evaluate import Talking
from .talking_latents import still_latents
from .texts import Texts
from .world import CHUNK_LATENTS, SIZE, render

SHOWN = (
    "size, own",
    "height, own",
    "size, another",
    "no balloon",
    "lantern in its colour",
    "terrain right",
    "flow error, px a frame",
    "sharpness, 1000 x",
)


class Rows:
    """The scenes of the talking demo's evaluation, and the pack's nodes with its weights."""

    def __init__(self, run: Run) -> None:
        self.nodes = {name: PackNode(node) for name, node in nodes().items()}
        import comfy.sd

        self.config, self.talking = run.config, Talking(run)
        self.model = comfy.sd.load_diffusion_model(self.config["weights"])
        self.segment = self.talking.segments[-1]

    def given(self, scene: int) -> dict[str, Any]:
        """What a stream is driven by and shown: its sound, its first picture, its words."""
        one = self.talking.scenes[scene]
        audio = {"waveform": one.waveform, "sample_rate": RATE}
        [encoded] = self.nodes["AdaStateDemoEar"](audio=audio)
        [track] = self.nodes["AdaStateAudio"](audio=audio, encoded=encoded, fps=0.0, offset=0.0)
        encoder = partial(encode_clip, self.talking.codec)
        still = still_latents(encoder, render(one, torch.arange(1))[0])[1]
        reference = self.model.model.process_latent_out(still[None, :, None].float())
        context = Texts().context(word_numbers(one, 1)[:1])
        return {"audio": track, "reference": {"samples": reference}, "positive": [[context, {}]]}

    def rolled_out(self, row: dict[str, Any], scene: int, seed: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """(latents [16, T, h, w] as the model has them, the report) of one stream by the rules of a row."""
        more = {}
        if "absorption" in row:
            [more["absorption"]] = self.nodes["AdaStateAbsorption"](**row["absorption"])
        samples, _, report, *_ = self.nodes["AdaStateRollout"](
            model=self.model, width=SIZE, height=SIZE, batch_size=1, length=pictures_of(self.talking.chunks * CHUNK_LATENTS),
            seed=seed, steps=0, shift=0.0, chunk_frames=0, window_frames=row["window_frames"], positions="auto",
            **self.given(scene), **more,
        )  # fmt: skip
        return self.model.model.process_latent_in(samples["samples"])[0], json.loads(report)

    @torch.no_grad()
    def measured(self, row: dict[str, Any], scene: int, seed: int) -> tuple[dict[str, Any], torch.Tensor]:
        """What a stream shows in the last segment and what its history takes, and its pictures there."""
        latents, report = self.rolled_out(row, scene, seed)
        start = max(0, self.segment.latents.start - LEAD)
        video = decoded(self.talking.codec, latents[:, start : self.segment.latents.stop])
        video = video[pictures_of(self.segment.latents.start - start) :]
        absorbed = report.get("absorption") or {}
        held = absorbed.get("kv_bytes_after", report["kv_bytes_used"])
        return self.talking.row(scene, video, self.segment) | {
            "bytes": held,
            "layers": absorbed.get("layers", []),
        }, video


def page(rows: Sequence[dict[str, Any]], found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a column a row of the config; in pairs, what each differs by from the first."""
    first = found[rows[0]["name"]]
    lines = [
        "# The talking demo without half of its history",
        "",
        f"Made by `python3 run.py train talking_absorption`: {len(first)} streams, each with one sound, picture and noise for all",
        "columns, rolled out by the pack's nodes to 6x the clips' length, and measured over the last clip's length as in",
        "[the demo's own table](../talking/talking.md). Layers that lose their history keep nothing of it after a warm-up of 24",
        "latent frames.",
        "",
    ]
    lines += ["| | " + " | ".join(row["name"] for row in rows) + " |", "| --- |" + " --- |" * len(rows)]
    for key in SHOWN:
        lines.append(f"| {key} | " + " | ".join(cell(one[key] for one in found[row["name"]]) for row in rows) + " |")
        differs = [[b[key] - a[key] for a, b in zip(first, found[row["name"]], strict=True)] for row in rows[1:]]
        lines.append(
            "| less the first column's, in pairs | | " + " | ".join(cell(each, "{:+.3f}") for each in differs) + " |"
        )
    whole = first[0]["bytes"]
    shares = [max(one["bytes"] for one in found[row["name"]]) for row in rows]
    lines.append("| keys and values at the end, KiB | " + " | ".join(f"{each / 2**10:.0f}" for each in shares) + " |")
    lines.append("| of the full history's | " + " | ".join(f"{each / whole:.2f}" for each in shares) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    run = Run.from_arguments("Measure the talking demo with absorbed history.")
    config, found = run.config, {}
    rows = Rows(run)
    for row in config["rows"]:
        rules = {name: value for name, value in row.items() if name != "name"} | {"weights": config["weights"]}
        kept = Kept(run.folder / f"{row['name'].replace(' ', '_').replace(',', '')}{ENDING}", rules)
        videos = []
        for seed, scene in product(config["seeds"], range(config["scenes"])):
            if f"{seed}/{scene}" not in kept.streams:
                measured, video = rows.measured(row, scene, seed)
                videos.append(video)
                kept.keep(f"{seed}/{scene}", measured)
        if videos:
            draw_sheet(videos[:8], run.folder / f"{kept.file.name.removesuffix(ENDING)}.png")
        found[row["name"]] = [kept.streams[f"{s}/{n}"] for s, n in product(config["seeds"], range(config["scenes"]))]
        log.info("%s: size follows %s", row["name"], cell(one["size, own"] for one in found[row["name"]]))
    (run.folder / "absorption.md").write_text(page(config["rows"], found))


if __name__ == "__main__":
    main()
