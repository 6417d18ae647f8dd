"""A stage of a big run on a model of its exact shapes with few layers: memory and step time before the real thing.

    python3 run.py train dry_run --config training/configs/wan_1_3b_distribution_matching.toml --layers 1 2

Random weights, clips and prompts stand in for the real ones. Every number of layers runs in a process of its own for three
steps (student, critic alone, student); what a layer adds is the difference. `--latent` makes the frames smaller where
the device is. The table goes to training/results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from adastate_core.geometry import WAN21

from .captioned_videos import ragged
from .host_models import build_denoiser
from .run import read_config
from .world import CHUNK_LATENTS

ROOT = Path(__file__).resolve().parents[1]
TOKENS, PROMPT_TOKENS = 512, 120


def stand_ins(
    config: dict, layers: int, chunks: int, clips: int, size: tuple[int, int], folder: Path
) -> dict[str, str]:
    """Random files of the exact shapes; the config's entries that name them."""
    geometry = config["geometry"]
    model = build_denoiser(geometry["dim"], geometry["ffn_dim"], layers)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    torch.save(model.state_dict(), folder / "model.pt")
    rows, columns = size
    latents = torch.randn(clips, WAN21.channels, chunks * CHUNK_LATENTS, rows, columns).half()
    words = torch.zeros(clips, chunks, 1, dtype=torch.long)
    save_file({"latents": latents, "words": words}, folder / "clips.safetensors")
    text = torch.zeros(TOKENS, 4096)
    text[:PROMPT_TOKENS] = torch.randn(PROMPT_TOKENS, 4096)
    save_file(ragged([text, text]), folder / "texts.safetensors")
    files = {"start_from": "model.pt", "teacher": "model.pt", "texts": "texts.safetensors"}
    files |= {"train": "clips.safetensors", "held_out": "clips.safetensors"}
    return {name: str(folder / file) for name, file in files.items()} | {"folder": str(folder / "run")}


def measured(
    stage: str, path: Path, layers: int, chunks: int, batch: int, size: tuple[int, int], folder: Path
) -> dict[str, float]:
    """{"peak_mib", "student_s", "critic_s"} of one process; seconds of the last two steps."""
    config = read_config(path)
    changed = stand_ins(config, layers, chunks, batch, size, folder)
    numbers: dict[str, int | str] = {
        "codec": "",        "steps": 3, "batch": batch, "recurrence_batch": min(batch, config.get("recurrence_batch", batch)),
        "critic_alone": 0, "student_every": 2, "log_every": 1, "evaluate_every": 1000,
    }  # fmt: skip
    if not torch.cuda.is_available():
        numbers["autocast"] = ""
    lines = [f"like = {json.dumps(str(path.resolve()))}"]
    lines += [f"latent_size = {list(size)}"] if "latent_size" in config else []
    lines += [f"{name} = {json.dumps(value)}" for name, value in (changed | numbers).items()]
    (folder / "config.toml").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", f"training.{stage}", "--config", str(folder / "config.toml"), "--fresh"]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{stage} with {layers} layers ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    clock = {line["step"]: line["seconds"] for line in log if "peak_mib" not in line}
    peak = max(line["peak_mib"] for line in log if "peak_mib" in line)
    return {"peak_mib": peak, "student_s": clock[3] - clock[2], "critic_s": clock[2] - clock[1]}


def report(
    path: Path, stage: str, results: dict[int, dict[str, float]], chunks: int, batch: int, size: tuple[int, int]
) -> list[str]:
    """The table, with what a layer adds and what the whole model would come to."""
    config, device = read_config(path), "a GPU" if torch.cuda.is_available() else "a CPU, float32 parameters"
    geometry, (rows, columns) = config["geometry"], size
    lines = [
        f"## {path.stem}: {stage} on {device}",
        "",
        f"Width {geometry['dim']}, feed-forward {geometry['ffn_dim']}, {rows * columns // 4} tokens a latent frame, batch "
        f"{batch}, {chunks} chunks of {CHUNK_LATENTS} latent frames and {config['anchor'].get('state_frames', 0)} of state.",
        "",
        "| layers | peak MiB | s a step with the student | s a step of the critic alone |",
        "| --- | --- | --- | --- |",
    ]
    for layers, one in results.items():
        lines.append(f"| {layers} | {one['peak_mib']:.0f} | {one['student_s']:.1f} | {one['critic_s']:.1f} |")
    few, many = min(results), max(results)
    if many > few:
        whole = geometry["layers"]
        added = {k: (results[many][k] - results[few][k]) / (many - few) for k in results[few]}
        total = {k: results[few][k] + (whole - few) * added[k] for k in added}
        lines += [
            f"| each more | {added['peak_mib']:.0f} | {added['student_s']:.1f} | {added['critic_s']:.1f} |",
            f"| {whole}, by that | {total['peak_mib']:.0f} | {total['student_s']:.0f} | {total['critic_s']:.0f} |",
        ]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--latent", type=int, nargs=2, help="height and width of a latent frame; default: the run's own"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "training" / "results")
    arguments = parser.parse_args()
    stage = "distribution_matching" if "teacher" in read_config(arguments.config) else "recurrence"
    size = tuple(arguments.latent or read_config(arguments.config)["geometry"]["latent_size"])
    results = {}
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as folder:
            given = arguments.config, layers, arguments.chunks, arguments.batch, size
            results[layers] = measured(stage, *given, Path(folder))
    lines = report(arguments.config, stage, results, arguments.chunks, arguments.batch, size)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"dry_run_{arguments.config.stem}.md").write_text("\n".join(lines))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
