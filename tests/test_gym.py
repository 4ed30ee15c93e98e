"""gymnasium's own checks of the environment, and its seeds and options."""

import numpy as np
import pytest

from cli import UserError
from data.families import FAMILIES
from data.robots import SQUEEZE
from data.tasks import TASKS

gymnasium = pytest.importorskip("gymnasium", reason="requirements-gym.txt")


def make(scene, **options):
    import data.gym  # noqa: F401, registers the names

    return gymnasium.make(f"nanoblm/{scene}-v0", **options)


@pytest.mark.parametrize("scene", ["PickCube", next(iter(FAMILIES))])
def test_gymnasium_has_nothing_to_say(scene):
    from gymnasium.utils.env_checker import check_env

    env = make(scene, robot="widowx")
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


def test_every_scene_has_a_name():
    make("PickCube").close()
    names = {f"nanoblm/{scene}-v0" for scene in (*TASKS, *FAMILIES)}
    assert names <= gymnasium.registry.keys()


def test_actions_are_bounded_by_the_arm():
    env = make("PickCube", robot="panda")
    arm = env.unwrapped.table.robot
    space = env.action_space
    assert np.allclose(space.low[:-1], arm.joint_range[:, 0]) and np.isclose(space.low[-1], SQUEEZE)
    assert np.allclose(space.high[:-1], arm.joint_range[:, 1])
    assert np.isclose(space.high[-1], arm.travel)
    env.close()


def test_seed_draws_the_layout_and_options_the_words():
    env = make("PickCube")
    a, _ = env.reset(seed=3)
    b, _ = env.reset(seed=3, options={"instruction": "take it"})
    assert np.array_equal(a["images"]["front"], b["images"]["front"])
    assert b["instruction"] == "take it" != a["instruction"]
    with pytest.raises(UserError, match="colour.*command, instruction"):
        env.reset(options={"colour": 1})
    env.close()
