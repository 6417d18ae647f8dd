"""Servers, prompts and commands that meet: what a prompt makes is what a lone server makes of it, or the beginning of that."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import av
import pytest
import torch
from conftest import Client, report_of, workflow
from safetensors import safe_open

VIDEOS = (".mp4", ".mkv")
MEMORY = ("plan_bytes", "kv_bytes_planned", "kv_bytes_used", "host_kv_bytes_used", "text_kv_bytes_used")


@dataclass(frozen=True)
class Work:
    """A small rollout; its number says which, and no two have the same frames."""

    number: int
    longer: int = 0  # chunks

    @property
    def batch(self) -> int:
        return 2 if self.number % 5 == 4 else 1

    @property
    def codec(self) -> str:
        return ("h264", "ffv1")[self.number % 2]

    @property
    def frames(self) -> int:
        return 9 + 12 * (self.number % 3 + self.longer)

    def prompt(self, prefix: str, **changes: object) -> dict:
        inputs = {
            "width": 32,
            "height": 32,
            "steps": 1,
            "seed": 1000 + self.number,
            "length": self.frames,
            "batch_size": self.batch,
        }
        stream = {"filename_prefix": prefix, "codec": self.codec}
        return workflow(
            "long_video",
            **{f"n5__{k}": v for k, v in inputs.items()},
            **{f"n4__{k}": v for k, v in stream.items()} | changes,
        )


@dataclass(frozen=True)
class Made:
    """What a run left, in digests: of each item the frames, and of its state the tensors."""

    frames: list[list[str]]
    state: dict[str, str]
    memory: dict[str, object]


def frames_of(path: Path) -> list[str]:
    form = "rgb48le" if path.suffix == ".mkv" else "rgb24"
    with av.open(str(path)) as container:
        return [hashlib.sha256(frame.to_ndarray(format=form)).hexdigest() for frame in container.decode(video=0)]


def seed_in(path: Path) -> int:
    """That of the prompt which a video carries."""
    with av.open(str(path)) as container:
        texts = {name.lower(): text for name, text in container.metadata.items()}
    return json.loads(texts["prompt"])["5"]["inputs"]["seed"]


def state_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    return {
        key: hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
        for key, value in tensors.items()
    }


def made(output: Path, report: dict) -> Made:
    frames = [frames_of(output / name) for name in report["videos"]]
    return Made(
        frames, state_of(output / report["state"].removesuffix(" [output]")), {key: report[key] for key in MEMORY}
    )


class Lone:
    """What a server that does nothing else makes of a work; each is made once."""

    def __init__(self, client: Client) -> None:
        self.client, self._made = client, dict[Work, Made]()

    def __call__(self, work: Work) -> Made:
        if work not in self._made:
            report = report_of(self.client.run(work.prompt(f"lone/{work.number}_{work.longer}_")))
            self._made[work] = made(self.client.output, report)
        return self._made[work]


@pytest.fixture(scope="module")
def lone(client):
    return Lone(client)


@pytest.fixture(scope="module")
def second(client, tmp_path_factory):
    """Another server with the first one's output, models and input."""
    folder = tmp_path_factory.mktemp("second")
    (folder / "base").mkdir()
    for name in ("models", "input"):
        (shared := client.folder / "base" / name).mkdir(exist_ok=True)
        (folder / "base" / name).symlink_to(shared, target_is_directory=True)
    running = Client(folder, client.output)
    yield running
    running.stop()


def post(client: Client, path: str, body: dict) -> None:
    """To a route that answers with nothing."""
    answer = client.server.request(path, body)
    assert "error" not in answer, answer


def ended(client: Client, jobs: dict[str, Work], seconds: float = 600) -> dict[str, dict]:
    """The history of these jobs, when none of them waits or runs any more."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.server.check_alive()
        if not set(jobs) & left(client):
            history = client.server.request("/history")
            return {job: history[job] for job in jobs if job in history}
        time.sleep(0.1)
    raise AssertionError(f"prompts still wait after {seconds} s: {client.server.log.read_text()[-2000:]}")


def running(client: Client) -> list[str]:
    return [item[1] for item in client.server.request("/queue")["queue_running"]]


def waiting(client: Client) -> list[str]:
    return [item[1] for item in client.server.request("/queue")["queue_pending"]]


def left(client: Client) -> set[str]:
    """Those that run and those that wait, at one moment: between two questions one could slip through."""
    queue = client.server.request("/queue")
    return {item[1] for key in ("queue_running", "queue_pending") for item in queue[key]}


def reports_in(folder: Path) -> dict[str, list[dict]]:
    """By prompt: the reports that lie in a folder."""
    found: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.report.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(report["prompt_id"], []).append(report)
    return found


def check_folder(
    output: Path, prefix: str, jobs: dict[str, Work], history: dict[str, dict], lone: Lone
) -> tuple[int, int]:
    """That a folder holds what these prompts made, each its own and nothing else; (whole runs, interrupted ones)."""
    folder, owners, counts = output / prefix, {}, [0, 0]
    reports = reports_in(folder)
    assert set(reports) <= set(jobs), "a report of a prompt that never ran"
    for job, entry in history.items():
        work, whole = jobs[job], entry["status"]["status_str"] == "success"
        counts[not whole] += 1
        assert whole or interrupted(entry), entry["status"]
        if whole:
            told = report_of(entry["outputs"])
            assert told["prompt_id"] == job and len(reports[job]) == work.batch, "one report beside each video"
            shown = [f"{each['subfolder']}/{each['filename']}" for each in entry["outputs"]["5"]["images"]]
            assert shown == told["videos"] and made(output, told) == lone(work), f"{work}: {told['videos']}"
        for name in {name for report in reports.get(job, []) for name in report["videos"]}:
            assert owners.setdefault(name, job) == job, f"{name} is told to be of two prompts"
            assert seed_in(output / name) == 1000 + work.number, name
            item = int(name.rpartition(".")[0][-1]) if work.batch > 1 else 0
            frames, own = frames_of(output / name), lone(work).frames[item]
            assert frames == own[: len(frames)], f"{name} has other frames than {work}"
    there = (
        {f"{prefix}/{path.name}" for path in folder.iterdir() if path.suffix in VIDEOS} if folder.is_dir() else set()
    )
    assert there == set(owners), "each video is told of in the report of one prompt"
    assert not [path.name for path in folder.glob(".*")], "hidden files stay"
    return counts[0], counts[1]


def interrupted(entry: dict) -> bool:
    return any(event == "execution_interrupted" for event, _ in entry["status"]["messages"])


def of_seed(chance: Random, count: int, pool: int) -> list[Work]:
    return [Work(number) for number in chance.sample(range(pool), count)]


def two_servers(client: Client, second: Client, lone: Lone, trial, each: int, pool: int) -> None:
    """Both run prompts of one prefix at the same time."""
    prefix = f"meet/{each}_{trial.seed}_{trial.number}"
    works = of_seed(trial.chance, 2 * each, pool)
    jobs: dict[Client, dict[str, Work]] = {client: {}, second: {}}
    for number, work in enumerate(works):
        server = (client, second)[number % 2]
        saves = {
            "n4__autosave_seconds": trial.chance.choice([0.01, 60.0]),
            "n4__history_chunks": trial.chance.choice([0, 1]),
        }
        jobs[server][server.queue(work.prompt(f"{prefix}/take", **saves))] = work
    history = {job: entry for server, queued in jobs.items() for job, entry in ended(server, queued).items()}
    whole, _ = check_folder(client.output, prefix, jobs[client] | jobs[second], history, lone)
    assert whole == len(works)
    trial.saw(runs=whole)


def test_two_servers(campaign, client, second, lone):
    for trial in campaign("two servers with one output folder: 6 runs each, all of one prefix", full=12, sample=0):
        with trial:
            two_servers(client, second, lone, trial, each=6, pool=120)
    for trial in campaign("two servers with one output folder: 2 runs each, all of one prefix", full=8, sample=1):
        with trial:
            two_servers(client, second, lone, trial, each=2, pool=8)


def test_two_servers_go_on_from_one_state(campaign, client, second, lone):
    """Both join what they add to the video of the state, which stays as it is."""
    for trial in campaign("two servers go on from one state and join its video", full=8, sample=0):
        with trial:
            work = Work(trial.chance.randrange(1, 120, 2))
            longer = Work(work.number, trial.chance.randint(1, 3))
            prefix = f"meet/join{trial.seed}_{trial.number}"
            first = report_of(client.run(work.prompt(f"{prefix}/take")))
            prompt = longer.prompt(f"{prefix}/take", n4__join=True, n5__resume=["6", 0])
            prompt["6"] = {"class_type": "AdaStateLoadState", "inputs": {"file": first["state"]}}
            jobs = {server: server.queue(prompt) for server in (client, second)}
            reports = [report_of(ended(server, {job: longer})[job]["outputs"]) for server, job in jobs.items()]
            assert len({name for report in [first, *reports] for name in report["videos"]}) == 3 * work.batch
            assert made(client.output, first) == lone(work)
            for report in reports:
                there, whole = made(client.output, report), lone(longer)
                assert (there.frames, there.state) == (whole.frames, whole.state)


class Queue:
    """Prompts that are queued, moved and ended at random; what was done to which."""

    def __init__(self, client: Client, prefix: str, chance: Random) -> None:
        self.client, self.prefix, self.chance = client, prefix, chance
        self.jobs: dict[str, Work] = {}
        self.deleted: set[str] = set()
        self.stopped: set[str] = set()

    def add(self, work: Work) -> None:
        """At the end of the queue, at its front, or at a place of its own."""
        place = self.chance.choice([{}, {}, {"front": True}, {"number": self.chance.uniform(-50, 50)}])
        answer = self.client.server.request("/prompt", {"prompt": work.prompt(f"{self.prefix}/take")} | place)
        assert "prompt_id" in answer and not answer["node_errors"], answer
        self.jobs[answer["prompt_id"]] = work

    def delete(self) -> None:
        """Some of those that wait, and one that nobody queued."""
        there = waiting(self.client)
        gone = self.chance.sample(there, min(len(there), self.chance.randint(1, 3)))
        self.deleted |= set(gone)
        post(self.client, "/queue", {"delete": [*gone, "nobody's"]})

    def interrupt(self) -> None:
        """Whatever runs, or a prompt by its name if it still does; one that waits is not touched by its name."""
        there = running(self.client)
        if self.chance.random() < 0.5:
            before = self.client.server.request("/history")
            post(self.client, "/interrupt", {})
            # the next one may have begun by then, and have ended by now
            self.stopped |= {*running(self.client), *self.client.server.request("/history").keys() - before.keys()}
        elif there:
            post(self.client, "/interrupt", {"prompt_id": there[0]})
        if names := waiting(self.client):
            there.append(self.chance.choice(names))  # which is not touched, unless it has begun by now
            post(self.client, "/interrupt", {"prompt_id": there[-1]})
        self.stopped |= set(there)


def queued(client: Client, lone: Lone, trial, count: int, pool: int) -> None:
    """So many prompts, of which some come later, some are deleted, some interrupted, some put to the front."""
    prefix, chance = f"queue/{count}_{trial.seed}_{trial.number}", trial.chance
    queue, works = Queue(client, prefix, chance), of_seed(chance, count, pool)
    for work in works[: count * 3 // 4]:
        queue.add(work)
    acts = [queue.delete] * (count // 8) + [queue.interrupt] * (count // 6)
    acts += [lambda work=work: queue.add(work) for work in works[count * 3 // 4 :]]
    chance.shuffle(acts)
    for act in [queue.delete, *acts]:  # the first one while all wait
        act()
        time.sleep(chance.uniform(0, 0.8))
    history = ended(client, queue.jobs)
    never = set(queue.jobs) - set(history)
    assert never <= queue.deleted, "a prompt that nobody deleted never ran"
    stopped = {job for job, entry in history.items() if interrupted(entry)}
    assert stopped <= queue.stopped, "a prompt that nobody interrupted was interrupted"
    whole, cut = check_folder(client.output, prefix, queue.jobs, history, lone)
    assert never and whole, f"{len(never)} deleted, {whole} whole, {cut} interrupted"
    trial.saw(whole=whole, interrupted=cut, deleted=len(never))


def test_queue(campaign, client, lone):
    for trial in campaign("100 prompts queued, some deleted, interrupted and put to the front", full=4, sample=0):
        with trial:
            queued(client, lone, trial, count=100, pool=120)
    for trial in campaign("8 prompts queued, some deleted, interrupted and put to the front", full=10, sample=1):
        with trial:
            queued(client, lone, trial, count=8, pool=8)


def test_free(campaign, client, lone):
    """Models are unloaded and memory freed when the host comes to it, between two prompts at the latest."""
    for trial in campaign("/free at random instants of 3 runs", full=20, sample=1):
        with trial:
            prefix, frees = f"free/{trial.seed}_{trial.number}", 0
            jobs = {client.queue(work.prompt(f"{prefix}/take")): work for work in of_seed(trial.chance, 3, 8)}
            while set(jobs) & left(client):
                post(client, "/free", {name: trial.chance.random() < 0.7 for name in ("unload_models", "free_memory")})
                frees += 1
                time.sleep(trial.chance.uniform(0, 0.5))
            whole, _ = check_folder(client.output, prefix, jobs, ended(client, jobs), lone)
            assert whole == 3 and frees > 1
            trial.saw(frees=frees)
