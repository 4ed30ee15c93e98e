"""The expert for LIBERO's tasks (data/libero.py): puts one object into a basket or onto a plate.

    approach, descend    above the object, then straight down: around its middle, or over its rim
    grasp, lift          until both fingers touch it
    carry, place         above the place, then down, wherever the object sits in the hand
    release, retreat     and again from the start if that was not a success

It reads the true state of the simulator in every step, so it recovers from wherever a disturbance,
or a policy, has led. The package has no expert; its demonstrations were recorded by people.
"""

from functools import partial
from itertools import product
from operator import itemgetter

import numpy as np

from data import seeds
from data.expert import Demonstration
from data.libero import CLOSED, HIDDEN, OPEN
from data.simulator import mujoco

# Control steps between two images of a demonstration: training reads only those.
PICTURE_STRIDE = 4
# heights in m above the point in question
GAIN = 2.0  # step of the hand's target per m of error; more than 1, because the hand lags behind
ABOVE = 0.15  # from here the hand descends straight
FINGER_DEPTH = 0.035  # largest depth below the top of an object that is held around its middle
RIM_DEPTH = 0.022  # the same for an object that is held by its rim
TIP = 0.012  # the fingers extend this far below the point between them
RIM_INSET = 0.004  # m, from the outer edge of an object to the middle of its rim
# The open hand over a rim: m outward along its closing axis, across it, and above the point between
# the fingers. First the outer finger, then the hand beside it.
FINGER_SHAPE = product((0.025, 0.032, 0.04, 0.047, 0.055), (-0.01, 0.0, 0.01), (-TIP,))
HAND_SHAPE = [*FINGER_SHAPE, *product((-0.1, -0.06, 0.07, 0.1), (-0.03, 0.0, 0.03), (0.045,))]
WIDEST = 0.068  # m; widest object that fits between the fingers
CLOSE_STEPS = 20  # control steps; the fingers reach a rim of 5 mm after 10
OPEN_STEPS = 8
NOISE_SCALE = 20  # of an action per rad of data.record's --noise, as for Meta-World
FREE = ("approach", "lift", "carry")  # phases that are disturbed
PLANS = 4  # how often the expert replans
UP = np.array([0.0, 0.0, 1.0])
CUBE = np.array(list(product((-1, 1), repeat=3)))  # corners of a cube


def corners(env, name):
    """(n, 3) m: corners of an object's collision shapes, now."""
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
    """(3,) m: the center of an object's bounding box."""
    points = corners(env, name)
    return (points.min(axis=0) + points.max(axis=0)) / 2


def height_below(env, x, y, z):
    """m: height of the first surface below a point, not counting the arm."""
    geom = np.zeros(1, np.int32)
    groups = np.array([group == HIDDEN for group in range(6)], np.uint8)
    way = mujoco.mj_ray(env.model, env.data, np.array([x, y, z]), -UP, groups, 1, -1, geom)
    body = env.model.geom_bodyid[geom[0]]
    arm = env.model.body_rootid[body] == env.model.body("robot0_base").id
    return -np.inf if way < 0 or arm else z - way


def plan_grasp(env):
    """(point (3,) m, closing axis (3,)): around the object's middle, or over a wide one's rim."""
    points = corners(env, env.target)
    low, high = points.min(axis=0), points.max(axis=0)
    middle = (low + high) / 2
    around = []
    rims = []
    for angle in np.radians((0, 30, -30, 60, -60, 90)):  # relative to the hand's rest direction
        axis = np.array([np.sin(angle), np.cos(angle), 0.0])
        along = (points - middle) @ axis
        width = along.max() - along.min()
        if width < WIDEST:
            point = middle + (along.max() + along.min()) / 2 * axis
            point[2] = max(high[2] - FINGER_DEPTH, low[2] + TIP)
            # turning takes time: only if the object is much narrower that way
            around.append((width + 0.01 * abs(angle), point, axis))
        for side in (-1, 1):
            rim = middle + side * (width / 2 - RIM_INSET) * axis
            rim[2] = high[2] - RIM_DEPTH
            # there must be room for the outer finger at its depth, and for the hand above the
            # object
            over = []
            for out, across, height in HAND_SHAPE:
                x, y, _ = rim + out * side * axis + across * np.cross(axis, UP)
                over.append(height_below(env, x, y, high[2] + ABOVE) - rim[2] - height)
            rims.append((max(0.0, *over) + 0.01 * abs(angle), rim, axis))
    _, point, axis = min(around or rims, key=itemgetter(0))
    return point, axis


def steer(env, target, axis, fingers):
    """The action (7,) that moves the hand to `target`, pointing down and closing along `axis`."""
    place, rotation = env.hand()
    axis = axis * np.sign(axis @ rotation[:, 0] or 1.0)  # half a turn makes no difference
    wanted = np.column_stack([axis, np.cross(-UP, axis), -UP])
    turn = np.cross(rotation, wanted, axis=0).sum(axis=1) / 2  # rad, for small angles
    action = np.concatenate([GAIN * (target - place) / 0.05, GAIN * turn / 0.5, [fingers]])
    return np.clip(action, -1, 1)


def go(env, name, target, axis, fingers, near, most=60):
    """Yield (name, action) until the hand is `near` (m) its target, or after `most` steps.

    target: (3,) m, or a function that returns its current position.
    """
    for _ in range(most):
        place, rotation = env.hand()
        goal = target() if callable(target) else target
        if np.linalg.norm(goal - place) < near and abs(axis @ rotation[:, 0]) > 0.98:
            return
        yield name, steer(env, goal, axis, fingers)


def close_hand(env, axis):
    """Yield (name, action) while the fingers close on something and the hand stays in place."""
    place = env.hand()[0].copy()
    firm = 0
    for _ in range(CLOSE_STEPS):
        firm += env.held()
        if firm > 2:
            return
        yield "grasp", steer(env, place, axis, CLOSED)


def open_hand(env, axis):
    """Yield (name, action) while the fingers open and the hand stays in place."""
    place = env.hand()[0].copy()
    for _ in range(OPEN_STEPS):
        yield "release", steer(env, place, axis, OPEN)


def over_place(env, height):
    """(3,) m: hand position with the object above the middle of its place.

    It works wherever the object sits in the hand.
    """
    x, y, _ = env.hand()[0] + middle_of(env, env.place) - middle_of(env, env.target)
    return np.array([x, y, height])


def fetch(env):
    """Yield (name, action) to grasp the object, until it is held or missed; returns the axis."""
    point, axis = plan_grasp(env)
    yield from go(env, "approach", point + ABOVE * UP, axis, OPEN, near=0.025)
    yield from go(env, "descend", point, axis, OPEN, near=0.006, most=30)
    yield from close_hand(env, axis)
    return axis


def deliver(env, axis):
    """Yield (name, action) to put down a held object at its place."""
    hand = env.hand()[0].copy()
    hang = hand[2] - corners(env, env.target)[:, 2].min()  # m, from the object's lower end
    top = corners(env, env.place)[:, 2].max() + hang
    high = max(top + 0.06, hand[2] + 0.05)
    start = np.array([*hand[:2], high])
    yield from go(env, "lift", start, axis, CLOSED, near=0.02)
    over = partial(over_place, env, high)
    yield from go(env, "carry", over, axis, CLOSED, near=0.02, most=100)
    # into a basket, or onto a plate
    down = top - 0.04 if env.task.tier == "object" else top - 0.006
    over = partial(over_place, env, down)
    yield from go(env, "place", over, axis, CLOSED, near=0.006, most=25)
    yield from open_hand(env, axis)


def control_steps(env):
    """Yield (primitive's name, action) for every control step; without success it starts over."""
    for _ in range(PLANS):
        axis = env.hand()[1][:, 0].copy()
        axis[2] = 0  # horizontal
        axis /= np.linalg.norm(axis)
        if not env.held():
            axis = yield from fetch(env)
        if env.held():
            yield from deliver(env, axis)
        away = env.hand()[0] + ABOVE * UP
        yield from go(env, "retreat", away, axis, OPEN, near=0.02, most=15)


def demonstrate(env, seed, noise=0.0, command=0, reset=True):
    """Like data.expert.demonstrate: recorded actions are clean, executed ones are disturbed.

    The expert reads the state in every step, so it recovers from wherever a disturbance leads.
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
