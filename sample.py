"""Watch the model at work, or ask it something.

One episode of PickCube, drawn as out/widowx-PickCube-1000001.gif; then three of another task:

    python sample.py --robot widowx
    python sample.py --robot panda --task StackCube --episodes 3

Every robot and task at once, drawn as one mosaic; and in your own words:

    python sample.py --robot all --task all
    python sample.py --robot xarm7 --instruction "grasp the red cube and bring it to the green ball"

A question about the rendered scene, or about any picture:

    python sample.py --ask "Where is the red cube in the front view? Give a point."
    python sample.py --ask "How many cubes are there?" --image picture.png
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cli import UserError, at_least, choose_many, parse, pick_device, run
from data.env import CONTROL_HZ, TabletopEnv
from data.robots import ROBOTS
from data.tasks import TASKS
from files import writable
from rollout import EXECUTE_STEPS, GREEN, RED, draw_episode, robots_of, rollout, save_gif

TILE = 144  # pixels of one of the mosaic's pictures


@dataclass
class SampleConfig:
    robot: str = "widowx"  # panda, xarm6, xarm7, widowx, several with commas, or all
    task: str = "PickCube"  # PickCube, PushCube, PullCube, StackCube, PlaceSphere, LiftPegUpright, several with commas, or all
    instruction: str = ""  # what to tell the robot; empty: one of the task's own wordings
    seed: int = 1_000_001  # layout of the first episode; demonstrations use seeds below 1,000,000
    episodes: int = 1  # episodes, with seeds counting up
    out: str = "out"  # folder for the GIFs
    weights: str = "weights/nano"  # checkpoint folder
    execute_steps: int = EXECUTE_STEPS  # steps of a chunk carried out before the policy looks again
    device: str = "auto"  # auto, cpu, cuda or mps
    ask: str = ""  # a question to answer instead of acting
    image: str = ""  # picture to ask about; empty: the scene of --robot, --task and --seed


def act(blm, config, robot, task):
    """config.episodes episodes of one robot and task; a GIF and a line for each."""
    env = TabletopEnv(robot, task, render=False, held_out=True)
    wins = 0
    for seed in range(config.seed, config.seed + config.episodes):
        path, result, outcome = draw_episode(
            blm, env, seed, config.out, config.execute_steps, config.instruction
        )
        wins += result["success"]
        print(f"{env.robot.display_name}: {env.instruction}")
        print(
            f"  {outcome} after {result['steps'] / CONTROL_HZ:.1f} s; "
            f"act {1000 * result['act_s']:.0f} ms a chunk; drawn in {path}"
        )
    if config.episodes > 1:
        print(f"{wins} of {config.episodes} done")


def mosaic(blm, config, robots, tasks):
    """One episode of every robot (rows) and task (columns), side by side in one GIF.

    A bar under a finished tile: green is done, red is not.
    """
    tiles = []
    wins = 0
    for robot in robots:
        for task in tasks:
            env = TabletopEnv(robot, task, render=False, held_out=True)
            options = {"instruction": config.instruction or None, "frame_size": TILE}
            result = rollout(blm, env, config.seed, config.execute_steps, **options)
            env.close()
            wins += result["success"]
            outcome = "success" if result["success"] else "not done"
            print(f"{robot:8s}{task:16s}{outcome} after {result['steps'] / CONTROL_HZ:.1f} s")
            *pictures, last = result["frames"]
            last = last.copy()  # the renderer's own memory
            last[-5:] = GREEN if result["success"] else RED
            tiles.append([*pictures, last])
    longest = max(len(pictures) for pictures in tiles)
    frames = []
    for i in range(longest):
        now = [pictures[min(i, len(pictures) - 1)] for pictures in tiles]  # the finished wait
        grid = np.stack(now).reshape(len(robots), len(tasks), TILE, TILE, 3)
        grid = grid.swapaxes(1, 2).reshape(len(robots) * TILE, len(tasks) * TILE, 3)
        frames.append(Image.fromarray(grid))
    path = Path(config.out) / "mosaic.gif"
    save_gif(path, frames)
    print(f"{wins} of {len(tiles)} done; drawn in {path}")


def ask(blm, config, robot, task):
    """Print the answer to config.ask."""
    if config.image:
        from data.media import load_image

        images = [load_image(config.image)]
    else:
        observation, _ = TabletopEnv(robot, task).reset(config.seed)
        images = list(observation["images"].values())
    start = time.time()
    print(blm.answer(images, config.ask))
    print(f"({time.time() - start:.2f} s)")


def main():
    config = parse(SampleConfig, description="Watch the model drive a robot, or ask it a question.")
    robots = choose_many(config.robot, ROBOTS, "robot")
    tasks = choose_many(config.task, TASKS, "task")
    at_least(config, 1, "episodes", "execute_steps")
    at_least(config, 0, "seed")
    if config.image and not config.ask:
        raise UserError('--image goes with --ask "a question"')
    if config.episodes > 1 and len(robots) * len(tasks) > 1:
        raise UserError("--episodes goes with one robot and one task: a mosaic has one of each")
    writable(config.out)

    from model import BLM  # after all that can be told at once

    blm = BLM.from_pretrained(config.weights, pick_device(config.device))
    if config.ask:
        ask(blm, config, robots[0], tasks[0])
        return
    robots = robots_of(blm, config.robot)
    if len(robots) == len(tasks) == 1:
        act(blm, config, robots[0], tasks[0])
    else:
        mosaic(blm, config, robots, tasks)


if __name__ == "__main__":
    run(main)
