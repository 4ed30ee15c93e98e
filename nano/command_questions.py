"""Questions about commands, asked of the scenes of commands.py.

    done       is this done? yes, or no
    possible   can this be done here? yes, or "no: there is no yellow ball"
    meant      what must be moved? its label, whatever words the command has for it
    where      the same as a point in the front picture
    goes       where it ends, as a point
    goal       several commands in a sentence to a numbered list of plain ones, in their order

Wordings are in commands.json. A plain command names things by their colors, in its task's first
wording: so a plan is written, and so a policy is told its steps.
"""

import json
from pathlib import Path

from data.families import BALL_COLORS, BIN_COLORS, is_new, plain
from data.tasks import RGBA
from nano.questions import numbered
from nano.scenes import class_of

WORDINGS = json.loads((Path(__file__).parent / "commands.json").read_text())
COLORS_OF = {"cube": list(RGBA), "ball": BALL_COLORS, "bin": BIN_COLORS}
KINDS = ("done", "possible", "meant", "where", "goes", "goal")
CHANCE = {  # of a guess; others are open
    "done": 0.5,
    "possible": 0.5,
    "meant": 1 / len(RGBA),
}
NOT_DONE = 0.15  # share of scenes without a finished command that are asked whether one is done


def absent(record, command, rng):
    """(things of the command with an absent one in place of another, the absent one), or Nones."""
    present = set(record["things"])
    if "bin" in present:  # that of PlaceSphere is white
        present.add("white bin")
    choices = []
    for i, thing in enumerate(command["things"]):
        kind = thing.split()[-1]
        for color in COLORS_OF.get(kind, ()):
            missing = f"{color} {kind}"
            things = list(command["things"])
            things[i] = missing
            # what training must not show is not even refused there
            if missing not in present and not is_new(command["task"], things):
                choices.append((things, missing))
    if not choices:
        return None, None
    return choices[rng.integers(len(choices))]


class Asker:
    """Asks about the commands of a record; `rng` draws which, and in which words."""

    def __init__(self, record, rng, held_out=False):
        self.record = record
        self.rng = rng
        self.wordings = "held_out" if held_out else "seen"
        self.questions = []

    def pick(self, choices):
        return choices[self.rng.integers(len(choices))]

    def ask(self, kind, words, answer, form="words", labels=(), place=None):
        """Add a question as nano/questions.py describes them."""
        text = self.pick(WORDINGS[kind][self.wordings])
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
        """A command as it was recorded or, as often, plain."""
        # a judge hears the steps of a plan, which are plain
        if self.rng.random() < 0.5:
            return command["instruction"]
        return plain(command["task"], command["things"])

    def all_kinds(self):
        """Questions of every kind that the record allows."""
        commands = self.record["commands"]
        self.ask_done(commands)
        # each of another command, or of the same: words alone must not give an answer away
        self.possible(self.pick(commands))
        self.meant(self.pick(commands))
        self.points(self.pick(commands))
        if len(commands) > 1:
            self.goal(commands)
        return self.questions

    def ask_done(self, commands):
        done = [command for command in commands if command["done"]]
        others = [command for command in commands if not command["done"]]
        asked = done[:1]
        # over all scenes there are about as many of each
        if others and (done or self.rng.random() < NOT_DONE):
            asked.append(self.pick(others))
        for command in asked:
            words = self.words_of(command)
            answer = "yes" if command["done"] else "no"
            self.ask("done", words, answer, "yes/no", command["things"])

    def possible(self, command):
        things, missing = absent(self.record, command, self.rng)
        # what is absent is named in plain words: nothing else tells what is meant
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
        """Where is what moves, and where does it go?"""
        kinds = zip(("where", "goes"), command["things"], command["places"])
        for kind, label, place in kinds:
            if place:  # a peg goes nowhere
                x, y, _ = place
                point = [int(x), int(y)]
                answer = json.dumps({"point_2d": point, "label": label})
                words = self.words_of(command)
                self.ask(kind, words, answer, "point", [label], point)

    def goal(self, commands):
        """Two or three commands, in an order that their words give."""
        number = self.rng.integers(2, 4)  # of commands, if there are so many
        order = self.rng.permutation(len(commands))[:number]
        chosen = [commands[i] for i in order]
        # the last one is joined in a way that may turn the order of the words round
        words = ", then ".join(map(self.words_of, chosen[:-1]))
        join = self.pick(WORDINGS["joins"][self.wordings])
        words = join.format(words, self.words_of(chosen[-1]))
        steps = [plain(command["task"], command["things"]) for command in chosen]
        self.ask("goal", words, numbered(steps), "steps")
