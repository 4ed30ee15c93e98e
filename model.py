"""BLM: one set of weights that answers questions about pictures and drives every robot it was trained on.

    blm = BLM.from_pretrained("weights/nano")
    blm.answer([front, wrist], "Where is the red cube in the front view? Give a point.")       a string
    blm.act({"images": {"front": ..., "wrist": ...}, "state": ..., "instruction": "push the cube"}, "widowx")      (T, dof + 1) rad and m

A checkpoint folder:
    config.json, model.safetensors, tokenizer.json     the language model, as the hub's Qwen2.5-VL: a folder with only these answers
    policy.safetensors, policy.json                    the policy: weights and statistics; sizes, robots with the order and units of their numbers, and
                                                       which language model it reads (a hash), for it is useless on any other
    training.json                                      how each stage was made: command, seed, steps, figures

Letters: B batch, L tokens of the prompt, Dc width of the language model, T action horizon, S state dims.
"""
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cli import UserError, choose

from files import atomic, write_json
from policy import Policy, PolicyConfig
from checkpoint import config_dict, hub_weights
from processor import Processor
from vlm import VLM
from files import find_folder, read_json

VIEWS = ("front", "wrist")
VERSION = 1                              # of policy.json


def backbone_hash(vlm, processor, num_layers=None):
    """16 hex digits that name the weights behind a language model's hidden states after `num_layers` blocks (None: all weights), the same whether
    stored as float16 or float32. Blocks after k may be trained on: a policy that reads block k stays valid."""
    about = {**config_dict(vlm.config), "min_pixels": processor.image.min_pixels, "max_pixels": processor.image.max_pixels}
    digest, ran = hashlib.sha256(json.dumps(about, sort_keys=True).encode()), len(vlm.model.layers[:num_layers])
    later = (*(f"model.layers.{i}." for i in range(ran, len(vlm.model.layers))), *(("model.norm.", "lm_head.") if num_layers is not None else ()))
    for name, tensor in sorted(hub_weights(vlm.state_dict(), vlm.config).items()):
        if name.startswith(later):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy())
    return digest.hexdigest()[:16]


def describe(state_dim, action_dim):
    """Order and units of a robot's numbers, for whoever reads policy.json: data/robots.py has the frames."""
    joints = action_dim - 1
    state = [["joint angle", joints, "rad"], ["finger travel", 1, "m"], ["TCP position, base frame", 3, "m"], ["TCP rotation, first two columns", 6, "1"]]
    return {"state_dim": state_dim, "action_dim": action_dim, "state": state, "action": [["joint target", joints, "rad"], ["finger target", 1, "m"]]}


class BLM:
    """vlm a VLM and processor its Processor; policy a Policy or None; training {stage: its record}."""

    def __init__(self, vlm, processor, policy=None, training=None):
        self.vlm, self.processor, self.training = vlm.eval(), processor, training or {}
        self.policy = policy and policy.eval()
        self.device = next(vlm.parameters()).device

    # ---- digital space

    def answer(self, images, question, max_new_tokens=128, temperature=0.0, top_p=1.0, seed=None, stream=None):
        """The reply to `question` about `images` (PIL or uint8 (height, width, 3), a video as the list of its frames, two a second; maybe none), greedy at
        temperature 0. UserError if nothing is asked.

        stream(text) is called with every new piece of the reply, as it comes.
        """
        if not question.strip():
            raise UserError("the question is empty: ask something, as in --ask \"Where is the red cube?\"")
        batch = self.prompt([images], [question])
        ids, said = [], ""

        def piece(tokens):
            nonlocal said
            ids.append(tokens[0])
            text = self.processor.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):                             # half a character: its other bytes are still to come
                said, new = text, text[len(said):]
                stream(new)

        made = self.vlm.generate(**batch, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop_token_ids=self.stops(),
                                 stream=stream and piece)
        return self.processor.tokenizer.decode(made[0])

    def answers(self, images, questions, max_new_tokens=128, batch_size=16):
        """`answer`, greedy, for many: images and a question for each row, to a list of replies."""
        made = []
        for start in range(0, len(questions), batch_size):
            part = slice(start, start + batch_size)
            made += self.vlm.generate(**self.prompt(images[part], questions[part], side="left"), max_new_tokens=max_new_tokens, stop_token_ids=self.stops())
        return [self.processor.tokenizer.decode(ids) for ids in made]

    def prompt(self, images, texts, side="right"):
        """`Processor.prompt`, on the model's device."""
        return {name: tensor.to(self.device) for name, tensor in self.processor.prompt(images, texts, side).items()}

    def stops(self):
        """What ends a reply: the folder's stop tokens, and the chat template's."""
        special = self.processor.tokenizer.special
        return [*self.vlm.generation_config["eos_token_id"], special["<|im_end|>"], special["<|endoftext|>"]]

    # ---- physical space

    @torch.no_grad()
    def intent_states(self, images, instructions, num_layers=None):
        """[[front, wrist], ...] and an instruction each, to hidden states (B, L, Dc) behind block k and their mask (B, L) bool; later blocks do not run.

        The one place where the prompt for acting is made: `act` and the cache of train_policy.py both call it. num_layers is k where no policy is yet.
        """
        batch = self.prompt(images, instructions)
        hidden = self.vlm(**batch, num_layers=num_layers or self.policy.config.intent_layer).hidden_states[-1]
        return hidden, batch["attention_mask"].bool()

    def act(self, observation, robot, temperature=0.0, seed=None):
        """One chunk of targets, (T, dof + 1) float32: joint angles (rad) and the finger (m), for the next T control steps of 50 ms.

        observation {"images": {"front", "wrist": (height, width, 3) uint8}, "state": (S,) physical units, "instruction": str}.
        temperature scales the noise that the chunk flows from: at 1 a sample, as GR00T draws it; at 0 the flow starts from the noise's mean, gives one
        chunk for one observation, and is what eval.py measures unless told otherwise. seed (an integer or a list of them) fixes the
        noise. UserError on an unknown robot or anything of the wrong shape.
        """
        if self.policy is None:
            raise UserError("this model folder has no policy.safetensors: it answers, but does not act; train a policy with `python train_policy.py`")
        names = list(self.policy.embodiments)
        index = names.index(choose(robot, names, "robot"))
        state_dim, action_dim = self.policy.embodiments[robot]
        images, state, instruction = check(observation, robot, state_dim)
        hidden, mask = self.intent_states([images], [instruction])
        shape = (1, self.policy.config.action_horizon, self.policy.action_dim)
        noise = temperature * np.random.default_rng(seed).standard_normal(shape, np.float32) if temperature else np.zeros(shape, np.float32)
        padded = np.zeros((1, self.policy.state_dim), np.float32)
        padded[0, :state_dim] = state
        tensors = (torch.from_numpy(array).to(self.device) for array in (padded, np.array([index]), noise))
        return self.policy.sample(hidden, mask, *tensors)[0, :, :action_dim].cpu().numpy()

    # ---- the folder

    @classmethod
    def from_pretrained(cls, path_or_repo_id, device="cpu", dtype=torch.float32):
        """The model in a folder or on the hub, with its policy if it has one; dtype is the language model's. UserError on anything missing, broken, or
        from another model; nothing stays at random."""
        folder = find_folder(path_or_repo_id)
        if not folder.is_dir():
            raise UserError(f"no model folder {folder}; name one with --weights, or train one with `python train_sft.py` and `python train_policy.py`")
        vlm, processor = VLM.from_pretrained(folder, device, dtype), Processor.from_pretrained(folder)
        if len(processor.tokenizer) > vlm.config.vocab_size:
            raise UserError(f"{folder / 'tokenizer.json'} has {len(processor.tokenizer)} tokens, the model {vlm.config.vocab_size}: take both from one folder")
        here = [(folder / name).exists() for name in ("policy.json", "policy.safetensors")]
        if any(here) and not all(here):
            raise UserError(f"{folder} has one of policy.json and policy.safetensors without the other: copy both, or delete it")
        policy = load_policy(folder, vlm, processor).to(device) if all(here) else None
        return cls(vlm, processor, policy, load_training(folder))

    def save_pretrained(self, folder, dtype=None):
        """Write the whole folder, each file whole or not at all; dtype float16 halves it (statistics stay float32)."""
        self.vlm.save_pretrained(folder, dtype)
        self.processor.save_pretrained(folder)
        if self.policy is not None:
            self.save_policy(folder, dtype)
        if self.training:
            write_json(Path(folder) / "training.json", self.training)

    def save_policy(self, folder, dtype=None, weights=None, backbone=None):
        """Write policy.safetensors and policy.json beside their language model; weights {name: tensor} stand for the policy's own, backbone for the hash."""
        policy, kept = self.policy, {name: tensor.detach().cpu().contiguous() for name, tensor in (weights or self.policy.state_dict()).items()}
        weights = {name for name, _ in policy.named_parameters()}
        tensors = {name: tensor.to(dtype) if dtype and name in weights else tensor for name, tensor in kept.items()}
        with atomic(Path(folder) / "policy.safetensors") as path:
            save_file(tensors, path, metadata={"format": "pt"})
        robots = {name: describe(*sizes) for name, sizes in policy.embodiments.items()}
        about = {"version": VERSION, "config": dataclasses.asdict(policy.config), "condition_size": policy.condition_size, "embodiments": robots,
                 "views": list(VIEWS), "backbone": backbone or backbone_hash(self.vlm, self.processor, policy.config.intent_layer)}
        write_json(Path(folder) / "policy.json", about)


def check(observation, robot, state_dim):
    """([front, wrist], state, instruction) of an observation, or a UserError that says what is wrong with it."""
    missing = {"images", "state", "instruction"} - observation.keys()
    if missing:
        raise UserError(f"the observation lacks {', '.join(sorted(missing))}")
    absent = [view for view in VIEWS if view not in observation["images"]]
    if absent:
        raise UserError(f"the observation lacks the {absent[0]} picture: its images must be {' and '.join(VIEWS)}")
    images = [np.asarray(observation["images"][view]) for view in VIEWS]
    for view, image in zip(VIEWS, images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"the {view} picture must be uint8 (height, width, 3), not {image.dtype} {image.shape}")
    state = np.asarray(observation["state"], np.float32)
    if state.shape != (state_dim,):
        raise UserError(f"the state of {robot} has {state_dim} numbers (order and units: data/robots.py), not {state.shape}")
    if not np.isfinite(state).all():
        raise UserError(f"the state of {robot} holds a number that is not finite: {state.tolist()}")
    if not observation["instruction"].strip():
        raise UserError("the instruction is empty: say what to do, as in --instruction \"push the cube to the goal\"")
    return images, state, observation["instruction"]


def load_policy(folder, vlm, processor):
    """The Policy in `folder`, which must belong to `vlm`: every tensor's name and shape must match, so nothing is left at random."""
    path, weights = Path(folder) / "policy.json", Path(folder) / "policy.safetensors"
    found, advice = read_json(path), f"make it with `python train_policy.py --out {folder}`"
    if found.get("version") != VERSION:
        raise UserError(f"{path} has format version {found.get('version')}, this code reads {VERSION}; {advice}")
    try:
        embodiments = {name: (sizes["state_dim"], sizes["action_dim"]) for name, sizes in found["embodiments"].items()}
        policy = Policy(PolicyConfig(**found["config"]), found["condition_size"], embodiments)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a policy's description ({type(error).__name__}: {error}); {advice}") from None
    if found.get("backbone") != backbone_hash(vlm, processor, policy.config.intent_layer):
        raise UserError(f"{weights} was trained on another language model than {folder}/model.safetensors: take both from one folder, or {advice}")
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read weights {weights}: {getattr(error, 'strerror', None) or error}; is the file complete? Else {advice}") from None
    tensors = {name.replace("normaliser.", "normalizer."): tensor for name, tensor in tensors.items()}
    wanted = policy.state_dict()
    reshaped = {name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape}
    for what, names in (("missing", wanted.keys() - tensors.keys()), ("unknown", tensors.keys() - wanted.keys()), ("of another shape", reshaped)):
        if names:
            raise UserError(f"{weights} does not fit {path.name}: {len(names)} tensors {what}, first {min(names)}; {advice}")
    policy.load_state_dict(tensors)
    return policy.eval()


def load_training(folder):
    """{stage: record} of a folder's training.json, {} without one; Stage I writes its record bare."""
    path = Path(folder) / "training.json"
    found = read_json(path) if path.exists() else {}
    return {found["stage"]: found} if "stage" in found else found
