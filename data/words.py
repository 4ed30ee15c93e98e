"""Hundreds of ways to word one instruction, from which those for training are drawn.

A policy trained on forty sentences per command did 74% of the commands in those, and 60% in
held-out ones (results/told-text-first-before.json). So most training instructions are drawn from
patterns.json: one alternative of each [a|b|c] is chosen, and {roles} stand for objects. Sometimes a
phrase is added before, after or in the middle, or a letter is missing.
"""

import json
import re
from pathlib import Path

PATTERNS = json.loads((Path(__file__).parent / "patterns.json").read_text())
BEFORE = PATTERNS.pop("before")
BETWEEN = PATTERNS.pop("between")
AFTER = PATTERNS.pop("after")
SHARE = 2 / 3  # share of training sentences from patterns; the others are fixed wordings
ASIDE = 0.2  # share with an aside: before the sentence, after it, and after one of its objects
TYPO = 0.1  # share with a missing letter or two swapped ones, and share with a capital
CHOICE = re.compile(r"\[([^][]*)\]")
ROLE = re.compile(r"\{\w+\}(?=[ ,:;])")  # not at the end of a sentence


def pick(choices, rng):
    return choices[rng.integers(len(choices))]


def expand(pattern, rng):
    """A sentence of a pattern: one alternative of each [a|b|c], starting with the innermost."""
    while choice := CHOICE.search(pattern):
        words = pick(choice[1].split("|"), rng)
        pattern = pattern[: choice.start()] + words + pattern[choice.end() :]
    # an empty alternative leaves two spaces, or a space before a comma or question mark
    return re.sub(r" +([,?])", r"\1", " ".join(pattern.split()))


def interrupt(sentence, rng):
    """Sometimes add an aside after one of the {roles}: "on {cubeB}, please, put {cubeA}"."""
    roles = list(ROLE.finditer(sentence))
    if not roles or rng.random() > ASIDE:
        return sentence
    end = pick(roles, rng).end()
    comma = "," if sentence[end] == " " else ""
    return f"{sentence[:end]}, {pick(BETWEEN, rng)}{comma}{sentence[end:]}"


def misspell(sentence, rng):
    """Drop a letter inside one of the longer words, or swap it with the next."""
    words = sentence.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if not places:
        return sentence
    i = pick(places, rng)
    at = rng.integers(1, len(words[i]) - 1)
    head = words[i][:at]
    letter, after, *rest = words[i][at:]
    kept = [after] if rng.random() < 0.5 else [after, letter]
    words[i] = "".join([head, *kept, *rest])
    return " ".join(words)


def vary(sentence, rng, before=BEFORE, after=AFTER):
    """Sometimes add an aside before or after a sentence, a typo, or a capital, as people write."""
    if rng.random() < ASIDE:
        sentence = f"{pick(before, rng)} {sentence}"
    if rng.random() < ASIDE and sentence[-1] not in "?.!":
        sentence += pick(after, rng)
    if rng.random() < TYPO:
        sentence = misspell(sentence, rng)
    if rng.random() < TYPO:
        sentence = sentence[0].upper() + sentence[1:]
    return sentence
