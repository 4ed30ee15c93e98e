"""Compare a policy with held-out recordings: `python eval.py replay`.

Open loop: for each recorded frame the policy predicts the next actions, which are compared with the
recorded ones. Two controls put the errors in proportion: repeating the last action, and the actions
recorded at the training frame with the nearest state. Letters as in data/demonstrations.py: T steps
of a chunk, A numbers of an action, S of a state, n rows of a robot.
"""

import copy
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

from cli import choose
from data.demonstrations import FRAME_STRIDE, Demonstrations, select_episodes
from data.lerobot_write import names_in


def predict(blm, episode, step):
    """The chunk (T, A) that the policy predicts at a step, as when it drives."""
    return blm.act(episode.observation(step), episode.robot)


def repeat_last(episode, step, horizon):
    """The previous action, T times (T, A); at the first step one that keeps the robot still."""
    last = episode.action[step - 1] if step else stand_still(episode)
    return np.tile(last, (horizon, 1))


def stand_still(episode):
    """The action (A,) that leaves a robot where it starts: its own joints, or deltas of zero."""
    relative = np.array(episode.embodiment.relative)
    first = episode.state[0]
    action = np.zeros_like(episode.action[0])
    # a gripper has the same index in state and action
    if (relative >= 0).any():
        size = min(len(first), len(action))
        action[:size] = first[:size]
    return np.where(relative >= 0, first[relative], action)


class Nearest:
    """The training rows of a robot (its index), looked up by state."""

    def __init__(self, demonstrations, normalizer, robot):
        own = demonstrations.embodiment[demonstrations.train] == robot
        rows = demonstrations.train[own]
        robots = list(demonstrations.embodiments.values())
        self.action_dim = robots[robot].action_dim
        self.normalizer = normalizer
        self.robot = torch.tensor([robot])
        state, self.action = demonstrations.numbers(rows)
        # joints in rad and positions in m are comparable only in standard deviations
        self.state = normalizer.normalize_state(state, self.robot.expand(len(rows)))  # (n, S)

    def chunk(self, state):
        """The actions (T, A) recorded where the normalized state was nearest to this one (1, S)."""
        state = self.normalizer.normalize_state(state, self.robot)
        row = (self.state - state).norm(dim=1).argmin()
        return self.action[row, :, : self.action_dim].numpy()


def joints_of(episode):
    """(names, units) of an action's numbers. For an imported robot only the names are known."""
    size = episode.action.shape[1]
    _, names = names_in(episode)
    names = [str(name).removesuffix(".rad").removesuffix(".m") for name in names or range(size)]
    if "dataset" in episode.about:
        return names, ["the dataset's unit"] * size
    # recorded in our simulator: the units are those of data/robots.py
    return names, ["rad"] * (size - 1) + ["m"]


def compare(blm, config):
    """{robot: errors by joint of the policy and of both controls, and an episode to draw}.

    Evaluated on the held-out frames of --data. UserError on a robot that the policy does not know.
    """
    policy = blm.require_policy()
    robots = policy.embodiments
    episodes = select_episodes(config, robots)
    for episode in episodes:
        choose(episode.robot, robots, "robot of this policy")
    horizon = policy.config.action_horizon
    # no hidden states: `act` computes its own
    demonstrations = Demonstrations(episodes, None, horizon, 0, robots)
    normalizer = copy.deepcopy(policy.normalizer).cpu()  # on the device of the demonstrations
    nearest = {}  # {robot: its training rows}
    errors = defaultdict(lambda: defaultdict(list))
    drawn = {}  # {robot: the episode to draw, and the policy's chunks for it, in order}
    for row in tqdm(np.concatenate(demonstrations.held_out), unit="frame"):
        # a row is one frame of an episode
        number, frame = demonstrations.frame[row]
        episode = demonstrations.episodes[number]
        step = int(frame) * FRAME_STRIDE
        robot = int(demonstrations.embodiment[row])
        if robot not in nearest:
            nearest[robot] = Nearest(demonstrations, normalizer, robot)
        state, _ = demonstrations.numbers([row])
        chunks = {
            "policy": predict(blm, episode, step),
            "repeat_last": repeat_last(episode, step, horizon),
            "nearest_frame": nearest[robot].chunk(state),
        }
        # nothing was recorded past the end
        done = episode.action[step : step + horizon]
        for name, chunk in chunks.items():
            error = np.abs(chunk[: len(done)] - done)
            errors[episode.robot][name].append(error)
        # the first episode of each robot, its chunks concatenated
        first, parts = drawn.setdefault(episode.robot, (episode, []))
        if first is episode and step % horizon == 0:
            parts.append(chunks["policy"][: len(done)].tolist())
    return {robot: figures(kinds, *drawn[robot]) for robot, kinds in errors.items()}


def figures(kinds, episode, chunks):
    """The result for one robot: kinds {policy or control: errors (steps, A) of each frame}."""
    names, units = joints_of(episode)
    means = {}
    for name, parts in kinds.items():
        # every step has the same weight
        means[name] = np.concatenate(parts).mean(0).tolist()
    return {
        "frames": len(kinds["policy"]),
        "joints": names,
        "units": units,
        "error": means,
        "episode": episode.path.name,
        "recorded": episode.action.tolist(),
        "chunks": chunks,
    }
