"""Questions cannot be guessed from their text: wordings, options and answers are balanced."""

import re
import string
from collections import Counter

import numpy as np

from data.tasks import TASKS
from nano.questions import (
    CATEGORIES,
    COLORS,
    KEPT,
    PATTERNS,
    WORDINGS,
    Asker,
    bare,
    draw_pattern,
    equalise,
)


def test_every_question_has_ten_wordings_of_one_meaning():
    for name, wordings in WORDINGS.items():
        every = wordings["seen"] + wordings["held_out"]
        assert len(every) == len(set(every)) >= 10 and len(wordings["held_out"]) == 2
        takes = set()
        for wording in every:
            numbers = [int(number) for number in re.findall(r"{(\d)}", wording)]
            takes.add(max(numbers) + 1 if numbers else wording.count("{}"))
        assert len(takes) == 1, name
        words = {
            kind: set(re.findall("[a-z]+", " ".join(wordings[kind]).lower())) for kind in wordings
        }
        assert words["held_out"] <= words["seen"], name  # a new sentence, but no new word
    assert len(CATEGORIES) == 17


def test_whatever_a_task_is_about_can_be_named():
    labels = {label for task in TASKS.values() for label in task.labels.values()}
    assert labels <= set(COLORS) and list(COLORS) == sorted(COLORS)


def test_answers_are_balanced_whatever_is_usual():
    rng = np.random.default_rng(0)
    asker = Asker(rng)
    for _ in range(2000):
        asker.yes_no("existence", rng.random() < 0.9, ["red cube"])  # nine of ten scenes have one
    given = Counter(question["answer"] for question in asker.take())
    assert abs(given["yes"] - given["no"]) <= 1 and given["no"] > 100
    for _ in range(600):
        asker.closed("past", str(rng.choice(["a", "b", "c"], p=[0.7, 0.2, 0.1])), ["a", "b", "c"])
    letters = Counter()
    words = Counter()
    for question in asker.take():
        if question["form"] == "choice":
            word, letter = question["answer"].split(": ")
            letters[letter] += 1
            assert f"{letter}) {word}" in question["question"] and question["chance"] == 1 / 3
            assert question["options"]["ABC".index(letter)] == word
        else:
            words[question["answer"]] += 1
    for counts in (letters, words):  # a third each, though "a" is right seven times of ten
        assert len(counts) == 3
        assert all(0.2 < count / counts.total() < 0.47 for count in counts.values())


def test_yes_and_no_are_as_many_to_whatever_reads_alike():
    def question(about, answer):
        return {"category": "existence", "about": about, "answer": answer, "held_out": False}

    where = {"category": "point", "answer": "x"}
    scenes = [
        [question("peg", "yes"), where],
        [question("peg", "yes"), question("bin", "no")],
        [question("peg", "no")],
    ]
    equalise(scenes)
    assert scenes == [[question("peg", "yes"), where], [], [question("peg", "no")]]


def test_held_out_wordings_are_never_asked_in_training():
    texts = []
    for wordings in ("seen", "held_out", "off_template"):
        asked = set()
        for seed in range(100):
            asker = Asker(np.random.default_rng(seed), wordings)
            asker.locate("point", "point", (1, 2), "peg", words=["front"])
            [question] = asker.take()
            assert question["held_out"] == (wordings != "seen")
            asked.add(question["question"])
        texts.append(asked)
    seen, held_out, off_template = texts
    assert len(seen) > 30 and len(held_out) == 2 and len(off_template) == 14
    assert len(set.union(*texts)) == len(seen) + 16


def slots(text):
    return sum(field is not None for _, field, *_ in string.Formatter().parse(text))


def test_patterns_ask_the_same_in_hundreds_of_ways_and_never_as_evaluations_do():
    assert set(PATTERNS) == set(WORDINGS)
    rng = np.random.default_rng(1)
    for name, wordings in WORDINGS.items():
        number = slots(wordings["seen"][0])
        words = [f"thing {i}" for i in range(number)]
        drawn = {draw_pattern(name, rng) for _ in range(1000)}
        asked = {text.format(*words) for text in drawn}
        assert len(asked) > 500, name
        for text in asked:
            assert not set("[]|{}") & set(text) and "  " not in text and " ?" not in text
            assert all(word in text for word in words), text
        kept = {bare(text) for text in wordings["held_out"] + wordings["off_template"]}
        assert kept == KEPT[name] and not kept & set(map(bare, drawn))


def test_questions_off_the_templates_are_many_and_ask_the_same():
    assert sum(len(wordings["off_template"]) for wordings in WORDINGS.values()) >= 300
    for wordings in WORDINGS.values():
        templates = wordings["seen"] + wordings["held_out"]
        for text in wordings["off_template"]:
            assert text not in templates
            assert slots(text) == slots(templates[0])


def test_a_question_tells_what_it_names_and_points_at():
    asker = Asker(np.random.default_rng(0))
    for _ in range(60):
        asker.ask("spatial side", "left", ["peg", "bin"])
        asker.ask("spatial side", "right", ["peg", "bin"])
    orders = {tuple(question["labels"]) for question in asker.questions}
    for question in asker.take():  # in the order of the text
        assert question["labels"] == sorted(["peg", "bin"], key=question["question"].index)
    assert len(orders) == 2
    asker.locate("box", "box", (10, 20, 30, 60), "bin", words=["front"])
    [question] = asker.take()
    assert question["place"] == [20, 40] and '"bbox_2d": [10, 20, 30, 60]' in question["answer"]
    asker.yes_no("existence", True, ["orange cube"])
    assert " a orange" not in asker.take()[0]["question"]
