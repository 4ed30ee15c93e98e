"""Corrections: a policy begins, the expert takes over (DAgger, arXiv 1011.0686).

    python corrections.py --policy out/policy --tasks StackCube,PlaceSphere --episodes 80
    python corrections.py --policy out/policy --seed 10000      another round, of the policy after it

They show what to do about the policy's own mistakes, and are episodes like any other
(data/record.py): `python train_policy.py --resume` learns from them. Their seeds lie 500,000 behind
those of demonstrations.
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
    policy: str = "out/policy"  # model folder: the policy that begins


def correct(folder, env, seed, noise, command, expert=demonstrate):
    """A Demonstration that begins where the policy got to in some number of steps.

    None if it was done by then.
    """
    steps = seeds.rng(seed, "takeover").integers(10, env.horizon - 10)
    render = env.render
    env.render = False  # the policy draws only what it looks at
    blm = load_model(folder)  # on the CPU: pictures are drawn and joints moved between looks
    which = {"command": command} if env.family else {}
    done = rollout(blm, env, seed, max_steps=int(steps), **which)["success"]
    env.render = render
    # the expert goes on in the same episode, from where things are
    return None if done else expert(env, seed, noise, reset=False)


def main():
    config = parse(CorrectionConfig, description="Record corrections of a policy by the expert.")
    blm = load_model(config.policy)  # what is wrong with it is told here, once
    config.robots = ",".join(robots_of(blm, config.robots, config.env))
    # other weights make other corrections, whatever the folder is called
    weights = {name: tensor.numpy() for name, tensor in blm.policy.state_dict().items()}
    maker = f"expert after a policy with checksum {checksum(weights)}"
    # each worker loads its own
    begin = functools.partial(correct, config.policy, expert=expert_of(config.env))
    record(config, begin, maker, first_seed=seeds.FIRST_CORRECTION)


if __name__ == "__main__":
    run(main)
