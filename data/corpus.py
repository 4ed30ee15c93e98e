"""Stage I's corpus: pictures from the simulator, and questions whose answers are its true state.

    python -m data.corpus --scenes 18000 --workers 2            (train; 800 scenes for validation beside it)

A scene is one moment of one robot and task: a random layout and arm pose with spare cubes around ("still"), or a moment of the expert at work
("working"). It has one picture (front) or two (front, wrist), four to eight question-answer turns about them, and dense targets for the base stage:
    patch_class  (V, 8, 8) int     what a patch shows, index into CLASSES, 0 = nothing named
    patch_offset (V, 8, 8, 3)      that object's centre minus the patch's centre (in patches, x to the right, y down), and its camera depth (m) minus 0.6
Coordinates in answers are pixels of the 128 x 128 picture, as Qwen2.5-VL's absolute ones: {"point_2d": [x, y], "label": ...}, {"bbox_2d": [x1, y1, x2, y2], ...}.
Files: <folder>/<split>/<shard>.safetensors with images (n, 128, 128, 3) uint8, first (scenes + 1), the targets, and the turns as JSON in the header.
Validation scenes come from seeds, and questions in wordings, that training never sees.
"""
import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from cli import UserError, atomic, parse, run
from data.env import IMAGE_SIZE, VIEWS, TabletopEnv
from data.expert import demonstrate, tool_rotation
from data.robots import ROBOTS, get_kinematics
from data.tasks import TASKS

GRID = 8                                                      # patches a side of nano's ViT
SPARE = {"yellow cube": (0.95, 0.85, 0.1, 1), "purple cube": (0.55, 0.15, 0.65, 1), "orange cube": (1, 0.5, 0.05, 1), "white cube": (0.95, 0.95, 0.95, 1)}
LABELS = sorted({label for task in TASKS.values() for label in task.labels.values()} | set(SPARE))
CLASSES = ["nothing", "gripper", *LABELS]
SHARD, CLUTTER = 250, 3
VALIDATION_SEED = 2_000_000
NEXT = {"approach": "move above the {}", "descend": "lower the gripper", "grasp": "close the gripper", "lift": "lift the {}", "carry": "carry the {}",
        "place": "set the {} down", "release": "open the gripper", "push": "push the {} forward", "pull": "pull the {} back", "turn": "turn the {} upright"}
# the last wording of each question is kept for validation
WORDINGS = {
    "exists": ("Is there a {}?", "Can you see a {}?", "Is a {} on the table?", "Do you see a {}?", "Is a {} in the picture?", "Does a {} lie on the table?",
               "Is there a {} in view?", "Does the picture show a {}?"),
    "list": ("What is on the table?", "Which objects do you see?", "Name the objects.", "What objects are there?", "List the objects.", "What do you see on the table?",
             "Name everything that lies on the table.", "List everything on the table."),
    "count": ("How many cubes are there?", "Count the cubes.", "How many cubes do you see?", "How many cubes are on the table?", "Give the number of cubes.",
              "How many cubes does the picture show?", "Count the cubes on the table.", "What is the number of cubes?"),
    "colour": ("What colour is the object nearest to the robot?", "Which colour has the object closest to the robot?", "Name the colour of the object nearest to the robot.",
               "What is the colour of the nearest object?", "Which colour is the object closest to the robot?", "What colour has the nearest object?",
               "Tell the colour of the object nearest to the robot.", "The object nearest to the robot has which colour?"),
    "side": ("Is the {} left or right of the {}?", "On which side of the {1} is the {0}, left or right?", "Does the {} lie to the left or to the right of the {}?",
             "Left or right: where is the {} from the {}?", "Is the {} on the left or on the right of the {}?", "To which side of the {1} lies the {0}, left or right?",
             "Do you find the {} left or right of the {}?", "Seen from {1}, is the {0} left or right?"),
    "nearest": ("Which object is nearest to the robot?", "What lies closest to the robot?", "Name the object nearest to the robot.", "What is nearest to the robot?",
                "Which object lies closest to the robot?", "What object is closest to the robot?", "Name what lies nearest to the robot.", "Which thing is closest to the robot?"),
    "point": ("Point to the {} in the {} view.", "Where is the {} in the {} view? Give a point.", "Locate the {} in the {} view with a point.", "Give a point on the {} in the {} view.",
              "Mark the {} in the {} view with a point.", "Point at the {} in the {} view.", "Show where the {} is in the {} view, as a point.", "Show a point on the {} in the {} view."),
    "box": ("Give the box of the {} in the {} view.", "Draw a box around the {} in the {} view.", "Where is the {} in the {} view? Give a box.", "Locate the {} in the {} view with a box.",
            "Mark the {} in the {} view with a box.", "Put a box around the {} in the {} view.", "Show where the {} is in the {} view, as a box.", "Frame the {} in the {} view with a box."),
    "task": ("What is the robot doing?", "Which task is this?", "What task does the robot work on?", "What is the robot at work on?", "What does the robot do?", "Which task does the robot do?",
             "Name this task.", "Name the task of the robot."),
    "next": ("The task: {}. What comes next?", "To {}, what is the next step?", "The robot shall {}. What should it do now?", "The task: {}. What is the next step?",
             "What should the robot do now to {}?", "What comes next, to {}?", "The robot is told to {}. Which step is next?", "In order to {}, which step follows?"),
    "success": ("The task: {}. Is it done?", "Did the robot {}?", "Is this finished: {}?", "The robot shall {}. Is it done?", "The task: {}. Has the robot finished?", "Is it done: {}?",
                "The robot was told to {}. Did it succeed?", "Has the robot managed to {}?"),
    "holding": ("Is the gripper holding something?", "Does the robot hold an object?", "Is something in the gripper?", "Is the robot holding an object?", "Does the gripper hold anything?",
                "Is there an object in the gripper?", "Has the gripper grasped something?", "Has the robot grasped anything?"),
    "robot": ("Which robot is this?", "Name the robot.", "What robot do you see?", "What robot is this?", "Which robot do you see?", "What is the name of this robot?",
              "Which robot is at work?", "Which arm is it?"),
}


@dataclass
class CorpusConfig:
    scenes: int = 18000        # training scenes, spread over all robots and tasks
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
    """The picture, its dense targets, and {label: (x1, y1, x2, y2, pixels)} of what it shows. spare {body: label}."""
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
        seen[CLASSES[c]] = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1, len(xs))
    return picture, patch_class, patch_offset, seen


# ---- questions

def questions(env, views, spare, phase, done, rng, held_out):
    """Every question that this moment allows, as {category: [(question, answer)]}. views {name: what `look` saw there}."""
    def ask(category, *words):
        wordings = WORDINGS[category]
        return (wordings[-1] if held_out else wordings[rng.integers(len(wordings) - 1)]).format(*words)

    bodies = {label: body for body, label in {**env.task.labels, **spare}.items()}
    seen = views["front"]
    visible = [label for label in LABELS if seen.get(label, (0,) * 5)[4] >= 6]
    where = {label: env.position(bodies[label]) for label in visible}
    found = {"robot": [(ask("robot"), env.robot.display_name)]}
    absent = [label for label in LABELS if label not in bodies]
    found["exists"] = [(ask("exists", label), "yes") for label in visible] + [(ask("exists", label), "no") for label in rng.permutation(absent)[:max(1, len(visible))]]
    if visible:
        found["list"] = [(ask("list"), ", ".join(f"{'an' if label[0] in 'aeiou' else 'a'} {label}" for label in visible))]
    found["count"] = [(ask("count"), str(sum("cube" in label for label in visible)))]
    if all(seen.get(label, (0,) * 5)[4] >= 6 for label in bodies):       # only where nothing hides
        order = sorted(visible, key=lambda label: where[label][0])
        if len(order) > 1 and where[order[1]][0] - where[order[0]][0] > 0.025:
            found["nearest"] = [(ask("nearest"), order[0])]
            if order[0].split()[0] not in ("target", "bin", "peg"):
                found["colour"] = [(ask("colour"), order[0].split()[0])]
    pairs = [(a, b) for a in visible for b in visible if a != b and abs(seen[a][0] + seen[a][2] - seen[b][0] - seen[b][2]) > 12]
    found["side"] = [(ask("side", a, b), "left" if seen[a][0] + seen[a][2] < seen[b][0] + seen[b][2] else "right") for a, b in pairs]
    found["point"], found["box"] = [], []
    for view, shown in views.items():
        for label, (x1, y1, x2, y2, pixels) in shown.items():
            x, y, _ = project(env, view, env.position(bodies[label]))
            if pixels >= 8 and 0 <= x < IMAGE_SIZE and 0 <= y < IMAGE_SIZE:
                found["point"].append((ask("point", label, view), json.dumps({"point_2d": [int(x), int(y)], "label": label})))
                found["box"].append((ask("box", label, view), json.dumps({"bbox_2d": [x1, y1, x2, y2], "label": label})))
    if phase is not None:
        first, wording = list(env.task.labels.values())[0], env.task.instructions[rng.integers(len(env.task.instructions))]
        found["task"] = [(ask("task"), env.task.instructions[0])]
        found["success"] = [(ask("success", wording), "yes" if done else "no")]
        if not done and phase in NEXT:
            found["next"] = [(ask("next", wording), NEXT[phase].format(first))]
    held = any(env.grasped(name) for name in env.task.labels if env.model.body(name).mocapid[0] < 0)
    found["holding"] = [(ask("holding"), "yes" if held else "no")]
    return {category: items for category, items in found.items() if items}


def describe(env, spare, phase, done, rng, held_out):
    """One scene: images, targets and turns. Two pictures in seven of ten scenes; pointing in every one, since control lives on it."""
    shown = VIEWS if rng.random() < 0.7 else VIEWS[:1]
    looks = {view: look(env, view, spare) for view in shown}
    found = questions(env, {view: seen for view, (*_, seen) in looks.items()}, spare, phase, done, rng, held_out)
    turns = [q for category in ("point", "box") for q in rng.permutation(found.pop(category, np.empty((0, 2), object)))[:2].tolist()]
    for category in rng.permutation(list(found))[:5]:
        turns.append(found[category][rng.integers(len(found[category]))])
    turns = [list(map(str, turns[i])) for i in rng.permutation(len(turns))]
    return [looks[v][0] for v in shown], [looks[v][1] for v in shown], [looks[v][2] for v in shown], turns


def still(env, seed, rng, held_out):
    """A layout with spare cubes around and the arm anywhere above it."""
    env.reset(seed)
    s, spare, taken = env.robot.scale, {}, [env.position(name)[:2] for name in env.task.labels]
    for i, label in enumerate(rng.permutation(list(SPARE))[:rng.integers(CLUTTER + 1)]):
        xy = rng.uniform((-0.2, -0.22), (0.15, 0.22)) * s
        if min(np.hypot(*(xy - other)) for other in taken) > 0.07:
            env.place(f"clutter{i}", (*xy, 0.02), rng.uniform(0, np.pi))
            env.model.geom(f"clutter{i}").rgba[:] = SPARE[label]
            spare[f"clutter{i}"] = str(label)
            taken.append(xy)
    centre = np.array([env.robot.base_to_spawn_centre, 0, 0])
    for _ in range(5):
        position = centre + rng.uniform((-0.13, -0.13, 0.03), (0.13, 0.13, 0.3)) * (s, s, 0.7 if s < 1 else 1)
        rotation = tool_rotation(env.robot, np.arctan2(position[1], position[0]), rng.normal(0, 0.4), rng.choice([0.0, 0.3]))
        qpos = get_kinematics(env.robot.name).inverse(position, rotation, env.robot.home)
        if qpos is not None:
            env.set_arm(qpos, rng.uniform(0, env.robot.travel))
            break
    mujoco.mj_forward(env.model, env.data)
    scene = describe(env, spare, None, False, rng, held_out)
    for i in range(CLUTTER):
        env.place(f"clutter{i}", (0.1 * i, 0, -0.5))
    return [scene]


def working(env, seed, rng, held_out, moments=4):
    """The expert at work, caught at some moments and at its end."""
    scenes, wanted = [], set(rng.integers(1, 90, moments).tolist())

    def watch(env, phase):
        if env.steps in wanted:
            scenes.append(describe(env, {}, phase, False, rng, held_out))

    if demonstrate(env, seed, 0.015, watch).success:
        scenes.append(describe(env, {}, "done", True, rng, held_out))
    return scenes


# ---- shards

def make_shard(job):
    """Write one shard of `count` scenes of one cell; returns how many are there."""
    path, robot, task, seed, count, held_out = job
    if path.exists():
        return count
    env, scenes = TabletopEnv(robot, task, render=False, held_out=held_out, clutter=CLUTTER), []
    while len(scenes) < count:
        rng = np.random.default_rng([seed, 11])
        make = still if rng.random() < 0.75 else working     # a "working" seed gives several scenes, so that they make up half
        scenes += make(env, seed, rng, held_out)
        seed += 1
    env.close()
    scenes = scenes[:count]
    tensors = {"images": np.concatenate([np.stack(s[0]) for s in scenes]), "patch_class": np.concatenate([np.stack(s[1]) for s in scenes]).astype(np.uint8),
               "patch_offset": np.concatenate([np.stack(s[2]) for s in scenes]).astype(np.float16), "first": np.cumsum([0] + [len(s[0]) for s in scenes])}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"turns": json.dumps([s[3] for s in scenes]), "robot": robot, "task": task, "classes": json.dumps(CLASSES)})
    return count


def make(config):
    """Render what is missing of config.scenes training scenes and 800 validation scenes; the result does not depend on the number of workers."""
    cells, jobs = [(r, t) for t in TASKS for r in ROBOTS], []
    shards = max(1, round(config.scenes / len(cells) / SHARD))
    for c, (robot, task) in enumerate(cells):
        base = config.seed + 10_000 * c
        jobs += [(Path(config.out) / "train" / f"{robot}-{task}-{i:03d}.safetensors", robot, task, base + 300 * i, SHARD, False) for i in range(shards)]
        jobs.append((Path(config.out) / "val" / f"{robot}-{task}-000.safetensors", robot, task, VALIDATION_SEED + base, 34, True))
    # shards are drawn out of order, so that a corpus cut short is balanced
    jobs = [jobs[i] for i in np.random.default_rng(0).permutation(len(jobs))]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with multiprocessing.get_context("spawn").Pool(config.workers) as pool, tqdm(total=sum(j[4] for j in jobs), unit="scene") as bar:
        for count in pool.imap_unordered(make_shard, jobs):
            bar.update(count)


def ensure(folder):
    """Make the default corpus in `folder` unless it is there."""
    config = CorpusConfig(out=str(folder), workers=os.cpu_count() or 1)
    if not any(Path(folder).glob("val/*.safetensors")):
        print(f"no corpus in {folder}: rendering {config.scenes} scenes (about {config.scenes / 50 / 60 / config.workers:.0f} minutes)")
        make(config)


class Corpus:
    """Scenes of a split ("train" or "val"), read from memory-mapped shards.

    corpus[i] -> {"images": [(128, 128, 3) uint8], "turns": [(question, answer)], "patch_class": (V, 8, 8), "patch_offset": (V, 8, 8, 3), "robot": str}.
    """
    num_classes = len(CLASSES)

    def __init__(self, folder, split):
        paths = sorted((Path(folder) / split).glob("*.safetensors"))
        if not paths:
            raise UserError(f"no {split} corpus in {folder}; make it with `python -m data.corpus --out {folder}`")
        self.scenes, self.files = [], []
        for path in paths:
            try:
                file = safe_open(path, "numpy")
                turns, first = json.loads(file.metadata()["turns"]), file.get_tensor("first")
            except Exception as error:
                raise UserError(f"broken corpus file {path} ({type(error).__name__}: {error}); delete it and run `python -m data.corpus --out {folder}` again") from None
            if file.metadata()["classes"] != json.dumps(CLASSES):
                raise UserError(f"{path} was made for other object classes; delete {folder} and run `python -m data.corpus --out {folder}` again")
            self.scenes += [(len(self.files), int(a), int(b), t) for a, b, t in zip(first, first[1:], turns)]
            self.files.append(file)

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        number, a, b, turns = self.scenes[i]
        images, classes, offsets = (self.files[number].get_slice(name)[a:b] for name in ("images", "patch_class", "patch_offset"))
        return {"images": list(images), "turns": [tuple(t) for t in turns], "patch_class": classes.astype(np.int64), "patch_offset": offsets.astype(np.float32),
                "robot": self.files[number].metadata()["robot"]}


def texts(corpus):
    """Every string of the corpus, every instruction, and the chat template's own words, for the tokenizer."""
    words = [*(w for task in TASKS.values() for w in task.instructions), "system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    return [text for *_, turns in corpus.scenes for turn in turns for text in turn] + words * 100


def main():
    config = parse(CorpusConfig, description="Render Stage I's corpus of questions about scenes.")
    make(config)
    print(f"corpus in {config.out}: {len(Corpus(config.out, 'train'))} training scenes, {len(Corpus(config.out, 'val'))} validation scenes")


if __name__ == "__main__":
    run(main)
