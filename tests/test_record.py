"""Episodes: recorded, recorded again, read back; anything wrong with one gives one line."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from cli import UserError
from data import record as recorder
from data import seeds
from data.env import TabletopEnv
from data.expert import Demonstration
from data.record import Episode, RecordConfig, load_episodes, record, write_episode
from files import Tensors, save_tensors

ROOT = Path(__file__).parent.parent
NAME = "widowx-PushCube-0.safetensors"


def picture(i):
    return np.random.default_rng(i).integers(0, 255, (16, 16, 3)).astype(np.uint8)


def draw(env, seed, noise, command=0):
    """Replaces the expert: five steps that nobody executed, quick to make."""
    draws = np.random.default_rng(seed)
    states = draws.normal(size=(5, env.robot.state_dim)).astype(np.float32)
    actions = draws.normal(size=(5, env.robot.action_dim)).astype(np.float32)
    images = [{"front": picture(2 * i), "wrist": picture(2 * i + 1)} for i in range(5)]
    phases = ["approach", "approach", "push", "push", "push"]
    return Demonstration(states, actions, phases, images, True, "push it")


def draw_what_is_there(env, seed, noise, command=0):
    env.reset(seed, command=command)
    demonstration = draw(env, seed, noise)
    demonstration.instruction = env.instruction
    return demonstration


def fail_once(env, seed, noise, command=0):
    """Seed 0 fails, seed 1 is to be left out."""
    if seed == 1:
        return None
    demonstration = draw(env, seed, noise)
    demonstration.success = seed != 0
    return demonstration


def fail(env, seed, noise, command=0):
    demonstration = draw(env, seed, noise)
    demonstration.success = False
    return demonstration


def die_at_three(env, seed, noise, command=0):
    if seed == 3:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(env, seed, noise)


def config(folder, **changes):
    settings = {"robots": "widowx", "tasks": "PushCube", "episodes": 2, "workers": 1}
    return RecordConfig(out=str(folder), **{**settings, **changes})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def episode(tmp_path):
    """The path of one good episode."""
    path = tmp_path / NAME
    about = {"robot": "widowx", "task": "PushCube", "seed": 0, "noise": 0}
    write_episode(path, draw(TabletopEnv("widowx", "PushCube"), 0, 0.0), about)
    return path


@pytest.fixture
def one_process(monkeypatch):
    """The recorder's jobs in this process: a worker takes seconds to start."""
    monkeypatch.setattr(recorder, "run_jobs", lambda function, jobs, workers: map(function, jobs))


# ---- recording


def test_recorder_resumes_and_reads_back(tmp_path):
    record(config(tmp_path))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [NAME, "widowx-PushCube-1.safetensors"]
    before = contents(tmp_path)
    files[0].unlink()
    os.utime(files[1], (1, 1))
    record(config(tmp_path))
    assert contents(tmp_path) == before and files[1].stat().st_mtime == 1
    episode = load_episodes(tmp_path)[0]
    assert episode.robot == "widowx" and episode.seed == 0
    assert "made" in episode.about and episode.phases[0] == "retreat"
    env = TabletopEnv("widowx", "PushCube", varied="all")
    observation, _ = env.reset(0)
    front, _ = episode.images(0)
    error = np.abs(front.astype(int) - observation["images"]["front"])
    assert error.mean() < 3  # JPEG loses little
    assert np.allclose(episode.state[0], observation["state"])
    assert episode.action.shape == (len(episode), 7) and len(episode.images(len(episode) - 1)) == 2
    assert json.loads((tmp_path / "failures.json").read_text()) == {"widowx-PushCube": []}


def test_a_scene_with_several_commands_is_played_with_two(tmp_path, one_process):
    record(config(tmp_path, tasks="which_stack", episodes=4), draw_what_is_there)
    loaded = load_episodes(tmp_path)
    assert [(e.scene, e.task, e.seed, e.command) for e in loaded] == [
        ("which_stack", "StackCube", seed, command) for seed in (0, 1) for command in (0, 1)
    ]
    assert loaded[0].path.name == "widowx-which_stack-0-0.safetensors"
    assert loaded[0].instruction != loaded[1].instruction


def test_files_do_not_depend_on_the_number_of_workers(tmp_path):
    for workers in (1, 2):
        record(config(tmp_path / str(workers), episodes=21, workers=workers), draw)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1")) == 21 + 1


def test_failures_are_counted_and_other_seeds_taken(tmp_path, one_process):
    failures = record(config(tmp_path), fail_once)
    assert failures == {"widowx-PushCube": [0]}
    assert [episode.seed for episode in load_episodes(tmp_path)] == [2, 3]
    assert json.loads((tmp_path / "failures.json").read_text()) == {"widowx-PushCube": [0]}


def test_a_cell_that_cannot_be_done_is_given_up(tmp_path, one_process):
    with pytest.raises(UserError, match="0 of 2 episodes of widowx PushCube"):
        record(config(tmp_path), fail)


def test_damaged_episodes_are_recorded_again(tmp_path, one_process):
    record(config(tmp_path, episodes=5), draw)
    whole = contents(tmp_path)
    for seed, keep in enumerate((-9, 100, 0, -1)):
        path = tmp_path / f"widowx-PushCube-{seed}.safetensors"
        path.write_bytes(whole[path.name][:keep] + b"?" * (seed == 3))
    record(config(tmp_path, episodes=5), draw)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("changes, maker", [({"noise": 0.0}, "expert"), ({}, "another")])
def test_other_settings_than_what_is_there_are_refused(changes, maker, tmp_path, one_process):
    record(config(tmp_path), draw)
    before = contents(tmp_path)
    says = f"{NAME} was made by expert with noise 0.015, not .*choose another --out"
    with pytest.raises(UserError, match=says):
        record(config(tmp_path, episodes=4, **changes), draw, maker)
    assert contents(tmp_path) == before
    record(config(tmp_path, seed=100, **changes), draw, maker)  # other layouts may differ
    assert len(contents(tmp_path)) == len(before) + 2


def test_a_killed_worker_ends_the_recorder_and_what_is_done_is_kept(tmp_path, request):
    with pytest.raises(UserError, match="a worker was killed"):
        record(config(tmp_path, episodes=6), die_at_three)
    assert [episode.seed for episode in load_episodes(tmp_path)] == [0, 1, 2]
    request.getfixturevalue("one_process")
    record(config(tmp_path, episodes=6), draw)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    broken = contents(tmp_path)
    record(config(tmp_path / "unbroken", episodes=6), draw)
    assert contents(tmp_path / "unbroken") == broken


def test_a_killed_recorder_leaves_no_workers_and_the_next_cleans_up(tmp_path):
    command = [sys.executable, "-m", "data.record", "--out", str(tmp_path), "--episodes", "5"]
    run = subprocess.Popen([*command, "--robots", "widowx"], cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("*.safetensors")) and time.monotonic() < end:
        time.sleep(0.02)
    run.kill()
    run.wait()
    time.sleep(1.5)
    (tmp_path / ".part-widowx-PickCube-9-abc.safetensors").write_bytes(b"half")
    before = contents(tmp_path)
    time.sleep(0.5)
    assert contents(tmp_path) == before  # nothing is written anymore
    record(config(tmp_path, episodes=1, tasks="PickCube"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert load_episodes(tmp_path)


def test_two_recorders_do_not_share_a_folder(tmp_path):
    with recorder.claim(tmp_path), pytest.raises(UserError, match="another process writes to"):
        record(config(tmp_path), draw)


@pytest.mark.parametrize("text", ["", "[]", '{"a": ["x"]}'])
def test_damaged_counts_are_replaced(text, tmp_path, one_process):
    (tmp_path / "failures.json").write_text(text)
    record(config(tmp_path, episodes=1), draw)
    assert json.loads((tmp_path / "failures.json").read_text()) == {"widowx-PushCube": []}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"seed": seeds.FIRST_CORRECTION}, "stay below 500,000"),
        ({"episodes": 300_000}, "stay below 500,000"),
        ({"robots": "widowz"}, "did you mean widowx"),
        ({"noise": float("nan")}, "--noise nan"),
        ({"workers": 0}, "--workers 0"),
        ({"out": "/proc/nowhere"}, "cannot write"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(changes, says, tmp_path):
    changes = dict(changes)
    with pytest.raises(UserError, match=says):
        record(config(changes.pop("out", tmp_path / "new"), **changes), draw)
    assert not (tmp_path / "new").exists()


# ---- reading


def parts(path):
    """({name: array}, header) of an episode's file."""
    file = Tensors(path)
    return {name: file[name] for name in file.names()}, file.about


def rewrite(path, **changes):
    """The same episode with other arrays, and a matching checksum."""
    arrays, header = parts(path)
    save_tensors(path, {**arrays, **changes}, header)


def with_header(path, **changes):
    arrays, about = parts(path)
    about = {**about, **changes}
    about = {name: value for name, value in about.items() if value is not None}
    save_tensors(path, arrays, about)


def with_number(name, value):
    def damage(path):
        array = parts(path)[0][name].copy()
        array[2, 1] = value
        rewrite(path, **{name: array})

    return damage


def with_flip(name):
    def damage(path):
        body = parts(path)[0][name].tobytes()
        whole = path.read_bytes()
        place = whole.index(body) + len(body) // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])

    return damage


def replaced(before, after):
    return lambda path: path.write_bytes(path.read_bytes().replace(before, after, 1))


DAMAGES = {
    "empty": (lambda path: path.write_bytes(b""), ""),
    "junk": (lambda path: path.write_bytes(b"not an episode at all"), ""),
    "one byte short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), ""),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), ""),
    "header cut": (lambda path: path.write_bytes(path.read_bytes()[:200]), ""),
    "flip in state": (with_flip("state"), "checksum"),
    "flip in action": (with_flip("action"), "checksum"),
    "flip in offset": (with_flip("offset"), "checksum"),
    "flip in jpeg": (with_flip("jpeg"), "checksum"),
    "flip in phase": (with_flip("phase"), "checksum"),
    "other words": (replaced(b"push it", b"pull it"), "checksum"),
    "other seed": (replaced(rb"seed\": 0", rb"seed\": 7"), "checksum"),
    "other type": (replaced(b'"dtype":"F32"', b'"dtype":"I32"'), "checksum"),
    "other checksum": (replaced(rb"crc32\": \"", rb"crc32\": \""[:-1] + b"f"), ""),
    "no checksum": (replaced(rb"\"crc32", rb"\"crc23"), "checksum"),
    "header no JSON": (replaced(rb"{\"robot", rb"!\"robot"), ""),
    "NaN in state": (with_number("state", np.nan), "state at step 2 holds nan"),
    "inf in state": (with_number("state", -np.inf), "state at step 2 holds -inf"),
    "NaN in action": (with_number("action", np.nan), "action at step 2 holds nan"),
    "absurd action": (with_number("action", 1e30), "action at step 2 holds 1.*e.30"),
    "short action": (lambda path: rewrite(path, action=parts(path)[0]["action"][1:]), "length"),
    "short phase": (lambda path: rewrite(path, phase=parts(path)[0]["phase"][1:]), "length"),
    "long offset": (lambda path: rewrite(path, offset=np.arange(14)), "length"),
    "flat state": (lambda path: rewrite(path, state=np.zeros(5, np.float32)), ""),
    "no steps": (lambda path: rewrite(path, state=np.zeros((0, 16), np.float32)), "length"),
    "strange phase": (lambda path: rewrite(path, phase=np.full(5, 99, np.uint8)), ""),
    "words as state": (lambda path: rewrite(path, state=np.full((5, 16), 1, bool)), ""),
    "unknown robot": (lambda path: with_header(path, robot="r2d2"), "unknown robot 'r2d2'"),
    "unknown task": (lambda path: with_header(path, task=["x"]), "unknown task"),
    "no robot": (lambda path: with_header(path, robot=None), "lacks 'robot'"),
    "no instruction": (lambda path: with_header(path, instruction=None), "lacks 'instruction'"),
    "no phases": (lambda path: with_header(path, phases=None), "lacks 'phases'"),
    "seed no number": (lambda path: with_header(path, seed="x"), "invalid literal"),
}


@pytest.mark.parametrize("damage, says", DAMAGES.values(), ids=DAMAGES)
def test_a_broken_episode_is_named_in_one_line(damage, says, episode):
    before = episode.read_bytes()
    damage(episode)
    assert episode.read_bytes() != before
    with pytest.raises(UserError, match=f"{NAME}.*{says}.*delete it and record again") as caught:
        load_episodes(episode.parent)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_no_flipped_byte_goes_unnoticed(episode):
    whole = episode.read_bytes()
    draws = np.random.default_rng(0)
    length = 8 + int.from_bytes(whole[:8], "little")  # of the header
    places = [*draws.integers(0, length, 150), *draws.integers(length, len(whole), 150)]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(draws.integers(8))
        episode.write_bytes(flipped)
        with pytest.raises(UserError, match=NAME):
            Episode(episode)


def jpeg_of(image, kind="JPEG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.mark.parametrize(
    "body",
    [
        jpeg_of(Image.new("RGB", (2000, 1500))),
        jpeg_of(Image.new("1", (30_000, 30_000)), "PNG"),
        jpeg_of(Image.new("RGB", (64, 64)))[:300],
        np.zeros(50, np.uint8),
        np.zeros(0, np.uint8),
    ],
    ids=["large", "a bomb", "cut", "zeros", "nothing"],
)
def test_a_bad_picture_inside_an_episode_is_told(body, episode):
    offset = np.array([0, *[len(body)] * 10])
    rewrite(episode, jpeg=body, offset=offset)
    with pytest.raises(UserError, match=f"{NAME}.*delete it and record again"):
        Episode(episode).images(0)


def test_episodes_without_a_checksum_still_load(episode):
    arrays, header = parts(episode)
    pictures = Episode(episode).images(3)
    about = {**header, "version": 1}
    save_file(arrays, episode, metadata={"episode": json.dumps(about)})
    old = load_episodes(episode.parent)[0]
    assert old.instruction == "push it" and len(old.checksum) == 8
    assert all(np.array_equal(a, b) for a, b in zip(old.images(3), pictures))
    episode.write_bytes(episode.read_bytes()[:-1])
    with pytest.raises(UserError, match="delete it"):
        Episode(episode)


def test_episodes_are_sorted_by_cell_and_number(episode):
    demonstration = draw(TabletopEnv("widowx", "PushCube"), 0, 0.0)
    for robot, seed in (("widowx", 10), ("widowx", 9), ("panda", 10)):
        path = episode.parent / f"{robot}-PushCube-{seed}.safetensors"
        about = {"robot": robot, "task": "PushCube", "seed": seed, "noise": 0.0}
        write_episode(path, demonstration, about)
    loaded = load_episodes(episode.parent)
    assert [(e.robot, e.seed) for e in loaded] == [
        ("panda", 10),
        ("widowx", 0),
        ("widowx", 9),
        ("widowx", 10),
    ]
    with pytest.raises(UserError, match="no episodes"):
        load_episodes(episode.parent / "nowhere")


# ---- looking


def test_show_draws_a_sheet(episode, tmp_path):
    demonstration = draw(TabletopEnv("panda", "PickCube"), 0, 0.0)
    other = tmp_path / "panda-PickCube-0.safetensors"
    about = {"robot": "panda", "task": "PickCube", "seed": 0, "noise": 0.0}
    write_episode(other, demonstration, about)
    out = tmp_path / "drawn.png"
    recorder.show(tmp_path, out)
    with Image.open(out) as image:
        # two robots side by side, two tasks; front above wrist at half size; moments side by side
        assert image.size == (2 * 8 * 4, 2 * 16)
        pixels = np.asarray(image.convert("RGB"))
    # the Panda picks, the WidowX pushes: the other corners are empty
    assert pixels[:16, : 8 * 4].any() and not pixels[:16, 8 * 4 :].any()
