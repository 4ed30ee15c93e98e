"""Evaluation: the same seeds give the same table, in any number of processes; nothing is mixed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import eval as evaluation
from data.env import CONTROL_HZ, PERTURBATIONS
from data.robots import ROBOTS
from data.tasks import TASKS
from rollout import jerk

NANO = str(ROOT / "weights" / "nano")


def test_jerk():
    t = np.arange(50) / CONTROL_HZ
    states = np.zeros((50, 17))
    states[:, 0] = t**3  # third derivative 6, in one joint of two
    states[:, 9] = 100 * t**3  # no joint
    assert np.isclose(jerk(states, 2), 3)
    assert jerk(states[:3], 2) == 0


def test_processes_share_an_evaluation():
    config = evaluation.ExpertConfig(robots="widowx,panda", tasks="PushCube", episodes=12)
    config.workers = 1
    alone = evaluation.physical("expert", config)
    config.workers = 2
    shared = evaluation.physical("expert", config)
    assert shared == alone
    assert alone["episodes"] == 24
    assert list(alone["cells"]) == ["widowx", "panda"]


def test_the_shipped_weights_give_the_shipped_table(tmp_path, monkeypatch, capsys):
    known = json.loads((ROOT / "results" / "physical.json").read_text())
    argv = "eval.py physical --robots widowx --tasks PushCube --episodes 2 --workers 1 --out"
    monkeypatch.setattr(sys, "argv", [*argv.split(), str(tmp_path / "r.json")])
    evaluation.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert known.keys() <= result.keys()
    cell = result["cells"]["widowx"]["PushCube"]
    assert cell.keys() == known["cells"]["widowx"]["PushCube"].keys()
    assert cell["success"] == known["cells"]["widowx"]["PushCube"]["success"] == 1
    assert "| widowx | 100 (68) | 100.0 |" in capsys.readouterr().out


def test_a_failure_is_drawn_and_has_its_reason(tmp_path):
    config = evaluation.PhysicalConfig(device="cpu", failures=str(tmp_path))
    _, (episode,) = evaluation.work((config, ("", "widowx", "PickCube"), [1_000_003]))
    assert not episode["success"]
    assert episode["reason"] == "held to the end"
    with Image.open(tmp_path / "held_to_the_end" / "widowx-PickCube-1000003.gif") as picture:
        assert picture.n_frames > 3


def test_weights_that_change_meanwhile_do_not_matter(tmp_path):
    folder = tmp_path / "nano"
    shutil.copytree(NANO, folder)
    first = evaluation.load(str(folder), "cpu")
    shutil.rmtree(folder)
    assert evaluation.load(str(folder), "cpu") is first


def here(function, jobs, workers):
    """run_jobs in this process: a fifth of the episodes fail, and under noise all."""
    for _, cell, seeds in jobs:
        episodes = []
        for seed in seeds:
            success = cell[0] != "noise" and seed % 5 > 0
            episode = {"seed": seed, "success": success, "steps": 40, "jerk": 1.0, "act_s": 0.01}
            episode["clipped"] = {"limits": 0, "speed": 1}
            episode["reason"] = "" if success else "never grasped"
            episodes.append(episode)
        yield cell, episodes


def test_perturbations_are_rows(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "run_jobs", here)
    config = evaluation.PhysicalConfig(device="cpu", weights=NANO, episodes=15)
    result = evaluation.physical("perturbations", config)
    assert list(result["cells"]) == ["unchanged", *PERTURBATIONS]
    cell = result["cells"]["camera"]["PickCube"]
    assert (cell["success"], cell["episodes"]) == (0.8, 15 * len(ROBOTS))
    assert result["cells"]["noise"]["StackCube"]["success"] == 0
    assert result["mean"] == pytest.approx(0.8 * 6 / 7)
    assert result["reasons"] == {"never grasped": (6 * 3 + 15) * len(ROBOTS) * len(TASKS)}
    assert result["clipped_steps"]["speed"] == result["episodes"] == 15 * 7 * 24
    assert "| camera | 80 |" in capsys.readouterr().out


def test_a_killed_worker_ends_the_evaluation(tmp_path):
    command = f"eval.py expert --episodes 5000 --workers 2 --out {tmp_path}/r.json".split()
    run = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    workers = []
    while len(workers) < 2:
        time.sleep(0.2)
        for pid in children.read_text().split():
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() and pid not in workers:
                workers.append(pid)
    os.kill(int(workers[0]), signal.SIGKILL)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "a worker was killed" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())
