"""General instructions and the balance of questions: probes are new, answers cannot be guessed."""

import json
import re
from collections import Counter

import numpy as np

from data.conversations import Conversations
from nano import instructions as general
from nano.questions import CATEGORIES, HELD_OUT, WORDINGS, Asker, equalise


def test_general_instructions_are_right_and_probes_are_new(tmp_path):
    general.make(general.GeneralConfig(rows=600, probes=120, pictures=9, out=str(tmp_path)))
    train, probes = (Conversations(tmp_path / f"{name}.jsonl") for name in ("train", "probes"))
    asked = [
        {
            json.dumps(json.loads(line)["messages"][0])
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        }
        for name in ("train", "probes")
    ]
    assert len(train) == 600 and len(probes) == 120 and not asked[0] & asked[1]
    lines = [json.loads(line) for line in (tmp_path / "probes.jsonl").read_text().splitlines()]
    assert (
        Counter(line["kind"] for line in lines) == dict.fromkeys(general.KINDS, 20)
        and 0.3 < np.mean([line["held_out"] for line in lines]) < 0.7
    )
    for messages in (
        rows.row(i).conversations[0] for rows in (train, probes) for i in range(len(rows))
    ):
        text, answer = messages[0]["content"][-1]["text"], messages[1]["content"]
        if " + " in text:
            a, b = (
                int(word)
                for word in text.replace("?", "").replace(".", "").split()
                if word.isdigit()
            )
            assert int(answer) == a + b
        if "A) " in text:
            before, options = text.split("A) ")
            listed = dict(
                option.split(") ") for option in re.split(" (?=[B-F][)])", "A) " + options)
            )
            taken, _, last = answer.rpartition(
                ": "
            )  # "words: letter", the letter alone, or the words alone
            letter = (
                last
                if last in listed
                else next(name for name in listed if re.search(rf"\b{name}\b", before))
            )
            assert (listed[letter] if last in listed else letter) in before and listed[letter] == (
                taken or (listed.get(last, answer))
            )
        if "numbers" in text:
            numbers = [int(n) for n in answer.split(", ")]
            assert numbers == sorted(numbers) and sorted(numbers) == sorted(
                int(n) for n in text.rstrip(".").split(": ")[1].split(", ")
            )


def test_every_question_has_ten_wordings_of_one_meaning():
    for name, wordings in WORDINGS.items():
        assert len(wordings) == len(set(wordings)) >= 8 + HELD_OUT
        places = {
            tuple(sorted({part.split("}")[0] for part in wording.split("{")[1:]}))
            for wording in wordings
        }
        counts = {
            max(len(place), 1 + max((int(p) for p in place if p.isdigit()), default=-1))
            if place
            else wording.count("{}")
            for place, wording in zip(places, wordings)
        }
        assert len(counts) <= 2
        words = [set(re.findall("[a-z]+", wording.lower())) for wording in wordings]
        assert set.union(*words[-HELD_OUT:]) <= set.union(*words[:-HELD_OUT]), (
            name
        )  # a new sentence, but no new word
    assert len(CATEGORIES) == 17


def test_answers_are_balanced_whatever_is_usual():
    rng = np.random.default_rng(0)
    asker, given = Asker(rng), Counter()
    for _ in range(2000):
        question = asker.yes_no(
            "existence", rng.random() < 0.9, ("red cube",)
        )  # nine of ten scenes have one
        if question:
            given[question["answer"]] += 1
    assert abs(given["yes"] - given["no"]) <= 1 and given["no"] > 100
    letters, seen = Counter(), Counter()
    for _ in range(600):
        question = asker.closed(
            "past", str(rng.choice(["a", "b", "c"], p=[0.7, 0.2, 0.1])), ["a", "b", "c"]
        )
        if question and question["form"] == "choice":
            word, letter = question["answer"].split(": ")
            letters[letter] += 1
            assert f"{letter}) {word}" in question["question"] and question["chance"] == 1 / 3
        elif question:
            seen[question["answer"]] += 1
    for counts in (letters, seen):  # a third each, though "a" is right seven times of ten
        assert len(counts) == 3 and all(
            0.2 < count / counts.total() < 0.47 for count in counts.values()
        )


def test_yes_and_no_are_as_many_to_whatever_reads_alike():
    question = lambda about, answer: {"category": "existence", "about": about, "answer": answer}
    scenes = [
        [question("peg", "yes"), {"category": "point", "answer": "x"}],
        [question("peg", "yes"), question("bin", "no")],
        [question("peg", "no")],
    ]
    assert equalise(scenes) == [scenes[0], [], scenes[2]]


def test_held_out_wordings_are_never_asked_in_training():
    texts = [
        {
            Asker(np.random.default_rng(seed), held_out).ask("point", "x", ("peg", "front"))[
                "question"
            ]
            for seed in range(60)
        }
        for held_out in (False, True)
    ]
    assert len(texts[0]) == 8 and len(texts[1]) == HELD_OUT and not texts[0] & texts[1]
