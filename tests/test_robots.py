"""The arms: kinematics against published poses, inverse kinematics, files that say what is wrong."""

import numpy as np
import pytest

from cli import UserError
from data.expert import tool_rotation
from data.robots import ROBOTS, SHIPPED, Robot, get_kinematics, get_robot

# TCP positions (m, base frame) that the arms' sources publish for these joint angles (rad)
PANDA_DOWN = [0.0, 0.392699, 0.0, -1.963495, 0.0, 2.356194, 0.785398]
PANDA_UP = [0.0, 0.0, 0.0, -1.57079, 0.0, 1.57079, -0.7853]
XARM6 = [0.001563, -1.109124, -0.097134, 0.000153, 1.206067, 0.001662]
POSES = [
    ("panda", PANDA_DOWN, [0.615, 0.0, 0.1698]),
    ("panda", PANDA_UP, [0.5545, 0.0, 0.5211]),
    ("xarm6", XARM6, [0.1928, 0.0003, 0.1229]),
    ("xarm7", [0.0, -0.247, 0.0, 0.909, 0.0, 1.15644, 0.0], [0.3998, 0.0, 0.2278]),
    ("xarm7", [0.0, -0.4, 0.0, 0.5, 0.0, 0.9, -3.0], [0.3267, 0.0, 0.1361]),
    ("widowx", [0.0, 1.38, 1.04, -1.26, 0.0, 0.0], [0.2135, 0.0, 0.0849]),
    ("widowx", [0.0, 2.08, 0.41, 1.57, 0.0, 0.0], [0.4356, 0.0, 0.059]),
]


@pytest.mark.parametrize(("robot", "qpos", "tcp"), POSES)
def test_forward_kinematics_matches_published_poses(robot, qpos, tcp):
    assert np.allclose(get_kinematics(robot).forward(qpos)[0], tcp, atol=1e-4)


@pytest.mark.parametrize("name", ROBOTS)
def test_inverse_kinematics_inverts_and_refuses(name):
    kinematics = get_kinematics(name)
    robot = get_robot(name)
    low, high = robot.joint_range.T
    rng = np.random.default_rng(0)
    for _ in range(5):
        target = np.array([robot.spawn_distance, 0, 0.06]) + rng.uniform(-0.05, 0.05, 3)
        rotation = tool_rotation(robot, rng.uniform(-0.5, 0.5), 0.2)
        qpos = kinematics.solve_ik(target, rotation, robot.home)
        at, turned = kinematics.forward(qpos)
        assert np.abs(at - target).max() < 1e-3
        assert np.abs(turned - rotation).max() < 3e-3
        assert (qpos >= low).all() and (qpos <= high).all()
    assert kinematics.solve_ik(np.array([2.0, 0, 0.1]), rotation, robot.home) is None


def test_the_order_of_the_arms_is_that_of_the_tables():
    assert ROBOTS[:4] == SHIPPED == ("panda", "xarm6", "xarm7", "widowx")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_vector_has_the_documented_size(name):
    robot = get_robot(name)
    assert len(robot.home) == len(robot.velocity_limit) == len(robot.joint_range) == robot.dof
    assert (robot.state_dim, robot.action_dim) == (robot.dof + 10, robot.dof + 1)
    clipped = robot.clip(np.full(robot.action_dim, 99.0))
    assert (clipped[:-1] == robot.joint_range[:, 1]).all() and clipped[-1] == robot.travel


@pytest.mark.parametrize("what", ['name="home"', "</worldbody>", 'name="tcp"'])
def test_a_broken_arm_is_one_line_with_its_file(what, tmp_path):
    path = tmp_path / "mine.xml"
    path.write_text(get_robot("panda").path.read_text().replace(what, 'name="x"'))
    if what == 'name="tcp"':
        path.write_text("not an arm")
    with pytest.raises(UserError, match=r"mine\.xml.*add_robot"):
        Robot("mine", path)
