"""Episodes: recorded from the expert, kept on disk, read at training speed, looked at.

    python -m data.record --robots all --tasks all --episodes 100 --workers 2
    python -m data.record --show out/demos --out out/demos.png      a contact sheet, or a .gif

An episode is one file, <folder>/<robot>-<task>-<seed>.safetensors, L control steps at 20 Hz long:

    state   (L, S) float32      what was seen, and what the expert commanded then;
    action  (L, A) float32      order and units: data/robots.py
    jpeg    (bytes,) uint8      JPEG pictures end to end
    offset  (2 L + 1,) int64    where each begins: front of step t is piece 2 t, wrist 2 t + 1
    phase   (L,) uint8          index into the header's "phases"

Its header has robot, task, seed, instruction, phases, noise, maker, and made (the command).
Files appear whole or not at all, and what they hold does not depend on the number of workers. A
second run records what is missing or damaged. Only successes are kept; failures.json has the seeds
of the others, and is written last.
"""

import io
import itertools
import os
import shlex
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

import data.expert
from cli import UserError, at_least, choose, choose_many, parse, run
from data import seeds
from data.env import TabletopEnv
from data.media import open_image
from data.robots import ROBOTS
from data.tasks import TASKS
from files import (
    Tensors,
    atomic,
    claim,
    reading,
    save_tensors,
    whole_files,
    writable,
    write_json,
)
from jobs import run_jobs

JPEG_QUALITY = 92
LARGEST = 1e3  # rad or m: no arm's state or action comes near
MOST_PIXELS = 1024  # of a picture's side
TRIES = 5  # seeds for each episode that is wanted, and 20 more, before a cell is given up
ADVICE = "delete it and record again"


@dataclass
class RecordConfig:
    robots: str = "all"  # comma-separated robots, or all
    tasks: str = "all"  # comma-separated tasks, or all
    episodes: int = 100  # successful episodes for each robot and task
    seed: int = 0  # first layout seed
    workers: int = 2  # processes
    noise: float = 0.015  # rad, smooth disturbance of what is executed (never of what is recorded)
    out: str = "out/demos"  # folder of episodes; with --show the picture to draw


@dataclass
class Flags(RecordConfig):
    show: str = ""  # draw this folder (or file) of episodes instead of recording


# ---- writing


def encode(image):
    """(bytes,) uint8: a picture (H, W, 3) as JPEG."""
    buffer = io.BytesIO()
    # full color resolution: objects are a few pixels wide
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def write_episode(path, demonstration, robot, task, seed, noise, maker="expert"):
    """One Demonstration as a file; see the top of this file."""
    pieces = []
    for images in demonstration.images:
        pieces += [encode(images["front"]), encode(images["wrist"])]
    # words become numbers, the header says which
    names, phase = np.unique(demonstration.phases, return_inverse=True)
    tensors = {
        "state": demonstration.states,
        "action": demonstration.actions,
        "jpeg": np.concatenate(pieces),
        "offset": np.cumsum([0] + [len(piece) for piece in pieces]),
        "phase": phase.astype(np.uint8),
    }
    about = {
        "robot": robot,
        "task": task,
        "seed": seed,
        "instruction": demonstration.instruction,
        "phases": names.tolist(),
        "noise": noise,
        "maker": maker,
        "made": shlex.join(sys.argv),
    }
    save_tensors(path, tensors, about)


def whole_header(path):
    """The header of an episode, or None if there is none or it is damaged."""
    with suppress(UserError):
        return Episode(path).about


def record_slice(job):
    """Record every `step`-th seed of a cell: (cell's name, episodes, seeds that failed)."""
    config, demonstrate, maker, robot, task, first, step = job  # what a process can be sent
    env = TabletopEnv(robot, task, varied="all")
    wanted = len(range(first, config.episodes, step))
    seed = config.seed + first  # counts up until enough are kept
    # some layouts fail, and some are solved by the policy that was to be corrected
    last = seed + step * (TRIES * wanted + 20)
    kept = 0
    failed = []
    while kept < wanted:
        path = Path(config.out) / f"{robot}-{task}-{seed}.safetensors"
        about = whole_header(path)
        if about is None:
            demonstration = demonstrate(env, seed, config.noise)
            if demonstration and demonstration.success:
                write_episode(path, demonstration, robot, task, seed, config.noise, maker)
                kept += 1
            elif demonstration:  # None is no failure
                failed.append(seed)
        else:
            # kept only if this run would have made it so; older episodes do not name their maker
            there = (about.get("maker", maker), about.get("noise"))
            if there != (maker, config.noise):
                raise UserError(
                    f"{path} was made by {there[0]} with noise {there[1]}, "
                    f"not by {maker} with noise {config.noise}: choose another --out"
                )
            kept += 1
        seed += step
        if seed > last:
            raise UserError(f"{kept} of {wanted} episodes of {robot} {task}, and no more to be had")
    env.close()
    return f"{robot}-{task}", kept, failed


def record(config, demonstrate=data.expert.demonstrate, maker="expert", first_seed=0):
    """Record what is missing of robots x tasks x episodes into config.out.

    demonstrate(env, seed, noise) -> Demonstration, or None for a seed to be left out; it travels
    to the workers. maker: what it is, in the headers; first_seed: what is added to config.seed.
    Returns {cell: seeds that failed}.
    """
    robots = choose_many(config.robots, ROBOTS, "robot")
    tasks = choose_many(config.tasks, TASKS, "task")
    at_least(config, 1, "episodes", "workers")
    at_least(config, 0, "seed", "noise")
    if config.seed + (TRIES + 2) * config.episodes + 20 > seeds.FIRST_CORRECTION:
        limit = f"{seeds.FIRST_CORRECTION:,}"
        raise UserError(f"--seed {config.seed}: stay below {limit}, where other seeds begin")
    config = replace(config, seed=config.seed + first_seed)
    writable(config.out)
    # slices of ten interleaved seeds, so that the work divides well among any number of workers
    step = max(1, config.episodes // 10)
    slices = itertools.product(tasks, robots, range(step))
    jobs = [(config, demonstrate, maker, robot, task, i, step) for task, robot, i in slices]
    episodes = config.episodes * len(robots) * len(tasks)
    failures = defaultdict(list)
    # One recorder a folder: another would draw the same episodes.
    with claim(config.out), tqdm(total=episodes, unit="episode") as bar:
        for cell, kept, failed in run_jobs(record_slice, jobs, config.workers):
            failures[cell] += failed
            bar.update(kept)
        write_json(Path(config.out) / "failures.json", failures)
    return failures


# ---- reading


class Episode:
    """One file: state (L, S), action (L, A) float32, phases [L], images(t); `about`, its header.

    Also robot, task, seed, instruction, and the checksum of all. UserError if a byte is
    not as it was written, or a number cannot be.
    """

    def __init__(self, path):
        self.path = Path(path)
        file = Tensors(path, ADVICE).check()
        with reading(path, ADVICE):
            self.checksum = file.checksum
            self.about = about = file.about
            self.robot = choose(about["robot"], ROBOTS, "robot")
            self.task = choose(about["task"], TASKS, "task")
            self.seed = int(about["seed"])
            self.instruction = str(about["instruction"])
            self.state = file["state"]
            self.action = file["action"]
            self.offset = file["offset"]
            # pictures stay on disk until they are asked for
            self.phases = [about["phases"][i] for i in file["phase"]]
            lengths = {len(self.action), len(self.phases), (len(self.offset) - 1) / 2}
            assert lengths == {len(self)}, "its arrays differ in length"
            for name in ("state", "action"):
                values = file[name]
                assert values.ndim == 2 and values.dtype.kind == "f", f"{name} is no matrix"
                strange = ~(np.abs(values) < LARGEST)  # NaN is not smaller either
                if strange.any():
                    step, number = np.argwhere(strange)[0]
                    raise UserError(f"{name} at step {step} holds {values[step, number]}")

    def __len__(self):
        return len(self.state)

    def images(self, t):
        """[front, wrist] (128, 128, 3) uint8 of step t."""
        with reading(self.path, ADVICE):
            # opened anew: thousands of open maps would not do
            jpeg = safe_open(self.path, "numpy").get_slice("jpeg")
            return [self.picture(jpeg, 2 * t), self.picture(jpeg, 2 * t + 1)]

    def picture(self, jpeg, i):
        start, stop = self.offset[i : i + 2].tolist()
        with open_image(io.BytesIO(jpeg[start:stop].tobytes())) as image:
            assert max(image.size) <= MOST_PIXELS, f"a picture of {image.size} pixels"
            return np.asarray(image)


def load_episodes(folder):
    """All episodes of a folder, sorted by cell and seed. UserError if one is broken, or none."""
    paths = whole_files(folder, "*.safetensors")
    if not paths:
        raise UserError(f"no episodes in {folder}; make them: python -m data.record --out {folder}")
    return sorted(map(Episode, paths), key=lambda e: (f"{e.robot}-{e.task}", e.seed))


def ensure(folder):
    """Record the default demonstrations into `folder` unless episodes are there.

    In their own folder also if not all are: a recording was stopped.
    """
    there = whole_files(folder, "*.safetensors")
    whole = (Path(folder) / "failures.json").exists() or Path(folder) != Path(RecordConfig.out)
    if there and whole:
        return
    config = RecordConfig(out=str(folder), workers=os.cpu_count() or 1)
    minutes = config.episodes / 10 / config.workers  # of one core: ten episodes of all cells
    print(f"too few demonstrations in {folder}: recording them, about {minutes:.0f} minutes")
    record(config)


# ---- looking


def show(source, out):
    """Draw one episode of each cell, front view above wrist view, a row a task, a column a robot.

    A .png has four moments of each, a .gif lets all play side by side. source: a folder or a file.
    """
    paths = [Path(source)] if Path(source).is_file() else whole_files(source, "*.safetensors")
    if not paths:
        raise UserError(f"no episodes at {source}; make them: python -m data.record --out {source}")
    cells = {path.stem.rsplit("-", 1)[0]: path for path in paths}  # the last of each
    episodes = [Episode(path) for path in cells.values()]
    tasks, rows = np.unique([episode.task for episode in episodes], return_inverse=True)
    robots, columns = np.unique([episode.robot for episode in episodes], return_inverse=True)
    moving = Path(out).suffix == ".gif"
    strips = []
    for episode in episodes:
        moments = np.linspace(0, len(episode) - 1, 40 if moving else 4).astype(int)
        # half size; front above wrist
        strips.append([np.concatenate(episode.images(t))[::2, ::2] for t in moments])
    sheet = np.zeros((len(tasks), len(robots), *np.shape(strips[0])), np.uint8)
    sheet[rows, columns] = strips  # (tasks, robots, moments, height, width, 3)
    height = len(tasks) * sheet.shape[3]
    if moving:
        sheet = sheet.transpose(2, 0, 3, 1, 4, 5).reshape(len(moments), height, -1, 3)
    else:  # moments side by side
        sheet = sheet.transpose(0, 3, 1, 2, 4, 5).reshape(1, height, -1, 3)
    frames = [Image.fromarray(frame) for frame in sheet]
    with atomic(out) as temporary:
        frames[0].save(temporary, save_all=moving, append_images=frames[1:], duration=100, loop=0)
    print(f"drew {len(episodes)} episodes into {out}")


def main():
    config = parse(Flags, description="Record the expert's demonstrations, or look at them.")
    if config.show:
        # --out is a folder by default
        drawn = Path(config.out).suffix in (".gif", ".png")
        show(config.show, config.out if drawn else "out/demos.png")
        return
    failures = record(config)
    print(f"episodes in {config.out}; failed layouts: {sum(map(len, failures.values()))}")


if __name__ == "__main__":
    run(main)
