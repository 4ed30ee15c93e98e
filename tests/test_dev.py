"""The programs in dev/: figures are drawn, rows are collected, both sides are timed."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import cli
from data.robots import ROBOTS
from data.tasks import TASKS
from dev import ablations, bench, bench_gpu

NANO = str(ROOT / "weights" / "nano")


def draw(name, tmp_path, monkeypatch, *flags):
    figures = pytest.importorskip("dev.figures", reason="wants requirements-dev.txt")
    out = tmp_path / f"{name}.png"
    monkeypatch.setattr(sys, "argv", ["figures.py", name, "--out", str(out), *map(str, flags)])
    figures.main()
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert out.stat().st_size < 200_000
    assert pixels.std() > 10
    return pixels


def test_success_is_drawn(tmp_path, monkeypatch):
    draw("success", tmp_path, monkeypatch, "--source", ROOT / "results" / "physical.json")


def test_digital_bars_are_drawn(tmp_path, monkeypatch):
    row = {"asked": 10, "chance": 0.5, "blind": 0.4, "model": 0.9, "interval": [0.7, 0.95]}
    tables = {"a.jsonl": {"categories": {"counting": row, "point": row}}}
    (tmp_path / "r.json").write_text(json.dumps({"files": tables}))
    draw("digital", tmp_path, monkeypatch, "--source", tmp_path / "r.json")


def test_losses_are_drawn(tmp_path, monkeypatch):
    lines = [{"step": step, "loss": 10 / step, "flow": 5 / step} for step in range(1, 200)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw("losses", tmp_path, monkeypatch, "--source", tmp_path / "log.jsonl")


def test_noise_is_drawn_as_it_becomes_a_chunk(tmp_path, monkeypatch):
    draw("denoising", tmp_path, monkeypatch, "--weights", NANO)


def test_the_intent_queries_look_somewhere(tmp_path, monkeypatch):
    draw("intent", tmp_path, monkeypatch, "--weights", NANO)


def run_folder(folder, row, number, robots, wins):
    """The files that runs/ablations.sh leaves for one model."""
    model = folder / row / str(number)
    model.mkdir(parents=True)
    figures = {"joint_error_rad": 0.0123}
    policy = {"command": "python train_policy.py", "seconds": 60, "figures": figures}
    (model / "training.json").write_text(json.dumps({"policy": policy}))
    cell = {"success": wins / 10, "episodes": 10}
    cells = {robot: dict.fromkeys(TASKS, cell) for robot in robots}
    result = {"cells": cells, "seconds": 60, "command": "python eval.py physical"}
    (folder / row / f"{number}.json").write_text(json.dumps(result))


def test_rows_of_ablations_are_gathered(tmp_path, monkeypatch, capsys):
    run_folder(tmp_path / "runs", "full", 0, ROBOTS, 5)
    for number, robot in enumerate(ROBOTS):
        run_folder(tmp_path / "runs", "per_robot", number, [robot], 2 * number)
    out = tmp_path / "r.json"
    argv = ["ablations.py", "--runs", tmp_path / "runs", "--results", out]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    ablations.main()
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["full", "per_robot"]
    assert rows["full"]["mean"] == 0.5
    assert rows["per_robot"]["mean"] == pytest.approx(0.3)
    assert rows["per_robot"]["minutes"] == 8
    assert len(rows["per_robot"]["commands"]) == 8
    printed = capsys.readouterr().out
    assert "| full | the method: 100 demonstrations a cell, one model for all | 50 | 50" in printed
    assert "| 0 | 20 | 40 | 60 | 30.0 |" in printed
    assert "| 12.3 |" in printed


def test_the_shipped_rows_are_known():
    rows = json.loads((ROOT / "results" / "ablations.json").read_text())["rows"]
    assert list(rows) == list(ablations.ROWS)
    assert ablations.table(rows).count("\n") == len(rows) + 1


def test_sides_take_turns(tmp_path, monkeypatch):
    """Compared with a commit of another repository, which has what the part calls."""
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copytree(ROOT / "weights" / "nano", tree / "weights" / "nano")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tree)
    shutil.copytree(ROOT / "data", tree / "data")
    shutil.copytree(ROOT / "dev", tree / "dev")
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m first"):
        subprocess.run(["git", *words.split()], cwd=tree, check=True)
    out = tmp_path / "r.json"
    argv = f"bench.py --against HEAD --only prefill --rounds 2 --threads 1 --out {out}"
    monkeypatch.setattr(sys, "argv", argv.split())
    monkeypatch.setattr(bench, "ROOT", tree)
    bench.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row["what"] == "prefill"
    assert 0.1 < row["times_as_fast"] < 10
    trees = subprocess.run(
        ["git", "worktree", "list"], cwd=tree, check=True, capture_output=True, text=True
    )
    assert trees.stdout.count("\n") == 1  # the worktree of the other commit is gone


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--only sped", "unknown part 'sped'"),
        ("--rounds 0", "--rounds 0"),
        ("--against no-such-commit --only act", "git rev-parse"),
        ("--only data", "add --dataset"),
    ],
)
def test_mistakes_of_bench_are_told(flags, says, tmp_path, monkeypatch):
    argv = ["bench.py", *flags.split(), "--out", str(tmp_path / "r.json"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(cli.UserError, match=says):
        bench.main()


def test_the_bench_of_a_gpu_runs_dry(tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    argv = ["bench.py", "--only", "gpu", "--device", "cpu", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    bench.main()
    rows = json.loads(out.read_text())["rows"]
    assert not [row for row in rows if "left_out" in row]
    # limits; three ways to act and two to decode of each of two models; a step of each stage
    assert len(rows) == 1 + 6 + 4 + 2
    assert all(row["ms"] > 0 for row in rows[1:])


@pytest.mark.parametrize("name", bench_gpu.TINY.vlms)
def test_a_look_is_what_the_models_say(name):
    config = bench_gpu.TINY.vlms[name]
    cpu = torch.device("cpu")
    with torch.no_grad():
        look, (pixels, state), ordinary = bench_gpu.new_look(
            config, bench_gpu.TINY, cpu, torch.float32
        )
        for parameter in look.policy.parameters():  # a new policy returns its noise
            parameter.add_(0.05 * torch.randn_like(parameter))
        torch.testing.assert_close(look(pixels, state), ordinary(), atol=1e-5, rtol=1e-5)
        other = torch.randn_like(pixels)
        assert not torch.allclose(look(other, state), look(pixels, state), atol=1e-4)


def test_no_finished_row_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--runs", str(tmp_path)])
    with pytest.raises(cli.UserError, match="no finished row"):
        ablations.main()
