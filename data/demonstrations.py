"""What Stage II reads: rows of episodes, with what the frozen language model says of their frames.

The language model says the same of the same frame every time. So what its block k says is computed once
for every FRAME_STRIDE-th frame and kept in <cache>/<model>-k<k>/<episode>.safetensors. Names are hashes of
what a file was made from: another model or other episodes never meet a stale one.

A row is a frame t of an episode: hidden states at t and at t + T, state at t, actions t .. t + T - 1.
Past the end the last action is held: an episode ends where its task is done, and an arm that was never
shown to stay there drifts on. There the future is missing, and its loss left out.

Letters: B rows of a step, R rows of all episodes, L tokens, Dc width of the language model, T action
horizon, A and S action and state dims, padded to the largest robot's.
"""

import hashlib
from collections import Counter

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from cli import UserError, choose_many
from data.record import load_episodes
from data.robots import ROBOTS
from data.tasks import TASKS
from files import Tensors, save_tensors

FRAME_STRIDE = 4  # control steps between frames that are trained on; divides the action horizon
HELD_OUT = 25  # one episode in so many of each cell is for validation
MOST_FRAMES = 64  # that the language model sees at once


def select_episodes(cfg, known):
    """The episodes that cfg (a TrainConfig) asks for, sorted by cell and seed.

    If some are of robots that are not among `known`, only theirs: the others' layers will not train.
    """
    robots = choose_many(cfg.robots, ROBOTS, "robot")
    tasks = choose_many(cfg.tasks, TASKS, "task")
    episodes = [e for e in load_episodes(cfg.data) if e.robot in robots and e.task in tasks]
    new = {e.robot for e in episodes} - set(known)
    if known and new:
        episodes = [e for e in episodes if e.robot in new]
    if cfg.demonstrations:
        counts = Counter()
        first = []
        for e in episodes:
            counts[e.robot, e.task] += 1
            if counts[e.robot, e.task] <= cfg.demonstrations:
                first.append(e)
        episodes = first
    if not episodes:
        raise UserError(
            f"{cfg.data} holds no episodes of --robots {cfg.robots} and --tasks {cfg.tasks}: "
            f"record them with `python -m data.record --out {cfg.data}`"
        )
    return episodes


# ---- hidden states


def frames_of(episode):
    """The control steps of an episode that are trained on."""
    return range(0, len(episode), FRAME_STRIDE)


def cache_path(folder, episode):
    """A name made of all that an episode's hidden states depend on."""
    words = f"{episode.path.name} {episode.instruction} {episode.checksum}"
    return folder / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.safetensors"


def open_cache(folder, episode, width):
    """Hidden states (frames, L, Dc) float16, read as they are asked for.

    None if there are none, or they are damaged or of another shape: they will be made again.
    """
    path = cache_path(folder, episode)
    if not path.exists():
        return None
    try:
        hidden = Tensors(path).check().slice("hidden")
    except UserError as error:
        tqdm.write(f"{error}; it is made again")
        return None
    frames, *_, last = hidden.get_shape()
    return hidden if (frames, last) == (len(frames_of(episode)), width) else None


def cache_hidden_states(blm, episodes, intent_layer, folder, rank=0, world=1, fsdp=False):
    """Compute what is missing in `folder`; rank r of `world` processes computes its share."""
    width = blm.vlm.config.hidden_size
    bar = tqdm(episodes, "hidden states: looking", disable=rank > 0, leave=False)
    missing = [episode for episode in bar if open_cache(folder, episode, width) is None]
    share = missing[rank::world]
    if fsdp:  # shards work together, so every process does as many
        share += missing[: -(-len(missing) // world) - len(share)]
    for episode in tqdm(share, "hidden states", disable=rank > 0 or not share, unit="episode"):
        frames = frames_of(episode)
        parts = []
        for start in range(0, len(frames), MOST_FRAMES):
            images = [episode.images(t) for t in frames[start : start + MOST_FRAMES]]
            texts = [episode.instruction] * len(images)  # one length, so no padding
            hidden, _ = blm.intent_states(images, texts, intent_layer)
            parts.append(hidden.clamp(-65504, 65504).half().cpu().numpy())
        save_tensors(cache_path(folder, episode), {"hidden": np.concatenate(parts)}, {})


# ---- rows


class Demonstrations:
    """All rows in memory, but for hidden states, which stay on disk until a batch asks for them.

    embodiments {robot: (state_dim, action_dim)}, those of `known` first; cells [(robot, task)];
    frame (R, 2): episode and frame of each row; has_future (R,); train (n,): row numbers;
    held_out [row numbers], an array a cell.
    """

    def __init__(self, episodes, hidden, horizon, known=()):
        self.hidden = hidden
        self.names = [episode.path.name for episode in episodes]
        self.embodiments = dict(known)
        for episode in episodes:
            sizes = (episode.state.shape[1], episode.action.shape[1])
            if self.embodiments.setdefault(episode.robot, sizes) != sizes:
                expected = self.embodiments[episode.robot]
                raise UserError(f"{episode.path}: {sizes} numbers of state, action; not {expected}")
        self.cells = sorted({(episode.robot, episode.task) for episode in episodes})
        self.ahead = horizon // FRAME_STRIDE  # frames until the future
        counts = np.array([len(frames_of(episode)) for episode in episodes])
        index = np.repeat(np.arange(len(episodes)), counts)
        within = np.concatenate([np.arange(count) for count in counts])
        self.frame = np.stack([index, within], axis=1)  # (R, 2)
        self.has_future = within + self.ahead < counts[index]  # (R,)
        robots = list(self.embodiments)
        self.embodiment = np.array([robots.index(episodes[i].robot) for i in index])
        self.fill(episodes, horizon)
        self.split(episodes)

    def fill(self, episodes, horizon):
        """state (R, S) and action (R, T, A), zeros where a robot has fewer numbers."""
        state_dim, action_dim = np.max(list(self.embodiments.values()), axis=0)
        self.state = np.zeros((len(self.frame), state_dim), np.float32)
        self.action = np.zeros((len(self.frame), horizon, action_dim), np.float32)
        for row, (i, j) in enumerate(self.frame):
            t = j * FRAME_STRIDE
            state = episodes[i].state[t]
            action = episodes[i].action[t : t + horizon]
            action = np.pad(action, ((0, horizon - len(action)), (0, 0)), mode="edge")
            self.state[row, : len(state)] = state
            self.action[row, :, : action.shape[1]] = action

    def split(self, episodes):
        """Set every HELD_OUT-th episode of a cell aside; new ones come last, so those aside stay."""
        self.held_out = []
        for cell in self.cells:
            members = [i for i, e in enumerate(episodes) if (e.robot, e.task) == cell]
            aside = members[HELD_OUT - 1 :: HELD_OUT]
            if not aside and len(members) > 1:
                aside = members[-1:]
            self.held_out.append(np.flatnonzero(np.isin(self.frame[:, 0], aside)))
        rows = np.arange(len(self.frame))
        self.train = np.setdiff1d(rows, np.concatenate(self.held_out))

    def fit_statistics(self, normalizer):
        """Fit a policy's normalizer to the training rows of robots that have no statistics yet."""
        for robot in np.unique(self.embodiment[self.train]):
            if not normalizer.fitted[robot]:
                rows = self.train[self.embodiment[self.train] == robot]
                state = torch.from_numpy(self.state[rows])
                normalizer.fit(int(robot), state, torch.from_numpy(self.action[rows]))

    def rows_of_step(self, seed, step, batch_size):
        """(B,) rows, a function of (seed, step), sorted by robot: the policy has few groups then.

        Any frame is as likely as any other, so longer tasks weigh more.
        """
        rows = np.random.default_rng([seed, step]).choice(self.train, batch_size)
        return rows[np.argsort(self.embodiment[rows], kind="stable")]

    def batch(self, rows):
        """What Policy.forward takes, for rows (B,). A row without a future has the present there."""
        future = self.has_future[rows]
        later = self.frame[rows]  # a copy: fancy indexing
        later[:, 1] += self.ahead * future
        batch = {"future_valid": torch.from_numpy(future)}
        for name, frames in (("", self.frame[rows]), ("future_", later)):
            states = [torch.from_numpy(self.hidden[i][int(j)]).float() for i, j in frames]
            lengths = torch.tensor([len(state) for state in states])
            batch[f"{name}hidden"] = pad_sequence(states, batch_first=True)  # (B, L, Dc)
            batch[f"{name}mask"] = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, L)
        for name in ("state", "action", "embodiment"):
            batch[name] = torch.from_numpy(getattr(self, name)[rows])
        return batch

    def describe(self, rows):
        """Rows in words, for whoever looks for a bad one."""
        frames = self.frame[rows]
        return ", ".join(f"{self.names[i]} step {j * FRAME_STRIDE}" for i, j in frames)
