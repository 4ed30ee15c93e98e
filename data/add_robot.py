"""Your own arm from its MJCF file: an entry of data/robots.json, and the expert's first attempts with it.

    python -m data.add_robot --mjcf universal_robots_ur5e/ur5e.xml --name ur5e

Joints, limits, inertias and servos are the file's; links become capsules that fit its geoms; the gripper is that of a robot that is here already. Where the
tasks take place follows from how far the arm reaches. The file must have a site at the flange (z outwards, y along which the fingers shall close), as
the arms of MuJoCo Menagerie do. Afterwards: demonstrations, and a policy (README, "Add a robot").
"""
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np

from cli import UserError, at_least, choose, parse, run

from files import atomic
from data.robots import ROBOTS, Kinematics, Robot, get_robot

FILE = Path(__file__).parent / "robots.json"
MOST_CAPSULES = 4                # of one link, the largest
SERVO = (1000.0, 100.0, 87.0)    # kp, kd, N m: for joints whose file has no position servo


@dataclass
class AddConfig:
    mjcf: str = ""                      # MJCF file of the arm
    name: str = ""                      # what to call it: lower case, no spaces
    site: str = "attachment_site"       # site of the flange: z outwards, y along the fingers' way
    gripper: str = "xarm6"              # robot whose gripper, fingers and wrist camera it gets
    speed: float = 2.0                  # velocity limit of the joints, rad/s: MJCF has none
    check: bool = True                  # let the expert try each task in five layouts


def pose(position, quat):
    """(4, 4) transform of a position (m) and a quaternion (w, x, y, z)."""
    rotation, transform = np.empty(9), np.eye(4)
    mujoco.mju_quat2Mat(rotation, np.asarray(quat, float))
    transform[:3, :3], transform[:3, 3] = rotation.reshape(3, 3), position
    return transform


def position_quat(transform):
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, transform[:3, :3].ravel())
    return transform[:3, 3].round(9).tolist(), quat.round(9).tolist()


def chain(model, site):
    """[(joint id or -1, [(body id, its transform in the link's frame)])] from the base to the site's body; the site's transform in the last frame.

    A link's frame has its joint's anchor as origin. Bodies without a joint belong to the link before them. Also the links' transforms, each in the frame before.
    """
    path, body = [], model.site_bodyid[site]
    while body:
        path, body = [body, *path], model.body_parentid[body]
    links, frames, here = [(-1, [])], [np.eye(4)], np.eye(4)                 # here: the body's transform in its link's frame
    for body in path:
        here = here @ pose(model.body_pos[body], model.body_quat[body])
        joints = [j for j in range(model.njnt) if model.jnt_bodyid[j] == body]
        if len(joints) > 1 or any(model.jnt_type[j] != mujoco.mjtJoint.mjJNT_HINGE for j in joints):
            raise UserError(f"body {model.body(body).name} must have one hinge joint or none: the arms here are chains of turning joints")
        if joints:
            anchor = pose(model.jnt_pos[joints[0]], (1, 0, 0, 0))
            frames.append(here @ anchor)
            here = np.linalg.inv(anchor)
            links.append((joints[0], []))
        links[-1][1].append((body, here.copy()))
    return links, frames, here @ pose(model.site_pos[site], model.site_quat[site])


def inertia(model, bodies):
    """Mass (kg), centre (m), principal inertia (kg m^2) and its quaternion of bodies [(id, transform)] as one."""
    masses = np.array([model.body_mass[b] for b, _ in bodies])
    inner = [transform @ pose(model.body_ipos[b], model.body_iquat[b]) for b, transform in bodies]
    mass = max(masses.sum(), 1e-3)
    centre = sum(m * t[:3, 3] for m, t in zip(masses, inner)) / mass
    total = np.eye(3) * 1e-6
    for (b, _), m, t in zip(bodies, masses, inner):
        way = t[:3, 3] - centre
        total += t[:3, :3] @ np.diag(model.body_inertia[b]) @ t[:3, :3].T + m * (way @ way * np.eye(3) - np.outer(way, way))
    moments, axes = np.linalg.eigh(total)
    if np.linalg.det(axes) < 0:
        axes[:, 0] *= -1
    turned = np.eye(4)
    turned[:3, :3] = axes
    return {"mass": round(float(mass), 6), "com": centre.round(6).tolist(), "inertia": moments.round(9).tolist(), "inertia_quat": position_quat(turned)[1]}


def capsules(model, bodies):
    """[x, y, z of one end, of the other, radius] (m) for the largest geoms of bodies [(id, transform)]: those that collide, if any do."""
    geoms = [(g, transform) for b, transform in bodies for g in range(model.ngeom) if model.geom_bodyid[g] == b and model.geom_type[g] != mujoco.mjtGeom.mjGEOM_PLANE]
    made = []
    for g, transform in [pair for pair in geoms if model.geom_contype[pair[0]]] or geoms:
        centre, half = model.geom_aabb[g][:3], model.geom_aabb[g][3:]
        axis = int(np.argmax(half))
        radius = float(np.delete(half, axis).mean())
        way = np.eye(3)[axis] * max(half[axis] - radius, 1e-4)
        ends = [transform @ pose(model.geom_pos[g], model.geom_quat[g]) @ np.append(end, 1) for end in (centre - way, centre + way)]
        made.append([*ends[0][:3].round(4).tolist(), *ends[1][:3].round(4).tolist(), round(radius, 4)])
    return sorted((c for c in made if c[6] > 0.005), key=lambda c: -c[6] ** 2 * (c[6] + np.linalg.norm(np.subtract(c[:3], c[3:6]))))[:MOST_CAPSULES]


def servo(model, joint):
    """kp (N m/rad), kd and largest torque (N m) of a joint's position servo, or the usual ones."""
    for a in range(model.nu):
        if model.actuator_trntype[a] == mujoco.mjtTrn.mjTRN_JOINT and model.actuator_trnid[a, 0] == joint and model.actuator_biastype[a] == mujoco.mjtBias.mjBIAS_AFFINE:
            kp, kd = float(model.actuator_gainprm[a, 0]), float(-model.actuator_biasprm[a, 2])
            force = max(np.abs(model.actuator_forcerange[a]).max(), np.abs(model.jnt_actfrcrange[joint]).max())
            return kp, kd or max(0.0, kp / 10 - float(model.dof_damping[model.jnt_dofadr[joint]])), float(force) or SERVO[2]
    return SERVO


def workspace(entry, starts):
    """Put home_qpos, reach and where the tasks take place into `entry`: the home pose, found from `starts` (n, dof), that reaches far straight down and is plain."""
    kinematics, best, most, middle = Kinematics(Robot("new", entry)), None, -np.inf, np.mean([joint["range"] for joint in entry["joints"]], axis=1)

    def down(q, distance, height, side):
        z, y = np.array([0, 0, -1.0]), np.array([0, side, 0.0])
        found = kinematics.solve_ik(np.array([distance, 0, height]), np.stack([np.cross(y, z), y, z], axis=1), q)
        low = found is not None and min(kinematics.data.body(f"link{i + 1}").xpos[2] for i in range(1, len(found))) < 0.03      # an elbow in the table
        return None if low else found

    span = sum(np.linalg.norm(joint["pos"]) for joint in entry["joints"])
    for start in starts:
        for side in (-1.0, 1.0):
            q = down(start, 0.5 * span, 0.12 * span, side)
            if q is None:
                continue
            ends = []
            for way in (-0.01, 0.01):                                        # inwards and outwards along the table
                distance, at = 0.5 * span, down(q, 0.5 * span, 0.02, side)
                while at is not None and distance > 0.15:
                    distance += way
                    at = down(at, distance, 0.02, side)
                ends.append(distance - way)
            score = ends[1] - ends[0] - 0.05 * np.abs(q - middle).max()          # radians from the middle of the joints' ranges cost reach
            if score > most:
                best, most = (*ends, q, side), score
    if best is None or best[1] - best[0] < 0.2:
        raise UserError("this arm's hand cannot point straight down along 0.2 m of the table: is the site right (z outwards, away from the flange)?")
    near, far, home, side = best
    scale = round(float(min(1.0, (far - near) / 0.53)), 2)                          # 1 for arms with 0.53 m of table, as the xArms
    centre = round(float(far - 0.21 * scale), 3)
    rest = down(home, centre - 0.05 * scale, 0.2 * scale, side)
    entry |= {"home_qpos": (home if rest is None else rest).round(4).tolist(), "base_to_spawn_centre": centre, "spawn_half_size": round(0.1 * scale, 3),
              "max_goal_height": round(0.25 * scale, 3), "scale": scale, "reach": [round(float(near), 3), round(float(far), 3)]}


def convert(path, site, gripper, speed):
    """The entry of robots.json for the arm in the MJCF file `path`. UserError if it is none, or has no such site."""
    try:
        model = mujoco.MjModel.from_xml_path(str(path))
    except ValueError as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    sites = [model.site(i).name for i in range(model.nsite)]
    if site not in sites:
        raise UserError(f"{path} has no site {site!r} for the gripper; name one with --site: {', '.join(filter(None, sites)) or 'it has none, add one at the flange'}")
    links, frames, flange = chain(model, sites.index(site))
    if len(links) < 6:
        raise UserError(f"{path} has {len(links) - 1} joints before the site {site!r}: the tasks need at least five")
    (_, base), *moving = links
    joints = []
    for (joint, bodies), frame in zip(moving, frames[1:]):
        position, quat = position_quat(frame)
        dof, (kp, kd, force) = model.jnt_dofadr[joint], servo(model, joint)
        limits = model.jnt_range[joint] if model.jnt_limited[joint] else np.array([-2 * np.pi, 2 * np.pi])
        joints.append({"name": model.joint(joint).name, "pos": position, "quat": quat, "axis": model.jnt_axis[joint].round(9).tolist(), "range": limits.round(6).tolist(),
                       "velocity_limit": speed, "kp": kp, "kd": kd, "force_range": force, "armature": max(float(model.dof_armature[dof]), 0.01),
                       "damping": float(model.dof_damping[dof]), "frictionloss": float(model.dof_frictionloss[dof]), **inertia(model, bodies), "capsules": capsules(model, bodies)})
    like = get_robot(gripper)
    old, camera = pose(like.hand["pos"], like.hand["quat"]), like.wrist_camera
    if camera["frame"] == "flange":                                          # as the hand sees it
        camera = {"pos": (np.linalg.inv(old) @ np.append(camera["pos"], 1))[:3].round(6).tolist(), "direction": (old[:3, :3].T @ camera["direction"]).round(6).tolist(), "frame": "hand"}
    position, quat = position_quat(flange)
    entry = {"display_name": path.stem, "source": path.name, "colour": [0.75, 0.78, 0.82, 1], "colour_accent": [0.35, 0.4, 0.5, 1], "colour_gripper": like.colour_gripper,
             "base": {"mass": round(float(sum(model.body_mass[b] for b, _ in base)), 4), "capsules": capsules(model, base)}, "joints": joints,
             "hand": {**like.hand, "pos": position, "quat": quat}, "fingers": like.fingers, "tcp_z": like.tcp_z, "wrist_camera": camera}
    low, high = np.clip(np.array([joint["range"] for joint in joints]), -np.pi, np.pi).T
    own = [model.key_qpos[k][[model.jnt_qposadr[j] for j, _ in moving]] for k in range(model.nkey)]
    workspace(entry, [*own, (low + high) / 2, *np.random.default_rng(0).uniform(low, high, (40, len(joints)))])
    return entry


def with_entry(text, name, entry):
    """The JSON `text` with one more robot behind the last, a line for each of its keys and joints; the rest stays as it is."""
    lines = [f'   "{key}": ' + ("[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n   ]" if key == "joints" else json.dumps(value)) for key, value in entry.items()]
    end = text.rindex("}", 0, text.rindex("}", 0, text.rindex("}"))) + 1                   # of the last robot
    made = text[:end] + f',\n  "{name}": {{\n' + ",\n".join(lines) + "\n  }" + text[end:]
    assert json.loads(made)["robots"][name] == json.loads(json.dumps(entry))
    return made


def main():
    config = parse(AddConfig, description="Add your own arm, from its MJCF file.")
    if not config.mjcf or not config.name:
        raise UserError("say which arm: python -m data.add_robot --mjcf arm.xml --name my_arm")
    at_least(config, 0.01, "speed")
    if config.name in ROBOTS or not re.fullmatch("[a-z][a-z0-9_]*", config.name):
        raise UserError(f"--name {config.name}: " + ("there is such a robot already; delete its entry in data/robots.json first" if config.name in ROBOTS
                                                     else "lower-case letters, digits and underscores only"))
    entry = convert(Path(config.mjcf), config.site, choose(config.gripper, ROBOTS, "gripper"), config.speed)
    with atomic(FILE) as temporary:
        temporary.write_text(with_entry(FILE.read_text(), config.name, entry))
    print(f"{config.name}: {len(entry['joints'])} joints, reaches {entry['reach'][0]} to {entry['reach'][1]} m straight down; tasks around {entry['base_to_spawn_centre']} m, scale "
          f"{entry['scale']}; its entry is in {FILE}")
    if config.check:
        subprocess.run([sys.executable, "eval.py", "expert", "--robots", config.name, "--episodes", "5"], cwd=FILE.parent.parent)


if __name__ == "__main__":
    run(main)
