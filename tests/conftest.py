"""Tests run from anywhere, on one core each, without a GPU, a display or a network."""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def one_thread():
    """Before each test: code under test may change the number, and sums of two threads differ."""
    torch.set_num_threads(1)


def last_state(folder):
    """{name: tensor} of a run's last checkpoint."""
    return load_file(max(Path(folder, "state").glob("*.safetensors")))


def log_of(folder):
    """The lines of a run's log, dicts."""
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def spawn_two(function, *arguments):
    """Run function(*arguments) as two processes of one run, as torchrun starts them."""
    torch.multiprocessing.spawn(start_one, (free_port(), function, arguments), nprocs=2)


def free_port():
    """A port that nothing listens on, below those that the kernel gives to connections."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise RuntimeError("no free port")


def start_one(rank, port, function, arguments):
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    function(*arguments)


def killed_again_and_again(function, moments, *arguments):
    """Run function(*arguments, moment), which ends by SIGKILL, for each moment in turn."""
    context = torch.multiprocessing.get_context("spawn")
    killer = context.Process(target=live_and_die, args=(function, moments, arguments))
    killer.start()
    killer.join()
    assert killer.exitcode == 0


def live_and_die(function, moments, arguments):
    """Run in a fresh process that has started no threads, so that forking is safe."""
    torch.set_num_threads(1)
    for moment in moments:
        child = os.fork()
        if child == 0:
            function(*arguments, moment)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL


def here(work, jobs, workers):
    """Replaces run_jobs: works in this process, with its open packages and own functions."""
    return map(work, jobs)
