"""General instructions have right answers, and no probe is a training row."""

import json
import re
from collections import Counter

import numpy as np
import pytest

from cli import UserError
from data.conversations import Conversations
from nano.instructions import KINDS, WORDINGS, InstructionsConfig, make


def test_instructions_are_right_and_probes_are_new(tmp_path):
    make(InstructionsConfig(rows=600, probes=120, pictures=9, out=str(tmp_path)))
    asked = []
    for name, count in (("train", 600), ("probes", 120)):
        rows = Conversations(tmp_path / f"{name}.jsonl")
        assert len(rows) == count
        questions = [record["questions"][0] for _, record in rows.records]
        asked.append(
            {json.dumps([r["images"], r["questions"][0]["question"]]) for _, r in rows.records}
        )
        for question in questions:
            check(question)
        row = rows.row(next(i for i, q in enumerate(questions) if q["category"] == "refusal"))
        assert (
            row.media[0][1].size == (128, 128)
            and "There is no" in row.conversations[0][1]["content"]
        )
    assert not asked[0] & asked[1]
    assert Counter(question["category"] for question in questions) == dict.fromkeys(KINDS, 20)
    assert 0.3 < np.mean([question["held_out"] for question in questions]) < 0.7


def check(question):
    """Is the answer right, and do the options fit?"""
    text, answer = question["question"], question["answer"]
    if " + " in text:
        a, b = re.findall(r"\d+", text)
        assert int(answer) == int(a) + int(b)
    if "A) " in text:
        before, options = text.split("A) ")
        listed = dict(option.split(") ") for option in re.split(" (?=[B-F][)])", "A) " + options))
        assert list(listed.values()) == question["options"] and question["chance"] == 1 / len(
            listed
        )
        taken, _, last = answer.rpartition(": ")  # "words: letter", the letter, or the words
        if last in listed:
            assert listed[last] in before and listed[last] == (taken or listed[last])
            assert question["form"] == "choice"
        else:
            letter = next(name for name in listed if re.search(rf"\b{name}\b", before))
            assert listed[letter] == answer and question["form"] == "words"
    if "numbers" in text:
        numbers = [int(number) for number in answer.split(", ")]
        assert numbers == sorted(numbers)
        assert numbers == sorted(map(int, re.findall(r"\d+", text)))


def test_held_out_wordings_are_never_trained_on():
    assert all(wordings["held_out"] not in wordings["seen"] for wordings in WORDINGS.values())


def test_one_picture_is_too_few(tmp_path):
    with pytest.raises(UserError, match="--pictures 1 must be at least 2"):
        make(InstructionsConfig(pictures=1, out=str(tmp_path)))
