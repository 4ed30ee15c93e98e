"""One model in one environment, closed loop: it looks, acts for a few steps, and looks again; what came of it, and its pictures."""
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cli import UserError, choose_many

from files import atomic
from data.env import CONTROL_HZ
from data.robots import ROBOTS

EXECUTE_STEPS = 12           # of a chunk that are carried out before the policy looks again: with fewer it may hesitate for ever where an arm starts slowly
GIF_SIZE, FRAMES_EVERY = 384, 2          # pixels; control steps between two frames
INK, GREEN, RED = (20, 20, 20), (0, 130, 0), (180, 0, 0)


def robots_of(blm, names):
    """The robots called `names`, or all those that `blm` was trained on. UserError if it was not trained on one of them, or cannot act at all."""
    if blm.policy is None:
        raise UserError("this model folder has no policy.safetensors: it answers, but does not act; train a policy with `python train_policy.py`")
    robots, known = choose_many(names, ROBOTS, "robot"), blm.policy.embodiments
    strange = [robot for robot in robots if robot not in known]
    if strange and names != "all":
        raise UserError(f"this model was not trained on {', '.join(strange)}, but on {', '.join(known)}")
    return [robot for robot in robots if robot in known]


def rollout(blm, env, seed, execute_steps=EXECUTE_STEPS, temperature=0.0, instruction=None, watch=None, max_steps=None):
    """One closed-loop episode of `blm` in `env`: {"success", "steps", "clipped", "jerk": rad/s^3, "act_s": mean seconds a chunk, "reason": why not, or ""}.

    Every `execute_steps` control steps the policy looks again, and only then are pictures drawn: make env with render=False. watch(env): called before
    every control step. max_steps: stop sooner than the task does.
    """
    env.reset(seed, instruction=instruction)
    done = truncated = False
    times, held, states, body = [], [], [env.state()], next(iter(env.task.labels))
    while not (done or truncated):
        observation, start = env.observe(render=True), time.perf_counter()
        chunk = blm.act(observation, env.robot.name, temperature, seed=[seed, env.steps])
        times.append(time.perf_counter() - start)
        for action in chunk[:execute_steps]:
            if watch:
                watch(env)
            *_, done, truncated, info = env.step(action)
            truncated = truncated or env.steps == max_steps
            held.append(env.grasped(body))
            states.append(env.state())
            if done or truncated:
                break
    return {"success": bool(done), "steps": env.steps, "clipped": info["clipped"], "jerk": jerk(states, env.robot.dof), "act_s": float(np.mean(times)),
            "reason": "" if done else why(env.task, held)}


def jerk(states, dof):
    """Mean absolute third difference of the joint angles in `states` (L, S), rad/s^3: how rough a motion is."""
    return float(np.abs(np.diff(np.array(states)[:, :dof], 3, axis=0)).mean() * CONTROL_HZ ** 3) if len(states) > 3 else 0.0


def why(task, held):
    """Why an episode of `task` failed, from whether its object was held after each step."""
    if task.name in ("PushCube", "PullCube"):
        return "missed the target"
    return "never grasped" if not any(held) else "held to the end" if held[-1] else "let go elsewhere"


def caption(picture, lines, colour=INK, coloured=1):
    """A PIL image with lines of text on a band below the picture (H, W, 3), the last `coloured` of them in a colour."""
    image = Image.new("RGB", (picture.shape[1], picture.shape[0] + 18 * len(lines) + 6), (250, 250, 250))
    image.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((6, picture.shape[0] + 4 + 18 * i), line, fill=colour if i >= len(lines) - coloured else INK, font_size=13)
    return image


def save_gif(path, frames):
    """Frames (PIL) as a looping GIF at the speed of life, the last one held."""
    quantized = [frame.quantize(64) for frame in frames]
    with atomic(path) as temporary:
        quantized[0].save(temporary, save_all=True, append_images=quantized[1:], loop=0,
                          duration=[1000 * FRAMES_EVERY // CONTROL_HZ] * (len(frames) - 1) + [1500])


def play(blm, env, seed, size, execute_steps, instruction="", temperature=0.0):
    """One closed-loop episode, watched: (frames [(picture, control step)], result of `rollout`)."""
    frames = []

    def watch(env):
        if env.steps % FRAMES_EVERY == 0:
            frames.append((env.draw("render", size, pretty=True), env.steps))

    result = rollout(blm, env, seed, execute_steps, temperature, instruction or None, watch)
    frames.append((env.draw("render", size, pretty=True), env.steps))
    return frames, result


def draw_episode(blm, env, seed, folder, execute_steps, instruction="", temperature=0.0):
    """One closed-loop episode as a GIF, <folder>/<robot>-<task>-<seed>.gif: (path, result of `rollout`, outcome in words)."""
    frames, result = play(blm, env, seed, GIF_SIZE, execute_steps, instruction, temperature)
    outcome = "success" if result["success"] else f"not done: {result['reason']}"
    last, path = frames[-1][1], Path(folder) / f"{env.robot.name}-{env.task.name}-{seed}.gif"
    save_gif(path, [caption(picture, [env.robot.display_name, env.instruction, f"{step / CONTROL_HZ:.1f} s" + (f"   {outcome}" if step == last else "")],
                            INK if step < last else GREEN if result["success"] else RED) for picture, step in frames])
    return path, result, outcome
