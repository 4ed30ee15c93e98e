"""A rollout: how often the policy observes, and why an episode failed."""

import numpy as np

from data.env import TabletopEnv
from data.robots import get_robot
from rollout import rollout


class Lazy:
    """A policy that leans to one side and stays there."""

    def __init__(self, env):
        self.env = env
        self.asked = []  # steps

    def act(self, observation, robot):
        self.asked.append(self.env.steps)
        return np.tile(np.append(get_robot(robot).home + (0.3, 0, 0, 0, 0, 0), 0.0), (16, 1))


def test_a_rollout_looks_every_few_steps_and_says_why_it_failed():
    env = TabletopEnv("widowx", "StackCube", render=False)
    lazy = Lazy(env)
    result = rollout(lazy, env, 5, execute_steps=6, max_steps=20)
    assert (
        not result["success"]
        and result["steps"] == 20
        and result["reason"] == "never grasped"
        and lazy.asked == [0, 6, 12, 18]
    )
    for held, reason in (([0, 1, 1], "held to the end"), ([0, 1, 0], "let go elsewhere")):
        assert env.why(held) == reason
    assert TabletopEnv("widowx", "PushCube").why([0]) == "missed the target"
