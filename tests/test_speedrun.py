"""speedrun.sh with other programs in python's and torchrun's place: what it runs, in which order, and where it goes on."""
import os
import shutil
import subprocess

import pytest

from conftest import ROOT
from test_readme import flags_parse

STUB = """#!/bin/sh
echo "${0##*/} $*" >> "$LOG"
case "$*" in *"$FAIL"*) mkdir -p out/base/state/300; exit 3;; esac
"""


@pytest.fixture
def go(tmp_path):
    """Run it in a folder of its own: (exit code, the commands it ran, stderr)."""
    shutil.copy(ROOT / "speedrun.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*flags, fail="nothing fails"):
        log = tmp_path / "log"
        log.write_text("")
        environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(log), "FAIL": fail}
        made = subprocess.run(["sh", str(tmp_path / "speedrun.sh"), *flags], env=environment, capture_output=True, text=True)
        return made.returncode, log.read_text().splitlines(), made.stderr
    return run


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
def test_it_runs_all_in_order_once_with_flags_that_exist(go, budget, monkeypatch):
    code, ran, _ = go("--budget", budget)
    steps = ("data.record", "nano.scenes", "--preset base", "--preset scenes", "--preset embodied", "train_policy.py", "eval.py physical", "eval.py digital")
    assert code == 0 and len(ran) == len(steps) and all(step in line for step, line in zip(steps, ran))
    for line in ran:
        words = line.replace("torchrun --nproc_per_node 2", "python").replace("../../", "").split()
        flags_parse(words[1:], monkeypatch)
    assert ("torchrun" in "".join(ran)) == (budget == "cpu") and not any("--resume" in line for line in ran)
    assert go("--budget", budget)[:2] == (0, [])


def test_it_goes_on_where_it_was_stopped(go):
    code, ran, _ = go(fail="--preset base")
    assert code != 0 and "--preset base" in ran[-1] and len(ran) == 3
    code, ran, _ = go()
    assert code == 0 and len(ran) == 6 and "--preset base" in ran[0] and ran[0].endswith("--resume") and not ran[1].endswith("--resume")


@pytest.mark.parametrize("flags", [("--budget", "tpu"), ("--bugdet", "cpu"), ("gpu",)])
def test_other_flags_are_one_line(go, flags, tmp_path):
    code, ran, said = go(*flags)
    assert (code, ran) == (2, []) and said.count("\n") == 1 and "--budget cpu or --budget gpu" in said and not (tmp_path / "out").exists()
