"""Chunks that arrive late: the arm keeps moving, and the new chunk starts with what it executes."""

import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_model import observation, small_blm
from test_policy import ROBOTS, WIDTH, T, observed, small_batch, small_policy

import rollout
from cli import UserError
from inpainting import guided, soft_mask
from model import BLM
from policy import Policy, PolicyConfig
from rollout import Pilot, joint_steps


@pytest.fixture(scope="module")
def blm():
    return small_blm()


# ---- the flow


@pytest.mark.parametrize("committed, known", [(0, 4), (2, 4), (4, 8), (8, 8), (0, 0), (3, 16)])
def test_weights_are_those_of_the_paper(committed, known):
    H, d, s = 16, committed, 16 - known
    weights = []
    for i in range(H):
        c = (H - s - i) / (H - s - d + 1)
        fading = c * (math.exp(c) - 1) / (math.e - 1)
        weights.append(1 if i < d else fading if i < H - s else 0)
    assert soft_mask(committed, known, H).tolist() == pytest.approx(weights)


def test_guidance_is_clipped_and_follows_the_gradient():
    """With a linear network, v = x M, the vector-Jacobian product is known."""
    M = torch.randn(3, 3)
    x, known, weight = torch.randn(3, 2, 4, 3).unbind()
    for tau, strength in ((0.0, 5.0), (0.25, 10 / 3), (0.5, 2.0), (0.99, 5.0)):
        jacobian = torch.eye(3) + (1 - tau) * M
        error = weight * (known - x @ jacobian)
        wanted = x @ M + strength * error @ jacobian.T
        got = guided(lambda x, tau: (x @ M,), x, (torch.tensor([tau]),), known, weight)
        assert torch.allclose(got, wanted, atol=1e-4)


def test_held_steps_end_in_known_targets_and_free_ones_do_not_move():
    """A new policy's velocity is zero, so only the guidance moves anything."""
    policy = Policy(PolicyConfig(), WIDTH, ROBOTS)
    batch = small_batch()
    for robot in range(2):
        policy.normalizer.fit(robot, torch.randn(30, 8), torch.randn(30, 16, 5))
    noise, known = torch.randn(2, 6, 16, 5).unbind()
    own = policy.valid(batch["embodiment"])
    made = policy.sample(*observed(batch), noise, known, soft_mask(4, 4, 16))
    free = policy.sample(*observed(batch), noise)
    assert torch.equal(made[:, 4:], free[:, 4:])
    # absolute targets, whatever state they are relative to and whatever each step's statistics
    error = torch.where(own, made - known, 0)[:, :4].abs().max()
    assert error < 0.01 * (free - known)[:, :4].abs().max()
    assert (made[~own] == 0).all()


def test_without_weight_guidance_changes_nothing():
    policy, batch = small_policy(), small_batch()
    noise, known = torch.randn(2, 6, T, 5).unbind()
    made = policy.sample(*observed(batch), noise, known, torch.zeros(T))
    assert torch.allclose(made, policy.sample(*observed(batch), noise), atol=1e-6)


def test_a_chunk_begins_with_what_is_committed_to_the_bit(blm):
    seen = observation()
    old = blm.act(seen, "panda", 1.0, seed=1)
    new = blm.act(seen, "panda", 1.0, seed=2)
    chunk = blm.act(seen, "panda", 1.0, seed=2, committed=old[:2], planned=old[2:])
    assert (chunk[:2] == old[:2]).all() and not (chunk[2:] == new[2:]).any()
    # nothing is left over
    assert all(parameter.grad is None for parameter in blm.policy.parameters())
    assert (blm.act(seen, "panda", 1.0, seed=2) == new).all()


def test_nothing_committed_is_a_chunk_as_ever(blm):
    seen = observation()
    free = blm.act(seen, "panda")
    assert np.allclose(blm.act(seen, "panda", committed=[]), free, atol=1e-5)


def test_the_shipped_weights_go_on_from_where_the_old_chunk_ends():
    blm = BLM.from_pretrained(ROOT / "weights" / "nano")
    rng = np.random.default_rng(0)
    steps = []
    for seed in range(6):
        seen = observation("widowx", seed)
        usual = blm.policy.normalizer.state_mean[1, :16].numpy()
        seen["state"] = usual + 0.05 * rng.standard_normal(16, np.float32)
        old = blm.act(seen, "widowx", 1.0, seed=[seed, 0])
        new = blm.act(seen, "widowx", 1.0, seed=[seed, 1])
        fits = blm.act(seen, "widowx", 1.0, [seed, 1], committed=old[:4], planned=old[4:12])
        steps.append([np.abs(chunk[4] - old[3])[:6].max() for chunk in (new, fits)])
    plain, inpainted = np.mean(steps, 0)
    assert inpainted < 0.8 * plain


MISTAKES = [
    ({"committed": np.zeros((2, 7))}, "committed targets.*shape.*4 rows of 8 numbers"),
    ({"committed": np.zeros((5, 8))}, "committed targets.*at most 4 rows"),
    ({"committed": np.full((1, 8), np.nan)}, "committed targets.*not finite"),
    ({"committed": "ab"}, "committed targets"),
    ({"committed": np.zeros((3, 8)), "planned": np.zeros((2, 8))}, "planned.*at most 1 rows"),
]


@pytest.mark.parametrize("options, says", MISTAKES)
def test_mistakes_in_targets_are_told(blm, options, says):
    with pytest.raises(UserError, match=says):
        blm.act(observation(), "panda", **options)


# ---- the loop


class Counting:
    """Chunks of 16 whose first joint encodes look and step of a target, as 100 look + step."""

    def __init__(self, monkeypatch, seconds=0.0):
        self.looks = []
        self.now = 0.0
        self.seconds = seconds
        monkeypatch.setattr(rollout.time, "perf_counter", lambda: self.now)

    def act(self, observation, robot, **options):
        chunk = np.zeros((16, 3), np.float32)
        chunk[:, 0] = 100 * len(self.looks) + np.arange(16)
        self.looks.append({name: [row[0] for row in rows] for name, rows in options.items()})
        self.now += self.seconds
        return chunk


def first(targets):
    return [int(target[0]) for target in targets]


def test_without_a_delay_chunks_follow_each_other_as_ever(monkeypatch):
    blm = Counting(monkeypatch)
    pilot = Pilot(blm, "panda", 12)
    assert first(pilot.look({})) == [*range(12)]
    assert first(pilot.look({})) == [*range(100, 112)]
    assert blm.looks == [{}, {}] and pilot.borders == [12]


@pytest.mark.parametrize("delay, stop", [(2, 12), (4, 12), (8, 8)])
def test_with_a_delay_the_old_chunk_goes_on(monkeypatch, delay, stop):
    blm = Counting(monkeypatch)
    pilot = Pilot(blm, "panda", 12, delay=delay, inpaint=True)
    assert first(pilot.look({})) == [*range(stop)]  # the arm waits for the first one
    old = [*range(stop, stop + delay)]
    assert first(pilot.look({})) == [*old, *range(100 + delay, 100 + stop)]
    assert pilot.borders == [stop + delay]
    known = blm.looks[1]
    assert known["committed"] == old
    assert known["planned"] == [*range(stop + delay, 16)]


def test_a_measured_delay_is_the_clocks(monkeypatch):
    blm = Counting(monkeypatch, seconds=0.12)
    pilot = Pilot(blm, "panda", 12, delay=None, inpaint=True)
    pilot.look({})
    assert first(pilot.look({})) == [12, 13, 14, *range(103, 112)]
    blm.seconds = 0.04  # faster than expected: the committed targets are in the chunk too
    assert first(pilot.look({})) == [112, *range(201, 212)]
    assert blm.looks[2]["committed"] == [112, 113, 114]
    assert pilot.delays == [3, 3, 1]


def test_an_arm_whose_chunk_comes_too_late_waits_at_its_last_target(monkeypatch):
    blm = Counting(monkeypatch, seconds=0.09)
    pilot = Pilot(blm, "panda", 12, delay=None)
    pilot.look({})
    blm.seconds = 0.49  # once: only four targets were left for ten steps
    assert first(pilot.look({})) == [12, 13, 14, 15, *[15] * 6]
    blm.seconds = 1.99  # longer than a chunk: none of it is usable
    assert first(pilot.look({})) == [*range(110, 116), *[115] * 34]
    blm.seconds = 0.09
    assert first(pilot.look({})) == [115, 115]
    assert first(pilot.look({})) == [302, 303]


def test_steps_between_targets_are_told_apart_by_where_they_are():
    targets = np.array([[0, 0, 9], [1, 0, 9], [1, 5, 0], [1, 5, 7.0]])  # the last is the finger
    assert joint_steps(list(targets), [2, 4], 2) == ([5.0], [1.0, 0.0])
    assert joint_steps(list(targets[:1]), [], 2) == ([], [])
