"""What a rollout took is free when its node has ended, however it ended: nothing waits for Python's collector to come by."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "core"))
from cut_prompts import Looks, Prompts, interrupt, newer_interrupt, patched, stop
from cut_rollouts import SETTINGS, models
from test_links import node

LATE = 500  # a look of the host's in the last chunk
HEAVY = {"Job", "Rollout", "Past", "KVCache", "HostModel", "ModelPatcher", "HostDecoder", "FrameWriter", "SavedStates"}


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


HOW = {"whole": (None, "success"), "interrupted": (interrupt, "interrupted"), "stopped": (stop, "success")}
HOW |= {"newer interrupt": (newer_interrupt, "interrupted"), "out of memory": (no_memory, "error")}


@contextlib.contextmanager
def collected():
    """A list that then has what only the collector would have freed of what was made within."""
    found: list[object] = []
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def heavy(found: list[object], aside: set[int]) -> dict[str, int]:
    """What takes memory of these: how many of each class, but for storages that were there before, and for the sound that a graph
    was given, which is held with a failed node's inputs."""
    aside = aside | {each.waveform.untyped_storage()._cdata for each in found if type(each).__name__ == "Sound"}
    tensors = [each for each in found if isinstance(each, torch.Tensor)]
    names = [type(each).__name__ for each in found if type(each).__name__ in HEAVY]
    names += ["Tensor" for each in tensors if each.untyped_storage()._cdata not in aside and each.nbytes]
    return dict(Counter(names))


@pytest.mark.parametrize("name", ["absorption", "sound, decode beside"])
def test_nothing_heavy_is_left_to_the_collector(monkeypatch, tmp_path, name):
    prompts, settings = Prompts(monkeypatch, **models(tmp_path)), SETTINGS[name]
    prompts(settings.graph("first/take"))
    prompts.nothing()
    for how, (do, ending) in HOW.items():
        aside = {id(None)} | {each.untyped_storage()._cdata for each in gc.get_objects() if type(each) is torch.Tensor}
        with collected() as found:
            with patched(Looks(LATE if do else None, do)):
                assert prompts(settings.graph("again/take")).how == ending, how
            prompts.nothing()
        assert heavy(found, aside) == {}, how


@pytest.mark.parametrize("how", ["whole", "interrupted", "out of memory"])
def test_nor_of_the_sampler(monkeypatch, tmp_path, how):
    import comfy_extras.nodes_custom_sampler as sampling
    import comfy_extras.nodes_hunyuan as hunyuan

    import nodes as host_nodes

    for each in (sampling.SamplerCustomAdvanced, sampling.BasicGuider, sampling.BasicScheduler):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, each.__name__, each)
    monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, "EmptyHunyuanLatentVideo", hunyuan.EmptyHunyuanLatentVideo)
    prompts = Prompts(monkeypatch, **models(tmp_path))
    graph = {
        "1": node("GivenModel"), "2": node("GivenPositive"),
        "3": node("AdaStateSampler", chunk_frames=3, window_frames=3, positions="packed"),
        "4": node("AdaStateNoise", seed=5, chunk_frames=3),
        "5": node("BasicGuider", model=["1", 0], conditioning=["2", 0]),
        "6": node("BasicScheduler", model=["1", 0], scheduler="simple", steps=2, denoise=1.0),
        "7": node("EmptyHunyuanLatentVideo", width=32, height=32, length=33, batch_size=1),
        "8": node(
            "SamplerCustomAdvanced", noise=["4", 0], guider=["5", 0], sampler=["3", 0], sigmas=["6", 0], latent_image=["7", 0]
        ),
        "9": node("Take", value=["8", 0], slot=0),
    }  # fmt: skip
    do, ending = HOW[how]
    assert prompts(graph).how == "success"
    prompts.nothing()
    with collected() as found:
        with patched(Looks(100 if do else None, do)):
            assert prompts(graph).how == ending
        prompts.nothing()
    left = [each.nbytes + each.text_nbytes for each in found if type(each).__name__ == "KVCache"]
    assert left == [0] * len(left) and (how == "out of memory" or not left)
