"""Episodes: record them from the expert, store and load them, look at them.

    python -m data.record --robots all --tasks all --episodes 100 --workers 2
    python -m data.record --show out/demos      a contact sheet, out/demos.png
    python -m data.record --env metaworld --episodes 50 --out out/metaworld
    python -m data.record --env libero --episodes 50 --out out/libero
    python -m data.record --env maniskill --episodes 50 --out out/maniskill
                                                tasks in other simulators (data/environments.py)

An episode is one file, L control steps at 20 Hz: <folder>/<robot>-<task>-<seed>.safetensors, or, in
a scene that allows several commands (data/families.py), <robot>-<family>-<seed>-<n> for the n-th of
them. Each such layout is recorded twice, with two commands, which only the instruction tells apart.

    state   (L, S) float32      what was measured, and what the expert commanded;
    action  (L, A) float32      order and units: data/robots.py
    jpeg    (bytes,) uint8      JPEG images, concatenated
    offset  (V L + 1,) int64    where each starts: step t has V t (front) and V t + 1 (wrist);
                                V = 2 cameras here, 1 to 3 for an imported robot
    phase   (L,) uint8          index into the header's "phases"

The header has robot, scene (a task or a family), command, task, seed, instruction, phases, noise,
maker, made (the command line) and a checksum; also env and embodiment if recorded outside the
tabletop. Files appear whole or not at all, and their content does not depend on the number of
workers. Running again records what is missing or damaged. Only successes are stored; failures.json
lists the seeds of the failures, and is written last.
"""

import io
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from cli import UserError, at_least, choose, command_line, parse, run
from data.environments import cells_of, expert_of, open_environment
from data.families import FAMILIES
from data.media import open_image
from data.robots import ROBOTS
from data.seeds import FIRST_CORRECTION
from data.tasks import TASKS
from embodiment import Embodiment
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
LARGEST = 1e3  # rad or m: far above any arm's state or action
MOST_PIXELS = 1024  # on either side of an image
# Seeds to try per wanted episode, plus 20 more, before a cell is given up: some layouts fail, and
# some are solved by the policy that was to be corrected.
TRIES = 7
ADVICE = "delete it and record again"


@dataclass
class RecordConfig:
    env: str = "tabletop"  # tabletop, metaworld, libero or maniskill
    robots: str = "all"  # comma-separated robots, or all
    tasks: str = "all"  # comma-separated tasks, or all; families of scenes by name
    episodes: int = 100  # successful episodes for each robot and task
    seed: int = 0  # first layout seed
    workers: int = 2  # processes
    noise: float = 0.015  # rad, smooth disturbance of executed (never of recorded) actions
    out: str = "out/demos"  # folder of episodes


@dataclass
class Flags(RecordConfig):
    show: str = ""  # draw a contact sheet of this folder instead of recording


# ---- writing


def write_episode(path, demonstration, about):
    """Write one Demonstration to a file, with `about` in its header; see the top of this file."""
    pictures = []
    for images in demonstration.images:
        for image in images.values():  # in the order of the prompt
            # do not compress a JPEG twice
            pictures.append(image if isinstance(image, bytes) else to_jpeg(image))
    # words become numbers, which index the header's list
    names, phase = np.unique(demonstration.phases, return_inverse=True)
    tensors = {
        "state": demonstration.states,
        "action": demonstration.actions,
        "jpeg": np.frombuffer(b"".join(pictures), np.uint8),
        "offset": np.cumsum([0, *map(len, pictures)]),
        "phase": phase.astype(np.uint8),
    }
    about = about | {
        "instruction": demonstration.instruction,
        "phases": names.tolist(),
        "made": command_line(),
    }
    save_tensors(path, tensors, about)


def to_jpeg(pixels):
    """(height, width, 3) uint8 to the bytes of a JPEG file."""
    body = io.BytesIO()
    # full color resolution, because objects are only a few pixels wide
    Image.fromarray(pixels).save(body, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return body.getvalue()


def describe(maker, noise, environment):
    """How an episode was made, with the environment: ManiSkill's have the same names as ours."""
    elsewhere = environment not in (None, "tabletop")
    return f"{maker} with noise {noise}" + (f" in {environment}" if elsewhere else "")


def record_slice(job):
    """Record a cell's episodes until there are enough: (name of the cell, seeds that failed)."""
    config, demonstrate, maker, robot, scene, seeds, wanted = job  # all that is sent to the process
    # looks vary only in our own simulator
    varied = {"varied": "all"} if config.env == "tabletop" else {}
    env = open_environment(config.env, robot, scene, **varied)
    cell = f"{robot}-{scene}"
    by = describe(maker, config.noise, config.env)
    commands = (0, 1) if env.family else (0,)
    kept = 0
    left_out = 0
    failed = []
    for seed, command in product(seeds, commands):
        name = f"{cell}-{seed}-{command}" if env.family else f"{cell}-{seed}"
        path = Path(config.out) / f"{name}.safetensors"
        try:
            about = Episode(path).about
        except UserError:  # missing or damaged
            demonstration = demonstrate(env, seed, config.noise, command)
            if not demonstration:  # skipped, which is not a failure
                left_out += 1
                continue
            if not demonstration.success:
                failed.append(seed)
                continue
            about = {
                "robot": robot,
                "scene": scene,
                "command": command,
                "task": env.task.name,
                "seed": seed,
                "noise": config.noise,
                "maker": maker,
            }
            if config.env != "tabletop":  # the robot is not one of ours
                about |= {"env": config.env, "embodiment": asdict(env.embodiment)}
            write_episode(path, demonstration, about)
        else:
            # reuse it only if this run would make the same; older episodes do not name their maker
            made_by = describe(about.get("maker", maker), about.get("noise"), about.get("env"))
            if made_by != by:
                raise UserError(f"{path} was made by {made_by}, not by {by}: choose another --out")
        kept += 1
        if kept == wanted:
            break
    env.close()
    if kept < wanted and not left_out:
        raise UserError(
            f"{kept} of {wanted} episodes of {robot} {scene}, and all seeds are used up"
        )
    if kept < wanted:  # a policy that needs no more corrections is not an error
        print(
            f"{kept} of {wanted} episodes of {robot} {scene}: "
            f"in {left_out} others the policy succeeded"
        )
    return cell, failed


def record(config, demonstrate=None, maker="expert", first_seed=0):
    """Record the missing episodes of robots x tasks x episodes in config.out.

    demonstrate(env, seed, noise, command) -> Demonstration, or None to skip a seed; it is sent to
    the workers, and defaults to the environment's expert. maker: its name in the headers;
    first_seed: added to config.seed.
    Returns {cell: seeds that failed}.
    """
    robots, scenes = cells_of(config)
    demonstrate = demonstrate or expert_of(config.env)
    at_least(config, 1, "episodes", "workers")
    at_least(config, 0, "seed", "noise")
    end = config.seed + TRIES * config.episodes + 20
    if end > FIRST_CORRECTION:
        raise UserError(
            f"--seed {config.seed} --episodes {config.episodes}: "
            f"stay below {FIRST_CORRECTION:,}, where other seeds begin"
        )
    writable(config.out)
    # slices of ten interleaved seeds, so that the work divides evenly among any number of workers
    step = max(1, config.episodes // 10)
    jobs = []
    for scene, robot, i in product(scenes, robots, range(step)):
        own_seeds = range(first_seed + config.seed + i, first_seed + end, step)
        wanted = len(range(i, config.episodes, step))
        jobs.append((config, demonstrate, maker, robot, scene, own_seeds, wanted))
    failures = defaultdict(list)
    # One recorder per folder: another would record the same episodes.
    with claim(config.out):
        done = run_jobs(record_slice, jobs, config.workers)
        for cell, failed in tqdm(done, total=len(jobs)):
            failures[cell] += failed
        write_json(Path(config.out) / "failures.json", failures)
    print(f"episodes in {config.out}; failed layouts: {sum(map(len, failures.values()))}")
    return failures


# ---- reading


class Episode:
    """One file: state (L, S), action (L, A) float32, phases [L], images(t); `about`, its header.

    Also robot, its Embodiment, task, seed, instruction, and the checksum of everything. UserError
    if a byte has changed since writing, or a value is implausible. An imported episode's robot has
    any name, its task is its sentence, and its scene is the dataset's name.
    """

    def __init__(self, path):
        self.path = Path(path)
        file = Tensors(path, ADVICE).check()
        self.checksum = file.checksum
        self.about = file.about
        with reading(path, ADVICE):
            self.robot = self.about["robot"]
            self.task = self.about["task"]
            self.scene = self.about.get("scene", self.task)  # older episodes have only a task
            # episodes of a dataset (data/lerobot.py) or another environment have their own names
            if not {"dataset", "env"} & self.about.keys():
                choose(self.robot, ROBOTS, "robot")
                choose(self.task, TASKS, "task")
                choose(self.scene, [*TASKS, *FAMILIES], "scene")
            self.command = int(self.about.get("command", 0))
            self.seed = int(self.about["seed"])
            self.instruction = str(self.about["instruction"])
            self.state = file["state"]
            self.action = file["action"]
            self.offset = file["offset"]
            self.phases = [self.about["phases"][i] for i in file["phase"]]
            # images stay on disk until they are needed
            pictures = len(self.offset) - 1
            self.embodiment = embodiment_of(self.about, self.state.shape[1], self.action.shape[1])
            shots = pictures / len(self.embodiment.views)
            lengths = {len(self.action), len(self.phases), shots}
            assert lengths == {len(self)}, "its arrays differ in length"
            for name in ("state", "action"):
                values = file[name]
                assert values.ndim == 2 and values.dtype.kind == "f", f"{name} is not a matrix"
                strange = np.argwhere(~(np.abs(values) < LARGEST))  # NaN fails this too
                for step, number in strange:
                    raise UserError(f"{name} at step {step} holds {values[step, number]}")

    def __len__(self):
        return len(self.state)

    def jpegs(self, t):
        """The encoded images of step t, bytes of one JPEG file each."""
        count = len(self.embodiment.views)
        pieces = self.offset[count * t : count * (t + 1) + 1].tolist()
        with reading(self.path, ADVICE):
            # reopened, because thousands of open memory maps would be too many
            jpeg = Tensors(self.path).slice("jpeg")
            return [jpeg[start:stop].tobytes() for start, stop in pairwise(pieces)]

    def images(self, t):
        """[front, wrist] (128, 128, 3) uint8 of step t; an imported episode has any squares."""
        pictures = []
        with reading(self.path, ADVICE):
            for body in self.jpegs(t):
                with open_image(io.BytesIO(body)) as image:
                    assert max(image.size) <= MOST_PIXELS, f"a picture of {image.size} pixels"
                    pictures.append(np.asarray(image))
        return pictures

    def observation(self, t):
        """What the policy would have observed at step t, in the form that `BLM.act` takes."""
        return {
            "images": dict(zip(self.embodiment.views, self.images(t), strict=True)),
            "state": self.state[t],
            "instruction": self.instruction,
        }


def embodiment_of(about, state_dim, action_dim):
    """The Embodiment in an episode's header."""
    if "embodiment" in about:  # another simulator's robot
        return Embodiment(**about["embodiment"])
    if "dataset" not in about:
        return Embodiment(state_dim, action_dim)
    unknown = "the dataset does not name them"
    return Embodiment(
        state_dim,
        action_dim,
        views=tuple(about["cameras"]),
        relative=about.get("relative"),  # None, the default rule, in imports older than this field
        control_hz=about["fps"],
        state=", ".join(about["state_names"]) or unknown,
        action=", ".join(about["action_names"]) or unknown,
    )


def load_episodes(folder):
    """All episodes in a folder, sorted by cell and seed. UserError on a broken one, or none."""
    episodes = [Episode(path) for path in whole_files(folder, "*.safetensors")]
    if not episodes:
        raise UserError(f"no episodes in {folder}; make them: python -m data.record --out {folder}")
    return sorted(episodes, key=lambda e: (f"{e.robot}-{e.scene}", e.seed, e.command))


def ensure(folder):
    """Record the default demonstrations into `folder` if it is the default one and incomplete."""
    config = RecordConfig(workers=os.cpu_count() or 1)
    finished = Path(folder, "failures.json").exists()  # written last
    if Path(folder) == Path(config.out) and not finished:
        print(f"too few demonstrations in {folder}: recording them, a few minutes")
        record(config)


# ---- contact sheet


def show(folder, out):
    """Draw four moments of an episode of each cell: a row per task, a column per robot.

    Front view above wrist view, at half size.
    """
    strips = {}
    cells = {(e.scene, e.robot): e for e in load_episodes(folder)}  # the last of each
    for cell, episode in cells.items():
        moments = np.linspace(0, len(episode) - 1, 4).astype(int)
        views = [np.concatenate(episode.images(t))[::2, ::2] for t in moments]
        strips[cell] = np.hstack(views)
    empty = np.zeros_like(strips[cell])
    scenes, robots = map(sorted, map(set, zip(*cells)))
    rows = []
    for scene in scenes:
        row = [strips.get((scene, robot), empty) for robot in robots]
        rows.append(np.hstack(row))  # moments and robots side by side
    with atomic(out) as temporary:
        Image.fromarray(np.vstack(rows)).save(temporary)
    print(f"drew {len(cells)} episodes into {out}")


def main():
    config = parse(Flags, description="Record the expert's demonstrations, or look at them.")
    if config.show:
        show(config.show, f"{Path(config.show)}.png")  # next to the folder
    else:
        record(config)


if __name__ == "__main__":
    run(main)
