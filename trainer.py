"""What both training scripts share: processes, shards, optimizers, schedule, checkpoints, the log.

    python train_policy.py                                   one process, on the best device
    torchrun --nproc_per_node 8 train_policy.py              data parallel: divides a step's rows
    torchrun --nproc_per_node 8 train_sft.py --fsdp          shards weights, gradients and moments

torchrun takes --start for an abbreviation of its own --start-method: with that flag, write
`torchrun --nproc_per_node 8 -- train_policy.py --start weights/nano`.

The training loops are in the scripts. Rows, noise and everything else drawn in a step depend only
on (seed, step), not on the number of processes. So a checkpoint holds no random state, and a run
that was stopped and resumed equals one that was not: on one CPU, bit for bit.

Written to --out: state/<step>.safetensors, the last two, each whole or absent; log.jsonl, one line
per step.
"""

import json
import math
import os
import re
import signal
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from cli import UserError, at_least, choose, command_line, pick_device
from files import Tensors, atomic, claim, reading, save_tensors, whole_files, writable

GRAD_CLIP = 1.0  # largest norm of a step's gradient
MOST_SKIPPED = 10  # consecutive steps whose loss or gradient is not finite
MOMENTUM = 0.95  # Muon's
MUON_NUMBERS = 2**24  # numbers in one batched product


@dataclass
class RunConfig:
    """The flags of both stages."""

    out: str = ""  # folder for the model
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # rows per step, over all processes
    lr: float = 1e-3  # peak learning rate
    eval_every: int = 500  # steps between evaluations, each with a checkpoint
    seed: int = 0  # seed of weights, rows and noise
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # dtype of matrix products: float32, bfloat16; auto: bfloat16 on CUDA
    fsdp: bool = False  # with torchrun: shard weights, gradients and moments
    resume: bool = False  # continue from the last checkpoint in --out; more --steps train longer


# Flags that may change when a run is resumed.
FREE = {"out", "steps", "eval_every", "device", "dtype", "fsdp", "resume", "data"}


def check(cfg):
    """UserError for anything wrong with a RunConfig and its folder, before any work."""
    at_least(cfg, 1, "steps", "batch_size", "eval_every")
    at_least(cfg, 0, "lr", "seed")
    choose(cfg.dtype, ("auto", "float32", "bfloat16"), "--dtype")
    _, world = this_process()
    folder = Path(cfg.out)
    if cfg.fsdp and world == 1:
        raise UserError("--fsdp shards over processes: start it with `torchrun --nproc_per_node 2`")
    if cfg.batch_size % world:
        raise UserError(f"--batch_size {cfg.batch_size} must be a multiple of {world} processes")
    started = checkpoints(cfg.out)
    if started and not cfg.resume:
        raise UserError(f"{cfg.out} already holds a training run: add --resume, or change --out")
    if cfg.resume and not started:
        raise UserError(f"{cfg.out} holds no training run to resume: leave out --resume")
    if (folder / "config.json").exists() and not (folder / "state").exists():
        raise UserError(f"{cfg.out} already holds a model: choose another --out")
    if is_first():
        writable(cfg.out)


def claim_out(cfg):
    """A context that holds --out for this run alone; the first process holds it for all."""
    return claim(cfg.out) if is_first() else nullcontext()


# ---- processes


def this_process():
    """(rank, world): this process's index and their number under torchrun; (0, 1) under python."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first():
    """Is this the process that writes files and prints?"""
    return this_process()[0] == 0


def start_processes(cfg):
    """Join the other processes of torchrun, if any. Returns this one's device."""
    device = pick_device(cfg.device)
    if this_process()[1] == 1:
        return device
    if not dist.is_initialized():  # one stage may follow another in the same process
        backend = "nccl" if device.type == "cuda" else "gloo"
        # long, because the first process may make data and write files while the others wait
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    if device.type == "cuda":  # one GPU per process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def end_processes():
    """Called at the end of a script, by all processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(numbers, device):
    """[float] of this process to their sums over all processes."""
    numbers = [float(number) for number in numbers]
    if not dist.is_initialized():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def autocast(cfg, device):
    """The context of a forward pass: matrix products in bfloat16, or in the weights' dtype."""
    enabled = compute_dtype(cfg, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def compute_dtype(cfg, device):
    """The dtype of matrix products. Weights and moments stay in float32."""
    if cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def shard(module, blocks, device, methods=()):
    """Shard parameters over all processes (FSDP2): one unit per block, and one for the rest.

    On a GPU the shards compute in bfloat16. methods: those that are called besides `forward`.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # sum gradients in float32: bfloat16 would lose many small ones
    precision = MixedPrecisionPolicy()
    if device.type == "cuda":
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for part in (*blocks, module):
        fully_shard(part, mp_policy=precision)
        # each process computes its share of the loss, so gradients are summed, not averaged
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    for method in methods:
        register_fsdp_forward_method(module, method)


def full_tensor(tensor):
    """A tensor, sharded or not, as a whole on the CPU. Every process must call this."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()


def full_state_dict(module):
    return {name: full_tensor(tensor) for name, tensor in module.state_dict().items()}


# ---- one optimizer step


def to_device(batch, device):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def prefetch(make_batch, steps):
    """Yield make_batch(step) for each of `steps`, making the next one in a thread meanwhile."""
    with ThreadPoolExecutor(1) as loader:
        upcoming = None
        for step in steps:
            # a batch depends only on its step, so it can be made ahead of time
            batch = make_batch(step) if upcoming is None else upcoming.result()
            upcoming = loader.submit(make_batch, step + 1) if step + 1 in steps else None
            yield batch


def sum_gradients(parameters):
    """Sum gradients over processes in one message, so that all take the same step.

    fully_shard has already summed those of sharded parameters.
    """
    for p in parameters:
        if p.grad is None:  # without images in the rows the ViT gets none
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters if not isinstance(p, DTensor)]
    if not dist.is_initialized() or not gradients:
        return
    # one long message is faster than many short ones
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters):
    """Scale gradients down to a norm of at most GRAD_CLIP. Returns the norm before, a float."""
    # sharded and whole tensors need separate norms
    squares = 0.0
    for sharded in (False, True):
        gradients = [p.grad for p in parameters if isinstance(p.grad, DTensor) == sharded]
        squares += float(full_tensor(nn.utils.get_total_norm(gradients))) ** 2
    norm = math.sqrt(squares)
    nn.utils.clip_grads_with_norm_(parameters, GRAD_CLIP, torch.tensor(norm))
    return norm


def learning_rate(step, cfg, warmup):
    """Linear warmup, then a cosine down to a tenth."""
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, cfg.steps - warmup)
    return cfg.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def take_step(optimizers, lr, losses, signals, device):
    """Sum and clip the gradients, and step unless the loss or the gradient is not finite.

    losses {name: this process's share}. Returns the log line (lr, losses over all processes,
    grad_norm), whether the step was taken, and whether any process received a signal.
    """
    parameters = trained_parameters(optimizers)
    sum_gradients(parameters)
    norm = clip_gradients(parameters)
    shares = [*(loss.detach() for loss in losses.values()), len(signals)]
    *sums, stop = sum_over_processes(shares, device)
    line = {"lr": lr, **dict(zip(losses, sums)), "grad_norm": norm}
    finite = math.isfinite(line["loss"] + norm)
    if finite:
        step_optimizers(optimizers, lr)
    zero_gradients(optimizers)
    return line, finite, stop > 0


def report_skipped(line, count, rows):
    """Report a step that was skipped because it was not finite; end the run after many in a row.

    `line` is the log line; `rows` describes the step's rows.
    """
    # one spike is bad luck; many in a row mean a wrong rate or bad data
    text = f"loss {line['loss']}, gradient norm {line['grad_norm']}; its rows: {rows}"
    if count == MOST_SKIPPED:
        raise UserError(f"{count} consecutive steps not finite: {text}; try a smaller --lr")
    say(f"step skipped: {text}")


# ---- optimizers


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized steps (Jordan et al. 2024), for matrices.

    All singular values of a step are near one, so rare directions of the gradient are learned as
    fast as common ones. A step is as large as AdamW's at the same rate (arXiv 2502.16982). Unlike
    torch.optim's it computes in `dtype`, not always in bfloat16.
    """

    def __init__(self, params, lr, weight_decay, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # one batched product for all matrices of a shape: small ones alone do not fill a
            # machine
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for shape, matrices in same_shape.items():
                count = max(1, MUON_NUMBERS // shape.numel())
                for start in range(0, len(matrices), count):
                    self.update(matrices[start : start + count], group["lr"], group["weight_decay"])

    def update(self, matrices, lr, weight_decay):
        # Nesterov momentum: add the current gradient once more
        momenta = []
        for p in matrices:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            mean = state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
            momenta.append(p.grad.lerp(mean, MOMENTUM).to(self.dtype))
        steps = orthogonalize(torch.stack(momenta)).to(matrices[0].dtype)
        # 0.2 sqrt(longer side) gives the root mean square of AdamW's steps
        for p, step in zip(matrices, steps):
            p.mul_(1 - lr * weight_decay)
            p.add_(step, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def orthogonalize(x, iterations=5):
    """Each matrix U S V' of x (N, m, n) to approximately U V'.

    Newton-Schulz: every iteration pulls the singular values toward one. Coefficients: Jordan's.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, iterations).mT
    # singular values must be below one, or the iteration diverges
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT  # (N, m, m)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


def make_optimizers(modules, lr, weight_decay, dtype=torch.float32):
    """[Muon for the matrices of blocks, AdamW for the rest; no decay for vectors and biases]."""
    matrices = []
    decayed = []
    plain = []
    for name, p in chain.from_iterable(module.named_parameters() for module in modules):
        if not p.requires_grad:
            continue
        # not for embeddings, heads and robots' own layers: there each row has its own meaning
        if p.ndim == 2 and re.search(r"\b(layers|blocks|attentions|mlps)\.\d", name):
            matrices.append(p)
        elif p.ndim > 1 and not name.endswith("bias"):
            decayed.append(p)
        else:
            plain.append(p)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    muon = [Muon(matrices, lr, weight_decay, dtype)] if matrices else []  # with LoRA maybe none
    return [*muon, adamw]


def step_optimizers(optimizers, lr):
    """One step of each optimizer at this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


def zero_gradients(optimizers):
    for optimizer in optimizers:
        optimizer.zero_grad()


def trained_parameters(optimizers):
    return [p for p, _ in optimized_parameters(optimizers)]


def optimized_parameters(optimizers):
    """[(parameter, its optimizer's state)], in an order that checkpoints rely on."""
    pairs = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            pairs += [(p, optimizer.state) for p in group["params"]]
    return pairs


# ---- checkpoints


def checkpoints(out):
    """The checkpoints in a folder, newest last."""
    return whole_files(Path(out) / "state", "[0-9]*.safetensors")


def state_tensors(modules, optimizers):
    """Everything in a checkpoint, by name: weights, and moments as optimizer.<parameter>.<kind>."""
    tensors = {}
    for owner, module in modules.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{owner}.{name}"] = tensor
    for i, (p, states) in enumerate(optimized_parameters(optimizers)):
        for kind, value in states.get(p, {}).items():
            tensors[f"optimizer.{i}.{kind}"] = value
    return tensors


def save_checkpoint(cfg, modules, optimizers, record):
    """Write state/<step>.safetensors. Every process must call this; the first one writes.

    Shards are gathered, so that any number of processes can resume.
    """
    tensors = state_tensors(modules, optimizers)
    tensors = {name: full_tensor(tensor) for name, tensor in tensors.items()}
    if is_first():
        # keep two: a full disk or a bad step may have spoiled the newest
        save_tensors(Path(cfg.out) / "state" / f"{record['step']:08d}.safetensors", tensors, record)
        for path in checkpoints(cfg.out)[:-2]:
            path.unlink()
    barrier()


def read_checkpoint(cfg, free=()):
    """(Tensors, its record) of the last checkpoint in --out.

    UserError if it is damaged, or was made with other flags than cfg's (except FREE and `free`).
    """
    advice = "delete it to resume from the previous checkpoint"
    checkpoint = Tensors(checkpoints(cfg.out)[-1], advice).check()
    record = checkpoint.about
    with reading(checkpoint.path, advice):
        for name, value in asdict(cfg).items():
            before = record["config"].get(name, value)
            if name not in FREE | set(free) and before != value:
                raise UserError(
                    f"{cfg.out} was trained with --{name} {before}, not {value}: "
                    "resume with that, or choose another --out"
                )
    return checkpoint, record


def resume(cfg, free, modules, optimizers):
    """With --resume load the last checkpoint. Returns its record, or the record of a new run."""
    if not cfg.resume:
        return {"step": 0, "seconds": 0.0, "figures": {}}
    checkpoint, record = read_checkpoint(cfg, free)
    pairs = optimized_parameters(optimizers)
    names = checkpoint.names()
    with reading(checkpoint.path, "it belongs to another configuration: choose another --out"):
        for name in names:  # optimizers create their moments in the first step
            if name.startswith("optimizer."):
                _, i, kind = name.split(".")
                p, states = pairs[int(i)]
                empty = torch.zeros(()) if kind == "step" else torch.zeros_like(p)
                states[p][kind] = empty.to(p.device)
        tensors = state_tensors(modules, optimizers)
        if tensors.keys() != names:
            raise UserError(f"tensors differ, first {min(tensors.keys() ^ names)}")
        for name, tensor in tensors.items():
            fill(tensor, checkpoint[name])
    return record


@torch.no_grad()
def fill(tensor, array):
    """Copy a numpy array into a tensor, sharded or not."""
    whole = torch.from_numpy(array).to(tensor.device)
    if isinstance(tensor, DTensor):
        mesh, placements = tensor.device_mesh, tensor.placements
        whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    tensor.copy_(whole)


def run_record(cfg, stage, line, figures):
    """The record of a run after the step of this log line: for checkpoints and training.json."""
    return {
        "stage": stage,
        "command": command_line(),
        "seed": cfg.seed,
        "step": line["step"],
        "steps": cfg.steps,
        "seconds": round(line["seconds"], 1),
        "figures": figures,
        "config": asdict(cfg),
    }


# ---- log and signals


def say(text):
    """Print a line, from the first process only."""
    if is_first():
        tqdm.write(text)


def progress_bar(steps):
    """tqdm over a range of steps, shown by the first process only."""
    return tqdm(steps, initial=steps.start, total=steps.stop, disable=not is_first(), unit="step")


class Log:
    """log.jsonl, one line per step, from the first process. Resuming drops lines to be redone."""

    def __init__(self, out, step):
        self.path = Path(out) / "log.jsonl"
        self.silent = not is_first()
        if not self.silent:
            text = self.path.read_text() if step and self.path.exists() else ""
            with atomic(self.path) as temporary:
                temporary.write_text("".join(text.splitlines(keepends=True)[:step]))

    def write(self, line):
        """Append a dict. A full disk is reported once; training itself continues."""
        if self.silent:
            return
        line = {k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}
        try:
            # reopened for every line, so that a killed process loses none
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            say(f"cannot write {self.path}: {error.strerror}")
            self.silent = True


@contextmanager
def catch_signals():
    """A list that collects SIGINT and SIGTERM, for a loop that ends after its current step.

    A second signal ends the process at once.
    """
    caught = []
    before = {}

    def remember(number, frame):
        caught.append(number)
        # someone who signals twice does not want to wait for the step
        default = signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
        signal.signal(number, default)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, remember)
    try:
        yield caught
    finally:  # another stage, or a test, may follow
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_stopped(step, signals):
    """End the script after a signal, with the shell's exit code for it."""
    end_processes()
    say(f"stopped at step {step}, which is saved; continue with --resume")
    sys.exit(128 + (signals or [signal.SIGTERM])[0])
