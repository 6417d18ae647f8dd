"""POST /adastate/steer: change a rollout while it is under way.

{"prompt_id", "node_id"} name it, as for /adastate/stop, and at least one more key says what is asked:

"prompt"      other words from the next chunk on; with it "transition", the timeline node's if it is left out
"seed"        of the noise, from the next chunk on
"strength"    of the adaptive anchor, from the next chunk on
"pause"       true, alone: end after the chunk under way and keep what there is, to go on later
"take_back"   seconds of video to go back, to a state that the history has kept; what else is asked holds from there

The answer is the run's summary and "steer": {"id"}; what came of it is told in the summary's "steering" and by adastate.steered.
"""

from __future__ import annotations

import math
import time
from typing import Any

from aiohttp import web

from ...adastate_core.prompts.entry_options import TRANSITIONS
from ...adastate_core.prompts.timeline import LONGEST
from . import live_runs as live
from .node import shown
from .request_body import BodyError, off_loop, parse_json, read_bytes
from .steer_wishes import Refused, Wish
from .timeline_route import check_seed, check_strength, plain_lines

BODY = (
    'the body must be JSON with "prompt_id", "node_id" and at least one of "prompt" (with "transition"), "seed", "strength", '
    '"pause" and "take_back"'
)
LONGEST_WORDS = 20_000  # characters
MOST_BYTES = 2**18
LONGEST_NAME = 200
_KEYS = ("prompt_id", "node_id", "prompt", "transition", "seed", "strength", "pause", "take_back")


async def steer(request: web.Request) -> web.Response:
    """The route."""
    arrived = time.perf_counter()
    try:
        asked = parse_json(await read_bytes(request, MOST_BYTES), BODY)
        names = [asked.get(name) for name in ("prompt_id", "node_id")] if isinstance(asked, dict) else [None]
        if not all(type(name) in (str, int) for name in names):
            raise BodyError(BODY)
        wish = _wish(asked)
        prompt_id, node_id = (str(name)[:LONGEST_NAME] for name in names)
        run = live.find(prompt_id, node_id)
        if run is None or not run.running:
            raise BodyError(
                f"no rollout of node {node_id} runs in prompt {prompt_id}; GET /adastate/runs lists those that do", 404
            )
        if run.steering is None:
            raise BodyError("the rollout is still being prepared; ask again when its models are being loaded", 409)
        number = await off_loop(run.steering.ask, wish, arrived)
    except (BodyError, Refused) as error:
        return web.json_response({"error": {"message": str(error)}}, status=error.status)
    except ValueError as error:
        return web.json_response({"error": {"message": str(error)}}, status=400)
    return web.json_response(run.summary() | {"steer": {"id": number}})


def _wish(asked: dict[str, Any]) -> Wish:
    """What a body asks. ValueError, in a sentence, for what is out of bounds, unknown or nothing."""
    if unknown := [key for key in asked if key not in _KEYS]:
        raise ValueError(f"{shown(unknown[0])} is no key of this route; {BODY}")
    given = {key: value for key, value in asked.items() if key not in ("prompt_id", "node_id")}
    if not given.keys() - {"transition"}:
        raise ValueError(f"nothing is asked; {BODY}")
    wish = Wish(
        _words(given),
        _transition(given),
        check_seed(given["seed"], "seed") if "seed" in given else None,
        check_strength(given["strength"], "strength") if "strength" in given else None,
        _pause(given),
        _seconds(given),
    )
    if wish.pause and len(given) > 1:
        raise ValueError("pause is asked together with something else; ask it alone")
    return wish


def _words(given: dict[str, Any]) -> str | None:
    if "prompt" not in given:
        return None
    words = given["prompt"]
    if not isinstance(words, str) or not (words := plain_lines(words)):
        raise ValueError(f"prompt is {shown(given['prompt'])}; write what the video is to show")
    if len(words) > LONGEST_WORDS:
        raise ValueError(f"prompt has {len(words)} characters; it may have {LONGEST_WORDS}: shorten it")
    return words


def _transition(given: dict[str, Any]) -> str | None:
    if given.get("transition") is None:
        return None
    if given["transition"] not in TRANSITIONS:
        raise ValueError(f"transition is {shown(given['transition'])}; it must be one of {', '.join(TRANSITIONS)}")
    if "prompt" not in given:
        raise ValueError("transition is how the video changes to a prompt; give a prompt with it")
    return given["transition"]


def _pause(given: dict[str, Any]) -> bool:
    if "pause" in given and given["pause"] is not True:
        raise ValueError(f"pause is {shown(given['pause'])}; it can only be true")
    return "pause" in given


def _seconds(given: dict[str, Any]) -> float | None:
    if "take_back" not in given:
        return None
    seconds = given["take_back"]
    plain = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not plain or not math.isfinite(seconds) or not 0 < seconds <= LONGEST:
        raise ValueError(f"take_back is {shown(seconds)}; give a number of seconds above 0, at most {LONGEST}")
    return float(seconds)
