"""Stage II: train the policy on demonstrations of all robots and tasks together.

    python train_policy.py                          reads out/demos, writes out/policy; on a laptop
    python train_policy.py --resume --steps 12000   continue a run that stopped, for more steps
    python train_policy.py --robots ur5e --start weights/nano --out out/ur5e --steps 600
                                    a robot that weights/nano lacks: trains only its own layers
    python train_policy.py --start weights/nano --backbone out/sft
                                    move a policy to another language model: trains all of it
    torchrun --nproc_per_node 8 train_policy.py --batch_size 512        several GPUs: trainer.py

The language model is frozen. data/demonstrations.py caches its hidden states, and it is in memory
only while some are missing. Written to --out: a complete model folder (model.py) with the moving
average of the weights, the state to resume from, and log.jsonl.
"""

import copy
import dataclasses
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import trainer
from checkpoint import VLMConfig, copy_model, folder_hash
from cli import UserError, at_least, choose, parse, run
from data import record
from data.demonstrations import (
    Demonstrations,
    cache_folder,
    cache_hidden_states,
    open_cache,
    select_episodes,
    uncached,
)
from data.robots import ROBOTS
from files import find_folder, write_json
from model import BLM
from policy import PRESETS, EmbodimentLinear, Policy
from rollout import EXECUTE_STEPS
from trainer import RunConfig
from vlm import VLM

EVAL_ROWS = 512  # validation rows
WARMUP = 200  # steps
WEIGHT_DECAY = 0.01  # for matrices
EMA_DECAY = 0.999  # of the moving average of the weights; the average is what is shipped
STATE_NOISE = 0.02  # deviations, on the normalized state: so the policy observes, not counts


@dataclass
class TrainConfig(RunConfig):
    """The flags of Stage II."""

    data: str = "out/demos"  # folder of demonstrations; recorded if missing
    out: str = "out/policy"  # folder for the model
    backbone: str = "weights/nano"  # folder or hub name of the frozen language model
    start: str = ""  # model folder whose policy to start from
    cache: str = "out/intents"  # folder for the language model's hidden states
    robots: str = "all"  # comma-separated robots to learn from, or all
    tasks: str = "all"  # comma-separated tasks and families of scenes to learn from, or all
    demonstrations: int = 0  # episodes of each robot and task, lowest seeds first; 0: all
    sizes: str = "nano"  # size of the policy: nano or gr00t (policy.py)
    intent_layer: int = 0  # LLM block whose hidden states carry the intent; 0: that of --sizes
    text_first: bool = False  # instruction before the images, as in runs/listen.sh
    use_intent: bool = True  # off: act from the robot's state alone, for comparison
    future_loss: bool = True  # off: without the future loss, for comparison
    waypoint_loss: bool = False  # the intent predicts where the tool goes: for several commands
    steps: int = 7000  # optimizer steps
    batch_size: int = 64  # rows per step, over all processes
    lr: float = 3e-3  # peak learning rate
    eval_every: int = 1000  # steps between evaluations, each with a checkpoint


FREE = {"cache", "backbone"}  # may change when resuming, in addition to trainer.FREE


def policy_config(cfg):
    """The PolicyConfig that the flags describe."""
    config = PRESETS[choose(cfg.sizes, PRESETS, "--sizes")]
    return dataclasses.replace(
        config,
        use_intent=cfg.use_intent,
        intent_layer=cfg.intent_layer or config.intent_layer,
        text_first=cfg.text_first,
        future_loss_weight=config.future_loss_weight * cfg.future_loss,
        waypoint_loss_weight=config.waypoint_loss_weight * cfg.waypoint_loss,
    )


# ---- validation


def validation_rows(demos):
    """Rows of held-out episodes: the same number from each cell, evenly spaced."""
    share = max(1, EVAL_ROWS // len(demos.cells))
    parts = []
    for rows in demos.held_out:
        places = np.linspace(0, len(rows) - 1, min(share, len(rows))).astype(int)
        parts.append(rows[places])
    return np.concatenate(parts)


def divisors(demos, policy, rows):
    """Numbers of action values, futures and rows, by which their losses are divided."""
    action_dims = np.array([robot.action_dim for robot in demos.embodiments.values()])
    numbers = policy.config.action_horizon * int(action_dims[demos.embodiment[rows]].sum())
    return numbers, max(1, int(demos.has_future[rows].sum())), len(rows)


@torch.no_grad()
def evaluate(policy, demos, cfg, device):
    """Figures on held-out episodes, with fixed noise.

    val_flow, val_future, val_waypoint, and joint_error_rad: the mean error of joint targets in
    chunks as `act` computes them, over the steps that are executed. Of all figures here it agrees
    best with success when ranking policies. For a robot without such targets it is the mean error
    of all its action values.
    """
    policy.eval()
    generator = torch.Generator().manual_seed(0)
    rows = validation_rows(demos)
    totals = divisors(demos, policy, rows)
    sums = Counter()
    targets = policy.normalizer.relative_mask
    others = policy.normalizer.action_mask & ~targets.any(1, keepdim=True)
    compared = targets | others  # (E, A)
    for start in range(0, len(rows), cfg.batch_size):
        batch = demos.batch(rows[start : start + cfg.batch_size])
        batch |= policy.draw(len(batch["state"]), generator)
        batch = trainer.to_device(batch, device)
        losses = policy(batch, totals)  # already divided by the totals: they add up
        inputs = [batch[name] for name in ("hidden", "mask", "state", "embodiment")]
        chunk = policy.sample(*inputs, noise=torch.zeros_like(batch["noise"]))
        error = (chunk - batch["action"])[:, :EXECUTE_STEPS].abs()
        joints = compared[batch["embodiment"]][:, None].expand_as(error)
        for name in ("flow", "future", "waypoint"):
            sums[f"val_{name}"] += float(losses[name])
        sums["joint_error_rad"] += float(error[joints].sum())
        sums["joints"] += int(joints.sum())
    policy.train()
    sums["joint_error_rad"] /= max(1, sums.pop("joints"))
    return {name: round(value, 5) for name, value in sums.items()}


# ---- what is trained


def sizes(config):
    """A PolicyConfig without fields that change no weight's shape: a policy may switch blocks."""
    free = {"intent_layer": 0, "text_first": False}
    return vars(config) | free | {"future_loss_weight": 0.0, "waypoint_loss_weight": 0.0}


def load_models(cfg, config, device):
    """(BLM of --backbone, its width, BLM of --start or None, hash of what the policy reads).

    The BLMs have no VLM: if all hidden states are cached, files are only hashed and copied, and no
    language model is ever loaded.
    """
    blm = BLM.from_pretrained(cfg.backbone, vlm=False)
    vlm_config = VLMConfig.from_pretrained(find_folder(cfg.backbone))
    width = vlm_config.hidden_size
    blocks = vlm_config.num_hidden_layers
    if config.intent_layer > blocks:
        raise UserError(f"--intent_layer {config.intent_layer}: {cfg.backbone} has {blocks} blocks")
    blm.policy = None  # the backbone's own policy may read another block or another prompt
    blm.device = device  # where the VLM will go
    blm.training.pop("policy", None)
    backbone = hash_of_folder(cfg.backbone, blm, config.intent_layer)
    if cfg.resume and trainer.read_checkpoint(cfg, FREE)[1]["backbone"] != backbone:
        raise UserError(f"{cfg.out} was trained on another language model than {cfg.backbone}")
    start = None
    if cfg.start:
        start = BLM.from_pretrained(cfg.start, vlm=False)
        old = start.policy
        if old is None or old.condition_size != width or sizes(old.config) != sizes(config):
            raise UserError(f"--start {cfg.start} has no policy of the size that the flags specify")
    return blm, width, start, backbone


def hash_of_folder(name, blm, num_layers):
    folder = find_folder(name)
    return folder_hash(folder, VLMConfig.from_pretrained(folder), blm.processor, num_layers)


def load_vlm(cfg, blm):
    """Load the frozen VLM of --backbone into `blm`; with --fsdp each process holds a shard."""
    blm.vlm = VLM.from_pretrained(cfg.backbone, "cpu" if cfg.fsdp else blm.device)
    # frozen: the policy must be able to rely on its hidden states
    blm.vlm.requires_grad_(False)
    if cfg.fsdp:
        blocks = [*blm.vlm.visual.blocks, *blm.vlm.model.layers]
        trainer.shard(blm.vlm, blocks, blm.device)


def load_demonstrations(cfg, config, blm, start, backbone):
    """Demonstrations of --data with their hidden states; both are created if missing."""
    rank, world = trainer.this_process()
    known = start.policy.embodiments if start else {}
    if rank == 0:
        record.ensure(cfg.data)
    trainer.barrier()
    episodes = select_episodes(cfg, known)
    new = {episode.robot for episode in episodes} - set(known)
    imported = {episode.robot for episode in episodes} - set(ROBOTS)
    if cfg.waypoint_loss and imported:
        raise UserError(
            f"--waypoint_loss: the state of {min(imported)} does not contain the tool's position"
        )
    if start and new:  # layers that stay frozen need the hidden states that they were trained on
        old = start.policy.config
        k = old.intent_layer
        if k != config.intent_layer:
            raise UserError(f"--start {cfg.start} reads block {k}: add --intent_layer {k}")
        if old.text_first != config.text_first:
            advice = "leave out --text_first" if config.text_first else "add --text_first"
            raise UserError(f"--start {cfg.start} reads the prompt in the other order: {advice}")
        if hash_of_folder(cfg.start, start, k) != backbone:
            raise UserError(f"--start {cfg.start} reads another language model than {cfg.backbone}")
    folder = cache_folder(cfg.cache, backbone, config)
    missing = uncached(episodes, folder, rank)
    trainer.barrier()  # all list the missing files before any is written: it divides the work
    if missing:
        load_vlm(cfg, blm)
        cache_hidden_states(blm, missing, config, folder, rank, world, cfg.fsdp)
        blm.vlm = None  # all hidden states are cached: free its memory for the policy
    trainer.barrier()
    hidden = [open_cache(folder, episode) for episode in episodes]
    return Demonstrations(episodes, hidden, config.action_horizon, config.num_waypoints, known)


def continue_policy(policy, old):
    """Copy weights and statistics of `old` into `policy`, whose first robots are those of `old`.

    If `policy` has further robots, only their own layers will be trained, so that the others keep
    acting as before.
    """
    weights = policy.state_dict()
    for name, tensor in old.state_dict().items():
        corner = tuple(slice(size) for size in tensor.shape)
        weights[name][corner] = tensor
    if len(policy.embodiments) > len(old.embodiments):
        policy.requires_grad_(False)
        for module in policy.modules():
            if isinstance(module, EmbodimentLinear):
                module.requires_grad_(True)


# ---- the run


def make_batch(demos, policy, cfg, step):
    """(this process's rows of a step, with noise; the divisors of the losses of all processes)."""
    rank, world = trainer.this_process()
    # noise depends only on the step: no random state to save, the same for any number of processes
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
    draws = policy.draw(cfg.batch_size, generator, STATE_NOISE)  # for all rows, then divided
    rows = demos.rows_of_step(cfg.seed, step, cfg.batch_size)
    batch = demos.batch(rows[rank::world])
    batch |= {name: tensor[rank::world] for name, tensor in draws.items()}
    return batch, divisors(demos, policy, rows)


@torch.no_grad()
def update_average(average, policy, step):
    """Update the moving average, faster at first, so that it leaves the random weights."""
    decay = min(EMA_DECAY, (step + 1) / (step + 11))
    torch._foreach_lerp_(list(average.parameters()), list(policy.parameters()), 1 - decay)


def save(cfg, blm, modules, optimizers, about):
    """Save a checkpoint to resume from, and the model folder. Every process must call this."""
    # the checkpoint first: it can produce the model folder, but not the reverse
    trainer.save_checkpoint(cfg, modules, optimizers, about)
    weights = trainer.full_state_dict(blm.policy)
    if trainer.is_first():
        blm.training["policy"] = about
        blm.save_policy(cfg.out, torch.float16, weights, about["backbone"])
        write_json(Path(cfg.out) / "training.json", blm.training)


def train(cfg):
    """Train with a TrainConfig; returns the last figures."""
    trainer.check(cfg)
    at_least(cfg, 0, "demonstrations", "intent_layer")
    device = trainer.start_processes(cfg)
    config = policy_config(cfg)
    blm, width, start, backbone = load_models(cfg, config, device)
    demos = load_demonstrations(cfg, config, blm, start, backbone)
    facts = {
        "backbone": backbone,
        "robots": list(demos.embodiments),
        "episodes": len(demos.episodes),
        "rows": len(demos.train),
        "cells": len(demos.cells),
    }
    if trainer.is_first() and not cfg.resume:
        # a run killed before its first checkpoint should not look like a finished model
        (Path(cfg.out) / "state").mkdir(parents=True, exist_ok=True)
        copy_model(find_folder(cfg.backbone), cfg.out)
        blm.processor.save_pretrained(cfg.out)

    # on the CPU, so that a GPU starts from the same weights
    torch.manual_seed(cfg.seed)
    policy = Policy(config, width, demos.embodiments)
    if start:
        continue_policy(policy, start.policy)
        facts["started_from"] = start.training.get("policy")
    demos.fit_statistics(policy.normalizer)
    blm.policy = copy.deepcopy(policy).requires_grad_(False)  # the moving average of the weights
    for module in (policy, blm.policy):
        if cfg.fsdp:
            trainer.shard(module, (), device, ("sample",))
        module.to(device)
    figures = fit(cfg, blm, policy, demos, facts, device)
    trainer.say(f"model in {cfg.out}; try {what_next(cfg, demos)}")
    return figures


def what_next(cfg, demos):
    """The command that shows what the robots of these episodes have learned."""
    robot = demos.episodes[0].robot
    if robot in ROBOTS:
        return f"`python sample.py --robot {robot} --weights {cfg.out}`"
    # for a robot without a simulator: compare with its recordings, then drive it
    replay = f"python eval.py replay --data {cfg.data} --weights {cfg.out}"
    return f"`{replay}`, then `python serve.py --robot {robot} --weights {cfg.out}`"


def fit(cfg, blm, policy, demos, facts, device):
    """The training loop of Stage II; `facts` go into the run's record. Returns the last figures."""
    # when only a new robot's layers train, weight decay would still shrink those of the others
    adapting = not all(p.requires_grad for p in policy.parameters())
    dtype = trainer.compute_dtype(cfg, device)
    optimizers = trainer.make_optimizers([policy], cfg.lr, 0.0 if adapting else WEIGHT_DECAY, dtype)
    modules = {"policy": policy, "ema": blm.policy}
    before = trainer.resume(cfg, FREE, modules, optimizers)
    if before["step"] and before["robots"] != facts["robots"]:
        raise UserError(f"{cfg.out} was trained on {before['robots']}, not {facts['robots']}")
    figures = before["figures"]
    skipped = 0
    began = time.time() - before["seconds"]
    log = trainer.Log(cfg.out, before["step"])
    steps = range(before["step"], cfg.steps)
    batches = trainer.prefetch(lambda step: make_batch(demos, policy, cfg, step), steps)
    with trainer.catch_signals() as signals:
        for step in trainer.progress_bar(steps):
            lr = trainer.learning_rate(step, cfg, WARMUP)
            batch, totals = next(batches)
            batch = trainer.to_device(batch, device)
            with trainer.autocast(cfg, device):
                losses = policy(batch, totals)
            losses["loss"].backward()
            line, taken, stop = trainer.take_step(optimizers, lr, losses, signals, device)
            skipped = 0 if taken else skipped + 1
            if taken:
                update_average(blm.policy, policy, step)
            else:
                rows = demos.rows_of_step(cfg.seed, step, cfg.batch_size)
                trainer.report_skipped(line, skipped, demos.describe(rows))

            line = {"step": step + 1, **line, "seconds": time.time() - began}
            due = (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps
            if due and not stop:
                figures = evaluate(blm.policy, demos, cfg, device)
                line |= figures
                trainer.say(f"step {step + 1}: {figures}")
            log.write(line)
            if due or stop:
                about = trainer.run_record(cfg, "policy", line, figures)
                save(cfg, blm, modules, optimizers, about | facts)
            if stop:
                trainer.exit_stopped(step + 1, signals)
    return figures


def main():
    description = "Stage II: train the policy; the language model stays frozen."
    cfg = parse(TrainConfig, description=description)
    with trainer.claim_out(cfg):
        train(cfg)
    trainer.end_processes()


if __name__ == "__main__":
    run(main)
