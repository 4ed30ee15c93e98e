"""Stage I: train the vision-language model on conversations about images, yours or others'.

    python train_sft.py --data mine.jsonl                    continue from nano, on a laptop
    python train_sft.py --data mine.jsonl:3,theirs.jsonl:1   a mixture: 3 of every 4 rows are mine
    python train_sft.py --preset qwen --data mine.jsonl --lora_rank 16 --lr 1e-4      hub weights
    python train_sft.py --resume                             continue from the last checkpoint
    torchrun --nproc_per_node 8 train_sft.py --fsdp          several GPUs: trainer.py

Presets: nano, qwen (Qwen2.5-VL-3B) and qwen3 (Qwen3-VL-2B). A row is one line of a conversations
file (data/conversations.py). The rows of a step are packed into one sequence, where none attends to
another, so nothing is wasted on padding. The cross-entropy covers only the answers. nano itself was
trained from scratch by calling `train` with its own sources and losses (nano/train.py).

Written to --out: config.json, model.safetensors, the processor's files, training.json (how it was
trained), the state to resume from, and log.jsonl.
Letters: B rows, L tokens of all rows, n tokens of answers, V size of the vocabulary.
"""

import math
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import trainer
from checkpoint import stored_dtype
from cli import UserError, at_least, choose, choose_many, parse, run
from data.conversations import Row
from data.mixture import Mixture, open_sources
from files import atomic, find_folder, read_json, save_tensors, write_json
from processor import VISION_INPUTS, Processor
from trainer import RunConfig
from vlm import VLM

EVAL_ROWS = 128  # validation rows from each source
WARMUP = 100  # steps
WEIGHT_DECAY = 0.05  # for matrices
LORA_SCALE = 2.0  # the usual choice: alpha = 2 rank
PARTS = ("vision", "merger", "llm")
PACKED = 256  # tokens: a packed row is as long as a multiple of this
INPUTS = ("input_ids", "segments", "image_index", *VISION_INPUTS["image"], *VISION_INPUTS["video"])


@dataclass
class SFTConfig(RunConfig):
    """The flags of Stage I."""

    data: str = "mine.jsonl"  # conversations files with weights: a.jsonl:3,b.jsonl:1
    on_bad: str = "refuse"  # unusable records: refuse, or skip and count
    out: str = "out/sft"  # folder for the model
    backbone: str = "weights/nano"  # start from this folder or hub name
    train: str = "vision,merger,llm"  # parts to train
    lora_rank: int = 0  # train low-rank additions to the LLM's matrices, merged when saved; 0: off
    frozen_blocks: int = 0  # LLM blocks kept frozen, with the ViT: their policies stay valid
    micro_batch: int = 32  # rows in memory at once: fewer save memory, the gradient is the same
    checkpointing: bool = False  # compute blocks twice: a third more time, much less memory
    lr: float = 5e-4  # peak learning rate; about 1e-5 for downloaded weights, 1e-4 with LoRA
    eval_every: int = 250  # steps between evaluations, each with a checkpoint


QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"
QWEN3 = "Qwen/Qwen3-VL-2B-Instruct"
PRESETS = {
    "nano": SFTConfig(),
    "qwen": SFTConfig(backbone=QWEN, lr=1e-5, micro_batch=1, checkpointing=True),
    "qwen3": SFTConfig(backbone=QWEN3, lr=1e-5, micro_batch=1, checkpointing=True),
}
FREE = {"on_bad", "micro_batch", "checkpointing"}  # may change when resuming, like trainer.FREE


# ---- rows


def grey_row():
    """A row that teaches nothing: a gray image without an answer."""
    grey = np.full((28, 28, 3), 128, np.uint8)
    return Row([[{"role": "user", "content": [{"type": "image"}]}]], [("image", grey)], {})


@lru_cache
def say_once(text):
    tqdm.write(text)


def read_row(rows, index, seed, cfg):
    """A Row. With --on_bad skip, one with broken images is reported and replaced by a gray one."""
    try:
        return rows.row(index, seed)
    except UserError as error:
        if cfg.on_bad == "refuse":
            raise
        say_once(f"left out: {error}")
        return grey_row()


def make_batch(rows, processor, auxiliary, cfg):
    """Rows packed into model inputs, with the targets of `auxiliary`."""
    if cfg.fsdp:  # with FSDP all processes must run the ViT if one of them does
        rows = [*rows, grey_row()]
    batch = processor.pack(rows)
    if auxiliary is not None:
        batch |= auxiliary.targets(rows, batch)
    # Lengths that change with every batch fragment glibc's heap: on a CPU, a step soon takes half
    # as long again (findings/torch_changing_lengths.sh). A text without labels fills the row up.
    padding = -batch["input_ids"].shape[1] % PACKED
    if padding:
        batch["input_ids"] = F.pad(batch["input_ids"], (0, padding))
        batch["labels"] = F.pad(batch["labels"], (0, padding), value=-100)
        batch["segments"] = [*batch["segments"], [padding]]
    return batch


def batches_of_step(mixture, processor, auxiliary, cfg, step):
    """This process's micro-batches of a step."""
    rank, world = trainer.this_process()
    rows = mixture.rows_of_step(step, cfg.batch_size)
    size = cfg.micro_batch * world
    # a step has the same rows for any number of processes
    batches = []
    for start in range(0, len(rows), size):
        # sorted, so that every process gets an equal share of each source
        together = sorted(rows[start : start + size], key=lambda row: row[1])
        share = []
        for number, source, index in together[rank::world]:
            dataset = mixture.sources[source].rows
            share.append(read_row(dataset, index, (cfg.seed, number), cfg))
        groups = [share]
        if auxiliary is not None:  # rows without answers need no more blocks than its losses
            answered = [row for row in share if has_answer(row)]
            groups = [answered, [row for row in share if not has_answer(row)]]
        batches += [make_batch(group, processor, auxiliary, cfg) for group in groups if group]
    return batches


def has_answer(row):
    return row.conversations[0][-1]["role"] == "assistant"


# ---- losses


def answer_numbers(batch):
    """(n,): the index of the answer that each answer token belongs to, counted within the batch."""
    learned = batch["labels"][:, 1:] >= 0
    first = learned & ~F.pad(learned, (1, 0))[:, :-1]  # first token of each answer
    return first[learned].cumsum(0) - 1


def answer_weights(batch):
    """(n,): for each answer token one over the square root of its answer's length.

    As in InternVL 2.5 (arXiv 2412.05271): otherwise a box's thirty tokens would outweigh a color's
    two.
    """
    answer = answer_numbers(batch)
    return torch.bincount(answer)[answer] ** -0.5


def count(batches, auxiliary):
    """[divisor of each loss], summed over all micro-batches and processes, at least 1."""
    # means over the step, not the micro-batch, so the gradient does not depend on the split
    shares = []
    for batch in batches:
        answers = float(answer_weights(batch).sum())
        shares.append([answers, *(auxiliary.count(batch) if auxiliary else ())])
    totals = np.sum(shares, axis=0).tolist()
    device = batches[0]["input_ids"].device
    return [max(1.0, total) for total in trainer.sum_over_processes(totals, device)]


def forward(model, auxiliary, batch):
    """(VLMOutput, labels (n,)): logits (n, V) only where an answer's next token is predicted."""
    learned = batch["labels"][:, 1:] >= 0  # token i predicts token i + 1
    # logits of all tokens would take most of the memory, because V is large
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    blocks = None
    if auxiliary is not None and not learned.any():
        blocks = auxiliary.intent_layer
    places = None if blocks else F.pad(learned, (0, 1))
    out = model(**inputs, num_layers=blocks, logits_at=places)
    return out, batch["labels"][:, 1:][learned]


def compute_losses(model, auxiliary, batch, totals):
    """{"loss", "answer", those of `auxiliary`}: this batch's shares of the step's losses."""
    out, labels = forward(model, auxiliary, batch)
    # every process must return the same losses, or their sums would be mixed up
    losses = {}
    if auxiliary is None or not auxiliary.pictures_only:
        losses["answer"] = out.hidden_states[0].new_zeros(())
    if out.logits is not None:
        answer = answer_weights(batch) @ F.cross_entropy(out.logits, labels, reduction="none")
        losses["answer"] = answer / totals[0]
    if auxiliary is not None:
        losses |= auxiliary.losses(out, batch, totals[1:])
    return {"loss": sum(losses.values()), **losses}


@torch.no_grad()
def evaluate(model, mixture, processor, auxiliary, cfg, device):
    """Validation figures: answer_loss, the share of exact answers for each source, and others."""
    model.eval()
    sums = Counter()
    counts = Counter()
    for source in mixture.sources:
        # the same rows every time, spread evenly over all of them
        count = len(source.val_index)
        places = np.linspace(0, count - 1, min(EVAL_ROWS, count))
        index = [source.val_index[int(place)] for place in places]
        for start in range(0, len(index), cfg.micro_batch):
            part = index[start : start + cfg.micro_batch]
            rows = [read_row(source.validation, i, None, cfg) for i in part]
            batch = trainer.to_device(make_batch(rows, processor, auxiliary, cfg), device)
            out, labels = forward(model, auxiliary, batch)
            figures = auxiliary.figures(out, batch) if auxiliary else {}
            if out.logits is not None:
                wrong = (out.logits.argmax(-1) != labels).float()
                wrong = torch.bincount(answer_numbers(batch), weights=wrong)  # per answer
                figures["answer_loss"] = F.cross_entropy(out.logits, labels, reduction="none")
                figures[f"exact_{source.name}"] = (wrong == 0).float()  # with teacher forcing
            for name, values in figures.items():
                sums[name] += float(values.sum())
                counts[name] += values.numel()
    model.train()
    return {name: round(total / max(1, counts[name]), 4) for name, total in sums.items()}


# ---- low-rank additions


class LoRA(nn.Module):
    """A frozen linear layer plus a trained low-rank product b a, zero at first (arXiv 2106.09685)."""

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        dtype = linear.weight.dtype
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x):
        return self.linear(x) + LORA_SCALE * F.linear(F.linear(x, self.a), self.b)


def add_lora(model, rank):
    """Wrap the linear layers of the LLM's blocks in LoRA. The rest of the LLM is frozen."""
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, LoRA(module, rank))


def merge_lora(weights):
    """{name: tensor} of a model with LoRA, merged into those of an equal model without."""
    # the folder then loads anywhere, and LoRA costs nothing at inference
    merged = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        if kind in ("a", "b") and f"{stem}.linear.weight" in weights:
            continue
        if name.endswith(".linear.weight"):
            stem = name.removesuffix(".linear.weight")
            tensor = tensor + LORA_SCALE * weights[f"{stem}.b"] @ weights[f"{stem}.a"]
        merged[name.replace(".linear.", ".")] = tensor
    return merged


# ---- the run


def select_parts(model, cfg):
    """Require gradients only for what cfg trains."""
    parts = choose_many(cfg.train, PARTS, "part")
    blocks = len(model.model.layers)
    if not cfg.frozen_blocks < blocks:
        raise UserError(f"--frozen_blocks {cfg.frozen_blocks} must leave some of {blocks} blocks")
    # with LoRA the matrices that it adds to stay frozen
    whole_llm = "llm" in parts and not cfg.lora_rank
    model.requires_grad_(whole_llm)
    model.visual.requires_grad_("vision" in parts)
    for merger in (model.visual.merger, model.visual.deepstack_merger_list):
        merger.requires_grad_("merger" in parts)
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank)
    if cfg.frozen_blocks:
        # everything that block k depends on: images, embeddings, and the blocks up to it
        layers = model.model.layers[: cfg.frozen_blocks]
        for module in (model.visual, model.model.embed_tokens, layers):
            module.requires_grad_(False)


def save(cfg, model, processor, auxiliary, dtype, about):
    """Write the model folder. Every process must call this.

    A policy that reads only frozen blocks is copied along.
    """
    # gathered by all processes, written by the first
    weights = merge_lora(trainer.full_state_dict(model))
    if not trainer.is_first():
        return
    model.save_pretrained(cfg.out, dtype, weights)
    processor.save_pretrained(cfg.out)
    if auxiliary is not None:
        save_tensors(Path(cfg.out) / "heads.safetensors", trainer.full_state_dict(auxiliary), {})
    policy = find_folder(cfg.backbone) / "policy.json"
    reads = read_json(policy)["config"]["intent_layer"] if policy.exists() else math.inf
    if reads <= cfg.frozen_blocks:
        for file in (policy.with_name("policy.safetensors"), policy):
            with atomic(Path(cfg.out) / file.name) as temporary:
                shutil.copy(file, temporary)
    write_json(Path(cfg.out) / "training.json", {"sft": about})


def train(cfg, model, processor, sources, auxiliary=None):
    """Train `model` on the sources; returns the last figures.

    auxiliary: a module with losses beside that of the answers, or None. It has `intent_layer` (how
    many blocks its losses need), `pictures_only` (no row has an answer), targets(rows, batch),
    count(batch), losses(out, batch, totals) and figures(out, batch): see nano/grounding.py.
    """
    device = trainer.start_processes(cfg)
    mixture = Mixture(sources, cfg.seed)
    select_parts(model, cfg)
    if auxiliary is not None and auxiliary.pictures_only:  # other blocks never run
        model.model.layers[auxiliary.intent_layer :].requires_grad_(False)
        model.model.norm.requires_grad_(False)
    model.checkpointing = model.visual.checkpointing = cfg.checkpointing
    modules = {"model": model}
    if auxiliary is not None:
        modules["heads"] = auxiliary
    if cfg.fsdp:
        trainer.shard(model, [*model.visual.blocks, *model.model.layers], device)
    for module in modules.values():
        module.to(device).train()
    dtype = trainer.compute_dtype(cfg, device)
    optimizers = trainer.make_optimizers(modules.values(), cfg.lr, WEIGHT_DECAY, dtype)
    before = trainer.resume(cfg, FREE, modules, optimizers)
    size = sum(p.numel() for p in trainer.trained_parameters(optimizers)) / 1e6
    trainer.say(f"{size:.1f} M parameters to train on {sum(len(s.rows) for s in sources)} rows")
    return fit(cfg, modules, processor, mixture, optimizers, before, device)


def fit(cfg, modules, processor, mixture, optimizers, before, device):
    """The training loop of Stage I. Returns the last figures."""
    model = modules["model"]
    auxiliary = modules.get("heads")
    # a downloaded model keeps its file's dtype
    stored = stored_dtype(find_folder(cfg.backbone)) if cfg.backbone else torch.float16
    figures = before["figures"]
    skipped = 0
    began = time.time() - before["seconds"]
    log = trainer.Log(cfg.out, before["step"])
    steps = range(before["step"], cfg.steps)
    data = (mixture, processor, auxiliary, cfg)
    upcoming = trainer.prefetch(lambda step: batches_of_step(*data, step), steps)
    with trainer.catch_signals() as signals:
        for step in trainer.progress_bar(steps):
            lr = trainer.learning_rate(step, cfg, WARMUP)
            batches = [trainer.to_device(batch, device) for batch in next(upcoming)]
            totals = count(batches, auxiliary)
            sums = Counter()
            for batch in batches:  # gradients accumulate
                with trainer.autocast(cfg, device):
                    losses = compute_losses(model, auxiliary, batch, totals)
                losses["loss"].backward()
                sums.update({name: loss.detach() for name, loss in losses.items()})
            line, taken, stop = trainer.take_step(optimizers, lr, sums, signals, device)
            skipped = 0 if taken else skipped + 1
            if skipped:
                rows = mixture.rows_of_step(step, cfg.batch_size)
                trainer.report_skipped(line, skipped, mixture.describe(rows))

            line = {"step": step + 1, **line, "seconds": time.time() - began}
            due = (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps
            if due and not stop:
                figures = evaluate(model, mixture, processor, auxiliary, cfg, device)
                line |= figures
                trainer.say(f"step {step + 1}: {figures}")
            log.write(line)
            if due or stop:
                about = trainer.run_record(cfg, "sft", line, figures)
                trainer.save_checkpoint(cfg, modules, optimizers, about)
                save(cfg, model, processor, auxiliary, stored, about)
            if stop:
                trainer.exit_stopped(step + 1, signals)
    return figures


def check(cfg):
    """UserError for anything wrong with an SFTConfig, before any work."""
    trainer.check(cfg)
    choose(cfg.on_bad, ("refuse", "skip"), "--on_bad")
    choose_many(cfg.train, PARTS, "part")
    at_least(cfg, 1, "micro_batch")
    at_least(cfg, 0, "lora_rank", "frozen_blocks")


def main():
    description = "Stage I: train the vision-language model on conversations with pictures."
    cfg = parse(SFTConfig, presets=PRESETS, description=description)
    check(cfg)
    sources = open_sources(cfg.data, cfg.on_bad)
    model = VLM.from_pretrained(cfg.backbone)
    with trainer.claim_out(cfg):
        train(cfg, model, Processor.from_pretrained(cfg.backbone), sources)
    trainer.end_processes()
    trainer.say(f"model in {cfg.out}; try `python sample.py --weights {cfg.out} --ask ...`")


if __name__ == "__main__":
    run(main)
