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

import numpy as np

from data.tasks import MAX_STEPS
from rollout import EXECUTE_STEPS

TRIES = 2  # of a step, each as long as an episode
HOME_STEPS = 30  # control steps back to the rest pose
LISTED = "The goal: {}. List the commands."
POSSIBLE = "Can this be done here: {}?"
DONE = "Is this done: {}?"


@dataclass
class Step:
    """A command of a plan, and what came of it: "done", or why not; control steps that it took."""

    command: str
    outcome: str
    steps: int = 0


def pictures(env):
    return list(env.observe(render=True)["images"].values())


def write_plan(blm, images, goal):
    """The commands [str] that a goal takes, as the model lists them; [] if it lists none."""
    reply = blm.answer(images, LISTED.format(goal))
    # "1. put ... 2. stack ...": a number inside a step has no full stop behind it
    if not reply.startswith("1. "):
        return []
    return [step.strip() for step in re.split(r"\s*\d+\.\s+", reply) if step.strip()]


def why_not(blm, images, command):
    """Why a command cannot be done here, in the model's words, or ""."""
    reply = blm.answer(images, POSSIBLE.format(command))
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


def attempt(blm, env, command, execute_steps, after_step):
    """Act until the model sees the command done or the time is over: (done, control steps)."""
    env.instruction = command
    env.steps = 0
    while env.steps < MAX_STEPS:
        chunk = blm.act(env.observe(render=True), env.robot.name, seed=[0, env.steps])
        for action in chunk[:execute_steps]:
            env.step(action)
            after_step()
        # the same weights that act look at what came of it
        if blm.answer(pictures(env), DONE.format(command)).startswith("yes"):
            return True, env.steps
    return False, env.steps


def carry_out(blm, env, commands, execute_steps=EXECUTE_STEPS, after_step=lambda: None):
    """Yield a Step for each command as it ends; it stops at the first that is not done.

    after_step() is called behind every control step, for whoever draws or watches.
    """
    for number, command in enumerate(commands):
        # asked at its turn: an earlier step may have changed what is possible
        reason = why_not(blm, pictures(env), command)
        if reason:
            yield Step(command, reason)
            return
        taken = 0
        for _ in range(TRIES):
            done, steps = attempt(blm, env, command, execute_steps, after_step)
            taken += steps
            if done:
                break
            go_home(env)
        yield Step(command, "done" if done else "given up", taken)
        if not done:
            return
        if number + 1 < len(commands):
            go_home(env)
