"""Rollout states: saved, loaded, looked into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..adastate_core.geometry import space_of
from ..adastate_core.rollout import RolloutState
from ..adastate_core.states.kept_states import state_at
from ..adastate_core.states.state_file import load_state, save_state
from .host import api
from .host.api import io, schema, ui, widget
from .host.codec import HostDecoder
from .host.model import wan_to_vae_space
from .host.node import Node, shown
from .host.output_files import STATE_SUFFIX, check_prefix, check_saved, fingerprint, saved_files, saved_path, write_new
from .host.vae_family import check_vae
from .stream import latent_space_widget

CATEGORY = "AdaState/state"
MOST_CHUNKS = 2**30


class SaveStateNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateSaveState",
            display_name="Save Rollout State",
            category=CATEGORY,
            description="Writes a rollout's state to the output folder, so that it can go on later, bit for bit.",
            is_output_node=True,
            inputs=[
                api.State.Input("state", tooltip="STATE of a rollout."),
                widget(io.String, "filename_prefix", default="adastate/state", tooltip="Where in the output folder."),
            ],
            outputs=[io.String.Output("file", display_name="FILE", tooltip="Name to give Load Rollout State.")],
        )

    @classmethod
    def check(cls, filename_prefix: str | None = None) -> str | None:
        return check_prefix(filename_prefix, STATE_SUFFIX) if filename_prefix is not None else None

    @classmethod
    def execute(cls, state: RolloutState, filename_prefix: str) -> io.NodeOutput:
        name = write_new(filename_prefix, STATE_SUFFIX, lambda path: save_state(state, path, new=True))
        return io.NodeOutput(name, ui=ui.PreviewText(f"{name}\n{state!r}"))


class LoadStateNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateLoadState",
            display_name="Load Rollout State",
            category=CATEGORY,
            description="Reads a saved state, or the one that a stream saved beside its video, to go on from.",
            has_intermediate_output=True,
            inputs=[
                widget(
                    io.Combo,
                    "file",
                    options=saved_files(STATE_SUFFIX) or [""],
                    tooltip="A saved state: newest first; '<video>.state.safetensors' are the streams' own, those in "
                    "'<video>.history' were kept on the way.",
                ),
                widget(
                    io.Int,
                    "chunk",
                    default=-1,
                    min=-1,
                    max=MOST_CHUNKS,
                    optional=True,
                    tooltip="The state after so many generated chunks, or the nearest before, from the history that the stream "
                    "kept of this file's video (history_chunks). -1 = the file itself.",
                ),
            ],
            outputs=[api.State.Output("state", display_name="STATE", tooltip="Connect to a rollout's resume.")],
        )

    @classmethod
    def check(cls, file: str | None = None, chunk: int | None = None) -> str | None:
        if chunk is not None and not -1 <= chunk <= MOST_CHUNKS:
            return f"chunk is {shown(chunk)}; it must be between -1 (the file itself) and {MOST_CHUNKS}"
        if (reason := check_saved(file, "state file")) or file is None or chunk is None:
            return reason
        try:
            cls._path(file, chunk)
        except ValueError as error:
            return str(error)
        return None

    @classmethod
    def fingerprint_inputs(cls, file: str, chunk: int = -1) -> str:
        return fingerprint(cls._path(file, chunk))

    @classmethod
    def execute(cls, file: str, chunk: int = -1) -> io.NodeOutput:
        path = cls._path(file, chunk)
        state = load_state(path)
        told = f"{path.name}: after {state.next_chunk} chunks\n{state!r}{_steered(state)}"
        return io.NodeOutput(state, ui=ui.PreviewText(told))

    @staticmethod
    def _path(file: str, chunk: int) -> Path:
        path = saved_path(file, "state file")
        return path if chunk < 0 else state_at(path, chunk)


def _steered(state: RolloutState) -> str:
    """What the video was steered by, to be given to the run that goes on: a killed run leaves no report that says it."""
    changes = state.steered.get("changes", [])
    if not changes:
        return ""
    if timeline := state.steered["timeline"]:
        return f"\nsteered while it was made; the timeline that has it all:\n{timeline}"
    said = (", ".join(f"{name} {value}" for name, value in one.items() if name != "frame") for one in changes)
    return "\nsteered while it was made:\n" + "\n".join(said)


class DecodeStateNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateDecodeState",
            display_name="Decode Hidden State",
            category=CATEGORY,
            description="Shows the hidden state of an adaptive rollout as pictures: what the model carries, never rendered.",
            inputs=[
                api.State.Input("state", tooltip="STATE of a rollout with the adaptive anchor."),
                io.Vae.Input("vae", tooltip="The Wan VAE that belongs to the model, full or tiny."),
                latent_space_widget(),
            ],
            outputs=[
                io.Image.Output("image", display_name="IMAGE", tooltip="One picture a state frame and batch item.")
            ],
        )

    @classmethod
    def execute(cls, state: RolloutState, vae: Any, latent_space: str = "auto") -> io.NodeOutput:
        if state.hidden is None:
            kind = state.spec["anchor"]["kind"]
            raise ValueError(
                f"this rollout ran with the {kind} anchor, which has no hidden state; use Anchor: Adaptive State"
            )
        space = space_of(state.spec)
        check_vae(vae, space)
        frames = wan_to_vae_space(state.hidden, space).transpose(1, 2).flatten(0, 1)[:, :, None]
        pictures = []
        for frame in frames:  # each is the first frame of a video of its own
            decoder = HostDecoder(vae, latent_space=latent_space)
            decoder.load(frame[None].shape)
            pictures.append(decoder.step(frame[None])[0])
        return io.NodeOutput(torch.cat(pictures))


NODES = [SaveStateNode, LoadStateNode, DecodeStateNode]
