"""One model in one environment, closed loop: it observes, acts for a few steps, and repeats.

`rollout` is the loop, `draw_episode` the same with a GIF; eval.py, sample.py and corrections.py
call them. `Pilot` turns chunks into a stream of targets, also for an arm that does not wait: it
continues with the old chunk while the new one is computed.

                 observe          observe, with a delay of 4 steps of 50 ms
    old chunk   ───────●━━━━●╌╌╌╌    ━ executed   ╌ planned, never executed
    new chunk          ╌╌╌╌╌●━━━━━━━━●━━━━●╌╌╌╌
                        late       observe
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

# Control steps of a chunk that are executed before the policy observes again. With fewer, it can
# hesitate forever where an arm starts slowly.
EXECUTE_STEPS = 12
RECENT = 10  # observations: expect a chunk to take as long as the slowest of these
GIF_SIZE = 384  # pixels
GIF_HZ = 10  # frames per second


@functools.cache  # once per process: ignore weights that change meanwhile
def load_model(folder, device="cpu", dtype="float32"):
    """The BLM of a folder."""
    import torch  # slow to load, and the expert does not need it

    from model import BLM

    return BLM.from_pretrained(folder, device, getattr(torch, dtype))


# the episodes of a cell follow each other, so only the last one is kept
make_env = functools.lru_cache(maxsize=1)(open_environment)


def robots_of(blm, names, environment="tabletop"):
    """The robots called `names`, or for "all" those of an environment that `blm` was trained on.

    UserError if it was not trained on one of them, or has no policy.
    """
    known = blm.require_policy().embodiments
    robots, _, _ = names_in(environment)
    trained = [robot for robot in robots if robot in known]
    if not trained:
        raise UserError(
            f"these weights drive {', '.join(known)}, none of which is in {environment}: "
            "train on its episodes, or use other weights"
        )
    return choose_many(names, trained, "robot")


class Pilot:
    """A policy's chunks as one stream of targets, even for an arm that does not wait for them.

    A chunk starts at the time of its observation. With a delay its first targets come too late:
    meanwhile the arm executes the rest of the previous chunk, and holds still when that ends. The
    arm waits for the first chunk.
    delay: control steps from an observation until its chunk arrives; None: as long as `act` takes
    in real time. inpaint: the chunk starts with the targets executed meanwhile (`BLM.act`,
    committed); their number is estimated as the largest delay of the last RECENT observations.
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
        self.targets = []  # every target handed out so far, (dof + 1,) each
        self.left = []  # what follows them in the last chunk
        self.borders = []  # indices of the targets where a new chunk takes over
        self.delays = []  # of each observation
        self.act_seconds = []  # of each observation

    def expected(self):
        """The delay to plan for, in control steps."""
        return max([self.delay or 0, *self.delays[-RECENT:]])

    def look(self, observation):
        """[(dof + 1,)]: the targets until the next observation."""
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
        # early enough for the next chunk to arrive before this one ends
        stop = max(1, late, min(self.execute_steps, len(chunk) - self.expected()))
        if self.targets:
            self.borders.append(len(self.targets) + late)
        self.left = list(chunk[stop:])
        targets = [*old, *chunk[late:stop]]
        self.targets += targets
        return targets

    def stream(self, env):
        """Yield a target for each control step, endlessly, for an env that executes them."""
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

    act_s: mean seconds per chunk; reason: why it failed, or "". Images are drawn only when the
    policy observes: make env with render=False. max_steps stops earlier than the task's limit.
    frame_size adds "frames": images of that many pixels for people, GIF_HZ per second and a final
    one. which: command and new of `TabletopEnv.reset`. other: another of the scene's commands;
    "other" tells whether it was done at any time. delay, inpaint: see `Pilot`. "border_steps" and
    "inner_steps": see `joint_steps`.
    """
    env.reset(seed, instruction, **which)
    states = [env.state()]
    held = []  # what the gripper held after each step
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
    """Differences of successive targets, of the largest joint, rad: (at borders, elsewhere).

    targets: [(dof + 1,)]; borders: indices of the targets where a new chunk takes over.
    """
    joints = np.array(targets)[:, :dof]
    steps = np.abs(np.diff(joints, axis=0)).max(1)  # (L - 1,)
    # an episode may end before the last border
    before = [border - 1 for border in borders if border < len(targets)]
    return steps[before].tolist(), np.delete(steps, before).tolist()


def jerk(states, dof, hz=CONTROL_HZ):
    """Mean absolute third difference of joint angles in states (L, S), rad/s^3: roughness.

    For a robot whose state has no joint angles it is that of the hand's position, m/s^3.
    """
    if len(states) < 4:
        return 0.0
    differences = np.diff(np.array(states)[:, :dof], 3, axis=0)  # (L - 3, dof)
    return float(np.abs(differences).mean() * hz**3)


def save_gif(path, frames):
    """Frames (PIL) as a looping GIF in real time, with a pause on the last one."""
    first, *others = [frame.quantize(64) for frame in frames]  # a third of the file size
    duration = 1000 // GIF_HZ  # ms
    durations = [duration] * len(others) + [1500]
    with atomic(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, loop=0, duration=durations)


def draw_episode(blm, env, seed, folder, **options):
    """A `rollout` with these options as a GIF, <folder>/<robot>-<scene>-<seed>.gif.

    Returns (path, outcome); the outcome is text for people, such as "success after 3.2 s".
    """
    result = rollout(blm, env, seed, **options, frame_size=GIF_SIZE)
    outcome = f"{result['reason'] or 'success'} after {result['steps'] / env.hz:.1f} s"
    text = f"{env.robot.display_name}\n{env.instruction}"
    texts = [text] * len(result["frames"])
    texts[-1] += f"\n{outcome}"  # below the last frame
    frames = []
    for picture, text in zip(result["frames"], texts):
        frame = Image.new("RGB", (GIF_SIZE, GIF_SIZE + 60), "white")
        frame.paste(Image.fromarray(picture))
        place = (6, GIF_SIZE + 4)
        ImageDraw.Draw(frame).text(place, text, fill="black", font_size=13)
        frames.append(frame)
    # the command is in the name, so that one episode does not overwrite another
    command = f"-{options['command']}" if env.family else ""
    path = Path(folder) / f"{env.robot.name}-{env.scene}-{seed}{command}.gif"
    save_gif(path, frames)
    return path, outcome
