"""The paper's benchmarks on a small scale, with files where their authors put them."""

import json

import numpy as np
import pytest
from PIL import Image

from cli import UserError
from data.benchmarks import BenchmarkConfig, convert
from data.conversations import Conversations
from data.scoring import is_right

PAIR = {"question": "Is it done?", "index2ans": {"A": "yes", "B": "no"}, "answer": "B"}


def picture(path, n=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(n).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def converted(name, folder):
    """The rows of a converted benchmark, as evaluation reads them."""
    convert(BenchmarkConfig(name, str(folder)))
    rows = Conversations(folder / f"{name}.json")
    return [rows.row(i) for i in range(len(rows))]


@pytest.fixture
def cosmos(tmp_path):
    """Clips as folders of frames: one with one question, one with two, one that is missing."""
    root = tmp_path / "cosmos" / "robovqa"
    options = {"A": "lift", "C": "stop", "B": "turn"}  # listed by their letters
    other = {"question": "What next?", "index2ans": options, "correct_answer": "c"}
    rows = [
        {"video": "clips/one", "qa_pairs": PAIR},
        {"video": "clips/two", "qa_pairs": [PAIR, other]},
        {"video": "clips/gone.mp4", "qa_pairs": PAIR},
    ]
    write(root / "robovqa_benchmark_qa_pairs.json", rows)
    for clip, frames in (("one", 3), ("two", 40)):
        for i in range(frames):
            picture(root / "clips" / clip / f"{i:03d}.png", i)
    return root.parent


@pytest.mark.parametrize("below", ["", "robovqa"])
def test_clips_with_options(cosmos, capsys, below):
    rows = converted("robovqa", cosmos / below)
    questions = [row.record["questions"][0] for row in rows]
    assert [question["answer"] for question in questions] == ["B", "B", "C"]
    assert "3 of 4 questions" in capsys.readouterr().out
    last = questions[2]
    request = "Answer with the letter of the right option alone."
    assert last["question"] == f"What next?\n(A) lift\n(B) turn\n(C) stop\n{request}"
    assert last["options"] == ["lift", "turn", "stop"] and last["chance"] == 1 / 3
    assert (last["form"], last["category"]) == ("letter", "robovqa")
    assert [len(row.media[0][1]) for row in rows] == [3, 40, 40]
    replies = ["B", "I think <answer>(B)</answer> A", "The answer is A."]
    assert [is_right(*pair) for pair in zip(questions, replies)] == [True, True, False]
    asked = [item["text"] for item in rows[2].conversations[0][0]["content"] if "text" in item]
    assert asked == [last["question"]]


def test_pictures_with_open_answers(tmp_path):
    folder = tmp_path / "ego" / "Object" / "existence"
    row = {
        "image_path": ["images/a.jpg"],
        "question": "What is in my hand?",
        "answer": "A red cup.",
    }
    write(folder / "annotations.json", [row, {**row, "image_path": "b.jpg"}])
    picture(folder / "images" / "a.jpg")
    picture(folder / "images" / "b.jpg")
    rows = converted("egothink", tmp_path / "ego")
    question = rows[0].record["questions"][0]
    assert question["category"] == "existence" and question["form"] == "open"
    assert (question["question"], question["answer"]) == ("What is in my hand?", "A red cup.")
    assert [row.media[0][1].size for row in rows] == [(64, 64)] * 2
    assert is_right(question, "the red cup") and not is_right(question, "a blue cup")


def test_pictures_of_an_episode(tmp_path):
    turns = [{"from": "human", "value": "<image><image>\nWhat comes next?"}]
    turns += [{"from": "gpt", "value": "Lift it."}]
    row = {"id": 1, "task": "future", "image": ["f/0.png", "f/1.png"], "conversations": turns}
    write(tmp_path / "share" / "planning" / "jsons" / "test.json", [row])
    for i in (0, 1):
        picture(tmp_path / "share" / "planning" / "images" / "f" / f"{i}.png")
    (row,) = converted("sharerobot", tmp_path / "share")
    question = row.record["questions"][0]
    assert (question["question"], question["answer"]) == ("What comes next?", "Lift it.")
    assert question["category"] == "future" and len(row.media) == 2


def test_a_second_conversion_is_the_first(cosmos):
    first = converted("robovqa", cosmos)
    again = converted("robovqa", cosmos)
    assert [row.record for row in first] == [row.record for row in again]
    below = converted("robovqa", cosmos / "robovqa")  # only its own folder
    assert [row.conversations for row in below] == [row.conversations for row in first]


@pytest.mark.parametrize("video", ["../clip", "/etc/hostname", "a/../../../clip"])
def test_media_may_not_lie_outside(tmp_path, video):
    rows = [{"video": video, "qa_pairs": PAIR}]
    write(tmp_path / "data" / "robovqa" / "robovqa_benchmark_qa_pairs.json", rows)
    picture(tmp_path / "clip" / "0.png")
    with pytest.raises(UserError, match="robovqa_benchmark_qa_pairs.json.*outside"):
        converted("robovqa", tmp_path / "data")
    assert not list(tmp_path.rglob("robovqa.json"))


NOT_ONE = {
    "a field is missing": (
        "robofail",
        [{"video": "clips/one"}],
        "published.*qa_pairs|qa_pairs.*published",
    ),
    "an answer that is no option": (
        "robofail",
        [{"video": "a", "qa_pairs": {**PAIR, "answer": "E"}}],
        "answer E",
    ),
    "no list": ("robofail", 7, "published"),
    "a list of words": ("robofail", ["a"], "published"),
    "no pictures": (
        "robofail",
        [{"video": "a", "qa_pairs": PAIR}],
        "1 questions.*none of their images",
    ),
    "another benchmark": ("agibot", [], "0 questions of agibot"),
    "a name": ("robofial", [], "did you mean robofail"),
}


@pytest.mark.parametrize("case", NOT_ONE)
def test_what_is_not_a_benchmark_is_told(tmp_path, case):
    name, content, word = NOT_ONE[case]
    write(tmp_path / "data" / "robofail_benchmark_qa_pairs.json", content)
    with pytest.raises(UserError, match=word):
        converted(name, tmp_path / "data")
    assert not list(tmp_path.rglob("robofail.json"))


def test_no_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="nowhere has 0 questions of egothink.*download"):
        converted("egothink", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
