"""The scripted expert: it solves every task within the limits, and replans from any state."""

import numpy as np
import pytest

from data.env import CONTROL_HZ, TabletopEnv
from data.expert import Infeasible, Primitive, demonstrate, grasp, plan, tool_rotation
from data.robots import ROBOTS, get_robot
from data.tasks import TASKS


def demonstrate_watched(env, seed, look):
    """A demonstration, and look(env) before every control step."""
    seen = []
    step = env.step

    def watched_step(action):
        seen.append(look(env))
        return step(action)

    env.step = watched_step
    return demonstrate(env, seed), seen


@pytest.mark.parametrize("robot", ROBOTS)
@pytest.mark.parametrize("task", TASKS)
def test_expert_solves_every_task(robot, task):
    env = TabletopEnv(robot, task, render=False)
    limit = env.robot.velocity_limit / CONTROL_HZ
    low, high = env.robot.joint_range.T
    for seed in (0, 1):
        demonstration = demonstrate(env, seed, noise=0.015)
        assert demonstration.success
        assert len(demonstration.states) == len(demonstration.actions) == len(demonstration.phases)
        arm = demonstration.actions[:, :-1]
        assert (arm >= low - 1e-6).all() and (arm <= high + 1e-6).all()
        assert (np.abs(np.diff(arm, axis=0)) <= limit + 1e-6).all()


def test_same_seed_same_demonstration_whatever_came_before():
    env = TabletopEnv("xarm7", "LiftPegUpright", render=False, varied="all")
    first = demonstrate(env, 4, noise=0.015)
    demonstrate(env, 5, noise=0.015)
    again = demonstrate(env, 4, noise=0.015)
    assert np.array_equal(first.states, again.states)
    assert np.array_equal(first.actions, again.actions)


def test_disturbances_are_executed_but_not_recorded():
    env = TabletopEnv("widowx", "PickCube", render=False)
    clean = demonstrate(env, 3)
    noisy = demonstrate(env, 3, noise=0.015)
    assert np.array_equal(clean.actions[:10], noisy.actions[:10])
    assert not np.array_equal(clean.states[:10], noisy.states[:10])


def test_a_held_cube_stays_held_while_the_arm_moves():
    env = TabletopEnv("widowx", "PickCube", render=False)
    demonstration, held = demonstrate_watched(env, 3, lambda env: env.grasped("cube"))
    carried = [now for now, phase in zip(held, demonstration.phases) if phase == "carry"]
    assert len(carried) > 5 and all(carried)


@pytest.mark.parametrize("robot", ROBOTS)
def test_a_grip_is_steady(robot):
    env = TabletopEnv(robot, "StackCube", render=False)
    fingers = slice(env.robot.dof, env.robot.dof + 2)
    demonstration, seen = demonstrate_watched(env, 1, lambda env: env.data.qpos[fingers].copy())
    carried = [now for now, phase in zip(seen, demonstration.phases) if phase == "carry"]
    assert len(carried) > 5 and np.ptp(carried, axis=0).max() < 1e-3
    assert np.abs(np.mean(carried, axis=0) - 0.02).max() < 1.5e-3


@pytest.mark.parametrize("robot", ROBOTS)
def test_the_expert_goes_on_from_a_missed_grasp(robot):
    env = TabletopEnv(robot, "PickCube", render=False)
    env.reset(3)
    beside = env.position("cube") + (0.0, 0.065, 0.0)
    for _, targets in plan(env, grasp(env, "cube", beside, 0.0)):
        for target in targets:
            env.step(target)
    assert not env.grasped("cube")
    demonstration = demonstrate(env, 3, reset=False)
    assert demonstration.success and demonstration.phases[0] == "retreat"
    assert demonstration.actions[0, -1] == np.float32(env.robot.travel)


def test_a_hand_that_is_above_its_object_goes_straight_down():
    env = TabletopEnv("panda", "PickCube", render=False)
    env.reset(3)
    whole = plan(env, grasp(env, "cube", env.position("cube"), 0.0))
    assert [name for name, _ in whole] == ["approach", "descend", "grasp"]
    for target in whole[0][1]:
        env.step(target)
    for _ in range(10):  # the servos catch up
        env.step(whole[0][1][-1])
    rest = plan(env, grasp(env, "cube", env.position("cube"), 0.0))
    assert [name for name, _ in rest] == ["descend", "grasp"]


@pytest.mark.parametrize("robot", ROBOTS)
def test_tools_point_down_and_tilt_forwards(robot):
    straight = tool_rotation(get_robot(robot), 0.4, 0.0)
    assert np.allclose(straight @ straight.T, np.eye(3)) and np.isclose(np.linalg.det(straight), 1)
    assert np.allclose(straight[:, 2], [0, 0, -1]) and np.isclose(straight[2, 1], 0)
    tilted = tool_rotation(get_robot(robot), 0.4, 0.3)
    ahead = np.sin(0.3) * np.array([np.cos(0.4), np.sin(0.4)])
    assert np.allclose(tilted[:2, 2], ahead) and np.isclose(tilted[2, 1], 0)


def test_paths_do_not_lead_through_the_table():
    env = TabletopEnv("panda", "PickCube", render=False)
    env.reset(0)
    for depth in (0.02, -0.08):
        below = Primitive("descend", 0.0, np.array([0.0, 0.0, depth]), 0.0)
        if depth > 0:
            plan(env, [below])
        else:
            with pytest.raises(Infeasible):
                plan(env, [below])
