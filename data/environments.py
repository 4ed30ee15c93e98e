"""The simulators that a policy is recorded, evaluated and watched in, and what each must have.

    tabletop     this repository's own (data/env.py): four arms, six tasks, families of scenes
    metaworld    Meta-World's 50 tasks (data/metaworld.py), with packages of its own
    libero       20 tasks of LIBERO (data/libero.py), with packages of its own
    maniskill    ManiSkill's six tasks of the Panda (data/maniskill.py), with packages of its own

An environment is an object with

    robot         name, display_name, dof (the leading numbers of the state that move it)
    embodiment    what its numbers are (embodiment.py); the tabletop's arms have the usual one
    scene         the task, or the family of scenes (data/families.py), which is then in `family`
    task          what is to be done; its name
    instruction   the sentence of this episode; steps: its control steps so far
    hz            control steps a second; horizon: control steps of an episode
    reset(seed, instruction=None) -> observation, info
    step(action (A,)) -> observation, reward, terminated, truncated, info {"success", "clipped"}
    observe(render) -> {"images": {view: (size, size, 3) uint8}, "state": (S,) float32, "instruction"}
    state() -> (S,) float32
    draw(view, size, pretty) -> a picture; the view "render" is for people
    held() -> bool, has the hand got what the task is about; why(held) -> why it failed, in words
    close()

and its expert is a function (env, seed, noise, command, reset) -> Demonstration (data/expert.py).
Episodes name the robot, and policies the robots they know, so training asks for no environment.
"""

from dataclasses import dataclass
from importlib import import_module

import numpy as np

from cli import choose, choose_many

ENVIRONMENTS = ("tabletop", "metaworld", "libero", "maniskill")


@dataclass(frozen=True)
class Arm:
    """What a rollout asks of a robot."""

    name: str
    display_name: str
    dof: int  # numbers of the state that say where the hand is


@dataclass(frozen=True)
class Task:
    """A task of a package: tier is its difficulty or suite; sentence is what the policy is told."""

    name: str
    tier: str
    horizon: int  # control steps
    sentence: str


class PackageEnv:
    """What environments of other people's packages share: one task, told by a sentence.

    Each sets hz, robot and embodiment, and has state(), draw(view), reset and step. tasks: {name: its
    name, tier, horizon and sentence}. render=False leaves the images out; blind=True puts noise in
    their place. UserError on an unknown task.
    """

    family = None

    def __init__(self, tasks, task, render=True, blind=False):
        self.scene = choose(task, tasks, "task")
        self.task = tasks[task]
        self.number = list(tasks).index(task)  # among the package's, for random streams
        self.horizon = self.task.horizon
        self.render = render
        self.blind = blind

    def start_episode(self, seed, instruction):
        """Start the time and the noise of an episode that is laid out: what `reset` returns."""
        self.instruction = instruction or self.task.sentence
        self.steps = 0
        self.static = np.random.default_rng([seed, self.number])  # pictures of noise
        return self.observe(), {}

    def read_action(self, action):
        """(A,) from -1 to 1. ValueError if the action has another shape, or is not finite."""
        action = np.asarray(action, float)
        size = self.embodiment.action_dim
        if action.shape != (size,) or not np.isfinite(action).all():
            raise ValueError(f"{self.robot.name} takes {size} finite numbers, not {action}")
        return np.clip(action, -1, 1)

    def count_step(self, reward, success, render):
        """What `step` returns, once the physics are done."""
        self.steps += 1
        success = bool(success)
        truncated = self.steps >= self.horizon and not success
        info = {"success": success, "clipped": {}}
        return self.observe(render), reward, success, truncated, info

    def observe(self, render=None):
        images = {}
        if self.render if render is None else render:
            images = {view: self.draw(view) for view in self.embodiment.views}
        if self.blind:
            for image in images.values():
                image[:] = self.static.integers(0, 256, image.shape)
        return {"images": images, "state": self.state(), "instruction": self.instruction}


def simulator(environment):
    """The module of somebody else's: its ENVIRONMENT, ROBOT, TASKS, HZ and PACKAGES.

    UserError if it needs packages that are not there: the tabletop does without.
    """
    return import_module(f"data.{environment}")


def names_in(environment):
    """(robots, tasks, further scenes) that an environment has. UserError if there is no such one."""
    if choose(environment, ENVIRONMENTS, "environment") != "tabletop":
        module = simulator(environment)
        return (module.ROBOT.name,), tuple(module.TASKS), ()
    from data.families import FAMILIES
    from data.robots import ROBOTS
    from data.tasks import TASKS

    return ROBOTS, tuple(TASKS), tuple(FAMILIES)


def cells_of(config):
    """(robots, scenes) that config's env, robots and tasks name; all tasks are without families."""
    robots, tasks, families = names_in(config.env)
    chosen = choose_many(config.robots, robots, "robot")
    if config.tasks == "all":
        return chosen, list(tasks)
    return chosen, choose_many(config.tasks, [*tasks, *families], "task")


def open_environment(environment, robot, scene, **options):
    """One of the classes' objects; options are the tabletop's own (data/env.py)."""
    if environment != "tabletop":
        return simulator(environment).ENVIRONMENT(scene, **options)
    from data.env import TabletopEnv

    return TabletopEnv(robot, scene, **options)


def expert_of(environment):
    """The function that demonstrates there."""
    if environment == "metaworld":
        return simulator(environment).demonstrate
    if environment == "libero":
        from data.libero_expert import demonstrate
    else:  # of the tabletop, which also knows ManiSkill's tasks
        from data.expert import demonstrate
    return demonstrate
