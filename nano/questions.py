"""What is asked about a scene: 17 categories, ten wordings each or more, six forms of answers, none of which can be guessed without the pictures.

A question is {"question", "answer", "category", "form", "chance"}. Forms: "yes/no"; "words", a short text; "choice", one of the options that the question
lists and then its letter, "green: B", in the order in which they can be found out; "point" and "box", pixels as Qwen2.5-VL writes them: {"point_2d": [x, y], "label": ...}, {"bbox_2d": [x1, y1, x2, y2], "label": ...}; "steps", a numbered list.
chance: how often a guess among the answers that the text leaves possible is right, 0 where answers are open.

`Asker.ask` keeps count of the answers given so far to everything that reads alike, and leaves out a question whose answer is ahead of its alternatives:
whoever has only the text gains little from what is usual; of yes and no, which are guessed most easily, `equalise` leaves exactly as many. The last two
wordings of each question are held out for evaluation: new sentences, of words that the others have.
"""
import json
from collections import Counter

import numpy as np

LETTERS = "ABCDEF"
HELD_OUT = 2                                         # wordings of each question that training never sees
CAUSES = ("missed", "dropped", "stopped", "beside")  # what can go wrong; CAUSE_TEXT says it in words
CAUSE_TEXT = {"missed": "the gripper missed the {}", "dropped": "the gripper dropped the {}", "stopped": "the robot stopped too early",
              "beside": "the {} ended beside its place"}
STEP_TEXT = {"approach": "move above the {}", "descend": "lower the gripper", "grasp": "close the gripper", "lift": "lift the {}", "carry": "carry the {}",
             "place": "set the {} down", "release": "open the gripper", "push": "push the {} forward", "pull": "pull the {} back", "turn": "turn the {} upright",
             "retreat": "move the gripper away"}
WORDINGS = {
    "attribute colour": ("What colour is the object nearest to the robot?", "Which colour has the object closest to the robot?",
                         "Name the colour of the object nearest to the robot.", "What is the colour of the object nearest to the robot?",
                         "Which colour is the object closest to the robot?", "What colour has the object closest to the robot?",
                         "Tell the colour of the object nearest to the robot.", "The object nearest to the robot: what is its colour?",
                         "The object closest to the robot has which colour?", "Of what colour is the object nearest to the robot?"),
    "attribute shape": ("What shape is the {} object?", "Which shape has the {} object?", "Name the shape of the {} object.", "What is the shape of the {} object?",
                        "What is the {} object?", "What kind of object is {}?", "Tell the shape of the {} object.", "The {} object: what is its shape?",
                        "The {} object has which shape?", "Of what shape is the {} object?"),
    "existence": ("Is there a {}?", "Can you see a {}?", "Is a {} on the table?", "Do you see a {}?", "Does a {} lie on the table?", "Is there a {} in view?",
                  "Does the picture show a {}?", "Can a {} be seen?", "Is a {} in the picture?", "Is there a {} on the table?"),
    "counting": ("Count the cubes.", "How many cubes do you see?", "How many cubes are on the table?", "Give the number of cubes.", "How many cubes does the picture show?",
                 "How many cubes can you see?", "What is the number of cubes?", "Tell how many cubes there are.", "How many cubes are there?", "Count the cubes on the table."),
    "spatial side": ("Is the {} left or right of the {}?", "On which side of the {1} is the {0}, left or right?", "Does the {} lie to the left or to the right of the {}?",
                     "Left or right: where is the {} from the {}?", "Is the {} on the left or on the right of the {}?", "To which side of the {1} lies the {0}, left or right?",
                     "Do you find the {} left or right of the {}?", "Seen from the {1}, is the {0} left or right?", "Is the {} to the left or to the right of the {}?",
                     "Where does the {} lie, left or right of the {}?"),
    "spatial nearer": ("Is the {} nearer to the robot than the {}?", "Does the {} lie nearer to the robot than the {}?", "Is the {}, not the {}, nearer to the robot?",
                       "Is the {} the nearer one to the robot, beside the {}?", "Do you find the {} nearer to the robot than the {}?",
                       "Of the two, is the {} nearer to the robot than the {}?", "Seen from the robot, is the {} nearer than the {}?",
                       "Do you see the {} closer to the robot than the {}?", "Is the {} closer to the robot than the {}?", "Does the {} lie closer to the robot than the {}?"),
    "nearest": ("Which object is {} the robot?", "What lies {} the robot?", "Name the object {} the robot.", "What is {} the robot?", "Which object lies {} the robot?",
                "What object is {} the robot?", "Tell which object is {} the robot.", "Which thing is {} the robot?", "Name what lies {} the robot.",
                "What object lies {} the robot?"),
    "point": ("Point to the {} in the {} view.", "Where is the {} in the {} view? Give a point.", "Locate the {} in the {} view with a point.",
              "Give a point on the {} in the {} view.", "Mark the {} in the {} view with a point.", "Point at the {} in the {} view.",
              "Show where the {} is in the {} view, as a point.", "Give the point of the {} in the {} view.", "Show a point on the {} in the {} view.",
              "Locate the {} in the {} view, as a point."),
    "box": ("Give the box of the {} in the {} view.", "Draw a box around the {} in the {} view.", "Where is the {} in the {} view? Give a box.",
            "Locate the {} in the {} view with a box.", "Mark the {} in the {} view with a box.", "Put a box around the {} in the {} view.",
            "Show where the {} is in the {} view, as a box.", "Frame the {} in the {} view with a box.", "Give a box around the {} in the {} view.",
            "Locate the {} in the {} view, as a box."),
    "affordance now": ("Can the gripper grasp the {} now, just by closing?", "Would closing the gripper now grasp the {}?", "Is the {} between the fingers, ready to be grasped?",
                       "If the gripper closes now, does it grasp the {}?", "Is the gripper in place to grasp the {}?", "Can the {} be grasped now, just by closing the gripper?",
                       "Is the {} ready to be grasped now?", "Does closing the gripper now grasp the {}?", "Would the gripper grasp the {} if it closes now?",
                       "Is the {} between the fingers now?"),
    "affordance where": ("Where should the gripper grasp the {}? Give a point in the front view.", "Give the point where the gripper should grasp the {} in the front view.",
                         "Point to where the {} should be grasped in the front view.", "At which point should the {} be grasped in the front view?",
                         "Mark where to grasp the {} in the front view with a point.", "Show where to grasp the {} in the front view, as a point.",
                         "Where is the {} to be grasped in the front view? Give a point.", "Locate where to grasp the {} in the front view with a point.",
                         "Give a point where the {} should be grasped in the front view.", "Mark with a point where the gripper should grasp the {} in the front view."),
    "task": ("What is the robot doing in these pictures?", "Which task is this?", "What task does the robot work on?", "What does the robot do in these pictures?",
             "Which task does the robot do?", "Name the task of the robot.", "Which task do these pictures show?", "What task is the robot at work on?",
             "What is the task in these pictures?", "Name this task."),
    "past": ("What has just been done?", "Which step has just been done?", "Name the last step.", "What did the robot do just now?",
             "What has the robot just done?", "What did the robot do last?", "Which step has the robot just done?", "Which step was the last one?",
             "Name the step that the robot has just done.", "What was the robot's last step?", "What step has just been done?", "What was the last step of the robot?",
             "Which step did the robot do last?", "Name the robot's last step."),
    "next": ("What is next, to {}?", "Which step is next to {}?", "To {}, what should the robot do now?", "The task: {}. Which step is next?",
             "The task: {}. What comes next?", "To {}, what is the next step?", "The robot shall {}. What should it do now?", "The task: {}. What is the next step?",
             "What should the robot do now to {}?", "What comes next, to {}?", "The robot is told to {}. Which step is next?", "In order to {}, which step comes next?",
             "The robot shall {}. What comes next?", "The task: {}. Which step comes next?"),
    "remaining": ("What steps are left to {}?", "What remains to be done to {}?", "List the steps left to {}.", "The task: {}. What steps are left?", "To {}, what steps remain?",
                  "Name the steps that are left to {}.", "The robot shall {}. What remains to be done?", "Which of the steps are still left to {}?",
                  "The task: {}. Which steps remain?", "To {}, which steps are left?", "The robot shall {}. Which steps remain?", "The task: {}. List the steps that are left.",
                  "Which steps remain to {}?", "The task: {}. Name the steps that remain.", "The robot is told to {}. Which steps are left?",
                  "In order to {}, which steps remain?", "Which steps are left, to {}?", "The robot shall {}. List the steps that remain."),
    "plan": ("The robot shall pick up the cube {} it. Plan the steps.", "Give the steps to pick up the cube {} the robot.", "Plan how to pick up the cube {} the robot.",
             "The task: pick up the cube {} the robot. Which steps does it take?", "List the steps to pick up the cube {} the robot.",
             "To pick up the cube {} it, which steps shall the robot do?", "The robot shall pick up the cube {} it. List the steps.",
             "Make a plan to pick up the cube {} the robot.", "The task: pick up the cube {} the robot. Plan the steps.",
             "Which steps does it take to pick up the cube {} the robot?"),
    "future": ("Pictures 1 and 2 are in order. Which comes next, 3 or 4?", "After pictures 1 and 2, which comes next, 3 or 4?",
               "The first two pictures are in order. Is the next one 3 or 4?", "What comes after pictures 1 and 2, picture 3 or picture 4?",
               "Which of 3 and 4 comes after pictures 1 and 2?", "Does picture 3 or picture 4 come next after 1 and 2?", "Which picture follows pictures 1 and 2, 3 or 4?",
               "Given pictures 1 and 2, which one is next, 3 or 4?", "Which picture comes next after 1 and 2: 3 or 4?",
               "Pictures 1 and 2 are in order. Is picture 3 or picture 4 the next?"),
    "success": ("Has the robot done what it was told: {}?", "Is the task finished: {}?", "Did the robot finish this: {}?", "Has the robot managed to {}?", "Has this been done: {}?",
                "Did the robot do this: {}?", "Is this task done: {}?", "Has the arm done it: {}?",
                "The task: {}. Is it done?", "Did the robot {}?", "Is this finished: {}?", "The robot shall {}. Is it done?", "The task: {}. Has the robot finished?",
                "Is it done: {}?", "The task: {}. Did the robot do it?", "The robot was told to {}. Is it done?", "Has the robot done this: {}?", "Has the robot finished: {}?"),
    "failure": ("Why has the robot failed to {}?", "What kept the robot from this: {}?", "The robot failed to {}. Why?", "This is not done: {}. Why not?",
                "The task: {}. What went wrong?", "Why did the robot not {}?", "The robot should {}. Why is it not done?", "What went wrong when the robot should {}?",
                "The robot shall {}. What went wrong?", "The task: {}. Why did the robot fail?", "The robot was told to {}. What went wrong?", "Why is this not done: {}?",
                "The task: {}. Why is it not done?", "Why did the robot fail to {}?"),
    "embodiment robot": ("Which robot is this?", "Name the robot.", "What robot do you see?", "What robot is this?", "What is the name of this robot?", "Which robot is at work?",
                         "Tell which robot this is.", "Which robot does the picture show?", "Which robot do you see?", "Name this robot."),
    "embodiment joints": ("How many joints does this arm have?", "How many joints has this robot?", "Count the joints of the arm.", "Give the number of joints of this arm.",
                          "How many joints has this arm?", "What is the number of joints of this arm?", "Tell how many joints this arm has.",
                          "How many joints are there in this arm?", "How many joints does the robot have?", "Count the joints of this robot."),
    "embodiment moving": ("Does the arm move from the first picture to the last?", "Has the arm moved between the first picture and the last?",
                          "Do the arm's joints move in these pictures?", "Is the arm moving in these pictures?", "Does the arm move in these pictures?",
                          "Do the joints of the arm move from the first picture to the last?", "Have the arm's joints moved in these pictures?",
                          "Does the robot's arm move between these pictures?", "Has the arm moved from the first picture to the last?",
                          "Is the arm moving from the first picture to the last?"),
}
CATEGORIES = tuple(dict.fromkeys(name.split()[0] for name in WORDINGS))


def point(x, y, label):
    return json.dumps({"point_2d": [int(x), int(y)], "label": label})


def box(corners, label):
    return json.dumps({"bbox_2d": [int(v) for v in corners], "label": label})


def steps(names, label):
    """A numbered list of STEP_TEXT's steps; repetitions of one step in a row count once."""
    texts = list(dict.fromkeys(STEP_TEXT[name].format(label) for name in names))
    return " ".join(f"{i}. {text}" for i, text in enumerate(texts, start=1))


def equalise(scenes):
    """Lists of questions without those "yes" or "no" that are one too many, among all that ask the same about other pictures."""
    same = lambda question: (question["category"], question["about"], question.get("held_out"))
    given = Counter((same(q), q["answer"]) for scene in scenes for q in scene if "about" in q)
    left = {(alike, answer): min(given[alike, "yes"], given[alike, "no"]) for alike, _ in given for answer in ("yes", "no")}

    def stays(question):
        if "about" not in question:
            return True
        left[same(question), question["answer"]] -= 1
        return left[same(question), question["answer"]] >= 0

    return [[question for question in scene if stays(question)] for scene in scenes]


class Asker:
    """Makes the questions of many scenes, in seen or held-out wordings; `rng` chooses wordings, forms and the order of options."""

    def __init__(self, rng, held_out=False):
        self.rng, self.held_out, self.given = rng, held_out, {}

    def ask(self, name, answer, words=(), options=(), forms=("words",), about=(), ahead=0, unseen=()):
        """A question of WORDINGS[name] about `words`, or None if its answer is more than `ahead` of the rarest of its `options`.

        options: the answers that can occur, `answer` among them; none where answers are open. forms: one is drawn. about: what else tells questions apart.
        ahead=inf: the answer is the same for a robot and task, and the corpus has as much of each. unseen: the answers that are possible for one who does not
        see which `options` there are.
        """
        options = sorted(options)
        if options and ahead < np.inf:
            given = self.given.setdefault((name, *about, *options), Counter())
            if given[answer] > min(given[option] for option in options) + ahead:
                return None
            given[answer] += 1
        wordings = WORDINGS[name]
        chosen = wordings[-HELD_OUT:] if self.held_out else wordings[:-HELD_OUT]
        question, form = chosen[self.rng.integers(len(chosen))].format(*words).replace(" a orange", " an orange"), forms[self.rng.integers(len(forms))]
        if form == "choice":
            listed = [answer, *self.rng.permutation([option for option in options if option != answer])[:3]]
            listed = [str(option) for option in self.rng.permutation(listed)]
            question += " " + " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, listed))
            return {"question": question, "answer": f"{answer}: {LETTERS[listed.index(answer)]}", "category": name.split()[0], "form": form, "chance": 1 / len(listed)}
        made = {"question": question, "answer": answer, "category": name.split()[0], "form": form, "chance": 1 / len(unseen or options) if options else 0.0}
        return made | {"about": " ".join(about)} if form == "yes/no" else made

    def closed(self, name, answer, options, words=(), about=(), ahead=0, unseen=()):
        """As words or as a choice, whichever the draw says; None with fewer than two options."""
        return self.ask(name, answer, words, options, ("words", "choice"), about, ahead, unseen) if len(set(options)) > 1 else None

    def yes_no(self, name, truth, words=(), about=(), ahead=0):
        return self.ask(name, "yes" if truth else "no", words, ("yes", "no"), ("yes/no",), about or tuple(words), ahead)

    # ---- about one picture, or one from each camera

    def picture(self, seen, bodies, where, colours, grasps, arm, own):
        """Questions about a moment, a list of them with many left out by the balance.

        seen {view: {label: (x1, y1, x2, y2, pixels, x, y of its centre)}}; bodies: labels on the table, the task's own first; where {label: (3,) m} of those;
        colours {label: colour or None}; grasps {label: (ready to be grasped bool, (x, y) pixels in the front view)}; arm (name, joints, names of all robots);
        own: how many cubes the task has itself.
        """
        rng, found, front = self.rng, [], seen["front"]
        visible = [label for label in bodies if front.get(label, (0,) * 5)[4] >= 6]
        found.append(self.closed("embodiment robot", arm[0], arm[2], ahead=np.inf))
        found.append(self.ask("embodiment joints", str(arm[1]), (), ("6", "7"), ahead=np.inf))
        for label in rng.permutation(sorted(colours)).tolist():
            if label in visible or label not in bodies:              # not where something hides it
                found.append(self.yes_no("existence", label in visible, (label,)))
        number = sum("cube" in label for label in visible)
        found.append(self.ask("counting", str(number), (), [str(n) for n in range(own, own + 4)], unseen=range(6)) if own <= number <= own + 3 else None)      # a task has two at most
        for label in visible:
            same = [other for other in visible if colours[other] == colours[label]]
            if colours[label] and len(same) == 1:
                shapes = {name.split()[-1] for name, colour in colours.items() if colour == colours[label]}
                found.append(self.closed("attribute shape", label.split()[-1], shapes, (colours[label],), (colours[label],)))
        order = sorted(visible, key=lambda label: where[label][0])
        if len(order) > 1 and len(visible) == len(bodies):                # nothing hides
            gap = lambda a, b: where[b][0] - where[a][0] > 0.025
            ends = [("nearest to", order[0], gap(order[0], order[1])), ("farthest from", order[-1], gap(order[-2], order[-1]))]
            for word, label, clear in ends:
                if clear:
                    found.append(self.closed("nearest", label, order, (word,), (word,), unseen=colours))
            cubes = [label for label in order if "cube" in label]
            for word, a, b, label in (("nearest to", 0, 1, 0), ("farthest from", -2, -1, -1)):
                if len(cubes) > 1 and gap(cubes[a], cubes[b]):
                    plans = [steps(("approach", "descend", "grasp", "lift"), other) for other in cubes]
                    found.append(self.ask("plan", plans[label], (word,), plans, ("steps",), (word,), unseen=[other for other in colours if "cube" in other]))
            if ends[0][2] and colours[order[0]]:
                found.append(self.closed("attribute colour", colours[order[0]], {colours[label] for label in order if colours[label]},
                                         unseen=set(filter(None, colours.values()))))
        for a in visible:
            for b in visible:
                if a != b and abs(front[a][0] + front[a][2] - front[b][0] - front[b][2]) > 12:
                    found.append(self.ask("spatial side", "left" if front[a][0] + front[a][2] < front[b][0] + front[b][2] else "right", (a, b), ("left", "right"), ("words",), (a, b)))
                if a != b and abs(where[a][0] - where[b][0]) > 0.025:
                    found.append(self.yes_no("spatial nearer", where[a][0] < where[b][0], (a, b)))
        for view, shown in seen.items():
            for label, (x1, y1, x2, y2, pixels, x, y) in shown.items():
                if pixels >= 8 and x1 <= x < x2 and y1 <= y < y2:             # not a corner that peeps out
                    found.append(self.ask("box", box((x1, y1, x2, y2), label), (label, view), (), ("box",)))
                    found.append(self.ask("point", point(x, y, label), (label, view), (), ("point",)))
        for label, (ready, at) in grasps.items():
            if label in visible:
                found.append(self.yes_no("affordance now", ready, (label,)))
                found.append(self.ask("affordance where", point(*at, label), (label,), (), ("point",)))
        return [question for question in found if question]

    # ---- about four pictures of an attempt

    def whole(self, task, tasks, wording, label, success, cause, causes, moved):
        """Questions about an attempt from beginning to end. task and tasks: instructions; cause: of its failure, or None."""
        found = [self.closed("task", task, tasks, ahead=np.inf), self.yes_no("success", success, (wording,), (task,), ahead=3)]      # as many as an attempt gives
        if cause:
            texts = [CAUSE_TEXT[name].format(label) for name in causes]
            found.append(self.closed("failure", CAUSE_TEXT[cause].format(label), texts, (wording,), (task,), ahead=3))
        return [question for question in [*found, self.yes_no("embodiment moving", moved, (), ("moving",))] if question]

    def within(self, task, wording, label, phases, now):
        """Questions at the end of step `now` of an attempt of `phases`."""
        plan = list(dict.fromkeys(STEP_TEXT[name].format(label) for name in phases))
        at = plan.index(STEP_TEXT[phases[now]].format(label))
        found = [self.closed("past", plan[at], plan[:-1], (), (task,))] if at + 1 < len(plan) else []
        if at + 1 < len(plan):
            left = [" ".join(f"{i}. {text}" for i, text in enumerate(plan[first:], start=1)) for first in range(1, len(plan))]
            found.append(self.closed("next", plan[at + 1], plan[1:], (wording,), (task,)))
            found.append(self.ask("remaining", left[at], (wording,), left, ("steps",), (task,)))
        return [question for question in found if question]

    def future(self, third):
        """Is the third picture the next one, or the fourth?"""
        return [question for question in [self.ask("future", "3" if third else "4", (), ("3", "4"))] if question]


def is_right(question, reply):
    """Points: within 5 px, half a cube in the front view. Boxes: an intersection over union of 0.5. All else: the very words."""
    if question["form"] == "point":
        return distance(reply, question["answer"]) <= 5
    return overlap(reply, question["answer"]) >= 0.5 if question["form"] == "box" else reply.strip() == question["answer"]


def distance(given, answer):
    """Pixels between the points of two answers; infinite if one has none."""
    try:
        return float(np.hypot(*np.subtract(json.loads(given)["point_2d"], json.loads(answer)["point_2d"])))
    except (ValueError, KeyError, TypeError):
        return np.inf


def overlap(given, answer):
    """Intersection over union of two answers' boxes; 0 if one has none."""
    try:
        a, b = (np.array(json.loads(text)["bbox_2d"], float) for text in (given, answer))
        inner = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
        return inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner)
    except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
        return 0.0
