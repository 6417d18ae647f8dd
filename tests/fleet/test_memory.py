"""What is asked of Plan Rollout Memory, and what its answer is taken for."""

from __future__ import annotations

import json

import pytest
from tables import LONG, ROOT

from fleet.graph import with_values
from fleet.memory import PLAN, SHARED, SHOWN, plan_key, plan_prompt, read_plan

SENTENCE = "the rollout's caches need 9.00 GiB and 4.00 GiB are free; window_frames 6 would fit"


def shown(fits: bool, words: str = SENTENCE) -> dict:
    numbers = json.dumps({"fits": fits, "total_bytes": 9, "free_bytes": 4})
    return {"outputs": {PLAN: {"text": [f"planned for 64x64\n{words}\nmore"]}, SHOWN: {"text": [numbers]}}}


def test_the_plan_has_the_rollouts_own_inputs_and_nothing_else_runs():
    graph = json.loads(LONG.read_text())
    prompt = plan_prompt(graph)
    inputs = graph["5"]["inputs"]
    assert prompt[PLAN]["inputs"] == {name: inputs[name] for name in SHARED if name in inputs}
    assert set(prompt) == {
        PLAN,
        SHOWN,
        "1",
        "2",
        "4",
    }  # the model, the VAE and the stream; not the words, not the rollout
    assert plan_prompt(json.loads((ROOT / "workflows" / "api" / "anchor_comparison.json").read_text())) is None


def test_rows_share_a_plan_if_their_caches_take_the_same():
    graph = json.loads(LONG.read_text())
    for same in ({"5.seed": 9}, {"5.length": 97}, {"4.filename_prefix": "x"}, {"3.balloon": "gold"}):
        assert plan_key(with_values(graph, same)) == plan_key(graph)
    for other in (
        {"5.width": 128},
        {"5.window_frames": 3},
        {"1.unet_name": "x"},
        {"4.upscale_by": 2.0},
        {"5.batch_size": 2},
    ):
        assert plan_key(with_values(graph, other)) != plan_key(graph)


def test_a_plan_that_does_not_fit_says_what_would():
    plan = read_plan(shown(False), 4)
    assert (plan.fits, plan.sentence, plan.memory, plan.total_bytes) == (False, SENTENCE, 4, 9)
    assert read_plan(shown(True), 4).fits and not read_plan(shown(True), 4).sentence


@pytest.mark.parametrize("entry", [{}, {"outputs": {SHOWN: {"text": ["["]}}}, {"outputs": {SHOWN: {"text": []}}}])
def test_an_answer_that_cannot_be_read_refuses_nothing(entry):
    plan = read_plan(entry, 4)
    assert plan.fits and not plan.known
