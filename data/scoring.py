"""Is a reply right? Scores of answers, by the form that a question asks for.

yes/no, words, choice, steps   the very words of the answer
point                          {"point_2d": [x, y], ...} within 5 px, half a cube in nano's front view
box                            {"bbox_2d": [x1, y1, x2, y2], ...}, intersection over union of 0.5
letter                         the first letter of an option that stands alone in the reply, as
                               Cosmos-Reason1's own evaluation has it (arXiv 2503.15558)
open                           the same words but for case, punctuation and articles, as SQuAD has
                               it (arXiv 1606.05250): stricter than a language model as judge
"""

import json
import math
import re
import string
from collections import Counter

import numpy as np

from cli import choose

FORMS = ("yes/no", "words", "choice", "steps", "point", "box", "letter", "open")
POINT_PX = 5.0  # most pixels between a point and the right one
BOX_OVERLAP = 0.5  # least intersection over union


def is_right(question, reply):
    """Whether a reply answers {"answer", "form", and "options" for letters} as its form asks.

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


# ---- points and boxes, written in JSON as Qwen2.5-VL does


def numbers(text, key, missing):
    """The finite numbers under `key` of a JSON object, as many as `missing` has; else `missing`."""
    try:
        values = np.array(json.loads(text)[key], float)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return missing  # a model may reply anything
    usable = values.shape == missing.shape and np.isfinite(values).all()
    return values if usable else missing


def distance(reply, answer):
    """Pixels between the points of two answers; infinite if the reply has none."""
    # far away is where no point is said to be
    point = numbers(reply, "point_2d", np.full(2, np.inf))
    return math.dist(point, json.loads(answer)["point_2d"])


def overlap(reply, answer):
    """Intersection over union of two answers' boxes, 0 to 1; 0 if the reply has none."""
    box = numbers(reply, "bbox_2d", np.zeros(4))  # an empty box covers nothing
    # (2, 2, 2): reply and answer, lowest and highest corner, x and y
    corners = np.reshape([box, json.loads(answer)["bbox_2d"]], (2, 2, 2))
    low = corners[:, 0]
    high = corners[:, 1]
    sides = high.min(axis=0) - low.max(axis=0)  # of what both cover
    shared = sides.clip(0).prod()  # 0 where they lie apart
    union = (high - low).prod(axis=1).sum() - shared
    return float(shared / union) if union > 0 else 0.0


# ---- words


def letter(reply, count):
    """The first of the first `count` letters alone in a reply, inside <answer> if it has that."""
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
    """Counter of the three words in a row of a text."""
    spoken = text.lower().split()
    return Counter(zip(spoken, spoken[1:], spoken[2:]))


def is_degenerate(reply, answer):
    """Does a reply repeat itself: three words in a row more than twice, or a character six times?

    What the right answer repeats as often is fine: a plan may name one thing in every step.
    """
    right = word_groups(answer)
    repeats = any(n > max(2, right[group]) for group, n in word_groups(reply).items())
    return repeats or re.search(r"(\S)\1{5}", reply) is not None


# ---- how sure a rate is


def wilson(successes, n):
    """95% interval (low, high) of a rate, 0 to 1 (Wilson 1927)."""
    z = 1.96  # deviations
    more = z * z  # trials that are imagined, half of them successes
    center = successes + more / 2
    # nothing tried is as unsure as can be: 0 to 1
    spread = successes * (n - successes) / max(n, 1)
    half = z * math.sqrt(spread + more / 4)
    low = center - half
    high = center + half
    return low / (n + more), high / (n + more)
