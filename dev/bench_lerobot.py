"""lerobot's side of `python -m dev.bench --only data`: run by an interpreter that has lerobot.

    python dev/bench_lerobot.py FOLDER EPISODES BATCH

For each line on stdin it makes a batch of shuffled rows, as in lerobot's training script: a frame
of every camera, the state, and a chunk of actions. Prints milliseconds, one line per batch.
"""

import sys
import time

HORIZON = 16  # actions per row, as in weights/nano


def main():
    folder, episodes, batch_size = sys.argv[1:]
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata

    fps = LeRobotDatasetMetadata("local/dataset", root=folder).fps
    chunk = {"action": [step / fps for step in range(HORIZON)]}
    chosen = list(range(int(episodes)))
    dataset = LeRobotDataset("local/dataset", folder, chosen, delta_timestamps=chunk)
    # no workers, as on the other side: with few cores, two that decode would hide the cost
    loader = torch.utils.data.DataLoader(dataset, int(batch_size), shuffle=True, drop_last=True)
    batches = iter(loader)
    next(batches)  # opens the videos
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        # the epoch may have ended
        if next(batches, None) is None:
            batches = iter(loader)
            next(batches)
        print(1000 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
