"""The scripted expert: tasks to primitives, poses, joint paths, and targets at 20 Hz.

    primitives    PRIMITIVES[task](env) -> [Primitive]: approach, descend, grasp, carry, ..., each a
                  pose of the tool or a finger position
    poses, paths  plan(env, primitives) -> [(name, targets)]: inverse kinematics along the path,
                  another tilt or turn if that fails or collides, timing under the speed limits
    execution     demonstrate(env, seed) -> Demonstration: execute with small disturbances, check
                  for success, and replan from the current state

This is the planning side of BLM1's data engine. The expert reads the true state of the simulator;
policies never do. TCP is the tool's frame (data/robots.py); L control steps, S state and A action
dimensions; q (dof,) joint angles in rad; m, rad, s.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from data import seeds
from data.env import CONTROL_HZ
from data.robots import SHIPPED, get_kinematics
from data.simulator import mujoco
from data.tasks import PEG_LENGTH, PEG_RADIUS, region_radius

JOINT_SPEED = 1.3  # rad/s, peak, and never above 0.6 of the arm's own limit
TCP_SPEED = 0.45  # m/s, peak
CLEARANCE = 0.06  # m; from this height the hand descends straight onto what it grasps
PEG_SWING = 6.0  # N per finger: carries the peg (5.9 N), and lets it swing until friction stops it
PEG_FIRM = 25.0  # N per finger: the peg does not swing
PEG_LEVER = 0.07  # m from its center to where it is grasped
FINGER_STEPS = 6  # control steps per closing or opening, as in ManiSkill's experts
# Tilts to try, rad forward from straight down: the WidowX points straight down only below 0.175 m.
TILTS = (0.0, 0.3, 0.6)
STEEP = (0.9, 1.2)  # also for a small arm of five joints: high up it has to reach outward
PLANS = 6  # how often the expert may replan from the current state
UP = np.array([0.0, 0.0, 1.0])


class Infeasible(Exception):
    """No joint path reaches the pose of a primitive."""


@dataclass
class Primitive:
    """One movement of the TCP to a `position`, or of the fingers alone if there is none."""

    name: str
    finger: float  # m, finger target; see SQUEEZE in data/robots.py
    position: np.ndarray = None  # m, in the task frame
    turn: float = None  # rad from the rest direction there; None: keep the hand's direction
    tilts: tuple = TILTS  # tilts to try with that turn
    straight: bool = True  # the TCP moves in a line; else the joints do, checking the next one too
    slow: float = 1.0  # fraction of the speed limits
    hold: int = 0  # control steps to wait at the end, until the servos catch up


@dataclass
class Demonstration:
    """What was observed and commanded: row t of each is control step t."""

    states: np.ndarray  # (L, S)
    actions: np.ndarray  # (L, A) clean targets
    phases: list  # L names of primitives
    images: list  # L times {view: image}, empty if the env does not render
    success: bool
    instruction: str

    @classmethod
    def of(cls, rows, success, instruction):
        """From rows of (state, action, phase, images), one per control step."""
        states, actions, phases, images = zip(*rows)
        actions = np.array(actions, np.float32)
        return cls(np.array(states), actions, phases, images, success, instruction)


# ---- poses of the hand


def tcp_of(env):
    """(3,) m: the tool's position in the task frame, now."""
    return env.data.site_xpos[env.tcp]


def closing_sign(robot):
    """1, or -1 if the hand's closing axis points the other way at rest."""
    _, rotation = get_kinematics(robot.name).forward(robot.home)
    return -np.sign(rotation[1, 1])


def tool_rotation(robot, direction, tilt, azimuth=None):
    """(3, 3) rotation of a tool that points down, tilted by `tilt` toward `direction` (both rad).

    The closing axis is horizontal; direction is about the vertical, 0 along the base's x. An arm
    of five joints can tilt its hand only outward, toward `azimuth`, so it turns the hand first.
    """
    if robot.dof == 5 and tilt:
        straight = tool_rotation(robot, direction, 0.0)
        return outwards(azimuth, tilt) @ straight
    x = np.cos(direction)
    y = np.sin(direction)
    ahead = np.sin(tilt)
    approach = np.array([ahead * x, ahead * y, -np.cos(tilt)])
    closing = closing_sign(robot) * np.array([y, -x, 0.0])
    return np.column_stack([np.cross(closing, approach), closing, approach])


def outwards(azimuth, tilt):
    """(3, 3) rotation that tilts a downward vector by `tilt` toward `azimuth` (both rad)."""
    axis = np.array([np.sin(azimuth), -np.cos(azimuth), 0.0])
    quat = np.empty(4)
    rotation = np.empty(9)
    mujoco.mju_axisAngle2Quat(quat, axis, tilt)
    mujoco.mju_quat2Mat(rotation, quat)
    return rotation.reshape(3, 3)


def hand_pose(env):
    """(direction, tilt) of the hand now: the closest arguments of tool_rotation."""
    tool = env.tool()
    tilt = 0.0
    if env.robot.dof == 5:
        azimuth = azimuth_of(env, tcp_of(env))
        x, y, z = tool[:, 2]
        ahead = x * np.cos(azimuth) + y * np.sin(azimuth)
        tilt = np.arctan2(ahead, -z)
        tool = outwards(azimuth, -tilt) @ tool
    _, closing, approach = tool.T
    x, y, _ = closing_sign(env.robot) * closing
    direction = np.arctan2(x, -y)
    ahead = (np.cos(direction), np.sin(direction))
    forward = approach[:2] @ ahead
    return direction, tilt or np.arctan2(forward, -approach[2])


def hand_offset(env, point):
    """(3,) m: a point in the tool's frame."""
    return env.tool().T @ (point - tcp_of(env))


def azimuth_of(env, position):
    """Direction (rad) from the base to a point, which is the hand's rest direction there."""
    x, y, _ = position - env.base
    return np.arctan2(y, x)


def quarter_turn(env, name, point):
    """The smallest turn (rad) after which the hand, at `point`, closes on two faces of a cube."""
    x, y, _ = env.rotation(name)
    axis = np.hypot(x, y).argmax()  # the most horizontal axis: the cube may lie on any face
    quarter = np.pi / 2
    yaw = np.arctan2(y[axis], x[axis])
    turn = yaw - azimuth_of(env, point)
    return (turn + quarter / 2) % quarter - quarter / 2


# ---- tasks as primitives: for each task the remaining ones, from the current state.
# They follow the order of ManiSkill's experts; comments explain differences.


def retreat(env, finger):
    """Move the fingers to `finger`, then up from the table if the hand is low."""
    tcp = tcp_of(env)
    steps = []
    travel = env.opening() - max(finger, 0.0)
    if abs(travel) > 0.1 * env.robot.travel:
        steps.append(Primitive("retreat", finger))
    if tcp[2] < 0.06:
        high = tcp + (0.06 - tcp[2] + 0.01) * UP
        steps.append(Primitive("retreat", finger, high, slow=0.8))
    return steps


def grasp(env, name, point, turn, close=None, tilts=TILTS):
    """Open, approach, descend, close; nothing if the body is already held."""
    if env.grasped(name):
        return []
    close = env.robot.squeeze if close is None else close
    wide = env.robot.travel
    steps = [Primitive("descend", wide, point, slow=0.6, hold=2), Primitive("grasp", close)]
    # Is the hand already above it, open and turned? Half a turn makes no difference.
    direction, _ = hand_pose(env)
    error = direction - azimuth_of(env, point) - turn
    turned = abs(np.cos(error)) > np.cos(0.15)
    x, y, z = hand_offset(env, point)
    over = np.hypot(x, y) < 0.006 and z < CLEARANCE + 0.02
    # m, of each finger; an empty hand may still be closed
    is_open = env.opening() > 0.9 * wide
    if not (turned and over and is_open):
        high = point + CLEARANCE * UP
        approach = Primitive("approach", wide, high, turn, tilts, straight=False)
        steps = [*retreat(env, wide), approach, *steps]
    return steps


def held_at(env, name, point):
    """The TCP position that puts a held body at `point`: it may be off-center in the hand."""
    if env.grasped(name):
        return point + tcp_of(env) - env.position(name)
    return point


def fetch(env, name, height, low):
    """Grasp a body, and lift it by `height` (m) if it is lower than `low`."""
    body = env.position(name)
    turn = 0.0 if name == "sphere" else quarter_turn(env, name, body)
    steps = grasp(env, name, body, turn)
    # what is still to be grasped has to be lifted in any case
    if steps or body[2] < low:
        high = held_at(env, name, body) + height * UP
        steps.append(Primitive("lift", env.robot.squeeze, high))
    return steps


def pick_cube(env):
    goal = held_at(env, "cube", env.position("goal"))
    steps = fetch(env, "cube", height=0.04, low=0.04)
    return [*steps, Primitive("carry", env.robot.squeeze, goal, hold=8)]


def slide(env, name, side):
    """Place closed fingers behind the cube, and move it along x over the edge of the target.

    Push: side 1; pull: side -1.
    """
    cube = env.position("cube")
    turn = -azimuth_of(env, cube)
    # if one jaw is fixed, the jaws close beside the tool's position
    _, closing, _ = tool_rotation(env.robot, 0.0, 0.0).T
    cube -= env.robot.fist * closing
    back = 0.055  # m, behind the cube
    above = 0.07
    if env.robot.dof == 5:  # near its base it cannot reach higher
        back = 0.04
        above = 0.045
    start = cube - (side * back, 0, 0)
    # between TCP and cube center are half a finger's thickness and half a cube
    short = 0.03 + 0.6 * region_radius(env.robot)
    end = start.copy()
    end[0] = env.position("goal")[0] - side * short
    drive = Primitive(name, 0.0, end, turn, slow=0.7, hold=2)
    away = tcp_of(env) - cube
    behind, beside, over = away * (-side, 1, 1)
    if 0.02 < behind < 0.07 and max(abs(beside), abs(over)) < 0.01:
        return [drive]
    return [
        *retreat(env, 0.0),
        Primitive("approach", 0.0, start + above * UP, turn, straight=False),
        Primitive("descend", 0.0, start, slow=0.8),
        drive,
    ]


def put(env, name, support, rest, lift, drop):
    """Grasp a body, lift it by `lift`, carry it above a support, on which it rests `rest` higher.

    Then lower it to `drop` above its resting place (all in m), let go and retreat.
    """
    wide = env.robot.travel
    place = env.position(support) + rest * UP
    target = held_at(env, name, place)
    x, y, _ = env.position(name) - place
    away = np.hypot(x, y) >= 0.01
    steps = fetch(env, name, lift, low=place[2] + 0.03 if away else 0.0)
    if steps or away:
        steps.append(Primitive("carry", env.robot.squeeze, target + 0.05 * UP))
    return [
        *steps,
        Primitive("place", env.robot.squeeze, target + drop * UP, slow=0.5, hold=4),
        Primitive("release", wide),
        Primitive("retreat", wide, target + 0.065 * UP),
    ]


def peg_style(env, high):
    """How this arm can raise the peg from the lifted pose: "upright", "leaning" or "loose"."""
    name = env.robot.name
    if name in SHIPPED:  # as in the recorded demonstrations
        return {"panda": "loose", "widowx": "upright"}.get(name, "leaning")
    arm = get_kinematics(name)
    q = env.data.ctrl[: env.robot.dof]
    for how, tilt in (("upright", np.pi / 2), ("leaning", np.pi / 2 - 0.25)):
        azimuth = azimuth_of(env, high)
        rotation = tool_rotation(env.robot, azimuth, tilt, azimuth)
        if arm.solve_ik(high - env.base, rotation, q) is not None:
            return how
    return "loose"


def lift_peg(env):
    """Grasp across the far half and lift: the peg swings down in the grip. Then stand it up."""
    peg = env.position("peg")
    axis = env.rotation("peg")[:, 0]
    firm = PEG_RADIUS - PEG_FIRM / env.robot.finger_kp  # m, finger target for this force
    if env.grasped("peg") and peg[2] > 1.2 * PEG_RADIUS:
        return stand_peg(env, peg, axis * np.sign(axis[2]), firm)
    axis *= np.sign(axis @ (peg - env.base))  # pointing outward
    point = peg + PEG_LEVER * axis
    turn = np.arctan2(axis[1], axis[0]) - azimuth_of(env, point)
    high = peg + PEG_LEVER / 2 * axis + 0.23 * UP
    grip = firm
    tilts = TILTS
    lift_tilts = TILTS[::-1]
    how = peg_style(env, high)
    if how == "loose":  # the wrist cannot turn the peg all the way, so the peg swings
        grip = PEG_RADIUS - PEG_SWING / env.robot.finger_kp
        lift_tilts = TILTS
    elif how == "leaning":
        # leaning back a little keeps the wrist from its limit when the peg stands
        tilts = (-0.25, 0.0, 0.3)
    return [
        *grasp(env, "peg", point, turn, grip, tilts),
        Primitive("lift", grip, high, 0.0, lift_tilts, slow=0.8),
    ]


def stand_peg(env, peg, axis, grip):
    """From a hanging peg: turn the hand by the remaining angle, and set the peg down."""
    tcp = tcp_of(env)
    _, (x, y, _), approach = env.tool().T
    forward = np.array([-y, x, 0.0])
    forward *= np.sign(forward @ (tcp - env.base)) / np.linalg.norm(forward)
    tilt = np.arctan2(approach @ forward, -approach[2])
    tilt += np.arctan2(axis @ forward, axis[2])
    # aim its lower end 6 mm below the tabletop, so that it surely stands
    down = PEG_LENGTH + (tcp - peg) @ axis - tcp[2] - 0.006
    return [
        Primitive("turn", grip, tcp, 0.0, (tilt,), straight=False),
        Primitive("place", grip, tcp + down * UP, slow=0.4, hold=4),
        Primitive("release", env.robot.travel),
    ]


PRIMITIVES = {
    "PickCube": pick_cube,
    "PushCube": partial(slide, name="push", side=1),
    "PullCube": partial(slide, name="pull", side=-1),
    "StackCube": partial(
        put,
        name="cubeA",
        support="cubeB",
        rest=0.04,
        lift=0.09,
        drop=0.003,
    ),
    # 9 mm above its resting place instead of ManiSkill's 27: a ball dropped from higher jumps out
    # of walls that reach only its lower half
    "PlaceSphere": partial(
        put,
        name="sphere",
        support="bin",
        rest=0.0225,
        lift=0.07,
        drop=0.0095,
    ),
    "LiftPegUpright": lift_peg,
}


# ---- paths


def collides(env, path, finger):
    """True if the arm, anywhere on its path (n, dof), touches itself or anything fixed."""
    model = env.model
    scratch = copy.copy(env.data)
    is_free = model.body_dofnum[model.geom_bodyid] == 6  # may be touched: that is the task
    fingers = env.robot.finger_joints(finger)
    for q in path:
        scratch.qpos[: len(q) + len(fingers)] = [*q, *fingers]
        mujoco.mj_kinematics(model, scratch)
        mujoco.mj_collision(model, scratch)
        fixed = ~is_free[scratch.contact.geom].any(axis=1)  # (contacts, 2) -> (contacts,)
        if (scratch.contact.dist[fixed] < -0.001).any():
            return True
    return False


def straight_path(arm, q, goal, rotation):
    """Waypoints [q] that move the TCP along a line to a pose, turning evenly. Raises Infeasible."""
    at, turned = arm.forward(q)
    start, end = np.empty((2, 4))  # quaternions
    turn = np.empty(3)
    between = np.empty(9)
    mujoco.mju_mat2Quat(start, turned.ravel())
    mujoco.mju_mat2Quat(end, rotation.ravel())
    mujoco.mju_subQuat(turn, end, start)
    by_way = np.linalg.norm(goal - at) / 0.02  # a waypoint every 2 cm
    by_turn = np.linalg.norm(turn) / 0.15  # or 0.15 rad
    n = int(max(by_way, by_turn, 2))
    path = [q]
    for fraction in np.linspace(0, 1, n + 1)[1:]:
        position = at + fraction * (goal - at)
        quat = start.copy()
        mujoco.mju_quatIntegrate(quat, turn, fraction)
        mujoco.mju_quat2Mat(between, quat)
        q = arm.solve_ik(position, between.reshape(3, 3), path[-1])
        # a jump would flip the elbow or the wrist
        if q is None or np.abs(q - path[-1]).max() > 0.6:
            raise Infeasible
        path.append(q)
    return path


def find_path(env, q, primitive, pose):
    """Waypoints (n, dof) from `q` to a primitive's position and a pose. Raises Infeasible."""
    arm = get_kinematics(env.robot.name)
    goal = primitive.position - env.base
    azimuth = azimuth_of(env, primitive.position)
    rotation = tool_rotation(env.robot, *pose, azimuth)
    if primitive.straight:
        path = straight_path(arm, q, goal, rotation)
    else:
        end = arm.solve_ik(goal, rotation, q)
        if end is None:
            raise Infeasible
        path = np.linspace(q, end, 8)
    # Do not check the start: a hand pressed onto the table must be able to leave.
    if collides(env, path[1:], max(primitive.finger, 0.0)):
        raise Infeasible
    return np.array(path)


def timed(robot, path, slow, hold):
    """Targets (n, dof) at 20 Hz along the waypoints; the last one is held for `hold` steps.

    Minimum-jerk progress 10 u^3 - 15 u^4 + 6 u^5, with peak joint and TCP speeds under the limits.
    """
    arm = get_kinematics(robot.name)
    limit = np.minimum(JOINT_SPEED, 0.6 * robot.velocity_limit) * slow
    places = [arm.forward(q)[0] for q in path]  # of the TCP
    ways = np.linalg.norm(np.diff(places, axis=0), axis=1)
    turns = np.abs(np.diff(path, axis=0)) / limit
    seconds = np.maximum(ways / (TCP_SPEED * slow), turns.max(axis=1))
    # times of the waypoints at full speed
    knots = np.cumsum([0.0, *seconds + 1e-6])
    # the peak speed of minimum jerk is 15/8 of its mean
    n = max(3, math.ceil(1.875 * knots[-1] * CONTROL_HZ))
    u = np.minimum(np.arange(1, n + hold + 1) / n, 1.0)
    progress = knots[-1] * u**3 * (10 - 15 * u + 6 * u**2)
    return np.column_stack([np.interp(progress, knots, joint) for joint in path.T])


def reach(env, q, pose, primitive, following):
    """Targets (n, dof) from `q` to a primitive, and the hand's (direction, tilt) there.

    An approach is accepted only if the following path is possible too. Raises Infeasible.
    """
    direction, tilt = pose
    more = STEEP if env.robot.dof == 5 else ()
    choices = (tilt, *TILTS, *more)
    tilts = sorted(choices, key=lambda other: abs(other - tilt))  # closest to the hand's tilt first
    if primitive.turn is not None:
        direction = azimuth_of(env, primitive.position) + primitive.turn
        tilts = (*primitive.tilts, *more)
    for tilt in tilts:
        try:
            path = find_path(env, q, primitive, (direction, tilt))
            if not primitive.straight:
                find_path(env, path[-1], following, (direction, tilt))
        except Infeasible:
            continue
        return timed(env.robot, path, primitive.slow, primitive.hold), (direction, tilt)
    raise Infeasible


def plan(env, primitives):
    """[(name, targets (n, A))] that execute primitives from the arm's pose. Raises Infeasible."""
    q = env.data.ctrl[: env.robot.dof]
    pose = hand_pose(env)
    segments = []
    # each one starts where the previous one ends
    for primitive, following in pairwise([*primitives, None]):
        targets = np.tile(q, (FINGER_STEPS, 1))
        if primitive.position is not None:
            targets, pose = reach(env, q, pose, primitive, following)
            q = targets[-1]
        fingers = np.full(len(targets), primitive.finger)
        targets = np.column_stack([targets, fingers])
        segments.append((primitive.name, targets))
    return segments


# ---- execution


def control_steps(env):
    """Yield (primitive's name, target (A,), steps left in it) for every control step.

    A plan that ends without success is followed by a new one.
    """
    for _ in range(PLANS):
        try:
            segments = plan(env, PRIMITIVES[env.task.name](env))
        except Infeasible:  # fall back: let go, and plan again
            segments = plan(env, [Primitive("release", env.robot.travel)])
        for name, targets in segments:
            for i, target in enumerate(targets):
                yield name, target, len(targets) - i


def demonstrate(env, seed, noise=0.0, command=0, reset=True):
    """Carry out a command in the layout of `seed`; with reset=False continue from the env's state.

    noise: size (rad) of smooth disturbances of the executed joint targets during free motion. The
    recorded actions stay clean, so demonstrations show how to recover (DART, arXiv 1703.09327).
    Returns a Demonstration, successful or not.
    """
    if reset:
        env.reset(seed, command=command)
    env.steps = 0  # the task's time starts with the expert
    observation = env.observe()
    rng = seeds.rng(seed, "disturbance")
    disturbance = np.zeros(env.robot.dof)  # rad, correlated in time
    rows = []
    for name, target, left in control_steps(env):
        disturbance = 0.8 * disturbance + 0.6 * noise * rng.normal(size=env.robot.dof)
        free = name in ("approach", "lift", "carry")
        fade = min(1.0, left / 6) if free else 0.0  # fade out before precise motion
        rows.append((observation["state"], target, name, observation["images"]))
        target = target + np.append(disturbance * fade, 0)
        observation, _, success, late, _ = env.step(target)
        if success or late:
            break
    return Demonstration.of(rows, success, env.instruction)
