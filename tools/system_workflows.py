"""The workflows of the public systems: one graph, one note and one layout, told apart by what SYSTEMS says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adastate_core.weights.presets import PRESETS
from tools.workflow_layouts import FRAMEWISE_URL, HUB, TEXT_URL, VAE_URL, Layout, offered

PREFIX = "system_"
# thirty seconds: past the window and the anchor of every system that is made for more than 81 frames, and long enough to drift
LONG = 481


@dataclass(frozen=True)
class System:
    """A preset and where its weights are: repositories of the hub with the files in them, the one to take first.

    `url` is a public safetensors file of the system; where there is none, the front end can offer no download.
    """

    weights: tuple[tuple[str, str], ...]
    words: tuple[str, str, str, str]
    url: str = ""
    remark: str = ""


_SELF = (("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt"),)
_LONGLIVE = ("Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt")

SYSTEMS = {
    "self_forcing": System(_SELF, ("meadow", "steady", "crimson", "no lantern")),
    "causal_forcing_frame": System(
        (("zhuhz22/Causal-Forcing", "framewise/causal_forcing.pt"),),
        ("desert", "slow", "gold", "no lantern"),
        url=FRAMEWISE_URL,
        remark="The presets *causal_forcing*, *causal_forcing_frame_2step* and *causal_forcing_frame_1step* are for the other "
        "weights of that repository.",
    ),
    "causvid": System(
        (("tianweiy/CausVid", "autoregressive_checkpoint/model.pt"),), ("city", "fast", "gold", "no lantern")
    ),
    "longlive": System(
        (_LONGLIVE,),
        ("snow", "steady", "violet", "lantern"),
        remark="The LoRA is `models/lora.pt` of the same repository, for `models/loras`.",
    ),
    "rolling_forcing": System(
        (("TencentARC/RollingForcing", "checkpoints/rolling_forcing_dmd.pt"),),
        ("meadow", "fast", "white", "no lantern"),
    ),
    "reward_forcing": System(
        (("JaydenLu666/Reward-Forcing-T2V-1.3B", "rewardforcing.pt"),), ("desert", "fast", "crimson", "lantern")
    ),
    "infinity_rope": System(_SELF, ("snow", "slow", "crimson", "no lantern")),
    "memrope": System((*_SELF, _LONGLIVE), ("city", "steady", "white", "lantern")),
    "rolling_sink": System(_SELF, ("meadow", "slow", "violet", "lantern")),
    "deep_forcing": System(_SELF, ("desert", "steady", "white", "no lantern")),
    "krea_14b": System(
        (("krea/krea-realtime-video", "krea-realtime-video-14b.safetensors"),),
        ("city", "slow", "violet", "no lantern"),
        url=f"{HUB}krea/krea-realtime-video/resolve/main/krea-realtime-video-14b.safetensors",
    ),
    "adastate": System(
        (),
        ("meadow", "steady", "violet", "lantern"),
        remark="The preset *adastate_long* is for weights trained with horizon weight 4. The preset brings the anchor; *Anchor: "
        "Adaptive State* is not needed.",
    ),
}


def length(name: str) -> int:
    """Video frames: LONG, or as many as the system was made for where these are fewer."""
    return min(made_for(name), LONG) if PRESETS[name].longer else LONG


def made_for(name: str) -> int:
    """Video frames of the clips that the system was made for."""
    return 4 * PRESETS[name].trained_frames - 3


def graph(name: str) -> dict[str, Any]:
    """The API prompt of a system's workflow; what it leaves out stands at the nodes' defaults."""
    terrain, pace, balloon, lantern = SYSTEMS[name].words
    size = {"width": 64, "height": 64, "length": length(name), "seed": 7}
    return {
        "1": _node("AdaStateLoadModel", file="adastate_demo.safetensors", weight_dtype="default", preset="auto"),
        "2": _node("VAELoader", vae_name="adastate_demo_vae.safetensors"),
        "3": _node("AdaStateDemoPrompt", terrain=terrain, pace=pace, balloon=balloon, lantern=lantern),
        "4": _node("AdaStateModelPreset", model=["1", 0], preset=name),
        "5": _node("AdaStateStreamOutput", vae=["2", 0], filename_prefix=f"video/AdaState_{name}"),
        "6": _node("AdaStateRollout", model=["4", 0], positive=["3", 0], stream=["5", 0], keep_latents=False, **size),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def models(name: str) -> dict[int, list[dict[str, str]]]:
    """What the front end can offer to download, by node id, once the workflow names these files: for `properties.models`."""
    found = {2: [offered(VAE_URL, "vae")]}
    if url := SYSTEMS[name].url:
        found[1] = [offered(url, "diffusion_models")]
    return found


def note(name: str) -> str:
    """What the workflow is, and what to change for the real weights."""
    preset, system = PRESETS[name], SYSTEMS[name]
    files = " or ".join(f"`{file}` of [{repository}]({HUB}{repository})" for repository, file in system.weights)
    if system.url and not all(file.endswith("safetensors") for _, file in system.weights[:1]):
        files += f" or [{system.url.rpartition('/')[2]}]({system.url})"
    files = files or "there are no public weights yet; `training/` makes them from a causal Wan 2.1"
    frames = f"up to {made_for(name)} frames, what it was made for" if preset.longer else "any length"
    rules, *more = map(_sentence, preset.describe().splitlines()[1:])
    remarks = " ".join([*more, system.remark])
    demo = "The demo model was not trained for these rules: here they run, but what the system paints is seen with its own weights:"
    if not system.weights:
        demo = "The demo model was trained for these rules, at a small size. For the size of Wan 2.1:"
    return f"""\
### {preset.title}
By the rules of {preset.source}. *Model Preset* sets them; what stands at auto follows. {rules}

{demo}

- **Load Causal Video Model**: {files}, in `models/diffusion_models`
- **Load VAE**: [wan_2.1_vae.safetensors]({VAE_URL}), in `models/vae`
- **CLIP Text Encode** in place of *Demo Prompt*, behind *Load CLIP* (type wan) with \
[umt5_xxl_fp8_e4m3fn_scaled.safetensors]({TEXT_URL}), in `models/text_encoders`
- **width** 832, **height** 480, {frames}

{remarks}""".rstrip()


def _sentence(line: str) -> str:
    """A line as a sentence; one that begins with a file's name keeps it as it is."""
    return (line if "_" in line.split()[0] else line[0].upper() + line[1:]) + "."


def layout(name: str) -> Layout:
    """Loaders and words under the note, then the rollout."""
    return Layout(
        note=note(name),
        groups={"Model, prompt, rules": [[1, 2], [3, 4]], "Roll out and write": [[5], [6]]},
        room={4: 130, 6: 340},
        note_height=400,
        models=models(name),
    )
