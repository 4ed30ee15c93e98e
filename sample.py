"""Watch the model at work, or ask it something.

    python sample.py --robot widowx                                       one episode of PickCube, drawn as out/widowx-PickCube-0.gif
    python sample.py --robot panda --task StackCube --episodes 3
    python sample.py --robot xarm7 --instruction "grasp the red cube and bring it to the green ball"
    python sample.py --ask "Where is the red cube in the front view? Give a point."        about the rendered scene
    python sample.py --ask "How many cubes are there?" --image picture.png                 about any picture
"""
import time
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, atomic, choose, parse, run
from data.env import CONTROL_HZ, VIEWS, TabletopEnv
from data.robots import ROBOTS, get_robot
from data.tasks import TASKS

GIF_SIZE, FRAMES_EVERY = 384, 2          # pixels; control steps between two frames


@dataclass
class SampleConfig:
    robot: str = "widowx"            # panda, xarm6, xarm7 or widowx
    task: str = "PickCube"           # PickCube, PushCube, PullCube, StackCube, PlaceSphere or LiftPegUpright
    instruction: str = ""            # what to tell the robot; empty: one of the task's own wordings
    seed: int = 1_000_000            # layout of the first episode; demonstrations use seeds below
    episodes: int = 1                # episodes, with seeds counting up
    out: str = "out"                 # folder for the GIFs
    weights: str = "weights/nano"    # checkpoint folder
    execute_steps: int = 8           # control steps of a chunk that are carried out before the policy looks again
    ask: str = ""                    # a question to answer instead of acting
    image: str = ""                  # picture to ask about; empty: the scene of --robot, --task and --seed


def caption(picture, lines, colour=(20, 20, 20)):
    """A PIL image with lines of text on a band below the picture (H, W, 3)."""
    from PIL import Image, ImageDraw
    image = Image.new("RGB", (picture.shape[1], picture.shape[0] + 18 * len(lines) + 6), (250, 250, 250))
    image.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((6, picture.shape[0] + 4 + 18 * i), line, fill=colour if i == len(lines) - 1 else (20, 20, 20), font_size=13)
    return image


def save_gif(path, frames):
    """Frames (PIL) as a looping GIF at the speed of life, the last one held."""
    quantized = [frame.quantize(64) for frame in frames]
    with atomic(path) as temporary:
        quantized[0].save(temporary, save_all=True, append_images=quantized[1:], loop=0,
                          duration=[1000 * FRAMES_EVERY // CONTROL_HZ] * (len(frames) - 1) + [1500])


def act(blm, config):
    """Roll out config.episodes episodes closed-loop; a GIF and a line for each."""
    from eval import rollout
    env, wins = TabletopEnv(config.robot, config.task, held_out=True), 0
    for seed in range(config.seed, config.seed + config.episodes):
        frames, start = [], time.time()

        def watch(env, every=FRAMES_EVERY):
            if env.steps % every == 0:
                frames.append((env.draw("render", GIF_SIZE, pretty=True), env.steps))

        result = rollout(blm, env, seed, config.execute_steps, config.instruction or None, watch)
        watch(env, every=1)
        outcome = "success" if result["success"] else "not done: " + ", ".join(name for name, value in result["conditions"].items() if not value)
        title = f"{get_robot(config.robot).display_name}: {env.instruction}"
        path = Path(config.out) / f"{config.robot}-{config.task}-{seed}.gif"
        save_gif(path, [caption(f, [title, f"{step / CONTROL_HZ:.1f} s" + (f"   {outcome}" if i == len(frames) - 1 else "")],
                                (0, 130, 0) if result["success"] else (180, 0, 0) if i == len(frames) - 1 else (20, 20, 20)) for i, (f, step) in enumerate(frames)])
        wins += result["success"]
        print(f"{title}\n  {outcome} after {result['steps'] / CONTROL_HZ:.1f} s; act {1000 * result['act_s']:.0f} ms a chunk, {time.time() - start:.1f} s in all; drawn in {path}")
    if config.episodes > 1:
        print(f"{wins} of {config.episodes} done")


def main():
    config = parse(SampleConfig, description="Watch the model drive a robot, or ask it a question.")
    choose(config.robot, ROBOTS, "robot"), choose(config.task, TASKS, "task")
    if config.episodes < 1:
        raise UserError(f"--episodes {config.episodes} must be at least 1")
    if config.image and not config.ask:
        raise UserError("--image goes with --ask \"a question\"")
    with atomic(Path(config.out) / ".writable"):           # an unwritable folder is told before the work, not after
        pass
    (Path(config.out) / ".writable").unlink()
    from model import BLM
    blm = BLM.from_pretrained(config.weights)
    if not config.ask:
        return act(blm, config)
    if config.image:
        from vlm import load_image
        images = [load_image(config.image)]
    else:
        observation, _ = TabletopEnv(config.robot, config.task).reset(config.seed)
        images = [observation["images"][view] for view in VIEWS]
    start = time.time()
    print(blm.answer(images, config.ask))
    print(f"({time.time() - start:.2f} s)")


if __name__ == "__main__":
    run(main)
