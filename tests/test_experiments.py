import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import cli
import eval as evaluation
import train_policy
from data.robots import ROBOTS
from data.tasks import TASKS
from dev import experiments
from policy import PRESETS, PolicyConfig


@pytest.mark.parametrize("name", experiments.ROWS)
def test_commands_of_experiments_are_right(name):
    config, steps = experiments.ExperimentConfig(backbone=str(ROOT / "weights" / "nano")), 0
    last = json.loads((ROOT / "weights" / "nano" / "config.json").read_text())["num_hidden_layers"]
    for train, evaluate, result in experiments.commands(name, config):
        flags, sizes = cli.parse(
            train_policy.TrainConfig, PolicyConfig, presets=PRESETS, argv=train[2:]
        )
        measured = cli.parse(evaluation.PhysicalConfig, argv=evaluate[3:])
        assert (
            flags.out == measured.weights
            and measured.out == result
            and (flags.robots, flags.tasks) == (measured.robots, measured.tasks)
        )
        steps += flags.steps
        assert sizes.blind == (name == "blind") and sizes.intent_layer == (
            last if name == "last_block" else 3
        )
    assert abs(steps - config.steps * (0.3 if name[0] == "a" else 1)) <= 24


def test_a_row_is_run_once(tmp_path, monkeypatch, capsys):
    done = []

    def do(command):
        done.append(command[1])
        if command[1] == "train_policy.py":
            folder = Path(command[command.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / "training.json").write_text(
                json.dumps(
                    {
                        "policy": {
                            "step": int(command[command.index("--steps") + 1]),
                            "seconds": 60,
                            "figures": {"joint_error_rad": 0.0123},
                        }
                    }
                )
            )
        else:
            robots, n = (
                command[command.index("--robots") + 1],
                int(command[command.index("--episodes") + 1]),
            )
            cells = {
                robot: {task: {"success": 0.5, "episodes": n} for task in TASKS}
                for robot in (ROBOTS if robots == "all" else robots.split(","))
            }
            Path(command[command.index("--out") + 1]).write_text(
                json.dumps({"cells": cells, "seconds": 60})
            )

    monkeypatch.setattr(experiments, "do", do)
    argv = [
        "experiments.py",
        "--rows",
        "per_robot,full",
        "--out",
        str(tmp_path / "e"),
        "--results",
        str(tmp_path / "r.json"),
        "--backbone",
        str(ROOT / "weights/nano"),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    experiments.main()
    found = json.loads((tmp_path / "r.json").read_text())
    assert (
        len(done) == 10
        and list(found["rows"]) == ["full", "per_robot"]
        and found["rows"]["full"]["mean"] == 0.5
        and found["rows"]["per_robot"]["minutes"] == 8
    )
    said = capsys.readouterr().out
    assert "| full |" in said and "| 12.3 |" in said
    experiments.main()
    assert len(done) == 10
    monkeypatch.setattr(sys, "argv", [*argv, "--steps", "7"])
    with pytest.raises(cli.UserError, match="2000 steps"):
        experiments.main()
