"""Meta-World through its adapter: the real package, fixed for this mujoco; recorded, evaluated."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, here

import eval as evaluation
import sample
from cli import UserError
from data import record
from data.demonstrations import Demonstrations
from tables import mean_of_tiers, rate

ROWS = json.loads((ROOT / "data" / "metaworld.json").read_text())["tasks"]


def test_there_are_fifty_tasks_in_the_published_tiers():
    tiers = [row["tier"] for row in ROWS.values()]
    counts = {tier: tiers.count(tier) for tier in evaluation.TIERS["metaworld"]}
    assert counts == {"easy": 28, "medium": 11, "hard": 6, "very_hard": 5}
    sentences = [row["sentence"] for row in ROWS.values()]
    twice = {sentence for sentence in sentences if sentences.count(sentence) > 1}
    assert twice == {"Push the puck to a goal"}  # push and push-back, told apart by the picture


def test_a_mean_of_tiers_counts_each_tier_alike():
    tiers = {"easy": rate([True] * 28), "hard": rate([False] * 6)}
    figure = mean_of_tiers(tiers)
    assert figure["mean"] == 0.5
    low, high = figure["interval"]
    assert 0.4 < low < 0.5 < high < 0.7  # few episodes of the hard one, so the top is less certain
    alone = rate([True, False, True])
    low, high = mean_of_tiers({"easy": alone})["interval"]
    assert np.allclose((low, high), alone["interval"])


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    monkeypatch.delitem(sys.modules, "data.metaworld", raising=False)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--env", "metaworld", "--task", "drawer-open"])
    with pytest.raises(UserError, match="pip install --no-deps -r requirements-metaworld.txt"):
        sample.main()


@pytest.fixture
def metaworld():
    reason = "pip install --no-deps -r requirements-metaworld.txt"
    pytest.importorskip("metaworld", reason=reason)
    from data import metaworld

    return metaworld


def test_every_task_has_a_simulation_and_an_expert(metaworld):
    assert {f"{task}-v3" for task in metaworld.TASKS} == set(metaworld.ALL_V3_ENVIRONMENTS)
    assert set(metaworld.ALL_V3_ENVIRONMENTS) == set(metaworld.ENV_POLICY_MAP)


def test_an_episode_depends_on_its_seed_alone(metaworld):
    env = metaworld.MetaWorldEnv("pick-place", render=False)
    first = metaworld.demonstrate(env, 3, noise=0.015)
    other = metaworld.demonstrate(env, 4, noise=0.015)
    again = metaworld.demonstrate(env, 3, noise=0.015)
    assert first.success and other.success
    assert np.array_equal(first.states, again.states)
    assert np.array_equal(first.actions, again.actions)
    assert not np.array_equal(first.states[:50], other.states[:50])
    assert first.states.shape[1:] == first.actions.shape[1:] == (4,)
    assert np.abs(first.actions).max() <= 1


def test_the_first_picture_shows_nothing_of_the_episode_before(metaworld):
    env = metaworld.MetaWorldEnv("window-open")
    env.reset(0)
    again = env.reset(2)[0]["images"]["front"]
    other = metaworld.MetaWorldEnv("window-open")
    assert np.array_equal(again, other.reset(2)[0]["images"]["front"])
    env.close()
    other.close()


def test_the_expert_sees_the_goal(metaworld):
    # cached bounds without the goal would clip it to zero
    env = metaworld.MetaWorldEnv("reach", render=False)
    env.reset(1)
    env.step(np.zeros(4))
    assert np.allclose(env.full[-3:], env.inner._target_pos)
    assert np.linalg.norm(env.full[-3:]) > 0.5


def test_the_picture_is_the_middle_of_the_published_one(metaworld):
    env = metaworld.MetaWorldEnv("drawer-open")
    observation, _ = env.reset(2)
    front = observation["images"]["front"]
    assert front.shape == observation["images"]["wrist"].shape == (128, 128, 3)
    # the whole picture of the moved camera, turned by half a turn, cut out by hand
    env.inner.model.cam_sensorsize[:] = 0
    whole = env.draw("front", size=metaworld.PUBLISHED_SIZE).astype(int)
    half = metaworld.CROP_SIZE // 2
    x, y = metaworld.CROP_CENTER
    cut = whole[y - half : y + half, x - half : x + half]
    smaller = cut.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(front - smaller).mean() < 4  # of 255; 15 or more if it is off by a few pixels
    env.close()


def test_time_runs_out_and_bad_actions_are_refused(metaworld):
    env = metaworld.MetaWorldEnv("drawer-open", render=False)
    env.reset(1)
    env.steps = env.horizon - 1
    *_, done, truncated, info = env.step(np.zeros(4))
    assert truncated and not done and not info["success"]
    for bad in (np.zeros(3), np.full(4, np.nan)):
        with pytest.raises(ValueError, match="sawyer takes 4 finite numbers"):
            env.step(bad)


def test_demonstrations_are_episodes_like_any_other(metaworld, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "run_jobs", here)
    config = record.RecordConfig(env="metaworld", tasks="handle-press", episodes=2, workers=1)
    config.out = str(tmp_path)
    assert record.record(config) == {"sawyer-handle-press": []}
    episodes = record.load_episodes(tmp_path)
    assert [episode.path.name for episode in episodes] == [
        "sawyer-handle-press-0.safetensors",
        "sawyer-handle-press-1.safetensors",
    ]
    episode = episodes[0]
    assert episode.about["env"] == "metaworld"
    assert episode.instruction == ROWS["handle-press"]["sentence"]
    assert len(episode.images(0)) == 2
    # and training asks for nothing else
    demos = Demonstrations(episodes, [None, None], horizon=16, num_waypoints=4)
    robot = demos.embodiments["sawyer"]
    assert robot == metaworld.MetaWorldEnv.embodiment
    assert robot.relative == (-1,) * 4 and robot.control_hz == 80  # steps of the hand, no targets
    state, action = demos.numbers(demos.train[:3])
    assert state.shape == (3, 4) and action.shape == (3, 16, 4)


class Expert:
    """A policy that cheats: the package's expert, if it gets the right sentence and sees images."""

    policy = SimpleNamespace(
        embodiments={"sawyer": (4, 4)}, config=SimpleNamespace(action_horizon=16)
    )

    def require_policy(self):
        return self.policy

    def act(self, observation, robot):
        env = evaluation.make_env("metaworld", "sawyer", "handle-press", render=False, blind=False)
        told = observation["instruction"] == ROWS["handle-press"]["sentence"]
        sees = observation["images"]["front"].std() < 60  # noise has 74
        action = env.expert.get_action(env.full) if told and sees else np.zeros(4)
        return np.tile(np.clip(action, -1, 1), (16, 1))


def test_controls_tell_words_from_pictures(metaworld, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load_model", lambda *args: Expert())
    monkeypatch.setattr(evaluation, "run_jobs", here)
    config = evaluation.MetaWorldConfig(tasks="handle-press", episodes=2, controls=1)
    config.execute_steps = 4
    result = evaluation.elsewhere("metaworld", config)
    assert result["tiers"]["easy"]["rate"] == result["mean"] == 1
    assert list(result["controls"]) == list(evaluation.CONTROLS)
    for control in result["controls"].values():
        assert control["mean"] == 0
        assert list(control["tasks"]["handle-press"]["failures"].values()) == ["never near it"]
    printed = capsys.readouterr().out
    assert "| told | 100.0 | 100.0 |" in printed


def test_weights_of_another_world_are_told_apart(metaworld):
    flags = {"weights": str(ROOT / "weights" / "nano"), "tasks": "reach", "episodes": 1}
    with pytest.raises(UserError, match="none of which is in metaworld"):
        evaluation.elsewhere("metaworld", evaluation.MetaWorldConfig(**flags))
