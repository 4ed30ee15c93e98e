"""Scenes in which several things can be done, so that only the words say which.

    which_cube    three cubes and a marker: pick one of them
    which_way     two cubes, each with a target ahead and a target behind: push or pull one of them
    which_stack   three cubes: put one of them on another
    which_bin     two balls and two bins: put one ball into one bin
    peg_or_cube   a peg, two cubes and a marker: stand the peg up, or pick a cube
    mixed         two cubes, a marker, a ball and a bin: whatever the tasks allow

A command is one of the six tasks (data/tasks.py) on some of the things that lie there: its `roles`
say which body stands for the task's cube, goal and so on. It is done when the task is, and nothing
else has moved by more than 3 cm.

Some combinations are kept out of all training (NEW), so that an evaluation can ask for what was
never shown. Positions m, in the task's frame (data/tasks.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from data.tasks import BLUE, GREEN, PEG_RADIUS, RED, TASKS, reachable

COLORS = {
    "red": RED,
    "green": GREEN,
    "blue": BLUE,
    "yellow": (0.95, 0.85, 0.1, 1),
    "purple": (0.55, 0.15, 0.65, 1),
    "orange": (1, 0.5, 0.05, 1),
    "white": (0.95, 0.95, 0.95, 1),
}
BIN_COLORS = ("white", "red", "green", "yellow", "purple")
BALL_COLORS = ("blue", "red", "green", "yellow", "orange")
GAP = 0.088  # m between the centers of neighbors: room for the open fingers
STILL = 0.03  # m that whatever a command does not name may move
CLEAR = 0.03  # m between a thing and the next, if "left" or "nearest" is to tell them apart
RELATIONS = 0.25  # share of things that are named by where they lie
OTHER_NAMES = {"cube": "block", "ball": "sphere", "bin": "tray"}

# (task, things in the order of its roles) that no training shows
NEW = {
    ("PickCube", "orange cube"),
    ("PushCube", "purple cube"),
    ("PullCube", "yellow cube"),
    ("StackCube", "red cube", "yellow cube"),
    ("StackCube", "blue cube", "orange cube"),
    ("StackCube", "green cube", "purple cube"),
    ("StackCube", "yellow cube", "blue cube"),
    ("StackCube", "purple cube", "red cube"),
    ("StackCube", "white cube", "green cube"),
    ("StackCube", "orange cube", "white cube"),
    ("PlaceSphere", "red ball", "white bin"),
    ("PlaceSphere", "yellow ball", "green bin"),
    ("PlaceSphere", "blue ball", "yellow bin"),
    ("PlaceSphere", "green ball", "purple bin"),
    ("PlaceSphere", "orange ball", "red bin"),
}


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
        color = "green" if kind_of(body) == "marker" else self.colors.get(body)
        return f"{color} {kind_of(body)}" if color else kind_of(body)

    def is_new(self, command):
        """Is this combination kept out of training?"""
        things = [self.label(body) for body in command.roles.values()]
        named = [thing for thing in things if thing not in ("target", "green marker")]
        return (command.task, *named) in NEW


@dataclass(frozen=True)
class Family:
    """bodies: those of data/objects/things.xml that lie there. arrange(robot, rng) -> a Table."""

    name: str
    bodies: tuple
    arrange: Callable


# ---- where things lie


def scatter(robot, rng, boxes, gap=GAP):
    """Points (n, 2), one in each of `boxes` ((low x, low y), (high x, high y)), `gap` apart.

    Boxes are for an arm of scale 1.
    """
    low, high = np.array(boxes).transpose(1, 0, 2) * robot.scale  # (n, 2) each
    first, second = np.triu_indices(len(low), 1)
    while True:
        points = rng.uniform(low, high)
        ways = np.linalg.norm(points[first] - points[second], axis=1)
        if ways.min() > gap and reachable(robot, *points):
            return points


def near(x, y, width=0.12, depth=0.18):
    """A box around (x, y)."""
    return (x - width, y - depth), (x + width, y + depth)


ANYWHERE = near(0, 0)


def colored(rng, bodies, colors):
    """{body: color}, each another."""
    return dict(zip(bodies, rng.permutation(list(colors)).tolist()))


def lying(rng, names, points, height=0.02):
    """{body: (position, yaw)} of things that stand on the table, turned anyhow."""
    return {
        name: ((x, y, height), rng.uniform(0, 2 * np.pi)) for name, (x, y) in zip(names, points)
    }


def floating(robot, rng, point):
    """Place of a marker above a point."""
    height = rng.uniform(0.2, 1) * robot.max_goal_height
    return ((*point, robot.cube_half + height), 0.0)


def picks(cubes):
    return [Command("PickCube", {"cube": cube, "goal": "marker0"}) for cube in cubes]


def stacks(cubes):
    return [Command("StackCube", {"cubeA": a, "cubeB": b}) for a, b in permutations(cubes, 2)]


def places(balls, bins):
    pairs = product(balls, bins)
    return [Command("PlaceSphere", {"sphere": ball, "bin": bin_}) for ball, bin_ in pairs]


# ---- the families


def which_cube(robot, rng):
    cubes = ("cube0", "cube1", "cube2")
    *points, goal = scatter(robot, rng, [ANYWHERE] * 4)
    layout = lying(rng, cubes, points)
    layout["marker0"] = floating(robot, rng, goal)
    return Table(layout, colored(rng, cubes, COLORS), picks(cubes))


def which_way(robot, rng):
    cubes = ("cube0", "cube1")
    boxes = [near(0, 0.135, 0.05, 0.025), near(0, -0.135, 0.05, 0.025)]
    layout = {}
    commands = []
    for i, (x, y) in enumerate(scatter(robot, rng, boxes)):
        layout[f"cube{i}"] = ((x, y, 0.02), 0.0)
        for task, target, way in (
            ("PushCube", f"target{i}", 1),
            ("PullCube", f"target{i + 2}", -1),
        ):
            # 0.5 mm up, so that the rings are seen
            layout[target] = ((x + way * 0.2 * robot.scale, y, 0.0005), 0.0)
            commands.append(Command(task, {"cube": f"cube{i}", "goal": target}))
    return Table(layout, colored(rng, cubes, COLORS), commands)


def which_stack(robot, rng):
    cubes = ("cube0", "cube1", "cube2")
    layout = lying(rng, cubes, scatter(robot, rng, [ANYWHERE] * 3))
    return Table(layout, colored(rng, cubes, COLORS), stacks(cubes))


def which_bin(robot, rng):
    balls = ("ball0", "ball1")
    bins = ("bin0", "bin1")
    boxes = [near(-0.08, 0, 0.05)] * 2 + [near(0.06, 0, 0.05)] * 2
    points = scatter(robot, rng, boxes)
    layout = {}
    for ball, (x, y) in zip(balls, points[:2]):
        layout[ball] = ((x, y, 0.02), 0.0)
    for bin_, (x, y) in zip(bins, points[2:]):
        layout[bin_] = ((x, y, 0.0025), 0.0)
    colors = colored(rng, balls, BALL_COLORS) | colored(rng, bins, BIN_COLORS)
    return Table(layout, colors, places(balls, bins))


def peg_or_cube(robot, rng):
    cubes = ("cube0", "cube1")
    # the peg lies along x on one side, the cubes on the other
    side = rng.choice([-1, 1])
    boxes = [near(0, 0.1 * side, 0.06, 0.03)]
    boxes += [near(0, -0.09 * side, 0.1, 0.08)] * 3
    peg, *points, goal = scatter(robot, rng, boxes)
    layout = lying(rng, cubes, points)
    layout["peg0"] = ((*peg, PEG_RADIUS), 0.0)
    layout["marker0"] = floating(robot, rng, goal)
    commands = [Command("LiftPegUpright", {"peg": "peg0"}), *picks(cubes)]
    return Table(layout, colored(rng, cubes, COLORS), commands)


def mixed(robot, rng):
    cubes = ("cube0", "cube1")
    *points, ball, bin_, goal = scatter(robot, rng, [ANYWHERE] * 5, 0.08)
    layout = lying(rng, cubes, points)
    layout["ball0"] = ((*ball, 0.02), 0.0)
    layout["bin0"] = ((*bin_, 0.0025), 0.0)
    layout["marker0"] = floating(robot, rng, goal)
    colors = colored(rng, cubes, COLORS)
    colors |= colored(rng, ["ball0"], BALL_COLORS) | colored(rng, ["bin0"], BIN_COLORS)
    commands = picks(cubes) + stacks(cubes) + places(["ball0"], ["bin0"])
    return Table(layout, colors, commands)


CUBES = ("cube0", "cube1", "cube2")
TARGETS = ("target0", "target1", "target2", "target3")
FAMILIES = {
    "which_cube": Family("which_cube", (*CUBES, "marker0"), which_cube),
    "which_way": Family("which_way", (*CUBES[:2], *TARGETS), which_way),
    "which_stack": Family("which_stack", CUBES, which_stack),
    "which_bin": Family("which_bin", ("ball0", "ball1", "bin0", "bin1"), which_bin),
    "peg_or_cube": Family("peg_or_cube", (*CUBES[:2], "peg0", "marker0"), peg_or_cube),
    "mixed": Family("mixed", (*CUBES[:2], "ball0", "bin0", "marker0"), mixed),
}


def arrange(family, robot, rng, new=False):
    """A Table whose commands are at least two, all of them seen in training.

    new: one that training never shows comes first, before those that it does.
    """
    while True:
        table = family.arrange(robot, rng)
        table.commands = [table.commands[i] for i in rng.permutation(len(table.commands))]
        fresh = [command for command in table.commands if table.is_new(command)]
        seen = [command for command in table.commands if not table.is_new(command)]
        if new and fresh and seen:
            table.commands = [*fresh[:1], *seen]
            return table
        if not new and len(seen) > 1:
            table.commands = seen
            return table


# ---- in words


def names_of(table, body):
    """Words for a thing by its color."""
    label = table.label(body)
    kind = kind_of(body)
    other = label.replace(kind, OTHER_NAMES.get(kind, kind))
    return list(dict.fromkeys([f"the {label}", f"the {other}"]))


def relations(table, body):
    """Words for a thing by where it lies among its kind, where that is clear."""
    kind = kind_of(body)
    if kind not in OTHER_NAMES:
        return []
    others = [name for name in table.layout if kind_of(name) == kind and name != body]
    if not others:
        return [f"the {kind}"]
    x, y, _ = table.layout[body][0]
    places = np.array([table.layout[other][0][:2] for other in others])
    words = []
    # as the front camera sees it: its right is the robot's left
    if y > places[:, 1].max() + CLEAR:
        words += [f"the {kind} on the right", f"the right {kind}"]
    if y < places[:, 1].min() - CLEAR:
        words += [f"the {kind} on the left", f"the left {kind}"]
    if x < places[:, 0].min() - CLEAR:
        words += [f"the {kind} nearest to the robot", f"the nearest {kind}"]
    if x > places[:, 0].max() + CLEAR:
        words += [f"the {kind} farthest from the robot", f"the farthest {kind}"]
    return words


def instruct(table, command, rng, held_out=False):
    """A sentence for a command, in one of the task's wordings."""
    task = TASKS[command.task]
    wordings = task.held_out_commands if held_out else task.commands
    sentence = wordings[rng.integers(len(wordings))]
    names = {}
    for role, body in command.roles.items():
        choices = names_of(table, body)
        by_place = relations(table, body)
        if by_place and rng.random() < RELATIONS:
            choices = by_place
        names[role] = choices[rng.integers(len(choices))]
    return sentence.format(**names)
