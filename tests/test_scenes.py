"""Scenes tell the truth: questions, patches and places match what the simulator shows."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from squares import write_lines, write_squares

from cli import UserError
from data import seeds
from data.env import TabletopEnv
from data.tasks import TASKS
from nano import scenes
from nano.questions import CAUSES
from nano.scenes import (
    CLASSES,
    CLUTTER,
    MOST_QUESTIONS,
    SHARD,
    Scenes,
    ScenesConfig,
    attempt,
    jobs_of,
    look,
    make,
    make_shard,
    project,
)


@pytest.mark.parametrize("task", TASKS)
def test_attempts_end_as_they_should(task):
    env = TabletopEnv("panda", task, render=False)
    assert attempt(env, 0, np.random.default_rng(0), None)[2]
    for fault in [name for name, cause in CAUSES.items() if task in cause["tasks"]]:
        ended = [attempt(env, seed, np.random.default_rng(seed), fault) for seed in (0, 2)]
        assert not all(success for _, _, success in ended)
        assert all(len(qpos) == len(names) > 4 for qpos, names, _ in ended)


def small(folder, monkeypatch, count=8, **changes):
    """Render one cell of a small corpus in this process."""

    def jobs(config):
        shards = jobs_of(config)
        return {
            split: [
                job[:4] + (count,) for job in shards[split] if job[0].stem == "widowx-PickCube-000"
            ]
            for split in shards
        }

    monkeypatch.setattr(scenes, "jobs_of", jobs)
    monkeypatch.setattr(scenes, "run_jobs", lambda function, jobs, workers: map(function, jobs))
    make(ScenesConfig(out=str(folder), scenes=24, **changes))


def test_a_corpus_tells_the_truth(tmp_path, monkeypatch):
    small(tmp_path, monkeypatch, 24)
    corpus = Scenes(str(tmp_path))
    rows = [corpus.row(i) for i in range(len(corpus))]
    assert len(rows) > 20 and {len(row.media) for row in rows} == {1, 2, 4}
    asked = Counter()
    for row in rows:
        assert 1 <= len(row.conversations) == len(row.record["questions"]) <= MOST_QUESTIONS
        assert len(row.record["grounding"]) == len(row.media)
        for question, conversation in zip(row.record["questions"], row.conversations):
            asked[question["category"]] += 1
            assert not question["held_out"] and 0 <= question["chance"] <= 0.5
            assert conversation[-1]["content"] == question["answer"]
            if question["form"] in ("point", "box"):
                check_place(question, row.record["grounding"])
    assert {"point", "box", "existence", "embodiment", "affordance"} < asked.keys()
    assert asked.keys() & {"task", "success", "past", "future"}
    validation = corpus.validation()
    questions = [q for i in range(len(validation)) for q in validation.row(i).record["questions"]]
    assert {question["held_out"] for question in questions} == {False, True}
    yes_no = [q for row in rows for q in row.record["questions"] if q["form"] == "yes/no"]
    answers = Counter((q["category"], q["about"], q["answer"]) for q in yes_no)
    for category, about, _ in answers:  # equally many of each
        assert answers[category, about, "yes"] == answers[category, about, "no"]


def check_place(question, grounding):
    """What a point or box shows lies near the patches that show it."""
    label = question["labels"][0]
    picture = grounding["wrist view" in question["question"]]
    shown = np.array(
        [letter == chr(ord("A") + CLASSES.index(label)) for letter in picture["patches"]]
    )
    cells = np.argwhere(shown.reshape(8, 8)) * 16 + 8
    distance = np.abs(cells[:, ::-1] - question["place"]).max(1)
    assert len(cells) == 0 or distance.min() < 40


def test_patches_and_centers_are_where_the_pixels_are():
    env = TabletopEnv("widowx", "PickCube", render=False, clutter=CLUTTER)
    env.reset(4)
    picture, grounding, seen = look(env, "front", env.task.labels)
    x, y, depth = project(env, "front", env.position("cube"))
    red = np.argwhere((picture[..., 0] > 150) & (picture[..., 1] < 60))
    assert np.abs(red.mean(0)[::-1] - (x, y)).max() < 4
    assert np.allclose(grounding["objects"]["red cube"], (x, y, depth), atol=1e-4)
    assert seen["red cube"][5:] == (x, y)
    shown = [
        i
        for i, letter in enumerate(grounding["patches"])
        if CLASSES[ord(letter) - 65] == "red cube"
    ]
    assert int(y // 16) * 8 + int(x // 16) in shown
    tip = project(env, "front", env.data.site_xpos[env.tcp])
    assert np.allclose(grounding["objects"]["gripper"], tip, atol=1e-4)
    assert np.isclose(
        grounding["opening"], env.data.qpos[env.robot.dof] / env.robot.travel, atol=1e-4
    )


def test_a_stopped_rendering_goes_on_and_other_settings_are_told(tmp_path, monkeypatch):
    small(tmp_path / "whole", monkeypatch)
    shards = []

    def stop(job):
        if shards:
            raise KeyboardInterrupt
        shards.append(make_shard(job))
        return shards[-1]

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "make_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path / "parts", monkeypatch)
    with pytest.raises(UserError, match="python -m nano.scenes"):  # it is not whole
        Scenes(str(tmp_path / "parts"))
    [part] = (tmp_path / "parts").glob("*/*.jsonl")
    before = part.stat().st_mtime_ns
    with pytest.raises(UserError, match="--seed 0.*choose another --out"):
        small(tmp_path / "parts", monkeypatch, seed=7)
    assert part.stat().st_mtime_ns == before
    small(tmp_path / "parts", monkeypatch)
    for name in ("made.json", "train.jsonl", "val.jsonl", "off_template.jsonl"):
        read = [(tmp_path / folder / name).read_bytes() for folder in ("whole", "parts")]
        assert read[0] == read[1]
    assert not list(tmp_path.glob("*/*/*.jsonl"))  # parts are gone, joined
    with pytest.raises(UserError, match="--seed 0.*choose another --out"):
        small(tmp_path / "parts", monkeypatch, seed=7)
    small(tmp_path / "parts", monkeypatch)  # it is there: nothing to do


def test_a_corpus_has_as_many_scenes_as_asked():
    for count in (1, 240, 24 * 600):
        jobs = jobs_of(ScenesConfig(scenes=count))
        assert sum(job[-1] for job in jobs["train"]) == max(count, 24)
        assert all(0 < job[-1] <= SHARD for job in jobs["train"]) and len(jobs["val"]) == 24
        assert len({job[0] for split in jobs.values() for job in split}) == sum(
            map(len, jobs.values())
        )
        assert min(job[3] for job in jobs["val"]) >= seeds.FIRST_VALIDATION


def test_damage_and_edits_are_one_line(tmp_path):
    write_squares(tmp_path)
    path = tmp_path / "train.jsonl"
    whole = path.read_text()
    for text in (whole[:-9], whole.replace("red", "blue", 1), ""):
        path.write_text(text)
        with pytest.raises(UserError, match="train.jsonl.*damaged or changed"):
            Scenes(str(tmp_path))
    path.write_text(whole)
    with pytest.raises(UserError, match="unknown category 'points'.*did you mean point"):
        Scenes(str(tmp_path), categories="points")
    with pytest.raises(UserError, match="train.jsonl has no questions in --categories box"):
        Scenes(str(tmp_path), categories="box")
    picture = tmp_path / "train" / "0-0.png"
    picture.write_bytes(picture.read_bytes()[:100])
    with pytest.raises(UserError, match="train.jsonl, line 1.*0-0.png"):
        Scenes(str(tmp_path)).row(0)
    for broken in ("{", "[]", '{"scenes": 12}'):
        (tmp_path / "made.json").write_text(broken)
        with pytest.raises(UserError, match="made.json|train.jsonl"):
            Scenes(str(tmp_path))
    with pytest.raises(UserError, match="python -m nano.scenes --out"):
        Scenes(str(tmp_path / "nowhere"))


def test_rows_depend_on_seed_and_number_alone(tmp_path):
    corpus = Scenes(str(write_squares(tmp_path)), questions=2)
    a, b, c = (corpus.row(0, (3, number)).record["questions"] for number in (0, 0, 12))
    assert a == b != c and len(a) == 2  # other questions in another epoch
    assert len(corpus.row(0).conversations) == 3  # all, where nothing is drawn
    rarest = Scenes(str(tmp_path), questions=1)
    rows = [rarest.row(0, (0, number)) for number in range(300)]
    asked = Counter(row.conversations[0][0]["content"][-1]["text"] for row in rows)
    assert max(asked.values()) < 150  # as the others: each category is equally likely
    only = Scenes(str(tmp_path), categories="point")
    assert {q["category"] for i in range(12) for q in only.row(i).record["questions"]} == {"point"}
    assert only.name(3).endswith("train.jsonl, line 4")
    assert "Is it red?" in list(corpus.texts()) and "Is it red?" not in list(only.texts())


def test_rare_categories_are_asked_more(tmp_path):
    write_squares(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    kept = []
    for i, line in enumerate(lines):
        record = json.loads(line)
        if i % 9:  # nine questions of two categories for one of the third
            record["questions"] = record["questions"][:2]
        kept.append(json.dumps(record) + "\n")
    corpus = Scenes(str(write_lines(tmp_path, kept)), questions=1)
    rows = [corpus.row(0, (0, number)) for number in range(300)]
    asked = [row.conversations[0][0]["content"][-1]["text"] for row in rows]
    assert 0.65 < asked.count("Is it red?") / 300 < 0.85  # six times as rare: 6 in 8


def test_blind_rows_show_noise_and_tell_nothing_of_it(tmp_path):
    corpus = Scenes(str(write_squares(tmp_path)), blind=0.5)

    def pixels(seed):
        return np.asarray(corpus.row(3, seed).media[0][1])

    real = np.asarray(Image.open(tmp_path / "train" / "3-0.png"))
    noisy = [not np.array_equal(pixels((0, number)), real) for number in range(40)]
    assert 10 < sum(noisy) < 30
    blind = corpus.row(3, (0, noisy.index(True)))
    assert blind.record["grounding"] is None and len(blind.conversations) == 3
    assert np.array_equal(pixels(None), real)  # validation rows never are


def test_pictures_can_go_alone(tmp_path):
    corpus = Scenes(str(write_squares(tmp_path)), blind=1.0, pictures_only=True)
    row = corpus.row(1, (0, 0))
    assert row.conversations == [[{"role": "user", "content": [{"type": "image"}] * 2}]]
    assert row.record["questions"] == [] and row.record["grounding"]
    assert corpus.validation().pictures_only
