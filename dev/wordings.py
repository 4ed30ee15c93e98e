"""Does Stage I understand sentences that it was not taught? Scenes with commands, told in other words.

    python -m dev.wordings --models out/listen,out/sft

Each model places what a command names in the same validation scenes of nano/commands.py, told

    seen           in sentences of patterns, as training draws them (data/words.py)
    held_out       in those that only evaluations use
    off_template   as people write
    .              nothing, the control: what pictures alone say

Printed and written to --out: the share of patches with the right role, how far the places of what
moves and of where it goes are off (px of the front picture), and the share that is off by more than
FAR; then the sentences that are understood worst. Things are named by their colors. The heads that
say it are those of the model's training.
"""

import shlex
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import train_sft
from cli import parse, run
from data import words
from data.families import FAMILIES
from data.tasks import TASKS
from files import write_json
from nano.commands import Commands
from nano.grounding import PATCH, Grounding
from nano.train import STAGES
from processor import Processor
from tables import print_table
from vlm import VLM

KINDS = ("seen", "held_out", "off_template", ".")
FAR = 4.0  # px
ROWS = 32  # of a batch
WORST = 8  # sentences that are printed


def wording(record, command, kind, rng):
    """What a command of a record can be told in: a sentence of a kind, with {roles} for things."""
    if kind == ".":
        return kind
    task = TASKS[command["task"]]
    if kind == "seen":
        return words.expand(words.pick(words.PATTERNS[task.name], rng), rng)
    choices = task.sentences(kind, record["scene"] in FAMILIES)
    return words.pick(choices, rng)


def sentence(command, text):
    """A wording of a command with its things in it."""
    task = TASKS[command["task"]]
    names = dict(zip(task.labels, (f"the {thing}" for thing in command["things"])))
    # the marker of a task that has its table to itself is no thing of the command
    names = {role: f"the {label}" for role, label in task.labels.items()} | names
    return text.format(**names)


@torch.no_grad()
def measure(folder, source, layer):
    """How well a model reads the rows of a Commands source, its heads' blocks up to `layer`.

    The share of patches with the right role, and how far what moves and where it goes are off, px
    (n, 2), NaN where nothing goes anywhere.
    """
    processor = Processor.from_pretrained(folder)
    model = VLM.from_pretrained(folder).eval()
    heads = Grounding(model.config, processor.tokenizer, layer, pictures_only=True)
    heads.load(load_file(Path(folder) / "heads.safetensors"))
    config = replace(STAGES["look"], intent_layer=layer)
    hits = []
    errors = []
    for start in range(0, len(source), ROWS):
        index = range(start, min(start + ROWS, len(source)))
        rows = [train_sft.read_row(source, i, None, config) for i in index]
        batch = train_sft.make_batch(rows, processor, heads, config)
        out, _ = train_sft.forward(model, heads, batch)
        roles, places = heads.read_commands(out, batch)
        meant = batch["patch_role"] > 0
        hits.append((roles.argmax(1) == batch["patch_role"])[meant])
        ways = places[..., :2] - batch["command_place"][..., :2]
        errors.append(PATCH * ways.norm(dim=-1))
    return float(torch.cat(hits).float().mean()), torch.cat(errors).numpy()


def figures(px):
    """{"px", "far"} of errors (n, 2): their mean, and the share above FAR."""
    known = px[np.isfinite(px)]
    return {"px": round(float(known.mean()), 4), "far": round(float((known > FAR).mean()), 4)}


@dataclass
class WordingsConfig:
    models: str = "out/listen"  # comma-separated folders of nano.train --preset look
    commands: str = "out/corpus/commands"  # folder of nano.commands
    intent_layer: int = 4  # LLM block that the heads read
    out: str = "out/results/wordings.json"  # result file


def main():
    config = parse(WordingsConfig, description=__doc__.splitlines()[0])
    source = Commands(config.commands, "val")
    results = {folder: {} for folder in config.models.split(",")}
    sentences = {folder: {} for folder in results}
    for kind in KINDS:
        rows = defaultdict(list)  # of each sentence
        for i, record in enumerate(source.records):
            rng = np.random.default_rng([i, KINDS.index(kind)])
            for number, command in enumerate(record["commands"]):
                text = wording(record, command, kind, rng)
                command["instruction"] = sentence(command, text)
                if number == i % len(record["commands"]):  # the one that the row asks for
                    rows[text].append(i)
        for folder, kinds in results.items():
            role, px = measure(folder, source, config.intent_layer)
            kinds[kind] = {"role": round(role, 4), **figures(px)}
            if kind in ("held_out", "off_template"):
                for text, own in rows.items():
                    sentences[folder][text] = {"rows": len(own), **figures(px[own])}
    lines = []
    for folder, kinds in results.items():
        for kind, row in kinds.items():
            texts = (f"{100 * row['role']:.1f}", f"{row['px']:.2f}", f"{100 * row['far']:.1f}")
            lines.append([folder, kind, *texts])
    print_table(["model", "told", "roles right, %", "px off", f"more than {FAR:.0f} px, %"], lines)
    lines = []
    for folder, rows in sentences.items():
        worst = sorted(rows, key=lambda text: -rows[text]["far"])[:WORST]
        for text in worst:
            row = rows[text]
            lines.append([folder, text, row["rows"], f"{row['px']:.1f}", f"{100 * row['far']:.0f}"])
    print_table(["model", "sentence", "rows", "px off", f"more than {FAR:.0f} px, %"], lines)
    result = {
        "scenes": len(source),
        "models": results,
        "sentences": sentences,
        "config": asdict(config),
        "command": shlex.join(["python", "-m", "dev.wordings", *sys.argv[1:]]),
    }
    write_json(config.out, result)


if __name__ == "__main__":
    run(main)
