"""Questions about commands, for the scenes of commands.py.

    done       is this done? yes, or no
    possible   can this be done here? yes, or "no: there is no yellow ball"
    meant      what must be moved? its label, however the command words it
    where      the same, as a point in the front image
    goes       where it ends up, as a point
    goal       several commands in one sentence, to a numbered list of plain ones in their order

Wordings are in commands.json. A plain command names objects by their colors, in the first wording
of its task. Plans are written in plain commands, and so are the steps given to a policy.
"""

import json
from pathlib import Path

from data.families import BALL_COLORS, BIN_COLORS, is_new, plain
from data.tasks import RGBA
from data.words import pick
from nano.questions import numbered
from nano.scenes import class_of

WORDINGS = json.loads((Path(__file__).parent / "commands.json").read_text())
COLORS_OF = {"cube": list(RGBA), "ball": BALL_COLORS, "bin": BIN_COLORS}
KINDS = ("done", "possible", "meant", "where", "goes", "goal")
CHANCE = {  # probability that a guess is right; the others are open
    "done": 0.5,
    "possible": 0.5,
    "meant": 1 / len(RGBA),
}
NOT_DONE = 0.15  # share of scenes without a finished command that still get the question "done"


def absent(record, command, rng):
    """(things of the command, one of them replaced by an absent one; the absent one), or Nones."""
    present = set(record["things"])
    if "bin" in present:  # the bin of PlaceSphere is white
        present.add("white bin")
    choices = []
    for i, thing in enumerate(command["things"]):
        kind = thing.split()[-1]
        for color in COLORS_OF.get(kind, ()):
            missing = f"{color} {kind}"
            things = list(command["things"])
            things[i] = missing
            # not even to be refused: training must not contain combinations that are held out
            if missing not in present and not is_new(command["task"], things):
                choices.append((things, missing))
    if not choices:
        return None, None
    return choices[rng.integers(len(choices))]


class Asker:
    """Asks about the commands of a record; `rng` draws which ones, and the wordings."""

    def __init__(self, record, rng, held_out=False):
        self.record = record
        self.rng = rng
        self.wordings = "held_out" if held_out else "seen"
        self.questions = []

    def ask(self, kind, words, answer, form="words", labels=(), place=None):
        """Add a question, in the format of nano/questions.py."""
        text = pick(WORDINGS[kind][self.wordings], self.rng)
        question = {
            "question": text.format(words),
            "answer": answer,
            "category": kind,
            "form": form,
            "labels": list(map(class_of, labels)),
            "chance": CHANCE.get(kind, 0.0),
            "held_out": self.wordings != "seen",
        }
        if place:  # a label, or [x, y] in pixels
            question["place"] = place if isinstance(place, list) else class_of(place)
        self.questions.append(question)

    def words_of(self, command):
        """A command as it was recorded or, half of the time, plain."""
        # the judge of a plan's steps is given plain commands
        if self.rng.random() < 0.5:
            return command["instruction"]
        return plain(command["task"], command["things"])

    def all_kinds(self):
        """Questions of every kind that the record allows."""
        commands = self.record["commands"]
        self.ask_done(commands)
        # the command is drawn for each: the instruction alone must not give an answer away
        self.possible(pick(commands, self.rng))
        self.meant(pick(commands, self.rng))
        self.points(pick(commands, self.rng))
        if len(commands) > 1:
            self.goal(commands)
        return self.questions

    def ask_done(self, commands):
        done = [command for command in commands if command["done"]]
        others = [command for command in commands if not command["done"]]
        asked = done[:1]
        # over all scenes the two answers are about equally frequent
        if others and (done or self.rng.random() < NOT_DONE):
            asked.append(pick(others, self.rng))
        for command in asked:
            words = self.words_of(command)
            answer = "yes" if command["done"] else "no"
            self.ask("done", words, answer, "yes/no", command["things"])

    def possible(self, command):
        things, missing = absent(self.record, command, self.rng)
        # an absent object gets a plain command: other words would not tell which one is meant
        if missing and self.rng.random() < 0.5:
            words = plain(command["task"], things)
            self.ask("possible", words, f"no: there is no {missing}")
        else:
            words = self.words_of(command)
            self.ask("possible", words, "yes", labels=command["things"])

    def meant(self, command):
        label = command["things"][0]
        words = self.words_of(command)
        self.ask("meant", words, label, labels=[label], place=label)

    def points(self, command):
        """Where is the object to move, and where does it go?"""
        kinds = zip(("where", "goes"), command["things"], command["places"])
        for kind, label, place in kinds:
            if place:  # a peg goes nowhere
                x, y, _ = place
                point = [int(x), int(y)]
                answer = json.dumps({"point_2d": point, "label": label})
                words = self.words_of(command)
                self.ask(kind, words, answer, "point", [label], point)

    def goal(self, commands):
        """Two or three commands, in the order that the sentence gives."""
        number = self.rng.integers(2, 4)  # number of commands, if there are that many
        order = self.rng.permutation(len(commands))[:number]
        chosen = [commands[i] for i in order]
        # the last one is joined by words that may reverse the order
        words = ", then ".join(map(self.words_of, chosen[:-1]))
        join = pick(WORDINGS["joins"][self.wordings], self.rng)
        words = join.format(words, self.words_of(chosen[-1]))
        steps = [plain(command["task"], command["things"]) for command in chosen]
        self.ask("goal", words, numbered(steps), "steps")
