"""nano's own Stage I, from nothing: four trainings, each of which starts where the one before ends.

    python -m nano.train                       trains each stage that is not there yet, on a laptop
    python -m nano.train --resume              goes on where it was stopped
    python -m nano.train --preset base         no further than this stage

    look       pictures alone, through k blocks: several times as fast as with text
    base       stands in for Qwen's pretraining: the model points, and follows instructions
    scenes     Stage I: all of the model, on all questions
    embodied   Stage I goes on above block k, in half the time a step: what policies read is there

Rows, losses and loop are those of train_sft.py, with scenes.py's pictures, instructions.py's
replay and grounding.py's heads; all are made if they are not there. --mixture can add the scenes of
commands.py, from which a policy learns to listen (runs/listen.sh). With maniskill or metaworld it adds
scenes of another simulator, whose images look different (docs/MANISKILL.md, docs/METAWORLD.md).
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

import trainer
from cli import UserError, at_least, choose, parse, run
from data.conversations import Conversations
from data.mixture import Source
from files import read_json, reading
from nano import commands, instructions, scenes
from nano.commands import CommandQuestions, Commands, CommandsConfig, folder_in
from nano.grounding import Grounding
from nano.instructions import InstructionsConfig
from nano.scenes import Scenes, ScenesConfig
from processor import SYSTEM_PROMPT, Processor, Tokenizer, train_tokenizer
from train_sft import train
from trainer import RunConfig
from vlm import PRESETS, VLM

VOCAB_SIZE = 1024  # byte-level pieces of the tokenizer
MOST_TEXTS = 50_000  # that it learns from


@dataclass
class StageConfig(RunConfig):
    """The flags of one stage."""

    scenes: str = "out/corpus"  # folder of scenes
    instructions: str = "out/general"  # folder of instructions
    out: str = "out/sft"  # folder for the model
    backbone: str = "out/scenes"  # start from this folder; empty: from nothing
    steps: int = 9000  # optimizer steps
    lr: float = 2e-3  # peak learning rate
    eval_every: int = 1000  # steps between evaluations, each with a checkpoint
    categories: str = "all"  # of questions about scenes, comma-separated, or all
    questions: int = 5  # at most so many questions of a scene in a step, drawn anew each time
    blind: float = 0.15  # share of scenes with noise for pictures
    mixture: str = "scenes:1,instructions:1"  # rows of each; also of the others in SOURCES
    pictures_only: bool = False  # ask nothing, and run k blocks alone
    intent_layer: int = 3  # k: the LLM block that the second head, and later the policy, reads
    frozen_blocks: int = 3  # LLM blocks, with the ViT: a policy that reads them stays valid
    micro_batch: int = 32  # rows in memory at once

    # what train_sft.py lets people choose, and this recipe does not
    train = "vision,merger,llm"
    on_bad = "refuse"
    lora_rank = 0
    checkpointing = False


# {source of scenes with commands: the environment that they show}
WORLDS = {name: name for name in commands.WORLDS[1:]}
WORLDS |= {"commands": "tabletop", "command_questions": "tabletop"}
SOURCES = ("scenes", "instructions", *WORLDS)
SIMPLE = "attribute,existence,point,box"
YOUNG = StageConfig(categories=SIMPLE, questions=8, blind=0.05, lr=4e-3, frozen_blocks=0)
YOUNG.eval_every = 300
STAGES = {
    "embodied": StageConfig(),
    "scenes": StageConfig(
        out="out/scenes", backbone="out/base", steps=2200, questions=4, blind=0.05,
        mixture="scenes:3,instructions:1", frozen_blocks=0, eval_every=300,
    ),
    "base": dataclasses.replace(YOUNG, out="out/base", backbone="out/look", steps=1500),
    "look": dataclasses.replace(
        YOUNG, out="out/look", backbone="", steps=900, pictures_only=True, mixture="scenes:1",
    ),
}  # fmt: skip


def weights_of(cfg):
    """{source: its weight} of --mixture. UserError on what it cannot be."""
    weights = {}
    for part in cfg.mixture.split(","):
        name, _, weight = part.partition(":")
        with reading(f"--mixture {cfg.mixture}", "such as scenes:3,instructions:1"):
            weights[choose(name, SOURCES, "source")] = float(weight or 1)
    answers = weights.keys() & {"command_questions", "instructions"}
    if cfg.pictures_only and answers:
        raise UserError(f"--pictures_only asks nothing: leave {answers.pop()} out of --mixture")
    return weights


def make_data(stages):
    """Make the scenes and instructions of stages where they are not there."""
    cfg = stages[-1]  # all share the folders
    names = set().union(*map(weights_of, stages))
    if not all(stage.backbone for stage in stages):
        names |= {"scenes", "instructions"}  # for a tokenizer
    workers = os.cpu_count() or 1
    if "scenes" in names and not (Path(cfg.scenes) / "val.jsonl").exists():
        scenes.make(ScenesConfig(out=cfg.scenes, workers=workers))
    if "instructions" in names and not (Path(cfg.instructions) / "probes.jsonl").exists():
        instructions.make(InstructionsConfig(out=cfg.instructions))
    for env in sorted({WORLDS[name] for name in names & WORLDS.keys()}):
        folder = folder_in(cfg.scenes, env)
        if not (Path(folder) / "val.jsonl").exists():
            commands.make(CommandsConfig(env=env, out=folder, workers=workers))


def open_source(name, cfg):
    match name:
        case "scenes":
            kinds = (cfg.categories, cfg.questions, cfg.blind, cfg.pictures_only)
            return Scenes(cfg.scenes, "train", *kinds)
        case "instructions":
            return Conversations(Path(cfg.instructions) / "train.jsonl")
        case "command_questions":
            return CommandQuestions(folder_in(cfg.scenes, WORLDS[name]))
        case _:
            return Commands(folder_in(cfg.scenes, WORLDS[name]))


def open_sources(cfg):
    """The rows of a stage. UserError on what they lack."""
    sources = []
    for name, weight in weights_of(cfg).items():
        rows = open_source(name, cfg)
        # scenes have files of their own for validation
        validation = None if name == "instructions" else rows.validation()
        sources.append(Source(name, rows, weight, validation))
    return sources


def learn_tokenizer(cfg):
    """A Tokenizer of all texts that the stages from nothing show."""
    everything = dataclasses.replace(cfg, pictures_only=False, mixture=StageConfig.mixture)
    sources = open_sources(everything)
    texts = [text for source in sources for text in source.rows.texts()]
    frame = f"system\n{SYSTEM_PROMPT}\nuser\nassistant\n"  # in every row, so worth whole tokens
    return train_tokenizer([*texts[:: 1 + len(texts) // MOST_TEXTS], *[frame] * 1000], VOCAB_SIZE)


def train_stage(cfg):
    """Train one stage; returns its last figures."""
    torch.manual_seed(cfg.seed)
    if cfg.resume:  # its own: the backbone or the data may be others by now
        processor = Processor(Tokenizer.from_pretrained(cfg.out))
    elif cfg.backbone:
        processor = Processor.from_pretrained(cfg.backbone)
    else:
        processor = Processor(learn_tokenizer(cfg))
    if cfg.backbone:
        model = VLM.from_pretrained(cfg.backbone)
    else:
        model = VLM(PRESETS["nano"].for_tokenizer(processor.tokenizer))
    heads = Grounding(model.config, processor.tokenizer, cfg.intent_layer, cfg.pictures_only)
    learned = Path(cfg.backbone) / "heads.safetensors"
    if cfg.backbone and learned.exists():  # new ones would undo in a hundred steps what is learned
        with reading(learned):
            heads.load(load_file(learned))
    with trainer.claim_out(cfg):
        processor.tokenizer.save_pretrained(cfg.out)  # before a first checkpoint needs it
        return train(cfg, model, processor, open_sources(cfg), heads)


def finished(folder):
    """Is there a model in a folder, and not one of a run that was stopped?"""
    about = Path(folder) / "training.json"
    if not about.exists():
        return False
    with reading(about, "delete the folder"):
        stage = read_json(about)["sft"]
        return stage["step"] >= stage["steps"]


def missing_stages(cfg):
    """The stages to train, cfg last: those before it whose folders hold no finished model."""
    same = {"batch_size", "seed", "device", "dtype", "fsdp", "micro_batch", "scenes"}
    same |= {"instructions", "intent_layer"}
    same = {name: getattr(cfg, name) for name in same}
    stages = {stage.out: dataclasses.replace(stage, **same) for stage in STAGES.values()}
    missing = [cfg]
    while missing[0].backbone in stages and not finished(missing[0].backbone):
        missing.insert(0, stages[missing[0].backbone])
    for stage in missing[:-1]:
        stage.resume = bool(trainer.checkpoints(stage.out))
        if stage.out == cfg.out:
            raise UserError(f"--out {cfg.out} is where an earlier stage goes: choose another")
    if cfg.backbone in stages:  # it may have been stopped before this stage began
        cfg.resume = cfg.resume and bool(trainer.checkpoints(cfg.out))
    return missing


def check(cfg):
    """UserError for what is wrong with a StageConfig: told before any work."""
    trainer.check(cfg)
    blocks = PRESETS["nano"].num_hidden_layers
    at_least(cfg, 1, "questions", "micro_batch", "intent_layer")
    at_least(cfg, 0, "blind", "frozen_blocks")
    weights_of(cfg)
    if cfg.fsdp:
        raise UserError("--fsdp: nano is small enough for every machine, leave it out")
    if cfg.blind > 1:
        raise UserError(f"--blind {cfg.blind} is a share of rows: at most 1")
    if cfg.intent_layer > blocks or cfg.frozen_blocks >= blocks:
        raise UserError(f"--intent_layer and --frozen_blocks: this model has {blocks} blocks")


def main():
    cfg = parse(StageConfig, presets=STAGES, description="nano's own Stage I, from nothing.")
    missing = missing_stages(cfg)
    for stage in missing:
        check(stage)
    trainer.start_processes(cfg)
    if trainer.is_first():
        make_data(missing)
    trainer.barrier()
    for stage in missing:  # mistakes are told now, not after other stages' training
        open_sources(stage)
    trainer.say("stages to train: " + ", ".join(stage.out for stage in missing))
    for stage in missing:
        train_stage(stage)
    trainer.end_processes()


if __name__ == "__main__":
    run(main)
