"""The simulators that policies are recorded, evaluated and watched in, and their interface.

    tabletop     this repository's own (data/env.py): four arms, six tasks, families of scenes
    metaworld    Meta-World's 50 tasks (data/metaworld.py), with extra packages
    libero       20 tasks of LIBERO (data/libero.py), with extra packages
    maniskill    ManiSkill's six tasks of the Panda (data/maniskill.py), with extra packages

An environment is an object with

    robot         name, display_name, dof (how many leading numbers of the state move it)
    embodiment    the meaning of its numbers (embodiment.py); the tabletop's arms use the default
    scene         the task, or the family of scenes (data/families.py), which is then in `family`
    task          what is to be done; its name
    instruction   the sentence of this episode; steps: its control steps so far
    hz            control steps per second; horizon: control steps of an episode
    reset(seed, instruction=None) -> observation, info
    step(action (A,)) -> observation, reward, terminated, truncated, info {"success", "clipped"}
    observe(render) -> {"images": {view: (size, size, 3) uint8}, "state", "instruction"}
    state() -> (S,) float32
    draw(view, size, pretty) -> an image; the view "render" is for people
    held() -> bool, does the gripper hold the task's object; why(held) -> why it failed, in words
    close()

and its expert is a function (env, seed, noise, command, reset) -> Demonstration (data/expert.py).
Episodes name their robot, and policies the robots they know, so training needs no environment.
"""

from dataclasses import dataclass
from importlib import import_module

import numpy as np

from cli import choose, choose_many

ENVIRONMENTS = ("tabletop", "metaworld", "libero", "maniskill")


@dataclass(frozen=True)
class Arm:
    """What a rollout needs to know about a robot."""

    name: str
    display_name: str
    dof: int  # leading numbers of the state that give the hand's pose


@dataclass(frozen=True)
class Task:
    """A task of a package: tier is its difficulty or suite; sentence is the instruction."""

    name: str
    tier: str
    horizon: int  # control steps
    sentence: str


class PackageEnv:
    """What the environments of other packages share: one task, given by a sentence.

    Each sets hz, robot and embodiment, and has state(), draw(view), reset and step. tasks: {name:
    its name, tier, horizon and sentence}. render=False leaves the images out; blind=True replaces
    them with noise. UserError on an unknown task.
    """

    family = None

    def __init__(self, tasks, task, render=True, blind=False):
        self.scene = choose(task, tasks, "task")
        self.task = tasks[task]
        self.number = list(tasks).index(task)  # index in the package's list, for random streams
        self.horizon = self.task.horizon
        self.render = render
        self.blind = blind

    def start_episode(self, seed, instruction):
        """Reset time and noise for an episode with a new layout. Returns what `reset` does."""
        self.instruction = instruction or self.task.sentence
        self.steps = 0
        self.static = np.random.default_rng([seed, self.number])  # images of noise
        return self.observe(), {}

    def read_action(self, action):
        """(A,) clipped to -1..1. ValueError if the action has the wrong shape or is not finite."""
        action = np.asarray(action, float)
        size = self.embodiment.action_dim
        if action.shape != (size,) or not np.isfinite(action).all():
            raise ValueError(f"{self.robot.name} takes {size} finite numbers, not {action}")
        return np.clip(action, -1, 1)

    def count_step(self, reward, success, render):
        """The return value of `step`, after the physics."""
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
    """The module of another simulator: its ENVIRONMENT, ROBOT, TASKS, HZ and PACKAGES.

    UserError if its packages are not installed; the tabletop does not need them.
    """
    return import_module(f"data.{environment}")


def names_in(environment):
    """(robots, tasks, further scenes) of an environment. UserError if there is no such one."""
    if choose(environment, ENVIRONMENTS, "environment") != "tabletop":
        module = simulator(environment)
        return (module.ROBOT.name,), tuple(module.TASKS), ()
    from data.families import FAMILIES
    from data.robots import ROBOTS
    from data.tasks import TASKS

    return ROBOTS, tuple(TASKS), tuple(FAMILIES)


def cells_of(config):
    """(robots, scenes) that config's env, robots and tasks name; "all" tasks excludes families."""
    robots, tasks, families = names_in(config.env)
    chosen = choose_many(config.robots, robots, "robot")
    if config.tasks == "all":
        return chosen, list(tasks)
    return chosen, choose_many(config.tasks, [*tasks, *families], "task")


def open_environment(environment, robot, scene, **options):
    """An object of one of these classes; options are those of its constructor."""
    if environment != "tabletop":
        return simulator(environment).ENVIRONMENT(scene, **options)
    from data.env import TabletopEnv

    return TabletopEnv(robot, scene, **options)


def expert_of(environment):
    """The expert function of an environment."""
    if environment == "metaworld":
        return simulator(environment).demonstrate
    if environment == "libero":
        from data.libero_expert import demonstrate
    else:  # the tabletop's expert, which also handles ManiSkill's tasks
        from data.expert import demonstrate
    return demonstrate
