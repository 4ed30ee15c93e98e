"""BLM: one set of weights that answers questions about images and drives every robot it knows.

    blm = BLM.from_pretrained("weights/nano")
    blm.answer([front, wrist], "Where is the red cube in the front view? Give a point.")  # a string
    observation = {"images": {"front": ..., "wrist": ...}, "state": ..., "instruction": "push it"}
    blm.act(observation, "widowx")  # (T, dof + 1), rad and m

A model folder:

    config.json, generation_config.json, model.safetensors   the language model, as on the hub
    tokenizer*.json, preprocessor_config.json                the processor; enough to answer

    policy.safetensors      the policy's weights and statistics
    policy.json             its sizes, its robots (embodiment.py), and a hash of the language model
                            whose hidden states it reads: with any other it is useless
    training.json           how each stage was trained: command, seed, steps, figures

Letters: B batch, L tokens of the prompt, Dc width of the language model, T action horizon, A and S
action and state dims.
"""

import dataclasses
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoint import VLMConfig, backbone_hash, folder_hash
from cli import UserError, choose
from data.media import middle_square, to_rgb
from embodiment import VIEWS, Embodiment
from files import atomic, find_folder, read_json, reading, write_json
from inpainting import soft_mask
from policy import Policy, PolicyConfig, waypoint_head
from processor import Processor
from vlm import VLM

# of policy.json; 2 had no waypoint head, 2 and 3 no text_first, 2 to 4 the same cameras for all
VERSION = 5
LARGEST_STATE = 10  # rad, m: no joint turns this far; a larger number is probably in degrees
FARTHEST = 5.0  # times a robot's usual magnitude, for robots whose states really are in degrees


class BLM:
    """vlm a VLM, processor its Processor; policy a Policy or None; training {stage: record}.

    vlm is None while a policy is trained or inspected: the language model is not loaded then.
    """

    def __init__(self, vlm, processor, policy=None, training=None, device="cpu"):
        self.vlm = vlm and vlm.eval()
        self.processor = processor
        self.policy = policy and policy.eval()
        self.training = training or {}
        self.device = next(vlm.parameters()).device if vlm else device

    def prompt(self, images, texts, **options):
        """The processor's inputs for a list of images and a text per row, on the model's device."""
        batch = self.processor.prompt(images, texts, **options)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    # ---- digital space

    def answer(self, images, question, **options):
        """The reply to `question` about `images`. Each call stands alone: there is no history.

        images: PIL or uint8 (height, width, 3); a video is the list of its frames, two per second;
        the list may be empty. options: see `answers`.
        """
        return self.answers([images], [question], **options)[0]

    def answers(self, images, questions, **options):
        """Replies [str] to a batch of questions, each about its own list of images.

        options of `VLM.generate`: max_new_tokens; temperature (0: greedy); seed.
        """
        for question in questions:
            check_text("question", question)
        tokenizer = self.processor.tokenizer
        # a reply ends at the chat template's end tokens and at the folder's stop tokens
        stops = [tokenizer.special["<|im_end|>"], tokenizer.special["<|endoftext|>"]]
        stops += self.vlm.generation_config["eos_token_id"]
        batch = self.prompt(images, questions, side="left")
        replies = self.vlm.generate(**batch, stop_token_ids=stops, **options)
        return [tokenizer.decode(ids) for ids in replies]

    # ---- physical space

    def require_policy(self):
        """The policy. UserError if there is none."""
        if self.policy is None:
            advice = "train a policy with `python train_policy.py`"
            raise UserError(
                f"this model has no policy: it can answer questions but not act; {advice}"
            )
        return self.policy

    @torch.no_grad()
    def intent_states(self, images, instructions, num_layers=None, text_first=False):
        """What the language model makes of each robot's list of images and its instruction.

        Returns the hidden states (B, L, Dc) after block k and their mask (B, L) bool; later blocks
        do not run. Prompts for acting are built only here: `act` and data/demonstrations.py call
        it. num_layers (k) and text_first are for callers that have no policy yet. With the
        instruction first, image tokens can attend to it, since attention is causal.
        """
        if self.policy is not None:
            text_first = self.policy.config.text_first
        batch = self.prompt(images, instructions, text_first=text_first)
        if self.policy is not None:  # before the network runs
            self.policy.check_length(batch["input_ids"].shape[1])
        k = num_layers or self.policy.config.intent_layer
        hidden = self.vlm(**batch, num_layers=k).hidden_states[-1]  # (B, L, Dc)
        return hidden, batch["attention_mask"].bool()

    def act(self, observation, robot, temperature=0.0, seed=None, committed=None, planned=()):
        """One chunk of targets, (T, A) float32, for the robot's next T control steps.

        For the simulator's arms A is dof + 1: joint angles (rad) and the finger (m), in steps of 50
        ms. For other robots their Embodiment describes the numbers. observation: see
        `read_observation`. temperature scales the noise that the flow starts from: 1 draws a
        sample, as GR00T does; 0 starts from the mean of the noise and always gives the same chunk
        for the same observation, which is what eval.py measures. seed (an integer or a list of
        them) fixes the noise. UserError on an unknown robot and on anything wrong with the
        observation.

        For an arm that keeps moving while this is computed (inpainting.py): committed (n, A), maybe
        empty, are the targets that it will execute meanwhile, in physical units, and planned (m, A)
        are the ones that follow in the previous chunk. The new chunk starts with the committed
        targets, and stays close to the planned ones at first, then less and less.
        """
        policy = self.require_policy()
        names = list(policy.embodiments)
        index = names.index(choose(robot, names, "robot"))
        embodiment = policy.embodiments[robot]
        usual = policy.normalizer.state_mean[index].abs() + policy.normalizer.state_std[index]
        largest = max(LARGEST_STATE, FARTHEST * float(usual.max()))
        images, numbers, instruction = read_observation(observation, embodiment, largest)
        hidden, mask = self.intent_states([images], [instruction])

        state = torch.zeros(1, policy.state_dim)  # padded to S
        state[0, : embodiment.state_dim] = torch.from_numpy(numbers)
        shape = (1, policy.config.action_horizon, policy.action_dim)
        with reading("temperature and seed"):  # numpy's noise is the same on every device
            noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
            noise = torch.from_numpy(temperature * noise)
        inputs = [state, torch.tensor([index]), noise]
        if committed is not None:
            known, weight = read_targets(committed, planned, shape, embodiment.action_dim)
            inputs += [known, weight]
        inputs = [part.to(self.device) for part in inputs]
        chunk = policy.sample(hidden, mask, *inputs).cpu()  # (1, T, A)
        if committed is not None:  # the committed targets are executed anyway: keep their bits
            chunk = torch.where(weight[:, None] < 1, chunk, known)
        chunk = chunk[0, :, : embodiment.action_dim].numpy()
        if not np.isfinite(chunk).all():
            raise UserError(f"the chunk for {robot} is not finite: are the weights damaged?")
        return chunk

    # ---- the folder

    @classmethod
    def from_pretrained(cls, path_or_repo_id, device="cpu", dtype=torch.float32, vlm=True):
        """The model in a folder or on the hub, with its policy if it has one.

        dtype is the language model's; vlm=False does not load it. UserError if anything is missing,
        broken, or from another model; nothing stays uninitialized.
        """
        folder = find_folder(path_or_repo_id)
        if not folder.is_dir():
            advice = "name one with --weights, or train one with `python train_sft.py`"
            raise UserError(f"no model folder {folder}; {advice}")
        processor = Processor.from_pretrained(folder)
        config = VLMConfig.from_pretrained(folder)
        vlm = VLM.from_pretrained(folder, device, dtype) if vlm else None
        with reading(folder / "tokenizer.json", "use the tokenizer that came with the weights"):
            # the embedding table has no rows for more
            size = config.vocab_size
            assert len(processor.tokenizer) <= size, f"more tokens than the model's {size}"
        policy = None
        if list(folder.glob("policy.[js]*")):  # if one is missing, it is reported
            policy = load_policy(folder, config, processor).to(device)
        return cls(vlm, processor, policy, load_training(folder), device)

    def save_pretrained(self, folder, dtype=None):
        """Write the whole folder, each file whole or not at all.

        dtype float16 halves its size (statistics stay float32).
        """
        self.vlm.save_pretrained(folder, dtype)
        self.processor.save_pretrained(folder)
        if self.policy is not None:
            self.save_policy(folder, dtype)
        if self.training:
            write_json(Path(folder) / "training.json", self.training)

    def push_to_hub(self, repo_id, results=(), private=False, dtype=None):
        """Upload the folder with a model card to user/name on the hub; returns the commit's URL.

        results: eval.py's result files about this model, for the card. private: if the repository
        is new. UserError without a token or a connection. To upload a folder as it is, see hub.py.
        """
        from hub import push  # imported here because hub imports this module

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            return push(folder, repo_id, results, private)

    def save_policy(self, folder, dtype=None, weights=None, backbone=None):
        """Write policy.safetensors and policy.json next to their language model.

        weights {name: tensor} replace the policy's own; backbone replaces the hash of a language
        model that is no longer loaded.
        """
        policy = self.policy
        k = policy.config.intent_layer
        tensors = {  # float16 is too coarse for statistics
            name: tensor.to("cpu", None if name.startswith("normalizer.") else dtype)
            for name, tensor in (weights or policy.state_dict()).items()
        }
        robots = {}
        for name, embodiment in policy.embodiments.items():
            # with an index, because JSON objects have no order
            robots[name] = {"index": len(robots), **dataclasses.asdict(embodiment)}
        about = {
            "version": VERSION,
            "config": dataclasses.asdict(policy.config),
            "embodiments": robots,
            "backbone": backbone or backbone_hash(self.vlm, self.processor, k, dtype),
        }
        # the description last: weights without one are refused when loading
        with atomic(Path(folder) / "policy.safetensors") as path:
            save_file(tensors, path, metadata={"format": "pt"})
        write_json(Path(folder) / "policy.json", about)


# ---- checking what callers pass in


def check_text(name, text):
    """UserError if a question or an instruction is not a string, or is empty."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"the {name} is {text!r}: it must be a non-empty string")


def to_array(numbers, ndim):
    """Lists, arrays or tensors of any dtype and device, as numpy; a batch of one is unpacked."""
    if isinstance(numbers, torch.Tensor):
        if numbers.is_floating_point():
            numbers = numbers.float()  # numpy has no bfloat16
        numbers = numbers.numpy(force=True)
    numbers = np.asarray(numbers)
    return numbers[0] if numbers.ndim == ndim + 1 and len(numbers) == 1 else numbers


def to_square(picture):
    """A picture as uint8 (side, side, 3), center-cropped if not square. UserError if it is none.

    PIL in any mode, uint8 or floats in 0..1, height x width x 3 or 3 x height x width, possibly a
    batch of one.
    """
    if not isinstance(picture, Image.Image):
        picture = to_array(picture, 3)
        if picture.shape[:1] == (3,) != picture.shape[2:]:  # channels first, as in torch
            picture = picture.transpose(1, 2, 0)
        if picture.dtype.kind == "f":
            fine = picture.min() >= 0 and picture.max() <= 1  # NaN fails both
            assert fine, "a picture of floats must lie in 0..1"
            picture = (picture * 255).round().astype(np.uint8)
    picture = np.asarray(to_rgb(picture))
    square = middle_square(picture)
    if square.shape != picture.shape:  # Python shows the same warning only once
        height, width, _ = picture.shape
        side = len(square)
        warnings.warn(
            f"a camera of {width}x{height} is center-cropped to {side}x{side}: "
            "the policy takes square images",
            stacklevel=4,
        )
    return square


def read_observation(observation, embodiment, largest=LARGEST_STATE):
    """([picture of each camera], state (S,) float64, instruction) of an observation, checked.

    observation: {"images": {camera: picture, see `to_square`}, "state": S numbers in the robot's
    order and units, "instruction": str}, as arrays, lists or tensors. The cameras are "front" and
    "wrist", or whatever the robot calls its own. No number of the state may be larger than
    `largest`. UserError says what is wrong.
    """
    S = embodiment.state_dim
    cameras = ", ".join(f'"{view}"' for view in embodiment.views)
    form = f'{{"images": {{{cameras}}}, "state": {S} numbers, "instruction": text}}'
    with reading("the observation", f"it must be {form}; the numbers: {embodiment.state}"):
        images = {view: observation["images"][view] for view in embodiment.views}
        instruction = observation["instruction"]
        check_text("instruction", instruction)
        # rejects complex numbers and text
        state = to_array(observation["state"], 1).astype(np.float64, casting="same_kind")
        assert state.shape == (S,), f"the state has the shape {state.shape}"
        # NaN fails this too
        fine = np.abs(state) <= largest
        assert fine.all(), f"the state is not finite, or too large: {state[~fine]}"
    squares = []
    for view, picture in images.items():
        with reading(f"the {view} picture"):
            squares.append(to_square(picture))
    return squares, state, instruction.strip()  # as in training


def read_targets(committed, planned, shape, action_dim):
    """(targets (1, T, A), how strongly each step is tied to them (T,)) for `act`, checked.

    shape is (1, T, A). UserError says what is wrong.
    """
    known = torch.zeros(shape)
    first = 0
    for name, targets in (("committed", committed), ("planned", planned)):
        room = shape[1] - first
        form = f"they must be at most {room} rows of {action_dim} numbers in rad and m"
        with reading(f"the {name} targets", form):
            targets = to_array(targets, 2).astype(np.float32, casting="same_kind")
            if not targets.size:
                targets = targets.reshape(0, action_dim)
            fine = targets.shape[1:] == (action_dim,) and len(targets) <= room
            assert fine, f"they have the shape {targets.shape}"
            assert np.isfinite(targets).all(), "they are not finite"
        known[0, first : first + len(targets), :action_dim] = torch.from_numpy(targets)
        first += len(targets)
    return known, soft_mask(len(committed), first, shape[1])


# ---- loading a policy and its record


def load_policy(folder, vlm_config, processor):
    """The Policy in `folder`, which must belong to the language model there.

    Every tensor's name and shape must match and every number be finite.
    """
    path = folder / "policy.json"
    weights = folder / "policy.safetensors"
    advice = f"take both from one folder, or make them with `python train_policy.py --out {folder}`"
    tensors = {}
    with reading(weights, advice):
        for name, tensor in load_file(weights).items():
            assert tensor.isfinite().all(), f"{name} holds numbers that are not finite"
            assert not name.endswith("_std") or tensor.min() > 0, f"{name} is not positive"
            name = name.replace("normaliser", "normalizer")  # as in the shipped weights
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor

    about = read_json(path, advice)
    with reading(path, advice):
        version = about["version"]
        assert version in range(2, VERSION + 1), (
            f"format version {version}, this code reads 2 to {VERSION}"
        )
        sizes = about["config"]
        if version < 4:
            sizes["text_first"] = False
        counted = "version 4 of --text_first numbered the prompt's tokens from its beginning"
        assert version > 4 or not sizes["text_first"], counted
        if version == 2:  # a head that only training needs starts anew
            sizes |= {"num_waypoints": 4, "waypoint_loss_weight": 1.0}
            head = waypoint_head(PolicyConfig(**sizes)).state_dict()
            tensors |= {f"waypoint_head.{name}": tensor for name, tensor in head.items()}
        if version < 5:  # one set of cameras for all robots; now each has its own
            assert about["views"] == list(VIEWS), f"views {about['views']}"
        config = PolicyConfig(**sizes)
        assert sizes == vars(config), "sizes are missing in config"
        # before a network of a million layers is built
        assert config.num_layers + config.perceiver_layers < len(tensors), "too many layers"
        embodiments = {}
        robots = about["embodiments"]
        for name in sorted(robots, key=lambda name: robots[name]["index"]):
            assert robots[name].pop("index") == len(embodiments), "robots without an index"
            with reading(f"the robot {name}"):
                embodiments[name] = Embodiment(**robots[name])
        with torch.device("meta"):  # only shapes
            policy = Policy(config, vlm_config.hidden_size, embodiments)
        backbone = folder_hash(folder, vlm_config, processor, config.intent_layer)
        differs = "it was trained on another language model, tokenizer or size of pictures"
        assert about["backbone"] == backbone, differs
    with reading(weights, f"it does not fit {path.name}; {advice}"):
        policy.load_state_dict(tensors, assign=True)  # names and shapes must match
        assert policy.normalizer.fitted.all(), "a robot has no statistics"
    return policy


def load_training(folder):
    """{stage: record} of a folder's training.json, or {}: a hub model has none."""
    path = Path(folder) / "training.json"
    return read_json(path) if path.exists() else {}
