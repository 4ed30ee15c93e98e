"""What is asked about a scene: 17 categories, ten wordings each or more (questions.json).

A question is {"question", "answer", "category", "form", "chance", "held_out", "labels", ...}:
    form      "yes/no"; "words", a short text; "choice", one of the options that the question lists
              and then its letter, "green: B", in the order in which they can be found out; "point"
              and "box", pixels as Qwen2.5-VL writes them; "steps", a numbered list
    chance    how often a guess among the answers that the text leaves possible is right; 0: open
    labels    the things that it names, in the order of its text
    place     what its answer points at, if anything: a label, or [x, y] in pixels
    options   of a choice, in the order of their letters
    about     of yes and no: what else tells questions apart that read alike

None can be guessed without the pictures: `Asker.ask` counts the answers given so far to everything
that reads alike, and leaves out a question whose answer is ahead of its alternatives. Of yes and
no, which are guessed most easily, `equalise` leaves exactly as many. Held-out wordings are for
evaluation: new sentences, of words that the others have.

questions.json also says of each kind of question how it is asked:
    forms     of which one is drawn
    options   answers that can occur, where these are always the same
    guesses   answers that are possible for one who does not see which options there are
    ahead     how many more than the rarest of the options an answer may have been given; 0
    usual     counted by nobody: a robot or a task has one answer, and as many scenes as the others
    key       of the numbers in an answer, Qwen2.5-VL's
"""

import json
import string
from collections import Counter, defaultdict
from itertools import permutations
from pathlib import Path

import numpy as np

DATA = json.loads((Path(__file__).parent / "questions.json").read_text())
WORDINGS = DATA["wordings"]  # {name: {"seen": [...], "held_out": [...]}}, by category and kind
COLORS = DATA["things"]  # {label: color or None}, all that can be named; weights rest on the order
CATEGORIES = tuple(dict.fromkeys(name.split()[0] for name in WORDINGS))
LETTERS = string.ascii_uppercase  # of options, and of what patches show
NEAR = 0.025  # m: what lies less apart is not asked about
ASIDE = 6  # pixels, the same for left and right


def numbered(texts):
    return " ".join(f"{i}. {text}" for i, text in enumerate(texts, start=1))


def clear_ends(labels, where):
    """{"nearest to", "farthest from": label} of the robot, where no other lies about as far."""
    order = sorted(labels, key=lambda label: where[label][0])  # x points away from the robot
    ends = {}
    for word, way in (("nearest to", 1), ("farthest from", -1)):
        end, *others = order[::way] or [None]
        if others and abs(where[end][0] - where[others[0]][0]) > NEAR:
            ends[word] = end
    return ends


def equalise(scenes):
    """Leave as many "yes" as "no" among the questions of all scenes that read alike."""
    alike = defaultdict(lambda: {"yes": [], "no": []})
    for scene in scenes:
        for question in scene:
            if "about" in question:
                key = question["category"], question["about"], question["held_out"]
                alike[key][question["answer"]].append((scene, question))
    for answers in alike.values():
        few = min(map(len, answers.values()))
        for same in answers.values():
            for scene, question in same[few:]:  # the first ones stay
                scene.remove(question)


class Asker:
    """Asks about many scenes, in seen or held-out wordings.

    `rng` draws wordings, forms and the order of options; `take` hands over what has been asked.
    """

    def __init__(self, rng, held_out=False):
        self.rng = rng
        self.held_out = held_out
        self.given = defaultdict(Counter)  # {what reads alike: its answers}
        self.task = None  # of a clip: all questions about it are about its task, in any wording
        self.questions = []

    def take(self):
        taken = self.questions
        self.questions = []
        return taken

    def pick(self, choices):
        return choices[self.rng.integers(len(choices))]

    def ask(self, name, answer, labels=(), words=(), options=(), place=None):
        """Ask WORDINGS[name] about labels and words, unless this answer has been given too often.

        options: answers that can occur; none where answers are open.
        """
        kind = DATA["kinds"][name]
        words = about = (*labels, *words)
        if self.task:
            words = [self.pick(self.task.instructions)]
            about = self.task.instructions[:1]
        options = sorted(set(options or kind.get("options", ())))
        if len(options) == 1:  # it goes without saying
            return
        # whoever cannot see shall gain nothing from knowing what is usual
        if options and "usual" not in kind:
            given = self.given[name, *about, *options]
            if given[answer] > min(given[option] for option in options) + kind.get("ahead", 0):
                return
            given[answer] += 1
        text = self.pick(WORDINGS[name]["held_out" if self.held_out else "seen"])
        text = text.format(*words).replace(" a orange", " an orange")
        form = self.pick(kind["forms"])
        question = {
            "question": text,
            "answer": answer,
            "category": name.split()[0],
            "form": form,
            "chance": 1 / kind.get("guesses", len(options)) if options else 0.0,
            "held_out": self.held_out,
            "labels": sorted(labels, key=text.index),  # some wordings turn them round
        }
        if place:
            question["place"] = place
        if form == "yes/no":
            question["about"] = " ".join(about)
        if form == "choice":
            self.list_options(question, options)
        self.questions.append(question)

    def list_options(self, question, options):
        """Add the answer and at most three other options to a question, in any order."""
        answer = question["answer"]
        others = self.rng.permutation([option for option in options if option != answer])[:3]
        listed = self.rng.permutation([answer, *others]).tolist()
        for letter, option in zip(LETTERS, listed):
            question["question"] += f" {letter}) {option}"
        question["answer"] += f": {LETTERS[listed.index(answer)]}"
        question["chance"] = 1 / len(listed)  # the text leaves no more
        question["options"] = listed

    def yes_no(self, name, truth, labels=()):
        self.ask(name, "yes" if truth else "no", labels)

    def locate(self, name, numbers, label, *words):
        """Where is it? numbers: a point's x, y or a box's x1, y1, x2, y2, in pixels."""
        numbers = [int(number) for number in numbers]
        answer = json.dumps({DATA["kinds"][name]["key"]: numbers, "label": label})
        center = np.reshape(numbers, (-1, 2)).mean(0).tolist()
        self.ask(name, answer, [label], words, place=center)

    # ---- about one picture, or one from each camera

    def things(self, seen, where, own):
        """What lies on the table, how it shows and where it lies.

        seen {view: {label: (x1, y1, x2, y2, x, y of its center)}} in pixels; where {label: (3,) m},
        the task's own things first; own: how many cubes the task has.
        """
        visible = [label for label in where if label in seen["front"]]
        for label in COLORS:
            if label in visible or label not in where:  # not where something hides it
                self.yes_no("existence", label in visible, [label])
        # at most three spare ones, and none hidden of its own
        counts = [str(own + more) for more in range(4)]
        number = str(sum("cube" in label for label in visible))
        if number in counts:
            self.ask("counting", number, options=counts)
        colors = [COLORS[label] for label in visible]
        for label, color in zip(visible, colors):
            if color and colors.count(color) == 1:  # else "the blue object" would be two
                shapes = [name.split()[-1] for name in COLORS if COLORS[name] == color]
                self.ask("attribute shape", label.split()[-1], words=[color], options=shapes)
        if len(visible) == len(where):  # what hides might be nearer
            self.order(where)
        self.pairs(visible, where, seen["front"])
        for view, shown in seen.items():
            for label, (*corners, x, y) in shown.items():
                x1, y1, x2, y2 = corners
                if x1 <= x < x2 and y1 <= y < y2:  # not a corner that peeps out
                    self.locate("box", corners, label, view)
                    self.locate("point", (x, y), label, view)

    def order(self, where):
        """What is nearest, what farthest, where nothing hides?"""
        ends = clear_ends(where, where)
        for word, label in ends.items():
            self.ask("nearest", label, words=[word], options=where, place=label)
        plans = {label: DATA["plan"].format(label) for label in where if "cube" in label}
        for word, label in clear_ends(plans, where).items():
            self.ask("plan", plans[label], words=[word], options=plans.values(), place=label)
        color = COLORS.get(ends.get("nearest to"))
        if color:
            colors = {COLORS[label] for label in where} - {None}
            self.ask("attribute color", color, options=colors)

    def pairs(self, visible, where, front):
        """Which is left, and which is nearer?"""
        for a, b in permutations(visible, 2):
            *_, step, _ = np.subtract(front[b], front[a])  # pixels between their centers
            if abs(step) > ASIDE:
                self.ask("spatial side", "right" if step < 0 else "left", [a, b])
            if abs(where[a][0] - where[b][0]) > NEAR:
                self.yes_no("spatial nearer", where[a][0] < where[b][0], [a, b])
