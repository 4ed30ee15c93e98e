"""Meta-World's 50 tasks (arXiv 1910.10897, version 3.1.1 of its package) as environments of ours.

    state   (4,)  hand's position 3 m | opening of the gripper, 0 to 1
    action  (4,)  step of the hand's target 3, in cm | closing force of the gripper; all -1 to 1

At 80 Hz. Instructions and horizons are in metaworld.json, as published. The front image is the
center of the published comparisons' camera (corner2 moved, and turned by 180 degrees), the wrist
image the package's camera between the fingers. Goals and positions are drawn by the package. An
episode is done at its first step of success. Needs
`pip install --no-deps -r requirements-metaworld.txt`.
"""

import json
import warnings
from pathlib import Path

import numpy as np

from data import seeds
from data.env import IMAGE_SIZE
from data.environments import Arm, PackageEnv, Task
from data.expert import Demonstration
from data.simulator import Camera, mujoco
from embodiment import Embodiment
from files import reading

with reading("metaworld", "`pip install --no-deps -r requirements-metaworld.txt`"):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

PACKAGES = ("metaworld",)
HZ = 80
CAMERA_POSITION = (0.75, 0.075, 0.7)  # m, for corner2: arXiv 2206.14244
CAMERAS = {"front": "corner2", "render": "corner2", "wrist": "gripperPOV"}  # the package's names
PUBLISHED_SIZE = 480  # pixels per side, for 60 degrees
CROP_CENTER = (258, 278)  # pixels in the published image: the middle of the table
CROP_SIZE = 256  # a puck of 10 published pixels gets 5 of ours; without the crop 2 or 3
# Control steps between two images of a demonstration, as for a 20 Hz camera: rendering is
# expensive.
PICTURE_STRIDE = 4
# Action per rad of data.record's --noise: its 0.015 rad become 0.3 of a cm.
NOISE_SCALE = 20
# Control steps of a disturbance, and of the pause after it in which the expert recovers. Without a
# pause the hand could not turn a dial (165 steps instead of 78) or a lock.
BURST = 10
REST = 20


ROBOT = Arm("sawyer", "Sawyer in Meta-World", 3)
NUMBERS = Embodiment(
    state_dim=4,
    action_dim=4,
    relative=(-1, -1, -1, -1),  # steps, not targets
    control_hz=HZ,
    state="hand (m), how far it is open (0 to 1)",
    action="step of the hand's target (cm), how hard it closes; -1 to 1",
)
ROWS = json.loads((Path(__file__).parent / "metaworld.json").read_text())["tasks"]
TASKS = {name: Task(name, **row) for name, row in ROWS.items()}


def make_inner(task):
    """The package's own environment: draws new goals at each reset, shows them to the expert."""

    class Inner(ALL_V3_ENVIRONMENTS[f"{task}-v3"]):
        def reset_mocap_welds(self):
            """As in the package, whose rows of 11 numbers do not fit the 12 of mujoco 4.0."""
            welds = self.model.eq_type == mujoco.mjtEq.mjEQ_WELD.value
            # anchor, position, rotation, torquescale: at the same indices in both
            self.model.eq_data[welds, :11] = [0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 5]

    inner = Inner()
    inner._set_task_called = True
    inner._freeze_rand_vec = False
    inner.seeded_rand_vec = True  # draw from np_random
    # The goal is in the state, for the expert. The constructor has cached bounds without the goal,
    # which would clip it to zero.
    inner._partially_observable = False
    del inner.sawyer_observation_space
    return inner


def set_cameras(model):
    """Set up the published camera to render only a crop around the table, with the same pixels."""
    model.vis.quality.offsamples = 0  # no multisampling
    camera = model.camera("corner2")
    camera.pos[:] = CAMERA_POSITION
    side = CROP_SIZE / PUBLISHED_SIZE  # the published image is 1 wide and high
    focal = 0.5 / np.tan(np.radians(camera.fovy[0] / 2))
    # the image is turned by 180 degrees later, so right and left are exchanged here
    away = 0.5 - np.array(CROP_CENTER) / PUBLISHED_SIZE
    model.cam_sensorsize[camera.id] = side
    model.cam_intrinsic[camera.id] = [focal, focal, *away]


class MetaWorldEnv(PackageEnv):
    """One task; data/environments.py describes the interface."""

    hz = HZ
    robot = ROBOT
    embodiment = NUMBERS

    def __init__(self, task="drawer-open", **options):
        super().__init__(TASKS, task, **options)
        self.inner = make_inner(task)
        self.expert = ENV_POLICY_MAP[f"{task}-v3"]()
        set_cameras(self.inner.model)
        self.camera = Camera(self.inner.model)

    def reset(self, seed=0, instruction=None):
        """Draw goals and positions from `seed`; instruction replaces the task's sentence."""
        self.inner.np_random = seeds.rng(seed, "metaworld", self.number)
        self.full, _ = self.inner.reset()  # (39,): for the expert; starts with the policy's state
        # half of the tasks leave objects or marks drawn where they were in the previous episode
        mujoco.mj_forward(self.inner.model, self.inner.data)
        self.near = False
        return self.start_episode(seed, instruction)

    def step(self, action, render=None):
        """1/80 s. ValueError if the action has the wrong shape or is not finite."""
        action = self.read_action(action)
        self.inner.curr_path_length = 0  # time is counted here
        self.full, reward, _, _, info = self.inner.step(action)
        self.near = bool(info["near_object"])
        return self.count_step(reward, info["success"], render)

    def state(self):
        return self.full[:4].astype(np.float32)

    def draw(self, view, size=IMAGE_SIZE, pretty=False):
        """(size, size, 3) uint8: "front", "wrist", or "render" for people."""
        picture = self.camera.draw(self.inner.data, CAMERAS[view], size, pretty)
        return picture if view == "wrist" else picture[::-1, ::-1].copy()

    def segment(self, view, size=IMAGE_SIZE):
        """What the pixels of an image show, see Camera.segment."""
        both = self.camera.segment(self.inner.data, CAMERAS[view], size)
        return both if view == "wrist" else [part[::-1, ::-1] for part in both]

    def held(self):
        return self.near

    def why(self, held):
        return "out of time" if any(held) else "never near it"

    def close(self):
        self.camera.close()


ENVIRONMENT = MetaWorldEnv


def demonstrate(env, seed, noise=0.0, command=0, reset=True):
    """Like data.expert.demonstrate, with the package's expert: recorded actions are clean.

    The expert reads the state in every step, so it recovers from wherever a disturbance leads.
    """
    if reset:
        env.reset(seed)
    env.steps = 0
    rng = seeds.rng(seed, "disturbance")
    first = rng.integers(BURST + REST)  # disturbances start at a different step in every episode
    disturbance = np.zeros(4)  # of the action, correlated in time
    rows = []
    over = False
    while not over:
        if env.steps % PICTURE_STRIDE == 0:
            images = env.observe()["images"]
        with warnings.catch_warnings(action="ignore"):  # about actions beyond 1
            action = np.clip(env.expert.get_action(env.full), -1, 1)
        rows.append((env.state(), action, "expert", images))
        step = NOISE_SCALE * noise * rng.normal(size=3)
        disturbance[:3] = 0.8 * disturbance[:3] + 0.6 * step
        burst = (env.steps + first) % (BURST + REST) < BURST
        _, _, success, late, _ = env.step(action + burst * disturbance, render=False)
        over = success or late
    return Demonstration.of(rows, success, env.instruction)
