"""Watch the model drive a robot, or ask it a question.

One episode of PickCube, drawn as out/widowx-PickCube-1000001.gif; three episodes of another task;
and one with your own instruction:

    python sample.py --robot widowx
    python sample.py --robot panda --task StackCube --episodes 3
    python sample.py --robot xarm7 --instruction "grasp the red cube and bring it to the green ball"

One scene, two commands:

    python sample.py --task which_cube --command 0
    python sample.py --task which_cube --command 1

A task of another benchmark, in its own simulator (data/environments.py):

    python sample.py --env metaworld --task drawer-open --weights out/metaworld-policy
    python sample.py --env libero --task object-0 --weights out/libero-policy
    python sample.py --env maniskill --task PickCube

A goal of several commands, which a model trained for it (runs/listen.sh) lists, carries out and
judges:

    python sample.py --task mixed --goal "put the ball into the bin, then stack the left cube on the right cube"

A question about the rendered scene, or about any image:

    python sample.py --ask "Where is the red cube in the front view? Give a point."
    python sample.py --ask "How many cubes are there?" --image picture.png
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cli import UserError, at_least, choose, parse, pick_device, run
from data.env import CONTROL_HZ, TabletopEnv
from data.environments import names_in, open_environment
from data.media import load_image
from files import writable
from goal import carry_out, pictures, write_plan
from rollout import EXECUTE_STEPS, GIF_HZ, GIF_SIZE, draw_episode, save_gif


@dataclass
class SampleConfig:
    env: str = "tabletop"  # tabletop, metaworld, libero or maniskill
    robot: str = ""  # panda, xarm6, xarm7 or widowx; empty: widowx, or the one that --env has
    task: str = "PickCube"  # a task, or a family of scenes with several, such as which_cube
    command: int = 0  # which command of such a scene to give
    instruction: str = ""  # what to tell the robot; empty: one of the task's wordings
    goal: str = ""  # several commands in one sentence: the model plans them, then acts
    seed: int = 1_000_001  # layout of the first episode; demonstrations use seeds below 1,000,000
    episodes: int = 1  # episodes, with seeds counting up
    out: str = "out"  # folder for the GIFs
    weights: str = "weights/nano"  # checkpoint folder
    execute_steps: int = EXECUTE_STEPS  # steps of a chunk before the policy observes again
    device: str = "auto"  # auto, cpu, cuda or mps
    ask: str = ""  # a question to answer instead of acting
    image: str = ""  # image to ask about; empty: the scene of --robot, --task and --seed


def act(blm, config):
    """Run config.episodes episodes; write a GIF and print a line for each."""
    options = {"execute_steps": config.execute_steps, "instruction": config.instruction or None}
    words = {}
    if config.env == "tabletop":
        options["command"] = config.command
        words["wordings"] = "held_out"
    env = open_environment(config.env, config.robot, config.task, render=False, **words)
    for seed in range(config.seed, config.seed + config.episodes):
        path, outcome = draw_episode(blm, env, seed, config.out, **options)
        print(f"{env.robot.display_name}: {env.instruction}\n  {outcome}, drawn in {path}")


def reach_goal(blm, config):
    """Print the model's plan for config.goal, and each step as it ends; draw a GIF."""
    env = TabletopEnv(config.robot, config.task, render=False)
    env.reset(config.seed)
    commands = write_plan(blm, pictures(env), config.goal)
    print(f"{env.robot.display_name}: {config.goal}")
    if not commands:
        print(f"  {config.weights} lists no commands: was it trained to, as in runs/listen.sh?")
    frames = []

    def draw():
        if env.steps % (CONTROL_HZ // GIF_HZ) == 0:
            frames.append(env.draw("render", GIF_SIZE, pretty=True))

    for step in carry_out(blm, env, commands, execute_steps=config.execute_steps, after_step=draw):
        print(f"  {step.command}: {step.outcome} ({step.steps / CONTROL_HZ:.1f} s)")
    if frames:
        path = Path(config.out) / f"{config.robot}-{config.task}-{config.seed}-goal.gif"
        save_gif(path, [Image.fromarray(frame) for frame in frames])
        print(f"drawn in {path}")


def ask(blm, config):
    """Print the answer to config.ask."""
    if config.image:
        images = [load_image(config.image)]
    else:
        env = open_environment(config.env, config.robot, config.task)
        observation, _ = env.reset(config.seed)
        images = observation["images"].values()
    print(blm.answer(list(images), config.ask))


def main():
    config = parse(SampleConfig, description="Watch the model drive a robot, or ask it a question.")
    # check everything possible before the weights are loaded
    robots, tasks, families = names_in(config.env)
    usual = "widowx" if config.env == "tabletop" else robots[0]
    config.robot = choose(config.robot or usual, robots, "robot")
    choose(config.task, [*tasks, *families], "task")
    at_least(config, 1, "episodes", "execute_steps")
    at_least(config, 0, "seed", "command")
    if config.env != "tabletop" and (config.goal or config.command):
        raise UserError(
            f"--goal and --command: scenes of --env {config.env} allow only one command"
        )
    if config.image and not config.ask:
        raise UserError('--image goes with --ask "a question"')
    writable(config.out)

    from model import BLM  # slow to load

    blm = BLM.from_pretrained(config.weights, pick_device(config.device))
    if config.ask:
        ask(blm, config)
    elif config.goal:
        reach_goal(blm, config)
    else:
        act(blm, config)


if __name__ == "__main__":
    run(main)
