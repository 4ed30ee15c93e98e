"""What one set of weights can do: drive in 24 cells (four robots, six tasks), and answer.

    python eval.py expert           the planner that makes the demonstrations
    python eval.py physical         the policy, told in wordings that it was not trained on
    python eval.py perturbations    the policy again, with one thing of the scene changed at a time
    python eval.py digital          questions about pictures, beside chance and beside noise

Layout seeds start beyond those of every demonstration; the same seeds give the same table. Results
are JSON with the command that made them, printed as tables in markdown.
"""

import functools
import itertools
import math
import shlex
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm, trange

from cli import UserError, at_least, choose, choose_many, parse, pick_device, run
from data.conversations import Conversations
from data.env import CONTROL_HZ, PERTURBATIONS, TabletopEnv
from data.expert import demonstrate
from data.robots import ROBOTS
from data.scoring import FORMS, distance, is_right, soft, wilson
from data.seeds import FIRST_EVALUATION
from data.tasks import TASKS
from files import reading, writable, write_json
from jobs import run_jobs
from rollout import EXECUTE_STEPS, draw_episode, jerk, robots_of, rollout

JOB = 10  # episodes that a process does before it takes the next
MOST_TOKENS = 256  # of a reply
COLUMNS = ("chance", "blind", "base", "model", "seen", "held_out", "soft")
DTYPES = ("float32", "bfloat16", "float16")
# what a question is when its file does not say
DEFAULTS = {"category": "all", "form": "open", "chance": 0.0, "held_out": False}
# BLM1, arXiv 2510.24161: success in % over 50 episodes a cell, in ManiSkill; columns as in TASKS
PAPER = {
    "panda": (86, 100, 100, 60, 96, 66),
    "xarm6": (92, 100, 100, 86, 94, 10),
    "xarm7": (72, 88, 100, 56, 78, 54),
    "widowx": (100, 68, 84, 44, 2, 84),
}


@dataclass
class ExpertConfig:
    robots: str = "all"  # comma-separated robots, or all
    tasks: str = "all"  # comma-separated tasks, or all
    episodes: int = 50  # episodes of each robot and task
    seed: int = FIRST_EVALUATION  # first layout seed
    workers: int = 2  # processes
    out: str = ""  # result file; default out/results/<what>.json


@dataclass
class PhysicalConfig(ExpertConfig):
    weights: str = "weights/nano"  # checkpoint folder
    device: str = "auto"  # auto, cpu, cuda or mps
    execute_steps: int = EXECUTE_STEPS  # steps of a chunk before the policy looks again
    temperature: float = 0.0  # of the noise that a chunk flows from; 0 is deterministic
    instruction: str = ""  # what to tell the robot, with one of --tasks; empty: held-out wordings
    failures: str = ""  # folder for GIFs of failed episodes, sorted by reason; empty: none


@dataclass
class DigitalConfig:
    weights: str = "weights/nano"  # checkpoint folder
    base: str = ""  # another one to stand beside, such as the one before Stage I
    data: str = "out/corpus/val.jsonl,out/general/probes.jsonl"  # conversations with questions
    questions: int = 50  # of each category in seen wordings, and as many in held-out ones; 0: all
    batch_size: int = 16  # questions at a time
    seed: int = 0  # which of the questions
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "float32"  # of the language model; bfloat16 for large ones on a GPU
    out: str = ""  # result file; default out/results/digital.json


@functools.cache  # once in a process: weights that change meanwhile must not matter
def load(folder, device, dtype="float32"):
    import torch  # slow to load, and the expert needs none

    from model import BLM

    return BLM.from_pretrained(folder, device, getattr(torch, dtype))


# ---- driving


def work(job):
    """Some episodes of one cell, in a process of its own: (cell, [{"seed", "success", ...}])."""
    config, cell, seeds = job
    perturbation, robot, task = cell
    acts = isinstance(config, PhysicalConfig)
    env = TabletopEnv(robot, task, render=False, held_out=acts, perturbation=perturbation)
    episodes = []
    for seed in seeds:
        if acts:
            blm = load(config.weights, config.device)
            options = (config.execute_steps, config.temperature, config.instruction or None)
            episode = rollout(blm, env, seed, *options)
        else:
            shown = demonstrate(env, seed)
            episode = {"success": bool(shown.success), "steps": len(shown.states), "reason": ""}
            episode["jerk"] = jerk(shown.states, env.robot.dof)
        episodes.append({"seed": seed, **episode})
        if acts and config.failures and not episode["success"]:  # once more, the same way
            folder = Path(config.failures) / perturbation / episode["reason"].replace(" ", "_")
            draw_episode(blm, env, seed, folder, *options)
    env.close()
    return cell, episodes


def run_cells(config, cells):
    """{cell: [one dict an episode, in the order of seeds]}, from all processes."""
    jobs = []
    end = config.seed + config.episodes
    for cell in cells:  # in jobs of a few episodes, so that no process is idle at the end
        for first in range(config.seed, end, JOB):
            jobs.append((config, cell, range(first, min(first + JOB, end))))
    found = {cell: [] for cell in cells}
    with tqdm(total=len(cells) * config.episodes, unit="episode") as bar:
        for cell, episodes in run_jobs(work, jobs, config.workers):
            found[cell] += episodes
            bar.update(len(episodes))
    for episodes in found.values():  # which job ended first must not matter
        episodes.sort(key=lambda episode: episode["seed"])
    return found


def summary(episodes):
    """Success, its 95% interval, mean seconds to success and jerk (rad/s^3) of some episodes."""
    steps = [e["steps"] for e in episodes if e["success"]]
    return {
        "success": len(steps) / len(episodes),
        "episodes": len(episodes),
        "interval": np.round(wilson(len(steps), len(episodes)), 4).tolist(),
        "seconds_to_success": round(np.mean(steps) / CONTROL_HZ, 2) if steps else None,
        "jerk": round(np.mean([e["jerk"] for e in episodes]), 1),
    }


def choose_cells(what, config):
    """[(perturbation or "", robot, task)] of the flags. UserError for what is wrong with them."""
    at_least(config, 1, "episodes", "workers")
    at_least(config, 0, "seed")
    robots = choose_many(config.robots, ROBOTS, "robot")
    tasks = choose_many(config.tasks, TASKS, "task")
    changes = ["", *PERTURBATIONS] if what == "perturbations" else [""]
    if what != "expert":
        at_least(config, 1, "execute_steps")
        at_least(config, 0, "temperature")
        config.device = str(pick_device(config.device))
        blm = load(config.weights, config.device)  # a bad folder is told here, once
        robots = robots_of(blm, config.robots)
        horizon = blm.policy.config.action_horizon
        if config.execute_steps > horizon:
            raise UserError(f"--execute_steps {config.execute_steps}: a chunk has {horizon} steps")
        if config.instruction and len(tasks) > 1:
            raise UserError(f"--instruction {config.instruction!r}: name its one task with --tasks")
    return list(itertools.product(changes, robots, tasks))


def physical(what, config):
    """Success in %: a row a robot, or a row a perturbation of all robots. The result as a dict."""
    episodes = run_cells(config, choose_cells(what, config))
    cells = {}
    for (change, robot, task), own in episodes.items():
        name = (change or "unchanged") if what == "perturbations" else robot
        cells.setdefault(name, {}).setdefault(task, []).extend(own)
    flat = list(itertools.chain(*episodes.values()))
    rows = []
    for name, row in cells.items():
        for task, own in row.items():
            row[task] = summary(own)
            if name in ROBOTS:  # in a row of all robots a seed names no episode
                row[task]["failures"] = {e["seed"]: e["reason"] for e in own if not e["success"]}
        rates = [cell["success"] for cell in row.values()]
        texts = [f"{100 * rate:.0f}" for rate in rates]
        if what == "physical" and name in PAPER:
            paper = dict(zip(TASKS, PAPER[name]))
            texts = [f"{text} ({paper[task]})" for text, task in zip(texts, row)]
        rows.append([name, *texts, f"{100 * np.mean(rates):.1f}"])

    result = {"what": what, **summary(flat), "cells": cells}
    result["mean"] = result["success"]  # of cells too: each has as many episodes
    result["reasons"] = Counter(e["reason"] for e in flat if not e["success"])
    if what != "expert":
        result["act_ms"] = 1000 * np.mean([e["act_s"] for e in flat])
        result["clipped_steps"] = Counter()  # targets beyond a joint's range, or its speed
        for episode in flat:
            result["clipped_steps"].update(episode["clipped"], of=episode["steps"])
    print_table(["", *row, "mean"], rows)
    print(f"\nmean {100 * result['mean']:.2f}% of {len(flat)}; failures {dict(result['reasons'])}")
    if what == "physical":
        print("in brackets: BLM1 in ManiSkill, another simulator; its mean is 75.83%")
    return result


# ---- answering


def draw_questions(source, config):
    """[(pictures, row, question)] of a file: `config.questions` of each category and wording."""
    left = defaultdict(lambda: config.questions or math.inf)
    asked = []
    for i in np.random.default_rng(config.seed).permutation(len(source)).tolist():
        with reading(source.name(i), 'wanted: {"images", "questions": [{"question", "answer"}]}'):
            row = source.row(i)
            for record in row.record["questions"]:
                question = DEFAULTS | record
                choose(question["form"], FORMS, "form")
                is_right(question, "")  # so that whatever a score needs is missed now
                kind = (question["category"], question["held_out"])
                left[kind] -= 1
                if left[kind] >= 0:
                    asked.append((len(row.media), i, question))
    # neighbors are asked together: alike in length, so little is padding
    return sorted(asked, key=lambda one: (one[0], len(one[2]["question"])))


def noise(pictures, rng):
    """Random pictures as large as these; a video is a list of them."""
    if isinstance(pictures, list):
        return [noise(picture, rng) for picture in pictures]
    width, height = pictures.size
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def ask(blm, source, asked, config, name):
    """A model's replies to `draw_questions`; as "blind" it sees noise for pictures."""
    rng = np.random.default_rng(config.seed)
    replies = []
    for first in trange(0, len(asked), config.batch_size, desc=name):
        media = []  # read again for each model: a benchmark's films do not all fit into memory
        questions = []
        for _, i, question in asked[first : first + config.batch_size]:
            shown = [what for _, what in source.row(i).media]
            media.append(noise(shown, rng) if name == "blind" else shown)
            questions.append(question["question"])
        replies += blm.answers(media, questions, max_new_tokens=MOST_TOKENS)
    return replies


def score(question, replies):
    """{column: true, false or a number} of one question, from {model: its reply}."""
    row = {name: is_right(question, reply) for name, reply in replies.items()}
    row["chance"] = question["chance"]
    # right in wordings that training saw, or in those that it did not
    row["held_out" if question["held_out"] else "seen"] = row["model"]
    if question["form"] == "open":
        row["soft"] = soft(replies["model"], question["answer"])
    if question["form"] == "point":
        row["px"] = distance(replies["model"], question["answer"])
    return row


def averages(rows):
    """{column: mean over the rows that have it}."""
    means = {}
    for column in COLUMNS:
        values = [row[column] for row in rows if column in row]
        if values:
            means[column] = float(np.mean(values))
    return means


def accuracy(categories):
    """{"means", "categories", ...} of {category: rows of `score`}, its table printed, in %."""
    rates = {}
    for category, rows in sorted(categories.items(), key=str):
        interval = wilson(sum(row["model"] for row in rows), len(rows))
        rates[category] = {"asked": len(rows), **averages(rows)}
        rates[category]["interval"] = np.round(interval, 3).tolist()
    means = averages(rates.values())  # a category counts as much as another
    lines = []
    for name, row in [*rates.items(), ("mean", means)]:
        texts = [f"{100 * row[column]:.1f}" if column in row else "" for column in means]
        ends = [f"{100 * end:.0f}" for end in row.get("interval", ())]
        lines.append([name, row.get("asked", ""), *texts, " to ".join(ends)])
    print_table(["category", "asked", *means, "95% interval of model"], lines)
    result = {"means": means, "categories": rates}
    pixels = [row["px"] for rows in categories.values() for row in rows if "px" in row]
    if pixels:
        result["point_error_px_median"] = float(np.median(pixels))
        print(f"pointing error, median: {result['point_error_px_median']:.1f} px")
    return result


def digital(what, config):
    """A table for every file of questions, printed; the result as a dict."""
    at_least(config, 1, "batch_size")
    at_least(config, 0, "questions", "seed")
    choose(config.dtype, DTYPES, "dtype")
    device = pick_device(config.device)
    # models and files are opened before any work, so that a bad one is told at once
    folders = {"blind": config.weights, "base": config.base, "model": config.weights}
    models = {name: load(path, device, config.dtype) for name, path in folders.items() if path}
    sources = {path: Conversations(path) for path in config.data.split(",")}
    files = {}
    for path, source in sources.items():
        asked = draw_questions(source, config)
        replies = {name: ask(blm, source, asked, config, name) for name, blm in models.items()}
        categories = defaultdict(list)  # what came of each question
        for i, (*_, question) in enumerate(asked):
            given = {name: texts[i] for name, texts in replies.items()}
            categories[question["category"]].append(score(question, given))
        print(f"\n{path}\n")
        files[path] = accuracy(categories)
    return {"what": what, "files": files}


def print_table(head, rows):
    """In markdown."""
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(map(str, row)) + " |")


KINDS = {
    "expert": (physical, ExpertConfig),
    "physical": (physical, PhysicalConfig),
    "perturbations": (physical, PhysicalConfig),
    "digital": (digital, DigitalConfig),
}


def main():
    what = sys.argv[1] if sys.argv[1:] else ""
    if what in ("-h", "--help"):
        print(f"{__doc__}\npython eval.py <what> --help lists the flags")
        return
    evaluate, config_class = KINDS[choose(what, KINDS, "evaluation")]
    config = parse(config_class, description=__doc__.split("\n")[0], argv=sys.argv[2:])
    out = Path(config.out or f"out/results/{what}.json")
    if out.suffix != ".json" or out.is_dir():
        raise UserError(f"--out {out}: name a .json file")
    writable(out.parent)
    start = time.time()
    result = evaluate(what, config)
    result["command"] = shlex.join(["python", *sys.argv])
    result["seconds"] = round(time.time() - start)
    result["config"] = asdict(config)
    write_json(out, result)
    print(f"written to {out}")


if __name__ == "__main__":
    run(main)
