"""One robot, one task, one table: the environment, with gymnasium's signature and 20 Hz control.

Or one robot and a family of scenes (data/families.py), each of which allows several commands:
`command` selects one, and object names in its task, such as "cube", stand for the bodies that have
these roles.

    reset(seed) -> observation, info
    step(action (A,)) -> observation, reward, terminated, truncated, info

Observation: {"images": {"front", "wrist"}: (128, 128, 3) uint8, "state": (S,) float32,
"instruction": str}; order and units of state and action: data/robots.py. Deterministic given the
seed. The policy sees nothing else; `position`, `rotation` and the like are for success tests, the
expert and the scenes of Stage I.

A layout is {body: (position (3,) m, yaw rad)}; the body to move first comes first.
"""

import copy
from functools import cache
from pathlib import Path

import numpy as np

from cli import UserError, choose
from data import seeds
from data.families import FAMILIES, STILL, arrange, instruct, table_of
from data.robots import get_robot
from data.simulator import Camera, mujoco
from data.tasks import MAX_STEPS, RGBA, TASKS, reachable, resize
from embodiment import CONTROL_HZ, VIEWS

SUBSTEPS = 20  # of the physics per control step, 2.5 ms each
IMAGE_SIZE = 128  # pixels: 8 x 8 patches of Stage I's ViT, merged to 4 x 4
INITIAL_NOISE = 0.02  # rad on every joint, as in ManiSkill

# Demonstrations with varied="all": the shares with random light and table, with a moved front
# camera, and with an extra cube in a color that no task or perturbation uses.
VARIED = 0.6
MOVED = 0.5
CROWDED = 0.3
CROWD = ("purple", "orange", "white")
PERTURBATIONS = (  # what an evaluation changes, one at a time
    "lighting",  # half the light, from the other side
    "table",  # a gray-blue tabletop
    "camera",  # front camera 2 cm and 3 degrees off, in a random direction for each episode
    "outside",  # objects moved together until the first is 2 cm outside the demonstrations' region
    "noise",  # sigma 8 of 255 on every pixel, 0.005 rad or m on every number of the state
    "distractor",  # a yellow cube, at least 10 cm from everything else
)


@cache
def compile_scene(robot_name, task_name, clutter):
    """The MjModel of a cell, shared by all envs of this process: each one changes a copy."""
    robot = get_robot(robot_name)
    family = FAMILIES.get(task_name)
    here = Path(__file__).parent
    objects = here / "objects"
    things = "things" if family else TASKS[task_name].objects
    paths = [here / "table.xml", robot.path, objects / f"{things}.xml"]
    if clutter:
        paths.append(objects / "clutter.xml")
    # sections of the included files are merged as if they were in one file
    files = {path.name: path.read_bytes() for path in paths}
    parts = "".join(f'<include file="{name}"/>' for name in files)
    spec = mujoco.MjSpec.from_string(f"<mujoco>{parts}</mujoco>", include=files)
    # in the arm's file the base is at the origin; here the origin is where objects start
    spec.body("base").pos[0] = -robot.spawn_distance
    for view in ("front", "render"):  # closer for a small arm
        spec.camera(view).pos *= robot.scale
    if family:
        everything = set().union(*(other.bodies for other in FAMILIES.values()))
        for name in sorted(everything - set(family.bodies)):
            spec.delete(spec.body(name))
    resize(spec, robot)
    return spec.compile()


# ---- variations: light, tabletop, front camera, and where objects are


def restore_looks(model, original):
    """Undo the changes that the previous episode made to `model`."""
    changed = (
        "light_diffuse",
        "light_dir",
        "geom_rgba",
        "cam_pos",
        "cam_quat",
    )
    for name in changed:
        getattr(model, name)[:] = getattr(original, name)
    model.vis.headlight = original.vis.headlight


def set_light(model, ambient, diffuse, lamp, direction):
    headlight = model.vis.headlight
    headlight.ambient[:] = ambient
    headlight.diffuse[:] = diffuse
    model.light_diffuse[:] = lamp
    model.light_dir[:] = direction


def vary_looks(model, rng):
    """Random light and tabletop, in a share VARIED of the episodes."""
    # draw everything first, so that the random stream does not depend on whether it is used
    low = (0, 0.6, 0.3, 0.15, 0.15, 0.2)
    high = (2 * np.pi, 2, 0.8, 0.45, 0.45, 0.6)
    turn, height, grey, *light = rng.uniform(low, high)
    table = grey + rng.normal(0, 0.06, 3)
    if rng.random() < VARIED:
        # from anywhere above
        direction = (np.cos(turn), np.sin(turn), -height)
        set_light(model, *light, direction)
        model.geom("table").rgba[:3] = np.clip(table, 0.2, 0.9)


def turn_camera(model, rng, far=1.0):
    """Move the front camera by 2 cm and turn it by 3 degrees in a random direction, times `far`."""
    camera = model.camera("front")
    way, axis = rng.normal(size=(2, 3))
    way /= np.linalg.norm(way)
    axis /= np.linalg.norm(axis)
    camera.pos += 0.02 * far * way
    turn = np.empty(4)
    mujoco.mju_axisAngle2Quat(turn, axis, np.radians(3) * far)
    mujoco.mju_mulQuat(camera.quat, camera.quat.copy(), turn)


def spots(layout):
    """(objects, 2) m: positions of a layout's objects on the table."""
    positions = [position for position, _ in layout.values()]
    return np.array(positions)[:, :2]


@cache
def region(robot, task):
    """(2, 2) m: lowest and highest corner of the box where a task's first object starts."""
    rng = np.random.default_rng(0)
    layouts = [task.spawn(robot, rng) for _ in range(10_000)]
    starts = [spots(layout)[0] for layout in layouts]
    low = np.min(starts, axis=0)
    high = np.max(starts, axis=0)
    return np.array([low, high])


def outside(robot, task, layout, rng):
    """The layout shifted along one axis, until its first object is 2 cm outside its region.

    The direction is drawn from `rng`, among those that keep all objects within reach.
    """
    outer = region(robot, task) + np.array([[-0.02], [0.02]])  # (2, xy)
    shifts = outer - spots(layout)[0]
    # all objects move together, so that their distances stay the same
    for edge in rng.permutation(4):
        axis, side = divmod(edge, 2)
        shift = np.zeros(3)
        shift[axis] = shifts[side, axis]
        moved = {}
        for name, (position, yaw) in layout.items():
            moved[name] = (position + shift, yaw)
        if reachable(robot, *spots(moved)):
            return moved
    return layout


def add_spare(robot, layout, rng):
    """Add a cube, 10 cm from all objects, or as far as possible if there is no such place."""
    tries = rng.uniform(-1, 1, (100, 2))
    tries *= robot.spawn_half_size + 0.05
    ways = tries[:, None] - spots(layout)  # (100, objects, 2)
    nearest = np.linalg.norm(ways, axis=-1).min(axis=1)
    # the first that is far enough wins
    x, y = tries[np.minimum(nearest, 0.1).argmax()]
    yaw = rng.uniform(0, np.pi)
    layout["clutter0"] = ((x, y, 0.02), yaw)


class TabletopEnv:
    """`robot` at the table with `task` to do. UserError on unknown names.

    render=False leaves the images out; wordings: "seen" or "held_out"; clutter adds three spare
    cubes below the table. perturbation: one of PERTURBATIONS; layouts and wordings stay as they are
    without it, except for what it changes. varied, for training, randomizes some episodes: "looks"
    the light and the table, "all" also the front camera's pose and an extra cube.
    """

    hz = CONTROL_HZ
    horizon = MAX_STEPS

    def __init__(
        self,
        robot="widowx",
        task="PickCube",
        render=True,
        wordings="seen",
        clutter=False,
        perturbation="",
        varied="",
    ):
        self.robot = get_robot(robot)
        choose(task, [*TASKS, *FAMILIES], "task")
        self.scene = task  # a task or a family
        self.family = FAMILIES.get(task)
        self.task = TASKS.get(task)  # in a family's scene, the task of the command
        self.roles = {}  # {name in the task: body}, for the command
        self.target = None  # (A,) target of the servos: the action, clipped to the limits
        self.render = render
        self.perturbation = choose(perturbation, ["", *PERTURBATIONS], "perturbation")
        if self.family and perturbation in ("outside", "distractor"):
            raise UserError(
                f"perturbation {perturbation} works only for single tasks, not families"
            )
        self.varied = varied  # "", "looks" or "all"
        self.wordings = wordings
        # spare cubes only where they are used: without them the physics is slightly faster
        may_be_crowded = varied == "all" and not self.family  # an extra cube could be ambiguous
        crowded = clutter or perturbation == "distractor" or may_be_crowded
        # reset restores the original; only the copy is changed
        self.original = compile_scene(robot, task, crowded)
        self.model = copy.copy(self.original)
        self.data = mujoco.MjData(self.model)
        self.start = {}  # {body: position (3,) m}; a command may move only its own bodies
        # the origin of the task frame is where objects start
        self.base = np.array([-self.robot.spawn_distance, 0.0, 0.0])
        self.tcp = self.model.site("tcp").id
        # each finger's collision geoms: left_pad, left_pad1, ...
        names = [self.model.geom(i).name for i in range(self.model.ngeom)]
        self.pads = []
        for side in ("left_pad", "right_pad"):
            self.pads.append([i for i, name in enumerate(names) if name.startswith(side)])
        self.camera = Camera(self.model)

    # ---- gymnasium's two verbs

    def reset(self, seed=0, instruction=None, command=0, new=False):
        """Draw a layout, a wording and a slightly disturbed rest pose from `seed`.

        instruction replaces the wording. In a family's scene, command selects one of its commands,
        and new draws scenes whose first command never occurs in training. info holds the layout.
        """
        rng = seeds.rng(seed, self.scene)  # for layout, rest pose and wording
        mujoco.mj_resetData(self.model, self.data)
        restore_looks(self.model, self.original)
        if self.family:
            self.table = arrange(self.family, self.robot, rng, new)
        else:
            self.table = table_of(self.task, self.robot, rng)
        self.paint()
        layout = self.perturb(seed, self.table.layout)
        self.lay_out(seed, layout, rng)
        self.start = {body: self.position(body) for body in layout}
        self.give(command)
        words = rng
        if self.family:  # the layout's other command draws its own wording
            words = seeds.rng(seed, "command", command)
        sentence = instruct(self.table, self.command, words, self.wordings)
        self.instruction = instruction or sentence
        self.steps = 0  # control steps of this episode
        self.clipped = {"limits": 0, "speed": 0}
        self.sensor = seeds.rng(seed, "sensor")  # its noise continues from step to step
        return self.observe(), {"layout": layout}

    def lay_out(self, seed, layout, rng):
        """Put objects where they start, and the arm near its rest pose."""
        for name, (position, yaw) in layout.items():
            self.place(name, position, yaw)
        noise = rng.normal(0, INITIAL_NOISE, self.robot.dof)
        rest = [*(self.robot.home + noise), self.robot.travel]
        self.set_arm(self.robot.clip(rest))
        self.forward()

    def give(self, number):
        """Switch to this one of the scene's commands."""
        commands = len(self.table.commands)
        if not 0 <= number < commands:
            raise UserError(f"command {number}: this scene has {commands}, counted from 0")
        self.command = self.table.commands[number]
        self.task = TASKS[self.command.task]
        self.roles = self.command.roles

    def begin(self, number):
        """Like `give`, but other objects must now stay where they currently are."""
        self.give(number)
        self.start = {body: self.data.body(body).xpos.copy() for body in self.start}

    def paint(self):
        """Give the objects of a family's scene their colors."""
        for name, color in self.table.colors.items():
            geoms = self.model.geom_bodyid == self.model.body(name).id
            self.model.geom_rgba[geoms] = RGBA[color]

    def succeeded(self):
        """Is the command done, without moving any object that it does not name?"""
        for name in self.start.keys() - self.roles.values():
            if np.linalg.norm(self.position(name) - self.start[name]) > STILL:
                return False
        return all(self.task.success(self).values())

    def perturb(self, seed, layout):
        """Apply this env's perturbation or variation to the model's looks; returns the layout.

        Each uses a random stream of its own, so that everything else stays the same.
        """
        model = self.model  # as compiled: reset has restored it
        rng = seeds.rng(seed, "perturbation")
        match self.perturbation:
            case "lighting":
                direction = (0.6, 0.5, -0.6)
                set_light(model, 0.17, 0.17, 0.3, direction)
            case "table":
                model.geom("table").rgba[:3] = (0.45, 0.5, 0.58)
            case "camera":
                turn_camera(model, rng)
            case "distractor":
                add_spare(self.robot, layout, rng)
            case "outside":
                layout = outside(self.robot, self.task, layout, rng)
        if self.varied:
            vary_looks(model, seeds.rng(seed, "appearance"))
        if self.varied == "all":
            rng = seeds.rng(seed, "camera")
            far = rng.uniform(0, 1.25)
            far *= rng.random() < MOVED
            turn_camera(model, rng, far)
            if rng.random() < CROWDED and not self.family:
                add_spare(self.robot, layout, rng)
                model.geom("clutter0").rgba[:] = RGBA[rng.choice(CROWD)]
        return layout

    def step(self, action):
        """Drive the servos to `action` (A,) for one control step (0.05 s).

        Targets beyond joint, finger or velocity limits are clipped; such steps are counted in
        info["clipped"]. ValueError if the action has the wrong shape or is not finite.
        """
        robot = self.robot
        dof = robot.dof
        action = np.asarray(action, float)
        fits = action.shape == (dof + 1,)
        if not fits or not np.isfinite(action).all():
            raise ValueError(f"{robot.name} takes {dof + 1} finite numbers, not {action}")
        before = self.data.ctrl[:dof].copy()
        *inside, finger = robot.clip(action)
        reach = robot.velocity_limit / CONTROL_HZ  # rad
        target = np.clip(inside, before - reach, before + reach)
        # fingers are driven to their end stops on purpose, so they are not counted
        self.clipped["limits"] += not np.allclose(inside, action[:dof], 0, 1e-6)
        self.clipped["speed"] += not np.allclose(target, inside, 0, 1e-6)
        self.target = np.append(target, finger)
        self.drive(target, finger)
        self.steps += 1
        done = self.succeeded()
        truncated = self.steps >= self.horizon and not done
        info = {"success": done, "clipped": self.clipped}
        return self.observe(), float(done), done, truncated, info

    def drive(self, target, finger):
        """One control step of physics toward joint targets (dof,) rad and a finger target, m."""
        dof = self.robot.dof
        before = self.data.ctrl[:dof].copy()
        # fingers jump to their target: the force of their servo is limited
        self.data.ctrl[dof] = self.robot.finger_control(finger)
        for i in range(1, SUBSTEPS + 1):  # interpolated, so that the servos see no jumps
            way = (target - before) * i
            self.data.ctrl[:dof] = before + way / SUBSTEPS
            mujoco.mj_step(self.model, self.data)

    # ---- what the policy sees

    def state(self):
        """(S,) float32 in physical units and the order of data/robots.py."""
        numbers = (
            self.data.qpos[: self.robot.dof],
            [self.opening()],
            self.data.site_xpos[self.tcp] - self.base,
            *self.tool().T[:2],
        )
        return np.concatenate(numbers, dtype=np.float32)

    def opening(self):
        """m, of each finger, now."""
        return self.robot.opening(self.data.qpos)

    def tool(self):
        """(3, 3) rotation of the tool, now."""
        return self.data.site_xmat[self.tcp].reshape(3, 3)

    def observe(self, render=None):
        """The observation now. `render` overrides the env's own setting.

        A policy that observes only every few steps needs no images in between.
        """
        images = {}
        if self.render if render is None else render:
            images = {view: self.draw(view) for view in VIEWS}
        state = self.state()
        if self.perturbation == "noise":
            for view, image in images.items():
                noise = self.sensor.normal(0, 8, image.shape)
                noisy = np.clip(image + noise, 0, 255)
                images[view] = noisy.astype(np.uint8)
            state += self.sensor.normal(0, 0.005, state.shape).astype(np.float32)
        return {"images": images, "state": state, "instruction": self.instruction}

    def draw(self, view, size=IMAGE_SIZE, **how):
        """An image from a camera, see Camera.draw. UserError without GL."""
        return self.camera.draw(self.data, view, size, **how)

    def close(self):
        self.camera.close()

    # ---- the true state: for success tests, the expert and scenes

    def place(self, name, position, yaw=0.0):
        """Put a body at a position, at rest, turned by `yaw` (rad) about the vertical."""
        half = yaw / 2
        quat = [np.cos(half), 0, 0, np.sin(half)]
        body = self.model.body(name)
        if body.mocapid[0] >= 0:  # goals, bins and spare cubes are static
            self.data.mocap_pos[body.mocapid] = position
            self.data.mocap_quat[body.mocapid] = quat
        else:
            joint = self.data.joint(body.jntadr[0])
            joint.qpos[:] = [*position, *quat]
            joint.qvel[:] = 0

    def forward(self):
        """Recompute all positions after joints or bodies were set directly."""
        mujoco.mj_forward(self.model, self.data)

    def set_arm(self, targets):
        """Set joints (rad) and both fingers (m) to targets (A,) at once, with servos holding."""
        *joints, finger = targets
        places = [*joints, *self.robot.finger_joints(finger)]
        moving = len(places)
        self.data.qpos[:moving] = places
        self.data.qvel[:moving] = 0
        control = self.robot.finger_control(finger)
        self.data.ctrl[: len(targets)] = [*joints, control]
        self.target = np.array(targets)

    def body(self, name):
        """The id of a body, given its name or its role in the task."""
        return self.model.body(self.roles.get(name, name)).id

    def position(self, name):
        return self.data.xpos[self.body(name)].copy()

    def rotation(self, name):
        return self.data.xmat[self.body(name)].reshape(3, 3).copy()

    def held(self):
        """Is the task's object held?"""
        return self.grasped(next(iter(self.task.labels)))

    def why(self, held):
        """Why an episode failed, from the values of `held` after each step."""
        # these are done without a grasp
        if self.task.name in ("PushCube", "PullCube"):
            return "missed the target"
        if not any(held):
            return "never grasped"
        return "held to the end" if held[-1] else "let go elsewhere"

    def grasped(self, name):
        """True if both pads press on the body, within 85 degrees of the closing axis.

        This is ManiSkill's grasp test; the force threshold is in the arm's file.
        """
        body = self.body(name)
        _, closing, _ = self.tool().T
        wrench = np.zeros(6)  # in the contact frame, whose axes are the rows of contact.frame
        for pads in self.pads:
            force = np.zeros(3)  # N, in the world frame
            for i, contact in enumerate(self.data.contact):
                bodies = self.model.geom_bodyid[contact.geom]
                if body in bodies and any(geom in pads for geom in contact.geom):
                    mujoco.mj_contactForce(self.model, self.data, i, wrench)
                    axes = contact.frame.reshape(3, 3)
                    force += axes.T @ wrench[:3]
            size = np.linalg.norm(force)
            steepest = np.cos(np.radians(85))
            askew = abs(force @ closing) < size * steepest
            if askew or size < self.robot.grasp_force:
                return False
        return True
