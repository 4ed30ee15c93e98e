"""Score answers: is a reply right, by the form that its question asks for?

yes/no, words, choice, steps   exactly the words of the answer
point                          {"point_2d": [x, y], ...} within 5 px, half a cube in the front view
box                            {"bbox_2d": [x1, y1, x2, y2], ...}, intersection over union of 0.5
letter                         the first option letter that stands alone in the reply, as in
                               Cosmos-Reason1's own evaluation (arXiv 2503.15558)
open                           the same words, ignoring case, punctuation and articles, as in
                               SQuAD (arXiv 1606.05250): stricter than a language model as judge
"""

import json
import math
import re
import string
from collections import Counter

import numpy as np

from cli import choose

FORMS = ("yes/no", "words", "choice", "steps", "point", "box", "letter", "open")
POINT_PX = 5.0  # largest distance in pixels to the right point
BOX_OVERLAP = 0.5  # smallest intersection over union


def is_right(question, reply):
    """Is a reply right for {"answer", "form", and "options" for letters}, by the rule of its form?

    UserError if the form is unknown.
    """
    answer = question["answer"]
    form = choose(question["form"], FORMS, "form")
    if form == "point":
        return distance(reply, answer) <= POINT_PX
    if form == "box":
        return overlap(reply, answer) >= BOX_OVERLAP
    if form == "letter":
        return letter(reply, len(question["options"])) == answer
    if form == "open":
        return words(reply) == words(answer)
    return reply.strip() == answer


# ---- points and boxes, written in JSON as in Qwen2.5-VL


def numbers(text, key, missing):
    """The finite numbers under `key` of a JSON object, if shaped like `missing`; else `missing`."""
    try:
        values = np.array(json.loads(text)[key], float)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return missing  # a model may reply with anything
    usable = values.shape == missing.shape and np.isfinite(values).all()
    return values if usable else missing


def distance(reply, answer):
    """Distance in pixels between the points of two answers; infinite if the reply has none."""
    # a reply without a point is infinitely far away
    point = numbers(reply, "point_2d", np.full(2, np.inf))
    return math.dist(point, json.loads(answer)["point_2d"])


def overlap(reply, answer):
    """Intersection over union of the boxes of two answers, 0 to 1; 0 if the reply has none."""
    box = numbers(reply, "bbox_2d", np.zeros(4))  # an empty box
    # (2, 2, 2): reply and answer, lowest and highest corner, x and y
    corners = np.reshape([box, json.loads(answer)["bbox_2d"]], (2, 2, 2))
    low = corners[:, 0]
    high = corners[:, 1]
    sides = high.min(axis=0) - low.max(axis=0)  # of the intersection
    shared = sides.clip(0).prod()  # 0 if they are disjoint
    union = (high - low).prod(axis=1).sum() - shared
    return float(shared / union) if union > 0 else 0.0


# ---- words


def letter(reply, count):
    """The first of the first `count` letters alone in a reply; inside <answer> if it has that."""
    inside = re.search(r"<answer>(.*?)</answer>", reply, re.DOTALL)
    letters = string.ascii_uppercase[:count]
    text = inside[1] if inside else reply
    first = re.search(rf"\b[{letters}]\b", text)
    return first and first[0]


def words(text):
    """The words of a text in lower case, without punctuation and articles."""
    plain = re.sub(r"[^\w\s]|_", "", text.lower())
    return re.sub(r"\b(a|an|the)\b", "", plain).split()


def word_groups(text):
    """Counter of a text's groups of three successive words."""
    spoken = text.lower().split()
    return Counter(zip(spoken, spoken[1:], spoken[2:]))


def is_degenerate(reply, answer):
    """Is a reply repetitive: three words in a row more than twice, or one character six times?

    Repetitions that the right answer has too are fine: a plan may name an object in every step.
    """
    right = word_groups(answer)
    repeats = any(n > max(2, right[group]) for group, n in word_groups(reply).items())
    return repeats or re.search(r"(\S)\1{5}", reply) is not None


# ---- confidence interval


def wilson(successes, n):
    """95% interval (low, high) of a rate, 0 to 1 (Wilson 1927)."""
    z = 1.96  # standard deviations
    more = z * z  # pseudo-trials, half of them successes
    center = successes + more / 2
    # without any trials the interval is 0 to 1
    spread = successes * (n - successes) / max(n, 1)
    half = z * math.sqrt(spread + more / 4)
    low = center - half
    high = center + half
    return low / (n + more), high / (n + more)
