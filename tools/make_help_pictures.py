"""Make web/docs/images/*, the pictures of the help pages, by running the shipped workflows on the demo model.

    python -m tools.make_help_pictures                              # all of them, some minutes
    python -m tools.make_help_pictures AdaStatePlan AdaStateRollout # some

Needs what the browser tests need: playwright, and a Chromium on PATH or named by CHROMIUM. A picture that two pages share bears
the name of one of them. Run it again, from the checkout's root, whenever the demo weights or the nodes' looks change.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tools import make_figures, sound_pictures
from tools.help_runs import Graph, Run, Stage, narrowed, node, strip, with_rollout, workflow, written
from tools.made_chain import CLIP, NAME, write_chain
from tools.make_workflows import running_browser, running_host
from tools.setup_host import ROOT, SetupError, say

IMAGES = ROOT / "web" / "docs" / "images"
# The lantern's colour is in no word. It is asked for at first, then not for longer than the window, and again at the end.
LANTERN = "0:00 desert, steady, violet balloon, lantern\n0:03 {cut} no lantern\n0:18 {cut} lantern"
MOMENTS = (2.5, 6, 12, 15, 21)
WORDS = ("lantern", "no lantern", "no lantern", "no lantern", "lantern")
ANCHORS = {  # page -> its node, and the rollout's window and positions; of those that the workflow does not have
    "Memory": (node("AdaStateAnchorMemory", sink_frames=1, long_rate=0.01, short_rate=0.1), 3, "packed"),
    "Replay": (node("AdaStateAnchorReplay", first_frames=9), 6, "packed"),
    "Deep": (
        node("AdaStateAnchorDeep", sink_frames=3, recent_frames=4, budget_frames=9, shift_selected=True),
        6,
        "packed",
    ),
}
NUMBERS = {"Adaptive": "9", "Static": "11", "EMA": "13", "None": "15"}  # the rollouts of the workflow
TITLES = {
    "Adaptive": "a hidden state",
    "Static": "the first frame stays (1 sink frame)",
    "EMA": "a running mean (1 slot, decay 0.99)",
    "None": "no anchor, window 4",
    "Memory": "1 sink frame and two memories",
    "Replay": "the first 9 latent frames, replayed",
    "Deep": "3 sink frames and chosen tokens",
}


def anchors(stage: Stage) -> Run:
    """One prompt and seed with every anchor."""
    graph = workflow("anchor_comparison")
    graph["3"] = node("AdaStateDemoTimeline", text=LANTERN, transition="cut", blend_chunks=3, blend="linear")
    for name, (anchor, window, positions) in ANCHORS.items():
        graph[f"anchor {name}"] = anchor
        with_rollout(graph, name, ("9", "8"), anchor=[f"anchor {name}", 0], window_frames=window, positions=positions)
    del graph["16"], graph["17"]
    for each in graph.values():
        if each["class_type"] == "AdaStateRollout":
            each["inputs"] |= {"length": 345, "seed": make_figures.SEED}
    return stage.run(graph)


def anchor(name: str, stage: Stage) -> Image.Image:
    """What comes back with an anchor, and without one; of none, and with the hidden state."""
    run = anchors(stage)
    shown = (name, "Adaptive" if name == "None" else "None")
    rows = {TITLES[each]: run.at(NUMBERS.get(each, each), MOMENTS) for each in shown}
    return strip(rows, [f"{second:g} s\n{word}" for second, word in zip(MOMENTS, WORDS, strict=True)])


def figures(stage: Stage) -> Run:
    return stage.run(make_figures.prompt())


def attention_share(stage: Stage) -> Image.Image:
    return figures(stage).picture("save share")


def hidden_state(stage: Stage) -> Image.Image:
    """The last frame of each part, and the state after it."""
    run, parts = figures(stage), range(len(make_figures.PARTS))
    rows = {
        "what is rendered": [run.frames(f"save video {i}")[-1] for i in parts],
        "the hidden state at that moment": [run.picture(f"save state {i}") for i in parts],
    }
    captions = [f"{n / 16:.0f} s\n{'' if lantern else 'no '}lantern" for n, lantern in make_figures.PARTS]
    return strip(rows, captions)


def absorbed() -> Graph:
    """The absorption workflow, shorter, and its correction saved."""
    graph = workflow("absorption", n6__length=193)
    graph["9"] = node("AdaStateSaveAbsorption", state=["6", 1], filename_prefix="help/correction")
    return graph


def absorption(stage: Stage) -> Image.Image:
    graph = absorbed()
    with_rollout(graph, "full", ("6", "5"))
    del graph["full"]["inputs"]["absorption"]
    run, moments = stage.run(graph), (3, 5.5, 7, 9, 11.5)
    rows = {"full history": run.at("full", moments), "half of the layers forget at 6 s": run.at("6", moments)}
    return strip(rows, [f"{second:g} s" for second in moments])


def absorption_report(stage: Stage) -> Image.Image:
    return stage.run(workflow("absorption")).picture("8")


def load_absorption(stage: Stage) -> Image.Image:
    first = stage.run(absorbed())
    graph, moments = absorbed(), (3, 5.5, 7, 9, 11.5)
    graph["4"] = node("AdaStateLoadAbsorption", file=first.text("9").splitlines()[0])
    del graph["7"], graph["8"], graph["9"]
    rows = {"solved at 6 s": first.at("6", moments), "loaded, switched at 6 s": stage.run(graph).at("6", moments)}
    return strip(rows, [f"{second:g} s" for second in moments])


def save_absorption(stage: Stage) -> Image.Image:
    return written(stage.run(absorbed()).text("9"))


def demo_prompt(stage: Stage) -> Image.Image:
    """Each ground with a balloon of another colour."""
    scenes = (("meadow", "crimson"), ("desert", "white"), ("snow", "gold"), ("city", "violet"))
    rows: dict[str, list[Image.Image]] = {"no lantern": [], "lantern": []}
    for lantern, row in rows.items():
        for terrain, balloon in scenes:
            words = {"n3__terrain": terrain, "n3__balloon": balloon, "n3__lantern": lantern}
            run = stage.run(workflow("long_video", n5__length=45, **words))
            row.append(run.frames("5")[-1])
    return strip(rows, [f"{terrain}\n{balloon}" for terrain, balloon in scenes])


def timeline(stage: Stage) -> Image.Image:
    run = stage.run(workflow("prompt_timeline"))
    said = {2: "from 0:00\ncrimson", 4.5: "0:04 {soft}\nlantern", 7: "", 9.5: "0:08 {cut}\ngold, no\nlantern", 12: ""}
    return strip({"": run.at("5", list(said))}, [f"{second:g} s\n{text}" for second, text in said.items()])


def prompt_at(stage: Stage) -> Image.Image:
    """Three prompts from a chain of nodes."""
    graph, before = workflow("prompt_timeline", n5__length=129), {}
    del graph["3"], graph["6"]
    for i, (seconds, lantern) in enumerate(((0.0, "no lantern"), (3.0, "lantern"), (6.0, "no lantern"))):
        words = {"terrain": "snow", "pace": "slow", "balloon": "crimson", "lantern": lantern}
        graph[str(20 + i)] = node("AdaStateDemoPrompt", **words)
        chain = {"transition": "recache", "blend_chunks": 3, "blend": "linear", **before}
        graph[str(30 + i)] = node("AdaStatePromptAt", positive=[str(20 + i), 0], seconds=seconds, **chain)
        before = {"prompts": [str(30 + i), 0]}
    graph["5"]["inputs"]["positive"] = ["32", 0]
    said = {1.5: "from 0\nno lantern", 3.8: "from 3\nlantern", 5.2: "", 6.8: "from 6\nno lantern", 8: ""}
    run = stage.run(graph)
    return strip({"": run.at("5", list(said))}, [f"{second:g} s\n{text}" for second, text in said.items()])


def compare(stage: Stage) -> Image.Image:
    frames = stage.run(workflow("video_metrics")).frames("12")
    return narrowed(frames[len(frames) * 4 // 5])


def video_metrics(stage: Stage) -> Image.Image:
    return stage.run(workflow("video_metrics")).picture("9")


def clips(stage: Stage) -> Image.Image:
    """Of a chain that is made up."""
    write_chain(stage.folders["input"])
    changes = {"n1__file": NAME, "n2__clip_frames": CLIP, "n2__first_clip_frames": CLIP + 1}
    return stage.run(workflow("measure_any_video", **changes)).picture("3")


def continue_video(stage: Stage) -> Image.Image:
    run = stage.run(workflow("continue_video"))
    given, made = run.frames("5"), run.frames("9")
    rows = {
        "the end of the video that was given": [given[-1 - i] for i in (64, 48, 32, 16, 0)],
        "what was made from it: gold, lantern": [made[12 + i] for i in (8, 20, 40, 64, 96)],
    }
    return strip(rows)


def first_part(stage: Stage) -> Run:
    """The workflow's first rollout and its saved state."""
    graph = workflow("save_and_resume")
    return stage.run({key: graph[key] for key in ("1", "2", "3", "4", "5", "6")})


def save_state(stage: Stage) -> Image.Image:
    return written(first_part(stage).text("6"))


def load_state(stage: Stage) -> Image.Image:
    """A video that was made in two runs, the second from the saved state."""
    first = first_part(stage)
    graph = workflow("save_and_resume", n8__length=321)
    graph = {key: graph[key] for key in ("1", "2", "3", "7", "8")}
    graph["4"] = node("AdaStateLoadState", file=first.text("6").splitlines()[0], chunk=-1)
    graph["8"]["inputs"]["resume"] = ["4", 0]
    whole = stage.run(graph)
    before, after = (1, 3, 5, 7.5, 10), (10.2, 12.5, 15, 17.5, 20)
    rows = {"saved at 10 s": whole.at("8", before), "loaded, went on to 20 s": whole.at("8", after)}
    return strip(rows)


def decode(stage: Stage) -> Image.Image:
    """The same latent through both decoders."""
    graph = workflow("hidden_state")
    graph = {key: graph[key] for key in ("1", "2", "3", "4", "5")}
    graph["stream"] = node("AdaStateDecode", latent=["5", 0], vae=["2", 0], frames_per_call=1, latent_space="auto")
    graph["whole"] = node("VAEDecode", samples=["5", 0], vae=["2", 0])
    for name in ("stream", "whole"):
        graph[f"{name} video"] = node("CreateVideo", images=[name, 0], fps=16.0)
        graph[f"{name} saved"] = node(
            "SaveVideo", video=[f"{name} video", 0], filename_prefix=f"help/{name}", format="auto", codec="auto"
        )
    run, moments = stage.run(graph), (0, 2.5, 5, 7.5, 10)
    rows = {"Streaming VAE Decode": run.at("stream saved", moments), "VAE Decode": run.at("whole saved", moments)}
    return strip(rows, [f"{second:g} s" for second in moments])


def preset(stage: Stage) -> Image.Image:
    graph = {
        "1": node("AdaStateLoadModel", file="adastate_demo.safetensors", weight_dtype="default", preset="none"),
        "2": node("AdaStateModelPreset", model=["1", 0], preset="longlive"),
        "3": node("PreviewAny", source=["2", 1]),
    }
    return written(stage.run(graph).text("3"))


def self_test(stage: Stage) -> Image.Image:
    """The head of a table and its first rows, the columns' padding and the time that it took, left out."""
    lines = stage.run({"1": node("AdaStateSelfTest", speed=False)}).text("1").splitlines()[1:]
    rows = [re.sub(r"\s+", " ", line.strip("| ")) for line in lines if not line.startswith("| ---")]
    return written("\n".join(rows[:13]))


def text(number: str, stage: Stage) -> Image.Image:
    return written(stage.run(workflow("inspect_and_plan")).text(number))


def crop(name: str, *ids: int, run: bool = True) -> Callable[[Stage], Image.Image]:
    return lambda stage: stage.crop(name, ids, run=run)


PICTURES: dict[str, Callable[[Stage], Image.Image]] = {
    **{f"AdaStateAnchor{name}.jpg": functools.partial(anchor, name) for name in TITLES},
    "AdaStateAttentionShare.png": attention_share,
    "AdaStateDecodeState.jpg": hidden_state,
    "AdaStateAbsorption.jpg": absorption,
    "AdaStateAbsorptionReport.png": absorption_report,
    "AdaStateLoadAbsorption.jpg": load_absorption,
    "AdaStateSaveAbsorption.png": save_absorption,
    "AdaStateDemoPrompt.jpg": demo_prompt,
    "AdaStateDemoTimeline.jpg": timeline,
    "AdaStatePromptAt.jpg": prompt_at,
    "AdaStateCompare.jpg": compare,
    "AdaStateVideoMetrics.png": video_metrics,
    "AdaStateVideoMetricsClips.png": clips,
    "AdaStateContinueVideo.jpg": continue_video,
    "AdaStateLoadState.jpg": load_state,
    "AdaStateDecode.jpg": decode,
    "AdaStateModelPreset.png": preset,
    "AdaStateLoadModel.png": crop("inspect_and_plan", 1, run=False),
    "AdaStateInspectCheckpoint.png": functools.partial(text, "5"),
    "AdaStatePlan.png": functools.partial(text, "7"),
    "AdaStateRollout.jpg": lambda stage: stage.watched("long_video", 5, 14),
    "AdaStateStreamOutput.png": crop("long_video", 4, run=False),
    "AdaStateStreamFrames.png": crop("stream_to_frames", 6, run=False),
    "AdaStateSampler.png": crop("sampler", 7, 8, 9, 10, 11, run=False),
    "AdaStateRenderVideo.jpg": crop("sampler", 11, 12),
    "AdaStateSaveState.png": save_state,
    "AdaStateSelfTest.png": self_test,
    "AdaStateDemoSound.png": lambda stage: sound_pictures.voice(),
    "AdaStateDemoEar.png": lambda stage: sound_pictures.ear(),
}


def write(name: str, picture: Image.Image) -> None:
    """Frames as JPEG, plots and pages in few colours."""
    path = IMAGES / name
    if path.suffix == ".jpg":
        picture.save(path, quality=85, subsampling=0, optimize=True)
    else:
        picture.quantize(64, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    say(f"web/docs/images/{name} {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB")


def main(arguments: list[str]) -> int:
    """Make the pictures asked for."""
    known = {name.partition(".")[0]: name for name in PICTURES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="page", help="pages whose pictures to make instead of all")
    pages = parser.parse_args(arguments).pages or list(known)
    if unknown := [page for page in pages if page not in known]:
        parser.error(f"{unknown[0]} has no picture of its own; those that have: {', '.join(known)}")
    IMAGES.mkdir(parents=True, exist_ok=True)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            running_host(Path(folder)) as server,
            running_browser() as browser,
        ):
            stage = Stage(server, Path(folder), browser)
            for page in pages:
                write(known[page], PICTURES[known[page]](stage))
    except SetupError as error:
        say(f"make_help_pictures: {error}")
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
