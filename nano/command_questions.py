"""Questions about commands, asked of the scenes of commands.py: what knowledge of the digital space is for.

    done       is this done? yes, or no
    possible   can this be done here? yes, or "no: there is no yellow ball"
    meant      which thing must be moved? its label, whatever words the command uses for it
    where      the same as a point in the front picture; `goes`: the point where it ends
    goal       several commands in one sentence to a numbered list of plain commands, in their order

The wordings are in commands.json. A plain command names things by their colors and is written in
its task's first wording (data/wordings.json): that is how a plan is written, and how a policy is
told its steps.
"""

import json
from pathlib import Path

import numpy as np

from data.conversations import Row
from data.families import BALL_COLORS, BIN_COLORS, NEW
from data.tasks import RGBA, TASKS
from nano.commands import Commands
from nano.questions import numbered

WORDINGS = json.loads((Path(__file__).parent / "commands.json").read_text())
COLORS_OF = {"cube": list(RGBA), "ball": BALL_COLORS, "bin": BIN_COLORS}
KINDS = ("done", "possible", "meant", "where", "goes", "goal")


def plain(task, things):
    """A command in its task's first wording, things [label, ...] by their colors."""
    roles = TASKS[task].labels
    names = {role: f"the {thing}" for role, thing in zip(roles, things)}
    return TASKS[task].commands[0].format(**names)


def is_new(task, things):
    named = [thing for thing in things if thing not in ("target", "green marker")]
    return [task, *named] in NEW


def absent(record, command, rng):
    """(things of the command with one that is not on the table in place of another, that one)."""
    places = []
    for i, thing in enumerate(command["things"]):
        kind = thing.split()[-1]
        for color in COLORS_OF.get(kind, ()):
            other = f"{color} {kind}"
            things = [*command["things"]]
            things[i] = other
            there = other in record["things"] or (
                other == "white bin" and "bin" in record["things"]
            )
            if not there and not is_new(command["task"], things):
                places.append((things, other))
    return places[rng.integers(len(places))] if places else (None, None)


class Asker:
    """Questions about a record's commands. `rng` draws everything; held_out takes other wordings."""

    def __init__(self, record, rng, held_out=False):
        self.record = record
        self.rng = rng
        self.wordings = "held_out" if held_out else "seen"
        self.questions = []

    def pick(self, choices):
        return choices[self.rng.integers(len(choices))]

    def ask(self, kind, words, answer, form="words", labels=(), place=None):
        text = self.pick(WORDINGS[kind][self.wordings]).format(words)
        question = {"question": text, "answer": answer, "category": kind, "form": form}
        question |= {"labels": list(labels), "held_out": self.wordings != "seen"}
        if place:
            question["place"] = place
        self.questions.append(question)

    def words_of(self, command):
        """As it was recorded, or plain."""
        if self.rng.random() < 0.5:
            return command["instruction"]
        return plain(command["task"], command["things"])

    def all_kinds(self):
        commands = self.record["commands"]
        done = [command for command in commands if command["done"]]
        others = [command for command in commands if not command["done"]]
        if done:
            self.done(done[0])
        # as many of each, over all scenes
        if others and self.rng.random() < (1.0 if done else 0.15):
            self.done(self.pick(others))
        self.possible(self.pick(commands))
        self.meant(self.pick(commands))
        self.points(self.pick(commands))
        if len(commands) > 1:
            self.goal(commands)
        return self.questions

    def done(self, command):
        self.ask("done", self.words_of(command), "yes" if command["done"] else "no", "yes/no",
                 command["things"])  # fmt: skip

    def possible(self, command):
        things, missing = absent(self.record, command, self.rng)
        if missing and self.rng.random() < 0.5:
            self.ask("possible", plain(command["task"], things), f"no: there is no {missing}")
        else:
            self.ask("possible", self.words_of(command), "yes", labels=command["things"])

    def meant(self, command):
        label, *_ = command["things"]
        self.ask("meant", self.words_of(command), label, labels=[label], place=label)

    def points(self, command):
        kinds = zip(("where", "goes"), command["things"], command["places"])
        for kind, label, place in kinds:
            if place:
                x, y, _ = place
                answer = json.dumps({"point_2d": [int(x), int(y)], "label": label})
                self.ask(kind, self.words_of(command), answer, "point", [label], [int(x), int(y)])

    def goal(self, commands):
        """Two or three commands, in an order that their words give."""
        number = min(len(commands), int(self.rng.integers(2, 4)))
        chosen = [commands[i] for i in self.rng.permutation(len(commands))[:number]]
        words = self.words_of(chosen[0])
        for command in chosen[1:-1]:
            words += f", then {self.words_of(command)}"
        words = self.pick(WORDINGS["joins"][self.wordings]).format(words, self.words_of(chosen[-1]))
        steps = [plain(command["task"], command["things"]) for command in chosen]
        self.ask("goal", words, numbered(steps))


class CommandQuestions(Commands):
    """The same scenes as rows of pictures and then questions; as many at most, drawn anew each time."""

    questions = 4

    def validation(self):
        return CommandQuestions(self.folder, "val")

    def texts(self):
        rng = np.random.default_rng(0)
        for record in self.records:
            for question in Asker(record, rng).all_kinds():
                yield from (question["question"], question["answer"])

    def row(self, i, seed=None):
        record = self.records[i]
        rng = np.random.default_rng([9, i] if seed is None else [seed[0], 4, seed[1]])
        questions = Asker(record, rng, held_out=seed is None and i % 2 > 0).all_kinds()
        if seed is not None:
            questions = [questions[n] for n in rng.permutation(len(questions))[: self.questions]]
        media = self.media(record)
        pictures = [{"type": kind} for kind, _ in media]
        conversations = []
        for question in questions:
            text = {"type": "text", "text": question["question"]}
            turns = [{"role": "user", "content": [*pictures, text]}]
            conversations.append([*turns, {"role": "assistant", "content": question["answer"]}])
        return Row(conversations, media, {"grounding": record["grounding"], "questions": questions})
