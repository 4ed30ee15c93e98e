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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(start_one, (port, function, arguments), nprocs=2)


def start_one(rank, port, function, arguments):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(*arguments)
