"""The title of each shipped workflow, by the name of its API twin: workflows/<title>.json is what the template browser lists.

A file's name is its title there, and the browser lists by name. So the names begin with numbers in the order in which one needs
them; the systems come behind, since letters sort after digits. Letters, digits, spaces and hyphens only: a title is a part of a
URL, and a file's name on Windows.
"""

from __future__ import annotations

from pathlib import Path

from tools.setup_host import ROOT

WORKFLOWS = ROOT / "workflows"
API = WORKFLOWS / "api"

TITLES = {
    "start_from_picture": "01 Start from a picture",
    "long_video": "02 A long video",
    "prompt_timeline": "03 Change the words over time",
    "continue_video": "04 Go on from any video",
    "save_and_resume": "05 Stop and go on another day",
    "redo_from_chunk": "06 Make a part again",
    "stream_to_frames": "07 Frames for editors",
    "inspect_and_plan": "08 Will it fit into memory",
    "small_cache": "09 A long window in less memory",
    "measure_any_video": "10 Measure any video",
    "video_metrics": "11 Measure two videos",
    "compare_systems": "12 Four systems side by side",
    "anchor_comparison": "13 Four anchors side by side",
    "hidden_state": "14 The hidden state",
    "absorption": "15 Half the layers without their history",
    "sampler": "16 The rollout as a sampler",
    "talking_balloon": "17 A balloon that talks",
    "journey": "18 A journey past the first frame",
    "system_adastate": "System AdaState",
    "system_causal_forcing_frame": "System Causal-Forcing frame-wise",
    "system_causvid": "System CausVid",
    "system_deep_forcing": "System Deep Forcing",
    "system_infinity_rope": "System Infinity-RoPE",
    "system_krea_14b": "System Krea Realtime 14B",
    "system_liveavatar": "System LiveAvatar",
    "system_longlive": "System LongLive",
    "system_longlive2": "System LongLive 2",
    "system_memrope": "System MemRoPE",
    "system_reward_forcing": "System Reward Forcing",
    "system_rolling_forcing": "System Rolling Forcing",
    "system_rolling_sink": "System Rolling Sink",
    "system_self_forcing": "System Self-Forcing",
}


def shown(name: str) -> Path:
    """The file that the template browser lists for the workflow of this API name; KeyError if it has no title."""
    return WORKFLOWS / f"{TITLES[name]}.json"


def twin(name: str) -> Path:
    """The API prompt of this name."""
    return API / f"{name}.json"


def thumbnail(name: str) -> Path:
    """The picture on the workflow's card."""
    return shown(name).with_suffix(".jpg")
