"""Add an arm from its MJCF file: the same arm in any style of file, or a refusal."""

import re
from pathlib import Path

import numpy as np
import pytest

import data.env
import data.expert
import data.robots
from cli import UserError
from data import add_robot
from data.add_robot import AddConfig, convert
from data.env import TabletopEnv
from data.expert import demonstrate
from data.robots import ARMS, ROBOTS, Kinematics, get_kinematics, get_robot


def shipped(name, folder, position="0 0 0"):
    """An arm that we ship, written as others do: a site at its flange, a stand without a joint."""
    text = get_robot(name).path.read_text()
    text = text.replace('<site name="tcp"', '<site name="attachment_site"/><site name="tcp"')
    stand = f'<body name="stand" pos="{position}"><body pos="0 0 0.1" quat="0 0 0 1">'
    stand += '<body pos="0 0 -0.1" quat="0 0 0 1"><body name="base"'
    text = text.replace('<body name="base"', stand)
    text = text.replace("</worldbody>", "</body></body></body></worldbody>")
    path = folder / f"{name}.xml"
    path.write_text(text)
    return path


def added(path, folder, **flags):
    config = AddConfig(mjcf=str(path), name="mine", **flags)
    return convert(config, folder / "made.xml")


@pytest.mark.parametrize("name", ROBOTS)
def test_an_arm_from_its_mjcf_file_is_the_same_arm(name, tmp_path):
    robot = get_robot(name)
    mine = added(shipped(name, tmp_path), tmp_path)
    made = Kinematics(mine)
    known = get_kinematics(name)
    for qpos in np.random.default_rng(0).uniform(*robot.joint_range.T, (5, robot.dof)):
        for a, b in zip(flange(made, qpos), flange(known, qpos), strict=True):
            assert np.allclose(a, b, atol=1e-6)
    n = robot.dof  # the last servo is the gripper's
    for field in ("actuator_gainprm", "actuator_biasprm", "actuator_forcerange", "jnt_range"):
        ours, theirs = getattr(mine.model, field)[:n], getattr(robot.model, field)[:n]
        assert np.array_equal(ours, theirs), field
    assert np.isclose(
        mass_of_arm(mine) - robot.model.body("hand").mass, mass_of_arm(robot), atol=1e-3
    )
    assert all(mine.model.body_geomnum[mine.model.jnt_bodyid[:n]] > 0)
    if name == add_robot.GRIPPER:
        assert np.allclose(mine.reach, robot.reach, atol=0.05)
        assert abs(mine.spawn_distance - robot.spawn_distance) < 0.06
    gripper = get_robot(add_robot.GRIPPER)
    for a, b in zip(seen_from_hand(mine), seen_from_hand(gripper), strict=True):
        assert np.allclose(a, b, atol=1e-6)


def flange(kinematics, qpos):
    """Position and axes of the hand: those of the tool, without the hand's length."""
    at, turned = kinematics.forward(qpos)
    return at - turned @ kinematics.model.site("tcp").pos, turned


def mass_of_arm(robot):
    """Mass (kg) of the moving links before the hand.

    The site at the flange is in the hand, or in a link of the new arm.
    """
    first = robot.model.body(robot.model.jnt_bodyid[0])
    return (first.subtreemass - robot.model.body("hand").subtreemass).item()


def seen_from_hand(robot):
    """Where the wrist camera is, and its axes, in the tool's frame."""
    kinematics = Kinematics(robot)
    at, turned = kinematics.forward(robot.home)
    data.robots.mujoco.mj_camlight(kinematics.model, kinematics.data)
    camera = kinematics.data.camera("wrist")
    return turned.T @ (camera.xpos - at), turned.T @ camera.xmat.reshape(3, 3)


def use(monkeypatch, robot):
    """Make `robot` known to the environment and the expert under its name."""
    monkeypatch.setattr(data.env, "get_robot", lambda name: robot)
    monkeypatch.setattr(data.expert, "get_kinematics", lambda name: Kinematics(robot))
    data.env.compile_scene.cache_clear()
    data.env.region.cache_clear()


@pytest.fixture
def known(monkeypatch):
    yield lambda robot: use(monkeypatch, robot)
    data.env.compile_scene.cache_clear()
    data.env.region.cache_clear()


# ---- a plain arm of seven joints, and the same in the style of other people's files

JOINTS = [  # place in the link before, axis, range, mass
    ("0 0 0.12", "0 0 1", "-3.1 3.1", 4),
    ("0 0.1 0.1", "0 1 0", "-2 2", 4),
    ("0 -0.1 0.35", "0 1 0", "-2.6 2.6", 3),
    ("0 0 0.3", "0 1 0", "-2.6 2.6", 1.5),
    ("0 0.08 0.06", "0 0 1", "-3.1 3.1", 1.2),
    ("0 -0.08 0.06", "0 1 0", "-2 2", 1),
    ("0 0 0.06", "0 0 1", "-3.1 3.1", 0.2),
]
SERVO = '<position joint="j{}" kp="800" kv="80" forcerange="-90 90"/>'
SITE = '<site name="attachment_site" pos="0 0 0.08"/>'


def plain(base="", servo=SERVO, joint="", site=SITE, end="", limits=True, above=""):
    """MJCF of the arm; `joint` are attributes of its third joint."""
    text = site
    for i, (place, axis, limit, mass) in reversed(list(enumerate(JOINTS, 1))):
        extra = joint if i == 3 else ""
        limit = f'range="{limit}"' if limits else ""
        text = f"""<body name="l{i}" pos="{place}"><joint name="j{i}" axis="{axis}" {limit} {extra}/>
        <inertial pos="0 0 0.03" mass="{mass}" diaginertia="0.01 0.01 0.005"/>
        <geom type="capsule" fromto="0 0 0 0 0 0.06" size="0.04"/>{text}</body>"""
    servos = "".join(servo.format(i) for i in range(1, 8))
    body = f'<body name="base" {base}><geom type="cylinder" size="0.06 0.05"/>{text}</body>'
    body = above + body + "</body>" * above.count("<body")
    return f"""<mujoco><compiler angle="radian" autolimits="true"/>
    <worldbody>{body}</worldbody><actuator>{servos}</actuator>{end}</mujoco>"""


GEAR = '<position joint="j{}" kp="8" kv="0.8" gear="10" ctrlrange="-31 31" forcerange="-9 9"/>'
DRIVEN_BACK = GEAR.replace('gear="10"', 'gear="-10"')
BESIDE = '<velocity joint="j{0}" kv="30"/>' + SERVO.replace("{}", "{0}")
MOTOR = '<motor joint="j{}" gear="5" ctrlrange="-18 18"/>'
NARROW = SERVO.replace("/>", ' ctrlrange="-1.5 1.5"/>')
LIKE_PLAIN = {
    "pedestal": (plain('pos="0.3 -0.2 0.75"'), {}),
    "beside another": (plain('pos="0 0.6 0" quat="0.7071068 0 0 0.7071068"'), {}),
    "base without a name": (plain().replace('<body name="base"', "<body"), {}),
    "turned about": (plain('quat="0 0 0 1"'), {}),
    "gear": (plain(servo=GEAR), {}),
    "negative gear": (plain(servo=DRIVEN_BACK), {}),
    "joint's limit is wider": (plain(joint='actuatorfrcrange="-200 200"'), {}),
    "flange is a body": (
        plain(site='<body name="flange" pos="0 0 0.08"/>'),
        {"site": "flange"},
    ),
    "x is outwards": (plain(site=SITE.replace("/>", ' euler="0 -1.5707963 0"/>')), {"axes": "x,y"}),
    "on a named stand": (
        plain('pos="0 0 0.8"', above='<body name="stand"><geom type="sphere" size="0.1"/>'),
        {"base": "base"},
    ),
}


def flange_of(robot):
    """TCP pose at some joint angles: equal for equal arms."""
    return np.concatenate([part.ravel() for part in Kinematics(robot).forward(np.full(7, 0.3))])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    (folder / "plain.xml").write_text(plain())
    return added(folder / "plain.xml", folder)


@pytest.mark.parametrize("case", LIKE_PLAIN)
def test_the_same_arm_written_otherwise_is_the_same_arm(case, tmp_path, reference):
    text, flags = LIKE_PLAIN[case]
    (tmp_path / "arm.xml").write_text(text)
    mine = added(tmp_path / "arm.xml", tmp_path, **flags)
    assert np.allclose(flange_of(mine), flange_of(reference), atol=1e-5)
    for field in ("actuator_gainprm", "actuator_biasprm", "actuator_forcerange", "jnt_range"):
        ours = getattr(mine.model, field)
        assert np.allclose(ours, getattr(reference.model, field), atol=1e-4), field
    assert np.allclose(mine.reach, reference.reach, atol=0.02)


SERVOS = {  # kp, kv, torque and range of the third joint
    "plain": (plain(), (800, 80, 90, 2.6)),
    "no damping": (plain(servo=SERVO.replace('kv="80"', 'kv="0"')), (800, 0, 90, 2.6)),
    "joint's limit is narrower": (plain(joint='actuatorfrcrange="-27 27"'), (800, 80, 27, 2.6)),
    "limit of the joint alone": (
        plain(servo="", joint='actuatorfrcrange="-12 12"'),
        (1000, 100, 12, 2.6),
    ),
    "nothing at all": (plain(servo=""), (1000, 100, 87, 2.6)),
    "motors": (plain(servo=MOTOR), (1000, 100, 90, 2.6)),
    "velocity instead": (
        plain(servo='<velocity joint="j{}" kv="30" forcerange="-40 40"/>'),
        (1000, 100, 40, 2.6),
    ),
    "no limit": (plain(servo=SERVO.replace('forcerange="-90 90"', "")), (800, 80, 0, 2.6)),
    "ctrlrange is narrower": (plain(servo=NARROW), (800, 80, 90, 1.5)),
    "ctrlrange alone": (plain(servo=NARROW, limits=False), (800, 80, 90, 1.5)),
}


@pytest.mark.parametrize("case", SERVOS)
def test_a_servo_is_what_arrives_at_the_joint(case, tmp_path):
    text, (kp, kv, torque, limit) = SERVOS[case]
    (tmp_path / "arm.xml").write_text(text)
    robot = added(tmp_path / "arm.xml", tmp_path)
    assert np.isclose(robot.model.actuator_gainprm[2, 0], kp)
    assert np.isclose(-robot.model.actuator_biasprm[2, 2], kv)
    assert np.allclose(robot.model.actuator_forcerange[2], [-torque, torque])
    assert np.allclose(robot.joint_range[2], [-limit, limit])


def test_angles_count_from_the_file_s_reference(tmp_path, reference):
    (tmp_path / "arm.xml").write_text(plain(joint='ref="0.4"'))
    mine = added(tmp_path / "arm.xml", tmp_path)
    qpos = np.full(7, 0.3)
    shifted = qpos + 0.4 * (np.arange(7) == 2)
    a = Kinematics(mine).forward(shifted)[0]
    assert np.allclose(a, Kinematics(reference).forward(qpos)[0], atol=1e-5)


COUPLED = '<equality><joint joint1="j4" joint2="j3" polycoef="0 -1 0 0 0"/></equality>'
PULLED = '<tendon><fixed name="t"><joint joint="j3" coef="1"/></fixed></tendon>'
STAND = '<body name="stand"><geom type="sphere" size="0.1"/>'
REFUSED = {
    "slide": (plain(joint='type="slide"'), {}, "l3 must be a hinge, and the only joint"),
    "spring": (plain(joint='stiffness="20"'), {}, "l3 has a spring"),
    "coupled": (plain(end=COUPLED), {}, "l3 is coupled to another"),
    "tendon": (plain(end=PULLED), {}, "l3 is pulled by a tendon"),
    "no site": (plain(site=""), {}, "--site.*choose from: base, l1"),
    "velocity beside": (plain(servo=BESIDE), {}, "l1 has two actuators"),
    "axes": (plain(), {"axes": "z,z"}, "name two axes"),
    "sideways": (
        plain(site=SITE.replace("/>", ' euler="0 -1.5707963 0"/>')),
        {},
        "does not point outward: .*--axes",
    ),
    "stand": (plain('pos="0 0 0.8"', above=STAND), {}, "--base to name the body.*stand, base"),
    "few joints": (plain(), {"site": "l4", "axes": "z,y"}, "4 joints before l4"),
    "no reach": (plain().replace("-2.6 2.6", "-0.1 0.1"), {}, "cannot point straight down"),
    "not XML": ("<mujoco><worldbody/>", {}, "cannot read"),
    "mesh": (plain(end='<asset><mesh name="m" file="no.stl"/></asset>'), {}, "cannot read.*no.stl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_arm_that_cannot_be_kept_is_refused_with_the_reason(case, tmp_path, monkeypatch):
    text, flags, reason = REFUSED[case]
    (tmp_path / "arm.xml").write_text(text)
    before = sorted(ARMS.iterdir())
    config = AddConfig(mjcf=str(tmp_path / "arm.xml"), name="mine", **flags)
    monkeypatch.setattr(add_robot, "parse", lambda *_, **__: config)
    with pytest.raises(UserError) as error:
        add_robot.main()
    assert re.search(reason, str(error.value))
    assert sorted(ARMS.iterdir()) == before


@pytest.mark.parametrize("name", ["panda", "My Arm", "../arm"])
def test_a_name_is_new_and_plain(name, monkeypatch):
    config = AddConfig(mjcf="arm.xml", name=name)
    monkeypatch.setattr(add_robot, "parse", lambda *_, **__: config)
    with pytest.raises(UserError, match=f"--name {re.escape(name)}"):
        add_robot.main()


def test_the_expert_works_with_a_new_arm(tmp_path, known, monkeypatch, capsys):
    config = AddConfig(mjcf=str(shipped("xarm6", tmp_path)), name="mine")
    monkeypatch.setattr(add_robot, "parse", lambda *_, **__: config)
    monkeypatch.setattr(add_robot, "ARMS", tmp_path / "arms")
    add_robot.main()
    assert "mine: 6 joints" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "arms").iterdir()] == ["mine.xml"]
    known(data.robots.Robot("mine", Path(tmp_path / "arms" / "mine.xml")))
    assert demonstrate(TabletopEnv("mine", "StackCube", render=False), 0).success
