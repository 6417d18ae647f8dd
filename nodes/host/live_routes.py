"""The pack's routes: what runs, how far it is, and stopping it.

GET  /adastate/runs                          every rollout under way and the newest ended ones; ?client_id= for one client's
GET  /adastate/runs/{prompt_id}/{node_id}    one of them with its chunks and newest pictures
POST /adastate/timeline                      reads a prompt timeline, or writes one: see timeline_route.py
POST /adastate/steer                         changes one while it is under way: see steer_route.py
POST /adastate/stop                          {"prompt_id", "node_id"}: end it after the chunk under way and keep what there is
"""

from __future__ import annotations

from aiohttp import web

from . import live_runs as live
from .request_body import BodyError, parse_json, read_bytes
from .steer_route import steer
from .timeline_route import timeline

STOP_BODY = 'the body must be JSON with "prompt_id" and "node_id"'
LONGEST_NAME = 200  # characters


def add_routes() -> None:
    """Register the routes with the host's server, if there is one."""
    server = live.prompt_server()
    if server is not None:
        server.routes.post("/adastate/timeline")(timeline)
        server.routes.get("/adastate/runs")(list_runs)
        server.routes.get("/adastate/runs/{prompt_id}/{node_id}")(show_run)
        server.routes.post("/adastate/stop")(stop_run)
        server.routes.post("/adastate/steer")(steer)


def refused(status: int, text: str) -> web.Response:
    return web.json_response({"error": {"message": text}}, status=status)


async def list_runs(request: web.Request) -> web.Response:
    client = request.query.get("client_id")
    if client and len(client) <= LONGEST_NAME and request.query.get("page"):
        live.page_opened(client)
    return web.json_response({"runs": [run.summary() for run in live.runs(client)]})


async def show_run(request: web.Request) -> web.Response:
    prompt_id, node_id = request.match_info["prompt_id"], request.match_info["node_id"]
    run = live.find(prompt_id, node_id)
    if run is None:
        return refused(
            404, f"there is no rollout of node {node_id} in prompt {prompt_id}; GET /adastate/runs lists them"
        )
    return web.json_response(run.summary() | run.history.describe())


async def stop_run(request: web.Request) -> web.Response:
    try:
        asked = parse_json(await read_bytes(request, 2**18), STOP_BODY)  # short, and waits for no other body
    except BodyError as error:
        return refused(error.status, str(error))
    names = [asked.get(name) for name in ("prompt_id", "node_id")] if isinstance(asked, dict) else [None]
    if not all(type(name) in (str, int) for name in names):
        return refused(400, STOP_BODY)
    prompt_id, node_id = (str(name)[:LONGEST_NAME] for name in names)
    run = live.find(prompt_id, node_id)
    if run is None or not run.running:
        return refused(
            404, f"no rollout of node {node_id} runs in prompt {prompt_id}; GET /adastate/runs lists those that do"
        )
    run.stop()
    return web.json_response(run.summary())
