"""A policy beside recordings that it was not trained on: `python eval.py replay`.

Open loop: it sees a recorded frame and says the next steps, and what was done instead is known. Two
controls say what that is worth: the last action said again, and what was done in the training frame
whose state is nearest. Letters as in data/demonstrations.py: T steps of a chunk, A numbers of an
action, n rows of a robot.
"""

import copy
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

from cli import choose
from data.demonstrations import FRAME_STRIDE, Demonstrations, select_episodes
from data.env import VIEWS
from data.lerobot_write import names_in
from data.robots import ROBOTS


def predict(blm, episode, step):
    """The chunk (T, A) that the policy would carry out at a step, as when it drives."""
    images = dict(zip(VIEWS, episode.images(step)))
    observation = {"images": images, "state": episode.state[step]}
    return blm.act({**observation, "instruction": episode.instruction}, episode.robot)


def repeat_last(episode, step, horizon):
    """The action before, T times (T, A); at the first step where the joints are."""
    size = episode.action.shape[1]
    last = episode.action[step - 1] if step else episode.state[0, :size]
    return np.tile(last, (horizon, 1))


class Nearest:
    """The training rows of a robot (its index), to be looked up by state."""

    def __init__(self, demonstrations, normalizer, robot):
        rows = demonstrations.train[demonstrations.embodiment[demonstrations.train] == robot]
        self.normalizer = normalizer
        self.robot = torch.tensor([robot])
        self.size = list(demonstrations.embodiments.values())[robot][1]
        state, self.action = demonstrations.numbers(rows)
        self.state = normalizer.normalize_state(state, self.robot.expand(len(rows)))  # (n, S)

    def chunk(self, state):
        """What was done (T, A) where the normalized state was nearest to this one (1, S)."""
        state = self.normalizer.normalize_state(state, self.robot)
        row = (self.state - state).norm(dim=1).argmin()
        return self.action[row, :, : self.size].numpy()


def joints_of(episode):
    """Name and unit of every number of an action. Of an imported robot only the names are known."""
    _, names = names_in(episode)
    size = episode.action.shape[1]
    names = [str(name).removesuffix(".rad").removesuffix(".m") for name in names or range(size)]
    units = ["the dataset's"] * size
    if episode.robot in ROBOTS:
        units = [*["rad"] * (size - 1), "m"]
    return names, units


def compare(blm, config):
    """Mean absolute error by joint, in its unit, of a policy and of the controls, as a dict."""
    policy = blm.require_policy()
    horizon = policy.config.action_horizon
    episodes = select_episodes(config, policy.embodiments)
    for episode in episodes:
        choose(episode.robot, policy.embodiments, "robot of this policy")
    demonstrations = Demonstrations(episodes, None, horizon, 0, policy.embodiments)
    normalizer = copy.deepcopy(policy.normalizer).cpu()  # where demonstrations are
    rows = np.concatenate(demonstrations.held_out)
    nearest = {}
    errors = defaultdict(lambda: defaultdict(list))
    traces = {}
    for row in tqdm(rows, unit="frame"):
        number, frame = demonstrations.frame[row]
        episode = episodes[number]
        step = int(frame) * FRAME_STRIDE
        robot = int(demonstrations.embodiment[row])
        if robot not in nearest:
            nearest[robot] = Nearest(demonstrations, normalizer, robot)
        state, _ = demonstrations.numbers([row])
        chunks = {
            "policy": predict(blm, episode, step),
            "repeat": repeat_last(episode, step, horizon),
            "nearest": nearest[robot].chunk(state),
        }
        done = episode.action[step : step + horizon]  # what is past the end was never recorded
        for name, chunk in chunks.items():
            errors[episode.robot][name].append(np.abs(chunk[: len(done)] - done))
        # one episode of each robot is drawn, chunk behind chunk
        trace = traces.setdefault(episode.robot, {"episode": episode, "chunks": []})
        if trace["episode"] is episode and step % horizon == 0:
            trace["chunks"].append(chunks["policy"][: len(done)].tolist())

    robots = {}
    for robot, kinds in errors.items():
        trace = traces[robot]
        names, units = joints_of(trace["episode"])
        means = {name: np.concatenate(parts).mean(0).tolist() for name, parts in kinds.items()}
        robots[robot] = {"frames": len(kinds["policy"]), "joints": names, "units": units}
        robots[robot] |= {"error": means, "chunks": trace["chunks"]}
        robots[robot] |= {"episode": trace["episode"].path.name}
        robots[robot]["recorded"] = trace["episode"].action.tolist()
        for line in zip(names, units, *means.values()):
            name, unit, *numbers = line
            print(
                f"| {robot} | {name} ({unit}) | " + " | ".join(f"{x:.4f}" for x in numbers) + " |"
            )
    return {"robots": robots}
