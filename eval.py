"""What one set of weights can do: drive in 24 cells (four robots, six tasks), and answer.

    python eval.py expert                          the planner that makes the demonstrations, 50 layouts a cell
    python eval.py physical --weights weights/nano the policy: camera pictures, joint state and an instruction in wordings it was not trained on
    python eval.py conditions --episodes 10        the policy again, with the light, the camera and so on changed, one thing at a time
    python eval.py digital --weights weights/nano  questions about validation scenes, 17 categories, beside chance and beside noise for pictures
    python eval.py benchmark --name robovqa --data nvidia/Cosmos-Reason1-Benchmark --weights Qwen/Qwen2.5-VL-7B-Instruct        one of the paper's six

Layout seeds start at 1,000,000, beyond every demonstration; the same seeds give the same table. Results are written as JSON, tables of cells as a heat
map too. An evaluation of cells that was stopped goes on where it was, if nothing about it has changed, and shares its episodes among torchrun's processes.
"""
import hashlib
import json
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image
from tqdm import tqdm, trange

from cli import UserError, at_least, choose, choose_many, parse, pick_device, run
from jobs import pool, this_process

from files import atomic, whole_files, writable, write_json
from data.env import PERTURBATIONS, CONTROL_HZ, TabletopEnv, front_pixel
from data.expert import demonstrate
from nano.questions import CATEGORIES, distance, is_right
from data.robots import ROBOTS, get_robot
from data.tasks import TASKS
from dev.plot import bars, heat_map
from rollout import EXECUTE_STEPS, GREEN, RED, caption, draw_episode, jerk, robots_of, rollout

ELSEWHERE = ("workers", "out", "failures")     # settings that no episode depends on
# BLM1, arXiv 2510.24161: success (%) over 50 episodes a cell, one set of weights, in ManiSkill; columns in the order of TASKS
PAPER = {"panda": (86, 100, 100, 60, 96, 66), "xarm6": (92, 100, 100, 86, 94, 10), "xarm7": (72, 88, 100, 56, 78, 54), "widowx": (100, 68, 84, 44, 2, 84)}


@dataclass
class EvalConfig:
    weights: str = "weights/nano"   # checkpoint folder
    device: str = "auto"            # auto, cpu, cuda or mps
    out: str = ""                   # result file; default out/results/<what>.json


@dataclass
class ExpertConfig:
    robots: str = "all"             # comma-separated robots, or all
    tasks: str = "all"              # comma-separated tasks, or all
    episodes: int = 50              # episodes for each robot and task
    seed: int = 1_000_000           # first layout seed
    condition: str = ""             # change one thing: lighting, table, camera, outside, noise or distractor (data/env.py)
    workers: int = 2                # processes
    out: str = ""                   # result file; default out/results/<what>.json


@dataclass
class PhysicalConfig(EvalConfig, ExpertConfig):
    execute_steps: int = EXECUTE_STEPS     # control steps of a chunk that are carried out before the policy looks again
    temperature: float = 0.0        # of the noise a chunk flows from; 0 is deterministic
    instruction: str = ""           # what to tell the robot, with one of --tasks; empty: the wordings kept for evaluation
    failures: str = ""              # folder for GIFs of the failed episodes, sorted by reason; empty: none are drawn


@dataclass
class DigitalConfig(EvalConfig):
    base: str = ""                  # another model folder to stand beside, such as the one before Stage I
    no_replay: str = ""             # a third one, trained without general instructions
    examples: str = ""              # picture file for three dialogues; empty: none is drawn
    corpus: str = "out/corpus"      # the corpus whose validation scenes are asked
    general: str = "out/general"    # folder with the probes of instruction following
    questions: int = 50             # how many of each category in wordings that training saw, and as many in others
    seed: int = 0                   # which of the scenes


@dataclass
class BenchmarkConfig(EvalConfig):
    name: str = "robovqa"           # robovqa, agibot, holoassist, robofail, egothink or sharerobot
    data: str = ""                  # its folder, or its name on the hub
    dtype: str = "float32"          # of the language model; bfloat16 for large ones on a GPU


def wilson(successes, n, z=1.96):
    """95% interval (low, high) of a rate, Wilson 1927."""
    if n == 0:
        return 0.0, 1.0
    p, centre = successes / n, (successes + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * np.sqrt(n * p * (1 - p) + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def work(job):
    """Some episodes of one cell, in a process of its own: [{seed, success, ...}]."""
    what, config, robot, task, seeds = job
    if what == "expert":
        env = TabletopEnv(robot, task, render=False, perturbation=config.condition)
        made = [(s, demonstrate(env, s)) for s in seeds]
        return robot, task, [{"seed": s, "success": bool(d.success), "steps": len(d.states), "jerk": jerk(d.states, env.robot.dof), "reason": ""} for s, d in made]
    import torch
    from model import BLM
    torch.set_num_threads(1)
    blm, env = BLM.from_pretrained(config.weights, config.device), TabletopEnv(robot, task, render=False, held_out=True, perturbation=config.condition)
    results = [{"seed": s, **rollout(blm, env, s, config.execute_steps, config.temperature, config.instruction or None)} for s in seeds]
    env.close()
    return robot, task, results


def part_file(out, rank):
    """Where a process keeps the episodes of the result file `out` until all are done."""
    return Path(out).with_name(f".{Path(out).name}.{rank}.part")


def condition_file(out, name):
    return str(Path(out).with_name(f"{Path(out).stem}-{name}.json"))


def episodes_of(what, config, robots, tasks):
    """{(robot, task): [one dict an episode]}, from all processes; None under torchrun for all but the first, which waits for the others' shares. What is
    done stays beside the result file until all is done."""
    jobs, found, (rank, world) = {}, {}, this_process()
    for task in tasks:
        for robot in robots:
            for first in range(config.seed, config.seed + config.episodes, 10):
                jobs[robot, task, first] = (what, config, robot, task, range(first, min(first + 10, config.seed + config.episodes)))
    about = {name: value for name, value in asdict(config).items() if name not in ELSEWHERE}
    if what == "physical":
        from files import find_folder
        files = whole_files(find_folder(config.weights), "*.safetensors")
        about["weights"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    part_of = lambda rank: part_file(config.out, rank)

    def known(path):
        """{(robot, task, first seed): results} of a part file, {} if it is not there or of another evaluation; half a line does not count."""
        head, *lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else [None]
        return {tuple(key): results for key, results in lines if tuple(key) in jobs} if head == about else {}

    for path in Path(config.out).parent.glob(part_file(config.out, "*").name):         # of any number of processes
        found |= known(path)
    mine = [job for i, (key, job) in enumerate(jobs.items()) if i % world == rank and key not in found]
    kept = found if rank == 0 else known(part_of(rank))
    with atomic(part_of(rank)) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in (about, *kept.items())))
    with pool(config.workers) as workers, open(part_of(rank), "a") as part, \
            tqdm(total=len(robots) * len(tasks) * config.episodes, initial=sum(map(len, found.values())), unit="episode", disable=rank > 0) as bar:
        for robot, task, results in workers.imap_unordered(work, mine):
            part.write(json.dumps([[robot, task, results[0]["seed"]], results]) + "\n")
            part.flush()
            found[robot, task, results[0]["seed"]] = results
            bar.update(len(results))
        if rank:
            return None
        while found.keys() < jobs.keys():                  # the other processes' shares
            time.sleep(0.5)
            before = sum(map(len, found.values()))
            for other in range(1, world):
                found |= known(part_of(other))
            bar.update(sum(map(len, found.values())) - before)
    episodes = {}
    for (robot, task, _), results in found.items():
        episodes.setdefault((robot, task), []).extend(results)
    return {cell: sorted(results, key=lambda e: e["seed"]) for cell, results in sorted(episodes.items())}


def physical(what, config):
    """Run all cells, print the table, return the result as a dict."""
    robots, tasks = choose_many(config.robots, ROBOTS, "robot"), choose_many(config.tasks, TASKS, "task")
    if what == "physical":
        from model import BLM
        config.device = str(pick_device(config.device))
        blm = BLM.from_pretrained(config.weights, config.device)                             # a bad folder is told here, once
        robots, horizon = robots_of(blm, config.robots), blm.policy.config.action_horizon
        if config.execute_steps > horizon:
            raise UserError(f"--execute_steps {config.execute_steps}: a chunk of this policy has {horizon}")
        if config.instruction and len(tasks) > 1:
            raise UserError(f"--instruction {config.instruction!r} asks for one thing: name its task with --tasks")
    if config.condition:
        choose(config.condition, PERTURBATIONS, "condition")
    start = time.time()
    episodes, cells = episodes_of(what, config, robots, tasks), {}
    if episodes is None:
        return None
    for (robot, task), results in episodes.items():
        cells.setdefault(robot, {})[task] = summary(results) | {"failures": {e["seed"]: e["reason"] for e in results if not e["success"]}}
    flat = [e for results in episodes.values() for e in results]
    result = {"what": what, "mean": float(np.mean([c["success"] for row in cells.values() for c in row.values()])), **summary(flat), "cells": cells,
              "command": shlex.join(["python", *sys.argv]), "seconds": round(time.time() - start),
              "config": {k: v for k, v in asdict(config).items() if k not in ELSEWHERE}}
    if what == "physical":
        result["act_ms"] = 1000 * float(np.mean([e["act_s"] for e in flat]))
        result["clipped_steps"] = {kind: sum(e["clipped"][kind] for e in flat) for kind in ("limits", "speed")} | {"of": sum(e["steps"] for e in flat)}
        result["reasons"] = dict(Counter(e["reason"] for e in flat if not e["success"]).most_common())
    print(table(result, robots, tasks))
    if what == "physical" and config.failures:
        draw_failures(blm, config, cells)
    return result


def summary(episodes):
    """Success, its 95% interval, seconds to success and jerk of some episodes."""
    wins = [e["steps"] for e in episodes if e["success"]]
    return {"success": len(wins) / len(episodes), "episodes": len(episodes), "interval": [round(x, 4) for x in wilson(len(wins), len(episodes))],
            "seconds_to_success": round(float(np.mean(wins)) / CONTROL_HZ, 2) if wins else None, "jerk": round(float(np.mean([e["jerk"] for e in episodes])), 1)}


def draw_failures(blm, config, cells):
    """A GIF of every failed episode, as <failures>/<reason>/<robot>-<task>-<seed>.gif: run once more, which gives the same."""
    failed = [(robot, task, seed, reason) for robot, row in cells.items() for task, cell in row.items() for seed, reason in cell["failures"].items()]
    for robot, task, seed, reason in tqdm(failed, unit="picture"):
        env = TabletopEnv(robot, task, render=False, held_out=True, perturbation=config.condition)
        draw_episode(blm, env, seed, Path(config.failures) / config.condition / reason.replace(" ", "_"), config.execute_steps, config.instruction, config.temperature)
        env.close()


def conditions(what, config):
    """The table of cells once as it is and once under each condition of data/env.py; prints the means, returns all results."""
    if config.condition:
        raise UserError("eval.py conditions runs them all: leave --condition out, or ask `eval.py physical` for one")
    found = {}
    for name, about in {"unchanged": "as in the other tables", **PERTURBATIONS}.items():
        print(f"\n{name}: {about}")
        found[name] = physical("physical", replace(config, condition=name if name in PERTURBATIONS else "", out=condition_file(config.out, name)))
    if None in found.values():
        return None
    tasks = choose_many(config.tasks, TASKS, "task")
    print("\n| condition | " + " | ".join(tasks) + " | mean |\n" + "|---" * (len(tasks) + 2) + "|")
    for name, result in found.items():
        columns = [np.mean([row[task]["success"] for row in result["cells"].values()]) for task in tasks]
        print(f"| {name} | " + " | ".join(f"{100 * x:.0f}" for x in (*columns, result["mean"])) + " |")
    return {"what": what, "means": {name: result["mean"] for name, result in found.items()}, "about": PERTURBATIONS,
            "command": shlex.join(["python", *sys.argv]), "conditions": found}


def table(result, robots, tasks):
    """The paper's table, ours: markdown, success in %, the paper's ManiSkill figure in brackets where the policy is meant."""
    def entry(robot, task):
        mine = f"{100 * result['cells'][robot][task]['success']:.0f}"
        return f"{mine} ({PAPER[robot][list(TASKS).index(task)]})" if result["what"] == "physical" and robot in PAPER else mine

    lines = ["| robot | " + " | ".join(tasks) + " | mean |", "|---" * (len(tasks) + 2) + "|"]
    for robot in robots:
        mean = np.mean([result["cells"][robot][task]["success"] for task in tasks])
        lines.append(f"| {robot} | " + " | ".join(entry(robot, task) for task in tasks) + f" | {100 * mean:.1f} |")
    n = sum(c["episodes"] for row in result["cells"].values() for c in row.values())
    lines.append(f"\nmean {100 * result['mean']:.2f}% over {len(robots) * len(tasks)} cells, {n} episodes"
                 + (" (in brackets: BLM1 in ManiSkill, another simulator; its mean 75.83%)" if result["what"] == "physical" else ""))
    if result.get("reasons"):
        lines.append("failures: " + ", ".join(f"{reason} {count}" for reason, count in result["reasons"].items()))
    return "\n".join(lines)


def digital(what, config):
    """Ask held-back scenes' questions of each category: of the model, of the model with noise for pictures ("blind"), and of a base model if one is named.

    Accuracy by category, in wordings that training saw and in those that it did not, beside chance; pointing error in pixels, and in centimetres on the front
    view; and retention: general instructions (data/general.py), answered by the model and by the base.
    """
    import torch
    from nano import instructions as general
    from data.conversations import Chats
    from nano.scenes import Corpus, ensure
    from model import BLM
    if config.examples and Path(config.examples).suffix not in (".png", ".jpg"):
        raise UserError(f"--examples {config.examples}: name a .png or .jpg file")
    torch.set_num_threads(os.cpu_count() or 1)
    ensure(config.corpus)
    general.ensure(config.general)
    corpus, asked, device = Corpus(config.corpus, "val"), [], pick_device(config.device)
    left = {(category, held_out): config.questions for category in CATEGORIES for held_out in (False, True)}
    for i in np.random.default_rng(config.seed).permutation(len(corpus)):
        scene = corpus[int(i)]
        for question in scene["questions"]:
            key = question["category"], question["held_out"]
            if left[key]:
                left[key] -= 1
                asked.append((scene, question))
    asked.sort(key=lambda pair: (len(pair[0]["images"]), len(pair[1]["question"])))      # alike in length, so little padding
    noise = np.random.default_rng(config.seed)
    blind = [[noise.integers(0, 256, image.shape, dtype=np.uint8) for image in scene["images"]] for scene, _ in asked]
    pictures, questions = [scene["images"] for scene, _ in asked], [question["question"] for _, question in asked]
    given, probes = {}, [json.loads(line) for line in (Path(config.general) / "probes.jsonl").read_text().splitlines()]
    chats, retention = Chats(Path(config.general) / "probes.jsonl"), {}
    for name, folder, seen in (("model", config.weights, pictures), ("blind", config.weights, blind), ("base", config.base, pictures), ("no_replay", config.no_replay, pictures)):
        if folder:
            blm = BLM.from_pretrained(folder, device)
            given[name] = [reply for start in trange(0, len(asked), 64, desc=name) for reply in blm.answers(seen[start:start + 64], questions[start:start + 64], 96)]
            if name != "blind":
                talks = [chats[i] for i in range(len(chats))]
                replies = blm.answers([[picture for _, picture in talk["media"]] for talk in talks], [talk["messages"][0]["content"][-1]["text"] for talk in talks], 48)
                hits = np.array([reply.strip() == talk["messages"][1]["content"] for reply, talk in zip(replies, talks)])
                kinds = np.array([probe["kind"] for probe in probes])
                retention[name] = {kind: float(hits[kinds == kind].mean()) for kind in general.KINDS} | {"mean": float(hits.mean())}
    right = {name: np.array([is_right(question, reply) for (_, question), reply in zip(asked, replies)]) for name, replies in given.items()}
    category, held_out = np.array([q["category"] for _, q in asked]), np.array([q["held_out"] for _, q in asked])
    chance, rows = np.array([q["chance"] for _, q in asked]), {}
    for name in CATEGORIES:
        own = category == name
        if own.any():
            rows[name] = {"asked": int(own.sum()), "chance": float(chance[own].mean()), **{who: float(found[own].mean()) for who, found in right.items()},
                          "interval": [round(x, 3) for x in wilson(int(right["model"][own].sum()), int(own.sum()))],
                          **{wording: float(right["model"][own & (held_out == new)].mean()) for wording, new in (("seen", False), ("held_out", True)) if (own & (held_out == new)).any()}}
    mean = lambda key: float(np.mean([row[key] for row in rows.values() if key in row]))
    points = [(scene, question, reply) for (scene, question), reply in zip(asked, given["model"]) if question["category"] == "point"]
    errors = [distance(reply, question["answer"]) for _, question, reply in points]
    front = [error * front_pixel(get_robot(scene["robot"])) for (scene, question, _), error in zip(points, errors) if "front" in question["question"]]
    result = {"what": what, "mean": mean("model"), "blind_mean": mean("blind"), "chance_mean": mean("chance"), **{f"{name}_mean": mean(name) for name in ("base", "no_replay") if name in given},
              "seen_mean": mean("seen"), "held_out_mean": mean("held_out"), "categories": rows, "asked": len(asked), "retention": retention,
              "point_error_px_median": float(np.median(errors)), "point_error_cm_median": 100 * float(np.median(front)), "command": shlex.join(["python", *sys.argv])}
    print(digital_table(result))
    for name, row in retention.items():
        print(f"general instructions, {name}: " + ", ".join(f"{kind} {100 * value:.0f}%" for kind, value in row.items()))
    print(f"pointing error, median: {result['point_error_px_median']:.1f} px of 128; {result['point_error_cm_median']:.1f} cm in the front view")
    if config.examples:
        draw_dialogues([(scene["images"], question, reply) for (scene, question), reply in zip(asked, given["model"])], config.examples)
    return result


def draw_dialogues(talks, path):
    """Three of `talks` [(pictures, question, reply)], spread over them, into one picture: right or wrong, as they come."""
    rows = []
    for i in np.linspace(0, len(talks) - 1, 5).astype(int)[1:-1]:
        pictures, question, reply = talks[i]
        strip, right = np.full((pictures[0].shape[0], 4 * pictures[0].shape[1], 3), 250, np.uint8), is_right(question, reply)
        strip[:, :len(pictures) * pictures[0].shape[1]] = np.concatenate(pictures, 1)
        asked, said = wrap(question["question"], 80) + ([] if right else wrap(f"(It is: {question['answer']})", 80)), wrap(reply, 80)
        rows.append(np.asarray(caption(strip, asked + said, GREEN if right else RED, len(said))))
    with atomic(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)


def benchmark(what, config):
    """One of the paper's six benchmarks (data/benchmarks.py), scored; and the paper's figures, which other weights and another judge made."""
    import torch
    from data import benchmarks
    from model import BLM
    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, choose(config.dtype, ("float32", "bfloat16", "float16"), "dtype"))
    items, missing = benchmarks.read(config.name, config.data)
    blm, replies = BLM.from_pretrained(config.weights, pick_device(config.device), dtype), []
    for item in tqdm(items, unit="question"):
        replies.append(blm.answer(item.load(), item.prompt(), 16 if item.options else 256))
    before, after = benchmarks.PAPER[config.name]
    result = {"what": what, "name": config.name, **benchmarks.score(items, replies), "missing": missing, "paper": {"before": before, "after": after},
              "command": shlex.join(["python", *sys.argv]), "replies": replies}
    measures = [name for name in ("accuracy", "exact", "soft") if name in result]
    for category, row in [*result["categories"].items(), ("all", result)]:
        print(f"{category:24s}" + "  ".join(f"{name} {100 * row[name]:.1f}%" for name in measures) + f"  of {row['asked']}")
    print(f"{missing} questions left out for want of their pictures; the paper's figures: {before} before Stage I, {after} after"
          + ("" if "accuracy" in result else "; those are a language model's judgement, which is milder than either of ours"))
    return result


def digital_table(result):
    """Markdown: a row a category, in %."""
    names = [name for name in ("chance", "blind", "base", "no_replay", "model") if f"{name}_mean" in result or name == "model"]
    lines = ["| category | asked | " + " | ".join(names) + " | 95% interval | seen / new wording |", "|---" * (len(names) + 4) + "|"]
    for name, row in result["categories"].items():
        low, high = row["interval"]
        lines.append(f"| {name} | {row['asked']} | " + " | ".join(f"{100 * row[who]:.0f}" for who in names) + f" | {100 * low:.0f} to {100 * high:.0f} | "
                     + " / ".join(f"{100 * row[kind]:.0f}" for kind in ("seen", "held_out") if kind in row) + " |")
    means = " | ".join(f"{100 * result['mean' if who == 'model' else f'{who}_mean']:.1f}" for who in names)
    return "\n".join([*lines, f"| mean | {result['asked']} | {means} | | {100 * result['seen_mean']:.1f} / {100 * result['held_out_mean']:.1f} |"])


KINDS = {"expert": (physical, ExpertConfig), "physical": (physical, PhysicalConfig), "conditions": (conditions, PhysicalConfig), "digital": (digital, DigitalConfig),
         "benchmark": (benchmark, BenchmarkConfig)}


def main():
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__ + "\npython eval.py <what> --help lists the flags")
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError(f"say what to evaluate: python eval.py {' | '.join(KINDS)}")
    what = choose(sys.argv[1], KINDS, "evaluation")
    evaluate, config_class = KINDS[what]
    config = parse(config_class, description=__doc__.split("\n")[0], argv=sys.argv[2:])
    for name, low in (("episodes", 1), ("workers", 1), ("execute_steps", 1), ("questions", 1), ("seed", 0), ("temperature", 0)):
        if hasattr(config, name):
            at_least(config, low, name)
    config.out = config.out or f"out/results/{config.name if what == 'benchmark' else what}.json"
    if Path(config.out).suffix != ".json":
        raise UserError(f"--out {config.out}: name a .json file, the picture is drawn beside it")
    writable(Path(config.out).parent)
    if what in ("digital", "benchmark") and this_process()[0]:
        return                                             # one process does it all
    result = evaluate(what, config)
    if result is None:                                     # a process whose share another one reports
        return
    write_json(config.out, result)
    if what not in ("conditions", "benchmark"):
        (bars if what == "digital" else heat_map)(result, Path(config.out).with_suffix(".png"))
    for out in [condition_file(config.out, name) for name in ("unchanged", *PERTURBATIONS)] if what == "conditions" else [config.out]:
        for part in Path(out).parent.glob(part_file(out, "*").name):
            part.unlink()
    print(f"written to {config.out}")


if __name__ == "__main__":
    run(main)
