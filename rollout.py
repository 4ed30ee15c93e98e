"""One model in one environment, closed loop: it looks, acts for a few steps, and looks again.

`rollout` is the loop, `draw_episode` the same with a GIF; eval.py, sample.py and corrections.py
call them.
"""

import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cli import UserError, choose_many
from data.env import CONTROL_HZ
from data.robots import ROBOTS
from files import atomic

# Control steps of a chunk that are carried out before the policy looks again. With fewer it may
# hesitate for ever where an arm starts slowly.
EXECUTE_STEPS = 12
GIF_SIZE = 384  # pixels
FRAMES_EVERY = 2  # control steps between two frames
INK = (20, 20, 20)  # RGB
GREEN = (0, 130, 0)
RED = (180, 0, 0)


def robots_of(blm, names):
    """The robots called `names`, or, for "all", those that `blm` was trained on.

    UserError if it was not trained on one of them, or cannot act at all.
    """
    robots = choose_many(names, ROBOTS, "robot")
    known = blm.require_policy().embodiments
    strange = [robot for robot in robots if robot not in known]
    if strange and names != "all":
        raise UserError(
            f"this model was not trained on {', '.join(strange)}, but on {', '.join(known)}"
        )
    return [robot for robot in robots if robot in known]


def rollout(
    blm,
    env,
    seed,
    execute_steps=EXECUTE_STEPS,
    temperature=0.0,
    instruction=None,
    max_steps=None,
    frame_size=0,
):
    """One closed-loop episode: {"success", "steps", "clipped", "jerk": rad/s^3, "act_s", "reason"}.

    act_s: mean seconds a chunk; reason: why not, or "". Pictures are drawn only when the policy
    looks: make env with render=False. max_steps stops sooner than the task does. frame_size adds
    "frames": pictures of so many pixels for people, every FRAMES_EVERY steps and at the end.
    """
    env.reset(seed, instruction=instruction)
    body = next(iter(env.task.labels))  # what the task is about
    states = [env.state()]
    held = []  # after each step
    frames = []
    act_seconds = []
    done = truncated = False
    while not (done or truncated):
        observation = env.observe(render=True)
        start = time.perf_counter()
        chunk = blm.act(observation, env.robot.name, temperature, seed=[seed, env.steps])
        act_seconds.append(time.perf_counter() - start)
        for action in chunk[:execute_steps]:  # the rest of the chunk is thrown away
            if frame_size and env.steps % FRAMES_EVERY == 0:
                frames.append(env.draw("render", frame_size, pretty=True))
            *_, done, truncated, info = env.step(action)
            states.append(env.state())
            held.append(env.grasped(body))
            truncated = truncated or env.steps == max_steps
            if done or truncated:
                break
    result = {
        "success": bool(done),
        "steps": env.steps,
        "clipped": info["clipped"],
        "jerk": jerk(states, env.robot.dof),
        "act_s": float(np.mean(act_seconds)),
        "reason": "" if done else why(env.task, held),
    }
    if frame_size:
        result["frames"] = [*frames, env.draw("render", frame_size, pretty=True)]
    return result


def jerk(states, dof):
    """Mean absolute third difference of joint angles in states (L, S), rad/s^3: how rough it is."""
    if len(states) < 4:
        return 0.0
    # (L - 3, dof)
    differences = np.diff(np.array(states)[:, :dof], 3, axis=0)
    return float(np.abs(differences).mean() * CONTROL_HZ**3)


def why(task, held):
    """Why an episode of `task` failed, from whether its object was held after each step."""
    if task.name in ("PushCube", "PullCube"):
        return "missed the target"
    if not any(held):
        return "never grasped"
    return "held to the end" if held[-1] else "let go elsewhere"


def save_gif(path, frames):
    """Frames (PIL) as a looping GIF at the speed of life, the last one held."""
    first, *others = [frame.quantize(64) for frame in frames]  # a third of the size
    duration = 1000 * FRAMES_EVERY // CONTROL_HZ  # ms
    durations = [duration] * len(others) + [1500]
    with atomic(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, loop=0, duration=durations)


def draw_episode(blm, env, seed, folder, execute_steps, instruction="", temperature=0.0):
    """One closed-loop episode as a GIF, <folder>/<robot>-<task>-<seed>.gif.

    Returns (path, result of `rollout`, outcome in words).
    """
    result = rollout(
        blm, env, seed, execute_steps, temperature, instruction or None, frame_size=GIF_SIZE
    )
    color = GREEN if result["success"] else RED
    outcome = "success" if result["success"] else f"not done: {result['reason']}"
    frames = []
    for i, picture in enumerate(result.pop("frames")):
        step = min(i * FRAMES_EVERY, result["steps"])  # the last frame may come early
        last = step == result["steps"]
        lines = [env.robot.display_name, env.instruction, f"{step / CONTROL_HZ:.1f} s"]
        if last:
            lines[-1] += f"   {outcome}"
        frame = Image.new("RGB", (GIF_SIZE, GIF_SIZE + 60), (250, 250, 250))  # three lines below
        frame.paste(Image.fromarray(picture))
        draw = ImageDraw.Draw(frame)
        draw.text((6, GIF_SIZE + 4), "\n".join(lines), fill=color if last else INK, font_size=13)
        frames.append(frame)
    path = Path(folder) / f"{env.robot.name}-{env.task.name}-{seed}.gif"
    save_gif(path, frames)
    return path, result, outcome
