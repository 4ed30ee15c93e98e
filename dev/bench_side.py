"""One side of dev/bench.py: prepares a part, then times it once for each line on stdin.

    python dev/bench_side.py act cpu        in the tree to measure, with PYTHONPATH at its root

Prints milliseconds, one line per run. It uses only functions that all commits have.
"""

import sys
import time

import numpy as np
import torch

GENERATED = 32  # tokens
WORDS = 72  # tokens of text in a prompt
VIEWS = ("front", "wrist")
STATE_DIM = 16  # the WidowX's


def observation(state_dim):
    """The input that `BLM.act` is timed on: two images of noise, a state of zeros."""
    rng = np.random.default_rng(0)
    pictures = {view: rng.integers(0, 255, (128, 128, 3), dtype=np.uint8) for view in VIEWS}
    return {
        "images": pictures,
        "state": np.zeros(state_dim, np.float32),
        "instruction": "stack the red cube on the green cube",
    }


def act(device):
    from model import BLM

    blm = BLM.from_pretrained("weights/nano", device)
    seen = observation(STATE_DIM)
    return lambda: blm.act(seen, "widowx")


def prompt(config, device):
    """One image of 8 x 8 patches, and WORDS random words."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (1, 18 + WORDS), generator=generator)
    ids[0, 0] = config.vision_start_token_id
    ids[0, 1:17] = config.image_token_id  # 2 x 2 patches each
    ids[0, 17] = config.vision_end_token_id
    vision = config.vision_config
    numbers = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64, numbers, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def prefill(device):
    from vlm import VLM

    vlm = VLM.from_pretrained("weights/nano", device)
    inputs = prompt(vlm.config, device)
    return torch.no_grad()(lambda: vlm(**inputs))


def generate(device):
    from vlm import VLM

    vlm = VLM.from_pretrained("weights/nano", device)
    inputs = prompt(vlm.config, device)
    return lambda: vlm.generate(**inputs, max_new_tokens=GENERATED, stop_token_ids=[-1])


def engine(device):
    from data.env import TabletopEnv
    from data.expert import demonstrate

    env = TabletopEnv("widowx", "StackCube")
    return lambda: demonstrate(env, 1)


PARTS = {"act": act, "prefill": prefill, "generate": generate, "engine": engine}


def main():
    part, device = sys.argv[1:]
    job = PARTS[part](device)
    job()  # the first run is slower
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        job()
        if device == "cuda":
            torch.cuda.synchronize()
        print(1000 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
