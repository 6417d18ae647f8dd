"""A plan of stages: what is still to be done, going on after a failure, being asked to stop, and another machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from training import handover, stages
from training.loop import train
from training.optim import Average, Optimiser
from training.run import STOPPED, Run, read_config
from training.stages import Plan

ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "training" / "configs" / "journey" / "plan.toml"


def toml(value) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


def entry(tmp_path: Path, name: str, **config) -> dict:
    """A stage of a plan, an export, with a config of its own."""
    path = tmp_path / f"{name}.toml"
    values = {"folder": str(tmp_path / "runs" / name), "seed": 0} | config
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in values.items()))
    return {"name": name, "stage": "export", "config": str(path), "minutes": 1.5}


def configured(tmp_path: Path, entries: list[dict]) -> dict:
    """A plan's config, which `plan.toml` says as well."""
    config = {
        "folder": str(tmp_path / "runs"), "table": str(tmp_path / "plan.md"), "title": "T", "about": "A", "seed": 0,
        "stages": entries,
    }  # fmt: skip
    lines = [f"{key} = {toml(value)}" for key, value in config.items() if key != "stages"]
    lines.append(f"stages = [{', '.join(map(toml, entries))}]")
    (tmp_path / "plan.toml").write_text("\n".join(lines))
    return config


def test_what_is_gone_is_made_again_only_if_it_is_needed(tmp_path):
    runs = tmp_path / "runs"
    plan = Plan(
        configured(
            tmp_path,
            [
                entry(tmp_path, "clips"),
                entry(tmp_path, "teacher", train=str(runs / "clips" / "train.safetensors")),
                entry(
                    tmp_path,
                    "student",
                    train=str(runs / "clips" / "train.safetensors"),
                    start=str(runs / "teacher" / "model.pt"),
                ),
                entry(tmp_path, "table", models=[str(runs / "student" / "model.pt")]),
            ],
        )
    )

    def left() -> list[str]:
        return [one.name for one in plan.to_do()]

    assert left() == ["clips", "teacher", "student", "table"]
    for one in plan.entries[:2]:
        plan.note(one, 60.0, 30.0, True)
    assert left() == ["clips", "teacher", "student", "table"], "done, but what they made is not here"
    for path in (runs / "clips" / "train.safetensors", runs / "teacher" / "model.pt"):
        path.parent.mkdir(parents=True)
        path.touch()
    assert left() == ["student", "table"]
    plan.note(plan.entries[2], 60.0, 30.0, True)
    (runs / "teacher" / "model.pt").unlink()
    (runs / "clips" / "train.safetensors").unlink()
    assert left() == ["clips", "teacher", "student", "table"], (
        "the student's weights are gone, and all that they come from"
    )
    (runs / "student").mkdir()
    (runs / "student" / "model.pt").touch()
    assert left() == ["table"]
    row = next(line for line in plan.table() if line.startswith("| student |"))
    assert row.split("|")[4:8] == [" 1.5 ", " 0.5 ", " 1.0 ", " done "]
    with pytest.raises(ValueError, match="has a stage twice"):
        Plan(plan.config | {"stages": [vars(plan.entries[0])] * 2})


def test_a_plan_goes_on_behind_what_is_done(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "one.pt")
    first = entry(tmp_path, "first", vae={"weights": str(tmp_path / "one.pt"), "file": "a.safetensors"})
    second = entry(tmp_path, "second", vae={"weights": str(tmp_path / "two.pt"), "file": "b.safetensors"})
    configured(tmp_path, [first, second])
    monkeypatch.chdir(ROOT)

    def start(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["stages", "--config", str(tmp_path / "plan.toml"), "--threads", "1", *more])
        stages.main()

    start("--minutes", "0")
    assert "| all | | | 3 | 0.0 | 0.0 | |" in (tmp_path / "plan.md").read_text()
    with pytest.raises(SystemExit, match="second ended with status 1"):
        start()
    written = (tmp_path / "runs" / "first" / "vae" / "a.safetensors").stat().st_mtime_ns
    text = (tmp_path / "plan.md").read_text()
    assert text.count("| done |") == 1 and "| begun |" in text
    torch.save({"b": torch.ones(2)}, tmp_path / "two.pt")
    start()
    assert (tmp_path / "plan.md").read_text().count("| done |") == 2
    assert (tmp_path / "runs" / "first" / "vae" / "a.safetensors").stat().st_mtime_ns == written, "it is not run again"
    spent = json.loads((tmp_path / "runs" / "stages.json").read_text())
    assert all(one["core_seconds"] > 0.2 for one in spent.values())


def test_stages_that_do_not_need_each_other_run_side_by_side(tmp_path, monkeypatch):
    """Called a second time, the plan takes what is ready and what nobody runs, and waits if that is nothing."""
    runs = tmp_path / "runs"
    teacher = str(runs / "teacher" / "model.pt")
    entries = [
        entry(tmp_path, "teacher"), entry(tmp_path, "one", start=teacher), entry(tmp_path, "other", start=teacher),
        entry(tmp_path, "table", models=[str(runs / "one" / "model.pt"), str(runs / "other" / "model.pt")]),
    ]  # fmt: skip
    plan, taken = Plan(configured(tmp_path, entries)), []

    def run_stage(plan: Plan, entry: stages.Entry, deadline: stages.Deadline, _inherited: tuple[int, ...]) -> int:
        taken.append(entry.name)
        if entry.name in ("teacher", "one"):
            assert stages.next_stage(Plan(plan.config), deadline), "the second one"
        entry.folder.mkdir(parents=True)
        (entry.folder / "model.pt").touch()
        plan.note(entry, 1.0, 1.0, True)
        return 0

    monkeypatch.setattr(stages, "run_stage", run_stage)
    monkeypatch.setattr(stages, "_LOOK", 0.0)
    while stages.next_stage(plan, stages.Deadline(1.0)):
        plan.read()
    assert taken == ["teacher", "one", "other", "table"], "beside the teacher there was nothing to run"
    assert all(spent["done"] and spent["seconds"] == 1.0 for spent in plan.spent.values()) and len(plan.spent) == 4


def trained(folder: Path, ask_at: int | None) -> torch.Tensor:
    """Six steps of a tiny run, in which somebody may ask it to stop."""
    torch.manual_seed(0)
    run = Run({"steps": 6, "seed": 0, "log_every": 2}, folder, False)
    model = torch.nn.Linear(4, 4)
    optimiser, average = Optimiser(model, 1e-2), Average(model, 0.9)
    run.resume(model=model, optimiser=optimiser, average=average)
    while run.step < run.steps:
        model(torch.full((1, 4), float(run.step))).square().mean().backward()
        optimiser.step(run.done)
        average.update(model)
        if run.step == ask_at:
            run.stop_file.touch()
        run.advance(loss=0.0)
    return torch.cat([model.weight.flatten(), average.shadow["weight"].flatten()]).detach()


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_it_had_not(tmp_path):
    whole = trained(tmp_path / "whole", None)
    with pytest.raises(SystemExit) as stopped:
        trained(tmp_path / "asked", 3)
    assert stopped.value.code == STOPPED and not (tmp_path / "asked" / "stop").exists()
    assert torch.load(tmp_path / "asked" / "last.pt", weights_only=True)["step"] == 4
    assert torch.equal(trained(tmp_path / "asked", None), whole)


def test_a_kill_between_the_last_step_and_the_weights_loses_none(tmp_path):
    config = {
        "steps": 3, "seed": 0, "lr": 1e-2, "decay_from": 0.5, "ema": 0.9, "evaluate_every": 3, "log_every": 1,
    }  # fmt: skip
    seen = []

    def start() -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)

        def step(seed: int) -> tuple[torch.Tensor, dict[str, float]]:
            seen.append(seed)
            return model(torch.ones(1, 4)).square().mean(), {}

        train(Run(config, tmp_path, False), model, step, lambda: {"held_out": 1.0})

    start()
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    (tmp_path / "model.pt").unlink()
    start()
    assert len(seen) == 3, "no step is made twice"
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=True)["weight"], weights["weight"])


def test_another_machine_goes_on_with_what_is_needed(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    entries = [
        entry(tmp_path, "teacher"),
        entry(tmp_path, "student", start=str(runs / "teacher" / "model.pt")),
        entry(tmp_path, "other", start=str(runs / "teacher" / "model.pt")),
        entry(tmp_path, "table", models=[str(runs / "student" / "model.pt")]),
    ]
    for name in ("teacher", "student"):
        (runs / name).mkdir(parents=True)
        torch.save({"w": torch.randn(8, 8)}, runs / name / "model.pt")
        torch.save({"step": 9}, runs / name / "last.pt")
    with pytest.raises(SystemExit):
        trained(runs / "other", 2)
    plan = Plan(configured(tmp_path, entries))
    for one in plan.entries[:2]:
        plan.note(one, 1.0, 1.0, True)
    names = [str(path.relative_to(runs)) for path in handover.files_of(plan)]
    assert names == ["other/last.pt", "student/model.pt", "teacher/model.pt"]
    assert [p.parent.name for p in handover.files_of(plan, weights_only=True)] == ["student", "teacher"]

    def start(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["handover", "--config", str(tmp_path / "plan.toml"), *more])
        handover.main()

    start("--into", str(tmp_path / "packed"))
    before = torch.load(runs / "other" / "last.pt", weights_only=True)
    runs.rename(tmp_path / "here")
    start("--out_of", str(tmp_path / "packed"))
    after = torch.load(runs / "other" / "last.pt", weights_only=True)
    assert after["step"] == before["step"] == 3 and after["rng"].equal(before["rng"])
    torch.testing.assert_close(after["model"]["weight"], before["model"]["weight"], atol=0, rtol=0.005)
    assert [one.name for one in Plan(configured(tmp_path, entries)).to_do()] == ["other", "table"]
    assert trained(runs / "other", None).isfinite().all(), "it goes on from there"
    with pytest.raises(SystemExit, match="give either --into"):
        start()


def test_the_journeys_contenders_have_equal_budgets(monkeypatch):
    """Equal steps, clips, noise and frames of keys; nothing but the anchor, the window and where things lie differs."""
    monkeypatch.chdir(ROOT)
    plan = Plan(read_config(PLAN) | {"folder": "training/runs/journey"})
    settings = {one.name: one.settings for one in plan.entries}
    for stage in ("recurrence", "trajectories", "four steps", "matching"):
        adaptive, static, none = (settings[f"{stage}, {kind}"] for kind in ("adaptive", "static", "none"))
        where = {"folder", "start_from", "trajectories"} | ({"teacher"} if stage == "trajectories" else set())
        differing = {key for key in adaptive if not adaptive[key] == static[key] == none[key]}
        assert differing <= where | {"anchor", "window_frames"}, stage
        assert adaptive["window_frames"] + 1 == static["window_frames"] + 1 == none["window_frames"]
    folders = [config["folder"] for name, config in settings.items() if "journey_table" not in name]
    tables = [one for one in plan.entries if one.stage == "journey_table"]
    assert len(set(folders)) == len(folders) - len(tables) + 1, "no run writes over another; the tables share a folder"
    assert all(one.minutes > 0 for one in plan.entries)
    known = {one.folder for one in plan.entries}
    wanted = {path for path in plan.wanted(plan.entries) if path.suffix == ".pt"}
    assert wanted and all(path.parent in known for path in wanted), "every weight that is named is trained"
