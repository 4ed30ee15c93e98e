"""Stage II: teach the policy to act, on demonstrations of all robots and tasks together, with the language model frozen.

    python train_policy.py                                     `nano`, on a laptop: reads out/sft (or weights/nano) and out/demos, writes out/policy
    python train_policy.py --resume                            goes on where a stopped run saved last
    python -m data.record --policy out/policy && python train_policy.py --resume --steps 12000      learns from its own mistakes, corrected by the expert
    python train_policy.py --robots widowx --start out/three --out out/four --steps 600      a robot that out/three lacks: only its own layers are trained
    python train_policy.py --start weights/nano --backbone out/sft      a policy goes on with a new language model: all of it is trained, but not from nothing
    torchrun --nproc_per_node 8 train_policy.py --batch_size 512     the same on several GPUs (trainer.py); --fsdp shards a model that does not fit one

A frozen model says the same of the same frame every time, so what its block k says is computed once, every `frame_stride` control steps of each
episode, and kept: <cache>/<model>-k<k>-s<stride>/<episode>.npy, (frames, L, Dc) float16, memory-mapped. File names are hashes of what they were
made from: another model or other demonstrations never meet a stale file, more demonstrations cost only themselves, a stopped run goes on.

A row is a frame t of an episode: hidden states at t and at t + T, state at t, actions t .. t + T - 1. Past the end the last action is held, since an
episode ends where its task is done and an arm that was never shown to stay there drifts on; there is no future.
Rows of a step depend on (seed, step) alone, as does all noise: resuming skips and repeats nothing.

Written to --out: a whole model folder (model.py) with the moving average of the weights, and what trainer.py writes.
Letters: B rows of a step, R rows of all episodes, L tokens, Dc width of the language model, T action horizon, A and S action and state dims.
"""
import copy
import dataclasses
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from cli import UserError, at_least, choose_many, parse, run

from files import atomic, write_json
from data import record
from data.robots import ROBOTS
from data.tasks import TASKS
from model import BLM, backbone_hash, load_training
from policy import PRESETS, EmbodimentLinear, Policy, PolicyConfig
from rollout import EXECUTE_STEPS
from processor import Processor
from trainer import Run, RunConfig, checkpoints, end_processes, make_optimizers, read_record, shard, whole
from checkpoint import stored_dtype
from vlm import VLM
from files import find_folder


@dataclass
class TrainConfig(RunConfig):
    data: str = "out/demos"        # folder of demonstrations; recorded if it is not there
    out: str = "out/policy"        # folder for the model
    robots: str = "all"            # comma-separated robots to learn from, or all
    tasks: str = "all"             # comma-separated tasks to learn from, or all
    demonstrations: int = 0        # episodes of each robot and task, those of the lowest seeds; 0: all
    start: str = ""                # model folder whose policy to begin with; if there are robots that it lacks, only their own layers are trained
    backbone: str = ""             # folder or hub name of the frozen language model; empty: out/sft if it is there, else weights/nano
    cache: str = "out/intents"     # folder for the language model's hidden states
    steps: int = 7000              # optimiser steps
    batch_size: int = 64           # rows a step, over all processes
    lr: float = 3e-3               # peak learning rate
    warmup: int = 200              # steps
    ema: float = 0.999             # decay of the moving average of the weights, which is what is shipped
    state_noise: float = 0.02      # added to the normalised state in training, in deviations: the policy must look, not count
    frame_stride: int = 4          # control steps between frames that are trained on; must divide the action horizon
    held_out: int = 25             # one episode in so many of each cell is for validation; 0: none
    eval_rows: int = 512           # validation rows for the figures


MOST_FRAMES = 64                                                         # that the language model sees at once
FREE_TO_CHANGE = {"cache", "backbone", "eval_rows"}                      # when resuming, beside trainer.FREE


# ---- what the frozen model says of every frame

def episode_hash(episode):
    digest = hashlib.sha256(f"{episode.path.name} {episode.instruction}".encode())
    for array in (episode.state, episode.action, episode.offset):      # offsets tell other pictures of the same motion
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def open_cache(path, frames, width):
    """The cached (frames, L, Dc) float16, memory-mapped; None if it is not there or not whole."""
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return found if found.ndim == 3 and found.dtype == np.float16 and (found.shape[0], found.shape[2]) == (frames, width) else None


def cache_intents(blm, episodes, cfg, intent_layer, backbone, run):
    """One array a training frame's hidden states live in, for each episode; computes what is missing, each process its share."""
    folder, stride = Path(cfg.cache) / f"{backbone}-k{intent_layer}-s{cfg.frame_stride}", cfg.frame_stride
    wanted = [(e, folder / f"{episode_hash(e)}.npy", range(0, len(e), stride)) for e in episodes]
    width = blm.vlm.config.hidden_size
    missing = [(e, path, frames) for e, path, frames in wanted[run.rank::run.world] if open_cache(path, len(frames), width) is None]
    jobs = [(e, path, frames[i:i + MOST_FRAMES], i + MOST_FRAMES >= len(frames)) for e, path, frames in missing for i in range(0, len(frames), MOST_FRAMES)]
    rounds, parts = run.most(len(jobs)) if run.sharded else len(jobs), []
    if jobs and run.rank == 0:
        print(f"hidden states of {len(missing)} episodes, once, into {folder}")
    for i in trange(rounds, disable=run.rank > 0 or not rounds, mininterval=1):
        episode, path, frames, last = jobs[i] if i < len(jobs) else (*wanted[0][:2], range(1), False)         # shards work together: whoever is done goes along
        hidden, mask = blm.intent_states([episode.images(t) for t in frames], [episode.instruction] * len(frames), num_layers=intent_layer)
        assert mask.all()                                                # one instruction, so one length: no padding
        parts.append(hidden.clamp(-65504, 65504).half().cpu().numpy())
        if last:
            with atomic(path) as temporary:
                with open(temporary, "wb") as file:
                    np.save(file, np.concatenate(parts))
            parts = []
    run.barrier()
    return [open_cache(path, len(frames), width) for _, path, frames in wanted]


# ---- rows

class Demos:
    """All rows in memory, except the hidden states, which stay on disk until a batch asks for them.

    embodiments {robot: (state_dim, action_dim)}, `known` ones first; cells [(robot, task)]; train: row numbers; held_out {cell: row numbers}.
    """

    def __init__(self, episodes, hidden, config, stride, every, known=()):
        self.hidden, T = hidden, config.action_horizon
        self.ahead = T // stride                                         # frames until the future
        self.embodiments = dict(known)
        for episode in episodes:
            sizes = episode.state.shape[1], episode.action.shape[1]
            if self.embodiments.setdefault(episode.robot, sizes) != sizes:
                raise UserError(f"{episode.path}: state and action have {sizes} numbers, in other episodes of {episode.robot} {self.embodiments[episode.robot]}")
        self.cells = sorted({(e.robot, e.task) for e in episodes})
        S, A = (max(sizes[i] for sizes in self.embodiments.values()) for i in (0, 1))
        names = list(self.embodiments)
        self.where = np.array([(i, j) for i, e in enumerate(episodes) for j in range(len(range(0, len(e), stride)))])     # (R, 2): episode, frame
        R = len(self.where)
        self.state, self.action = np.zeros((R, S), np.float32), np.zeros((R, T, A), np.float32)
        self.embodiment = np.array([names.index(episodes[i].robot) for i, _ in self.where])
        for row, (i, j) in enumerate(self.where):
            state, action = episodes[i].state[j * stride], episodes[i].action[j * stride:j * stride + T]
            action = np.pad(action, ((0, T - len(action)), (0, 0)), mode="edge")      # past the end the arm holds still: that is what "done" looks like
            self.state[row, :len(state)], self.action[row, :, :action.shape[1]] = state, action
        first, trained, self.held_out = np.searchsorted(self.where[:, 0], np.arange(len(episodes) + 1)), [], {}
        rows_of = lambda members: np.concatenate([np.arange(first[i], first[i + 1]) for i in members] or [np.zeros(0, int)])
        for cell in self.cells:                                          # new episodes come last, so those set aside stay so
            members = [i for i, e in enumerate(episodes) if (e.robot, e.task) == cell]
            aside = (members[every - 1::every] or members[-1:]) if every and len(members) > 1 else []
            trained, self.held_out[cell] = trained + [i for i in members if i not in aside], rows_of(aside)
        self.train = rows_of(sorted(trained))

    def statistics(self, policy):
        """Fit the policy's normaliser to the training rows, for robots that have none yet."""
        for index in np.unique(self.embodiment[self.train]):
            own = self.train[self.embodiment[self.train] == index]
            if policy.normalizer.fitted[index]:
                continue
            policy.normalizer.fit(int(index), torch.from_numpy(self.state[own]), torch.from_numpy(self.action[own]))

    def rows_of_step(self, seed, step, batch_size):
        """(B,) row numbers, a function of (seed, step), sorted by robot: any frame as likely as any other, so the longer and harder tasks weigh more."""
        rows = np.random.default_rng([seed, step]).choice(self.train, batch_size)
        return rows[np.argsort(self.embodiment[rows], kind="stable")]

    def __getitem__(self, rows):
        """The batch that Policy.forward describes, for row numbers (B,)."""
        now = [self.hidden[i][j] for i, j in self.where[rows]]                                   # (L, Dc) each
        later = [self.hidden[i][j + self.ahead] if j + self.ahead < len(self.hidden[i]) else None for i, j in self.where[rows]]
        batch = {"future_valid": torch.tensor([frame is not None for frame in later])}
        length = max(map(len, now))
        for name, frames in (("", now), ("future_", [b if b is not None else a for a, b in zip(now, later)])):
            hidden, mask = np.zeros((len(rows), length, now[0].shape[1]), np.float32), np.zeros((len(rows), length), bool)
            for b, frame in enumerate(frames):
                hidden[b, :len(frame)], mask[b, :len(frame)] = frame, True
            batch[f"{name}hidden"], batch[f"{name}mask"] = torch.from_numpy(hidden), torch.from_numpy(mask)
        arrays = {"state": self.state, "action": self.action, "embodiment": self.embodiment}
        return {**batch, **{name: torch.from_numpy(array[rows]) for name, array in arrays.items()}}


# ---- evaluation

@torch.no_grad()
def evaluate(policy, demos, cfg, device):
    """Figures on held-out episodes, evenly over cells: flow and future loss with fixed noise; of chunks as `act` makes them, over their first steps, the mean
    error of joint targets (rad) and the share of finger targets on the right side of half open."""
    policy.eval()
    share = max(1, cfg.eval_rows // len(demos.cells))
    cells = [rows for rows in demos.held_out.values() if len(rows)]
    if not cells:
        return {}
    rows = np.concatenate([cell[np.linspace(0, len(cell) - 1, min(share, len(cell))).astype(int)] for cell in cells])
    sizes = [size for _, size in demos.embodiments.values()]
    finger, halfway = torch.tensor(sizes, device=device) - 1, torch.zeros(len(sizes), device=device)
    for e in np.unique(demos.embodiment):
        targets = demos.action[demos.embodiment == e, :, sizes[e] - 1]
        halfway[e] = float(targets.min() + targets.max()) / 2
    generator, sums = torch.Generator().manual_seed(0), {}

    def tally(name, total, n):
        so_far = sums.get(name, (0.0, 0.0))
        sums[name] = so_far[0] + float(total), so_far[1] + float(n)

    for start in range(0, len(rows), cfg.batch_size):
        batch = demos[rows[start:start + cfg.batch_size]]
        batch = {name: tensor.to(device) for name, tensor in {**batch, **policy.draw(len(batch["state"]), generator)}.items()}
        losses, valid, robot = policy(batch), policy.valid(batch["embodiment"]), batch["embodiment"]
        for name, n in (("flow", valid.sum()), ("future", batch["future_valid"].sum())):
            tally(f"val_{name}", losses[name] * n, n)
        made = policy.sample(batch["hidden"], batch["mask"], batch["state"], robot, torch.zeros_like(batch["noise"]))[:, :EXECUTE_STEPS]
        action, valid = batch["action"][:, :EXECUTE_STEPS], valid[:, :EXECUTE_STEPS]
        joints = valid & policy.normalizer.joint_mask[robot][:, None]
        tally("joint_error_rad", (made - action).abs()[joints].sum(), joints.sum())
        place = finger[robot][:, None, None].expand(-1, action.shape[1], 1)
        sides = [x.gather(2, place)[..., 0] > halfway[robot][:, None] for x in (made, action)]
        tally("finger_accuracy", (sides[0] == sides[1]).sum(), sides[0].numel())
    policy.train()
    return {name: round(total / n, 5) for name, (total, n) in sums.items() if n}


# ---- the run

def chosen(episodes, cfg, known):
    """The episodes that cfg asks for; with robots among them that `known` lacks, only theirs."""
    robots, tasks, count, kept = choose_many(cfg.robots, ROBOTS, "robot"), choose_many(cfg.tasks, TASKS, "task"), Counter(), []
    new = {episode.robot for episode in episodes if episode.robot in robots} - known.keys()
    for episode in episodes:                                             # sorted by cell, then seed
        cell = episode.robot, episode.task
        if episode.robot in (new or robots) and episode.task in tasks and (count[cell] < cfg.demonstrations or not cfg.demonstrations):
            count[cell] += 1
            kept.append(episode)
    if not kept:
        raise UserError(f"{cfg.data} holds no episodes of --robots {cfg.robots} and --tasks {cfg.tasks}: record them with `python -m data.record --out {cfg.data}`")
    return kept


def begin_with(policy, old):
    """Give `policy` the weights and statistics of `old`, whose robots are the first of its own; the layers of further robots stay as they are, and
    only those will be trained."""
    new, weights = len(policy.embodiments) > len(old.embodiments), policy.state_dict()
    for name, before in old.state_dict().items():
        weights[name][tuple(map(slice, before.shape))] = before.to(weights[name].device)
    if new:
        policy.requires_grad_(False)
        for module in policy.modules():
            if isinstance(module, EmbodimentLinear):
                module.requires_grad_(True)
    return new


def load_backbone(cfg, run):
    """(folder, BLM without a policy), frozen."""
    folder = find_folder(cfg.backbone or ("out/sft" if Path("out/sft/model.safetensors").exists() else "weights/nano"))
    if not folder.is_dir():
        raise UserError(f"no language model in {folder}: train one with `python train_sft.py`, or name a folder with --backbone")
    blm = BLM(VLM.from_pretrained(folder, "cpu" if run.sharded else run.device).requires_grad_(False), Processor.from_pretrained(folder))
    blm.device = run.device                                              # where shards will be
    blm.training = {stage: about for stage, about in load_training(folder).items() if stage != "policy"}
    return folder, blm


def train(cfg, config):
    """Train with a TrainConfig and a PolicyConfig; returns the last figures."""
    run = Run(cfg, {**dataclasses.asdict(cfg), **dataclasses.asdict(config)}, FREE_TO_CHANGE)
    at_least(cfg, 1, "eval_rows"), at_least(cfg, 0, "demonstrations", "ema", "state_noise")
    if cfg.ema >= 1:
        raise UserError(f"--ema {cfg.ema} must be below 1: the average would never move")
    if cfg.frame_stride < 1 or config.action_horizon % cfg.frame_stride:
        raise UserError(f"--frame_stride {cfg.frame_stride} must divide --action_horizon {config.action_horizon}: the future is a cached frame too")
    if cfg.held_out < 0 or cfg.held_out == 1:
        raise UserError(f"--held_out {cfg.held_out} must be 0, or at least 2: one episode in so many is not trained on")
    folder, blm = load_backbone(cfg, run)
    if config.intent_layer > blm.vlm.config.num_hidden_layers:
        raise UserError(f"--intent_layer {config.intent_layer}: the language model in {folder} has {blm.vlm.config.num_hidden_layers} blocks")
    backbone, old = backbone_hash(blm.vlm, blm.processor, config.intent_layer), None
    if cfg.resume and read_record(checkpoints(cfg.out)[-1]).get("backbone") != backbone:         # before anything in --out is touched
        raise UserError(f"{cfg.out} was trained on another language model than {folder}: resume with that one as --backbone, or choose another --out")
    if cfg.start:
        started = BLM.from_pretrained(cfg.start)
        old = started.policy
        if old is None or (old.config, old.condition_size) != (config, blm.vlm.config.hidden_size):
            raise UserError(f"--start {cfg.start} holds {'no policy' if old is None else 'a policy of other sizes than the flags say'}: name another folder")
    known = old.embodiments if old else {}
    if run.rank == 0:
        record.ensure(cfg.data)
    run.barrier()
    episodes = chosen(record.load_episodes(cfg.data), cfg, known)
    if old and {episode.robot for episode in episodes} - known.keys() and backbone_hash(started.vlm, started.processor, config.intent_layer) != backbone:
        raise UserError(f"--start {cfg.start} reads another language model than {folder}, and lacks some of --robots: name its own with --backbone")
    if run.rank == 0:
        blm.vlm.save_pretrained(cfg.out, stored_dtype(folder))                  # does not change: once is enough
        blm.processor.save_pretrained(cfg.out)
    if run.sharded:
        shard(blm.vlm, [*blm.vlm.visual.blocks, *blm.vlm.model.layers], run.device)
    hidden = cache_intents(blm, episodes, cfg, config.intent_layer, backbone, run)
    demos, condition_size = Demos(episodes, hidden, config, cfg.frame_stride, cfg.held_out, known), blm.vlm.config.hidden_size
    origin = {"started_from": started.training.get("policy")} if cfg.start else {}
    blm.vlm = started = None                                             # all that they say is cached: their memory is the policy's now
    torch.manual_seed(cfg.seed)
    policy = Policy(config, condition_size, demos.embodiments)
    only_new = old is not None and begin_with(policy, old)
    demos.statistics(policy)
    blm.policy = copy.deepcopy(policy).requires_grad_(False)             # the moving average
    size = sum(p.numel() for p in policy.parameters())
    for module in (policy, blm.policy):
        if run.sharded:
            shard(module, (), run.device, ("sample",))
        module.to(run.device)
    averages = list(blm.policy.parameters())
    optimizers = make_optimizers((policy,), dataclasses.replace(cfg, weight_decay=0.0) if only_new else cfg, run.dtype)       # it would shrink the others' layers

    def check_origin(before):
        if before["robots"] != list(policy.embodiments):
            raise UserError(f"{cfg.out} was trained on {', '.join(before['robots'])}, --data has {', '.join(policy.embodiments)}: choose another --out")

    run.begin({"policy": policy, "ema": blm.policy}, optimizers, check_origin)
    before = [*run.record.get("before", []), {name: run.record[name] for name in ("command", "step", "episodes")}] if cfg.resume else []

    def batches_of(step):
        """This process's rows of a step, and over all processes what the losses are divided by. Noise is drawn for all rows, then shared out."""
        mine = slice(run.rank, None, run.world)
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        random = {name: tensor[mine] for name, tensor in policy.draw(cfg.batch_size, generator, cfg.state_noise).items()}
        rows = demos.rows_of_step(cfg.seed, step, cfg.batch_size)
        numbers = config.action_horizon * np.array([size for _, size in demos.embodiments.values()])[demos.embodiment[rows]].sum()
        futures = sum(j + demos.ahead < len(demos.hidden[i]) for i, j in demos.where[rows])
        return {**demos[rows[mine]], **random}, (int(numbers), max(1, int(futures)))

    def gradients(batches, step):
        """Leaves this process's share of the step's gradient in the parameters; returns its share of the losses."""
        batch, totals = batches
        with run.autocast():
            losses = policy({name: tensor.to(run.device) for name, tensor in batch.items()}, totals)
        run.backward(losses["loss"])
        return {name: value.detach() for name, value in losses.items()}

    def average(step):
        with torch.no_grad():                                            # early on the average would still be the random start
            torch._foreach_lerp_(averages, list(policy.parameters()), 1 - min(cfg.ema, (step + 1) / (step + 11)))

    def about():
        rows = {"train": len(demos.train), "held_out": sum(map(len, demos.held_out.values()))}
        return run.about("policy", before=before, episodes=len(episodes), rows=rows, cells=len(demos.cells), robots=list(demos.embodiments), backbone=backbone, **origin)

    def export():
        weights = whole(blm.policy)
        if run.rank == 0:
            blm.training["policy"] = about()
            blm.save_policy(cfg.out, torch.float16, weights, backbone)
            write_json(Path(cfg.out) / "training.json", blm.training)

    def describe(step):
        return ", ".join(f"{episodes[i].path.name} step {j * cfg.frame_stride}" for i, j in demos.where[demos.rows_of_step(cfg.seed, step, cfg.batch_size)])

    if run.rank == 0:
        print(f"{size / 1e6:.1f} M parameters, {len(episodes)} episodes of {len(demos.cells)} cells, {len(demos.where)} rows, {cfg.steps - run.step} steps of {cfg.batch_size}, "
              f"{run.world} process(es)")
    run.expect([(cfg.steps - run.step, run.step)] if run.step < cfg.steps else [], gradients, batches_of)
    tokens, inner = 1 + config.action_horizon + config.num_future_tokens, sum(p.numel() for p in policy.blocks.parameters())       # of the DiT: most of the work
    figures = run.loop(batches_of, gradients, lambda: evaluate(blm.policy, demos, cfg, run.device), export, about, describe,
                       flops=lambda batches, step: 6 * inner * tokens * len(batches[0]["state"]), after=average)
    if run.rank == 0:
        print(f"model in {cfg.out}; try `python sample.py --weights {cfg.out}`")
    return figures


def main():
    cfg, config = parse(TrainConfig, description="Stage II: train the policy; the language model stays frozen."), PRESETS["nano"]
    train(cfg, config)
    end_processes()


if __name__ == "__main__":
    run(main)
