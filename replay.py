"""A policy beside recordings that it was not trained on: `python eval.py replay`.

Open loop: it sees a recorded frame and says the next steps, and what was done instead is known. Two
controls say what that is worth: the last action said again, and what was done in the training frame
whose state is nearest. Letters as in data/demonstrations.py: T steps of a chunk, A numbers of an
action, S of a state, n rows of a robot.
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
    """The chunk (T, A) that the policy would carry out at a step, as when it drives."""
    return blm.act(episode.observation(step), episode.robot)


def repeat_last(episode, step, horizon):
    """The action before, T times (T, A); at the first step where the joints are, or no movement."""
    last = episode.action[step - 1] if step else stand_still(episode)
    return np.tile(last, (horizon, 1))


def stand_still(episode):
    """The action (A,) that leaves a robot where it begins: its own joints, or deltas of zero."""
    relative = np.array(episode.embodiment.relative)
    first = episode.state[0]
    action = np.zeros_like(episode.action[0])
    # a gripper stands in state and action in the same place
    if (relative >= 0).any():
        size = min(len(first), len(action))
        action[:size] = first[:size]
    return np.where(relative >= 0, first[relative], action)


class Nearest:
    """The training rows of a robot (its index), to be looked up by state."""

    def __init__(self, demonstrations, normalizer, robot):
        own = demonstrations.embodiment[demonstrations.train] == robot
        rows = demonstrations.train[own]
        robots = list(demonstrations.embodiments.values())
        self.action_dim = robots[robot].action_dim
        self.normalizer = normalizer
        self.robot = torch.tensor([robot])
        state, self.action = demonstrations.numbers(rows)
        # joints in rad and places in m count alike only in deviations
        self.state = normalizer.normalize_state(state, self.robot.expand(len(rows)))  # (n, S)

    def chunk(self, state):
        """What was done (T, A) where the normalized state was nearest to this one (1, S)."""
        state = self.normalizer.normalize_state(state, self.robot)
        row = (self.state - state).norm(dim=1).argmin()
        return self.action[row, :, : self.action_dim].numpy()


def joints_of(episode):
    """(names, units) of the numbers of an action. Of an imported robot only names are known."""
    size = episode.action.shape[1]
    _, names = names_in(episode)
    names = [str(name).removesuffix(".rad").removesuffix(".m") for name in names or range(size)]
    if "dataset" in episode.about:
        return names, ["the dataset's unit"] * size
    # recorded here: units are those of data/robots.py
    return names, ["rad"] * (size - 1) + ["m"]


def compare(blm, config):
    """{robot: errors by joint of the policy and of both controls, and an episode to draw}.

    Over the held-out frames of --data. UserError on a robot that the policy does not know.
    """
    policy = blm.require_policy()
    robots = policy.embodiments
    episodes = select_episodes(config, robots)
    for episode in episodes:
        choose(episode.robot, robots, "robot of this policy")
    horizon = policy.config.action_horizon
    # without hidden states: `act` makes its own
    demonstrations = Demonstrations(episodes, None, horizon, 0, robots)
    normalizer = copy.deepcopy(policy.normalizer).cpu()  # where demonstrations are
    nearest = {}  # {robot: its training rows}
    errors = defaultdict(lambda: defaultdict(list))
    drawn = {}  # {robot: the episode that is drawn, and the policy's chunks one after another}
    for row in tqdm(np.concatenate(demonstrations.held_out), unit="frame"):
        # a row is a frame of an episode
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
        # what lies past the end was never recorded
        done = episode.action[step : step + horizon]
        for name, chunk in chunks.items():
            error = np.abs(chunk[: len(done)] - done)
            errors[episode.robot][name].append(error)
        # the first episode of each robot, its chunks end to end
        first, parts = drawn.setdefault(episode.robot, (episode, []))
        if first is episode and step % horizon == 0:
            parts.append(chunks["policy"][: len(done)].tolist())
    return {robot: figures(kinds, *drawn[robot]) for robot, kinds in errors.items()}


def figures(kinds, episode, chunks):
    """What is kept of a robot: kinds {policy or control: errors (steps, A) of each frame}."""
    names, units = joints_of(episode)
    means = {}
    for name, parts in kinds.items():
        # every step counts as much as another
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
