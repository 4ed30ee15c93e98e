"""Instructions that have nothing to do with robots: replayed beside the embodied questions, and probed before and after them.

    python -m nano.instructions                 writes out/general/{train,probes}.jsonl and the pictures that some of them show

Six kinds: format (answer in capital letters, twice, as JSON), copying, ordering (words and numbers), arithmetic, choice (which letter stands before some
words, which words after a letter; take an option and give its letter), and refusal (asked about what the picture does not show, say so). Probes use words and numbers of which training sees
other combinations, and half of them a wording that it never sees. Training has most of copying and choice: looking up in the text what is to be said
next comes late in a small model, suddenly, and the letter of an answer rests on it.
Each line is a chat, {"messages": [...], "kind": ..., "held_out": bool}: the shape in which people have their own data (data/chats.py reads both).
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cli import at_least, parse, run

from files import atomic
from data.env import TabletopEnv
from nano.questions import LETTERS
from data.robots import ROBOTS
from data.tasks import TASKS

WORDS = ("apple bread chair cloud door eagle field fish garden glass hat house island jacket key lamp leaf lemon milk moon mountain needle nose ocean orange paper pear pencil "
         "plum queen rain river road rope salt sand shoe ship silver snow spoon star stone storm sugar summer sun table tiger tooth tower train tree valley water wheel window wind "
         "winter wolf wood yard zebra").split()
ABSENT = ("car dog tree house bird clock horse lamp boat flower book cat chair cup hat key plate shoe train window").split()
NUMBERS = range(1, 10)
WORDINGS = {                                         # the last of each is held out: a new sentence, of words that the others have
    "format capitals": ("Write the word {} in capital letters.", "Write {} in capital letters.", "Give the word {} in capitals.", "Put {} into capital letters.",
                        "Say the word {} in capitals.", "Put the word {} in capital letters."),
    "format twice": ("Write the word {} twice.", "Say {} two times.", "Write {} twice.", "Give the word {} two times.", "Put the word {} twice.", "Say the word {} twice."),
    "format json": ("Write the word {} as JSON with the key \"word\".", "Give {} as JSON with the key \"word\".", "Answer in JSON: the word {}, with the key \"word\".",
                    "Put {} into JSON, the key is \"word\".", "Say {} in JSON with the key \"word\".", "Put the word {} into JSON with the key \"word\"."),
    "copying": ("Repeat: {}.", "Repeat these words: {}.", "Say after me: {}.", "Copy: {}.", "Write these words again: {}.", "Say these words: {}.", "Copy what I write: {}.",
                "Write after me, these words: {}.", "Copy these words: {}."),
    "ordering words": ("Put these words in alphabetical order: {}.", "Sort these words: {}.", "Order these words by the alphabet: {}.", "Sort: {}.",
                       "Put in order by the alphabet: {}.", "Write these words in alphabetical order: {}.", "Give these words, sorted: {}.", "Sort by the alphabet: {}."),
    "ordering numbers": ("Sort these numbers: {}.", "Put these numbers in order, the smallest first: {}.", "Order these numbers: {}.", "Put these in order: {}.",
                         "Give these numbers in order: {}.", "Write these numbers, sorted: {}.", "Order: {}.", "Put in order: {}."),
    "arithmetic plus": ("What is {} + {}?", "Add {} and {}.", "How much is {} + {}?", "Give {} + {}.", "What is the sum of {} and {}?", "What do {} and {} give?",
                        "Write the sum of {} and {}.", "Give the sum of {} and {}."),
    "arithmetic minus": ("What is {} - {}?", "Take {1} from {0}.", "How much is {} - {}?", "Give what is left of {} without {}.", "Write {} - {}.",
                         "What is left of {} without {}?", "Give {} - {}."),
    "choice letter": ("Which letter stands before {}? {}", "Give the letter of {}: {}", "Which of these is {}? {}", "Which letter has {}? {}", "Choose the letter of {}. {}",
                      "Say which is {}. {}", "Choose {}. {}"),
    "choice words": ("What stands after {}? {}", "Give what has the letter {}: {}", "Which words have the letter {}? {}", "What has the letter {}? {}", "Say what {} is. {}",
                     "Which words stand behind {}? {}", "Say what is behind {}. {}"),
    "choice both": ("Take {}. {}", "Take {} and give its letter. {}", "It is {}. {}", "Say {} and its letter. {}", "Write {} with its letter: {}", "Choose what is {}. {}",
                    "Repeat {} and its letter. {}", "Take what is {}. {}"),
    "refusal": ("What colour is the {}?", "Where is the {}? Give a point.", "Describe the {} in the picture.", "What shape is the {}?", "Tell where the {} is.",
                "What do you see of the {}?", "Tell me what you see of the {}.", "Is the {} red?", "Give the box of the {} in the picture.", "Tell me about the {} in the picture."),
}
KINDS = tuple(dict.fromkeys(name.split()[0] for name in WORDINGS))
OFTEN = {"copying": 6, "choice letter": 4, "choice words": 4, "choice both": 6}        # times as many training rows as of the others


@dataclass
class GeneralConfig:
    rows: int = 60000            # training rows
    probes: int = 400            # probes, as many of each kind
    pictures: int = 240          # pictures for refusals, of all robots and tasks
    seed: int = 0                # of everything
    out: str = "out/general"     # folder


def instruction(name, rng):
    """(words that go into the wording, answer) of one instruction."""
    some = lambda n: [str(word) for word in rng.choice(WORDS, n, replace=False)]
    if name.startswith("format"):
        word, = some(1)
        return (word,), {"capitals": word.upper(), "twice": f"{word} {word}", "json": json.dumps({"word": word})}[name.split()[1]]
    if name == "copying":
        text = " ".join(some(rng.integers(2, 13)))
        return (text,), text
    if name == "ordering words":
        words = some(rng.integers(3, 5))
        return (", ".join(words),), ", ".join(sorted(words))
    if name == "ordering numbers":
        numbers = rng.choice(99, rng.integers(3, 5), replace=False)
        return (", ".join(map(str, numbers)),), ", ".join(map(str, sorted(numbers)))
    if name.startswith("choice"):
        lengths = rng.integers(1, 4, rng.integers(2, 6))
        options = [" ".join(part) for part in np.split(np.array(some(lengths.sum())), lengths.cumsum()[:-1])]
        right, listed = int(rng.integers(len(options))), " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options))
        if name == "choice words":
            return (LETTERS[right], listed), options[right]
        return (options[right], listed), LETTERS[right] if name == "choice letter" else f"{options[right]}: {LETTERS[right]}"
    if name == "refusal":
        thing = str(rng.choice(ABSENT))
        return (thing,), f"There is no {thing} in the picture."
    a, b = (int(n) for n in rng.choice(NUMBERS, 2))
    return ((a, b), str(a + b)) if name == "arithmetic plus" else ((max(a, b), min(a, b)), str(abs(a - b)))


def row(name, rng, pictures, held_out):
    words, answer = instruction(name, rng)
    wordings = WORDINGS[name]
    text = (wordings[-1] if held_out else wordings[rng.integers(len(wordings) - 1)]).format(*words)
    content = [{"type": "image", "image": str(rng.choice(pictures))}] if name == "refusal" else []
    return {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": text}]}, {"role": "assistant", "content": answer}],
            "kind": name.split()[0], "held_out": held_out}


def make(config):
    """Write both files and the pictures. No probe is also a training row."""
    at_least(config, 1, "rows", "probes"), at_least(config, 2, "pictures"), at_least(config, 0, "seed")
    out, rng = Path(config.out), np.random.default_rng(config.seed)
    cells, pictures = [(robot, task) for task in TASKS for robot in ROBOTS], []
    for i in range(config.pictures):
        robot, task = cells[i % len(cells)]
        pictures.append(f"pictures/{i:03d}.png")
        if not (out / pictures[-1]).exists():
            env = TabletopEnv(robot, task)
            with atomic(out / pictures[-1]) as temporary:
                Image.fromarray(env.reset(3_000_000 + i)[0]["images"]["front"]).save(temporary)
            env.close()
    names, probes = list(WORDINGS), []
    per_kind = {kind: [name for name in names if name.split()[0] == kind] for kind in KINDS}
    for i in range(config.probes):
        kind = KINDS[i % len(KINDS)]
        probes.append(row(per_kind[kind][i // len(KINDS) % len(per_kind[kind])], rng, pictures[::8], bool(i // len(KINDS) // len(per_kind[kind]) % 2)))
    taken = {json.dumps(probe["messages"][0]) for probe in probes}
    shown = [picture for i, picture in enumerate(pictures) if i % 8]
    train, odds = [], np.array([OFTEN.get(name, 1) for name in names]) / sum(OFTEN.get(name, 1) for name in names)
    while len(train) < config.rows:
        made = row(str(rng.choice(names, p=odds)), rng, shown, False)
        if json.dumps(made["messages"][0]) not in taken:
            train.append(made)
    for name, rows in (("train", train), ("probes", probes)):
        with atomic(out / f"{name}.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in rows))


def ensure(folder):
    """Write the default instructions into `folder` unless they are there."""
    if not all((Path(folder) / f"{name}.jsonl").exists() for name in ("train", "probes")):
        print(f"no general instructions in {folder}: writing them")
        make(GeneralConfig(out=str(folder)))


def main():
    config = parse(GeneralConfig, description="Write general instructions to replay, and probes of them.")
    make(config)
    print(f"{config.rows} rows and {config.probes} probes in {config.out}")


if __name__ == "__main__":
    run(main)
