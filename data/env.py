"""One robot, one task, one table: the environment, with gymnasium's signature and 20 Hz control.

reset(seed) -> observation, info;  step(action (A,)) -> observation, reward, terminated, truncated, info
Observation: {"images": {"front", "wrist"}: (128, 128, 3) uint8, "state": (S,) float32, "instruction": str}; order and units of state and action: data/robots.py.
Deterministic given the seed. The policy's view is this and nothing else; `position`, `rotation` and the like serve success tests, the expert and the corpus.
"""
import copy
import os
from functools import cache

import mujoco
import numpy as np

from cli import UserError, choose
from data import seeds
from data.robots import DEFAULTS, camera_axes, get_robot, robot_xml
from data.tasks import TASKS, reachable

CONTROL_HZ, SUBSTEPS = 20, 20
IMAGE_SIZE = 128
VIEWS = ("front", "wrist")
INITIAL_NOISE = 0.02                                   # rad on every joint, as ManiSkill
VARIED = 0.6                                           # share of the episodes whose light and table are drawn anew, where those vary
MOVED, CROWDED = 0.5, 0.3                              # shares of the demonstrations with the front camera moved, and with one cube more on the table
CROWD = {"purple cube": (0.55, 0.15, 0.65, 1), "orange cube": (1, 0.5, 0.05, 1), "white cube": (0.95, 0.95, 0.95, 1)}           # which: no task has one, nor is one a perturbation's
PERTURBATIONS = {                                         # what `perturbation` changes, each alone
    "lighting": "half the light, from the other side",
    "table": "a grey-blue table top",
    "camera": "front camera 2 cm and 3 degrees off, another way in every episode",
    "outside": "objects moved together, until one lies 2 cm outside the region of the demonstrations",
    "noise": "8 of 255 on every pixel, 0.005 rad and m on every number of the state",
    "distractor": "a yellow cube, at least 10 cm from everything else",
}


def camera_xml(name, eye, target, fov):
    direction = np.subtract(target, eye)
    return f'<camera name="{name}" pos="{eye[0]} {eye[1]} {eye[2]}" xyaxes="{camera_axes(direction, (0, 0, 1))}" fovy="{fov}"/>'


FRONT_EYE, FRONT_TARGET, FRONT_FOV = np.array([0.75, 0, 0.6]), np.array([-0.02, 0, 0.1]), 36     # m at scale 1, degrees


def front_pixel(robot):
    """Metres that a pixel of the front view spans at the middle of the workspace."""
    return robot.scale * np.linalg.norm(FRONT_EYE - FRONT_TARGET) * 2 * np.tan(np.radians(FRONT_FOV / 2)) / IMAGE_SIZE


def scene_xml(robot, task, clutter=0):
    """MJCF of table, lights, cameras, `robot`, the task's objects, and `clutter` spare cubes parked below the table."""
    s = robot.scale
    body, rest = robot_xml(robot, (-robot.base_to_spawn_centre, 0, 0))
    # the source looks from (0.3, 0, 0.6) with 90 degrees; 36 degrees from farther back show the objects larger to 64 patches
    cameras = camera_xml("front", s * FRONT_EYE, s * FRONT_TARGET, FRONT_FOV) + camera_xml("render", (0.75 * s, 0.75 * s, 0.6 * s), (-0.12 * s, 0, 0.13 * s), 45)
    spare = "".join(f'<body name="clutter{i}" mocap="true" pos="{0.1 * i} 0 -0.5"><geom name="clutter{i}" type="box" size="0.02 0.02 0.02" contype="0" conaffinity="0"/></body>'
                    for i in range(clutter))
    return f'''<mujoco model="{robot.name} {task.name}">{DEFAULTS}
      <visual><headlight ambient="0.35 0.35 0.35" diffuse="0.35 0.35 0.35" specular="0 0 0"/><quality offsamples="0" shadowsize="2048"/>
        <global offwidth="640" offheight="640"/><map znear="0.01" zfar="20"/></visual>
      <asset><texture type="skybox" builtin="gradient" rgb1="0.75 0.8 0.88" rgb2="0.45 0.5 0.58" width="64" height="64"/></asset>
      <worldbody><light pos="0.4 0.6 2" dir="-0.2 -0.3 -1" directional="true" diffuse="0.5 0.5 0.5" specular="0 0 0"/>
        <geom name="table" type="box" size="0.6046 1.209 0.2" pos="-0.1357 -0.006 -0.2" rgba="0.72 0.66 0.58 1"/>
        {cameras}{body}{task.scene(robot)}{spare}</worldbody>{rest}</mujoco>'''


@cache
def compiled(robot_name, task_name, clutter):
    """The MjModel of a cell, shared by every env of this process that does not change it."""
    return mujoco.MjModel.from_xml_string(scene_xml(get_robot(robot_name), TASKS[task_name], clutter))


class Camera:
    """Renders views of one model; made at first use, since a machine may lack a GL."""

    def __init__(self, model, size):
        try:
            self.renderer = mujoco.Renderer(model, size, size)
        except Exception as error:                     # EGL, OSMesa and GLFW each raise their own
            raise UserError(f"cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL', 'unset')} ({type(error).__name__}: {error}); on Debian or Ubuntu type "
                            "`apt-get install libegl1 libgl1-mesa-dri`, or set MUJOCO_GL=osmesa after `apt-get install libosmesa6`") from None

    def draw(self, data, view, pretty=False, segmentation=False):
        """(size, size, 3) uint8, or with segmentation (size, size) geom ids, -1 for the sky. `pretty` adds shadows, for people."""
        self.renderer.update_scene(data, view)
        flags = self.renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = pretty
        if not segmentation:
            return self.renderer.render().copy()
        self.renderer.enable_segmentation_rendering()
        ids = self.renderer.render()
        self.renderer.disable_segmentation_rendering()
        return np.where(ids[..., 1] == int(mujoco.mjtObj.mjOBJ_GEOM), ids[..., 0], -1)      # numpy compares with the enum itself pixel by pixel, in Python


# ---- perturbations

def repaint(model, perturbation):
    """What a perturbation changes once and for all, in a model of its own."""
    if perturbation == "lighting":
        model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = 0.17, 0.17
        model.light_diffuse[:], model.light_dir[:] = 0.3, (0.6, 0.5, -0.6)
    elif perturbation == "table":
        model.geom("table").rgba[:] = 0.45, 0.5, 0.58, 1
    elif perturbation == "distractor":
        model.geom("clutter0").rgba[:] = 0.95, 0.8, 0.1, 1


def harden(model):
    """Let the first spare cube be run into."""
    geom, body = model.geom("clutter0"), model.body("clutter0").id
    geom.contype[:], geom.conaffinity[:], model.body_contype[body], model.body_conaffinity[body] = 1, 1, 1, 1


def vary(model, original, rng):
    """Another light and another table top for VARIED of the episodes, those of `original` for the others, drawn from `rng`."""
    turn, height, grey = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 2), rng.uniform(0.3, 0.8)
    ambient, diffuse, light, tint = rng.uniform(0.15, 0.45), rng.uniform(0.15, 0.45), rng.uniform(0.2, 0.6), rng.normal(0, 0.06, 3)
    if rng.random() < VARIED:
        model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:], model.light_diffuse[:] = ambient, diffuse, light
        model.light_dir[:] = np.cos(turn), np.sin(turn), -height
        model.geom("table").rgba[:3] = np.clip(grey + tint, 0.2, 0.9)
    else:
        model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:] = original.vis.headlight.ambient, original.vis.headlight.diffuse
        model.light_diffuse[:], model.light_dir[:], model.geom("table").rgba[:] = original.light_diffuse, original.light_dir, original.geom("table").rgba


def turn_camera(model, original, rng, shift=0.02, angle=np.radians(3)):
    """The front camera of `original` moved by `shift` (m) and turned by `angle` (rad), both in directions drawn from `rng`."""
    camera, before = model.camera("front"), original.camera("front")
    way, axis = (v / np.linalg.norm(v) for v in rng.normal(size=(2, 3)))
    camera.pos[:] = before.pos + shift * way
    mujoco.mju_mulQuat(camera.quat, before.quat, np.array([np.cos(angle / 2), *(np.sin(angle / 2) * axis)]))


@cache
def region(robot_name, task_name, samples=10_000):
    """(low, high): corners (m) of the box in which a task's first object starts, from this many layouts."""
    task, rng = TASKS[task_name], np.random.default_rng(0)
    seen = np.array([task.spawn(get_robot(robot_name), rng)[next(iter(task.labels))][0][:2] for _ in range(samples)])
    return seen.min(0), seen.max(0)


def outside(robot, task, layout, rng, distance=0.02):
    """The layout shifted as a whole along one axis, until its first object lies `distance` (m) outside the box where it starts in the demonstrations.

    Which of the box's edges is drawn from `rng`, among those where all objects stay in reach.
    """
    (low, high), at = region(robot.name, task.name), np.array(layout[next(iter(task.labels))][0][:2])
    shifts = [np.eye(2)[axis] * (edge[axis] + way * distance - at[axis]) for axis in (0, 1) for edge, way in ((low, -1), (high, 1))]
    for shift in rng.permutation(shifts):
        moved = {body: ((x + shift[0], y + shift[1], z), yaw) for body, ((x, y, z), yaw) in layout.items()}
        if reachable(robot, *(position[:2] for position, _ in moved.values())):
            return moved
    return layout


def aside(robot, layout, rng, least=0.1):
    """A spot (m) in the spawn square for one more cube, `least` from all objects; nearer only where there is no such spot."""
    others = np.array([position[:2] for position, _ in layout.values()])
    spots = rng.uniform(-1, 1, (100, 2)) * (robot.spawn_half_size + 0.05)
    far = np.linalg.norm(spots[:, None] - others, axis=-1).min(1)
    return (*spots[np.argmax(far >= least) if (far >= least).any() else np.argmax(far)], 0.02)


class TabletopEnv:
    """`robot` at the table with `task` to do. `held_out` takes the wordings kept for evaluation; `render=False` leaves the images out; `varied`, for training,
    draws anew for some episodes "looks", which is light and table, or "all", the front camera's place and one more cube too; `perturbation` names one of
    PERTURBATIONS, with layouts and wordings as without it, except for what it changes.

    Raises UserError on an unknown robot or task, and ValueError on an action of the wrong shape or not finite.
    """

    def __init__(self, robot="widowx", task="PickCube", render=True, held_out=False, clutter=0, perturbation="", varied=""):
        self.robot, self.task = get_robot(robot), TASKS[choose(task, TASKS, "task")]
        self.render, self.wordings = render, self.task.held_out if held_out else self.task.instructions + self.task.paraphrases
        crowded = perturbation == "distractor" or varied == "all"
        self.model = self.original = compiled(robot, task, max(clutter, int(crowded)))
        self.perturbation, self.varied = perturbation and choose(perturbation, PERTURBATIONS, "perturbation"), varied and choose(varied, ("looks", "all"), "variation")
        if perturbation or varied:
            self.model = copy.copy(self.model)         # it will be changed
            repaint(self.model, perturbation)
        if crowded:
            harden(self.model)
        self.data = mujoco.MjData(self.model)
        self.base = np.array([-self.robot.base_to_spawn_centre, 0.0, 0.0])
        self.tcp = self.model.site("tcp").id
        self.pads = [self.model.geom(f"{side}_pad").id for side in ("left", "right")]
        self.max_speed_step = self.robot.velocity_limit / CONTROL_HZ
        self.cameras = {}

    # ---- gymnasium's two verbs

    def reset(self, seed=0, instruction=None):
        """A layout, a wording and a slightly disturbed rest pose drawn from `seed`; info holds the layout."""
        rng = seeds.rng(seed, self.task.name)
        mujoco.mj_resetData(self.model, self.data)
        layout = self.task.spawn(self.robot, rng)
        changes = seeds.rng(seed, "perturbation")     # apart, so that the rest is drawn alike under every perturbation
        if self.perturbation == "outside":
            layout = outside(self.robot, self.task, layout, changes)
        elif self.perturbation == "distractor":
            layout["clutter0"] = (aside(self.robot, layout, changes), changes.uniform(0, np.pi))
        elif self.perturbation == "camera":
            turn_camera(self.model, self.original, changes)
        if self.varied:
            vary(self.model, self.original, seeds.rng(seed, "appearance"))
        if self.varied == "all":
            loose = seeds.rng(seed, "camera")
            far = loose.uniform(0, 1.25) * (loose.random() < MOVED)
            turn_camera(self.model, self.original, loose, 0.02 * far, np.radians(3) * far)
            if loose.random() < CROWDED:
                layout["clutter0"] = (aside(self.robot, layout, loose), loose.uniform(0, np.pi))
                self.model.geom("clutter0").rgba[:] = list(CROWD.values())[loose.integers(len(CROWD))]
        for name, (position, yaw) in layout.items():
            self.place(name, position, yaw)
        dof = self.robot.dof
        low, high = self.robot.joint_range.T
        qpos = np.clip(self.robot.home + rng.normal(0, INITIAL_NOISE, dof), low, high)
        self.set_arm(qpos, self.robot.travel)
        wording = self.wordings[rng.integers(len(self.wordings))]
        self.instruction = wording if instruction is None else instruction
        self.steps, self.clipped, self.sensor = 0, {"limits": 0, "speed": 0}, seeds.rng(seed, "sensor")
        mujoco.mj_forward(self.model, self.data)
        return self.observe(), {"layout": layout}

    def step(self, action):
        """Drive the servos to `action` for one control step (0.05 s). Targets beyond joint, finger or velocity limits are clipped, and steps counted in info["clipped"]."""
        action = np.asarray(action, float)
        if action.shape != (self.robot.action_dim,) or not np.isfinite(action).all():
            raise ValueError(f"action for {self.robot.name} must be {self.robot.action_dim} finite numbers, got {action}")
        dof, before = self.robot.dof, self.data.ctrl.copy()
        inside = self.robot.clip(action)
        target = inside.copy()
        target[:dof] = np.clip(inside[:dof], before[:dof] - self.max_speed_step, before[:dof] + self.max_speed_step)
        self.clipped["limits"] += bool(np.abs(inside - action)[:dof].max() > 1e-6)     # fingers are sent to their end stops on purpose
        self.clipped["speed"] += bool(np.abs(target - inside).max() > 1e-6)
        for i in range(1, SUBSTEPS + 1):               # the target slides there within the step, so the servos see no jumps
            self.data.ctrl[:dof] = before[:dof] + (target[:dof] - before[:dof]) * i / SUBSTEPS
            self.data.ctrl[dof] = target[dof]
            mujoco.mj_step(self.model, self.data)
        self.steps += 1
        conditions = self.task.success(self)
        done = all(conditions.values())
        info = {"success": done, "conditions": conditions, "clipped": self.clipped}
        return self.observe(), float(done), done, self.steps >= self.task.max_steps and not done, info

    # ---- what the policy sees

    def state(self):
        """(S,) float32 in physical units and the order of data/robots.py."""
        dof, rotation = self.robot.dof, self.data.site_xmat[self.tcp].reshape(3, 3)
        return np.concatenate([self.data.qpos[:dof + 1], self.data.site_xpos[self.tcp] - self.base, rotation[:, 0], rotation[:, 1]]).astype(np.float32)

    def observe(self, render=None):
        """The observation now; `render` overrides the env's own choice, for a policy that looks only every few steps."""
        images = {view: self.draw(view) for view in VIEWS} if (self.render if render is None else render) else {}
        state = self.state()
        if self.perturbation == "noise":
            images = {view: np.clip(image + self.sensor.normal(0, 8, image.shape), 0, 255).astype(np.uint8) for view, image in images.items()}
            state = state + self.sensor.normal(0, 0.005, state.shape).astype(np.float32)
        return {"images": images, "state": state, "instruction": self.instruction}

    def draw(self, view, size=IMAGE_SIZE, **how):
        if size not in self.cameras:
            self.cameras[size] = Camera(self.model, size)
        return self.cameras[size].draw(self.data, view, **how)

    def close(self):
        for camera in self.cameras.values():
            camera.renderer.close()
        self.cameras = {}

    # ---- the true state: for success tests, expert and corpus

    def place(self, name, position, yaw=0.0):
        """Put a body somewhere, at rest, turned by `yaw` about the vertical."""
        quat = np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
        body = self.model.body(name)
        if body.mocapid[0] >= 0:
            self.data.mocap_pos[body.mocapid[0]], self.data.mocap_quat[body.mocapid[0]] = position, quat
        else:
            at = body.jntadr[0]
            self.data.qpos[self.model.jnt_qposadr[at]:][:7] = [*position, *quat]
            self.data.qvel[self.model.jnt_dofadr[at]:][:6] = 0

    def set_arm(self, qpos, finger):
        """Joints (dof,) rad and both fingers (m) there at once, servos holding."""
        dof = self.robot.dof
        self.data.qpos[:dof], self.data.qpos[dof:dof + 2], self.data.qvel[:dof + 2] = qpos, max(finger, 0.0), 0
        self.data.ctrl[:dof], self.data.ctrl[dof] = qpos, finger

    def position(self, name):
        return self.data.body(name).xpos.copy()

    def rotation(self, name):
        return self.data.body(name).xmat.reshape(3, 3).copy()

    def speed(self, name):
        """(linear m/s, angular rad/s) of a free body."""
        at = self.model.jnt_dofadr[self.model.body(name).jntadr[0]]
        velocity = self.data.qvel[at:at + 6]
        return np.linalg.norm(velocity[:3]), np.linalg.norm(velocity[3:])

    def joint_speed(self):
        """Largest arm joint speed, rad/s; the fingers are not counted."""
        return np.abs(self.data.qvel[:self.robot.dof]).max()

    def grasped(self, name):
        """True if both pads press the body with at least 0.5 N (WidowX 0.2 N), within 85 degrees of the closing axis: ManiSkill's grasp test."""
        body, least = self.model.body(name).id, 0.2 if self.robot.name == "widowx" else 0.5
        closing = self.data.site_xmat[self.tcp].reshape(3, 3)[:, 1]
        force, wrench = {pad: np.zeros(3) for pad in self.pads}, np.zeros(6)
        for i, contact in enumerate(self.data.contact[:self.data.ncon]):
            for pad, other in (contact.geom, contact.geom[::-1]):
                if pad in force and self.model.geom_bodyid[other] == body:
                    mujoco.mj_contactForce(self.model, self.data, i, wrench)
                    force[pad] += contact.frame.reshape(3, 3).T @ wrench[:3]
        sizes = [np.linalg.norm(f) for f in force.values()]
        return all(n >= least and abs(f @ closing) >= n * np.cos(np.radians(85)) for n, f in zip(sizes, force.values()))
