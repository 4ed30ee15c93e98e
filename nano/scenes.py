"""nano's images for Stage I, from the simulator, with questions answered from its true state.

    python -m nano.scenes --scenes 42000 --workers 2        writes out/corpus in about 15 minutes

A scene is one of two things:
    a picture   front, or front and wrist: a random layout with spare cubes, the arm in a random
                pose, sometimes ready to grasp or nearly so
    a clip      four front views in order: an attempt at the task, by the expert or with one of
                four faults; the whole attempt, its end, the time until a step ends, or two images
                and two possible continuations
It has at most ten questions (questions.py), and is one line of train.jsonl or val.jsonl, which are
ordinary conversations files:

    {"images": ["train/panda-PickCube-000/12-0.png", ...], "questions": [...], "robot", "task",
     "grounding": [{"patches": 64 letters, row by row, what each patch of this image shows:
                               A nothing, B gripper, C the first of questions.COLORS, ...
                    "objects": {label: [x, y, depth] of its center}, in pixels and m;
                               includes the gripper, even if it is not visible
                    "opening": of the gripper, 0 to 1}, ...]}

Validation scenes come from seeds that training never sees. Their questions are asked in seen and in
held-out wordings and, in off_template.jsonl, the way people might ask them. made.json stores the
settings and, once all files are complete, checksums.
"""

import dataclasses
import itertools
import json
import math
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from cli import UserError, at_least, choose_many, parse, run
from data import seeds
from data.conversations import Conversations
from data.env import CROWD, IMAGE_SIZE, VIEWS
from data.environments import open_environment
from data.expert import (
    PEG_LEVER,
    PRIMITIVES,
    Infeasible,
    hand_offset,
    plan,
    quarter_turn,
    tool_rotation,
)
from data.families import BALL_COLORS, BIN_COLORS
from data.robots import ROBOTS, get_kinematics, get_robot
from data.tasks import RGBA, TASKS
from files import atomic, read_json, reading, write_json
from jobs import run_jobs
from nano.questions import CATEGORIES, CAUSES, COLORS, STEPS, Asker, equalise

GRID = 8  # patches per side of nano's ViT
PATCH = IMAGE_SIZE // GRID
PICTURE = (IMAGE_SIZE, IMAGE_SIZE, 3)
MORE = [f"{color} ball" for color in BALL_COLORS] + [f"{color} bin" for color in BIN_COLORS[1:]]
# what a patch may show: classes in questions, then those only in commands; weights depend on the
# order
CLASSES = ["nothing", "gripper", *dict.fromkeys([*COLORS, *MORE])]
SPARE = ("yellow", *CROWD, "red", "green", "blue")  # colors of spare cubes, if the task has none
GRASPABLE = [label for label in COLORS if "cube" in label or label in ("blue ball", "peg")]
CLUTTER = 3  # most spare cubes
MOST_QUESTIONS = 10
SHARD = 250  # scenes per job
SPLITS = {  # files, and the wordings of their questions
    "train": ["seen"],
    "val": ["seen", "held_out"],
    "off_template": ["off_template"],
}
LIFTED = ("lift", "LiftPegUpright")  # a step during which something is held, like "carry"


@dataclass
class ScenesConfig:
    scenes: int = 42000  # training scenes, over all robots and tasks
    seed: int = 0  # first seed
    workers: int = 2  # processes
    out: str = "out/corpus"  # folder


# ---- what is in an image


def project(env, view, point):
    """x, y (pixels) and depth (m) of a point in the task frame, seen by the camera `view`."""
    camera = env.data.camera(view)
    x, y, z = camera.xmat.reshape(3, 3).T @ (point - camera.xpos)
    depth = max(-z, 1e-3)  # cameras look along -z; points behind the camera project far away
    half = IMAGE_SIZE / 2
    focal = half / np.tan(np.radians(env.model.camera(view).fovy[0]) / 2)
    return half + focal * x / depth, half - focal * y / depth, depth


def class_of(label):
    """The name in CLASSES for a label: a white bin looks like the bin of PlaceSphere."""
    return "bin" if label == "white bin" else label


def classes_of(env, geoms, numbers):
    """(128, 128) the class of each pixel in a segmentation; numbers {name of a body: its class}."""
    of_body = np.zeros(env.model.nbody, int)
    for body, number in numbers.items():
        of_body[env.model.body(body).id] = number
    of_geom = of_body[env.model.geom_bodyid]
    return np.append(of_geom, 0)[geoms]  # geom -1 is the sky


def patches_of(classes, number, first):
    """64 letters: the class, out of `number`, that each patch shows; objects start at `first`."""
    # (128, 128) to one row of pixels per patch, in reading order
    tiles = rearrange(classes, "(y a) (x b) -> (y x) (a b)", a=PATCH, b=PATCH)
    counts = (tiles[..., None] == np.arange(number)).sum(1)  # (64, C)
    counts[:, 0] = 4  # four pixels of an object are enough to name a patch
    counts[:, first:] *= 4  # and objects count more than fingers in front of them
    return "".join(chr(ord("A") + number) for number in counts.argmax(1))


def look(env, view, bodies):
    """(image, its grounding for the record, visible objects for the Asker).

    bodies {name of a body: label}; the last {label: (x1, y1, x2, y2, number of pixels, x, y)}. If
    objects share a label, patches are marked, but no center is given.
    """
    labels = list(map(class_of, bodies.values()))
    things = sorted(zip(labels, bodies))
    numbers = {body: CLASSES.index(label) for label, body in things}
    for geom in np.concatenate(env.pads):
        finger = env.model.body(env.model.geom_bodyid[geom])
        numbers[finger.name] = CLASSES.index("gripper")
    geoms = env.draw(view, segmentation=True)
    classes = classes_of(env, geoms, numbers)
    centers = {"gripper": project(env, view, env.data.site_xpos[env.tcp])}
    seen = {}
    for label, body in things:
        ys, xs = np.nonzero(classes == numbers[body])
        if len(xs) and labels.count(label) == 1:
            center = project(env, view, env.position(body))
            centers[label] = center
            # a box ends after its last pixel
            corners = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            seen[label] = (*map(int, corners), len(xs), *center[:2])
    grounding = {
        "patches": patches_of(classes, len(CLASSES), first=2),
        "objects": {label: np.round(center, 4).tolist() for label, center in centers.items()},
        "opening": round(env.opening() / env.robot.travel, 4),
    }
    return env.draw(view), grounding, seen


def scene(env, shots, questions, rng):
    """The record of a scene from the results of `look`; its images are still arrays."""
    mixed = [questions[i] for i in rng.permutation(len(questions))]
    categories = [question["category"] for question in mixed]
    # first one question of each category, then a second of each
    turns = [categories[:i].count(category) for i, category in enumerate(categories)]
    order = np.argsort(turns, kind="stable")[:MOST_QUESTIONS]
    images, grounding, _ = zip(*shots)
    return {
        "images": images,
        "questions": [mixed[i] for i in order],
        "grounding": grounding,
        "robot": env.robot.name,
        "task": env.task.name,
    }


# ---- pictures


def picture(env, seed, rng, asker):
    """[the scene] of a layout with spare cubes, the arm anywhere or around an object."""
    env.reset(seed)
    bodies = {label: body for body, label in env.task.labels.items()}
    own = sum("cube" in label for label in bodies)
    add_cubes(env, bodies, rng)
    # compute positions of bodies from qpos
    env.forward()
    pose_arm(env, bodies, rng)
    views = VIEWS if rng.random() < 0.7 else VIEWS[:1]  # clips show only the front
    things = dict(zip(bodies.values(), bodies))
    shots = [look(env, view, things) for view in views]
    *_, shown = zip(*shots)
    seen = dict(zip(views, shown))
    asker.arm(env.robot, [get_robot(name).display_name for name in ROBOTS])
    where = {label: env.position(body) for label, body in bodies.items()}
    for label in asker.things(seen, where, own):
        if label in GRASPABLE:
            *place, _ = project(env, "front", grasp_point(env, label, bodies[label]))
            asker.grasp(label, ready(env, label, bodies[label]), place)
    return [scene(env, shots, asker.take(), rng)]


def grasp_point(env, label, body):
    """Where to grasp a body: its center, or a point on the outer half of the peg."""
    center = env.position(body)
    if label != "peg":
        return center
    axis = env.rotation(body)[:, 0]
    return center + PEG_LEVER * axis * np.sign(axis @ (center - env.base))


def add_cubes(env, bodies, rng):
    """Put spare cubes in free places on the table, and into bodies {label: body}."""
    others = [f"{color} cube" for color in SPARE if f"{color} cube" not in bodies]
    taken = [env.position(body)[:2] for body in bodies.values()]
    for i, label in enumerate(rng.permutation(others)[: rng.integers(CLUTTER + 1)].tolist()):
        # on the table in front of the arm, scaled with its reach (m)
        xy = rng.uniform((-0.2, -0.22), (0.15, 0.22)) * env.robot.scale
        if np.linalg.norm(xy - taken, axis=1).min() > 0.07:
            body = f"clutter{i}"
            env.place(body, (*xy, 0.02), rng.uniform(0, np.pi))
            env.model.geom(body).rgba[:] = RGBA[label.split()[0]]
            bodies[label] = body
            taken.append(xy)


def pose_arm(env, bodies, rng):
    """Pose the arm anywhere; in four of ten scenes open around an object, or centimeters off."""
    scale = env.robot.scale
    finger = rng.uniform(0, env.robot.travel)
    labels = sorted(set(bodies) & set(GRASPABLE))
    for _ in range(5):  # retry, because not every pose can be reached
        # anywhere in a box over the spawn region, in the base frame (m)
        position = rng.uniform((-0.13, -0.13, 0.03), (0.13, 0.13, 0.3))
        position = position * (scale, scale, 0.7 if scale < 1 else 1) - env.base
        turn = rng.normal(0, 0.4)
        tilt = rng.choice([0.0, 0.3])
        if labels and rng.random() < 0.4:  # otherwise hardly any scene would be ready to grasp
            label = rng.choice(labels)
            point = grasp_point(env, label, bodies[label])
            turn = quarter_turn(env, bodies[label], point)
            tilt = 0.0
            finger = env.robot.travel
            position = point - env.base + beside(rng)
        azimuth = np.arctan2(position[1], position[0])
        rotation = tool_rotation(env.robot, azimuth + turn, tilt, azimuth)
        qpos = get_kinematics(env.robot.name).solve_ik(position, rotation, env.robot.home)
        if qpos is not None:
            env.set_arm([*qpos, finger])
            break
    env.forward()


def beside(rng):
    """(3,) m: offset from a successful grasp, by centimeters or, as often, by millimeters."""
    if rng.random() < 0.5:
        distance = rng.uniform(0.035, 0.06)
        angle = rng.uniform(0, 2 * np.pi)
        return distance * np.array([np.cos(angle), np.sin(angle), 0.3])
    return rng.normal(0, 0.003, 3)


def ready(env, label, body):
    """Would closing the gripper now grasp the body? It must be open around the right point."""
    offset = np.abs(hand_offset(env, grasp_point(env, label, body)))
    opened = env.opening() > 0.028  # m, per finger: half a cube takes 0.02
    return bool((offset < (0.012, 0.015, 0.02)).all() and opened and not env.grasped(body))


# ---- clips


def commands(env, rng, fault):
    """(name of the step, action) of the expert: one plan with a `fault`, else as many as needed."""
    shift = np.append(rng.choice([-1, 1], 2) * rng.uniform(0.035, 0.05, 2), 0)
    late = rng.uniform(0.3, 0.8)  # when in its step a dropped object is released
    astray = CAUSES[fault]["astray"] if fault else []
    for _ in range(1 if fault else 4):  # a second plan would repair the fault
        try:
            primitives = PRIMITIVES[env.task.name](env)
            for primitive in primitives:
                if primitive.position is not None and primitive.name in astray:
                    primitive.position = primitive.position + shift
            segments = plan(env, primitives)
        except Infeasible:
            break
        if fault == "stopped":  # somewhere in the second half
            half = len(segments) // 2
            segments = segments[: rng.integers(max(1, half), max(2, len(segments)))]
        for name, targets in segments:
            held = name == "carry" or (name, env.task.name) == LIFTED
            for i, target in enumerate(targets):
                if fault == "dropped" and held and i > late * len(targets):
                    target = np.append(target[:-1], env.robot.travel)
                yield name, target
            if fault == "dropped" and name == "carry":
                break  # there is nothing left to put down
    for _ in range(8):  # wait until a released object is at rest
        yield None, env.target.copy()


def attempt(env, seed, rng, fault):
    """Run the expert, once with a `fault` or, with None, with as many plans as it needs.

    Returns qpos (T, n) and the step's name for every control step, and whether it succeeded.
    """
    env.reset(seed)
    qpos = []
    names = []
    for name, action in commands(env, rng, fault):
        if name:
            qpos.append(env.data.qpos.copy())
            names.append(name)
        *_, done, truncated, _ = env.step(action)
        if name and (done or truncated):
            break
    # the state after the last step belongs to that step
    return np.array([*qpos, env.data.qpos]), [*names, *names[-1:]], done


def clips(env, seed, rng, asker):
    """The scenes of one attempt; none if a fault did no harm, or if the expert failed."""
    causes = [name for name, cause in CAUSES.items() if env.task.name in cause["tasks"]]
    fault = causes[seed // 4 % len(causes)] if rng.random() < 0.5 else None
    qpos, names, success = attempt(env, seed, rng, fault)
    if len(qpos) < 12 or success != (fault is None):
        return []
    labels = list(env.task.labels.values())
    task = env.task.instructions[0]
    scenes = []

    def add(times):
        """Append a scene of four moments, if there are questions about it."""
        questions = asker.take()
        for question in questions:  # each depends on all of the task's objects
            question["labels"] = labels
        if questions:
            shots = [replay(env, qpos[int(t)], env.task.labels) for t in times]
            scenes.append(scene(env, shots, questions, rng))

    ask_as_a_whole(env, qpos, rng, asker, add, labels[0], fault, causes)
    last = len(qpos) - 1
    begin = max(0, last - rng.integers(9, 40))  # the end of the attempt, half a second to two
    asker.success(task, wording(env, rng), success)
    add(np.linspace(begin, last, 4))
    order = [name for name, _ in groupby(names)]
    if fault is None and "approach" in order and len(set(order)) == len(order):  # no second try
        for t in range(8, last):  # control steps, at 20 Hz
            if names[t] != names[t + 1] and names[t] in STEPS:  # the end of a step
                asker.within(task, wording(env, rng), labels[0], order, names[t])
                add(np.linspace(max(0, t - 24), t, 4))
    ask_what_follows(qpos, rng, asker, add)
    return scenes


def wording(env, rng):
    return env.task.instructions[rng.integers(len(env.task.instructions))]


def replay(env, qpos, bodies):
    """What `look` sees from the front at a moment of an attempt."""
    env.data.qpos[:] = qpos
    env.data.qvel[:] = 0
    env.forward()
    return look(env, "front", bodies)


def ask_as_a_whole(env, qpos, rng, asker, add, label, fault, causes):
    """Scenes from the beginning to the end of an attempt: four if it failed, which is rarer."""
    last = len(qpos) - 1
    tasks = [task.instructions[0] for task in TASKS.values()]
    own = env.task.instructions[0]
    for _ in range(4 if fault else 2):
        times = np.linspace(0, last, 4)
        # the ends are fixed, the two moments between them vary
        times[1:3] += rng.uniform(-0.1, 0.1, 2) * last
        still = rng.random() < 0.25
        times = np.full(4, rng.integers(last)) if still else times.astype(int)
        asker.whole(own, tasks, wording(env, rng), label, fault, causes)
        if still:  # four times the same image shows only that nothing moves
            asker.take()
        way = np.abs(qpos[times[-1]] - qpos[times[0]])
        asker.yes_no("embodiment moving", way[: env.robot.dof].max() > 0.05)
        add(times)


def ask_what_follows(qpos, rng, asker, add):
    """Scenes of two moments and two possible continuations, 0.4 s later and far off."""
    last = len(qpos) - 1
    for t in rng.integers(8, max(9, last - 8), 3):
        third = rng.random() < 0.5
        after = min(t + 8, last)
        # the wrong image is from before, or from long after
        back = t >= 16 and rng.random() < 0.7
        other = t - 16 if back else min(t + 40, last)
        way = np.abs(qpos[after] - qpos[t]).max()
        other_way = np.abs(qpos[other] - qpos[t]).max()
        # if little moves, the wrong image could be right too
        if last >= 24 and way > 0.05 and other_way > 1.5 * way:
            asker.ask("future", "3" if third else "4", options=("3", "4"))
            pair = (after, other) if third else (other, after)
            add([t - 8, t, *pair])


# ---- files


def make_shard(job):
    """`fill_shard` with pictures and clips and their questions."""
    part, *_, first, _ = job
    draw = seeds.rng(first, "wording")
    askers = [Asker(draw, wordings) for wordings in SPLITS[part.parent.name]]

    def scenes_of(env, seed):
        kind = picture if seed % 4 else clips  # the seed of a clip gives up to nine scenes
        scenes = [kind(env, seed, seeds.rng(seed, "scene"), asker) for asker in askers]
        return itertools.chain(*scenes)

    return fill_shard(job, scenes_of, clutter=CLUTTER, varied="looks")


def fill_shard(job, scenes_of, environment="tabletop", **options):
    """Write the images of a shard, then its lines. Returns the number of scenes.

    scenes_of(env, seed): records whose images are still arrays; options: of the environment.
    """
    part, robot, scene, first, count = job
    if part.exists():  # complete, from a run that was stopped
        return count
    # the images of `reset` and `step` are not used
    env = open_environment(environment, robot, scene, render=False, **options)
    records = []
    for seed in itertools.count(first):
        records += scenes_of(env, seed)
        if len(records) >= count:
            break
    env.close()
    write_scenes(part, records[:count])
    return count


def write_scenes(part, records):
    """Write the images of records, then their lines: a part that exists has all its images."""
    folder = part.parent.parent
    with atomic(part) as lines, open(lines, "w") as file:
        for number, record in enumerate(records):
            names = []
            for i, image in enumerate(record["images"]):
                path = part.with_suffix("") / f"{number}-{i}.png"
                with atomic(path) as temporary:
                    Image.fromarray(image).save(temporary, compress_level=1)
                names.append(str(path.relative_to(folder)))
            record["images"] = names
            file.write(json.dumps(record) + "\n")


def jobs_of(config):
    """{split: [(part, robot, task, first seed, scenes)]}: SHARD scenes of a cell, or the remainder.

    All cells have the same number of scenes, and validation has a fifteenth as many.
    """
    jobs = {split: [] for split in SPLITS}
    out = Path(config.out)
    cells = list(itertools.product(TASKS, ROBOTS))
    # rounded up, so that even a small corpus has every cell
    each = math.ceil(config.scenes / len(cells))
    few = max(20, config.scenes // 15 // len(cells))
    for number, (task, robot) in enumerate(cells):
        seed = config.seed + 10_000 * number  # no two cells share a seed
        # 300 seeds give more than SHARD scenes, so shards share none
        jobs["train"] += shards_of(out / "train", robot, task, each, SHARD, seed, 300)
        seed += seeds.FIRST_VALIDATION
        for split in ("val", "off_template"):
            jobs[split] += shards_of(out / split, robot, task, few, few, seed)
    return {split: sorted(shards) for split, shards in jobs.items()}


def shards_of(folder, robot, scene, each, most, seed, apart=0):
    """[(part, robot, scene, first seed, scenes)]: `each` scenes of a cell, `most` per part."""
    shards = []
    for i in range(math.ceil(each / most)):
        part = folder / f"{robot}-{scene}-{i:03d}.jsonl"
        shards.append((part, robot, scene, seed + apart * i, min(most, each - most * i)))
    return shards


def join(lines, path):
    """Write lines to a file, without surplus "yes" or "no" questions."""
    records = [json.loads(line) for line in lines]
    equalise([record["questions"] for record in records])  # balanced over all robots and tasks
    write_lines(path, [json.dumps(record) for record in records if record["questions"]])


def write_lines(path, lines):
    with atomic(path) as temporary, open(temporary, "w") as file:
        file.writelines(f"{line}\n" for line in lines)


def checksum(path):
    return zlib.crc32(path.read_bytes())


def render(config, jobs, make_shard, join, env="tabletop"):
    """Render what is missing in a folder. The result does not depend on the number of workers.

    config has scenes, seed, workers and out; jobs {split: [job]}, where job[0] is the part that
    make_shard(job) writes; join(lines, path) writes all their lines to one file. env: the
    environment.
    """
    at_least(config, 1, "scenes", "workers")
    at_least(config, 0, "seed")
    path = Path(config.out) / "made.json"
    settings = {"scenes": config.scenes, "seed": config.seed, "env": env}
    if path.exists():
        before = {"env": "tabletop"} | read_json(path, "delete it")  # older folders do not name it
        if before | settings != before:
            there = f"--scenes {before.get('scenes')} --seed {before.get('seed')}"
            if before["env"] != env:
                there = f"--env {before['env']} {there}"
            raise UserError(
                f"{path.parent} was made with {there}: choose another --out, or delete it"
            )
        if "checksums" in before:  # everything is there
            return
    # now, so that the folder cannot be continued with other settings; checksums come last
    write_json(path, settings)
    shards = list(itertools.chain(*jobs.values()))
    with tqdm(total=sum(count for *_, count in shards), unit="scene") as bar:
        for count in run_jobs(make_shard, shards, config.workers):
            bar.update(count)
    checksums = {}
    for split in jobs:
        file = path.with_name(f"{split}.jsonl")
        lines = [part.read_text().splitlines() for part, *_ in jobs[split]]
        join(itertools.chain(*lines), file)
        checksums[file.name] = checksum(file)
    write_json(path, {**settings, "checksums": checksums})
    for part, *_ in shards:
        part.unlink()


def make(config):
    render(config, jobs_of(config), make_shard, join)


def check_whole(path, advice):
    """UserError if a file of `render` is missing, or has changed since it was made."""
    with reading(path, advice):
        if checksum(path) != read_json(path.with_name("made.json"))["checksums"][path.name]:
            raise UserError("it was damaged or changed since it was made; delete the folder")


@lru_cache(maxsize=4)
def read_rows(path, time):
    """Conversations of a file with this modification time: several stages read the same file."""
    return Conversations(path)


@dataclass
class Scenes:
    """The scenes of a split ("train" or "val") as rows: a source for train_sft.py.

    A row asks at most `questions` of the chosen categories, drawn anew each time, with higher
    probability for rarer categories. A share `blind` of the rows has noise for images: the model
    learns to guess when it sees nothing, instead of babbling. pictures_only: without questions.
    """

    folder: str
    split: str = "train"
    categories: str = "all"
    questions: int = 4
    blind: float = 0.0
    pictures_only: bool = False

    def __post_init__(self):
        names = choose_many(self.categories, CATEGORIES, "category")
        path = Path(self.folder) / f"{self.split}.jsonl"
        check_whole(path, f"make it with `python -m nano.scenes --out {self.folder}`")
        self.file = read_rows(path, path.stat().st_mtime_ns)
        self.index = []  # (row of the file, indices of its questions)
        self.often = Counter()  # number of questions in each category
        for i, (_, record) in enumerate(self.file.records):
            categories = [question["category"] for question in record["questions"]]
            kept = [n for n, category in enumerate(categories) if category in names]
            self.often.update(categories[n] for n in kept)
            if kept:
                self.index.append((i, kept))
        if not self.index:
            raise UserError(
                f"{path} has no questions in --categories {self.categories}: choose others"
            )

    def validation(self):
        return dataclasses.replace(self, split="val")

    def __len__(self):
        return len(self.index)

    def name(self, i):
        return self.file.name(self.index[i][0])

    def texts(self):
        """All questions and answers, and instructions with many repetitions, for a tokenizer."""
        for i, kept in self.index:
            questions = self.file.records[i][1]["questions"]
            for n in kept:
                yield from (questions[n]["question"], questions[n]["answer"])
        for task in TASKS.values():
            yield from task.instructions * 100  # policies read them at every step

    def row(self, i, seed=None):
        """A Row. seed (of the run, number of the row) draws its questions, and whether it is blind.

        Without a seed it has all questions, in their order.
        """
        i, kept = self.index[i]
        row = self.file.row(i)
        questions = row.record["questions"]
        if self.pictures_only:
            kept = []
        elif seed is not None:
            run, number = seed
            draw = np.random.default_rng([run, 2, number])
            if draw.random() < self.blind:
                row.media = [("image", noise(draw)) for _ in row.media]
                row.record = {**row.record, "grounding": None}
            # exponential waiting times draw without replacement, with odds of one over the
            # frequency
            often = [self.often[questions[n]["category"]] for n in kept]
            wait = np.random.default_rng([run, 1, number]).exponential(often)
            kept = [kept[n] for n in wait.argsort()[: self.questions]]
        pictures = [{"role": "user", "content": [{"type": "image"} for _ in row.media]}]
        row.conversations = [row.conversations[n] for n in kept] or [pictures]
        row.record = {**row.record, "questions": [questions[n] for n in kept]}
        return row


def noise(rng):
    return Image.fromarray(rng.integers(0, 256, PICTURE, dtype=np.uint8))


def main():
    config = parse(ScenesConfig, description="Render pictures for Stage I, and ask about them.")
    make(config)
    print(f"scenes in {config.out}: train.jsonl, val.jsonl and their pictures")


if __name__ == "__main__":
    run(main)
