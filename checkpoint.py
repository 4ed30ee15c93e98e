"""The sizes of a VLM, the rule for reading a folder of weights, and the writing of one.

A folder holds config.json, sometimes generation_config.json, and model.safetensors (or shards and
their index). Only safetensors are read. weights/nano is such a folder too. What each version of
transformers writes for Qwen2.5-VL:

    4.49 to 4.51   config.json is flat; fields of the ViT that equal the class defaults are left
                   out; tensors visual.*, model.*, lm_head.*, as on the hub and as we write them
    4.52 to 4.56   the text fields are repeated in text_config, which can hold nulls where the top
                   level has values; raw state dicts (FSDP, ZeRO, verl) have model.visual.* and
                   model.language_model.*
    4.57 to 5.24   text_config only; rope_scaling is called rope_parameters and contains rope_theta
    others         language_model.model.*, language_model.lm_head.*; some also hold rotary inv_freq

Qwen3-VL has always had text_config only, model.visual.* and model.language_model.*, and we write it
that way too; rope_scaling and rope_theta moved as above. On the hub its dtype is in text_config.

eos_token_id may be a number or a list in both files; every one of them stops generation. If
config.json says tied but the file has a different lm_head, the file wins, as in transformers.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cli import UserError
from files import atomic, inside, read_json, reading, write_json

# the defaults of transformers' config classes; config files leave out fields that equal them
SPECIAL_TOKENS = {  # both models share one tokenizer
    "bos_token_id": 151643,  # <|endoftext|>
    "eos_token_id": 151645,  # <|im_end|>
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,  # <|image_pad|>
    "video_token_id": 151656,
}
TEXT_DEFAULTS = {
    "qwen2_5_vl": {  # the 72B's
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "mrope_section": (16, 24, 24),  # time, row, column
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        **SPECIAL_TOKENS,
    },
    "qwen3_vl": {  # no released model's
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,  # in the 4B and the 32B larger than hidden_size / num_attention_heads
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,  # 5e6 before transformers 5; every released file sets it
        "mrope_section": (24, 20, 20),
        "tie_word_embeddings": False,
        "max_position_embeddings": 128000,
        **SPECIAL_TOKENS,
    },
}
VISION_DEFAULTS = {
    "qwen2_5_vl": {
        "depth": 32,
        "hidden_size": 3584,  # no released model's: they all set it
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,  # pixels
        "fullatt_block_indexes": (7, 15, 23, 31),
        "tokens_per_second": 4,
    },
    "qwen3_vl": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 48 * 48,
        "deepstack_visual_indexes": (8, 16, 24),  # counted from 0
    },
}
HIDDEN_ACT = {"qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}  # in the ViT
RENAMED = (  # from any layout to the names on the hub
    (r"^(model\.language_model|language_model\.model)\.", "model."),
    (r"^(model|language_model)\.(visual|lm_head)\.", r"\2."),
)
# what a merger's layers are called here, and in Qwen3-VL's files
QWEN3_MERGER = (("ln_q", "norm"), ("mlp.0", "linear_fc1"), ("mlp.2", "linear_fc2"))
# integer tensors mean quantized weights, whatever they are called
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX = "model.safetensors.index.json"
ROWS_CHECKED = 4096  # rows of a tensor checked at a time
QUANTIZED = "the weights are quantized: take the model in float16, bfloat16 or float32"


# ---- configuration


SPECIAL_FIELDS = {
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


MOST_BLOCKS = 1000  # a damaged file may ask for so many that building never ends


@dataclass
class VisionConfig:
    """The ViT. Field names and meanings are Hugging Face's."""

    depth: int = 4
    hidden_size: int = 192
    intermediate_size: int = 384
    num_heads: int = 6
    out_hidden_size: int = 192  # the LLM's width
    patch_size: int = 16  # pixels
    spatial_merge_size: int = 2  # m
    temporal_patch_size: int = 2  # frames in a patch; a still image is shown twice
    window_size: int = 64  # pixels: side of the windows that most blocks attend within
    fullatt_block_indexes: tuple = (1, 3)  # the blocks that attend to the whole frame
    tokens_per_second: int = 2  # temporal positions per second of video
    model_type: str = "qwen2_5_vl"  # or "qwen3_vl"
    num_position_embeddings: int = 0  # rows of Qwen3-VL's position table, which is square
    deepstack_visual_indexes: tuple = ()  # the Qwen3-VL blocks that are followed by a merger

    def __post_init__(self):
        if self.qwen3:  # no windows
            self.fullatt_block_indexes = range(self.depth)
            assert self.num_position_embeddings > 0, "num_position_embeddings is below 1"
        self.fullatt_block_indexes = tuple(self.fullatt_block_indexes)
        self.deepstack_visual_indexes = tuple(self.deepstack_visual_indexes)
        token = self.patch_size * self.spatial_merge_size  # pixels
        assert self.window_size >= token, "window_size is smaller than a token"
        assert 0 < self.depth < MOST_BLOCKS, "depth is not a valid number of blocks"
        # half of a head's rotary pairs rotate with the row, the other half with the column
        assert self.hidden_size % (4 * self.num_heads) == 0, "hidden_size / num_heads / 4 is odd"

    @property
    def qwen3(self):
        return self.model_type == "qwen3_vl"


@dataclass
class VLMConfig:
    """The LLM, the special tokens and the ViT. Defaults are `nano`."""

    vocab_size: int = 1038
    hidden_size: int = 192
    intermediate_size: int = 384
    num_hidden_layers: int = 7
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    mrope_section: tuple = (4, 6, 6)  # rotary pairs of a head for time, row, column
    tie_word_embeddings: bool = True  # the embedding's weights also compute the logits
    max_position_embeddings: int = 4096
    bos_token_id: int = 1024  # <|endoftext|>
    eos_token_id: int = 1026  # <|im_end|>
    vision_start_token_id: int = 1033
    vision_end_token_id: int = 1034
    image_token_id: int = 1036
    video_token_id: int = 1037
    model_type: str = "qwen2_5_vl"  # or "qwen3_vl"
    head_dim: int | None = None  # Qwen3-VL sets it; otherwise hidden_size / num_attention_heads
    vision_config: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self):
        self.mrope_section = tuple(self.mrope_section)
        heads = self.num_attention_heads
        assert min(heads, self.num_key_value_heads, self.vocab_size) > 0, "a size is below 1"
        assert 0 < self.num_hidden_layers < MOST_BLOCKS, (
            "num_hidden_layers is not a valid number of blocks"
        )
        if self.head_dim is None:
            whole = self.hidden_size % heads == 0
            assert whole, "hidden_size is not a multiple of num_attention_heads"
            self.head_dim = self.hidden_size // heads
        assert heads % self.num_key_value_heads == 0, (
            "num_attention_heads is not a multiple of num_key_value_heads"
        )
        assert 2 * sum(self.mrope_section) == self.head_dim, "mrope_section is not half a head"
        assert self.vision_config.out_hidden_size == self.hidden_size, "out_hidden_size differs"
        assert self.vision_config.model_type == self.model_type, "model_type differs"

    @property
    def qwen3(self):
        return self.model_type == "qwen3_vl"

    @classmethod
    def from_pretrained(cls, folder):
        """The configuration in a folder. UserError if it is missing or another architecture."""
        fields = read_config(folder)
        with reading(Path(folder) / "config.json"):
            vision = VisionConfig(**fields.pop("vision_config"))
            return cls(**fields, vision_config=vision)

    def for_tokenizer(self, tokenizer):
        """A copy with this Tokenizer's vocabulary and special tokens."""
        ids = {name: tokenizer.special[token] for name, token in SPECIAL_FIELDS.items()}
        return dataclasses.replace(self, vocab_size=len(tokenizer), **ids)


def known(fields):
    return {name: value for name, value in fields.items() if value is not None}


def read_config(folder):
    """The fields of VLMConfig from a folder's config.json, vision_config as a dict.

    UserError on another architecture, quantized weights or adapters.
    """
    path = Path(folder) / "config.json"
    if (Path(folder) / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter: merge it first (peft's merge_and_unload)")
    with reading(path):
        content = read_json(path)
        kind = content.get("model_type")
        assert kind in TEXT_DEFAULTS, f"model_type is {kind!r}, none of {[*TEXT_DEFAULTS]}"
        assert not content.get("quantization_config"), QUANTIZED
        # the text fields: flat, nested, or both with nulls in one of them
        nested = content.get("text_config") or {}
        text = known(content) | known(nested)
        # tied if either says so
        text["tie_word_embeddings"] = content.get("tie_word_embeddings") or nested.get(
            "tie_word_embeddings", False
        )
        # M-RoPE's name and place have changed twice
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        text |= rope
        plain = rope.get("rope_type", rope.get("type", "default")) in ("default", "mrope")
        assert plain, "rope scaling is not supported: take a checkpoint without it"
        assert text.get("hidden_act", "silu") == "silu", "hidden_act is not silu"
        assert not text.get("use_sliding_window"), (
            "sliding windows are not supported: take a checkpoint without them"
        )
        # Qwen2.5-VL has biases, but its file has no option for them
        assert not text.get("attention_bias"), "attention_bias is not supported"
        vision = known(content.get("vision_config") or {})
        activation = vision.get("hidden_act", HIDDEN_ACT[kind])
        assert activation == HIDDEN_ACT[kind], f"the ViT's hidden_act is not {HIDDEN_ACT[kind]}"
        # fields that are left out have the class defaults
        fields = {name: text.get(name, value) for name, value in TEXT_DEFAULTS[kind].items()}
        vision = {name: vision.get(name, value) for name, value in VISION_DEFAULTS[kind].items()}
    if fields["tie_word_embeddings"] and has_own_head(folder):
        fields["tie_word_embeddings"] = False
    kind = {"model_type": kind}  # the ViT's own model_type has had other names
    return {**fields, **kind, "vision_config": {**vision, **kind}}


def config_fields(config):
    """{name: value} of the VLMConfig fields that this architecture has, vision_config as a dict.

    This is what config.json stores and what a policy's hash covers, so adding an architecture with
    new fields changes neither.
    """
    fields = dataclasses.asdict(config)
    vision = fields["vision_config"]
    text = {name: fields[name] for name in TEXT_DEFAULTS[config.model_type]}
    vision = {name: vision[name] for name in VISION_DEFAULTS[config.model_type]}
    return {**text, "vision_config": vision}


def read_generation_config(folder, config):
    """{"eos_token_id": [every stop], "repetition_penalty"} for a folder with this VLMConfig."""
    path = Path(folder) / "generation_config.json"
    content = known(read_json(path)) if path.exists() else {}
    with reading(path):
        penalty = content.get("repetition_penalty", 1.0)
        assert isinstance(penalty, (int, float)) and penalty > 0, (
            "repetition_penalty must be a positive number"
        )
        stops = []  # every token that any of the files calls an end
        for ids in (content.get("eos_token_id", []), config.eos_token_id, config.bos_token_id):
            stops += ids if isinstance(ids, list) else [ids]
        return {"eos_token_id": sorted(set(map(int, stops))), "repetition_penalty": penalty}


def stored_dtype(folder):
    """The dtype that config.json names for the weights; float16 unless float32 or bfloat16."""
    content = read_json(Path(folder) / "config.json")
    nested = content.get("text_config") or {}
    name = content.get("dtype") or content.get("torch_dtype") or nested.get("dtype")
    return getattr(torch, name) if name in ("float32", "bfloat16") else torch.float16


# ---- weights


def our_name(name):
    """A tensor's name on the hub, from any of the layouts above; None for what is computed here."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return None if name.endswith("inv_freq") else name


def weight_files(folder):
    # large models come in shards, which the index names
    index = Path(folder) / INDEX
    if not index.exists():
        return [Path(folder) / "model.safetensors"]
    with reading(index):
        names = sorted(set(read_json(index)["weight_map"].values()))
        return [inside(folder, name) for name in names]


def tensors_of(folder, only=""):
    """Yield (file, hub name, tensor) for the names that match the pattern `only`, sorted by name.

    Each tensor gets a memory mapping of its own, which is released at once, so memory peaks at one
    tensor.
    """
    found = []
    for path in weight_files(folder):
        with reading(path, "is the file complete?"), safe_open(path, "pt") as file:
            names = file.keys()
        found += [(our_name(stored) or "", path, stored) for stored in names]
    for name, path, stored in sorted(found):
        if name and re.match(only, name):
            with reading(path, "is the file complete?"), safe_open(path, "pt") as file:
                tensor = file.get_tensor(stored)
            yield path, name, tensor
            del tensor  # otherwise it would stay in memory while the next one is read


def has_own_head(folder):
    """Do the files hold an lm_head that differs from the embedding?"""
    tables = [tensor for *_, tensor in tensors_of(folder, r"lm_head|model\.embed_tokens")]
    return len(tables) == 2 and not torch.equal(*tables)


def hub_weights(weights, config):
    """{our name: tensor} as {hub name: view}: q, k and v are separate there, as are gate and up."""
    kv = config.num_key_value_heads * config.head_dim
    views = {}
    for name, tensor in weights.items():
        rows = len(tensor)
        layer = name.split(".")[-2]
        # one matrix product here, separate tensors on the hub
        fused = {
            "qkv_proj": {"q_proj": rows - 2 * kv, "k_proj": kv, "v_proj": kv},
            "gate_up_proj": {"gate_proj": rows // 2, "up_proj": rows // 2},
        }
        parts = fused.get(layer, {layer: rows})
        if config.qwen3 and "merger" in name:  # the same layers, under other module names
            for ours, theirs in QWEN3_MERGER:
                name = name.replace(ours, theirs)
        for part, view in zip(parts, tensor.split(list(parts.values()))):
            views[name.replace(layer, part)] = view
    return views


def load_weights(model, folder, device="cpu", dtype=torch.float32):
    """Copy a folder's tensors into `model`, which is on the meta device.

    UserError unless every name and shape matches and every number is finite, so nothing stays
    uninitialized. Memory peaks at the weights plus one tensor.
    """
    # allocate all weights, then fill them through views that have the hub's names
    model.to(dtype).to_empty(device=device)
    views = hub_weights(model.state_dict(), model.config)
    for path, name, tensor in tensors_of(folder):
        if name == "lm_head.weight" and model.lm_head is None:
            continue  # tied, and stored twice
        with reading(path, "does it fit config.json?"):
            assert tensor.dtype in FLOATS, QUANTIZED
            assert name in views, f"unexpected tensor {name}"
            view = views.pop(name)
            shapes = f"{name} has shape {list(tensor.shape)}, wanted {list(view.shape)}"
            assert tensor.shape == view.shape, shapes
            view.copy_(tensor)  # this also casts
            del tensor
            # an embedding table is a tenth of a model: check it in parts
            finite = all(part.isfinite().all() for part in view.split(ROWS_CHECKED))
            assert finite, f"{name} holds numbers that are not finite in {dtype}"
    if views:  # they would stay uninitialized
        missing = f"{len(views)} tensors missing, first {min(views)}"
        raise UserError(f"{folder} does not fit config.json: {missing}")


# ---- writing


def config_json(config):
    """config.json for a VLMConfig, in the hub's layout."""
    kind = config.model_type
    fields = config_fields(config)
    rope = {"mrope_section": fields.pop("mrope_section")}
    fields["vision_config"] |= {"model_type": kind, "hidden_act": HIDDEN_ACT[kind]}
    fields = {"model_type": kind, "hidden_act": "silu", **fields}
    # the two architectures keep the same fields in different places
    if not config.qwen3:  # flat, which all versions read
        fields["vision_config"]["in_chans"] = 3
        fields["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
        return fields | {"rope_scaling": {"type": "mrope", **rope}}
    vision = fields.pop("vision_config") | {"in_channels": 3}
    # the text fields in text_config; special token ids there and at the top
    about = {"model_type": kind, "architectures": ["Qwen3VLForConditionalGeneration"]}
    about |= {name: fields[name] for name in (*SPECIAL_TOKENS, "tie_word_embeddings")}
    fields["rope_scaling"] = {"rope_type": "default", "mrope_interleaved": True, **rope}
    fields["model_type"] = "qwen3_vl_text"
    return {**about, "text_config": fields, "vision_config": vision}


def save_model(model, folder, dtype, weights):
    """Write a VLM's files with these weights {name: tensor}, each file whole or not at all."""
    folder = Path(folder)
    dtype = dtype or next(iter(weights.values())).dtype
    config = config_json(model.config)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", model.generation_config)
    tensors = {}
    for name, tensor in hub_weights(weights, model.config).items():
        if model.config.qwen3:  # the only one of the layouts above that transformers reads here
            name = re.sub("^model", "model.language_model", name)
            name = re.sub("^visual", "model.visual", name)
        tensors[name] = tensor.detach().to("cpu", dtype).contiguous()
    with atomic(folder / "model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_index(folder, tensors, sum(tensor.nbytes for tensor in tensors.values()))


def write_index(folder, names, size):
    # vLLM reads every safetensors file that is not excluded by an index, even policy.safetensors
    weight_map = dict.fromkeys(names, "model.safetensors")
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / INDEX, index)


def copy_model(source, folder):
    """Copy a VLM's files to another folder without loading them, each whole or not at all."""
    source = Path(source).absolute()
    folder = Path(folder)
    paths = [source / name for name in ("config.json", "generation_config.json", INDEX)]
    for path in [*weight_files(source), *filter(Path.exists, paths)]:
        with atomic(folder / path.relative_to(source)) as new:  # shards may be in subfolders
            shutil.copyfile(path, new)
    if not (source / INDEX).exists():
        path = folder / "model.safetensors"
        with safe_open(path, "pt") as file:
            write_index(folder, list(file.keys()), path.stat().st_size)


# ---- what a policy belongs to


def backbone_hash(vlm, processor, num_layers, dtype=None):
    """16 hex digits that identify everything the hidden states after block `num_layers` depend on.

    That is configuration, weights, image settings and tokenizer. Later blocks may be trained
    without invalidating a policy that reads block `num_layers`. The hash is the same for weights in
    float16 and in float32; dtype: compute the hash that the model will have once stored in that
    type.
    """
    weights = sorted(hub_weights(vlm.state_dict(), vlm.config).items())
    weights = ((name, tensor.to("cpu", dtype)) for name, tensor in weights)
    return hash_of(vlm.config, processor, num_layers, weights)


def folder_hash(folder, config, processor, num_layers):
    """`backbone_hash` of the model in a folder, with one tensor in memory at a time."""
    weights = ((name, tensor) for _, name, tensor in tensors_of(folder))
    return hash_of(config, processor, num_layers, weights)


def hash_of(config, processor, num_layers, weights):
    # what the tokenizer does, not its file: versions of the library write it differently
    tokenizer = json.loads(processor.tokenizer.fast.to_str())
    # one version of the library writes a merge as "a b", another as ["a", "b"]
    merges = tokenizer["model"]["merges"]
    settings = [
        config_fields(config),
        dataclasses.asdict(processor.image),
        tokenizer["pre_tokenizer"],
        processor.tokenizer.fast.get_vocab(),
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    ]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    blocks = range(num_layers, config.num_hidden_layers)
    unread = ("model.norm.", "lm_head.", *(f"model.layers.{i}." for i in blocks))
    for name, tensor in weights:
        if not name.startswith(unread):
            digest.update(name.encode())
            digest.update(tensor.to(torch.float16).contiguous().numpy())
    return digest.hexdigest()[:16]
