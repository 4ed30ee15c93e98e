"""Your own arm, from its MJCF file: data/arms/NAME.xml.

    python -m data.add_robot --mjcf universal_robots_ur5e/ur5e.xml --name ur5e

Chain, limits, inertias and servos are the file's; links become capsules around its geoms; the
gripper is that of an arm that is here already. Where the tasks take place follows from how far the
arm reaches. What cannot be kept (springs, coupled joints, ...) is refused, with the reason.

The chain stays as MuJoCo compiled it, body by body: all poses are in the frame of the body before.
"""

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from cli import UserError, choose, parse, run
from data.robots import ARMS, Kinematics, Robot, get_robot
from data.simulator import mujoco
from files import atomic, reading

MOST_CAPSULES = 4  # of one body, the largest
GAINS = (1000.0, 100.0)  # N m/rad, N m s/rad: for joints whose file has no position servo
TORQUE = 87.0  # N m, for those if it has no limit either
SPEED = 2.0  # rad/s, velocity limit of the joints: MJCF has none


@dataclass
class AddConfig:
    mjcf: str = ""  # MJCF file of the arm
    name: str = ""  # what to call it: lower case, no spaces
    site: str = "attachment_site"  # site or body at the flange
    axes: str = ""  # its axes outwards and along the fingers' way, such as x,-y; empty: z,y
    base: str = ""  # body that stands on the table; empty: the one that holds the first joint
    gripper: str = "xarm6"  # robot whose gripper, fingers and wrist camera it gets


# ---- the user's file


def read_model(config):
    """The file's MjModel, with a site `config.site` even where that is a body. UserError."""
    with reading(config.mjcf):
        spec = mujoco.MjSpec.from_file(config.mjcf)
        model = spec.compile()
    places = [place.name for place in spec.bodies[1:] + spec.sites]
    choose(config.site, places, "--site (a site or a body)")
    if not spec.site(config.site):
        if not config.axes:
            raise UserError(f"{config.site} is a body: say which way it looks, as with --axes z,y")
        spec.body(config.site).add_site(name=config.site)
        model = spec.compile()
    return model


def find_path(model, config):
    """Body ids from the table to the flange. UserError if they are no chain of hinges."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    flange = data.site(config.site)
    path = [model.site_bodyid[flange.id]]
    while model.body_parentid[path[0]]:
        path.insert(0, model.body_parentid[path[0]])
    turning = [body for body in path if model.body_jntnum[body]]
    for body in turning:
        refuse_what_is_lost(model, body)
    if len(turning) < 5:
        raise UserError(f"{len(turning)} joints before {config.site}: the tasks need five")

    # What is not told is checked: the way from the last joint but one to the flange leads outwards.
    away = (flange.xpos - data.xpos[turning[-2]]) @ flange.xmat.reshape(3, 3)
    if not config.axes and away[2] < 0.3 * np.linalg.norm(away):
        axis = "xyz"[np.abs(away).argmax()]
        raise UserError(
            f"is z of {config.site} outwards and y along the fingers' way? By the look of the arm "
            f"it is {axis} that points away: say it with --axes, such as z,y"
        )
    fixed = path[: path.index(turning[0])]
    names = [model.body(body).name for body in fixed]
    # is the last of several on a pedestal, or on a column of its own?
    high = fixed and abs(data.xpos[fixed[-1], 2]) > 0.01
    if len(fixed) > 1 and high and not config.base:
        raise UserError(f"say with --base which stands on the table: {', '.join(names)}")
    if fixed:  # what it stands on in the file is left out
        base = choose(config.base or names[-1], names, "--base")
        path = path[names.index(base) :]
    return path


def refuse_what_is_lost(model, body):
    """UserError for a body whose joint is more than a hinge with a servo."""
    joint = model.body_jntadr[body]
    hinge = model.jnt_type[joint] == mujoco.mjtJoint.mjJNT_HINGE  # no slide, ball or free base
    coupled = model.eq_type == mujoco.mjtEq.mjEQ_JOINT
    partners = np.append(model.eq_obj1id[coupled], model.eq_obj2id[coupled])
    wrapped = model.wrap_type == mujoco.mjtWrap.mjWRAP_JOINT
    reasons = {
        "must be the one hinge of its body": not hinge or model.body_jntnum[body] > 1,
        "has a spring": np.any(model.jnt_stiffness[joint]),
        "is coupled to another": joint in partners,
        "is pulled by a tendon": joint in model.wrap_objid[wrapped],
    }
    for reason, holds in reasons.items():
        if holds:
            name = model.body(body).name
            raise UserError(f"the joint of body {name} {reason}: such arms cannot be kept")


def measure_servos(model, joints):
    """kp (n,) N m/rad, kv (n,), torques (n, 2) N m and targets (n, 2) rad of n joints' servos.

    MuJoCo is asked what arrives at the joints, whatever gears, gains and limits lie between; the
    model is changed. Without a position servo: GAINS, and TORQUE unless the file has a limit.
    """
    of_joint = model.actuator_trntype <= int(mujoco.mjtTrn.mjTRN_JOINTINPARENT)
    position = of_joint & (model.actuator_biasprm[:, 1] < 0)
    driven = model.actuator_trnid[:, 0]
    beside = ~position & np.isin(driven, driven[position])
    model.actuator_gainprm[beside] = 0  # a velocity servo's target would follow the motion
    model.actuator_biasprm[beside] = 0
    model.body_gravcomp[:] = 0  # it can be counted among the actuators' torques
    data = mujoco.MjData(model)

    def torque(ctrl=0.0, angle=0.0, speed=0.0):
        data.qpos[model.jnt_qposadr[joints]] = angle
        data.qvel[model.jnt_dofadr[joints]] = speed
        data.ctrl[:] = ctrl
        data.act[:] = ctrl  # what an integrated servo would have reached
        mujoco.mj_forward(model, data)
        return data.qfrc_actuator[model.jnt_dofadr[joints]]  # a copy

    # Driven as far as it goes, and against a joint that is far away and fast, a servo gives all
    # that it has; a motor does so by its own limit of control.
    most = 1e8
    lowest = torque(-most, most, most)
    highest = torque(most, -most, -most)
    torques = np.sort([lowest, highest], axis=0)  # a gear may be negative
    idle = ~torques.any(axis=0)  # nothing drives these: the joint has a limit, or 0 0 for none
    torques[:, idle] = model.jnt_actfrcrange[joints][idle].T

    # Without limits of force a servo is linear: differences are its gains, zeros its targets.
    model.actuator_forcelimited[:] = 0
    model.jnt_actfrclimited[:] = 0
    rest = torque()
    kp = rest - torque(angle=1.0)
    kv = rest - torque(speed=1.0)
    ends = np.sort([torque(-most), torque(most)], axis=0)
    servo = kp > 0
    kp = np.where(servo, kp, GAINS[0])
    kv = np.where(servo, kv, GAINS[1])
    targets = np.where(servo, ends / kp, [[-most], [most]])
    unlimited = (np.abs(torques) > 1e6) | (torques == 0)
    default = np.where(servo, 0, [[-TORQUE], [TORQUE]])  # 0 0 is no limit in MJCF
    torques = np.where(unlimited, default, torques)
    return kp, kv, torques.T, targets.T


# ---- the new file: the gripper's own, with another arm under its hand


def add(parent, tag, **attributes):
    """A new element, with numbers as MJCF writes them."""
    for name, value in attributes.items():
        if not isinstance(value, str):
            attributes[name] = " ".join(f"{number:.9g}" for number in np.ravel(value))
    return ET.SubElement(parent, tag, attributes)


def xy_axes(words):
    """(2, 3): x and y of a hand that looks and closes along two axes, such as "x,-y"."""
    axes = []
    with reading(f"--axes {words}", "name two axes, such as z,y or x,-y"):
        for word in words.split(","):
            axis = np.eye(3)["xyz".index(word[-1])]
            axes.append(-axis if word[0] == "-" else axis)
        z, y = axes
        assert z @ y == 0
    return np.cross(y, z), y


def add_body(parent, model, i, name, place):
    """A body with the mass of the file's body `i`, and capsules around its largest geoms."""
    body = add(parent, "body", name=name, gravcomp="1", **place)
    add(
        body,
        "inertial",
        pos=model.body_ipos[i],
        quat=model.body_iquat[i],
        mass=max(model.body_mass[i], 1e-6),
        diaginertia=model.body_inertia[i] + 1e-6,
    )
    mine = model.geom_bodyid == i
    mine &= model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE  # without an end
    solid = mine & (model.geom_contype > 0)  # what collides, if anything does
    geoms = np.flatnonzero(solid if solid.any() else mine)
    volumes = model.geom_aabb[geoms, 3:].prod(axis=1)
    for g in geoms[np.argsort(-volumes)][:MOST_CAPSULES]:
        center, half = np.split(model.geom_aabb[g], 2)
        radius = np.sort(half)[:2].mean()  # the longest side is the capsule's axis
        way = np.eye(3)[half.argmax()] * max(half.max() - radius, 1e-4)
        if radius > 0.005:  # m; screws and labels are left out
            frame = add(body, "frame", pos=model.geom_pos[g], quat=model.geom_quat[g])
            ends = [center - way, center + way]
            add(frame, "geom", fromto=ends, size=radius)
    return body


def add_joint(body, actuators, model, joint, name, servo):
    """A hinge and its servo, inside the joint's limits and the servo's."""
    kp, kv, torques, limits = servo
    if model.jnt_limited[joint]:
        limits = np.clip(limits, *model.jnt_range[joint])
    limits = np.clip(limits, -2 * np.pi, 2 * np.pi)
    dof = model.jnt_dofadr[joint]
    add(
        body,
        "joint",
        name=name,
        pos=model.jnt_pos[joint],
        axis=model.jnt_axis[joint],
        range=limits,
        ref=model.qpos0[model.jnt_qposadr[joint]],
        armature=max(model.dof_armature[dof], 0.01),  # stiff servos shake a light wrist
        damping=model.dof_damping[dof],
        frictionloss=model.dof_frictionloss[dof],
    )
    add(
        actuators,
        "position",
        joint=name,
        kp=kp,
        kv=kv,
        ctrlrange=limits,
        forcerange=torques,
    )


def write_arm(config, root):
    """Put the arm into `root`, the parsed file of the one whose gripper it gets; its first pose."""
    model = read_model(config)
    path = find_path(model, config)
    joints = model.body_jntadr[path]
    joints = joints[joints >= 0]

    hand = root.find(".//body[@name='hand']")
    camera = root.find(".//camera")
    if hand.find(".//camera") is None:  # it is fixed to the flange, where the hand is turned
        turn = get_robot(config.gripper).model.body("hand").quat
        add(hand, "frame", quat=turn * (-1, 1, 1, 1)).append(camera)
    world = root.find("worldbody")
    actuators = root.find("actuator")
    contact = root.find("contact")
    fingers = actuators[-1]
    for element in (world, actuators, contact):
        element.clear()
    servos = zip(*measure_servos(model, joints), strict=True)
    body = add(world, "body", name="base", childclass="link")
    depths = {"base": 0}  # {body: joints before it}
    depth = 0
    for i in path:
        place = {"pos": model.body_pos[i], "quat": model.body_quat[i]}
        turns = model.body_jntnum[i] > 0
        if i == path[0]:  # wherever it stood in the file; if it turns, that is above the floor
            place = place | {"pos": place["pos"] * (0, 0, 1)} if turns else {}
        depth += turns
        name = f"link{depth}" if turns else f"part{i}"
        depths[name] = depth
        body = add_body(body, model, i, name, place)
        if turns:
            joint = model.body_jntadr[i]
            add_joint(body, actuators, model, joint, f"joint{depth}", next(servos))
    actuators.append(fingers)
    flange = model.site(config.site)
    body = add(body, "frame", pos=flange.pos, quat=flange.quat)
    # where and how the hand sat on its own arm is forgotten
    hand.set("pos", "0 0 0")
    hand.set("quat", "1 0 0 0")
    turned = add(body, "frame", xyaxes=xy_axes(config.axes or "z,y"))
    turned.append(hand)

    # Capsules overlap at their joints: only links more than three apart are checked.
    depths |= dict.fromkeys(("hand", "left_finger", "right_finger"), depth + 1)
    for body1, body2 in combinations(depths, 2):
        if depths[body2] - depths[body1] <= 3:
            add(contact, "exclude", body1=body1, body2=body2)
    # a file's first key is its rest pose, as in MuJoCo Menagerie
    home = model.key_qpos[0] if model.nkey else model.qpos0
    return home[model.jnt_qposadr[joints]]


# ---- where the tasks take place


def point_down(kinematics, start, distance, height):
    """qpos (dof,) near `start` with the hand straight down there and no elbow in the table, or None.

    The closing axis points to the left or to the right, as it does at `start`.
    """
    _, rotation = kinematics.forward(start)
    z = np.array([0, 0, -1.0])
    y = np.array([0, np.sign(rotation[1, 1]), 0.0])
    down = np.column_stack([np.cross(y, z), y, z])
    qpos = kinematics.solve_ik(np.array([distance, 0, height]), down, start)
    links = kinematics.model.jnt_bodyid[1 : len(start)]
    low = kinematics.data.xpos[links, 2].min() < 0.03
    return None if qpos is None or low else qpos


def farthest(kinematics, qpos, distance, step):
    """The distance (m) up to which the hand points down at the table, in steps of `step`."""
    while qpos is not None and distance > 0.15:
        distance += step
        qpos = point_down(kinematics, qpos, distance, 0.02)
    return distance - step


def find_workspace(robot):
    """{numeric: value} of the new arm's file: rest pose, reach, and where the tasks take place.

    The rest pose is the one, of many, that reaches far straight down and is plain: a radian from
    the middle of a joint's range costs as much as 5 cm of reach. UserError if none reaches.
    """
    kinematics = Kinematics(robot)
    low, high = np.clip(robot.joint_range.T, -np.pi, np.pi)  # one turn is enough to look at
    starts = np.random.default_rng(0).uniform(low, high, (80, robot.dof))
    kinematics.forward(robot.home)  # distances between joints are the same in any pose
    joints = kinematics.data.xpos[robot.model.jnt_bodyid[: robot.dof]]  # (dof, 3) m
    lengths = np.linalg.norm(np.diff(joints, axis=0, prepend=0), axis=1)
    span = lengths.sum()  # m, of the arm stretched out
    best = (-np.inf, 0.0, 0.0)
    for start in [robot.home, (low + high) / 2, *starts]:
        qpos = point_down(kinematics, start, 0.5 * span, 0.12 * span)
        if qpos is not None:
            near = farthest(kinematics, qpos, 0.5 * span, -0.01)
            far = farthest(kinematics, qpos, 0.5 * span, 0.01)
            bent = np.abs(qpos - robot.joint_range.mean(axis=1)).max()
            score = far - near - 0.05 * bent
            best = max(best, (score, near, far, list(qpos)))
    _, near, far, *home = best  # none where no pose was found
    if far - near < 0.2:
        raise UserError(
            "this arm's hand cannot point straight down along 0.2 m of the table; its first joint "
            f"is {joints[0, 2]:.2f} m above it: are --base, --site and --axes right?"
        )
    scale = min(1.0, round((far - near) / 0.53, 2))  # 1 for arms with 0.53 m, as the xArms
    center = far - 0.21 * scale
    # 20 cm above the near half of the region, at scale 1
    rest = point_down(kinematics, home[0], center - 0.05 * scale, 0.2 * scale)
    return {
        "home": home if rest is None else rest,
        "reach": (near, far),
        "spawn_distance": center,
        "spawn_half_size": 0.1 * scale,
        "max_goal_height": 0.25 * scale,
        "scale": scale,
    }


def convert(config, path):
    """Write the arm that config.mjcf describes to `path`; its Robot. UserError: it cannot be kept."""
    tree = ET.parse(get_robot(config.gripper).path)
    root = tree.getroot()
    home = write_arm(config, root)
    root.set("model", config.name)
    root.find(".//text").set("data", config.name)

    def write(numbers):
        for name, value in numbers.items():
            text = " ".join(f"{number:.4g}" for number in np.ravel(value))
            root.find(f".//numeric[@name='{name}']").set("data", text)
        ET.indent(tree)
        tree.write(path)
        return Robot(config.name, path)

    # the workspace is found with the arm as it stands in the file
    robot = write({"home": home, "velocity_limit": [SPEED] * len(home)})
    return write(find_workspace(robot))


def main():
    config = parse(AddConfig, description="Add your own arm, from its MJCF file.")
    if "" in (config.mjcf, config.name):
        raise UserError("say which arm: python -m data.add_robot --mjcf arm.xml --name my_arm")
    path = ARMS / f"{config.name}.xml"
    if not re.fullmatch("[a-z][a-z0-9_]*", config.name):
        raise UserError(f"--name {config.name}: lower-case letters, digits and underscores only")
    if path.exists():
        raise UserError(f"--name {config.name}: there is such a robot already; delete {path} first")
    with atomic(path) as temporary:  # a refusal leaves nothing behind
        robot = convert(config, temporary)
    print(
        f"{config.name}: {robot.dof} joints, reaches {robot.reach} m straight down; its file is "
        f"{path}. See it work: python eval.py expert --robots {config.name} --episodes 5"
    )


if __name__ == "__main__":
    run(main)
