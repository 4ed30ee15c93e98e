"""The expert of LIBERO's tasks (data/libero.py): it puts one thing into a basket or onto a plate.

    approach, descend    above the thing, then straight down: around its middle, or over its rim
    grasp, lift          until both fingers touch it
    carry, place         above the place, then down, wherever the thing sits in the hand
    release, retreat     and all again if that was not it

It reads the true state of the simulator in every step, and so goes on from wherever a disturbance,
or a policy, has led. The package has no expert, and its demonstrations are people's.
"""

from functools import partial
from itertools import product
from operator import itemgetter

import numpy as np

from data import seeds
from data.expert import Demonstration
from data.libero import CLOSED, HIDDEN, OPEN
from data.simulator import mujoco

# Control steps between two pictures of a demonstration: training reads those alone.
PICTURE_STRIDE = 4
# heights are m above what is meant
GAIN = 2.0  # of a step of the hand's target, for each m of error; more than 1, since it lags behind
ABOVE = 0.15  # from where the hand goes straight down
FINGER_DEPTH = 0.035  # at most so far below the top of a thing that is held around its middle
RIM_DEPTH = 0.022  # and of one that is held by its rim
TIP = 0.012  # fingers reach this far below the point between them
RIM_INSET = 0.004  # m, from the outermost of a thing to the middle of its rim
# The open hand over a rim: m along its closing axis outwards, across it, and above the point between
# the fingers. First the outer finger, then what is beside it.
FINGER_SHAPE = product((0.025, 0.032, 0.04, 0.047, 0.055), (-0.01, 0.0, 0.01), (-TIP,))
HAND_SHAPE = [*FINGER_SHAPE, *product((-0.1, -0.06, 0.07, 0.1), (-0.03, 0.0, 0.03), (0.045,))]
WIDEST = 0.068  # m, that goes between the fingers
CLOSE_STEPS = 20  # control steps: a rim of 5 mm is reached after 10
OPEN_STEPS = 8
NOISE_SCALE = 20  # of an action for each rad of data.record's --noise, as in Meta-World
FREE = ("approach", "lift", "carry")  # what is disturbed
PLANS = 4  # how often the expert looks again
UP = np.array([0.0, 0.0, 1.0])
CUBE = np.array(list(product((-1, 1), repeat=3)))  # corners of one


def corners(env, name):
    """(n, 3) m: corners of the shapes that a thing collides with, where they are now."""
    model = env.model
    data = env.data
    shapes = []
    for geom in np.flatnonzero(model.body_rootid[model.geom_bodyid] == env.inner.obj_body_id[name]):
        if model.geom_group[geom] != HIDDEN:
            continue
        points = CUBE * model.geom_size[geom]
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH.value:
            mesh = model.geom_dataid[geom]
            first = model.mesh_vertadr[mesh]
            points = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
        turned = data.geom_xmat[geom].reshape(3, 3)
        shapes.append(points @ turned.T + data.geom_xpos[geom])
    return np.concatenate(shapes)


def middle_of(env, name):
    """(3,) m: the middle of the box around a thing."""
    points = corners(env, name)
    return (points.min(axis=0) + points.max(axis=0)) / 2


def height_below(env, x, y, z):
    """m: how high what lies below a point is, the arm aside."""
    geom = np.zeros(1, np.int32)
    groups = np.array([group == HIDDEN for group in range(6)], np.uint8)
    way = mujoco.mj_ray(env.model, env.data, np.array([x, y, z]), -UP, groups, 1, -1, geom)
    body = env.model.geom_bodyid[geom[0]]
    arm = env.model.body_rootid[body] == env.model.body("robot0_base").id
    return -np.inf if way < 0 or arm else z - way


def plan_grasp(env):
    """(point (3,) m, closing axis (3,)): around the thing's middle, or over its rim if it is wide."""
    points = corners(env, env.target)
    low, high = points.min(axis=0), points.max(axis=0)
    middle = (low + high) / 2
    around = []
    rims = []
    for angle in np.radians((0, 30, -30, 60, -60, 90)):  # away from how the hand is at rest
        axis = np.array([np.sin(angle), np.cos(angle), 0.0])
        along = (points - middle) @ axis
        width = along.max() - along.min()
        if width < WIDEST:
            point = middle + (along.max() + along.min()) / 2 * axis
            point[2] = max(high[2] - FINGER_DEPTH, low[2] + TIP)
            # turning takes time: only where it is much narrower
            around.append((width + 0.01 * abs(angle), point, axis))
        for side in (-1, 1):
            rim = middle + side * (width / 2 - RIM_INSET) * axis
            rim[2] = high[2] - RIM_DEPTH
            # the outer finger wants room as far down as it comes, the hand beside it above the thing
            over = []
            for out, across, height in HAND_SHAPE:
                x, y, _ = rim + out * side * axis + across * np.cross(axis, UP)
                over.append(height_below(env, x, y, high[2] + ABOVE) - rim[2] - height)
            rims.append((max(0.0, *over) + 0.01 * abs(angle), rim, axis))
    _, point, axis = min(around or rims, key=itemgetter(0))
    return point, axis


def steer(env, target, axis, fingers):
    """The action (7,) that brings the hand towards a place, pointing down and closing along `axis`."""
    place, rotation = env.hand()
    axis = axis * np.sign(axis @ rotation[:, 0] or 1.0)  # half a turn makes no difference
    wanted = np.column_stack([axis, np.cross(-UP, axis), -UP])
    turn = np.cross(rotation, wanted, axis=0).sum(axis=1) / 2  # rad, if it is small
    action = np.concatenate([GAIN * (target - place) / 0.05, GAIN * turn / 0.5, [fingers]])
    return np.clip(action, -1, 1)


def go(env, name, target, axis, fingers, near, most=60):
    """(name, action) until the hand is `near` (m) a place, or after `most` steps.

    target: (3,) m, or a function that says where it is now.
    """
    for _ in range(most):
        place, rotation = env.hand()
        goal = target() if callable(target) else target
        if np.linalg.norm(goal - place) < near and abs(axis @ rotation[:, 0]) > 0.98:
            return
        yield name, steer(env, goal, axis, fingers)


def close_hand(env, axis):
    """(name, action) while the fingers close around something, the hand staying where it is."""
    place = env.hand()[0].copy()
    firm = 0
    for _ in range(CLOSE_STEPS):
        firm += env.held()
        if firm > 2:
            return
        yield "grasp", steer(env, place, axis, CLOSED)


def open_hand(env, axis):
    """(name, action) while the fingers open, the hand staying where it is."""
    place = env.hand()[0].copy()
    for _ in range(OPEN_STEPS):
        yield "release", steer(env, place, axis, OPEN)


def over_place(env, height):
    """(3,) m: where the hand must be for the thing to be over the middle of its place.

    However the thing sits in the hand.
    """
    x, y, _ = env.hand()[0] + middle_of(env, env.place) - middle_of(env, env.target)
    return np.array([x, y, height])


def fetch(env):
    """(name, action) of the way to the thing, until it is held or was missed; returns the axis."""
    point, axis = plan_grasp(env)
    yield from go(env, "approach", point + ABOVE * UP, axis, OPEN, near=0.025)
    yield from go(env, "descend", point, axis, OPEN, near=0.006, most=30)
    yield from close_hand(env, axis)
    return axis


def deliver(env, axis):
    """(name, action) of the way of a held thing to its place, and of the hand away from there."""
    hand = env.hand()[0].copy()
    hang = hand[2] - corners(env, env.target)[:, 2].min()  # m, from the thing's lower end
    top = corners(env, env.place)[:, 2].max() + hang
    high = max(top + 0.06, hand[2] + 0.05)
    start = np.array([*hand[:2], high])
    yield from go(env, "lift", start, axis, CLOSED, near=0.02)
    over = partial(over_place, env, high)
    yield from go(env, "carry", over, axis, CLOSED, near=0.02, most=100)
    # into a basket, onto a plate
    down = top - 0.04 if env.task.tier == "object" else top - 0.006
    over = partial(over_place, env, down)
    yield from go(env, "place", over, axis, CLOSED, near=0.006, most=25)
    yield from open_hand(env, axis)


def control_steps(env):
    """(primitive's name, action) for every control step; what ends without success begins again."""
    for _ in range(PLANS):
        axis = env.hand()[1][:, 0].copy()
        axis[2] = 0  # level
        axis /= np.linalg.norm(axis)
        if not env.held():
            axis = yield from fetch(env)
        if env.held():
            yield from deliver(env, axis)
        away = env.hand()[0] + ABOVE * UP
        yield from go(env, "retreat", away, axis, OPEN, near=0.02, most=15)


def demonstrate(env, seed, noise=0.0, command=0, reset=True):
    """As data.expert.demonstrate: what is recorded is clean, what is done is disturbed.

    It looks at the state anew in every step, so it goes on from wherever a disturbance leads.
    """
    if reset:
        env.reset(seed)
    env.steps = 0
    rng = seeds.rng(seed, "disturbance")
    disturbance = np.zeros(3)  # of the action, correlated in time
    rows = []
    success = False
    for phase, action in control_steps(env):
        if env.steps % PICTURE_STRIDE == 0:
            images = env.observe()["images"]
        rows.append((env.state(), action, phase, images))
        disturbance = 0.8 * disturbance + 0.6 * NOISE_SCALE * noise * rng.normal(size=3)
        done = action.copy()
        done[:3] += disturbance * (phase in FREE)
        _, _, success, late, _ = env.step(done, render=False)
        if success or late:
            break
    return Demonstration.of(rows, success, env.instruction)
