"""Ridges chosen on a chunk apart, and corrections drawn towards a prior, against least squares on the stored rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_absorption import absorbed_spec
from test_absorption_solve import activations, direct_fit, draw, moments_of
from test_rollout import SCHEDULE
from tiny_model import TinyModel

from adastate_core.absorption.collector import Collector
from adastate_core.absorption.prior import PRIOR_RIDGE, Prior, is_prior, load_prior, prior_of, with_prior
from adastate_core.absorption.settings import AbsorptionSettings
from adastate_core.absorption.solve import fit, residual, solve
from adastate_core.files.tensor_file import write_tensors
from adastate_core.rollout import Rollout, Settings
from adastate_core.states.state_file import load_state, save_state


def stacked(x: np.ndarray, y: np.ndarray, weight: float, target: np.ndarray) -> np.ndarray:
    """Least squares of [x; sqrt(weight) I] on [y; sqrt(weight) target], float64."""
    root = math.sqrt(weight)
    left = np.concatenate([x, root * np.eye(x.shape[1])])
    return np.linalg.lstsq(left, np.concatenate([y, root * target]), rcond=None)[0]


@pytest.mark.parametrize(("blocks", "ridge"), [(1, 0.3), (3, 0.3), (3, 30.0)])
def test_a_prior_is_what_the_ridge_draws_towards(blocks, ridge):
    """semantics: Absorption: the solve."""
    local, full = activations(90, 12)
    size = 12 // blocks
    target = draw(blocks, size, size, seed=77)
    found = solve(moments_of(local, full, blocks), ridge, prior=target)
    for h in range(blocks):
        part = slice(h * size, (h + 1) * size)
        x, y = (t[:, part].double().numpy() for t in (local, full - local))
        centred = x - x.mean(0)
        expected = stacked(centred, y - y.mean(0), ridge * (centred**2).sum() / size, target[h].double().numpy())
        np.testing.assert_allclose(found.matrix[h].numpy(), expected, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(found.constant[part].numpy(), y.mean(0) - x.mean(0) @ expected, atol=1e-4, rtol=1e-4)


def test_an_infinite_ridge_is_the_prior_itself_with_the_videos_own_constant():
    local, full = activations(90, 12)
    target = draw(1, 12, 12, seed=77)
    found = solve(moments_of(local, full, 1), math.inf, prior=target)
    torch.testing.assert_close(found.matrix, target)
    error = (full - found.apply(local[None])[0]).mean(0)
    torch.testing.assert_close(error, torch.zeros(12), atol=1e-5, rtol=0)


def test_a_ridge_is_chosen_on_the_newest_chunk_of_a_fit_that_stops_two_before_it():
    """semantics: Absorption: what is collected."""
    chunks = [activations(40, 8, seed=10 * n) for n in range(6)]
    chunks[4] = (chunks[4][0], chunks[4][0] - 3)  # the chunk between would mislead whoever fitted on it
    collector = Collector([0], 8, 2, torch.device("cpu"), apart=True)
    for local, full in chunks:
        collector.start_chunk()
        collector.add(0, local[None], full[None])
        for _, join in [*collector.joins(), *collector.joins()]:
            join()
        collector.close_chunk()
    again = Collector([0], 8, 2, torch.device("cpu"), apart=True)
    again.restore(collector.state())
    settings = AbsorptionSettings()
    errors, rows = {}, lambda some: (torch.cat(t) for t in zip(*some, strict=True))
    for ridge in settings.ridges(6)[1:]:
        matrix, constant = direct_fit(*rows(chunks[:4]), 2, ridge)
        local, full = (t.double() for t in chunks[5])
        errors[ridge] = float((full - local - local @ torch.block_diag(*matrix) - constant).square().sum())
    best = min(errors, key=errors.get)
    for one in (collector, again):
        found = fit(one.seen[0], one.held_out[0], settings.ridges(6), between=one.between[0])
        assert found.ridge == best
        assert found.residual == pytest.approx(errors[best] / float(chunks[5][1].double().square().sum()), rel=1e-3)
        matrix, constant = direct_fit(*rows(chunks), 2, best)  # and then on every row
        torch.testing.assert_close(found.correction.matrix.double(), matrix, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found.correction.constant.double(), constant, atol=1e-3, rtol=1e-3)


def test_with_a_prior_doing_nothing_is_tried_too():
    local, noise = draw(60, 8), draw(60, 8, seed=1)
    seen, held_out = moments_of(local, local + noise, 1), moments_of(noise, noise + local, 1)
    found = fit(seen, held_out, AbsorptionSettings().ridges(4), prior=50 * torch.eye(8)[None])
    assert math.isinf(found.ridge) and not found.towards and not found.correction.whole().any()
    missing = moments_of(local, local + local @ (2 * torch.eye(8)), 1)
    found = fit(missing, missing, AbsorptionSettings().ridges(4), prior=2 * torch.eye(8)[None])
    assert found.towards and residual(missing, found.correction) < 1e-6


SEEDS = (7, 8)


def collected(seed: int, monkeypatch: pytest.MonkeyPatch, prior: Prior | None = None) -> tuple[dict, Prior, list]:
    """(spec, prior of one run that never switches, the rows that layer 1 gave)."""
    spec, rows = absorbed_spec(TinyModel(), warmup_frames=4096), []
    add = Collector.add

    def recorded(collector, layer, local, full):
        if layer == 1:
            rows.append((local.flatten(0, 1).clone(), full.flatten(0, 1).clone()))
        add(collector, layer, local, full)

    monkeypatch.setattr(Collector, "add", recorded)
    rollout = Rollout(TinyModel(), spec, Settings(seed, SCHEDULE))
    rollout.absorber.origin = {"prompt": "a", "seed": seed}
    list(rollout.chunks(18))
    monkeypatch.setattr(Collector, "add", add)
    state = rollout.snapshot()
    return state.spec, prior_of(state.spec, spec.absorption, state.absorption), rows


def test_a_prior_of_two_videos_is_their_common_fit_and_comes_back_from_its_file(monkeypatch, tmp_path):
    (described, one, rows), (_, two, more) = (collected(seed, monkeypatch) for seed in SEEDS)
    both = one.joined(two)
    x, y = [], []
    for each in (rows, more):
        local, full = (torch.cat(t).double() for t in zip(*each, strict=True))
        x.append((local - local.mean(0)).numpy())
        y.append((full - local - (full - local).mean(0)).numpy())
    x, y = np.concatenate(x), np.concatenate(y)
    heads = described["geometry"]["heads"]
    size = x.shape[1] // heads
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        weight = PRIOR_RIDGE * (x[:, part] ** 2).sum() / size
        expected = stacked(x[:, part], y[:, part], weight, np.zeros((size, size)))
        np.testing.assert_allclose(both.matrix(1, torch.device("cpu"))[h].numpy(), expected, atol=1e-3, rtol=1e-3)
    path = both.save(tmp_path / "a.absorption.safetensors")
    again = load_prior(path)
    assert is_prior(path) and again.fingerprint == both.fingerprint != one.fingerprint
    assert [(run["prompt"], run["seed"]) for run in again.runs] == [("a", 7), ("a", 8)]
    with pytest.raises(ValueError, match="already holds a run of this prompt and seed 8"):
        again.joined(two)
    settings = AbsorptionSettings(local_window_frames=3)
    again.check(described, settings)
    for spec, other, words in (
        (described | {"model": "b"}, settings, "model is another checkpoint"),
        (described, replace(settings, local_window_frames=2), "local_window_frames was 3 and is 2"),
        (described, replace(settings, scope="layer"), "scope head and the others have priors of their own"),
    ):
        with pytest.raises(ValueError, match=f"^the prior belongs to other rollouts: {words}"):
            again.check(spec, other)


def test_a_run_that_is_drawn_towards_a_prior_goes_on_with_it_alone(monkeypatch, tmp_path):
    _, prior, _ = collected(8, monkeypatch)
    model, plain = TinyModel(), absorbed_spec(TinyModel(), ratio=1.0, warmup_frames=18)
    spec = replace(plain, absorption=with_prior(plain.absorption, prior))

    def run(length, state=None, given=prior, asked=spec):
        rollout = Rollout(model, asked, Settings(7, SCHEDULE), state=state, prior=given)
        return torch.cat([chunk.latents for chunk in rollout.chunks(length)], 2), rollout

    whole, rollout = run(24)
    without, _ = run(24, given=None, asked=plain)
    report = rollout.absorber.report()
    assert report["prior"] == prior.fingerprint and any(one.get("towards_prior") for one in report["residuals"])
    assert report["ridge_chosen"] == "fitted on the first 2 of 4 collected chunks, judged on the last"
    assert torch.equal(whole[:, :, :18], without[:, :, :18]) and not torch.equal(whole, without)
    first, rollout = run(15)
    state = load_state(save_state(rollout.snapshot(), tmp_path / "a.safetensors"))
    rest, _ = run(24, state)
    assert torch.equal(torch.cat([first, rest], 2), whole)
    with pytest.raises(ValueError, match="prior is [0-9a-f]{16}, and no prior is given: load that prior"):
        run(24, state, given=None)
    with pytest.raises(ValueError, match="another rollout: absorption is"):
        run(24, state, given=None, asked=plain)


def test_files_that_are_no_prior_are_refused_with_the_field(monkeypatch, tmp_path):
    _, prior, _ = collected(7, monkeypatch)
    path = prior.save(tmp_path / "a.absorption.safetensors")
    tensors, header = load_file(path), {"belongs_to": prior.belongs_to, "runs": list(prior.runs)}
    texts = {"format": "adastate.absorption-prior", "version": "1"}
    for change, words in (
        (lambda t, h: t.pop("gram.1"), "gram.1 is missing"),
        (lambda t, h: t.update({"gram.9": t["gram.1"]}), "a tensor gram.9"),
        (lambda t, h: t["cross.0"].fill_(math.nan), "cross.0 holds NaN"),
        (lambda t, h: t["gram.0"].neg_(), "gram.0 has a diagonal below 0"),
        (lambda t, h: h["belongs_to"].update(blocks=3), "blocks is 3, not "),
        (lambda t, h: h["belongs_to"].pop("model"), "belongs_to.model is missing"),
        (lambda t, h: h["belongs_to"]["geometry"].update(layers=10**6), "gram.2 is missing"),
        (lambda t, h: h["runs"][0].update(seed=1.5), r"runs\[0\].seed is 1.5"),
        (lambda t, h: h.update(more=1), "more, which this version does not know"),
    ):
        some, changed = {name: t.clone() for name, t in tensors.items()}, json.loads(json.dumps(header))
        change(some, changed)
        write_tensors(path, some, texts | {"prior": json.dumps(changed)})
        with pytest.raises(ValueError, match=rf"^a.absorption.safetensors is damaged: .*{words}"):
            load_prior(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="^a.absorption.safetensors cannot be read as a saved prior"):
        load_prior(path)


def test_a_prior_is_made_of_a_warm_up_that_lasts():
    model, spec = TinyModel(), absorbed_spec(TinyModel())
    for length, words in ((15, "has switched already"), (3, "has collected nothing")):
        rollout = Rollout(model, spec, Settings(7, SCHEDULE))
        list(rollout.chunks(length))
        state = rollout.snapshot()
        with pytest.raises(ValueError, match=words):
            prior_of(state.spec, spec.absorption, state.absorption)
