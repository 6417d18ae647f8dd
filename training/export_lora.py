"""A trained LoRA as the host's loaders take it, with the rollout that it was trained for.

    python3 run.py train export_lora --config training/configs/journey/export.toml

The run's own file has all settings of the training as metadata; this one the rollout's alone (metadata key "adastate", JSON).
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from .export import write_weights
from .run import Run


def main() -> None:
    run = Run.from_arguments("Export a trained LoRA.")
    config = run.config
    metadata = {"format": "pt", "adastate": json.dumps(config["rollout"])}
    write_weights(Path(config["folder"]) / config["file"], load_file(config["lora"]), metadata)


if __name__ == "__main__":
    main()
