"""The six tasks: what lies on the table, where it starts, when it is done, how it is asked for.

What lies there is in data/objects/, which of it and the words in data/wordings.json. Frame: z = 0 is the table
top, the origin is the middle of the region where objects start, x points away from the robot, y to
its left; m, rad, kg. Source: ManiSkill 3.0.1, mani_skill/envs/tasks/tabletop. Departures:

- Regions, goal heights and (for the small WidowX) every distance follow the arm's workspace: the
  source's lie beyond some arms' reach.
- Layouts are drawn again if the tool cannot reach a cube pointing straight down (StackCube), if
  ball and bin are too close for the fingers, or if the cube lies at its goal already.
- PickCube's goal is drawn for the policy's cameras.
- LiftPegUpright tests the angle between the peg's axis and the vertical, either end up: the
  source's Euler angle does not see every tilt.
- 200 control steps (10 s) instead of 50: the source's own experts need more than 50.
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
MAX_STEPS = 200  # control steps of an episode


@dataclass(frozen=True, eq=False)  # hashable, though its wordings are lists
class Task:
    """objects: file in data/objects/; labels {body: what people call it}, what is moved first.

    spawn(robot, rng) -> {body: (position, yaw)}; success(env) -> {condition: bool}, done when all
    hold. instructions: wordings that Stage I uses too; paraphrases and commands: more, for policies,
    which with the four alone obeyed the four alone; held_out: for evaluation only.
    """

    name: str
    spawn: Callable
    success: Callable
    objects: str
    labels: dict
    instructions: list
    paraphrases: list
    held_out: list
    commands: list  # with {roles} in place of things, for scenes with several commands
    held_out_commands: list
    off_template_commands: list  # as people write, for evaluation only

    def sentences(self, wordings, several=False):
        """Its "seen", "held_out" or "off_template" wordings, where a scene has several commands or one.

        In all but those of one command {roles} stand for things.
        """
        if several or wordings == "off_template":
            choices = {"seen": self.commands, "held_out": self.held_out_commands}
            choices["off_template"] = self.off_template_commands
        else:
            own = self.instructions + self.paraphrases
            choices = {"seen": own + self.commands, "held_out": self.held_out}
        return choices[wordings]


def resize(spec, robot):
    """Fit goals, targets and PickCube's cube to the arm, in an uncompiled scene."""
    for body in spec.bodies:
        if body.name == "marker0":  # of scenes with several commands
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
    """True if the tool can point straight down at every xy (in the task's frame)."""
    near, far = robot.reach
    return all(near <= np.hypot(x + robot.spawn_distance, y) <= far for x, y in points)


def pick_spawn(robot, rng):
    half = robot.cube_half
    while True:
        goal = square(robot, rng)
        cube = square(robot, rng)
        yaw = rng.uniform(0, 2 * np.pi)  # a cube is turned, and the goal above the table
        height = rng.uniform(0, robot.max_goal_height)
        distance = np.linalg.norm([*(cube - goal), height])
        if distance > 2 * robot.goal_radius:  # else it is done before it begins
            return {
                "cube": ((*cube, half), yaw),
                "goal": ((*goal, half + height), 0.0),
            }


def region_spawn(robot, rng, way):
    x, y = square(robot, rng)
    # straight ahead of the cube (way 1), or straight behind; 0.5 mm up, so that the rings are seen
    goal = (x + way * 0.2 * robot.scale, y, 0.0005)
    return {
        "cube": ((x, y, 0.02), 0.0),
        "goal": (goal, 0.0),
    }


def stack_spawn(robot, rng):
    s = robot.scale
    while True:
        # both cubes lie near a place that is itself drawn
        offset = rng.uniform(-0.1, 0.1, 2) * s
        a, b = offset + rng.uniform((-0.1, -0.2), (0.1, 0.2), (2, 2)) * s
        # so far apart they do not touch, however they are turned
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
    # it lies along x, towards the robot or away from it
    return {"peg": ((*square(robot, rng), PEG_RADIUS), 0.0)}


# ---- when it is done


def pick_success(env):
    offset = env.position("cube") - env.position("goal")
    speed = np.abs(env.data.qvel[: env.robot.dof]).max()  # rad/s, of the arm alone
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
    """The body `name` lies, let go and at rest, `height` (m) above `place`."""
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
    up = env.rotation("peg")[2, 0]  # of its axis; either end will do
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
