"""Corrections: a policy begins, the expert takes over (DAgger, arXiv 1011.0686).

    python corrections.py --policy out/policy --tasks StackCube,PlaceSphere --episodes 80
    python corrections.py --policy out/policy --seed 10000      another round, with the next policy

They show how to recover from the policy's own mistakes. They are ordinary episodes
(data/record.py), so `python train_policy.py --resume` trains on them. Their seeds start 500,000
above those of the demonstrations.
"""

import functools
from dataclasses import dataclass

from cli import parse, run
from data import seeds
from data.environments import expert_of
from data.expert import demonstrate
from data.record import RecordConfig, record
from files import checksum
from rollout import load_model, robots_of, rollout


@dataclass
class CorrectionConfig(RecordConfig):
    policy: str = "out/policy"  # model folder: the policy that starts each episode


def correct(folder, env, seed, noise, command, expert=demonstrate):
    """A Demonstration that starts from the state the policy reached after a random number of steps.

    None if the policy had succeeded by then.
    """
    steps = seeds.rng(seed, "takeover").integers(10, env.horizon - 10)
    render = env.render
    env.render = False  # images are drawn only when the policy observes
    blm = load_model(folder)  # on the CPU: most of the time goes into simulation and rendering
    which = {"command": command} if env.family else {}
    done = rollout(blm, env, seed, max_steps=int(steps), **which)["success"]
    env.render = render
    # the expert continues the same episode from here
    return None if done else expert(env, seed, noise, reset=False)


def main():
    config = parse(CorrectionConfig, description="Record corrections of a policy by the expert.")
    blm = load_model(config.policy)  # a bad folder is reported here, once
    config.robots = ",".join(robots_of(blm, config.robots, config.env))
    # other weights give other corrections, whatever the folder is called
    weights = {name: tensor.numpy() for name, tensor in blm.policy.state_dict().items()}
    maker = f"expert after a policy with checksum {checksum(weights)}"
    # each worker loads its own copy
    begin = functools.partial(correct, config.policy, expert=expert_of(config.env))
    record(config, begin, maker, first_seed=seeds.FIRST_CORRECTION)


if __name__ == "__main__":
    run(main)
