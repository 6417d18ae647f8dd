"""The pack's nodes, one file a topic; host/ is what touches ComfyUI."""

from __future__ import annotations

import logging
import traceback

from typing_extensions import override

from .host import queued
from .host.api import ComfyExtension, io
from .host.live_routes import add_routes
from .host.output_files import add_own_models
from .host.pack_hooks import offer, when_all_are_loaded

log = logging.getLogger("adastate")


class AdaStateExtension(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        try:
            from . import (
                absorption_nodes,
                analysis,
                anchor_nodes,
                audio_nodes,
                demo,
                frames_node,
                metrics_node,
                models,
                prompt_nodes,
                rollout_node,
                sampler_nodes,
                self_test_node,
                start,
                state_nodes,
                stream,
            )
        except Exception:
            # The host reports a failed import in one line; the reason is in the traceback.
            log.error("ComfyUI-AdaState could not be loaded:\n%s", traceback.format_exc())
            raise
        add_own_models()
        add_routes()
        offer()
        when_all_are_loaded()
        queued.watch()
        return [
            *models.NODES,
            *anchor_nodes.NODES,
            *prompt_nodes.NODES,
            *rollout_node.NODES,
            *sampler_nodes.NODES,
            *stream.NODES,
            *frames_node.NODES,
            *audio_nodes.NODES,
            *start.NODES,
            *state_nodes.NODES,
            *absorption_nodes.NODES,
            *analysis.NODES,
            *metrics_node.NODES,
            *self_test_node.NODES,
            *demo.NODES,
        ]
