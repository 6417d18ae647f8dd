"""Whose latents a VAE of the host decodes: what else it is, or whose latents do not go with it, is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...adastate_core.families.family import Family
from ...adastate_core.families.known import FAMILIES
from ...adastate_core.geometry import LatentSpace, space_of, space_with
from ...adastate_core.rollout import RolloutState


def check_vae(vae: Any, space: LatentSpace | None = None) -> Family:
    """The family whose latents `vae`, full or tiny, decodes. ValueError, naming what was given, for a VAE of none, or of another
    one than whose models work in `space`."""
    name, channels = _class_of(vae), getattr(vae, "latent_channels", 0)
    family = next(
        (one for one in FAMILIES if name in one.vae_classes.values() and channels == one.space.channels), None
    )
    if family is None:
        known = any(name in one.vae_classes.values() for one in FAMILIES)
        other = f" with {channels} channels" if known else ""
        each = [f"a {one.space.name} VAE ({one.space.channels} channels): {one.vae_examples}" for one in FAMILIES]
        wanted = ", or ".join(dict.fromkeys(each))
        raise ValueError(f"the vae is a {name}{other}; streaming decode needs {wanted}")
    if space is not None and family.space != space:
        raise ValueError(
            f"the vae is a {family.space.name} VAE ({family.space.channels} channels), and the model works in {space.name}'s "
            f"latents ({space.channels} channels): {family_of_space(space).vae_examples}"
        )
    return family


def is_tiny(vae: Any, family: Family) -> bool:
    """Whether a VAE of `family` is a tiny one, which decodes only."""
    return _class_of(vae) == family.vae_classes["tiny"]


def check_encoder(vae: Any) -> Family:
    """The family of `vae`. ValueError, naming what was given, unless it is a full VAE."""
    family = check_vae(vae)
    if is_tiny(vae, family):
        raise ValueError(
            f"the vae is a tiny VAE, which decodes only; encoding needs a full {family.space.name} VAE: {family.full_examples}"
        )
    return family


def check_latent_shape(shape: Sequence[int], family: Family) -> None:
    """ValueError unless latents of `shape` are those of a video that a VAE of `family` decodes."""
    space = family.space
    if len(shape) == 5 and shape[1] == space.channels and 0 not in shape:
        return
    other = space_with(shape[1]) if len(shape) == 5 and 0 not in shape else None
    if other is not None:
        raise ValueError(
            f"the latent is {list(shape)}, a {other.name} video, and the vae is a {space.name} VAE ({space.channels} channels); "
            f"connect the VAE that belongs to the latent: {family_of_space(other).vae_examples}"
        )
    raise ValueError(
        f"the latent is {list(shape)}; streaming decode needs a {space.name} video latent "
        f"[B, {space.channels}, frames, h, w]"
    )


def check_spaces(
    family: Family, start_latent: Mapping[str, Any] | None = None, resume: RolloutState | None = None, vae: Any = None
) -> None:
    """ValueError, naming what was given, where a LATENT to start from, a state or a VAE is not of the latents that a model of
    `family` works in. What is None is not connected."""
    space = family.space
    if resume is not None and (theirs := space_of(resume.spec)) != space:
        raise ValueError(
            f"the state is of a model of {theirs.name}'s latents ({theirs.channels} channels), and the model works in "
            f"{space.name}'s ({space.channels} channels): load the model that the state was made with"
        )
    if start_latent is not None:
        shape = start_latent["samples"].shape
        if len(shape) != 5 or shape[1] != space.channels:
            other = space_with(shape[1]) if len(shape) == 5 else None
            what = f" of {other.name}" if other else ""
            raise ValueError(
                f"start_latent is {list(shape)}{what}; it must be a {space.name} video latent [B, {space.channels}, frames, h, w]: "
                f"encode pictures with Continue Video and a full {space.name} VAE ({family.full_examples})"
            )
    if vae is not None:
        check_vae(vae, space)


def family_of_space(space: LatentSpace) -> Family:
    """The family whose models work in `space`."""
    return next(family for family in FAMILIES if family.space == space)


def _class_of(vae: Any) -> str:
    return type(getattr(vae, "first_stage_model", None)).__name__
