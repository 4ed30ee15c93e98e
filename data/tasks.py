"""The six tasks: objects on the table, where they start, when a task is done, its instructions.

The objects are in data/objects/, their names and the wordings in data/wordings.json. Frame: z = 0
is the tabletop, the origin is the middle of the region where objects start, x points away from the
robot, y to its left; m, rad, kg. Source: ManiSkill 3.0.1, mani_skill/envs/tasks/tabletop.
Differences:

- Regions, goal heights and (for the small WidowX) all distances follow the arm's workspace: the
  source's are beyond the reach of some arms.
- Layouts are drawn again if the tool cannot reach a cube pointing straight down (StackCube), if
  ball and bin are too close for the fingers, or if the cube starts at its goal.
- PickCube's goal is visible to the policy's cameras.
- LiftPegUpright tests the angle between the peg's axis and the vertical, with either end up: the
  source's Euler angle misses some tilts.
- 200 control steps (10 s) instead of 50: even the source's own experts need more than 50.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

RGBA = {
    "red": (1, 0, 0, 1),
    "green": (0, 1, 0, 1),
    "blue": (0.0471, 0.1647, 0.6275, 1),
    "yellow": (0.95, 0.85, 0.1, 1),
    "purple": (0.55, 0.15, 0.65, 1),
    "orange": (1, 0.5, 0.05, 1),
    "white": (0.95, 0.95, 0.95, 1),
}
PEG_LENGTH = 0.12  # half length, m
PEG_RADIUS = 0.025  # half width, m
MAX_STEPS = 200  # control steps per episode


@dataclass(frozen=True, eq=False)  # hashable by identity, although its wordings are lists
class Task:
    """objects: file in data/objects/; labels {body: its everyday name}, the body to move first.

    spawn(robot, rng) -> {body: (position, yaw)}; success(env) -> {condition: bool}, done when all
    hold. instructions: wordings that Stage I uses too; paraphrases and commands: more of them for
    policies, which obeyed only these four when trained on no others; held_out: only for evaluation.
    """

    name: str
    spawn: Callable
    success: Callable
    objects: str
    labels: dict
    instructions: list
    paraphrases: list
    held_out: list
    commands: list  # with {roles} for objects, for scenes with several commands
    held_out_commands: list
    off_template_commands: list  # the way people write, only for evaluation

    def sentences(self, wordings, several=False):
        """Its "seen", "held_out" or "off_template" wordings; several: the scene has many commands.

        {roles} stand for objects, except in wordings that are only for scenes with one command.
        """
        if several or wordings == "off_template":
            choices = {"seen": self.commands, "held_out": self.held_out_commands}
            choices["off_template"] = self.off_template_commands
        else:
            own = self.instructions + self.paraphrases
            choices = {"seen": own + self.commands, "held_out": self.held_out}
        return choices[wordings]


def resize(spec, robot):
    """Fit goals, targets and PickCube's cube to the arm, in a scene that is not compiled yet."""
    for body in spec.bodies:
        if body.name == "marker0":  # in scenes with several commands
            body.geoms[0].size[0] = robot.goal_radius
        if body.name.startswith("target"):
            for ring in body.geoms:
                ring.size[0] *= robot.scale
    goal = spec.body("goal")  # StackCube, PlaceSphere and LiftPegUpright have none
    if spec.geom("goal"):  # PickCube's
        cube = spec.geom("cube")
        cube.size = [robot.cube_half] * 3
        cube.mass = robot.cube_mass
        spec.geom("goal").size[0] = robot.goal_radius
    elif goal:
        for ring in goal.geoms:
            ring.size[0] *= robot.scale


def region_radius(robot):
    return 0.1 * robot.scale


# ---- where things start


def square(robot, rng):
    return rng.uniform(-robot.spawn_half_size, robot.spawn_half_size, 2)


def reachable(robot, *points):
    """True if the tool can point straight down at every xy (in the task frame)."""
    near, far = robot.reach
    return all(near <= np.hypot(x + robot.spawn_distance, y) <= far for x, y in points)


def pick_spawn(robot, rng):
    half = robot.cube_half
    while True:
        goal = square(robot, rng)
        cube = square(robot, rng)
        yaw = rng.uniform(0, 2 * np.pi)  # the cube is rotated, and the goal is above the table
        height = rng.uniform(0, robot.max_goal_height)
        distance = np.linalg.norm([*(cube - goal), height])
        if distance > 2 * robot.goal_radius:  # otherwise it is done before it starts
            return {
                "cube": ((*cube, half), yaw),
                "goal": ((*goal, half + height), 0.0),
            }


def region_spawn(robot, rng, way):
    x, y = square(robot, rng)
    # straight ahead of the cube (way 1), or straight behind it; 0.5 mm up, so that the rings show
    goal = (x + way * 0.2 * robot.scale, y, 0.0005)
    return {
        "cube": ((x, y, 0.02), 0.0),
        "goal": (goal, 0.0),
    }


def stack_spawn(robot, rng):
    s = robot.scale
    while True:
        # both cubes are near a point that is drawn too
        offset = rng.uniform(-0.1, 0.1, 2) * s
        a, b = offset + rng.uniform((-0.1, -0.2), (0.1, 0.2), (2, 2)) * s
        # far enough apart not to touch, whatever their rotation
        if np.hypot(*(a - b)) > 0.0586 and reachable(robot, a, b):
            yaw_a, yaw_b = rng.uniform(0, 2 * np.pi, 2)
            return {
                "cubeA": ((*a, 0.02), yaw_a),
                "cubeB": ((*b, 0.02), yaw_b),
            }


def sphere_spawn(robot, rng):
    while True:
        # the bin is always farther from the robot than the ball
        ball = rng.uniform((-0.1, -0.1), (-0.05, 0.1)) * robot.scale
        bin_ = rng.uniform((0, -0.1), (0.1, 0.1)) * robot.scale
        if np.hypot(*(ball - bin_)) > 0.07:  # room for the open fingers
            return {
                "sphere": ((*ball, 0.02), 0.0),
                "bin": ((*bin_, 0.0025), 0.0),
            }


def peg_spawn(robot, rng):
    # it lies along x, either toward the robot or away from it
    return {"peg": ((*square(robot, rng), PEG_RADIUS), 0.0)}


# ---- when it is done


def pick_success(env):
    offset = env.position("cube") - env.position("goal")
    speed = np.abs(env.data.qvel[: env.robot.dof]).max()  # rad/s, of the arm only
    return {
        "at_goal": np.linalg.norm(offset) <= env.robot.goal_radius,
        "robot_static": speed <= 0.2,
    }


def pull_success(env):
    offset = env.position("cube") - env.position("goal")
    return {"on_target": np.hypot(*offset[:2]) < region_radius(env.robot)}


def push_success(env):
    return pull_success(env) | {"on_table": env.position("cube")[2] < 0.025}


def put_success(name, place, within, height, env):
    """Is the body `name` at rest, released, and `height` (m) above `place`?"""
    offset = env.position(name) - env.position(place)
    joint = env.model.body_jntadr[env.body(name)]
    linear, angular = np.split(env.data.joint(joint).qvel, 2)  # m/s, rad/s
    # ManiSkill's is_static
    slow = np.linalg.norm(linear) <= 0.01
    return {
        "above": np.hypot(*offset[:2]) <= within,
        "height": abs(offset[2] - height) <= 0.005,
        "at_rest": slow and np.linalg.norm(angular) <= 0.5,
        "released": not env.grasped(name),
    }


def peg_success(env):
    up = env.rotation("peg")[2, 0]  # of its axis; either end may be up
    height = env.position("peg")[2]
    return {
        "upright": abs(up) >= np.cos(0.08),
        "height": abs(height - PEG_LENGTH) < 0.005,
    }


# ---- all of them

RULES = {
    "PickCube": (pick_spawn, pick_success),
    "PushCube": (partial(region_spawn, way=1), push_success),
    "PullCube": (partial(region_spawn, way=-1), pull_success),
    "StackCube": (
        stack_spawn,
        partial(put_success, "cubeA", "cubeB", 0.0333, 0.04),
    ),
    "PlaceSphere": (
        sphere_spawn,
        partial(put_success, "sphere", "bin", 0.005, 0.0225),
    ),
    "LiftPegUpright": (peg_spawn, peg_success),
}
WORDINGS = json.loads((Path(__file__).parent / "wordings.json").read_text())
TASKS = {name: Task(name, *rules, **WORDINGS[name]) for name, rules in RULES.items()}
