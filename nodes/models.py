"""Models: causal checkpoints as people have them, what they want, and what a rollout of them will take."""

from __future__ import annotations

from typing import Any

from ..adastate_core.anchors import Anchor
from ..adastate_core.audio.track import AudioTrack
from ..adastate_core.cache.byte_plan import CACHE_DEVICES, CACHE_DTYPES
from ..adastate_core.geometry import LatentSpace
from ..adastate_core.rope import POSITION_MODES
from ..adastate_core.schedules.solvers import SAMPLERS
from ..adastate_core.spec import ENDINGS
from ..adastate_core.weights.presets import PRESETS
from .absorption_request import AbsorptionRequest
from .driven import FOLLOWS_SOUND
from .host import api
from .host.api import io, schema, ui, widget
from .host.checkpoint_wishes import (
    KIND,
    LORAS,
    WEIGHT_DTYPES,
    checkpoint_files,
    checkpoint_path,
    file_fingerprint,
    load_causal,
    notes_of,
    with_preset,
)
from .host.loras import with_lora
from .host.model import space_of
from .host.node import Node
from .host.pack_hooks import preset_names
from .inputs import check_size, number
from .inspection import inspect_file, plan_text
from .rollout_node import RolloutNode

CATEGORY = "AdaState/models"
_PRESET_TOOLTIP = (
    "Whose rules to follow: steps, shift, chunk, window, anchor and positions for everything that is left at auto. auto: what "
    "the file says or is named after."
)


def _file_input() -> io.Input:
    return widget(
        io.Combo,
        "file",
        options=checkpoint_files() or [""],
        tooltip="A Wan text-to-video transformer in models/diffusion_models: safetensors, or a trainer's .pt (Self-Forcing "
        "and its kin), which is read without running any code in it.",
    )


def _check_file(file: str | None, kind: str = KIND) -> str | None:
    if file is None:
        return None
    try:
        checkpoint_path(file, kind)
    except ValueError as error:
        return str(error)
    return None


def _space(model: Any) -> LatentSpace | None:
    """The latent space of a MODEL; None for one that the rollout will refuse."""
    try:
        return space_of(model)
    except ValueError:
        return None


def _told(notes: list[str]) -> Any:
    """What a loader shows on its node, or nothing."""
    return ui.PreviewText("\n".join(notes)) if notes else None


class LoadModelNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateLoadModel",
            display_name="Load Causal Video Model",
            category=CATEGORY,
            description="Loads a causal Wan model in any of the public layouts, and remembers how its system rolls it out.",
            search_aliases=["self forcing", "causal forcing", "longlive", "unet", "checkpoint", ".pt"],
            has_intermediate_output=True,
            inputs=[
                _file_input(),
                widget(
                    io.Combo,
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="Number format of the weights; default: the file's own. fp8 halves the weights' memory.",
                ),
                widget(
                    io.Combo,
                    "preset",
                    options=["auto", *preset_names(), "none"],
                    default="auto",
                    optional=True,
                    tooltip=_PRESET_TOOLTIP,
                ),
            ],
            outputs=[io.Model.Output("loaded", display_name="MODEL", tooltip="The model, for AdaState Rollout.")],
        )

    @classmethod
    def check(cls, file: str | None = None) -> str | None:
        return _check_file(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None, weight_dtype: str = "default", preset: str = "auto") -> str:
        return f"{file_fingerprint(file)} {weight_dtype} {preset}"

    @classmethod
    def execute(cls, file: str, weight_dtype: str, preset: str = "auto") -> io.NodeOutput:
        model = load_causal(file, weight_dtype, preset)
        return io.NodeOutput(model, ui=_told(notes_of(model)))


class LoadLoraNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateLoadLora",
            display_name="Load Causal LoRA",
            category=CATEGORY,
            description="Puts a causal model's LoRA onto it, in the trainers' own layout too (LongLive's lora.pt); what of the "
            "file is left out is said.",
            search_aliases=["longlive lora", "peft", "lora.pt"],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="A Wan text-to-video model from any loader."),
                widget(
                    io.Combo,
                    "file",
                    options=checkpoint_files(LORAS) or [""],
                    tooltip="A LoRA in models/loras with Wan's module names or kohya's: safetensors, or a trainer's .pt, which is "
                    "read without running any code in it.",
                ),
                widget(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip="How much of it; 1: as it was trained. LongLive's base model needs all of it.",
                ),
            ],
            outputs=[io.Model.Output("with_lora", display_name="MODEL", tooltip="The model with the LoRA.")],
        )

    @classmethod
    def check(cls, file: str | None = None) -> str | None:
        return _check_file(file, LORAS)

    @classmethod
    def fingerprint_inputs(cls, file: str | None, strength: float = 1.0, **_: Any) -> str:
        return f"{file_fingerprint(file, LORAS)} {strength}"

    @classmethod
    def execute(cls, model: Any, file: str, strength: float = 1.0) -> io.NodeOutput:
        changed, notes = with_lora(model, file, strength)
        return io.NodeOutput(changed, ui=_told(notes))


class ModelPresetNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateModelPreset",
            display_name="Model Preset",
            category=CATEGORY,
            description="Says whose rules a model from any loader (also with LoRAs, fp8 or GGUF) is to be rolled out by.",
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="A Wan text-to-video model from any loader."),
                widget(
                    io.Combo,
                    "preset",
                    options=preset_names(),
                    default="self_forcing",
                    tooltip="What every auto input of the rollout follows; a number or an anchor of your own still wins.",
                ),
                widget(
                    io.Combo,
                    "ending",
                    options=list(ENDINGS),
                    default=ENDINGS[0],
                    optional=True,
                    tooltip="Of Rolling Forcing, which denoises several chunks together. as published: its window shrinks at the "
                    "end, and a longer video has other last chunks. open: a shorter video is an exact prefix of a longer one.",
                ),
                widget(
                    io.Boolean,
                    "keep_first_frame",
                    default=False,
                    optional=True,
                    tooltip="Of Krea Realtime, which makes its past anew before every chunk: the past then begins with the video's "
                    "first frame, and no picture is encoded anew.",
                ),
                widget(
                    io.Combo,
                    "sampler",
                    options=["auto", *SAMPLERS],
                    default="auto",
                    optional=True,
                    tooltip="How a chunk comes from one noise level to the next. auto: as the preset has it. renoising: with fresh "
                    "noise at every step. euler and unipc add none; unipc also uses the step before.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "preset_model", display_name="MODEL", tooltip="The same model, with the preset's defaults."
                ),
                io.String.Output("description", display_name="TEXT", tooltip="What the preset sets."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str,
        ending: str = ENDINGS[0],
        keep_first_frame: bool = False,
        sampler: str = "auto",
    ) -> io.NodeOutput:
        sampler = "" if sampler == "auto" else sampler
        text = PRESETS[preset].describe(ending, keep_first_frame, sampler, _space(model))
        given = with_preset(model, preset, ending, keep_first_frame, sampler)
        return io.NodeOutput(given, text, ui=ui.PreviewText(text))


class InspectCheckpointNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateInspectCheckpoint",
            display_name="Inspect Checkpoint",
            category=CATEGORY,
            description="Tells what a file is, what it wants and what its cache will cost, without loading it.",
            is_output_node=True,
            inputs=[
                _file_input(),
                number(io.Int, "width", auto=False, default=832, optional=True, tooltip="Video width."),
                number(io.Int, "height", auto=False, default=480, optional=True, tooltip="Video height."),
                number(
                    io.Int,
                    "length",
                    auto=False,
                    default=81,
                    optional=True,
                    tooltip="Video frames, to tell whether the file was made for that many.",
                ),
            ],
            outputs=[io.String.Output("text", display_name="TEXT", tooltip="What was found, a line each.")],
        )

    @classmethod
    def check(cls, file: str | None = None, width: int | None = None, height: int | None = None) -> str | None:
        return check_size(width, height) or _check_file(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None, width: int = 832, height: int = 480, length: int = 81) -> str:
        return f"{file_fingerprint(file)} {width} {height} {length}"

    @classmethod
    def execute(cls, file: str, width: int = 832, height: int = 480, length: int = 81) -> io.NodeOutput:
        text = inspect_file(file, width, height, length)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class PlanNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        shared = {i.id: i for i in RolloutNode.define_schema().inputs}
        return schema(
            node_id="AdaStatePlan",
            display_name="Plan Rollout Memory",
            category=CATEGORY,
            description="The exact bytes that a rollout's caches will take, whether they fit, and what would make them fit.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that is to be rolled out; it is not moved to the device."),
                number(
                    io.Int,
                    "width",
                    default=832,
                    tooltip="Width of the video in pixels; 0 = that of start_latent.",
                ),
                number(io.Int, "height", default=480, tooltip="Height in pixels; 0 = that of start_latent."),
                number(
                    io.Int,
                    "length",
                    default=81,
                    min=FOLLOWS_SOUND,
                    tooltip="Video frames; 0 = rolled until it is stopped, -1 = as long as audio. Caches do not depend on it; kept "
                    "latents and files do.",
                ),
                number(io.Int, "batch_size", default=1, optional=True, tooltip="Videos side by side."),
                number(io.Int, "chunk_frames", default=0, optional=True, tooltip="0: what the model wants."),
                number(
                    io.Int,
                    "window_frames",
                    default=-1,
                    optional=True,
                    tooltip="-1: what the model wants.",
                ),
                widget(
                    io.Combo,
                    "positions",
                    options=["auto", *POSITION_MODES],
                    default="auto",
                    optional=True,
                    tooltip="As in the rollout; absolute needs no second copy of a long window.",
                ),
                api.Anchor.Input("anchor", optional=True, tooltip="As in the rollout; empty: what the model wants."),
                io.Vae.Input("vae", optional=True, tooltip="With a stream: the decoder, whose own cache counts too."),
                shared["absorption"],
                shared["cache_dtype"],
                shared["cache_device"],
                io.Latent.Input(
                    "start_latent",
                    optional=True,
                    tooltip="Only its size counts, where width or height is 0, and whether it fits into the first chunk, where the "
                    "model's preset has it there.",
                ),
                api.Stream.Input(
                    "stream",
                    optional=True,
                    tooltip="STREAM of Stream To Video or Stream To Frames: says what its files will be, and counts what they "
                    "take. Its VAE counts where vae is empty.",
                ),
                shared["audio"],
                shared["reference"],
            ],
            outputs=[
                io.String.Output("text", display_name="TEXT", tooltip="The plan in words."),
                io.String.Output("json", display_name="JSON", tooltip="The same as JSON: bytes by name, fits, free."),
            ],
        )

    @classmethod
    def check(cls, width: int | None = None, height: int | None = None) -> str | None:
        return check_size(width, height, auto=True)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """Never equal to itself: what is free on the device changes from run to run."""
        return float("nan")

    @classmethod
    def execute(
        cls,
        model: Any,
        width: int,
        height: int,
        length: int,
        batch_size: int = 1,
        chunk_frames: int = 0,
        window_frames: int = -1,
        positions: str = "auto",
        anchor: Anchor | None = None,
        vae: Any = None,
        absorption: AbsorptionRequest | None = None,
        cache_dtype: str = CACHE_DTYPES[0],
        cache_device: str = CACHE_DEVICES[0],
        start_latent: dict[str, Any] | None = None,
        stream: Any = None,
        audio: AudioTrack | None = None,
        reference: Any = None,
    ) -> io.NodeOutput:
        asked = {"chunk_frames": chunk_frames, "window_frames": window_frames, "positions": positions}
        cache = {"cache_dtype": cache_dtype, "cache_device": cache_device}
        if absorption is not None:
            cache["absorption"] = absorption.asked
        text, numbers = plan_text(
            model, width, height, length, batch_size, asked, anchor, vae, cache, start_latent, stream, audio, reference
        )
        return io.NodeOutput(text, numbers, ui=ui.PreviewText(text))


NODES = [LoadModelNode, LoadLoraNode, ModelPresetNode, InspectCheckpointNode, PlanNode]
