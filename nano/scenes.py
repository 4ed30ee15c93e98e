"""nano's pictures for Stage I, from the simulator, with questions that its true state answers.

    python -m nano.scenes --scenes 42000 --workers 2        writes out/corpus in about 15 minutes

A scene is one of two things:
    a picture   front, or front and wrist: a random layout with spare cubes around, the arm
                anywhere, now and then ready to grasp or nearly so
    a clip      four front views in order: an attempt at the task, by the expert or with one of
                four faults, as a whole, its end, up to the end of a step, or two pictures with two
                that may follow
It has one question of a category (questions.py), is one line of train.jsonl or val.jsonl, and is read
like any other conversations file:

    {"images": ["train/panda-PickCube/12-0.png", ...], "questions": [...], "robot", "task",
     "grounding": [{"patches": 64 letters, row by row, what each patch of this picture shows:
                               A nothing, B gripper, C the first of questions.COLORS, ...
                    "objects": {label: [x, y, depth] of its center}, in pixels and m,
                               of the gripper too, even where it does not show
                    "opening": of the gripper, 0 to 1}, ...]}

Validation scenes come from seeds that training never sees; their questions are asked twice, in
wordings that it sees and in those that it does not. made.json has what they were made from and,
once all is there, checksums. The same flags give the same files, whatever the number of workers.
"""

import itertools
import json
import math
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from cli import UserError, at_least, choose_many, parse, run
from data import expert, seeds
from data.conversations import Conversations
from data.env import IMAGE_SIZE, VIEWS, TabletopEnv
from data.robots import ROBOTS, get_kinematics
from data.simulator import mujoco
from data.tasks import TASKS
from files import atomic, read_json, reading, whole_files, write_json
from jobs import run_jobs
from nano.questions import CATEGORIES, COLORS, DATA, LETTERS, Asker, equalise, numbered

GRID = 8  # patches a side of nano's ViT
PATCH = IMAGE_SIZE // GRID
PICTURE = (IMAGE_SIZE, IMAGE_SIZE, 3)
CLASSES = ["nothing", "gripper", *COLORS]
FINGERS = {"left_finger": "gripper", "right_finger": "gripper"}
CAUSES = DATA["causes"]  # {what can go wrong: its text, tasks, what the robot does}
CLUTTER = 3  # spare cubes at most
LEAST_PIXELS = 8  # of a thing that counts as seen
SPLITS = ("train", "val")


@dataclass
class ScenesConfig:
    scenes: int = 42000  # training scenes, spread over all robots and tasks
    seed: int = 0  # first seed
    workers: int = 2  # processes
    out: str = "out/corpus"  # folder


# ---- what is in a picture


def project(env, view, point):
    """[x, y (pixels), depth (m)] of a point in the task's frame, seen by the camera `view`."""
    camera = env.data.camera(view)
    x, y, z = camera.xmat.reshape(3, 3).T @ (point - camera.xpos)
    depth = max(-z, 1e-3)  # cameras look along -z; what is behind one projects far away
    half = IMAGE_SIZE / 2
    focal = half / np.tan(np.radians(env.model.camera(view).fovy[0]) / 2)
    seen = half + focal * x / depth, half - focal * y / depth, depth
    return np.round(seen, 4).tolist()


def look(env, view, bodies):
    """(picture, its grounding for the record, how things show for the Asker) of {body: label}."""
    # the class of each body, of each geom, of each pixel
    of_body = np.zeros(env.model.nbody, int)
    for body, label in (bodies | FINGERS).items():
        of_body[env.model.body(body).id] = CLASSES.index(label)
    of_geom = np.append(of_body[env.model.geom_bodyid], 0)  # geom -1 is the sky
    classes = of_geom[env.draw(view, segmentation=True)]
    # (128, 128) to a row of pixels for each patch, in reading order
    tiles = rearrange(classes, "(y a) (x b) -> (y x) (a b) 1", a=PATCH, b=PATCH)
    counts = (tiles == np.arange(len(CLASSES))).sum(1)  # (64, C)
    counts[:, 0] = 4  # a few pixels of an object are enough to name a patch
    counts[:, 2:] *= 4  # and objects matter more than fingers in front of them
    centers = {"gripper": project(env, view, env.data.site_xpos[env.tcp])}
    seen = {}
    for body, label in bodies.items():
        ys, xs = np.nonzero(classes == CLASSES.index(label))
        if len(xs) >= LEAST_PIXELS:
            centers[label] = project(env, view, env.position(body))
            # a box ends behind its last pixel
            corners = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            seen[label] = (*corners, *centers[label][:2])
    grounding = {
        "patches": "".join(LETTERS[number] for number in counts.argmax(1)),
        "objects": centers,
        "opening": env.data.qpos[env.robot.dof] / env.robot.travel,
    }
    return env.draw(view), grounding, seen


def scene(env, shots, questions, rng):
    """The record of a scene of what `look` returned; its images are still arrays."""
    images, grounding, _ = zip(*shots)
    # one of each category, whichever the draw says
    asked = {question["category"]: question for question in rng.permutation(questions)}
    record = {"images": images, "questions": list(asked.values()), "grounding": grounding}
    return {**record, "robot": env.robot.name, "task": env.task.name}


# ---- pictures


def picture(env, seed, rng, asker):
    """[the scene] of a layout with spare cubes, the arm anywhere or its fingers around something."""
    env.reset(seed)
    bodies = dict(env.task.labels)
    own = sum("cube" in label for label in bodies.values())
    add_cubes(env, bodies, rng)
    graspable = [body for body, label in bodies.items() if label in DATA["graspable"]]
    pose_arm(env, graspable, rng)
    views = VIEWS if rng.random() < 0.7 else VIEWS[:1]  # the front alone is what clips show
    shots = [look(env, view, bodies) for view in views]
    seen = {view: shown for view, (*_, shown) in zip(views, shots)}
    asker.task = None
    asker.ask("embodiment robot", env.robot.display_name)
    asker.ask("embodiment joints", str(env.robot.dof))
    asker.things(seen, {label: env.position(body) for body, label in bodies.items()}, own)
    for body in graspable:
        if bodies[body] in seen["front"]:
            asker.yes_no("affordance now", ready(env, body), [bodies[body]])
            *place, _ = project(env, "front", env.position(body))
            asker.locate("affordance where", place, bodies[body])
    return [scene(env, shots, asker.take(), rng)]


def add_cubes(env, bodies, rng):
    """Put spare cubes on the table, where nothing lies, and into bodies {body: label}."""
    spare = [label for label in DATA["spare"] if label not in bodies.values()]
    for i, label in enumerate(rng.permutation(spare)[: rng.integers(CLUTTER + 1)].tolist()):
        # on the table before the arm, whose reach the scale follows (m)
        xy = rng.uniform((-0.2, -0.22), (0.15, 0.22)) * env.robot.scale
        taken = [env.position(body)[:2] for body in bodies]
        if np.linalg.norm(xy - taken, axis=1).min() > 0.07:
            body = f"clutter{i}"
            env.place(body, (*xy, 0.02), rng.uniform(0, np.pi))
            env.model.geom(body).rgba[:] = DATA["spare"][label]
            bodies[body] = label
            mujoco.mj_forward(env.model, env.data)  # now it has a position


def pose_arm(env, graspable, rng):
    """The arm anywhere; in four of ten scenes open around a thing, or some centimeters away."""
    # anywhere in a box over the spawn region (m)
    position = rng.uniform((-0.13, -0.13, 0.03), (0.13, 0.13, 0.3)) * env.robot.scale
    finger = rng.uniform(0, env.robot.travel)
    turn = rng.normal(0, 0.4)
    if graspable and rng.random() < 0.4:  # else hardly one scene would be ready to grasp
        body = rng.choice(graspable)
        position = env.position(body)
        finger = env.robot.travel
        turn = expert.quarter_turn(env, body, position)
        # where a grasp would fail by centimeters or, as often, succeed
        position += aside(rng) * rng.choice([0.05, 1])
    direction = expert.azimuth_of(env, position) + turn
    for tilt in expert.TILTS:  # not every arm points straight down everywhere
        rotation = expert.tool_rotation(env.robot, direction, tilt)
        arm = get_kinematics(env.robot.name)
        qpos = arm.solve_ik(position - env.base, rotation, env.robot.home)
        if qpos is not None:
            env.set_arm(qpos, finger)
            break
    mujoco.mj_forward(env.model, env.data)


def aside(rng):
    """(3,) m: three to five centimeters along x, and along y, to either side."""
    return np.append(rng.choice([-1, 1], 2) * rng.uniform(0.03, 0.05, 2), 0)


def ready(env, body):
    """Would closing the gripper now grasp the body? It stands open around its center."""
    offset = expert.hand_offset(env, env.position(body))
    near = np.abs(offset) < (0.012, 0.015, 0.02)
    opened = env.data.qpos[env.robot.dof] > 0.028  # m, a finger's: half a cube takes 0.02
    return near.all() and opened and not env.grasped(body)


# ---- clips


def faulty(env, rng, cause):
    """[(name of the step, action)] of one plan of the expert, in which something goes wrong."""
    primitives = expert.PRIMITIVES[env.task.name](env)
    shift = aside(rng)
    for primitive in primitives:
        if primitive.name in cause.get("astray", ()) and primitive.position is not None:
            primitive.position = primitive.position + shift
    segments = expert.plan(env, primitives)
    if "stops" in cause:
        segments = segments[: rng.integers(2, len(segments))]
    if "opens" in cause:  # in the middle of that step, and nothing is left to do
        while segments[-1][0] not in cause["opens"]:
            segments.pop()
        targets = segments[-1][1]
        targets[len(targets) // 2 :, -1] = env.robot.travel
    steps = [(name, target) for name, targets in segments for target in targets]
    return steps + steps[-1:] * 8  # what was let go comes to rest


def attempt(env, seed, rng, fault):
    """The expert, once with a `fault` or, with None, as often as it takes.

    Returns qpos (T, n) and the step's name of every control step, and whether it succeeded.
    Raises Infeasible.
    """
    env.reset(seed)
    steps = faulty(env, rng, CAUSES[fault]) if fault else expert.control_steps(env)
    qpos, names = [], []
    for name, action, *_ in steps:
        qpos.append(env.data.qpos.copy())
        names.append(name)
        *_, success, truncated, _ = env.step(action)
        if success or truncated:
            break
    return np.array(qpos), names, success


def clips(env, seed, rng, asker):
    """The scenes of one attempt, none if a fault did no harm or the expert failed."""
    causes = [name for name, cause in CAUSES.items() if env.task.name in cause["tasks"]]
    fault = rng.choice(causes) if rng.random() < 0.5 else None
    try:
        qpos, names, success = attempt(env, seed, rng, fault)
    except expert.Infeasible:
        return []
    if len(qpos) < 30 or success != (fault is None):
        return []
    asker.task = env.task
    labels = list(env.task.labels.values())
    texts = {name: CAUSES[name]["text"].format(*labels) for name in causes}
    scenes = []
    for times in moments(qpos, names, labels[0], texts, fault, rng, asker):
        questions = asker.take()
        for question in questions:  # all depend on all that the task is about
            question["labels"] = labels
        if questions:
            shots = [replay(env, qpos[int(t)]) for t in times]
            scenes.append(scene(env, shots, questions, rng))
    return scenes


def replay(env, qpos):
    """What `look` sees from the front at a moment of an attempt."""
    env.data.qpos[:] = qpos
    mujoco.mj_forward(env.model, env.data)
    return look(env, "front", env.task.labels)


def moments(qpos, names, label, texts, fault, rng, asker):
    """Ask about an attempt; yield the four control steps whose pictures the questions are about.

    label: of what is moved; texts {fault: in words}.
    """
    last = len(qpos) - 1
    for _ in range(4 if fault else 2):  # failures are rarer
        asker.ask("task", asker.task.instructions[0])
        asker.yes_no("success", not fault)
        if fault:
            asker.ask("failure", texts[fault], options=texts.values())
        # ends stay ends, the two between them move
        yield np.linspace(0, last, 4) + [0, *rng.uniform(-0.1, 0.1, 2) * last, 0]
    # the ends of steps, but for the last one
    ends = [t for t in range(last) if names[t] != names[t + 1]]
    steps = [DATA["steps"][names[t]].format(label) for t in (*ends, last)]
    left = [numbered(steps[i:]) for i in range(1, len(steps))]
    if not fault and len(set(steps)) == len(steps):  # no second try
        for i, t in enumerate(ends):
            asker.ask("past", steps[i], options=steps[:-1])
            asker.ask("next", steps[i + 1], options=steps[1:])
            asker.ask("remaining", left[i], options=left)
            yield np.linspace(max(0, t - 24), t, 4)
    # two moments and two that may follow: 0.4 s later, and of before or of long after
    for t in rng.integers(16, last - 8, 3):
        after = t + 8
        other = min(last, t + rng.choice([-16, 40]))
        way, other_way = np.abs(qpos[[after, other]] - qpos[t]).max(1)
        # what stays where it was might be next as well
        if way > 0.05 and other_way > 1.5 * way:
            third, fourth = rng.permutation([after, other])
            asker.ask("future", "3" if third == after else "4")
            yield t - 8, t, third, fourth


# ---- files


def checksum(path):
    return zlib.crc32(path.read_bytes())


def write_lines(path, records):
    """JSON lines, all or none; returns their checksum."""
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    return checksum(path)


def make_cell(job):
    """Write the pictures of a cell, then, as a sign that all are there, its lines."""
    name, out, robot, task, first, count = job
    # render: what `reset` and `step` would draw is not looked at
    env = TabletopEnv(robot, task, render=False, clutter=CLUTTER, varied="looks")
    draw = seeds.rng(first, "wording")
    askers = [Asker(draw, kind) for kind in (False, True)[: 1 + name.startswith("val")]]
    scenes = []
    seed = first
    while len(scenes) < count:
        kind = picture if seed % 4 else clips  # a clip's seed gives up to nine scenes
        for asker in askers:
            scenes += kind(env, seed, seeds.rng(seed, "scene"), asker)
        seed += 1
    env.close()
    Path(out, name).mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(scenes[:count]):
        files = [f"{name}/{number}-{i}.png" for i in range(len(record["images"]))]
        for file, image in zip(files, record["images"]):
            Image.fromarray(image).save(Path(out, file), compress_level=1)
        record["images"] = files
    write_lines(Path(out, f"{name}.jsonl"), scenes[:count])


def jobs_of(config):
    """[(name, out, robot, task, first seed, scenes)]: each robot and task has as many."""
    cells = list(itertools.product(TASKS, ROBOTS))
    each = math.ceil(config.scenes / len(cells))  # so that a small corpus has each cell
    jobs = []
    for number, (task, robot) in enumerate(cells):
        cell = f"{robot}-{task}"
        first = config.seed + 10_000 * number  # no two cells share a seed
        jobs.append((f"train/{cell}", config.out, robot, task, first, each))
        first += seeds.FIRST_VALIDATION
        jobs.append((f"val/{cell}", config.out, robot, task, first, max(20, each // 15)))
    return jobs


def join(parts, path):
    """Files' lines as one file, without the "yes" or "no" too many; returns its checksum."""
    records = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    equalise([record["questions"] for record in records])  # over all robots and tasks
    return write_lines(path, [record for record in records if record["questions"]])


def make(config):
    """Render what is missing of a corpus, a cell at a time."""
    at_least(config, 1, "scenes", "workers")
    at_least(config, 0, "seed")
    path = Path(config.out) / "made.json"
    settings = {"scenes": config.scenes, "seed": config.seed}
    before = read_json(path, "delete it") if path.exists() else settings
    if before | settings != before:
        there = f"--scenes {before.get('scenes')} --seed {before.get('seed')}"
        raise UserError(f"{path.parent} is of {there}: choose another --out, or delete it")
    if "checksums" in before:  # all is there
        return
    # now, so that nobody goes on with other settings; checksums last, when all is there
    write_json(path, settings)
    jobs = jobs_of(config)
    missing = [job for job in jobs if not path.parent.joinpath(f"{job[0]}.jsonl").exists()]
    list(tqdm(run_jobs(make_cell, missing, config.workers), total=len(missing), unit="cell"))
    checksums = {}
    for split in SPLITS:
        name = f"{split}.jsonl"
        parts = whole_files(path.with_name(split), "*.jsonl")
        checksums[name] = join(parts, path.with_name(name))
    write_json(path, {**settings, "checksums": checksums})
    for part in path.parent.glob("*/*.jsonl"):
        part.unlink()


class Scenes(Conversations):
    """The scenes of a split ("train" or "val") as rows: a source of train_sft.py.

    A row asks at most `questions` of the chosen categories, drawn anew each time, the rarer its
    category the likelier; with none it has pictures alone. A share `blind` of rows that ask has
    noise for pictures: the model learns to guess where it sees nothing, instead of babbling.
    """

    def __init__(self, folder, split="train", categories="all", questions=4, blind=0.0):
        self.questions = questions
        self.blind = blind
        names = choose_many(categories, CATEGORIES, "category")
        path = Path(folder) / f"{split}.jsonl"
        with reading(path, f"make it with `python -m nano.scenes --out {folder}`"):
            if checksum(path) != read_json(path.with_name("made.json"))["checksums"][path.name]:
                raise UserError("it was damaged or changed since it was made; delete the folder")
        super().__init__(path)
        self.often = Counter()  # questions of each category
        for _, record in self.records:
            chosen = [entry for entry in record["questions"] if entry["category"] in names]
            record["questions"] = chosen
            self.often.update(entry["category"] for entry in chosen)
        self.records = [entry for entry in self.records if entry[1]["questions"]]
        if not self.records:
            raise UserError(f"{path} asks nothing of --categories {categories}: take others")

    def texts(self):
        """Every text, and often, for a tokenizer, every instruction."""
        yield from super().texts()
        for task in TASKS.values():
            yield from task.instructions * 100  # policies read them at every step

    def row(self, i, seed=None):
        """A Row. seed (of the run, number of the row) draws its questions, and whether it is blind.

        Without one it asks all questions as they stand.
        """
        row = super().row(i)
        row.record = dict(row.record)  # the file's stays as it is
        entries = row.record["questions"]
        order = range(len(entries))
        if not self.questions:
            order = []
        elif seed is not None:
            rng = np.random.default_rng(seed)
            # waiting times: who comes first comes with odds of one over how often there are others
            often = [self.often[entry["category"]] for entry in entries]
            order = rng.exponential(often).argsort()[: self.questions]
            if rng.random() < self.blind:
                noise = rng.integers(0, 256, (len(row.media), *PICTURE), dtype=np.uint8)
                row.media = [("image", picture) for picture in noise]
                row.record["grounding"] = None
        pictures = [{"role": "user", "content": [{"type": "image"} for _ in row.media]}]
        row.conversations = [row.conversations[n] for n in order] or [pictures]
        row.record["questions"] = [entries[n] for n in order]
        return row


def main():
    config = parse(ScenesConfig, description="Render pictures for Stage I, and ask about them.")
    make(config)
    print(f"scenes in {config.out}: train.jsonl, val.jsonl and their pictures")


if __name__ == "__main__":
    run(main)
