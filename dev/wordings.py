"""Does Stage I understand wordings that it was not trained on? Tested on scenes with commands.

    python -m dev.wordings --models out/listen,out/sft

Each model locates what a command names, in the same validation scenes of nano/commands.py, with
instructions

    seen           from patterns, as in training (data/words.py)
    held_out       in wordings that are only for evaluation
    off_template   as people write
    by_place       in wordings of training, with objects named by where they lie: "the left cube"
    .              without words, as a control: what the images alone tell

Printed and written to --out: the share of patches with the right role, the errors of the object to
move and its destination (px in the front image), and the share of errors above FAR; then the
sentences that are understood worst. All but by_place name objects by their colors. The heads that
predict this come from the model's training.
"""

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import train_sft
from cli import UserError, command_line, parse, run
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

KINDS = ("seen", "held_out", "off_template", "by_place", ".")
FAR = 4.0  # px
ROWS = 32  # per batch
WORST = 8  # sentences to print


def wording(record, command, kind, rng):
    """A sentence for a command of a record, of some kind, with {roles} for objects."""
    if kind == ".":
        return kind
    task = TASKS[command["task"]]
    if kind in ("seen", "by_place"):
        return words.expand(words.pick(words.PATTERNS[task.name], rng), rng)
    choices = task.sentences(kind, record["scene"] in FAMILIES)
    return words.pick(choices, rng)


def sentence(command, text, kind, rng):
    """The sentence with the command's objects filled in."""
    task = TASKS[command["task"]]
    names = dict(zip(task.labels, (f"the {thing}" for thing in command["things"])))
    if kind == "by_place":
        for role, choices in zip(task.labels, command["by_place"]):
            if choices:
                names[role] = words.pick(choices, rng)
    # the command does not list the markers that belong to a single-command task
    names = {role: f"the {label}" for role, label in task.labels.items()} | names
    return text.format(**names)


def told(records, kind):
    """(records with one command each, in a sentence of a kind; {wording: its row numbers})."""
    kept = []
    rows = defaultdict(list)
    for i, record in enumerate(records):
        rng = np.random.default_rng([i, KINDS.index(kind)])
        commands = record["commands"]
        if kind == "by_place":
            commands = [command for command in commands if any(command["by_place"])]
        if commands:
            command = commands[i % len(commands)]
            text = wording(record, command, kind, rng)
            instruction = sentence(command, text, kind, rng)
            rows[text].append(len(kept))
            kept.append(record | {"commands": [command | {"instruction": instruction}]})
    return kept, rows


@torch.no_grad()
def measure(folder, source, layer):
    """How well a model understands the rows of a Commands source, with heads on block `layer`.

    Returns the share of patches with the right role, and the errors in px of object and destination
    (n, 2), NaN if there is no destination.
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
    intent_layer: int = 4  # LLM block whose hidden states the heads read
    out: str = "out/results/wordings.json"  # result file


def main():
    config = parse(WordingsConfig, description=__doc__.splitlines()[0])
    source = Commands(config.commands, "val")
    results = {folder: {} for folder in config.models.split(",")}
    sentences = {folder: {} for folder in results}
    records = source.records
    if not all("by_place" in command for command in records[0]["commands"]):
        advice = "make it again with `python -m nano.commands`"
        raise UserError(f"{config.commands} has no names by place: {advice}")
    for kind in KINDS:
        source.records, rows = told(records, kind)
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
        "scenes": len(records),
        "models": results,
        "sentences": sentences,
        "config": asdict(config),
        "command": command_line(),
    }
    write_json(config.out, result)


if __name__ == "__main__":
    run(main)
