"""Tables and the commands that can be given at them; scenes in which only the words say which.

    which_cube    three cubes and a marker: pick one of them
    which_way     two cubes, each with a target ahead and a target behind: push or pull one of them
    which_stack   three cubes: put one of them on another
    which_bin     two balls and two bins: put one ball into one bin
    peg_or_cube   a peg, two cubes and a marker: stand the peg up, or pick a cube
    mixed         two cubes, a marker, a ball and a bin: whatever the tasks allow

A task that has its table to itself is the same with one command (`table_of`).

A command is one of the six tasks (data/tasks.py) on some of the things that lie there: its `roles`
say which body stands for the task's cube, goal and so on. It is done when the task is, and nothing
else has moved by more than 3 cm.

Some combinations are kept out of all training (new_combinations.json), so that an evaluation can ask
for what was never shown. Positions m, in the task's frame (data/tasks.py).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

import numpy as np

from data.tasks import PEG_RADIUS, RGBA, TASKS, reachable
from data.words import PATTERNS, SHARE, expand, interrupt, pick, vary

BIN_COLORS = ("white", "red", "green", "yellow", "purple")
BALL_COLORS = ("blue", "red", "green", "yellow", "orange")
GAP = 0.088  # m between the centers of neighbors: room for the open fingers
CUBES = ("cube0", "cube1", "cube2")
TWO_CUBES = CUBES[:2]
BALLS = ("ball0", "ball1")
BINS = ("bin0", "bin1")
TARGETS = ("target0", "target1", "target2", "target3")  # ahead of two cubes, then behind them

STILL = 0.03  # m that whatever a command does not name may move
CLEAR = 0.03  # m between a thing and the next, if "left" or "nearest" is to tell them apart
RELATIONS = 0.25  # share of things that are named by where they lie
COLORS_ALONE = 0.15  # share of training sentences that name cubes by color alone: "red"
OTHER_NAMES = {"cube": "block", "ball": "sphere", "bin": "tray"}

# [task, things in the order of its roles] that no training shows
NEW = json.loads((Path(__file__).parent / "new_combinations.json").read_text())


def is_new(task, things):
    """Is this combination of a task and labels, in the order of its roles, kept out of training?"""
    named = [thing for thing in things if thing not in ("target", "green marker")]
    return [task, *named] in NEW


def kind_of(body):
    """A body's name without its number: cube, ball, bin, peg, marker or target."""
    return body.rstrip("0123456789")


@dataclass
class Command:
    """A task on some of the things: roles {name in the task: body}."""

    task: str
    roles: dict


@dataclass
class Table:
    """What lies where: layout {body: (position (3,), yaw)}, colors {body: name} and all commands."""

    layout: dict
    colors: dict
    commands: list

    def label(self, body):
        """What people call it, such as "red cube"."""
        kind = kind_of(body)
        color = "green" if kind == "marker" else self.colors.get(body)
        return f"{color} {kind}" if color else kind

    def things(self, command):
        """The labels of what a command is about, in the order of its roles."""
        return [self.label(body) for body in command.roles.values()]

    def is_new(self, command):
        return is_new(command.task, self.things(command))


@dataclass(frozen=True)
class Family:
    """bodies: those of data/objects/things.xml that lie there. arrange(robot, rng) -> a Table."""

    bodies: tuple
    arrange: Callable


# ---- where things lie


def scatter(robot, rng, boxes, gap=GAP):
    """Points (n, 2), one in each of `boxes` ((low x, low y), (high x, high y)), `gap` apart.

    Boxes are for an arm of scale 1.
    """
    # all at once, again until they fit: one after another the last would have no place left
    low, high = np.swapaxes(boxes, 0, 1) * robot.scale  # (n, 2) each
    first, second = np.triu_indices(len(low), 1)
    while True:
        points = rng.uniform(low, high)
        ways = np.linalg.norm(points[first] - points[second], axis=1)
        if ways.min() > gap and reachable(robot, *points):
            return points


def box(x, y, half_x=0.12, half_y=0.18):
    """Lowest and highest corner of a box around (x, y)."""
    return (x - half_x, y - half_y), (x + half_x, y + half_y)


ANYWHERE = box(0, 0)


def colored(rng, bodies, colors):
    """{body: color}, each another."""
    return dict(zip(bodies, rng.permutation(list(colors)).tolist()))


def turned(rng, cubes, points):
    """{body: (position, yaw)} of cubes on the table, turned anyhow."""
    layout = {}
    for cube, (x, y) in zip(cubes, points):
        # 0.02: half a cube's side, m
        yaw = rng.uniform(0, 2 * np.pi)
        layout[cube] = ((x, y, 0.02), yaw)
    return layout


def straight(bodies, points, height):
    """{body: (position, yaw)} of what is not turned, its center at `height`."""
    return {body: ((x, y, height), 0.0) for body, (x, y) in zip(bodies, points)}


def floating(robot, rng, point):
    """Place of a marker above a point."""
    height = rng.uniform(0.2, 1) * robot.max_goal_height
    return ((*point, robot.cube_half + height), 0.0)


def picks(cubes):
    return [Command("PickCube", {"cube": cube, "goal": "marker0"}) for cube in cubes]


def stacks(cubes):
    pairs = permutations(cubes, 2)
    return [Command("StackCube", {"cubeA": a, "cubeB": b}) for a, b in pairs]


def places(balls, bins):
    pairs = product(balls, bins)
    return [Command("PlaceSphere", {"sphere": ball, "bin": bin_}) for ball, bin_ in pairs]


# ---- the families


def which_cube(robot, rng):
    *points, goal = scatter(robot, rng, [ANYWHERE] * 4)
    layout = turned(rng, CUBES, points)
    layout["marker0"] = floating(robot, rng, goal)
    return Table(layout, colored(rng, CUBES, RGBA), picks(CUBES))


def which_way(robot, rng):
    # one to the left and one to the right, so that neither is in the other's way
    left = box(0, 0.135, 0.05, 0.025)
    right = box(0, -0.135, 0.05, 0.025)
    points = scatter(robot, rng, [left, right])
    layout = straight(TWO_CUBES, points, 0.02)
    away = (0.2 * robot.scale, 0)
    # 0.5 mm up, so that the rings are seen
    layout |= straight(TARGETS, [*(points + away), *(points - away)], 0.0005)
    commands = []
    for i, cube in enumerate(TWO_CUBES):
        commands.append(Command("PushCube", {"cube": cube, "goal": TARGETS[i]}))
        commands.append(Command("PullCube", {"cube": cube, "goal": TARGETS[i + 2]}))
    return Table(layout, colored(rng, TWO_CUBES, RGBA), commands)


def which_stack(robot, rng):
    points = scatter(robot, rng, [ANYWHERE] * 3)
    layout = turned(rng, CUBES, points)
    return Table(layout, colored(rng, CUBES, RGBA), stacks(CUBES))


def which_bin(robot, rng):
    # balls nearer to the robot than bins
    near = box(-0.08, 0, 0.05)
    far = box(0.06, 0, 0.05)
    points = scatter(robot, rng, [near, near, far, far])
    # heights are those of PlaceSphere's ball and bin
    layout = straight(BALLS, points[:2], 0.02)
    layout |= straight(BINS, points[2:], 0.0025)
    # a ball may have the color of a bin: the words say which is meant
    colors = colored(rng, BALLS, BALL_COLORS)
    colors |= colored(rng, BINS, BIN_COLORS)
    return Table(layout, colors, places(BALLS, BINS))


def peg_or_cube(robot, rng):
    # the peg lies along x on one side, the cubes on the other
    side = rng.choice([-1, 1])
    here = box(0, 0.1 * side, 0.06, 0.03)
    there = box(0, -0.09 * side, 0.1, 0.08)
    peg, *points, goal = scatter(robot, rng, [here, there, there, there])
    layout = turned(rng, TWO_CUBES, points)
    layout["peg0"] = ((*peg, PEG_RADIUS), 0.0)
    layout["marker0"] = floating(robot, rng, goal)
    lift = Command("LiftPegUpright", {"peg": "peg0"})
    return Table(layout, colored(rng, TWO_CUBES, RGBA), [lift, *picks(TWO_CUBES)])


def mixed(robot, rng):
    *points, ball, bin_, goal = scatter(robot, rng, [ANYWHERE] * 5, 0.08)
    layout = turned(rng, TWO_CUBES, points)
    layout |= straight(["ball0"], [ball], 0.02)
    layout |= straight(["bin0"], [bin_], 0.0025)
    layout["marker0"] = floating(robot, rng, goal)
    colors = colored(rng, TWO_CUBES, RGBA)
    colors |= colored(rng, ["ball0"], BALL_COLORS)
    colors |= colored(rng, ["bin0"], BIN_COLORS)
    commands = picks(TWO_CUBES)
    commands += stacks(TWO_CUBES)
    commands += places(["ball0"], ["bin0"])
    return Table(layout, colors, commands)


FAMILIES = {
    "which_cube": Family((*CUBES, "marker0"), which_cube),
    "which_way": Family((*TWO_CUBES, *TARGETS), which_way),
    "which_stack": Family(CUBES, which_stack),
    "which_bin": Family((*BALLS, *BINS), which_bin),
    "peg_or_cube": Family((*TWO_CUBES, "peg0", "marker0"), peg_or_cube),
    "mixed": Family((*TWO_CUBES, "ball0", "bin0", "marker0"), mixed),
}


def arrange(family, robot, rng, new=False):
    """A Table whose commands are at least two, all of them seen in training.

    new: one that training never shows comes first, before those that it does.
    """
    while True:
        table = family.arrange(robot, rng)
        # in any order: the first two are what is played
        order = rng.permutation(len(table.commands))
        fresh = []
        seen = []
        for i in order:
            command = table.commands[i]
            kind = fresh if table.is_new(command) else seen
            kind.append(command)
        first = fresh[:1] if new else []
        table.commands = first + seen
        if len(table.commands) > 1 and (first or not new):
            return table


def table_of(task, robot, rng):
    """The Table of a task that has it to itself: its bodies are called as their roles."""
    layout = task.spawn(robot, rng)
    roles = dict(zip(layout, layout))
    return Table(layout, {}, [Command(task.name, roles)])


# ---- in words


def names_of(label):
    """Words for a thing by its label, such as "red cube"."""
    names = [f"the {label}"]
    kind = label.split()[-1]
    if kind in OTHER_NAMES:
        names.append(f"the {label.replace(kind, OTHER_NAMES[kind])}")
    return names


def others_of_kind(table, body):
    kind = kind_of(body)
    return [name for name in table.layout if kind_of(name) == kind and name != body]


def relations(table, body):
    """Words for a thing by where it lies among others of its kind, where that is clear."""
    kind = kind_of(body)
    others = others_of_kind(table, body)
    if kind not in OTHER_NAMES or not others:
        return []
    x, y, _ = table.layout[body][0]
    xs, ys, _ = np.transpose([table.layout[other][0] for other in others])
    words = []
    # as the front camera sees it: its right is the robot's left
    if y > ys.max() + CLEAR:
        words += [f"the {kind} on the right", f"the right {kind}"]
    if y < ys.min() - CLEAR:
        words += [f"the {kind} on the left", f"the left {kind}"]
    if x < xs.min() - CLEAR:
        words += [f"the {kind} nearest to the robot", f"the nearest {kind}"]
    if x > xs.max() + CLEAR:
        words += [f"the {kind} farthest from the robot", f"the farthest {kind}"]
    return words


def plain(task, things):
    """A command in its task's first wording: how the steps of a plan are written.

    things: their labels, in the order of the task's roles.
    """
    names = [f"the {thing}" for thing in things]
    roles = dict(zip(TASKS[task].labels, names))
    return TASKS[task].commands[0].format(**roles)


def sequence(table, number, rng):
    """So many of a table's commands that can be carried out one after the other, or [].

    None touches what another has moved or filled, but that the last one may pick up what was
    stacked before. What is held in the air is let go before the next, so picking comes last.
    """
    for commands in rng.permutation(list(permutations(table.commands, number))).tolist():
        *early, last = commands
        # bodies that earlier commands move or fill
        touched = [body for command in early for body in command.roles.values()]
        own = list(last.roles.values())
        stacked = [command.roles.get("cubeA") for command in early]
        if last.task == "PickCube" and own[0] in stacked:
            own = own[1:]
        touched += own
        held = any(command.task == "PickCube" for command in early)
        if not held and len(set(touched)) == len(touched):
            return commands
    return []


def instruct(table, command, rng, wordings="seen", place_share=RELATIONS):
    """A sentence for a command, in a wording of its task: "seen", "held_out" or "off_template".

    Most seen ones are drawn from patterns (data/words.py), and vary as people's sentences do.
    place_share: the share of things that are named by where they lie.
    """
    several = len(table.commands) > 1
    task = TASKS[command.task]
    sentence = wording(task, rng, wordings, several)
    names = {}
    for role, body in command.roles.items():
        if several:
            names[role] = name_of(table, body, rng, place_share)
        else:  # the only command: nothing is ambiguous
            names[role] = f"the {task.labels[role]}"
    if wordings != "seen":
        return sentence.format(**names)
    labels = [table.label(body) for body in table.layout] if several else task.labels.values()
    return fill(sentence, names, labels, rng)


def wording(task, rng, wordings="seen", several=False):
    """A sentence for a task, in which {roles} stand for objects."""
    sentence = pick(task.sentences(wordings, several), rng)
    if wordings == "seen" and rng.random() < SHARE:
        sentence = expand(pick(PATTERNS[task.name], rng), rng)
    return sentence


def fill(sentence, names, labels, rng):
    """A sentence with {role: name} filled in, varied as people's sentences are.

    labels: of all that lies there, so that a color says which cube is meant only if it does.
    """
    sentence = interrupt(sentence, rng)
    if rng.random() < COLORS_ALONE:
        short = pick(("{}", "the {} one"), rng)
        names = {role: color_alone(name, labels, short) for role, name in names.items()}
    return vary(sentence.format(**names), rng)


def color_alone(name, labels, short):
    """A cube's name, shortened to its color as `short` says ("{}" or "the {} one").

    Other names come back unchanged, and so do cubes whose color occurs in another of the labels.
    """
    _, color, *rest = name.split()
    alone = sum(color in label.split() for label in labels) == 1
    cube = rest in (["cube"], ["block"])  # not one that is named by its position
    return short.format(color) if alone and cube and color in RGBA else name


def name_of(table, body, rng, place_share):
    """Words for a thing by its color or, in a share of cases, by its place or its kind alone."""
    alone = not others_of_kind(table, body)
    return choose_name(table.label(body), relations(table, body), alone, rng, place_share)


def choose_name(label, by_place, alone, rng, place_share):
    """The same, from a thing's label, its names by place and whether no other is of its kind."""
    kind = label.split()[-1]
    without_color = by_place
    if kind in OTHER_NAMES and alone:  # it needs no more
        without_color = [f"the {kind}"]
    if without_color and rng.random() < place_share:
        return pick(without_color, rng)
    return pick(names_of(label), rng)
