"""Work in several processes: it ends when it should, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli import UserError
from jobs import run_jobs

ROOT = Path(__file__).parent.parent  # conftest would load torch in every worker


def double(job):
    return 2 * job


def work(job):
    """job: (folder, what to do). Leaves a file with the worker's number."""
    folder, deed = job
    (folder / str(os.getpid())).touch()
    if deed in ("die", "fail"):
        time.sleep(1)  # after the quick one, however slowly its worker starts
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "fail":
        raise UserError("this job cannot be done")
    if deed == "sleep":
        time.sleep(60)
    return deed


def alive(folder):
    """Workers that left a file in `folder` and are still alive."""
    numbers = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    return [n for n in numbers if os.path.exists(f"/proc/{n}")]


def wait_until(true, seconds):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def test_every_job_is_done_once():
    assert sorted(run_jobs(double, range(23), workers=2)) == [2 * i for i in range(23)]
    assert list(run_jobs(double, [], workers=2)) == []


@pytest.mark.parametrize(
    "deed, says", [("die", "a worker was killed.*run the same command again"), ("fail", "cannot")]
)
def test_one_bad_job_ends_all_in_one_line_and_what_is_done_is_kept(deed, says, tmp_path):
    start = time.monotonic()
    kept = []
    with pytest.raises(UserError, match=says) as caught:
        jobs = [(tmp_path, "quick"), (tmp_path, deed), *[(tmp_path, "sleep")] * 5]
        kept.extend(run_jobs(work, jobs, workers=2))
    assert kept == ["quick"] and "\n" not in str(caught.value)
    assert time.monotonic() - start < 15 and not alive(tmp_path)


def test_a_reader_that_stops_early_ends_the_workers(tmp_path):
    results = run_jobs(work, [(tmp_path, "quick"), *[(tmp_path, "sleep")] * 3], workers=2)
    assert next(results) == "quick"
    results.close()
    assert not alive(tmp_path)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
import cli, jobs, test_jobs
folder = Path({folder!r})

def main():
    for _ in jobs.run_jobs(test_jobs.work, [(folder, "sleep")] * 4, workers=2):
        pass

if __name__ == "__main__":
    (folder / "begun").touch()
    cli.run(main)
"""


def sleeping_run(tmp_path):
    """A process of its own group, with two workers that sleep."""
    words = SCRIPT.format(path=[str(ROOT), str(ROOT / "tests")], folder=str(tmp_path))
    (tmp_path / "script.py").write_text(words)
    command = [sys.executable, str(tmp_path / "script.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # tests that run in a shell's background would hand Ctrl-C down as ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, start_new_session=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    run = sleeping_run(tmp_path)
    assert wait_until(lambda: len(alive(tmp_path)) == 2, 60)
    run.kill()
    run.communicate()
    assert wait_until(lambda: not alive(tmp_path), 2)


def test_ctrl_c_ends_everything_with_one_word(tmp_path):
    run = sleeping_run(tmp_path)
    assert wait_until(lambda: len(alive(tmp_path)) == 2, 60)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, told = run.communicate(timeout=10)
    assert run.returncode == 130 and told.split() == ["stopped"] and not alive(tmp_path)


def test_ctrl_c_while_workers_start_leaves_no_traceback(tmp_path):
    run = sleeping_run(tmp_path)
    assert wait_until((tmp_path / "begun").exists, 60)
    time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    _, told = run.communicate(timeout=10)
    assert run.returncode == 130 and told.split() == ["stopped"]
    assert wait_until(lambda: not alive(tmp_path), 2)
