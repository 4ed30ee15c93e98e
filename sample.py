"""Watch the model at work, or ask it something.

    python sample.py --robot widowx                                       one episode of PickCube, drawn as out/widowx-PickCube-1000001.gif
    python sample.py --robot panda --task StackCube --episodes 3
    python sample.py --robot all --task all                               every robot and task at once, drawn as one mosaic
    python sample.py --robot xarm7 --instruction "grasp the red cube and bring it to the green ball"
    python sample.py --ask "Where is the red cube in the front view? Give a point."        about the rendered scene
    python sample.py --ask "How many cubes are there?" --image picture.png                 about any picture
"""
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from cli import UserError, at_least, choose_many, parse, pick_device, run

from files import writable
from data.env import CONTROL_HZ, VIEWS, TabletopEnv
from data.robots import ROBOTS
from data.tasks import TASKS
from rollout import EXECUTE_STEPS, GREEN, RED, draw_episode, play, robots_of, save_gif

TILE = 144                          # pixels of one of the mosaic's pictures


@dataclass
class SampleConfig:
    robot: str = "widowx"            # panda, xarm6, xarm7, widowx, several with commas, or all
    task: str = "PickCube"           # PickCube, PushCube, PullCube, StackCube, PlaceSphere, LiftPegUpright, several with commas, or all
    instruction: str = ""            # what to tell the robot; empty: one of the task's own wordings
    seed: int = 1_000_001            # layout of the first episode; demonstrations use seeds below 1,000,000
    episodes: int = 1                # episodes, with seeds counting up
    out: str = "out"                 # folder for the GIFs
    weights: str = "weights/nano"    # checkpoint folder
    execute_steps: int = EXECUTE_STEPS      # control steps of a chunk that are carried out before the policy looks again
    device: str = "auto"             # auto, cpu, cuda or mps
    ask: str = ""                    # a question to answer instead of acting
    image: str = ""                  # picture to ask about; empty: the scene of --robot, --task and --seed


def act(blm, config, robot, task):
    """config.episodes episodes of one robot and task; a GIF and a line for each."""
    env, wins = TabletopEnv(robot, task, render=False, held_out=True), 0
    for seed in range(config.seed, config.seed + config.episodes):
        start = time.time()
        path, result, outcome = draw_episode(blm, env, seed, config.out, config.execute_steps, config.instruction)
        wins += result["success"]
        print(f"{env.robot.display_name}: {env.instruction}\n  {outcome} after {result['steps'] / CONTROL_HZ:.1f} s; act {1000 * result['act_s']:.0f} ms a chunk, "
              f"{time.time() - start:.1f} s in all; drawn in {path}")
    if config.episodes > 1:
        print(f"{wins} of {config.episodes} done")


def mosaic(blm, config, robots, tasks):
    """One episode of every robot (rows) and task (columns), side by side in one GIF; a green bar under a tile says done, a red one not."""
    cells, wins = [], 0
    for robot in robots:
        for task in tasks:
            env = TabletopEnv(robot, task, render=False, held_out=True)
            frames, result = play(blm, env, config.seed, TILE, config.execute_steps, config.instruction)
            env.close()
            wins += result["success"]
            print(f"{robot:8s}{task:16s}{'success' if result['success'] else 'not done'} after {result['steps'] / CONTROL_HZ:.1f} s")
            pictures = [picture for picture, _ in frames]
            pictures[-1] = pictures[-1].copy()
            pictures[-1][-5:] = GREEN if result["success"] else RED
            cells.append(pictures)
    longest = max(map(len, cells))
    at = lambda pictures, i: pictures[min(i, len(pictures) - 1)]         # a finished tile waits
    frames = [Image.fromarray(np.concatenate([np.concatenate([at(p, i) for p in cells[r:r + len(tasks)]], 1) for r in range(0, len(cells), len(tasks))])) for i in range(longest)]
    path = Path(config.out) / "mosaic.gif"
    save_gif(path, frames)
    print(f"{wins} of {len(cells)} done; drawn in {path}")


def main():
    config = parse(SampleConfig, description="Watch the model drive a robot, or ask it a question.")
    robots, tasks = choose_many(config.robot, ROBOTS, "robot"), choose_many(config.task, TASKS, "task")
    at_least(config, 1, "episodes", "execute_steps"), at_least(config, 0, "seed")
    if config.image and not config.ask:
        raise UserError("--image goes with --ask \"a question\"")
    if config.episodes > 1 and len(robots) * len(tasks) > 1:
        raise UserError("--episodes goes with one robot and one task: a mosaic has one episode of each")
    writable(config.out)
    from model import BLM
    blm = BLM.from_pretrained(config.weights, pick_device(config.device))
    if not config.ask:
        robots = robots_of(blm, config.robot)
        return act(blm, config, robots[0], tasks[0]) if len(robots) == len(tasks) == 1 else mosaic(blm, config, robots, tasks)
    if config.image:
        from data.media import load_image
        images = [load_image(config.image)]
    else:
        observation, _ = TabletopEnv(robots[0], tasks[0]).reset(config.seed)
        images = [observation["images"][view] for view in VIEWS]
    start = time.time()
    blm.answer(images, config.ask, stream=lambda text: print(text, end="", flush=True))
    print(f"\n({time.time() - start:.2f} s)")


if __name__ == "__main__":
    run(main)
