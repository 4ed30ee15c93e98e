"""The simulators that a policy is recorded, evaluated and watched in, and what each must have.

    tabletop     this repository's own (data/env.py): four arms, six tasks, families of scenes
    metaworld    Meta-World's 50 tasks (data/metaworld.py), with packages of its own
    libero       20 tasks of LIBERO (data/libero.py), with packages of its own

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

from cli import choose, choose_many

ENVIRONMENTS = ("tabletop", "metaworld", "libero")


@dataclass(frozen=True)
class Arm:
    """What a rollout asks of a robot."""

    name: str
    display_name: str
    dof: int  # numbers of the state that say where the hand is


def simulator(environment):
    """The module of somebody else's: its ROBOT, TASKS, HZ and PACKAGES.

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
    if environment == "metaworld":
        return simulator(environment).MetaWorldEnv(scene, **options)
    if environment == "libero":
        return simulator(environment).LiberoEnv(scene, **options)
    from data.env import TabletopEnv

    return TabletopEnv(robot, scene, **options)


def expert_of(environment):
    """The function that demonstrates there."""
    if environment == "metaworld":
        return simulator(environment).demonstrate
    if environment == "libero":
        from data.libero_expert import demonstrate
    else:
        from data.expert import demonstrate
    return demonstrate
