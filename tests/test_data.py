"""The data engine: kinematics against published poses, success tests both ways, determinism, the expert in every cell, episode files."""
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open

import data.robots
from cli import UserError
from nano import scenes as corpora
from data import record as recorder
from data.add_robot import convert, with_entry
from nano.scenes import CLASSES, CLUTTER, MOST_QUESTIONS, Corpus, attempt, faults_of, look, make_shard, project
from data.env import CONTROL_HZ, TabletopEnv
from data.expert import demonstrate, tool_rotation
from nano.questions import equalise
from data.record import Episode, RecordConfig, correction, load_episodes, record, write_episode
from data.robots import DEFAULTS, ROBOTS, SQUEEZE, Kinematics, Robot, get_kinematics, get_robot, robot_xml
from data.tasks import PEG_LENGTH, TASKS
from rollout import rollout, why

import mujoco  # isort: skip, data chooses the GL first

# TCP positions (m, base frame) that the arms' sources publish for these joint angles (rad)
POSES = [
    ("panda", [0.0, 0.392699, 0.0, -1.963495, 0.0, 2.356194, 0.785398], [0.615, 0.0, 0.1698]),
    ("panda", [0.0, 0.0, 0.0, -1.57079, 0.0, 1.57079, -0.7853], [0.5545, 0.0, 0.5211]),
    ("xarm6", [0.001563, -1.109124, -0.097134, 0.000153, 1.206067, 0.001662], [0.1928, 0.0003, 0.1229]),
    ("xarm7", [0.0, -0.247, 0.0, 0.909, 0.0, 1.15644, 0.0], [0.3998, 0.0, 0.2278]),
    ("xarm7", [0.0, -0.4, 0.0, 0.5, 0.0, 0.9, -3.0], [0.3267, 0.0, 0.1361]),
    ("widowx", [0.0, 1.38, 1.04, -1.26, 0.0, 0.0], [0.2135, 0.0, 0.0849]),
    ("widowx", [0.0, 2.08, 0.41, 1.57, 0.0, 0.0], [0.4356, 0.0, 0.059]),
]


@pytest.mark.parametrize("robot, qpos, tcp", POSES)
def test_forward_kinematics_matches_published_poses(robot, qpos, tcp):
    assert np.allclose(get_kinematics(robot).forward(qpos)[0], tcp, atol=1e-4)


@pytest.mark.parametrize("robot", ROBOTS)
def test_inverse_kinematics_inverts_and_refuses(robot):
    k, r = get_kinematics(robot), get_robot(robot)
    rng = np.random.default_rng(0)
    for _ in range(5):
        target = np.array([r.base_to_spawn_centre, 0, 0.06]) + rng.uniform(-0.05, 0.05, 3)
        rotation = tool_rotation(r, rng.uniform(-0.5, 0.5), 0.2)
        qpos = k.solve_ik(target, rotation, r.home)
        at, turned = k.forward(qpos)
        assert np.abs(at - target).max() < 1e-3 and np.abs(turned - rotation).max() < 3e-3
        assert (qpos >= r.joint_range[:, 0]).all() and (qpos <= r.joint_range[:, 1]).all()
    assert k.solve_ik(np.array([2.0, 0, 0.1]), rotation, r.home) is None


@pytest.mark.parametrize("robot", ROBOTS)
def test_fingers_close_on_nothing_and_open_again(robot):
    env = TabletopEnv(robot, "PushCube", render=False)
    env.reset(0)
    dof, travel = env.robot.dof, env.robot.travel
    for _ in range(2):
        for target, rest in ((SQUEEZE, 0.0), (travel, travel)):
            settle(env, 12, target)
            assert np.abs(env.data.qpos[dof:dof + 2] - rest).max() < 1.5e-3 and np.abs(env.data.qvel[dof:dof + 2]).max() < 0.01


class Lazy:
    """A policy that leans to one side and stays there."""

    def __init__(self):
        self.asked = []

    def act(self, observation, robot, temperature, seed):
        self.asked.append(seed)
        return np.tile(np.append(get_robot(robot).home + (0.3, 0, 0, 0, 0, 0), 0.0), (16, 1))


def test_corrections_begin_where_the_policy_was():
    env, lazy = TabletopEnv("widowx", "PickCube", render=False), Lazy()
    demonstration = correction(lazy, env, 5, 0.0)
    assert demonstration.success and abs(demonstration.states[0, 0] - 0.3) < 0.02 and demonstration.phases[0] == "retreat"
    assert lazy.asked[0] == [5, 0] and lazy.asked[-1][1] >= 8 and len(demonstration.states) <= env.task.max_steps


def test_corrections_are_of_the_robots_that_the_policy_knows(tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(recorder, "load_policy", lambda folder: SimpleNamespace(policy=SimpleNamespace(embodiments={"panda": (17, 8), "widowx": (16, 7)})))
    monkeypatch.setattr(recorder, "record_cell", lambda job: jobs.append(job) or (*job[:2], 1, []))
    monkeypatch.setattr(recorder, "pool", lambda workers: nullcontext(SimpleNamespace(imap_unordered=map)))
    record(RecordConfig(out=str(tmp_path), policy="some", tasks="PickCube", episodes=1))
    assert [job[0] for job in jobs] == ["panda", "widowx"]
    with pytest.raises(UserError, match="not trained on xarm6"):
        record(RecordConfig(out=str(tmp_path), policy="some", robots="xarm6", episodes=1))


def test_a_rollout_looks_every_few_steps_and_says_why_it_failed():
    env, lazy = TabletopEnv("widowx", "StackCube", render=False), Lazy()
    result = rollout(lazy, env, 5, execute_steps=6, max_steps=20)
    assert not result["success"] and result["steps"] == 20 and result["reason"] == "never grasped" and [step for _, step in lazy.asked] == [0, 6, 12, 18]
    for held, reason in (([0, 1, 1], "held to the end"), ([0, 1, 0], "let go elsewhere")):
        assert why(env.task, held) == reason
    assert why(TASKS["PushCube"], [0]) == "missed the target"


def settle(env, steps=6, finger=None):
    hold = np.append(env.data.ctrl[:env.robot.dof], env.robot.travel if finger is None else finger)
    for _ in range(steps):
        *_, info = env.step(hold)
    return info


def put(env, name, position, yaw=0.0):
    env.place(name, position, yaw)
    mujoco.mj_forward(env.model, env.data)


@pytest.mark.parametrize("robot", ["panda", "widowx"])
def test_success_conditions_both_ways(robot):
    env = TabletopEnv(robot, "PushCube", render=False)
    env.reset(0)
    goal, radius = env.position("goal"), 0.1 * env.robot.scale
    for distance, wanted in ((0.95 * radius, True), (1.05 * radius, False)):
        put(env, "cube", goal + (distance, 0, 0.0195))
        assert settle(env, 1)["success"] is wanted
    put(env, "cube", goal + (0, 0, 0.1))
    assert not env.task.success(env)["on_table"]

    env = TabletopEnv(robot, "StackCube", render=False)
    env.reset(0)
    under = env.position("cubeB")
    for offset, wanted in ((0.015, True), (0.06, False)):
        put(env, "cubeA", under + (offset, 0, 0.0405))
        assert settle(env, 12)["success"] is wanted
    env.place("cubeB", under)
    put(env, "cubeA", under + (0, 0, 0.1))
    assert not env.task.success(env)["height"]

    env = TabletopEnv(robot, "PlaceSphere", render=False)
    env.reset(0)
    put(env, "sphere", env.position("bin") + (0, 0, 0.026))
    assert settle(env, 20)["success"]
    put(env, "sphere", env.position("bin") + (0.05, 0, 0.0175))
    assert not settle(env, 20)["success"]

    env = TabletopEnv(robot, "LiftPegUpright", render=False)
    env.reset(0)
    assert not settle(env, 2)["success"]
    for tilt, wanted in ((np.pi / 2, True), (-np.pi / 2, True), (np.pi / 2 - 0.12, False)):       # either end up; 0.12 rad off is too much
        at = env.model.jnt_qposadr[env.model.body("peg").jntadr[0]]
        env.data.qpos[at:at + 7] = [0.05, 0, PEG_LENGTH, np.cos(tilt / 2), 0, np.sin(tilt / 2), 0]
        mujoco.mj_forward(env.model, env.data)
        assert all(env.task.success(env).values()) is wanted

    env = TabletopEnv(robot, "PickCube", render=False)
    env.reset(0)
    threshold = 0.0225 if robot == "widowx" else 0.025
    for distance, wanted in ((0.9, True), (1.1, False)):
        put(env, "cube", env.position("goal") + (0, distance * threshold, 0))
        assert all(env.task.success(env).values()) is wanted
    env.data.qvel[0] = 0.3
    put(env, "cube", env.position("goal"))
    assert not env.task.success(env)["robot_static"]


def test_ball_comes_to_rest_only_with_rolling_friction():
    env = TabletopEnv("panda", "PlaceSphere", render=False)
    env.reset(0)
    assert env.model.geom("sphere").condim[0] == 6 and settle(env, 10)["conditions"]["at_rest"]


def test_env_is_deterministic_and_renders_what_it_says():
    runs = []
    for _ in range(2):
        env = TabletopEnv("xarm7", "PickCube")
        observation, _ = env.reset(5)
        for i in range(4):
            observation, reward, terminated, truncated, info = env.step(np.append(env.robot.home + 0.02 * i, 0.02))
        runs.append(observation)
        env.close()
    a, b = runs
    assert np.array_equal(a["state"], b["state"]) and a["instruction"] == b["instruction"]
    assert all(np.array_equal(a["images"][v], b["images"][v]) and a["images"][v].shape == (128, 128, 3) and a["images"][v].std() > 5 for v in ("front", "wrist"))
    env = TabletopEnv("xarm7", "PickCube", render=False)
    assert not np.array_equal(env.reset(6)[0]["state"], env.reset(7)[0]["state"])
    assert a["state"].shape == (env.robot.state_dim,)


def test_actions_are_clipped_counted_and_checked():
    env = TabletopEnv("widowx", "PickCube", render=False)
    env.reset(0)
    *_, info = env.step(np.append(np.full(6, 9.0), 1.0))
    assert info["clipped"] == {"limits": 1, "speed": 1} and (env.data.ctrl[:6] - env.robot.home <= env.robot.velocity_limit / CONTROL_HZ + 0.1).all()
    assert env.data.ctrl[6] == env.robot.travel
    for bad in (np.zeros(3), np.full(7, np.nan)):
        with pytest.raises(ValueError):
            env.step(bad)


def test_held_out_wordings_are_never_seen_in_training():
    for task in TASKS.values():
        assert task.held_out and not set(task.held_out) & set(task.instructions + task.paraphrases)
    seen = {TabletopEnv("panda", "PickCube", render=False).reset(s)[0]["instruction"] for s in range(12)}
    assert len(seen) > 2 and not seen & set(TASKS["PickCube"].held_out)
    assert TabletopEnv("panda", "PickCube", render=False, held_out=True).reset(0)[0]["instruction"] in TASKS["PickCube"].held_out


@pytest.mark.parametrize("make", [lambda: TabletopEnv("pandas"), lambda: TabletopEnv("panda", "PikCube")])
def test_unknown_names_list_the_choices(make):
    with pytest.raises(UserError, match="choose from.*did you mean"):
        make()


def test_recorder_resumes_and_reads_back(tmp_path):
    config = RecordConfig(robots="widowx", tasks="PushCube", episodes=2, workers=1, out=str(tmp_path))
    record(config)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == ["widowx-PushCube-0.safetensors", "widowx-PushCube-1.safetensors"]
    before, kept = files[0].read_bytes(), files[1].read_bytes()
    files[0].unlink()
    record(config)
    assert files[1].read_bytes() == kept and len(files[0].read_bytes()) == len(before)
    episode = load_episodes(tmp_path)[0]
    assert episode.robot == "widowx" and episode.success and episode.seed == 0 and "made" in episode.header
    front, wrist = episode.images(len(episode) - 1)
    env = TabletopEnv("widowx", "PushCube", varied="all")
    observation, _ = env.reset(0)
    assert np.abs(episode.images(0)[0].astype(int) - observation["images"]["front"]).mean() < 3       # JPEG loses little
    assert np.allclose(episode.state[0], observation["state"]) and episode.action.shape == (len(episode), 7)
    assert json.loads((tmp_path / "failures.json").read_text()) == {"widowx-PushCube": []}


def test_broken_episodes_are_named(tmp_path):
    with pytest.raises(UserError, match="no episodes"):
        load_episodes(tmp_path)
    env = TabletopEnv("widowx", "PushCube", render=False)
    demonstration = demonstrate(env, 0)
    demonstration.images = [{v: np.zeros((8, 8, 3), np.uint8) for v in ("front", "wrist")}] * len(demonstration.states)
    path = tmp_path / "widowx-PushCube-0.safetensors"
    write_episode(path, demonstration, "widowx", "PushCube", 0, 0.0)
    assert len(Episode(path)) == len(demonstration.states)
    whole = path.read_bytes()
    for broken in (whole[:200], whole[:-50], b"", b"not an episode at all"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="broken episode"):
            load_episodes(tmp_path)


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


# ---- another arm, from its MJCF file

def mjcf_of(robot, folder):
    """An MJCF file of an arm that is here already, with a site at its flange; its first link hangs from a body without a joint, as bases do elsewhere."""
    body, rest = robot_xml(robot)
    flange = body.replace('<site name="tcp"', '<site name="attachment_site"/><site name="tcp"')
    path = folder / f"{robot.name}.xml"
    path.write_text(f'<mujoco>{DEFAULTS}<worldbody><body name="stand" pos="0 0 0.1" quat="0 0 0 1"><body pos="0 0 -0.1" quat="0 0 0 1">{flange}</body></body></worldbody>{rest}</mujoco>')
    return path


@pytest.mark.parametrize("name", ROBOTS)
def test_an_arm_from_its_mjcf_file_is_the_same_arm(name, tmp_path):
    robot = get_robot(name)
    entry = convert(mjcf_of(robot, tmp_path), "attachment_site", name, 2.0)
    made, known = Kinematics(Robot(name, entry)), get_kinematics(name)
    for qpos in np.random.default_rng(0).uniform(*robot.joint_range.T, (5, robot.dof)):
        for a, b in zip(made.forward(qpos), known.forward(qpos)):
            assert np.allclose(a, b, atol=1e-6)
    for mine, joint in zip(entry["joints"], robot.joints):
        assert (mine["kp"], mine["kd"], mine["force_range"]) == (joint["kp"], joint["kd"], joint["force_range"]) and mine["capsules"]
    assert np.isclose(sum(j["mass"] for j in entry["joints"]), sum(j["mass"] for j in robot.joints) + robot.hand["mass"], atol=1e-3)
    assert np.allclose(entry["reach"], robot.reach, atol=0.05) and abs(entry["base_to_spawn_centre"] - robot.base_to_spawn_centre) < 0.06


def test_a_new_entry_works_and_leaves_the_others_alone(tmp_path, monkeypatch):
    entry, text = convert(mjcf_of(get_robot("xarm6"), tmp_path), "attachment_site", "xarm6", 2.0), (Path(data.robots.__file__).parent / "robots.json").read_text()
    made = json.loads(with_entry(text, "mine", entry))
    assert list(made["robots"]) == [*ROBOTS, "mine"] and {name: made["robots"][name] for name in ROBOTS} == json.loads(text)["robots"]
    monkeypatch.setattr(data.robots, "ROBOTS", (*ROBOTS, "mine"))
    monkeypatch.setitem(data.robots.NUMBERS, "mine", made["robots"]["mine"])
    assert demonstrate(TabletopEnv("mine", "StackCube", render=False), 0).success


def test_arms_that_cannot_be_added_are_told(tmp_path):
    path = mjcf_of(get_robot("panda"), tmp_path)
    with pytest.raises(UserError, match="no site 'flange'.*attachment_site, tcp"):
        convert(path, "flange", "panda", 2.0)
    path.write_text(path.read_text().replace('name="joint3"', 'name="joint3" type="slide"'))
    with pytest.raises(UserError, match="link3 must have one hinge joint"):
        convert(path, "attachment_site", "panda", 2.0)
    path.write_text("<mujoco><worldbody/>")
    with pytest.raises(UserError, match="cannot read"):
        convert(path, "attachment_site", "panda", 2.0)
