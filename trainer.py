"""A training run, which is the same in both stages: processes, optimiser and schedule, checkpoints that lose nothing, stops, spikes, logs.

    python train_policy.py                                       one process, on the best device found
    torchrun --nproc_per_node 8 train_policy.py                  data parallel: processes share the rows of a step; any number of nodes, with torchrun's own flags
    torchrun --nproc_per_node 8 train_sft.py --fsdp              weights, gradients and moments sharded too (PyTorch's fully_shard)

A stage brings what the rows of a step are, their losses, its figures on validation data, and how its model is written; `Run` does the rest. Rows, noise
and everything else that is drawn in a step depend on (seed, step) alone, whatever the number of processes: a checkpoint holds no random state, and a run
that was stopped and goes on is the run that was not stopped, on one CPU to the bit.

Written to --out: state/<step>.safetensors (with --fsdp the folder state/<step>, of torch.distributed.checkpoint), the last `keep` of them, each whole or
absent; log.jsonl, a line a step; loss.png. Ctrl-C and SIGTERM save before they end.
"""
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from cli import UserError, at_least, choose, pick_device
from jobs import this_process

from files import atomic, writable, write_json
from dev.plot import curves

NORMS = 64                       # steps over whose gradient norms the usual one is the median
MOST_SKIPPED = 10                # steps in a row


@dataclass
class RunConfig:
    steps: int = 1000              # optimiser steps
    batch_size: int = 32           # rows a step, over all processes
    lr: float = 1e-3               # peak learning rate
    warmup: int = 100              # steps
    weight_decay: float = 0.01     # on matrices
    grad_clip: float = 1.0         # largest norm of a step's gradient; 0: any
    spike: float = 20.0            # a gradient norm so many times the usual one is a spike, as is one that is not a number; 0: only the latter
    on_spike: str = "skip"         # what to do then: skip the step, or stop; either way its rows are named
    eval_every: int = 1000         # steps
    save_every: int = 500          # steps
    keep: int = 2                  # checkpoints that are kept, the newest
    fsdp: bool = False             # with torchrun: shard weights, gradients and moments over the processes
    tracker: str = "none"          # send the log to wandb or tensorboard as well, if it is installed
    seed: int = 0                  # of weights, rows and noise
    device: str = "auto"           # auto, cpu, cuda or mps
    dtype: str = "auto"            # of matrix products: float32 or bfloat16; auto: bfloat16 on CUDA. A CPU with AVX-512 BF16 or AMX gains by it as well
    resume: bool = False           # go on from the last checkpoint in --out; with more --steps, train it longer


FREE = {"steps", "spike", "on_spike", "eval_every", "save_every", "keep", "fsdp", "tracker", "device", "dtype", "resume", "out", "data"}         # may change when resuming


# ---- processes

def start_processes(cfg):
    """(rank, world, device): a world of one under `python`, more under `torchrun`; NCCL with CUDA, else gloo."""
    if "RANK" not in os.environ:
        return 0, 1, pick_device(cfg.device)
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    if cfg.device == "cuda" and not cuda:
        raise UserError("--device cuda: this machine has no usable cuda; leave --device out")
    if not dist.is_initialized():                                    # one stage may follow another
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))        # the first one makes data and evaluates, the others wait
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), device


def end_processes():
    """For the end of a script, where all processes arrive."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(module, blocks, device, methods=()):
    """Shard a module's parameters over all processes, one unit for each of `blocks` and one for the rest; on a GPU it computes in bfloat16. methods: those
    that are called beside `forward`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    how = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for part in (*blocks, module):
        fully_shard(part, mp_policy=how)
    for method in methods:
        register_fsdp_forward_method(module, method)


def whole(module):
    """{name: tensor} of a module, sharded or not: all of it on the CPU. Every process must call this."""
    return {name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu() for name, tensor in module.state_dict().items()}


def add_gradients(parameters):
    """Sum gradients over processes, as one message: every process then takes the same step. Rows without a picture leave the ViT without a gradient: such a
    process adds zeros to what others have."""
    touched = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(touched, dist.ReduceOp.MAX)
    for parameter, by_any in zip(parameters, touched.tolist()):
        if by_any and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


# ---- optimiser

class Muon(torch.optim.Optimizer):
    """Momentum whose step has all singular values near one (Jordan et al. 2024), for the matrices of blocks: what is rare in the gradient is learned as fast
    as what is common. A step is as large as AdamW's at the same rate (arXiv 2502.16982). torch.optim's is in bfloat16 whatever the machine; this one, in `dtype`."""
    TOGETHER = 2 ** 24                 # numbers in one product of several matrices

    def __init__(self, params, lr, weight_decay, momentum=0.95, dtype=torch.float32):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "dtype": dtype})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)                            # matrices of one shape take one product together: small ones alone leave a machine idle
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, matrices in alike.items():
                together = max(1, self.TOGETHER // shape.numel())
                for i in range(0, len(matrices), together):
                    self.move(matrices[i:i + together], **group)

    def move(self, matrices, lr, weight_decay, momentum, dtype, **_):
        wanted = []
        for p in matrices:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
            mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            wanted.append(p.grad.lerp(mean, momentum).to(dtype))
        for p, step in zip(matrices, orthogonal(torch.stack(wanted)).to(matrices[0].dtype)):
            p.mul_(1 - lr * weight_decay).add_(step, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def orthogonal(x, steps=5):
    """U S V' of each matrix of x (N, m, n) to about U V', by a Newton-Schulz iteration that pulls each singular value towards one, its coefficients Jordan's."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT, steps).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def make_optimizers(modules, cfg, dtype=torch.float32):
    """Muon for the matrices of blocks; AdamW for embeddings, heads, what robots have each for themselves, and, without decay, for vectors and biases."""
    parameters = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    in_blocks = lambda name, p: p.ndim == 2 and re.search(r"\b(layers|blocks|attentions|mlps)\.\d", name)
    hidden, rest = [p for name, p in parameters if in_blocks(name, p)], [pair for pair in parameters if not in_blocks(*pair)]
    groups = [{"params": [p for name, p in rest if decays == (p.ndim > 1 and not name.endswith("bias"))], "weight_decay": decays * cfg.weight_decay} for decays in (True, False)]
    groups = [group for group in groups if group["params"]]
    muon = [Muon(hidden, cfg.lr, cfg.weight_decay, dtype=dtype)] if hidden else []
    return muon + ([torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)] if groups else [])


def learning_rate(step, cfg):
    """Linear warmup, then a cosine down to a tenth."""
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * (min(1, (step + 1) / max(1, cfg.warmup)) if step < cfg.warmup else 0.55 + 0.45 * math.cos(math.pi * progress))


# ---- checkpoints

def checkpoints(out):
    """The whole checkpoints of a folder, the newest last."""
    found = [path for path in (Path(out) / "state").glob("[0-9]*") if path.suffix == ".safetensors" or (path / "state.json").exists()]
    return sorted(found, key=lambda path: int(path.stem))


def read_record(path):
    """What the run knew of itself at a checkpoint; UserError if it is broken."""
    try:
        if path.is_dir():
            return json.loads((path / "state.json").read_text())
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["state"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"cannot resume from {path}: {getattr(error, 'strerror', None) or error}; delete it to go on from the one before") from None


def read_tensors(path, wanted):
    """Fill the tensors of `wanted` (name: tensor, sharded or not) from a checkpoint; UserError if it lacks one."""
    missing = wanted.keys() - stored(path)
    if missing:
        raise UserError(f"{path} lacks {len(missing)} tensors, first {min(missing)}: it belongs to another configuration")
    if path.is_dir():
        import torch.distributed.checkpoint as dcp
        warnings.filterwarnings("ignore", "torch.distributed is disabled")          # one process reads what several wrote: that is meant
        return dcp.load(wanted, checkpoint_id=path, no_dist=not dist.is_initialized())
    from torch.distributed.tensor import DTensor, distribute_tensor
    with safe_open(path, "pt") as file:
        for name, tensor in wanted.items():
            found = file.get_tensor(name)
            with torch.no_grad():
                tensor.copy_(distribute_tensor(found.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None) if isinstance(tensor, DTensor) else found)


def stored(path):
    """Names of a checkpoint's tensors."""
    if path.is_dir():
        from torch.distributed.checkpoint import FileSystemReader
        return FileSystemReader(path).read_metadata().state_dict_metadata.keys()
    with safe_open(path, "pt") as file:
        return set(file.keys())


# ---- the run

def check(cfg):
    """UserError for what is wrong with a RunConfig and its folder: to be told before any work."""
    choose(cfg.on_spike, ("skip", "stop"), "--on_spike")
    at_least(cfg, 1, "steps", "batch_size", "eval_every", "save_every", "keep"), at_least(cfg, 0, "lr", "warmup", "weight_decay", "grad_clip", "spike", "seed")
    choose(cfg.tracker, ("none", "wandb", "tensorboard"), "--tracker"), choose(cfg.dtype, ("auto", "float32", "bfloat16"), "--dtype")
    world, found = this_process()[1], checkpoints(cfg.out)
    if world > 1:
        choose(cfg.device, ("auto", "cpu", "cuda"), "device of several processes")
    if cfg.fsdp and world == 1:
        raise UserError("--fsdp shards over several processes: start it with `torchrun --nproc_per_node 2` or more")
    if cfg.batch_size % world:
        raise UserError(f"--batch_size {cfg.batch_size} must be a multiple of the {world} processes")
    if found and not cfg.resume:
        raise UserError(f"{cfg.out} already holds a training run: add --resume to go on, or choose another --out")
    if cfg.resume and not found:
        raise UserError(f"{cfg.out} holds no training run to resume: leave --resume out to start one")
    writable(cfg.out)


class Run:
    """flags {name: value}: all settings of the stage, kept in its checkpoints; free: those that a resumed run may have otherwise, beside FREE."""

    def __init__(self, cfg, flags, free=()):
        self.cfg, self.flags, self.free = cfg, flags, FREE | set(free)
        check(cfg)
        self.track = tracker(cfg, flags)
        self.rank, self.world, self.device = start_processes(cfg)
        self.sharded = cfg.fsdp
        self.dtype = torch.bfloat16 if cfg.dtype == "bfloat16" or cfg.dtype == "auto" and self.device.type == "cuda" else torch.float32
        if self.rank == 0 and self.dtype == torch.bfloat16:
            print("matrix products in bfloat16")
        self.step, self.seconds, self.norms, self.skipped, self.figures, self.record, self.signal, self.ending = 0, 0.0, [], 0, {}, {}, None, None
        self.writer, self.writing = ThreadPoolExecutor(1), None

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def most(self, number):
        """The largest `number` of any process."""
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def autocast(self):
        """What the forward pass runs under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def backward(self, loss):
        """Of a loss that is this process's share of the step's: gradients add up. fully_shard would take their mean."""
        (loss * self.world if self.sharded else loss).backward()

    def begin(self, modules, optimizers, check=lambda record: None):
        """Take modules {name: module} and their optimisers, and put the last checkpoint back into them when resuming; `check` may refuse its record."""
        self.modules, self.optimizers = modules, optimizers
        owners = [(p, optimizer.state) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self.parameters, self.states = [p for p, _ in owners], [state for _, state in owners]
        if not self.cfg.resume:
            return
        for leftover in (Path(self.cfg.out) / "state").glob(".*") if self.rank == 0 else ():           # of a process that was killed while it wrote
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        path = checkpoints(self.cfg.out)[-1]
        self.record = record = read_record(path)
        for name, value in self.flags.items():
            before = record["config"].get(name, value)                   # a flag that came later: the run had its default
            if name not in self.free and before != value:
                raise UserError(f"{self.cfg.out} was trained with --{name} {before}, not {value}: resume with that, or choose another --out")
        check(record)
        moments = sorted(name for name in stored(path) if name.startswith("optimizer."))         # optimisers make these in their first step
        if moments and any(isinstance(optimizer, Muon) for optimizer in optimizers) != any(name.endswith(".momentum_buffer") for name in moments):
            raise UserError(f"{path} was written by an older trainer, with other optimisers: begin a new run from the model in {self.cfg.out}, with another --out")
        for name in moments:
            _, i, kind = name.split(".")
            parameter = self.parameters[int(i)]
            self.states[int(i)][parameter][kind] = torch.zeros((), device=self.device) if kind == "step" else torch.zeros_like(parameter)
        read_tensors(path, self.tensors())
        self.step, self.seconds, self.norms, self.figures = record["step"], record["seconds"], record.get("norms", []), record.get("figures", {})

    def about(self, stage, **more):
        """What is known of the run, for its checkpoints and for training.json."""
        return {"stage": stage, "command": "python " + shlex.join(sys.argv), "seed": self.cfg.seed, "step": self.step, "steps": self.cfg.steps,
                "seconds": round(self.seconds, 1), "figures": self.figures, "config": self.flags, **more}

    def tensors(self):
        """All that a checkpoint holds, by name."""
        found = {f"{owner}.{name}": tensor for owner, module in self.modules.items() for name, tensor in module.state_dict().items()}
        for i, (parameter, state) in enumerate(zip(self.parameters, self.states)):
            found.update({f"optimizer.{i}.{kind}": value for kind, value in state.get(parameter, {}).items()})
        return found

    def save(self, record):
        """Write a checkpoint in the background, after the one before is whole; the oldest beyond --keep go. Errors are told at the next save or the end."""
        self.finish_writing()
        folder, record = Path(self.cfg.out) / "state", {**record, "norms": self.norms}
        if self.sharded:                                                 # every process writes its own part
            import torch.distributed.checkpoint as dcp
            path, temporary = folder / f"{self.step:08d}", folder / f".{self.step:08d}"
            dcp.save(self.tensors(), checkpoint_id=temporary)
            if self.rank == 0:
                write_json(temporary / "state.json", record)
                shutil.rmtree(path, ignore_errors=True)
                temporary.rename(path)
                self.forget()
            self.barrier()
        elif self.rank == 0:
            tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors().items()}
            self.writing = self.writer.submit(self.write, folder / f"{self.step:08d}.safetensors", tensors, record)

    def write(self, path, tensors, record):
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"state": json.dumps(record)})
        self.forget()

    def forget(self):
        for path in checkpoints(self.cfg.out)[:-max(1, self.cfg.keep)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish_writing(self):
        if self.writing is not None:
            self.writing.result()
            self.writing = None

    def expect(self, kinds, gradients, batches_of):
        """Tell how long the run will take: kinds [(number of steps, one of them)] that cost alike. The second of two steps is timed; none is taken."""
        told = []
        for number, step in kinds:
            for _ in range(2):
                start = time.perf_counter()
                float(gradients(batches_of(step), step)["loss"])
                seconds = time.perf_counter() - start
            told.append((number, seconds))
        self.forget_gradients()
        if self.rank == 0 and told:
            each = ", ".join(f"{number} steps at {seconds:.2f} s ({self.cfg.batch_size / seconds:.0f} rows/s)" for number, seconds in told)
            print(f"about {sum(number * seconds for number, seconds in told) / 60:.0f} minutes without evaluation: {each}")

    def loop(self, batches_of, gradients, evaluate, export, about, describe, flops, after=lambda step: None):
        """Train to cfg.steps; returns the last figures.

        batches_of(step): this process's rows, made ahead in a thread; gradients(batches, step) calls `backward` and returns this process's share of the
        losses {"loss", ...}, tensors; evaluate() -> {name: float}; export() writes the model folder and about() -> `Run.about`, both for
        rank 0, export on every process if sharded; describe(step): the step's rows in words; flops(batches, step) of this process; after(step) follows an
        optimiser step.
        """
        cfg, begun, peak = self.cfg, time.time() - self.seconds, product_speed(self.device, self.dtype)
        log = open_log(Path(cfg.out) / "log.jsonl", self.step) if self.rank == 0 else None
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=cfg.steps, initial=self.step, disable=self.rank > 0, mininterval=1, unit="step")
        try:
            with ThreadPoolExecutor(1) as loader:
                upcoming = loader.submit(batches_of, self.step)
                while self.step < cfg.steps:
                    start, batches = time.perf_counter(), upcoming.result()
                    if self.step + 1 < cfg.steps:
                        upcoming = loader.submit(batches_of, self.step + 1)
                    rate = learning_rate(self.step, cfg)
                    for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                        group["lr"] = rate
                    line = self.one_step(gradients, batches, describe)
                    if "skipped" not in line:
                        after(self.step)
                    self.step += 1
                    self.seconds = time.time() - begun
                    line = {"step": self.step, "lr": rate, **line, "seconds": round(self.seconds, 1)}
                    took, ended = time.perf_counter() - start, self.ending or self.step == cfg.steps
                    line |= {"rows_per_s": round(cfg.batch_size / took, 1), "memory_gb": memory(self.device), "utilisation": round(flops(batches, self.step - 1) / took / peak, 3)}
                    if self.step % cfg.eval_every == 0 or self.step == cfg.steps:
                        if self.rank == 0 or self.sharded:
                            self.figures = evaluate()
                        if self.rank == 0:
                            bar.write(f"step {self.step}: " + ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items()))
                            line |= self.figures
                    if self.rank == 0:
                        log.write(json.dumps(line) + "\n")
                        log.flush()
                        self.track(line)
                        bar.set_postfix({"loss": f"{line['loss']:.3g}", "lr": f"{rate:.1e}"}, refresh=False)
                        bar.update()
                    if self.step % cfg.save_every == 0 or ended:
                        if self.rank == 0 or self.sharded:
                            export()
                        self.save(about())
                    if self.ending:
                        break
            self.finish_writing()
        finally:
            self.writer.shutdown()                                       # whatever ends the run, a checkpoint that was begun is finished
            bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
            if log:
                log.close()
        if self.rank == 0:
            curves(Path(cfg.out) / "log.jsonl", Path(cfg.out) / "loss.png")
        self.barrier()                                                   # the last files are written
        self.ending = self.ending or self.signal                         # one that came behind the last step: no other stage shall follow
        if self.ending:
            end_processes()
            if self.rank == 0:
                print(f"stopped at step {self.step}, which is saved: go on with --resume", file=sys.stderr)
            sys.exit(128 + self.ending)
        return self.figures

    def stop(self, number, frame):
        """A first signal ends the run after its step; a second one ends it at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

    def one_step(self, gradients, batches, describe):
        """Gradients of all processes, looked at, and the optimiser's step unless they are a spike; the losses and the norm as floats."""
        losses = gradients(batches, self.step)
        if self.world > 1 and not self.sharded:
            add_gradients(self.parameters)
        values = torch.stack([value.detach().float() for value in losses.values()] + [torch.tensor(float(self.signal or 0), device=self.device)])
        if self.world > 1:
            dist.all_reduce(values)                                      # processes are signalled at slightly different times: one is enough for all
        self.ending = (self.signal or signal.SIGTERM) if values[-1] else None       # a signal that comes later, as in evaluation, ends the next step
        with_gradient = [p for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in with_gradient])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        line = {name: round(value, 5) for name, value in zip(losses, values.tolist())} | {"grad_norm": round(float(norm), 5)}
        usual = float(np.median(self.norms)) if len(self.norms) == NORMS else math.inf
        if not math.isfinite(line["grad_norm"] + line["loss"]) or self.cfg.spike and line["grad_norm"] > self.cfg.spike * usual:
            self.spike(line, usual, describe)
        else:
            self.norms, self.skipped = [*self.norms, line["grad_norm"]][-NORMS:], 0
            nn.utils.clip_grads_with_norm_(with_gradient, self.cfg.grad_clip or math.inf, norm)
            for optimizer in self.optimizers:
                optimizer.step()
        self.forget_gradients()
        return line

    def forget_gradients(self):
        for parameter in self.parameters:
            parameter.grad = None

    def spike(self, line, usual, describe):
        about = f"step {self.step + 1}: loss {line['loss']}, gradient norm {line['grad_norm']}" + (f" where {usual:.3g} is usual" if usual < math.inf else "")
        self.skipped += 1
        if self.cfg.on_spike == "stop" or self.skipped == MOST_SKIPPED:
            self.finish_writing()
            times = f", the {self.skipped}th in a row" if self.skipped > 1 else ""
            raise UserError(f"{about}{times}; its rows: {describe(self.step)}; look at those, or try a smaller --lr than {self.cfg.lr}")
        line["skipped"] = describe(self.step)
        if self.rank == 0:
            tqdm.write(f"{about}: skipped; its rows: {line['skipped']}")


# ---- logs

def open_log(path, step):
    """log.jsonl, open to go on; what a resumed run will do again is cut off, as is a line that was broken off."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if step and path.exists() else []:
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except ValueError:
            break
    with atomic(path) as temporary:
        temporary.write_text("".join(kept))
    return open(path, "a", encoding="utf-8")


def tracker(cfg, flags):
    """A function that takes a line of the log; nothing is sent unless --tracker says where."""
    if cfg.tracker == "none" or this_process()[0]:
        return lambda line: None
    try:
        if cfg.tracker == "wandb":
            import wandb
            wandb.finish()                                               # of the stage before
            run = wandb.init(project="nanoblm", name=Path(cfg.out).name, config=flags, resume="allow")
            return lambda line: run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(f"--tracker {cfg.tracker} needs the package {cfg.tracker}: `pip install {cfg.tracker}`, or leave it out; log.jsonl has it all") from None
    writer = SummaryWriter(cfg.out)
    return lambda line: [writer.add_scalar(name, value, line["step"]) for name, value in line.items() if isinstance(value, float)]


def memory(device):
    """Gigabytes of memory at the highest so far: the GPU's, or this process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    import resource                                                      # not on Windows
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6), 2)


def product_speed(device, dtype, n=1024):
    """FLOP/s of a matrix product on this device: what utilisation is a share of."""
    a, sync = torch.randn(n, n, device=device, dtype=dtype), lambda: device.type == "cuda" and torch.cuda.synchronize()
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        sync()
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best
