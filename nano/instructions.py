"""Instructions unrelated to robots: mixed into Stage I, and probed afterward.

    python -m nano.instructions          writes out/general/{train,probes}.jsonl and some images

Six kinds: format (answer in capital letters, twice, as JSON), copying, ordering (words, numbers),
arithmetic, choice (which letter precedes given words, which words follow a letter; repeat an option
and give its letter), and refusal (say that something is not in the image). Probes use words and
numbers in combinations that training does not contain, and half of them a held-out wording. Copying
and choice are the most frequent kinds in training: looking up the next word in the text is learned
late by a small model, and suddenly, and giving the letter of an answer depends on it.

A line is {"images", "questions": [one]}, with the fields that questions.py describes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cli import at_least, parse, run
from data.env import TabletopEnv
from data.robots import ROBOTS
from data.tasks import TASKS
from files import atomic, writable
from nano.questions import LETTERS
from nano.scenes import write_lines

DATA = json.loads((Path(__file__).parent / "instructions.json").read_text())
WORDS = DATA["words"].split()
ABSENT = DATA["absent"].split()  # things that no image shows
WORDINGS = DATA["wordings"]  # {name: {"seen": [...], "held_out": one}}; a name starts with its kind
KINDS = tuple(dict.fromkeys(name.split()[0] for name in WORDINGS))
OFTEN = {"copying": 6, "choice letter": 4, "choice words": 4, "choice both": 6}  # times the others
FIRST_SEED = 3_000_000  # of the images' layouts, which no other scene has


@dataclass
class InstructionsConfig:
    rows: int = 60000  # training rows
    probes: int = 400  # probes, equally many of each kind
    pictures: int = 240  # images for refusals, from all robots and tasks
    seed: int = 0  # seed of everything but the images
    out: str = "out/general"  # folder


def instruction(name, rng):
    """(words to insert into the wording, answer, options or None) for one instruction."""

    def draw(number):
        return rng.choice(WORDS, number, replace=False).tolist()

    if name.startswith("format"):
        [word] = draw(1)
        answers = {
            "format capitals": word.upper(),
            "format twice": f"{word} {word}",
            "format json": json.dumps({"word": word}),
        }
        return [word], answers[name], None
    if name == "copying":  # two to twelve words
        text = " ".join(draw(rng.integers(2, 13)))
        return [text], text, None
    if name.startswith("ordering"):
        number = rng.integers(3, 5)
        if name == "ordering words":
            things = draw(number)
        else:
            things = rng.choice(99, number, replace=False)
        listed = ", ".join(map(str, things))
        ordered = ", ".join(map(str, sorted(things)))
        return [listed], ordered, None
    if name.startswith("choice"):
        return choice(name, draw, rng)
    if name == "refusal":  # words for things that are in no scene
        thing = str(rng.choice(ABSENT))
        return [thing], f"There is no {thing} in the picture.", None
    a, b = rng.choice(range(1, 10), 2).tolist()
    if name == "arithmetic plus":
        return [a, b], str(a + b), None
    return [max(a, b), min(a, b)], str(abs(a - b)), None  # never negative


def choice(name, draw, rng):
    """`instruction` about two to five options of one to three words each."""
    lengths = rng.integers(1, 4, rng.integers(2, 6))
    parts = np.split(draw(lengths.sum()), lengths.cumsum()[:-1])
    options = [" ".join(part) for part in parts]
    right = rng.integers(len(options))
    # in the same format as in questions about scenes
    listed = " ".join(map("{}) {}".format, LETTERS, options))
    option = options[right]
    letter = LETTERS[right]
    if name == "choice words":
        return [letter, listed], option, options
    answer = letter if name == "choice letter" else f"{option}: {letter}"
    return [option, listed], answer, options


def row(name, rng, pictures, held_out):
    """A line of the file, with an instruction of WORDINGS[name]."""
    words, answer, options = instruction(name, rng)
    seen = WORDINGS[name]["seen"]
    wording = WORDINGS[name]["held_out"] if held_out else seen[rng.integers(len(seen))]
    question = {
        "question": wording.format(*words),
        "answer": answer,
        "category": name.split()[0],
        # an answer that ends in a letter also trains the auxiliary heads on options
        "form": "choice" if answer[-1] in LETTERS and options else "words",
        "chance": 1 / len(options) if options else 0.0,
        "held_out": held_out,
    }
    if options:
        question["options"] = options
    images = [str(rng.choice(pictures))] if name == "refusal" else []
    return {"images": images, "questions": [question]}


def draw_pictures(config):
    """Draw the missing images. Returns their paths within the folder."""
    cells = [(robot, task) for task in TASKS for robot in ROBOTS]
    names = [f"pictures/{i:03d}.png" for i in range(config.pictures)]
    for i, name in enumerate(names):
        path = Path(config.out) / name
        if not path.exists():  # otherwise it is the same: it does not depend on the configuration
            env = TabletopEnv(*cells[i % len(cells)])
            observation, _ = env.reset(FIRST_SEED + i)
            with atomic(path) as temporary:
                Image.fromarray(observation["images"]["front"]).save(temporary)
            env.close()
    return names


def text_of(line):
    return str(line["images"]) + line["questions"][0]["question"]


def make(config):
    """Write both files and the images. No probe is also a training row."""
    at_least(config, 1, "rows", "probes")
    at_least(config, 2, "pictures")
    at_least(config, 0, "seed")
    writable(config.out)
    rng = np.random.default_rng(config.seed)
    pictures = draw_pictures(config)
    names = list(WORDINGS)
    probes = []
    for i in range(config.probes):
        # alternate first kinds, then names of a kind, then seen and held-out wordings
        turn, kind = divmod(i, len(KINDS))
        same = [name for name in names if name.split()[0] == KINDS[kind]]
        turn, which = divmod(turn, len(same))
        held_out = turn % 2 == 1
        probes.append(row(same[which], rng, pictures[::8], held_out))
    taken = set(map(text_of, probes))
    odds = np.array([OFTEN.get(name, 1) for name in names])
    odds = odds / odds.sum()
    # every eighth image is only for probes
    shown = [picture for i, picture in enumerate(pictures) if i % 8]
    train = []
    while len(train) < config.rows:
        name = str(rng.choice(names, p=odds))
        line = row(name, rng, shown, False)
        if text_of(line) not in taken:
            train.append(line)
    write_lines(Path(config.out) / "train.jsonl", map(json.dumps, train))
    write_lines(Path(config.out) / "probes.jsonl", map(json.dumps, probes))


def main():
    config = parse(InstructionsConfig, description="Write general instructions and probes of them.")
    make(config)
    print(f"{config.rows} rows and {config.probes} probes in {config.out}")


if __name__ == "__main__":
    run(main)
