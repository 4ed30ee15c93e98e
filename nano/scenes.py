"""Stage I's corpus: pictures from the simulator, and questions whose answers are its true state.

    python -m nano.scenes --scenes 42000 --workers 2            (train; a fifteenth of it for validation beside it)

A scene is one of two things:
    a picture    front, or front and wrist: a random layout with spare cubes around, the arm anywhere, now and then ready to grasp or nearly so
    a clip       four front views in order: an attempt at the task, by the expert or with one of four faults, as a whole, its end,
                 up to the end of a step, or two pictures with two that may follow
It has at most ten questions (data/questions.py) and, for the base stage, dense targets of every picture:
    patch_class  (V, 8, 8) int     what a patch shows, index into CLASSES, 0 = nothing named
    patch_offset (V, 8, 8, 3)      that object's centre minus the patch's centre (in patches, x to the right, y down), and its camera depth (m) minus 0.6
    gripper      (V, 4)            where it is, seen or not: x, y (patches from the picture's centre), depth (dm) minus 6; its opening, 0 closed to 1 open
Files: <folder>/<split>/<shard>.safetensors with images (n, 128, 128, 3) uint8, first (scenes + 1), the targets, and the questions as JSON in the header.
Validation scenes come from seeds that training never sees; their questions are asked twice, in wordings that it sees and in those that it does not.
"""
import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from cli import UserError, at_least, choose_many, parse, run
from jobs import pool

from files import atomic, whole_files, writable, write_json
from data import seeds
from data.simulator import mujoco
from data.env import CROWD, IMAGE_SIZE, VIEWS, TabletopEnv
from data.expert import PEG_LEVER, PRIMITIVES, Infeasible, hand_offset, plan, quarter_turn, tool_rotation
from nano.questions import CATEGORIES, CAUSES, STEP_TEXT, Asker, equalise
from data.robots import ROBOTS, get_kinematics, get_robot
from data.tasks import BLUE, GREEN, RED, TASKS

GRID = 8                                                      # patches a side of nano's ViT
SPARE = {"yellow cube": (0.95, 0.85, 0.1, 1), **CROWD, "red cube": RED, "green cube": GREEN, "blue cube": BLUE}      # the last three where the task has none of its own
LABELS = sorted({label for task in TASKS.values() for label in task.labels.values()} | set(SPARE))
COLOURS = {label: label.split()[0] if " " in label else None for label in LABELS}
GRASPED = [label for label in LABELS if "cube" in label or label in ("blue ball", "peg")]
CLASSES = ["nothing", "gripper", *LABELS]
SHARD, CLUTTER, MOST_QUESTIONS = 250, 3, 10



@dataclass
class CorpusConfig:
    scenes: int = 42000        # training scenes, spread over all robots and tasks
    seed: int = 0              # first seed
    workers: int = 2           # processes
    out: str = "out/corpus"    # folder


# ---- what is in a picture

def project(env, view, point):
    """(x, y) pixels and depth (m) of a point in the task's frame, seen by the camera `view`."""
    camera = env.data.camera(view)
    x, y, z = camera.xmat.reshape(3, 3).T @ (point - camera.xpos)
    focal = IMAGE_SIZE / 2 / np.tan(np.radians(env.model.camera(view).fovy[0]) / 2)
    depth = max(-z, 1e-3)
    return IMAGE_SIZE / 2 + focal * x / depth, IMAGE_SIZE / 2 - focal * y / depth, depth


def look(env, view, spare):
    """The picture, its patch_class, patch_offset and gripper, and {label: (x1, y1, x2, y2, pixels, x, y of its centre)} of what it shows. spare {body: label}."""
    names = {**env.task.labels, **spare}
    label_of = np.zeros(env.model.ngeom + 1, int)             # the last entry serves id -1, the sky
    centres = {1: env.data.site_xpos[env.tcp]}
    for geom in range(env.model.ngeom):
        body = env.model.body(env.model.geom_bodyid[geom]).name
        if body in names:
            label_of[geom] = CLASSES.index(names[body])
            centres[label_of[geom]] = env.data.body(body).xpos
        elif body in ("left_finger", "right_finger"):
            label_of[geom] = 1
    picture, classes = env.draw(view), label_of[env.draw(view, segmentation=True)]
    patch = IMAGE_SIZE // GRID
    tiles = classes.reshape(GRID, patch, GRID, patch).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    counts = (tiles[..., None] == np.arange(len(CLASSES))).sum(2)
    counts[..., 0] = 4                                        # four pixels of an object are enough to name a patch
    counts[..., 2:] *= 4                                      # and objects matter more than fingers in front of them
    patch_class = counts.argmax(-1)
    patch_offset = np.zeros((GRID, GRID, 3), np.float32)
    for c, centre in centres.items():
        x, y, depth = project(env, view, centre)
        rows, columns = np.nonzero(patch_class == c)
        offset = np.stack([x / patch - columns - 0.5, y / patch - rows - 0.5, np.full(len(rows), depth - 0.6)], 1)
        patch_offset[rows, columns] = offset.clip(-GRID, GRID)         # a centre beside or behind the camera projects anywhere
    seen = {}
    for c in np.unique(classes[classes > 1]):
        ys, xs = np.nonzero(classes == c)
        seen[CLASSES[c]] = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1, len(xs), *project(env, view, centres[c])[:2])
    x, y, depth = project(env, view, centres[1])
    gripper = (*np.clip((x / patch - GRID / 2, y / patch - GRID / 2), -GRID, GRID), 10 * depth - 6, env.data.qpos[env.robot.dof] / env.robot.travel)
    return picture, patch_class, patch_offset, gripper, seen


# ---- scenes

def scene_of(shots, asked, rng):
    """A scene of `shots`, what `look` returned: {name: one of each shot}, and up to MOST_QUESTIONS of what was asked."""
    mixed, ranks = [asked[i] for i in rng.permutation(len(asked))], Counter()
    for question in mixed:                                   # one of each category first, then a second of each
        question["rank"] = ranks[question["category"]] = ranks[question["category"]] + 1
    chosen = sorted(mixed, key=lambda question: question.pop("rank"))[:MOST_QUESTIONS]
    images, classes, offsets, grippers, _ = zip(*shots)
    return {"images": images, "patch_class": classes, "patch_offset": offsets, "gripper": grippers}, chosen


def grasp_point(env, label, body):
    """Where to grasp a body: its centre, or a place on the outer half of the peg."""
    at = env.position(body)
    if label != "peg":
        return at
    axis = env.rotation(body)[:, 0]
    return at + PEG_LEVER * axis * np.sign(axis @ (at - env.base))


def picture(env, seed, rng, asker):
    """A layout with spare cubes, and the arm anywhere above it, or with its fingers around something, or nearly."""
    env.reset(seed)
    s, spare, taken = env.robot.scale, {}, [env.position(name)[:2] for name in env.task.labels]
    others = [label for label in SPARE if label not in env.task.labels.values()]
    for i, label in enumerate(rng.permutation(others)[:rng.integers(CLUTTER + 1)]):
        xy = rng.uniform((-0.2, -0.22), (0.15, 0.22)) * s
        if min(np.hypot(*(xy - other)) for other in taken) > 0.07:
            env.place(f"clutter{i}", (*xy, 0.02), rng.uniform(0, np.pi))
            env.model.geom(f"clutter{i}").rgba[:] = SPARE[label]
            spare[f"clutter{i}"] = str(label)
            taken.append(xy)
    mujoco.mj_forward(env.model, env.data)
    bodies = {label: body for body, label in {**env.task.labels, **spare}.items()}
    pose_arm(env, {label: body for label, body in bodies.items() if label in GRASPED}, rng)
    views = VIEWS if rng.random() < 0.7 else VIEWS[:1]
    looks = {view: look(env, view, spare) for view in views}
    grasps = {label: (ready(env, label, body), project(env, "front", grasp_point(env, label, body))[:2]) for label, body in bodies.items() if label in GRASPED}
    asked = asker.picture({view: shot[-1] for view, shot in looks.items()}, list(bodies), {label: env.position(body) for label, body in bodies.items()}, COLOURS, grasps,
                          (env.robot.display_name, env.robot.dof, [get_robot(name).display_name for name in ROBOTS]), sum("cube" in label for label in env.task.labels.values()))
    for i in range(CLUTTER):
        env.place(f"clutter{i}", (0.1 * i, 0, -0.5))
    return scene_of(list(looks.values()), asked, rng)


def pose_arm(env, bodies, rng):
    """The arm anywhere above the table; in four of ten scenes its open fingers around one of `bodies`, or some centimetres beside or above it."""
    s, finger = env.robot.scale, rng.uniform(0, env.robot.travel)
    centre = np.array([env.robot.spawn_distance, 0, 0])
    for _ in range(5):
        position = centre + rng.uniform((-0.13, -0.13, 0.03), (0.13, 0.13, 0.3)) * (s, s, 0.7 if s < 1 else 1)
        turn, tilt = rng.normal(0, 0.4), rng.choice([0.0, 0.3])
        if bodies and rng.random() < 0.4:
            label = rng.choice(sorted(bodies))
            at = grasp_point(env, label, bodies[label])
            turn, tilt, finger = quarter_turn(env, bodies[label], at), 0.0, env.robot.travel
            away = rng.uniform(0.035, 0.06) * [np.array([np.cos(a), np.sin(a), 0.3]) for a in [rng.uniform(0, 2 * np.pi)]][0] if rng.random() < 0.5 else rng.normal(0, 0.003, 3)
            position = at - env.base + away
        rotation = tool_rotation(env.robot, np.arctan2(position[1], position[0]) + turn, tilt)
        qpos = get_kinematics(env.robot.name).solve_ik(position, rotation, env.robot.home)
        if qpos is not None:
            env.set_arm(qpos, finger)
            break
    mujoco.mj_forward(env.model, env.data)


def ready(env, label, body):
    """True if closing the gripper now would grasp the body: it stands open around the place where it should."""
    along, across, down = np.abs(hand_offset(env, grasp_point(env, label, body)))
    return bool(along < 0.012 and across < 0.015 and down < 0.02 and env.data.qpos[env.robot.dof] > 0.028 and not (env.model.body(body).mocapid[0] < 0 and env.grasped(body)))


# ---- attempts

def faults_of(task):
    """What can go wrong in a task: nothing is grasped to be pushed, and the peg is set down wherever it stands."""
    return CAUSES if task.name in ("PickCube", "StackCube", "PlaceSphere") else ("missed", "stopped") if task.name in ("PushCube", "PullCube") else CAUSES[:3]


def attempt(env, seed, rng, fault):
    """The expert's plan, carried out once with a `fault` or, with None, as often as it takes: ([(qpos, phase)] of every control step, success)."""
    env.reset(seed)
    trace, done, shift = [], False, np.append(rng.choice([-1, 1], 2) * rng.uniform(0.035, 0.05, 2), 0)
    late = rng.uniform(0.3, 0.8)                             # where in its step a dropped thing is let go
    for _ in range(1 if fault else 4):
        try:
            primitives = PRIMITIVES[env.task.name](env)
            for step in primitives:
                if step.position is not None and (fault == "missed" and step.name in ("approach", "descend", "push", "pull")
                                                  or fault == "beside" and step.name in ("carry", "place", "retreat") and len(primitives) > 2):
                    step.position = step.position + shift
            segments = plan(env, primitives)
        except Infeasible:
            break
        if fault == "stopped":
            segments = segments[:rng.integers(max(1, len(segments) // 2), max(2, len(segments)))]
        for name, targets in segments:
            for i, action in enumerate(targets):
                if fault == "dropped" and (name == "carry" or name == "lift" and env.task.name == "LiftPegUpright") and i > late * len(targets):
                    action = np.append(action[:-1], env.robot.travel)
                trace.append((env.data.qpos.copy(), name))
                *_, done, truncated, _ = env.step(action)
                if done or truncated:
                    trace.append((env.data.qpos.copy(), name))
                    return trace, bool(done)
            if fault == "dropped" and name == "carry":
                break
    for _ in range(8):                                       # what was let go comes to rest
        *_, done, _, _ = env.step(np.append(env.data.ctrl[:env.robot.dof], env.data.ctrl[env.robot.dof]))
    trace.append((env.data.qpos.copy(), trace[-1][1] if trace else "approach"))
    return trace, bool(done)


def clips(env, seed, rng, asker):
    """The scenes of one attempt: twice as a whole, four times if it failed, its end, up to the end of each of its steps, and three times two pictures with two that
    may follow."""
    causes = faults_of(env.task)
    fault = causes[seed // 4 % len(causes)] if rng.random() < 0.5 else None
    trace, success = attempt(env, seed, rng, fault)
    if len(trace) < 12 or success == (fault is not None):    # a fault that did no harm, or an expert that failed
        return []
    label, task = next(iter(env.task.labels.values())), env.task.instructions[0]
    names, tasks = [phase for _, phase in trace], [other.instructions[0] for other in TASKS.values()]
    last, dof, found = len(trace) - 1, env.robot.dof, []

    def shots(times):
        views = []
        for t in times:
            env.data.qpos[:], env.data.qvel[:] = trace[t][0], 0
            mujoco.mj_forward(env.model, env.data)
            views.append(look(env, "front", {}))
        return views

    def add(times, asked):
        if asked:
            found.append(scene_of(shots(times), asked, rng))

    wording = lambda: env.task.instructions[rng.integers(len(env.task.instructions))]
    for _ in range(4 if fault else 2):
        times = np.linspace(0, last, 4) + np.append(np.insert(rng.uniform(-0.1, 0.1, 2) * last, 0, 0), 0)
        still = rng.random() < 0.25                          # the same picture four times over: nothing moves
        times = np.full(4, rng.integers(last)) if still else times.astype(int)
        moved = bool(np.abs(trace[times[-1]][0][:dof] - trace[times[0]][0][:dof]).max() > 0.05)
        questions = asker.whole(task, tasks, wording(), label, success, fault, causes, moved)
        add(times, [q for q in questions if q["category"] == "embodiment"] if still else questions)
    add(np.linspace(max(0, last - rng.integers(9, 40)), last, 4).astype(int), [q for q in [asker.yes_no("success", success, (wording(),), (task,), ahead=3)] if q])
    ends = [t for t in range(8, last) if names[t] != names[t + 1] and names[t] in STEP_TEXT]
    if fault is None and names.count("approach") and len(set(names)) == len([1 for a, b in zip(names, names[1:]) if a != b]) + 1:     # each step once: no second try
        order = list(dict.fromkeys(names))
        for t in ends:
            add(np.linspace(max(0, t - 24), t, 4).astype(int), asker.within(task, wording(), label, order, order.index(names[t])))
    step, far = 8, lambda t, other: np.abs(trace[other][0] - trace[t][0]).max()
    for t in rng.integers(step, max(step + 1, last - step), 3):
        third, after = rng.random() < 0.5, min(t + step, last)
        other = t - 2 * step if t >= 2 * step and rng.random() < 0.7 else min(t + 5 * step, last)
        if last >= 3 * step and far(t, after) > 0.05 and far(t, other) > 1.5 * far(t, after):        # what stays where it was might be next as well
            add([t - step, t, *((after, other) if third else (other, after))], asker.future(third))
    return found


# ---- shards

def scenes_of(path):
    """How many scenes a shard holds; None if it is not there or cannot be read."""
    try:
        with safe_open(path, "numpy") as file:
            return file.get_slice("first").get_shape()[0] - 1
    except (OSError, SafetensorError):
        return None


def make_shard(job):
    """Write one shard of `count` scenes of one cell; returns how many are there. Validation shards ask every question in seen and in held-out wordings."""
    path, robot, task, seed, count, validation = job
    if scenes_of(path) == count:
        return count
    env, scenes = TabletopEnv(robot, task, render=False, clutter=CLUTTER, varied="looks"), []
    draw = seeds.rng(seed, "wording")
    askers = [Asker(draw, held_out) for held_out in ((False, True) if validation else (False,))]
    while len(scenes) < count:
        for asker in askers:
            rng = seeds.rng(seed, "scene")
            made = [picture(env, seed, rng, asker)] if seed % 4 else clips(env, seed, rng, asker)     # a clip's seed gives up to nine scenes
            for scene in made:
                for question in scene[1]:
                    question["held_out"] = asker.held_out
            scenes += made
        seed += 1
    env.close()
    scenes = scenes[:count]
    joined = lambda name, dtype: np.concatenate([np.stack(shots[name]) for shots, _ in scenes]).astype(dtype)
    tensors = {"images": joined("images", np.uint8), "patch_class": joined("patch_class", np.uint8), "patch_offset": joined("patch_offset", np.float16),
               "gripper": joined("gripper", np.float16), "first": np.cumsum([0] + [len(shots["images"]) for shots, _ in scenes])}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"questions": json.dumps([questions for _, questions in scenes]), "robot": robot, "task": task, "classes": json.dumps(CLASSES)})
    return count


def make(config):
    """Render what is missing of config.scenes training scenes, rounded up to as many for each robot and task, and a fifteenth for validation; the result does
    not depend on the number of workers."""
    at_least(config, 1, "scenes", "workers"), at_least(config, 0, "seed"), writable(config.out)
    cells, jobs = [(r, t) for t in TASKS for r in ROBOTS], []
    of_cell = math.ceil(config.scenes / len(cells))
    sizes = [min(SHARD, of_cell - first) for first in range(0, of_cell, SHARD)]
    for c, (robot, task) in enumerate(cells):
        base = config.seed + 10_000 * c
        jobs += [(Path(config.out) / "train" / f"{robot}-{task}-{i:03d}.safetensors", robot, task, base + 300 * i, size, False) for i, size in enumerate(sizes)]
        jobs.append((Path(config.out) / "val" / f"{robot}-{task}-000.safetensors", robot, task, seeds.FIRST_VALIDATION + base, max(20, config.scenes // 15 // len(cells)), True))
    # shards are drawn out of order, so that a corpus cut short is balanced
    jobs = [jobs[i] for i in np.random.default_rng(0).permutation(len(jobs))]
    with pool(config.workers) as workers, tqdm(total=sum(j[4] for j in jobs), unit="scene") as bar:
        for count in workers.imap_unordered(make_shard, jobs):
            bar.update(count)
    write_json(Path(config.out) / "made.json", asdict(config))


def ensure(folder):
    """Make the default corpus in `folder` unless one is there; in its own folder, one that was not stopped."""
    config, there = CorpusConfig(out=str(folder), workers=os.cpu_count() or 1), whole_files(Path(folder) / "val", "*.safetensors")
    if not there or Path(folder) == Path(CorpusConfig.out) and not (Path(folder) / "made.json").exists():
        print(f"no whole corpus in {folder}: rendering {config.scenes} scenes (about {config.scenes / 25 / 60 / config.workers:.0f} minutes)")
        make(config)


class Corpus:
    """Scenes of a split ("train" or "val"), read from memory-mapped shards.

    corpus[i] -> {"images": [(128, 128, 3) uint8], "turns": [(question, answer)], "questions": the same with category, form and chance,
    "often": how many the corpus has of each one's category, "patch_class": (V, 8, 8), "patch_offset": (V, 8, 8, 3), "gripper": (V, 4), "robot": str, "things": [str], the labels
    of what a clip's task is about, none for pictures}.
    """
    num_classes = len(CLASSES)

    def __init__(self, folder, split, categories="all"):
        self.folder, self.categories, chosen = folder, categories, set(choose_many(categories, CATEGORIES, "category"))
        paths = whole_files(Path(folder) / split, "*.safetensors")
        if not paths:
            raise UserError(f"no {split} corpus in {folder}; make it with `python -m nano.scenes --out {folder}`")
        self.files, places, asked = [], [], []
        for path in paths:
            try:
                file = safe_open(path, "numpy")
                questions, first = json.loads(file.metadata()["questions"]), file.get_tensor("first")
            except Exception as error:
                raise UserError(f"broken corpus file {path} ({type(error).__name__}: {error}); delete it and run `python -m nano.scenes --out {folder}` again") from None
            if file.metadata()["classes"] != json.dumps(CLASSES) or "gripper" not in file.keys():
                raise UserError(f"{path} is of another version of the corpus; delete {folder} and run `python -m nano.scenes --out {folder}` again")
            places += [(len(self.files), int(a), int(b)) for a, b in zip(first, first[1:])]
            asked += [[question for question in scene if question["category"] in chosen] for scene in questions]
            self.files.append(file)
        self.scenes = [(*place, some) for place, some in zip(places, equalise(asked)) if some]
        self.often = Counter(question["category"] for *_, questions in self.scenes for question in questions)

    def validation(self):
        """The validation split of the same folder and categories."""
        return Corpus(self.folder, "val", self.categories)

    def texts(self):
        """Every string of the questions and answers, every instruction, and the chat template's own words, for a tokenizer."""
        words = [*(w for task in TASKS.values() for w in task.instructions), "system\nYou are a helpful assistant.", "user\n", "assistant\n"]
        return [q[part] for *_, questions in self.scenes for q in questions for part in ("question", "answer")] + words * 100

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        number, a, b, questions = self.scenes[i]
        about = self.files[number].metadata()
        images, classes, offsets, gripper = (self.files[number].get_slice(name)[a:b] for name in ("images", "patch_class", "patch_offset", "gripper"))
        return {"images": list(images), "turns": [(q["question"], q["answer"]) for q in questions], "questions": questions, "often": [self.often[q["category"]] for q in questions],
                "patch_class": classes.astype(np.int64), "patch_offset": offsets.astype(np.float32), "gripper": gripper.astype(np.float32), "robot": about["robot"],
                "things": list(TASKS[about["task"]].labels.values()) if b - a > len(VIEWS) else []}


def main():
    config = parse(CorpusConfig, description="Render Stage I's corpus of questions about scenes.")
    make(config)
    print(f"corpus in {config.out}: {len(Corpus(config.out, 'train'))} training scenes, {len(Corpus(config.out, 'val'))} validation scenes")


if __name__ == "__main__":
    run(main)
