"""Files that mean harm, through the nodes: models, LoRAs, timelines, videos and sounds, each read in a child process under limits.

A node is queued and run as the host does it. What it says is one clear sentence, or the file goes through to what follows it.
"""

from __future__ import annotations

import json

import pytest
import torch
from conftest import HostNode, random_vae, random_wan
from hostile import headers, media, pickles, timelines
from hostile.cell import canary, check, tried
from safetensors.torch import save
from test_loras import KINDS, NAMES, content
from test_models import AUTO, loras, models  # noqa: F401  fixtures

SETTINGS = {"steps": 2, "shift": 5.0, "chunk_frames": 3, "window_frames": 3, "positions": "packed", "fps": 16.0}


def queued(node_id: str, **inputs):
    """A node's outputs; ValueError with what its validation says."""
    node = HostNode(node_id)
    said = node.validate(**{name: value for name, value in inputs.items() if isinstance(value, (str, int, float))})
    if said is not True:
        raise ValueError(said)
    return node(**inputs).args


@pytest.fixture(scope="session")
def wan_bytes():
    """A model of one layer, in bfloat16, that says how it wants to be rolled out; and its weights."""
    weights = {name: weight.bfloat16() for name, weight in random_wan(layers=1).items()}
    return save(weights, {"adastate": json.dumps(SETTINGS), "format": "pt"}), weights


@pytest.fixture(scope="session")
def vae_bytes():
    return save(random_vae())


@pytest.fixture
def put(request):
    """Write a file into a folder of models, so that the host's lists know it."""
    import folder_paths

    def write(kind, name, data):
        path = request.getfixturevalue({"diffusion_models": "models", "loras": "loras"}[kind]) / name
        path.write_bytes(data)
        folder_paths.filename_list_cache.clear()
        return path

    return write


@pytest.fixture
def loads(rollout):
    """The doors of a model's file: looked into, loaded, planned and, if that is asked, rolled out by its own settings."""

    def through(name: str, rolled: bool) -> None:
        said = ""
        try:
            queued("AdaStateInspectCheckpoint", file=name, width=64, height=64, length=33)
        except ValueError as error:
            said = str(error)
        (model,) = queued("AdaStateLoadModel", file=name, weight_dtype="default", preset="auto")
        queued("AdaStatePlan", model=model, width=64, height=64, length=33)
        if rolled:
            rollout(**AUTO | {"model": model, "length": 9})
        if said:
            raise ValueError(said)

    return through


def hosts_vae(data: bytes):
    """A VAE as the host's own loader makes it, or None where that refuses it in its own words."""
    import comfy.sd
    import safetensors.torch

    try:
        vae = comfy.sd.VAE(sd=safetensors.torch.load(data))
        vae.throw_exception_if_invalid()
        return vae
    except Exception:  # noqa: BLE001  the host's own loader speaks
        return None


def test_hostile_safetensors(campaign, put, loads, wan_bytes, vae_bytes, folders):
    put("diffusion_models", "w.safetensors", wan_bytes[0])
    assert tried(lambda: loads("w.safetensors", True), folders, "a whole model").held
    assert tried(lambda: through_vae(vae_bytes), folders, "a whole VAE").held
    for trial in campaign("hostile safetensors: models and VAEs", full=200, sample=6):
        with trial:
            if trial.number % 8 == 7:
                data, what = headers.hostile(vae_bytes, trial.chance)
                names, door = ("vae",), lambda data=data: through_vae(data)
            else:
                data, what = headers.hostile(wan_bytes[0], trial.chance)
                name, rolled = put("diffusion_models", "w.safetensors", data).name, trial.chance.random() < 0.7
                names, door = (name, "model"), lambda name=name, rolled=rolled: loads(name, rolled)
            seen = tried(door, folders, what, names if trial.number % 8 == 7 else ())
            trial.saw(seconds=round(seen.seconds, 2), MB=round(seen.megabytes))


def through_vae(data: bytes) -> None:
    if (vae := hosts_vae(data)) is not None:
        pictures = torch.full((5, 32, 32, 3), 0.5)
        latent, *_ = queued(
            "AdaStateContinueVideo", vae=vae, image=pictures, width=32, height=32, frames=5, crop="center"
        )
        queued("AdaStateDecode", latent=latent, vae=vae)


def test_hostile_torch_files(campaign, put, loads, wan_bytes, folders, model):
    put("diffusion_models", "w.pt", pickles.saved(wan_bytes[1]))
    assert tried(lambda: loads("w.pt", True), folders, "a whole model").held
    for trial in campaign("hostile torch files (.pt): models and LoRAs", full=200, sample=6):
        with trial:
            is_lora = trial.number % 4 == 3
            weights = content("pair with alpha", NAMES["dots"]) if is_lora else wan_bytes[1]
            data, what = pickles.hostile(weights, canary(folders), trial.chance)
            name = put(
                "loras" if is_lora else "diffusion_models",
                trial.chance.choice(["w.pt", "w.pth", "w.ckpt", "w.bin"]),
                data,
            ).name
            rolled = trial.chance.random() < 0.5
            if is_lora:
                door = lambda name=name: queued("AdaStateLoadLora", model=model, file=name)  # noqa: E731
            else:
                door = lambda name=name, rolled=rolled: loads(name, rolled)  # noqa: E731
            seen = tried(door, folders, what, (name,))
            trial.saw(seconds=round(seen.seconds, 2), MB=round(seen.megabytes))


def _odd_lora(chance) -> tuple[bytes, str]:
    """A LoRA whose tensors do not fit, or hold no numbers; or one in a safetensors file that lies."""
    kind, names = chance.choice(list(KINDS)), chance.choice(list(NAMES))
    weights, done = content(kind, NAMES[names]), []
    for _ in range(chance.choice([0, 1, 1, 2, 4])):
        name = chance.choice(list(weights))
        tensor, how = (
            weights[name],
            chance.choice(
                [
                    "nan",
                    "inf",
                    "zero",
                    "huge",
                    "drop",
                    "rank",
                    "row",
                    "axis",
                    "int",
                    "bool",
                    "fp8",
                    "scalar",
                    "empty",
                    "alpha",
                    "name",
                    "more",
                ]
            ),
        )
        done.append(f"{how} {name}")
        if how in ("nan", "inf", "zero", "huge"):
            value = {"nan": float("nan"), "inf": float("inf"), "zero": 0.0, "huge": 3e38}[how]
            weights[name] = torch.full_like(tensor.float(), value)
        elif how == "drop" and len(weights) > 1:
            del weights[name]
        elif how == "rank" and tensor.ndim:
            weights[name] = torch.cat([tensor, tensor])
        elif how == "row" and tensor.ndim and len(tensor) > 1:
            weights[name] = tensor[1:].clone()
        elif how == "axis":
            weights[name] = tensor[None].clone() if chance.random() < 0.5 or not tensor.ndim else tensor.flatten()
        elif how in ("int", "bool", "fp8"):
            weights[name] = (tensor * 20).to({"int": torch.int64, "bool": torch.bool, "fp8": torch.float8_e4m3fn}[how])
        elif how == "scalar":
            weights[name] = torch.tensor(chance.choice([0.0, 5.0, float("nan")]))
        elif how == "empty":
            weights[name] = torch.zeros(0)
        elif how == "alpha":
            value = chance.choice([0.0, -3.0, float("nan"), float("inf"), 1e30])
            alpha = torch.tensor(value) if chance.random() < 0.7 else torch.full((3,), value)
            weights[name.rpartition(".lora_")[0] + ".alpha"] = alpha
        elif how == "name":
            weights[chance.choice(headers.NAMES)] = weights.pop(name)
        elif how == "more":
            weights[
                name.rpartition(".")[0] + chance.choice([".weight", ".x", ".lora_mid.weight", ".diff", ".dora_scale"])
            ] = tensor.clone()
    whole = save({name.replace("\0", "0"): tensor.contiguous().clone() for name, tensor in weights.items()})
    if chance.random() < 0.4 or not done:
        whole, more = headers.hostile(whole, chance)
        done.append(more)
    return whole, f"{kind}, {names}: {'; '.join(done)}"


def test_hostile_loras(campaign, put, rollout, model, folders):
    for trial in campaign("hostile LoRAs (safetensors)", full=200, sample=6):
        with trial:
            data, what = _odd_lora(trial.chance)
            name = put("loras", "l.safetensors", data).name
            strength = trial.chance.choice([1.0, -10.0, 0.0, 0.5])

            def door(name=name, strength=strength, rolled=trial.number % 2) -> None:
                (changed,) = queued("AdaStateLoadLora", model=model, file=name, strength=strength)
                if rolled:
                    rollout(model=changed, length=9, steps=1)

            seen = tried(door, folders, what)
            trial.saw(seconds=round(seen.seconds, 2), MB=round(seen.megabytes))


@pytest.fixture(scope="session")
def whole_videos():
    """(ending, bytes) of small videos of every container."""
    import matplotlib.font_manager  # noqa: F401  which looks for fonts, and remembers them, the first time
    import matplotlib.pyplot  # noqa: F401

    made = [(ending, media.video(form, codec, pixels)) for ending, form, codec, pixels in media.VIDEOS]
    return made + [(kind.lower(), media.animation(kind)) for kind in ("WEBP", "GIF", "PNG")]


@pytest.fixture
def watches(vae):
    """The doors of a video that somebody brings."""
    from adastate_pack.nodes.host.api import InputImpl

    def through(path, door: str) -> None:
        video = InputImpl.VideoFromFile(str(path))
        if door == "continue":
            queued("AdaStateContinueVideo", vae=vae, video=video, width=32, height=32, frames=5, crop="center")
        elif door == "as it is":
            queued(
                "AdaStateContinueVideo",
                vae=vae,
                video=video,
                width=0,
                height=0,
                frames=1,
                crop="center",
                fps=0.0,
                area="64x64",
            )
        elif door == "metrics":
            queued("AdaStateVideoMetrics", video=video)
        else:
            queued("AdaStateCompare", video_a=video, video_b=video, labels="a, b")

    return through


@pytest.fixture
def joins(rollout, stream, node, folders):
    """A stream's own files: what they hold, and a run that goes on from its state and joins them."""
    audio = {"waveform": torch.full((1, 1, 48_000), 0.1), "sample_rate": 16_000}
    made = {}
    for codec, sound, suffix in (("h264", None, "mp4"), ("h264", audio, "mp4"), ("ffv1", audio, "mkv")):
        given = {"filename_prefix": f"own{len(made)}", "codec": codec, **({"audio": sound} if sound else {})}
        state = rollout(length=9, steps=1, keep_latents=False, stream=stream(**given)).args[1]
        path = folders / "output" / f"own{len(made)}_00001_.{suffix}"
        made[path] = (path.read_bytes(), state, lambda given=given: stream(join=True, **given))
    given = {"vae": stream().vae, "filename_prefix": "animated", "format": "webp", "fps": 16.0, "preview": False}
    frames = lambda **more: node("AdaStateStreamFrames")(**given | more).args[0]  # noqa: E731
    state = rollout(length=9, steps=1, keep_latents=False, stream=frames()).args[1]
    (path,) = (folders / "output").glob("animated_*/*.webp")
    made[path] = (path.read_bytes(), state, lambda: frames(join=True))

    def go_on(path) -> None:
        _, state, joined = made[path]
        rollout(length=21, steps=1, keep_latents=False, resume=state, stream=joined())

    return {path: whole for path, (whole, *_) in made.items()}, go_on


def test_hostile_videos(campaign, watches, joins, whole_videos, folders):
    own, go_on = joins
    for path in own:
        assert tried(lambda path=path: go_on(path), folders, f"{path.name}, whole").held
    for trial in campaign("hostile videos: brought, and a stream's own", full=200, sample=6):
        with trial:
            chance = trial.chance
            if trial.number % 4 == 3:
                path = chance.choice(sorted(own))
                data, what = media.hostile_video(path.suffix[1:], own[path], chance)
                door = lambda path=path: go_on(path)  # noqa: E731
                what = f"join {path.name} {what}"
            else:
                ending, whole = chance.choice(whole_videos)
                data, what = media.hostile_video(ending, whole, chance)
                path = folders / f"brought.{ending}"
                which = chance.choice(["continue", "as it is", "metrics", "metrics", "compare"])
                door = lambda path=path, which=which: watches(path, which)  # noqa: E731
                what = f"{which} {ending} {what}"
            path.write_bytes(data)
            (folders / "last").write_bytes(data)
            names = (path.name, path.parent.name) if path in own else (path.name, "the video", "video ")
            seen = tried(door, folders, what, names)
            for one, whole in own.items():
                one.write_bytes(whole)
            trial.saw(seconds=round(seen.seconds, 2), MB=round(seen.megabytes))


@pytest.fixture(scope="session")
def whole_sounds():
    return [(ending, media.sound(form, codec)) for ending, form, codec in media.SOUNDS]


@pytest.fixture
def hears(rollout, stream):
    """The doors of a sound: it is loaded, heard, driven by, and written beside pictures."""

    def through(name: str, streamed: bool) -> None:
        (audio,) = queued("AdaStateLoadSound", file=name)
        short = audio["waveform"].shape[-1] < 20 * audio["sample_rate"]  # the demo's ear takes its time
        heard = {"encoded": queued("AdaStateDemoEar", audio=audio)[0]} if short else {}
        queued("AdaStateAudio", audio=audio, fps=16.0, offset=0.0, **heard)
        if streamed:
            rollout(length=9, steps=1, keep_latents=False, stream=stream(audio=audio))

    return through


def test_hostile_sounds(campaign, hears, whole_sounds, folders):
    (folders / "input" / "heard.wav").write_bytes(whole_sounds[0][1])
    assert tried(lambda: hears("heard.wav", True), folders, "a whole sound").held
    for trial in campaign("hostile sounds", full=200, sample=6):
        with trial:
            ending, whole = trial.chance.choice(whole_sounds)
            data, what = media.hostile_sound(ending, whole, trial.chance)
            path = folders / "input" / f"heard.{'mp4' if ending == 'mka' else 'ogg' if ending == 'opus' else ending}"
            path.write_bytes(data)
            streamed = trial.number % 3 == 0
            door = lambda path=path, streamed=streamed: hears(path.name, streamed)  # noqa: E731
            seen = tried(door, folders, f"{ending} {what}", (path.name, "sound", "audio"))
            path.unlink()
            trial.saw(seconds=round(seen.seconds, 2), MB=round(seen.megabytes))


class Encoder:
    """The host's two methods of a CLIP, of which every text is the same."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return [[torch.zeros(1, 1, 8), {}]]


def reads(text: str, shared: str, duration: float) -> None:
    """The doors of a timeline: both nodes and the route that pages ask."""
    from adastate_pack.nodes.host import timeline_route

    body = json.dumps({"text": text, "fps": 16, "duration": duration}).encode("utf-8", "surrogatepass")
    _, answer = timeline_route._answered(body)
    asked, told = json.loads(answer), ""
    if "error" in asked:
        told = asked["error"]["message"]
    try:
        queued("AdaStateDemoTimeline", text=text)
    except ValueError as error:
        check("ValueError", str(error), (), "demo")
    queued("AdaStatePromptTimeline", clip=Encoder(), text=text, shared=shared, duration=duration)
    if told:
        raise ValueError(told)


def test_hostile_timelines(campaign, folders):
    for trial in campaign("hostile timelines", full=200, sample=6):
        with trial:
            text, what = timelines.hostile(trial.chance)
            shared = trial.chance.choice(["", "", "film {}", "{}{}{}", "[5s]", "\0", "x" * 100_000])
            duration = trial.chance.choice([0.0, 0.0, 20.0, 0.5, 360_000.0])
            seen = tried(
                lambda text=text, shared=shared, duration=duration: reads(text, shared, duration), folders, what
            )
            trial.saw(seconds=round(seen.seconds, 2), MB=round(seen.megabytes))
