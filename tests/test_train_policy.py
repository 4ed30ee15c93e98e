"""train_policy.py keeps its promises, on tiny episodes in the real format: frozen means frozen, resuming is bit-exact, two processes equal one."""
import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trainer
from cli import UserError
from conftest import last_state, spawn_two
from data.record import load_episodes, write_episode
from model import BLM, backbone_hash
from policy import PolicyConfig
from test_model import small_blm
from train_policy import Demos, TrainConfig, cache_intents, train

SIZES = {"panda": (17, 8), "widowx": (16, 7)}
ALONE = SimpleNamespace(rank=0, world=1, sharded=False, barrier=lambda: None)
SMALL = dict(intent_layer=2, num_intent_queries=4, max_condition_tokens=96, hidden_size=16, num_layers=2, num_heads=2, action_horizon=4, num_future_tokens=2, future_layer=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with demos/ (2 robots x 2 tasks x 3 episodes of 5 to 10 steps) and backbone/."""
    folder, rng = tmp_path_factory.mktemp("stage2"), np.random.default_rng(0)
    (folder / "demos").mkdir()
    for robot, (S, A) in SIZES.items():
        for task in ("PickCube", "PushCube"):
            for seed in range(3):
                n = int(rng.integers(5, 11))
                pictures = [{view: rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for view in ("front", "wrist")} for _ in range(n)]
                states, actions = rng.normal(size=(n, S)).astype(np.float32), rng.normal(size=(n, A)).astype(np.float32)
                demonstration = SimpleNamespace(images=pictures, states=states, actions=actions, phases=["move"] * n, success=True, attempts=1,
                                                instruction="push the cube" + " to the goal" * seed)
                write_episode(folder / "demos" / f"{robot}-{task}-{seed}.safetensors", demonstration, robot, task, seed, 0.0)
    small_blm(policy=False).save_pretrained(folder / "backbone")
    return folder


def hash_of(blm):
    return backbone_hash(blm.vlm, blm.processor)


def flags(made, out, **changes):
    settings = dict(data=str(made / "demos"), backbone=str(made / "backbone"), cache=str(made / "intents"), out=str(out), steps=4, batch_size=4, warmup=1, lr=1e-3,
                    frame_stride=2, save_every=2, eval_every=4, eval_rows=8, device="cpu")
    return TrainConfig(**{**settings, **changes})


def test_a_run_makes_a_model_and_the_backbone_does_not_move(made, tmp_path):
    before = hash_of(BLM.from_pretrained(made / "backbone"))
    figures = train(flags(made, tmp_path), PolicyConfig(**SMALL))
    blm = BLM.from_pretrained(tmp_path)
    assert hash_of(blm) == before and set(blm.policy.embodiments) == set(SIZES)
    assert {"val_flow", "val_future", "joint_error_rad", "finger_accuracy"} <= figures.keys()
    assert blm.training["sft"]["step"] == 7 and blm.training["policy"]["step"] == 4
    assert blm.training["policy"]["rows"]["held_out"] > 0 and blm.training["policy"]["command"].startswith("python ")
    episode = load_episodes(made / "demos")[0]
    seen = {"images": dict(zip(("front", "wrist"), episode.images(0))), "state": episode.state[0], "instruction": episode.instruction}
    assert blm.act(seen, episode.robot).shape == (4, 8)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4 and lines[-1]["joint_error_rad"] == figures["joint_error_rad"]
    with pytest.raises(UserError, match="--resume"):
        train(flags(made, tmp_path), PolicyConfig(**SMALL))
    with pytest.raises(UserError, match="--lr"):
        train(flags(made, tmp_path, resume=True, lr=1.0), PolicyConfig(**SMALL))


def test_resume_is_bit_exact(made, tmp_path, monkeypatch):
    train(flags(made, tmp_path / "whole"), PolicyConfig(**SMALL))
    rate = trainer.learning_rate

    def stop(step, cfg):
        if step == 3:
            raise KeyboardInterrupt
        return rate(step, cfg)

    monkeypatch.setattr(trainer, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        train(flags(made, tmp_path / "parts"), PolicyConfig(**SMALL))
    monkeypatch.undo()
    train(flags(made, tmp_path / "parts", resume=True), PolicyConfig(**SMALL))
    whole, parts = last_state(tmp_path / "whole"), last_state(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_a_resumed_run_takes_new_episodes_in(made, tmp_path):
    shutil.copytree(made / "demos", tmp_path / "demos")
    train(flags(made, tmp_path / "out", data=str(tmp_path / "demos")), PolicyConfig(**SMALL))
    before = last_state(tmp_path / "out")
    for path in sorted((made / "demos").glob("widowx-PushCube-*")):
        shutil.copy(path, tmp_path / "demos" / path.name.replace("Cube-", "Cube-50000"))
    train(flags(made, tmp_path / "out", data=str(tmp_path / "demos"), resume=True, steps=6), PolicyConfig(**SMALL))
    about, after = json.loads((tmp_path / "out" / "training.json").read_text())["policy"], last_state(tmp_path / "out")
    assert about["episodes"] == 15 and [(run["step"], run["episodes"]) for run in about["before"]] == [(4, 12)]
    scale = [name for name in before if "normalizer" in name]
    assert scale and all(torch.equal(before[name], after[name]) for name in scale)      # the weights were made for these


def one_of_two(made, out):
    train(flags(made, out), PolicyConfig(**SMALL))


def test_two_processes_equal_one(made, tmp_path):
    train(flags(made, tmp_path / "one"), PolicyConfig(**SMALL))
    spawn_two(one_of_two, made, tmp_path / "two")
    one, two = last_state(tmp_path / "one"), last_state(tmp_path / "two")
    for name in one:
        if name.startswith("policy.") and not name.endswith("key_value.bias"):     # softmax ignores a bias on keys: Adam blows up rounding
            assert torch.allclose(one[name].float(), two[name].float(), atol=1e-4), name


def demos_of(made, cache="intents"):
    blm, episodes = BLM.from_pretrained(made / "backbone"), load_episodes(made / "demos")
    hidden = cache_intents(blm, episodes, flags(made, "unused", cache=str(made / cache)), 2, hash_of(blm), ALONE)
    return blm, episodes, Demos(episodes, hidden, PolicyConfig(**SMALL), 2, 25)


def test_rows_hold_what_the_episode_holds(made):
    blm, episodes, demos = demos_of(made)
    rows = np.arange(len(demos.where))
    batch = demos[rows]
    for row, (i, j) in enumerate(demos.where):
        episode, t = episodes[i], 2 * int(j)
        dims, left = episode.action.shape[1], min(4, len(episode) - t)
        assert np.array_equal(batch["state"][row, :episode.state.shape[1]], episode.state[t])
        assert np.array_equal(batch["action"][row, :left, :dims], episode.action[t:t + left])
        assert (batch["action"][row, left:, :dims].numpy() == episode.action[-1]).all()                # past the end: hold
        assert bool(batch["future_valid"][row]) == (t + 4 < len(episode))
        assert list(demos.embodiments)[batch["embodiment"][row]] == episode.robot
        if row % 5 == 0:
            for name, at in (("", t), ("future_", t + 4)):
                if at < len(episode):
                    alone, mask = blm.intent_states([episode.images(at)], [episode.instruction], num_layers=2)
                    stored = batch[name + "hidden"][row, batch[name + "mask"][row]]
                    assert torch.allclose(stored, alone[0], atol=2e-2, rtol=2e-3)                # float16


def test_held_out_episodes_are_not_trained_on(made):
    _, episodes, demos = demos_of(made)
    trained, held = set(demos.train), set(np.concatenate(list(demos.held_out.values())))
    assert not trained & held and len(trained) + len(held) == len(demos.where)
    assert {episodes[i].seed for i in demos.where[sorted(held), 0]} == {2}
    drawn = [demos.rows_of_step(0, step, 8) for step in range(20)]
    assert set(np.concatenate(drawn)) <= trained
    assert np.array_equal(drawn[3], demos.rows_of_step(0, 3, 8)) and not np.array_equal(drawn[3], demos.rows_of_step(1, 3, 8))


def test_the_cache_is_computed_once_and_never_stale(made, monkeypatch):
    calls, states = [], BLM.intent_states
    monkeypatch.setattr(BLM, "intent_states", lambda self, *args, **named: calls.append(1) or states(self, *args, **named))
    demos_of(made, "fresh")
    assert len(calls) == 12
    demos_of(made, "fresh")
    assert len(calls) == 12
    files = sorted((made / "fresh").rglob("*.npy"))
    files[0].write_bytes(files[0].read_bytes()[:-10])                    # a broken file is made again
    demos_of(made, "fresh")
    assert len(calls) == 13
    other = small_blm(seed=5, policy=False)
    cache_intents(other, load_episodes(made / "demos"), flags(made, "unused", cache=str(made / "fresh")), 2, hash_of(other), ALONE)
    assert len(calls) == 25


def test_mistakes_are_told(made, tmp_path):
    for changes, config, word in (({"frame_stride": 3}, {}, "--frame_stride"), ({"backbone": "nowhere"}, {}, "train_sft.py"), ({"resume": True}, {}, "no training run"), ({"held_out": 1}, {}, "--held_out"),
                                  ({}, {"intent_layer": 4}, "--intent_layer"), ({"robots": "xarm6"}, {}, "no episodes"), ({"start": "nowhere"}, {}, "nowhere")):
        with pytest.raises(UserError, match=word):
            train(flags(made, tmp_path / "none", **changes), PolicyConfig(**{**SMALL, **config}))


def test_a_new_robot_trains_its_own_layers_alone(made, tmp_path):
    train(flags(made, tmp_path / "one", robots="panda"), PolicyConfig(**SMALL))
    train(flags(made, tmp_path / "two", robots="widowx", start=str(tmp_path / "one"), demonstrations=2), PolicyConfig(**SMALL))
    one, two = BLM.from_pretrained(tmp_path / "one"), BLM.from_pretrained(tmp_path / "two")
    assert list(one.policy.embodiments) == ["panda"] and list(two.policy.embodiments) == ["panda", "widowx"]
    assert two.training["policy"]["episodes"] == 4                       # two tasks, the two lowest seeds of each
    before, after = one.policy.state_dict(), two.policy.state_dict()
    changed = {name for name, tensor in after.items() if tensor.shape != before[name].shape}
    assert changed and all(torch.equal(after[name][tuple(map(slice, old.shape))], old) for name, old in before.items())
    episode = load_episodes(made / "demos")[0]
    seen = {"images": dict(zip(("front", "wrist"), episode.images(0))), "state": episode.state[0], "instruction": episode.instruction}
    assert episode.robot == "panda" and np.array_equal(one.act(seen, "panda"), two.act(seen, "panda"))
    start = last_state(tmp_path / "two")
    moments = [tensor for name, tensor in start.items() if name.endswith("exp_avg")]
    assert moments and all((tensor[0] == 0).all() and (tensor[1] != 0).any() for tensor in moments if tensor.ndim)
    with pytest.raises(UserError, match="other sizes"):
        train(flags(made, tmp_path / "three", start=str(tmp_path / "one")), PolicyConfig(**{**SMALL, "num_layers": 3}))


def test_a_policy_that_goes_on_from_another_trains_all(made, tmp_path):
    train(flags(made, tmp_path / "one"), PolicyConfig(**SMALL))
    train(flags(made, tmp_path / "two", start=str(tmp_path / "one"), tasks="PushCube"), PolicyConfig(**SMALL))
    before, after = (BLM.from_pretrained(tmp_path / name).policy.state_dict() for name in ("one", "two"))
    assert all(torch.equal(before[name], after[name]) == name.startswith("normalizer.") for name in ("normalizer.state_mean", "blocks.0.mlp.1.weight"))


def test_a_run_refused_for_its_language_model_is_left_as_it_was(made, tmp_path):
    cfg = flags(made, tmp_path / "one", robots="panda")
    train(cfg, PolicyConfig(**SMALL))
    small_blm(seed=5, policy=False).save_pretrained(tmp_path / "other")
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.is_file()}
    with pytest.raises(UserError, match="another language model"):
        train(dataclasses.replace(cfg, backbone=str(tmp_path / "other"), resume=True), PolicyConfig(**SMALL))
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.is_file()} == before


def test_a_policy_goes_on_with_another_language_model(made, tmp_path):
    train(flags(made, tmp_path / "one", robots="panda"), PolicyConfig(**SMALL))
    small_blm(seed=5, policy=False).save_pretrained(tmp_path / "other")
    train(flags(made, tmp_path / "two", robots="panda", start=str(tmp_path / "one"), backbone=str(tmp_path / "other")), PolicyConfig(**SMALL))
    one, two = BLM.from_pretrained(tmp_path / "one"), BLM.from_pretrained(tmp_path / "two")
    assert not torch.equal(*(blm.vlm.model.embed_tokens.weight for blm in (one, two)))
    assert torch.equal(one.policy.normalizer.state_mean, two.policy.normalizer.state_mean)
    assert not torch.equal(one.policy.perceiver.queries, two.policy.perceiver.queries)
    assert two.training["policy"]["started_from"]["backbone"] == one.training["policy"]["backbone"] != two.training["policy"]["backbone"]
    with pytest.raises(UserError, match="another language model"):           # frozen layers would read what they do not know
        train(flags(made, tmp_path / "three", robots="widowx", start=str(tmp_path / "one"), backbone=str(tmp_path / "other")), PolicyConfig(**SMALL))
