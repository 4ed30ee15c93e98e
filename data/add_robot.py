"""Add your own arm from its MJCF file: data/arms/NAME.xml.

    python -m data.add_robot --mjcf universal_robots_ur5e/ur5e.xml --name ur5e

Chain, limits, inertias and servos are taken from the file; its geoms become ellipsoids. The gripper
is the file's own if it has two sliding fingers (data/add_gripper.py) or jaws that turn
(data/add_jaws.py), or comes from a file of its own; otherwise it is the xArm-6's. The arm's reach
determines where the tasks take place. What cannot be kept (springs, coupled joints, ...) is
refused, with the reason.

The chain is kept as MuJoCo compiled it, body by body: all poses are relative to the parent body.
"""

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from cli import UserError, choose, parse, run
from data.add_gripper import add, add_gripper, add_inertial, below, find_gripper
from data.add_jaws import Jaws, add_jaws, find_jaws
from data.robots import ARMS, Kinematics, Robot, get_robot
from data.simulator import mujoco
from files import atomic, reading

GRIPPER = "xarm6"  # the arm whose file is the template: its hand is at the origin of its flange
KP = 1000.0  # N m/rad, for joints without a position servo in the file
KV = 100.0  # N m s/rad, for the same joints
TORQUE = 87.0  # N m, for the same joints if they have no limit either
ADVICE = "MuJoCo itself must load it, with meshes as .stl, .obj or .msh"
SPAN = 0.15  # m of the table; with less there is no room for the tasks' objects
SPEED = 2.0  # rad/s, velocity limit of the joints, which MJCF does not have


@dataclass
class AddConfig:
    mjcf: str = ""  # MJCF file of the arm
    name: str = ""  # its name here: lower case, no spaces
    site: str = "attachment_site"  # site or body at the flange
    axes: str = ""  # its axes outward and along the fingers' motion, such as x,-y; empty: z,y
    base: str = ""  # body that is fixed to the table; empty: the first of the chain
    gripper: str = ""  # its MJCF file, or "xarm6"; empty: the one behind --site, else the xArm-6's


# ---- the user's file


def read_model(config):
    """MjSpec and MjModel of the file, with a site `config.site` even if that is a body. UserError.

    A gripper from a file of its own is attached at that site.
    """
    hand = None
    if config.gripper not in ("", GRIPPER):
        with reading(config.gripper, ADVICE):
            hand = mujoco.MjSpec.from_file(config.gripper)
            hand.compile()
    with reading(config.mjcf, ADVICE):
        spec = mujoco.MjSpec.from_file(config.mjcf)
        places = [place.name for place in spec.bodies[1:] + spec.sites]
        choose(config.site, places, "--site (a site or a body)")
        site = spec.site(config.site) or spec.body(config.site).add_site(name=config.site)
        if hand:
            for option in ("cone", "impratio", "timestep", "integrator"):  # avoids warnings
                setattr(hand.option, option, getattr(spec.option, option))
            spec.attach(hand, site=site, prefix="gripper/")
        return spec, spec.compile()


def find_path(model, config, gripper):
    """Body ids from the base to the hand's carrier. UserError if they are not a chain of hinges."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    flange = data.site(config.site)
    path = [gripper.hand if gripper else model.site_bodyid[flange.id]]
    while model.body_parentid[path[0]]:
        path.insert(0, model.body_parentid[path[0]])
    turning = [body for body in path if model.body_jntnum[body]]
    for body in turning:
        refuse_what_is_lost(model, body)
    if len(turning) < 5:
        raise UserError(f"{len(turning)} joints before {config.site}: the tasks need five")

    if path[0] == turning[0]:
        path.insert(0, 0)  # its first joint is on the world itself
    still = path[: path.index(turning[0])]
    names = [model.body(body).name for body in still]
    # Check what the flags leave open: without --base the bodies before the first joint must not
    # form a pedestal; without --axes the site's z must point outward, away from the last joint but
    # one.
    column = data.xpos[still[-1]] - data.xpos[still[0]]
    pedestal = np.any(np.abs(column) > 0.01)
    away = (flange.xpos - data.xpos[turning[-2]]) @ flange.xmat.reshape(3, 3)
    sideways = not gripper and away[2] < 0.3 * np.linalg.norm(away)
    if pedestal and not config.base:
        raise UserError(f"use --base to name the body on the table: {', '.join(names)}")
    if sideways and not config.axes:
        advice = "name the axes with --axes, such as x,y"
        raise UserError(f"z of {config.site} does not point outward: {advice}")
    base = choose(config.base or names[0], names, "--base")
    return path[names.index(base) :]  # leave out what the base stands on in the file


def refuse_what_is_lost(model, body):
    """UserError if a body's joint is more than a hinge with a servo."""
    joint = model.body_jntadr[body]
    several = model.body_jntnum[body] > 1
    hinge = model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE  # not slide, ball or free
    driven = model.actuator_trnid[model.actuator_trntype < 2, 0]
    coupled = model.eq_type == mujoco.mjtEq.mjEQ_JOINT
    partners = np.append(model.eq_obj1id[coupled], model.eq_obj2id[coupled])
    wrapped = model.wrap_type == mujoco.mjtWrap.mjWRAP_JOINT
    reasons = {
        "must be a hinge, and the only joint of its body": several or not hinge,
        "has a spring": np.any(model.jnt_stiffness[joint]),
        "has two actuators": np.sum(driven == joint) > 1,
        "is coupled to another": joint in partners,
        "is pulled by a tendon": joint in model.wrap_objid[wrapped],
    }
    whose = f"cannot be kept: the joint of body {model.body(body).name}"
    advice = "take that out of a copy of the file, if the arm can do without"
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{whose} {reason}; {advice}")


def measure_servos(model, joints):
    """(n, 5) for the servos of n joints: kp N m/rad, kv, torque N m, lowest and highest target rad.

    Computed from the torques that MuJoCo applies to the joints, whatever gears, gains and limits
    are in between. Changes the model. Zeros if there is no position servo, or no torque limit.
    """
    model.opt.gravity[:] = 0  # gravity compensation may be included in the actuators' torques
    data = mujoco.MjData(model)

    def torque(ctrl=0.0, angle=0.0, speed=0.0):
        data.qpos[model.jnt_qposadr[joints]] = angle
        data.qvel[model.jnt_dofadr[joints]] = speed
        data.ctrl[:] = ctrl
        data.act[:] = ctrl  # what an integrating servo would have reached
        # mj_forward without inertia and constraints, which overflow at such extreme values
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_tendon(model, data)
        mujoco.mj_transmission(model, data)
        mujoco.mj_fwdVelocity(model, data)
        mujoco.mj_fwdActuation(model, data)
        return data.qfrc_actuator[model.jnt_dofadr[joints]]  # a copy

    # With an extreme target, and the joint far from it and moving away fast, a servo gives its full
    # torque; a motor gives its own at its control limit. The weaker of both directions counts.
    most = 1e8
    ways = [torque(-most, most, most), torque(most, -most, -most)]
    torques = np.abs(ways).min(axis=0)
    torques[torques == 0] = model.jnt_actfrcrange[joints, 1][torques == 0]  # no actuator drives it
    torques[torques > 1e6] = 0  # no limit

    # Without force limits a servo is linear: its gains are differences, its targets are zeros.
    model.actuator_forcelimited[:] = 0
    model.jnt_actfrclimited[:] = 0
    kp = torque() - torque(angle=1.0)
    kv = torque() - torque(speed=1.0)
    # a gear ratio may be negative
    targets = np.sort([torque(-most), torque(most)], axis=0) / np.maximum(kp, 1e-9)
    return np.transpose([kp, kv, torques, *targets])


# ---- the new file: the template's hand on another arm


def xy_axes(words):
    """(2, 3): x and y of the hand, from its outward and closing axes, such as "x,-y"."""
    axes = []
    with reading(f"--axes {words}", "name two axes, such as z,y or x,-y"):
        for word in words.split(","):
            axis = np.eye(3)["xyz".index(word[-1])]
            axes.append(-axis if word[0] == "-" else axis)
        z, y = axes
        assert z @ y == 0
    return np.cross(y, z), y


def fill_body(body, model, i):
    """Give `body` the mass and inertia of the file's body `i`, and an ellipsoid for each geom."""
    add_inertial(body, model, i)
    for g in np.flatnonzero(model.geom_bodyid == i):
        center, half = np.split(model.geom_aabb[g], 2)
        if half.min() > 0.005 and half.max() < 1:  # m; leave out screws, labels and planes
            frame = add(body, "frame", pos=model.geom_pos[g], quat=model.geom_quat[g])
            add(frame, "geom", type="ellipsoid", pos=center, size=half)


def add_joint(body, actuators, model, joint, servo):
    """A hinge and its servo, from a row of measure_servos, within the limits of both."""
    kp, kv, torque, *limits = servo
    if kp <= 0:  # the file has no position servo
        kp = KP
        kv = KV
        torque = torque or TORQUE
        limits = (-np.inf, np.inf)
    limits = np.clip(limits, -2 * np.pi, 2 * np.pi)
    if model.jnt_limited[joint]:
        limits = np.clip(limits, *model.jnt_range[joint])
    dof = model.jnt_dofadr[joint]
    name = f"joint{joint}"
    add(
        body,
        "joint",
        name=name,
        pos=model.jnt_pos[joint],
        axis=model.jnt_axis[joint],
        range=limits,
        ref=model.qpos0[model.jnt_qposadr[joint]],
        armature=max(model.dof_armature[dof], 0.01),  # stiff servos make a light wrist shake
        damping=model.dof_damping[dof],
        frictionloss=model.dof_frictionloss[dof],
    )
    ranges = {"ctrlrange": limits, "forcerange": (-torque, torque)}  # in MJCF 0 0 means no limit
    add(actuators, "position", joint=name, kp=kp, kv=kv, **ranges)


def choose_gripper(config, spec, model, body):
    """The Gripper or Jaws behind the flange's body and "", or None for the xArm-6's and why."""
    if config.gripper == GRIPPER:
        return None, "chosen with --gripper"
    moving = np.isin(model.jnt_bodyid, below(model, body)[1:])
    turns = model.jnt_type[moving] == mujoco.mjtJoint.mjJNT_HINGE
    if turns.any():
        gripper, reason = find_jaws(spec, model, body)
    else:
        gripper, reason = find_gripper(model, body)
    if config.gripper and not gripper:
        cannot = f"--gripper {config.gripper} cannot be kept, {reason}"
        raise UserError(f"{cannot}; leave it out for the xArm-6's")
    return gripper, reason


def add_chain(world, actuators, model, path, servos, jaw):
    """Nest the bodies of `path` in each other; returns the last. The body `jaw` gets no geoms yet.

    servos: {joint: row of measure_servos}.
    """
    # the base's pose in the file does not matter
    body = add(world, "body", name="base", childclass="link")
    fill_body(body, model, path[0])
    for i in path[1:]:
        place = {"pos": model.body_pos[i], "quat": model.body_quat[i]}
        body = add(body, "body", name=f"part{i}", gravcomp="1", **place)
        if i == jaw:
            add_inertial(body, model, i)
        else:
            fill_body(body, model, i)
        joint = model.body_jntadr[i]
        if joint in servos:
            add_joint(body, actuators, model, joint, servos[joint])
    return body


def write_arm(config, root):
    """Build the arm in `root`, the parsed template. Returns its number of joints."""
    spec, model = read_model(config)
    flange = model.site(config.site)
    gripper, reason = choose_gripper(config, spec, model, flange.bodyid[0])
    path = find_path(model, config, gripper)
    hand = root.find(".//body[@name='hand']")
    hand.append(root.find(".//camera"))
    world = root.find("worldbody")
    actuators = root.find("actuator")
    contact = root.find("contact")
    fingers = actuators[-1]
    for section in (world, actuators, contact):
        section.clear()

    joints = model.body_jntadr[path]
    joints = joints[joints >= 0]
    jaws = isinstance(gripper, Jaws)
    slides = joints[:0] if jaws or not gripper else model.body_jntadr[gripper.fingers]
    measured = measure_servos(model, np.append(joints, slides))
    servos = dict(zip(joints, measured, strict=False))  # those of the fingers come last
    jaw = gripper.hand if jaws and gripper.fixed else None
    body = add_chain(world, actuators, model, path, servos, jaw)
    if gripper:
        x, y, _ = gripper.axes.T
        add(body, "frame", xyaxes=(x, y)).append(hand)
    else:
        body = add(body, "frame", pos=flange.pos, quat=flange.quat)
        add(body, "frame", xyaxes=xy_axes(config.axes or "z,y")).append(hand)
    if jaws:
        add_jaws(hand, root, gripper)
    else:
        actuators.append(fingers)
    if gripper and not jaws:
        add_gripper(hand, root, model, gripper, measured[len(joints) :])
    whose = "the file's own" if gripper else f"the xArm-6's: {reason}"
    add(root.find("custom"), "text", name="gripper", data=whose)
    # bodies overlap at their joints: an arm does not collide with itself
    for body1, body2 in combinations(world.iter("body"), 2):
        add(contact, "exclude", body1=body1.get("name"), body2=body2.get("name"))
    return len(joints)


# ---- where the tasks take place


def point_down(kinematics, start, distance, height):
    """qpos (dof,) near `start` with the hand straight down there and links above 3 cm; or None.

    The closing axis points left or right, as it does at `start`.
    """
    _, rotation = kinematics.forward(start)
    side = np.sign(rotation[1, 1])
    down = np.diag([-side, side, -1])
    qpos = kinematics.solve_ik(np.array([distance, 0, height]), down, start)
    links = kinematics.model.jnt_bodyid[1 : len(start)]
    low = kinematics.data.xpos[links, 2].min() < 0.03
    return None if qpos is None or low else qpos


def farthest(kinematics, qpos, distance, step, nearest):
    """The distance (m) up to which the hand points down at the table, in steps of `step`.

    At less than `nearest` the hand would hit the base.
    """
    while qpos is not None and distance > nearest:
        distance += step
        qpos = point_down(kinematics, qpos, distance, 0.02)
    return distance - step


def find_workspace(robot):
    """{numeric: value} of the new arm's file: rest pose, reach, and where the tasks take place.

    The rest pose is the best of many, by reach straight down and by distance from the middle of the
    joint ranges: one radian costs as much as 5 cm of reach. UserError if none reaches.
    """
    kinematics = Kinematics(robot)
    low, high = np.clip(robot.joint_range.T, -np.pi, np.pi)  # one turn is enough to search
    starts = np.random.default_rng(0).uniform(low, high, (80, robot.dof))
    links = robot.model.body_pos[: robot.model.body("hand").id + 1]
    length = np.linalg.norm(links, axis=1).sum()  # m, length of the stretched arm
    nearest = min(0.15, 0.2 * length)
    best = (0.0, 0.0, 0.0)
    for stretched in (0.4, 0.25):  # starting distance: less than half of the stretched arm
        middle = stretched * length
        for start in [(low + high) / 2, *starts]:
            qpos = point_down(kinematics, start, middle, 0.3 * middle)
            if qpos is not None:
                near = farthest(kinematics, qpos, middle, -0.01, nearest)
                far = farthest(kinematics, qpos, middle, 0.01, nearest)
                bent = np.abs(qpos - robot.joint_range.mean(axis=1)).max()
                best = max(best, (1 + far - near - 0.05 * bent, near, far, *qpos))
        if best[0]:
            break
    _, near, far, *home = best  # without the pose if none was found
    if far - near < SPAN:
        found = f"only from {near:.2f} to {far:.2f} m" if best[0] else "and no pose was found"
        raise UserError(
            f"with this gripper the arm cannot point straight down along {SPAN} m of the table, "
            f"{found}: are --base, --site and --axes right?"
        )
    scale = min(1.0, round((far - near) / 0.53, 2))  # 1 for arms with 0.53 m, like the xArms
    center = far - 0.21 * scale
    # 20 cm above the near half of the region, at scale 1
    rest = point_down(kinematics, home, center - 0.05 * scale, 0.2 * scale)
    return {
        "home": home if rest is None else rest,
        "reach": (near, far),
        "spawn_distance": center,
        "spawn_half_size": 0.1 * scale,
        "max_goal_height": 0.25 * scale,
        "scale": scale,
    }


def convert(config, path):
    """Write the arm of config.mjcf to `path`; returns its Robot. UserError if it cannot be kept."""
    tree = ET.parse(get_robot(GRIPPER).path)
    root = tree.getroot()
    dof = write_arm(config, root)
    root.set("model", config.name)
    root.find(".//text").set("data", config.name)

    def write(values):
        custom = root.find("custom")
        for name, value in values.items():
            custom.remove(custom.find(f"numeric[@name='{name}']"))
            add(custom, "numeric", name=name, data=value)
        ET.indent(tree)
        tree.write(path)
        return Robot(config.name, path)

    # the workspace is searched with the arm as it is in the file
    robot = write({"home": np.zeros(dof), "velocity_limit": np.full(dof, SPEED)})
    return write(find_workspace(robot))


def main():
    config = parse(AddConfig, description="Add your own arm, from its MJCF file.")
    path = ARMS / f"{config.name}.xml"
    named = f"--name {config.name}:"
    if "" in (config.mjcf, config.name):
        raise UserError("say which arm: python -m data.add_robot --mjcf arm.xml --name my_arm")
    if not re.fullmatch("[a-z][a-z0-9_]*", config.name):
        raise UserError(f"{named} lower-case letters, digits and underscores only")
    if path.exists():
        raise UserError(f"{named} there is such a robot already; delete {path} first")
    with atomic(path) as temporary:  # a refusal leaves no file behind
        robot = convert(config, temporary)
    print(
        f"{config.name}: {robot.dof} joints, reaches {robot.reach} m straight down; its file is "
        f"{path}. See it work: python eval.py expert --robots {config.name} --episodes 5"
    )


if __name__ == "__main__":
    run(main)
