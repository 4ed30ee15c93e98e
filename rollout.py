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
from data.environments import names_in
from files import atomic

# Control steps of a chunk that are carried out before the policy looks again. With fewer it may
# hesitate for ever where an arm starts slowly.
EXECUTE_STEPS = 12
GIF_SIZE = 384  # pixels
GIF_HZ = 10  # pictures a second


def robots_of(blm, names, environment="tabletop"):
    """The robots called `names`, or, for "all", those of an environment that `blm` was trained on.

    UserError if it was not trained on one of them, or cannot act at all.
    """
    known = blm.require_policy().embodiments
    robots, _, _ = names_in(environment)
    trained = [robot for robot in robots if robot in known]
    if not trained:
        raise UserError(
            f"these weights drive {', '.join(known)}, no robot of {environment}: train them on its "
            "episodes, or name another folder"
        )
    return choose_many(names, trained, "robot")


def rollout(
    blm,
    env,
    seed,
    execute_steps=EXECUTE_STEPS,
    temperature=0.0,
    instruction=None,
    max_steps=None,
    frame_size=0,
    other=None,
    **which,
):
    """One closed-loop episode: {"success", "steps", "clipped", "jerk": rad/s^3, "act_s", "reason"}.

    act_s: mean seconds a chunk; reason: why not, or "". Pictures are drawn only when the policy
    looks: make env with render=False. max_steps stops sooner than the task does. frame_size adds
    "frames": pictures of so many pixels for people, GIF_HZ a second and one at the end.
    which: command and new of `TabletopEnv.reset`. other: another of the scene's commands; "other"
    says whether that was done on the way.
    """
    env.reset(seed, instruction, **which)
    states = [env.state()]
    held = []  # after each step
    frames = []
    done_other = False
    act_seconds = []
    over = False
    while not over:
        observation = env.observe(render=True)
        start = time.perf_counter()
        # noise, if there is any, is this moment's own and the same again when it is repeated
        chunk = blm.act(observation, env.robot.name, temperature, seed=[seed, env.steps])
        act_seconds.append(time.perf_counter() - start)
        for action in chunk[:execute_steps]:  # the rest of the chunk is thrown away
            if frame_size and env.steps % (env.hz // GIF_HZ) == 0:
                frames.append(env.draw("render", frame_size, pretty=True))
            *_, done, truncated, info = env.step(action)
            states.append(env.state())
            held.append(env.held())
            if other is not None:
                env.give(other)
                done_other |= env.succeeded()
                env.give(which.get("command", 0))
            over = done or truncated or env.steps == max_steps
            if over:
                break
    if frame_size:
        frames.append(env.draw("render", frame_size, pretty=True))
    return {
        "success": bool(done),
        "other": done_other,
        "steps": env.steps,
        "clipped": info["clipped"],
        "jerk": jerk(states, env.robot.dof, env.hz),
        "act_s": float(np.mean(act_seconds)),
        "reason": "" if done else env.why(held),
        "frames": frames,
    }


def jerk(states, dof, hz=CONTROL_HZ):
    """Mean absolute third difference of joint angles in states (L, S), rad/s^3: how rough it is.

    Of a robot whose state has no joint angles, of the hand's place, m/s^3.
    """
    if len(states) < 4:
        return 0.0
    differences = np.diff(np.array(states)[:, :dof], 3, axis=0)  # (L - 3, dof)
    return float(np.abs(differences).mean() * hz**3)


def save_gif(path, frames):
    """Frames (PIL) as a looping GIF at the speed of life, the last one held."""
    first, *others = [frame.quantize(64) for frame in frames]  # a third of the size
    duration = 1000 // GIF_HZ  # ms
    durations = [duration] * len(others) + [1500]
    with atomic(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, loop=0, duration=durations)


def draw_episode(blm, env, seed, folder, **options):
    """A `rollout` with these options as a GIF, <folder>/<robot>-<scene>-<seed>.gif: (path, outcome).

    The outcome in words, for people, such as "success after 3.2 s".
    """
    result = rollout(blm, env, seed, **options, frame_size=GIF_SIZE)
    outcome = f"{result['reason'] or 'success'} after {result['steps'] / env.hz:.1f} s"
    frames = []
    for picture in result["frames"]:
        # three lines below the picture, of which the last comes at the end
        frame = Image.new("RGB", (GIF_SIZE, GIF_SIZE + 60), "white")
        frame.paste(Image.fromarray(picture))
        lines = [env.robot.display_name, env.instruction]
        if len(frames) == len(result["frames"]) - 1:
            lines.append(outcome)
        draw = ImageDraw.Draw(frame)
        draw.text((6, GIF_SIZE + 4), "\n".join(lines), fill="black", font_size=13)
        frames.append(frame)
    # by name, so that another episode does not write over this one
    name = f"{env.robot.name}-{env.scene}-{seed}"
    if env.family:
        name = f"{name}-{options['command']}"
    path = Path(folder) / f"{name}.gif"
    save_gif(path, frames)
    return path, outcome
