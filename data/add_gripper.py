"""An arm's own gripper, for data/add_robot.py: two fingers that slide toward each other.

The collision geoms of each finger are kept as in the file: shape, friction, condim, solref, solimp,
priority, margin, gap and solmix; of a mesh its convex hull, because MuJoCo collides nothing else.
So are the masses, the travel, and the stiffness, force and friction of the joints. The table's own
contact options apply to every arm: elliptic cones, impratio 10.

The hand's frame is that of the other arms' files: z points out of the hand, y along the opening
motion of the left finger, and at position 0 the face of each fingertip is in the middle.
"""

import xml.etree.ElementTree as ET
from dataclasses import dataclass

import numpy as np

from data.simulator import mujoco

TIP = 0.015  # m; length of a fingertip, where its face and the middle are measured
TCP = 0.01  # m, from the end of the fingers back to the tool's position
DAMPING = 0.075  # s; least damping of a finger's joint over its stiffness, to avoid chatter
CONTACT = ("friction", "condim", "solref", "solimp", "priority", "margin", "gap", "solmix")
SIDES = ("left", "right")


@dataclass
class Gripper:
    """The gripper that was found; lengths in m, in the hand's frame."""

    hand: int  # id of the body that carries both fingers
    fingers: list  # ids of the bodies of the left and the right finger
    axes: np.ndarray  # (3, 3), columns x, y, z of the hand's frame in the frame of that body
    tcp: np.ndarray  # (3,) the tool's position
    poses: list  # of each finger at 0: (pos (3,), quat (4,), opening direction (3,) in its frame)
    ranges: np.ndarray  # (2,) lowest and highest position of either finger


# ---- elements of the new file


def to_text(numbers):
    """A number or an array as the text of an attribute."""
    return " ".join(f"{number:.9g}" for number in np.ravel(numbers))


def add(parent, tag, **attributes):
    """Add an element, whose attributes are text or numbers."""
    element = ET.SubElement(parent, tag)
    for name, value in attributes.items():
        element.set(name, value if isinstance(value, str) else to_text(value))
    return element


def add_inertial(body, model, i):
    """Give `body` the mass and inertia of the file's body `i`."""
    add(
        body,
        "inertial",
        pos=model.body_ipos[i],
        quat=model.body_iquat[i],
        mass=model.body_mass[i],
        diaginertia=model.body_inertia[i] + 1e-6,  # a flat one could be refused after rounding
    )


# ---- what is in the user's file


def below(model, body):
    """Ids of `body` and all its descendants, parents first."""
    found = [body]
    for i in range(body + 1, model.nbody):
        if model.body_parentid[i] in found:
            found.append(i)
    return found


def pads_of(model, finger):
    """Ids of a finger's collision geoms; all its geoms if it has none."""
    geoms = np.flatnonzero(np.isin(model.geom_bodyid, below(model, finger)))
    touches = (model.geom_contype | model.geom_conaffinity)[geoms] > 0
    return geoms[touches] if touches.any() else geoms


def corners(model, geom):
    """(n, 3) m in the geom's frame: a mesh's convex hull; otherwise the corners of its box."""
    if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_MESH:
        center, half = np.split(model.geom_aabb[geom], 2)
        signs = np.stack(np.meshgrid(*[(-1, 1)] * 3), axis=-1)  # (2, 2, 2, 3)
        return center + signs.reshape(8, 3) * half
    mesh = model.geom_dataid[geom]
    first = model.mesh_vertadr[mesh]
    points = model.mesh_vert[first:][: model.mesh_vertnum[mesh]]
    start = model.mesh_graphadr[mesh]
    if start < 0:  # MuJoCo builds no hull for a mesh that does not collide
        return points
    # the graph: numbers of vertices and faces, an address per vertex, then the vertex ids
    count = model.mesh_graph[start]
    ids = model.mesh_graph[start + 2 + count :][:count]
    return points[ids]


def outline(model, data, finger):
    """(n, 3) m in the world frame: points around all collision geoms of a finger."""
    points = []
    for geom in pads_of(model, finger):
        turned = data.geom_xmat[geom].reshape(3, 3)
        from_center = corners(model, geom) @ turned.T
        points.append(data.geom_xpos[geom] + from_center)
    return np.concatenate(points)


def why_not(model, moving):
    """Why the moving bodies behind the flange cannot be kept as two fingers; "" if they can."""
    joints = model.body_jntadr[moving]
    kinds = model.jnt_type[joints]
    slides = np.sum(kinds == mujoco.mjtJoint.mjJNT_SLIDE)
    reasons = {
        "the file has none behind --site": not moving,
        "its joints neither turn nor slide": slides < len(moving),
        f"its own gripper has {slides} fingers": slides != 2,
        "its fingers slide on two bodies": len(set(model.body_parentid[moving])) > 1,
        "its fingers have no range": not all(model.jnt_limited[joints]),
        "its fingers have no geoms": not all(len(pads_of(model, body)) for body in moving),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def hand_axes(model, data, hand, y, middle):
    """(3, 3): columns x, y and z of the hand's frame in the world.

    z is the axis of the hand's body that best matches the direction from the wrist to `middle`,
    between the fingers.
    """
    # the body of the arm's last joint
    wrist = hand
    while wrist and not model.body_jntnum[wrist]:
        wrist = model.body_parentid[wrist]
    out = middle - data.xpos[wrist]
    out -= y * (out @ y)
    frame = data.xmat[hand].reshape(3, 3)
    along = out @ frame
    best = np.abs(along).argmax()
    side = np.sign(along[best])
    z = side * frame[:, best]
    # the fingers may slide at an angle to the body's axes
    z -= y * (z @ y)
    z /= np.linalg.norm(z)
    x = np.cross(y, z)
    return np.column_stack([x, y, z])


def find_gripper(model, body):
    """The Gripper behind the flange's body and "", or None and the reason why it cannot be kept."""
    moving = [i for i in below(model, body)[1:] if model.body_jntnum[i]]
    reason = why_not(model, moving)
    if reason:
        return None, reason
    joints = model.body_jntadr[moving]
    data = mujoco.MjData(model)
    # half open: at joint position zero the fingers may be anywhere
    data.qpos[model.jnt_qposadr[joints]] = model.jnt_range[joints].mean(axis=1)
    mujoco.mj_kinematics(model, data)
    y, other = data.xaxis[joints]
    if abs(y @ other) < 0.99:
        return None, "its fingers do not slide along one line"
    # the collision geoms tell which finger is which, and where it is
    points = [outline(model, data, finger) for finger in moving]
    left, right = (part.mean(axis=0) for part in points)
    y = y * np.sign(y @ (left - right))  # the first finger is the left one
    hand = model.body_parentid[moving[0]]
    middle = (left + right) / 2
    axes = hand_axes(model, data, hand, y, middle)

    sides = np.array([1, -1])
    ways = np.ptp(model.jnt_range[joints], axis=1)  # m, travel of each finger
    shifts = -sides * ways / 2  # m along y, from half open to closed
    tips = []  # tip points of each finger, closed, in the hand's frame
    for part, shift in zip(points, shifts, strict=True):
        part = (part - data.xpos[hand]) @ axes
        part[:, 1] += shift
        ends = part[:, 2] > part[:, 2].max() - TIP
        tips.append(part[ends])
    # a held object touches the innermost points of both tips
    left_face = tips[0][:, 1].min()
    right_face = tips[1][:, 1].max()
    center = (left_face + right_face) / 2
    ends = np.vstack(tips)
    low = ends.min(axis=0)
    high = ends.max(axis=0)
    x = (low[0] + high[0]) / 2
    tcp = np.array([x, center, high[2] - TCP])

    # at 0 the faces meet there, even if the file's fingers do not travel so far
    shifts += center - np.array([left_face, right_face])
    poses = []
    for finger, shift, side in zip(moving, shifts, sides, strict=True):
        pos = (data.xpos[finger] - data.xpos[hand]) @ axes
        pos[1] += shift
        turned = data.xmat[finger].reshape(3, 3)
        quat = np.empty(4)
        mujoco.mju_mat2Quat(quat, (axes.T @ turned).ravel())
        poses.append((pos, quat, side * y @ turned))
    apart = max(0.0, (left_face - right_face) / 2)  # faces that overlap when closed meet earlier
    ranges = np.array([apart, apart + ways.min()])
    frame = data.xmat[hand].reshape(3, 3)
    axes = frame.T @ axes
    return Gripper(hand, moving, axes, tcp, poses, ranges), ""


# ---- writing the new file


def add_geom(body, assets, model, geom, name, points):
    """A geom with the file's contact options; a mesh becomes the convex hull of `points`."""
    options = {option: getattr(model, f"geom_{option}")[geom] for option in CONTACT}
    kind = mujoco.mjtGeom(model.geom_type[geom])
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        options["mesh"] = f"{name}_hull"
        add(
            assets,
            "mesh",
            name=f"{name}_hull",
            vertex=points,
            inertia="convex",
        )
    else:
        options["size"] = model.geom_size[geom]
    # in the body's frame, as compiled: MuJoCo moves a mesh to its center of mass
    options["type"] = kind.name.removeprefix("mjGEOM_").lower()
    options["pos"] = model.geom_pos[geom]
    options["quat"] = model.geom_quat[geom]
    return add(body, "geom", name=name, **options)


def add_finger(hand, assets, model, gripper, side, stiffness, damping):
    """One finger, 0 left or 1 right, and its child bodies. Its joint in N/m and N s/m."""
    name = SIDES[side]
    finger = gripper.fingers[side]
    pos, quat, way = gripper.poses[side]
    joint = model.body_jntadr[finger]
    dof = model.jnt_dofadr[joint]
    damping = max(damping + model.dof_damping[dof], DAMPING * stiffness)
    pads = list(pads_of(model, finger))  # visual geoms are left out
    bodies = {}
    for i in below(model, finger):
        if i == finger:
            body = add(hand, "body", name=f"{name}_finger", pos=pos, quat=quat)
            body.set("childclass", "finger")
        else:
            parent = bodies[model.body_parentid[i]]
            body = add(parent, "body", name=f"part{i}")
            body.set("pos", to_text(model.body_pos[i]))
            body.set("quat", to_text(model.body_quat[i]))
        body.set("gravcomp", "1")
        bodies[i] = body
        add_inertial(body, model, i)
    add(
        bodies[finger],
        "joint",
        name=f"{name}_finger",
        axis=way,
        range=gripper.ranges,
        armature=max(model.dof_armature[dof], 0.05),
        damping=damping,
        frictionloss=model.dof_frictionloss[dof],
    )
    for number, geom in enumerate(pads):
        body = bodies[model.geom_bodyid[geom]]
        pad = f"{name}_pad{number or ''}"
        add_geom(body, assets, model, geom, pad, corners(model, geom))


def place_tool(hand, tcp):
    """Remove the fingers from the new file's body `hand`, and move its tool to `tcp` (3,) m."""
    camera = hand.find("camera")
    tool = hand.find("site")
    # keep the camera's view of the tool as in the other arms
    eye, old_tcp = (np.array(part.get("pos").split(), float) for part in (camera, tool))
    for part in list(hand):
        if part.tag in ("body", "geom", "inertial"):
            hand.remove(part)
    eye = tcp + (eye - old_tcp)
    tool.set("pos", to_text(tcp))
    camera.set("pos", to_text(eye))


def add_gripper(hand, root, model, gripper, servos):
    """Put the gripper into the new file's body `hand`, replacing what is there.

    servos: for each finger a row kp N/m, kv N s/m, force N, ... as measured; zeros: no servo.
    """
    place_tool(hand, gripper.tcp)
    servo = root.find("actuator/position[@tendon='fingers']")
    servo.set("ctrlrange", to_text([-0.01, gripper.ranges[1]]))
    kp, kv, force = servos[:, :3].sum(axis=0)  # one servo may drive both fingers
    if kp > 0:
        unlimited = np.any((servos[:, 0] > 0) & (servos[:, 2] == 0))
        force = 0.0 if unlimited else force  # in MJCF 0 0 means no limit
        limits = [-force, force]
        servo.set("kp", to_text(kp))
        servo.set("forcerange", to_text(limits))
    stiffness = float(servo.get("kp")) / 2  # of each finger
    assets = add(root, "asset")
    for side in range(2):
        add_finger(hand, assets, model, gripper, side, stiffness, kv / 2)
