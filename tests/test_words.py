import re

import numpy as np
import pytest

from data.tasks import TASKS
from data.words import AFTER, BEFORE, BETWEEN, PATTERNS, expand, interrupt, misspell, vary
from dev import wordings

SLOT = re.compile(r"\{(\w+)\}")


def as_regex(pattern):
    """All that a pattern can say, as one regular expression; spaces count for nothing."""
    pattern = re.escape(pattern.replace(" ", ""))
    for plain, special in ((r"\[", "(?:"), (r"\]", ")"), (r"\|", "|")):
        pattern = pattern.replace(plain, special)
    return pattern


@pytest.mark.parametrize("task", TASKS)
def test_patterns_say_what_the_task_moves_and_nothing_else(task):
    rng = np.random.default_rng(0)
    moved = next(iter(TASKS[task].labels))
    for pattern in PATTERNS[task]:
        for _ in range(20):
            sentence = expand(pattern, rng)
            assert not set("[]|") & set(sentence)
            assert sentence == " ".join(sentence.split()) and " ," not in sentence
            slots = SLOT.findall(sentence)
            assert set(slots) <= set(TASKS[task].labels) and len(set(slots)) == len(slots)
            assert moved in slots or task == "LiftPegUpright"  # there is one peg


@pytest.mark.parametrize("task", TASKS)
def test_patterns_cannot_say_what_is_kept_for_evaluation(task):
    known = TASKS[task]
    for sentence in (*known.held_out, *known.held_out_commands, *known.off_template_commands):
        for role, label in known.labels.items():
            sentence = sentence.replace(f"the {label}", f"{{{role}}}")
        for aside in BETWEEN:  # with and without what interrupt() adds
            sentence = sentence.replace(f"}}, {aside}", "}")
        sentence = re.escape(sentence.replace(" ", ""))
        for pattern in PATTERNS[task]:
            assert not re.fullmatch(as_regex(pattern), re.sub(r"\\(.)", r"\1", sentence))


def test_a_regex_of_a_pattern_knows_what_it_says():
    rng = np.random.default_rng(1)
    for patterns in PATTERNS.values():
        for pattern in patterns:
            assert re.fullmatch(as_regex(pattern), expand(pattern, rng).replace(" ", ""))


def test_a_task_is_told_in_hundreds_of_ways():
    rng = np.random.default_rng(2)
    for task, patterns in PATTERNS.items():
        said = {expand(pattern, rng) for pattern in patterns for _ in range(200)}
        assert len(said) > 500, task


def test_an_aside_follows_one_of_the_things():
    rng = np.random.default_rng(6)
    for sentence in ("on {cubeB} put {cubeA}", "on {cubeB}, put {cubeA}", "{cubeA}: on {cubeB}"):
        said = {interrupt(sentence, rng) for _ in range(300)}
        assert len(said) == 1 + len(BETWEEN) and sentence in said
        for text in said - {sentence}:
            aside = text[text.index("}, ") + 3 :].split(",")[0].split(":")[0]
            assert aside in BETWEEN
    assert "on {cubeB}, please, put {cubeA}" in {
        interrupt("on {cubeB} put {cubeA}", rng) for _ in range(300)
    }
    assert interrupt("stand the peg up", rng) == "stand the peg up"


def test_a_slip_changes_one_word_by_a_letter():
    rng = np.random.default_rng(3)
    sentence = "put the blue ball into the white bin"
    for _ in range(200):
        wrong = misspell(sentence, rng)
        pairs = zip(sentence.split(), wrong.split(), strict=True)
        changed = [(right, slip) for right, slip in pairs if right != slip]
        assert len(changed) <= 1  # two of the same letter may have been swapped
        for right, slip in changed:
            assert len(right) > 3 and right[0] == slip[0] and len(right) - len(slip) in (0, 1)
    assert misspell("to the bin", rng) == "to the bin"


def test_scenes_are_told_in_words_of_every_kind_and_in_none():
    rng = np.random.default_rng(5)
    command = {"task": "StackCube", "things": ["red cube", "white cube"]}
    record = {"scene": "which_stack", "commands": [command]}
    assert wordings.wording(record, command, ".", rng) == "."
    texts = {kind: wordings.wording(record, command, kind, rng) for kind in wordings.KINDS[:3]}
    assert texts["held_out"] in TASKS["StackCube"].held_out_commands
    assert len(set(texts.values())) == 3
    for kind, text in texts.items():
        said = wordings.sentence(command, text, kind, rng)
        assert "the red cube" in said and "the white cube" in said
    # one of the two has names that say where it lies
    command["by_place"] = [["the left cube", "the cube on the left"], []]
    text = wordings.wording(record, command, "by_place", rng)
    said = wordings.sentence(command, text, "by_place", rng)
    assert any(name in said for name in command["by_place"][0])
    assert "the red cube" not in said and "the white cube" in said
    # alone on its table it has sentences as they stand
    alone = {"scene": "PickCube", "commands": []}
    command = {"task": "PickCube", "things": ["red cube"]}
    text = wordings.wording(alone, command, "held_out", rng)
    assert wordings.sentence(command, text, "held_out", rng) == text
    assert text in TASKS["PickCube"].held_out


def test_errors_of_places_are_counted_where_there_are_two():
    px = np.array([[1.0, 3.0], [8.0, np.nan]])
    assert wordings.figures(px) == {"px": 4.0, "far": 0.3333}


def test_asides_leave_most_sentences_as_they_are():
    rng = np.random.default_rng(4)
    sentence = "put the blue ball into the white bin"
    said = [vary(sentence, rng) for _ in range(1000)]
    assert 400 < said.count(sentence) < 700
    assert any(text.startswith(tuple(BEFORE)) for text in said)
    assert any(text.endswith(tuple(AFTER)) for text in said)
    asked = "could you put the blue ball into the white bin?"
    assert all(vary(asked, rng)[-1] == "?" for _ in range(100))
