"""docs/examples/fleet: each file against the schema of what reads it, each line against the fleet's own arguments."""

from __future__ import annotations

import copy
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import cli

from fleet.__main__ import check, parser

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "examples" / "fleet"
FILES = sorted(path for path in FOLDER.iterdir() if path.name != "__pycache__")
RUN = re.compile(r"(?:python3 run\.py fleet|python -m fleet) ((?:\"[^\"\n]*\"|[^\n\"])+)")


def loaded(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def text_of(path: Path) -> str:
    """A file with its continued lines in one."""
    return re.sub(r"\s*\\\n\s*", " ", path.read_text(encoding="utf-8"))


# ---- the lines


def fleet_lines() -> list[tuple[str, str]]:
    return [(path.name, line) for path in FILES for line in RUN.findall(text_of(path))]


def test_there_is_a_line_for_each_way():
    found = {name for name, line in fleet_lines() if "--into" in line}
    assert found == {"README.md", "fleet.sbatch", "rayjob.yaml"}
    assert sum("--runtime-env" in line for _, line in fleet_lines()) == 1
    assert sum("s3://" in line for _, line in fleet_lines()) == 1


@pytest.mark.parametrize(("name", "line"), fleet_lines())
def test_a_line_is_one_that_the_fleet_takes(name, line):
    words = shlex.split(line.replace("$workers", "32").split("&")[0].split(">")[0])
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            parser().parse_args(words)
        return
    options = parser().parse_args(words)
    check(options)
    assert options.workers > 0, "machines without a GPU yet are counted, too"
    assert options.runtime_env is None or (ROOT / options.runtime_env).is_file()
    assert options.address and options.base == Path("/shared/comfyui")


def test_a_line_with_a_wrong_argument_would_be_seen():
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(["batch.jsonl", "--into", "x", "--adress", "auto"])


def ray_lines() -> list[tuple[str, str]]:
    pattern = re.compile(
        r"(?:bin/ray|\"\$ray\"|^ray) (start|stop|status|up|down|exec|get-auth-token)\b([^\n&>]*)", re.MULTILINE
    )
    return [(command, rest) for path in FILES for command, rest in pattern.findall(text_of(path))]


def test_rays_own_commands_are_called_as_it_takes_them():
    assert {command for command, _ in ray_lines()} == {
        "start", "stop", "status", "up", "down", "exec", "get-auth-token",
    }  # fmt: skip
    for command, rest in ray_lines():
        known = {flag for each in cli.commands[command].params for flag in (*each.opts, *each.secondary_opts)}
        unquoted = re.sub(r"\"[^\"]*\"", "", rest)
        used = set(re.findall(r"(--[\w-]+)", unquoted))
        assert used <= known, (command, used - known)


def test_versions_are_those_of_the_fleets_environment():
    wanted = dict(re.findall(r"(?m)^([\w-]+)==(\S+)$", (ROOT / "fleet" / "requirements.txt").read_text()))
    assert {**dict(each.split("==") for each in loaded("runtime-env.yaml")["pip"]), "ray": wanted["ray"]} == wanted
    assert loaded("rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == wanted["ray"] == ray.__version__
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"ray[default]=={wanted['ray']}" in readme and f"s3fs=={wanted['fsspec']}" in readme


def test_every_file_is_explained_and_linked():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in FILES} - set(re.findall(r"\]\(([\w.-]+)\)", readme)) == {"README.md"}


# ---- Ray's cluster launcher


def test_the_launchers_file_is_as_rays_schema_wants_it():
    config = loaded("cluster.yaml")
    validate_config(prepare_config(copy.deepcopy(config)))
    assert config["max_workers"] == config["available_node_types"]["gpu"]["min_workers"] == 8
    (line,) = [
        line for _, line in fleet_lines() if "--workers 8" in line and "s3://" not in line and "runtime" not in line
    ]
    assert parser().parse_args(shlex.split(line)).workers == 8
    for change in ({"max_worker": 3}, {"max_workers": "8"}, {"head_node_type": "none"}):
        with pytest.raises((jsonschema.ValidationError, ValueError)):
            validate_config(prepare_config(copy.deepcopy(config) | change))


# ---- the runtime environment


def test_the_runtime_environment_is_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    told = RuntimeEnv(**loaded("runtime-env.yaml"))
    assert told["working_dir"] == "." and set(told["env_vars"]) == {"COMFYUI_PATH", "COMFYUI_PYTHON"}
    for folder in told["excludes"]:
        assert (ROOT / folder.strip("/")).is_dir(), folder
    with pytest.raises((TypeError, ValueError)):
        RuntimeEnv(**loaded("runtime-env.yaml") | {"pip": 3})


# ---- KubeRay. The fields that are used, as its CRD of v1 has them; with ADASTATE_RAYJOB_CRD that file itself is asked, too.


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


TEXT, COUNT, SWITCH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
CONTAINER = _object(
    ("name",),
    name=TEXT,
    image=TEXT,
    resources=_object(requests=TEXTS, limits=TEXTS),
    volumeMounts={"type": "array", "items": _object(("name", "mountPath"), name=TEXT, mountPath=TEXT)},
)
CLAIM = _object(("claimName",), claimName=TEXT)
POD = _object(
    ("spec",),
    spec=_object(
        ("containers",),
        containers={"type": "array", "items": CONTAINER},
        volumes={"type": "array", "items": _object(("name",), name=TEXT, persistentVolumeClaim=CLAIM)},
    ),
)
GROUP = _object(
    ("groupName", "template", "maxReplicas", "minReplicas"),
    groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, rayStartParams=TEXTS, template=POD,
)  # fmt: skip
RAYJOB = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_object(("name",), name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}),
    spec=_object(
        entrypoint=TEXT,
        shutdownAfterJobFinishes=SWITCH,
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        rayClusterSpec=_object(
            ("headGroupSpec",),
            rayVersion=TEXT,
            headGroupSpec=_object(("template",), rayStartParams=TEXTS, template=POD),
            workerGroupSpecs={"type": "array", "items": GROUP},
        ),
    ),
)


def closed(schema: Any) -> Any:
    """A CRD's schema, which passes over what it does not know, as one that refuses it."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            schema.setdefault("additionalProperties", False)
        for each in schema.values():
            closed(each)
    elif isinstance(schema, list):
        for each in schema:
            closed(each)
    return schema


def rayjob_schemas() -> dict[str, dict[str, Any]]:
    found = {"by hand": RAYJOB}
    if file := os.environ.get("ADASTATE_RAYJOB_CRD"):
        versions = yaml.safe_load(Path(file).read_text())["spec"]["versions"]
        crd = closed(next(each for each in versions if each["name"] == "v1")["schema"]["openAPIV3Schema"])
        found["the CRD"] = crd | {"properties": crd["properties"] | {"metadata": {"type": "object"}}}
    return found


@pytest.mark.parametrize("schema", rayjob_schemas().values(), ids=rayjob_schemas())
def test_the_rayjob_is_as_kuberay_wants_it(schema):
    job = loaded("rayjob.yaml")
    jsonschema.validate(job, schema)
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == parser().parse_args(shlex.split(job["spec"]["entrypoint"])[3:]).workers
    pods = [each["template"]["spec"] for each in (cluster["headGroupSpec"], group)]
    for pod in pods:
        assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert f"-t {images.pop()} ." in (FOLDER / "README.md").read_text() and not images
    group["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, schema)


def test_the_image_is_made_with_commands_that_there_are():
    text = (FOLDER / "Dockerfile").read_text()
    (run,) = re.findall(r"(?m)^RUN (.*)$", text)
    told = (ROOT / "run.py").read_text()
    for command in re.findall(r"python3 run\.py (\w+)", run):
        assert f'    "{command}": {command},' in told
    assert re.findall(r"(?m)^FROM (\S+)$", text) == ["python:3.11-slim-bookworm"]


# ---- Slurm: the script itself, with programs that only write down how they were called

CALLED = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
  scontrol*) echo node1; echo node2 ;;
  python3*) trap 'echo told >> "$CALLS"; sleep 0.3; exit 3' TERM; echo up >> "$CALLS"; for i in $(seq 100); do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """The script in a folder of its own, and what its programs are told."""
    programs, checkout = tmp_path / "bin", tmp_path / "checkout"
    ray_program = checkout / ".cache" / "fleet-env" / "bin" / "ray"
    programs.mkdir()
    ray_program.parent.mkdir(parents=True)
    for path in (*(programs / name for name in ("scontrol", "srun", "python3")), ray_program):
        path.write_text(CALLED)
        path.chmod(0o755)
    text = (FOLDER / "fleet.sbatch").read_text()
    script = tmp_path / "fleet.sbatch"
    script.write_text(text.replace("cd /shared/ComfyUI-AdaState", f"cd {checkout}"))
    calls = tmp_path / "calls"
    calls.touch()
    env = {
        "PATH": f"{programs}:/usr/bin:/bin", "CALLS": str(calls), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2",
        "SLURM_GPUS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "HOME": str(tmp_path),
    }  # fmt: skip
    return script, calls, env


def test_the_batch_script_starts_ray_on_every_node_and_passes_the_signal_on(slurm):
    script, calls, env = slurm
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    process = subprocess.Popen(["bash", script], env=env)
    end = time.monotonic() + 20
    while "up\n" not in calls.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 3, "the driver's own status, after it has kept its states"
    told = calls.read_text().splitlines()
    assert "told" in told
    starts = sorted(line for line in told if line.startswith("srun"))
    assert len(starts) == 2 and " start --head --port=6379 --block" in starts[1] and "--nodelist=node1" in starts[1]
    assert "--exclude=node1" in starts[0] and starts[0].endswith("start --address=node1:6379 --block")
    (line,) = [line for line in told if line.startswith("python3 run.py fleet")]
    options = parser().parse_args(shlex.split(line)[3:])
    assert (options.address, options.workers) == ("node1:6379", 16)


def test_the_batch_scripts_own_options_are_slurms():
    told = re.findall(r"(?m)^#SBATCH --([\w-]+)(?:=(\S+))?$", (FOLDER / "fleet.sbatch").read_text())
    assert len(told) == (FOLDER / "fleet.sbatch").read_text().count("#SBATCH ")
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue"}
    assert {name for name, _ in told} == known and dict(told)["signal"] == "B:TERM@300"
