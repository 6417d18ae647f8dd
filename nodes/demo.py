"""Words for the demo model, which has no text encoder."""

from __future__ import annotations

from ..adastate_core.prompts.demo_words import ANY, DEFAULTS, VOCABULARY, prompt
from .host.api import io, schema, widget
from .host.node import Node, shown

_TOOLTIPS = {
    "terrain": "What the ground is.",
    "pace": "How fast the camera moves on.",
    "balloon": "Colour of the balloon.",
    "lantern": "Whether the lantern is up. Its colour is in no word: the model chooses it.",
}


class DemoPromptNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateDemoPrompt",
            display_name="Demo Prompt",
            category="AdaState/demo",
            description="Words of the demo model's little world as CONDITIONING. Real checkpoints take CLIP Text Encode.",
            inputs=[
                widget(
                    io.Combo,
                    slot,
                    options=[*words, ANY] if slot != "lantern" else list(words),
                    default=DEFAULTS[slot],
                    tooltip=_TOOLTIPS[slot],
                )
                for slot, words in VOCABULARY.items()
            ],
            outputs=[io.Conditioning.Output("positive", display_name="CONDITIONING", tooltip="Connect to positive.")],
        )

    @classmethod
    def check(
        cls,
        terrain: str | None = None,
        pace: str | None = None,
        balloon: str | None = None,
        lantern: str | None = None,
    ) -> str | None:
        for slot, word in zip(VOCABULARY, (terrain, pace, balloon, lantern), strict=True):
            allowed = (*VOCABULARY[slot], *(() if slot == "lantern" else (ANY,)))
            if word is not None and word not in allowed:
                return f"{slot} is {shown(word)}; the demo model knows {', '.join(allowed)}"
        return None

    @classmethod
    def execute(cls, terrain: str, pace: str, balloon: str, lantern: str) -> io.NodeOutput:
        words = {"terrain": terrain, "pace": pace, "balloon": balloon, "lantern": lantern}
        return io.NodeOutput([[prompt(words), {}]])


NODES = [DemoPromptNode]
