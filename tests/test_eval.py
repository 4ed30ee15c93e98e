"""Evaluation and experiments: what a condition changes and what it leaves, resuming, pictures of results, rows that are run once."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli
import eval as evaluation
from dev import experiments
import train_policy
from dev.plot import heat_map
from conftest import ROOT
from data.env import PERTURBATIONS, CONTROL_HZ, TabletopEnv
from data.robots import ROBOTS
from data.tasks import TASKS
from policy import PRESETS, PolicyConfig
from rollout import jerk


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_perturbation_changes_what_it_says_and_no_more(perturbation):
    plain, changed = TabletopEnv("panda", "StackCube"), TabletopEnv("panda", "StackCube", perturbation=perturbation)
    (before, told), (seen, new) = plain.reset(3), changed.reset(3)
    again = changed.reset(3)[0]
    assert all(np.array_equal(seen["images"][view], again["images"][view]) for view in seen["images"]) and np.array_equal(seen["state"], again["state"])
    assert not np.array_equal(seen["images"]["front"], before["images"]["front"]) and seen["instruction"] == before["instruction"]
    assert np.array_equal(plain.reset(3)[0]["images"]["front"], before["images"]["front"])             # the shared model is as it was
    moved = {name: np.subtract(new["layout"][name][0], told["layout"][name][0]) for name in told["layout"]}
    if perturbation == "outside":
        assert np.allclose(moved["cubeA"], moved["cubeB"]) and moved["cubeA"][2] == 0
        drawn = np.array([TASKS["StackCube"].spawn(plain.robot, np.random.default_rng(seed))["cubeA"][0] for seed in range(2000)])
        beyond = np.maximum(drawn.min(0) - new["layout"]["cubeA"][0], new["layout"]["cubeA"][0] - drawn.max(0))[:2].max()
        assert 0.015 < beyond < 0.025
    else:
        assert all((shift == 0).all() for shift in moved.values())
    difference = np.abs(seen["state"] - before["state"])
    assert difference.max() == 0 if perturbation != "noise" else 0 < difference.max() < 0.03
    if perturbation == "camera":
        shift = changed.model.camera("front").pos - plain.model.camera("front").pos
        turn = 2 * np.arccos(abs(changed.model.camera("front").quat @ plain.model.camera("front").quat))
        assert np.isclose(np.linalg.norm(shift), 0.02) and np.isclose(np.degrees(turn), 3, atol=1e-3)
    if perturbation == "distractor":
        cube = new["layout"]["clutter0"][0]
        assert all(np.hypot(*np.subtract(cube, place)[:2]) >= 0.1 for place, _ in told["layout"].values())


def test_demonstrations_vary_in_light_camera_and_clutter_and_evaluation_does_not():
    plain, varied = TabletopEnv("xarm6", "PickCube"), TabletopEnv("xarm6", "PickCube", varied="all")
    shifts, crowded, alike = [], 0, 0
    for seed in range(30):
        before, told = plain.reset(seed)
        seen, new = varied.reset(seed)
        shifts.append(np.linalg.norm(varied.model.camera("front").pos - plain.model.camera("front").pos))
        crowded += "clutter0" in new["layout"]
        assert varied.position("clutter0")[2] == (0.02 if "clutter0" in new["layout"] else -0.5)
        assert {name: place for name, place in new["layout"].items() if name != "clutter0"} == told["layout"] and seen["instruction"] == before["instruction"]
        alike += np.array_equal(seen["images"]["front"], before["images"]["front"])
    assert max(shifts) < 0.026 and 8 < sum(shift > 0 for shift in shifts) < 22 and 3 < crowded < 16 and 0 < alike < 12
    again = plain.reset(0)[0]["images"]["front"]
    assert np.array_equal(again, TabletopEnv("xarm6", "PickCube").reset(0)[0]["images"]["front"])


def test_an_arm_stops_at_the_distractor():
    env = TabletopEnv("panda", "PushCube", render=False, perturbation="distractor")
    env.reset(0)
    env.place("clutter0", env.data.geom_xpos[env.pads[0]])
    env.step(np.append(env.data.ctrl[:7], 0.04))
    assert any(env.model.geom("clutter0").id in contact.geom for contact in env.data.contact)


def test_an_unknown_perturbation_is_told():
    with pytest.raises(cli.UserError, match="unknown perturbation 'cam'.*lighting"):
        TabletopEnv("panda", "StackCube", perturbation="cam")


def test_jerk():
    t = np.arange(50) / CONTROL_HZ
    states = np.zeros((50, 17))
    states[:, 0] = t ** 3                                                # third derivative 6, in one joint of two
    states[:, 9] = 100 * t ** 3                                          # no joint
    assert np.isclose(jerk(states, 2), 3)
    assert jerk(states[:3], 2) == 0


def test_an_evaluation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    config = evaluation.PhysicalConfig(robots="widowx", tasks="PushCube", episodes=12, workers=1, out=str(tmp_path / "r.json"))
    part, ran = tmp_path / ".r.json.0.part", []
    whole = evaluation.physical("expert", config)
    lines = part.read_text().splitlines(keepends=True)
    assert len(lines) == 3 and whole["episodes"] == 12
    here = lambda workers: type("Pool", (), {"__enter__": lambda self: self, "__exit__": lambda *a: None,
                                           "imap_unordered": lambda self, f, jobs: (ran.append(job) or f(job) for job in jobs)})()
    monkeypatch.setattr(evaluation, "pool", here)
    part.write_text("".join(lines)[:-20])                                # killed while it wrote its last line
    same = evaluation.physical("expert", config)
    assert len(ran) == 1 and len(ran[0][-1]) in (2, 10) and same["cells"] == whole["cells"]
    assert part.read_text().splitlines(keepends=True) == lines
    evaluation.physical("expert", replace(config, seed=config.seed + 1, episodes=2))        # another evaluation: nothing of the old one counts
    assert len(ran) == 2 and len(part.read_text().splitlines()) == 2


def test_processes_share_an_evaluation(tmp_path, monkeypatch):
    config = lambda name: evaluation.PhysicalConfig(robots="widowx,panda", tasks="PushCube", episodes=12, workers=1, out=str(tmp_path / f"{name}.json"))
    alone = evaluation.physical("expert", config("alone"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        shared = evaluation.physical("expert", config("shared"))
        assert (shared is None) == (rank == 1)
    assert shared["cells"] == alone["cells"]
    parts = [len((tmp_path / f".shared.json.{rank}.part").read_text().splitlines()) for rank in (0, 1)]
    assert parts == [1 + 4, 1 + 2]                                       # rank 0 takes over what it found done


def test_pictures_of_results(tmp_path):
    from model import BLM
    result = {"cells": {robot: {task: {"success": 0.5, "interval": [0.4, 0.6]} for task in TASKS} for robot in ROBOTS}}
    heat_map(result, tmp_path / "map.png")
    assert np.asarray(Image.open(tmp_path / "map.png")).std() > 10
    config = evaluation.PhysicalConfig(failures=str(tmp_path / "failures"))
    evaluation.draw_failures(BLM.from_pretrained(ROOT / "weights" / "nano"), config, {"widowx": {"PushCube": {"failures": {1000000: "never grasped"}}}})
    with Image.open(tmp_path / "failures" / "never_grasped" / "widowx-PushCube-1000000.gif") as picture:
        assert picture.n_frames > 3


@pytest.mark.parametrize("name", experiments.ROWS)
def test_commands_of_experiments_are_right(name):
    config, steps = experiments.ExperimentConfig(backbone=str(ROOT / "weights" / "nano")), 0
    last = json.loads((ROOT / "weights" / "nano" / "config.json").read_text())["num_hidden_layers"]
    for train, evaluate, result in experiments.commands(name, config):
        flags, sizes = cli.parse(train_policy.TrainConfig, PolicyConfig, presets=PRESETS, argv=train[2:])
        measured = cli.parse(evaluation.PhysicalConfig, argv=evaluate[3:])
        assert flags.out == measured.weights and measured.out == result and (flags.robots, flags.tasks) == (measured.robots, measured.tasks)
        steps += flags.steps
        assert sizes.blind == (name == "blind") and sizes.intent_layer == (last if name == "last_block" else 3)
    assert abs(steps - config.steps * (0.3 if name[0] == "a" else 1)) <= 24


def test_a_row_is_run_once(tmp_path, monkeypatch, capsys):
    done = []

    def do(command):
        done.append(command[1])
        if command[1] == "train_policy.py":
            folder = Path(command[command.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / "training.json").write_text(json.dumps({"policy": {"step": int(command[command.index("--steps") + 1]), "seconds": 60, "figures": {"joint_error_rad": 0.0123}}}))
        else:
            robots, n = command[command.index("--robots") + 1], int(command[command.index("--episodes") + 1])
            cells = {robot: {task: {"success": 0.5, "episodes": n} for task in TASKS} for robot in (ROBOTS if robots == "all" else robots.split(","))}
            Path(command[command.index("--out") + 1]).write_text(json.dumps({"cells": cells, "seconds": 60}))

    monkeypatch.setattr(experiments, "do", do)
    argv = ["experiments.py", "--rows", "per_robot,full", "--out", str(tmp_path / "e"), "--results", str(tmp_path / "r.json"), "--backbone", str(ROOT / "weights/nano")]
    monkeypatch.setattr(sys, "argv", argv)
    experiments.main()
    found = json.loads((tmp_path / "r.json").read_text())
    assert len(done) == 10 and list(found["rows"]) == ["full", "per_robot"] and found["rows"]["full"]["mean"] == 0.5 and found["rows"]["per_robot"]["minutes"] == 8
    said = capsys.readouterr().out
    assert "| full |" in said and "| 12.3 |" in said
    experiments.main()
    assert len(done) == 10
    monkeypatch.setattr(sys, "argv", [*argv, "--steps", "7"])
    with pytest.raises(cli.UserError, match="2000 steps"):
        experiments.main()
