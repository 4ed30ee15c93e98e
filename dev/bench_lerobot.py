"""lerobot's side of `python -m dev.bench --only data`: run by an interpreter that has lerobot.

    python dev/bench_lerobot.py FOLDER EPISODES BATCH

A batch of shuffled rows for each line on stdin, as lerobot's training script makes them: a frame of
every camera, the state, and a chunk of actions. Prints milliseconds, a line each.
"""

import sys
import time

HORIZON = 16  # actions of a row, as weights/nano's


def main():
    folder, episodes, batch_size = sys.argv[1:]
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

    fps = LeRobotDatasetMetadata("local/dataset", root=folder).fps
    chunk = {"action": [step / fps for step in range(HORIZON)]}
    chosen = list(range(int(episodes)))
    dataset = LeRobotDataset("local/dataset", folder, chosen, delta_timestamps=chunk)
    # no workers, as on the other side: the cores are few, and two that decode would hide the cost
    loader = torch.utils.data.DataLoader(dataset, int(batch_size), shuffle=True, drop_last=True)
    batches = iter(loader)
    next(batches)  # opens the films
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        # an epoch may end
        if next(batches, None) is None:
            batches = iter(loader)
            next(batches)
        print(1000 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
