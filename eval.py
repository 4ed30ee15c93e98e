"""Closed-loop success in 24 cells (four robots, six tasks): of the scripted expert, and of one set of weights.

    python eval.py expert                          the planner that makes the demonstrations, 50 layouts a cell
    python eval.py physical --weights weights/nano the policy: camera pictures, joint state and an instruction in wordings it was not trained on
    python eval.py conditions --episodes 10        the policy again, with the light, the camera and so on changed, one thing at a time
    python eval.py digital --weights weights/nano  questions about validation scenes, 17 categories, beside chance and beside noise for pictures
    python eval.py benchmark --name robovqa --data nvidia/Cosmos-Reason1-Benchmark --weights Qwen/Qwen2.5-VL-7B-Instruct        one of the paper's six

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
from tqdm import tqdm, trange

from cli import UserError, at_least, atomic, choose, choose_many, parse, pick_device, run, this_process
from data.env import CONDITIONS, CONTROL_HZ, TabletopEnv, front_pixel
from data.expert import demonstrate
from data.questions import CATEGORIES
from data.robots import ROBOTS, get_robot
from data.tasks import TASKS
from plot import bars, heat_map

EVALUATION_SEED = 1_000_000
ELSEWHERE = ("workers", "out", "failures", "corpus", "questions", "base", "general", "name", "data", "dtype")     # settings that no episode depends on
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
    questions: int = 50             # digital: how many of each category in wordings that training saw, and as many in others
    base: str = ""                  # digital: another model folder to stand beside, such as the one before Stage I
    general: str = "out/general"    # digital: folder with the probes of instruction following
    name: str = "robovqa"           # benchmark: robovqa, agibot, holoassist, robofail, egothink or sharerobot
    data: str = ""                  # benchmark: its folder, or its name on the hub
    dtype: str = "float32"          # benchmark: of the language model; bfloat16 for large ones on a GPU
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
    """{(robot, task): [one dict an episode]}, from all processes; None under torchrun for all but the first, which waits for the others' shares. What is
    done stays beside the result file until all is done."""
    jobs, found, (rank, world) = {}, {}, this_process()
    for task in tasks:
        for robot in robots:
            for first in range(config.seed, config.seed + config.episodes, 10):
                jobs[robot, task, first] = (what, config, robot, task, range(first, min(first + 10, config.seed + config.episodes)))
    about = {name: value for name, value in asdict(config).items() if name not in ELSEWHERE}
    if what == "physical":
        files = sorted(Path(config.weights).glob("*.safetensors"))
        about["weights"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    part_of = lambda rank: Path(config.out).with_name(f".{Path(config.out).name}.{rank}.part")

    def known(path):
        """{(robot, task, first seed): results} of a part file, {} if it is not there or of another evaluation; half a line does not count."""
        head, *lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else [None]
        return {tuple(key): results for key, results in lines if tuple(key) in jobs} if head == about else {}

    for path in Path(config.out).parent.glob(f".{Path(config.out).name}.*.part"):      # of any number of processes
        found |= known(path)
    mine = [job for i, (key, job) in enumerate(jobs.items()) if i % world == rank and key not in found]
    kept = found if rank == 0 else known(part_of(rank))
    with atomic(part_of(rank)) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in (about, *kept.items())))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with multiprocessing.get_context("spawn").Pool(config.workers) as pool, open(part_of(rank), "a") as part, \
            tqdm(total=len(robots) * len(tasks) * config.episodes, initial=sum(map(len, found.values())), unit="episode", disable=rank > 0) as bar:
        for robot, task, results in pool.imap_unordered(work, mine):
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
        robots = robots_of(blm, config.robots)
    if config.condition:
        choose(config.condition, CONDITIONS, "condition")
    start = time.time()
    episodes, cells = episodes_of(what, config, robots, tasks), {}
    if episodes is None:
        return None
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
              "config": {k: v for k, v in asdict(config).items() if k not in ELSEWHERE}}
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
    if None in found.values():
        return None
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


def digital(config):
    """Ask held-back scenes' questions of each category: of the model, of the model with noise for pictures ("blind"), and of a base model if one is named.

    Accuracy by category, in wordings that training saw and in those that it did not, beside chance; pointing error in pixels, and in centimetres on the front
    view; and retention: general instructions (data/general.py), answered by the model and by the base.
    """
    import torch
    from data import general
    from data.chats import Chats
    from data.corpus import Corpus, ensure
    from model import BLM
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
    for name, folder, seen in (("model", config.weights, pictures), ("blind", config.weights, blind), ("base", config.base, pictures)):
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
    result = {"what": "digital", "mean": mean("model"), "blind_mean": mean("blind"), "chance_mean": mean("chance"), **({"base_mean": mean("base")} if config.base else {}),
              "seen_mean": mean("seen"), "held_out_mean": mean("held_out"), "categories": rows, "asked": len(asked), "retention": retention,
              "point_error_px_median": float(np.median(errors)), "point_error_cm_median": 100 * float(np.median(front)), "command": shlex.join(["python", *sys.argv])}
    print(digital_table(result))
    for name, row in retention.items():
        print(f"general instructions, {name}: " + ", ".join(f"{kind} {100 * value:.0f}%" for kind, value in row.items()))
    print(f"pointing error, median: {result['point_error_px_median']:.1f} px of 128; {result['point_error_cm_median']:.1f} cm in the front view")
    return result


def benchmark(config):
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
    result = {"what": "benchmark", "name": config.name, **benchmarks.score(items, replies), "missing": missing, "paper": {"before": before, "after": after},
              "command": shlex.join(["python", *sys.argv]), "replies": replies}
    measures = [name for name in ("accuracy", "exact", "soft") if name in result]
    for category, row in [*result["categories"].items(), ("all", result)]:
        print(f"{category:24s}" + "  ".join(f"{name} {100 * row[name]:.1f}%" for name in measures) + f"  of {row['asked']}")
    print(f"{missing} questions left out for want of their pictures; the paper's figures: {before} before Stage I, {after} after"
          + ("" if "accuracy" in result else "; those are a language model's judgement, which is milder than either of ours"))
    return result


def digital_table(result):
    """Markdown: a row a category, in %."""
    names = [name for name in ("chance", "blind", "base", "model") if f"{name}_mean" in result or name == "model"]
    lines = ["| category | asked | " + " | ".join(names) + " | 95% interval | seen / new wording |", "|---" * (len(names) + 4) + "|"]
    for name, row in result["categories"].items():
        low, high = row["interval"]
        lines.append(f"| {name} | {row['asked']} | " + " | ".join(f"{100 * row[who]:.0f}" for who in names) + f" | {100 * low:.0f} to {100 * high:.0f} | "
                     + " / ".join(f"{100 * row[kind]:.0f}" for kind in ("seen", "held_out") if kind in row) + " |")
    means = " | ".join(f"{100 * result['mean' if who == 'model' else f'{who}_mean']:.1f}" for who in names)
    return "\n".join([*lines, f"| mean | {result['asked']} | {means} | | {100 * result['seen_mean']:.1f} / {100 * result['held_out_mean']:.1f} |"])


def is_right(question, reply):
    """Points: within 5 px, half a cube in the front view. Boxes: an intersection over union of 0.5. All else: the very words."""
    if question["form"] == "point":
        return distance(reply, question["answer"]) <= 5
    return overlap(reply, question["answer"]) >= 0.5 if question["form"] == "box" else reply.strip() == question["answer"]


def distance(given, answer):
    """Pixels between the points of two answers; infinite if one has none."""
    try:
        return float(np.hypot(*np.subtract(json.loads(given)["point_2d"], json.loads(answer)["point_2d"])))
    except (ValueError, KeyError, TypeError):
        return np.inf


def overlap(given, answer):
    """Intersection over union of two answers' boxes; 0 if one has none."""
    try:
        a, b = (np.array(json.loads(text)["bbox_2d"], float) for text in (given, answer))
        inner = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
        return inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner)
    except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
        return 0.0


def main():
    kinds = ("expert", "physical", "conditions", "digital", "benchmark")
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        if "--help" in sys.argv or "-h" in sys.argv:
            print(__doc__)
            parse(EvalConfig, argv=["--help"])
        raise UserError(f"say what to evaluate: python eval.py {' | '.join(kinds)}")
    what = choose(sys.argv[1], kinds, "evaluation")
    config = parse(EvalConfig, description=__doc__.split("\n")[0], argv=sys.argv[2:])
    at_least(config, 1, "episodes", "workers", "execute_steps", "questions"), at_least(config, 0, "seed", "temperature")
    config.out = config.out or f"out/results/{config.name if what == 'benchmark' else what}.json"
    if what == "expert" and "--episodes" not in " ".join(sys.argv):
        config.episodes = 50
    own = {"digital": digital, "conditions": conditions, "benchmark": benchmark}
    result = own[what](config) if what in own else physical(what, config)
    if result is None:                                     # a process whose share another one reports
        return
    with atomic(config.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    if what not in ("conditions", "benchmark"):
        (bars if what == "digital" else heat_map)(result, Path(config.out).with_suffix(".png"))
    for part in Path(config.out).parent.glob(f".{Path(config.out).stem}*.part"):
        part.unlink()
    print(f"written to {config.out}")


if __name__ == "__main__":
    run(main)
