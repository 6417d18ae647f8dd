"""The world that speaks: the balloon is as large as the sound is loud, and the lantern hangs as high as its pitch is.

Terrain, pace, colours and the lantern's coming and going are in the words (world.py); what the sound decides is in no word.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from adastate_core.audio.demo_ear import HOP, RATE
from adastate_core.audio.demo_tones import tones

from .world import FPS, LANTERN_STATES, Scene

# pixels at 64x64: the balloon's radius in silence and at full loudness; the lantern's height at the lowest and highest pitch
SOFTEST, LOUDEST = 5.0, 11.0
LOWEST, HIGHEST = 26.0, 12.0
# the lantern's way to a new pitch: this share of it in 20 ms
_FOLLOWS = 0.3
# this share of the clips has the lantern up throughout; in the others it comes and goes
_ALWAYS_UP = 0.75


@dataclass(frozen=True)
class TalkingScene(Scene):
    """A stream with its sound: `waveform` [1, 1, N] at 16 kHz, and the `loudness` and `pitch` [T50] that it was made of."""

    waveform: torch.Tensor
    loudness: torch.Tensor
    pitch: torch.Tensor

    @staticmethod
    def of(scene: Scene, waveform: torch.Tensor, loudness: torch.Tensor, pitch: torch.Tensor) -> TalkingScene:
        return TalkingScene(*(getattr(scene, field.name) for field in fields(Scene)), waveform, loudness, pitch)

    @staticmethod
    def drawn(seed: int, chunks: int, up: bool | None = None) -> TalkingScene:
        """The scene of a seed with a voice of its own as long as `chunks` chunks. `up`: whether the lantern is up
        throughout; None: mostly."""
        generator = torch.Generator().manual_seed(seed)
        stays = bool(torch.rand(1, generator=generator) < _ALWAYS_UP) if up is None else up
        scene = Scene.draw(generator, chunks, LANTERN_STATES[:1] if stays else None)
        return TalkingScene.of(scene, *tones((12 * chunks + 4) / FPS, seed))

    def truth(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """As Scene has it; also `loudness` and `pitch` 0..1 and the `balloon_radius` in pixels."""
        loudness, pitch = at_frames(self.loudness, frames), at_frames(followed(self.pitch), frames)
        return super().truth(frames) | {
            "loudness": loudness,
            "pitch": pitch,
            "balloon_radius": SOFTEST + (LOUDEST - SOFTEST) * loudness,
            "lantern_y": self._lantern_y(frames, LOWEST + (HIGHEST - LOWEST) * pitch),
        }

    def hushed(self) -> TalkingScene:
        """The same in silence."""
        return replace(self, waveform=torch.zeros_like(self.waveform), loudness=torch.zeros_like(self.loudness))


@dataclass(frozen=True)
class WrongBalloon(TalkingScene):
    """A scene whose balloon is not as sound and words have it: `factor` times as large as it should be and `more` pixels, and
    of a colour that lies between its own and one that is drawn (`towards` [3], by the share `off`)."""

    factor: float
    more: float
    towards: torch.Tensor
    off: float

    @staticmethod
    def drawn_of(scene: TalkingScene, generator: torch.Generator) -> WrongBalloon:
        """In half of the scenes the colour is wrong: any, so that what lies between two words' colours is among them."""
        factor, more, off, half = torch.rand(4, generator=generator).tolist()
        given = {field.name: getattr(scene, field.name) for field in fields(TalkingScene)}
        return WrongBalloon(
            **given,
            factor=0.2 + 1.2 * factor,
            more=4 * more - 2,
            towards=torch.rand(3, generator=generator),
            off=off if half < 0.5 else 0.0,
        )

    def balloon_rgb(self) -> torch.Tensor:
        return torch.lerp(super().balloon_rgb(), self.towards, self.off)

    def truth(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        told = super().truth(frames)
        return told | {"balloon_radius": (self.factor * told["balloon_radius"] + self.more).clamp(min=0.5)}


def followed(pitch: torch.Tensor) -> torch.Tensor:
    """[T50] pitch as the lantern shows it: it takes a moment to follow."""
    out, now = torch.empty_like(pitch), pitch[0]
    for i, value in enumerate(pitch):
        now = now + _FOLLOWS * (value - now)
        out[i] = now
    return out


def at_frames(track: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """A track [T50] at the times of video frames [T], float32; what is beyond its end is its end."""
    # a frame of the ear lies in the middle of its 25 ms
    place = (frames.double() / FPS * RATE / HOP - 0.625).clamp(0, len(track) - 1)
    low = place.long()
    high = (low + 1).clamp(max=len(track) - 1)
    return torch.lerp(track[low].float(), track[high].float(), (place - low).float())
