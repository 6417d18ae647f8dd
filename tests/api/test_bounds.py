"""Numbers and choices outside what the nodes say they take, over HTTP: refused when queued, or when a link's value comes."""

from __future__ import annotations

import json
import math

import pytest
from conftest import error_of, workflow

ABOVE = [
    ("n5__steps", 2**64 - 1, "steps is 18446744073709551615; it must be between 0 and 100"),
    ("n5__steps", 101, "steps is 101; it must be between 0 and 100"),
    ("n5__width", 8208, "width is 8208; it must be a multiple of 16, at most 8192: try 8192"),
    ("n5__window_frames", 5000, "window_frames is 5000; it must be between -1 and 4096"),
    ("n5__chunk_frames", 65, "chunk_frames is 65; it must be between 0 and 64"),
    ("n5__batch_size", 65, "batch_size is 65; it must be between 1 and 64"),
    ("n5__shift", 1000.0, "shift is 1000.0; it must be between 0 and 100"),
    ("n5__shift", math.nan, "shift is nan; it must be a number between 0 and 100"),
    ("n5__seed", -1, "seed is -1; it must be between 0 and 18446744073709551615"),
    ("n5__cache_dtype", "fp2", "cache_dtype is 'fp2'; it must be one of model, fp8, int8"),
    ("n4__autosave_seconds", 1e9, "autosave_seconds is 1000000000.0; it must be between 0 and 86400"),
    ("n4__history_states", 10**6, "history_states is 1000000; it must be between 1 and 1024"),
    ("n4__latent_space", "pixel", "latent_space is 'pixel'; it must be one of auto, vae, model"),
    ("n4__fps", "abc", "fps is 'abc'; it must be a number between 0 and 240"),
    ("n4__fps", math.inf, "fps is inf; it must be a number between 0 and 240"),
    ("n4__quality", "best", "quality is 'best'; it must be a whole number between 0 and 51"),
]


@pytest.mark.parametrize(("name", "value", "sentence"), ABOVE, ids=lambda value: str(value)[:24])
def test_what_is_out_of_range_is_refused_when_queued(client, name, value, sentence):
    node, field = name.removeprefix("n").split("__")
    answer = client.refused(workflow("long_video", n5__length=13, **{name: value}))
    errors = answer["node_errors"][node]["errors"]
    assert sentence in [error["details"].partition(" - ")[2] for error in errors], errors
    named = {error["extra_info"]["input_name"] for error in errors}
    assert field in named and not named & {"model", "positive", "vae"}, "sockets have no part in it"


@pytest.mark.parametrize(
    ("field", "kind", "value", "sentence"),
    [
        ("steps", "PrimitiveInt", 2**63 - 1, "steps is 9223372036854775807; it must be between 0 and 100"),
        ("width", "PrimitiveInt", 8208, "width is 8208; it must be a multiple of 16, at most 8192: try 8192"),
        ("shift", "PrimitiveFloat", 1000.0, "shift is 1000.0; it must be between 0 and 100"),
        ("shift", "PrimitiveFloat", math.nan, "shift is nan; it must be a number between 0 and 100"),
    ],
)
def test_what_is_linked_is_refused_when_it_is_known(client, field, kind, value, sentence):
    prompt = workflow("long_video", n5__length=13, **{f"n5__{field}": ["20", 0]})
    prompt["20"] = {"class_type": kind, "inputs": {"value": value}}
    error = error_of(client.wait(client.queue(prompt)))
    assert error["node_type"] == "AdaStateRollout" and sentence in error["exception_message"], json.dumps(error)
