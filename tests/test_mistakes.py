"""A user's mistakes: one clear line, exit code 2, nothing half-written. And the shipped weights at work."""

import re
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import cli
import corrections
import data.add_robot
import data.record
import eval as evaluation
import nano.instructions
import nano.scenes
import nano.train
import sample
import train_policy
import train_sft
from dev import bench

NANO = str(ROOT / "weights" / "nano")


def call(module, argv, monkeypatch, capsys):
    """(exit code, stderr) of `python module.py argv...`, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, argv)])
    try:
        cli.run(module.main)
        return 0, capsys.readouterr().err
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# (script, flags with {tmp} for a scratch folder and {nano} for the shipped weights, what the line must say)
MISTAKES = [
    (
        sample,
        "--robot widowz",
        "unknown robot 'widowz'.*panda, xarm6, xarm7, widowx.*did you mean widowx",
    ),
    (sample, "--task PickCub", "unknown task 'PickCub'.*did you mean PickCube"),
    (sample, "--robott panda", "--robott.*did you mean --robot"),
    (sample, "--episodes 0", "--episodes 0"),
    (sample, "--episodes two", "invalid int value"),
    (sample, "--weights {tmp}/nowhere", "nowhere"),
    (sample, "--weights {tmp}/truncated --out {tmp}/o", "truncated"),
    (sample, "--weights {tmp}/foreign --out {tmp}/o", "foreign"),
    (sample, "--weights {tmp}/empty --out {tmp}/o", "empty"),
    (sample, "--weights {tmp}/unjson --out {tmp}/o", "unjson"),
    (sample, "--out {tmp}/file.txt --weights {nano}", "cannot write"),
    (sample, "--out /proc/nowhere --weights {nano}", "cannot write"),
    (sample, "--image {tmp}/picture.png", "--ask"),
    (
        sample,
        "--ask What? --image {tmp}/file.txt --weights {nano} --out {tmp}/o",
        "cannot read .*file.txt: cannot identify",
    ),
    (sample, "--ask What? --image {tmp}/missing.png --weights {nano} --out {tmp}/o", "missing.png"),
    (sample, "--ask What? --image {tmp}/thin.png --weights {nano} --out {tmp}/o", "too thin"),
    (
        sample,
        ["--ask", "  ", "--image", "{tmp}/picture.png", "--weights", "{nano}", "--out", "{tmp}/o"],
        "question",
    ),
    (evaluation, "", "unknown evaluation.*expert, physical"),
    (evaluation, "physicl", "unknown evaluation.*did you mean physical"),
    (evaluation, "physical --weights {tmp}/nowhere", "nowhere"),
    (evaluation, "physical --robots panda,widowy", "unknown robot 'widowy'"),
    (evaluation, "expert --episodes -1", "--episodes -1"),
    (evaluation, "physical --execute_steps 17", "--execute_steps 17: a chunk has 16 steps"),
    (evaluation, "expert --out {tmp}/empty", "name a .json file"),
    (evaluation, "expert --out {tmp}/folder.json", "name a .json file"),
    (evaluation, "expert --out {tmp}/file.txt/r.json", "cannot write"),
    (data.add_robot, "", "say which arm"),
    (data.add_robot, "--mjcf {tmp}/file.txt --name new", "cannot read"),
    (data.add_robot, "--mjcf {tmp}/file.txt --name panda", "there is such a robot already"),
    (data.record, "--robots pandas", "unknown robot"),
    (corrections, "--policy {tmp}/nowhere --out {tmp}/o", "nowhere"),
    (corrections, "--policy {nano} --robots pandas --out {tmp}/o", "unknown robot 'pandas'"),
    (data.record, "--policy out/policy", "unrecognized arguments: --policy"),
    (data.record, "--tasks Juggle", "unknown task"),
    (data.record, "--episodes 0", "at least 1"),
    (data.record, "--out /proc/nowhere", "cannot write"),
    (data.record, "--show {tmp}/empty", "no episodes"),
    (data.record, "--show {tmp}/broken", "panda-PickCube-0.*delete it and record again"),
    (nano.scenes, "--scenes many", "invalid int value"),
    (sample, "--execute_steps 0", "--execute_steps 0 must be at least 1"),
    (sample, "--seed -1", "--seed -1 must be at least 0"),
    (
        sample,
        "--device cud --weights {nano} --out {tmp}/o",
        "unknown device 'cud'.*did you mean cuda",
    ),
    (evaluation, "expert --workers 0", "--workers 0 must be at least 1"),
    (evaluation, "physical --seed -5", "--seed -5"),
    (
        evaluation,
        "physical --instruction push",
        "--instruction 'push': name its one task with --tasks",
    ),
    (evaluation, "digital --questions -1", "--questions -1"),
    (evaluation, "digital --weights {tmp}/nowhere", "nowhere"),
    (evaluation, "digital --base {tmp}/nowhere", "nowhere"),
    (evaluation, "digital --dtype int7", "unknown dtype 'int7'"),
    (evaluation, "digital --batch_size 0", "--batch_size 0"),
    (bench, "--only act --against nowhere-at-all", "git rev-parse"),
    (bench, "--only sped", "unknown part .sped."),
    (data.record, "--workers 0", "--workers 0 must be at least 1"),
    (data.record, "--seed -1", "--seed -1"),
    (data.record, "--noise nan", "--noise nan"),
    (nano.scenes, "--scenes 0", "--scenes 0 must be at least 1"),
    (nano.scenes, "--out /proc/nowhere", "cannot write"),
    (nano.instructions, "--rows 0", "--rows 0"),
    (nano.instructions, "--pictures -3", "--pictures -3"),
    (train_sft, "--stepps 3", "did you mean --steps"),
    (train_sft, "--steps 0 --out {tmp}/o", "--steps 0 must be at least 1"),
    (train_sft, "--lr nan --out {tmp}/o", "--lr nan"),
    (train_sft, "--batch_size 0 --out {tmp}/o", "--batch_size 0"),
    (train_sft, "--on_bad ignore --out {tmp}/o", "unknown --on_bad 'ignore'"),
    (train_sft, "--fsdp --out {tmp}/o", "torchrun"),
    (train_sft, "--resume --out {tmp}/o", "no training run to resume"),
    (train_sft, "--out /proc/nowhere", "cannot write"),
    (train_sft, "--out {nano}", "already holds a model"),
    (train_sft, "--micro_batch 0 --out {tmp}/o", "--micro_batch 0"),
    (train_sft, "--lora_rank -1 --out {tmp}/o", "--lora_rank -1"),
    (train_sft, "--preset qwenn --out {tmp}/o", "unknown preset 'qwenn'.*did you mean qwen"),
    (train_sft, "--data {tmp}/nowhere.jsonl --out {tmp}/o", "cannot read .*nowhere.jsonl"),
    (train_sft, "--data {tmp}/bad.jsonl --out {tmp}/o", "bad.jsonl, line 2.*answer.*--on_bad skip"),
    (train_sft, "--data {tmp}/good.jsonl:0 --out {tmp}/o", "must not all be zero"),
    (
        train_sft,
        "--data {tmp}/good.jsonl --out {tmp}/o --train eyes",
        "unknown part 'eyes'.*vision, merger, llm",
    ),
    (train_sft, "--data {tmp}/good.jsonl --out {tmp}/o --frozen_blocks 9", "--frozen_blocks 9"),
    (
        train_sft,
        "--data {tmp}/good.jsonl --out {tmp}/o --dtype half",
        "half.*auto, float32, bfloat16",
    ),
    (train_sft, "--data {tmp}/good.jsonl --out {tmp}/o --backbone {tmp}/nowhere", "nowhere"),
    (nano.train, "--preset embodid", "unknown preset 'embodid'.*did you mean embodied"),
    (nano.train, "--steps 0 --out {tmp}/o", "--steps 0"),
    (nano.train, "--fsdp --out {tmp}/o", "--fsdp"),
    (nano.train, "--blind 2 --out {tmp}/o", "--blind 2"),
    (train_policy, "--batch_size -4 --out {tmp}/o", "--batch_size -4"),
    (train_policy, "--resume --out {tmp}/o", "no training run to resume"),
    (
        train_policy,
        "--data {tmp}/broken --backbone {nano} --out {tmp}/o",
        "panda-PickCube-0.*delete it and record again",
    ),
    (
        train_policy,
        "--intent_layer 99 --data {tmp}/broken --backbone {nano} --out {tmp}/o",
        "--intent_layer 99",
    ),
    (train_policy, "--backbone {tmp}/nowhere --out {tmp}/p", "nowhere"),
    (train_policy, "--sizes nan --out {tmp}/o", "unknown --sizes 'nan'.*did you mean nano"),
    (train_policy, "--intent_layer -1 --out {tmp}/o", "--intent_layer -1 must be at least 0"),
]


@pytest.fixture
def scratch(tmp_path):
    for name in ("empty", "broken", "folder.json"):
        (tmp_path / name).mkdir()
    (tmp_path / "file.txt").write_text("not a picture")
    talk = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}\n'
    (tmp_path / "good.jsonl").write_text(talk)
    (tmp_path / "bad.jsonl").write_text(talk + talk.replace("Hello.", " "))
    (tmp_path / "broken" / "panda-PickCube-0.safetensors").write_bytes(b"junk")
    Image.fromarray(np.full((40, 50, 3), 128, np.uint8)).save(tmp_path / "picture.png")
    Image.fromarray(np.zeros((50, 1, 3), np.uint8)).save(tmp_path / "thin.png")
    for name in ("truncated", "foreign", "unjson"):
        shutil.copytree(NANO, tmp_path / name)
    path = tmp_path / "truncated" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    shutil.copy(
        tmp_path / "foreign" / "policy.safetensors", tmp_path / "foreign" / "model.safetensors"
    )
    (tmp_path / "unjson" / "config.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize(
    "module, flags, says", MISTAKES, ids=[f"{m.__name__} {f}" for m, f, _ in MISTAKES]
)
def test_a_mistake_is_one_line(module, flags, says, scratch, monkeypatch, capsys):
    before = files(scratch)
    words = flags.split() if isinstance(flags, str) else flags
    code, told = call(
        module, [word.format(tmp=scratch, nano=NANO) for word in words], monkeypatch, capsys
    )
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in told, told
    assert re.search(says, lines[0]), lines[0]
    new = {name for name in files(scratch) - before if name.split("/")[0] != "o"}
    assert not new, f"left behind: {new}"


def test_sample_draws_an_episode_and_answers(tmp_path, monkeypatch, capsys):
    code, told = call(
        sample, ["--robot", "widowx", "--task", "PushCube", "--out", tmp_path], monkeypatch, capsys
    )
    assert code == 0, told
    with Image.open(tmp_path / "widowx-PushCube-1000001.gif") as gif:
        assert gif.n_frames > 5
    code, told = call(
        sample, ["--ask", "Which robot is this?", "--out", tmp_path], monkeypatch, capsys
    )
    assert code == 0, told
