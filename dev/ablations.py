"""What each part of the method contributes: a table of policies trained with one change each.

    sh runs/ablations.sh                                    train and evaluate them
    python -m dev.ablations --runs out/ablations            collect them in results/ablations.json
    python -m dev.ablations                                 print the table of that file again

A row is one model or several that share the row's training steps: <runs>/<row>/<number>, with the
evaluation next to it in <number>.json.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli import UserError, parse, run
from data.robots import ROBOTS
from data.scoring import wilson
from files import read_json, reading, whole_files, write_json

ROWS = {  # name: what changes
    "full": "the method: 100 demonstrations a cell, one model for all",
    "no_stage_1": "the base backbone, before Stage I",
    "no_intent": "no intent: the robot's state alone",
    "no_future": "no future-prediction loss",
    "last_block": "intent from the last block instead of block k",
    "per_robot": "one model for each robot",
    "per_cell": "one model for each robot and task",
    "50_demonstrations": "50 demonstrations a cell",
    "25_demonstrations": "25 demonstrations a cell",
    "corrections": "all demonstrations and all corrections",
    "three_robots": "without widowx",
    "adapted_10": "widowx with 10 demonstrations a task, its own layers added to that of the three",
    "alone_10": "widowx with 10 demonstrations a task, a model of its own",
    "adapted_25": "widowx with 25 demonstrations a task, its own layers added to that of the three",
    "alone_25": "widowx with 25 demonstrations a task, a model of its own",
}


@dataclass
class AblationConfig:
    runs: str = ""  # folder of runs/ablations.sh to collect; empty: only print
    results: str = "results/ablations.json"  # result file


def gather(folder, about):
    """The row of a folder: success over all its models, {robot: {task: [wins, episodes]}}."""
    cells = {}
    commands = []
    errors = []
    seconds = 0.0
    for path in whole_files(folder, "*.json"):
        with reading(path):
            evaluated = read_json(path)
            trained = read_json(path.with_suffix("") / "training.json")["policy"]
            seconds += evaluated["seconds"] + trained["seconds"]
            commands += [trained["command"], evaluated["command"]]
            errors.append(trained["figures"]["joint_error_rad"])
            for robot, row in evaluated["cells"].items():
                for task, cell in row.items():
                    wins = round(cell["success"] * cell["episodes"])
                    cells.setdefault(robot, {})[task] = [wins, cell["episodes"]]
    pairs = np.array([pair for row in cells.values() for pair in row.values()])
    wins, episodes = pairs.sum(0).tolist()
    return {
        "about": about,
        "mean": float((pairs[:, 0] / pairs[:, 1]).mean()),
        "interval": np.round(wilson(wins, episodes), 3).tolist(),
        "cells": cells,
        "validation": {"joint_error_rad": round(float(np.mean(errors)), 5)},
        "minutes": round(seconds / 60, 1),
        "commands": commands,
    }


def table(rows):
    """Markdown: success in % for each robot and overall, error of joint targets in mrad.

    The error is measured on held-out episodes of the row's own data.
    """
    head = ["row", "what changes", *ROBOTS, "mean", "95% interval", "off, mrad"]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        line = [name, row["about"]]
        for robot in ROBOTS:
            cells = row["cells"].get(robot, {})
            rates = [wins / episodes for wins, episodes in cells.values()]
            line.append(f"{100 * np.mean(rates):.0f}" if rates else "")
        low, high = row["interval"]
        line.append(f"{100 * row['mean']:.1f}")
        line.append(f"{100 * low:.1f} to {100 * high:.1f}")
        line.append(f"{1000 * row['validation']['joint_error_rad']:.1f}")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    config = parse(AblationConfig, description=__doc__.split("\n")[0])
    if config.runs:
        folders = {name: Path(config.runs) / name for name in ROWS}
        done = {name: folder for name, folder in folders.items() if whole_files(folder, "*.json")}
        if not done:
            raise UserError(
                f"{config.runs} holds no finished row: run `sh runs/ablations.sh` first"
            )
        rows = {name: gather(folder, ROWS[name]) for name, folder in done.items()}
        write_json(config.results, {"rows": rows})
    with reading(config.results):
        print(table(read_json(config.results)["rows"]))


if __name__ == "__main__":
    run(main)
