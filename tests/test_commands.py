"""Scenes with commands: patches know what is meant, questions about commands have true answers."""

import json
import shutil

import numpy as np
import pytest

from cli import UserError
from data import seeds
from data.conversations import Conversations
from data.env import TabletopEnv
from data.families import is_new, plain
from data.scoring import is_right
from nano import command_questions, commands
from nano.command_questions import Asker, absent
from nano.commands import (
    CommandQuestions,
    Commands,
    CommandsConfig,
    jobs_of,
    make,
    reword,
    scenes_of,
)
from nano.scenes import CLASSES, GRID, PATCH


@pytest.fixture(scope="module")
def records():
    env = TabletopEnv("widowx", "mixed", render=False, varied="all")
    scenes = []
    for seed in range(3):
        scenes += scenes_of(env, seed)
    env.close()
    return scenes


def test_roles_lie_where_the_things_are(records):
    near = 0
    for record in records:
        for command in record["commands"]:
            letters = np.array([*command["roles"][0]]).reshape(GRID, GRID)
            for letter, place in zip("BC", command["places"]):
                ys, xs = np.nonzero(letters == letter)
                if not len(xs):  # the arm hides it, or it is out of sight
                    continue
                distance = np.hypot(xs * PATCH + 8 - place[0], ys * PATCH + 8 - place[1])
                assert distance.min() < 3 * PATCH
                near += 1
    assert near > 20


def test_the_same_picture_means_another_thing_for_another_command(records):
    commands = records[0]["commands"]
    assert len(commands) > 1
    assert len({str(command["roles"]) for command in commands}) == len(commands)


def test_a_name_by_place_means_one_thing(records):
    places = 0
    for record in records:
        meant = {}
        for command in record["commands"]:
            for thing, names in zip(command["things"], command["by_place"], strict=True):
                places += len(names)
                assert len(names) != 1
                for name in names:
                    assert meant.setdefault(name, thing) == thing
    assert places > 10


def test_no_combination_is_asked_that_training_must_not_show(records):
    for record in records:
        for command in record["commands"]:
            assert not is_new(command["task"], command["things"])


def test_some_command_is_done_when_the_expert_is(records):
    assert any(command["done"] for record in records for command in record["commands"])


def test_questions_are_true(records):
    rng = np.random.default_rng(0)
    asked = {kind: 0 for kind in command_questions.KINDS}
    for record in records * 4:
        for question in Asker(record, rng).all_kinds():
            asked[question["category"]] += 1
            answer = question["answer"]
            if answer.startswith("no: there is no "):
                thing = answer.removeprefix("no: there is no ")
                assert thing not in record["things"] and thing in question["question"]
            if question["category"] == "meant":
                assert answer in record["things"]
            if question["category"] == "goal":
                assert answer.startswith("1. ") and " 2. " in answer
            if question["form"] == "point":
                x, y = json.loads(answer)["point_2d"]
                assert [x, y] == question["place"]
    assert min(asked.values()) > 0


def test_a_goal_lists_its_commands_in_their_order(monkeypatch):
    def pick(choices, rng):
        return choices[5] if choices[0].startswith("{0}") else choices[0]

    monkeypatch.setattr(command_questions, "pick", pick)
    cubes = {
        "task": "StackCube",
        "things": ["red cube", "green cube"],
        "instruction": "a",
        "done": False,
    }
    ball = {
        "task": "PlaceSphere",
        "things": ["blue ball", "red bin"],
        "instruction": "b",
        "done": False,
    }
    record = {"commands": [cubes, ball], "things": []}
    for seed in range(20):
        asker = Asker(record, np.random.default_rng(seed))
        asker.goal([cubes, ball])
        [question] = asker.questions
        first, second = question["answer"].removeprefix("1. ").split(" 2. ")
        words = {
            plain("StackCube", cubes["things"]): "a",
            plain("PlaceSphere", ball["things"]): "b",
        }
        # "{1}, but first {0}"
        text = question["question"]
        before = max(text.find(f"but first {words[first]}"), text.find(f"but first {first}"))
        assert before > 0 and second in words


def test_what_is_absent_is_of_the_same_kind(records):
    rng = np.random.default_rng(0)
    for record in records:
        for command in record["commands"]:
            things, missing = absent(record, command, rng)
            if missing:
                assert missing not in record["things"]
                changed = [a for a, b in zip(command["things"], things) if a != b]
                assert [thing.split()[-1] for thing in changed] == [missing.split()[-1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four scenes for training and four for validation, of one cell, made as all are."""
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "SCENES", ["which_bin"])
        patch.setattr(commands, "ROBOTS", ["widowx"])
        make(CommandsConfig(scenes=4, workers=1, out=str(folder)))
    return folder


def test_a_folder_reads_as_rows_of_both_kinds(folder):
    told = Commands(str(folder))
    row = told.row(0, (0, 5))
    kinds = [item["type"] for item in row.conversations[0][0]["content"]]
    assert kinds == ["text", "image", "image"] and len(row.media) == 2
    commands = row.record["commands"]
    sentences = [own[0]["content"][0]["text"] for own in row.conversations]
    assert sentences == [command["instruction"] for command in commands] and len(commands) > 1
    # each time in other words, but not in validation
    assert told.row(0, (0, 5)).conversations == row.conversations
    assert told.row(0, (0, 6)).conversations != row.conversations
    validation = told.validation()
    assert len(validation.row(0).conversations) == 1
    assert validation.row(0).record["commands"] == validation.records[0]["commands"][:1]
    asked = CommandQuestions(str(folder))
    row = asked.row(0, (0, 5))
    assert len(row.conversations) == len(row.record["questions"]) <= 4
    assert asked.row(1, (0, 5)).conversations == asked.row(1, (0, 5)).conversations
    held_out = asked.validation().row(1).record["questions"]
    assert all(question["held_out"] for question in held_out)


def test_new_sentences_for_a_command_name_its_own_things(folder):
    record = Commands(str(folder)).records[0]
    named = record | {"scene": "which_bin"}
    rng = np.random.default_rng(0)
    for command in record["commands"]:
        sentences = {reword(named, command, rng)["instruction"] for _ in range(40)}
        assert len(sentences) > 30
        labels = [label.split()[0] for label in record["things"]]
        for thing, by_place in zip(command["things"], command["by_place"]):
            others = [color for color in labels if color not in " ".join(command["things"])]
            assert not any(color in text.split() for color in others for text in sentences)
            assert any(thing.split()[0] in text.lower() for text in sentences)
            assert any(name in text for name in by_place for text in sentences) or not by_place
    other = {key: value for key, value in command.items() if key != "by_place"}
    assert reword(named, other, rng) == other  # of a simulator with sentences of its own


def test_a_folder_is_made_once_and_damage_is_told(folder, tmp_path):
    with pytest.raises(UserError, match="was made with --scenes 4 --seed 0"):
        make(CommandsConfig(scenes=5, out=str(folder)))
    make(CommandsConfig(scenes=4, out=str(folder)))  # all is there: nothing is rendered
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "train.jsonl").write_text("{}")
    with pytest.raises(UserError, match="damaged or changed"):
        Commands(str(tmp_path / "copy"))
    next((tmp_path / "copy" / "val").rglob("*.png")).write_text("no picture")
    damaged = Commands(str(tmp_path / "copy"), "val")
    with pytest.raises(UserError, match=r"cannot read .*\.png"):
        for i in range(len(damaged)):
            damaged.row(i)
    with pytest.raises(UserError, match="python -m nano.commands"):
        Commands(str(tmp_path))


def test_questions_of_validation_can_be_asked_by_the_evaluation(folder):
    rows = Conversations(folder / "questions.jsonl")
    assert len(rows) == 2 * len(Commands(str(folder), "val"))
    assert len(rows.row(0).media) == 2
    for _, row in rows.records:
        for question in row["questions"]:
            assert is_right(question, question["answer"])
            assert not is_right(question, "")


def test_a_white_bin_is_called_so_and_looks_like_the_bin_of_its_task():
    env = TabletopEnv("widowx", "which_bin", render=False)
    for seed in range(20):
        env.reset(seed)
        if "white" in env.table.colors.values():
            break
    records = scenes_of(env, seed)
    asked = [command for record in records for command in record["commands"]]
    named = [command for command in asked if "white bin" in command["things"]]
    assert named and "white bin" in records[0]["things"]
    letter = chr(ord("A") + CLASSES.index("bin"))
    assert any(letter in picture["patches"] for r in records for picture in r["grounding"])
    for question in Asker({**records[0], "commands": named}, np.random.default_rng(0)).all_kinds():
        assert set(question["labels"]) <= set(CLASSES)
        if question["category"] == "goes":
            assert json.loads(question["answer"])["label"] == "white bin"


def test_validation_has_layouts_of_its_own():
    jobs = jobs_of(CommandsConfig(scenes=14400))
    train = {seed for *_, seed, _ in jobs["train"]}
    assert max(train) + 100 < seeds.FIRST_VALIDATION <= min(seed for *_, seed, _ in jobs["val"])
    assert commands.SCENES == list(dict.fromkeys(scene for _, _, scene, _, _ in jobs["train"]))
