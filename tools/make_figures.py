"""Make docs/images/attention_share.png and hidden_state.png, the paper's two figures of the shipped weights.

    python -m tools.make_figures

Both come out of the pack's own nodes on a real host. The second shows the last frame of a rollout and the decoded state
below it, chunk after chunk: the lantern is asked for at first, not for a while, and again at the end.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw

from tools.host_client import Server, run_prompt
from tools.make_workflows import running_host
from tools.setup_host import ROOT, SetupError, say

IMAGES = ROOT / "docs" / "images"
# video frames at the end of every part, and whether the lantern is asked for in it
PARTS = ((45, True), (93, False), (189, False), (285, False), (333, True))
SIDE, CAPTION = 192, 18
SEED = 11


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def prompt() -> dict[str, dict[str, Any]]:
    """One graph for both figures; part i has the nodes "rollout i", "state i" and "video i"."""
    graph = {
        "model": node("UNETLoader", unet_name="adastate_demo.safetensors", weight_dtype="default"),
        "vae": node("VAELoader", vae_name="adastate_demo_vae.safetensors"),
        "anchor": node("AdaStateAnchorAdaptive", state_frames=1),
    }
    for lantern, word in ((True, "lantern"), (False, "no lantern")):
        graph[f"words {lantern}"] = node(
            "AdaStateDemoPrompt", terrain="desert", pace="steady", balloon="violet", lantern=word
        )
    model = {"model": ["model", 0], "anchor": ["anchor", 0], "width": 64, "height": 64, "seed": SEED}
    graph["share"] = node("AdaStateAttentionShare", positive=["words True", 0], windows="3, 6, 9", **model)
    graph["save share"] = node("SaveImage", images=["share", 0], filename_prefix="share")
    settings = {"steps": 0, "shift": 0.0, "chunk_frames": 0, "window_frames": -1, "positions": "auto", "batch_size": 1}
    for i, (length, lantern) in enumerate(PARTS):
        past = {"resume": [f"rollout {i - 1}", 1]} if i else {}
        graph[f"rollout {i}"] = node(
            "AdaStateRollout", positive=[f"words {lantern}", 0], length=length, keep_latents=True, **model, **settings, **past
        )  # fmt: skip
        graph[f"state {i}"] = node("AdaStateDecodeState", state=[f"rollout {i}", 1], vae=["vae", 0])
        graph[f"save state {i}"] = node("SaveImage", images=[f"state {i}", 0], filename_prefix=f"state_{i}")
        graph[f"video {i}"] = node(
            "AdaStateRenderVideo", latent=[f"rollout {i}", 0], vae=["vae", 0], filename_prefix="part", fps=16.0,
            codec="h264", quality=10,
        )  # fmt: skip
        graph[f"save video {i}"] = node(
            "SaveVideo", video=[f"video {i}", 0], filename_prefix=f"part_{i}", format="auto", codec="auto"
        )
    return graph


def last_frame(video: Path) -> Image.Image:
    with av.open(str(video)) as container:
        return list(container.decode(video=0))[-1].to_image()


def beside(frames: list[Image.Image], states: list[Image.Image]) -> Image.Image:
    """The rendered frames above, the states below, a caption under each pair."""
    sheet = Image.new("RGB", (SIDE * len(frames), 2 * SIDE + CAPTION), "white")
    draw = ImageDraw.Draw(sheet)
    for i, ((length, lantern), *pair) in enumerate(zip(PARTS, frames, states, strict=True)):
        for row, picture in enumerate(pair):
            sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (i * SIDE, row * SIDE))
        text = f"{length / 16:.0f} s, lantern {'' if lantern else 'not '}asked for"
        draw.text((i * SIDE + 6, 2 * SIDE + 3), text, fill="black")
    return sheet


def make(server: Server, output: Path) -> None:
    """Run the graph and write both pictures."""
    entry = run_prompt(server, prompt())
    if entry["status"]["status_str"] != "success":
        raise SetupError(f"the figures' graph did not run; the host's log is {server.log}", code=1)

    def newest(pattern: str) -> Path:
        return max(output.glob(pattern), key=lambda path: path.stat().st_mtime_ns)

    frames = [last_frame(newest(f"part_{i}_*.mp4")) for i in range(len(PARTS))]
    states = [Image.open(newest(f"state_{i}_*.png")).convert("RGB") for i in range(len(PARTS))]
    IMAGES.mkdir(parents=True, exist_ok=True)
    beside(frames, states).save(IMAGES / "hidden_state.png", optimize=True)
    Image.open(newest("share_*.png")).convert("P", palette=Image.Palette.ADAPTIVE).save(
        IMAGES / "attention_share.png", optimize=True
    )
    say("docs/images/hidden_state.png and attention_share.png")


def main() -> int:
    """Make both figures."""
    try:
        with tempfile.TemporaryDirectory() as folder, running_host(Path(folder)) as server:
            make(server, Path(folder) / "output")
    except SetupError as error:
        say(f"make_figures: {error}")
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
