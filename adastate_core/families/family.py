"""What differs by model family: its latent space, its VAEs, what a chunk is conditioned on, and its samplers.

A family is a value. Whoever needs one of its facts asks it, so that another family is one more value and no `if`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..decode.wan_makes import WanMake
from ..geometry import LatentSpace


@dataclass(frozen=True)
class Family:
    """`model_classes` are the host's names of its models' classes (model_base), `vae_classes` those of its VAEs' networks by
    their kind here, and `full_vae` is how the full one is called. `full_examples` and `vae_examples` say which full VAE, and which
    of any kind, a user loads; `empty_latent` which node of the host gives an empty LATENT. `refused_conditions` are the host's keys
    of what a prompt may carry besides its text and a chunk of this family is not given, with the words for each. `samplers` are of
    schedule.SAMPLERS, or empty for all of them. `driven_by_sound`: its models hear a sound and are shown a reference.
    """

    name: str
    space: LatentSpace
    model_classes: tuple[str, ...]
    vae_classes: dict[str, str]
    full_vae: WanMake
    full_examples: str
    vae_examples: str
    empty_latent: str
    refused_conditions: dict[str, str] = field(default_factory=dict, repr=False)
    samplers: tuple[str, ...] = ()
    driven_by_sound: bool = False

    @property
    def model_class(self) -> str:
        """The class that most of its models have."""
        return self.model_classes[0]
