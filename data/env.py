"""One robot, one task, one table: the environment, with gymnasium's signature and 20 Hz control.

    reset(seed) -> observation, info
    step(action (A,)) -> observation, reward, terminated, truncated, info

Observation: {"images": {"front", "wrist"}: (128, 128, 3) uint8, "state": (S,) float32,
"instruction": str}; order and units of state and action: data/robots.py. Deterministic given the
seed. The policy sees this and nothing else; `position`, `rotation` and the like serve success
tests, the expert and the scenes of Stage I.
"""

import copy
from functools import cache
from pathlib import Path

import numpy as np

from cli import choose
from data import seeds
from data.robots import get_robot
from data.simulator import Camera, mujoco
from data.tasks import TASKS, reachable, resize

CONTROL_HZ = 20
SUBSTEPS = 20
IMAGE_SIZE = 128
VIEWS = ("front", "wrist")
INITIAL_NOISE = 0.02  # rad on every joint, as ManiSkill

# Demonstrations with varied="all": shares with light and table drawn anew, with the front camera
# moved, and with one cube more, in a color that no task and no perturbation has.
VARIED = 0.6
MOVED = 0.5
CROWDED = 0.3
CROWD = {
    "purple cube": (0.55, 0.15, 0.65, 1),
    "orange cube": (1, 0.5, 0.05, 1),
    "white cube": (0.95, 0.95, 0.95, 1),
}
PERTURBATIONS = {  # what an evaluation changes, each alone
    "lighting": "half the light, from the other side",
    "table": "a grey-blue table top",
    "camera": "front camera 2 cm and 3 degrees off, another way in every episode",
    "outside": "objects moved together, until one lies 2 cm outside the demonstrations' region",
    "noise": "8 of 255 on every pixel, 0.005 rad and m on every number of the state",
    "distractor": "a yellow cube, at least 10 cm from everything else",
}


# ---- the scene: table.xml, the arm's file and the task's objects in one model


@cache
def compile_scene(robot_name, task_name, clutter):
    """The MjModel of a cell, shared by every env of this process that does not change it.

    clutter: spare cubes, parked below the table.
    """
    robot = get_robot(robot_name)
    task = TASKS[task_name]
    here = Path(__file__).parent
    # the sections of the three files are merged as if they stood in one
    files = {
        "table": (here / "table.xml").read_bytes(),
        "arm": robot.path.read_bytes(),
        "objects": (here / "objects" / f"{task.objects}.xml").read_bytes(),
    }
    parts = "".join(f'<include file="{name}"/>' for name in files)
    spec = mujoco.MjSpec.from_string(f"<mujoco>{parts}</mujoco>", include=files)
    # the arm's file has its base at the origin; here that is where objects start
    spec.body("base").pos[0] = -robot.spawn_distance
    for view in ("front", "render"):
        spec.camera(view).pos *= robot.scale
    resize(spec, robot)
    for i in range(clutter):
        name = f"clutter{i}"
        body = spec.worldbody.add_body(name=name, mocap=True)
        body.pos = [0.1 * i, 0, -0.5]
        geom = body.add_geom(name=name, type=mujoco.mjtGeom.mjGEOM_BOX)
        geom.size = [0.02] * 3
        geom.contype = geom.conaffinity = 0
    return spec.compile()


# ---- what varies


def set_light(model, ambient, diffuse, light, direction):
    model.vis.headlight.ambient[:] = ambient
    model.vis.headlight.diffuse[:] = diffuse
    model.light_diffuse[:] = light
    model.light_dir[:] = direction


def vary_looks(model, original, rng):
    """Another light and table top for VARIED of the episodes, those of `original` for others."""
    # all are drawn before it is drawn whether they are used
    low = (0, 0.6, 0.3, 0.15, 0.15, 0.2)
    high = (2 * np.pi, 2, 0.8, 0.45, 0.45, 0.6)
    turn, height, grey, ambient, diffuse, light = rng.uniform(low, high)
    table = np.clip(grey + rng.normal(0, 0.06, 3), 0.2, 0.9)
    if rng.random() < VARIED:
        direction = (np.cos(turn), np.sin(turn), -height)
        set_light(model, ambient, diffuse, light, direction)
    else:
        head = original.vis.headlight
        set_light(model, head.ambient, head.diffuse, original.light_diffuse, original.light_dir)
        table = original.geom("table").rgba[:3]
    model.geom("table").rgba[:3] = table


def turn_camera(model, original, rng, far=1.0):
    """The front camera of `original` moved 2 cm and turned 3 degrees some way, times `far`."""
    shift = 0.02 * far
    angle = np.radians(3) * far
    camera = model.camera("front")
    before = original.camera("front")
    way, axis = rng.normal(size=(2, 3))
    camera.pos[:] = before.pos + shift * (way / np.linalg.norm(way))
    turn = np.empty(4)
    mujoco.mju_axisAngle2Quat(turn, axis / np.linalg.norm(axis), angle)
    mujoco.mju_mulQuat(camera.quat, before.quat, turn)


def first_start(layout):
    """(2,) m: where the object lies that is moved first."""
    position, _ = next(iter(layout.values()))
    return np.array(position[:2])


@cache
def region(robot, task, samples=10_000):
    """(low, high): corners (2,) m of the box in which a task's first object starts."""
    rng = np.random.default_rng(0)
    starts = [first_start(task.spawn(robot, rng)) for _ in range(samples)]
    return np.min(starts, axis=0), np.max(starts, axis=0)


def outside(robot, task, layout, rng, distance=0.02):
    """The layout shifted along one axis, until its first object lies outside its region.

    `distance` (m) beyond an edge that is drawn from `rng`, among those where all stay in reach.
    """
    low, high = region(robot, task)
    start = first_start(layout)
    # one shift along one axis for each edge of the box
    below = np.diag(low - distance - start)
    above = np.diag(high + distance - start)
    shifts = np.stack([below, above], axis=1).reshape(4, 2)
    for shift in rng.permutation(shifts):
        moved = {}
        for name, (position, yaw) in layout.items():
            moved[name] = (np.add(position, [*shift, 0]), yaw)
        places = [position[:2] for position, _ in moved.values()]
        if reachable(robot, *places):
            return moved
    return layout


def spare_spot(robot, layout, rng, least=0.1):
    """A spot (m) for one more cube, `least` from all objects; nearer only where there is none."""
    others = np.array([position[:2] for position, _ in layout.values()])
    spots = rng.uniform(-1, 1, (100, 2)) * (robot.spawn_half_size + 0.05)
    apart = np.linalg.norm(spots[:, None] - others, axis=-1)  # (100, objects)
    clear = np.minimum(apart.min(axis=1), least)  # the first that is far enough wins
    return (*spots[np.argmax(clear)], 0.02)


class TabletopEnv:
    """`robot` at the table with `task` to do. UserError on unknown names.

    render=False leaves the images out; held_out takes the wordings kept for evaluation; clutter:
    spare cubes below the table. perturbation: one of PERTURBATIONS; layouts and wordings are as
    without it, except for what it changes. varied, for training, draws anew for some episodes
    "looks", which is light and table, or "all", the front camera's place and one more cube too.
    """

    def __init__(
        self,
        robot="widowx",
        task="PickCube",
        render=True,
        held_out=False,
        clutter=0,
        perturbation="",
        varied="",
    ):
        self.robot = get_robot(robot)
        self.task = TASKS[choose(task, TASKS, "task")]
        self.render = render
        self.perturbation = choose(perturbation, ["", *PERTURBATIONS], "perturbation")
        self.varied = choose(varied, ["", "looks", "all"], "variation")
        self.wordings = self.task.instructions + self.task.paraphrases
        if held_out:
            self.wordings = self.task.held_out
        crowded = perturbation == "distractor" or varied == "all"
        self.original = compile_scene(robot, task, max(clutter, int(crowded)))
        self.model = self.original
        if perturbation or varied:
            self.model = copy.copy(self.original)  # it will be changed, the shared one never
        if perturbation == "lighting":
            set_light(self.model, 0.17, 0.17, 0.3, (0.6, 0.5, -0.6))
        if perturbation == "table":
            self.model.geom("table").rgba[:] = (0.45, 0.5, 0.58, 1)
        if crowded:  # the first spare cube can be run into
            spare = self.model.geom("clutter0")
            spare.rgba[:] = (0.95, 0.8, 0.1, 1)
            spare.contype[:] = spare.conaffinity[:] = 1
            self.model.body_contype[spare.bodyid] = self.model.body_conaffinity[spare.bodyid] = 1
        self.data = mujoco.MjData(self.model)
        self.base = np.array([-self.robot.spawn_distance, 0.0, 0.0])
        self.tcp = self.model.site("tcp").id
        self.pads = [self.model.geom(name).id for name in ("left_pad", "right_pad")]
        # what a joint may move in one control step, rad
        self.max_speed_step = self.robot.velocity_limit / CONTROL_HZ
        self.cameras = {}  # {size: Camera}, opened with the first picture

    # ---- gymnasium's two verbs

    def reset(self, seed=0, instruction=None):
        """A layout, a wording and a slightly disturbed rest pose, drawn from `seed`.

        instruction: another wording. info holds the layout {body: (position, yaw)}.
        """
        rng = seeds.rng(seed, self.task.name)  # where things lie, how the arm rests, which words
        mujoco.mj_resetData(self.model, self.data)
        layout = self.task.spawn(self.robot, rng)
        layout = self.perturb(seed, layout)
        if self.varied:
            vary_looks(self.model, self.original, seeds.rng(seed, "appearance"))
        if self.varied == "all":
            self.vary_camera_and_crowd(seed, layout)
        for name, (position, yaw) in layout.items():
            self.place(name, position, yaw)
        low, high = self.robot.joint_range.T
        qpos = self.robot.home + rng.normal(0, INITIAL_NOISE, self.robot.dof)
        self.set_arm(np.clip(qpos, low, high), self.robot.travel)
        wording = self.wordings[rng.integers(len(self.wordings))]
        self.instruction = wording if instruction is None else instruction
        self.steps = 0
        self.clipped = {"limits": 0, "speed": 0}
        self.sensor = seeds.rng(seed, "sensor")
        mujoco.mj_forward(self.model, self.data)
        return self.observe(), {"layout": layout}

    def perturb(self, seed, layout):
        """The layout under this env's perturbation, drawn apart, so that the rest is alike."""
        rng = seeds.rng(seed, "perturbation")
        if self.perturbation == "outside":
            return outside(self.robot, self.task, layout, rng)
        if self.perturbation == "distractor":
            self.add_spare(layout, rng)
        if self.perturbation == "camera":
            turn_camera(self.model, self.original, rng)
        return layout

    def vary_camera_and_crowd(self, seed, layout):
        rng = seeds.rng(seed, "camera")
        far = rng.uniform(0, 1.25) * (rng.random() < MOVED)
        turn_camera(self.model, self.original, rng, far)
        if rng.random() < CROWDED:
            self.add_spare(layout, rng)
            colors = list(CROWD.values())
            self.model.geom("clutter0").rgba[:] = colors[rng.integers(len(colors))]

    def add_spare(self, layout, rng):
        spot = spare_spot(self.robot, layout, rng)
        layout["clutter0"] = (spot, rng.uniform(0, np.pi))

    def step(self, action):
        """Drive the servos to `action` (A,) for one control step (0.05 s).

        Targets beyond joint, finger or velocity limits are clipped, and such steps counted in
        info["clipped"]. ValueError if the action has another shape, or is not finite.
        """
        action = np.asarray(action, float)
        fits = action.shape == (self.robot.action_dim,)
        if not fits or not np.isfinite(action).all():
            raise ValueError(
                f"action for {self.robot.name} must be {self.robot.action_dim} finite numbers, "
                f"got {action}"
            )
        dof = self.robot.dof
        before = self.data.ctrl[:dof].copy()
        inside = self.robot.clip(action)
        reach = self.max_speed_step
        target = np.clip(inside[:dof], before - reach, before + reach)
        # fingers are sent to their end stops on purpose, and not counted
        too_far = np.abs(inside - action)[:dof].max()
        too_fast = np.abs(target - inside[:dof]).max()
        self.clipped["limits"] += bool(too_far > 1e-6)
        self.clipped["speed"] += bool(too_fast > 1e-6)
        self.data.ctrl[dof] = inside[dof]  # at once: their servo's force is limited
        for i in range(1, SUBSTEPS + 1):  # targets slide there, so that servos see no jumps
            self.data.ctrl[:dof] = before + (target - before) * i / SUBSTEPS
            mujoco.mj_step(self.model, self.data)
        self.steps += 1
        conditions = self.task.success(self)
        done = all(conditions.values())
        truncated = self.steps >= self.task.max_steps and not done
        info = {"success": done, "conditions": conditions, "clipped": self.clipped}
        return self.observe(), float(done), done, truncated, info

    # ---- what the policy sees

    def state(self):
        """(S,) float32 in physical units and the order of data/robots.py."""
        rotation = self.data.site_xmat[self.tcp].reshape(3, 3)
        position = self.data.site_xpos[self.tcp] - self.base
        joints = self.data.qpos[: self.robot.dof + 1]  # the arm's and one finger's
        parts = [joints, position, rotation[:, 0], rotation[:, 1]]
        return np.concatenate(parts).astype(np.float32)

    def observe(self, render=None):
        """The observation now. `render` overrides the env's own choice: a policy that looks only
        every few steps needs no pictures between.
        """
        render = self.render if render is None else render
        images = {view: self.draw(view) for view in VIEWS} if render else {}
        state = self.state()
        if self.perturbation == "noise":
            for view, image in images.items():
                noisy = image + self.sensor.normal(0, 8, image.shape)
                images[view] = np.clip(noisy, 0, 255).astype(np.uint8)
            noise = self.sensor.normal(0, 0.005, state.shape)
            state = state + noise.astype(np.float32)
        return {"images": images, "state": state, "instruction": self.instruction}

    def draw(self, view, size=IMAGE_SIZE, **how):
        """A picture of a camera, see Camera.draw. UserError where there is no GL."""
        if size not in self.cameras:
            self.cameras[size] = Camera(self.model, size)
        return self.cameras[size].draw(self.data, view, **how)

    def close(self):
        for camera in self.cameras.values():
            camera.close()
        self.cameras = {}

    # ---- the true state: for success tests, the expert and scenes

    def place(self, name, position, yaw=0.0):
        """Put a body somewhere, at rest, turned by `yaw` (rad) about the vertical."""
        pose = [*position, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        body = self.model.body(name)
        mocap = body.mocapid[0]
        if mocap >= 0:  # goals, bins and spare cubes stay where they are put
            self.data.mocap_pos[mocap] = pose[:3]
            self.data.mocap_quat[mocap] = pose[3:]
        else:
            joint = self.data.joint(body.jntadr[0])
            joint.qpos[:] = pose
            joint.qvel[:] = 0

    def set_arm(self, qpos, finger):
        """Joints (dof,) rad and both fingers (m) there at once, servos holding."""
        dof = self.robot.dof
        self.data.qpos[:dof] = qpos
        self.data.qpos[dof : dof + 2] = max(finger, 0.0)
        self.data.qvel[: dof + 2] = 0
        self.data.ctrl[: dof + 1] = [*qpos, finger]

    def position(self, name):
        return self.data.body(name).xpos.copy()

    def rotation(self, name):
        return self.data.body(name).xmat.reshape(3, 3).copy()

    def speed(self, name):
        """(linear m/s, angular rad/s) of a free body."""
        joint = self.model.body(name).jntadr[0]
        linear, angular = np.split(self.data.joint(joint).qvel, 2)
        return np.linalg.norm(linear), np.linalg.norm(angular)

    def joint_speed(self):
        """Largest arm joint speed, rad/s; the fingers are not counted."""
        return np.abs(self.data.qvel[: self.robot.dof]).max()

    def grasped(self, name):
        """True if both pads press the body, within 85 degrees of the closing axis.

        ManiSkill's grasp test; how hard they must press is in the arm's file.
        """
        body = self.model.body(name).id
        tool = self.data.site_xmat[self.tcp].reshape(3, 3)
        closing = tool[:, 1]
        forces = {pad: np.zeros(3) for pad in self.pads}  # N, in the world's frame
        wrench = np.zeros(6)  # in the contact's frame, whose rows are its axes
        for i, contact in enumerate(self.data.contact):
            for pad, other in (contact.geom, contact.geom[::-1]):  # either may be the pad
                if pad in forces and self.model.geom_bodyid[other] == body:
                    mujoco.mj_contactForce(self.model, self.data, i, wrench)
                    axes = contact.frame.reshape(3, 3)
                    forces[pad] += axes.T @ wrench[:3]
        pressed = []
        for force in forces.values():
            size = np.linalg.norm(force)
            along = abs(force @ closing) >= size * np.cos(np.radians(85))
            pressed.append(along and size >= self.robot.grasp_force)
        return all(pressed)
