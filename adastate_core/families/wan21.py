"""Wan 2.1 text to video: the few-step causal models that are distilled from it, and the host's own class for them."""

from __future__ import annotations

from ..decode.wan_makes import VAE_2_1
from ..geometry import WAN21
from .family import Family

# what the host can put beside a text, by the words that a user knows it by
_REFUSED: dict[str, str] = {
    "hooks": "hooks (keyframed LoRA)",
    "area": "an area",
    "mask": "a mask",
    "set_area_to_bounds": "an area",
    "start_percent": "a timestep range",
    "end_percent": "a timestep range",
    "timestep_start": "a timestep range",
    "timestep_end": "a timestep range",
    "clip_start_percent": "a schedule of text encoder hooks",
    "clip_end_percent": "a schedule of text encoder hooks",
    "control": "a ControlNet",
    "additional_models": "a model of its own",
    "noise_concat": "channels beside the noise",
    "concat_image": "a concat image",
    "concat_latent_image": "a concat latent image (image to video)",
    "concat_mask": "a concat mask (image to video)",
    "reference_latents": "reference latents",
    "context_latents": "reference latents",
    "clip_vision_output": "a CLIP vision output",
    "unclip_conditioning": "a CLIP vision output",
    "gligen": "GLIGEN boxes",
    "vace_frames": "VACE frames",
    "vace_context": "VACE frames",
    "audio_embed": "audio",
    "time_dim_concat": "reference frames (Phantom)",
    "camera_conditions": "camera motion",
    "control_video": "a control video",
    "reference_motion": "a reference motion",
    "pose_video_latent": "a pose video",
    "face_video_pixels": "a face video",
}

WAN21_TEXT = Family(
    name="Wan 2.1 text to video",
    space=WAN21,
    # the host's own autoregressive class has the same weights; only the attention's forward differs, which a rollout replaces
    model_classes=("WAN21_T2V", "WAN21_CausalAR_T2V"),
    vae_classes={"full": "WanVAE", "tiny": "TAEHV"},
    full_vae=VAE_2_1,
    full_examples="load wan_2.1_vae, or the demo's",
    vae_examples="load wan_2.1_vae, the demo's, or a tiny one (taew2_1, lighttaew2_1)",
    empty_latent="Empty HunyuanVideo Latent",
    refused_conditions=_REFUSED,
)
