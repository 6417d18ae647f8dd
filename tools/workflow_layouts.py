"""How the shipped workflows of single features are laid out and explained; those of systems are in system_workflows.py."""

from __future__ import annotations

from dataclasses import dataclass, field

HUB = "https://huggingface.co/"
_REPACKAGED = f"{HUB}Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/"
VAE_URL = f"{_REPACKAGED}vae/wan_2.1_vae.safetensors"
TEXT_URL = f"{_REPACKAGED}text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
_REPACKAGED22 = f"{HUB}Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files/"
VAE22_URL = f"{_REPACKAGED22}vae/wan2.2_vae.safetensors"
S2V_URL = f"{_REPACKAGED22}diffusion_models/wan2.2_s2v_14B_fp8_scaled.safetensors"
EAR_URL = f"{_REPACKAGED22}audio_encoders/wav2vec2_large_english_fp16.safetensors"
FRAMEWISE_URL = (
    f"{HUB}TalmajM/causal_forcing_framewise_ComfyUI_repackaged/resolve/main/split_files/diffusion_models/"
    "causal_forcing-framewise.safetensors"
)


@dataclass(frozen=True)
class Layout:
    """Titled groups of columns of node ids, left to right, and a note above the first; `room` is kept free below a node, and
    `widths` are those of nodes that are wider than the others.

    `models`, by node id, is what the front end can offer to download when a file is missing (`properties.models`).
    """

    note: str
    groups: dict[str, list[list[int]]]
    room: dict[int, int] = field(default_factory=dict)
    note_height: int = 260
    models: dict[int, list[dict[str, str]]] = field(default_factory=dict)
    widths: dict[int, int] = field(default_factory=dict)


def offered(url: str, directory: str) -> dict[str, str]:
    """A file that the front end can offer to download into a folder of the models."""
    return {"name": url.rpartition("/")[2], "url": url, "directory": directory}


FEATURES = {
    "long_video": Layout(
        note="""\
### Long video at constant memory
Each chunk is decoded and written to the mp4 as soon as it is made, so memory stays the same however large **length** is.

Stop it whenever you like: the file plays, and the state saved beside it can be resumed.

*Demo Prompt* is for the tiny demo model; real checkpoints take *CLIP Text Encode*.""",
        groups={"Model and prompt": [[1, 2, 3]], "Roll out and write": [[4], [5]]},
        room={5: 340},
    ),
    "stream_to_frames": Layout(
        note="""\
### Frames for editors
Every frame becomes a file, made from the decoder's own values: 16-bit PNG here, or 8-bit PNG, 16-bit TIFF, 32-bit float EXR, \
an animated WebP. They lie in **output/frames**, numbered by the video's frame.

*Stream To Video* writes the video beside them. For frames alone, bypass it and connect *Load VAE* to **vae** of \
*Stream To Frames*.

Drag a PNG frame in to open this graph again.

For a real checkpoint: Wan 2.1 VAE, *CLIP Text Encode*, 832x480.""",
        groups={"Model and prompt": [[1, 2, 3]], "Write": [[4], [6]], "Roll out": [[5]]},
        room={5: 340},
    ),
    "hidden_state": Layout(
        note="""\
### The hidden state
The adaptive anchor denoises a hidden latent with every chunk. The model looks back to it; it is never shown.

*Decode Hidden State* makes a picture of it as it is after the last chunk. Other anchors have none: bypass that node \
when you try them.

It needs weights that were trained with it. On others it acts like one more frame.""",
        groups={
            "Model, prompt, anchor": [[1, 2, 3, 4]],
            "Roll out": [[5]],
            "What is seen and what is not": [[6, 8], [7, 9]],
            "What is looked at": [[10], [11]],
        },
        room={6: 330, 7: 370, 9: 240, 11: 340},
    ),
    "absorption": Layout(
        note="""\
### Half the layers without their history
With a long **window_frames** most of the cache is history. After the warm-up half the layers drop theirs, and a correction \
solved in closed form stands in for it (ISPA).

The report shows what each layer would lose before and after, which were switched (shaded), and how the corrections age.

Turn **absorb** off on *ISPA Cache Absorption* to see the same without a correction.""",
        groups={
            "Model, prompt, settings": [[1, 2, 3], [4]],
            "Roll out and write": [[5], [6]],
            "What it did": [[7], [8]],
        },
        room={6: 340, 8: 340},
    ),
    "anchor_comparison": Layout(
        note="""\
### Four anchors side by side
The same prompt, seed and noise with four things to look back to: a hidden state, the first frame, a running mean, nothing. \
All read equally many cached frames: where there is no anchor the window is one frame longer.

The demo's weights were trained with the state, so the other three only show what the machinery does. The fair comparison, \
each trained with its own anchor, is in the model card.""",
        groups={
            "Model, prompt, anchors": [[1, 2, 3], [4, 5, 6, 7]],
            "Adaptive": [[8, 9]],
            "Static": [[10, 11]],
            "EMA": [[12, 13]],
            "None": [[14, 15]],
            "Side by side": [[16], [17]],
        },
        room={8: 90, 9: 340, 10: 90, 11: 340, 12: 90, 13: 340, 14: 90, 15: 340, 17: 370},
    ),
    "compare_systems": Layout(
        note="""\
### Four systems side by side, thirty seconds
One prompt, seed and noise, rolled out by the rules of four systems. *Compare Videos* puts them side by side with meters.

Systems differ in what they look back to. No anchor: Self-Forcing, Causal-Forcing, CausVid. The first frames, kept: LongLive, \
Rolling Forcing, Infinity-RoPE. Something that moves along: Reward Forcing, MemRoPE, Rolling Sink. A hidden state: AdaState. \
*Model Preset* takes any of them.

All four run on the demo's weights here, which were trained with a hidden state. For a fair picture give each *Model Preset* a \
*Load Causal Video Model* with that system's own weights; the workflows *System ...* say where they are. Self-Forcing was made for \
81 pictures, so its report warns at 481.""",
        groups={
            "Model, prompt, rules": [[1, 2, 3], [4, 5, 6, 7]],
            "No anchor": [[8, 9]],
            "First frames": [[10, 11]],
            "Running mean": [[12, 13]],
            "Hidden state": [[14, 15]],
            "Side by side": [[16], [17]],
        },
        room={
            **dict.fromkeys((4, 5, 6, 7), 130),
            **dict.fromkeys((8, 10, 12, 14), 90),
            **dict.fromkeys((9, 11, 13, 15), 340),
            17: 370,
        },
        note_height=400,
    ),
    "save_and_resume": Layout(
        note="""\
### Save and resume
The second rollout goes on from the state of the first. Its **length** counts from the very first frame. *join* copies \
the first file in front, so the second file holds the whole video.

On another day put *Load Rollout State* in the first rollout's place.""",
        groups={
            "Model and prompt": [[1, 2, 3]],
            "First part": [[4], [5]],
            "Keep its state, go on from it": [[6, 7], [8]],
        },
        room={5: 340, 8: 340},
    ),
    "prompt_timeline": Layout(
        note="""\
### Prompts over time
Each line is a time and what the video shows from then on. `{soft}` blends the words over some chunks, `{cut}` changes them \
and nothing else; a line that names no transition takes the one below.

*Preview Any* shows the timeline as it was read.

*Demo Prompt Timeline* is for the tiny demo model, which holds on to its ground and follows in balloon and lantern; real \
checkpoints take *Prompt Timeline*, with a CLIP.""",
        groups={
            "Model and prompts": [[1, 2, 3]],
            "What was read": [[6]],
            "Roll out and write": [[4], [5]],
        },
        room={3: 120, 5: 340, 6: 160},
    ),
    "start_from_picture": Layout(
        note=f"""\
### A video from a picture
Drop a picture onto **Load Image**, say in the words what is to happen, press Run. The picture becomes the first frame, and the \
video takes its shape: **width** and **height** are 0 in both nodes. Nothing is stretched; of one side up to 3 % may be cut off \
(at the demo's 64x64 up to a sixth).

The demo model knows one little world, and leads any picture into it. For real video, with Causal-Forcing frame-wise, which its \
authors offer for pictures too:

- **Load Causal Video Model**: [causal_forcing-framewise.safetensors]({FRAMEWISE_URL}), in `models/diffusion_models`. Leave \
**preset** at auto: it finds 4 steps, one latent frame a chunk and a window of 20.
- **Load VAE**: [wan_2.1_vae.safetensors]({VAE_URL}), in `models/vae`. A tiny VAE only decodes.
- **CLIP Text Encode** in place of *Demo Prompt*, behind *Load CLIP* (type wan) with \
[umt5_xxl_fp8_e4m3fn_scaled.safetensors]({TEXT_URL}), in `models/text_encoders`
- **Continue Video**: **area** 832x480. A square picture becomes 624x624, an upright phone's picture 464x832.
- **length** 81: five seconds, what the model was made for. Which weights are made for more say the workflows *System ...*: \
connect this LATENT to their *start_latent*.

It was made at 832x480; how it does in other shapes has not been measured here.""",
        groups={
            "Your picture, the model, the words": [[3], [1, 2, 9]],
            "Encode it, go on from it": [[8], [10], [11]],
        },
        room={3: 260, 8: 80, 11: 340},
        note_height=360,
        models={1: [offered(FRAMEWISE_URL, "diffusion_models")], 2: [offered(VAE_URL, "vae")]},
    ),
    "continue_video": Layout(
        note="""\
### Go on from any video
*Continue Video* takes the last frames of a video and encodes them; the second rollout goes on from there with words and seed of \
its own. Its **length** counts the frames taken.

The last group leaves these frames out and puts both parts into one video. Put *Load Video* in the first rollout's place for \
your own, at the model's size.

With a rollout's state at hand, *resume* has no seam at all: workflow *Stop and go on another day*.""",
        groups={
            "Model and prompt": [[1, 2, 3]],
            "A video": [[4], [5]],
            "Its end, and what follows": [[6, 7], [8], [9]],
            "Both in one": [[10, 11, 12], [13, 14], [15]],
        },
        room={5: 340, 6: 80, 9: 340, 10: 80, 11: 80, 15: 370},
        note_height=340,
    ),
    "redo_from_chunk": Layout(
        note="""\
### Make a part again
Both takes go on from the same state: one with the words and the seed as they were, one with others. *join* copies the frames \
before it in front.

On another day: **history_chunks** on *Stream To Video* keeps states beside the video. Choose its file in *Load Rollout State*, \
set **chunk** to the last good one, and connect it to *resume* in the place of the first rollout's STATE.""",
        groups={
            "Model and prompt": [[1, 2, 3]],
            "What is good": [[4], [5]],
            "As it came": [[6], [7]],
            "Made again": [[8, 9], [10]],
            "Side by side": [[11], [12]],
        },
        room={5: 340, 7: 340, 10: 340, 12: 370},
        note_height=320,
    ),
    "inspect_and_plan": Layout(
        note="""\
### What a file is and what it will take
*Inspect Checkpoint* reads a file's header only. *Plan Rollout Memory* counts the bytes of a rollout exactly, for your device, \
before anything is loaded: set size and window there first.

The rollout's REPORT says what was planned and what was used.""",
        groups={
            "Model and prompt": [[1, 2, 3]],
            "The file": [[4], [5]],
            "The plan": [[6], [7]],
            "Roll out and compare": [[8], [9], [10]],
        },
        room={4: 240, 5: 300, 6: 240, 7: 300, 9: 340, 10: 700},
    ),
    "sampler": Layout(
        note="""\
### The rollout as a sampler
For graphs that are built around *SamplerCustomAdvanced*: guider, sigmas, noise and latent are the host's own nodes.

*ModelSamplingSD3* with shift 5 and 4 simple steps give the levels of Self-Forcing. With *AdaState Noise* the video is that of \
*AdaState Rollout* with the same seed and *sigmas*.

No resume, no stream: the whole latent is held. For long videos take *AdaState Rollout*.""",
        groups={
            "Model and prompt": [[1, 2, 3]],
            "What the sampler needs": [[4, 5, 6], [7, 8, 9]],
            "Sample and write": [[10, 11], [12]],
        },
        room={11: 330, 12: 370},
        note_height=320,
    ),
    "talking_balloon": Layout(
        note="""\
### A voice moves the picture
*Demo Sound* speaks, *Demo Ear* hears it, and the balloon swells with every syllable while the lantern climbs with the pitch. The \
mp4 carries the sound. **length** is -1: as long as the sound.

The lantern's colour is in no word. It comes from the picture in **reference**, which the small text model makes here: with \
another **seed** in the first group there is another lantern.

Take *Load Sound* in *Demo Sound*'s place for a voice of your own: a tune that is hummed between 200 and 800 Hz shows best. For \
real faces see *System LiveAvatar*. Use faces and voices of people who agreed, and say that the video is made.""",
        groups={
            "A picture": [[4, 2], [3], [5], [6, 7]],
            "A sound": [[8], [9, 10]],
            "Both together": [[1, 11], [12]],
        },
        room={5: 90, 7: 260, 12: 340},
        note_height=220,
    ),
    "journey": Layout(
        note="""\
### A journey past the first frame
A camera travels until nothing of the first frame is left in view. Both videos have the same weights, words and noise, and a \
window of one frame, so that much is left to what the model looks back to: a hidden state, or the first frame.

Here the evening comes; then the state goes on into the night, and with the first frame it is day again. Other seeds differ less: \
over 16 measured streams of half a minute the day is off by .04 of the true one with the state and by .14 with the first frame \
(model card).

*Load Causal LoRA* makes the little demo model a traveller. It was trained for both anchors alike and for **window_frames** 1, and \
does not know terrain, pace and lantern.""",
        groups={
            "Model, LoRA, words": [[1, 4], [2, 3]],
            "A hidden state": [[5, 7], [8]],
            "The first frame": [[6, 9], [10]],
            "Side by side": [[11], [12]],
        },
        room={7: 90, 8: 340, 9: 90, 10: 340, 12: 370},
        note_height=320,
    ),
    "small_cache": Layout(
        note="""\
### A long window in less memory
Twice the same video with a window of 18: the past in the model's own format, and in 8 bits with a scale each (**cache_dtype** \
int8), held in host memory (**cache_device**).

The REPORT has both sizes; names with `host_` lie in host memory. 8 bits change the video a little; where they lie changes \
nothing.

Both inputs are among the rollout's advanced ones.""",
        groups={
            "Model and prompt": [[1, 2, 3]],
            "As the model has it": [[4], [5]],
            "8 bits in host memory": [[6], [7]],
            "Side by side": [[8, 10], [9]],
        },
        room={5: 340, 7: 340, 9: 370, 10: 400},
        note_height=320,
    ),
    "measure_any_video": Layout(
        note="""\
### Does my long video drift?
For any video, whatever model made it: no model is loaded here. Drop it onto **Load Video** and press Run.

Many long videos are chains: each clip begins with the last picture of the one before. **clip_frames** is what each clip adds, \
**first_clip_frames** what the first one has: 80 and 81 for clips of 81 whose first picture is that last one. For one long take \
set both to 0.

The plot goes clip by clip. Where the curves climb, the chain drifts: colour drift in dE (1 can just be seen) and colours off \
grey, contrast and sharpness. The third panel shows the seams: how much more the picture moves into a clip than inside clips, and \
how far its colour jumps.

A sunset is drift too: the numbers say that something changes, not whether it should. To hold one video against another, take \
*Measure two videos*.""",
        groups={"Your video": [[1], [2]], "Clip by clip": [[3], [4]]},
        room={1: 320, 3: 620, 4: 640},
        note_height=300,
        widths={3: 760},
    ),
    "video_metrics": Layout(
        note="""\
### Measure two videos
Same prompt, same seed, a window of 9 and of 1. *Video Metrics* measures the second by chunk and compares it with the first: \
drift of the colours, contrast, motion, flicker, PSNR and SSIM.

Any two videos of one size can be connected, whatever model made them: put *Load Video* in the rollouts' places. Of chained clips \
say their length in **clip_frames**. Without **reference** the first six curves stay.""",
        groups={
            "Model and prompt": [[1, 2, 3]],
            "Long window": [[4], [5]],
            "Short window": [[6], [7]],
            "Measured": [[8, 9], [10]],
            "Side by side": [[11], [12]],
        },
        room={5: 340, 7: 340, 9: 440, 10: 600, 12: 370},
        widths={9: 560},
    ),
}
