"""Stage I: teach the vision-language model to look, point and answer, on questions about the simulator's scenes and on any conversations of your own.

    python train_sft.py                                        `nano`, on a laptop, from nothing: each of the stages below that is not there yet
    python train_sft.py --preset base                          stands in for Qwen's pretraining: the model sees, points, and follows instructions
    python train_sft.py --preset scenes                        Stage I: all of the model, on all questions
    python train_sft.py --preset embodied                      Stage I goes on above block k, in half the time a step: what policies read is there already
    python train_sft.py --resume                               goes on where a stopped run saved last
    python train_sft.py --data out/corpus:3,mine.jsonl:1       a mixture: of every four rows, three from the corpus and one from your file
    torchrun --nproc_per_node 8 train_sft.py --batch_size 256  the same on several GPUs (trainer.py); --fsdp shards a model that does not fit one
    python train_sft.py --preset qwen --data mine.jsonl --lora_rank 16 --lr 1e-4         from the hub's weights

A row is a corpus scene with some of its questions, or a record of a JSON lines file (data/conversations.py). Rows of a step are packed end to end, none seeing
another, so nothing is spent on padding; a scene's questions share its pictures, each as if it were asked alone; the cross-entropy is on answers alone.

A small model that starts from nothing hardly learns to see from sparse words: heads that only training has ask it more (dense.py). The first `dense_steps`
train what pictures show alone, without text and through k blocks only, several times as fast.

Written to --out: config.json, model.safetensors (float16, or as in the backbone's file), heads.safetensors, tokenizer.json, training.json (command,
figures), and what trainer.py writes.
Letters: B rows, L tokens of all rows, V size of the vocabulary.
"""
import dataclasses
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from nano import grounding as dense
from cli import UserError, at_least, choose, choose_many, parse, run
from jobs import this_process
from files import atomic, write_json
from nano import scenes as corpora
from nano import instructions as general
from data.conversations import Conversations, read_record
from data.env import IMAGE_SIZE
from nano.grounding import DenseHeads, answer_weights, begins, place_in
from model import BLM
from processor import SYSTEM_PROMPT, Processor, process_media, share_stem, train_tokenizer
import trainer
from trainer import Run, RunConfig, checkpoints, end_processes, make_optimizers, shard, whole
from checkpoint import stored_dtype
from vlm import PRESETS as SIZES
from vlm import VLM
from files import find_folder, read_json


@dataclass
class SFTConfig(RunConfig):
    data: str = "out/corpus:3,out/general/train.jsonl:1"       # corpus folders and JSON lines files, each with its weight; these two are made if they are not there
    categories: str = "all"        # categories of the corpus's questions, comma-separated, or all
    on_bad: str = "refuse"         # records of a JSON lines file that cannot be used: refuse, or skip and count
    out: str = "out/sft"           # folder for the model
    backbone: str = "out/base"     # start from this folder or hub name (Qwen2.5-VL or nanoBLM); empty: from nothing
    model: str = "nano"            # sizes of a model from nothing
    train: str = "vision,merger,llm"       # parts that are trained
    lora_rank: int = 0             # train low-rank additions to the LLM's matrices instead of those; merged when saved; 0: off
    frozen_blocks: int = 0         # freeze the ViT, the embeddings and so many LLM blocks: a policy that reads the last of them stays valid and comes along
    checkpointing: bool = False    # compute blocks again in the backward pass: a third more time, much less memory
    steps: int = 2200              # optimiser steps
    micro_batch: int = 32          # rows in memory at once; smaller needs less memory and gives the same gradient
    questions: int = 4             # at most so many questions of a scene in a step, drawn anew each time
    blind: float = 0.05            # share of a corpus's rows with noise for pictures: the model learns to guess where it sees nothing, instead of babbling
    lr: float = 2e-3               # peak learning rate; about 1e-5 for downloaded weights, 1e-4 with LoRA
    weight_decay: float = 0.05     # on matrices
    intent_layer: int = 3          # k: the LLM block that the second dense head (and later the policy) reads
    dense_weight: float = 1.0      # weight of the dense loss beside that of the answers; 0 for none
    dense_steps: int = 0           # first steps, with the dense loss alone
    vocab_size: int = 1024         # byte-level pieces of the tokenizer of a model from nothing
    eval_every: int = 300          # steps
    eval_rows: int = 128           # validation rows of each source for the figures by teacher forcing
    point_scenes: int = 48         # validation scenes for generated points
    save_every: int = 300          # steps


EVEN = "out/corpus:1,out/general/train.jsonl:1"
STAGES = {                         # each starts where the one below it ends
    "embodied": SFTConfig(data=EVEN, backbone="out/scenes", frozen_blocks=3, steps=9000, questions=5, blind=0.15, eval_every=1000),
    "scenes": SFTConfig(out="out/scenes"),
    "base": SFTConfig(data=EVEN, categories="attribute,existence,point,box", out="out/base", backbone="", steps=2400, questions=8, lr=4e-3, dense_steps=900),
}
PRESETS = STAGES | {"qwen": SFTConfig(data="mine.jsonl", backbone="Qwen/Qwen2.5-VL-3B-Instruct", lr=1e-5, dense_weight=0.0, micro_batch=1, checkpointing=True, out="out/mine")}
FREE_TO_CHANGE = {"on_bad", "eval_rows", "point_scenes", "micro_batch", "checkpointing"}     # when resuming, beside trainer.FREE
PARTS = ("vision", "merger", "llm")
WEIGHT = r":(\d+\.?\d*|\.\d+)$"           # of a source in --data
HEADS = "heads.safetensors"
BLOCK = 100                                  # rows that hold the mixture exactly
VALIDATION = 50                              # one record in so many of a JSON lines file is not trained on


# ---- rows

class Mixture:
    """The sources of --data and how their rows are mixed. A row is (number, source, index); every row of a step depends on (seed, number) alone."""

    def __init__(self, cfg):
        self.seed, self.sources, self.told, weights = cfg.seed, [], set(), []
        for part in cfg.data.split(","):
            path, _, weight = part.strip().rpartition(":") if re.search(WEIGHT, part.strip()) else (part.strip(), "", "1")
            self.sources.append(Conversations(path, cfg.on_bad) if path.lower().endswith((".jsonl", ".json")) else corpora.Corpus(path, "train", cfg.categories))
            weights.append(float(weight))
        if not sum(weights) > 0:
            raise UserError(f"--data {cfg.data}: the weights must not all be zero")
        self.weights = np.array(weights)
        self.dense = np.array([isinstance(source, corpora.Corpus) for source in self.sources])
        shares = np.bincount(self.block(0, False), minlength=len(self.sources))
        if lost := [part for part, weight, share in zip(cfg.data.split(","), weights, shares) if weight and not share]:
            raise UserError(f"--data {cfg.data}: {lost[0]} has no row in {BLOCK}, so it would never be trained on: give it a larger weight, or 0")
        if cfg.dense_weight and not (self.weights * self.dense).any():
            raise UserError(f"--data {cfg.data} has no corpus, so there are no dense targets: add --dense_weight 0")
        self.chosen = [np.arange(len(source)) if is_dense else np.array([i for i in range(len(source)) if i % VALIDATION or len(source) < VALIDATION])
                       for source, is_dense in zip(self.sources, self.dense)]

    def validation(self, source):
        """(what to read from, its validation rows) of a source."""
        if self.dense[source]:
            corpus = self.sources[source].validation()
            return corpus, range(len(corpus))
        chats = self.sources[source]
        return chats, range(0, len(chats), VALIDATION) if len(chats) >= VALIDATION else range(0)

    def name(self, source, index):
        """A row in words, for whoever looks for it."""
        chats = self.sources[source]
        return f"{chats.folder}, scene {index}" if self.dense[source] else chats.name(index)

    @lru_cache(maxsize=8)
    def block(self, block, dense_only):
        """(BLOCK,) the source of each row of a block, in a shuffled order, as near to the weights as whole numbers allow."""
        weights = self.weights * self.dense if dense_only else self.weights
        exact = BLOCK * weights / weights.sum()
        counts = np.floor(exact).astype(int)
        counts[np.argsort(counts - exact, kind="stable")[:BLOCK - counts.sum()]] += 1
        return np.random.default_rng([self.seed, 7, block]).permutation(np.repeat(np.arange(len(counts)), counts))

    @lru_cache(maxsize=16)
    def shuffle(self, source, epoch):
        return np.random.default_rng([self.seed, source, epoch]).permutation(self.chosen[source])

    def rows_of_step(self, step, batch_size, dense_only=False):
        """The (number, source, index) rows of a step: each epoch of a source is one shuffle, and nothing is skipped or repeated."""
        rows = []
        for number in range(step * batch_size, (step + 1) * batch_size):
            block, at = divmod(number, BLOCK)
            order = self.block(block, dense_only)
            source = order[at]
            place = block * int((order == source).sum()) + int((order[:at] == source).sum())
            epoch, i = divmod(place, len(self.chosen[source]))
            rows.append((number, int(source), int(self.shuffle(source, epoch)[i])))
        return rows


def conversations(images, turns):
    """One for each question about the same pictures, which come before it; the pictures alone where nothing is asked."""
    pictures = [{"type": "image"} for _ in range(images)]
    return [[{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}, {"role": "assistant", "content": answer}] for question, answer in turns] \
        or [[{"role": "user", "content": pictures}]]


def read_row(source, number, index, cfg, dense_only=False):
    """([messages], [("image" | "video", what)], scene or None) of a row: conversations about the same pictures. `number` chooses which questions of a scene
    are asked, and None asks all as they stand."""
    if isinstance(source, Conversations):
        row = source.row(index)
        return row.conversations, row.media, None
    found = source[index]
    turns = [] if dense_only else found["turns"]
    if number is not None:
        draw = np.random.default_rng([cfg.seed, 2, number])
        if draw.random() < cfg.blind and not dense_only:
            found = untaught(found, [draw.integers(0, 256, image.shape, dtype=np.uint8) for image in found["images"]])
        wait = np.random.default_rng([cfg.seed, 1, number]).exponential(found["often"][:len(turns)])
        turns = [turns[i] for i in np.argsort(wait)[:cfg.questions]]                                 # the rarer its category, the likelier a question is asked
    return conversations(len(found["images"]), turns), [("image", image) for image in found["images"]], found


def untaught(scene, images):
    """A corpus scene with other pictures, and nothing to be told about them: the losses leave such targets out."""
    return {**scene, "images": images, "patch_class": np.full_like(scene["patch_class"], -100), "gripper": np.full_like(scene["gripper"], np.nan)}


def read_rows(rows, mixture, cfg, dense_only=False):
    """`read_row` of rows [(number, what to read from, index)]. One whose pictures turn out broken ends the run or, with --on_bad skip, is told once and grey."""
    made = []
    for number, source, index in rows:
        try:
            made.append(read_row(source, number, index, cfg, dense_only))
        except UserError as error:
            if cfg.on_bad == "refuse":
                raise
            if str(error) not in mixture.told:
                tqdm.write(f"left out: {error}")
            mixture.told.add(str(error))
            made.append(grey_row(False))
    return made


def grey_row(scene):
    """A row that teaches nothing: a grey picture, nothing asked; as a `scene` it has dense targets, which the losses leave out."""
    grey, grid = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 128, np.uint8), (1, corpora.GRID, corpora.GRID)
    targets = {"patch_class": np.zeros(grid, int), "patch_offset": np.zeros((*grid, 3), np.float32), "gripper": np.zeros((1, 4), np.float32)}
    return conversations(1, []), [("image", grey)], untaught(targets, [grey]) if scene else None


def blank_rows(rows, others, mixture, cfg):
    """Under --fsdp all processes must run the ViT and the dense heads if one of them does: [a grey row] for the rows (number, source, index) of a process
    that lack what `others`, the rows of all, have; else []."""
    scene = [any(cfg.dense_weight and mixture.dense[source] for _, source, _ in some) for some in (others, rows)]
    picture = [any(mixture.dense[source] or read_record(mixture.sources[source].records[index][1])[1] for _, source, index in some) for some in (others, rows)]
    return [] if scene[0] == scene[1] and picture[0] == picture[1] else [grey_row(scene[0])]


def make_batch(rows, processor, cfg):
    """Rows as `read_row` gives them, packed: input_ids and labels (1, L), the VLM's vision inputs and `segments`, the lengths of each row; and what
    `dense.patch_targets` and `dense.answer_targets` make of them. Corpus scenes come first.
    """
    rows = sorted(rows, key=lambda row: row[2] is None)                                              # dense ones first
    batch, grids = process_media([pair for _, media, _ in rows for pair in media], processor.image)
    grids, merge = iter(grids), processor.image.merge_size
    texts = [share_stem(processor.tokenizer, talks, [next(grids) for _ in media], merge) for talks, media, _ in rows]
    batch |= {name: torch.tensor([[token for text in texts for token in text[i]]]) for i, name in enumerate(("input_ids", "labels"))}
    batch["segments"] = [lengths for _, _, lengths in texts]
    if cfg.dense_weight:
        scenes = [scene for _, _, scene in rows if scene is not None]
        if scenes:
            batch |= dense.patch_targets(scenes, batch["image_grid_thw"][0].tolist())
        batch |= dense.answer_targets(texts, rows, processor.tokenizer, processor.image.patch_size)
    return batch


def move(batch, device):
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


# ---- losses

INPUTS = ("input_ids", "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "segments")


def read(model, heads, batch, cfg, dense_only=False):
    """One pass: answer logits (n, V) with their labels (n,), None if not asked for, and the guesses of `heads` (dense.py)."""
    learned = batch["labels"][:, 1:] >= 0                                                            # token i predicts token i + 1, of its own row: rows begin unlearned
    depth = {"num_layers": cfg.intent_layer} if dense_only else {"logits_at": F.pad(learned, (0, 1))}
    out = model(**{name: batch[name] for name in INPUTS if name in batch}, **depth)
    return out.logits, batch["labels"][:, 1:][learned], dense.guess(model, heads, batch, out, cfg.intent_layer)


def count(batches):
    """What the losses are divided by, over all micro-batches and processes: answer tokens by weight, and `dense.count`."""
    totals = torch.tensor([[float(answer_weights(batch["labels"][:, 1:] >= 0).sum()), *dense.count(batch)] for batch in batches], dtype=torch.float64).sum(0)
    if dist.is_initialized():
        shared = totals.to(batches[0]["input_ids"].device)
        dist.all_reduce(shared)
        totals = shared.cpu()
    return totals.clamp(min=1).tolist()


def losses(model, heads, batch, totals, cfg, dense_only):
    """This micro-batch's share of the step's losses, scalars that add up: the cross-entropy of answers and what dense.py adds. Zero where the rows have
    none: every process names the same ones."""
    logits, labels, guesses = read(model, heads, batch, cfg, dense_only)
    zero, found = torch.zeros((), device=batch["input_ids"].device), {}
    if not dense_only:
        found["answer"] = answer_weights(batch["labels"][:, 1:] >= 0) @ F.cross_entropy(logits, labels, reduction="none") / totals[0]
    if cfg.dense_weight:
        named = dense.losses(heads, batch, guesses, totals[1:])
        found |= {name: cfg.dense_weight * named.get(name, zero) for name in (dense.LOSSES[:2] if dense_only else dense.LOSSES)}
    found["loss"] = sum(found.values())
    return found


# ---- evaluation

def answers_right(logits, labels, first):
    """For each answer, are all its tokens the likeliest? logits (n, V), labels (n,), first (n,) True where an answer begins; to (answers,) bool."""
    number = first.long().cumsum(0) - 1
    wrong = torch.zeros(int(first.sum()), device=logits.device).index_add_(0, number, (logits.argmax(-1) != labels).float())
    return wrong == 0


@torch.no_grad()
def evaluate(model, heads, mixture, processor, cfg, device, dense_only=False):
    """Figures on validation rows of all sources: dense accuracy and errors, exact answers by teacher forcing, error of generated points (pixels)."""
    model.eval()
    config, sums = model.config, {}

    def tally(name, values):
        total, n = sums.get(name, (0.0, 0))
        sums[name] = total + float(values.sum()), n + values.numel()

    for number, is_dense in enumerate(mixture.dense):
        source, rows = mixture.validation(number)
        if not len(rows) or dense_only and not is_dense:
            continue
        chosen = [rows[i] for i in np.linspace(0, len(rows) - 1, min(cfg.eval_rows, len(rows))).astype(int)]
        for i in range(0, len(chosen), cfg.micro_batch):
            batch = move(make_batch(read_rows([(None, source, row) for row in chosen[i:i + cfg.micro_batch]], mixture, cfg, dense_only), processor, cfg), device)
            logits, labels, guesses = read(model, heads, batch, cfg, dense_only)
            kind = "words" if is_dense else "general"
            if not dense_only:
                learned = batch["labels"] >= 0
                first = begins(learned)[:, 1:][learned[:, 1:]]
                right = answers_right(logits, labels, first)
                json_like = torch.tensor([processor.tokenizer.decode([int(token)]).startswith("{") for token in labels[first]], dtype=torch.bool, device=device)
                tally(f"exact_{kind}", right[~json_like].float()), tally("exact_coordinates" if is_dense else "exact_general", right[json_like].float())
                tally("answer_loss", F.cross_entropy(logits, labels, reduction="none"))
            for name, values in dense.errors(batch, guesses, kind, config.vision_config.patch_size):
                tally(name, values)
    figures = {name: round(total / n, 4) for name, (total, n) in sums.items() if n}
    if not dense_only and mixture.dense.any():
        figures.update(pointing(model, mixture.validation(int(mixture.dense.argmax()))[0], processor, cfg))
    model.train()
    return figures


def pointing(model, corpus, processor, cfg):
    """Ask for points and measure them: the median error in pixels of those that parse, the share within 8 pixels of all, the share that parses."""
    asked = []
    for scene in np.linspace(0, len(corpus) - 1, min(4 * cfg.point_scenes, len(corpus))).astype(int).tolist():
        turn = next((turn for turn in corpus[scene]["turns"] if "point_2d" in turn[1]), None)
        if turn and len(asked) < cfg.point_scenes:
            asked.append((corpus[scene]["images"], *turn))
    if not asked:
        return {}
    images, questions, answers = zip(*asked)
    replies = BLM(model, processor).answers(list(images), list(questions), max_new_tokens=48)
    errors = np.array([np.linalg.norm(place_in(reply) - place_in(answer)) if "point_2d" in reply and place_in(reply) is not None else np.inf
                       for reply, answer in zip(replies, answers)])
    parsed = errors[np.isfinite(errors)]
    found = {"point_within_8px": float((errors <= 8).mean()), "point_parsed": len(parsed) / len(errors)}
    return {**found, **({"point_error_px": float(np.median(parsed))} if len(parsed) else {})}


# ---- low-rank additions

class LoRA(nn.Module):
    """A frozen linear layer plus a trained B A of low rank, at first zero; scale 2 as usual with alpha = 2 rank (arXiv 2106.09685)."""
    SCALE = 2.0

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, dtype=linear.weight.dtype))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=linear.weight.dtype))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x):
        return self.linear(x) + self.SCALE * F.linear(F.linear(x, self.a), self.b)

    @property
    def weight(self):                  # as one matrix: what `VLM.step` reads
        return self.linear.weight + self.SCALE * self.b @ self.a

    @property
    def bias(self):
        return self.linear.bias


def add_lora(model, rank):
    """Put LoRA around every linear layer of the LLM's blocks; only those additions stay trainable there."""
    model.model.requires_grad_(False)
    if model.lm_head is not None:
        model.lm_head.requires_grad_(False)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, LoRA(module, rank))


def merged(weights):
    """{name: tensor} of a model with LoRA as those of one without: the same function."""
    made = {}
    for name, tensor in weights.items():
        if name.endswith(".linear.weight"):
            tensor = tensor + LoRA.SCALE * weights[name.replace("linear.weight", "b")] @ weights[name.replace("linear.weight", "a")]
        if not (name.endswith((".a", ".b")) and f"{name[:-2]}.linear.weight" in weights):
            made[name.replace(".linear.", ".")] = tensor
    return made


# ---- the run

def start_model(cfg, mixture):
    """(model, processor): from --backbone, or from nothing with a tokenizer learned from the data."""
    torch.manual_seed(cfg.seed)
    if cfg.backbone:
        return VLM.from_pretrained(cfg.backbone).train(), Processor.from_pretrained(cfg.backbone)
    if cfg.resume:                                               # its own, since the data may be others by now
        tokenizer = Processor.from_pretrained(cfg.out).tokenizer
    else:
        texts = [text for source in mixture.sources for text in source.texts()]
        frame = f"system\n{SYSTEM_PROMPT}\nuser\nassistant\n"                                         # in every row, so worth whole tokens
        tokenizer = train_tokenizer([*texts[::max(1, len(texts) // 50_000)], *[frame] * 1000], cfg.vocab_size)
    return VLM(SIZES[cfg.model].for_tokenizer(tokenizer)), Processor(tokenizer)


def choose_parts(model, cfg):
    """Leave only what cfg trains with gradients."""
    parts = choose_many(cfg.train, PARTS, "part")
    model.requires_grad_(False)
    for name, module in (("vision", model.visual), ("llm", model.model), ("llm", model.lm_head)):
        if name in parts and module is not None:
            module.requires_grad_(True)
    model.visual.merger.requires_grad_("merger" in parts)
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank)
    if cfg.frozen_blocks:
        for part in (model.visual, model.model.embed_tokens, model.model.layers[:cfg.frozen_blocks]):
            part.requires_grad_(False)


def carried_policy(cfg):
    """The files of the policy beside --backbone, if all that it reads is frozen; else none."""
    path = find_folder(cfg.backbone) / "policy.json" if cfg.frozen_blocks and cfg.backbone else None
    if path is None or not path.exists() or read_json(path)["config"]["intent_layer"] > cfg.frozen_blocks:
        return []
    return [path.with_name("policy.safetensors"), path]


def ensure_data(cfg):
    """Make the default corpus and the general instructions where --data names them and they are not there."""
    paths = [re.sub(WEIGHT, "", part.strip()) for part in cfg.data.split(",")]
    for path in paths:
        if Path(path) == Path(general.GeneralConfig.out) / "train.jsonl":
            general.ensure(general.GeneralConfig.out)
        elif Path(path) == Path(corpora.CorpusConfig.out):
            corpora.ensure(path)


def check(cfg):
    """UserError for what is wrong with a SFTConfig: to be told before any work."""
    choose(cfg.on_bad, ("refuse", "skip"), "--on_bad"), choose_many(cfg.train, PARTS, "part"), choose(cfg.model, SIZES, "model")
    at_least(cfg, 1, "micro_batch", "questions", "eval_rows", "intent_layer"), at_least(cfg, 256, "vocab_size")
    at_least(cfg, 0, "lora_rank", "frozen_blocks", "dense_weight", "dense_steps", "point_scenes", "blind")
    if cfg.blind > 1:
        raise UserError(f"--blind {cfg.blind} is a share of rows: at most 1")


def check_blocks(cfg, blocks):
    """UserError for what does not fit a model of so many LLM blocks."""
    if not 1 <= cfg.intent_layer <= blocks:
        raise UserError(f"--intent_layer {cfg.intent_layer}: this model has blocks 1 to {blocks}")
    if not cfg.frozen_blocks < blocks:
        raise UserError(f"--frozen_blocks {cfg.frozen_blocks} must leave some of the {blocks} blocks to train")


def train(cfg):
    """Train with a SFTConfig; returns the last figures."""
    check(cfg)
    run = Run(cfg, dataclasses.asdict(cfg), FREE_TO_CHANGE)                              # checks its own part
    if run.rank == 0:
        ensure_data(cfg)
    run.barrier()
    mixture = Mixture(cfg)
    model, processor = start_model(cfg, mixture)
    dtype = stored_dtype(find_folder(cfg.backbone)) if cfg.backbone else torch.float16
    check_blocks(cfg, model.config.num_hidden_layers)
    choose_parts(model, cfg)
    policy = carried_policy(cfg)
    model.checkpointing = model.visual.checkpointing = cfg.checkpointing
    heads = DenseHeads(model.config, corpora.Corpus.num_classes)
    if cfg.backbone and (Path(cfg.backbone) / HEADS).exists():           # new ones would undo in a hundred steps what the backbone has learned
        known = {name: tensor for name, tensor in load_file(Path(cfg.backbone) / HEADS).items() if heads.state_dict().get(name, torch.empty(0)).shape == tensor.shape}
        heads.load_state_dict(known, strict=False)
    sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in (("all", model), ("vision", model.visual), ("llm", model.model))}
    sizes["trained"] = sum(p.numel() for module in (model, heads) for p in module.parameters() if p.requires_grad)
    if run.sharded:
        shard(model, [*model.visual.blocks, *model.model.layers], run.device), shard(heads, heads.answer, run.device)
    model.to(run.device), heads.to(run.device)
    run.begin({"model": model, "heads": heads}, make_optimizers((model, heads), cfg, run.dtype))
    dense_steps = cfg.dense_steps if cfg.dense_weight else 0

    def batches_of(step):
        rows, size, batches = mixture.rows_of_step(step, cfg.batch_size, step < dense_steps), cfg.micro_batch * run.world, []
        for everyones in (sorted(rows[i:i + size], key=lambda row: row[1]) for i in range(0, len(rows), size)):      # each process gets as much of each source
            own = everyones[run.rank::run.world]
            read = read_rows([(number, mixture.sources[source], index) for number, source, index in own], mixture, cfg, step < dense_steps)
            batches.append(make_batch(read + (blank_rows(own, everyones, mixture, cfg) if run.sharded else []), processor, cfg))
        return batches

    def gradients(batches, step):
        """Leaves this process's share of the step's gradient in the parameters; returns its share of the losses."""
        batches = [move(batch, run.device) for batch in batches]
        totals, sums = count(batches), {}
        for batch in batches:
            with run.autocast():
                found = losses(model, heads, batch, totals, cfg, step < dense_steps)
            if found["loss"].requires_grad:                      # rows without a picture teach a ViT nothing
                run.backward(found["loss"])
            sums = {name: sums.get(name, 0) + value.detach() for name, value in found.items()}
        return sums

    def flops(batches, step):
        """Of this process's share of a step: six for each weight and patch or token."""
        tokens, patches = (sum(batch[name].numel() // size for batch in batches if name in batch)
                           for name, size in (("input_ids", 1), ("pixel_values", 3 * 2 * model.config.vision_config.patch_size ** 2)))
        deep = cfg.intent_layer / model.config.num_hidden_layers if step < dense_steps else 1
        return 6 * (sizes["vision"] * patches + deep * sizes["llm"] * tokens)

    def export():
        weights, more = merged(whole(model)), whole(heads)
        if run.rank == 0:
            with atomic(Path(cfg.out) / HEADS) as path:
                save_file(more, path)
            model.save_pretrained(cfg.out, dtype, weights)
            processor.save_pretrained(cfg.out)
            for file in policy:
                with atomic(Path(cfg.out) / file.name) as path:
                    path.write_bytes(file.read_bytes())
            write_json(Path(cfg.out) / "training.json", about())

    def about():
        before = Path(cfg.backbone) / "training.json"
        return run.about("sft", **({"started_from": read_json(before)} if cfg.backbone and before.exists() else {}))

    def describe(step):
        return ", ".join(mixture.name(source, index) for _, source, index in mixture.rows_of_step(step, cfg.batch_size, step < dense_steps))

    if run.rank == 0:
        print(f"{sizes['all'] / 1e6:.1f} M parameters, {sizes['trained'] / 1e6:.1f} M trained with the heads, {sum(map(len, mixture.sources))} rows, {cfg.steps - run.step} steps of "
              f"{cfg.batch_size}, {run.world} process(es)")
    kinds = [(max(0, dense_steps - run.step), dense_steps - 1), (cfg.steps - max(run.step, dense_steps), cfg.steps - 1)]
    run.expect([(number, at) for number, at in kinds if number > 0], gradients, batches_of)
    return run.loop(batches_of, gradients, lambda: evaluate(model, heads, mixture, processor, cfg, run.device, run.step <= dense_steps), export, about, describe=describe, flops=flops)


def finished(folder):
    """Is there a model in a folder, and not one of a run that was stopped?"""
    about = read_json(Path(folder) / "training.json") if (Path(folder) / "training.json").exists() else {}
    return (Path(folder) / "model.safetensors").exists() and about.get("step", 0) >= about.get("steps", 0)


def main():
    cfg = parse(SFTConfig, presets=PRESETS, description="Stage I: train the vision-language model on questions about scenes, and on conversations of your own.")
    check(cfg)
    same = {name: getattr(cfg, name) for name in ("batch_size", "seed", "device", "dtype", "fsdp", "micro_batch", "checkpointing", "tracker")}
    stages = {stage.out: dataclasses.replace(stage, **same, resume=bool(checkpoints(stage.out))) for stage in STAGES.values()}
    missing = [cfg]
    while missing[0].backbone in stages and not finished(missing[0].backbone):
        missing.insert(0, stages[missing[0].backbone])
    earlier = [stage.out for stage in missing[:-1]]
    if cfg.out in earlier:
        raise UserError(f"--out {cfg.out} is where an earlier stage goes: choose another")
    if cfg.out in stages and any(checkpoints(folder) for folder in (*earlier, missing[0].backbone) if folder in stages):       # stopped between stages
        cfg.resume = cfg.resume and bool(checkpoints(cfg.out))
    trainer.check(cfg)
    if this_process()[0] == 0 and earlier:               # mistakes are told now, not after other stages' training
        for stage in missing:
            ensure_data(stage), Mixture(stage)
            check_blocks(stage, SIZES[missing[0].model].num_hidden_layers)
        print("stages to train: " + ", ".join(stage.out for stage in missing))
    for stage in missing:
        train(stage)
    end_processes()


if __name__ == "__main__":
    run(main)
