"""Does Stage I understand sentences that it was not taught? Scenes with commands, told in other words.

    python -m dev.wordings --models out/listen,out/sft

Each model places what a command names in the same validation scenes of nano/commands.py, told

    seen           in sentences of patterns, as training draws them (data/words.py)
    held_out       in those that only evaluations use
    off_template   as people write
    .              nothing, the control: what pictures alone say

Printed and written to --out: the share of patches with the right role, how far the places of what
moves and of where it goes are off (px of the front picture), and the share that is off by more than
FAR. Things are named by their colors. The heads that say it are those of the model's training.
"""

import shlex
import sys
from collections import Counter
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
from nano.grounding import Grounding, pixels_between
from nano.train import STAGES
from processor import Processor
from tables import print_table
from vlm import VLM

KINDS = ("seen", "held_out", "off_template", ".")
FAR = 4.0  # px
ROWS = 32  # of a batch


def sentence(record, command, kind, rng):
    """A command of a record in wordings of a kind."""
    if kind == ".":
        return kind
    task = TASKS[command["task"]]
    choices = task.sentences(kind, record["scene"] in FAMILIES)
    if kind == "seen":
        choices = [words.expand(pattern, rng) for pattern in words.PATTERNS[task.name]]
    names = dict(zip(task.labels, (f"the {thing}" for thing in command["things"])))
    # the marker of a task that has its table to itself is no thing of the command
    names = {role: f"the {label}" for role, label in task.labels.items()} | names
    return words.pick(choices, rng).format(**names)


@torch.no_grad()
def measure(folder, source, layer):
    """{"role", "px", "far"} of a model on the rows of a Commands source, its heads' blocks up to `layer`."""
    processor = Processor.from_pretrained(folder)
    model = VLM.from_pretrained(folder).eval()
    heads = Grounding(model.config, processor.tokenizer, layer, pictures_only=True)
    heads.load(load_file(Path(folder) / "heads.safetensors"))
    config = replace(STAGES["look"], intent_layer=layer)
    sums = Counter()
    counts = Counter()
    for start in range(0, len(source), ROWS):
        index = range(start, min(start + ROWS, len(source)))
        rows = [train_sft.read_row(source, i, None, config) for i in index]
        batch = train_sft.make_batch(rows, processor, heads, config)
        out, _ = train_sft.forward(model, heads, batch)
        roles, places = heads.read_commands(out, batch)
        meant = batch["patch_role"] > 0
        hit = roles.argmax(1) == batch["patch_role"]
        px = pixels_between(places, batch["command_place"])
        for name, values in (("role", hit[meant]), ("px", px), ("far", px > FAR)):
            sums[name] += float(values.sum())
            counts[name] += len(values)
    return {name: round(sums[name] / counts[name], 4) for name in sums}


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
    for kind in KINDS:
        for i, record in enumerate(source.records):
            rng = np.random.default_rng([i, KINDS.index(kind)])
            for command in record["commands"]:
                command["instruction"] = sentence(record, command, kind, rng)
        for folder, kinds in results.items():
            kinds[kind] = measure(folder, source, config.intent_layer)
    lines = []
    for folder, kinds in results.items():
        for kind, row in kinds.items():
            figures = (f"{100 * row['role']:.1f}", f"{row['px']:.2f}", f"{100 * row['far']:.1f}")
            lines.append([folder, kind, *figures])
    print_table(["model", "told", "roles right, %", "px off", f"more than {FAR:.0f} px, %"], lines)
    result = {"scenes": len(source), "models": results, "config": asdict(config)}
    write_json(
        config.out,
        result | {"command": shlex.join(["python", "-m", "dev.wordings", *sys.argv[1:]])},
    )


if __name__ == "__main__":
    run(main)
