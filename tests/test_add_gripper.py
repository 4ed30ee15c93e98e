"""An arm's own gripper: two sliding fingers give the same result however the file writes them."""

import json
import sys

import numpy as np
import pytest
from test_add_robot import SITE, added, plain

from cli import UserError
from data import add_robot
from data.add_gripper import CONTACT
from data.env import TabletopEnv
from data.expert import demonstrate
from data.robots import Kinematics, get_robot
from data.simulator import mujoco
from dev import arms

# contact options of a real file's pads, each different from MuJoCo's default
OPTIONS = 'friction="0.8 0.03 0.002" condim="6" priority="2" solref="0.012 0.9" solmix="2"'
OPTIONS += ' solimp="0.8 0.97 0.002 0.4 1.5" margin="0.0005" gap="0.0002"'
PAD = f'<geom type="box" size="0.01 0.005 0.03" pos="0 {{0}} 0.09" {OPTIONS}/>'
# visual, not colliding
SCREW = '<geom type="box" size="0.001 0.5 0.5" contype="0" conaffinity="0"/>'


def finger(name, side, axis, limits, pad=PAD, place=0.0, turned=""):
    """A finger whose pad's face is in the middle when its body is; `side` is 1 or -1."""
    return f"""<body name="{name}" pos="0 {place} 0" {turned}>
    <joint name="{name}" type="slide" axis="{axis}" range="{limits}" damping="5"/>
    <inertial pos="0 0 0.09" mass="0.05" diaginertia="1e-5 1e-5 1e-5"/>
    {pad.format(0.005 * side)}{SCREW}</body>"""


LEFT = finger("a", 1, "0 1 0", "0 0.04")
RIGHT = finger("b", -1, "0 -1 0", "0 0.04")
HAND = '<body name="hand" pos="0 0 0.08" {}><geom type="box" size="0.03 0.04 0.02"/>{}{}</body>'
SERVOS = '<actuator><position joint="a" kp="600" kv="6" forcerange="-9 9"/>'
SERVOS += '<position joint="b" kp="600" kv="6" forcerange="-9 9"/></actuator>'


def gripped(left=LEFT, right=RIGHT, turned="", servos=SERVOS, more=""):
    """MJCF of the plain arm with a hand."""
    hand = HAND.format(turned, left, right)
    return plain(site=hand, end=servos + more)


def fitted(text, folder, **flags):
    (folder / "arm.xml").write_text(text)
    flags = {"site": "hand", **flags}
    return added(folder / "arm.xml", folder, **flags)


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """Skip the search for the workspace, which takes seconds."""
    found = {"home": np.full(7, 0.3), "reach": (0.2, 0.6), "spawn_distance": 0.4}
    monkeypatch.setattr(add_robot, "find_workspace", lambda robot: found)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gripper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(add_robot, "find_workspace", lambda robot: {"home": np.full(7, 0.3)})
        return fitted(gripped(), folder)


def touching(robot, opening):
    """Poses of all pads (n, 12), and the tool's, with the fingers `opening` m open."""
    kinematics = Kinematics(robot)
    kinematics.data.qpos[robot.dof :] = opening
    at, turned = kinematics.forward(np.full(robot.dof, 0.3))
    rows = [np.append(at, turned)]
    for name in ("left_pad", "right_pad"):
        pad = kinematics.data.geom(name)
        rows.append(np.append(pad.xpos, pad.xmat))
    return np.array(rows)


ACROSS = PAD.replace("0.01 0.005", "0.005 0.01").replace("0 {0} 0.09", "{0} 0 0.09")
INSIDE = f'<body pos="0 0.001 0"><body pos="0 -0.001 0">{PAD}</body></body>'
LIKE = {
    "the right one first": gripped(RIGHT, LEFT),
    "negative ranges": gripped(right=finger("b", -1, "0 1 0", "-0.04 0")),
    "zero is open": gripped(
        left=finger("a", 1, "0 1 0", "-0.04 0", place=0.04),
        right=finger("b", -1, "0 1 0", "0 0.04", place=-0.04),
    ),
    "fingers off the middle": gripped(
        left=finger("a", 1, "0 1 0", "-0.01 0.03", place=0.01),
        right=finger("b", -1, "0 -1 0", "0.02 0.06", place=0.02),
    ),
    "a finger is turned": gripped(right=finger("b", 1, "0 1 0", "0 0.04", turned='quat="0 0 0 1"')),
    "the hand is turned": gripped(
        left=finger("a", 1, "1 0 0", "0 0.04", ACROSS),
        right=finger("b", -1, "-1 0 0", "0 0.04", ACROSS),
        turned='quat="0.70710678 0 0 0.70710678"',
    ),
    "the pad is fixed to the finger": gripped(
        left=finger("a", 1, "0 1 0", "0 0.04", INSIDE),
    ),
    "one servo and a coupling": gripped(
        servos='<actuator><position joint="a" kp="1200" kv="12" forcerange="-18 18"/></actuator>',
        more='<equality><joint joint1="b" joint2="a"/></equality>',
    ),
}


@pytest.mark.parametrize("case", LIKE)
def test_the_same_gripper_written_otherwise_is_the_same_gripper(case, tmp_path, reference):
    mine = fitted(LIKE[case], tmp_path)
    assert np.isclose(mine.travel, reference.travel)
    assert np.isclose(mine.finger_kp, 600)
    assert np.allclose(mine.model.actuator_forcerange[mine.dof], (-18, 18))
    for opening in (0.0, 0.03):
        theirs = touching(reference, opening)
        ours = touching(mine, opening)
        # a box is symmetric, and which finger is the left one is arbitrary
        same = np.allclose(ours[:, :3], theirs[:, :3], atol=1e-5)
        assert same or np.allclose(ours[[0, 2, 1], :3], theirs[:, :3], atol=1e-5)


def test_a_finger_touches_as_it_does_in_its_file(reference):
    model = reference.model
    wanted = mujoco.MjModel.from_xml_string(
        f"<mujoco><worldbody>{PAD}</worldbody></mujoco>".format(0)
    )
    for name in ("left_pad", "right_pad"):
        pad = model.geom(name).id
        for option in CONTACT:
            ours = getattr(model, f"geom_{option}")[pad]
            assert np.allclose(ours, getattr(wanted, f"geom_{option}")[0]), option
    # geoms that never collide are left out
    assert model.body("left_finger").geomnum == 1


def test_fingers_at_zero_meet_in_the_middle(reference):
    model = reference.model
    data = mujoco.MjData(model)
    left, right = (model.geom(name).id for name in ("left_pad", "right_pad"))
    for opening in (0.0, 0.01, 0.04):
        data.qpos[7:] = opening
        mujoco.mj_kinematics(model, data)
        apart = mujoco.mj_geomDistance(model, data, left, right, 1.0, None)
        assert np.isclose(apart, 2 * opening, atol=1e-5)
    # 10 mm behind the end of the fingers, which is at 0.08 + 0.12 m
    assert np.allclose(model.site("tcp").pos, (0, 0, 0.11), atol=1e-6)


def test_fingers_that_end_apart_stay_apart(tmp_path):
    away = "0.006 0.046"
    left = finger("a", 1, "0 1 0", away)
    robot = fitted(gripped(left, finger("b", -1, "0 -1 0", away)), tmp_path)
    assert np.allclose(robot.model.joint("left_finger").range, (0.006, 0.046))


PYRAMID = "-.01 0 .06 .01 0 .06 -.01 0 .12 .01 0 .12 0 .01 .09 0 .002 .09"  # one point is inside
MESH = f'<asset><mesh name="tip" vertex="{PYRAMID}"/></asset>'


def test_a_mesh_touches_as_its_convex_hull(tmp_path):
    pad = f'<geom type="mesh" mesh="tip" {OPTIONS}/>'
    left = finger("a", 1, "0 1 0", "0 0.04", pad)
    robot = fitted(gripped(left, more=MESH), tmp_path)
    model = robot.model
    mesh = model.mesh(model.geom("left_pad").dataid[0])
    assert mesh.vertnum == 5
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    left, right = (model.geom(name).id for name in ("left_pad", "right_pad"))
    assert abs(mujoco.mj_geomDistance(model, data, left, right, 1.0, None)) < 1e-4
    assert model.geom("left_pad").condim == 6


def test_a_gripper_in_a_file_of_its_own_is_put_on(tmp_path, reference):
    text = f"<mujoco><option impratio='3'/><worldbody>{HAND.format('', LEFT, RIGHT)}</worldbody>"
    (tmp_path / "hand.xml").write_text(text.replace("0 0 0.08", "0 0 0") + SERVOS + "</mujoco>")
    gripper = str(tmp_path / "hand.xml")
    mine = fitted(plain(), tmp_path, site="attachment_site", gripper=gripper)
    assert np.allclose(touching(mine, 0.02), touching(reference, 0.02), atol=1e-5)
    assert np.isclose(mine.finger_kp, 600)


def test_a_gripper_without_servos_gets_the_xarm_s(tmp_path):
    robot = fitted(gripped(servos=""), tmp_path)
    known = get_robot("xarm6")
    assert robot.finger_kp == known.finger_kp
    assert np.allclose(robot.model.actuator_forcerange[-1], known.model.actuator_forcerange[-1])


TURNING = LEFT.replace('type="slide"', 'type="hinge"')
NO_RANGE = LEFT.replace('range="0 0.04"', "")
NOT_KEPT = {
    "turning": (gripped(left=TURNING), "its jaws both turn and slide"),
    "three": (
        gripped(right=RIGHT + finger("c", -1, "0 1 0", "0 1")),
        "its own gripper has 3 fingers",
    ),
    "one": (gripped(right="", servos=""), "its own gripper has 1 fingers"),
    "endless": (gripped(left=NO_RANGE), "its fingers have no range"),
    "askew": (gripped(left=LEFT.replace("0 1 0", "1 0 0")), "do not slide along one line"),
    "none": (plain(site='<body name="hand" pos="0 0 0.08"/>'), "none behind --site"),
}


@pytest.mark.parametrize("case", NOT_KEPT)
def test_another_gripper_makes_way_for_the_xarm_s_and_the_file_says_why(case, tmp_path):
    text, reason = NOT_KEPT[case]
    text = text.replace('joint="b"', 'joint="a"') if case == "one" else text
    robot = fitted(text, tmp_path)
    assert robot.travel == get_robot("xarm6").travel
    said = mujoco.MjSpec.from_file(str(robot.path)).text("gripper").data
    assert reason in said


def test_a_gripper_that_is_asked_for_and_cannot_be_kept_is_refused(tmp_path):
    hand = HAND.format("", TURNING, RIGHT)
    (tmp_path / "hand.xml").write_text(f"<mujoco><worldbody>{hand}</worldbody></mujoco>")
    with pytest.raises(UserError, match="hand.xml cannot be kept, its jaws both turn and slide"):
        fitted(plain(), tmp_path, site="attachment_site", gripper=str(tmp_path / "hand.xml"))
    with pytest.raises(UserError, match="cannot read.*none.xml"):
        fitted(plain(), tmp_path, site="attachment_site", gripper=str(tmp_path / "none.xml"))


def test_the_xarm_s_gripper_can_be_asked_for(tmp_path):
    text = plain(site=SITE + HAND.format("", LEFT, RIGHT), end=SERVOS)
    robot = fitted(text, tmp_path, site="attachment_site", gripper="xarm6")
    assert robot.travel == get_robot("xarm6").travel


def test_a_finger_of_several_geoms_grasps_and_lifts(tmp_path, monkeypatch):
    monkeypatch.undo()  # restore the search for the workspace
    two = PAD.replace("0.01 0.005 0.03", "0.01 0.005 0.015").replace("0.09", "0.075") + PAD
    fingers = [finger("a", 1, "0 1 0", "0 0.04", two), finger("b", -1, "0 -1 0", "0 0.04", two)]
    robot = fitted(gripped(*fingers), tmp_path)
    env = TabletopEnv(str(robot.path), "PickCube", render=False)
    assert [len(pads) for pads in env.pads] == [2, 2]
    assert demonstrate(env, 0).success


def test_arms_tries_what_is_there_and_says_why_not(tmp_path, monkeypatch, capsys):
    for name, text in {"good": plain(), "bad": plain(joint='stiffness="20"')}.items():
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "arm.xml").write_text(text)
    hand = HAND.format("", TURNING, RIGHT)
    (tmp_path / "models" / "hand.xml").write_text(f"<mujoco><worldbody>{hand}</worldbody></mujoco>")
    known = {name: {"mjcf": f"{name}/arm.xml"} for name in ("good", "bad", "gone")}
    known["good"]["gripper"] = "models/hand.xml"
    monkeypatch.setattr(arms, "KNOWN", known)
    monkeypatch.setattr(arms, "TASKS", ["PickCube"])
    monkeypatch.setattr(arms, "attempt", lambda path, task, n: {"solved": n, "ended": {}})
    out = tmp_path / "arms.json"
    argv = ["arms", "--folders", str(tmp_path), "--out", str(out), "--episodes", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    arms.main()
    rows = json.loads(out.read_text())["arms"]
    assert rows["good"]["solved"] == 1
    assert rows["good"]["gripper"].startswith("xArm-6's: --gripper models/hand.xml cannot be kept")
    assert "l3 has a spring" in rows["bad"]["refused"]
    assert "gone" not in rows
    assert "good: 1 of 1 tasks" in capsys.readouterr().out
