"""Embeddings of timesteps and texts are computed once a run: the bits of computing them in every pass."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from adastate_pack.adastate_core.anchors import AnchorAdaptive, AnchorStatic
from adastate_pack.adastate_core.prompts.plan import PromptChange, PromptPlan
from adastate_pack.adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_pack.adastate_core.schedules.schedule import Schedule
from adastate_pack.nodes.host import model as adapter
from adastate_pack.nodes.host.pass_memory import OF_TEXT, OF_TIME, PassMemory

CASES = {
    "state": {"anchor": AnchorAdaptive(1)},
    # every frame at a timestep of its own
    "rolling": {"anchor": AnchorStatic(1), "blocks": 3},
}


class Forgetful(adapter.HostModel):
    """Computes everything in every pass."""

    def _prepared(self, patcher):
        made = super()._prepared(patcher)
        for name in (*OF_TIME, OF_TEXT):
            del made.object_patches[f"diffusion_model.{name}.forward"]
        return made


def texts(count: int) -> list[torch.Tensor]:
    return [torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def latents_of(host, case: str, chunks: int = 3) -> torch.Tensor:
    spec = RolloutSpec(
        geometry=host.geometry, batch=1, height=4, width=4, chunk_frames=3, window_frames=3, positions="packed",
        dtype=host.dtype, **CASES[case],
    )  # fmt: skip
    prompts = PromptPlan([PromptChange(0, texts(2)[0]), PromptChange(6, texts(2)[1], "recache")], 3)
    prompts = prompts if spec.blocks == 1 else None
    host.load(spec.plan(5))
    rollout = Rollout(host, spec, Settings(3, Schedule.shifted(3, 5.0)), text_tokens=5, prompts=prompts)
    with torch.inference_mode():
        return torch.cat([chunk.latents for chunk in rollout.chunks(3 * chunks)], 2)


def calls(host, monkeypatch) -> dict[str, int]:
    """How often each module's own forward runs."""
    counted = dict.fromkeys((*OF_TIME, OF_TEXT), 0)
    wan = host.patcher.model.diffusion_model
    for name in counted:
        last = getattr(wan, name)[-1]

        def count(*args, name=name, forward=last.forward):
            counted[name] += 1
            return forward(*args)

        monkeypatch.setattr(last, "forward", count)
    return counted


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_computing_it_in_every_pass(wan_state, case, dtype, monkeypatch):
    import comfy.sd

    def host_of(kind):
        state = {name: value.clone() for name, value in wan_state.items()}
        return kind(comfy.sd.load_diffusion_model_state_dict(state, {"dtype": dtype}), texts(1)[0], 1)

    expected = latents_of(host_of(Forgetful), case)
    host = host_of(adapter.HostModel)
    counted = calls(host, monkeypatch)
    assert torch.equal(latents_of(host, case), expected)
    # 3 steps and the clean pass, or windows of 1, 2 and 3 chunks and the clean pass
    assert [counted[name] for name in OF_TIME] == [4, 4]
    assert counted[OF_TEXT] == (2 if case == "state" else 1)


def test_what_does_not_fit_is_computed_again(model, monkeypatch):
    expected = latents_of(Forgetful(model, texts(1)[0], 1), "state")
    host = adapter.HostModel(model, texts(1)[0], 1)
    one = 7 * host.geometry.heads * host.geometry.head_dim * 4  # of a timestep: its embedding and six modulations
    for most in (0, one, 2 * one):
        host.memory.most_bytes = most
        counted = calls(host, monkeypatch)
        assert torch.equal(latents_of(host, "state"), expected)
        assert host.memory.nbytes <= most and counted["time_projection"] > 4
        monkeypatch.undo()


def test_beside_its_passes_a_model_is_the_hosts_own(model):
    host = adapter.HostModel(model, texts(1)[0], 1)
    latents_of(host, "state")
    wan, x = host.patcher.model.diffusion_model, torch.randn(1, 256)
    assert host.memory.serves(wan)
    first, second = wan.time_embedding(x), wan.time_embedding(2 * x)
    assert not torch.equal(first, second)
    text = torch.randn(1, 5, 4096)
    assert not torch.equal(wan.text_embedding(text), wan.text_embedding(2 * text))


def test_nothing_outlives_a_run(model):
    """Not even where the host leaves the forwards in the model."""
    host = adapter.HostModel(model, texts(1)[0], 1)
    latents_of(host, "state")
    wan, memory = host.patcher.model.diffusion_model, weakref.ref(host.memory)
    x = torch.randn(1, 256)
    expected = wan.time_embedding(x)
    del host
    gc.collect()
    assert memory() is None and torch.equal(wan.time_embedding(x), expected)


def test_a_pass_that_fails_leaves_nothing_under_way(model):
    class Broken:
        def uses(self, *_):
            return False

        takes_unnormed = uses

        def attend(self, *_):
            raise MemoryError

    host = adapter.HostModel(model, texts(1)[0], 1)
    expected = latents_of(host, "state")
    with torch.inference_mode(), pytest.raises(MemoryError):
        host.velocity(torch.zeros(1, 16, 3, 4, 4), 500.0, Broken())
    assert host.memory._pass is None
    assert torch.equal(latents_of(host, "state"), expected)


def test_a_wan_with_a_pass_of_its_own_is_left_alone(model, monkeypatch):
    wan = model.model.diffusion_model
    memory = PassMemory(torch.device("cpu"))
    assert [name for name, _ in memory.forwards(model)] == [*OF_TIME, OF_TEXT]
    monkeypatch.setattr(wan, "__class__", type("OtherWan", (type(wan),), {}))
    assert not [*memory.forwards(model)] and not memory.serves(wan)
