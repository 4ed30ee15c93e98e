"""What the environments of other packages share, tested without any package."""

from types import SimpleNamespace

import numpy as np
import pytest

from cli import UserError
from data.environments import Arm, PackageEnv
from embodiment import Embodiment

TASK = SimpleNamespace(name="open", tier="easy", horizon=3, sentence="open the door")
TASKS = {"shut": TASK, "open": TASK}


class Door(PackageEnv):
    """An environment of a package whose physics is a single number."""

    hz = 10
    robot = Arm("hinge", "A hinge", 1)
    embodiment = Embodiment(1, 2)

    def reset(self, seed=0, instruction=None):
        self.angle = 0.0
        return self.start_episode(seed, instruction)

    def step(self, action, render=None):
        self.angle += self.read_action(action)[0]
        return self.count_step(0.0, self.angle > 1.5, render)

    def state(self):
        return np.array([self.angle], np.float32)

    def draw(self, view):
        return np.full((4, 4, 3), len(view), np.uint8)


def test_an_episode_ends_with_success_or_with_its_time():
    env = Door(TASKS, "open")
    observation, _ = env.reset(3)
    assert observation["instruction"] == "open the door" and env.number == 1
    assert list(observation["images"]) == ["front", "wrist"]
    *_, done, late, info = env.step([5.0, 0.0])  # clipped to 1
    assert env.angle == 1 and not done and not late
    *_, done, late, info = env.step([1.0, 0.0], render=False)
    assert done and not late and info == {"success": True, "clipped": {}}
    env.reset(3, "stay")
    for _ in range(3):
        observation, _, done, late, info = env.step(np.zeros(2), render=False)
    assert late and not done and not info["success"]
    assert observation["instruction"] == "stay" and observation["images"] == {}


@pytest.mark.parametrize("bad", [np.zeros(3), np.full(2, np.nan), 0.0])
def test_bad_actions_are_refused(bad):
    env = Door(TASKS, "open", render=False)
    env.reset()
    with pytest.raises(ValueError, match="hinge takes 2 finite numbers"):
        env.step(bad)


def test_a_blind_episode_has_noise_of_its_seed():
    env = Door(TASKS, "open", blind=True)
    first = env.reset(1)[0]["images"]["front"]
    again = env.reset(1)[0]["images"]["front"]
    other = env.reset(2)[0]["images"]["front"]
    assert first.std() > 30 and np.array_equal(first, again) and not np.array_equal(first, other)


def test_an_unknown_task_is_told():
    with pytest.raises(UserError, match="did you mean open"):
        Door(TASKS, "opem")
