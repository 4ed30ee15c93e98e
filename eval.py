"""Closed-loop success in 24 cells (four robots, six tasks): of the scripted expert, and of one set of weights.

    python eval.py expert                          the planner that makes the demonstrations, 50 layouts a cell
    python eval.py physical --weights weights/nano the policy: camera pictures, joint state and an instruction in wordings it was not trained on
    python eval.py digital --weights weights/nano  questions about validation scenes: answers right, and how far points are off

Layout seeds start at 1,000,000, beyond every demonstration; the same seeds give the same table. Results are written as JSON.
"""
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import UserError, atomic, choose, choose_many, parse, pick_device, run
from data.env import TabletopEnv, front_pixel
from data.expert import demonstrate
from data.robots import ROBOTS, get_robot
from data.tasks import TASKS

EVALUATION_SEED = 1_000_000
# BLM1, arXiv 2510.24161: success (%) over 50 episodes a cell, one set of weights, in ManiSkill; columns in the order of TASKS
PAPER = {"panda": (86, 100, 100, 60, 96, 66), "xarm6": (92, 100, 100, 86, 94, 10), "xarm7": (72, 88, 100, 56, 78, 54), "widowx": (100, 68, 84, 44, 2, 84)}


@dataclass
class EvalConfig:
    weights: str = "weights/nano"   # checkpoint folder
    robots: str = "all"             # comma-separated robots, or all
    tasks: str = "all"              # comma-separated tasks, or all
    episodes: int = 20              # episodes for each robot and task
    seed: int = EVALUATION_SEED     # first layout seed
    execute_steps: int = 8          # control steps of a chunk that are carried out before the policy looks again
    temperature: float = 0.0        # of the noise a chunk flows from; 0 is deterministic
    workers: int = 2                # processes
    device: str = "auto"            # auto, cpu, cuda or mps
    corpus: str = "out/corpus"      # digital: the corpus whose validation scenes are asked
    scenes: int = 400               # digital: how many of them
    out: str = ""                   # result file; default out/results/<what>.json


def rollout(blm, env, seed, execute_steps=8, temperature=0.0, instruction=None, watch=None, max_steps=None):
    """One closed-loop episode of `blm` in `env`: {"success", "steps", "clipped", "act_s": mean seconds a chunk, "reason": why it failed, or ""}.

    Every `execute_steps` control steps the policy looks again, and only then are pictures drawn: make env with render=False. watch(env): called before
    every control step. max_steps: stop sooner than the task does.
    """
    env.reset(seed, instruction=instruction)
    done = truncated = False
    times, held, body = [], [], next(iter(env.task.labels))
    while not (done or truncated):
        observation, start = env.observe(render=True), time.perf_counter()
        chunk = blm.act(observation, env.robot.name, temperature, seed=[seed, env.steps])
        times.append(time.perf_counter() - start)
        for action in chunk[:execute_steps]:
            if watch:
                watch(env)
            *_, done, truncated, info = env.step(action)
            truncated = truncated or env.steps == max_steps
            held.append(env.grasped(body))
            if done or truncated:
                break
    return {"success": bool(done), "steps": env.steps, "clipped": info["clipped"], "act_s": float(np.mean(times)), "reason": "" if done else why(env.task, held)}


def why(task, held):
    """Why an episode of `task` failed, from whether its object was held after each step."""
    if task.name in ("PushCube", "PullCube"):
        return "missed the target"
    return "never grasped" if not any(held) else "held to the end" if held[-1] else "let go elsewhere"


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
        env = TabletopEnv(robot, task, render=False)
        return robot, task, [{"seed": s, "success": bool(d.success), "steps": len(d.states)} for s, d in ((s, demonstrate(env, s)) for s in seeds)]
    import torch
    from model import BLM
    torch.set_num_threads(1)
    blm, env = BLM.from_pretrained(config.weights, config.device), TabletopEnv(robot, task, render=False, held_out=True)
    results = [{"seed": s, **rollout(blm, env, s, config.execute_steps, config.temperature)} for s in seeds]
    env.close()
    return robot, task, results


def physical(what, config):
    """Run all cells, print the table, return the result as a dict."""
    robots, tasks = choose_many(config.robots, ROBOTS, "robot"), choose_many(config.tasks, TASKS, "task")
    if config.episodes < 1 or config.workers < 1:
        raise UserError(f"--episodes {config.episodes} and --workers {config.workers} must be at least 1")
    if what == "physical":
        from model import BLM
        config.device = str(pick_device(config.device))
        BLM.from_pretrained(config.weights)                # a bad folder is told here, once
    jobs = [(what, config, r, t, range(config.seed + first, min(config.seed + first + 10, config.seed + config.episodes)))
            for t in tasks for r in robots for first in range(0, config.episodes, 10)]
    episodes, start = {}, time.time()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with multiprocessing.get_context("spawn").Pool(config.workers) as pool, tqdm(total=len(robots) * len(tasks) * config.episodes, unit="episode") as bar:
        for robot, task, results in pool.imap_unordered(work, jobs):
            episodes.setdefault((robot, task), []).extend(results)
            bar.update(len(results))
    cells = {}
    for (robot, task), results in sorted(episodes.items()):
        results.sort(key=lambda e: e["seed"])
        wins = sum(e["success"] for e in results)
        cells.setdefault(robot, {})[task] = {"success": wins / len(results), "episodes": len(results), "interval": [round(x, 3) for x in wilson(wins, len(results))],
                                             "mean_steps": float(np.mean([e["steps"] for e in results])),
                                             "failures": {e["seed"]: e.get("reason", "") for e in results if not e["success"]}}
    mean = float(np.mean([c["success"] for row in cells.values() for c in row.values()]))
    result = {"what": what, "mean": mean, "cells": cells, "command": shlex.join(["python", *sys.argv]), "seconds": round(time.time() - start),
              "config": {k: v for k, v in asdict(config).items() if k not in ("corpus", "scenes", "out")}}
    if what == "physical":
        flat = [e for results in episodes.values() for e in results]
        result["act_ms"] = 1000 * float(np.mean([e["act_s"] for e in flat]))
        result["clipped_steps"] = int(sum(e["clipped"] for e in flat))
        result["reasons"] = dict(Counter(e["reason"] for e in flat if not e["success"]).most_common())
    print(table(result, robots, tasks))
    return result


def table(result, robots, tasks):
    """The paper's table, ours: markdown, success in %, the paper's ManiSkill figure in brackets where the policy is meant."""
    def entry(robot, task):
        mine = f"{100 * result['cells'][robot][task]['success']:.0f}"
        return f"{mine} ({PAPER[robot][list(TASKS).index(task)]})" if result["what"] == "physical" else mine

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


def digital(config):
    """Ask the validation scenes' questions and read the answers: accuracy by kind of answer, pointing error in pixels and centimetres on the front view."""
    import torch
    from data.corpus import Corpus, ensure
    from model import BLM
    torch.set_num_threads(os.cpu_count() or 1)
    ensure(config.corpus)
    blm, corpus = BLM.from_pretrained(config.weights, pick_device(config.device)), Corpus(config.corpus, "val")
    right, asked, pixels, metres = {}, {}, [], []
    for i in tqdm(np.random.default_rng(config.seed).permutation(len(corpus))[:config.scenes], unit="scene"):
        scene = corpus[int(i)]
        for question, answer in scene["turns"]:
            given = blm.answer(scene["images"], question)
            kind = "point" if "point_2d" in answer else "box" if "bbox_2d" in answer else "yes/no" if answer in ("yes", "no") else "words"
            asked[kind] = asked.get(kind, 0) + 1
            if kind == "point":
                try:
                    error = np.hypot(*np.subtract(json.loads(given)["point_2d"], json.loads(answer)["point_2d"]))
                except (ValueError, KeyError, TypeError):
                    error = np.inf                         # no point in the answer: a miss
                pixels.append(error)
                if "front" in question:
                    metres.append(error * front_pixel(get_robot(scene["robot"])))
                right[kind] = right.get(kind, 0) + (error <= 4)
            elif kind == "box":
                right[kind] = right.get(kind, 0) + (overlap(given, answer) >= 0.5)
            else:
                right[kind] = right.get(kind, 0) + (given.strip() == answer)
    result = {"what": "digital", "scenes": config.scenes, "point_error_px_median": float(np.median(pixels)),
              "point_error_cm_median": 100 * float(np.median(metres)), "points": len(pixels),
              "accuracy": {kind: {"right": int(right[kind]), "asked": asked[kind], "interval": [round(x, 3) for x in wilson(right[kind], asked[kind])]} for kind in asked},
              "command": shlex.join(["python", *sys.argv])}
    for kind, row in result["accuracy"].items():
        print(f"{kind:8s} {100 * row['right'] / row['asked']:5.1f}% of {row['asked']}" + {"point": " within 4 px", "box": " with IoU >= 0.5"}.get(kind, ""))
    print(f"pointing error, median: {result['point_error_px_median']:.1f} px of 128; {result['point_error_cm_median']:.1f} cm in the front view")
    return result


def overlap(given, answer):
    """Intersection over union of two answers' boxes; 0 if one has none."""
    try:
        a, b = (np.array(json.loads(text)["bbox_2d"], float) for text in (given, answer))
        inner = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
        return inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner)
    except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
        return 0.0


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        if "--help" in sys.argv or "-h" in sys.argv:
            print(__doc__)
            parse(EvalConfig, argv=["--help"])
        raise UserError("say what to evaluate: python eval.py expert | physical | digital")
    what = choose(sys.argv[1], ["expert", "physical", "digital"], "evaluation")
    config = parse(EvalConfig, description=__doc__.split("\n")[0], argv=sys.argv[2:])
    if what == "expert" and "--episodes" not in " ".join(sys.argv):
        config.episodes = 50
    result = digital(config) if what == "digital" else physical(what, config)
    out = Path(config.out or f"out/results/{what}.json")
    with atomic(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    run(main)
