"""Your own arm, from its MJCF file: data/arms/NAME.xml, and the expert's first attempts with it.

    python -m data.add_robot --mjcf universal_robots_ur5e/ur5e.xml --name ur5e

Chain, limits, inertias and servos are the file's; links become capsules around its geoms; the
gripper is that of an arm that is here already. Where the tasks take place follows from how far the
arm reaches. What cannot be kept (springs, coupled joints, ...) is refused, with the reason.

A chain is read with no joint turned, where frames (4, 4) are simple: those of the bodies are the
world's, those in the new file are each in the frame before.
"""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli import UserError, at_least, choose, parse, run
from data.robots import ARMS, ROBOTS, Kinematics, Robot, get_robot
from data.simulator import mujoco
from files import atomic, reading

MOST_CAPSULES = 4  # of one link, the largest
GAINS = (1000.0, 100.0)  # N m/rad, N m s/rad: for joints whose file has no position servo
TORQUE = 87.0  # N m, for those if it has no limit either


@dataclass
class AddConfig:
    mjcf: str = ""  # MJCF file of the arm
    name: str = ""  # what to call it: lower case, no spaces
    site: str = "attachment_site"  # site or body at the flange
    axes: str = ""  # its axes outwards and along the fingers' way, such as x,-y; empty: z,y
    base: str = ""  # body that stands on the table; empty: the one that holds the first joint
    gripper: str = "xarm6"  # robot whose gripper, fingers and wrist camera it gets
    speed: float = 2.0  # velocity limit of the joints, rad/s: MJCF has none
    check: bool = True  # let the expert try each task in five layouts


# ---- the user's file


def frame(position, rotation):
    """(4, 4) of a position (3,) m and a rotation (9,) or (3, 3)."""
    transform = np.eye(4)
    transform[:3, 3] = position
    transform[:3, :3] = np.reshape(rotation, (3, 3))
    return transform


def frame_of(view):
    """(4, 4) of a body, site, geom or camera, as MjData shows it."""
    return frame(view.xpos, view.xmat)


def find_flange(model, data, config):
    """(body id, frame) of the site or body at the flange, z outwards, y along the fingers' way."""
    sites = {model.site(i).name: data.site(i) for i in range(model.nsite)}
    bodies = {model.body(i).name: data.body(i) for i in range(1, model.nbody)}
    named = {name: view for name, view in (bodies | sites).items() if name}
    flange = named[choose(config.site, named, "--site (a site or a body)")]
    is_site = config.site in sites
    body = model.site_bodyid[flange.id] if is_site else flange.id

    axes = re.fullmatch("(-?)([xyz]),(-?)([xyz])", config.axes or "z,y")
    if not axes or axes[2] == axes[4]:
        raise UserError(f"--axes {config.axes}: name two axes, such as z,y or x,-y")
    rotation = flange.xmat.reshape(3, 3)
    z = rotation[:, "xyz".index(axes[2])]
    y = rotation[:, "xyz".index(axes[4])]
    z = -z if axes[1] else z
    y = -y if axes[3] else y

    # What is not told is checked: the way from the last joint but one to the flange leads outwards.
    turning = [i for i in ancestors(model, body) if model.body_jntnum[i]]
    away = flange.xpos - data.xpos[turning[-2:][0]] if turning else z
    sideways = z @ away < 0.3 * np.linalg.norm(away)
    if not config.axes and (sideways or not is_site):
        axis = "xyz"[np.argmax(np.abs(away @ rotation))]
        raise UserError(
            f"is z of {config.site} outwards and y along the fingers' way? Say it with --axes z,y; "
            f"by the look of the arm it is {axis} that points away"
        )
    return body, frame(flange.xpos, np.column_stack([np.cross(y, z), y, z]))


def ancestors(model, body):
    """Body ids from the world's child to `body`."""
    path = []
    while body:
        path.insert(0, body)
        body = model.body_parentid[body]
    return path


def split_links(model, data, path, config):
    """[[body id]]: the base, then what each joint moves. UserError if they are no chain of hinges."""
    links = [[]]
    for body in path:
        joints = np.flatnonzero(model.jnt_bodyid == body)
        other = model.jnt_type[joints] != mujoco.mjtJoint.mjJNT_HINGE  # slides, balls, free bases
        if len(joints) > 1 or other.any():
            name = model.body(body).name
            raise UserError(f"body {name} must have one hinge joint or none, as all arms here")
        if len(joints):
            links.append([])
            refuse_what_is_lost(model, joints[0])
        links[-1].append(body)
    if len(links) < 6:  # the base and five joints
        raise UserError(
            f"{config.mjcf} has {len(links) - 1} joints before {config.site}: the tasks need five"
        )
    names = [model.body(i).name for i in links[0]]
    if config.base:
        first = names.index(choose(config.base, names, "fixed body"))
        links[0] = links[0][first:]  # what it stands on in the file is left out
    elif len(links[0]) > 1:
        if abs(data.xpos[links[0][-1], 2]) > 0.01:  # is it on a pedestal, or on a column?
            raise UserError(f"say with --base which stands on the table: {', '.join(names)}")
        links[0] = links[0][-1:]
    return links


def refuse_what_is_lost(model, joint):
    """UserError for a joint that is more than a hinge with a servo."""
    coupled = model.eq_type == mujoco.mjtEq.mjEQ_JOINT
    wrapped = model.wrap_type == mujoco.mjtWrap.mjWRAP_JOINT
    reasons = {
        "has a spring": np.any(model.jnt_stiffness[joint]),
        "is coupled to another": joint in model.eq_obj1id[coupled],
        "has another coupled to it": joint in model.eq_obj2id[coupled],
        "is pulled by a tendon": joint in model.wrap_objid[wrapped],
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"joint {model.joint(joint).name} {reason}: such arms cannot be kept")


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
    dofs = model.jnt_dofadr[joints]

    def torque(ctrl=0.0, angle=0.0, speed=0.0):
        data.qpos[model.jnt_qposadr[joints]] = angle
        data.qvel[dofs] = speed
        data.ctrl[:] = ctrl
        data.act[:] = ctrl  # what an integrated servo would have reached
        mujoco.mj_forward(model, data)
        return data.qfrc_actuator[dofs]  # a copy

    # Driven as far as it goes, and against a joint that is far away and fast, a servo gives all
    # that it has; a motor does so by its own limit of control.
    most = 1e8
    torques = np.sort([torque(-most, most, most), torque(most, -most, -most)], axis=0)
    limited = model.jnt_actfrclimited[joints]
    limits = np.where(limited, model.jnt_actfrcrange[joints].T, 0)
    torques = np.where(torques.any(0), torques, limits)  # what nothing drives has its own limit

    # Without limits of force a servo is linear: differences are its gains, zeros its targets.
    model.actuator_forcelimited[:] = 0
    model.jnt_actfrclimited[:] = 0
    rest = torque()
    kp = rest - torque(angle=1.0)
    kv = rest - torque(speed=1.0)
    ends = np.sort([torque(-most), torque(most)], axis=0)
    servo = kp > 0
    targets = np.where(servo, ends / np.where(servo, kp, 1), [[-most], [most]])

    default = np.where(servo, 0, [[-TORQUE], [TORQUE]])  # 0 0 is no limit in MJCF
    unlimited = (np.abs(torques) > 1e6) | (torques == 0)
    torques = np.where(unlimited, default, torques)
    kp = np.where(servo, kp, GAINS[0])
    kv = np.where(servo, kv, GAINS[1])
    return kp, kv, torques.T, targets.T


# ---- the new file: the gripper's own, with another arm under its hand


def add(parent, tag, **attributes):
    """A new element, with numbers as MJCF writes them; `frame` becomes pos and quat."""
    if "frame" in attributes:
        transform = attributes.pop("frame")
        quat = np.empty(4)
        mujoco.mju_mat2Quat(quat, transform[:3, :3].ravel())
        attributes |= {"pos": transform[:3, 3], "quat": quat}
    for name, value in attributes.items():
        if not isinstance(value, str):
            attributes[name] = " ".join(f"{number:.9g}" for number in np.ravel(value))
    return ET.SubElement(parent, tag, attributes)


def add_link(parent, chain, link, before, **attributes):
    """An element with masses and capsules of the bodies of `link`, and the world's frame in its.

    before: the world's frame in the parent's.
    """
    model, data = chain
    placed = frame_of(data.body(link[0]))
    here = np.linalg.inv(placed)
    element = add(parent, "body", frame=before @ placed, gravcomp="1", **attributes)
    # What is screwed on keeps its own mass, in a body of its own without a joint.
    for body in link:
        holder = element if body == link[0] else add(element, "body", gravcomp="1")
        mass = max(model.body_mass[body], 1e-6)
        moments = model.body_inertia[body] + 1e-6
        inertial = here @ frame(data.xipos[body], data.ximat[body])
        add(holder, "inertial", frame=inertial, mass=mass, diaginertia=moments)
    mine = np.isin(model.geom_bodyid, link)
    mine &= model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE
    solid = mine & (model.geom_contype > 0)  # what collides, if anything does
    geoms = np.flatnonzero(solid if solid.any() else mine)
    largest = sorted(geoms, key=lambda g: -model.geom_aabb[g, 3:].prod())
    for g in largest[:MOST_CAPSULES]:
        center, half = np.split(model.geom_aabb[g], 2)
        radius = np.sort(half)[:2].mean()  # the longest side is the capsule's axis
        way = np.eye(3)[half.argmax()] * max(half.max() - radius, 1e-4)
        placed = here @ frame_of(data.geom(g))
        start = placed @ [*(center - way), 1]
        end = placed @ [*(center + way), 1]
        if radius > 0.005:  # m; screws and labels are left out
            fromto = np.concatenate([start[:3], end[:3]])
            add(element, "geom", fromto=fromto.round(4), size=radius.round(4))
    return element, here


def write_arm(config, root):
    """Put the arm into `root`, the parsed file of the one whose gripper it gets; its first pose."""
    with reading(config.mjcf):
        model = mujoco.MjModel.from_xml_path(config.mjcf)
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    end, flange = find_flange(model, data, config)
    base, *links = split_links(model, data, ancestors(model, end), config)
    joints = model.body_jntadr[[link[0] for link in links]]

    hand = root.find(".//body[@name='hand']")
    if hand.find("camera") is None:
        hand_camera(get_robot(config.gripper).model, hand)
    world = root.find("worldbody")
    servos = root.find("actuator")
    contact = root.find("contact")
    fingers = servos[-1]
    for element in (world, servos, contact):
        element.clear()
    chain = (model, data)
    if base:
        before = np.linalg.inv(frame_of(data.body(base[0])))  # wherever it stood in the file
        body, before = add_link(world, chain, base, before, name="base", childclass="link")
    else:  # the first body turns: it stands on the floor of the world
        x, y, _ = data.xpos[links[0][0]]
        before = frame([-x, -y, 0], np.eye(3))
        body = add(world, "body", name="base", childclass="link")
    measured = zip(*measure_servos(model, joints), strict=True)
    for i, drive in enumerate(measured):
        body, before = add_link(body, chain, links[i], before, name=f"link{i + 1}")
        add_joint(body, servos, model, joints[i], f"joint{i + 1}", *drive)
    servos.append(fingers)
    placed = add(ET.Element("none"), "body", frame=before @ flange)
    hand.attrib |= placed.attrib
    body.append(hand)
    exclude_neighbors(contact, len(links))
    # a file's first key is its rest pose, as in MuJoCo Menagerie
    home = model.key_qpos[0] if model.nkey else model.qpos0
    return home[model.jnt_qposadr[joints]]


def add_joint(body, servos, model, joint, name, kp, kv, torques, targets):
    """A hinge and its servo, inside the joint's limits and the servo's."""
    low, high = targets
    if model.jnt_limited[joint]:
        low, high = np.clip(targets, *model.jnt_range[joint])
    limits = np.clip([low, high], -2 * np.pi, 2 * np.pi)
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
        servos,
        "position",
        joint=name,
        kp=kp,
        kv=kv,
        ctrlrange=limits,
        forcerange=torques,
    )


def hand_camera(model, hand):
    """Give the hand the wrist camera of its own arm, which is fixed to the flange there."""
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    seen = np.linalg.inv(frame_of(data.body("hand"))) @ frame_of(data.camera("wrist"))
    add(hand, "camera", name="wrist", fovy="90", frame=seen)


def exclude_neighbors(contact, dof):
    """Capsules overlap at their joints: only links more than three apart are checked."""
    links = ["base", *(f"link{i + 1}" for i in range(dof)), "hand"]
    pairs = [("left_finger", "right_finger")]
    for i, link in enumerate(links):
        pairs += [(link, other) for other in links[i + 1 : i + 4]]
    for link in links[-4:]:
        pairs += [("left_finger", link), ("right_finger", link)]
    for body1, body2 in pairs:
        add(contact, "exclude", body1=body1, body2=body2)


# ---- where the tasks take place


def point_down(kinematics, start, distance, height, side):
    """qpos (dof,) near `start` with the hand straight down there and no elbow in the table, or None.

    side: the closing axis points to the left (1) or the right (-1).
    """
    z = np.array([0, 0, -1.0])
    y = np.array([0, side, 0.0])
    rotation = np.column_stack([np.cross(y, z), y, z])
    qpos = kinematics.solve_ik(np.array([distance, 0, height]), rotation, start)
    links = [f"link{i + 2}" for i in range(len(start) - 1)]
    heights = [kinematics.data.body(link).xpos[2] for link in links]
    return None if qpos is None or min(heights) < 0.03 else qpos


def farthest(kinematics, qpos, distance, step, side):
    """The distance (m) up to which the hand points down at the table, in steps of `step`."""
    qpos = point_down(kinematics, qpos, distance, 0.02, side)
    while qpos is not None and distance > 0.15:
        distance += step
        qpos = point_down(kinematics, qpos, distance, 0.02, side)
    return distance - step


def find_workspace(robot):
    """{numeric: value} of the new arm's file: rest pose, reach, and where the tasks take place.

    The rest pose is the one, of many, that reaches far straight down and is plain: a radian from
    the middle of a joint's range costs as much as 5 cm of reach. UserError if none reaches.
    """
    kinematics = Kinematics(robot)
    low, high = np.clip(robot.joint_range.T, -np.pi, np.pi)  # one turn is enough to look at
    starts = np.random.default_rng(0).uniform(low, high, (40, robot.dof))
    lengths = [robot.model.body(f"link{i + 1}").pos for i in range(robot.dof)]
    span = np.linalg.norm(lengths, axis=1).sum()  # m, of the arm stretched out
    best = -np.inf
    near = far = 0.0
    for start in [robot.home, (low + high) / 2, *starts]:
        for side in (-1.0, 1.0):
            qpos = point_down(kinematics, start, 0.5 * span, 0.12 * span, side)
            if qpos is None:
                continue
            inner = farthest(kinematics, qpos, 0.5 * span, -0.01, side)
            outer = farthest(kinematics, qpos, 0.5 * span, 0.01, side)
            bent = np.abs(qpos - robot.joint_range.mean(axis=1)).max()
            score = outer - inner - 0.05 * bent
            if score > best:
                best = score
                near = inner
                far = outer
                home = qpos
                home_side = side
    if far - near < 0.2:
        raise UserError(
            "this arm's hand cannot point straight down along 0.2 m of the table; its first joint "
            f"is {lengths[0][2]:.2f} m above it: are --base, --site and --axes right?"
        )
    scale = min(1.0, round((far - near) / 0.53, 2))  # 1 for arms with 0.53 m, as the xArms
    center = far - 0.21 * scale
    # 20 cm above the near half of the region, at scale 1
    rest = point_down(kinematics, home, center - 0.05 * scale, 0.2 * scale, home_side)
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
    root.find(".//text").set("data", Path(config.mjcf).stem)

    def write(numbers):
        for name, value in numbers.items():
            text = " ".join(f"{number:.4g}" for number in np.ravel(value))
            root.find(f".//numeric[@name='{name}']").set("data", text)
        ET.indent(tree)
        tree.write(path)
        return Robot(config.name, path)

    # the workspace is found with the arm as it stands in the file
    speeds = [config.speed] * len(home)
    robot = write({"home": home, "velocity_limit": speeds})
    return write(find_workspace(robot))


def main():
    config = parse(AddConfig, description="Add your own arm, from its MJCF file.")
    if not config.mjcf or not config.name:
        raise UserError("say which arm: python -m data.add_robot --mjcf arm.xml --name my_arm")
    at_least(config, 0.01, "speed")
    choose(config.gripper, ROBOTS, "gripper")
    path = ARMS / f"{config.name}.xml"
    if not re.fullmatch("[a-z][a-z0-9_]*", config.name):
        raise UserError(f"--name {config.name}: lower-case letters, digits and underscores only")
    if path.exists():
        raise UserError(f"--name {config.name}: there is such a robot already; delete {path} first")
    with atomic(path) as temporary:  # a refusal leaves nothing behind
        robot = convert(config, temporary)
    near, far = robot.reach
    print(
        f"{config.name}: {robot.dof} joints, reaches {near:.2f} to {far:.2f} m straight down; tasks "
        f"around {robot.spawn_distance:.2f} m, scale {robot.scale}; its file is {path}"
    )
    if config.check:
        command = [sys.executable, "eval.py", "expert", "--robots", config.name, "--episodes", "5"]
        subprocess.run(command, cwd=ARMS.parent.parent, check=False)


if __name__ == "__main__":
    run(main)
