"""Reading batches for training, compared with lerobot's own loader on the same dataset.

    python -m dev.bench --only data --dataset FOLDER --lerobot PYTHON

FOLDER is a LeRobotDataset with videos, PYTHON an interpreter that has lerobot, which cannot be
installed into this project's environment. Each side has one process and no workers. Measured is how
long a step waits for data after the first epoch: `import` and the cache of hidden states are paid
once, and reported as `prepared_s`.
"""

import re
import tempfile
import time
from pathlib import Path

import numpy as np

from cli import UserError
from data.demonstrations import FRAME_STRIDE
from data.lerobot import ImportFlags, import_dataset
from data.lerobot_read import Dataset
from dev.bench_lerobot import HORIZON
from embodiment import MOST_VIEWS
from train_policy import TrainConfig, load_demonstrations, load_models, policy_config

ROOT = Path(__file__).parent.parent
BATCH = 64  # rows: one frame of all cameras, its state, and HORIZON actions
EPISODES = 4  # the dataset's first episodes


def prepare(source, folder, device):
    """Import the dataset `source` into `folder`, with hidden states. Returns its Demonstrations."""
    # use the dataset's own camera names
    cameras = Dataset(source).cameras[:MOST_VIEWS]
    views = [re.sub(r"\W", "_", camera.rpartition(".")[2]) for camera in cameras]
    chosen = ",".join(f"{view}={camera}" for view, camera in zip(views, cameras, strict=True))
    flags = ImportFlags(cameras=chosen, robot="robot", episodes=f":{EPISODES}")
    import_dataset(source, folder / "mine", flags)
    # from here on as in train_policy.py
    cfg = TrainConfig(data=str(folder / "mine"), cache=str(folder / "cache"))
    config = policy_config(cfg)
    assert config.action_horizon == HORIZON, "the other side would read other chunks"
    blm, _, backbone = load_models(cfg, config, device)
    return load_demonstrations(cfg, config, blm, None, backbone)


def read_pictures(demos, rows):
    """The images, which training reads only once, for the cache: [(V squares)] of rows."""
    frames = demos.frame[rows]
    # a row knows its episode and the index of its training frame
    return [demos.episodes[i].images(FRAME_STRIDE * j) for i, j in frames.tolist()]


def milliseconds(read, *arguments):
    start = time.perf_counter()
    read(*arguments)
    return 1000 * (time.perf_counter() - start)


def row_of(what, ours, theirs):
    """A row of the table: adjacent times (rounds,) in ms of both sides."""
    return {
        "what": what,
        "ms": round(float(np.median(ours)), 2),
        "rounds": len(ours),
        "against_ms": round(float(np.median(theirs)), 2),
        "times_as_fast": round(float(np.median(theirs / ours)), 1),
        "frames_a_second": round(float(BATCH * 1000 / np.median(ours))),
        "against_frames_a_second": round(float(BATCH * 1000 / np.median(theirs))),
    }


def measure(config, turns, environment, device):
    """The rows for config (a BenchConfig); turns is `process_turns` of dev/bench.py.

    UserError if a flag is missing.
    """
    if not (config.dataset and config.lerobot):
        advice = "add --dataset, a LeRobotDataset, and --lerobot, a Python that has lerobot"
        raise UserError(f"--only data stands beside lerobot: {advice}")
    words = ["dev/bench_lerobot.py", config.dataset, EPISODES, BATCH]
    command = [config.lerobot, *map(str, words)]
    # that interpreter must not import our modules
    environment = environment | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        demos = prepare(config.dataset, Path(folder), device)
        prepared = time.perf_counter() - start
        times = []
        with turns(command, ROOT, environment) as lerobot:
            # different rows each time, so that nothing is read twice
            for step in range(config.rounds + 1):
                rows = demos.rows_of_step(0, step, BATCH)
                batch = milliseconds(demos.batch, rows)
                pictures = milliseconds(read_pictures, demos, rows)
                times.append([batch, pictures, lerobot()])
    batches, pictures, theirs = np.array(times[1:]).T  # (rounds,) each; the first is slower
    # paid once, before the first step
    first = row_of("data, batches for a step of Stage II", batches, theirs)
    first["prepared_s"] = round(prepared)
    return [first, row_of("data, the pictures themselves", pictures, theirs)]
