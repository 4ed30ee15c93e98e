"""Scenes of Meta-World with commands, for nano/commands.py: what each of its 50 tasks moves, and where.

    python -m nano.commands --env metaworld --scenes 24000        writes out/corpus/metaworld

A line is as there, for blocks that have never seen these pictures; "grounding" is null, as the classes
of patches are the tabletop's. A scene allows one command, which stands there twice: in the published
sentence and in one of ours (metaworld.json). Of each pair of pictures it says

    B          patches of what is moved: all that hangs on the joint that is nearest to the position
               by which the package's expert goes, or the body that metaworld.json names
    C          patches of where that goes: a mark that the package draws at the goal, and a body
               that metaworld.json names; none where nothing shows it
    places     that position and the task's goal in the front picture, null where they are outside
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
ROBOT = ("base", "mocap")  # roots of its bodies
MOMENTS = 6  # pairs of pictures of an episode
LONGEST = 200  # control steps: an expert that needs more has lost the thing
WANDERING = 60  # control steps of a hand that only looks
STRIDE = 20  # of these to one place
AROUND = 0.08  # m, of places around what is moved
MARK = 0.01  # m, from the goal to what marks it


# ---- what is where


def geoms_under(model, name):
    """Geoms of a body and of all that is part of it."""
    inside = {model.body(name).id}
    for body in range(model.nbody):  # parents come before their children
        if model.body_parentid[body] in inside:
            inside.add(body)
    return [geom for geom, body in enumerate(model.geom_bodyid) if body in inside]


def geoms_moved(env):
    """Geoms of what the task moves."""
    model = env.inner.model
    if name := ABOUT[env.scene].get("moved"):
        return geoms_under(model, name)
    # a body is welded to itself or to what it is fixed on, at last to the world, which is 0
    weld = model.body_weldid[model.geom_bodyid]
    roots = model.body_rootid[model.geom_bodyid]
    robot = [model.body(name).id for name in ROBOT]
    loose = np.flatnonzero((weld != 0) & ~np.isin(roots, robot))
    # a mug stands beside the button and a nail beside the hammer: the expert's thing is nearest
    ways = env.inner.data.geom_xpos[loose] - thing_position(env)
    nearest = loose[np.linalg.norm(ways, axis=1).argmin()]
    return np.flatnonzero(weld == weld[nearest])


def tables_of(env):
    """{kind: (ids,) the role of each geom and site}: 0, 1 what is moved, 2 where it goes."""
    model = env.inner.model
    geoms = np.zeros(model.ngeom, int)
    if name := ABOUT[env.scene].get("goal"):
        geoms[geoms_under(model, name)] = 2
    geoms[geoms_moved(env)] = 1
    # marks are sites; their names differ from task to task, so those at the goal are meant
    ways = env.inner.data.site_xpos - env.inner._target_pos
    sites = np.where(np.linalg.norm(ways, axis=1) < MARK, 2, 0)
    return {GEOM: geoms, SITE: sites}


def roles_of(env):
    """Of each picture 64 letters, what its patches show."""
    tables = tables_of(env)
    roles = []
    for view in VIEWS:
        ids, kinds = env.segment(view)
        classes = np.zeros(ids.shape, int)
        for kind, table in tables.items():
            own = kinds == kind
            classes[own] = table[ids[own]]
        # three classes, of which those from 1 on are objects
        roles.append(patches_of(classes, 3, first=1))
    return roles


def thing_position(env):
    """Where the expert looks for what is moved, or where the hand is, if it moves nothing else (m)."""
    if ABOUT[env.scene].get("moved") == "hand":
        return env.inner.get_endeff_pos()
    return env.inner._get_pos_objects()[:3]  # of a tool and what it is for, the tool


def project(env, point):
    """[x, y, depth] of a point (m) in the front picture, px and m, or None outside of it."""
    camera = env.inner.data.camera(CAMERAS["front"])
    x, y, z = camera.xmat.reshape(3, 3).T @ (point - camera.xpos)
    depth = -z  # cameras look along -z
    if depth <= 0:
        return None
    # in pixels of the whole picture, as published: it is turned by half a turn
    half = PUBLISHED_SIZE / 2
    angle = np.radians(env.inner.model.camera(CAMERAS["front"]).fovy[0])
    focal = half / np.tan(angle / 2)
    whole = half + focal / depth * np.array([-x, y])
    # in ours, which are those of its middle
    corner = np.array(CROP_CENTER) - CROP_SIZE / 2
    place = (whole - corner) * IMAGE_SIZE / CROP_SIZE
    if (place < 0).any() or (place >= IMAGE_SIZE).any():
        return None
    return np.round([*place, depth], 4).tolist()


# ---- moments


def wander(env, rng):
    """Actions of a hand that goes from place to place, as often near what is moved as anywhere."""
    for _ in range(WANDERING // STRIDE):
        place = rng.uniform(env.inner.mocap_low, env.inner.mocap_high)
        if rng.random() < 0.5:
            # over it, so that the second camera sees it from near by
            place = thing_position(env) + rng.uniform(-AROUND, AROUND, 3) + (0, 0, AROUND)
        fingers = rng.uniform(-1, 1)
        for _ in range(STRIDE):
            # a hundredth of a meter a step is the most; the env clips it
            yield np.append(10 * (place - env.state()[:3]), fingers)


def carry_out(env):
    """Actions of the expert."""
    for _ in range(LONGEST):
        with warnings.catch_warnings(action="ignore"):  # that it asks for more than 1
            action = env.expert.get_action(env.full)
        yield action


def moments(env, seed, rng):
    """Bring the env to a few moments of an episode: yields at each whether the task is done."""
    env.reset(seed)
    # from wherever the hand may look, or while the task is done
    looks = rng.random() < 0.5
    path = []
    for action in wander(env, rng) if looks else carry_out(env):
        *_, info = env.step(action, render=False)
        path.append((env.inner.data.qpos.copy(), info["success"]))
        if info["success"] and not looks:
            break
    # the end is always there: at most moments the task is not done
    for t in [*rng.integers(len(path), size=MOMENTS - 1), -1]:
        qpos, done = path[t]
        env.inner.data.qpos[:] = qpos
        env.inner.data.qvel[:] = 0
        mujoco.mj_forward(env.inner.model, env.inner.data)
        yield done


def command_of(env, done):
    """What the task is in the pictures of this moment, but for its words."""
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
        # half of the rows have the published words, and half some of ours
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
