"""An arm's own gripper whose jaws turn, for data/add_robot.py.

Either one jaw is fixed and one turns, as the SO-101's, or two turn against each other, as those of
Robotiq's linkages. All below the hand is kept as it is in the file: links, hinges, springs,
tendons, equalities and the servo. What touches things are the pads, with their contact options:
the boxes (or other plain shapes) of a jaw; where it has none, its meshes, cut into slices 1 cm
long. A mesh's one convex hull, as MuJoCo has it, fills the space between the jaws.

States and actions have the opening (m, half the way between the pads), as of fingers that slide.
What the servo's control and the joints are at some opening is tabulated, from the model itself: it
is driven from one end of its range to the other.
"""

import xml.etree.ElementTree as ET
from dataclasses import dataclass

import numpy as np

from data.add_gripper import (
    TCP,
    TIP,
    add,
    add_geom,
    add_inertial,
    below,
    corners,
    hand_axes,
    place_tool,
)
from data.robots import FORCE, SQUEEZE
from data.simulator import mujoco

PREFIX = "jaws/"  # of all names that come from the file
PLACES = 21  # rows of the table
SETTLE = 400  # steps of 2 ms, until the servo is at its next place
WIDE = 0.04  # m; the tasks need no larger opening, and a jaw that turns far leaves the table
LEAST = 0.027  # m; the peg is 0.05 m wide
CUBE = 0.02  # m; at this opening the tool's place and the closing axis are measured
MARGIN = 0.003  # m; so much nearer to a cube than the table says its jaws may touch it
CLEARANCE = 0.006  # m, of a jaw that does not move, from a cube that is in the middle
REACH = 0.05  # m; what is so far behind the end of the jaws touches nothing
SLICE = 0.01  # m
CORNERS = 24  # of a slice, at most
KP = 20.0  # N m/rad, of a jaw whose file has no servo: about that of Feetech's STS3215
KV = 1.0  # N m s/rad
TORQUE = 3.0  # N m
KEPT = ("default", "tendon", "equality", "actuator")  # sections that belong to the jaws
SHAPELESS = ("default", "joint", "general", "tendon", "equality")  # defaults that are still needed


@dataclass
class Pad:
    """What of a jaw can be touched, or at least be seen."""

    geom: int
    points: np.ndarray  # (n, 3) m, in the geom's frame: around it
    sliced: bool  # a part of a mesh


@dataclass
class Jaws:
    """What was found; lengths in m, rotations and places in the frame of the hand's body."""

    hand: int  # id, in the file's model, of the body that carries the jaws
    axes: np.ndarray  # (3, 3), columns x, y, z of the hand's frame
    tcp: np.ndarray  # (3,) the tool's place, in the hand's frame
    spec: object  # the hand alone
    model: object  # and compiled
    pads: list  # of the left and of the right jaw: Pads
    seen: list  # Pads that nothing touches
    fixed: bool  # whether the right jaw is a part of the hand
    openings: np.ndarray  # (K,) m, increasing
    controls: np.ndarray  # (K,) of the servo
    places: np.ndarray  # (K, n) rad, of the joints
    stiffness: float  # N/m, of either jaw at a cube
    fist: float  # m along y, from the tool's place to where the jaws close


# ---- the hand alone


def cut_out(spec, hand):
    """(MjSpec, MjModel) of body `hand` without its own joint, and of all that hangs on it."""
    alone = mujoco.MjSpec()
    for option in (name for name in dir(alone.option) if name[0] != "_"):
        setattr(spec.option, option, getattr(alone.option, option))  # else it warns
    spec.visual.map.znear = alone.visual.map.znear
    spec.njmax = alone.njmax
    spec.nconmax = alone.nconmax
    whole = next(body for body in spec.bodies if body.id == hand)
    root = alone.worldbody.add_frame().attach_body(whole, PREFIX, "")
    for joint in list(root.joints):
        for actuator in list(alone.actuators):
            if actuator.target == joint.name:
                alone.delete(actuator)
        alone.delete(joint)
    for number, body in enumerate(alone.bodies[1:]):
        body.name = body.name or f"{PREFIX}{number}"
    if not alone.actuators and len(alone.joints) == 1:  # as in a URDF
        add_servo(alone, alone.joints[0])
    return alone, alone.compile()


def add_servo(spec, joint):
    """A hobby servo for the one joint of a jaw whose file has none."""
    servo = spec.add_actuator(name=f"{PREFIX}servo", target=joint.name)
    servo.trntype = mujoco.mjtTrn.mjTRN_JOINT
    servo.set_to_position(kp=KP, kv=KV)
    servo.ctrlrange = joint.range
    servo.forcerange = (-TORQUE, TORQUE)


def why_not(model):
    """Why the jaws of a hand alone cannot be kept; "" if they may be."""
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    hinges = model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE
    parallel = np.abs(data.xaxis @ data.xaxis[0]) > 0.99
    affine = model.actuator_biastype == mujoco.mjtBias.mjBIAS_AFFINE
    reasons = {
        "its jaws both turn and slide": not hinges.all(),
        "its joints do not turn about one direction": not parallel.all(),
        f"its own has {model.nu} servos": model.nu != 1,
        "its servo holds no position": not affine.all(),
        "its servo has no range": not model.actuator_ctrllimited.all(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def sweep(model):
    """(controls (K,), places (K, n)): where the joints settle as the servo goes along its range."""
    model.opt.gravity[:] = 0
    model.opt.disableflags = mujoco.mjtDisableBit.mjDSBL_CONTACT
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    model.opt.timestep = 0.002  # s
    data = mujoco.MjData(model)
    friction = model.dof_frictionloss.copy()
    damping = model.dof_damping.copy()
    model.dof_frictionloss[:] = 0  # else it stops short
    model.dof_damping += np.minimum(friction, 1.0)  # N m s/rad, else it may swing
    controls = np.linspace(*model.actuator_ctrlrange[0], PLACES)
    places = []
    for control in (controls[0], *controls):  # it begins anywhere
        data.ctrl[:] = control
        for _ in range(SETTLE):
            mujoco.mj_step(model, data)
        places.append(data.qpos.copy())
    model.dof_frictionloss[:] = friction
    model.dof_damping[:] = damping
    return controls, np.array(places[1:])


def pose(model, place):
    """MjData with the joints at a place (n,)."""
    data = mujoco.MjData(model)
    data.qpos[:] = place
    mujoco.mj_kinematics(model, data)
    return data


def around(model, data, pad, axes):
    """(n, 3) m: the points of a Pad, in the hand's frame."""
    turned = data.geom_xmat[pad.geom].reshape(3, 3)
    points = data.geom_xpos[pad.geom] + pad.points @ turned.T
    return (points - data.xpos[1]) @ data.xmat[1].reshape(3, 3) @ axes


# ---- which is the left jaw, which is closed, where is ahead


def split(model, places):
    """(left, right) ids of the geoms that touch things, and whether the first place is closed.

    The left ones move on; the right ones move the other way, or if none does, they stay.
    """
    first, last = (pose(model, places[i]).geom_xpos for i in (0, -1))
    touches = (model.geom_contype | model.geom_conaffinity) > 0
    if not touches.any():  # as in a URDF that has pictures alone
        return None
    ways = (last - first) * touches[:, None]
    on = ways @ ways[np.linalg.norm(ways, axis=1).argmax()]
    left = np.flatnonzero(on > 1e-6)
    right = np.flatnonzero(on < -1e-6)
    fixed = not len(right)
    if fixed:
        right = np.flatnonzero(touches & (on == 0))
    if not len(left) or not len(right):
        return None
    apart = [np.linalg.norm(at[left].mean(axis=0) - at[right].mean(axis=0)) for at in (first, last)]
    return left, right, fixed, apart[0] < apart[1]


def jaw_axes(model, hand, alone, closed, left, right, fixed):
    """(3, 3): columns x, y and z of the hand's frame in that of its body. x is what jaws turn about."""
    here = closed.xmat[1].reshape(3, 3)
    moving = left if fixed else np.append(left, right)
    middle = (closed.geom_xpos[moving].mean(axis=0) - closed.xpos[1]) @ here
    x = closed.xaxis[0] @ here
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    there = data.xmat[hand].reshape(3, 3)
    ahead = hand_axes(model, data, hand, there @ x, data.xpos[hand] + there @ middle)
    z = there.T @ ahead[:, 2]
    y = np.cross(z, x)
    centers = [closed.geom_xpos[side].mean(axis=0) for side in (left, right)]
    side = np.sign((centers[0] - centers[1]) @ here @ y)
    return np.column_stack([side * x, side * y, z])


# ---- what is touched


def slices(model, geom, way):
    """[(n, 3)] m in the geom's frame: points around the parts of a mesh, cut across `way` (3,)."""
    mesh = model.geom_dataid[geom]
    points = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
    faces = model.mesh_face[model.mesh_faceadr[mesh] :][: model.mesh_facenum[mesh]]
    edges = np.vstack([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    start, end = points[edges].transpose(1, 0, 2)  # (edges, 3) each
    low = start @ way
    rise = end @ way - low
    cuts = np.arange((points @ way).min(), (points @ way).max() + SLICE, SLICE)
    parts = []
    for bottom, top in zip(cuts[:-1], cuts[1:], strict=True):
        inside = points[(points @ way >= bottom) & (points @ way <= top)]
        part = [inside]
        for height in (bottom, top):
            # where edges pass through the plane of a cut
            share = (height - low) / np.where(rise == 0, np.inf, rise)
            crosses = (share > 0) & (share < 1)
            part.append(start[crosses] + share[crosses, None] * (end - start)[crosses])
        part = np.vstack(part)
        if len(part) > 3 and np.ptp(part, axis=0).min() > 1e-4:  # else it is flat
            parts.append(part)
    return hulls(parts)


def hulls(parts):
    """[(n, 3)] m: of every part (n, 3) the corners of its convex hull, the most prominent ones."""
    spec = mujoco.MjSpec()
    for number, part in enumerate(parts):
        inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_CONVEX
        mesh = spec.add_mesh(name=str(number), uservert=part.ravel(), inertia=inertia)
        mesh.maxhullvert = CORNERS
        kind = mujoco.mjtGeom.mjGEOM_MESH
        spec.worldbody.add_geom(type=kind, meshname=mesh.name)
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    found = []
    for geom in range(model.ngeom):
        turned = data.geom_xmat[geom].reshape(3, 3)
        found.append(data.geom_xpos[geom] + corners(model, geom) @ turned.T)
    return found


def pads_of(model, data, geoms, axes, end):
    """(Pads that touch, Pads that are only seen) of a jaw's geoms; its end is at z `end` (m)."""
    plain = []
    cut = []
    others = []
    for geom in geoms:
        pad = Pad(geom, corners(model, geom), False)
        if around(model, data, pad, axes)[:, 2].max() < end - REACH:
            pad.points = hulls([pad.points])[0]
            others.append(pad)
        elif model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_MESH:
            plain.append(pad)
        else:
            # across the jaw as it is when closed, whose length is along z
            way = data.geom_xmat[geom].reshape(3, 3).T @ data.xmat[1].reshape(3, 3) @ axes[:, 2]
            cut += [Pad(geom, part, True) for part in slices(model, geom, way)]
    return (plain, cut + others) if plain else (cut, others)


def measure(model, place, pads, axes):
    """(faces (2,) m: y of the left and the right jaw's, points (n, 3) m around the ends of both)."""
    data = pose(model, place)
    sides = []
    for side in pads:
        sides.append(np.vstack([around(model, data, pad, axes) for pad in side]))
    end = min(points[:, 2].max() for points in sides)
    left, right = (points[points[:, 2] > end - TIP] for points in sides)
    faces = np.array([left[:, 1].min(), right[:, 1].max()])
    return faces, np.vstack([left, right])


def find_jaws(spec, model, body):
    """The Jaws behind the flange's body and "", or None and the reason why none can be kept."""
    moving = [i for i in below(model, body)[1:] if model.body_jntnum[i]]
    first = [i for i in moving if not set(moving) & set(parents(model, i))]
    hands = {model.body_parentid[i] for i in first}
    if len(hands) != 1:
        return None, "its jaws turn on several bodies" if hands else "the file has none"
    hand = hands.pop()
    spec, alone = cut_out(spec, hand)
    reason = why_not(alone)
    if reason:
        return None, reason
    controls, places = sweep(alone)
    found = split(alone, places)
    if found is None:
        return None, "its jaws have nothing that touches things"
    left, right, fixed, increasing = found
    if not increasing:
        controls = controls[::-1]
        places = places[::-1]
    closed = pose(alone, places[0])
    axes = jaw_axes(model, hand, alone, closed, left, right, fixed)
    ends = [around(alone, closed, Pad(g, corners(alone, g), False), axes) for g in left]
    end = max(points[:, 2].max() for points in ends)
    touched, seen = zip(*[pads_of(alone, closed, side, axes, end) for side in (left, right)])
    if not all(touched):
        return None, "its jaws have nothing at their ends that touches things"
    rows = [measure(alone, place, touched, axes) for place in places]
    gaps = np.array([faces[0] - faces[1] for faces, _ in rows])
    rising = np.append(True, np.diff(np.maximum.accumulate(gaps)) > 1e-6)
    openings = gaps[rising] / 2
    jaws = Jaws(hand, axes, None, spec, alone, touched, sum(seen, []), fixed, openings, None, None, 0, 0)
    jaws.controls = controls[rising]
    jaws.places = places[rising]
    if openings[-1] < LEAST or openings[0] > CUBE:
        span = f"from {2 * openings[0]:.3f} to {2 * openings[-1]:.3f} m"
        return None, f"its jaws open {span}"
    jaws.tcp = tool_place(jaws, rows)
    jaws.stiffness = stiffness(jaws)
    faces, _ = measure(alone, at(jaws, 0.0)[1], touched, axes)
    jaws.fist = faces.mean() - jaws.tcp[1]
    return jaws, ""


def parents(model, body):
    """Ids of all bodies that a body hangs on."""
    found = []
    while body:
        body = model.body_parentid[body]
        found.append(body)
    return found


def at(jaws, opening):
    """(control, place (n,)) at an opening (m)."""
    control = np.interp(opening, jaws.openings, jaws.controls)
    place = [np.interp(opening, jaws.openings, column) for column in jaws.places.T]
    return control, np.array(place)


def tool_place(jaws, rows):
    """(3,) m, in the hand's frame: between the pads around a cube, behind all that sticks out."""
    _, place = at(jaws, CUBE)
    faces, ends = measure(jaws.model, place, jaws.pads, jaws.axes)
    middle = faces.mean()
    if jaws.fixed:  # it shall not scrape along what the open hand comes down around
        middle = faces[1] + CUBE + CLEARANCE
    deepest = max(
        points[:, 2].max()
        for faces, points in rows
        if 0 <= faces[0] - faces[1] <= 2 * WIDE
    )
    x = (ends[:, 0].min() + ends[:, 0].max()) / 2
    return np.array([x, middle, deepest - TCP])


def stiffness(jaws):
    """N/m: how the force of either pad grows when the servo is sent further in than a cube lets it.

    Up to FORCE; what friction in the joints takes away does not arrive. The work of the servo is
    that of the pads.
    """
    step = 0.001
    _, place = at(jaws, CUBE)
    _, further = at(jaws, CUBE - step)
    way = (further - place) / step / 2  # rad/m, of a joint, for either pad
    data = mujoco.MjData(jaws.model)
    for target in np.arange(CUBE, SQUEEZE, -step / 4):
        data.qpos[:] = place
        data.ctrl[:] = at(jaws, target)[0]
        mujoco.mj_forward(jaws.model, data)
        force = data.qfrc_actuator @ way - jaws.model.dof_frictionloss @ np.abs(way)
        if force >= FORCE:
            break
    return FORCE / max(MARGIN, CUBE - target)


# ---- into the new file


def clean(root):
    """Take out of the XML of the hand alone what is not of its joints; {name: body's element}."""
    for default in root.iter("default"):
        for part in [part for part in default if part.tag not in SHAPELESS]:
            default.remove(part)
    bodies = {}
    for body in root.iter("body"):
        bodies[body.get("name")] = body
        for part in [part for part in body if part.tag not in ("body", "joint")]:
            body.remove(part)
    return bodies


def add_pad(bodies, assets, model, pad, name):
    """A Pad's geom, in its body."""
    body = bodies[model.body(model.geom_bodyid[pad.geom]).name]
    geom = add_geom(body, assets, model, pad.geom, name, pad.points)
    geom.set("class", "finger")
    return geom


def add_jaws(hand, root, jaws):
    """Put the jaws into the new file's body `hand`, in place of the fingers there."""
    place_tool(hand, jaws.tcp)
    source = ET.fromstring(jaws.spec.to_xml())
    bodies = clean(source)
    frame = add(hand, "frame", xyaxes=jaws.axes[:2])  # the hand's body's own
    model = jaws.model
    names = [model.body(i).name for i in range(1, model.nbody)]
    for child in bodies[names[0]].findall("body"):
        frame.append(child)
    bodies[names[0]] = frame
    for name in names[1:]:
        bodies[name].set("gravcomp", "1")
        add_inertial(bodies[name], model, model.body(name).id)

    assets = add(root, "asset")
    named = [(name, pad) for name, side in zip(("left_pad", "right_pad"), jaws.pads) for pad in side]
    for number, (name, pad) in enumerate(named):
        add_pad(bodies, assets, model, pad, f"{name}{number or ''}")
    for number, pad in enumerate(jaws.seen):
        geom = add_pad(bodies, assets, model, pad, f"seen{number}")
        geom.set("contype", "0")
        geom.set("conaffinity", "0")
    for tag in ("tendon", "equality"):
        root.remove(root.find(tag))
    for section in source:
        if section.tag in KEPT:
            root.append(section)
    wide = min(WIDE, jaws.openings[-1])
    openings = [*jaws.openings[jaws.openings < wide], wide]
    controls, places = zip(*[at(jaws, opening) for opening in openings])
    custom = root.find("custom")
    add(custom, "numeric", name="jaw_openings", data=openings)
    add(custom, "numeric", name="jaw_controls", data=controls)
    add(custom, "numeric", name="jaw_angles", data=places)
    add(custom, "numeric", name="jaw_stiffness", data=jaws.stiffness)
    add(custom, "numeric", name="jaw_fist", data=jaws.fist)
