"""Scenes of Meta-World with commands: what each task moves is found, marked and learned."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, here
from test_grounding import TINY
from test_metaworld import ROWS

from cli import UserError
from nano import commands, scenes
from nano import train as recipe
from nano.commands import Commands, CommandsConfig, make
from nano.grounding import Grounding
from nano.scenes import GRID, PATCH
from processor import Processor, train_tokenizer
from train_sft import train
from vlm import VLM

ABOUT = json.loads((ROOT / "nano" / "metaworld.json").read_text())["tasks"]
BESIDE = {"sweep", "stick-pull", "stick-push", "lever-pull"}  # whose goals may be out of sight


def test_our_sentences_are_others_than_those_that_are_evaluated():
    assert list(ABOUT) == list(ROWS)
    published = {row["sentence"].lower() for row in ROWS.values()}
    for row in ABOUT.values():
        assert len(set(row["wordings"])) == 4
        assert not published & {wording.lower() for wording in row["wordings"]}
        assert len(row["things"]) == 2 or "goal" not in row


@pytest.fixture(scope="module")
def metaworld():
    reason = "pip install --no-deps -r requirements-metaworld.txt"
    pytest.importorskip("metaworld", reason=reason)
    from nano import metaworld

    return metaworld


def test_every_task_has_a_thing_in_sight_and_a_goal_somewhere(metaworld):
    for task in ABOUT:
        env = metaworld.MetaWorldEnv(task, render=False)
        env.reset(1)
        x, y, depth = metaworld.project(env, metaworld.thing_position(env))
        assert 0 <= min(x, y) and max(x, y) < 128 and 0.7 < depth < 1.5
        assert np.isfinite(env.inner._target_pos).all()
        assert task in BESIDE or metaworld.project(env, env.inner._target_pos), task
        moved = metaworld.geoms_moved(env)
        assert 0 < len(moved) < 40


@pytest.mark.parametrize("task", ["drawer-open", "reach", "pick-place"])
def test_the_patch_at_its_place_shows_what_is_moved(metaworld, task):
    env = metaworld.MetaWorldEnv(task, render=False)
    env.reset(1)
    x, y, _ = metaworld.project(env, metaworld.thing_position(env))
    front, wrist = metaworld.roles_of(env)
    assert len(front) == len(wrist) == GRID**2
    assert front[GRID * int(y // PATCH) + int(x // PATCH)] == "B"
    if task == "pick-place":  # a mark shows where it goes
        x, y, _ = metaworld.project(env, env.inner._target_pos)
        assert front[GRID * int(y // PATCH) + int(x // PATCH)] == "C"
    env.close()


@pytest.mark.parametrize("task", ["coffee-button", "stick-pull", "window-open"])
def test_what_the_expert_moves_most_is_what_is_painted(metaworld, task):
    env = metaworld.MetaWorldEnv(task, render=False)
    env.reset(1)
    moved = metaworld.geoms_moved(env)
    before = env.inner.data.geom_xpos.copy()
    for action in metaworld.carry_out(env):
        *_, done, _, _ = env.step(action, render=False)
        if done:
            break
    ways = np.linalg.norm(env.inner.data.geom_xpos - before, axis=1)
    roots = env.inner.model.body_rootid[env.inner.model.geom_bodyid]
    robot = [env.inner.model.body(name).id for name in metaworld.ROBOT]
    ways[np.isin(roots, robot)] = 0
    assert done and ways.argmax() in moved


def test_the_last_moment_of_an_expert_is_the_end_as_the_env_showed_it(metaworld):
    env = metaworld.MetaWorldEnv("handle-press", render=False)
    seed = next(i for i in range(9) if scenes.seeds.rng(i, "scene").random() >= 0.5)
    *_, done = metaworld.moments(env, seed, scenes.seeds.rng(seed, "scene"))
    assert done
    replayed = env.draw("front")
    env.reset(seed)
    for action in metaworld.carry_out(env):
        *_, done, _, _ = env.step(action, render=False)
        if done:
            break
    assert np.array_equal(replayed, env.draw("front"))
    env.close()


@pytest.fixture(scope="module")
def folder(metaworld, tmp_path_factory):
    """Scenes of one task for training and validation, made as all are, in this process."""
    folder = tmp_path_factory.mktemp("corpus") / "metaworld"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "run_jobs", here)
        patch.setattr(commands, "names_in", lambda env: (("sawyer",), ("coffee-pull",), ()))
        make(CommandsConfig(env="metaworld", scenes=8, out=str(folder)))
    return folder


def test_a_folder_teaches_what_is_moved_by_the_same_loader_and_loss(folder, tmp_path):
    told = Commands(str(folder))
    assert len(told) == 8 and len(told.validation()) == 4
    sentences = {told.row(0, (0, i)).record["command"]["instruction"] for i in range(9)}
    assert ROWS["coffee-pull"]["sentence"] in sentences
    assert len(sentences) == 2 and sentences < {
        ROWS["coffee-pull"]["sentence"],
        *ABOUT["coffee-pull"]["wordings"],
    }
    for record in told.records:
        assert record["robot"] == "sawyer" and record["scene"] == "coffee-pull"
        assert "B" in "".join(record["commands"][0]["roles"])
    flags = {
        "scenes": str(folder.parent),
        "mixture": "metaworld:1",
        "pictures_only": True,
        "steps": 2,
    }
    flags |= {"out": str(tmp_path / "out"), "intent_layer": 2, "frozen_blocks": 0, "device": "cpu"}
    cfg = recipe.StageConfig(**flags, batch_size=4, eval_every=2, backbone="")
    processor = Processor(train_tokenizer([*told.texts()], 300))
    torch.manual_seed(0)
    model = VLM(TINY.for_tokenizer(processor.tokenizer))
    heads = Grounding(model.config, processor.tokenizer, 2, pictures_only=True)
    figures = train(cfg, model, processor, recipe.open_sources(cfg), heads)
    assert 0 <= figures["role_accuracy"] <= 1 and figures["command_error_px"] > 0
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["commands"] for line in lines]
    assert np.isfinite(losses).all() and min(losses) > 0


def test_a_folder_of_another_world_is_told(folder):
    with pytest.raises(UserError, match="was made with --env metaworld --scenes 8 --seed 0"):
        make(CommandsConfig(scenes=8, out=str(folder)))


def test_an_unknown_world_is_told(tmp_path):
    with pytest.raises(UserError, match="environment.*metaworld"):
        make(CommandsConfig(env="elsewhere", out=str(tmp_path / "elsewhere")))
    assert not (tmp_path / "elsewhere").exists()
