"""Plan, then act: the same weights write a plan, carry it out step by step, and judge the result.

    answer   images and a goal in words -> the commands that it takes, in order
    act      carries out one command after another
    answer   judges whether each is done; if not in time, the arm goes back and tries again

    python sample.py --task mixed --goal "put the blue ball into the white bin, then stack the red cube on the green cube"

A command that the model calls impossible ("no: there is no yellow ball") is not started: the arm
stays in its rest pose. The simulator's state is never used here; eval.py plan compares against it.
"""

import re
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.tasks import MAX_STEPS
from rollout import EXECUTE_STEPS

TRIES = 2  # attempts per step, each as long as an episode
HOME_STEPS = 30  # control steps of the motion back to the rest pose
# questions in wordings that Stage I trains on (nano/commands.json)
LIST = "The goal: {}. List the commands."
IS_POSSIBLE = "Can this be done here: {}?"
IS_DONE = "Is this done: {}?"
# outcomes of a step, besides the reason why it was not started
DONE = "done"
GIVEN_UP = "given up"


@dataclass
class Step:
    """One command of a plan, its outcome, and the control steps that it took."""

    command: str
    outcome: str
    steps: int = 0


def pictures(env):
    return list(env.observe(render=True)["images"].values())


def write_plan(blm, images, goal):
    """The commands [str] that the model lists for a goal; [] if it lists none."""
    reply = blm.answer(images, LIST.format(goal))
    # "1. put ... 2. stack ...": a number inside a step is not followed by a period
    if not reply.startswith("1. "):
        return []
    return [step.strip() for step in re.split(r"\s*\d+\.\s+", reply) if step.strip()]


def why_not(blm, images, command):
    """Why a command cannot be done here, in the model's words; "" if it can."""
    reply = blm.answer(images, IS_POSSIBLE.format(command))
    if not reply.startswith("no"):
        return ""
    # "no: there is no yellow ball"
    return reply.removeprefix("no").lstrip(":, ") or "no"


def go_home(env):
    """Open the gripper, then move to the rest pose, where every demonstration started."""
    robot = env.robot
    start = env.data.ctrl[: robot.dof].copy()
    wait = np.zeros(6)  # first only the fingers move, which releases a held object where it is
    for part in [*wait, *np.linspace(0, 1, HOME_STEPS)]:
        joints = start + part * (robot.home - start)
        env.step([*joints, robot.travel])


def says_done(blm, env, command):
    """Does the model judge the command done? The same weights act and judge."""
    return blm.answer(pictures(env), IS_DONE.format(command)).startswith("yes")


def pursue(blm, env, command, is_done, execute_steps=EXECUTE_STEPS, after_step=lambda: None):
    """Act on a command until is_done(), at most TRIES times as long as an episode.

    Returns whether it is done, and how many control steps it took.
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
    """Yield a Step for each command as it ends; stop at the first that is not done.

    options of `pursue`: after_step() is called after every control step, for drawing.
    """
    for number, command in enumerate(commands):
        # checked only now: an earlier step may have changed what is possible
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
