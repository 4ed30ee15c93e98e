"""ManiSkill through its adapter: our model follows it, the tabletop's expert and weights act in it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import here

import eval as evaluation
import sample
from cli import UserError
from data import record
from data.expert import demonstrate
from data.seeds import FIRST_EVALUATION
from data.tasks import TASKS
from nano import commands


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sapien", None)
    monkeypatch.delitem(sys.modules, "data.maniskill", raising=False)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--env", "maniskill", "--task", "PickCube"])
    with pytest.raises(UserError, match="pip install --no-deps -r requirements-maniskill.txt"):
        sample.main()


@pytest.fixture(scope="module")
def maniskill():
    reason = "pip install --no-deps -r requirements-maniskill.txt"
    pytest.importorskip("sapien", reason=reason)
    pytest.importorskip("mani_skill", reason=reason)
    from data import maniskill

    try:
        maniskill.make_inner("PushCube").close()
    except UserError as error:  # the packages are there, Vulkan is not
        pytest.skip(str(error))
    return maniskill


@pytest.fixture(scope="module")
def env(maniskill):
    """One for all tests: the first picture of a process takes 8 s, its shaders are compiled."""
    env = maniskill.ManiSkillEnv("PickCube", render=False)
    yield env
    env.close()


def test_the_tasks_are_the_tabletops(maniskill):
    assert maniskill.TASKS.keys() == TASKS.keys()
    assert {task.tier for task in maniskill.TASKS.values()} == set(evaluation.TIERS["maniskill"])


def test_a_start_is_the_packages_and_depends_on_its_seed_alone(env):
    env.reset(3)
    first = env.data.qpos.copy()
    env.reset(4)
    assert not np.allclose(env.data.qpos, first)
    env.reset(3)
    assert np.array_equal(env.data.qpos, first)
    env.inner.reset(seed=3)
    assert np.allclose(env.joints(), first[:9])


def test_our_hand_and_things_are_where_maniskills_are(env):
    env.reset(5)
    target = env.data.ctrl.copy()
    for _ in range(10):
        target[:7] += 0.02
        target[7] = 0.01
        env.step(target)
    tool = env.inner.agent.tcp.pose
    base = env.hand.pose.p[0].numpy()
    state = env.state()
    assert np.allclose(state[8:11], tool.p[0].numpy() - base, atol=2e-6)
    rotation = tool.to_transformation_matrix()[0, :3, :3].numpy()
    assert np.allclose(state[11:], rotation.T[:2].ravel(), atol=2e-6)
    assert np.allclose(env.position("cube"), env.inner.cube.pose.p[0].numpy(), atol=1e-6)
    assert np.allclose(env.position("goal"), env.inner.goal_site.pose.p[0].numpy(), atol=1e-6)
    assert abs(state[7] - 0.01) < 1e-3  # the finger went where it was sent, in m


def test_instructions_of_evaluations_are_held_out_from_training(env):
    seen, _ = env.reset(7)
    told, _ = env.reset(FIRST_EVALUATION + 7)
    assert told["instruction"] in TASKS["PickCube"].held_out
    assert seen["instruction"] not in TASKS["PickCube"].held_out
    assert env.reset(7, "stay")[0]["instruction"] == "stay"


def test_the_tabletops_expert_demonstrates_here(env):
    shown = demonstrate(env, 1, noise=0.015)
    assert shown.success and len(shown.states) < 150
    assert shown.states.shape[1] == 17 and shown.actions.shape[1] == 8
    # success is ManiSkill's
    offset = env.inner.cube.pose.p - env.inner.goal_site.pose.p
    assert np.linalg.norm(offset.numpy()) <= env.inner.goal_thresh


def test_cameras_are_where_ours_are(env):
    env.reset(FIRST_EVALUATION + 1)
    for view in ("front", "wrist"):
        theirs = red(env.draw(view), 130)  # the wood is red by up to 110
        env.ours = True
        ours = red(env.draw(view), 60)
        env.ours = False
        assert len(theirs) > 80 and abs(len(theirs) - len(ours)) < 0.05 * len(ours)
        assert np.allclose(theirs.mean(axis=0), ours.mean(axis=0), atol=0.5)


def red(picture, threshold):
    """(n, 2): rows and columns of the pixels that are redder than anything else, by so much."""
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
    r, g, b = picture.astype(int).transpose(2, 0, 1)
    return np.argwhere(r - np.maximum(g, b) > threshold)


def test_a_demonstration_is_an_episode_with_pictures_at_every_fourth_step(
    env, maniskill, monkeypatch, tmp_path
):
    monkeypatch.setattr(record, "run_jobs", here)
    monkeypatch.setattr(record, "open_environment", lambda *args, **options: env)
    monkeypatch.setattr(env, "render", True)
    monkeypatch.setattr(env, "close", env.camera.close)  # the other tests go on with it
    config = record.RecordConfig(env="maniskill", tasks="PickCube", episodes=1, workers=1)
    config.out = str(tmp_path)
    assert record.record(config) == {"panda-PickCube": []}
    (episode,) = record.load_episodes(tmp_path)
    assert episode.robot == "panda" and episode.about["env"] == "maniskill"
    assert episode.embodiment == maniskill.ManiSkillEnv.embodiment
    first, kept, new = (episode.images(step)[0].astype(int) for step in (16, 19, 20))
    assert np.array_equal(first, kept) and not np.array_equal(kept, new)
    # nor are they taken for the tabletop's, which are called the same
    config.env = "tabletop"
    with pytest.raises(
        UserError, match="with noise 0.015 in maniskill, not by expert with noise 0.015"
    ):
        record.record(config)


def test_things_that_are_put_somewhere_by_hand_are_drawn_there(env):
    env.reset(8)
    env.place("cube", (0.05, 0.08, 0.3))
    env.forward()
    assert np.allclose(env.inner.cube.pose.p[0].numpy(), (0.05, 0.08, 0.3), atol=1e-6)
    assert not env.succeeded()
    env.place("cube", env.position("goal"))
    env.forward()
    assert env.succeeded()  # judged where they are now


def test_scenes_with_commands_show_what_they_mean(env):
    for scene in commands.scenes_of(env, 1):
        assert [image.shape for image in scene["images"]] == [(128, 128, 3)] * 2
        (command,) = scene["commands"]
        assert command["task"] == "PickCube" and command["things"] == ["red cube", "green marker"]
        shown = red(scene["images"][0], 130)
        if len(shown) > 40:  # not where the hand hides it
            x, y, _ = command["places"][0]
            assert np.linalg.norm(np.median(shown, axis=0) - (y, x)) < 8
            # patches are 16 pixels wide, eight of them a row
            row, column = (np.median(shown, axis=0) // 16).astype(int)
            assert command["roles"][0][8 * row + column] in "BC"


class Still:
    """A policy that stays where it is, and keeps what it was told and saw."""

    policy = SimpleNamespace(
        embodiments={"panda": (17, 8)}, config=SimpleNamespace(action_horizon=16)
    )

    def __init__(self):
        self.told = []

    def require_policy(self):
        return self.policy

    def act(self, observation, robot):
        self.told.append((observation["instruction"], observation["images"]["front"]))
        return np.tile(observation["state"][:8], (16, 1))


def test_controls_are_another_sentence_noise_and_our_pictures(env, monkeypatch, capsys):
    policy = Still()
    monkeypatch.setattr(evaluation, "load_model", lambda *args: policy)
    monkeypatch.setattr(evaluation, "run_jobs", here)

    def make_env(environment, robot, scene, render, blind, ours=False):
        env.blind = blind
        env.ours = ours
        return env

    monkeypatch.setattr(evaluation, "make_env", make_env)
    monkeypatch.setattr(env, "horizon", 3)
    config = evaluation.ManiSkillConfig(tasks="PickCube", episodes=1, controls=1)
    result = evaluation.elsewhere("maniskill", config)
    env.blind = env.ours = False
    assert result["tiers"]["panda"]["n"] == 1 and result["mean"] == 0
    assert result["versions"]["mani_skill"] == "3.0.1"
    assert list(result["controls"]) == [*evaluation.CONTROLS, "our pictures"]
    (words, theirs), (none, _), (other, _), (_, noise), (same, ours) = policy.told
    assert words == same and words in TASKS["PickCube"].held_out
    assert none == "." and other not in TASKS["PickCube"].held_out
    assert noise.std() > 70 > theirs.std()
    assert not np.array_equal(theirs, ours)
    assert "| told | 0.0 | 0.0 |" in capsys.readouterr().out
