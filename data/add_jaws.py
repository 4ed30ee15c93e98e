"""An arm's own gripper with jaws that turn, for data/add_robot.py.

Either one jaw turns against a fixed one, as in the SO-101, or two turn against each other, as in
Robotiq's linkages. Everything below the hand is kept as in the file: links, hinges, springs,
tendons, equalities and the servo. The collision geoms are the pads, with their contact options: the
boxes (or other primitive shapes) of a jaw or, if it has none, its meshes, cut into slices 1 cm
long. The single convex hull that MuJoCo makes of a mesh would fill the space between the jaws.

State and action contain the opening (m, half the distance between the pads), as for fingers that
slide. A table gives the servo's control and the joint angles for each opening. It is computed from
the model, by driving the servo from one end of its range to the other.
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

PREFIX = "jaws/"  # prefix of all names that come from the file
PLACES = 21  # rows of the table
SETTLE = 400  # steps of 2 ms until the servo has settled at its next position
WIDE = 0.04  # m; the tasks need no larger opening
WIDE_ALONE = 0.033  # m, if only one jaw opens, which then moves twice as far to its side
LEAST = 0.027  # m; the widest opening must be at least this, because the peg is 0.05 m wide
CUBE = 0.02  # m; the opening at which the tool's position and the closing axis are measured
MARGIN = 0.003  # m; the jaws may touch a cube this much later than the table says
CLEARANCE = 0.006  # m, from a jaw that does not move to a cube in the middle
REACH = 0.05  # m; geoms that end this far behind the end of the jaws do not collide
SLICE = 0.01  # m, thickness
CORNERS = 24  # corners of a slice, at most
KP = 20.0  # N m/rad, for a jaw whose file has no servo: roughly Feetech's STS3215
KV = 1.0  # N m s/rad
TORQUE = 3.0  # N m
KEPT = ("default", "tendon", "equality", "actuator")  # sections of the file that belong to the jaws
SHAPELESS = ("default", "joint", "general", "tendon", "equality")  # defaults that are still needed


@dataclass
class Pad:
    """A convex part of a jaw."""

    geom: int  # the geom that it is a part of
    points: np.ndarray  # (n, 3) m, its corners in the geom's frame


@dataclass
class Jaws:
    """The jaws that were found, in a model of the hand alone; m, in the hand's frame."""

    hand: int  # id of the body that carries the jaws, in the file's model
    spec: mujoco.MjSpec  # that body and its descendants
    model: mujoco.MjModel
    controls: np.ndarray  # (K,) of the servo, from closed to open
    places: np.ndarray  # (K, n) rad: where the joints settle
    left: np.ndarray  # ids of the geoms of the jaw that turns, or of one of the two
    right: np.ndarray  # ids of the other jaw's geoms
    fixed: bool  # whether the other jaw is part of the hand
    axes: np.ndarray = None  # (3, 3), columns x, y, z of the hand's frame in the frame of its body
    pads: list = None  # of the left and of the right jaw: Pads that collide
    seen: list = None  # Pads that are only visual
    openings: np.ndarray = None  # (K,) m, increasing
    tcp: np.ndarray = None  # (3,) the tool's position
    stiffness: float = 0.0  # N/m, of each jaw at a cube
    fist: float = 0.0  # m along y, from the tool's position to where the jaws close


# ---- the hand alone


def cut_out(spec, hand):
    """(MjSpec, MjModel) of body `hand`, without its own joint, and all its descendants."""
    alone = mujoco.MjSpec()
    for option in (name for name in dir(alone.option) if name[0] != "_"):
        setattr(spec.option, option, getattr(alone.option, option))  # avoids warnings
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
    # names, to find the bodies again later
    for number, body in enumerate(alone.bodies[1:]):
        body.name = body.name or f"{PREFIX}{number}"
    if not alone.actuators and len(alone.joints) == 1:  # as in a URDF
        add_servo(alone, alone.joints[0])
    return alone, alone.compile()


def add_servo(spec, joint):
    """Add a hobby servo to a jaw's only joint, if the file has no actuator."""
    servo = spec.add_actuator(name=f"{PREFIX}servo", target=joint.name)
    servo.trntype = mujoco.mjtTrn.mjTRN_JOINT
    servo.set_to_position(kp=KP, kv=KV)
    servo.ctrlrange = joint.range
    servo.forcerange = (-TORQUE, TORQUE)


def why_not(model):
    """Why the jaws of a hand cannot be kept; "" if they can."""
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
    """(controls (K,), places (K, n)): where the joints settle along the servo's range."""
    model.opt.gravity[:] = 0
    model.opt.disableflags = mujoco.mjtDisableBit.mjDSBL_CONTACT
    model.opt.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    model.opt.timestep = 0.002  # s
    data = mujoco.MjData(model)
    friction = model.dof_frictionloss.copy()
    damping = model.dof_damping.copy()
    model.dof_frictionloss[:] = 0  # otherwise the joints stop short
    model.dof_damping += np.minimum(friction, 1.0)  # N m s/rad; otherwise they may oscillate
    controls = np.linspace(*model.actuator_ctrlrange[0], PLACES)
    places = []
    for control in (controls[0], *controls):  # the first control twice: it may start anywhere
        data.ctrl[:] = control
        for _ in range(SETTLE):
            mujoco.mj_step(model, data)
        places.append(data.qpos.copy())
    model.dof_frictionloss[:] = friction
    model.dof_damping[:] = damping
    return controls, np.array(places[1:])


def pose(model, place):
    """MjData with the joints at `place` (n,)."""
    data = mujoco.MjData(model)
    data.qpos[:] = place
    mujoco.mj_kinematics(model, data)
    return data


def around(jaws, data, pad):
    """(n, 3) m: the points of a Pad, in the hand's frame."""
    turned = data.geom_xmat[pad.geom].reshape(3, 3)
    points = data.geom_xpos[pad.geom] + pad.points @ turned.T
    body = data.xmat[1].reshape(3, 3)
    return (points - data.xpos[1]) @ body @ jaws.axes


# ---- left and right, closed and open, the direction out of the hand


def split(hand, spec, model):
    """The Jaws of a hand with its two sides and its table, or None if it does not have two sides.

    The collision geoms that move farthest, and all that move the same way, are the left jaw. The
    right jaw moves the opposite way or, if no geom does, stays still.
    """
    controls, places = sweep(model)
    first = pose(model, places[0]).geom_xpos
    last = pose(model, places[-1]).geom_xpos
    touches = (model.geom_contype | model.geom_conaffinity) > 0
    ways = (last - first) * touches[:, None]
    if not ways.any():
        return None
    longest = np.linalg.norm(ways, axis=1).argmax()
    on = ways @ ways[longest]
    left = np.flatnonzero(on > 1e-6)
    right = np.flatnonzero(on < -1e-6)
    fixed = not len(right)
    if fixed:
        right = np.flatnonzero(touches & (on == 0))
    if not len(right):
        return None

    def apart(centers):
        return np.linalg.norm(centers[left].mean(axis=0) - centers[right].mean(axis=0))

    if apart(first) > apart(last):  # it starts open
        controls = controls[::-1]
        places = places[::-1]
    return Jaws(hand, spec, model, controls, places, left, right, fixed)


def jaw_axes(model, jaws):
    """(3, 3): columns x, y and z of the hand's frame in the frame of its body.

    x is the axis that the jaws turn about, z points out of the hand, y from the right jaw to the
    left one.
    """
    closed = pose(jaws.model, jaws.places[0])
    here = closed.xmat[1].reshape(3, 3)
    centers = (closed.geom_xpos - closed.xpos[1]) @ here
    left = centers[jaws.left]
    right = centers[jaws.right]
    middle = left if jaws.fixed else np.vstack([left, right])
    x = closed.xaxis[0] @ here
    # only the whole model knows where the wrist is
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    there = data.xmat[jaws.hand].reshape(3, 3)
    place = data.xpos[jaws.hand] + there @ middle.mean(axis=0)
    z = there.T @ hand_axes(model, data, jaws.hand, there @ x, place)[:, 2]
    y = np.cross(z, x)
    side = np.sign((left.mean(axis=0) - right.mean(axis=0)) @ y)
    return np.column_stack([side * x, side * y, z])


# ---- collision geoms


def slices(model, geom, way):
    """[(n, 3)] m in the geom's frame: corners of a mesh's slices, cut across `way` (3,)."""
    mesh = model.geom_dataid[geom]
    points = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
    faces = model.mesh_face[model.mesh_faceadr[mesh] :][: model.mesh_facenum[mesh]]
    edges = np.vstack([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    start = points[edges[:, 0]]  # (edges, 3)
    along = points[edges[:, 1]] - start
    heights = points @ way
    rise = along @ way
    rise[rise == 0] = np.inf  # an edge in the plane of a cut does not cross it
    parts = []
    for bottom in np.arange(heights.min(), heights.max(), SLICE):
        top = bottom + SLICE
        part = [points[(heights >= bottom) & (heights <= top)]]
        for cut in (bottom, top):
            share = (cut - start @ way) / rise  # fraction of the edge up to the cut
            crosses = (share > 0) & (share < 1)
            part.append(start[crosses] + share[crosses, None] * along[crosses])
        part = np.vstack(part)
        flat = np.ptp(part @ way) < 1e-3 or np.ptp(part, axis=0).min() < 1e-4
        if len(part) > 3 and not flat:
            parts.append(part)
    return hulls(parts)


def hulls(parts):
    """[(n, 3)] m: for each part (n, 3) the most prominent corners of its convex hull."""
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


def pads_of(jaws, geoms, end):
    """(Pads that collide, Pads that are only visual) of a jaw's geoms; `end`: z of its end, m."""
    model = jaws.model
    closed = pose(model, jaws.places[0])
    out = closed.xmat[1].reshape(3, 3) @ jaws.axes[:, 2]  # meshes are cut perpendicular to this
    plain = []
    cut = []
    others = []
    for geom in geoms:
        pad = Pad(geom, corners(model, geom))
        if around(jaws, closed, pad)[:, 2].max() < end - REACH:
            pad.points = hulls([pad.points])[0]
            others.append(pad)
        elif model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_MESH:
            plain.append(pad)
        else:
            parts = slices(model, geom, out @ closed.geom_xmat[geom].reshape(3, 3))
            cut += [Pad(geom, part) for part in parts]
    return (plain, cut + others) if plain else (cut, others)


def find_pads(jaws):
    """Set the Pads of both jaws."""
    closed = pose(jaws.model, jaws.places[0])
    ends = []
    for geom in jaws.left:
        pad = Pad(geom, corners(jaws.model, geom))
        ends.append(around(jaws, closed, pad)[:, 2].max())
    jaws.pads = []
    jaws.seen = []
    for geoms in (jaws.left, jaws.right):
        touched, seen = pads_of(jaws, geoms, max(ends))
        jaws.pads.append(touched)
        jaws.seen += seen


# ---- the opening, and the tool's position


def measure(jaws, place):
    """(faces (2,) m: y of the left and the right jaw's face, points (n, 3) m around their ends)."""
    data = pose(jaws.model, place)
    sides = []
    for pads in jaws.pads:
        points = [around(jaws, data, pad) for pad in pads]
        sides.append(np.vstack(points))
    left, right = sides
    end = min(left[:, 2].max(), right[:, 2].max()) - TIP
    left = left[left[:, 2] > end]
    right = right[right[:, 2] > end]
    faces = np.array([left[:, 1].min(), right[:, 1].max()])
    return faces, np.vstack([left, right])


def tabulate(jaws):
    """Set the openings, and drop table rows between which the jaws do not open."""
    gaps = []
    for place in jaws.places:
        faces, _ = measure(jaws, place)
        gaps.append(faces[0] - faces[1])
    widest = np.maximum.accumulate(gaps)
    opens = np.append(True, np.diff(widest) > 1e-6)
    jaws.openings = widest[opens] / 2
    jaws.controls = jaws.controls[opens]
    jaws.places = jaws.places[opens]


def at(jaws, opening):
    """(control, place (n,)) at an opening (m)."""
    control = np.interp(opening, jaws.openings, jaws.controls)
    place = [np.interp(opening, jaws.openings, column) for column in jaws.places.T]
    return control, np.array(place)


def tool_place(jaws):
    """(3,) m, in the hand's frame: between pads around a cube, behind all that sticks out."""
    faces, ends = measure(jaws, at(jaws, CUBE)[1])
    middle = faces.mean()
    if jaws.fixed:  # keep the fixed jaw off the object while the open hand descends around it
        middle = faces[1] + CUBE + CLEARANCE
    deepest = []
    for place in jaws.places[(jaws.openings >= 0) & (jaws.openings <= WIDE)]:
        deepest.append(measure(jaws, place)[1][:, 2].max())
    x = (ends[:, 0].min() + ends[:, 0].max()) / 2
    return np.array([x, middle, max(deepest) - TCP])


def stiffness(jaws):
    """N/m: the force of each pad per distance by which the servo's target is inside a held cube.

    Measured up to FORCE, minus what friction in the joints takes away. The work of the servo
    equals that of the pads.
    """
    step = 0.001
    _, place = at(jaws, CUBE)
    _, further = at(jaws, CUBE - step)
    way = (further - place) / step / 2  # rad/m, of a joint per pad
    data = mujoco.MjData(jaws.model)
    for target in np.arange(CUBE, SQUEEZE, -step / 4):
        data.qpos[:] = place
        data.ctrl[:] = at(jaws, target)[0]
        mujoco.mj_forward(jaws.model, data)
        force = data.qfrc_actuator @ way - jaws.model.dof_frictionloss @ np.abs(way)
        if force >= FORCE:
            break
    return FORCE / max(MARGIN, CUBE - target)


def carrier(model, body):
    """The only body behind `body` that carries all the jaws, or None."""
    carriers = []
    moved = set()
    for i in below(model, body)[1:]:
        parent = model.body_parentid[i]
        if parent in moved or model.body_jntnum[i]:
            moved.add(i)
            if parent not in moved:
                carriers.append(parent)
    return carriers[0] if len(set(carriers)) == 1 else None


def find_jaws(spec, model, body):
    """The Jaws behind the flange's body and "", or None and the reason why they cannot be kept.

    Changes the file's spec.
    """
    hand = carrier(model, body)
    if hand is None:
        return None, "its jaws turn on several bodies"
    spec, alone = cut_out(spec, hand)
    reason = why_not(alone)
    if reason:
        return None, reason
    jaws = split(hand, spec, alone)
    if not jaws:
        return None, "its jaws have no collision geoms"
    jaws.axes = jaw_axes(model, jaws)
    find_pads(jaws)
    if not all(jaws.pads):
        return None, "its jaws have no collision geoms at their ends"
    tabulate(jaws)
    ends = jaws.openings[[0, -1]]
    if ends[0] > CUBE or ends[1] < LEAST:
        return None, f"its jaws open from {2 * ends[0]:.3f} to {2 * ends[1]:.3f} m"
    jaws.tcp = tool_place(jaws)
    jaws.stiffness = stiffness(jaws)
    faces, _ = measure(jaws, at(jaws, 0.0)[1])
    jaws.fist = faces.mean() - jaws.tcp[1]
    return jaws, ""


# ---- writing the new file


def clean(root):
    """Remove all but bodies and joints from the hand's XML. Returns {name: body's element}."""
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
    """Add a Pad's geom to its body."""
    body = bodies[model.body(model.geom_bodyid[pad.geom]).name]
    geom = add_geom(body, assets, model, pad.geom, name, pad.points)
    geom.set("class", "finger")
    return geom


def add_jaws(hand, root, jaws):
    """Put the jaws into the new file's body `hand`, replacing the fingers there."""
    place_tool(hand, jaws.tcp)
    source = ET.fromstring(jaws.spec.to_xml())
    bodies = clean(source)
    frame = add(hand, "frame", xyaxes=jaws.axes[:2])  # the frame of the file's body
    model = jaws.model
    first, *others = [model.body(i).name for i in range(1, model.nbody)]
    for child in bodies[first].findall("body"):
        frame.append(child)
    bodies[first] = frame  # geoms of a fixed jaw become part of the hand
    for name in others:
        bodies[name].set("gravcomp", "1")
        add_inertial(bodies[name], model, model.body(name).id)

    assets = add(root, "asset")
    for name, side in zip(("left_pad", "right_pad"), jaws.pads, strict=True):
        for number, pad in enumerate(side):
            add_pad(bodies, assets, model, pad, f"{name}{number or ''}")
    for number, pad in enumerate(jaws.seen):
        geom = add_pad(bodies, assets, model, pad, f"seen{number}")
        geom.set("contype", "0")
        geom.set("conaffinity", "0")
    for tag in ("tendon", "equality"):  # those of the fingers that were there
        root.remove(root.find(tag))
    for section in source:
        if section.tag in KEPT:
            root.append(section)

    wide = min(WIDE_ALONE if jaws.fixed else WIDE, jaws.openings[-1])
    openings = [*jaws.openings[jaws.openings < wide], wide]
    rows = [at(jaws, opening) for opening in openings]
    numbers = {
        "jaw_openings": openings,
        "jaw_controls": [control for control, _ in rows],
        "jaw_angles": [place for _, place in rows],
        "jaw_stiffness": jaws.stiffness,
        "jaw_fist": jaws.fist,
    }
    for name, data in numbers.items():
        add(root.find("custom"), "numeric", name=name, data=data)
