"""Which weights a Wan transformer of text to video, or of sound and text to video, has, what its sizes are, and what a file holds
besides."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..geometry import SPACES, LatentSpace, space_with
from .file_kind import CheckpointError, shown_name

HEAD_CHANNELS = 128
TIME_CHANNELS = 256
PATCH = 2
IS_A_LORA = "is a LoRA and no model: load the model that it belongs to, and put Load Causal LoRA behind it"
# what only another kind of Wan model has: the host would load that kind, and a rollout drives plain text to video
_OTHER_KINDS = (
    (("vace_patch_embedding.", "vace_blocks."), "a Wan VACE model (control video)"),
    (("control_adapter.",), "a Wan camera control model"),
    (("audio_proj.",), "a Wan model that is driven by sound in another way than Wan 2.2 S2V (HuMo)"),
    (("face_adapter.", "motion_encoder.", "pose_patch_embedding.", "face_encoder."), "a Wan Animate model"),
    (
        ("patch_embedding_mask.", "patch_embedding_pose.", "patch_embedding_global."),
        "a Wan model that is driven by poses",
    ),
    (("img_emb.",), "a Wan image-to-video model"),
)
# what Wan 2.2 S2V has besides (the host's spelling); the host knows it by one of these weights
_OF_SOUND = ("casual_audio_encoder.", "audio_injector.", "frame_packer.", "trainable_cond_mask.", "cond_encoder.")
_KNOWN_BY = "casual_audio_encoder.encoder.final_linear.weight"
SOUND_CHANNELS, SOUND_LAYERS, SOUND_TOKENS = 1024, 25, 4
# the blocks behind which sound comes in, one injector each; a file may lack those of blocks that it has not
INJECTED_BLOCKS = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39)
# what quantised files keep beside a layer's weight, and the host reads
_QUANTISED = (
    "scale_weight",
    "scale_input",
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "comfy_quant",
    "pre_quant_scale",
)
_SCALES = ("scale_weight", "weight_scale", "weight_scale_2")
QUANTIZATION_KEY = "_quantization_metadata"
_MARKS = ("scaled_fp8",)
_PACKED = "quantized_weight_values"
_WRAPPED = re.compile(r"blocks\.\d+\.(self_attn|cross_attn|ffn)\.\w+\.linear\.weight")
# what TransformerEngine's layers keep beside a weight: bytes that only a pickle reads
EXTRA_STATE = "._extra_state"


@dataclass(frozen=True)
class WanGeometry:
    """The sizes of a Wan transformer: `width`, `feed_forward`, `layers`, `heads`, channels in, text channels, and the latent space
    that it makes latents of. `driven_by_sound`: it is one of Wan 2.2 S2V."""

    width: int
    feed_forward: int
    layers: int
    heads: int
    in_channels: int
    text_channels: int
    space: LatentSpace
    driven_by_sound: bool = False

    @property
    def parameters(self) -> str:
        """What people call it."""
        return {1536: "1.3B", 3072: "5B", 5120: "14B"}.get(self.width, f"width {self.width}")


def geometry_of(shapes: Mapping[str, tuple[int, ...]], file: str = "the file") -> WanGeometry:
    """Sizes from the weights' shapes; CheckpointError for what is missing or does not fit together."""
    check_family(shapes, file)
    needed = ("patch_embedding.weight", "text_embedding.0.weight", "head.head.weight", "blocks.0.ffn.0.weight")
    if absent := [name for name in needed if name not in shapes]:
        raise CheckpointError(f"{file} is not a Wan transformer: it has no {absent[0]}")
    ranks = {"patch_embedding.weight": 5} | dict.fromkeys(needed[1:], 2)
    if odd := next((name for name, rank in ranks.items() if len(shapes[name]) != rank or 0 in shapes[name]), None):
        raise CheckpointError(f"{file} is not a Wan transformer: its {odd} is {list(shapes[odd])}")
    numbers = sorted({int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d{1,4})\.", name))})
    if numbers != list(range(len(numbers))):
        gap = next(i for i, number in enumerate([*numbers, -1]) if number != i)
        raise CheckpointError(
            f"{file} is incomplete: it has {len(numbers)} layers up to {numbers[-1]}, and layer {gap} is missing"
        )
    width, in_channels = shapes["patch_embedding.weight"][:2]
    if width % HEAD_CHANNELS:
        raise CheckpointError(
            f"{file} has a width of {width}, which is not a whole number of Wan's heads of {HEAD_CHANNELS}"
        )
    feed_forward, text = shapes["blocks.0.ffn.0.weight"][0], shapes["text_embedding.0.weight"][1]
    space = _space_of(shapes["head.head.weight"], width, file)
    heads, hears = width // HEAD_CHANNELS, _hears(shapes, file)
    geometry = WanGeometry(width, feed_forward, len(numbers), heads, in_channels, text, space, hears)
    for name, shape in _expected(geometry):
        if name not in shapes:
            raise CheckpointError(f"{file} does not fit together: {name} is missing")
        if shapes[name] != shape:
            raise CheckpointError(
                f"{file} does not fit together: {name} is {list(shapes[name])} and should be {list(shape)}"
            )
    return geometry


def _hears(shapes: Mapping[str, tuple[int, ...]], file: str) -> bool:
    """Whether a file is of Wan 2.2 S2V; CheckpointError for what is left of one."""
    if _KNOWN_BY in shapes:
        return True
    if found := [name for name in shapes if name.startswith(_OF_SOUND)]:
        raise CheckpointError(
            f"{file} is what is left of a Wan 2.2 S2V model: it holds {len(found)} of its weights such as {shown_name(found[0])}, "
            f"and {_KNOWN_BY} is missing"
        )
    return False


def _space_of(head: tuple[int, ...], width: int, file: str) -> LatentSpace:
    """The latent space of what a head of this shape makes; CheckpointError if there is none."""
    rows = head[0] // PATCH**2
    if head[0] % PATCH**2 == 0 and (space := space_with(rows)) is not None:
        return space
    wanted = " or ".join(f"{[PATCH**2 * space.channels, width]} ({space.name})" for space in SPACES.values())
    raise CheckpointError(f"{file} does not fit together: head.head.weight is {list(head)} and should be {wanted}")


def _expected(geometry: WanGeometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight of a Wan text-to-video transformer of these sizes, with its shape."""
    width, feed_forward = geometry.width, geometry.feed_forward
    linear = {
        "text_embedding.0": (width, geometry.text_channels),
        "text_embedding.2": (width, width),
        "time_embedding.0": (width, TIME_CHANNELS),
        "time_embedding.2": (width, width),
        "time_projection.1": (6 * width, width),
        "head.head": (PATCH**2 * geometry.space.channels, width),
        "patch_embedding": (width, geometry.in_channels, 1, PATCH, PATCH),
    }
    yield "head.modulation", (1, 2, width)
    for i in range(geometry.layers):
        yield f"blocks.{i}.modulation", (1, 6, width)
        yield f"blocks.{i}.norm3.weight", (width,)
        yield f"blocks.{i}.norm3.bias", (width,)
        for kind in ("self_attn", "cross_attn"):
            linear |= {f"blocks.{i}.{kind}.{name}": (width, width) for name in "qkvo"}
            yield f"blocks.{i}.{kind}.norm_q.weight", (width,)
            yield f"blocks.{i}.{kind}.norm_k.weight", (width,)
        linear |= {f"blocks.{i}.ffn.0": (feed_forward, width), f"blocks.{i}.ffn.2": (width, feed_forward)}
    if geometry.driven_by_sound:
        yield "trainable_cond_mask.weight", (3, width)
        yield "casual_audio_encoder.weights", (1, SOUND_LAYERS, 1, 1)
        yield "casual_audio_encoder.encoder.padding_tokens", (1, 1, 1, width)
        linear |= _of_sound(width, geometry.space.channels)
        for i in range(sum(block < geometry.layers for block in INJECTED_BLOCKS)):
            yield from _injector(i, width)
    for name, shape in linear.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def _of_sound(width: int, channels: int) -> dict[str, tuple[int, ...]]:
    """The layers of an S2V model beside its blocks, each with a bias of its own."""
    encoder = "casual_audio_encoder.encoder"
    return {
        "cond_encoder": (width, channels, 1, PATCH, PATCH),
        f"{encoder}.conv1_local.conv": (width // 4 * SOUND_TOKENS, SOUND_CHANNELS, 3),
        f"{encoder}.conv1_global.conv": (width // 4, SOUND_CHANNELS, 3),
        f"{encoder}.conv2.conv": (width // 2, width // 4, 3),
        f"{encoder}.conv3.conv": (width, width // 2, 3),
        f"{encoder}.final_linear": (width, width),
        "frame_packer.proj": (width, channels, 1, PATCH, PATCH),
        "frame_packer.proj_2x": (width, channels, 2, 2 * PATCH, 2 * PATCH),
        "frame_packer.proj_4x": (width, channels, 4, 4 * PATCH, 4 * PATCH),
    }


def _injector(index: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight by which sound comes in behind one block."""
    for name in "qkvo":
        yield f"audio_injector.injector.{index}.{name}.weight", (width, width)
        yield f"audio_injector.injector.{index}.{name}.bias", (width,)
    for name in ("norm_q", "norm_k"):
        yield f"audio_injector.injector.{index}.{name}.weight", (width,)
    yield f"audio_injector.injector_adain_layers.{index}.linear.weight", (2 * width, width)
    yield f"audio_injector.injector_adain_layers.{index}.linear.bias", (2 * width,)


def check_family(shapes: Mapping[str, tuple[int, ...]], file: str) -> None:
    """CheckpointError where names show that a file is no plain text-to-video transformer, in words a user knows it by."""
    _check_packed(shapes, file)
    whole = "patch_embedding.weight" in shapes and "blocks.0.ffn.0.weight" in shapes
    if any(".base_layer." in name for name in shapes):
        raise CheckpointError(
            f"{file} was saved with a LoRA still apart from its layers (peft's base_layer): merge it there (merge_and_unload) and "
            "save again"
        )
    if lora := sum(".lora_" in name for name in shapes):
        if not whole:
            raise CheckpointError(f"{file} {IS_A_LORA}")
        raise CheckpointError(
            f"{file} holds a model and {lora} weights of a LoRA beside it, which would be left out: save the LoRA to a file of its "
            "own and put Load Causal LoRA behind the model"
        )
    for prefixes, words in _OTHER_KINDS:
        if of_it := [name for name in shapes if name.startswith(prefixes)]:
            raise CheckpointError(
                f"{file} is {words}, or what is left of one: it holds {len(of_it)} weights such as {shown_name(of_it[0])}; a "
                "rollout drives plain Wan text-to-video models"
            )
    if not whole and any(re.match(r"blocks\.\d+\.(attn1|ffn\.net)\.", name) for name in shapes):
        raise CheckpointError(
            f"{file} is a Wan model in the layout of diffusers, which the host does not load: take the file with Wan's own names "
            "(blocks.0.self_attn.q.weight)"
        )
    if not whole and (part := re.search(r"-(\d{5})-of-(\d{5})\.", file)):
        raise CheckpointError(
            f"{file} is part {int(part[1])} of {int(part[2])} of a model: join the parts to one file, or take the model as one file"
        )


def _check_packed(names: Iterable[str], file: str) -> None:
    """CheckpointError for weights that LongLive 2.0 has packed, or wrapped, for a library that is not used here."""
    names = list(names)
    if packed := sum(name.endswith(_PACKED) for name in names):
        raise CheckpointError(
            f"{file} holds {packed} weights packed in 4 bits (NVFP4 of FourOverSix, as in LongLive 2.0's model_4o6.pt), which are "
            "not read here: take model_te.pt of the same repository, or model_bf16.pt"
        )
    if wrapped := [name for name in names if _WRAPPED.fullmatch(name)]:
        raise CheckpointError(
            f"{file} was saved out of TransformerEngine's own layers ({shown_name(wrapped[0])}), which are not read here: take "
            "LongLive 2.0's model_te.pt, which holds plain weights for them, or model_bf16.pt"
        )


def check_scales(names: Iterable[str], metadata: Mapping[str, str], file: str) -> None:
    """CheckpointError for scales of quantised weights without the mark that makes the host use them: it would drop them."""
    names = list(names)
    scales = [name for name in names if name.rpartition(".")[2] in _SCALES]
    marked = QUANTIZATION_KEY in metadata or any(name in _MARKS or name.endswith(".comfy_quant") for name in names)
    if scales and not marked:
        raise CheckpointError(
            f"{file} holds {len(scales)} scales of quantised weights (such as {shown_name(scales[0])}) without the mark "
            "(scaled_fp8) by which the host knows them, and would run without them: take the file in bf16 "
            "or in ComfyUI's own fp8 layout"
        )


def unused_weights(shapes: Mapping[str, tuple[int, ...]], geometry: WanGeometry) -> list[str]:
    """The names in a file that the transformer of these sizes has no weight for, and that do not describe one either."""
    known = {name for name, _ in _expected(geometry)}
    if geometry.driven_by_sound:  # a whole file has all injectors, however few blocks use them
        known |= {name for i in range(len(INJECTED_BLOCKS)) for name, _ in _injector(i, geometry.width)}
    modules = {name.rpartition(".")[0] for name in known}

    def describes(name: str) -> bool:
        module, _, last = name.rpartition(".")
        return name in _MARKS or last in _QUANTISED and module in modules

    return [name for name in shapes if name not in known and not describes(name)]


def counted(names: Iterable[str], most: int = 4) -> str:
    """Weights by the module that they belong to, the largest groups first: "8 of vace_blocks, 2 of img_emb"."""
    groups = Counter(_group(name) for name in names)
    told = groups.most_common(most)
    rest = sum(groups.values()) - sum(count for _, count in told)
    return ", ".join(f"{count} of {shown_name(group)}" for group, count in told) + (f" and {rest} more" if rest else "")


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names on one line, the first of many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _group(name: str) -> str:
    """The first word of a name; of a block's weight its module in the block."""
    if name.endswith(EXTRA_STATE):
        return "TransformerEngine's _extra_state"
    if match := re.match(r"blocks\.\d+\.(.+)", name):
        return "blocks' " + match[1].removesuffix(".weight").removesuffix(".bias")
    return name.partition(".")[0]
