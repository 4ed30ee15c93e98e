"""train_policy.py keeps its promises on tiny episodes: frozen means frozen, resuming is bit-exact."""

import dataclasses
import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import killed_again_and_again, last_state, log_of, spawn_two
from test_model import small_blm

import policy
import train_policy
import trainer
from checkpoint import backbone_hash
from cli import UserError
from data import demonstrations
from data.record import load_episodes, write_episode
from embodiment import Embodiment
from model import BLM
from policy import PolicyConfig
from train_policy import TrainConfig, train

SIZES = {"panda": (17, 8), "widowx": (16, 7)}
SMALL = PolicyConfig(
    intent_layer=2,
    num_intent_queries=4,
    max_condition_tokens=96,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    action_horizon=4,
    num_future_tokens=2,
    future_layer=1,
)


def use_small_sizes():
    """Here and in every process that a test starts."""
    policy.PRESETS["small"] = SMALL
    demonstrations.FRAME_STRIDE = 2


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setitem(policy.PRESETS, "small", SMALL)
    monkeypatch.setattr(demonstrations, "FRAME_STRIDE", 2)


def write_random_episode(folder, robot, task, seed, rng):
    steps = int(rng.integers(5, 11))
    images = []
    for _ in range(steps):
        views = ("front", "wrist")
        images.append({v: rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for v in views})
    state_dim, action_dim = SIZES[robot]
    episode = SimpleNamespace(
        images=images,
        states=rng.normal(size=(steps, state_dim)).astype(np.float32),
        actions=rng.normal(size=(steps, action_dim)).astype(np.float32),
        phases=["move"] * steps,
        success=True,
        attempts=1,
        instruction="push the cube" + " to the goal" * seed,
    )
    about = {"robot": robot, "task": task, "seed": seed, "noise": 0.0}
    write_episode(folder / f"{robot}-{task}-{seed}.safetensors", episode, about)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """demos/ (2 robots x 2 tasks x 3 episodes of 5 to 10 steps) and backbone/."""
    folder = tmp_path_factory.mktemp("stage2")
    rng = np.random.default_rng(0)
    (folder / "demos").mkdir()
    for robot in SIZES:
        for task in ("PickCube", "PushCube"):
            for seed in range(3):
                write_random_episode(folder / "demos", robot, task, seed, rng)
    small_blm(policy=False).save_pretrained(folder / "backbone")
    return folder


def settings(folder, out, **changes):
    flags = {"data": str(folder / "demos"), "backbone": str(folder / "backbone"), "out": str(out)}
    flags |= {"cache": str(folder / "intents"), "sizes": "small", "steps": 4, "batch_size": 4}
    flags |= {"lr": 1e-2, "eval_every": 2, "device": "cpu"}
    return TrainConfig(**{**flags, **changes})


def observation(episode):
    images = dict(zip(("front", "wrist"), episode.images(0)))
    return {"images": images, "state": episode.state[0], "instruction": episode.instruction}


def hash_of(blm):
    return backbone_hash(blm.vlm, blm.processor, len(blm.vlm.model.layers))


def test_a_run_makes_a_model_and_the_backbone_does_not_move(folder, tmp_path):
    backbone = BLM.from_pretrained(folder / "backbone")
    before = hash_of(backbone)
    figures = train(settings(folder, tmp_path))
    blm = BLM.from_pretrained(tmp_path)
    after = blm.vlm.state_dict()
    for name, tensor in backbone.vlm.state_dict().items():  # what no policy reads too
        assert torch.equal(after[name], tensor), name
    assert hash_of(blm) == before and set(blm.policy.embodiments) == set(SIZES)
    assert figures.keys() == {"val_flow", "val_future", "val_waypoint", "joint_error_rad"}
    assert all(np.isfinite(value) and value > 0 for value in figures.values())
    record = blm.training["policy"]
    assert blm.training["sft"]["step"] == 7 and record["step"] == 4
    assert record["rows"] > 0 and record["command"].startswith("python ")
    episode = load_episodes(folder / "demos")[0]
    assert blm.act(observation(episode), episode.robot).shape == (4, 8)
    last = log_of(tmp_path)[-1]
    assert last["step"] == 4 and last["joint_error_rad"] == figures["joint_error_rad"]
    with pytest.raises(UserError, match="--resume"):
        train(settings(folder, tmp_path))
    with pytest.raises(UserError, match="--lr"):
        train(settings(folder, tmp_path, resume=True, lr=1.0))


def killed_run(folder, out, moment):
    """One life of a run that is killed when it makes the batch of step `moment`."""
    use_small_sizes()
    make = train_policy.make_batch

    def deadly(demos, policy, cfg, step):
        if step == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(demos, policy, cfg, step)

    train_policy.make_batch = deadly
    train(settings(folder, out, steps=45, resume=bool(trainer.checkpoints(out))))


def test_killed_at_twenty_moments_it_ends_with_the_same_bits(folder, tmp_path):
    train(settings(folder, tmp_path / "whole", steps=45))
    moments = sorted(np.random.default_rng(0).choice(np.arange(1, 44), 20, replace=False).tolist())
    killed_again_and_again(killed_run, moments, folder, tmp_path / "killed")
    train(settings(folder, tmp_path / "killed", steps=45, resume=True))
    whole, killed = last_state(tmp_path / "whole"), last_state(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    losses = [[line["loss"] for line in log_of(tmp_path / run)] for run in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 45


def test_a_resumed_run_takes_new_episodes_in(folder, tmp_path):
    shutil.copytree(folder / "demos", tmp_path / "demos")
    data = str(tmp_path / "demos")
    train(settings(folder, tmp_path / "out", data=data))
    before = last_state(tmp_path / "out")
    for path in sorted((folder / "demos").glob("widowx-PushCube-*")):
        shutil.copy(path, tmp_path / "demos" / path.name.replace("Cube-", "Cube-50000"))
    train(settings(folder, tmp_path / "out", data=data, resume=True, steps=6))
    record = json.loads((tmp_path / "out" / "training.json").read_text())["policy"]
    assert record["episodes"] == 15
    after = last_state(tmp_path / "out")
    statistics = [name for name in before if "normalizer" in name]
    assert statistics and all(torch.equal(before[name], after[name]) for name in statistics)


def two_processes(folder, out, changes):
    use_small_sizes()
    train(settings(folder, out, **changes))


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_equal_one(folder, tmp_path, fsdp):
    changes = {"steps": 20, "eval_every": 20}
    train(settings(folder, tmp_path / "one", **changes))
    cache = {"cache": str(tmp_path / "intents")}  # made by both, in shares
    spawn_two(two_processes, folder, tmp_path / "two", {**changes, **cache, "fsdp": fsdp})
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 20
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) <= 2e-5 * max(1, a["loss"])
    mine, theirs = last_state(tmp_path / "one"), last_state(tmp_path / "two")
    assert mine.keys() == theirs.keys()


def run_main(argv):
    use_small_sizes()
    sys.argv = ["train_policy.py", *argv]
    train_policy.main()


def test_the_script_runs_under_torchrun(folder, tmp_path):
    cfg = settings(folder, tmp_path / "out", steps=2)
    names = ("data", "backbone", "out", "cache", "sizes", "steps", "batch_size", "device")
    argv = [word for name in names for word in (f"--{name}", str(getattr(cfg, name)))]
    spawn_two(run_main, argv)
    assert BLM.from_pretrained(tmp_path / "out").policy is not None
    assert not (tmp_path / "out" / ".lock").exists()


def load_rows(folder, cache="intents"):
    blm = BLM.from_pretrained(folder / "backbone")
    episodes = load_episodes(folder / "demos")
    place = folder / cache / "model-k2"
    missing = demonstrations.uncached(episodes, place)
    demonstrations.cache_hidden_states(blm, missing, SMALL, place)
    hidden = [demonstrations.open_cache(place, episode) for episode in episodes]
    return blm, episodes, demonstrations.Demonstrations(episodes, hidden, 4, 2)


def assert_rounded(stored, hidden):
    """Half a quantization step, plus what float16 adds."""
    largest = hidden.abs().amax(-1, keepdim=True)
    assert ((stored.float() - hidden).abs() <= largest * (0.5 / 127 + 2**-10)).all()
    assert len(stored.unique()) > 20


def test_a_token_of_hidden_states_takes_a_byte_a_number_and_a_scale(tmp_path):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 64) * torch.tensor([0.0, 1e-6, 1.0, 1e3, 1e6])[:, None]
    demonstrations.save_tensors(tmp_path / "a.safetensors", demonstrations.to_bytes(hidden), {})
    read = demonstrations.HiddenStates(demonstrations.Tensors(tmp_path / "a.safetensors"))
    # float16 is coarse below 6e-5 and ends at 65,504
    assert (read[1] - hidden[1])[:2].abs().max() <= 1e-6
    assert_rounded(read[1][2:4], hidden[1, 2:4])
    assert torch.equal(read[2][4].abs().max(), torch.tensor(65504.0).half())
    assert (tmp_path / "a.safetensors").stat().st_size < hidden.numel() + 3 * 5 * 4 + 500


def test_with_all_hidden_states_cached_no_language_model_is_loaded(folder, tmp_path, monkeypatch):
    before = train(settings(folder, tmp_path / "one"))

    def refuse(*arguments):
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr(train_policy.VLM, "from_pretrained", refuse)
    start = {"start": str(tmp_path / "one")}
    assert train(settings(folder, tmp_path / "two")) == before
    train(settings(folder, tmp_path / "three", **start))
    monkeypatch.undo()
    assert np.array_equal(*(act_first(folder, tmp_path / name) for name in ("one", "two")))


def act_first(folder, out):
    episode = load_episodes(folder / "demos")[0]
    return BLM.from_pretrained(out).act(observation(episode), episode.robot)


def test_the_order_of_the_prompt_has_hidden_states_of_its_own(folder, tmp_path):
    cfg = settings(folder, tmp_path / "behind", steps=1, cache=str(tmp_path / "cache"))
    train(cfg)
    train(dataclasses.replace(cfg, out=str(tmp_path / "first"), text_first=True))
    behind, first = sorted((tmp_path / "cache").iterdir(), key=lambda place: len(place.name))
    assert first.name == behind.name.replace("-int8", "-text-first-int8")
    blm, episodes, _ = load_rows(folder)
    images = [episodes[0].images(0)]
    for place, text_first in ((behind, False), (first, True)):
        stored = demonstrations.open_cache(place, episodes[0])[0]
        hidden, _ = blm.intent_states(images, [episodes[0].instruction], 2, text_first)
        assert_rounded(stored, hidden[0])
    assert BLM.from_pretrained(tmp_path / "first").policy.config.text_first


def test_rows_hold_what_the_episode_holds(folder):
    blm, episodes, demos = load_rows(folder)
    batch = demos.batch(np.arange(len(demos.frame)))
    for row, (i, j) in enumerate(demos.frame):
        episode, t = episodes[i], 2 * int(j)
        state = batch["state"][row, : episode.state.shape[1]].numpy()
        action = batch["action"][row, :, : episode.action.shape[1]].numpy()
        left = min(4, len(episode) - t)
        assert np.array_equal(state, episode.state[t])
        assert np.array_equal(action[:left], episode.action[t : t + left])
        assert (action[left:] == episode.action[-1]).all()  # past the end: the last action is held
        assert bool(batch["future_valid"][row]) == (t + 4 < len(episode))
        assert list(demos.embodiments)[batch["embodiment"][row]] == episode.robot
        for name, at in (("", t), ("future_", t + 4)):
            if row % 5 == 0 and at < len(episode):
                alone, _ = blm.intent_states([episode.images(at)], [episode.instruction], 2)
                stored = batch[f"{name}hidden"][row, batch[f"{name}mask"][row]]
                assert_rounded(stored, alone[0])


def test_held_out_episodes_are_not_trained_on(folder):
    _, episodes, demos = load_rows(folder)
    trained = set(demos.train)
    held_out = set(np.concatenate(demos.held_out))
    assert not trained & held_out and len(trained) + len(held_out) == len(demos.frame)
    assert {episodes[i].seed for i in demos.frame[sorted(held_out), 0]} == {2}
    rows = [demos.rows_of_step(0, step, 8) for step in range(20)]
    assert set(np.concatenate(rows)) <= trained
    assert np.array_equal(rows[3], demos.rows_of_step(0, 3, 8))
    assert not np.array_equal(rows[3], demos.rows_of_step(1, 3, 8))


def test_hidden_states_are_computed_once_and_never_stale(folder, monkeypatch):
    calls = []
    states = BLM.intent_states

    def counted(self, *args):
        calls.append(1)
        return states(self, *args)

    monkeypatch.setattr(BLM, "intent_states", counted)
    load_rows(folder, "fresh")
    assert len(calls) == 12
    load_rows(folder, "fresh")
    assert len(calls) == 12


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "zeros"])
def test_damaged_hidden_states_are_made_again(folder, damage, capsys):
    load_rows(folder, damage)
    files = sorted((folder / damage).rglob("*.safetensors"))
    before = files[0].read_bytes()
    content = bytearray(before)
    if damage == "cut":
        content = content[:-10]
    elif damage == "flip":
        content[-7] ^= 4
    elif damage == "header":
        content[9:12] = b"\xff\xfe\xfd"
    else:
        content[-64:] = bytes(64)
    files[0].write_bytes(content)
    load_rows(folder, damage)
    assert files[0].read_bytes() == before
    assert "recomputing it" in capsys.readouterr().out


def test_a_mended_episode_gets_new_hidden_states(folder, tmp_path):
    shutil.copytree(folder / "demos", tmp_path / "demos")
    shutil.copytree(folder / "backbone", tmp_path / "backbone")
    load_rows(tmp_path)
    rng = np.random.default_rng(9)
    write_random_episode(tmp_path / "demos", "panda", "PickCube", 0, rng)  # other pictures
    count = len(list((tmp_path / "intents").rglob("*.safetensors")))
    load_rows(tmp_path)
    assert len(list((tmp_path / "intents").rglob("*.safetensors"))) == count + 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"backbone": "nowhere"}, "nowhere"),
        ({"resume": True}, "no training run"),
        ({"intent_layer": 9}, "--intent_layer 9.*blocks"),
        ({"robots": "xarm6"}, "no episodes"),
        ({"start": "nowhere"}, "nowhere"),
        ({"sizes": "huge"}, "unknown --sizes 'huge'"),
        ({"demonstrations": -1}, "--demonstrations -1"),
    ],
)
def test_mistakes_are_told(folder, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train(settings(folder, tmp_path / "none", **changes))


def test_a_new_robot_trains_its_own_layers_alone(folder, tmp_path):
    train(settings(folder, tmp_path / "one", robots="panda"))
    changes = {"robots": "widowx", "start": str(tmp_path / "one"), "demonstrations": 2}
    train(settings(folder, tmp_path / "two", **changes))
    one, two = BLM.from_pretrained(tmp_path / "one"), BLM.from_pretrained(tmp_path / "two")
    assert list(one.policy.embodiments) == ["panda"]
    assert list(two.policy.embodiments) == ["panda", "widowx"]
    assert two.training["policy"]["episodes"] == 4  # two tasks, the two lowest seeds of each
    before, after = one.policy.state_dict(), two.policy.state_dict()
    assert any(tensor.shape != before[name].shape for name, tensor in after.items())
    for name, old in before.items():
        corner = tuple(slice(size) for size in old.shape)
        assert torch.equal(after[name][corner], old), name
    episode = load_episodes(folder / "demos")[0]
    chunks = [blm.act(observation(episode), "panda") for blm in (one, two)]
    assert np.array_equal(*chunks)
    for name, tensor in last_state(tmp_path / "two").items():
        if name.endswith("exp_avg"):
            assert (tensor[0] == 0).all() and (tensor[1] != 0).any()
    monkey = dataclasses.replace(SMALL, num_layers=3)
    policy.PRESETS["other"] = monkey
    with pytest.raises(UserError, match="no policy of the size that"):
        train(settings(folder, tmp_path / "three", start=str(tmp_path / "one"), sizes="other"))


def write_imported(folder, robot, views, state, action, seed):
    """An episode as data/lerobot.py leaves it: cameras of any names, actions that are deltas."""
    draws = np.random.default_rng(seed)
    pictures = draws.integers(0, 255, (len(state), len(views), 32, 32, 3), dtype=np.uint8)
    shown = SimpleNamespace(
        images=[dict(zip(views, row, strict=True)) for row in pictures],
        states=state.astype(np.float32),
        actions=action.astype(np.float32),
        phases=["teleoperation"] * len(state),
        instruction="push the cube",
    )
    about = {"robot": robot, "scene": "bricks", "command": 0, "noise": 0.0, "dataset": "bricks"}
    about |= {
        "task": "push the cube",
        "seed": seed,
        "fps": 10,
        "state_names": [],
        "action_names": [],
    }
    about |= {"cameras": {view: f"observation.images.{view}" for view in views}}
    about |= {"relative": [-1] * action.shape[1]}
    write_episode(folder / f"{robot}-bricks-{seed}.safetensors", shown, about)


@pytest.mark.parametrize("views", [("top",), ("left", "right", "top")])
def test_a_robot_of_other_cameras_and_of_deltas_trains_and_acts(views, folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    for seed in range(3):
        draws = np.random.default_rng(seed)
        state = 400 + draws.normal(size=(9, 3))  # mm
        action = [30, 30, 30, 0, 1] + 0.1 * draws.normal(size=(9, 5))  # more numbers than the state
        write_imported(tmp_path / "mine", "mover", views, state, action, seed)
    train(settings(folder, tmp_path / "one", robots="panda", steps=1, eval_every=1))
    changes = {"data": str(tmp_path / "mine"), "start": str(tmp_path / "one")}
    figures = train(settings(folder, tmp_path / "two", **changes))
    assert 0 < figures["joint_error_rad"] < 2  # over all numbers, because none is a joint target
    blm = BLM.from_pretrained(tmp_path / "two")
    mover = blm.policy.embodiments["mover"]
    assert mover == Embodiment(3, 5, views, (-1,) * 5, 10, mover.state, mover.action)
    episode = load_episodes(tmp_path / "mine")[0]
    seen = episode.observation(0)
    chunk = blm.act(seen, "mover")
    # in the dataset's units, and 400 mm from where a relative target would be
    assert chunk.shape == (4, 5) and np.abs(chunk - [30, 30, 30, 0, 1]).max() < 1
    for view in views:
        black = {**seen["images"], view: np.zeros((32, 32, 3), np.uint8)}
        assert not np.array_equal(blm.act({**seen, "images": black}, "mover"), chunk), view
    with pytest.raises(UserError, match=f"lacks '{views[0]}'.*\"images\": ..{views[0]}"):
        blm.act({**seen, "images": {"front": seen["images"][views[0]]}}, "mover")
    told = capsys.readouterr().out
    assert "try `python eval.py replay --data" in told and "serve.py --robot mover" in told
    # the other robot has its own cameras still
    other = load_episodes(folder / "demos")[0]
    chunks = [
        blm.act(other.observation(0), "panda")
        for blm in (BLM.from_pretrained(tmp_path / "one"), blm)
    ]
    assert np.array_equal(*chunks)


def test_a_dataset_of_other_cameras_or_another_clock_is_told(folder, tmp_path):
    for seed, views in enumerate((["top"], ["hand"])):
        write_imported(tmp_path, "mover", views, np.ones((9, 3)), np.ones((9, 3)), seed)
    with pytest.raises(UserError, match="mover-bricks-1.*cameras hand at 10 Hz, not .*cameras top"):
        train(settings(folder, tmp_path / "out", data=str(tmp_path)))


def test_a_policy_that_goes_on_from_another_trains_all(folder, tmp_path):
    train(settings(folder, tmp_path / "one"))
    train(settings(folder, tmp_path / "two", start=str(tmp_path / "one"), tasks="PushCube"))
    one = BLM.from_pretrained(tmp_path / "one").policy.state_dict()
    two = BLM.from_pretrained(tmp_path / "two").policy.state_dict()
    assert torch.equal(one["normalizer.state_mean"], two["normalizer.state_mean"])
    assert not torch.equal(one["blocks.0.mlp.1.weight"], two["blocks.0.mlp.1.weight"])


def test_a_run_refused_for_its_language_model_is_left_as_it_was(folder, tmp_path):
    cfg = settings(folder, tmp_path / "one", robots="panda")
    train(cfg)
    small_blm(seed=5, policy=False).save_pretrained(tmp_path / "other")
    paths = [path for path in (tmp_path / "one").iterdir() if path.is_file()]
    before = {path: path.read_bytes() for path in paths}
    with pytest.raises(UserError, match="another language model"):
        train(dataclasses.replace(cfg, backbone=str(tmp_path / "other"), resume=True))
    assert {path: path.read_bytes() for path in paths} == before


def test_a_policy_goes_on_with_another_language_model(folder, tmp_path):
    train(settings(folder, tmp_path / "one", robots="panda"))
    small_blm(seed=5, policy=False).save_pretrained(tmp_path / "other")
    changes = {"start": str(tmp_path / "one"), "backbone": str(tmp_path / "other")}
    train(settings(folder, tmp_path / "two", robots="panda", **changes))
    one, two = BLM.from_pretrained(tmp_path / "one"), BLM.from_pretrained(tmp_path / "two")
    assert not torch.equal(one.vlm.model.embed_tokens.weight, two.vlm.model.embed_tokens.weight)
    assert torch.equal(one.policy.normalizer.state_mean, two.policy.normalizer.state_mean)
    assert not torch.equal(one.policy.perceiver.queries, two.policy.perceiver.queries)
    before = two.training["policy"]["started_from"]["backbone"]
    assert before == one.training["policy"]["backbone"] != two.training["policy"]["backbone"]
    with pytest.raises(UserError, match="another language model"):
        train(settings(folder, tmp_path / "three", robots="widowx", **changes))


class Played:
    """An episode of so many steps, in which step t holds the number t."""

    def __init__(self, scene, seed, command, steps):
        self.robot, self.scene, self.seed, self.command = "widowx", scene, seed, command
        self.state = np.tile(np.arange(steps, dtype=np.float32)[:, None], (1, 17))
        self.action = np.zeros((steps, 7), np.float32)
        self.embodiment = Embodiment(17, 7)

    def __len__(self):
        return len(self.state)


def test_half_of_a_batch_is_the_other_command_of_the_same_layout():
    episodes = [
        Played("which_cube", seed, command, 30 + 8 * command)
        for seed in range(9)
        for command in (0, 1)
    ]
    episodes += [Played("PickCube", seed, 0, 20) for seed in range(9)]
    demos = demonstrations.Demonstrations(episodes, None, 4, 2)
    rows = demos.rows_of_step(0, 0, 64)
    frames = [(episodes[i], frame) for i, frame in demos.frame[rows]]
    there = {(episode.scene, episode.seed, episode.command) for episode, _ in frames}
    paired = 0
    for episode, _ in frames:
        if episode.scene == "which_cube":
            paired += ("which_cube", episode.seed, 1 - episode.command) in there
    assert paired > 20
    assert np.isin(rows, demos.train).all()
    alone = demonstrations.Demonstrations(episodes[18:], None, 4, 2)
    drawn = np.random.default_rng([0, 0]).choice(alone.train, 64)
    assert sorted(alone.rows_of_step(0, 0, 64)) == sorted(drawn)  # no row appears twice
    for row, partner in enumerate(demos.partner):
        if row != partner:
            (i, frame), (j, other) = demos.frame[[row, partner]]
            assert episodes[i].scene == episodes[j].scene == "which_cube"
            assert episodes[i].seed == episodes[j].seed
            assert episodes[i].command != episodes[j].command
            last = len(demonstrations.frames_of(episodes[j])) - 1
            assert other == min(frame, last)


def test_waypoints_are_places_of_the_tool_ahead_and_at_last_where_it_ends():
    demos = demonstrations.Demonstrations([Played("PickCube", 0, 0, 20)], None, 4, 3)
    batch = demos.waypoints(np.arange(5))
    assert batch.shape == (5, 3, 3)
    assert batch[0, :, 0].tolist() == [4, 8, 12]
    assert batch[4, :, 2].tolist() == [12, 16, 19]
