"""policy.py keeps its promises: the loss is what the equations say, padding moves nothing, statistics are undone exactly, every layer learns."""

import math
from dataclasses import fields

import pytest
import torch

from cli import UserError
from embodiment import Embodiment
from policy import (
    PRESETS,
    STATE_LIMIT,
    Policy,
    PolicyConfig,
    add_noise,
    flow_loss,
    sample_tau,
)

# the last action is the finger; the last numbers of the state are a position
ROBOTS = {"long": Embodiment(8, 5), "short": Embodiment(6, 3)}
T, L, WIDTH = 4, 9, 24


SMALL = {
    "num_intent_queries": 4,
    "max_condition_tokens": 16,
    "hidden_size": 16,
    "num_layers": 4,
    "num_heads": 2,
    "action_horizon": T,
    "num_future_tokens": 2,
    "future_layer": 3,
}


def small_policy(fitted=True, **changes):
    """Tiny, and with no parameter at zero, so that every path matters."""
    torch.manual_seed(1)
    config = PolicyConfig(**{**SMALL, **changes})
    policy = Policy(config, WIDTH, ROBOTS)
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if fitted:
        for robot in range(2):
            policy.normalizer.fit(robot, torch.randn(30, 8), torch.randn(30, T, 5))
    return policy


def small_batch(n=6):
    return {
        "hidden": torch.randn(n, L, WIDTH),
        "mask": torch.arange(L) < torch.randint(4, L + 1, (n, 1)),
        "future_hidden": torch.randn(n, L, WIDTH),
        "future_mask": torch.arange(L) < torch.randint(4, L + 1, (n, 1)),
        "future_valid": torch.arange(n) % 3 != 1,
        "waypoints": torch.randn(n, 4, 3),
        "state": torch.randn(n, 8),
        "action": torch.randn(n, T, 5),
        "embodiment": torch.arange(n) % 2,
        "noise": torch.randn(n, T, 5),
        "tau": sample_tau(n),
        "state_noise": 0.02 * torch.randn(n, 8),
    }


def observed(batch):
    return batch["hidden"], batch["mask"], batch["state"], batch["embodiment"]


def test_flow_loss_of_a_known_case():
    actions = torch.tensor([[[2.0, 5.0]]])
    noise = torch.tensor([[[1.0, 7.0]]])
    valid = torch.tensor([[[True, False]]])
    noised = add_noise(actions, noise, torch.tensor([0.25]), valid)
    assert noised.tolist() == [[[0.25 * 2 + 0.75 * 1, 0.0]]]  # tau = 0 is noise
    assert flow_loss(torch.full_like(noised, 3.0), actions, noise, valid, 1) == (3 - (2 - 1)) ** 2
    assert flow_loss(actions - noise, actions, noise, torch.ones(1, 1, 2, dtype=torch.bool), 2) == 0


def test_euler_steps_of_the_exact_velocity_arrive_at_the_action():
    policy, batch = small_policy(), small_batch()
    own, target = (
        policy.normalizer.action_mask[batch["embodiment"]][:, None],
        policy.normalizer.normalize_action(batch["action"], batch["state"], batch["embodiment"]),
    )
    noise = torch.randn(6, T, 5)
    policy.velocity = lambda *_: (target - torch.where(own, noise, 0.0), None)
    made = policy.sample(*observed(batch), noise=noise)
    assert torch.allclose(made, torch.where(own, batch["action"], 0.0), atol=1e-5)


def test_a_patch_has_one_place_however_long_the_instruction():
    mask = torch.tensor([[True] * 6 + [False] * 3, [True] * 9])
    behind = small_policy().perceiver.token_places(mask)
    assert behind.tolist() == [list(range(9))] * 2  # pictures begin the prompt
    before = small_policy(text_first=True).perceiver.token_places(mask)
    assert before[0].tolist() == [5, 4, 3, 2, 1, 0, 0, 0, 0]  # pictures end it
    assert before[1].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("text_first", [False, True])
def test_padding_moves_nothing(text_first):
    policy, batch = small_policy(text_first=text_first), small_batch()
    losses = policy(batch)
    made = policy.sample(*observed(batch), noise=batch["noise"])
    valid, own = (
        policy.valid(batch["embodiment"]),
        policy.normalizer.state_mask[batch["embodiment"]],
    )
    wild = {
        **batch,
        "action": torch.where(valid, batch["action"], 1e6),
        "noise": torch.where(valid, batch["noise"], -1e6),
        "state": torch.where(own, batch["state"], 1e6),
        "state_noise": torch.where(own, batch["state_noise"], 1e6),
    }
    for which in ("", "future_"):  # garbage, even NaN, after a prompt's end; and a longer batch
        hidden = torch.where(batch[which + "mask"][..., None], batch[which + "hidden"], torch.nan)
        wild[which + "hidden"] = torch.cat([hidden, torch.full((6, 3, WIDTH), 1e6)], dim=1)
        wild[which + "mask"] = torch.cat(
            [batch[which + "mask"], torch.zeros(6, 3, dtype=torch.bool)], dim=1
        )
    wild["future_hidden"][~batch["future_valid"]] = torch.nan
    wild["future_mask"][~batch["future_valid"]] = False
    for name, value in policy(wild).items():
        assert torch.allclose(value, losses[name], rtol=1e-5), name
    own_actions = policy.normalizer.action_mask[batch["embodiment"]][:, None]
    noise = torch.where(own_actions, batch["noise"], 1e6)
    again = policy.sample(
        wild["hidden"], wild["mask"], wild["state"], wild["embodiment"], noise=noise
    )
    assert torch.allclose(again, made, atol=1e-5)
    assert (made[batch["embodiment"] == 1][..., 3:] == 0).all()
    policy(wild)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())


def test_the_loss_divides_by_what_is_valid():
    policy, batch = small_policy(), small_batch()
    totals = policy.valid(batch["embodiment"]).sum(), batch["future_valid"].sum(), 6
    parts = [
        policy({name: value[rows] for name, value in batch.items()}, totals)
        for rows in (slice(0, 2), slice(2, 6))
    ]
    for name, whole in policy(batch).items():
        assert torch.allclose(sum(part[name] for part in parts), whole, rtol=1e-5), name
    none = policy({**batch, "future_valid": torch.zeros(6, dtype=torch.bool)})
    assert none["future"] == 0 and none["loss"] == none["flow"] + none["waypoint"]


def test_normalisation_is_undone_exactly():
    norm, n = small_policy().normalizer, 50
    state, action, robot = 3 * torch.randn(n, 8), 3 * torch.randn(n, T, 5), torch.arange(n) % 2
    back = norm.unnormalize(norm.normalize_action(action, state, robot), state, robot)
    own = norm.action_mask[robot][:, None].expand_as(action)
    assert torch.allclose(back[own], action[own], atol=1e-5)


def test_statistics_are_those_of_relative_targets():
    norm, n = small_policy(fitted=False).normalizer, 400
    state = torch.randn(n, 8)
    action = torch.randn(n, T, 5) * torch.tensor([1, 2, 3, 4, 5.0]) + torch.arange(T)[:, None]
    action[..., 3] = (
        state[:, None, 3] + 0.5
    )  # a joint held half a radian ahead: no deviation at all
    norm.fit(0, state, action)
    x = norm.normalize_action(action, state, torch.zeros(n, dtype=torch.long))
    for t in range(T):
        moving = x[:, t, [0, 1, 2, 4]]
        assert torch.allclose(moving.mean(0), torch.zeros(4), atol=1e-4) and torch.allclose(
            moving.std(0, correction=0), torch.ones(4), atol=1e-4
        )
    assert x[..., 3].abs().max() < 1e-2 and norm.action_std[
        0, :, 3
    ].unique().item() == pytest.approx(norm.ACTION_FLOOR)
    assert torch.allclose(
        norm.action_mean[0, :, 4], action[..., 4].mean(0), atol=1e-4
    )  # the finger is absolute


def test_targets_are_relative_to_the_numbers_they_are_for_and_deltas_to_nothing():
    swapped = Embodiment(4, 5, relative=(2, 0, -1, -1, 3))  # more numbers of action than of state
    norm = Policy(
        PolicyConfig(**SMALL),
        WIDTH,
        {"swapped": swapped, "deltas": Embodiment(2, 2, relative=(-1, -1))},
    ).normalizer
    state = torch.tensor([[10.0, 20.0, 30.0, 40.0]]).repeat(2, 1)
    assert norm.reference(state, torch.tensor([0, 1]))[:, 0].tolist() == [
        [30, 10, 0, 0, 40],
        [0] * 5,
    ]
    draws = torch.randn(30, 4), torch.randn(30, T, 5)
    for robot in range(2):
        norm.fit(robot, *draws)
        rows = torch.full((30,), robot)
        back = norm.unnormalize(norm.normalize_action(draws[1], draws[0], rows), draws[0], rows)
        own = norm.action_mask[robot]
        assert torch.allclose(back[..., own], draws[1][..., own], atol=1e-5)
    assert torch.allclose(norm.action_mean[1, :, :2], draws[1][..., :2].mean(0), atol=1e-6)


def test_a_number_that_never_changes_stays_finite():
    norm = small_policy().normalizer
    state = torch.full((30, 8), 7.0)
    norm.fit(0, state, torch.full((30, T, 5), 9.0))
    rows = torch.zeros(30, dtype=torch.long)
    assert norm.normalize_state(state, rows).abs().max() == 0
    assert norm.normalize_state(state + 100, rows).abs().max() == STATE_LIMIT  # not 10,000
    assert norm.normalize_action(torch.full((30, T, 5), 9.0), state, rows).abs().max() == 0


def test_tau_has_the_moments_of_its_law():
    u = 0.999 * (1 - sample_tau(400_000, torch.Generator().manual_seed(0)))
    mean, variance = 1.5 / 2.5, 1.5 / (2.5**2 * 3.5)  # of Beta(1.5, 1)
    assert abs(u.mean() - mean) < 2e-3 and abs(u.var() - variance) < 1e-3
    assert 0 <= u.min() and (1 - u / 0.999).min() >= 0


def test_every_parameter_gets_gradient():
    policy = small_policy()
    policy(small_batch())["loss"].backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    for parameter in (policy.state_encoder[0].weight, policy.decoder[1].bias):
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all()  # every robot's


def test_robots_do_not_share_their_layers():
    policy, batch = small_policy(), small_batch()
    batch["embodiment"] = torch.zeros(6, dtype=torch.long)
    policy(batch)["loss"].backward()
    assert (
        policy.state_encoder[0].weight.grad[1].abs().sum() == 0
        and policy.action_encoder.second.weight.grad[1].abs().sum() == 0
    )


def test_at_birth_velocity_is_zero():
    policy = Policy(PolicyConfig(), WIDTH, ROBOTS)
    batch = small_batch()
    noise = torch.randn(6, 16, 5)
    own = policy.normalizer.action_mask[batch["embodiment"]][:, None]
    made = policy.normalizer.normalize_action(
        policy.sample(*observed(batch), noise=noise), batch["state"], batch["embodiment"]
    )
    assert torch.allclose(made, torch.where(own, noise, 0.0), atol=1e-5)


def test_sample_is_deterministic_and_batching_changes_nothing():
    policy, batch = small_policy(), small_batch()
    noise = torch.randn(6, T, 5)
    made = policy.sample(*observed(batch), noise=noise)
    assert torch.equal(made, policy.sample(*observed(batch), noise=noise))
    for i in range(6):
        alone = policy.sample(
            *(value[i : i + 1] for value in observed(batch)), noise=noise[i : i + 1]
        )
        assert torch.allclose(alone[0], made[i], atol=1e-5)


def test_keys_and_modulation_made_once_equal_those_made_every_step():
    policy, batch = small_policy(), small_batch()
    hidden, mask, state, robot = observed(batch)
    noise, own = torch.randn(6, T, 5), policy.normalizer.action_mask[robot][:, None]
    x = torch.where(own, noise, 0.0)
    with torch.no_grad():
        for step in range(4):
            tau = torch.full((6,), step / 4)
            _, context = policy.context(hidden, mask, state, robot)
            v, _ = policy.velocity(x, tau, policy.modulations(tau), context)
            x = torch.where(own, x + v / 4, 0.0)
    assert torch.allclose(
        policy.sample(hidden, mask, state, robot, noise),
        policy.normalizer.unnormalize(x, state, robot),
        atol=1e-5,
    )


def test_the_place_of_a_token_matters():
    policy, hidden = small_policy(), torch.randn(1, L, WIDTH)
    mask = torch.ones(1, L, dtype=torch.bool)
    assert (policy.intent(hidden, mask) - policy.intent(hidden.flip(1), mask)).abs().max() > 1e-2


def test_without_intent_the_prompt_changes_nothing():
    policy, batch = small_policy(use_intent=False), small_batch()
    made = policy.sample(*observed(batch), batch["noise"])
    batch["hidden"] = torch.randn(6, L, WIDTH)
    assert torch.equal(policy.sample(*observed(batch), batch["noise"]), made)


def test_the_future_target_takes_no_gradient():
    policy, batch = small_policy(), small_batch()
    tokens = torch.randn(6, 2, 16)
    policy.future_loss(tokens, batch, 4).backward()
    assert (
        policy.perceiver.queries.grad is None and policy.future_head[1].weight.grad.abs().sum() > 0
    )


def test_overfits_a_handful():
    policy, batch = small_policy(hidden_size=32), small_batch(4)
    policy.initialize()
    optimizer, generator = (
        torch.optim.Adam(policy.parameters(), lr=3e-3),
        torch.Generator().manual_seed(0),
    )
    batch = {name: value.repeat(4, *[1] * (value.ndim - 1)) for name, value in batch.items()}
    for _ in range(300):
        losses = policy({**batch, **policy.draw(16, generator)})
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    error = policy.sample(*observed(batch), policy.draw(16, generator)["noise"]) - batch["action"]
    scale = policy.normalizer.action_std[batch["embodiment"]]
    assert (error / scale).abs()[policy.valid(batch["embodiment"])].mean() < 0.3  # of a deviation
    assert losses["future"] < 0.1


def test_sizes_that_do_not_fit_are_named():
    wrong = [{"hidden_size": 100}, {"future_layer": 9}, {"num_future_tokens": 5}]
    wrong += [{field.name: 0} for field in fields(PolicyConfig) if field.type is int]
    wrong += [{"num_heads": -6}, {"future_loss_weight": -0.1}, {"future_loss_weight": math.nan}]
    for sizes in wrong:
        with pytest.raises(AssertionError, match=next(iter(sizes))):
            PolicyConfig(**sizes)


def test_a_prompt_that_is_too_long_is_told():
    policy = small_policy()
    with pytest.raises(UserError, match="17 tokens is longer than this policy's 16"):
        policy.intent(torch.randn(1, 17, WIDTH), torch.ones(1, 17, dtype=torch.bool))


def test_presets_build():
    with torch.device("meta"):
        sizes = {
            name: sum(
                p.numel()
                for p in Policy(
                    config,
                    192,
                    {robot: Embodiment(17, 8) for robot in ("panda", "xarm6", "xarm7", "widowx")},
                ).parameters()
            )
            for name, config in PRESETS.items()
        }
    assert 2e6 < sizes["nano"] < 4.5e6 and sizes["gr00t"] > 5e8


def test_the_intent_alone_foresees_where_the_tool_will_be():
    policy, batch = small_policy(), small_batch()
    losses = policy(batch)
    moved = {**batch, "state": batch["state"] + 1, "noise": batch["noise"] + 1}
    assert torch.equal(policy(moved)["waypoint"], losses["waypoint"])
    other = {**batch, "hidden": batch["hidden"].flip(1)}
    assert policy(other)["waypoint"] != losses["waypoint"]
    places = policy.normalizer.normalize_waypoints(batch["waypoints"], batch["embodiment"])
    for row, robot in enumerate(batch["embodiment"].tolist()):
        first = (5, 3)[robot]
        mean = policy.normalizer.state_mean[robot, first : first + 3]
        std = policy.normalizer.state_std[robot, first : first + 3]
        assert torch.allclose(places[row], (batch["waypoints"][row] - mean) / std)
