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
no, which are guessed most easily, `equalise` leaves exactly as many.

Most training questions are drawn from patterns (question_patterns.json, data/words.py), the others
have fixed wordings (questions.json). Two kinds are for evaluation only, and no pattern yields them:
held-out wordings, new sentences made of words that training has; and those off the templates
(off_template.json), as people write: polite or in a hurry, with typos, another word order and
irrelevant clauses.
"""

import json
import math
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np

from data.words import SHARE, expand, pick, vary

HERE = Path(__file__).parent
DATA = json.loads((HERE / "questions.json").read_text())
OFF_TEMPLATE = json.loads((HERE / "off_template.json").read_text())
WORDINGS = {  # {name: {"seen": [...], "held_out": [...], "off_template": [...]}}, by category and kind
    name: {**wordings, "off_template": OFF_TEMPLATE[name]}
    for name, wordings in DATA["wordings"].items()
}
PATTERNS = json.loads((HERE / "question_patterns.json").read_text())
ASIDES = PATTERNS.pop("before"), PATTERNS.pop("after")
STEPS = DATA["steps"]  # {name of the expert's step: what people call it}
CAUSES = DATA["causes"]  # {what can go wrong: its text, tasks, steps that go astray}
COLORS = DATA["things"]  # {label: color or None}, all that can be named; weights rest on the order
CATEGORIES = tuple(dict.fromkeys(name.split()[0] for name in WORDINGS))
KEYS = {"point": "point_2d", "box": "bbox_2d"}  # Qwen2.5-VL's
LETTERS = "ABCDEF"  # of options
HUES = 7  # colors of things, and of cubes
ENDS = {"nearest to": (0, 1), "farthest from": (-1, -2)}  # who lies there, and who might
ALWAYS = math.inf  # ahead: a robot or a task has one answer, and as many scenes as the others


def bare(text):
    """The letters of a text, to compare sentences without regard to spaces, slots and punctuation."""
    return re.sub("[^a-z]", "", text.lower())


KEPT = {  # sentences for evaluation only
    name: {bare(text) for text in wordings["held_out"] + wordings["off_template"]}
    for name, wordings in WORDINGS.items()
}


def draw_pattern(name, rng):
    """A sentence with its slots from PATTERNS[name], and never one that is for evaluation only."""
    while True:
        text = expand(pick(PATTERNS[name], rng), rng)
        if bare(text) not in KEPT[name]:
            return vary(text, rng, *ASIDES)


def plan_of(names, label):
    """These steps in words, each once."""
    # two steps of the expert may be one for people: to retreat takes it two movements
    return list(dict.fromkeys(STEPS[name].format(label) for name in names))


def numbered(texts):
    return " ".join(f"{i}. {text}" for i, text in enumerate(texts, start=1))


def clear_ends(order, where):
    """{word of ENDS: label} of labels by distance, where the next is 2.5 cm away at least."""
    clear = {}
    for word, (end, other) in ENDS.items():
        # x points away from the robot
        if len(order) > 1 and abs(where[order[end]][0] - where[order[other]][0]) > 0.025:
            clear[word] = order[end]
    return clear


def equalise(scenes):
    """Leave as many "yes" as "no" among the questions of all scenes that read alike."""
    there = Counter()
    taken = Counter()

    def alike(question, answer):
        return question["category"], question["about"], question["held_out"], answer

    def stays(question):
        if "about" not in question:
            return True
        # the first ones stay
        key = alike(question, question["answer"])
        taken[key] += 1
        return taken[key] <= min(there[alike(question, answer)] for answer in ("yes", "no"))

    for scene in scenes:
        there.update(alike(q, q["answer"]) for q in scene if "about" in q)
    for scene in scenes:
        scene[:] = filter(stays, scene)


class Asker:
    """Asks about many scenes, in wordings that are "seen", "held_out" or "off_template".

    `rng` draws wordings, forms and the order of options; `take` hands over what has been asked.
    """

    def __init__(self, rng, wordings="seen"):
        self.rng = rng
        self.wordings = wordings
        self.given = {}  # {what reads alike: Counter of its answers}
        self.questions = []

    def take(self):
        taken = self.questions
        self.questions = []
        return taken

    def ask(
        self,
        name,
        answer,
        labels=(),
        words=(),
        options=(),  # answers that can occur; none where answers are open
        forms=("words",),  # one is drawn
        about=None,  # what else tells questions apart; by default labels and words
        ahead=0,  # how many more than the rarest of the options this answer may have been given
        guesses=0,  # answers that are possible for one who does not see which options there are
        place=None,
    ):
        """Ask WORDINGS[name] about labels and words, unless this answer has been given too often."""
        words = (*labels, *words)
        about = about or words
        options = sorted(options)
        # whoever cannot see shall gain nothing from knowing what is usual
        if options and ahead < ALWAYS:
            given = self.given.setdefault((name, *about, *options), Counter())
            if given[answer] > min(given[option] for option in options) + ahead:
                return
            given[answer] += 1
        text = pick(WORDINGS[name][self.wordings], self.rng)
        if self.wordings == "seen" and self.rng.random() < SHARE:
            text = draw_pattern(name, self.rng)
        text = text.format(*words).replace(" a orange", " an orange")
        question = {
            "question": text,
            "answer": answer,
            "category": name.split()[0],
            "form": pick(forms, self.rng),
            "chance": 1 / (guesses or len(options)) if options else 0.0,
            "held_out": self.wordings != "seen",
            "labels": sorted(labels, key=text.index),  # some wordings turn them round
        }
        if place:
            question["place"] = place
        if question["form"] == "yes/no":
            question["about"] = " ".join(about)
        if question["form"] == "choice":
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

    def closed(self, name, answer, options, **more):
        """As words or as a choice, whichever the draw says; not with fewer than two options."""
        if len(set(options)) > 1:
            self.ask(
                name,
                answer,
                options=options,
                forms=("words", "choice"),
                **more,
            )

    def yes_no(self, name, truth, labels=(), **more):
        answer = "yes" if truth else "no"
        self.ask(
            name,
            answer,
            labels,
            options=("yes", "no"),
            forms=("yes/no",),
            **more,
        )

    def locate(self, name, form, numbers, label, **more):
        """Where is it? numbers: a point's x, y or a box's x1, y1, x2, y2, in pixels."""
        numbers = [int(number) for number in numbers]
        answer = json.dumps({KEYS[form]: numbers, "label": label})
        center = np.reshape(numbers, (-1, 2)).mean(0).tolist()
        self.ask(
            name,
            answer,
            [label],
            forms=(form,),
            place=center,
            **more,
        )

    # ---- about one picture, or one from each camera

    def arm(self, robot, robots):
        """Which robot is it, and how many joints has it? robots: the names of all."""
        self.closed("embodiment robot", robot.display_name, robots, ahead=ALWAYS)
        self.ask("embodiment joints", str(robot.dof), options=("6", "7"), ahead=ALWAYS)

    def things(self, seen, where, own):
        """What lies on the table, how it shows and where it lies.

        seen {view: {label: (x1, y1, x2, y2, how many pixels, x, y of its center)}};
        where {label: (3,) m}, the task's own things first; own: how many cubes the task has.
        """
        front = seen["front"]
        # a few pixels are enough to see it, not to deny it
        visible = [label for label in where if label in front and front[label][4] >= 6]
        for label in self.rng.permutation(list(COLORS)).tolist():
            if label in visible or label not in where:  # not where something hides it
                self.yes_no("existence", label in visible, [label])
        number = sum("cube" in label for label in visible)
        if own <= number <= own + 3:  # with at most three spare ones, and none hidden of its own
            counts = [str(own + more) for more in range(4)]
            self.ask("counting", str(number), options=counts, guesses=6)
        colors = [COLORS[label] for label in visible]
        for label, color in zip(visible, colors):
            if color and colors.count(color) == 1:  # else "the blue object" would be two
                shapes = {name.split()[-1] for name in COLORS if COLORS[name] == color}
                self.closed("attribute shape", label.split()[-1], shapes, words=[color])
        if len(visible) == len(where):  # what hides might be nearer
            self.order(where)
        self.pairs(visible, where, front)
        for view, shown in seen.items():
            for label, (*corners, pixels, x, y) in shown.items():
                x1, y1, x2, y2 = corners
                if pixels >= 8 and x1 <= x < x2 and y1 <= y < y2:  # not a corner that peeps out
                    self.locate("box", "box", corners, label, words=[view])
                    self.locate("point", "point", (x, y), label, words=[view])
        return visible

    def order(self, where):
        """What is nearest, what farthest, where nothing hides?"""
        order = sorted(where, key=lambda label: where[label][0])
        ends = clear_ends(order, where)
        for word, label in ends.items():
            self.closed(
                "nearest",
                label,
                order,
                words=[word],
                guesses=len(COLORS),
                place=label,
            )
        cubes = [label for label in order if "cube" in label]
        steps = ("approach", "descend", "grasp", "lift")  # as the expert picks one up
        plans = [numbered(plan_of(steps, cube)) for cube in cubes]
        for word, label in clear_ends(cubes, where).items():
            self.ask(
                "plan",
                plans[cubes.index(label)],
                words=[word],
                options=plans,
                forms=("steps",),
                guesses=HUES,
                place=label,
            )
        color = COLORS.get(ends.get("nearest to"))
        if color:
            colors = {COLORS[label] for label in order} - {None}
            self.closed("attribute color", color, colors, guesses=HUES)

    def pairs(self, visible, where, front):
        """Which is left, by 6 pixels at least, and which is nearer, by 2.5 cm?"""
        for a, b in permutations(visible, 2):
            step = sum(front[b][0:3:2]) - sum(front[a][0:3:2])  # twice that of their middles
            if abs(step) > 12:
                sides = ("left", "right")
                self.ask("spatial side", sides[step < 0], [a, b], options=sides)
            if abs(where[a][0] - where[b][0]) > 0.025:
                self.yes_no("spatial nearer", where[a][0] < where[b][0], [a, b])

    def grasp(self, label, ready, place):
        """Can it be grasped now, and where? place: (x, y) in pixels of the front view."""
        self.yes_no("affordance now", ready, [label])
        self.locate("affordance where", "point", place, label)

    # ---- about four pictures of an attempt; task and tasks: instructions

    def whole(self, task, tasks, wording, label, cause, causes):
        """About an attempt from beginning to end. cause: of its failure, or None."""
        self.closed("task", task, tasks, ahead=ALWAYS)  # by its first wording
        self.success(task, wording, cause is None)
        if cause:
            texts = {name: CAUSES[name]["text"].format(label) for name in causes}
            self.closed(
                "failure",
                texts[cause],
                texts.values(),
                ahead=3,
                words=[wording],
                about=[task],
            )

    def success(self, task, wording, success):
        # ahead: as many as one attempt gives
        self.yes_no("success", success, words=[wording], about=[task], ahead=3)

    def within(self, task, wording, label, phases, now):
        """At the end of step `now` of an attempt of these phases."""
        plan = plan_of(phases, label)
        at = plan.index(STEPS[now].format(label)) + 1
        if at == len(plan):  # nothing is next
            return
        # what could be left, whatever step this is
        left = [numbered(plan[first:]) for first in range(1, len(plan))]
        about = {"words": [wording], "about": [task]}
        self.closed("past", plan[at - 1], plan[:-1], about=[task])
        self.closed("next", plan[at], plan[1:], **about)
        self.ask(
            "remaining",
            left[at - 1],
            options=left,
            forms=("steps",),
            **about,
        )
