"""The paper's benchmarks, in small: each reader finds questions, pictures and answers where its authors put them, and scores are what they say."""
import json

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
from cli import UserError
from conftest import ROOT
from data import benchmarks
from data.conversations import load_media


def picture(path, n=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(n).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)


def write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))


@pytest.fixture
def cosmos(tmp_path):
    pair = {"question": "Is it done?", "index2ans": {"A": "yes", "B": "no"}, "answer": "B"}
    other = {"question": "What comes next?", "index2ans": {"A": "lift", "B": "turn", "C": "stop"}, "correct_answer": "c"}
    write(tmp_path / "robovqa" / "robovqa_benchmark_qa_pairs.json", [{"video": "clips/one.mp4", "qa_pairs": pair}, {"video": "clips/two.mp4", "qa_pairs": [pair, other]},
                                                                      {"video": "clips/gone.mp4", "qa_pairs": pair}])
    for clip, frames in (("one", 3), ("two", 40)):
        for i in range(frames):
            picture(tmp_path / "robovqa" / "clips" / clip / f"{i:03d}.png", i)
    return tmp_path


def test_clips_with_options(cosmos):
    items, missing = benchmarks.read("robovqa", str(cosmos))
    assert [item.answer for item in items] == ["B", "B", "C"] and missing == 1
    assert items[2].prompt() == "What comes next?\n(A) lift\n(B) turn\n(C) stop\nAnswer with the letter of the right option alone."
    assert [len(item.load()[0]) for item in items] == [3, benchmarks.MOST_FRAMES, benchmarks.MOST_FRAMES]
    found = benchmarks.score(items, ["B", "I think <answer>(B)</answer> A", "The answer is A."])
    assert found["accuracy"] == 2 / 3 and found["categories"]["robovqa"] == {"accuracy": 2 / 3, "asked": 3}
    assert benchmarks.score(items, ["", "b", "D"])["accuracy"] == 0


def test_egothink_and_sharerobot(tmp_path):
    write(tmp_path / "ego" / "Object" / "existence" / "annotations.json", [{"image_path": ["images/a.jpg"], "question": "What is in my hand?", "answer": "A red cup."}])
    picture(tmp_path / "ego" / "Object" / "existence" / "images" / "a.jpg")
    (item,), missing = benchmarks.read("egothink", str(tmp_path / "ego"))
    assert item.category == "Object/existence" and item.options is None and item.prompt() == "What is in my hand?" and item.load()[0].size == (64, 64) and missing == 0
    assert benchmarks.score([item], ["the red cup"])["exact"] == 1
    found = benchmarks.score([item], ["a blue cup"])
    assert found["exact"] == 0 and found["soft"] == pytest.approx(0.5)
    talk = [{"from": "human", "value": "<image><image>\nWhat comes next?"}, {"from": "gpt", "value": "Lift it."}]
    write(tmp_path / "share" / "planning" / "jsons" / "test.json", [{"id": 1, "task": "future prediction", "image": ["f/0.png", "f/1.png"], "conversations": talk}])
    for i in (0, 1):
        picture(tmp_path / "share" / "planning" / "images" / "f" / f"{i}.png")
    (item,), _ = benchmarks.read("sharerobot", str(tmp_path / "share"))
    assert (item.question, item.answer, item.category, len(item.load())) == ("What comes next?", "Lift it.", "future prediction", 2)


def test_a_benchmark_is_run_and_written(cosmos, monkeypatch):
    out = cosmos / "result.json"
    monkeypatch.setattr("sys.argv", ["eval.py", "benchmark", "--name", "robovqa", "--data", str(cosmos), "--weights", str(ROOT / "weights" / "nano"), "--out", str(out), "--device", "cpu"])
    evaluation.main()
    found = json.loads(out.read_text())
    assert found["asked"] == 3 == len(found["replies"]) and 0 <= found["accuracy"] <= 1 and found["paper"]["after"] == 95.45


def test_what_is_not_a_benchmark_is_told(tmp_path):
    write(tmp_path / "robofail" / "robofail_benchmark_qa_pairs.json", [{"video": "clips/one.mp4"}])
    with pytest.raises(UserError, match="not how robofail is published.*qa_pairs"):
        benchmarks.read("robofail", str(tmp_path))
    with pytest.raises(UserError, match="cannot read.*agibot"):
        benchmarks.read("agibot", str(tmp_path))
    with pytest.raises(UserError, match="pictures of none"):
        benchmarks.read("egothink", str(tmp_path))
    with pytest.raises(UserError, match="no folder nowhere"):
        benchmarks.read("egothink", "nowhere")
    with pytest.raises(UserError, match="did you mean robovqa"):
        benchmarks.read("robovq", str(tmp_path))


def test_films_are_cut_by_ffmpeg(tmp_path, monkeypatch):
    (tmp_path / "film.mp4").write_bytes(b"film")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="without the program ffmpeg"):
        load_media("video", tmp_path / "film.mp4")
    picture(tmp_path / "still.png")
    (tmp_path / "bin").mkdir()
    for script, word in ((f'#!/bin/sh\nfor last; do :; done\n/bin/cp {tmp_path}/still.png "$(/usr/bin/printf "$last" 1)"\n', None), ("#!/bin/sh\necho no such codec >&2\nexit 1\n", "no such codec")):
        (tmp_path / "bin" / "ffmpeg").write_text(script)
        (tmp_path / "bin" / "ffmpeg").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        if word:
            with pytest.raises(UserError, match=word):
                load_media("video", tmp_path / "film.mp4")
        else:
            assert [frame.size for frame in load_media("video", tmp_path / "film.mp4")] == [(64, 64)]
