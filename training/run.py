"""What every training stage shares: its TOML file, its folder, checkpoints that survive a kill, and a log."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import tomllib
import torch

from adastate_core.files.whole_file import whole_file

from .curves import draw_curves
from .lora import low_rank_parts, save_lora, whole_weights
from .parallel import Workers

log = logging.getLogger("adastate.training")
# what a run exits with that was asked to stop; it has saved where it is
STOPPED = 75


def read_config(path: Path) -> dict[str, Any]:
    """A run's TOML file. What it does not say comes from the file beside it that its `like` names, key by key."""
    config = tomllib.loads(path.read_text())
    if "like" in config:
        config = read_config(path.parent / config.pop("like")) | config
    return config


class Run:
    """One stage of training: `config` (TOML), `folder` for what it writes, `step`, and the time it has taken.

    Resumes by itself from `folder/last.pt`; `--fresh` starts anew. A file `folder/stop` makes a
    single process save, and end with `STOPPED`, at its next step.
    """

    def __init__(self, config: dict[str, Any], folder: Path, fresh: bool) -> None:
        self.config, self.folder, self.workers = config, folder, Workers()
        self.step, self.seconds = 0, 0.0
        self.parts: dict[str, Any] = {}
        self._fresh, self._tick = fresh, time.monotonic()
        self._saved = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def from_arguments(description: str, options: dict[str, type] | None = None) -> Run:
        """Read `--config FILE [--fresh] [--threads N]`; outputs go to the config's `folder`. `options`: those of the config's
        entries that may be given as arguments too."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--config", type=Path, required=True)
        resuming = parser.add_mutually_exclusive_group()
        resuming.add_argument("--resume", action="store_true", help="go on from the last checkpoint (the default)")
        resuming.add_argument("--fresh", action="store_true", help="start anew instead")
        parser.add_argument("--threads", type=int, default=os.cpu_count())
        for name, kind in (options or {}).items():
            parser.add_argument(f"--{name}", type=kind, help=f"instead of the config's {name}")
        arguments = parser.parse_args()
        torch.set_num_threads(arguments.threads)
        config = read_config(arguments.config)
        config |= {name: given for name in options or {} if (given := getattr(arguments, name)) is not None}
        # "medium": factors of float32 products in bfloat16, sums in float32, faster where a CPU has tiles for it
        torch.set_float32_matmul_precision(config.get("matmul_precision", "highest"))
        torch.manual_seed(config["seed"])
        run = Run(config, Path(config["folder"]), arguments.fresh)
        level = logging.INFO if run.workers.first else logging.WARNING
        logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        return run

    @property
    def steps(self) -> int:
        return self.config["steps"]

    @property
    def done(self) -> float:
        return self.step / self.steps

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"

    @property
    def device(self) -> torch.device:
        return self.workers.device

    def precision(self) -> torch.autocast:
        """Mixed precision where the config's `autocast` names a dtype; parameters stay float32."""
        dtype = self.config.get("autocast")
        return torch.autocast(self.device.type, getattr(torch, dtype or "bfloat16"), enabled=bool(dtype))

    def due(self) -> bool:
        """Whether it is time to evaluate: every `evaluate_every` steps and at the end."""
        return self.step % self.config["evaluate_every"] == 0 or self.step == self.steps

    def export(self, model: torch.nn.Module) -> None:
        """Write the weights as they are now to `folder/model.pt`, and trained updates alone to `folder/lora.safetensors`."""
        if not self.workers.first:
            return
        with whole_file(self.folder / "model.pt") as file:
            torch.save(whole_weights(model), file)
        if parts := low_rank_parts(model):
            save_lora(parts, self.folder / "lora.safetensors", self.config)

    def finish(self) -> None:
        """Log the highest memory, draw the log as curves and leave the group of processes."""
        self.record(peak_mib=self.workers.peak_mib())
        if self.workers.first:
            draw_curves(self.folder)
        self.workers.leave()

    def resume(self, **parts: Any) -> None:
        """Register what a checkpoint holds (objects with state_dict) and load the last one if there is any."""
        self.parts = parts
        self.stop_file.unlink(missing_ok=True)
        last = self.folder / "last.pt"
        if last.exists() and not self._fresh:
            state = torch.load(last, weights_only=True, map_location=self.device)
            self.step, self.seconds = state["step"], state["seconds"]
            torch.set_rng_state(state["rng"].cpu())
            for name, part in parts.items():
                part.load_state_dict(state[name])
            log.info("resumed at step %d of %d", self.step, self.steps)
        self._tick = time.monotonic()

    def save(self) -> None:
        """Write the checkpoint in one piece, so that a kill leaves the one before."""
        self._saved = time.monotonic()
        if not self.workers.first:
            return
        state: dict[str, Any] = {"step": self.step, "seconds": self.seconds, "rng": torch.get_rng_state()}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        with whole_file(self.folder / "last.pt") as file:
            torch.save(state, file)

    def advance(self, **figures: float) -> None:
        """Count a step; logs every `log_every` steps with rate and time left, saves every 2 minutes."""
        now = time.monotonic()
        self.seconds, self._tick = self.seconds + now - self._tick, now
        self.step += 1
        if self.step % self.config.get("log_every", 25) == 0 or self.step == self.steps:
            self.record(**self.workers.mean(figures))
        if now - self._saved > 120 or self.step == self.steps or self._asked_to_stop:
            self.save()
        if self.step < self.steps:
            self.stop_if_asked()

    @property
    def _asked_to_stop(self) -> bool:
        return self.workers.world == 1 and self.stop_file.exists()

    def stop_if_asked(self) -> None:
        """SystemExit with `STOPPED` if there is a file `folder/stop`, which is removed. Call it where all is saved."""
        if self._asked_to_stop:
            self.stop_file.unlink(missing_ok=True)
            log.info("stopped as asked; the same command goes on from here")
            raise SystemExit(STOPPED)

    def record(self, **figures: float) -> None:
        """One line to the log and to `folder/log.jsonl`."""
        if not self.workers.first:
            return
        rate = self.seconds / max(self.step, 1)
        line = {"step": self.step, "seconds": round(self.seconds, 1)} | {k: round(v, 5) for k, v in figures.items()}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        left = (self.steps - self.step) * rate / 60
        text = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        log.info("step %d/%d  %s  %.2f s/step  %.0f min left", self.step, self.steps, text, rate, left)
