"""Evaluation: the same seeds give the same table, in any number of processes; nothing is mixed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import eval as evaluation
import listening
from cli import UserError
from data.env import CONTROL_HZ, PERTURBATIONS, TabletopEnv
from data.expert import Demonstration, demonstrate
from data.record import write_episode
from data.robots import ROBOTS
from data.tasks import TASKS
from embodiment import Embodiment
from replay import repeat_last
from rollout import jerk, load_model, rollout

NANO = str(ROOT / "weights" / "nano")


def test_jerk():
    t = np.arange(50) / CONTROL_HZ
    states = np.zeros((50, 17))
    states[:, 0] = t**3  # third derivative 6, in one joint of two
    states[:, 9] = 100 * t**3  # no joint
    assert np.isclose(jerk(states, 2), 3)
    assert jerk(states[:3], 2) == 0


def test_processes_share_an_evaluation():
    config = evaluation.PhysicalConfig(robots="widowx,panda", tasks="PushCube", episodes=12)
    config.workers = 1
    alone = evaluation.physical("expert", config)
    config.workers = 2
    shared = evaluation.physical("expert", config)
    assert shared == alone
    assert alone["episodes"] == 24
    assert list(alone["cells"]) == ["widowx", "panda"]


def test_the_shipped_weights_give_the_shipped_table(tmp_path, monkeypatch, capsys):
    known = json.loads((ROOT / "results" / "physical.json").read_text())
    argv = "eval.py physical --robots widowx --tasks PushCube --episodes 2 --workers 1 --out"
    monkeypatch.setattr(sys, "argv", [*argv.split(), str(tmp_path / "r.json")])
    evaluation.main()
    result = json.loads((tmp_path / "r.json").read_text())
    assert known.keys() <= result.keys()
    cell = result["cells"]["widowx"]["PushCube"]
    assert cell.keys() == known["cells"]["widowx"]["PushCube"].keys()
    assert cell["success"] == known["cells"]["widowx"]["PushCube"]["success"] == 1
    assert "| widowx | 100 (68) | 100.0 |" in capsys.readouterr().out


def test_a_failure_has_its_seed_and_its_reason(monkeypatch):
    monkeypatch.setattr(evaluation, "run_jobs", lambda function, jobs, workers: map(function, jobs))
    config = evaluation.PhysicalConfig("widowx", "PickCube", 2, 1_000_003, device="cpu")
    result = evaluation.physical("physical", config)
    assert result["cells"]["widowx"]["PickCube"]["success"] == 0.5
    failures = {"widowx 1000003": "held to the end"}
    assert result["cells"]["widowx"]["PickCube"]["failures"] == failures
    assert result["reasons"] == {"held to the end": 1}


def test_weights_that_change_meanwhile_do_not_matter(tmp_path):
    folder = tmp_path / "nano"
    shutil.copytree(NANO, folder)
    first = load_model(str(folder), "cpu")
    shutil.rmtree(folder)
    assert load_model(str(folder), "cpu") is first


def here(function, jobs, workers):
    """run_jobs in this process: a fifth of the episodes fail, and under noise all."""
    for number, _, _, change, robot, task, seed in jobs:
        success = change != "noise" and seed % 5 > 0
        episode = {"name": f"{robot} {seed}", "success": success, "steps": 40, "jerk": 1.0}
        episode |= {"act_s": 0.01, "clipped": {"limits": 0, "speed": 1}}
        episode["reason"] = "" if success else "never grasped"
        yield number, change, task, episode


def test_perturbations_are_rows(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "run_jobs", here)
    config = evaluation.PhysicalConfig(device="cpu", weights=NANO, episodes=15)
    result = evaluation.physical("perturbations", config)
    assert list(result["cells"]) == ["unchanged", *PERTURBATIONS]
    cell = result["cells"]["camera"]["PickCube"]
    assert (cell["success"], cell["episodes"]) == (0.8, 15 * len(ROBOTS))
    assert result["cells"]["noise"]["StackCube"]["success"] == 0
    assert result["mean"] == pytest.approx(0.8 * 6 / 7)
    assert result["reasons"] == {"never grasped": (6 * 3 + 15) * len(ROBOTS) * len(TASKS)}
    assert result["clipped_steps"]["speed"] == result["episodes"] == 15 * 7 * 24
    assert "| camera | 80 |" in capsys.readouterr().out


def test_a_policy_that_listens_is_told_from_one_that_does_not(monkeypatch, capsys):
    def listen(blm, env, seed, instruction=None, command=0, other=None, new=False):
        env.reset(seed, instruction, command, new)
        return {"success": instruction is None, "other": False}

    def ignore(blm, env, seed, instruction=None, command=0, other=None, new=False):
        env.reset(seed, instruction, command, new)
        return {"success": command == 0, "other": command == 1}

    monkeypatch.setattr(listening, "run_jobs", lambda function, jobs, workers: map(function, jobs))
    config = evaluation.ToldConfig(robots="panda", families="which_cube,mixed", scenes=4)
    rates = {}
    for name, policy in (("listen", listen), ("ignore", ignore)):
        monkeypatch.setattr(listening, "rollout", policy)
        result = evaluation.told("told", config)
        figures = ("done", "pairs", "other", "neutral", "no_words", "new_combination")
        rates[name] = [result[figure]["rate"] for figure in figures]
    assert rates["listen"] == [1, 1, 0, 0, 0, 1]
    assert rates["ignore"] == [0.5, 0, 0.5, 1, 1, 1]
    assert result["done"]["n"] == 16 and result["pairs"]["n"] == 8
    assert result["seen_wordings"]["n"] == result["new_wordings"]["n"] == 8
    assert list(result["cells"]["panda"]) == ["which_cube", "mixed"]
    assert "| all | 50.0 | 0.0 |" in capsys.readouterr().out


def test_the_other_command_is_watched():
    env = TabletopEnv("panda", "which_cube", render=False)
    shown = demonstrate(env, 2, command=1)

    class Deaf:  # it always does the second command, whatever the instruction
        def act(self, observation, robot):
            return shown.actions[env.steps : env.steps + 12]

    told = {"command": 1, "other": 0}
    result = rollout(Deaf(), env, 2, **told)
    assert result["success"] and not result["other"]
    result = rollout(Deaf(), env, 2, command=0, other=1, max_steps=len(shown.actions))
    assert not result["success"] and result["other"]


def test_a_killed_worker_ends_the_evaluation(tmp_path):
    command = f"eval.py expert --episodes 5000 --workers 2 --out {tmp_path}/r.json".split()
    run = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    workers = []
    while len(workers) < 2:
        time.sleep(0.2)
        for pid in children.read_text().split():
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() and pid not in workers:
                workers.append(pid)
    os.kill(int(workers[0]), signal.SIGKILL)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "a worker was killed" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


# ---- questions


def question(text, answer, **fields):
    return {"question": text, "answer": answer, **fields}


@pytest.fixture
def questions(tmp_path):
    """A file with questions of every form about two pictures and a video."""
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    film = tmp_path / "film"
    film.mkdir()
    for i in range(3):
        shutil.copy(tmp_path / f"{i}.png", film / f"{i}.png")
    point = question("Point to the red cube.", '{"point_2d": [40, 50], "label": "red cube"}')
    point |= {"category": "point", "form": "point"}
    seen = question("Is there a red cube?", "yes", category="existence", form="yes/no", chance=0.5)
    new = seen | {"question": "Do you see a red cube?", "held_out": True}
    option = question("What is next?\n(A) lift\n(B) stop", "B", form="letter", chance=0.5)
    option |= {"category": "next", "options": ["lift", "stop"]}
    records = [
        {"images": ["0.png", "1.png"], "questions": [point, seen, new]},
        {"images": ["2.png"], "questions": [seen]},
        {"videos": ["film"], "questions": [option]},
        {"images": ["3.png"], "questions": [question("What is in my hand?", "A red cup.")]},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


KNOWN = {
    "Point to the red cube.": '{"point_2d": [40, 53]}',
    "Is there a red cube?": "yes",
    "Do you see a red cube?": "no",
    "What is next?\n(A) lift\n(B) stop": "It is (B).",
    "What is in my hand?": "a red mug",
}


class Oracle:
    """A model that gives the replies of KNOWN when shown images, and none when shown noise."""

    def answers(self, images, questions, max_new_tokens):
        replies = []
        for shown, text in zip(images, questions):
            first = shown[0][0] if isinstance(shown[0], list) else shown[0]
            replies.append(KNOWN[text] if isinstance(first, Image.Image) else "")
        return replies


def test_questions_of_every_form_are_scored(questions, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load_model", lambda folder, device, dtype: Oracle())
    config = evaluation.DigitalConfig(data=str(questions), device="cpu", batch_size=2)
    result = evaluation.digital("digital", config)["files"][str(questions)]
    rates = result["categories"]
    assert rates["existence"]["asked"] == 3
    assert rates["existence"]["model"] == pytest.approx(2 / 3)
    assert (rates["existence"]["seen"], rates["existence"]["held_out"]) == (1, 0)
    assert rates["existence"]["chance"] == 0.5
    assert rates["existence"]["blind"] == 0
    assert rates["point"]["model"] == rates["next"]["model"] == 1
    assert rates["all"]["model"] == 0  # the category of questions without one
    assert result["means"]["model"] == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)
    printed = capsys.readouterr().out
    assert "| existence | 3 | 50.0 | 0.0 | 66.7 | 100.0 | 0.0 | 0.0 | 21 to 94 |" in printed
    assert "| mean |  | 25.0 | 0.0 | 66.7 |" in printed


def test_so_many_questions_of_each_category_and_wording(questions, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda folder, device, dtype: Oracle())
    config = evaluation.DigitalConfig(data=str(questions), device="cpu", questions=1)
    rates = evaluation.digital("digital", config)["files"][str(questions)]["categories"]
    assert rates["existence"]["asked"] == 2
    config.questions = 0
    rates = evaluation.digital("digital", config)["files"][str(questions)]["categories"]
    assert rates["existence"]["asked"] == 3


def test_a_model_is_asked_and_the_result_written(questions, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    argv = ["eval.py", "digital", "--data", questions, "--base", NANO, "--out", out]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--weights", NANO, "--device", "cpu"])
    evaluation.main()
    result = json.loads(out.read_text())
    (table,) = result["files"].values()
    columns = ["chance", "blind", "base", "model", "seen", "held_out", "degenerate"]
    assert list(table["means"]) == columns
    assert table["means"]["base"] == table["means"]["model"]
    assert result["config"]["questions"] == 50


@pytest.mark.parametrize(
    "record, says",
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "q.jsonl"),
        ({"questions": [question("Why?", "So.", form="essay")]}, "line 1.*unknown form 'essay'"),
        ({"questions": [question("Why?", "B", form="letter")]}, "line 1.*it lacks 'options'"),
        ({"questions": [question("Why?", "B", category=[])]}, "line 1"),
        ({"questions": 5}, "line 1"),
    ],
)
def test_what_holds_no_questions_is_told(record, says, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda folder, device, dtype: Oracle())
    if "messages" in record:
        record["messages"].append({"role": "assistant", "content": "Hello."})
    (tmp_path / "q.jsonl").write_text(json.dumps(record) + "\n")
    config = evaluation.DigitalConfig(weights=NANO, data=str(tmp_path / "q.jsonl"), device="cpu")
    with pytest.raises(UserError, match=says):
        evaluation.digital("digital", config)


def test_replay_repeats_the_last_action_or_the_joints():
    state = np.arange(12.0).reshape(3, 4)
    episode = SimpleNamespace(state=state, action=-state[:, :2], embodiment=Embodiment(4, 2))
    assert repeat_last(episode, 0, 5).tolist() == [[0, 1]] * 5
    assert repeat_last(episode, 2, 5).tolist() == [[-4, -5]] * 5


def write_line(folder, seed, robot="widowx"):
    """An episode in which each joint moves linearly; the state is one step behind the action."""
    steps = np.arange(9)[:, None]
    states = np.zeros((9, 16), np.float32)
    states[:, :7] = 0.01 * seed + 0.01 * steps * np.arange(7)
    actions = states[:, :7] + 0.01 * np.arange(7, dtype=np.float32)
    image = np.zeros((128, 128, 3), np.uint8)
    images = [{"front": image, "wrist": image}] * 9
    shown = Demonstration(states, actions, ["lift"] * 9, images, True, "lift it")
    about = {"robot": robot, "scene": "PickCube", "task": "PickCube", "seed": seed}
    write_episode(folder / f"{robot}-PickCube-{seed}.safetensors", shown, about)


def test_replay_compares_with_both_controls_on_held_out_episodes_alone(tmp_path, capsys):
    write_line(tmp_path, 0)
    write_line(tmp_path, 1)  # the last one of a small cell is held out
    config = evaluation.ReplayConfig(data=str(tmp_path), weights=NANO, device="cpu")
    [result] = evaluation.replay("replay", config)["robots"].values()
    assert result["frames"] == 3 and result["episode"] == "widowx-PickCube-1.safetensors"
    assert result["units"] == ["rad"] * 6 + ["m"]
    error = result["error"]
    # in the other episode all joints are 0.01 lower; nothing else differs
    assert np.allclose(error["nearest_frame"], 0.01, atol=1e-6)
    # frames 0, 4 and 8 with 9, 5 and 1 steps left: mean distance of a line from where it was
    ahead = [*range(1, 10), *range(1, 6), 1]
    assert np.allclose(error["repeat_last"], 0.01 * np.mean(ahead) * np.arange(7), atol=1e-6)
    assert error["policy"][0] > 0
    printed = capsys.readouterr().out
    assert "| robot | joint | policy | repeat_last | nearest_frame |" in printed


def goal_row(way, done, **more):
    return {"way": way, "length": 2, "done": done, **more}


def test_figures_of_plans_stand_beside_those_of_the_whole_goal_told_at_once():
    rows = [
        goal_row("plan", [True, True], planned=True, judged_right=[True, True]),
        goal_row("plan", [True, False], planned=True, judged_right=[True, False]),
        goal_row("plan", [], planned=False, judged_right=[]),  # no plan, so nothing was judged
        goal_row("plan", [False], planned=False, judged_right=[]),  # refused
        goal_row("steps", [True, True]),
        goal_row("whole", [True, False]),
        goal_row("whole", [False]),
    ]
    figures = listening.plan_figures(rows, 2)
    rates = {name: (figure["rate"], figure["n"]) for name, figure in figures.items()}
    assert rates == {
        "planned": (0.5, 4),
        "judged_right": (0.75, 4),
        "plan_first": (0.5, 4),
        "plan_done": (0.25, 4),
        "steps_first": (1.0, 1),
        "steps_done": (1.0, 1),
        "whole_first": (0.5, 2),
        "whole_done": (0.0, 2),
    }


def late_episodes(function, jobs, workers):
    """run_jobs in this process: an episode succeeds if the arm waits, or the chunk is inpainted."""
    for number, _, _, change, robot, task, seed in jobs:
        options = evaluation.switches("0,8")[change]
        jump = 0.01 if options["inpaint"] else 0.01 * (1 + options["delay"])
        episode = {"name": f"{robot} {seed}", "success": jump < 0.05, "steps": 40, "jerk": 1.0}
        episode |= {"act_s": 0.01, "border_steps": [jump, 3 * jump], "inner_steps": [0.01]}
        episode |= {"delays": [options["delay"]], "reason": "" if jump < 0.05 else "never grasped"}
        yield number, change, task, episode


def test_late_chunks_are_a_row_for_each_delay_and_way(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "run_jobs", late_episodes)
    config = evaluation.DelaysConfig(device="cpu", weights=NANO, delays="0, 8", episodes=2)
    rows = evaluation.delays("delays", config)["rows"]
    assert list(rows) == ["0 plain", "0 inpainted", "8 plain", "8 inpainted"]
    assert [row["success"] for row in rows.values()] == [1, 1, 0, 1]
    assert rows["8 plain"]["border_step"] == pytest.approx(0.18)
    assert rows["8 plain"]["largest_border_step"] == pytest.approx(0.27)
    assert rows["8 plain"]["episodes"] == 2 * 3 * len(ROBOTS)
    assert rows["8 plain"]["failures"]["StackCube panda 1000001"] == "never grasped"
    assert "| 8 plain | 0.0 | 180 | 270 | 10 | 1.0 | 8.0 |" in capsys.readouterr().out


@pytest.mark.parametrize("delays", ["-1", "two", "", "1.5"])
def test_what_is_no_delay_is_told(delays):
    config = evaluation.DelaysConfig(device="cpu", weights=NANO, delays=delays)
    with pytest.raises(UserError, match="--delays"):
        evaluation.delays("delays", config)
