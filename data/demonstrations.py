"""Training data for Stage II: rows of episodes, with hidden states of the frozen language model.

The language model is frozen, so a frame's hidden states after block k never change. They are
computed once for every FRAME_STRIDE-th frame and stored in the folder that `cache_folder` names,
one file per episode: <cache>/<model>-k<k>-int8/<episode>.safetensors, or -text-first-int8 if the
instruction comes first. The names are hashes of the model and the episode, so a file of another
model or episode is never read.

Hidden states are stored in 8 bits, with a scale per token that maps its largest number to 127. The
policy's first layer normalizes each token, and for a token of unit standard deviation the rounding
error has a standard deviation of at most sqrt(Dc) / 440; docs/RESULTS.md has the measured one.

A row is a frame t of an episode: hidden states at t and at t + T, state at t, actions t .. t + T -
1. Past the end of the episode the last action is repeated: an episode ends when its task is done,
and an arm that was never shown to stay there would drift away. There is no future frame then, so
the future loss is left out.

Letters: B rows of a step, R rows of all episodes, L tokens, Dc width of the language model, T
action horizon, A and S action and state dims, padded to those of the largest robot.
"""

import hashlib
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from cli import UserError, choose_many
from data.families import FAMILIES
from data.record import load_episodes
from data.robots import ROBOTS
from data.tasks import TASKS
from files import Tensors, save_tensors

FRAME_STRIDE = 4  # control steps between training frames; divides the action horizon
HELD_OUT = 25  # every so many episodes of a cell, one is for validation


def select_episodes(cfg, known):
    """The episodes that cfg (a TrainConfig) selects, sorted by cell and seed.

    If some robots are not in `known`, only their episodes: the layers of the others stay frozen.
    """
    recorded = load_episodes(cfg.data)
    # an imported dataset has its own robots and tasks
    known_robots = [*ROBOTS, *(e.robot for e in recorded)]
    robots = choose_many(cfg.robots, dict.fromkeys(known_robots), "robot")
    known_scenes = [*TASKS, *FAMILIES, *(e.scene for e in recorded)]
    scenes = choose_many(cfg.tasks, dict.fromkeys(known_scenes), "task")
    # already sorted by cell and seed
    wanted = [e for e in recorded if e.robot in robots and e.scene in scenes]
    # layers of known robots will be frozen
    new = {episode.robot for episode in wanted} - set(known)
    episodes = []
    for _, cell in groupby(wanted, cell_of):
        members = [episode for episode in cell if not new or episode.robot in new]
        episodes += members[: cfg.demonstrations or None]
    if not episodes:
        raise UserError(
            f"{cfg.data} holds no episodes of --robots {cfg.robots} and --tasks {cfg.tasks}: "
            f"record them with `python -m data.record --out {cfg.data}`"
        )
    return episodes


def cell_of(episode):
    return episode.robot, episode.scene


# ---- hidden states


def frames_of(episode):
    """The control steps of an episode that are used in training."""
    return range(0, len(episode), FRAME_STRIDE)


def cache_path(folder, episode):
    """Named by everything that an episode's hidden states depend on, except the model."""
    # the checksum covers the images too: an edited episode gets a new name
    words = f"{episode.path.name} {episode.instruction} {episode.checksum} {FRAME_STRIDE}"
    digest = hashlib.sha256(words.encode()).hexdigest()
    return folder / f"{digest[:16]}.safetensors"


def cache_folder(cache, backbone, config):
    """The folder of hidden states for the model with this hash, as a PolicyConfig reads them."""
    order = "-text-first" if config.text_first else ""
    return Path(cache) / f"{backbone}-k{config.intent_layer}{order}-int8"


def to_bytes(hidden):
    """Hidden states (..., L, Dc) as {"hidden": int8, "scale": (..., L, 1) float32}."""
    hidden = hidden.float().cpu().clamp(-65504, 65504)  # readers convert to float16
    # avoid a scale of 0 for a token of zeros
    scale = hidden.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return {"hidden": (hidden / scale).round().to(torch.int8), "scale": scale}


class HiddenStates:
    """hidden[frame] of an episode's file, (L, Dc) float16, read from disk on access."""

    def __init__(self, file):
        self.hidden = file.slice("hidden")
        self.scale = file.slice("scale")

    def __getitem__(self, frame):
        numbers = torch.from_numpy(self.hidden[frame])
        return (numbers * torch.from_numpy(self.scale[frame])).half()


def open_cache(folder, episode):
    """The HiddenStates of an episode. UserError if they are missing or damaged."""
    return HiddenStates(Tensors(cache_path(folder, episode)).check())


def uncached(episodes, folder, rank=0):
    """The episodes whose hidden states are missing in `folder`, or damaged."""
    missing = []
    for episode in tqdm(episodes, "hidden states: looking", disable=rank > 0, leave=False):
        try:
            open_cache(folder, episode)
        except UserError as error:
            missing.append(episode)
            # do not report files that never existed
            if cache_path(folder, episode).exists():
                tqdm.write(f"{error}; recomputing it")
    return missing


def cache_hidden_states(blm, missing, config, folder, rank=0, world=1, fsdp=False):
    """Compute those of episodes for a PolicyConfig; rank r of `world` computes its share."""
    share = missing[rank::world]
    # with shards every process must run equally often
    if fsdp and len(share) < len(missing[::world]):
        share.append(missing[0])
    for episode in tqdm(share, "hidden states", disable=rank > 0, unit="episode"):
        # one batch: an episode of 200 steps gives 50 prompts of equal length, without padding
        images = [episode.images(t) for t in frames_of(episode)]
        texts = [episode.instruction] * len(images)
        reads = (config.intent_layer, config.text_first)
        hidden, _ = blm.intent_states(images, texts, *reads)
        save_tensors(cache_path(folder, episode), to_bytes(hidden), {})


# ---- rows


class Demonstrations:
    """All rows in memory, except for hidden states, which stay on disk until a batch needs them.

    embodiments {robot: Embodiment}, those of `known` first; cells [(robot, scene)];
    frame (R, 2): episode and frame of each row; has_future (R,); train (n,): row numbers;
    held_out: an array of row numbers per cell.
    """

    def __init__(self, episodes, hidden, horizon, num_waypoints, known=()):
        self.episodes = episodes
        self.hidden = hidden  # of each episode, from `open_cache`
        self.horizon = horizon
        self.num_waypoints = num_waypoints
        self.ahead = horizon // FRAME_STRIDE  # frames between a row and its future
        self.embodiments = dict(known)
        for episode in episodes:
            expected = self.embodiments.setdefault(episode.robot, episode.embodiment)
            shape = episode.embodiment.shape()
            if shape != expected.shape():
                raise UserError(f"{episode.path}: {shape}, not {expected.shape()}")
        robots = list(self.embodiments)
        indices = [robots.index(episode.robot) for episode in episodes]
        counts = [len(frames_of(episode)) for episode in episodes]
        # one row per frame of an episode
        self.frame = np.array([(i, j) for i, count in enumerate(counts) for j in range(count)])
        self.has_future = self.frame[:, 1] + self.ahead < np.repeat(counts, counts)
        self.embodiment = np.repeat(indices, counts)
        self.cells = sorted(set(map(cell_of, episodes)))
        self.split()
        self.partner = self.find_partners(counts)

    def split(self):
        """Hold out every HELD_OUT-th episode of a cell. New ones come last, so this is stable."""
        number = self.frame[:, 0]  # episode of each row
        self.held_out = []
        for cell in self.cells:
            members = [i for i, episode in enumerate(self.episodes) if cell_of(episode) == cell]
            # in a small cell hold out the last episode, unless it is the only one
            aside = members[HELD_OUT - 1 :: HELD_OUT] or members[1:][-1:]
            rows = np.flatnonzero(np.isin(number, aside))
            self.held_out.append(rows)
        aside = np.concatenate(self.held_out)
        self.train = np.setdiff1d(np.arange(len(number)), aside)

    def find_partners(self, counts):
        """(R,) for each row the one with the layout's other command at the same step.

        The row itself if there is no other command, or if its episode is held out.
        """
        first = np.cumsum([0, *counts])  # row of each episode's first frame
        layouts = defaultdict(list)
        for i, episode in enumerate(self.episodes):
            layouts[(*cell_of(episode), episode.seed)].append(i)
        itself = np.arange(len(self.frame))
        partner = itself.copy()
        for members in layouts.values():
            for i, j in zip(members, members[1:] + members[:1]):
                # or the last frame, if that episode is shorter
                frames = np.arange(counts[i]).clip(max=counts[j] - 1)
                partner[first[i] : first[i + 1]] = first[j] + frames
        return np.where(np.isin(partner, self.train), partner, itself)

    def numbers(self, rows):
        """state (n, S) and action (n, T, A) of rows (n,); zero-padded for smaller robots."""
        robots = self.embodiments.values()
        S = max(robot.state_dim for robot in robots)
        A = max(robot.action_dim for robot in robots)
        state = torch.zeros(len(rows), S)
        action = torch.zeros(len(rows), self.horizon, A)
        ahead = np.arange(self.horizon)
        for row, (i, frame) in enumerate(self.frame[rows]):
            episode = self.episodes[i]
            robot = self.embodiments[episode.robot]
            step = frame * FRAME_STRIDE
            # past the end the last action is held
            steps = (step + ahead).clip(max=len(episode) - 1)
            state[row, : robot.state_dim] = torch.from_numpy(episode.state[step])
            action[row, :, : robot.action_dim] = torch.from_numpy(episode.action[steps])
        return state, action

    def waypoints(self, rows):
        """(n, W, 3) m: tool positions T, 2 T, ... steps after each row, or at the episode's end."""
        ahead = self.horizon * np.arange(1, self.num_waypoints + 1)
        # an imported state does not tell where the tool is
        places = np.zeros((len(rows), len(ahead), 3), np.float32)
        for row, (i, frame) in enumerate(self.frame[rows]):
            episode = self.episodes[i]
            if episode.robot in ROBOTS:
                steps = (frame * FRAME_STRIDE + ahead).clip(max=len(episode) - 1)
                first = episode.action.shape[1]  # it comes after joints and finger
                places[row] = episode.state[steps, first : first + 3]
        return places

    def fit_statistics(self, normalizer):
        """Fit a policy's normalizer to the training rows of robots that have no statistics yet."""
        embodiment = self.embodiment[self.train]
        for robot in np.unique(embodiment):
            # other statistics would change how a trained robot acts
            if not normalizer.fitted[robot]:
                rows = self.train[embodiment == robot]
                normalizer.fit(int(robot), *self.numbers(rows))

    def rows_of_step(self, seed, step, batch_size):
        """(B,) rows, a function of (seed, step), sorted by robot so that the policy has few groups.

        All frames are equally likely, so longer tasks weigh more.
        """
        rng = np.random.default_rng([seed, step])
        rows = rng.choice(self.train, batch_size)
        # The second half holds the other commands of the first half's layouts, at the same step:
        # early in an episode only the instruction tells the two apart. Where there is none, the
        # drawn row is kept.
        half = len(rows) // 2
        first = rows[:half]
        second = rows[half : 2 * half]  # a view
        other = self.partner[first]
        second[:] = np.where(other == first, second, other)
        order = np.argsort(self.embodiment[rows], kind="stable")
        return rows[order]

    def batch(self, rows):
        """The input of Policy.forward for rows (B,). A missing future is the present frame."""
        future = self.has_future[rows]
        later = self.frame[rows]  # a copy: fancy indexing
        later[:, 1] += self.ahead * future
        state, action = self.numbers(rows)
        batch = {
            "future_valid": torch.from_numpy(future),
            "state": state,
            "action": action,
            "embodiment": torch.from_numpy(self.embodiment[rows]),
            "waypoints": torch.from_numpy(self.waypoints(rows)),
        }
        # instructions differ in length, so tokens are padded
        for name, frames in (("", self.frame[rows]), ("future_", later)):
            states = [torch.as_tensor(self.hidden[i][int(j)]) for i, j in frames]
            real = [torch.ones(len(state), dtype=torch.bool) for state in states]
            # the policy converts from float16 itself
            batch[f"{name}hidden"] = pad_sequence(states, True)  # (B, L, Dc)
            batch[f"{name}mask"] = pad_sequence(real, True)  # (B, L)
        return batch

    def describe(self, rows):
        """Rows in words, to find a bad one."""
        words = []
        for i, frame in self.frame[rows]:
            words.append(f"{self.episodes[i].path.name} step {frame * FRAME_STRIDE}")
        return ", ".join(words)
