"""Is a reply right? Scores of answers, by the form that a question asks for.

yes/no, words, choice, steps   the very words of the answer
point                          {"point_2d": [x, y], ...} within 5 px, half a cube in nano's front view
box                            {"bbox_2d": [x1, y1, x2, y2], ...}, intersection over union of 0.5
letter                         the first letter of an option that stands alone in the reply, as
                               Cosmos-Reason1's own evaluation has it (arXiv 2503.15558)
open                           the same words but for case, punctuation and articles; `soft` is
                               milder, and both are stricter than a language model as judge
"""

import json
import math
import re
import string
from collections import Counter

import numpy as np

FORMS = ("yes/no", "words", "choice", "steps", "point", "box", "letter", "open")
POINT_PX = 5.0  # most pixels between a point and the right one
BOX_OVERLAP = 0.5  # least intersection over union
ARTICLES = ("a", "an", "the")


def is_right(question, reply):
    """Whether a reply answers {"answer", "form", and "options" for letters} as its form asks."""
    answer = question["answer"]
    form = question["form"]
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


def numbers(text, key, count):
    """The `count` finite numbers under `key` of a JSON object, as an array; None without."""
    try:
        values = np.array(json.loads(text)[key], float)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None  # a model may reply anything
    usable = values.shape == (count,) and np.isfinite(values).all()
    return values if usable else None


def distance(reply, answer):
    """Pixels between the points of two answers; infinite if one has none."""
    a = numbers(reply, "point_2d", 2)
    b = numbers(answer, "point_2d", 2)
    if a is None or b is None:
        return np.inf
    return float(np.hypot(*(a - b)))


def overlap(reply, answer):
    """Intersection over union of two answers' boxes, 0 to 1; 0 if one has none."""
    a = numbers(reply, "bbox_2d", 4)
    b = numbers(answer, "bbox_2d", 4)
    if a is None or b is None:
        return 0.0
    low = np.maximum(a[:2], b[:2])  # corners of what both cover
    high = np.minimum(a[2:], b[2:])
    shared = np.prod((high - low).clip(0))  # 0 where they lie apart
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared
    return float(shared / union) if union > 0 else 0.0


# ---- words


def letter(reply, count):
    """The first of the first `count` letters alone in a reply, inside <answer> if it has that."""
    inside = re.search(r"<answer>(.*?)</answer>", reply, re.DOTALL)
    text = inside[1] if inside else reply
    letters = string.ascii_uppercase[:count]
    first = re.search(rf"\b[{letters}]\b", text)
    return first and first[0]


def words(text):
    """The words of a text in lower case, without punctuation and articles."""
    no_marks = str.maketrans("", "", string.punctuation)
    plain = text.lower().translate(no_marks)
    return [word for word in plain.split() if word not in ARTICLES]


def soft(reply, answer):
    """F1 of the words of a reply and an answer, 0 to 1, as SQuAD has it (arXiv 1606.05250)."""
    a = Counter(words(reply))
    b = Counter(words(answer))
    shared = (a & b).total()  # a word counts as often as both have it
    if not shared:
        return float(a == b)  # two empty texts are the same
    return 2 * shared / (a.total() + b.total())


# ---- how sure a rate is


def wilson(successes, n, z=1.96):
    """95% interval (low, high) of a rate, 0 to 1 (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    center = (successes + z * z / 2) / (n + z * z)  # drawn towards a half
    half = z / (n + z * z) * math.sqrt(n * rate * (1 - rate) + z * z / 4)
    return max(0.0, center - half), min(1.0, center + half)
