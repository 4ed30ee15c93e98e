"""The six tasks: what lies on the table, where it starts, when it is done, and in which words it is asked for.

Frame: z = 0 is the table top, the origin is the centre of the spawn region, x points away from the robot, y to its left; m, rad, kg.
Source: ManiSkill 3.0.1, mani_skill/envs/tasks/tabletop. Departures, each for a reason:
- spawn regions, goal heights and (for the small WidowX) every distance of the layout follow the arm's workspace in robots.json: the source's lie beyond some arms' reach.
- layouts of StackCube with a cube that the tool cannot reach pointing straight down are drawn again; so are a ball and a bin too close for the fingers,
  and a cube that lies at its goal already.
- PickCube's goal is drawn for the policy's cameras and stands on a thin stem: the source hides it and hands the policy its coordinates, and one picture shows no height.
- PlaceSphere's ball has rolling friction (condim 6): without it the ball rocks in the bin and never comes to rest.
- LiftPegUpright tests the angle between the peg's axis and the vertical, either end up: the source's Euler angle does not see every tilt.
- 200 control steps (10 s) instead of 50: the source's own experts need more than 50.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np

RED, GREEN, BLUE = (1, 0, 0, 1), (0, 1, 0, 1), (0.0471, 0.1647, 0.6275, 1)
TARGET_RED = (0.7608, 0.0745, 0.0863, 1)
PEG_RED, PEG_LENGTH, PEG_RADIUS = (0.6902, 0.0549, 0.0549, 1), 0.12, 0.025      # half length and half width
BIN_FLOOR = 0.0025                                                              # half thickness, and the height of the bin's origin
MAX_STEPS = 200


@dataclass(frozen=True)
class Task:
    """scene(robot) -> MJCF bodies; spawn(robot, rng) -> {body: (position, yaw)}; success(env) -> {condition: bool}, done when all hold.

    labels {body: what people call it}; instructions: wordings that Stage I's corpus uses too; paraphrases: more, for policies, which with the four alone
    obeyed the four alone; held_out: wordings for evaluation only.
    """
    name: str
    scene: Callable
    spawn: Callable
    success: Callable
    labels: dict
    instructions: list
    paraphrases: list
    held_out: list
    max_steps: int = MAX_STEPS


# ---- bodies

def rgba(colour):
    return " ".join(str(c) for c in colour)


def free_box(name, half, mass, colour):
    return f'<body name="{name}"><freejoint/><geom name="{name}" type="box" size="{half} {half} {half}" mass="{mass}" rgba="{rgba(colour)}"/></body>'


def cube_half(robot, task="PickCube"):
    """The source gives the WidowX a smaller cube in PickCube alone (m)."""
    return 0.018 if robot.name == "widowx" and task == "PickCube" else 0.02


def goal_threshold(robot):
    return 0.0225 if robot.name == "widowx" else 0.025


def pick_scene(robot):
    half = cube_half(robot)
    # the stem runs down into the table, whatever the height of the goal
    return free_box("cube", half, 0.04666 if half < 0.02 else 0.064, RED) + f'''<body name="goal" mocap="true">
      <geom type="sphere" size="{goal_threshold(robot)}" rgba="0 1 0 0.6" contype="0" conaffinity="0"/>
      <geom type="cylinder" fromto="0 0 0 0 0 -0.4" size="0.004" rgba="0 0.7 0 1" contype="0" conaffinity="0"/></body>'''


def region_radius(robot):
    return 0.1 * robot.scale


def region_scene(robot):
    rings = "".join(f'<geom type="cylinder" size="{region_radius(robot) * (5 - i) / 5:.4f} 0.0004" pos="0 0 {0.0004 * i:.4f}" rgba="{rgba((0.95, 0.95, 0.95, 1) if i % 2 else TARGET_RED)}" '
                    f'contype="0" conaffinity="0"/>' for i in range(5))
    return free_box("cube", 0.02, 0.064, BLUE) + f'<body name="goal" mocap="true">{rings}</body>'


def stack_scene(robot):
    return free_box("cubeA", 0.02, 0.064, RED) + free_box("cubeB", 0.02, 0.064, GREEN)


def sphere_scene(robot):
    walls = [((0.0025, 0.025, 0.005), (x, 0, 0.0075)) for x in (-0.0225, 0.0225)] + [((0.025, 0.0025, 0.005), (0, y, 0.0075)) for y in (-0.0225, 0.0225)]
    boxes = "".join(f'<geom type="box" size="{rgba(size)}" pos="{rgba(pos)}" rgba="0.95 0.95 0.95 1"/>' for size, pos in [((0.025, 0.025, BIN_FLOOR), (0, 0, 0)), *walls])
    return f'''<body name="sphere"><freejoint/><geom name="sphere" type="sphere" size="0.02" mass="0.03351" rgba="{rgba(BLUE)}" condim="6" friction="0.3 0.005 0.002"/></body>
      <body name="bin" mocap="true">{boxes}</body>'''


def peg_scene(robot):
    half = PEG_LENGTH / 2
    return f'''<body name="peg"><freejoint/>
      <geom name="peg" type="box" size="{PEG_LENGTH} {PEG_RADIUS} {PEG_RADIUS}" mass="0.6" rgba="0 0 0 0"/>
      <geom type="box" size="{half} {PEG_RADIUS} {PEG_RADIUS}" pos="{-half} 0 0" mass="0" rgba="{rgba(PEG_RED)}" contype="0" conaffinity="0"/>
      <geom type="box" size="{half} {PEG_RADIUS} {PEG_RADIUS}" pos="{half} 0 0" mass="0" rgba="{rgba(BLUE)}" contype="0" conaffinity="0"/></body>'''


# ---- where things start

def square(robot, rng):
    return rng.uniform(-robot.spawn_half_size, robot.spawn_half_size, 2)


def reachable(robot, *points):
    """True if the tool can point straight down at every xy (in the task's frame)."""
    near, far = robot.reach
    return all(near <= np.hypot(x + robot.base_to_spawn_centre, y) <= far for x, y in points)


def pick_spawn(robot, rng):
    half = cube_half(robot)
    while True:
        goal, cube, yaw = square(robot, rng), square(robot, rng), rng.uniform(0, 2 * np.pi)
        height = rng.uniform(0, robot.max_goal_height)
        if np.hypot(np.hypot(*(cube - goal)), height) > 2 * goal_threshold(robot):       # else it is done before it begins
            return {"cube": ((*cube, half), yaw), "goal": ((*goal, half + height), 0.0)}


def region_spawn(direction):
    def spawn(robot, rng):
        x, y = square(robot, rng)
        return {"cube": ((x, y, 0.02), 0.0), "goal": ((x + direction * 0.2 * robot.scale, y, 0.0005), 0.0)}
    return spawn


def stack_spawn(robot, rng):
    s = robot.scale
    while True:
        offset = rng.uniform(-0.1, 0.1, 2) * s
        a, b = (offset + rng.uniform((-0.1, -0.2), (0.1, 0.2)) * s for _ in range(2))
        if np.hypot(*(a - b)) > 0.0586 and reachable(robot, a, b):
            return {name: ((*xy, 0.02), rng.uniform(0, 2 * np.pi)) for name, xy in (("cubeA", a), ("cubeB", b))}


def sphere_spawn(robot, rng):
    s = robot.scale
    while True:
        ball, bin_ = (rng.uniform(-0.1, -0.05) * s, rng.uniform(-0.1, 0.1) * s), (rng.uniform(0, 0.1) * s, rng.uniform(-0.1, 0.1) * s)
        if np.hypot(ball[0] - bin_[0], ball[1] - bin_[1]) > 0.07:
            return {"sphere": ((*ball, 0.02), 0.0), "bin": ((*bin_, BIN_FLOOR), 0.0)}


def peg_spawn(robot, rng):
    return {"peg": ((*square(robot, rng), PEG_RADIUS), 0.0)}


# ---- when it is done

def pick_success(env):
    return {"at_goal": np.linalg.norm(env.position("cube") - env.position("goal")) <= goal_threshold(env.robot), "robot_static": env.joint_speed() <= 0.2}


def push_success(env):
    cube, goal = env.position("cube"), env.position("goal")
    return {"on_target": np.hypot(*(cube - goal)[:2]) < region_radius(env.robot), "on_table": cube[2] < 0.025}


def pull_success(env):
    return {"on_target": push_success(env)["on_target"]}


def at_rest(env, name):
    linear, angular = env.speed(name)
    return linear <= 0.01 and angular <= 0.5


def stack_success(env):
    offset = env.position("cubeA") - env.position("cubeB")
    return {"above": np.hypot(*offset[:2]) <= 0.0283 + 0.005, "height": abs(offset[2] - 0.04) <= 0.005, "at_rest": at_rest(env, "cubeA"), "released": not env.grasped("cubeA")}


def sphere_success(env):
    offset = env.position("sphere") - env.position("bin")
    return {"above": np.hypot(*offset[:2]) <= 0.005, "height": abs(offset[2] - 0.0225) <= 0.005, "at_rest": at_rest(env, "sphere"), "released": not env.grasped("sphere")}


def peg_success(env):
    tilt = np.arccos(np.clip(abs(env.rotation("peg")[2, 0]), 0, 1))
    return {"upright": tilt <= 0.08, "height": abs(env.position("peg")[2] - PEG_LENGTH) < 0.005}


WORDINGS = json.loads((Path(__file__).parent / "wordings.json").read_text())
TASKS = {
    name: Task(name, *how, **WORDINGS[name])
    for name, how in {
        "PickCube": (pick_scene, pick_spawn, pick_success),
        "PushCube": (region_scene, region_spawn(+1), push_success),
        "PullCube": (region_scene, region_spawn(-1), pull_success),
        "StackCube": (stack_scene, stack_spawn, stack_success),
        "PlaceSphere": (sphere_scene, sphere_spawn, sphere_success),
        "LiftPegUpright": (peg_scene, peg_spawn, peg_success),
    }.items()
}
