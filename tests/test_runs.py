"""runs/*.sh with stubs for python and torchrun: which commands they run, in which order, and again.

Every command must have flags that exist.
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import cli
from dev import ablations
from nano.train import weights_of

STUB = """#!/bin/sh
echo "${0##*/} $*" >> "$LOG"
case "$*" in *"$FAIL"*) mkdir -p out/base/state/300; exit 3;; esac
"""


@pytest.fixture
def go(tmp_path):
    """Run a script in a folder of its own: (exit code, the commands it ran, stderr)."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(script, *flags, fail="nothing fails"):
        log = tmp_path / "log"
        log.write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "LOG": str(log), "FAIL": fail}
        command = ["sh", str(tmp_path / "runs" / script), *flags]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return run.returncode, log.read_text().splitlines(), run.stderr

    return start


def parsed(line, monkeypatch):
    """The configuration that the script of a command would read from its flags."""
    line = line.replace("torchrun --nproc_per_node 2", "python").replace("python -- ", "python ")
    words = shlex.split(line)[1:]
    if words[0] == "-m":
        words = words[1:]
    name = words[0].split("/")[-1].removesuffix(".py")
    module = importlib.import_module(name)
    configs = []

    def parse(*classes, **options):
        configs.append(cli.parse(*classes, **options))
        raise KeyboardInterrupt  # parsed, which is all that is tested

    monkeypatch.setattr(module, "parse", parse)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(KeyboardInterrupt):
        module.main()
    monkeypatch.undo()
    return configs[0]


# ---- speedrun.sh

STEPS = ("data.record", "nano.scenes", "nano.instructions", "--preset look", "--preset base")
STEPS += ("--preset scenes", "--preset embodied", "train_policy.py", "eval.py physical")
STEPS += ("eval.py digital",)


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
def test_the_speedrun_runs_all_in_order_once(go, budget, monkeypatch):
    code, ran, _ = go("speedrun.sh", "--budget", budget)
    assert code == 0
    assert len(ran) == len(STEPS)
    for step, line in zip(STEPS, ran):
        assert step in line
        parsed(line, monkeypatch)
    assert ("torchrun" in "".join(ran)) == (budget == "cpu")
    assert not any("--resume" in line for line in ran)
    assert go("speedrun.sh", "--budget", budget)[:2] == (0, [])


def test_the_speedrun_goes_on_where_it_was_stopped(go):
    code, ran, _ = go("speedrun.sh", fail="--preset base")
    assert code != 0
    assert "--preset base" in ran[-1]
    assert len(ran) == 5
    code, ran, _ = go("speedrun.sh")
    assert code == 0
    assert len(ran) == 6
    assert "--preset base" in ran[0]
    assert ran[0].endswith("--resume")
    assert not ran[1].endswith("--resume")


@pytest.mark.parametrize("flags", [("--budget", "tpu"), ("--bugdet", "cpu"), ("gpu",)])
def test_other_flags_of_the_speedrun_are_one_line(go, flags, tmp_path):
    code, ran, printed = go("speedrun.sh", *flags)
    assert (code, ran) == (2, [])
    assert printed.count("\n") == 1
    assert "--budget cpu or --budget gpu" in printed
    assert not (tmp_path / "out").exists()


# ---- nano.sh, listen.sh and ablations.sh


def test_the_recipe_of_the_shipped_weights_has_flags_that_exist(go, monkeypatch):
    code, ran, _ = go("nano.sh")
    assert code == 0
    configs = [parsed(line, monkeypatch) for line in ran]
    lengths = [config.steps for line, config in zip(ran, configs) if "train_policy" in line]
    assert lengths == [7000, 12000, 16000, 19000]


def test_the_recipe_of_a_policy_that_listens_fits_together(go, monkeypatch):
    code, ran, _ = go("listen.sh")
    assert code == 0
    configs = {line: parsed(line, monkeypatch) for line in ran}
    [listen] = [config for line, config in configs.items() if "nano.train" in line]
    [policy] = [config for line, config in configs.items() if "train_policy" in line]
    assert policy.backbone == listen.out and policy.start == listen.backbone
    # the policy reads what Stage I taught, and Stage I keeps asking
    assert policy.intent_layer == listen.intent_layer and policy.text_first
    assert {"scenes", "commands", "instructions"} < set(weights_of(listen))
    recorded = [config.tasks for line, config in configs.items() if "data.record" in line]
    assert sorted(",".join(recorded).split(",")) == sorted(policy.tasks.split(","))


def test_every_ablation_is_trained_once_and_evaluated(go, monkeypatch):
    code, ran, _ = go("ablations.sh")
    assert code == 0
    steps = {}
    for train, evaluate in zip(ran[::2], ran[1::2]):
        config = parsed(train, monkeypatch)
        measured = parsed(evaluate, monkeypatch)
        assert measured.weights == config.out
        assert measured.out == f"{config.out}.json"
        assert (measured.robots, measured.tasks) == (config.robots, config.tasks)
        row = config.out.split("/")[2]
        steps[row] = steps.get(row, 0) + config.steps
        assert config.use_intent == (row != "no_intent")
        assert config.future_loss == (row != "no_future")
        assert config.intent_layer == (7 if row == "last_block" else 0)
    assert list(steps) == sorted(ablations.ROWS, key=list(steps).index)
    for row, total in steps.items():
        share = 0.3 if row.startswith(("adapted", "alone")) else 1
        assert abs(total - 2000 * share) <= 24
    again = go("ablations.sh", "full")[1]
    assert len(again) == 1  # it is trained; the stub wrote no result
    assert "eval.py physical" in again[0]
