"""How fast the parts are, alone or compared with another commit or with other packages.

    python -m dev.bench                               only the current tree
    python -m dev.bench --against v1 --only act       compare with a commit, both sides in turns
    python -m dev.bench --only transformers           vlm.py and Hugging Face transformers
    python -m dev.bench --only serve                  `act` through serve.py, and `act` alone
    python -m dev.bench --only data --dataset FOLDER --lerobot PYTHON       and lerobot's loader
    python -m dev.bench --only metaworld              images, and Meta-World's own renderer
    python -m dev.bench --only libero                 images, and LIBERO's own renderer
    python -m dev.bench --only gpu                    the large sizes on a large GPU: bench_gpu.py

    act            one chunk of the shipped policy: two images, a state, an instruction
    prefill        one forward pass of the shipped language model, batch 1
    generate       32 tokens after the same prompt
    engine         one demonstration with its images: planning, physics, rendering
    sft            a step of train_sft.py on rows with an image and a question
    policy         a step of train_policy.py from cached hidden states
    transformers   prefill, generate and a training step of Qwen2_5_VLForConditionalGeneration
    serve          what the server adds to a chunk, and eight clients that never pause
    data           batches of an imported LeRobotDataset (dev/bench_data.py)
    gpu            act, decode and a step of both stages at 3 B, both stages of nano

Machines are noisy, so the sides take turns, each in its own process, and a ratio is the median over
rounds of the ratio of two adjacent times. Results are written as JSON with the machine and both
commits.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cli import UserError, at_least, choose_many, command_line, parse, pick_device, run
from dev import bench_side
from files import writable, write_json

ROOT = Path(__file__).parent.parent
TRAININGS = ("sft", "policy")
PARTS = (*bench_side.PARTS, *TRAININGS)
STEPS = 30  # training steps per round
SKIPPED = 5  # initial steps that are not counted
SFT_ROWS = 96


@dataclass
class BenchConfig:
    only: str = "all"  # comma-separated parts, all of them, or one that has its own line above
    against: str = ""  # commit to compare with; empty: only the current tree
    rounds: int = 15  # turns of each side; a fifth of that for trainings
    threads: int = 0  # CPU threads; 0: all cores
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "float32"  # dtype of the trainings
    seconds: int = 60  # how long the clients of serve run
    dataset: str = ""  # folder of the LeRobotDataset for data
    lerobot: str = ""  # Python interpreter that has lerobot, for data
    sft_flags: str = ""  # additional flags that the other commit's train_sft.py needs
    out: str = "out/results/bench.json"  # result file


def git(*words):
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git {shlex.join(words)}: {done.stderr}")
    return done.stdout.strip()


@contextmanager
def checked_out(commit):
    """A worktree of another commit, for the duration of the block."""
    with tempfile.TemporaryDirectory() as folder:
        git("worktree", "add", "--detach", folder, commit)
        try:
            yield Path(folder)
        finally:
            git("worktree", "remove", "--force", folder)


def about_machine(device, threads):
    name = platform.processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1] for line in lines if line.startswith("model name")), name)
    return {"device": name.strip(), "threads": threads, "torch": torch.__version__}


def environment(tree, threads):
    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}


# ---- parts timed by a process, one turn at a time


def side(tree, part, device, threads):
    """`process_turns` of a part in a tree."""
    command = [sys.executable, str(ROOT / "dev" / "bench_side.py"), part, device.type]
    return process_turns(command, tree, environment(tree, threads))


@contextmanager
def process_turns(command, tree, environment):
    """A function that has another process do its part once, and returns milliseconds."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    process = subprocess.Popen(command, cwd=tree, env=environment, **pipes)

    def answer():
        while line := process.stdout.readline():
            if line.startswith("ready"):
                return 0.0
            try:
                return float(line)
            except ValueError:  # other output of the tree
                continue
        raise UserError(f"`{shlex.join(command)}` ended in {tree}: see above")

    def turn():
        process.stdin.write("\n")
        return answer()

    try:
        answer()
        yield turn
    finally:
        process.stdin.close()
        process.wait()


# ---- trainings: the scripts themselves, timed by their logs


def write_rows(folder):
    """A conversations file of random images, each with a question."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(SFT_ROWS):
        pixels = rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        asked = {"from": "human", "value": "<image>\nWhat color is the object nearest to you?"}
        told = {"from": "gpt", "value": "It is red, and lies beside a green cube. " * (1 + i % 3)}
        lines.append(json.dumps({"image": f"{i}.png", "conversations": [asked, told]}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")


def script(tree, words, threads):
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tree,
        env=environment(tree, threads),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"`python {shlex.join(words)}` in {tree}: {done.stderr[-500:]}")


@contextmanager
def training(tree, part, config, threads):
    """A function that trains for a few steps in a tree, and returns milliseconds per step."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        common = f"--steps {STEPS} --eval_every 1000 --backbone weights/nano --dtype {config.dtype}"
        common += f" --device {config.device}"
        if part == "sft":
            write_rows(folder)
            command = f"train_sft.py --data {folder}/rows.jsonl {common}"
            if tree != ROOT:
                command += f" {config.sft_flags}"
        else:
            demos = f"-m data.record --robots widowx,panda --tasks PushCube --out {folder}/demos"
            script(tree, shlex.split(f"{demos} --episodes 8"), threads)
            command = f"train_policy.py --data {folder}/demos --cache {folder}/cache {common}"
        count = 0

        def turn():
            nonlocal count
            count += 1
            out = folder / f"out{count}"
            script(tree, shlex.split(f"{command} --out {out}"), threads)
            lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            first, last = lines[SKIPPED], lines[-2]  # the last one may include an evaluation
            return 1000 * (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])

        turn()  # fills the cache
        yield turn


def compare(part, trees, config, device, threads):
    """Milliseconds of a part in each tree, and the median of their ratios."""
    rounds = config.rounds
    with ExitStack() as stack:
        if part in TRAININGS:
            rounds = max(1, rounds // 5)
            sides = [training(tree, part, config, threads) for tree in trees]
        else:
            sides = [side(tree, part, device, threads) for tree in trees]
        turns = [stack.enter_context(each) for each in sides]
        times = np.array([[turn() for turn in turns] for _ in range(rounds)])  # (rounds, sides)
    row = {"what": part, "ms": round(float(np.median(times[:, 0])), 2), "rounds": rounds}
    if len(trees) > 1:
        row["against_ms"] = round(float(np.median(times[:, 1])), 2)
        row["times_as_fast"] = round(float(np.median(times[:, 1] / times[:, 0])), 3)
    return row


# ---- transformers


def beside_transformers(config, device):
    """Rows like those of `compare`, with the same shipped weights on both sides."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "install transformers first: pip install -r requirements-test.txt"
        ) from None
    from vlm import VLM

    ours = VLM.from_pretrained(ROOT / "weights" / "nano", device)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        ROOT / "weights" / "nano", dtype=torch.float32
    ).to(device)
    inputs = bench_side.prompt(ours.config, device)
    ids = inputs["input_ids"]
    types = {"mm_token_type_ids": (ids == ours.config.image_token_id).int()}
    new = {"max_new_tokens": bench_side.GENERATED}
    fixed = {"min_new_tokens": bench_side.GENERATED, "do_sample": False}

    def train(model, **more):
        logits = model(**inputs, **more).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    forward = torch.no_grad()(lambda model, **more: model(**inputs, **more))
    parts = {
        "prefill": (lambda: forward(ours), lambda: forward(theirs, **types)),
        "generate": (
            lambda: ours.generate(**inputs, **new, stop_token_ids=[-1]),
            lambda: theirs.generate(**inputs, **types, **new, **fixed),
        ),
        "train": (lambda: train(ours), lambda: train(theirs, **types)),
    }
    rows = []
    for name, jobs in parts.items():
        times = []
        for _ in range(config.rounds + 1):
            for job in jobs:
                start = time.perf_counter()
                job()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(1000 * (time.perf_counter() - start))
        pairs = np.array(times[2:]).reshape(-1, 2)  # without the first round, which is slower
        row = {"what": name, "ms": round(float(np.median(pairs[:, 0])), 2), "rounds": config.rounds}
        row["against_ms"] = round(float(np.median(pairs[:, 1])), 2)
        row["times_as_fast"] = round(float(np.median(pairs[:, 1] / pairs[:, 0])), 3)
        rows.append(row)
    return rows, f"transformers {transformers.__version__}"


def main():
    config = parse(BenchConfig, description="How fast the parts are.")
    at_least(config, 1, "rounds", "seconds")
    at_least(config, 0, "threads")
    writable(Path(config.out).parent)
    device = pick_device(config.device)
    config.device = str(device)
    threads = config.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    machine = about_machine(device, threads)
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if config.only == "transformers":
        rows, against = beside_transformers(config, device)
    elif config.only == "serve":
        from dev import bench_serve  # its packages are extras

        rows = bench_serve.measure(config, environment(ROOT, threads))
        against = "act alone"
    elif config.only == "data":
        from dev import bench_data  # needs the extras for LeRobotDatasets

        rows = bench_data.measure(config, process_turns, environment(ROOT, threads), device)
        against = "lerobot's loader"
    elif config.only == "metaworld":
        from dev import bench_metaworld  # its packages are extras

        rows = bench_metaworld.measure(config.rounds)
        against = "its own renderer, CPU time"
    elif config.only == "libero":
        from dev import bench_libero  # its packages are extras

        rows = bench_libero.measure(config.rounds)
        against = "its own renderer, CPU time"
    elif config.only == "gpu":
        from dev import bench_gpu

        config.dtype = "bfloat16"
        stages = [partial(compare, part, [ROOT], config, device, threads) for part in TRAININGS]
        rows = bench_gpu.measure(device, dict(zip(TRAININGS, stages)))
        against = ""
    else:
        parts = choose_many(config.only, PARTS, "part")
        against = config.against and git("rev-parse", "--short", f"{config.against}^{{commit}}")
        with ExitStack() as stack:
            trees = [ROOT]
            if against:
                trees.append(stack.enter_context(checked_out(against)))
            rows = []
            for part in parts:
                rows.append(compare(part, trees, config, device, threads))
                print(rows[-1], flush=True)
    print(f"\n| what | ms | {against or 'alone'}, ms | times as fast |\n|---|---|---|---|")
    for row in rows:
        others = f"{row.get('against_ms', '')} | {row.get('times_as_fast', '')}"
        print(f"| {row['what']} | {row['ms']} | {others} |")
    result = {"machine": machine, "commit": git("rev-parse", "--short", "HEAD")}
    result |= {"against": against, "rows": rows, "command": command_line()}
    write_json(config.out, result)
    print(f"written to {config.out}")


if __name__ == "__main__":
    run(main)
