"""One model in one environment, closed loop: it looks, acts for a few steps, and looks again.

`rollout` is the loop, `draw_episode` the same with a GIF; eval.py, sample.py and corrections.py
call them. `Pilot` makes a stream of targets out of chunks, also for an arm that does not wait: it
goes on with the old chunk while the new one is computed.

                   look             look with a delay of 4 steps, of 50 ms each
    old chunk   ───────●━━━━●╌╌╌╌    ━ carried out   ╌ planned, never carried out
    new chunk          ╌╌╌╌╌●━━━━━━━━●━━━━●╌╌╌╌
                        late         look
"""

import functools
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cli import UserError, choose_many
from data.env import CONTROL_HZ
from data.environments import names_in, open_environment
from files import atomic

# Control steps of a chunk that are carried out before the policy looks again. With fewer it may
# hesitate for ever where an arm starts slowly.
EXECUTE_STEPS = 12
RECENT = 10  # looks: a chunk is expected to take as long as the slowest of these
GIF_SIZE = 384  # pixels
GIF_HZ = 10  # pictures a second


@functools.cache  # once in a process: weights that change meanwhile must not matter
def load_model(folder, device="cpu", dtype="float32"):
    """The BLM of a folder."""
    import torch  # slow to load, and the expert needs none

    from model import BLM

    return BLM.from_pretrained(folder, device, getattr(torch, dtype))


# the last one is kept for the episodes of a cell, which follow each other
make_env = functools.lru_cache(maxsize=1)(open_environment)


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


class Pilot:
    """A policy's chunks as one stream of targets, for an arm that moves on while one is computed.

    A chunk counts from its look. With a delay its first targets come too late: meanwhile the arm
    carries out what the chunk before had in mind, and where that ends it holds still. The first
    chunk is waited for.
    delay: control steps from a look until its chunk is there; None: as many as `act` takes by the
    clock. inpaint: the chunk begins with what is carried out meanwhile (`BLM.act`, committed); how
    much that will be is the most of the last RECENT looks.
    """

    def __init__(
        self,
        blm,
        robot,
        execute_steps,
        delay=0,
        inpaint=False,
        hz=CONTROL_HZ,
    ):
        self.blm = blm
        self.robot = robot
        self.hz = hz
        self.execute_steps = execute_steps
        self.delay = delay
        self.inpaint = inpaint
        self.targets = []  # all that were handed out, (dof + 1,) each
        self.left = []  # behind them in the last chunk
        self.borders = []  # indices of targets with which another chunk takes over
        self.delays = []  # of each look
        self.act_seconds = []  # of each look

    def expected(self):
        """The delay to reckon with, control steps."""
        return max([self.delay or 0, *self.delays[-RECENT:]])

    def look(self, observation):
        """[(dof + 1,)]: the targets until the next look."""
        options = {}
        if self.inpaint:
            options["committed"] = self.left[: self.expected()]
            options["planned"] = self.left[self.expected() :]
        start = time.perf_counter()
        chunk = self.blm.act(observation, self.robot, **options)
        seconds = time.perf_counter() - start
        self.act_seconds.append(seconds)
        delay = math.ceil(seconds * self.hz) if self.delay is None else self.delay
        self.delays.append(delay)

        late = delay if self.targets else 0
        last = [*self.targets, *self.left][-1:]
        old = (self.left + late * last)[:late]
        # soon enough for the next chunk to come before this one's end
        stop = max(1, late, min(self.execute_steps, len(chunk) - self.expected()))
        if self.targets:
            self.borders.append(len(self.targets) + late)
        self.left = list(chunk[stop:])
        targets = [*old, *chunk[late:stop]]
        self.targets += targets
        return targets

    def stream(self, env):
        """Yield a target for each control step of an env that carries them out, for ever."""
        while True:
            yield from self.look(env.observe(render=True))


def rollout(
    blm,
    env,
    seed,
    execute_steps=EXECUTE_STEPS,
    instruction=None,
    max_steps=None,
    frame_size=0,
    other=None,
    delay=0,
    inpaint=False,
    **which,
):
    """One closed-loop episode: {"success", "steps", "clipped", "jerk": rad/s^3, "act_s", "reason"}.

    act_s: mean seconds a chunk; reason: why not, or "". Pictures are drawn only when the policy
    looks: make env with render=False. max_steps stops sooner than the task does. frame_size adds
    "frames": pictures of so many pixels for people, GIF_HZ a second and one at the end.
    which: command and new of `TabletopEnv.reset`. other: another of the scene's commands; "other"
    says whether that was done on the way. delay, inpaint: see `Pilot`. "border_steps" and
    "inner_steps": see `joint_steps`.
    """
    env.reset(seed, instruction, **which)
    states = [env.state()]
    held = []  # after each step
    frames = []
    done_other = False
    pilot = Pilot(blm, env.robot.name, execute_steps, delay, inpaint, env.hz)
    for action in pilot.stream(env):
        if frame_size and env.steps % (env.hz // GIF_HZ) == 0:
            frames.append(env.draw("render", frame_size, pretty=True))
        *_, done, truncated, info = env.step(action)
        states.append(env.state())
        held.append(env.held())
        if other is not None:
            env.give(other)
            done_other |= env.succeeded()
            env.give(which.get("command", 0))
        if done or truncated or env.steps == max_steps:
            break
    if frame_size:
        frames.append(env.draw("render", frame_size, pretty=True))
    borders, inner = joint_steps(pilot.targets[: env.steps], pilot.borders, env.robot.dof)
    return {
        "success": bool(done),
        "other": done_other,
        "steps": env.steps,
        "clipped": info["clipped"],
        "jerk": jerk(states, env.robot.dof, env.hz),
        "act_s": float(np.mean(pilot.act_seconds)),
        "delays": pilot.delays,
        "border_steps": borders,
        "inner_steps": inner,
        "reason": "" if done else env.why(held),
        "frames": frames,
    }


def joint_steps(targets, borders, dof):
    """Steps from target to target, each the largest of its joints', rad: (at borders, elsewhere).

    targets: [(dof + 1,)]; borders: indices of those with which another chunk takes over.
    """
    joints = np.array(targets)[:, :dof]
    steps = np.abs(np.diff(joints, axis=0)).max(1)  # (L - 1,)
    # an episode may end before the last one
    before = [border - 1 for border in borders if border < len(targets)]
    return steps[before].tolist(), np.delete(steps, before).tolist()


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
    text = f"{env.robot.display_name}\n{env.instruction}"
    texts = [text] * len(result["frames"])
    texts[-1] += f"\n{outcome}"  # below the last picture
    frames = []
    for picture, text in zip(result["frames"], texts):
        frame = Image.new("RGB", (GIF_SIZE, GIF_SIZE + 60), "white")
        frame.paste(Image.fromarray(picture))
        place = (6, GIF_SIZE + 4)
        ImageDraw.Draw(frame).text(place, text, fill="black", font_size=13)
        frames.append(frame)
    # by name, so that another episode does not write over this one
    command = f"-{options['command']}" if env.family else ""
    path = Path(folder) / f"{env.robot.name}-{env.scene}-{seed}{command}.gif"
    save_gif(path, frames)
    return path, outcome
