"""One robot, one task, one table: the environment, with gymnasium's signature and 20 Hz control.

Or one robot and a family of scenes (data/families.py), in which several things can be done: `command`
says which, and names in the task, such as "cube", stand for the bodies of its roles.

    reset(seed) -> observation, info
    step(action (A,)) -> observation, reward, terminated, truncated, info

Observation: {"images": {"front", "wrist"}: (128, 128, 3) uint8, "state": (S,) float32,
"instruction": str}; order and units of state and action: data/robots.py. Deterministic given the
seed. The policy sees this and nothing else; `position`, `rotation` and the like serve success
tests, the expert and the scenes of Stage I.

A layout is {body: (position (3,) m, yaw rad)}, what is moved first standing first.
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

SUBSTEPS = 20  # of the physics, 2.5 ms each
IMAGE_SIZE = 128  # pixels: 8 x 8 patches of Stage I's ViT, merged to 4 x 4
INITIAL_NOISE = 0.02  # rad on every joint, as ManiSkill

# Demonstrations with varied="all": shares with light and table drawn anew, with the front camera
# moved, and with one cube more, in a color that no task and no perturbation has.
VARIED = 0.6
MOVED = 0.5
CROWDED = 0.3
CROWD = ("purple", "orange", "white")
PERTURBATIONS = (  # what an evaluation changes, each alone
    "lighting",  # half the light, from the other side
    "table",  # a gray-blue table top
    "camera",  # front camera 2 cm and 3 degrees off, another way in every episode
    "outside",  # objects moved together, until one lies 2 cm outside the demonstrations' region
    "noise",  # 8 of 255 on every pixel, 0.005 rad and m on every number of the state
    "distractor",  # a yellow cube, at least 10 cm from everything else
)


@cache
def compile_scene(robot_name, task_name, clutter):
    """The MjModel of a cell, shared by every env of this process: each changes a copy."""
    robot = get_robot(robot_name)
    family = FAMILIES.get(task_name)
    here = Path(__file__).parent
    objects = here / "objects"
    things = "things" if family else TASKS[task_name].objects
    paths = [here / "table.xml", robot.path, objects / f"{things}.xml"]
    if clutter:
        paths.append(objects / "clutter.xml")
    # the sections of the files are merged as if they stood in one
    files = {path.name: path.read_bytes() for path in paths}
    parts = "".join(f'<include file="{name}"/>' for name in files)
    spec = mujoco.MjSpec.from_string(f"<mujoco>{parts}</mujoco>", include=files)
    # the arm's file has its base at the origin; here that is where objects start
    spec.body("base").pos[0] = -robot.spawn_distance
    for view in ("front", "render"):  # nearer for a small arm
        spec.camera(view).pos *= robot.scale
    if family:
        everything = set().union(*(other.bodies for other in FAMILIES.values()))
        for name in sorted(everything - set(family.bodies)):
            spec.delete(spec.body(name))
    resize(spec, robot)
    return spec.compile()


# ---- what varies: light, table top, front camera, and where things lie


def restore_looks(model, original):
    """Undo what the episode before has changed of `model`."""
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
    """Another light and table top, for VARIED of the episodes."""
    # all are drawn before it is drawn whether they are used
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
    """Move the front camera by 2 cm and turn it by 3 degrees, some way, times `far`."""
    camera = model.camera("front")
    way, axis = rng.normal(size=(2, 3))
    way /= np.linalg.norm(way)
    axis /= np.linalg.norm(axis)
    camera.pos += 0.02 * far * way
    turn = np.empty(4)
    mujoco.mju_axisAngle2Quat(turn, axis, np.radians(3) * far)
    mujoco.mju_mulQuat(camera.quat, camera.quat.copy(), turn)


def spots(layout):
    """(objects, 2) m: where on the table the objects of a layout lie."""
    positions = [position for position, _ in layout.values()]
    return np.array(positions)[:, :2]


@cache
def region(robot, task):
    """(2, 2) m: lowest and highest corner of the box in which a task's first object starts."""
    rng = np.random.default_rng(0)
    layouts = [task.spawn(robot, rng) for _ in range(10_000)]
    starts = [spots(layout)[0] for layout in layouts]
    low = np.min(starts, axis=0)
    high = np.max(starts, axis=0)
    return np.array([low, high])


def outside(robot, task, layout, rng):
    """The layout shifted along one axis, until its first object lies 2 cm outside its region.

    The edge is drawn from `rng`, among those beyond which all objects stay in reach.
    """
    outer = region(robot, task) + np.array([[-0.02], [0.02]])  # (2, xy)
    shifts = outer - spots(layout)[0]
    # all move together, so that what the task asks for stays as far apart
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
    """One more cube, 10 cm from all objects; nearer only where there is no such place."""
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

    render=False leaves the images out; wordings: "seen", or "held_out" from training; clutter has
    three spare cubes below the table. perturbation: one of PERTURBATIONS; layouts and wordings are as
    without it, except for what it changes. varied, for training, draws anew for some episodes
    "looks", which is light and table, or "all", the front camera's place and one more cube too.
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
        self.task = TASKS.get(task)  # of a family's scenes, that of the command
        self.roles = {}  # {name in the task: body} of the command
        self.target = None  # (A,) that the servos hold: the action, inside the limits
        self.render = render
        self.perturbation = choose(perturbation, ["", *PERTURBATIONS], "perturbation")
        if self.family and perturbation in ("outside", "distractor"):
            raise UserError(
                f"perturbation {perturbation} is for a task that has its table to itself"
            )
        self.varied = varied  # "", "looks" or "all"
        self.wordings = wordings
        # spare cubes only where they are used: without them the physics is a little faster
        may_be_crowded = varied == "all" and not self.family  # words name what lies there already
        crowded = clutter or perturbation == "distractor" or may_be_crowded
        # what reset restores; the copy is changed
        self.original = compile_scene(robot, task, crowded)
        self.model = copy.copy(self.original)
        self.data = mujoco.MjData(self.model)
        self.start = {}  # {body: position (3,) m} of what a command may not move
        # the task's frame has its origin where objects start
        self.base = np.array([-self.robot.spawn_distance, 0.0, 0.0])
        self.tcp = self.model.site("tcp").id
        # the geoms of either finger that touch things: left_pad, left_pad1, ...
        names = [self.model.geom(i).name for i in range(self.model.ngeom)]
        self.pads = []
        for side in ("left_pad", "right_pad"):
            self.pads.append([i for i, name in enumerate(names) if name.startswith(side)])
        self.camera = Camera(self.model)

    # ---- gymnasium's two verbs

    def reset(self, seed=0, instruction=None, command=0, new=False):
        """A layout, a wording and a slightly disturbed rest pose, drawn from `seed`.

        instruction: another wording. Of a family's scene, command says which of its commands is
        given, and new asks for scenes whose first command training never shows. info holds the layout.
        """
        rng = seeds.rng(seed, self.scene)  # where things lie, how the arm rests, which words
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
        if self.family:  # the layout's other command draws its own
            words = seeds.rng(seed, "command", command)
        sentence = instruct(self.table, self.command, words, self.wordings)
        self.instruction = instruction or sentence
        self.steps = 0  # control steps of this episode
        self.clipped = {"limits": 0, "speed": 0}
        self.sensor = seeds.rng(seed, "sensor")  # its noise goes on from step to step
        return self.observe(), {"layout": layout}

    def lay_out(self, seed, layout, rng):
        """Put things where they start, and the arm near its rest pose."""
        for name, (position, yaw) in layout.items():
            self.place(name, position, yaw)
        noise = rng.normal(0, INITIAL_NOISE, self.robot.dof)
        rest = [*(self.robot.home + noise), self.robot.travel]
        self.set_arm(self.robot.clip(rest))
        self.forward()

    def give(self, number):
        """From now on it is this one of the scene's commands that counts."""
        commands = len(self.table.commands)
        if not 0 <= number < commands:
            raise UserError(f"command {number}: this scene has {commands}, counted from 0")
        self.command = self.table.commands[number]
        self.task = TASKS[self.command.task]
        self.roles = self.command.roles

    def begin(self, number):
        """As `give`, from where things are now: that is what others must not move away from."""
        self.give(number)
        self.start = {body: self.data.body(body).xpos.copy() for body in self.start}

    def paint(self):
        """Give the things of a family's scene their colors."""
        for name, color in self.table.colors.items():
            geoms = self.model.geom_bodyid == self.model.body(name).id
            self.model.geom_rgba[geoms] = RGBA[color]

    def succeeded(self):
        """Is the command done, and has nothing moved that it does not name?"""
        for name in self.start.keys() - self.roles.values():
            if np.linalg.norm(self.position(name) - self.start[name]) > STILL:
                return False
        return all(self.task.success(self).values())

    def perturb(self, seed, layout):
        """The layout, and the looks of the model, under this env's perturbation or variation.

        Each is drawn from a stream of its own, so that the rest is alike.
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

        Targets beyond joint, finger or velocity limits are clipped, and such steps counted in
        info["clipped"]. ValueError if the action has another shape, or is not finite.
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
        # fingers are sent to their end stops on purpose, and not counted
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
        """One control step of physics towards joint targets (dof,) rad and a finger's, m."""
        dof = self.robot.dof
        before = self.data.ctrl[:dof].copy()
        # at once: their servo's force is limited
        self.data.ctrl[dof] = self.robot.finger_control(finger)
        for i in range(1, SUBSTEPS + 1):  # targets slide there, so that servos see no jumps
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
        """m, of either finger, live."""
        return self.robot.opening(self.data.qpos)

    def tool(self):
        """(3, 3) rotation of the tool, live."""
        return self.data.site_xmat[self.tcp].reshape(3, 3)

    def observe(self, render=None):
        """The observation now. `render` overrides the env's own choice: a policy that looks only
        every few steps needs no pictures between.
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
        """A picture of a camera, see Camera.draw. UserError where there is no GL."""
        return self.camera.draw(self.data, view, size, **how)

    def close(self):
        self.camera.close()

    # ---- the true state: for success tests, the expert and scenes

    def place(self, name, position, yaw=0.0):
        """Put a body somewhere, at rest, turned by `yaw` (rad) about the vertical."""
        half = yaw / 2
        quat = [np.cos(half), 0, 0, np.sin(half)]
        body = self.model.body(name)
        if body.mocapid[0] >= 0:  # goals, bins and spare cubes stay where they are put
            self.data.mocap_pos[body.mocapid] = position
            self.data.mocap_quat[body.mocapid] = quat
        else:
            joint = self.data.joint(body.jntadr[0])
            joint.qpos[:] = [*position, *quat]
            joint.qvel[:] = 0

    def forward(self):
        """Work out where everything is, after joints or bodies were put somewhere by hand."""
        mujoco.mj_forward(self.model, self.data)

    def set_arm(self, targets):
        """Joints rad and both fingers m (A,) there at once, servos holding."""
        *joints, finger = targets
        places = [*joints, *self.robot.finger_joints(finger)]
        moving = len(places)
        self.data.qpos[:moving] = places
        self.data.qvel[:moving] = 0
        control = self.robot.finger_control(finger)
        self.data.ctrl[: len(targets)] = [*joints, control]
        self.target = np.array(targets)

    def body(self, name):
        """The body's number, by its own name or by its role in the task."""
        return self.model.body(self.roles.get(name, name)).id

    def position(self, name):
        return self.data.xpos[self.body(name)].copy()

    def rotation(self, name):
        return self.data.xmat[self.body(name)].reshape(3, 3).copy()

    def held(self):
        """Is what the task is about in the hand?"""
        return self.grasped(next(iter(self.task.labels)))

    def why(self, held):
        """Why an episode failed, from what `held` said after each step."""
        # these are done without a grasp
        if self.task.name in ("PushCube", "PullCube"):
            return "missed the target"
        if not any(held):
            return "never grasped"
        return "held to the end" if held[-1] else "let go elsewhere"

    def grasped(self, name):
        """True if both pads press the body, within 85 degrees of the closing axis.

        ManiSkill's grasp test; how hard they must press is in the arm's file.
        """
        body = self.body(name)
        _, closing, _ = self.tool().T
        wrench = np.zeros(6)  # in the contact's frame, whose rows are its axes
        for pads in self.pads:
            force = np.zeros(3)  # N, in the world's frame
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
