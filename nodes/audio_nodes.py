"""Sound: read from a file, as a rollout is driven by it, and what stands for a speech encoder in the demo."""

from __future__ import annotations

from typing import Any

from ..adastate_core.audio.demo_ear import heard
from ..adastate_core.audio.demo_tones import tones
from ..adastate_core.audio.track import AudioTrack
from ..adastate_core.video.sound_file import read_sound
from .host import api
from .host.api import io, schema, widget
from .host.node import Node
from .host.output_files import check_saved, saved_fingerprint, saved_path
from .host.sound_files import sound_files
from .inputs import check_fps, number
from .sound import sound_of

CATEGORY = "AdaState/audio"
LAYERS = 25  # of wav2vec2 large: what its convolutions give, and 24 more
MOST_SECONDS = 86_400.0
_FILE = "sound file"
# with it Nodes 2.0 lets a file be added in the list; the button of the classic node is web/js/upload.js
UPLOAD = getattr(getattr(io, "UploadType", None), "audio", None)


class AudioNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateAudio",
            display_name="AdaState Audio",
            category=CATEGORY,
            description="The sound that a rollout is driven by, and that its video carries.",
            search_aliases=["sound", "speech", "lip sync", "S2V", "LiveAvatar", "talking", "AdaState"],
            inputs=[
                io.Audio.Input(
                    "audio",
                    optional=True,
                    tooltip="The sound that the video carries. Without encoded it is carried and drives nothing.",
                ),
                io.AudioEncoderOutput.Input(
                    "encoded",
                    optional=True,
                    tooltip="What Audio Encoder Encode (or Demo Ear) made of the voice: it drives the pictures.",
                ),
                number(
                    io.Float,
                    "fps",
                    default=0.0,
                    step=0.001,
                    tooltip="Video frames a second at which the sound is read; 0 = as many as the model makes.",
                ),
                widget(
                    io.Float,
                    "offset",
                    default=0.0,
                    min=-MOST_SECONDS,
                    max=MOST_SECONDS,
                    step=0.001,
                    tooltip="Seconds of the sound before the first picture; below 0 the pictures begin earlier than the sound.",
                ),
            ],
            outputs=[
                api.AudioTrack.Output("track", display_name="AUDIO TRACK", tooltip="Connect to a rollout's audio.")
            ],
        )

    @classmethod
    def check(cls, fps: float | None = None) -> str | None:
        return check_fps(fps)

    @classmethod
    def execute(cls, audio: Any = None, encoded: Any = None, fps: float = 0.0, offset: float = 0.0) -> io.NodeOutput:
        if audio is None and encoded is None:
            raise ValueError(
                "neither audio nor encoded is connected; connect the sound, what Audio Encoder Encode made of it, or both"
            )
        sound = None if audio is None else sound_of(audio)
        track = AudioTrack(sound, () if encoded is None else layers_of(encoded), fps, offset)
        if track.seconds <= offset:
            raise ValueError(
                f"offset is {offset:g} and the sound lasts {track.seconds:.6g} s, so nothing of it is left; give less"
            )
        return io.NodeOutput(track)


def layers_of(encoded: Any) -> tuple[Any, ...]:
    """The layers of an AUDIO_ENCODER_OUTPUT, each [1, T50, C]. ValueError for what is no output of one, or of many sounds."""
    layers = tuple(encoded["encoded_audio_all_layers"])
    if not layers or any(getattr(layer, "ndim", 0) != 3 or not layer.shape[1] for layer in layers):
        raise ValueError("encoded holds no features; connect Audio Encoder Encode with a sound that lasts")
    if layers[0].shape[0] != 1:
        raise ValueError(f"encoded is of {layers[0].shape[0]} sounds at once; encode one of them")
    return layers


class LoadSoundNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateLoadSound",
            display_name="Load Sound",
            category=CATEGORY,
            description="Reads the sound of a file in the input folder, of music or of a video. It needs no torchaudio.",
            search_aliases=["load audio", "sound", "music", "wav", "mp3"],
            inputs=[
                widget(
                    io.Combo,
                    "file",
                    options=sound_files() or [""],
                    upload=UPLOAD,
                    tooltip="A file in ComfyUI's input folder; press r when you have put one there.",
                )
            ],
            outputs=[io.Audio.Output("audio", display_name="AUDIO", tooltip="At its own rate, with all its channels.")],
        )

    @classmethod
    def check(cls, file: str | None = None) -> str | None:
        return check_saved(file, _FILE)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return saved_fingerprint(file, _FILE)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        sound = read_sound(saved_path(file, _FILE))
        return io.NodeOutput({"waveform": sound.waveform[None], "sample_rate": sound.rate})


class DemoEarNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateDemoEar",
            display_name="Demo Ear",
            category="AdaState/demo",
            description="Hears loudness and pitch, in the form of a speech encoder's output. The demo model was trained with it; "
            "real checkpoints take Audio Encoder Encode.",
            inputs=[io.Audio.Input("audio", tooltip="A sound of at least a fortieth of a second.")],
            outputs=[
                io.AudioEncoderOutput.Output(
                    "encoded", display_name="AUDIO_ENCODER_OUTPUT", tooltip="Connect to AdaState Audio's encoded."
                )
            ],
        )

    @classmethod
    def execute(cls, audio: Any) -> io.NodeOutput:
        sound = sound_of(audio)
        features = heard(sound.waveform[None], sound.rate)
        return io.NodeOutput(
            {
                "encoded_audio": features,
                "encoded_audio_all_layers": (features,) * LAYERS,
                "audio_samples": round(sound.seconds * 16_000),
            }
        )


class DemoSoundNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaStateDemoSound",
            display_name="Demo Sound",
            category="AdaState/demo",
            description="A voice of tones, in syllables and pauses, for the demo model.",
            inputs=[
                widget(io.Float, "seconds", default=10.0, min=0.1, max=3600.0, step=0.1, tooltip="How long it is."),
                number(io.Int, "seed", default=0, control_after_generate=True, tooltip="Another seed, another voice."),
            ],
            outputs=[io.Audio.Output("audio", display_name="AUDIO", tooltip="One channel of 16,000 samples a second.")],
        )

    @classmethod
    def execute(cls, seconds: float, seed: int) -> io.NodeOutput:
        waveform, _, _ = tones(seconds, seed)
        return io.NodeOutput({"waveform": waveform, "sample_rate": 16_000})


NODES = [AudioNode, LoadSoundNode, DemoEarNode, DemoSoundNode]
