"""The rows of Stage I: several conversations files, mixed by weight.

Every row of a step depends only on (seed, step), for any number of processes. An epoch of a file is
one shuffle of it, so a resumed run skips and repeats nothing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli import UserError
from data.conversations import Conversations

BLOCK = 100  # rows in which the mixture's proportions are exact
HELD_OUT = 50  # one in so many rows of a file is for validation, unless it has a val.jsonl


@dataclass
class Source:
    """Rows from one file. `rows` and `validation` have the methods of Conversations."""

    name: str
    rows: Conversations
    weight: float = 1.0
    validation: Conversations = None

    def __post_init__(self):
        # all rows of a small file are for training: one or two validation rows would tell nothing
        self.train_index = range(len(self.rows))
        self.val_index = range(len(self.validation or ()))
        if self.validation is None and len(self.rows) >= HELD_OUT:
            self.validation = self.rows
            self.val_index = self.train_index[::HELD_OUT]
            self.train_index = [i for i in self.train_index if i % HELD_OUT]


def open_sources(data, on_bad):
    """--data as a list of Sources."""
    sources = []
    for part in data.split(","):
        # a path may contain a colon; the weight is a number after the last one
        name, weight = re.fullmatch(r"(.*?)(?::(\d+\.?\d*|\.\d+))?", part.strip()).groups()
        path = Path(name)
        name = path.stem
        validation = None
        if path.name == "train.jsonl":
            name = path.parent.name  # more informative than "train"
            beside = path.with_name("val.jsonl")
            validation = Conversations(beside, on_bad) if beside.exists() else None
        rows = Conversations(path, on_bad)
        sources.append(Source(name, rows, float(weight or 1), validation))
    return sources


class Mixture:
    """Rows of several sources, mixed by weight. Each row of a step depends only on (seed, step)."""

    def __init__(self, sources, seed):
        self.sources = sources
        self.seed = seed
        self.epochs = {}  # {source: (epoch, its order)}
        weights = np.array([source.weight for source in sources])
        if not weights.sum() > 0:
            raise UserError("--data: the weights must not all be zero")
        # as close to the weights as whole numbers of rows allow
        exact = BLOCK * weights / weights.sum()
        self.counts = np.floor(exact).astype(int)  # rows of each source in a block
        rest = np.argsort(self.counts - exact, kind="stable")[: BLOCK - self.counts.sum()]
        self.counts[rest] += 1
        for source, count in zip(sources, self.counts):
            if source.weight and not count:
                raise UserError(
                    f"--data: {source.name} has no row in {BLOCK}: give it a larger weight, or 0"
                )

    def block(self, number):
        """(BLOCK,) the source of each row of a block, shuffled."""
        rng = np.random.default_rng([self.seed, 7, number])
        return rng.permutation(np.repeat(np.arange(len(self.counts)), self.counts))

    def shuffle(self, source, epoch):
        """The rows of a source, in the order of an epoch."""
        if self.epochs.get(source, (None,))[0] != epoch:  # only the last epoch is cached
            rng = np.random.default_rng([self.seed, source, epoch])
            self.epochs[source] = (epoch, rng.permutation(self.sources[source].train_index))
        return self.epochs[source][1]

    def rows_of_step(self, step, batch_size):
        """[(number, source, index)] of a step's rows. An epoch of a source is one shuffle of it."""
        rows = []
        for number in range(step * batch_size, (step + 1) * batch_size):
            block, place = divmod(number, BLOCK)
            order = self.block(block)
            # the number of earlier rows from this source is its position in the source's epochs
            source = int(order[place])
            before = block * self.counts[source] + (order[:place] == source).sum()
            epoch, i = divmod(int(before), len(self.sources[source].train_index))
            rows.append((number, source, int(self.shuffle(source, epoch)[i])))
        return rows

    def describe(self, rows):
        """Rows in words, to find a bad one."""
        # a source knows the files and lines of its rows
        return ", ".join(self.sources[source].rows.name(index) for _, source, index in rows)
