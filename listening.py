"""Does the policy do what the instruction says? Counted for eval.py told and eval.py plan.

`told` plays each scene with two of its commands, and with none, so a policy that ignores the
instruction succeeds in at most one of the two. `plan_goals` has the model list the commands of a
goal, carry them out and judge each.
"""

import itertools
from collections import defaultdict

from cli import at_least, choose_many, pick_device
from data import seeds
from data.families import FAMILIES, instruct, plain, sequence
from goal import DONE, GIVEN_UP, carry_out, go_home, pictures, pursue, write_plan
from jobs import in_order, run_jobs
from rollout import load_model, make_env, robots_of, rollout
from tables import percent, print_table, rate

# ---- one scene, several commands

# How a scene is played: (kind, number of the command that counts, instruction instead of it).
# In every second scene the wordings are held out.
PLAYS = [
    ("told", 0, None),
    ("told", 1, None),
    ("neutral", 0, "do something useful"),
    ("no words", 0, "."),
    ("off template", 0, None),  # the way people write
    ("new combination", 0, None),  # scene and command never combined in training
]


def play(job):
    """A rollout of a scene, in its own process: (the job's number, the result as a dict)."""
    number, config, robot, family, seed, (kind, command, instruction) = job
    env = make_env("tabletop", robot, family, render=False)
    held_out = seed % 2 == 1
    env.wordings = "held_out" if held_out else "seen"
    if kind == "off template":
        env.wordings = "off_template"
    # also watch the other of the two commands: a policy that ignores the instruction does it as
    # often
    result = rollout(
        load_model(config.weights, config.device),
        env,
        seed,
        instruction=instruction,
        command=command,
        other=1 - command,
        new=kind == "new combination",
    )
    return number, {
        "robot": robot,
        "family": family,
        "seed": seed,
        "kind": kind,
        "command": command,
        "held_out": held_out,
        "success": result["success"],
        "other": result["other"],
    }


def told_figures(rows):
    """Figures of the rows of `play`, as `rate`s by name."""
    done = defaultdict(list)  # by kind, and by seen or held-out wordings
    others = []
    scenes = defaultdict(list)
    for row in rows:
        success = row["success"]
        done[row["kind"]].append(success)
        if row["kind"] == "told":
            wordings = "held out" if row["held_out"] else "seen"
            done[wordings].append(success)
            others.append(row["other"])
            # for both of its commands
            scenes[row["robot"], row["family"], row["seed"]].append(success)
    return {
        "done": rate(done["told"]),
        "pairs": rate(map(all, scenes.values())),
        "other": rate(others),
        "neutral": rate(done["neutral"]),
        "no_words": rate(done["no words"]),
        "seen_wordings": rate(done["seen"]),
        "new_wordings": rate(done["held out"]),
        "off_template": rate(done["off template"]),
        "new_combination": rate(done["new combination"]),
    }


def run_scenes(function, config, *choices):
    """(rows, robots, families): function(job) for each robot, family, layout and choice, in order.

    config: a ToldConfig. Results that are None are left out.
    """
    at_least(config, 1, "scenes", "workers")
    at_least(config, 0, "seed")
    families = choose_many(config.families, FAMILIES, "family")
    config.device = str(pick_device(config.device))
    robots = robots_of(load_model(config.weights, config.device), config.robots)
    layouts = range(config.seed, config.seed + config.scenes)
    jobs = enumerate(itertools.product([config], robots, families, layouts, *choices))
    jobs = [(number, *job) for number, job in jobs]
    done = in_order(run_jobs(function, jobs, config.workers), len(jobs))
    return [row for _, row in done if row], robots, families


def told(what, config):
    """Is what the instruction says done, and not another command? The result as a dict."""
    rows, robots, families = run_scenes(play, config, PLAYS)
    tables = {}
    for family in families:
        tables[family] = told_figures(row for row in rows if row["family"] == family)
    total = told_figures(rows)
    lines = []
    for name, figures in [*tables.items(), ("all", total)]:
        lines.append([name, *map(percent, figures.values())])
    print_table(["family", *total], lines)
    cells = defaultdict(dict)
    for robot, family in itertools.product(robots, families):
        cell = [row for row in rows if (row["robot"], row["family"]) == (robot, family)]
        figures = told_figures(cell)
        failures = []
        for row in cell:
            # `sample.py --seed --command` draws these
            if row["kind"] == "told" and not row["success"]:
                failures.append(f"{row['seed']} command {row['command']}")
        cells[robot][family] = {
            "done": figures["done"],
            "pairs": figures["pairs"],
            "failures": failures,
        }
    return {**total, "families": tables, "cells": cells}


# ---- goals of several commands

# The model plans and judges for itself; for comparison it is given the right steps one by
# one, or the whole goal all the time, and the simulator judges.
WAYS = ("plan", "steps", "whole")


def follow_plan(blm, env, goal, commands, right):
    """Which of a goal's commands the model's own plan gets done; are plan and judgment right?

    right: the steps that the plan should list.
    """
    steps = write_plan(blm, pictures(env), goal)
    walk = carry_out(blm, env, steps)
    row = {"planned": steps == right, "done": [], "judged_right": []}
    for command in commands:
        env.begin(env.table.commands.index(command))
        step = next(walk, None)
        if step is None:  # the plan is too short
            break
        row["done"].append(env.succeeded())
        if step.outcome not in (DONE, GIVEN_UP):  # not started
            break
        row["judged_right"].append((step.outcome == DONE) == row["done"][-1])
        if step.outcome != DONE:
            break
    return row


def follow_words(blm, env, commands, sentences):
    """The same for a policy that is given one sentence for each command."""
    done = []
    for command, sentence in zip(commands, sentences):
        env.begin(env.table.commands.index(command))
        done.append(pursue(blm, env, sentence, env.succeeded)[0])
        if not done[-1]:
            break
        go_home(env)
    return {"done": done}


def pursue_goal(job):
    """A goal in a scene, in its own process: (the job's number, the result or None)."""
    number, config, robot, family, seed, length, way = job
    env = make_env("tabletop", robot, family, render=False)
    blm = load_model(config.weights, config.device)
    env.reset(seed)
    rng = seeds.rng(seed, "command", length)
    commands = sequence(env.table, length, rng)
    if not commands:
        return number, None
    # worded like recorded commands, not in the plain words of a plan
    goal = ", then ".join(instruct(env.table, command, rng) for command in commands)
    row = {
        "robot": robot,
        "family": family,
        "seed": seed,
        "length": length,
        "way": way,
        "goal": goal,
    }
    right = [plain(command.task, env.table.things(command)) for command in commands]
    if way == "plan":
        return number, row | follow_plan(blm, env, goal, commands, right)
    sentences = right if way == "steps" else [goal] * length
    return number, row | follow_words(blm, env, commands, sentences)


def plan_figures(rows, length):
    """Figures of the rows of `pursue_goal` with goals of this many commands, as `rate`s by name."""
    plans = [row for row in rows if row["way"] == "plan"]
    judged = itertools.chain(*(row["judged_right"] for row in plans))
    figures = {
        "planned": rate(row["planned"] for row in plans),
        "judged_right": rate(judged),
    }
    for way in WAYS:
        # [was it done?] for each goal, up to where it stopped
        done = [row["done"] for row in rows if row["way"] == way]
        figures[f"{way}_first"] = rate(steps[:1] == [True] for steps in done)
        figures[f"{way}_done"] = rate(sum(steps) == length for steps in done)
    return figures


def plan_goals(what, config):
    """Goals that the model lists as commands, carries out and judges. The result as a dict."""
    rows, _, _ = run_scenes(pursue_goal, config, (2, 3), WAYS)
    lines = []
    lengths = {}
    for length in (2, 3):
        figures = plan_figures([row for row in rows if row["length"] == length], length)
        lengths[length] = figures
        number = figures["planned"]["n"]
        lines.append([f"{length} commands", number, *map(percent, figures.values())])
    print_table(["goals of", "number", *lengths[2]], lines)
    return {"lengths": lengths, "goals": rows}
