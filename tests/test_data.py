"""The data engine: kinematics against published poses, success tests both ways, determinism, the expert in every cell, episode files."""
import json
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open

from cli import UserError
from nano import scenes as corpora
from nano.scenes import CLASSES, CLUTTER, MOST_QUESTIONS, Corpus, attempt, faults_of, look, make_shard, project
from data.env import TabletopEnv
from nano.questions import equalise
from data.robots import get_robot
from data.tasks import TASKS
from rollout import rollout, why


class Lazy:
    """A policy that leans to one side and stays there."""

    def __init__(self):
        self.asked = []

    def act(self, observation, robot, temperature, seed):
        self.asked.append(seed)
        return np.tile(np.append(get_robot(robot).home + (0.3, 0, 0, 0, 0, 0), 0.0), (16, 1))


def test_a_rollout_looks_every_few_steps_and_says_why_it_failed():
    env, lazy = TabletopEnv("widowx", "StackCube", render=False), Lazy()
    result = rollout(lazy, env, 5, execute_steps=6, max_steps=20)
    assert not result["success"] and result["steps"] == 20 and result["reason"] == "never grasped" and [step for _, step in lazy.asked] == [0, 6, 12, 18]
    for held, reason in (([0, 1, 1], "held to the end"), ([0, 1, 0], "let go elsewhere")):
        assert why(env.task, held) == reason
    assert why(TASKS["PushCube"], [0]) == "missed the target"


@pytest.mark.parametrize("task", TASKS)
def test_attempts_end_as_they_should(task):
    env = TabletopEnv("panda", task, render=False)
    assert attempt(env, 0, np.random.default_rng(0), None)[1]
    for fault in faults_of(TASKS[task]):
        ended = [attempt(env, seed, np.random.default_rng(seed), fault) for seed in (0, 2)]
        assert not all(success for _, success in ended) and all(len(trace) > 4 for trace, _ in ended)


def test_corpus_tells_the_truth(tmp_path):
    path = tmp_path / "train" / "widowx-PickCube-000.safetensors"
    make_shard((path, "widowx", "PickCube", 0, 24, False))
    corpus, asked = Corpus(tmp_path, "train"), Counter()
    with safe_open(path, "numpy") as file:
        kept = equalise(json.loads(file.metadata()["questions"]))
    assert len(kept) == 24 and len(corpus) == sum(map(bool, kept)) > 20 and {len(corpus[i]["images"]) for i in range(len(corpus))} == {1, 2, 4}
    for scene in map(corpus.__getitem__, range(len(corpus))):
        assert scene["patch_class"].shape == (len(scene["images"]), 8, 8) and scene["patch_class"].max() < len(CLASSES) and 1 <= len(scene["turns"]) <= MOST_QUESTIONS
        asked.update(question["category"] for question in scene["questions"])
        for question in scene["questions"]:
            assert not question["held_out"] and 0 <= question["chance"] <= 0.5
            if question["form"] in ("point", "box"):
                label, numbers = json.loads(question["answer"])["label"], list(json.loads(question["answer"]).values())[0]
                view = 1 if "wrist view" in question["question"] else 0
                cells = np.argwhere(scene["patch_class"][view] == CLASSES.index(label)) * 16 + 8
                x, y = numbers if len(numbers) == 2 else ((numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2)
                assert len(cells) == 0 or np.abs(cells[:, ::-1] - (x, y)).max(1).min() < 40    # near where the patches show it
    assert {"point", "box", "existence", "embodiment", "affordance"} < asked.keys() and asked.keys() & {"task", "success", "past", "future"}
    few = Corpus(tmp_path, "train", "point,box")
    assert 0 < len(few) < 24 and {q["category"] for i in range(len(few)) for q in few[i]["questions"]} == {"point", "box"}
    with pytest.raises(UserError, match="unknown category 'points'.*did you mean point"):
        Corpus(tmp_path, "train", "points")
    make_shard((tmp_path / "val" / path.name, "widowx", "PickCube", 2_000_000, 12, True))
    validation = corpus.validation()
    assert {q["held_out"] for i in range(len(validation)) for q in validation[i]["questions"]} == {False, True}
    env = TabletopEnv("widowx", "PickCube", render=False, clutter=CLUTTER)
    env.reset(4)
    picture, patch_class, patch_offset, gripper, seen = look(env, "front", {})
    x, y, depth = project(env, "front", env.position("cube"))
    red = np.argwhere((picture[..., 0] > 150) & (picture[..., 1] < 60))
    assert np.abs(red.mean(0)[::-1] - (x, y)).max() < 4                     # the projected centre lies where the red pixels are
    rows, columns = np.nonzero(patch_class == CLASSES.index("red cube"))
    assert len(rows) and np.allclose((columns + 0.5 + patch_offset[rows, columns, 0]) * 16, x, atol=0.1) and np.allclose(patch_offset[rows, columns, 2] + 0.6, depth, atol=1e-4)
    tip = project(env, "front", env.data.site_xpos[env.tcp])
    assert np.allclose((gripper[0] * 16 + 64, gripper[1] * 16 + 64, gripper[2] / 10 + 0.6), tip) and np.isclose(gripper[3], env.data.qpos[env.robot.dof] / env.robot.travel)
    path.with_name(".panda-left.safetensors").write_bytes(b"half")          # what a killed process leaves is no shard
    assert len(Corpus(tmp_path, "train")) == len(corpus)
    before = path.stat().st_mtime_ns
    make_shard((path, "widowx", "PickCube", 0, 24, False))
    assert path.stat().st_mtime_ns == before                                # it is whole: kept
    make_shard((path, "widowx", "PickCube", 0, 5, False))
    assert corpora.scenes_of(path) == 5                                     # of another size: made anew
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="broken corpus"):
        Corpus(tmp_path, "train")


def test_a_corpus_has_as_many_scenes_as_asked(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(corpora, "make_shard", lambda job: jobs.append(job) or job[4])
    monkeypatch.setattr(corpora, "pool", lambda workers: nullcontext(SimpleNamespace(imap_unordered=map)))
    for scenes in (1, 240, 24 * 600):
        jobs.clear()
        corpora.make(corpora.CorpusConfig(out=str(tmp_path / str(scenes)), scenes=scenes))
        train = [job for job in jobs if not job[5]]
        assert sum(job[4] for job in train) == max(scenes, 24) and len({job[0] for job in jobs}) == len(jobs) and len(jobs) - len(train) == 24
        assert all(0 < job[4] <= corpora.SHARD for job in train)
