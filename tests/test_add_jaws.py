"""An arm's own gripper with jaws that turn: one number opens it, the file's own servo closes it."""

import numpy as np
import pytest
from test_add_gripper import OPTIONS, anywhere, fitted  # noqa: F401 (anywhere is a fixture)
from test_add_robot import JOINTS, plain

from data.add_gripper import CONTACT, corners
from data.add_jaws import CLEARANCE, CUBE, WIDE, WIDE_ALONE
from data.env import TabletopEnv
from data.expert import demonstrate
from data.robots import FORCE, LEAN, Kinematics
from data.simulator import mujoco

# a pad is a box whose inner face is at y = 0 when its jaw is closed, and ends at z = 0.12
PAD = f'<geom type="box" size="0.01 0.005 0.03" pos="0 {{0}} {{1}}" {OPTIONS}/>'
FIXED = PAD.format(-0.005, 0.09)
MESH = '<geom type="mesh" mesh="{}"/>'


def jaw(name, side, axis="-1 0 0", limits="0 0.9", pad=PAD, more=""):
    """A jaw that turns outward about x, mounted 2 cm beside the middle."""
    return f"""<body name="{name}" pos="0 {0.02 * side} 0.03">
    <joint name="{name}" axis="{axis}" range="{limits}" damping="0.1" armature="0.01" {more}/>
    <inertial pos="0 0 0.05" mass="0.05" diaginertia="1e-5 1e-5 1e-5"/>
    {pad.format(-0.015 * side, 0.06)}</body>"""


HAND = '<body name="hand" pos="0 0 0.08">{}</body>'
SERVO = (
    '<actuator><position joint="a" kp="20" kv="1" ctrlrange="0 0.9" forcerange="-4 4"/></actuator>'
)
LINKAGE = """<tendon><fixed name="both"><joint joint="a" coef="0.5"/><joint joint="b" coef="0.5"/>
    </fixed></tendon><equality><joint joint1="b" joint2="a" solref="0.005 1"/></equality>
    <actuator><general tendon="both" ctrlrange="0 255" forcerange="-8 8" biastype="affine"
    gainprm="0.14117647" biasprm="0 -40 -2"/></actuator>"""


def gripped(*parts, end=SERVO):
    return plain(site=HAND.format("".join(parts)), end=end)


ONE = gripped(FIXED, jaw("a", 1))
TWO = gripped(jaw("a", 1), jaw("b", -1, "1 0 0"), end=LINKAGE)
KINDS = {"one": ONE, "two": TWO}
BACK = SERVO.replace('"0 0.9"', '"-0.9 0"')
LIKE_ONE = {
    "turns the other way": gripped(FIXED, jaw("a", 1, "1 0 0", "-0.9 0"), end=BACK),
    "a gain of its own": gripped(
        FIXED,
        jaw("a", 1),
        end="""<actuator><general joint="a" ctrlrange="0 90" forcerange="-4 4"
        biastype="affine" gainprm="0.2" biasprm="0 -20 -1"/></actuator>""",
    ),
    "pads out of reach of each other": gripped(
        FIXED.replace("/>", ' contype="2" conaffinity="2"/>'), jaw("a", 1)
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{kind: Robot}"""
    found = {"home": np.full(7, 0.3), "reach": (0.2, 0.6), "spawn_distance": 0.4}
    robots = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.add_robot.find_workspace", lambda robot: found)
        for kind, text in KINDS.items():
            robots[kind] = fitted(text, tmp_path_factory.mktemp(kind))
    return robots


def gap(robot, opening):
    """m along the closing axis, between the innermost corners at the ends of the two pads."""
    kinematics = Kinematics(robot)
    kinematics.data.qpos[robot.dof :] = robot.finger_joints(opening)
    _, tool = kinematics.forward(np.full(robot.dof, 0.3))
    faces = []
    for name, side in (("left_pad", 1), ("right_pad", -1)):
        pad = kinematics.data.geom(name)
        corner = pad.xpos + pad.xmat.reshape(3, 3) @ (0, -0.005 * side, 0.03)
        faces.append(corner @ tool[:, 1])
    return faces[0] - faces[1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_opening_is_half_the_way_between_the_pads(kind, made):
    robot = made[kind]
    assert robot.travel == (WIDE_ALONE if kind == "one" else WIDE)
    for opening in (0.0, 0.01, CUBE, 0.03):
        assert np.isclose(gap(robot, opening), 2 * opening, atol=5e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_servo_goes_where_it_is_sent_and_the_state_says_so(kind, made):
    env = TabletopEnv(str(made[kind].path), "PickCube", render=False)
    env.reset(0)
    dof = env.robot.dof
    assert np.isclose(env.state()[dof], env.robot.travel, atol=1e-4)
    for target in (CUBE, 0.0, 0.03):
        for _ in range(25):
            env.step([*env.robot.home, target])
        assert np.isclose(env.state()[dof], target, atol=1e-3)
        assert env.target[-1] == target


@pytest.mark.parametrize("case", LIKE_ONE)
def test_the_same_jaw_written_otherwise_is_the_same_jaw(case, tmp_path, made):
    mine = fitted(LIKE_ONE[case], tmp_path)
    known = made["one"]
    assert np.allclose(mine.model.site("tcp").pos, known.model.site("tcp").pos, atol=1e-4)
    assert np.isclose(mine.finger_kp, known.finger_kp, rtol=0.05)
    for opening in (0.0, CUBE):
        assert np.isclose(gap(mine, opening), 2 * opening, atol=5e-4)


def test_the_tool_is_between_two_jaws_and_clear_of_a_fixed_one(made):
    two = made["two"].model.site("tcp").pos
    assert np.allclose(two[:2], 0, atol=1e-4)
    one = made["one"].model.site("tcp").pos
    assert np.isclose(one[1], CUBE + CLEARANCE, atol=1e-4)
    assert np.isclose(made["one"].fist, -one[1], atol=1e-3)
    # 10 mm behind the end of the pads
    assert np.isclose(one[2], 0.11, atol=3e-3)


def test_pads_touch_as_they_do_in_their_file(made):
    wanted = mujoco.MjModel.from_xml_string(
        f"<mujoco><worldbody>{PAD}</worldbody></mujoco>".format(0, 0)
    )
    for robot in made.values():
        for name in ("left_pad", "right_pad"):
            pad = robot.model.geom(name).id
            assert robot.model.geom_contype[pad] == 1
            for option in CONTACT:
                ours = getattr(robot.model, f"geom_{option}")[pad]
                assert np.allclose(ours, getattr(wanted, f"geom_{option}")[0]), option


def test_a_linkage_stays_as_it_is(made):
    model = made["two"].model
    assert (model.neq, model.ntendon, model.nu) == (1, 1, 8)
    assert np.allclose(model.actuator_biasprm[-1, :3], (0, -40, -2))
    assert np.allclose(model.actuator_forcerange[-1], (-8, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cube_is_pressed_by_what_the_servo_can_give(kind, made):
    robot = made[kind]
    model = robot.model
    data = mujoco.MjData(model)
    data.qpos[robot.dof :] = robot.finger_joints(CUBE)
    data.ctrl[-1] = robot.finger_control(robot.squeeze)
    mujoco.mj_forward(model, data)
    near = np.array(robot.finger_joints(CUBE - 1e-3)) - data.qpos[robot.dof :]
    force = data.qfrc_actuator[robot.dof :] @ near / 2e-3
    assert force > 0.8 * FORCE


def bracket(name, side):
    """MJCF of a mesh: a rod along z with a foot outwards at its lower end; hollow between them."""
    points = []
    faces = []
    for low, high in (((-0.005, 0), (0.005, 0.12)), ((0.005, 0), (0.03, 0.01))):
        first = len(points)
        for x in (-0.01, 0.01):
            for y, z in (
                (low[0], low[1]),
                (high[0], low[1]),
                (high[0], high[1]),
                (low[0], high[1]),
            ):
                points.append((x, side * y, z))
        for a, b, c, d in ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 5, 4), (1, 2, 6, 5), (2, 3, 7, 6)):
            faces += [(first + a, first + b, first + c), (first + a, first + c, first + d)]
    texts = (" ".join(map(str, np.ravel(part))) for part in (points, faces))
    return '<mesh name="{}" inertia="shell" vertex="{}" face="{}"/>'.format(name, *texts)


def test_the_hollow_of_a_mesh_stays_empty(tmp_path):
    # its foot points inwards, below where the cube is
    fixed = MESH.format("fixed").replace("/>", ' pos="0 -0.005 0"/>')
    assets = f"<asset>{bracket('fixed', 1)}</asset>"
    robot = fitted(gripped(fixed, jaw("a", 1), end=SERVO + assets), tmp_path)
    model = robot.model
    kinematics = Kinematics(robot)
    at, tool = kinematics.forward(np.full(7, 0.3))
    reaching = []
    for pad in (i for i in range(model.ngeom) if model.geom(i).name.startswith("right_pad")):
        turned = kinematics.data.geom_xmat[pad].reshape(3, 3)
        points = kinematics.data.geom_xpos[pad] + corners(model, pad) @ turned.T
        reaching.append((points - at) @ tool)
    assert len(reaching) > 5
    reaching = np.vstack(reaching)
    # next to a cube there is only the rod's face; a single hull would reach 2 cm farther
    beside = reaching[reaching[:, 2] > -0.07]
    assert beside[:, 1].max() < -CUBE - CLEARANCE + 1e-4
    assert reaching[:, 1].max() > -0.005  # the foot


MOTOR = '<actuator><motor joint="a" ctrlrange="-1 1"/></actuator>'
NOT_KEPT = {
    "motor": (gripped(FIXED, jaw("a", 1), end=MOTOR), "its servo holds no position"),
    "endless": (
        gripped(FIXED, jaw("a", 1), end=SERVO.replace('ctrlrange="0 0.9"', "")),
        "its servo has no range",
    ),
    "narrow": (
        gripped(FIXED, jaw("a", 1), end=SERVO.replace('"0 0.9"', '"0 0.4"')),
        "its jaws open from 0.000 to 0.0",
    ),
    "many": (
        gripped(jaw("a", 1), jaw("b", -1, "1 0 0"), end=SERVO + SERVO.replace('"a"', '"b"')),
        "its own has 2 servos",
    ),
    "askew": (
        gripped(jaw("a", 1), jaw("b", -1, "0 0 1"), end=LINKAGE),
        "its joints do not turn about one direction",
    ),
}


@pytest.mark.parametrize("case", NOT_KEPT)
def test_other_jaws_make_way_for_the_xarm_s_and_the_file_says_why(case, tmp_path):
    text, reason = NOT_KEPT[case]
    robot = fitted(text, tmp_path)
    assert robot.jaws is None
    assert reason in mujoco.MjSpec.from_file(str(robot.path)).text("gripper").data


@pytest.mark.parametrize("kind", KINDS)
def test_jaws_grasp_and_lift(kind, tmp_path, monkeypatch):
    # a value as data.add_robot would compute it, which takes seconds
    found = {
        "home": (-0.0524, 0.3951, 1.1367, 1.0634, 0.0, 0.5463, -0.0524),
        "reach": (0.1562, 0.7562),
        "spawn_distance": 0.5462,
    }
    monkeypatch.setattr("data.add_robot.find_workspace", lambda robot: found)
    robot = fitted(KINDS[kind], tmp_path)
    env = TabletopEnv(str(robot.path), "PickCube", render=False)
    assert [len(pads) for pads in env.pads] == [1, 1]
    assert demonstrate(env, 0).success


def test_five_joints_reach_a_place_and_lean_as_they_must(tmp_path, monkeypatch):
    found = {"home": np.full(5, 0.3)}
    monkeypatch.setattr("data.add_robot.find_workspace", lambda robot: found)
    text = ONE
    for number in (5, 6):  # two of the plain arm's seven joints become fixed
        _, axis, limit, _ = JOINTS[number - 1]
        joint = f'<joint name="j{number}" axis="{axis}" range="{limit}" />'
        assert joint in text
        servo = f'<position joint="j{number}" kp="800" kv="80" forcerange="-90 90"/>'
        text = text.replace(joint, "").replace(servo, "")
    robot = fitted(text, tmp_path)
    assert robot.dof == 5
    kinematics = Kinematics(robot)
    rng = np.random.default_rng(0)
    found = 0
    for qpos in rng.uniform(*robot.joint_range.T / 2, (20, 5)):
        position, rotation = kinematics.forward(qpos)
        turn = np.empty(9)
        mujoco.mju_euler2Quat(quat := np.empty(4), rng.uniform(-0.1, 0.1, 3), "xyz")
        mujoco.mju_quat2Mat(turn, quat)
        start = qpos + rng.uniform(-0.2, 0.2, 5)
        solved = kinematics.solve_ik(position, turn.reshape(3, 3) @ rotation, start)
        if solved is None:
            continue
        found += 1
        at, turned = kinematics.forward(solved)
        assert np.allclose(at, position, atol=3e-4)
        angle = np.arccos((np.trace(turned.T @ turn.reshape(3, 3) @ rotation) - 1) / 2)
        assert angle < LEAN
    assert found > 10
