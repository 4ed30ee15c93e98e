"""nano's Stage I from nothing: each stage that is missing is trained, a stopped one goes on."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import last_state
from safetensors.torch import load_file
from squares import write_squares
from test_grounding import TINY

import trainer
from cli import UserError
from nano import train as recipe
from nano.instructions import InstructionsConfig, make
from nano.train import STAGES, StageConfig, finished, missing_stages, open_sources, train_stage
from vlm import VLM


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make(InstructionsConfig(rows=60, probes=6, pictures=2, out=str(folder / "general")))
    write_squares(folder / "corpus")
    return {"scenes": str(folder / "corpus"), "instructions": str(folder / "general")}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "nano", TINY)
    monkeypatch.setattr(recipe, "VOCAB_SIZE", 300)


def config(out, data, **changes):
    small = {"steps": 4, "batch_size": 4, "intent_layer": 2, "frozen_blocks": 0, "device": "cpu"}
    small |= {"eval_every": 2, "backbone": "", "out": str(out), "categories": "all", **data}
    return StageConfig(**{**small, **changes})


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_looking_stops_at_block_k(tmp_path, data):
    cfg = config(tmp_path, data, pictures_only=True, mixture="scenes", steps=2)
    train_stage(cfg)
    torch.manual_seed(0)
    tokenizer = recipe.learn_tokenizer(cfg)
    before = VLM(TINY.for_tokenizer(tokenizer)).state_dict()
    after = last_state(tmp_path)
    moved = {name for name in before if not torch.equal(before[name], after[f"model.{name}"])}
    assert any(name.startswith("visual.blocks.0") for name in moved)
    assert any(name.startswith("model.layers.1") for name in moved)
    assert not any(name.startswith("model.layers.2") for name in moved)
    assert "model.norm.weight" not in moved
    line = log_of(tmp_path)[-1]
    assert {"patches_vit", "patches_llm"} < line.keys() and "answer" not in line
    assert "object_accuracy_llm" in line


def test_it_overfits_a_few_scenes(tmp_path, data):
    look = config(tmp_path / "look", data, pictures_only=True, mixture="scenes", steps=50, lr=5e-3)
    look.eval_every = 1000
    train_stage(look)
    changes = {"backbone": look.out, "steps": 320, "batch_size": 6, "lr": 5e-3, "blind": 0.0}
    figures = train_stage(
        config(
            tmp_path / "base", data, **changes, mixture="scenes:3,instructions:1", eval_every=1000
        )
    )
    answers = [line["answer"] for line in log_of(tmp_path / "base")]
    assert np.mean(answers[-9:]) < 0.3 * answers[0]
    assert figures["object_accuracy_llm"] > 0.9 and figures["exact_scenes"] > 0.6


def test_stages_that_are_missing_are_trained_and_stopped_ones_go_on(tmp_path, data, monkeypatch):
    out = {name: str(tmp_path / name) for name in ("look", "base", "scenes")}
    stages = {
        "scenes": config(out["scenes"], data, backbone=out["base"], steps=2),
        "base": config(out["base"], data, backbone=out["look"], steps=2),
        "look": config(out["look"], data, pictures_only=True, mixture="scenes", steps=2),
    }
    monkeypatch.setattr(recipe, "STAGES", stages)

    def main(*flags):
        monkeypatch.setattr("sys.argv", ["train.py", *flags])
        recipe.main()

    train_stage(stages["look"])
    before = (tmp_path / "look" / "log.jsonl").stat().st_mtime_ns
    main()
    assert all(finished(folder) for folder in out.values())
    assert (tmp_path / "look" / "log.jsonl").stat().st_mtime_ns == before
    tokenizers = [(tmp_path / name / "tokenizer.json").read_text() for name in out]
    assert len(set(tokenizers)) == 1
    with pytest.raises(UserError, match="--resume|already"):
        main()
    shutil.rmtree(out["scenes"])
    about = tmp_path / "base" / "training.json"  # as if it had been stopped in the second
    record = json.loads(about.read_text())
    record["sft"]["steps"] = 3
    about.write_text(json.dumps(record))
    stages["base"].steps = 3
    main("--resume")
    assert finished(out["scenes"]) and log_of(tmp_path / "base")[-1]["step"] == 3
    shutil.rmtree(out["scenes"])  # as if it had been stopped between two
    main("--resume")
    assert finished(out["scenes"])
    heads = load_file(tmp_path / "scenes" / "heads.safetensors")
    assert {name.split(".")[0] for name in heads} == {"vit", "llm", "answer", "role", "place"}


def test_resuming_changes_nothing(tmp_path, data, monkeypatch):
    train_stage(config(tmp_path / "whole", data))
    save = trainer.save_checkpoint

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train_stage(config(tmp_path / "parts", data))
    other = config(tmp_path / "parts", data, resume=True, blind=0.5)
    with pytest.raises(UserError, match="--blind"):
        train_stage(other)
    train_stage(config(tmp_path / "parts", data, resume=True))
    whole, parts = (last_state(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_mistakes_are_told_before_any_work(tmp_path, data, monkeypatch):
    def told(**changes):
        cfg = config(tmp_path / "o", data, **changes)
        stages = missing_stages(cfg)
        for stage in stages:
            recipe.check(stage)
        open_sources(cfg)

    monkeypatch.setattr(recipe, "STAGES", {"base": config(tmp_path / "o", data)})
    with pytest.raises(UserError, match="is where an earlier stage goes"):
        told(backbone=str(tmp_path / "o"))
    for changes, words in (
        ({"blind": 2.0}, "--blind 2.0 is a share"),
        ({"mixture": "scene:1"}, "did you mean scenes"),
        ({"mixture": "scenes:many"}, "--mixture scenes:many"),
        ({"pictures_only": True}, "leave instructions out"),
        ({"mixture": "commands:1"}, "python -m nano.commands"),
        ({"intent_layer": 9}, "--intent_layer.*3 blocks"),
        ({"frozen_blocks": 3}, "--frozen_blocks.*3 blocks"),
        ({"categories": "points"}, "did you mean point"),
        ({"categories": "future"}, "no questions in --categories future"),
        ({"scenes": str(tmp_path / "nowhere")}, "python -m nano.scenes"),
        ({"instructions": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(UserError, match=words):
            told(**changes)
    assert not list(tmp_path.iterdir())


def test_each_stage_starts_where_another_ends():
    stages = {stage.out: stage for stage in STAGES.values()}
    before = [stage.backbone for stage in STAGES.values()]
    assert set(before) == {"", *stages} - {STAGES["embodied"].out}
    assert len(dataclasses.fields(StageConfig)) < 22
