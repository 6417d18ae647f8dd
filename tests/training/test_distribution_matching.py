"""Distribution matching: the rollout it trains is the product's, its loss is DMD's, its weights are AdaState's."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_denoiser import tiny_denoiser

from adastate_core.anchors import anchor_from
from adastate_core.prompts.demo_words import VOCABULARY, prompt
from adastate_core.rollout import Rollout, RolloutSpec, Settings
from adastate_core.schedules.noise import noise
from adastate_core.schedules.schedule import Schedule
from training.bare_model import BareModel
from training.distribution_matching import horizon_weights, matching_loss, renoise
from training.few_step import on_path
from training.score_model import clip_velocity
from training.self_rollout import SelfRollout
from training.student import Student
from training.teacher_forcing import install
from training.texts import Prompts, Texts
from training.trajectories import solve

WORDS = {"terrain": "snow", "pace": "fast", "balloon": "gold", "lantern": "lantern"}
NUMBERS = torch.tensor([[[VOCABULARY[slot].index(word) for slot, word in WORDS.items()]] * 4])
CONFIG = {"chunk_frames": 3, "window_frames": 3, "positions": "fixed", "window_gradient": False, "state_gradient": 7}


@pytest.fixture
def model():
    return tiny_denoiser()


def draw(chunk: int, step: int, frames: int, state: bool) -> torch.Tensor:
    return noise(5, chunk, step, (1, 16, frames, 4, 4), state)


@torch.no_grad()
@pytest.mark.parametrize("anchor", [{"kind": "none"}, {"kind": "static"}, {"kind": "adaptive", "state_frames": 2}])
def test_the_self_rollout_is_the_products(model, anchor):
    bare = BareModel(copy.deepcopy(model), prompt(WORDS))
    spec = RolloutSpec(bare.geometry, 1, 4, 4, 3, 3, anchor_from(anchor), "fixed", torch.float32)
    schedule = Schedule.shifted(4, 5.0)
    product = torch.cat([c.latents for c in Rollout(bare, spec, Settings(5, schedule)).chunks(12)], 2)
    ours = SelfRollout(model, CONFIG | {"anchor": anchor})(NUMBERS, draw, schedule, exit_step=3)
    torch.testing.assert_close(ours, product, atol=2e-5, rtol=2e-5)


def test_gradient_of_the_exit_step_only(model):
    """The first chunk's own loss: what an earlier step computed is a constant, so its noise gets no gradient."""
    student = SelfRollout(model, CONFIG | {"anchor": {"kind": "adaptive", "state_frames": 1}})
    drawn = {}

    def remembered(chunk: int, step: int, frames: int, state: bool) -> torch.Tensor:
        key = (chunk, step, state)
        drawn.setdefault(key, draw(chunk, step, frames, state).requires_grad_())
        return drawn[key]

    student(NUMBERS, remembered, Schedule.shifted(4, 5.0), exit_step=2)[:, :, :3].square().mean().backward()
    assert drawn[0, 0, False].grad is None and drawn[0, 1, False].grad is None
    assert float(drawn[0, 2, False].grad.abs().sum()) > 0
    assert not any(step > 2 for _, step, _ in drawn), "steps after the exit are skipped"


@torch.no_grad()
def test_what_is_skipped_is_rolled_out_as_the_product_does_it(model):
    """Chunks after two skipped ones, of which only the last step is left out, are those of a whole rollout up to there."""
    student = SelfRollout(model, CONFIG | {"anchor": {"kind": "adaptive", "state_frames": 1}})
    schedule = Schedule.shifted(4, 5.0)
    whole = student(NUMBERS, draw, schedule, exit_step=3)
    chunks = whole.shape[2] // 3
    for skipped in range(chunks):
        torch.testing.assert_close(student(NUMBERS, draw, schedule, 3, skipped=skipped), whole[:, :, 3 * skipped :])
    early = student(NUMBERS, draw, schedule, 0, skipped=chunks - 1)
    assert not torch.allclose(early, whole[:, :, -3:]), "the exit step is that of what is given back"


def test_no_gradient_comes_out_of_skipped_chunks(model):
    student = SelfRollout(model, CONFIG | {"anchor": {"kind": "adaptive", "state_frames": 1}, "state_gradient": 7})
    drawn = {}

    def remembered(chunk: int, step: int, frames: int, state: bool) -> torch.Tensor:
        drawn.setdefault((chunk, step, state), draw(chunk, step, frames, state).requires_grad_())
        return drawn[chunk, step, state]

    student(NUMBERS, remembered, Schedule.shifted(4, 5.0), exit_step=0, skipped=1).square().mean().backward()
    assert all(noise.grad is None for (chunk, *_), noise in drawn.items() if chunk == 0)
    assert float(drawn[1, 0, True].grad.abs().sum()) > 0


@pytest.mark.parametrize(("writes", "reaches"), [(0, False), (7, True)])
def test_the_states_write_back_carries_gradient_when_asked(model, writes, reaches):
    student = SelfRollout(model, CONFIG | {"anchor": {"kind": "adaptive", "state_frames": 1}, "state_gradient": writes})
    start = draw(0, 0, 1, True).requires_grad_()

    def given(chunk: int, step: int, frames: int, state: bool) -> torch.Tensor:
        return start if state and (chunk, step) == (0, 0) else draw(chunk, step, frames, state)

    student(NUMBERS, given, Schedule.shifted(4, 5.0), exit_step=0)[:, :, 9:].square().mean().backward()
    assert (start.grad is not None and float(start.grad.abs().sum()) > 0) == reaches


def test_horizon_weights():
    assert torch.equal(horizon_weights(21, 0.0), torch.ones(21))
    weights = horizon_weights(5, 4.0)
    assert weights.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert horizon_weights(5, 4.0, normalise=True).mean() == pytest.approx(1.0)
    assert horizon_weights(1, 4.0).tolist() == [1.0]


def test_the_loss_has_the_gradient_of_dmd():
    """alpha = 0 is plain DMD: (fake - real) / mean|x - real| / elements, worked out by hand for every element."""
    generator = torch.Generator().manual_seed(0)
    x, real, fake = (torch.randn(2, 16, 6, 4, 4, generator=generator) for _ in range(3))
    for alpha in (0.0, 3.0):
        leaf = x.clone().requires_grad_()
        loss, size = matching_loss(leaf, real, fake, horizon_weights(6, alpha))
        loss.backward()
        expected = torch.empty_like(x)
        for b in range(2):
            expected[b] = (fake[b] - real[b]) / (x[b] - real[b]).abs().mean() / x.numel()
        plain = expected.clone()
        for i in range(6):
            expected[:, :, i] *= 1 + alpha * i / 5
        torch.testing.assert_close(leaf.grad, expected)
        if alpha == 0:
            torch.testing.assert_close(leaf.grad, plain)
            assert size == pytest.approx(plain.abs().mean().item() * x.numel(), rel=1e-4)


def test_a_teacher_equal_to_the_critic_moves_nothing():
    x = torch.randn(1, 16, 6, 4, 4, requires_grad=True)
    score = torch.randn(1, 16, 6, 4, 4)
    matching_loss(x, score, score, horizon_weights(6, 2.0))[0].backward()
    assert float(x.grad.abs().max()) == 0
    torch.testing.assert_close(matching_loss(x, x.detach(), x.detach(), horizon_weights(6, 0.0))[0].item(), 0.0)


def test_renoised_clips_keep_within_the_levels():
    x, drawn = torch.randn(64, 2, 3, 2, 2), torch.linspace(0, 1, 64)
    noise_of_x = torch.randn_like(x)
    noisy, sigma = renoise(x, 5.0, drawn, noise_of_x)
    assert float(sigma[0]) == pytest.approx(0.02) and float(sigma[-1]) == pytest.approx(0.98)
    assert float(sigma[21]) == pytest.approx(5 / 3 / (1 + 4 / 3))
    level = sigma.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy - level * (noise_of_x - x), x)


@torch.no_grad()
def test_the_score_model_sees_whole_clips_and_each_chunks_words(model):
    x, sigma = torch.randn(1, 16, 12, 4, 4), torch.tensor([0.5])
    condition = Texts().whole(NUMBERS, 0.0, torch.Generator())
    bare = copy.deepcopy(model)
    install(model)
    ours = clip_velocity(model, x, sigma, *condition)
    context = prompt(WORDS)
    freqs = bare.rope_encode(12, 4, 4)
    torch.testing.assert_close(
        ours, bare.forward_orig(x, torch.tensor([500.0]), context, freqs=freqs), atol=3e-5, rtol=3e-5
    )
    no_lantern = NUMBERS.clone()
    no_lantern[:, 3, -1] = 1
    changed = clip_velocity(model, x, sigma, *Texts().whole(no_lantern, 0.0, torch.Generator())) - ours
    assert float(changed.abs().amax()) > 1e-4, "one chunk's word matters"


@torch.no_grad()
def test_trajectories_start_at_noise_and_give_the_student_the_way_to_their_end(model):
    config = CONFIG | {"anchor": {"kind": "adaptive", "state_frames": 1}}
    schedule = Schedule.shifted(8, 5.0)
    latents = torch.randn(1, 16, 12, 4, 4)
    solved = solve(Student(model, config), latents, NUMBERS, schedule, 4, 3)
    assert solved.shape == (1, 5, 16, 12, 4, 4)
    assert solved[:, 0].std() == pytest.approx(1.0, abs=0.05)
    sigmas = torch.tensor(schedule.sigmas[::2])
    torch.testing.assert_close(sigmas, torch.tensor(Schedule.shifted(4, 5.0).sigmas))
    noisy, wanted, sigma = on_path(solved, sigmas, torch.Generator().manual_seed(2))
    for chunk in range(4):
        part, step = slice(3 * chunk, 3 * chunk + 3), int((sigmas == sigma[0, chunk]).nonzero())
        assert torch.equal(noisy[:, :, part], solved[:, step, :, part])
        reached = noisy[:, :, part] - sigma[0, chunk] * wanted[:, :, part]
        torch.testing.assert_close(reached, solved[:, -1, :, part], atol=1e-5, rtol=1e-5)


def test_prompts_take_the_place_of_words():
    given = [torch.randn(n, 4096) for n in (3, 5, 2)] + [torch.randn(4, 4096)]
    padded = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, 6 - len(text))) for text in given])
    texts, negative = padded[:3], padded[3]
    prompts = Prompts(torch.cat(given), torch.tensor([3, 5, 2, 4]), 6)
    numbers = torch.tensor([[2], [0]])
    assert torch.equal(prompts.context(numbers), texts[[2, 0]])
    assert torch.equal(prompts.context(numbers, prompts.kept([True])), negative.expand(2, -1, -1))
    whole, mask = prompts.whole(numbers[:, None].expand(-1, 4, -1), 0.0, torch.Generator())
    assert torch.equal(whole, texts[[2, 0]]) and mask is None
    blank, _ = prompts.whole(numbers[:, None].expand(-1, 4, -1), 1.0, torch.Generator())
    assert torch.equal(blank, negative.expand(2, -1, -1))
    with pytest.raises(ValueError, match="do not fit 14 embeddings padded to 4"):
        Prompts(torch.cat(given), torch.tensor([3, 5, 2, 4]), 4)
