"""Evaluate one set of weights: driving in 24 cells (four robots, six tasks), and answering.

    python eval.py expert           the scripted expert that records the demonstrations
    python eval.py physical         the policy, with instructions in held-out wordings
    python eval.py perturbations    the policy, with one property of the scene changed at a time
    python eval.py delays           the policy with delay, on an arm that does not wait for it
    python eval.py told             scenes that allow several commands, played with different ones
    python eval.py plan             goals of two and three commands: planned, carried out, judged
    python eval.py replay           held-out recordings: what would the policy have done instead?
    python eval.py metaworld        Meta-World's 50 tasks, in its own simulator (data/metaworld.py)
    python eval.py libero           20 tasks of LIBERO, in its own simulator (data/libero.py)
    python eval.py maniskill        ManiSkill's six tasks, in its own simulator (data/maniskill.py)
    python eval.py digital          questions about images, compared with chance and with noise

Layout seeds start above those of all demonstrations; the same seeds give the same table. Results
are stored as JSON with their command, and printed as markdown tables. They list the seed of each
failed episode: `sample.py --seed` draws it.
"""

import itertools
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import trange

from cli import UserError, at_least, choose, choose_many, command_line, parse, pick_device, run
from data import seeds
from data.conversations import Conversations
from data.env import PERTURBATIONS
from data.environments import simulator
from data.expert import demonstrate
from data.robots import ROBOTS
from data.scoring import is_degenerate, is_right, wilson
from data.seeds import FIRST_EVALUATION, FIRST_TOLD
from data.tasks import TASKS
from files import read_json, reading, writable, write_json
from jobs import in_order, run_jobs
from listening import plan_goals, told
from rollout import EXECUTE_STEPS, jerk, load_model, make_env, robots_of, rollout
from tables import failures, mean_of_tiers, percent, print_table, rate, summary

# the table in the BLM1 paper (arXiv 2510.24161)
PAPER = Path(__file__).parent / "results" / "paper.json"
MOST_TOKENS = 256  # tokens per reply
ASKED = "out/corpus/val.jsonl,out/corpus/off_template.jsonl,out/general/probes.jsonl"
COLUMNS = ("chance", "blind", "base", "model", "seen", "held_out", "degenerate")
# defaults for what a question's file leaves out
DEFAULTS = {"category": "all", "form": "open", "chance": 0.0, "held_out": False}


@dataclass
class PhysicalConfig:
    robots: str = "all"  # comma-separated robots, or all
    tasks: str = "all"  # comma-separated tasks, or all
    episodes: int = 50  # episodes of each robot and task
    seed: int = FIRST_EVALUATION  # first layout seed
    workers: int = 2  # processes
    out: str = ""  # result file; default out/results/<what>.json
    # the expert uses none of these
    weights: str = "weights/nano"  # checkpoint folder
    device: str = "auto"  # auto, cpu, cuda or mps
    execute_steps: int = EXECUTE_STEPS  # steps of a chunk before the policy observes again
    instruction: str = ""  # instruction, with one task in --tasks; empty: held-out wordings


@dataclass
class DelaysConfig(PhysicalConfig):
    tasks: str = "PickCube,StackCube,LiftPegUpright"  # comma-separated tasks, or all
    episodes: int = 5  # episodes of each robot and task in each row
    workers: int = 1  # processes; more of them lengthen a measured delay
    delays: str = "0,2,4,8"  # comma-separated control steps, or measured: as long as act takes


@dataclass
class ToldConfig:
    robots: str = "all"  # comma-separated robots, or all
    families: str = "all"  # comma-separated families of scenes (data/families.py), or all
    scenes: int = 25  # scenes of each robot and family
    seed: int = FIRST_TOLD  # first layout seed
    workers: int = 2  # processes
    weights: str = "weights/nano"  # checkpoint folder
    device: str = "auto"  # auto, cpu, cuda or mps
    out: str = ""  # result file; default out/results/<what>.json


@dataclass
class PlanConfig(ToldConfig):
    families: str = "which_way,which_bin,peg_or_cube,mixed"  # families with combinable commands
    scenes: int = 10  # scenes of each robot, family and number of commands


@dataclass
class MetaWorldConfig:
    tasks: str = "all"  # comma-separated tasks, or all 50
    episodes: int = 10  # episodes of each task
    controls: int = 4  # of each task without a sentence, with another task's, and without images
    seed: int = FIRST_EVALUATION  # first seed of goals and positions
    workers: int = 2  # processes
    weights: str = "out/metaworld-policy"  # checkpoint folder
    device: str = "auto"  # auto, cpu, cuda or mps
    execute_steps: int = EXECUTE_STEPS  # steps of a chunk before the policy observes again
    out: str = ""  # result file; default out/results/metaworld.json


@dataclass
class LiberoConfig(MetaWorldConfig):
    tasks: str = (
        "all"  # comma-separated tasks, object-0 to object-9 and spatial-0 to spatial-9, or all
    )
    episodes: int = 50  # episodes of each task: its 50 official starts in order
    seed: int = FIRST_EVALUATION  # official start 0; lower seeds draw starts as for demonstrations
    weights: str = "out/libero-policy"  # checkpoint folder
    out: str = ""  # result file; default out/results/libero.json


@dataclass
class ManiSkillConfig(MetaWorldConfig):
    tasks: str = "all"  # comma-separated tasks, or all six
    episodes: int = 50  # episodes of each task
    controls: int = 10  # episodes of each task in each control condition
    seed: int = FIRST_EVALUATION  # the package's seed of the first start
    weights: str = "weights/nano"  # checkpoint folder; its panda drives ManiSkill's
    out: str = ""  # result file; default out/results/maniskill.json


@dataclass
class ReplayConfig:
    data: str = "out/demos"  # folder of episodes, recorded or imported
    weights: str = "weights/nano"  # checkpoint folder
    robots: str = "all"  # comma-separated robots, or all
    tasks: str = "all"  # comma-separated tasks, or datasets, or all
    demonstrations: int = 0  # demonstrations of each cell, as in training; 0: all
    device: str = "auto"  # auto, cpu, cuda or mps
    out: str = ""  # result file; default out/results/replay.json


@dataclass
class DigitalConfig:
    weights: str = "weights/nano"  # checkpoint folder
    base: str = ""  # another checkpoint to compare with, such as the one before Stage I
    data: str = ASKED  # files of conversations with questions, comma-separated
    questions: int = 50  # of each category in seen wordings, and as many in held-out ones; 0: all
    batch_size: int = 16  # questions per batch
    seed: int = 0  # seed of the choice of questions
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "float32"  # dtype of the language model; bfloat16 for large ones on a GPU
    out: str = ""  # result file; default out/results/digital.json


# ---- driving


def choose_jobs(what, config):
    """The jobs for `work`, one tuple per episode. UserError on wrong flags."""
    at_least(config, 1, "episodes", "workers", "execute_steps")
    at_least(config, 0, "seed")
    robots = choose_many(config.robots, ROBOTS, "robot")
    tasks = choose_many(config.tasks, TASKS, "task")
    changes = ["unchanged", *PERTURBATIONS] if what == "perturbations" else [""]
    if what == "delays":
        changes = switches(config.delays)
    if config.instruction and len(tasks) > 1:
        raise UserError(f"--instruction {config.instruction!r}: name its one task with --tasks")
    if what != "expert":
        config.device = str(pick_device(config.device))
        blm = load_model(config.weights, config.device)  # a bad folder is reported here, once
        robots = robots_of(blm, config.robots)
        check_chunk(config, blm)
    seeds = range(config.seed, config.seed + config.episodes)
    jobs = enumerate(itertools.product(changes, robots, tasks, seeds))
    return [(number, what, config, *job) for number, job in jobs]


def check_chunk(config, blm):
    """UserError if a chunk has fewer steps than should be executed."""
    horizon = blm.policy.config.action_horizon
    if config.execute_steps > horizon:
        raise UserError(f"--execute_steps {config.execute_steps}: a chunk has {horizon} steps")


def work(job):
    """One episode, in its own process: (the job's number, row, task, the episode's result)."""
    number, what, config, change, robot, task, seed = job
    wordings = "seen" if what == "expert" else "held_out"  # no policy was trained on held_out
    perturbation = change if change in PERTURBATIONS else ""
    env = make_env(
        "tabletop", robot, task, render=False, wordings=wordings, perturbation=perturbation
    )
    episode = {"name": f"{robot} {seed}", "reason": ""}
    if what == "expert":
        shown = demonstrate(env, seed)
        episode["success"] = bool(shown.success)
        episode["steps"] = len(shown.states)
        episode["jerk"] = jerk(shown.states, env.robot.dof)
    else:
        blm = load_model(config.weights, config.device)
        options = {"instruction": config.instruction or None}
        if what == "delays":
            options |= switches(config.delays)[change]
        episode |= rollout(blm, env, seed, config.execute_steps, **options)
    return number, change or robot, task, episode


def physical(what, config):
    """Success in %: a row per robot, or per perturbation over all robots. Returns a dict."""
    jobs = choose_jobs(what, config)
    done = in_order(run_jobs(work, jobs, config.workers), len(jobs))
    cells = defaultdict(lambda: defaultdict(list))
    everything = []
    for _, row, task, episode in done:
        cells[row][task].append(episode)
        everything.append(episode)

    paper = read_json(PAPER) if what == "physical" else {}
    lines = []
    for name, row in cells.items():
        texts = []
        for task, episodes in row.items():
            row[task] = summary(episodes)
            row[task]["failures"] = failures(episodes)
            text = f"{100 * row[task]['success']:.0f}"
            texts.append(f"{text} ({paper[name][task]})" if name in paper else text)
        mean = np.mean([cell["success"] for cell in row.values()])
        lines.append([name, *texts, f"{100 * mean:.1f}"])
    print_table(["", *row, "mean"], lines)

    result = {**summary(everything), "cells": cells}
    result["mean"] = result["success"]  # also the mean of the cells: each has as many episodes
    result["reasons"] = Counter(e["reason"] for e in everything if e["reason"])
    print(f"\nmean {100 * result['mean']:.2f}%; failures {dict(result['reasons'])}")
    if what != "expert":
        result["act_ms"] = 1000 * np.mean([e["act_s"] for e in everything])
        clipped = Counter()  # targets beyond a joint's range or speed limit
        for episode in everything:
            clipped.update(episode["clipped"], of=episode["steps"])
        result["clipped_steps"] = clipped
    if paper:
        print(f"in parentheses: {paper['source']}, another simulator")
    return result


# ---- chunks that arrive late


def switches(texts):
    """{row: options of `rollout`} for comma-separated delays. UserError if one is invalid.

    The arm keeps moving while a chunk is computed, then switches to it. "plain": the chunk ignores
    what was executed meanwhile; "inpainted": it continues from there.
    """
    rows = {}
    for text in texts.split(","):
        text = text.strip()
        if text != "measured" and not text.isdecimal():
            raise UserError(f"--delays {text!r}: name numbers of control steps, or measured")
        delay = None if text == "measured" else int(text)
        for how in ("plain", "inpainted"):
            rows[f"{text} {how}"] = {"delay": delay, "inpaint": how == "inpainted"}
    return rows


def switch_figures(episodes):
    """Figures for a row's episodes: target steps in rad, of the largest joint; jerk in rad/s^3."""
    together = defaultdict(list)
    for episode in episodes:
        for name in ("border_steps", "inner_steps", "delays"):
            together[name] += episode[name]
    borders = together["border_steps"]
    return {
        **summary(episodes),
        "borders": len(borders),
        "border_step": np.mean(borders),
        "largest_border_step": max(borders),
        "inner_step": np.mean(together["inner_steps"]),
        "delay": np.mean(together["delays"]),
        "act_ms": 1000 * np.mean([e["act_s"] for e in episodes]),
        "failures": failures(episodes),
    }


def delays(what, config):
    """Success, and how far targets jump between chunks, for each delay. The result as a dict."""
    jobs = choose_jobs(what, config)
    done = in_order(run_jobs(work, jobs, config.workers), len(jobs))
    rows = defaultdict(list)
    for _, row, task, episode in done:
        rows[row].append(episode | {"name": f"{task} {episode['name']}"})
    figures = {row: switch_figures(episodes) for row, episodes in rows.items()}
    lines = []
    for row, found in figures.items():
        steps = (found["border_step"], found["largest_border_step"], found["inner_step"])
        line = [row, f"{100 * found['success']:.1f}", *(f"{1000 * step:.0f}" for step in steps)]
        lines.append([*line, f"{found['jerk']:.1f}", f"{found['delay']:.1f}"])
    print_table(
        ["row", "success", "border, mrad", "largest", "elsewhere", "jerk", "mean delay"], lines
    )
    return {"rows": figures}


# ---- other simulators

TIERS = {
    "metaworld": ("easy", "medium", "hard", "very_hard"),  # as in SmolVLA (arXiv 2506.01844)
    "libero": ("object", "spatial"),  # its suites
    "maniskill": ("panda",),  # its arm
}
CONTROLS = ("no sentence", "another sentence", "no picture")
OWN_CONTROLS = {"maniskill": ("our pictures",)}  # our simulator can draw its objects
DRAWN = {"our pictures": {"ours": True}}  # options that make an environment draw that way


def play_task(job):
    """A rollout in another simulator, in its own process: (number, way, task, the result)."""
    number, what, config, task, way, seed = job
    module = simulator(what)
    drawn = {"blind": way == "no picture"} | DRAWN.get(way, {})
    env = make_env(what, module.ROBOT.name, task, render=False, **drawn)
    instruction = None
    if way == "no sentence":
        instruction = "."
    if way == "another sentence":
        own = module.TASKS[task]
        # two tasks of Meta-World have the same sentence
        others = [other for other in module.TASKS.values() if other.sentence != own.sentence]
        if what == "libero":  # of the same suite: the other one has other objects
            others = [other for other in others if other.tier == own.tier]
        sentences = [other.sentence for other in others]
        instruction = str(seeds.rng(seed, "command", number).choice(sentences))
    blm = load_model(config.weights, config.device)
    result = rollout(blm, env, seed, config.execute_steps, instruction=instruction)
    return number, way, task, result | {"name": str(seed)}


def elsewhere(what, config):
    """Success in %: a row per tier, a column per way of instructing the policy. Returns a dict.

    what: an environment of another simulator (data/environments.py).
    """
    module = simulator(what)
    at_least(config, 1, "episodes", "workers", "execute_steps")
    at_least(config, 0, "seed", "controls")
    tasks = choose_many(config.tasks, module.TASKS, "task")
    config.device = str(pick_device(config.device))
    blm = load_model(config.weights, config.device)  # a bad folder is reported here, once
    robots_of(blm, "all", what)
    check_chunk(config, blm)
    jobs = []
    ways = ("told", *CONTROLS, *OWN_CONTROLS.get(what, ()))
    for task, way in itertools.product(tasks, ways):
        episodes = config.episodes if way == "told" else config.controls
        jobs += [(what, config, task, way, config.seed + i) for i in range(episodes)]
    jobs = [(number, *job) for number, job in enumerate(jobs)]
    done = in_order(run_jobs(play_task, jobs, config.workers), len(jobs))
    cells = defaultdict(lambda: defaultdict(list))
    for _, way, task, episode in done:
        cells[way][task].append(episode)

    ways = {}
    for way, row in cells.items():
        tiers = {}
        for tier in TIERS[what]:
            own = [task for task in row if module.TASKS[task].tier == tier]
            if own:
                tiers[tier] = rate(e["success"] for task in own for e in row[task])
        ways[way] = {"tiers": tiers, **mean_of_tiers(tiers)}
        ways[way]["tasks"] = {
            task: {**summary(episodes, module.HZ), "failures": failures(episodes)}
            for task, episodes in row.items()
        }
    print_ways(ways, tasks)
    acting = [e["act_s"] for episodes in cells["told"].values() for e in episodes]
    told_result = {**ways.pop("told"), "controls": ways, "act_ms": 1000 * np.mean(acting)}
    told_result["versions"] = {name: version(name) for name in ("mujoco", *module.PACKAGES)}
    return told_result


def print_ways(ways, tasks):
    """Print the results of `elsewhere`: by task, then by tier."""
    lines = []
    for task in tasks:
        rates = [f"{100 * way['tasks'][task]['success']:.0f}" for way in ways.values()]
        lines.append([task, *rates])
    print_table(["task", *ways], lines)
    print()
    lines = []
    for name, way in ways.items():
        low, high = way["interval"]
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        lines.append(
            [name, *map(percent, way["tiers"].values()), f"{100 * way['mean']:.1f}", interval]
        )
    print_table(["", *way["tiers"], "mean of tiers", "95% interval"], lines)


# ---- recordings


def replay(what, config):
    """Mean absolute errors by joint, in its unit, and those of two controls. Returns a dict."""
    from replay import compare  # loads torch, which the expert does not need

    blm = load_model(config.weights, str(pick_device(config.device)))
    robots = compare(blm, config)
    rows = []
    for robot, result in robots.items():
        joints = zip(result["joints"], result["units"], *result["error"].values())
        for name, unit, *errors in joints:
            rows.append([robot, f"{name} ({unit})", *(f"{error:.4f}" for error in errors)])
        kinds = list(result["error"])
    print_table(["robot", "joint", *kinds], rows)
    return {"robots": robots}


# ---- answering


def draw_questions(source, config):
    """[(i, question of record i, {column: number})] from a file; the columns are filled later.

    `config.questions` of each category, in seen and in held-out wordings.
    """
    drawn = []
    counts = Counter()
    for i in np.random.default_rng(config.seed).permutation(len(source)).tolist():
        _, record = source.records[i]
        with reading(source.name(i), 'wanted: {"images", "questions": [{"question", "answer"}]}'):
            for question in record["questions"]:
                question = DEFAULTS | question
                is_right(question, "")  # so that a missing field is found now
                kind = (question["category"], question["held_out"])
                counts[kind] += 1
                if counts[kind] <= config.questions or not config.questions:
                    drawn.append((i, question, {"chance": question["chance"]}))
    # neighbors share a batch: with similar lengths there is little padding
    return sorted(drawn, key=lambda one: len(one[1]["question"]))


def noise(media, rng):
    """Random images of the same sizes, in the same nested lists."""
    if isinstance(media, list):
        return [noise(part, rng) for part in media]
    return rng.integers(0, 256, np.shape(media), dtype=np.uint8)


def ask(models, source, config):
    """{category: [{column: true, false or a number}]}, one dict per question."""
    rng = np.random.default_rng(config.seed)
    drawn = draw_questions(source, config)
    categories = defaultdict(list)
    for first in trange(0, len(drawn), config.batch_size):
        batch = drawn[first : first + config.batch_size]
        texts = [question["question"] for _, question, _ in batch]
        media = []  # read only now: a benchmark's videos do not all fit into memory
        for i, question, row in batch:
            media.append([what for _, what in source.row(i).media])
            categories[question["category"]].append(row)
        for name, blm in models.items():
            shown = noise(media, rng) if name == "blind" else media
            replies = blm.answers(shown, texts, max_new_tokens=MOST_TOKENS)
            for (_, question, row), reply in zip(batch, replies):
                row[name] = is_right(question, reply)
                row["degenerate"] = is_degenerate(reply, question["answer"])
                # columns not named after a model hold the last one's, "model"
                row["held_out" if question["held_out"] else "seen"] = row[name]
    return categories


def averages(rows):
    """{column: mean over the rows that have it}."""
    means = {}
    for column in COLUMNS:
        values = [row[column] for row in rows if column in row]
        if values:
            means[column] = float(np.mean(values))
    return means


def accuracy(categories):
    """{"means", "categories"} of {category: rows of `ask`}; prints the table, in %."""
    rates = {}
    for category, rows in sorted(categories.items(), key=str):
        interval = wilson(sum(row["model"] for row in rows), len(rows))
        rates[category] = {"asked": len(rows), **averages(rows), "interval": interval}
    means = averages(rates.values())  # every category has the same weight
    lines = []
    for name, row in [*rates.items(), ("mean", means)]:
        texts = [f"{100 * row[column]:.1f}" if column in row else "" for column in means]
        ends = [f"{100 * end:.0f}" for end in row.get("interval", ())]
        lines.append([name, row.get("asked", ""), *texts, " to ".join(ends)])
    print_table(["category", "asked", *means, "95% interval of model"], lines)
    return {"means": means, "categories": rates}


def digital(what, config):
    """Print a table for every file of questions; returns the result as a dict."""
    at_least(config, 1, "batch_size")
    at_least(config, 0, "questions", "seed")
    choose(config.dtype, ("float32", "bfloat16"), "dtype")
    device = pick_device(config.device)
    # models and files are opened before any work, so that a bad one is reported at once; "blind"
    # is the same model, shown noise
    folders = {"blind": config.weights, "base": config.base, "model": config.weights}
    models = {
        name: load_model(path, device, config.dtype) for name, path in folders.items() if path
    }
    sources = [Conversations(path) for path in config.data.split(",")]
    files = {}
    for source in sources:
        print(f"\n{source.path}\n")
        files[str(source.path)] = accuracy(ask(models, source, config))
    return {"files": files}


KINDS = {
    "expert": (physical, PhysicalConfig),
    "physical": (physical, PhysicalConfig),
    "perturbations": (physical, PhysicalConfig),
    "delays": (delays, DelaysConfig),
    "told": (told, ToldConfig),
    "plan": (plan_goals, PlanConfig),
    "replay": (replay, ReplayConfig),
    "metaworld": (elsewhere, MetaWorldConfig),
    "libero": (elsewhere, LiberoConfig),
    "maniskill": (elsewhere, ManiSkillConfig),
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
    result = {"what": what, **evaluate(what, config), "config": asdict(config)}
    result["command"] = command_line()
    result["seconds"] = round(time.time() - start)
    write_json(out, result)
    print(f"written to {out}")


if __name__ == "__main__":
    run(main)
