"""nano's pictures for acting: scenes with commands, and which patches show what each command means.

    python -m nano.commands --scenes 24000 --workers 2        writes out/corpus/commands in about 10 minutes
    python -m nano.commands --env maniskill                   writes out/corpus/maniskill
    python -m nano.commands --env metaworld                   writes out/corpus/metaworld (metaworld.py)

A policy reads a command and two pictures, and no answer is ever written there. So these rows have
no answer either: Stage I learns from them what each patch shows *for this command*, in the hidden
states that the policy will read. A line of train.jsonl or val.jsonl:

    {"images": ["train/panda-which_cube-000/12-0.png", ...], front and wrist,
     "grounding": as in scenes.py, "things": [label] of all that lies there, "robot", "scene",
     "commands": [{"task", "instruction",
                   "things": labels of what is moved and of where it goes, if it goes anywhere,
                  "by_place": names of each by where it lies, if that tells it from the others,
                   "done": whether it is, in these pictures,
                   "roles": 64 letters for each picture, what each patch shows: A neither, B what
                            is moved, C where it goes,
                   "places": [x, y, depth] of both in the front picture, px and m, or null}, ...]}

Training draws another sentence for each command every time, validation reads the one of the file.
Half of the pictures are of a layout with the arm anywhere, half of moments while the expert works.
Every command that the scene allows may be asked of each, but for the combinations that are kept out
of training (data/new_combinations.json). questions.jsonl asks about the commands of val.jsonl.
"""

import itertools
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cli import choose, parse, run
from data import seeds
from data.conversations import Row
from data.env import VIEWS
from data.environments import names_in
from data.expert import Infeasible, control_steps
from data.families import FAMILIES, choose_name, fill, instruct, relations, wording
from data.media import load_image
from data.robots import ROBOTS
from data.tasks import MAX_STEPS, RGBA, TASKS
from nano.command_questions import Asker
from nano.scenes import (
    check_whole,
    classes_of,
    fill_shard,
    look,
    patches_of,
    pose_arm,
    project,
    render,
    shards_of,
    write_lines,
)

SHARD = 100  # scenes of one job
MOMENTS = 3  # pictures of one attempt of the expert
ASKED = 4  # commands of a scene, at most
PLACE_SHARE = 0.5  # of things are named by where they lie: harder than colors, so more of them
SCENES = [*TASKS, *FAMILIES]
WORLDS = ("tabletop", "maniskill", "metaworld")  # environments that it can render


@dataclass
class CommandsConfig:
    scenes: int = 24000  # pairs of pictures, spread over all robots, tasks and families
    seed: int = 0  # first layout seed
    workers: int = 2  # processes
    env: str = "tabletop"  # or maniskill or metaworld
    out: str = ""  # folder; empty: out/corpus/commands, or out/corpus/ and the env


def folder_in(corpus, env):
    """The folder of an environment's scenes with commands, inside that of the other scenes."""
    return str(Path(corpus, "commands" if env == "tabletop" else env))


# ---- scenes


def labels_of(env):
    """{body: what people call it} of all that lies there."""
    if not env.family:
        labels = dict(env.task.labels)
    else:
        labels = {body: env.table.label(body) for body in env.table.layout}
    if "clutter0" in env.start:  # a spare cube
        rgba = env.model.geom("clutter0").rgba
        color = next(name for name, known in RGBA.items() if np.allclose(rgba, known, atol=1e-3))
        labels["clutter0"] = f"{color} cube"
    return labels


def moments(env, seed, rng):
    """Bring the env to a few moments of a layout: yields once at each."""
    env.reset(seed)
    # at the beginning, where everything still lies, from wherever the hand may look
    if rng.random() < 0.5:
        bodies = {label: body for body, label in labels_of(env).items()}
        for _ in range(MOMENTS):
            env.reset(seed)
            pose_arm(env, bodies, rng)
            yield
        return
    # or while a command is carried out: things are held, moved and stacked
    env.reset(seed, command=int(rng.integers(len(env.table.commands))))
    path = [env.data.qpos.copy()]
    try:
        for _, target, _ in itertools.islice(control_steps(env), MAX_STEPS):
            _, _, done, late, _ = env.step(target)
            path.append(env.data.qpos.copy())
            if done or late:
                break
    except Infeasible:  # what it did so far will do
        pass
    # the end is always there: most questions whether something is done are answered "no"
    last = len(path) - 1
    for t in [*rng.integers(last, size=MOMENTS - 1), last]:
        env.data.qpos[:] = path[t]
        env.data.qvel[:] = 0
        env.forward()
        yield


def ask(env, command, views, words):
    """What a command means in the pictures whose segmentation is `views` {view: geom ids}."""
    bodies = list(command.roles.values())
    labels = labels_of(env)
    numbers = {body: i for i, body in enumerate(bodies, start=1)}
    # patches that show both belong to what covers more of them
    roles = []
    for geoms in views.values():
        classes = classes_of(env, geoms, numbers)
        roles.append(patches_of(classes, 1 + len(bodies), first=1))
    # from here on the env's roles, task and success are this command's
    env.give(env.table.commands.index(command))
    points = [env.position(role) for role in env.roles]
    places = [np.round(project(env, "front", point), 4).tolist() for point in points]
    nowhere = [None] * (2 - len(points))  # a peg goes nowhere
    return {
        "task": command.task,
        "things": [labels[body] for body in bodies],
        "by_place": [relations(env.table, body) for body in bodies],
        "done": bool(env.succeeded()),
        "instruction": instruct(env.table, command, words, place_share=PLACE_SHARE),
        "roles": roles,
        "places": places + nowhere,
        "points": np.round(points, 4).tolist() + nowhere,
    }


def scenes_of(env, seed):
    """Records of a seed; their images are still arrays."""
    rng = seeds.rng(seed, "scene")
    records = []
    for _ in moments(env, seed, rng):
        labels = labels_of(env)
        shots = [look(env, view, labels) for view in VIEWS]
        # once for all commands
        views = {view: env.draw(view, segmentation=True) for view in VIEWS}
        order = rng.permutation(len(env.table.commands))[:ASKED]
        commands = [ask(env, env.table.commands[i], views, rng) for i in order]
        images, grounding, _ = zip(*shots)
        record = {"images": images, "grounding": grounding, "commands": commands}
        record["things"] = sorted(set(labels.values()))
        records.append({**record, "robot": env.robot.name, "scene": env.scene})
    return records


# ---- files


def make_shard(env, job):
    match env:
        case "tabletop":
            # looks, camera and spare cubes vary as in the demonstrations that a policy learns from
            return fill_shard(job, scenes_of, varied="all")
        case "maniskill":
            return fill_shard(job, scenes_of, env)
        case "metaworld":
            from nano import metaworld  # packages that the others do without

            return fill_shard(job, metaworld.scenes_of, env)


def jobs_of(config):
    """{split: [(part, robot, scene, first seed, scenes)]}, as many of each cell."""
    jobs = {"train": [], "val": []}
    out = Path(config.out)
    scenes, robots = SCENES, ROBOTS
    if config.env != "tabletop":
        robots, scenes, _ = names_in(config.env)
    cells = list(itertools.product(scenes, robots))
    # rounded up, so that a small folder has each cell
    each = math.ceil(config.scenes / len(cells))
    few = max(4, each // 20)
    for scene, robot in cells:
        # a seed gives several scenes, so shards share none
        jobs["train"] += shards_of(out / "train", robot, scene, each, SHARD, config.seed, SHARD)
        jobs["val"] += shards_of(out / "val", robot, scene, few, few, seeds.FIRST_VALIDATION)
    return jobs


def join(lines, path):
    """Lines as a file; of validation's another file with questions, for eval.py digital."""
    lines = list(lines)
    write_lines(path, lines)
    records = map(json.loads, lines)
    # the questions are about the tabletop's things
    known = [record for record in records if record["robot"] in ROBOTS]
    if path.stem == "val" and known:
        write_lines(path.with_name("questions.jsonl"), questions_of(known))


def questions_of(records):
    """What validation asks about the commands of records: lines of a conversations file."""
    for i, record in enumerate(records):
        # once in wordings that training sees, once in others
        for held_out in (False, True):
            rng = np.random.default_rng([9, i, held_out])
            questions = Asker(record, rng, held_out).all_kinds()
            yield json.dumps({"images": record["images"], "questions": questions})


def make(config):
    choose(config.env, WORLDS, "environment")
    render(config, jobs_of(config), partial(make_shard, config.env), join, config.env)


def reword(record, command, rng):
    """A command of a record in another sentence, drawn as those of demonstrations are."""
    if "by_place" not in command:  # another simulator's tasks have their own few sentences
        return command
    task = TASKS[command["task"]]
    several = record["scene"] in FAMILIES
    names = {role: f"the {label}" for role, label in task.labels.items()}
    labels = record["things"] if several else task.labels.values()
    sentence = wording(task, rng, several=several)
    if several:
        kinds = [label.split()[-1] for label in record["things"]]
        for role, label, by_place in zip(task.labels, command["things"], command["by_place"]):
            alone = kinds.count(label.split()[-1]) == 1
            names[role] = choose_name(label, by_place, alone, rng, PLACE_SHARE)
    return command | {"instruction": fill(sentence, names, labels, rng)}


@dataclass
class Commands:
    """The scenes of a split as rows, a source of train_sft.py: each command, then the pictures.

    A row has all commands of its scene, so the ViT sees its pictures once, each in a sentence that
    is drawn anew every time. Validation asks one, in the sentence of the file.
    """

    folder: str
    split: str = "train"

    def __post_init__(self):
        self.path = Path(self.folder) / f"{self.split}.jsonl"
        check_whole(self.path, f"make it with `python -m nano.commands --out {self.folder}`")
        self.records = [json.loads(line) for line in self.path.read_text().splitlines()]

    def validation(self):
        return Commands(self.folder, "val")

    def __len__(self):
        return len(self.records)

    def name(self, i):
        return f"{self.path}, line {i + 1}"

    def texts(self):
        for record in self.records:
            for command in record["commands"]:
                yield command["instruction"]

    def media(self, record):
        """A record's pictures, as rows have them. UserError if one cannot be read."""
        folder = self.path.parent
        return [("image", load_image(folder / name)) for name in record["images"]]

    def row(self, i, seed=None):
        """A Row; seed (of the run, number of the row) draws the sentences, None is validation."""
        record = self.records[i]
        commands = record["commands"]
        if seed is None:
            commands = [commands[i % len(commands)]]
        else:
            run, row = seed
            rng = np.random.default_rng([run, 3, row])
            commands = [reword(record, command, rng) for command in commands]
        media = self.media(record)
        pictures = [{"type": kind} for kind, _ in media]
        conversations = []
        for command in commands:
            text = {"type": "text", "text": command["instruction"]}
            conversations.append([{"role": "user", "content": [text, *pictures]}])
        about = {"grounding": record["grounding"], "commands": commands}
        return Row(conversations, media, about)


class CommandQuestions(Commands):
    """The same scenes as rows of pictures and then questions: a source of train_sft.py.

    At most `questions` of a row, drawn anew each time; validation asks all, half of the rows in
    wordings that training never sees.
    """

    questions = 4

    def validation(self):
        return CommandQuestions(self.folder, "val")

    def texts(self):
        rng = np.random.default_rng(0)
        for record in self.records:
            for question in Asker(record, rng).all_kinds():
                yield from (question["question"], question["answer"])

    def row(self, i, seed=None):
        record = self.records[i]
        validates = seed is None
        rng = np.random.default_rng([9, i] if validates else [seed[0], 4, seed[1]])
        questions = Asker(record, rng, held_out=validates and i % 2 == 1).all_kinds()
        if not validates:
            order = rng.permutation(len(questions))[: self.questions]
            questions = [questions[n] for n in order]
        media = self.media(record)
        pictures = [{"type": kind} for kind, _ in media]
        conversations = []
        for question in questions:
            content = [*pictures, {"type": "text", "text": question["question"]}]
            answer = {"role": "assistant", "content": question["answer"]}
            conversations.append([{"role": "user", "content": content}, answer])
        about = {"grounding": record["grounding"], "questions": questions}
        return Row(conversations, media, about)


def main():
    config = parse(CommandsConfig, description="Render scenes with commands for Stage I.")
    config.out = config.out or folder_in("out/corpus", config.env)
    make(config)
    print(f"scenes in {config.out}: train.jsonl, val.jsonl and their pictures")


if __name__ == "__main__":
    run(main)
