"""What differs by model family: its latent space, its VAEs, what a chunk is conditioned on, and its samplers.

A family is a value. Whoever needs one of its facts asks it, so that another family is one more value and no `if`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..geometry import LatentSpace


@dataclass(frozen=True)
class Family:
    """`model_classes` are the host's names of its models' classes (model_base), `vae_classes` those of its VAEs' networks by
    their kind here. `conditions` are what a chunk may be given beside its latents; all else is refused. `samplers` are of
    schedule.SAMPLERS, or empty for all of them.
    """

    name: str
    space: LatentSpace
    model_classes: tuple[str, ...]
    vae_classes: dict[str, str]
    vae_examples: str
    conditions: tuple[str, ...] = ("text",)
    samplers: tuple[str, ...] = ()

    @property
    def model_class(self) -> str:
        """The class that most of its models have."""
        return self.model_classes[0]

    def latent_shape(self, batch: str = "batch") -> str:
        """A latent's shape in words."""
        return f"[{batch}, {self.space.channels}, frames, h, w]"
