"""How fast the parts are, each beside its peer or its limit on this machine.

    python bench.py vlm          vlm.py against Hugging Face transformers (pip install -r requirements-test.txt), the same random weights in both
    python bench.py engine       demonstrations a minute; what of an episode's time is physics and drawing
    python bench.py sft          Stage I's step: rows packed end to end against rows padded to the longest
    python bench.py policy       Stage II's step with hidden states cached and computed anew; acting; a head as large as a peer's, beside its figures

Every figure is the median of runs that take turns, ours and theirs, since machines are noisy. Results are printed and written as JSON.
"""
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError, at_least, choose, parse, pick_device, run

from files import writable, write_json
from data.robots import ROBOTS, get_robot
from data.tasks import TASKS
from model import BLM, VIEWS
from policy import Policy, PolicyConfig
from processor import Tokenizer, collate
from train_policy import TrainConfig
from trainer import make_optimizers
from vlm import PRESETS, VLM, VisionConfig, VLMConfig
from processor import process_images

GENERATED = 32


@dataclass
class BenchConfig:
    runs: int = 7                # timed runs of each side
    threads: int = 0             # CPU threads; 0: all cores
    device: str = "auto"         # auto, cpu, cuda or mps
    out: str = ""                # result file; default out/results/bench-<what>.json


LARGER = VLMConfig(vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=2,
                   mrope_section=(8, 12, 12), min_pixels=224 * 224, max_pixels=224 * 224, bos_token_id=8000, eos_token_id=8001, vision_start_token_id=8002,
                   vision_end_token_id=8003, image_token_id=8004, video_token_id=8005,
                   vision_config=VisionConfig(depth=6, hidden_size=384, intermediate_size=1024, num_heads=6, out_hidden_size=512, patch_size=14,
                                              window_size=56, fullatt_block_indexes=(2, 5)))


def median_ms(sides, runs, sync):
    """Median milliseconds of each function of `sides`, which take turns; the first round is not counted."""
    times = [[] for _ in sides]
    for i in range(runs + 1):
        for side, seconds in zip(sides, times):
            start = time.perf_counter()
            side()
            sync()
            seconds.append(time.perf_counter() - start)
    return [1000 * float(np.median(seconds[1:])) for seconds in times]


def limits(device, sync, n=2048):
    """(GFLOP/s of a float32 matrix product, GB/s of a copy): what this machine can do."""
    a, b = torch.randn(n, n, device=device), torch.randn(1 << 26, device=device)
    product, copy = median_ms([lambda: a @ a, lambda: b.clone()], 5, sync)
    return 2 * n ** 3 / product / 1e6, 2 * b.nbytes / copy / 1e6


def prompt(config, batch, text=72, seed=0):
    """A batch of one picture and `text` tokens each; token types for transformers, which uses plain positions in silence without them."""
    rng, side = np.random.default_rng(seed), int(config.min_pixels ** 0.5)
    pixel_values, grids = process_images([rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for _ in range(batch)], config)
    places = int(grids[0].prod()) // config.vision_config.spatial_merge_size ** 2
    words = torch.from_numpy(rng.integers(0, min(config.bos_token_id, config.eos_token_id), (batch, text)))
    ids = torch.cat([torch.full((batch, 1), config.vision_start_token_id), torch.full((batch, places), config.image_token_id),
                     torch.full((batch, 1), config.vision_end_token_id), words], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values, "image_grid_thw": grids}


def flops(model, batch):
    """Of one forward pass: two for each weight and token, and attention's two products."""
    config, vision = model.config, model.config.vision_config
    weights = lambda module: sum(p.numel() for p in module.parameters() if p.ndim > 1)
    (B, L), patches, merge = batch["input_ids"].shape, len(batch["pixel_values"]), vision.spatial_merge_size ** 2
    each = patches // B
    see = patches * (weights(model.visual.patch_embed) + weights(model.visual.blocks)) + patches // merge * weights(model.visual.merger)
    window = min(each, (vision.window_size // vision.patch_size) ** 2)
    for i in range(vision.depth):
        see += 2 * patches * vision.hidden_size * (each if i in vision.fullatt_block_indexes else window)
    read = B * L * (weights(model.model.layers) + model.model.embed_tokens.weight.numel()) + config.num_hidden_layers * B * L * L * config.hidden_size
    return 2 * (see + read)


def bench_vlm(config):
    try:
        import transformers
    except ImportError:
        raise UserError("bench.py vlm needs transformers: pip install -r requirements-test.txt") from None
    transformers.logging.set_verbosity_error()
    device = pick_device(config.device)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    peak, bandwidth = limits(device, sync)
    rows = []
    for size, shape in tqdm((("nano", PRESETS["nano"]), ("ten times nano", LARGER)), desc="sizes"):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            VLM(shape).save_pretrained(folder)
            ours = VLM.from_pretrained(folder, device)
            theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        parameters, read = (sum(p.numel() for p in part.parameters()) for part in (ours, ours.model))
        for batch_size in (1, 8, 16):
            batch = {name: tensor.to(device) for name, tensor in prompt(shape, batch_size).items()}
            more, L = {"mm_token_type_ids": (batch["input_ids"] == shape.image_token_id).int()}, batch["input_ids"].shape[1]

            @torch.no_grad()
            def prefill(model, **more):
                return model(**batch, **more).logits

            def train(model, **more):
                logits = model(**batch, **more).logits[:, :-1]
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()).backward()
                model.zero_grad(set_to_none=True)

            def continue_ours():
                ours.generate(**batch, max_new_tokens=GENERATED, stop_token_ids=[-1])

            def continue_theirs():
                theirs.generate(**batch, **more, max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False, pad_token_id=shape.bos_token_id)

            assert torch.allclose(prefill(ours), prefill(theirs, **more), atol=1e-4)
            jobs = {1: [("prefill", lambda: prefill(ours), lambda: prefill(theirs, **more)), ("generate", continue_ours, continue_theirs)],
                    8: [("generate", continue_ours, continue_theirs)],
                    16: [("prefill", lambda: prefill(ours), lambda: prefill(theirs, **more)), ("train", lambda: train(ours), lambda: train(theirs, **more))]}
            for what, mine, peer in jobs[batch_size]:
                ms, peer_ms = median_ms([mine, peer], config.runs, sync)
                row = {"size": size, "parameters": parameters, "what": what, "batch": batch_size, "tokens": L, "ms": round(ms, 2), "transformers_ms": round(peer_ms, 2),
                       "ratio": round(peer_ms / ms, 2)}
                if what == "generate":                     # the prompt counted as well, as a user waits for it; the LLM's weights are read once a token
                    row["tokens_per_s"] = round(1000 * GENERATED * batch_size / ms, 1)
                    row["of_bandwidth"] = round(4 * read * GENERATED / ms / 1e6 / bandwidth, 3)
                else:
                    row["of_peak"] = round((3 if what == "train" else 1) * flops(ours, batch) / ms / 1e6 / peak, 3)
                rows.append(row)
    machine = {**about_machine(device), "transformers": transformers.__version__, "matrix_product_gflops": round(peak, 1), "copy_gb_s": round(bandwidth, 1)}
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    print("| size | what | batch | ours ms | transformers ms | times as fast | of this machine's limit |\n" + "|---" * 7 + "|")
    for row in rows:
        limit = f"{100 * row['of_peak']:.0f}% of matrix peak" if "of_peak" in row else f"{100 * row['of_bandwidth']:.0f}% of bandwidth, {row['tokens_per_s']:.0f} tokens/s"
        print(f"| {row['size']}, {row['parameters'] / 1e6:.1f} M | {row['what']} | {row['batch']} | {row['ms']:.1f} | {row['transformers_ms']:.1f} | {row['ratio']:.2f} | {limit} |")
    return {"what": "vlm", "machine": machine, "rows": rows}


def about_machine(device):
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "") if os.path.exists("/proc/cpuinfo") else platform.processor()
    return {"device": torch.cuda.get_device_name() if device.type == "cuda" else cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


# lerobot's port of the GR00T N1.5 head: 10.9 M parameters, 88 condition tokens, 16 steps ahead, 4 Euler steps, float32, on a machine like this one, two cores
PEER = {"chunk": (121, 141), "train": (650, 780)}    # ms: a chunk at batch 1, a training step at batch 16
PEER_SIZED = PolicyConfig(hidden_size=320, num_layers=6, num_heads=8, future_layer=4)


def rows_of(policy, n, tokens, device):
    """A batch of random rows, as Policy.forward wants them."""
    generator, T, A = torch.Generator().manual_seed(0), policy.config.action_horizon, policy.action_dim
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    batch = {"hidden": normal(n, tokens, policy.condition_size), "future_hidden": normal(n, tokens, policy.condition_size), "state": normal(n, policy.state_dim),
             "action": normal(n, T, A), "embodiment": (torch.arange(n) % len(policy.embodiments)).sort().values}
    masks = {"mask": torch.ones(n, tokens, dtype=torch.bool), "future_valid": torch.ones(n, dtype=torch.bool)}
    batch |= masks | {"future_mask": masks["mask"]} | policy.draw(n, generator)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def bench_policy(config):
    device, n = pick_device(config.device), TrainConfig.batch_size
    sync, rng = torch.cuda.synchronize if device.type == "cuda" else lambda: None, np.random.default_rng(0)
    blm = BLM.from_pretrained("weights/nano", device)
    pictures = [[rng.integers(0, 255, (128, 128, 3), dtype=np.uint8) for _ in VIEWS] for _ in range(2 * n)]
    instruction = "stack the red cube on the green cube"

    def stepper(policy, batch, half=False):
        optimizers = make_optimizers((policy,), TrainConfig(), torch.bfloat16 if half else torch.float32)

        def step(**more):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = policy({**batch, **more})["loss"]
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return step

    def trainable(config, condition_size):
        policy = Policy(config, condition_size, {robot: (get_robot(robot).state_dim, get_robot(robot).action_dim) for robot in ROBOTS}).to(device)
        policy.normalizer.fitted[:] = True
        return policy

    def cached_and_anew(seer, k, runs, half=False):
        """Milliseconds of a step from cached hidden states behind block k of a model, and of one that computes them."""
        tokens = seer.intent_states(pictures[:1], [instruction], k)[0].shape[1]
        policy = trainable(blm.policy.config, seer.vlm.config.hidden_size)
        step = stepper(policy, rows_of(policy, n, tokens, device), half)

        def anew():                                  # a frame and the one T steps later, as train_policy.py would without its cache; pictures are there already
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                now, later = (seer.intent_states(part, [instruction] * n, k)[0] for part in (pictures[:n], pictures[n:]))
            step(hidden=now, future_hidden=later)
        return median_ms([step, anew], runs, sync)

    cached_ms, anew_ms = cached_and_anew(blm, blm.policy.config.intent_layer, config.runs)
    half_cached_ms, half_anew_ms = cached_and_anew(blm, blm.policy.config.intent_layer, config.runs, half=True)
    larger = BLM(VLM(LARGER.for_tokenizer(blm.tokenizer)).to(device), blm.tokenizer)
    large_cached_ms, large_anew_ms = cached_and_anew(larger, LARGER.num_hidden_layers // 2, min(3, config.runs))
    robot = ROBOTS[0]
    seen = {"images": dict(zip(VIEWS, pictures[0])), "state": np.zeros(get_robot(robot).state_dim, np.float32), "instruction": instruction}
    act_ms, = median_ms([lambda: blm.act(seen, robot)], 5 * config.runs, sync)
    head = trainable(PEER_SIZED, 320)
    small, large = rows_of(head, 1, 88, device), rows_of(head, 16, 88, device)
    chunk_ms, train_ms = median_ms([lambda: head.sample(small["hidden"], small["mask"], small["state"], small["embodiment"], small["noise"]), stepper(head, large)], config.runs, sync)
    size = sum(p.numel() for p in head.parameters()) / 1e6
    rows = [{"what": f"Stage II, a step of {n} rows from cached hidden states", "ms": cached_ms, "beside": [anew_ms], "beside_what": "computed anew"},
            {"what": "the same, `--dtype bfloat16`", "ms": half_cached_ms, "beside": [half_anew_ms], "beside_what": "computed anew"},
            {"what": "the same in float32, the language model ten times as large", "ms": large_cached_ms, "beside": [large_anew_ms], "beside_what": "computed anew"},
            {"what": "act, one chunk", "ms": act_ms, "beside": [], "beside_what": ""},
            {"what": f"a head of {size:.1f} M, 88 tokens: one chunk", "ms": chunk_ms, "beside": PEER["chunk"], "beside_what": "GR00T N1.5's head in lerobot"},
            {"what": f"a head of {size:.1f} M, 88 tokens: a training step of 16", "ms": train_ms, "beside": PEER["train"], "beside_what": "GR00T N1.5's head in lerobot"}]
    machine = about_machine(device)
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()) + "\n\n| what | ms | beside, ms | times as fast |\n" + "|---" * 4 + "|")
    for row in rows:
        row["ratio"] = [round(other / row["ms"], 2) for other in row["beside"]]
        print(f"| {row['what']} | {row['ms']:.1f} | {row['beside_what']} {' to '.join(f'{x:.0f}' for x in row['beside'])} | {' to '.join(map(str, row['ratio']))} |")
    return {"what": "policy", "machine": machine, "rows": rows}


def bench_engine(config):
    """Episodes a minute of the recorder, all cells once, on all cores; and how much of an episode's time is MuJoCo's physics and drawing, which no change here can save."""
    import mujoco
    from data.env import CONTROL_HZ, TabletopEnv
    from data.expert import demonstrate
    from data.record import RecordConfig, record
    workers, cells = config.threads or os.cpu_count() or 1, len(ROBOTS) * len(TASKS)
    with tempfile.TemporaryDirectory() as folder:
        record(RecordConfig(episodes=1, workers=workers, out=folder))                    # processes start, models compile
        start = time.perf_counter()
        record(RecordConfig(episodes=10, seed=1000, workers=workers, out=folder))
        a_minute = 60 * 10 * cells / (time.perf_counter() - start)
    env, inside = TabletopEnv("widowx", "StackCube"), {"physics": 0.0, "drawing": 0.0}

    def timed(name, function):
        def call(*args, **options):
            start = time.perf_counter()
            result = function(*args, **options)
            inside[name] += time.perf_counter() - start
            return result
        return call

    demonstrate(env, 0)
    env.draw = timed("drawing", env.draw)
    with mock.patch.object(mujoco, "mj_step", timed("physics", mujoco.mj_step)):
        start = time.perf_counter()
        rows = [len(demonstrate(env, seed).states) for seed in range(1, config.runs + 1)]
        whole = time.perf_counter() - start
    machine, share = about_machine(torch.device("cpu")), {name: round(seconds / whole, 3) for name, seconds in inside.items()}
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{a_minute:.0f} episodes a minute on {workers} processes")
    print(f"an episode of {np.mean(rows) / CONTROL_HZ:.1f} s takes {1000 * whole / len(rows):.0f} ms, of which MuJoCo: "
          + ", ".join(f"{name} {100 * part:.0f}%" for name, part in share.items()))
    return {"what": "engine", "machine": machine, "episodes_a_minute": round(a_minute, 1), "workers": workers, "episode_ms": round(1000 * whole / len(rows), 1), "of_limit": share}


def bench_sft(config):
    """Stage I's step on the default mixture, forward and backward: the same rows packed end to end, padded to the longest of them, and packed with matrix products
    in bfloat16."""
    import train_sft
    device, cfg = pick_device(config.device), train_sft.SFTConfig(dense_weight=0)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    train_sft.ensure_data(cfg)
    mixture, tokenizer = train_sft.Mixture(cfg), Tokenizer.from_pretrained("weights/nano")
    model, rows = VLM.from_pretrained("weights/nano", device).train(), []
    for name, which in (("the default mixture", lambda source: True), ("conversations of the second source alone", lambda source: source == 1)):
        chosen = [row for step in range(20) for row in mixture.rows_of_step(step, cfg.batch_size) if which(row[1])][:cfg.batch_size]
        packed = train_sft.make_batch([train_sft.read_row(mixture.sources[source], number, index, cfg) for number, source, index in chosen], tokenizer, model.config, cfg)
        lines = list(zip(*([part.tolist() for part in packed[key][0].split([sum(lengths) for lengths in packed["segments"]])] for key in ("input_ids", "labels"))))
        vision = {key: packed[key] for key in ("pixel_values", "image_grid_thw") if key in packed}
        padded = {key: torch.as_tensor(value) for key, value in collate(lines, model.config.bos_token_id, side="right").items()} | vision

        def train(batch, half=False):
            batch = train_sft.move(batch, device)
            learned = batch["labels"][:, 1:] >= 0
            inputs = {key: batch[key] for key in (*train_sft.INPUTS, "attention_mask") if key in batch}
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = model(**inputs, logits_at=torch.nn.functional.pad(learned, (0, 1))).logits
            torch.nn.functional.cross_entropy(logits.float(), batch["labels"][:, 1:][learned]).backward()
            model.zero_grad(set_to_none=True)

        tokens = packed["input_ids"].numel()
        ms, padded_ms, half_ms = median_ms([lambda: train(packed), lambda: train(padded), lambda: train(packed, half=True)], config.runs, sync)
        rows.append({"what": name, "rows": len(chosen), "tokens": tokens, "padded_tokens": padded["input_ids"].numel(), "ms": round(ms, 1), "padded_ms": round(padded_ms, 1),
                     "bfloat16_ms": round(half_ms, 1), "tokens_per_s": round(1000 * tokens / ms), "ratio": round(padded_ms / ms, 2)})
    machine = about_machine(device)
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()) + "\n\n| rows | tokens | with padding | packed ms | padded ms | packed, bfloat16 ms | tokens/s packed | times as fast as padded |\n" + "|---" * 8 + "|")
    for row in rows:
        print(f"| {row['rows']} of {row['what']} | {row['tokens']} | {row['padded_tokens']} | {row['ms']:.0f} | {row['padded_ms']:.0f} | {row['bfloat16_ms']:.0f} | {row['tokens_per_s']} | {row['ratio']} |")
    return {"what": "sft", "machine": machine, "rows": rows}


BENCHES = {"engine": bench_engine, "vlm": bench_vlm, "sft": bench_sft, "policy": bench_policy}


def main():
    if sys.argv[1:2] in (["--help"], ["-h"]):
        print(__doc__ + "\npython bench.py <what> --help lists the flags")
        return
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UserError(f"say what to time: python bench.py {' | '.join(BENCHES)}")
    what = choose(sys.argv[1], BENCHES, "benchmark")
    config = parse(BenchConfig, description=__doc__.split("\n")[0], argv=sys.argv[2:])
    at_least(config, 1, "runs"), at_least(config, 0, "threads")
    out = config.out or f"out/results/bench-{what}.json"
    writable(Path(out).parent)
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    result = BENCHES[what](config)
    write_json(out, result)
    print(f"written to {out}")


if __name__ == "__main__":
    run(main)
