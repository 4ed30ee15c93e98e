"""Instructions that have nothing to do with robots: replayed in Stage I, and probed afterwards.

    python -m nano.instructions          writes out/general/{train,probes}.jsonl and some pictures

Six kinds: format (answer in capital letters, twice, as JSON), copying, ordering (words, numbers),
arithmetic, choice (which letter stands before some words, which words after a letter; take an
option and give its letter), and refusal (asked about what the picture does not show, say so).
Probes use words and numbers of which training sees other combinations, and half of them a wording
that it never sees. Training has most of copying and choice: looking up in the text what is to be
said next comes late in a small model, suddenly, and the letter of an answer rests on it.

instructions.json has, for each sort of a kind, wordings and the answer, with places for what
`fill` draws, and how often it comes. A line is {"images", "questions": [one]}, of the fields that
questions.py describes.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cli import at_least, parse, run
from data.env import TabletopEnv
from data.robots import ROBOTS
from data.tasks import TASKS
from files import atomic
from nano.questions import LETTERS
from nano.scenes import write_lines

DATA = json.loads((Path(__file__).parent / "instructions.json").read_text())
WORDS = DATA["words"].split()
ABSENT = DATA["absent"].split()  # what no picture shows
WORDINGS = DATA["wordings"]  # {sort: {"answer", "often", "seen": [...], "held_out": one}}
KINDS = tuple(dict.fromkeys(name.split()[0] for name in WORDINGS))  # a sort begins with its kind
FIRST_SEED = 3_000_000  # of the pictures' layouts: no other scene has them


@dataclass
class InstructionsConfig:
    rows: int = 60000  # training rows
    probes: int = 400  # probes, as many of each kind
    pictures: int = 240  # pictures for refusals, of all robots and tasks
    seed: int = 0  # of everything but the pictures
    out: str = "out/general"  # folder


def fill(name, rng):
    """What goes into wordings and answer of a sort, by the name of its place."""
    words = rng.permutation(WORDS).tolist()
    if name.startswith("ordering"):
        things = words if name == "ordering words" else rng.permutation(99).tolist()
        things = things[: rng.integers(3, 5)]
        listed, ordered = [", ".join(map(str, order)) for order in (things, sorted(things))]
        return {"listed": listed, "ordered": ordered}
    if name.startswith("choice"):  # two to five options of one to three words each
        stops = rng.integers(1, 4, rng.integers(2, 6)).cumsum()
        options = [" ".join(part) for part in np.split(words, stops)[:-1]]
        # as questions about scenes list theirs
        listed = " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options))
        right = rng.integers(len(options))
        filled = {"option": options[right], "letter": LETTERS[right]}
        return {**filled, "listed": listed, "options": options}
    b, a = sorted(rng.integers(1, 10, 2).tolist())  # nothing below zero
    text = " ".join(words[: rng.integers(2, 13)])
    filled = {"a": a, "b": b, "sum": a + b, "difference": a - b}
    filled |= {"word": words[0], "capitals": words[0].upper(), "text": text}
    return {**filled, "absent": rng.choice(ABSENT)}


def row(name, rng, pictures, held_out):
    """A line of the file with an instruction of WORDINGS[name]."""
    sort = WORDINGS[name]
    wording = sort["held_out"] if held_out else rng.choice(sort["seen"])
    filled = fill(name, rng)
    options = filled.get("options", [])
    answer = sort["answer"].format(**filled)
    question = {
        "question": wording.format(**filled),
        "answer": answer,
        "category": name.split()[0],
        # an answer that ends in a letter also trains the heads on options
        "form": "choice" if options and answer[-1] in LETTERS else "words",
        "chance": 1 / len(options) if options else 0.0,
        "held_out": held_out,
        "options": options,
    }
    images = [rng.choice(pictures)] if name == "refusal" else []
    return {"images": images, "questions": [question]}


def draw_pictures(config):
    """Draw the pictures; their paths, from the folder."""
    names = []
    for i, cell in zip(range(config.pictures), itertools.cycle(itertools.product(ROBOTS, TASKS))):
        names.append(f"pictures/{i:03d}.png")
        env = TabletopEnv(*cell)
        observation, _ = env.reset(FIRST_SEED + i)
        with atomic(Path(config.out, names[i])) as path:
            Image.fromarray(observation["images"]["front"]).save(path)
        env.close()
    return names


def make(config):
    """Write both files and the pictures. No probe's question is also one of training."""
    at_least(config, 1, "rows", "probes", "pictures")
    at_least(config, 0, "seed")
    rng = np.random.default_rng(config.seed)
    pictures = draw_pictures(config)
    names = list(WORDINGS)
    probes = []
    for i in range(config.probes):  # kinds in turn, in seen and in held-out wordings
        turn, kind = divmod(i, len(KINDS))
        sorts = [name for name in names if name.startswith(KINDS[kind])]
        probes.append(row(rng.choice(sorts), rng, pictures, turn % 2 == 1))
    taken = [probe["questions"][0]["question"] for probe in probes]
    odds = np.array([sort["often"] for sort in WORDINGS.values()])
    train = []
    while len(train) < config.rows:
        line = row(rng.choice(names, p=odds / odds.sum()), rng, pictures, False)
        if line["questions"][0]["question"] not in taken:
            train.append(line)
    write_lines(Path(config.out) / "train.jsonl", train)
    write_lines(Path(config.out) / "probes.jsonl", probes)


def main():
    config = parse(InstructionsConfig, description="Write general instructions and probes of them.")
    make(config)
    print(f"{config.rows} rows and {config.probes} probes in {config.out}")


if __name__ == "__main__":
    run(main)
