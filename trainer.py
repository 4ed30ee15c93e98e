"""What both training scripts call: processes, shards, optimizers, schedule, checkpoints, the log.

    python train_policy.py                                   one process, on the best device
    torchrun --nproc_per_node 8 train_policy.py              data parallel: the rows of a step shared
    torchrun --nproc_per_node 8 train_sft.py --fsdp          weights, gradients and moments sharded

torchrun reads --start as a beginning of its own --start-method: with that flag, write
`torchrun --nproc_per_node 8 -- train_policy.py --start weights/nano`.

The loops are in the scripts. Rows, noise and all else that is drawn in a step depend on (seed, step)
alone, whatever the number of processes. So a checkpoint holds no random state, and a run that was
stopped and resumed is the run that was not: on one CPU to the bit.

Written to --out: state/<step>.safetensors, the last two, each whole or absent; log.jsonl, a line a step.
"""

import json
import math
import os
import re
import shlex
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

from cli import UserError, at_least, choose, pick_device
from files import Tensors, atomic, claim, reading, save_tensors, whole_files, writable

GRAD_CLIP = 1.0  # largest norm of a step's gradient
MOST_SKIPPED = 10  # steps in a row whose gradient is no number
MOMENTUM = 0.95  # Muon's
MUON_NUMBERS = 2**24  # in one product of several matrices


@dataclass
class RunConfig:
    """The flags that both stages have."""

    out: str = ""  # folder for the model
    steps: int = 1000  # optimizer steps
    batch_size: int = 32  # rows a step, over all processes
    lr: float = 1e-3  # peak learning rate
    eval_every: int = 500  # steps between evaluations, each with a checkpoint
    seed: int = 0  # of weights, rows and noise
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of matrix products: float32, bfloat16; auto: bfloat16 on CUDA
    fsdp: bool = False  # with torchrun: shard weights, gradients and moments
    resume: bool = False  # go on from the last checkpoint in --out; more --steps train longer


# What a resumed run may have otherwise than the run before.
FREE = {"out", "steps", "eval_every", "device", "dtype", "fsdp", "resume", "data"}


def check(cfg):
    """UserError for what is wrong with a RunConfig and its folder: told before any work."""
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
    """A context that holds --out for this run alone; the first process does it for all."""
    return claim(cfg.out) if is_first() else nullcontext()


# ---- processes


def this_process():
    """(rank, world): which of how many processes under torchrun; (0, 1) under python."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_first():
    """Is this the process that writes files and talks?"""
    return this_process()[0] == 0


def start_processes(cfg):
    """Join the other processes of torchrun, if any. Returns this one's device."""
    device = pick_device(cfg.device)
    if this_process()[1] == 1:
        return device
    if not dist.is_initialized():  # one stage may follow another
        backend = "nccl" if device.type == "cuda" else "gloo"
        # the first process makes data and writes files while the others wait
        dist.init_process_group(backend, timeout=timedelta(hours=3))
    if device.type == "cuda":  # one GPU a process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def end_processes():
    """For the end of a script, where all processes arrive."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(numbers, device):
    """[float] of this process to the sums over all of them."""
    numbers = [float(number) for number in numbers]
    if not dist.is_initialized():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def autocast(cfg, device):
    """The context of a forward pass: matrix products in bfloat16, or as the weights are."""
    enabled = compute_dtype(cfg, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def compute_dtype(cfg, device):
    """What matrix products are computed in. Weights and moments stay in float32."""
    if cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return torch.float32


def shard(module, blocks, device, methods=()):
    """Shard parameters over all processes (FSDP2): a unit for each of `blocks`, one for the rest.

    On a GPU the shards compute in bfloat16. methods: those called beside `forward`.
    """
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # gradients are summed in float32: many small ones would be lost in bfloat16
    precision = MixedPrecisionPolicy()
    if device.type == "cuda":
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for part in (*blocks, module):
        fully_shard(part, mp_policy=precision)
        # every process has its share of the loss: gradients add up
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    for method in methods:
        register_fsdp_forward_method(module, method)


def full_tensor(tensor):
    """A tensor, sharded or not, whole on the CPU. Every process must call this."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu()


def full_state_dict(module):
    return {name: full_tensor(tensor) for name, tensor in module.state_dict().items()}


# ---- one optimizer step


def to_device(batch, device):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def prefetch(make_batch, steps):
    """Yield make_batch(step) for each of `steps`; the next one is made in a thread meanwhile."""
    with ThreadPoolExecutor(1) as loader:
        upcoming = None
        for step in steps:
            # a batch depends on its step alone, so that it may be made ahead
            batch = make_batch(step) if upcoming is None else upcoming.result()
            upcoming = loader.submit(make_batch, step + 1) if step + 1 in steps else None
            yield batch


def sum_gradients(parameters):
    """Add up gradients over processes in one message, so that all take the same step.

    Those of shards are added already, by fully_shard.
    """
    for p in parameters:
        if p.grad is None:  # rows without a picture leave the ViT without one
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters if not isinstance(p, DTensor)]
    if not dist.is_initialized() or not gradients:
        return
    # one long message costs less than many short ones
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters):
    """Scale gradients down to a norm of GRAD_CLIP. Returns the norm before, a float."""
    # the norm of shards and of whole tensors cannot be taken together
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
    """Add up and clip the gradients, and step unless loss or gradient is no number.

    losses {name: this process's share}. Returns what the log says of it (lr, the losses of all
    processes, grad_norm), whether the step was taken, and whether any process got a signal.
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
    """Say that a step was left out since its gradient is no number; end the run if many in a row are.

    `line` is the log's, `rows` are the step's in words.
    """
    # one spike is bad luck; many in a row are a wrong rate or wrong data
    text = f"loss {line['loss']}, gradient norm {line['grad_norm']}; its rows: {rows}"
    if count == MOST_SKIPPED:
        raise UserError(f"{count} steps in a row gave no number: {text}; try a smaller --lr")
    say(f"step skipped: {text}")


# ---- optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose step has all singular values near one (Jordan et al. 2024), for matrices.

    What is rare in the gradient is learned as fast as what is common. A step is as large as AdamW's at
    the same rate (arXiv 2502.16982). Unlike torch.optim's it computes in `dtype`, not always in bfloat16.
    """

    def __init__(self, params, lr, weight_decay, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # one product for all matrices of a shape: small ones alone leave a machine idle
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for shape, matrices in same_shape.items():
                count = max(1, MUON_NUMBERS // shape.numel())
                for start in range(0, len(matrices), count):
                    self.update(matrices[start : start + count], group["lr"], group["weight_decay"])

    def update(self, matrices, lr, weight_decay):
        # Nesterov: the step looks ahead by the gradient of now
        momenta = []
        for p in matrices:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            mean = state["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
            momenta.append(p.grad.lerp(mean, MOMENTUM).to(self.dtype))
        steps = orthogonalize(torch.stack(momenta)).to(matrices[0].dtype)
        # 0.2 sqrt(longer side): the root mean square of AdamW's steps
        for p, step in zip(matrices, steps):
            p.mul_(1 - lr * weight_decay)
            p.add_(step, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def orthogonalize(x, iterations=5):
    """U S V' of each matrix of x (N, m, n) to about U V'.

    Newton-Schulz: every iteration pulls the singular values towards one. Coefficients: Jordan's.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, iterations).mT
    # singular values below one, or the iteration runs away
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT  # (N, m, m)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


def make_optimizers(modules, lr, weight_decay, dtype=torch.float32):
    """[Muon for the matrices of blocks, AdamW for all else; vectors and biases do not decay]."""
    matrices = []
    decayed = []
    plain = []
    for name, p in chain.from_iterable(module.named_parameters() for module in modules):
        if not p.requires_grad:
            continue
        # embeddings, heads and robots' own layers are no blocks: their rows are told apart
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
    muon = [Muon(matrices, lr, weight_decay, dtype)] if matrices else []  # LoRA may leave none
    return [*muon, adamw]


def step_optimizers(optimizers, lr):
    """One step of each at this learning rate."""
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
    """[(parameter, the state that its optimizer keeps of it)], in one order for ever."""
    pairs = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            pairs += [(p, optimizer.state) for p in group["params"]]
    return pairs


# ---- checkpoints


def checkpoints(out):
    """The checkpoints of a folder, the newest last."""
    return whole_files(Path(out) / "state", "[0-9]*.safetensors")


def state_tensors(modules, optimizers):
    """All that a checkpoint holds, by name: weights, and moments as optimizer.<parameter>.<kind>."""
    tensors = {}
    for owner, module in modules.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{owner}.{name}"] = tensor
    for i, (p, states) in enumerate(optimized_parameters(optimizers)):
        for kind, value in states.get(p, {}).items():
            tensors[f"optimizer.{i}.{kind}"] = value
    return tensors


def save_checkpoint(cfg, modules, optimizers, record):
    """Write state/<step>.safetensors; every process must call this, the first one writes.

    Shards are gathered, so that any number of processes can go on.
    """
    tensors = state_tensors(modules, optimizers)
    tensors = {name: full_tensor(tensor) for name, tensor in tensors.items()}
    if is_first():
        # two are kept: the newest may be the one that a full disk or a bad step spoiled
        save_tensors(Path(cfg.out) / "state" / f"{record['step']:08d}.safetensors", tensors, record)
        for path in checkpoints(cfg.out)[:-2]:
            path.unlink()
    barrier()


def read_checkpoint(cfg, free=()):
    """(Tensors, its record) of the last checkpoint in --out.

    UserError if it is damaged, or was made with other flags than cfg's (beside FREE and `free`).
    """
    advice = "delete it to go on from the checkpoint before"
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
    """With --resume put the last checkpoint back. Returns its record, or that of a run's beginning."""
    if not cfg.resume:
        return {"step": 0, "seconds": 0.0, "figures": {}}
    checkpoint, record = read_checkpoint(cfg, free)
    pairs = optimized_parameters(optimizers)
    names = checkpoint.names()
    with reading(checkpoint.path, "it belongs to another configuration: choose another --out"):
        for name in names:  # optimizers make their moments in the first step
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
    """What is known of a run after a step with this line of the log: for checkpoints, training.json."""
    return {
        "stage": stage,
        "command": "python " + shlex.join(sys.argv),
        "seed": cfg.seed,
        "step": line["step"],
        "steps": cfg.steps,
        "seconds": round(line["seconds"], 1),
        "figures": figures,
        "config": asdict(cfg),
    }


# ---- log and signals


def say(text):
    """A line for people, from the first process."""
    if is_first():
        tqdm.write(text)


def progress_bar(steps):
    """tqdm over a range of steps, shown by the first process."""
    return tqdm(steps, initial=steps.start, total=steps.stop, disable=not is_first(), unit="step")


class Log:
    """log.jsonl, a line a step, from the first process. What a resumed run does again is cut off."""

    def __init__(self, out, step):
        self.path = Path(out) / "log.jsonl"
        self.silent = not is_first()
        if not self.silent:
            text = self.path.read_text() if step and self.path.exists() else ""
            with atomic(self.path) as temporary:
                temporary.write_text("".join(text.splitlines(keepends=True)[:step]))

    def write(self, line):
        """Append a dict. A full disk is told, once: training itself need not end for it."""
        if self.silent:
            return
        line = {k: round(v, 6) if isinstance(v, float) else v for k, v in line.items()}
        try:
            # opened anew for every line: a killed process loses none
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            say(f"cannot write {self.path}: {error.strerror}")
            self.silent = True


@contextmanager
def catch_signals():
    """A list to which SIGINT and SIGTERM add their number, for a loop that ends after its step.

    A second signal ends the process at once.
    """
    caught = []
    before = {}

    def remember(number, frame):
        caught.append(number)
        # whoever asks twice does not want to wait for the step
        default = signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
        signal.signal(number, default)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, remember)
    try:
        yield caught
    finally:  # another stage may follow, or a test
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_stopped(step, signals):
    """End the script after a signal, with the shell's exit code for it."""
    end_processes()
    say(f"stopped at step {step}, which is saved: go on with --resume")
    sys.exit(128 + (signals or [signal.SIGTERM])[0])
