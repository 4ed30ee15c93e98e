"""Damage every kind of file that is read, slightly and at random.

    python -m dev.fuzz                       3,000 mutations of each kind of file
    python -m dev.fuzz --mutations 300 --only config.json,episode

A damaged file must load, or give a one-line error. A mutation of a JSON file replaces, removes or
doubles one value, at any depth; one of a binary file flips a bit, truncates the file, or fills a
stretch with zeros. tests/test_fuzz.py runs a few of each.
"""

import copy
import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from cli import UserError, at_least, choose_many, parse, run
from data.conversations import Conversations
from data.record import Episode
from embodiment import Embodiment
from files import Tensors, save_tensors
from model import BLM
from nano import scenes

VALUES = (
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    10**30,
    "",
    "x",
    "\ud83d",
    "../../etc",
    [],
    [[]],
    {},
    {"x": 1},
)
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mrope_section": (2, 2, 2),
}


@dataclass
class FuzzConfig:
    mutations: int = 3000  # mutations of each kind of file
    only: str = "all"  # kinds of file, comma-separated, or all
    seed: int = 0  # seed of everything


# ---- mutations


def places(value, path=()):
    """Every path into a JSON value, as keys and indices."""
    yield path
    pairs = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        pairs = enumerate(value)
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def mutate_json(text, rng):
    """JSON `text` with one value replaced, removed or doubled."""
    value = {"root": json.loads(text)}
    path = rng.choice([path for path in places(value) if path])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    deed = rng.choice(("replace", "remove", "double"))
    if deed == "remove" and len(path) > 1:
        del holder[path[-1]]
    elif deed == "double" and isinstance(holder[path[-1]], list):
        holder[path[-1]] = holder[path[-1]] * 2
    else:
        holder[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(value["root"])


def mutate_bytes(content, rng):
    """Bytes with a bit flipped, the end cut off, or a stretch of zeros."""
    content = bytearray(content)
    # headers are short, but most of what can go wrong is in them
    place = rng.randrange(min(len(content), 2000) if rng.random() < 0.5 else len(content))
    deed = rng.choice(("flip", "cut", "zeros"))
    if deed == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif deed == "cut":
        del content[place:]
    else:
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    return bytes(content)


# ---- the files, and how they are read


def make_model(folder):
    """A tiny model folder with a policy."""
    from checkpoint import VisionConfig, VLMConfig
    from policy import Policy, PolicyConfig
    from processor import ImageConfig, Processor, train_tokenizer
    from vlm import VLM

    torch.manual_seed(0)
    tokenizer = train_tokenizer(["system user assistant: what is it? a red cube"] * 3, 280)
    vision = VisionConfig(
        depth=1,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        out_hidden_size=48,
        fullatt_block_indexes=(0,),
    )
    vlm = VLM(VLMConfig(**SMALL, vision_config=vision).for_tokenizer(tokenizer))
    sizes = {"intent_layer": 1, "hidden_size": 16, "num_heads": 2, "num_layers": 1}
    policy = Policy(PolicyConfig(**sizes, future_layer=1), 48, {"widowx": Embodiment(16, 7)})
    policy.normalizer.fitted[:] = True
    BLM(vlm, Processor(tokenizer, ImageConfig()), policy, {"sft": {"step": 1}}).save_pretrained(
        folder
    )


def make_conversations(folder):
    question = {"question": "What is it?", "answer": "a cube", "category": "x", "form": "words"}
    records = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"questions": [question], "images": [], "grounding": []},
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "rows.jsonl").write_text("".join(lines))


def make_episode(folder):
    from types import SimpleNamespace

    from data.record import write_episode

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    episode = SimpleNamespace(
        images=[{"front": picture, "wrist": picture}] * 3,
        states=rng.normal(size=(3, 16)).astype(np.float32),
        actions=rng.normal(size=(3, 7)).astype(np.float32),
        phases=["move"] * 3,
        success=True,
        attempts=1,
        instruction="push the cube",
    )
    about = {"robot": "widowx", "task": "PushCube", "seed": 0, "noise": 0.0}
    write_episode(folder / "widowx-PushCube-0.safetensors", episode, about)


def read_rows(path):
    rows = Conversations(path, "skip")
    return [rows.row(i) for i in range(len(rows))]


def read_episode(path):
    episode = Episode(path)
    return [episode.images(t) for t in range(len(episode))]


def read_model(path):
    """Load the model and act: what loads must also work."""
    blm = BLM.from_pretrained(path.parent)
    picture = np.zeros((32, 32, 3), np.uint8)
    images = {"front": picture, "wrist": picture}
    blm.act({"images": images, "state": np.zeros(16), "instruction": "push"}, "widowx")


MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "policy.json",
    "training.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "model.safetensors",
    "policy.safetensors",
)
# kind: (function that makes it, its file, function that reads it)
KINDS = {name: (make_model, name, read_model) for name in MODEL_FILES}
KINDS["conversations"] = (make_conversations, "rows.jsonl", read_rows)
KINDS["episode"] = (make_episode, "widowx-PushCube-0.safetensors", read_episode)
KINDS["tensors"] = (
    lambda folder: save_tensors(folder / "a.safetensors", {"a": np.ones(9)}, {"step": 3}),
    "a.safetensors",
    lambda path: Tensors(path).check()["a"],
)
KINDS["made.json"] = (
    lambda folder: (folder / "made.json").write_text(
        '{"scenes": 1, "checksums": {"val.jsonl": 0}}'
    ),
    "made.json",
    lambda path: scenes.Scenes(path.parent, "val"),
)


def fuzz(kind, mutations, seed):
    """Mutate a file of this kind and read it, `mutations` times. Returns how many were refused."""
    make, name, read = KINDS[kind]
    rng = random.Random(f"{kind} {seed}")
    refused = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder)
        path = folder / name
        whole = path.read_bytes()
        for _ in trange(mutations, desc=kind, leave=False):
            if name.endswith(".json"):
                content = mutate_json(whole, rng).encode(errors="surrogatepass")
            elif name.endswith(".jsonl"):
                lines = whole.decode().splitlines()
                place = rng.randrange(len(lines))
                lines[place] = mutate_json(lines[place], rng)
                content = "\n".join(lines).encode(errors="surrogatepass")
            else:
                content = mutate_bytes(whole, rng)
            path.write_bytes(content)
            try:
                read(path)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
            except Exception:
                keep = Path(tempfile.gettempdir()) / f"fuzz-{kind}"
                shutil.copy(path, keep)
                print(f"the file that broke it: {keep}")
                raise
    return refused


def main():
    config = parse(FuzzConfig, description="Damage every file that is read, a little, at random.")
    at_least(config, 1, "mutations")
    torch.set_grad_enabled(False)
    for kind in choose_many(config.only, KINDS, "kind"):
        refused = fuzz(kind, config.mutations, config.seed)
        print(f"{kind}: {refused} of {config.mutations} refused in one line, the others load")


if __name__ == "__main__":
    run(main)
