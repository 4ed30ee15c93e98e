"""Closed-loop success in 24 cells (four robots, six tasks): of the scripted expert, and of one set of weights.

    python eval.py expert                          the planner that makes the demonstrations, 50 layouts a cell
    python eval.py physical --weights weights/nano the policy: camera pictures, joint state and an instruction in wordings it was not trained on
    python eval.py conditions --episodes 10        the policy again, with the light, the camera and so on changed, one thing at a time
    python eval.py digital --weights weights/nano  questions about validation scenes: answers right, and how far points are off

Layout seeds start at 1,000,000, beyond every demonstration; the same seeds give the same table. Results are written as JSON, tables of cells as a heat
map too. An evaluation that was stopped goes on where it was, if nothing about it has changed.
"""
import hashlib
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from cli import UserError, atomic, choose, choose_many, parse, pick_device, run
from data.env import CONDITIONS, CONTROL_HZ, TabletopEnv, front_pixel
from data.expert import demonstrate
from data.robots import ROBOTS, get_robot
from data.tasks import TASKS

EVALUATION_SEED = 1_000_000
EXECUTE_STEPS = 12           # of a chunk that are carried out before the policy looks again: with fewer it may hesitate for ever where an arm starts slowly
# BLM1, arXiv 2510.24161: success (%) over 50 episodes a cell, one set of weights, in ManiSkill; columns in the order of TASKS
PAPER = {"panda": (86, 100, 100, 60, 96, 66), "xarm6": (92, 100, 100, 86, 94, 10), "xarm7": (72, 88, 100, 56, 78, 54), "widowx": (100, 68, 84, 44, 2, 84)}


@dataclass
class EvalConfig:
    weights: str = "weights/nano"   # checkpoint folder
    robots: str = "all"             # comma-separated robots, or all
    tasks: str = "all"              # comma-separated tasks, or all
    episodes: int = 20              # episodes for each robot and task
    seed: int = EVALUATION_SEED     # first layout seed
    execute_steps: int = EXECUTE_STEPS     # control steps of a chunk that are carried out before the policy looks again
    condition: str = ""             # physical: change one thing: lighting, table, camera, outside, noise or distractor (data/env.py)
    failures: str = ""              # physical: folder for GIFs of the failed episodes, sorted by reason; empty: none are drawn
    temperature: float = 0.0        # of the noise a chunk flows from; 0 is deterministic
    workers: int = 2                # processes
    device: str = "auto"            # auto, cpu, cuda or mps
    corpus: str = "out/corpus"      # digital: the corpus whose validation scenes are asked
    scenes: int = 400               # digital: how many of them
    out: str = ""                   # result file; default out/results/<what>.json


def rollout(blm, env, seed, execute_steps=EXECUTE_STEPS, temperature=0.0, instruction=None, watch=None, max_steps=None):
    """One closed-loop episode of `blm` in `env`: {"success", "steps", "clipped", "jerk": rad/s^3, "act_s": mean seconds a chunk, "reason": why not, or ""}.

    Every `execute_steps` control steps the policy looks again, and only then are pictures drawn: make env with render=False. watch(env): called before
    every control step. max_steps: stop sooner than the task does.
    """
    env.reset(seed, instruction=instruction)
    done = truncated = False
    times, held, states, body = [], [], [env.state()], next(iter(env.task.labels))
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
            states.append(env.state())
            if done or truncated:
                break
    return {"success": bool(done), "steps": env.steps, "clipped": info["clipped"], "jerk": jerk(states, env.robot.dof), "act_s": float(np.mean(times)),
            "reason": "" if done else why(env.task, held)}


def jerk(states, dof):
    """Mean absolute third difference of the joint angles in `states` (L, S), rad/s^3: how rough a motion is."""
    return float(np.abs(np.diff(np.array(states)[:, :dof], 3, axis=0)).mean() * CONTROL_HZ ** 3) if len(states) > 3 else 0.0


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
        made = [(s, demonstrate(env, s)) for s in seeds]
        return robot, task, [{"seed": s, "success": bool(d.success), "steps": len(d.states), "jerk": jerk(d.states, env.robot.dof), "reason": ""} for s, d in made]
    import torch
    from model import BLM
    torch.set_num_threads(1)
    blm, env = BLM.from_pretrained(config.weights, config.device), TabletopEnv(robot, task, render=False, held_out=True, condition=config.condition)
    results = [{"seed": s, **rollout(blm, env, s, config.execute_steps, config.temperature)} for s in seeds]
    env.close()
    return robot, task, results


def episodes_of(what, config, robots, tasks):
    """{(robot, task): [one dict an episode]}, from all processes. What is done stays beside the result file until all is done."""
    path = Path(config.out)
    path, jobs, found = path.with_name(f".{path.name}.part"), {}, []
    for task in tasks:
        for robot in robots:
            for first in range(config.seed, config.seed + config.episodes, 10):
                jobs[robot, task, first] = (what, config, robot, task, range(first, min(first + 10, config.seed + config.episodes)))
    about = {name: value for name, value in asdict(config).items() if name not in ("workers", "out", "failures", "corpus", "scenes")}
    if what == "physical":
        files = sorted(Path(config.weights).glob("*.safetensors"))
        about["weights"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if not file.name.startswith("state")]
    if path.exists():
        head, *found = (json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
        found = [(tuple(key), results) for key, results in found if tuple(key) in jobs] if head == about else []
    with atomic(path) as temporary:                        # half a line, or another evaluation's, goes away
        temporary.write_text("".join(json.dumps(line) + "\n" for line in (about, *found)))
    episodes, left = {}, [job for key, job in jobs.items() if key not in dict(found)]
    for (robot, task, _), results in found:
        episodes.setdefault((robot, task), []).extend(results)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    total, done = len(robots) * len(tasks) * config.episodes, sum(map(len, episodes.values()))
    with multiprocessing.get_context("spawn").Pool(config.workers) as pool, tqdm(total=total, initial=done, unit="episode") as bar, open(path, "a") as part:
        for robot, task, results in pool.imap_unordered(work, left):
            part.write(json.dumps([[robot, task, results[0]["seed"]], results]) + "\n")
            part.flush()
            episodes.setdefault((robot, task), []).extend(results)
            bar.update(len(results))
    return {cell: sorted(results, key=lambda e: e["seed"]) for cell, results in sorted(episodes.items())}


def physical(what, config):
    """Run all cells, print the table, return the result as a dict."""
    robots, tasks = choose_many(config.robots, ROBOTS, "robot"), choose_many(config.tasks, TASKS, "task")
    if what == "physical":
        from model import BLM
        config.device = str(pick_device(config.device))
        blm = BLM.from_pretrained(config.weights, config.device)                             # a bad folder is told here, once
        robots = robots_of(blm, config.robots)
    if config.episodes < 1 or config.workers < 1:
        raise UserError(f"--episodes {config.episodes} and --workers {config.workers} must be at least 1")
    if config.condition:
        choose(config.condition, CONDITIONS, "condition")
    start = time.time()
    episodes, cells = episodes_of(what, config, robots, tasks), {}
    for (robot, task), results in episodes.items():
        wins = [e for e in results if e["success"]]
        cells.setdefault(robot, {})[task] = {"success": len(wins) / len(results), "episodes": len(results),
                                             "interval": [round(x, 3) for x in wilson(len(wins), len(results))],
                                             "seconds_to_success": round(float(np.mean([e["steps"] for e in wins])) / CONTROL_HZ, 2) if wins else None,
                                             "jerk": round(float(np.mean([e["jerk"] for e in results])), 1),
                                             "failures": {e["seed"]: e["reason"] for e in results if not e["success"]}}
    flat = [e for results in episodes.values() for e in results]
    wins = [e for e in flat if e["success"]]
    result = {"what": what, "mean": float(np.mean([c["success"] for row in cells.values() for c in row.values()])),
              "interval": [round(x, 4) for x in wilson(len(wins), len(flat))], "cells": cells, "episodes": len(flat),
              "seconds_to_success": round(float(np.mean([e["steps"] for e in wins])) / CONTROL_HZ, 2) if wins else None,
              "jerk": round(float(np.mean([e["jerk"] for e in flat])), 1), "command": shlex.join(["python", *sys.argv]), "seconds": round(time.time() - start),
              "config": {k: v for k, v in asdict(config).items() if k not in ("corpus", "scenes", "out", "failures")}}
    if what == "physical":
        result["act_ms"] = 1000 * float(np.mean([e["act_s"] for e in flat]))
        result["clipped_steps"] = {kind: sum(e["clipped"][kind] for e in flat) for kind in ("limits", "speed")} | {"of": sum(e["steps"] for e in flat)}
        result["reasons"] = dict(Counter(e["reason"] for e in flat if not e["success"]).most_common())
    print(table(result, robots, tasks))
    if what == "physical" and config.failures:
        draw_failures(blm, config, cells)
    return result


def robots_of(blm, names):
    """The robots called `names`, or all those that `blm` was trained on. UserError if it was not trained on one of them, or cannot act at all."""
    if blm.policy is None:
        raise UserError("this model folder has no policy.safetensors: it answers, but does not act; train a policy with `python train_policy.py`")
    robots, known = choose_many(names, ROBOTS, "robot"), blm.policy.embodiments
    strange = [robot for robot in robots if robot not in known]
    if strange and names != "all":
        raise UserError(f"this model was not trained on {', '.join(strange)}, but on {', '.join(known)}")
    return [robot for robot in robots if robot in known]


def draw_failures(blm, config, cells):
    """A GIF of every failed episode, as <failures>/<reason>/<robot>-<task>-<seed>.gif: run once more, which gives the same."""
    from sample import draw_episode
    failed = [(robot, task, seed, reason) for robot, row in cells.items() for task, cell in row.items() for seed, reason in cell["failures"].items()]
    for robot, task, seed, reason in tqdm(failed, unit="picture"):
        env = TabletopEnv(robot, task, render=False, held_out=True, condition=config.condition)
        draw_episode(blm, env, seed, Path(config.failures) / reason.replace(" ", "_"), config.execute_steps)
        env.close()


def conditions(config):
    """The table of cells once as it is and once under each condition of data/env.py; prints the means, returns all results."""
    found, out = {}, Path(config.out)
    for name in ("", *CONDITIONS):
        print(f"\n{name or 'unchanged'}: {CONDITIONS.get(name, 'as in the demonstrations')}")
        found[name or "unchanged"] = physical("physical", replace(config, condition=name, out=str(out.with_name(f"{out.stem}-{name or 'unchanged'}.json"))))
    tasks = choose_many(config.tasks, TASKS, "task")
    print("\n| condition | " + " | ".join(tasks) + " | mean |\n" + "|---" * (len(tasks) + 2) + "|")
    for name, result in found.items():
        columns = [np.mean([row[task]["success"] for row in result["cells"].values()]) for task in tasks]
        print(f"| {name} | " + " | ".join(f"{100 * x:.0f}" for x in (*columns, result["mean"])) + " |")
    return {"what": "conditions", "means": {name: result["mean"] for name, result in found.items()}, "about": CONDITIONS,
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


def heat_map(result, path, wide=118, high=44, left=84):
    """The table as a picture (PNG): red is 0%, green 100%; below each figure its 95% interval."""
    rows = result["cells"]
    tasks = list(next(iter(rows.values())))
    image = Image.new("RGB", (left + wide * len(tasks), high * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(image)
    for j, task in enumerate(tasks):
        draw.text((left + wide * (j + 0.5), high / 2), task, fill="black", anchor="mm", font_size=14)
    for i, (robot, row) in enumerate(rows.items(), start=1):
        draw.text((left / 2, high * (i + 0.5)), robot, fill="black", anchor="mm", font_size=14)
        for j, cell in enumerate(row.values()):
            x, y, p = left + wide * j, high * i, cell["success"]
            shade = tuple(int(a + (b - a) * q) for q in [2 * p if p < 0.5 else 2 * p - 1]
                          for a, b in zip(*(((215, 90, 80), (250, 235, 170)) if p < 0.5 else ((250, 235, 170), (90, 170, 100)))))
            draw.rectangle((x + 1, y + 1, x + wide - 2, y + high - 2), fill=shade)
            draw.text((x + wide / 2, y + 15), f"{100 * p:.0f}", fill="black", anchor="mm", font_size=16)
            draw.text((x + wide / 2, y + 32), "{:.0f} to {:.0f}".format(*(100 * x for x in cell["interval"])), fill="black", anchor="mm", font_size=11)
    with atomic(path) as temporary:
        image.save(temporary)


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
    kinds = ("expert", "physical", "conditions", "digital")
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        if "--help" in sys.argv or "-h" in sys.argv:
            print(__doc__)
            parse(EvalConfig, argv=["--help"])
        raise UserError(f"say what to evaluate: python eval.py {' | '.join(kinds)}")
    what = choose(sys.argv[1], kinds, "evaluation")
    config = parse(EvalConfig, description=__doc__.split("\n")[0], argv=sys.argv[2:])
    config.out = config.out or f"out/results/{what}.json"
    if what == "expert" and "--episodes" not in " ".join(sys.argv):
        config.episodes = 50
    result = digital(config) if what == "digital" else conditions(config) if what == "conditions" else physical(what, config)
    with atomic(config.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    if what in ("expert", "physical"):
        heat_map(result, Path(config.out).with_suffix(".png"))
    for part in Path(config.out).parent.glob(f".{Path(config.out).stem}*.part"):
        part.unlink()
    print(f"written to {config.out}")


if __name__ == "__main__":
    run(main)
