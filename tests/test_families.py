"""Scenes with several commands: all can be done, only the words tell, and words say what is there."""

import numpy as np
import pytest

from cli import UserError
from data import seeds
from data.env import TabletopEnv
from data.expert import demonstrate
from data.families import CLEAR, FAMILIES, arrange, instruct, plain, relations, sequence
from data.robots import ROBOTS, get_robot
from data.tasks import RGBA, TASKS


def tables(family, robot="widowx", n=30, new=False):
    for seed in range(n):
        yield arrange(FAMILIES[family], get_robot(robot), np.random.default_rng(seed), new)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_does_each_of_two_commands_and_moves_nothing_else(family):
    env = TabletopEnv("xarm6", family, render=False)
    for command in (0, 1):
        assert demonstrate(env, 3, command=command).success
        assert env.succeeded()
        env.give(1 - command)
        assert not env.succeeded()


def test_two_commands_of_a_scene_begin_with_the_same_pictures_and_other_words():
    env = TabletopEnv("panda", "which_stack")
    first, _ = env.reset(5, command=0)
    second, _ = env.reset(5, command=1)
    for view in ("front", "wrist"):
        assert (first["images"][view] == second["images"][view]).all()
    assert (first["state"] == second["state"]).all()
    assert first["instruction"] != second["instruction"]


@pytest.mark.parametrize("family", FAMILIES)
def test_combinations_kept_out_of_training_come_only_when_asked_for(family):
    for table in tables(family):
        assert len(table.commands) > 1
        assert not any(map(table.is_new, table.commands))
    for table in tables(family, new=True):
        first, *others = table.commands
        assert table.is_new(first)
        assert not any(map(table.is_new, others))


@pytest.mark.parametrize("robot", ROBOTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_things_lie_apart_and_things_of_a_kind_differ_in_color(family, robot):
    for table in tables(family, robot, 10):
        things = [name for name in table.layout if "target" not in name]
        places = np.array([table.layout[name][0][:2] for name in things])
        first, second = np.triu_indices(len(places), 1)
        assert np.linalg.norm(places[first] - places[second], axis=1).min() > 0.08 - 1e-9
        labels = [table.label(name) for name in things]
        assert len(set(labels)) == len(labels)


def test_left_is_left_in_the_front_picture_and_near_is_near_the_robot():
    env = TabletopEnv("panda", "which_cube", render=False)
    asked = 0
    for seed in range(40):
        env.reset(seed)
        camera = env.data.camera("front")
        right = camera.xmat.reshape(3, 3)[:, 0]  # in the world
        cubes = [name for name in env.family.bodies if "cube" in name]
        for name in cubes:
            words = relations(env.table, name)
            across = {cube: env.position(cube) @ right for cube in cubes}
            away = {cube: np.linalg.norm((env.position(cube) - env.base)[0]) for cube in cubes}
            if "the left cube" in words:
                assert min(across, key=across.get) == name
                asked += 1
            if "the nearest cube" in words:
                assert min(away, key=away.get) == name
                ordered = sorted(away.values())
                assert ordered[1] - ordered[0] > CLEAR
    assert asked > 10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wordings", ["seen", "held_out", "off_template"])
def test_a_sentence_names_what_its_command_is_about(family, wordings):
    for seed, table in enumerate(tables(family)):
        for command in table.commands:
            text = instruct(table, command, np.random.default_rng(seed), wordings)
            assert "{" not in text
            for color in RGBA:
                if color in ("red", "white", "green", "blue"):  # also of targets, marker and peg
                    continue
                named = [table.colors.get(body) for body in command.roles.values()]
                assert color not in text or color in named


def test_words_kept_for_evaluation_are_not_trained_on():
    for task in TASKS.values():
        kept = {*task.held_out_commands, *task.off_template_commands}
        assert not set(task.commands) & kept


def test_a_command_is_not_done_if_something_else_was_moved():
    env = TabletopEnv("panda", "which_cube", render=False)
    assert demonstrate(env, 1).success
    other = next(name for name in env.start if name not in env.roles.values())
    env.place(other, env.position(other) + (0.031, 0, 0))
    env.step(env.data.ctrl[: env.robot.dof + 1])
    assert not env.succeeded()


def test_layouts_of_families_come_from_streams_of_their_own():
    numbers = [seeds.STREAMS[name] for name in (*TASKS, *FAMILIES)]
    assert len(set(numbers)) == len(numbers)


def test_a_command_that_is_not_there_is_told():
    env = TabletopEnv("panda", "which_bin", render=False)
    with pytest.raises(UserError, match="command 9: this scene has"):
        env.reset(0, command=9)
    with pytest.raises(UserError, match="command 1: this scene has 1"):
        TabletopEnv("panda", "PickCube", render=False).reset(0, command=1)
    with pytest.raises(UserError, match="outside works only for single tasks"):
        TabletopEnv("panda", "which_bin", perturbation="outside")


@pytest.mark.parametrize("length", [2, 3])
def test_commands_of_a_goal_can_follow_each_other(length):
    lengths = set()
    for table in tables("mixed", n=40):
        commands = sequence(table, length, np.random.default_rng(0))
        lengths.add(len(commands))
        tasks = [command.task for command in commands]
        assert "PickCube" not in tasks[:-1]  # it would hold the cube for ever
        moved = [next(iter(command.roles.values())) for command in commands]
        filled = [
            list(command.roles.values())[1] for command in commands if command.task != "PickCube"
        ]
        assert len(set(filled)) == len(filled)
        assert not set(moved) & set(filled)
    assert lengths == {0, length} or lengths == {length}


def test_a_plain_command_is_a_wording_that_training_knows():
    for table in tables("which_bin", n=5):
        for command in table.commands:
            things = table.things(command)
            assert plain(command.task, things) == "put the {} into the {}".format(*things)


def test_what_a_second_command_finds_is_what_must_stay():
    env = TabletopEnv("xarm6", "which_stack", render=False)
    assert demonstrate(env, 3).success
    assert env.succeeded()
    env.give(1)
    assert not env.succeeded()  # the first command's cube has moved
    env.begin(0)
    assert env.succeeded()
