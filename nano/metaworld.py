"""Scenes of Meta-World with commands, for nano/commands.py: what each of the 50 tasks moves where.

    python -m nano.commands --env metaworld --scenes 24000        writes out/corpus/metaworld

The lines have the same format; they are for training blocks that have never seen these images.
"grounding" is null, because the classes of patches are the tabletop's. A scene allows one command,
which is listed twice: with the published sentence and with one of ours (metaworld.json). For each
pair of images it has

    B          patches of the object to move: everything attached to the joint nearest to the
               position that the package's expert uses, or a body that metaworld.json names
    C          patches of the destination: a mark that the package draws at the goal, and a body
               that metaworld.json names; none if neither is visible
    places     that position and the task's goal in the front image, null if they are outside of it
"""

import json
import warnings
from pathlib import Path

import numpy as np

from data import seeds
from data.env import IMAGE_SIZE
from data.metaworld import CAMERAS, CROP_CENTER, CROP_SIZE, PUBLISHED_SIZE, MetaWorldEnv
from data.simulator import GEOM, SITE, mujoco
from nano.scenes import patches_of

ABOUT = json.loads((Path(__file__).parent / "metaworld.json").read_text())["tasks"]
VIEWS = ("front", "wrist")
ROBOT = ("base", "mocap")  # root bodies of the robot
MOMENTS = 6  # image pairs per episode
LONGEST = 200  # control steps: an expert that needs more has lost the object
WANDERING = 60  # control steps of a hand that only moves around
STRIDE = 20  # control steps toward each position
AROUND = 0.08  # m, of positions around the object to move
MARK = 0.01  # m, from the goal to its mark


# ---- object to move and destination


def geoms_under(model, name):
    """Geoms of a body and all its descendants."""
    inside = {model.body(name).id}
    for body in range(model.nbody):  # parents come before their children
        if model.body_parentid[body] in inside:
            inside.add(body)
    return [geom for geom, body in enumerate(model.geom_bodyid) if body in inside]


def geoms_moved(env):
    """Geoms of the object that the task moves."""
    model = env.inner.model
    if name := ABOUT[env.scene].get("moved"):
        return geoms_under(model, name)
    # weldid: the root of what a body is fixed to, and 0 for the world
    weld = model.body_weldid[model.geom_bodyid]
    roots = model.body_rootid[model.geom_bodyid]
    robot = [model.body(name).id for name in ROBOT]
    loose = np.flatnonzero((weld != 0) & ~np.isin(roots, robot))
    # there is a mug next to the button, and a nail next to the hammer: take the one nearest to the
    # position that the expert uses
    ways = env.inner.data.geom_xpos[loose] - thing_position(env)
    nearest = loose[np.linalg.norm(ways, axis=1).argmin()]
    return np.flatnonzero(weld == weld[nearest])


def tables_of(env):
    """{kind: (ids,) the role of each geom and site}: 0, 1 object to move, 2 destination."""
    model = env.inner.model
    geoms = np.zeros(model.ngeom, int)
    if name := ABOUT[env.scene].get("goal"):
        geoms[geoms_under(model, name)] = 2
    geoms[geoms_moved(env)] = 1
    # marks are sites; their names differ between tasks, so take those at the goal
    ways = env.inner.data.site_xpos - env.inner._target_pos
    sites = np.where(np.linalg.norm(ways, axis=1) < MARK, 2, 0)
    return {GEOM: geoms, SITE: sites}


def roles_of(env):
    """For each image 64 letters: what its patches show."""
    tables = tables_of(env)
    roles = []
    for view in VIEWS:
        ids, kinds = env.segment(view)
        classes = np.zeros(ids.shape, int)
        for kind, table in tables.items():
            own = kinds == kind
            classes[own] = table[ids[own]]
        # three classes, where those from 1 on are objects
        roles.append(patches_of(classes, 3, first=1))
    return roles


def thing_position(env):
    """Position (m) that the expert uses for the object, or the hand's if only that moves."""
    if ABOUT[env.scene].get("moved") == "hand":
        return env.inner.get_endeff_pos()
    return env.inner._get_pos_objects()[:3]  # the tool's, if there are a tool and what it is for


def project(env, point):
    """[x, y, depth] of a point (m) in the front image, px and m, or None outside of it."""
    camera = env.inner.data.camera(CAMERAS["front"])
    x, y, z = camera.xmat.reshape(3, 3).T @ (point - camera.xpos)
    depth = -z  # cameras look along -z
    if depth <= 0:
        return None
    # in pixels of the whole published image, which is turned by 180 degrees
    half = PUBLISHED_SIZE / 2
    angle = np.radians(env.inner.model.camera(CAMERAS["front"]).fovy[0])
    focal = half / np.tan(angle / 2)
    whole = half + focal / depth * np.array([-x, y])
    # in our pixels: ours is the center of that image
    corner = np.array(CROP_CENTER) - CROP_SIZE / 2
    place = (whole - corner) * IMAGE_SIZE / CROP_SIZE
    if (place < 0).any() or (place >= IMAGE_SIZE).any():
        return None
    return np.round([*place, depth], 4).tolist()


# ---- moments


def wander(env, rng):
    """Actions of a hand that moves between positions, half of them near the object to move."""
    for _ in range(WANDERING // STRIDE):
        place = rng.uniform(env.inner.mocap_low, env.inner.mocap_high)
        if rng.random() < 0.5:
            # above it, so that the wrist camera sees it from nearby
            place = thing_position(env) + rng.uniform(-AROUND, AROUND, 3) + (0, 0, AROUND)
        fingers = rng.uniform(-1, 1)
        for _ in range(STRIDE):
            # at most 1 cm per step: the env clips actions
            yield np.append(10 * (place - env.state()[:3]), fingers)


def carry_out(env):
    """Actions of the expert."""
    for _ in range(LONGEST):
        with warnings.catch_warnings(action="ignore"):  # about actions beyond 1
            action = env.expert.get_action(env.full)
        yield action


def moments(env, seed, rng):
    """Take the env to some moments of an episode. Yields for each whether the task is done."""
    env.reset(seed)
    # either wandering around, or carrying out the task
    looks = rng.random() < 0.5
    path = []
    for action in wander(env, rng) if looks else carry_out(env):
        *_, info = env.step(action, render=False)
        path.append((env.inner.data.qpos.copy(), info["success"]))
        if info["success"] and not looks:
            break
    # always include the end: at most moments the task is not done
    for t in [*rng.integers(len(path), size=MOMENTS - 1), -1]:
        qpos, done = path[t]
        env.inner.data.qpos[:] = qpos
        env.inner.data.qvel[:] = 0
        mujoco.mj_forward(env.inner.model, env.inner.data)
        yield done


def command_of(env, done):
    """The command at this moment, without its words."""
    points = thing_position(env), env.inner._target_pos
    return {
        "task": env.scene,
        "things": ABOUT[env.scene]["things"],
        "done": done,
        "roles": roles_of(env),
        "places": [project(env, point) for point in points],
    }


def scenes_of(env: MetaWorldEnv, seed):
    """Records of a seed; their images are still arrays."""
    rng = seeds.rng(seed, "scene")
    about = ABOUT[env.scene]
    records = []
    for done in moments(env, seed, rng):
        command = command_of(env, done)
        # the published words, and some of ours, with equal weight
        ours = about["wordings"][rng.integers(len(about["wordings"]))]
        commands = [{**command, "instruction": words} for words in (env.task.sentence, ours)]
        record = {
            "images": [env.draw(view) for view in VIEWS],
            "grounding": None,
            "commands": commands,
            "things": about["things"],
            "robot": env.robot.name,
            "scene": env.scene,
        }
        records.append(record)
    return records
