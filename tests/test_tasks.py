"""The tasks: success conditions both ways, layouts in reach, wordings apart."""

import numpy as np
import pytest
from test_env import settle

from data import seeds
from data.env import TabletopEnv
from data.robots import ROBOTS, get_robot
from data.simulator import mujoco
from data.tasks import PEG_LENGTH, TASKS, reachable


def put(env, name, position, yaw=0.0):
    env.place(name, position, yaw)
    mujoco.mj_forward(env.model, env.data)


def fresh(robot, task):
    env = TabletopEnv(robot, task, render=False)
    env.reset(0)
    return env


@pytest.fixture(params=["panda", "widowx"])
def robot(request):
    return request.param


def test_a_cube_is_pushed_when_it_lies_on_the_target(robot):
    env = fresh(robot, "PushCube")
    goal = env.position("goal")
    radius = 0.1 * env.robot.scale
    for distance, done in ((0.95 * radius, True), (1.05 * radius, False)):
        put(env, "cube", goal + (distance, 0, 0.0195))
        assert settle(env, 1)["success"] is done
    put(env, "cube", goal + (0, 0, 0.1))
    assert not env.task.success(env)["on_table"]


def test_cubes_are_stacked_when_one_rests_on_the_other(robot):
    env = fresh(robot, "StackCube")
    under = env.position("cubeB")
    for offset, done in ((0.015, True), (0.06, False)):
        put(env, "cubeA", under + (offset, 0, 0.0405))
        assert settle(env, 12)["success"] is done
    env.place("cubeB", under)
    put(env, "cubeA", under + (0, 0, 0.1))
    assert not env.task.success(env)["height"]


def test_a_ball_is_placed_when_it_rests_in_the_bin(robot):
    env = fresh(robot, "PlaceSphere")
    put(env, "sphere", env.position("bin") + (0, 0, 0.026))
    assert settle(env, 20)["success"]
    put(env, "sphere", env.position("bin") + (0.05, 0, 0.0175))
    assert not settle(env, 20)["success"]


def test_a_peg_stands_on_either_end(robot):
    env = fresh(robot, "LiftPegUpright")
    assert not settle(env, 2)["success"]
    # 0.12 rad off is too much
    for tilt, done in ((np.pi / 2, True), (-np.pi / 2, True), (np.pi / 2 - 0.12, False)):
        turn = [np.cos(tilt / 2), 0, np.sin(tilt / 2), 0]
        env.data.joint(env.model.body("peg").jntadr[0]).qpos[:] = [0.05, 0, PEG_LENGTH, *turn]
        mujoco.mj_forward(env.model, env.data)
        assert all(env.task.success(env).values()) is done


def test_a_cube_is_picked_when_it_is_held_still_at_the_goal(robot):
    env = fresh(robot, "PickCube")
    threshold = 0.0225 if robot == "widowx" else 0.025
    for distance, done in ((0.9, True), (1.1, False)):
        put(env, "cube", env.position("goal") + (0, distance * threshold, 0))
        assert all(env.task.success(env).values()) is done
    env.data.qvel[0] = 0.3
    put(env, "cube", env.position("goal"))
    assert not env.task.success(env)["robot_static"]


def test_ball_comes_to_rest_only_with_rolling_friction():
    env = fresh("panda", "PlaceSphere")
    assert env.model.geom("sphere").condim[0] == 6
    settle(env, 10)
    assert env.task.success(env)["at_rest"]


def test_a_small_arm_has_smaller_things():
    for name, half, mass, goal in (
        ("panda", 0.02, 0.064, 0.025),
        ("widowx", 0.018, 0.04666, 0.0225),
    ):
        model = fresh(name, "PickCube").model
        assert (model.geom("cube").size == half).all() and model.body("cube").mass == mass
        assert model.geom("goal").size[0] == goal
    rings = fresh("widowx", "PullCube").model.body("goal").geomadr[0]
    assert np.isclose(fresh("widowx", "PullCube").model.geom_size[rings, 0], 0.06)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ROBOTS)
def test_what_must_be_grasped_lies_in_reach(name, task):
    for seed in range(30):
        layout = TASKS[task].spawn(get_robot(name), seeds.rng(seed, task))
        first = layout[next(iter(TASKS[task].labels))][0]
        assert reachable(get_robot(name), first[:2])


def test_held_out_wordings_are_never_seen_in_training():
    for task in TASKS.values():
        assert task.held_out and not set(task.held_out) & set(task.instructions + task.paraphrases)
    env = TabletopEnv("panda", "PickCube", render=False)
    seen = {env.reset(seed)[0]["instruction"] for seed in range(12)}
    held_out = TASKS["PickCube"].held_out
    assert len(seen) > 2 and not seen & set(held_out)
    env = TabletopEnv("panda", "PickCube", render=False, wordings="held_out")
    assert env.reset(0)[0]["instruction"] in held_out


def test_streams_are_apart():
    """Two share a number with others, which no episode has: corrections and scenes of Stage I."""
    numbers = [seeds.STREAMS[name] for name in seeds.STREAMS if name not in ("takeover", "wording")]
    assert len(set(numbers)) == len(numbers)
    assert [seeds.STREAMS[name] for name in TASKS] == [0, 1, 2, 3, 4, 5]
    one, same = seeds.rng(3, "camera"), seeds.rng(3, "camera")
    assert one.random() == same.random() != seeds.rng(3, "sensor").random()
