"""The workflows of the public systems: one graph, one note and one layout, told apart by what SYSTEMS says of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adastate_core.geometry import WAN21, WAN22
from adastate_core.weights.presets import Preset, preset
from tools.workflow_layouts import EAR_URL, FRAMEWISE_URL, HUB, S2V_URL, TEXT_URL, VAE22_URL, VAE_URL, Layout, offered

PREFIX = "system_"
# thirty seconds: past the window and the anchor of every system that is made for more than 81 frames, and long enough to drift
LONG = 481
# seconds of the sound that a system hears, and the length that stands for it
SOUND_SECONDS, FOLLOWS_SOUND = 20.0, -1
VAE_URLS = {WAN21.name: VAE_URL, WAN22.name: VAE22_URL}
SIZES = {WAN21.name: (832, 480), WAN22.name: (1280, 704)}


@dataclass(frozen=True)
class System:
    """A preset and where its weights are: repositories of the hub with the files in them, the one to take first.

    `url` is a public safetensors file of the system; where there is none, the front end can offer no download. `words` are the
    four of Demo Prompt, or one timeline for Demo Prompt Timeline; `picture`: the video starts from a picture.
    `by` is its preset where that has another name than the workflow. `size` is that of its own command where it is not its
    space's. `beside`: what else is loaded, a line each.
    """

    weights: tuple[tuple[str, str], ...]
    words: tuple[str, str, str, str] | str
    url: str = ""
    remark: str = ""
    picture: bool = False
    by: str = ""
    size: tuple[int, ...] = ()
    beside: tuple[str, ...] = ()


_SELF = (("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt"),)
_LONGLIVE = ("Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt")
_LIVE = "Quark-Vision/Live-Avatar"
_S2V = ("Comfy-Org/Wan_2.2_ComfyUI_Repackaged", "split_files/diffusion_models/wan2.2_s2v_14B_fp8_scaled.safetensors")

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
    "longlive2": System(
        (("Efficient-Large-Model/LongLive-2.0-5B", "model_bf16.pt"),),
        "0:00 meadow, steady, crimson balloon\n0:07 {shot} desert, fast\n0:13 {shot} snow, slow, lantern",
        remark="The preset *longlive2_5b_2step* is for the weights of two steps. `{shot}` in front of words begins a new scene; "
        "*Prompt Timeline*, which has a text encoder, puts the sentence in front of them that the weights know. Without a picture "
        "take *Load Image* and *Continue Video* out and set the rollout's size.",
        picture=True,
        by="longlive2_5b",
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
    "liveavatar": System(
        (_S2V,),
        ("meadow", "steady", "gold", "lantern"),
        url=S2V_URL,
        size=(704, 384),
        beside=(
            f"**Load Causal LoRA** behind it: `liveavatar.safetensors` of [{_LIVE}]({HUB}{_LIVE}), in `models/loras`",
            "**Audio Encoder Encode** in place of *Demo Ear*, behind *Load Audio Encoder* with "
            f"[{EAR_URL.rpartition('/')[2]}]({EAR_URL}) (0.6 GB), in `models/audio_encoders`",
            "**Load Sound** in place of *Demo Sound*: a voice. **Load Image**: who is seen, in the shape of the video",
        ),
        remark="The model takes 16.4 GB in fp8, and 32.6 GB as `wan2.2_s2v_14B_bf16.safetensors` of that repository. Its four "
        "windows take 41 GiB more at 704x384; with the preset *liveavatar_one_window* 12 GiB. The real weights were never run "
        "here. Show and voice only people who agreed, and say that the video is made.",
    ),
    "adastate": System(
        (),
        ("meadow", "steady", "violet", "lantern"),
        remark="The preset *adastate_long* is for weights trained with horizon weight 4. The preset brings the anchor; *Anchor: "
        "Adaptive State* is not needed.",
    ),
}


def preset_of(name: str) -> Preset:
    """The preset of the system whose workflow has this name."""
    return preset(SYSTEMS[name].by or name)


def heard(name: str) -> bool:
    """Whether the system is driven by sound."""
    return preset_of(name).driven_by_sound


def length(name: str) -> int:
    """Video frames: LONG, or as many as the system was made for where these are fewer; of one that hears as long as the sound."""
    if heard(name):
        return FOLLOWS_SOUND
    return min(made_for(name), LONG) if preset_of(name).longer else LONG


def made_for(name: str) -> int:
    """Video frames of the clips that the system was made for."""
    return 4 * preset_of(name).trained_frames - 3


def graph(name: str) -> dict[str, Any]:
    """The API prompt of a system's workflow; what it leaves out stands at the nodes' defaults."""
    words, picture = SYSTEMS[name].words, SYSTEMS[name].picture
    if isinstance(words, str):
        prompt = _node("AdaStateDemoTimeline", text=words)
    else:
        prompt = _node("AdaStateDemoPrompt", **dict(zip(("terrain", "pace", "balloon", "lantern"), words, strict=True)))
    side = 0 if picture else 64
    size: dict[str, Any] = {"width": side, "height": side, "length": length(name), "seed": 7}
    nodes = {
        "1": _node("AdaStateLoadModel", file=_demo_file(name), weight_dtype="default", preset="auto"),
        "2": _node("VAELoader", vae_name="adastate_demo_vae.safetensors"),
        "3": prompt,
        "4": _node("AdaStateModelPreset", model=["1", 0], preset=preset_of(name).name),
        "5": _node("AdaStateStreamOutput", vae=["2", 0], filename_prefix=f"video/AdaState_{name}"),
    }
    if picture:
        taken = {"width": 0, "height": 0, "frames": 1, "area": "64x64"}
        nodes["7"] = _node("LoadImage", image="example.png")
        nodes["8"] = _node("AdaStateContinueVideo", vae=["2", 0], image=["7", 0], **taken)
        size["start_latent"] = ["8", 0]
    if heard(name):
        nodes["7"] = _node("LoadImage", image="example.png")
        nodes["8"] = _node("AdaStateDemoSound", seconds=SOUND_SECONDS, seed=7)
        nodes["9"] = _node("AdaStateDemoEar", audio=["8", 0])
        nodes["10"] = _node("AdaStateAudio", audio=["8", 0], encoded=["9", 0])
        size |= {"audio": ["10", 0], "reference": ["7", 0]}
    rollout = _node("AdaStateRollout", model=["4", 0], positive=["3", 0], stream=["5", 0], keep_latents=False, **size)
    return nodes | {"6": rollout}


def _demo_file(name: str) -> str:
    """The shipped model that can follow a system's rules."""
    return f"adastate_{'talking_demo' if heard(name) else 'demo'}.safetensors"


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def models(name: str) -> dict[int, list[dict[str, str]]]:
    """What the front end can offer to download, by node id, once the workflow names these files: for `properties.models`."""
    found = {2: [offered(_vae_url(name), "vae")]}
    if url := SYSTEMS[name].url:
        found[1] = [offered(url, "diffusion_models")]
    return found


def _vae_url(name: str) -> str:
    """The VAE of the latent space that the system's weights work in."""
    return VAE_URLS[preset_of(name).space.name]


def note(name: str) -> str:
    """What the workflow is, and what to change for the real weights."""
    preset, system = preset_of(name), SYSTEMS[name]
    files = " or ".join(f"`{file}` of [{repository}]({HUB}{repository})" for repository, file in system.weights)
    if system.url and not all(file.endswith("safetensors") for _, file in system.weights[:1]):
        files += f" or [{system.url.rpartition('/')[2]}]({system.url})"
    files = files or "there are no public weights yet; `training/` makes them from a causal Wan 2.1"
    frames = f"up to {made_for(name)} frames, what it was made for" if preset.longer else "any length"
    frames = "**length** -1: as long as the sound" if heard(name) else frames
    vae, (width, height) = _vae_url(name), system.size or SIZES[preset.space.name]
    timed = isinstance(system.words, str)
    stands, encode = ("Demo Prompt Timeline", "Prompt Timeline") if timed else ("Demo Prompt", "CLIP Text Encode")
    size = (
        f"**area** {width}x{height} in *Continue Video*"
        if system.picture
        else f"**width** {width}, **height** {height}"
    )
    rules, *more = map(_sentence, preset.describe().splitlines()[1:])
    remarks = " ".join([*more, system.remark])
    beside = "".join(f"- {line}\n" for line in system.beside)
    demo = "The demo model was not trained for these rules: here they run, but what the system paints is seen with its own weights:"
    if not system.weights:
        demo = "The demo model was trained for these rules, at a small size. For the size of Wan 2.1:"
    return f"""\
### {preset.title}
By the rules of {preset.source}. *Model Preset* sets them; what stands at auto follows. {rules}

{demo}

- **Load Causal Video Model**: {files}, in `models/diffusion_models`
- **Load VAE**: [{vae.rpartition("/")[2]}]({vae}), in `models/vae`
- **{encode}** in place of *{stands}*, behind *Load CLIP* (type wan) with \
[umt5_xxl_fp8_e4m3fn_scaled.safetensors]({TEXT_URL}), in `models/text_encoders`
{beside}- {size}, {frames}

{remarks}""".rstrip()


def _sentence(line: str) -> str:
    """A line as a sentence; one that begins with a file's name keeps it as it is."""
    return (line if {"_", "."} & set(line.split()[0]) else line[0].upper() + line[1:]) + "."


def layout(name: str) -> Layout:
    """Loaders and words under the note, then the rollout."""
    groups = {"Model, prompt, rules": [[1, 2], [3, 4]], "Roll out and write": [[5], [6]]}
    if SYSTEMS[name].picture:
        groups = {"Model, words, rules": [[1, 2], [3, 4]], "Your picture": [[7], [8]], "Roll out and write": [[5], [6]]}
    if heard(name):
        groups = {
            "Model, words, rules": [[1, 2], [3, 4]],
            "Who is seen, what is heard": [[7], [8, 9, 10]],
            "Roll out and write": [[5], [6]],
        }
    return Layout(
        note=note(name),
        groups=groups,
        room={4: 130, 6: 340, 7: 260, 8: 80},
        note_height=520 if heard(name) else 400,
        models=models(name),
    )
