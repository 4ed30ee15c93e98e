"""Plan, then act: the same weights write a plan, carry it out step by step, and judge the result.

    answer   from the pictures and a goal in words: the commands that it takes, in order
    act      is told each of them in turn
    answer   looks whether it is done; if not in time, the arm goes back and tries again

    python sample.py --task mixed --goal "put the blue ball into the white bin, then stack the red cube on the green cube"

A command that the model calls impossible ("no: there is no yellow ball") is not begun: the arm
stays where it rests. What the simulator knows is never asked here; eval.py plan compares.
"""

import re
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.tasks import MAX_STEPS
from rollout import EXECUTE_STEPS

TRIES = 2  # of a step, each as long as an episode
HOME_STEPS = 30  # control steps back to the rest pose
# questions, in wordings that Stage I asks (nano/commands.json)
LIST = "The goal: {}. List the commands."
IS_POSSIBLE = "Can this be done here: {}?"
IS_DONE = "Is this done: {}?"
# outcomes of a step, beside the reason why it was not begun
DONE = "done"
GIVEN_UP = "given up"


@dataclass
class Step:
    """A command of a plan, what came of it, and the control steps that it took."""

    command: str
    outcome: str
    steps: int = 0


def pictures(env):
    return list(env.observe(render=True)["images"].values())


def write_plan(blm, images, goal):
    """The commands [str] that a goal takes, as the model lists them; [] if it lists none."""
    reply = blm.answer(images, LIST.format(goal))
    # "1. put ... 2. stack ...": a number inside a step has no full stop behind it
    if not reply.startswith("1. "):
        return []
    return [step.strip() for step in re.split(r"\s*\d+\.\s+", reply) if step.strip()]


def why_not(blm, images, command):
    """Why a command cannot be done here, in the model's words, or ""."""
    reply = blm.answer(images, IS_POSSIBLE.format(command))
    if not reply.startswith("no"):
        return ""
    # "no: there is no yellow ball"
    return reply.removeprefix("no").lstrip(":, ") or "no"


def go_home(env):
    """Open the hand, then move to the rest pose: from there the policy knows how to begin."""
    robot = env.robot
    start = env.data.ctrl[: robot.dof].copy()
    wait = np.zeros(6)  # first the fingers alone: what they hold is set free where it is
    for part in [*wait, *np.linspace(0, 1, HOME_STEPS)]:
        joints = start + part * (robot.home - start)
        env.step([*joints, robot.travel])


def says_done(blm, env, command):
    """The same weights that act look at what came of it."""
    return blm.answer(pictures(env), IS_DONE.format(command)).startswith("yes")


def pursue(blm, env, command, is_done, execute_steps=EXECUTE_STEPS, after_step=lambda: None):
    """Act on a command until is_done(), or TRIES times as long as an episode may be.

    Returns whether it is done, and the control steps that it took.
    """
    env.instruction = command
    taken = 0
    for _ in range(TRIES):
        env.steps = 0
        while env.steps < MAX_STEPS:
            chunk = blm.act(env.observe(render=True), env.robot.name)
            for action in chunk[:execute_steps]:
                env.step(action)
                after_step()
            if is_done():
                return True, taken + env.steps
        taken += env.steps
        go_home(env)
    return False, taken


def carry_out(blm, env, commands, **options):
    """Yield a Step for each command as it ends; it stops at the first that is not done.

    options of `pursue`: after_step() is called behind every control step, for whoever draws.
    """
    for number, command in enumerate(commands):
        # asked at its turn: an earlier step may have changed what is possible
        reason = why_not(blm, pictures(env), command)
        if reason:
            yield Step(command, reason)
            return
        is_done = partial(says_done, blm, env, command)
        done, steps = pursue(blm, env, command, is_done, **options)
        yield Step(command, DONE if done else GIVEN_UP, steps)
        if not done:
            return
        if number + 1 < len(commands):
            go_home(env)
