"""Scores: each form of question accepts what is right, and survives any reply of a model."""

import json

import pytest

from data.scoring import FORMS, distance, is_degenerate, is_right, letter, overlap, wilson

POINT = '{"point_2d": [40, 50], "label": "red cube"}'
BOX = '{"bbox_2d": [10, 10, 30, 30], "label": "red cube"}'


def point(x, y):
    return json.dumps({"point_2d": [x, y]})


def box(*corners):
    return json.dumps({"bbox_2d": corners})


@pytest.mark.parametrize(
    "form, answer, reply, right",
    [
        ("yes/no", "yes", " yes\n", True),
        ("yes/no", "yes", "Yes", False),
        ("words", "red cube", "red cube", True),
        ("words", "red cube", "a red cube", False),
        ("choice", "green: B", "green: B", True),
        ("choice", "green: B", "green: C", False),
        ("steps", "1. lift 2. turn", "1. lift 2. turn", True),
        ("steps", "1. lift 2. turn", "1. turn 2. lift", False),
        ("point", POINT, point(43, 54), True),
        ("point", POINT, point(43, 55), False),
        ("point", POINT, "at 40, 50", False),
        ("box", BOX, box(10, 10, 30, 20), True),
        ("box", BOX, box(10, 10, 30, 19), False),
        ("letter", "B", "B", True),
        ("letter", "B", "(B) stop", True),
        ("letter", "B", "The answer is B.", True),
        ("letter", "B", "A, or <answer>(B)</answer> A", True),
        ("letter", "B", "b", False),
        ("letter", "B", "D, then B", True),  # there is no option D
        ("letter", "B", "BCA", False),
        ("letter", "B", "", False),
        ("open", "A red cup.", "the red cup", True),
        ("open", "A red cup.", "a blue cup", False),
    ],
)
def test_each_form_takes_what_is_right(form, answer, reply, right):
    question = {"form": form, "answer": answer, "options": ["lift", "stop", "turn"]}
    assert form in FORMS
    assert is_right(question, reply) == right


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "[1, 2]",
        "null",
        "{}",
        '{"point_2d": null, "bbox_2d": 3}',
        '{"point_2d": [1], "bbox_2d": [1, 2, 3]}',
        '{"point_2d": ["x", "y"], "bbox_2d": {"a": 1}}',
        '{"point_2d": [[1, 2], [3]], "bbox_2d": [[1, 2, 3, 4]]}',
        '{"point_2d": [NaN, 1], "bbox_2d": [NaN, 1, 2, 3]}',
        '{"point_2d": [1e999, 1], "bbox_2d": [0, 0, Infinity, 1]}',
        '{"point_2d": [1' + "0" * 400 + ', 1], "bbox_2d": [1' + "0" * 400 + ", 1, 2, 3]}",
        "[" * 100_000,
    ],
)
def test_a_strange_reply_is_wrong_and_no_error(reply):
    assert distance(reply, POINT) == float("inf")
    assert overlap(reply, BOX) == 0


def test_overlap_of_boxes():
    assert overlap(box(10, 10, 30, 30), BOX) == 1
    assert overlap(box(40, 40, 60, 60), BOX) == 0
    assert overlap(box(20, 10, 40, 30), BOX) == pytest.approx(1 / 3)
    assert overlap(box(5, 5, 5, 5), box(5, 5, 5, 5)) == 0


def test_only_letters_of_options_count():
    assert letter("I would say C", 2) is None
    assert letter("I would say C", 3) == "C"


def test_wilson_interval():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(50, 50) == pytest.approx((0.9286, 1.0), abs=1e-4)
    assert wilson(48, 50) == pytest.approx((0.8654, 0.9890), abs=1e-4)
    assert wilson(0, 50)[0] == 0


def test_replies_that_repeat_themselves():
    assert is_degenerate("move the gripper, move the gripper, move the gripper,", "yes")
    assert is_degenerate("1. the grippppppp", "1. the gripper")
    assert not is_degenerate("move the gripper, move the gripper away", "yes")
    assert not is_degenerate('{"bbox_2d": [11, 20, 100, 111], "label": "red cube"}', "{}")
    assert not is_degenerate("", "yes")
    plan = "1. lift the blue ball 2. carry the blue ball 3. set the blue ball down"
    assert not is_degenerate(plan, plan)
    assert is_degenerate(plan + " 4. lift the blue ball", plan)
