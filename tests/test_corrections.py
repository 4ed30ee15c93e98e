"""Corrections: a policy begins, the expert takes over where it got to."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import corrections
from cli import UserError
from data import seeds
from data.env import TabletopEnv
from data.expert import demonstrate
from data.record import RecordConfig, record_slice
from data.robots import get_robot
from data.tasks import MAX_STEPS
from embodiment import Embodiment


class Lazy:
    """A policy that leans to one side and stays there."""

    def __init__(self, robots=("widowx",)):
        self.asked = []  # observations
        self.policy = torch.nn.Linear(2, 2)
        self.policy.embodiments = dict.fromkeys(robots, Embodiment(16, 7))

    def require_policy(self):
        return self.policy

    def act(self, observation, robot):
        self.asked.append(observation)
        pose = get_robot(robot).home + (0.3, 0, 0, 0, 0, 0)
        return np.tile(np.append(pose, 0.0), (16, 1))


@pytest.fixture
def lazy(monkeypatch):
    policy = Lazy(("panda", "widowx"))
    monkeypatch.setattr(corrections, "load_model", lambda folder: policy)
    return policy


def call(monkeypatch, *flags):
    """What `python corrections.py ...` passes to the recorder."""
    asked = []

    def keep(config, demonstrate, maker, first_seed):
        asked.append(SimpleNamespace(**vars(config), maker=maker, first_seed=first_seed))
        return {}

    monkeypatch.setattr(corrections, "record", keep)
    monkeypatch.setattr("sys.argv", ["corrections.py", *flags])
    corrections.main()
    return asked[0]


def test_corrections_begin_where_the_policy_was(lazy):
    env = TabletopEnv("widowx", "PickCube", render=False)
    demonstration = corrections.correct("some", env, 5, 0.0, 0)
    assert demonstration.success and demonstration.phases[0] == "retreat"
    assert abs(demonstration.states[0, 0] - 0.3) < 0.02
    # it leaned over in more than one chunk, from where the arm starts
    assert lazy.asked[0]["state"][0] < 0.1 and lazy.asked[-1]["state"][0] > 0.2
    assert len(demonstration.states) <= MAX_STEPS


def test_nothing_is_corrected_where_the_policy_was_done(lazy, monkeypatch):
    monkeypatch.setattr(corrections, "rollout", lambda *args, **options: {"success": True})
    env = TabletopEnv("widowx", "PickCube", render=False)
    assert corrections.correct("some", env, 5, 0.0, 0) is None


def test_a_policy_that_needs_few_corrections_is_no_mistake(tmp_path, capsys):
    def seldom(env, seed, noise, command):
        return demonstrate(env, seed, noise) if seed == 3 else None

    config = RecordConfig(out=str(tmp_path))
    job = (config, seldom, "expert after a policy", "widowx", "PickCube", range(2, 6), 2)
    assert record_slice(job) == ("widowx-PickCube", [])
    assert [path.name for path in tmp_path.iterdir()] == ["widowx-PickCube-3.safetensors"]
    said = capsys.readouterr().out
    assert said == "1 of 2 episodes of widowx PickCube: in 3 others the policy succeeded\n"
    # an expert that fails is a failure
    failure = SimpleNamespace(success=False)
    job = (config, lambda *_: failure, "expert", "widowx", "PushCube", range(2, 6), 2)
    with pytest.raises(UserError, match="0 of 2 episodes of widowx PushCube, and all seeds"):
        record_slice(job)


def test_corrections_have_seeds_of_their_own_and_name_their_policy(lazy, monkeypatch):
    asked = call(monkeypatch, "--policy", "some", "--seed", "10000")
    assert asked.seed == 10_000 and asked.first_seed == seeds.FIRST_CORRECTION == 500_000
    again = call(monkeypatch, "--policy", "a copy of it")
    assert asked.maker == again.maker
    lazy.policy.weight.data += 1
    assert call(monkeypatch, "--policy", "some").maker != asked.maker


def test_corrections_are_of_the_robots_that_the_policy_knows(lazy, monkeypatch):
    assert call(monkeypatch).robots == "panda,widowx"
    with pytest.raises(UserError, match="unknown robot 'xarm6', choose from: panda, widowx"):
        call(monkeypatch, "--robots", "xarm6")
