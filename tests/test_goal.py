"""A goal is planned, carried out step by step and judged, all by the model's replies."""

import numpy as np
import pytest

import goal
from data.env import TabletopEnv
from data.expert import control_steps
from data.tasks import MAX_STEPS
from goal import Step, carry_out, go_home, write_plan
from nano.command_questions import WORDINGS


class Model:
    """Replaces BLM: replies as the test says, and acts as the expert for the scene's command."""

    def __init__(self, env, plan="", refused=(), done=lambda: True):
        self.env = env
        self.plan = plan
        self.refused = refused
        self.done = done
        self.targets = {}  # of each instruction

    def answer(self, images, question):
        assert [image.shape for image in images] == [(128, 128, 3)] * 2
        if question == goal.LIST.format("x"):
            return self.plan
        if question.startswith("Can this"):
            refused = any(command in question for command in self.refused)
            return "no: there is no yellow ball" if refused else "yes"
        return "yes" if self.done() else "no"

    def act(self, observation, robot):
        instruction = observation["instruction"]
        assert instruction == self.env.instruction
        targets = self.targets.setdefault(instruction, control_steps(self.env))
        _, target, _ = next(targets)
        return target[None]  # one step at a time, so that the expert sees the result


@pytest.fixture
def env():
    env = TabletopEnv("xarm6", "which_way", render=False)
    env.reset(3)
    return env


def test_a_plan_is_read_from_a_numbered_list(env):
    images = goal.pictures(env)
    assert write_plan(Model(env, "1. push the red cube 2. put 2 cubes down"), images, "x") == [
        "push the red cube",
        "put 2 cubes down",
    ]
    for reply in ("", "yes", '{"point_2d": [3, 4]}'):
        assert write_plan(Model(env, reply), images, "x") == []


def test_it_asks_as_stage_1_does():
    for kind, question in (("goal", goal.LIST), ("possible", goal.IS_POSSIBLE)):
        assert question in WORDINGS[kind]["seen"]
    assert goal.IS_DONE in WORDINGS["done"]["seen"]


def test_what_cannot_be_done_is_not_begun(env):
    before = env.data.qpos.copy()
    steps = list(carry_out(Model(env, refused=["b"]), env, ["b", "c"]))
    assert steps == [Step("b", "there is no yellow ball")]
    assert (env.data.qpos == before).all()


def test_steps_follow_each_other_until_the_model_sees_them_done(env):
    model = Model(env, done=env.succeeded)
    walk = carry_out(model, env, ["first", "second"])
    for number in (0, 1):
        env.begin(number)
        step = next(walk)
        assert step.outcome == "done" and 0 < step.steps < MAX_STEPS
        assert env.succeeded()
    assert next(walk, None) is None


def test_a_step_that_is_never_done_is_given_up_after_two_tries(env, monkeypatch):
    monkeypatch.setattr(goal, "MAX_STEPS", 24)
    counted = []
    model = Model(env, done=lambda: False)
    steps = list(carry_out(model, env, ["a", "b"], after_step=lambda: counted.append(1)))
    assert steps == [Step("a", "given up", 48)]
    assert len(counted) == 48


def test_the_arm_goes_home_open(env):
    env.set_arm([*(env.robot.home + 0.2), 0.0])
    go_home(env)
    joints = env.state()[: env.robot.dof]
    assert np.abs(joints - env.robot.home).max() < 0.03
    assert env.state()[env.robot.dof] > 0.9 * env.robot.travel
