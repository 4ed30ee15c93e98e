"""Tests run from anywhere, on one core each, without a GPU, a display or a network."""
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def last_state(folder):
    """{name: tensor} of a run's last checkpoint."""
    from safetensors.torch import load_file
    from trainer import checkpoints
    return load_file(checkpoints(folder)[-1])


def spawn_two(function, *arguments):
    """Run function(*arguments) as two processes of one run, as torchrun starts them."""
    torch.multiprocessing.spawn(start_one, (free_port(), function, arguments), nprocs=2)


def free_port():
    """One that nothing listens on, below those that the kernel gives to connections: one of these may be taken again before the processes have begun."""
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise RuntimeError("no free port")


def start_one(rank, port, function, arguments):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(*arguments)
