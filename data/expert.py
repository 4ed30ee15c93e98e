"""The scripted expert: a task becomes primitives, a primitive a key pose, a pose a joint path, a path targets at 20 Hz (BLM1, planning side of its data engine).

    primitives(env) -> [Primitive]            approach, descend, grasp, carry, ... each a TCP pose or a finger target
    plan(env, primitives) -> [Segment]        inverse kinematics along the way, collision check, another tilt or yaw if infeasible, timing under speed limits
    demonstrate(env, seed) -> Demonstration   execute with small disturbances, watch success, plan again from where things are on failure

The expert reads the true state of the simulator; policies never do.
"""
from dataclasses import dataclass

import mujoco
import numpy as np

from data import seeds
from data.env import CONTROL_HZ
from data.robots import SQUEEZE, get_kinematics
from data.tasks import PEG_LENGTH, PEG_RADIUS, TASKS, region_radius

JOINT_SPEED = 1.3        # rad/s, peak, and never above 0.6 of the arm's own limit
TCP_SPEED = 0.45         # m/s, peak
PEG_SWING = 6.0          # N a finger: carries the peg (5.9 N) and lets it swing until friction balances it; for the Panda, whose wrist cannot turn it all the way
PEG_FIRM = 25.0          # N a finger: the peg does not swing
PEG_LEVER = 0.07         # m from its centre to where it is held
FINGER_STEPS = 6         # control steps for every closing or opening, as ManiSkill's experts
TILTS = (0.0, 0.3, 0.6)  # rad, forwards from straight down: the WidowX points straight down only below 0.175 m
PLANS = 6                # how often the expert may look again and plan from where things are


class Infeasible(Exception):
    """No joint path reaches a pose: the message says which."""


@dataclass
class Primitive:
    """Move the TCP to `position` (m, the task's frame) with the fingers at `finger` (m), or, without a position, only move the fingers.

    turns: closing axis' angles to try (rad, 0 = the hand's rest direction seen from the base); straight: along a line; slow: fraction of the speed limits.
    """
    name: str
    finger: float
    position: np.ndarray = None
    turns: tuple = None      # None: any direction will do, the present one first
    tilts: tuple = TILTS
    straight: bool = True
    slow: float = 1.0
    hold: int = 0            # control steps to wait at the end, while the servos catch up
    keep_pose: bool = False  # same orientation as the primitive before


@dataclass
class Segment:
    """One primitive as targets: name, actions (n, A)."""
    name: str
    actions: np.ndarray


@dataclass
class Demonstration:
    """states (L, S), actions (L, A) clean targets, phases [L], images [L] or [], success, attempts."""
    states: np.ndarray
    actions: np.ndarray
    phases: list
    images: list
    success: bool
    attempts: int
    instruction: str


# ---- poses

def tool_rotation(robot, azimuth, turn, tilt):
    """(3, 3): approach axis tilted by `tilt` forwards from straight down, closing axis horizontal; azimuth + turn is the direction (rad) of "forwards"."""
    a = azimuth + turn
    forward = np.array([np.cos(a), np.sin(a), 0.0])
    z = np.array([0.0, 0.0, -np.cos(tilt)]) + np.sin(tilt) * forward
    y = np.array([np.sin(a), -np.cos(a), 0.0])
    if get_kinematics(robot.name).forward(robot.home)[1][1, 1] > 0:      # this hand rests with its closing axis the other way round
        y = -y
    return np.stack([np.cross(y, z), y, z], axis=1)


def quarter_turns(yaw, azimuth):
    """Turns (rad) that put the closing axis across a cube's faces, the smallest first."""
    turn = (yaw - azimuth + np.pi / 4) % (np.pi / 2) - np.pi / 4
    return tuple(sorted((turn, turn - np.pi / 2, turn + np.pi / 2), key=abs))[:2]


def azimuth_of(env, position):
    """Direction (rad) from the base to a point: the hand's rest direction there."""
    x, y = position[:2] - env.base[:2]
    return np.arctan2(y, x)


def yaw_of(env, name):
    rotation = env.rotation(name)
    axis = max(range(3), key=lambda i: np.hypot(*rotation[:2, i]))       # the cube may lie on any face
    return np.arctan2(rotation[1, axis], rotation[0, axis])


def above(point, height):
    return np.array([point[0], point[1], point[2] + height])


def hand_pose(env):
    """(direction, tilt) in rad of the hand as it is: the arguments of tool_rotation that come nearest."""
    _, closing, approach = env.data.site_xmat[env.tcp].reshape(3, 3).T
    rest = tool_rotation(env.robot, 0.0, 0.0, 0.0)[1, 1]                 # -1, or +1 for a hand that rests the other way round
    direction = np.arctan2(closing[0], -closing[1]) if rest < 0 else np.arctan2(-closing[0], closing[1])
    return direction, np.arctan2(approach[:2] @ (np.cos(direction), np.sin(direction)), -approach[2])


def hand_offset(env, point):
    """(3,) m: a point as the hand sees it, in the tool's frame."""
    return env.data.site_xmat[env.tcp].reshape(3, 3).T @ (point - env.data.site_xpos[env.tcp])


# ---- tasks as primitives (the order of ManiSkill's experts; what differs says why)

def retreat(env, finger, low=0.06):
    """Fingers there first, then up from the table, if the hand is low."""
    tcp, steps = env.data.site_xpos[env.tcp], []
    if abs(env.data.qpos[env.robot.dof] - max(finger, 0.0)) > 0.1 * env.robot.travel:
        steps.append(Primitive("retreat", finger))
    return steps + ([Primitive("retreat", finger, above(tcp, low - tcp[2] + 0.01), slow=0.8)] if tcp[2] < low else [])


def grasp(env, name, point, turns, close=SQUEEZE, clearance=0.06, tilts=TILTS):
    """Open, go above, go down, close: what of it is still to do, seen from where the hand is."""
    if env.grasped(name):
        return []
    open_, offset = env.robot.travel, hand_offset(env, point)
    astray = min(abs((hand_pose(env)[0] - azimuth_of(env, point) - turn + np.pi / 2) % np.pi - np.pi / 2) for turn in turns)
    above_it = np.hypot(*offset[:2]) < 0.006 and astray < 0.15 and offset[2] < clearance + 0.02 and env.data.qpos[env.robot.dof] > 0.9 * open_
    there = [] if above_it else retreat(env, open_) + [Primitive("approach", open_, above(point, clearance), turns, tilts, straight=False)]
    return there + [Primitive("descend", open_, point, turns, slow=0.6, hold=2, keep_pose=True), Primitive("grasp", close)]


def held_at(env, name, point):
    """Where the TCP must be for the held body to be at `point`: it may sit askew in the hand."""
    return point + env.data.site_xpos[env.tcp] - env.position(name) if env.grasped(name) else point


def pick_cube(env):
    cube, goal = env.position("cube"), env.position("goal")
    steps = grasp(env, "cube", cube, quarter_turns(yaw_of(env, "cube"), azimuth_of(env, cube)))
    if steps or cube[2] < 0.04:
        steps.append(Primitive("lift", SQUEEZE, above(held_at(env, "cube", cube), 0.04)))
    return steps + [Primitive("carry", SQUEEZE, held_at(env, "cube", goal), hold=8)]


def slide(direction):
    """Push (+1) or pull (-1): the closed fingers stand behind the cube and drive it along x, over the edge of the target and inside."""
    def primitives(env):
        cube, goal = env.position("cube"), env.position("goal")
        turn = (-azimuth_of(env, cube),)
        start = cube - (direction * 0.055, 0, 0)
        # the fingers' half thickness and the cube's half side stand between TCP and cube centre
        end = np.array([goal[0] - direction * (0.03 + 0.6 * region_radius(env.robot)), cube[1], start[2]])
        drive = Primitive("push" if direction > 0 else "pull", 0.0, end, turn, slow=0.7, hold=2)
        behind, beside, over = (env.data.site_xpos[env.tcp] - cube) * (-direction, 1, 1)
        if 0.02 < behind < 0.07 and max(abs(beside), abs(over)) < 0.01:
            return [drive]
        return retreat(env, 0.0) + [Primitive("approach", 0.0, above(start, 0.07), turn, straight=False),
                                    Primitive("descend", 0.0, start, turn, slow=0.8, keep_pose=True), drive]
    return primitives


def put(env, name, place, turns, lift, drop):
    """Grasp a body, lift it by `lift`, carry it over `place`, lower it to `drop` above, let go and leave (m): what of it is still to do."""
    at = env.position(name)
    steps, to = grasp(env, name, at, turns), held_at(env, name, place)
    over = not steps and np.hypot(*(at - place)[:2]) < 0.01
    if steps or at[2] < place[2] + 0.03 and not over:
        steps.append(Primitive("lift", SQUEEZE, above(held_at(env, name, at), lift)))
    if not over:
        steps.append(Primitive("carry", SQUEEZE, above(to, 0.05)))
    return steps + [Primitive("place", SQUEEZE, above(to, drop), slow=0.5, hold=4),
                    Primitive("release", env.robot.travel), Primitive("retreat", env.robot.travel, above(to, 0.065))]


def stack_cube(env):
    a, b = env.position("cubeA"), env.position("cubeB")
    return put(env, "cubeA", above(b, 0.04), quarter_turns(yaw_of(env, "cubeA"), azimuth_of(env, a)), lift=0.09, drop=0.003)


def place_sphere(env):
    # 9 mm above its rest instead of 27: a ball dropped from higher jumps out of walls that reach only its lower half
    return put(env, "sphere", above(env.position("bin"), 0.0225), (0.0, np.pi / 4, -np.pi / 4), lift=0.07, drop=0.0095)


def lift_peg(env):
    """Grasp loosely across the far half and lift: the peg swings down in the grip. Then, from where it hangs, turn the hand by what is missing and set it down."""
    peg, axis, tcp = env.position("peg"), env.rotation("peg")[:, 0], env.data.site_xpos[env.tcp].copy()
    grip = PEG_RADIUS - (PEG_SWING if env.robot.name == "panda" else PEG_FIRM) / env.robot.fingers["kp"]
    if env.grasped("peg") and peg[2] > 1.2 * PEG_RADIUS:
        axis = axis * np.sign(axis[2])
        _, closing, approach = env.data.site_xmat[env.tcp].reshape(3, 3).T
        forward = np.array([-closing[1], closing[0], 0.0])
        forward *= np.sign(forward @ (tcp - env.base)) / np.linalg.norm(forward)
        tilt, lean = np.arctan2(approach @ forward, -approach[2]), np.arctan2(axis @ forward, axis[2])
        firm = PEG_RADIUS - PEG_FIRM / env.robot.fingers["kp"]
        turned = Primitive("turn", firm, tcp, (0.0,), tilts=tuple(tilt + lean + d for d in (0, -0.05, 0.05)), straight=False)
        down = above(tcp, PEG_LENGTH + (tcp - peg) @ axis - tcp[2] - 0.006)
        return [turned, Primitive("place", firm, down, slow=0.4, hold=4, keep_pose=True), Primitive("release", env.robot.travel)]
    outwards = axis * np.sign(axis @ (peg - env.base))
    point = peg + PEG_LEVER * outwards
    turn = np.arctan2(outwards[1], outwards[0]) - azimuth_of(env, point)
    # leaning back a little at first spares the xArm's wrist the last of its range when the peg stands
    return grasp(env, "peg", point, (turn,), close=grip, tilts=(-0.25, 0.0, 0.3) if env.robot.name.startswith("xarm") else TILTS) + [
        Primitive("lift", grip, above(peg + PEG_LEVER / 2 * outwards, 0.23), (0.0,), tilts=(0.6, 0.3, 0.0) if env.robot.name != "panda" else TILTS, slow=0.8)]


PRIMITIVES = dict(zip(TASKS, (pick_cube, slide(+1), slide(-1), stack_cube, place_sphere, lift_peg)))


# ---- paths

def rotation_between(a, b, fraction):
    """The rotation (3, 3) that lies `fraction` of the way from a to b."""
    quats, out, velocity = np.empty((2, 4)), np.empty(9), np.empty(3)
    for quat, matrix in zip(quats, (a, b)):
        mujoco.mju_mat2Quat(quat, matrix.ravel())
    mujoco.mju_subQuat(velocity, quats[1], quats[0])
    mujoco.mju_quatIntegrate(quats[0], velocity, fraction)
    mujoco.mju_quat2Mat(out, quats[0])
    return out.reshape(3, 3)


class Planner:
    """Joint paths for one env, checked for collisions on a private copy of its state."""

    def __init__(self, env):
        self.env, self.robot, self.kinematics = env, env.robot, get_kinematics(env.robot.name)
        self.scratch = mujoco.MjData(env.model)
        model = env.model
        bodies = {model.body(name).id for name in ["base", "hand", "left_finger", "right_finger"] + [f"link{i + 1}" for i in range(self.robot.dof)]}
        self.is_robot = np.array([b in bodies for b in model.geom_bodyid])
        self.is_free = np.array([model.body_dofnum[b] == 6 for b in model.geom_bodyid])   # what may be touched: the task is to touch it
        self.limit = np.minimum(JOINT_SPEED, 0.6 * self.robot.velocity_limit)

    def collides(self, qpos, finger):
        """True if the arm at `qpos` touches itself or what is fixed (table, bin)."""
        self.scratch.qpos[:] = self.env.data.qpos
        self.scratch.qpos[:self.robot.dof], self.scratch.qpos[self.robot.dof:self.robot.dof + 2] = qpos, max(finger, 0)
        self.scratch.mocap_pos[:], self.scratch.mocap_quat[:] = self.env.data.mocap_pos, self.env.data.mocap_quat
        mujoco.mj_kinematics(self.env.model, self.scratch)
        mujoco.mj_collision(self.env.model, self.scratch)
        for contact in self.scratch.contact[:self.scratch.ncon]:
            one, two = contact.geom
            if (self.is_robot[one] or self.is_robot[two]) and not (self.is_free[one] or self.is_free[two]) and contact.dist < -0.001:
                fingers = {one, two} == set(self.env.pads)
                if not fingers:
                    return True
        return False

    def path(self, start, primitive, rotation):
        """Waypoints (n, dof) from `start` to the primitive's pose, or None."""
        at, turned = self.kinematics.forward(start)
        goal = np.asarray(primitive.position) - self.env.base
        if primitive.straight:
            n = max(2, int(np.linalg.norm(goal - at) / 0.02), int(np.arccos(np.clip((np.trace(turned.T @ rotation) - 1) / 2, -1, 1)) / 0.15)) + 1
            points, q = [start], start
            for f in np.linspace(0, 1, n)[1:]:
                q_next = self.kinematics.solve_ik(at + f * (goal - at), rotation_between(turned, rotation, f), q)
                if q_next is None or np.abs(q_next - q).max() > 0.6:
                    return None
                points.append(q := q_next)
        else:
            end = self.kinematics.solve_ik(goal, rotation, start)
            if end is None:
                return None
            points = list(np.linspace(start, end, 8))
        # where the arm is already is not asked: a hand that was pressed onto the table must be able to leave
        return None if any(self.collides(q, primitive.finger) for q in points[1:]) else np.array(points)

    def timed(self, points, slow):
        """Targets (n, dof) at 20 Hz along the waypoints: minimum-jerk progress, peak joint and TCP speeds under the limits."""
        steps = np.abs(np.diff(points, axis=0)) / (self.limit * slow)
        places = np.array([self.kinematics.forward(q)[0] for q in points])
        tcp = np.linalg.norm(np.diff(places, axis=0), axis=1) / (TCP_SPEED * slow)
        knots = np.concatenate([[0], np.cumsum(np.maximum(steps.max(1), tcp) + 1e-6)])
        n = max(3, int(np.ceil(1.875 * knots[-1] * CONTROL_HZ)))        # minimum jerk peaks at 15/8 of its mean speed
        u = np.arange(1, n + 1) / n
        progress = knots[-1] * u ** 3 * (10 - 15 * u + 6 * u ** 2)
        return np.stack([np.interp(progress, knots, points[:, i]) for i in range(points.shape[1])], axis=1)

    def plan(self, primitives):
        """[Segment] for the primitives from where the arm is; raises Infeasible. Tilts and turns are tried in order; the grasp's choice is kept as long as it can be."""
        q, pose, segments = self.env.data.ctrl[:self.robot.dof].copy(), hand_pose(self.env), []
        for index, p in enumerate(primitives):
            if p.position is None:
                path = np.repeat(q[None], FINGER_STEPS, axis=0)
            else:
                path, q, pose = self.reach(q, p, pose, primitives[index + 1] if index + 1 < len(primitives) else None)
            segments.append(Segment(p.name, np.column_stack([path, np.full(len(path), p.finger)])))
        return segments

    def reach(self, q, p, pose, following):
        """Targets, last joint angles and (turn, tilt) for one primitive; an approach is taken only if the descent after it is possible too."""
        azimuth = azimuth_of(self.env, p.position)
        if p.keep_pose:
            options = [pose]
        elif p.turns is not None:
            options = [(azimuth + turn, tilt) for tilt in p.tilts for turn in p.turns]
        else:                                              # carrying: any direction will do, the present one first, then turned with the arm
            options = [(direction, tilt) for tilt in sorted(p.tilts, key=lambda t: abs(t - pose[1])) for direction in (pose[0], azimuth)]
        for direction, tilt in options:
            rotation = tool_rotation(self.robot, 0.0, direction, tilt)
            points = self.path(q, p, rotation)
            if points is None:
                continue
            if following is not None and following.keep_pose and self.path(points[-1], following, rotation) is None:
                continue
            targets = self.timed(points, p.slow)
            return np.concatenate([targets, np.repeat(targets[-1:], p.hold, axis=0)]), points[-1], (direction, tilt)
        raise Infeasible(f"{self.robot.name} cannot {p.name} at {np.round(p.position, 3)} in {self.env.task.name}")


# ---- demonstrations

def demonstrate(env, seed, noise=0.0, watch=None, reset=True):
    """Solve the layout of `seed`, or with reset=False go on from where env is; returns a Demonstration, successful or not.

    noise: size (rad) of smooth disturbances of the executed joint targets while moving freely; the recorded actions stay clean, so that
    demonstrations show the way back (DART, arXiv 1703.09327). watch(env, phase): called before every control step.
    """
    if reset:
        env.reset(seed)
    env.steps, observation = 0, env.observe()
    rng, planner = seeds.rng(seed, "disturbance"), Planner(env)
    states, actions, phases, images = [], [], [], []
    success, attempt, disturbance = False, 0, np.zeros(env.robot.dof)
    while not success and attempt < PLANS and env.steps < env.task.max_steps:
        try:
            segments = planner.plan(PRIMITIVES[env.task.name](env))
        except Infeasible:                                 # roll back: let go, and look again
            segments = planner.plan([Primitive("release", env.robot.travel)])
        attempt += 1
        for segment, i, action in [(segment, i, action) for segment in segments for i, action in enumerate(segment.actions)]:
            if watch:
                watch(env, segment.name)
            free = segment.name in ("approach", "lift", "carry")
            fade = min(1.0, (len(segment.actions) - i) / 6) if free else 0.0   # quiet again where precision begins
            disturbance = 0.8 * disturbance + 0.6 * noise * rng.normal(size=env.robot.dof)
            states.append(observation["state"]), actions.append(action), phases.append(segment.name), images.append(observation["images"])
            observation, _, success, truncated, _ = env.step(action + np.append(disturbance * fade, 0))
            if success or truncated:
                break
    return Demonstration(np.array(states), np.array(actions, np.float32).reshape(-1, env.robot.action_dim), phases, images, success, attempt, env.instruction)
