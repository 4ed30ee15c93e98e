"""Episodes: recorded from the expert, kept on disk, read at training speed, looked at.

    python -m data.record --robots all --tasks all --episodes 100 --seed 0 --workers 2
    torchrun --nproc_per_node 4 -m data.record                           each process makes its share, on one machine or several with a common folder
    python -m data.record --policy out/policy                            corrections: a policy begins, the expert takes over (DAgger, arXiv 1011.0686)
    python -m data.record --show out/demos --out out/demos.png          a contact sheet (.png) or a moving picture (.gif)

An episode is one safetensors file, <folder>/<robot>-<task>-<seed>.safetensors, L control steps at 20 Hz long:
    state   (L, S) float32   action (L, A) float32     order and units: data/robots.py; row t is what was seen and what the expert commanded
    jpeg    (bytes,) uint8   offset (2 L + 1,) int64    JPEG pictures end to end; front of step t is piece 2 t, wrist 2 t + 1
    phase   (L,) uint8       index into the header's "phases"
Header (one JSON object, "episode"): robot, task, seed, instruction, success, phases, noise, made (the command), version.
Files appear whole or not at all; a second run records only what is missing. Only successes are kept; failures.json counts the others.
"""
import io
import json
import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from cli import UserError, at_least, choose_many, parse, run
from jobs import pool, this_process

from files import atomic, whole_files, writable
from data import seeds
from data.env import TabletopEnv
from data.expert import demonstrate
from data.robots import ROBOTS
from data.tasks import TASKS
from rollout import robots_of, rollout

VERSION = 1
JPEG_QUALITY = 92


@dataclass
class RecordConfig:
    robots: str = "all"      # comma-separated robots, or all
    tasks: str = "all"       # comma-separated tasks, or all
    episodes: int = 100      # successful episodes for each robot and task
    seed: int = 0            # first layout seed; evaluation uses seeds from 1,000,000 on
    workers: int = 2         # processes
    noise: float = 0.015     # rad, smooth disturbance of what is executed (never of what is recorded)
    policy: str = ""         # model folder: corrections, in which this policy begins and the expert takes over; their seeds start 500,000 later
    out: str = "out/demos"   # folder of episodes; with --show the picture to draw
    show: str = ""           # draw this folder (or file) of episodes instead of recording


# ---- writing

def encode(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)      # full colour resolution: objects are a few pixels wide
    return np.frombuffer(buffer.getvalue(), np.uint8)


def write_episode(path, demonstration, robot, task, seed, noise):
    """One Demonstration as a file; see the top of this file."""
    pieces = [encode(images[view]) for images in demonstration.images for view in ("front", "wrist")]
    names = list(dict.fromkeys(demonstration.phases))
    tensors = {"state": demonstration.states, "action": demonstration.actions, "jpeg": np.concatenate(pieces),
               "offset": np.cumsum([0] + [len(p) for p in pieces]), "phase": np.array([names.index(p) for p in demonstration.phases], np.uint8)}
    header = {"robot": robot, "task": task, "seed": seed, "instruction": demonstration.instruction, "success": bool(demonstration.success),
              "phases": names, "noise": noise, "made": shlex.join(sys.argv), "version": VERSION}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"episode": json.dumps(header)})


def correction(blm, env, seed, noise):
    """A Demonstration that begins where `blm` got to in some number of steps: what to do about its own mistakes. None if it was done by then."""
    render, env.render = env.render, False                 # the policy draws only what it looks at
    steps = int(seeds.rng(seed, "takeover").integers(10, env.task.max_steps - 10))
    done = rollout(blm, env, seed, max_steps=steps)["success"]
    env.render = render
    return None if done else demonstrate(env, seed, noise, reset=False)


def load_policy(folder):
    """The BLM of a worker: on the CPU, since pictures are drawn and joints moved between any two looks."""
    import torch                                           # not needed, and slow to load, where the expert works alone
    from model import BLM
    torch.set_num_threads(1)
    return BLM.from_pretrained(folder)


def record_cell(job):
    """Record one slice of a cell: (robot, task, kept, failed seeds). Seeds count up from the slice's start until enough succeed."""
    robot, task, config, first, step = job
    folder, env, blm, kept, failed, seed = Path(config.out), None, None, 0, [], config.seed + first
    wanted = len(range(first, config.episodes, step))
    while kept < wanted:
        path = folder / f"{robot}-{task}-{seed}.safetensors"
        if not path.exists():
            env = env or TabletopEnv(robot, task, varied="all")
            if config.policy:
                blm = blm or load_policy(config.policy)
                demonstration = correction(blm, env, seed, config.noise)
            else:
                demonstration = demonstrate(env, seed, config.noise)
            if demonstration is None or not demonstration.success:
                if demonstration:
                    failed.append(seed)
                if len(failed) > 20 + wanted:
                    raise UserError(f"the expert fails on {robot} {task}: {len(failed)} layouts of {len(failed) + kept}")
                seed += step
                continue
            write_episode(path, demonstration, robot, task, seed, config.noise)
        kept += 1
        seed += step
    if env:
        env.close()
    return robot, task, kept, failed


def record(config):
    """Record what is missing of robots x tasks x episodes into config.out; returns {cell: failed seeds}."""
    robots, tasks = choose_many(config.robots, ROBOTS, "robot"), choose_many(config.tasks, TASKS, "task")
    at_least(config, 1, "episodes", "workers"), at_least(config, 0, "seed", "noise")
    if config.seed + 2 * config.episodes > seeds.FIRST_CORRECTION:
        raise UserError(f"--seed {config.seed}: stay below {seeds.FIRST_CORRECTION:,}, where the seeds of corrections begin, and behind those the evaluation's")
    if config.policy:
        robots = robots_of(load_policy(config.policy), config.robots)              # a bad folder is told here, once
        config = replace(config, seed=config.seed + seeds.FIRST_CORRECTION)
    writable(config.out)
    # slices of ten interleaved seeds, so that the work divides well and the files do not depend on the number of workers
    slices = max(1, config.episodes // 10)
    rank, world = this_process()
    jobs = [(r, t, config, first, slices) for t in tasks for r in robots for first in range(slices)][rank::world]
    counts = Path(config.out) / ("failures.json" if world == 1 else f"failures-{rank}.json")
    failures = json.loads(counts.read_text()) if counts.exists() else {}
    with pool(config.workers) as workers, tqdm(total=sum(len(range(first, config.episodes, slices)) for *_, first, _ in jobs), unit="episode") as bar:
        for robot, task, kept, failed in workers.imap_unordered(record_cell, jobs):
            failures.setdefault(f"{robot}-{task}", []).extend(failed)
            bar.update(kept)
            bar.set_postfix(failed=sum(map(len, failures.values())))
    with atomic(counts) as temporary:
        temporary.write_text(json.dumps({cell: sorted(set(seeds)) for cell, seeds in sorted(failures.items())}, indent=1))
    return failures


# ---- reading

class Episode:
    """One file, memory-mapped: state (L, S), action (L, A) float32, images(t) -> [front, wrist] uint8, header fields as attributes. UserError if broken."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            with safe_open(self.path, "numpy") as file:
                header = json.loads((file.metadata() or {})["episode"])
                self.state, self.action, self.offset, self.phase = (file.get_tensor(n) for n in ("state", "action", "offset", "phase"))
                assert len(self.state) == len(self.action) == len(self.phase) == (len(self.offset) - 1) // 2
                file.get_slice("jpeg").get_shape()
        except (OSError, SafetensorError, KeyError, ValueError, AssertionError) as error:
            raise UserError(f"broken episode file {path} ({type(error).__name__}: {error}); delete it and record again") from None
        if header.get("version") != VERSION:
            raise UserError(f"{path} has format version {header.get('version')}, this code reads {VERSION}; record again")
        self.header = header
        self.robot, self.task, self.seed, self.instruction, self.success = (header[k] for k in ("robot", "task", "seed", "instruction", "success"))
        self.phases = [header["phases"][i] for i in self.phase]

    def __len__(self):
        return len(self.state)

    def images(self, t):
        """[front, wrist] (128, 128, 3) uint8 of step t."""
        with safe_open(self.path, "numpy") as file:
            piece = file.get_slice("jpeg")
            return [np.asarray(Image.open(io.BytesIO(piece[int(self.offset[2 * t + v]):int(self.offset[2 * t + v + 1])].tobytes()))) for v in (0, 1)]


def load_episodes(folder):
    """All episodes of a folder, sorted by cell and seed. UserError if there are none, or one is broken."""
    paths = sorted(whole_files(folder, "*.safetensors"), key=lambda p: (p.stem.rsplit("-", 1)[0], int(p.stem.rsplit("-", 1)[1])) if p.stem.rsplit("-", 1)[-1].isdigit() else ("", 0))
    if not paths:
        raise UserError(f"no episodes in {folder}; make them with `python -m data.record --out {folder}`")
    return [Episode(path) for path in paths]


def ensure(folder):
    """Record the default demonstrations into `folder` unless episodes are there; in their own folder, not those of a recording that was stopped."""
    there, whole = (whole_files(folder, names) for names in ("*.safetensors", "failures*.json"))
    if there and (whole or Path(folder) != Path(RecordConfig.out)):
        return
    config = RecordConfig(out=str(folder), workers=os.cpu_count() or 1)
    print(f"{'not all' if there else 'no'} demonstrations in {folder}: recording {config.episodes} for each of 24 cells (about {24 * config.episodes / 240 / config.workers:.0f} minutes)")
    record(config)


# ---- looking

def show(source, out, frames=4, moments=40):
    """Draw one episode a cell (or the one file `source`), front above wrist: `frames` moments of each as .png, or all cells playing side by side as .gif."""
    paths = {}
    for path in [Path(source)] if Path(source).is_file() else whole_files(source, "*.safetensors"):
        paths.setdefault(path.stem.rsplit("-", 1)[0], path)
    if not paths:
        raise UserError(f"no episodes at {source}; make them with `python -m data.record --out {source}`")
    episodes = sorted((Episode(path) for path in paths.values()), key=lambda e: (list(TASKS).index(e.task), ROBOTS.index(e.robot)))
    moving, wide = Path(out).suffix == ".gif", len({e.robot for e in episodes})
    tiles = [[np.concatenate(e.images(int(t)), 0)[::2, ::2] for t in np.linspace(0, len(e) - 1, moments if moving else frames)] for e in episodes]
    tiles = tiles if moving else [[np.concatenate(row, 1)] for row in tiles]
    tiles += [[np.zeros_like(picture) for picture in tiles[0]]] * (-len(tiles) % wide)
    grids = [Image.fromarray(np.concatenate([np.concatenate([t[i] for t in tiles[r:r + wide]], 1) for r in range(0, len(tiles), wide)])) for i in range(len(tiles[0]))]
    with atomic(out) as temporary:
        grids[0].save(temporary, **({"save_all": True, "append_images": grids[1:], "duration": 100, "loop": 0} if moving else {}))
    print(f"drew {len(episodes)} episodes into {out}")


def main():
    config = parse(RecordConfig, description="Record the expert's demonstrations, or look at them (--show).")
    if config.show:
        out = config.out if Path(config.out).suffix in (".gif", ".png") else "out/demos.png"
        return show(config.show, out)
    failures = record(config)
    print(f"episodes in {config.out}; failed layouts: {sum(map(len, failures.values()))}")


if __name__ == "__main__":
    run(main)
