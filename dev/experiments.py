"""What each part of the method is worth: policies trained with one thing changed, the same number of steps, the same evaluation.

    python experiments.py                      every row that results/experiments.json lacks, one after the other
    python experiments.py --rows blind,full    some
    python experiments.py --list               what they are, and the commands of each

A row is a list of runs of train_policy.py, each followed by eval.py physical: the commands are printed and kept with the result. A row of several models
shares the steps among them. Rows that were stopped go on; the table is printed after every row. Two terminals, each
with --rows of its own, may share a result file.
"""
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, at_least, choose_many, parse, run

from files import writable, write_json
from data.robots import ROBOTS
from data.tasks import TASKS
from data.scoring import wilson
from trainer import checkpoints
from files import find_folder, read_json
from vlm import load_config

HELD_OUT = "widowx"                                  # the robot that comes later
REST = ",".join(robot for robot in ROBOTS if robot != HELD_OUT)
ALL = [("all", "all", 1)]                            # (robots, tasks, share of the steps) of each model of a row
ROWS = {                                             # name: (what it asks, flags of train_policy.py, models)
    "full": ("the method: 100 demonstrations a cell, one model for all", "--demonstrations 100", ALL),
    "no_stage_1": ("the base backbone, before Stage I", "--demonstrations 100 --backbone {base}", ALL),
    "blind": ("no intent: the robot's state alone", "--demonstrations 100 --no-use_intent", ALL),
    "no_future": ("no future-prediction loss", "--demonstrations 100 --future_loss_weight 0", ALL),
    "last_block": ("intent from the last block instead of block k", "--demonstrations 100 --intent_layer {last}", ALL),
    "per_robot": ("one model for each robot", "--demonstrations 100", [(robot, "all", 1 / len(ROBOTS)) for robot in ROBOTS]),
    "per_cell": ("one model for each robot and task", "--demonstrations 100", [(robot, task, 1 / len(ROBOTS) / len(TASKS)) for robot in ROBOTS for task in TASKS]),
    "50_demonstrations": ("50 demonstrations a cell", "--demonstrations 50", ALL),
    "25_demonstrations": ("25 demonstrations a cell", "--demonstrations 25", ALL),
    "corrections": ("all demonstrations and all corrections", "", ALL),
    "three_robots": (f"without {HELD_OUT}", "--demonstrations 100", [(REST, "all", 1)]),
    **{f"{way}_{n}": (f"{HELD_OUT} with {n} demonstrations a task, " + about, f"--demonstrations {n}" + flags, [(HELD_OUT, "all", 0.3)])
       for n in (10, 25) for way, about, flags in (("adapted", "its own layers added to the model of the other three", " --start {out}/{steps}-steps/three_robots/0"),
                                                   ("alone", "a model of its own, for comparison", ""))},
}


@dataclass
class ExperimentConfig:
    rows: str = "all"                                # comma-separated rows, or all
    steps: int = 2000                                # optimiser steps of a row
    episodes: int = 20                               # evaluation episodes of each robot and task
    data: str = "out/demos"                          # folder of demonstrations
    base: str = "weights/base"                       # model folder of the base stage, for no_stage_1
    backbone: str = "weights/nano"                   # model folder whose language model all other rows read
    dtype: str = "auto"                              # of train_policy.py
    out: str = "out/experiments"                     # folder for the trained policies
    results: str = "results/experiments.json"        # result file; rows that it holds are not run again
    list: bool = False                               # print the rows and their commands, run nothing


def commands(name, config):
    """[(train command, evaluate command, result file)] of a row, as lists of words."""
    _, flags, models = ROWS[name]
    last = load_config(find_folder(config.backbone)).num_hidden_layers if "{last}" in flags else 0
    flags, made = flags.format(base=config.base, last=last, out=config.out, steps=config.steps).split(), []
    flags += [] if "--backbone" in flags else ["--backbone", config.backbone]
    for i, (robots, tasks, share) in enumerate(models):
        folder = f"{config.out}/{config.steps}-steps/{name}/{i}"
        result = f"{folder}-{config.episodes}-episodes.json"
        steps = max(1, round(config.steps * share))
        chosen = ["--robots", robots, "--tasks", tasks]
        made.append((["python", "train_policy.py", "--data", config.data, "--out", folder, "--steps", str(steps), "--eval_every", str(steps), "--dtype", config.dtype, *chosen, *flags],
                     ["python", "eval.py", "physical", "--weights", folder, "--episodes", str(config.episodes), "--out", result, *chosen], result))
    return made


def do(command):
    print("\n" + shlex.join(command), flush=True)
    if subprocess.run([sys.executable, *command[1:]]).returncode:
        raise UserError(f"stopped in `{shlex.join(command)}`: mend what it says, then run this again; what is done is kept")


def experiment(name, config):
    """Train and evaluate a row: its entry of the result file."""
    cells, seconds, figures, listed = {}, 0.0, [], commands(name, config)
    for train, evaluate, result in listed:
        folder, steps = Path(train[train.index("--out") + 1]), int(train[train.index("--steps") + 1])
        begun = folder / "training.json"
        if not begun.exists() or json.loads(begun.read_text())["policy"]["step"] < steps:
            do(train + ["--resume"] * bool(checkpoints(folder)))
        if not Path(result).exists():
            do(evaluate)
        measured = json.loads(Path(result).read_text())
        trained = json.loads(begun.read_text())["policy"]
        seconds, figures = seconds + trained["seconds"] + measured["seconds"], figures + [trained["figures"]]
        for robot, row in measured["cells"].items():
            cells.setdefault(robot, {}).update({task: [round(cell["success"] * cell["episodes"]), cell["episodes"]] for task, cell in row.items()})
    flat = [cell for row in cells.values() for cell in row.values()]
    wins, n = map(sum, zip(*flat))
    return {"about": ROWS[name][0], "mean": sum(w / e for w, e in flat) / len(flat), "interval": [round(x, 3) for x in wilson(wins, n)], "cells": cells,
            "validation": {key: round(sum(f[key] for f in figures) / len(figures), 5) for key in figures[0]}, "minutes": round(seconds / 60, 1), "commands": [shlex.join(command) for pair in listed for command in pair[:2]]}


def table(found):
    """The rows as markdown: success in % for each robot, the mean and its 95% interval, the error of joint targets on the row's held-out episodes in mrad."""
    lines = ["| row | what changes | " + " | ".join(ROBOTS) + " | mean | 95% interval | off, mrad |", "|---" * (len(ROBOTS) + 5) + "|"]
    for name, row in found["rows"].items():
        means = [sum(w / n for w, n in row["cells"][robot].values()) / len(row["cells"][robot]) if robot in row["cells"] else None for robot in ROBOTS]
        low, high = row["interval"]
        lines.append(f"| {name} | {row['about']} | " + " | ".join("" if m is None else f"{100 * m:.0f}" for m in means)
                     + f" | {100 * row['mean']:.1f} | {100 * low:.1f} to {100 * high:.1f} | {1000 * row['validation']['joint_error_rad']:.1f} |")
    return "\n".join(lines)


def main():
    config = parse(ExperimentConfig, description="Train and evaluate the policy with one thing changed at a time.")
    rows = choose_many(config.rows, ROWS, "row")
    at_least(config, 1, "steps", "episodes")
    if config.list:
        for name in rows:
            print(f"\n{name}: {ROWS[name][0]}", *(f"    {shlex.join(command)}" for pair in commands(name, config) for command in pair[:2]), sep="\n")
        return
    path = Path(config.results)
    found = read_json(path) if path.exists() else {"steps": config.steps, "episodes": config.episodes, "rows": {}}
    if "rows" not in found or (found["steps"], found["episodes"]) != (config.steps, config.episodes):
        holds = f"rows of {found['steps']} steps and {found['episodes']} episodes: take those" if "rows" in found else "no rows"
        raise UserError(f"{path} holds {holds}, or name another file with --results")
    writable(path.parent)
    for name in rows:
        if name in found["rows"]:
            continue
        made = experiment(name, config)
        found = read_json(path) if path.exists() else found  # another terminal may have added rows
        found["rows"] = {row: (found["rows"] | {name: made})[row] for row in ROWS if row in found["rows"] or row == name}
        write_json(path, found)
        print("\n" + table(found), flush=True)
    print(table(found))


if __name__ == "__main__":
    run(main)
