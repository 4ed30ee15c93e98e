"""checkpoint.py keeps its promises: every layout loads, all else is one line."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from small import (
    SHAPES,
    picture,
    prompts,
    random_model,
    small_config,
    small_tokenizer,
    token_types,
    with_transformers,
)

from checkpoint import VisionConfig, VLMConfig, copy_model, read_config
from cli import UserError
from files import read_json
from processor import ImageConfig, Tokenizer, chat, process_images
from vlm import VLM


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="parity: pip install transformers")
    return with_transformers(transformers, tmp_path_factory.mktemp("model"))


def test_checkpoint_saved_by_transformers_loads(reference, tokenizer, tmp_path):
    ours, theirs = reference["untied, multi-head"]
    theirs.save_pretrained(tmp_path)
    again = VLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values())
    )
    assert again.config == ours.config


def test_bf16_shards_of_transformers_load_with_the_same_logits(reference, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, theirs = reference["tied, grouped"]
    copy.deepcopy(theirs).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2 and "text_config" in json.loads(
        (tmp_path / "config.json").read_text()
    )
    again, batch = VLM.from_pretrained(tmp_path), prompts(tokenizer, ours.config)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        expected = theirs(**batch, mm_token_type_ids=token_types(batch, ours.config)).logits
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(
            again(**batch).logits[real], expected[real], atol=1e-4, rtol=1e-4
        )
    half = VLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        near = (half(**batch).logits[real].float() - expected[real]).abs()
    assert near.mean() < 0.05 * expected[real].std()


def test_hub_names_are_fetched_and_their_absence_is_one_line(tokenizer, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    model = random_model(small_config(tokenizer))
    model.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns, ignore_patterns: asked.append(name) or str(tmp_path),
    )
    again = VLM.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
    assert asked == ["Qwen/Qwen2.5-VL-3B-Instruct"] and torch.equal(
        again.model.norm.weight, model.model.norm.weight
    )

    def absent(name, allow_patterns, ignore_patterns):
        raise LocalEntryNotFoundError("several lines\nof advice")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(UserError, match="Qwen/Nothing.*no such folder.*no connection"):
        VLM.from_pretrained("Qwen/Nothing")
    for local in (
        "tests/nowhere",
        "./Qwen/Nothing",
        "/Qwen/Nothing",
        "Qwen",
    ):  # these folders do not exist; the hub is not contacted
        with pytest.raises(UserError, match="cannot read"):
            VLM.from_pretrained(local)


def test_save_and_load_round_trip(tokenizer, tmp_path):
    model = random_model(small_config(tokenizer))
    for dtype in (None, torch.float16):
        model.save_pretrained(tmp_path, dtype=dtype)
        again = VLM.from_pretrained(tmp_path)
        assert again.config == model.config
        for name, tensor in model.state_dict().items():
            assert again.state_dict()[name].dtype == torch.float32
            assert torch.equal(again.state_dict()[name], tensor.to(dtype or tensor.dtype).float())
    weights = load_file(tmp_path / "model.safetensors")  # in shards, like large ones on the hub
    names = sorted(weights)
    for shard, part in (("a", names[:9]), ("b", names[9:])):
        save_file({name: weights[name] for name in part}, tmp_path / f"{shard}.safetensors")
    index = {
        "weight_map": {name: f"{'a' if name in names[:9] else 'b'}.safetensors" for name in names}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            VLM.from_pretrained(tmp_path).state_dict().values(), again.state_dict().values()
        )
    )


def spoil_weights(change):
    def spoil(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return spoil


@pytest.mark.parametrize(
    "spoil, named",
    [
        (
            spoil_weights(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
            "missing, first model.layers.1.mlp.up_proj.weight",
        ),
        (spoil_weights(lambda w: w.update(extra=torch.zeros(1))), "unexpected tensor extra"),
        (
            spoil_weights(lambda w: w.update({"visual.blocks.0.attn.qkv.bias": torch.zeros(3)})),
            "visual.blocks.0.attn.qkv.bias has shape [3]",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-100]
            ),
            "model.safetensors",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "No such file"),
        (lambda f: (f / "config.json").write_text("{not json"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "'llama'"),
        (
            lambda f: (f / "config.json").write_text(
                '{"model_type": "qwen2_5_vl", "hidden_size": 48}'
            ),
            "config.json",
        ),
        (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    ],
)
def test_broken_checkpoints_are_one_line_that_names_the_thing(tokenizer, tmp_path, spoil, named):
    random_model(small_config(tokenizer)).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        VLM.from_pretrained(tmp_path)
    assert (
        named in str(caught.value)
        and "\n" not in str(caught.value)
        and str(tmp_path) in str(caught.value)
    )


def test_the_shipped_weights_load_in_transformers():
    transformers = pytest.importorskip("transformers")
    folder = ROOT / "weights" / "nano"
    ours, tokenizer = VLM.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    pixels, grids = process_images([picture(128, 128)], ImageConfig())
    talk = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "Where is the red cube?"}],
        }
    ]
    ids = torch.tensor([chat(tokenizer, talk, grids.tolist())[0]])
    with torch.no_grad():
        expected = theirs(
            input_ids=ids,
            pixel_values=pixels,
            image_grid_thw=grids,
            mm_token_type_ids=(ids == ours.config.image_token_id).int(),
        ).logits
        torch.testing.assert_close(
            ours(ids, pixel_values=pixels, image_grid_thw=grids).logits,
            expected,
            atol=1e-4,
            rtol=1e-4,
        )
    words = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        talk[:1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert words == chat(tokenizer, talk, [(1, 2, 2)])[0]


CONFIGS = json.loads((ROOT / "tests" / "configs.json").read_text())  # the 3B's, by writer


@pytest.mark.parametrize("version", CONFIGS)
def test_config_of_every_transformers_means_the_same_model(tmp_path, version):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[version]))
    head = {"model.embed_tokens.weight": torch.zeros(1)}
    save_file(head, tmp_path / "model.safetensors")
    fields = read_config(tmp_path)
    vision = VisionConfig(**fields.pop("vision_config"))
    config = VLMConfig(**fields, vision_config=vision)
    expected = VLMConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        tie_word_embeddings=True,
        max_position_embeddings=128000,
        bos_token_id=151643,
        eos_token_id=151645,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        image_token_id=151655,
        video_token_id=151656,
        vision_config=VisionConfig(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            out_hidden_size=2048,
            patch_size=14,
            window_size=112,
            fullatt_block_indexes=(7, 15, 23, 31),
            tokens_per_second=2,
        ),
    )
    assert config == expected


def edit(folder, name, **changes):
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


LAYOUTS = {
    "FSDP, ZeRO, verl": (("visual.", "model.visual."), ("model.", "model.language_model.")),
    "language_model": (
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "model.lm_head": (("lm_head.", "model.lm_head."),),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_every_layout_load(tokenizer, tmp_path, layout, shape):
    model = random_model(small_config(tokenizer, **SHAPES[shape]))
    model.save_pretrained(tmp_path)
    renamed = {"visual.rotary_pos_emb.inv_freq": torch.ones(4)}
    renamed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        for ours, theirs in LAYOUTS[layout]:
            if name.startswith(ours):
                name = name.replace(ours, theirs, 1)
                break
        renamed[name] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    again = VLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor)


def test_a_head_of_its_own_is_kept_though_the_config_says_tied(tokenizer, tmp_path):
    model = random_model(small_config(tokenizer))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = torch.randn_like(weights["model.embed_tokens.weight"])
    for extra, tied in ((weights["model.embed_tokens.weight"].clone(), True), (head, False)):
        save_file({**weights, "lm_head.weight": extra}, tmp_path / "model.safetensors")
        again = VLM.from_pretrained(tmp_path)
        assert again.config.tie_word_embeddings == tied == (again.lm_head is None)
    assert torch.equal(again.lm_head.weight, head)


STOPS = [
    ({"eos_token_id": [7, 8]}, None, {7, 8}),
    ({"eos_token_id": 7, "bos_token_id": None}, None, {7}),
    ({"eos_token_id": 7}, {"eos_token_id": 9}, {7, 9}),
    ({"eos_token_id": 7}, {"eos_token_id": [9, 10]}, {7, 9, 10}),
    ({"eos_token_id": None}, {"eos_token_id": [9]}, {9}),
    ({"eos_token_id": 7}, {"eos_token_id": None}, {7}),
]


@pytest.mark.parametrize("config, generation, stops", STOPS)
def test_every_stop_of_both_files_stops(tokenizer, tmp_path, config, generation, stops):
    random_model(small_config(tokenizer)).save_pretrained(tmp_path)
    edit(tmp_path, "config.json", **config)
    (tmp_path / "generation_config.json").unlink()
    if generation:
        edit(tmp_path, "generation_config.json", **generation)
    model = VLM.from_pretrained(tmp_path)
    kept = set(model.generation_config["eos_token_id"])
    assert stops <= kept and kept - stops <= {tokenizer.special["<|endoftext|>"], 151643, 151645}
    model.save_pretrained(tmp_path / "again")  # what was read is written again
    again = VLM.from_pretrained(tmp_path / "again")
    assert set(again.generation_config["eos_token_id"]) == kept


def test_repetition_penalty_of_the_folder_is_obeyed_as_in_transformers(
    reference, tokenizer, tmp_path
):
    ours, theirs = reference["tied, grouped"]
    ours.save_pretrained(tmp_path)
    edit(tmp_path, "generation_config.json", repetition_penalty=1.7, eos_token_id=299)
    model = VLM.from_pretrained(tmp_path)
    batch = {name: tensor for name, tensor in prompts(tokenizer, ours.config).items()}
    alone = {name: batch[name][1:2, -20:] for name in ("input_ids", "attention_mask")}
    expected = theirs.generate(
        **alone, max_new_tokens=16, do_sample=False, repetition_penalty=1.7, eos_token_id=299
    )
    found = model.generate(**alone, max_new_tokens=16, stop_token_ids=[299])
    assert found == [expected[0, 20:].tolist()]
    plain = model.generate(**alone, max_new_tokens=16, stop_token_ids=[299], repetition_penalty=1.0)
    assert plain != found
    together = model.generate(**batch, max_new_tokens=16, stop_token_ids=[299])
    assert len(together) == 3


def with_dtype(dtype, name="model.layers.0.mlp.up_proj.weight"):
    return spoil_weights(lambda w: w.update({name: w[name].to(dtype)}))


def adapter_only(folder):
    for path in folder.iterdir():
        path.unlink()
    edit(folder, "adapter_config.json", peft_type="LORA")


def without_index(folder):
    (folder / "model.safetensors.index.json").unlink()


REFUSED = {
    "AWQ": (
        lambda f: edit(f, "config.json", quantization_config={"quant_method": "awq"}),
        "quantized",
    ),
    "GPTQ": (
        lambda f: edit(f, "config.json", quantization_config={"quant_method": "gptq"}),
        "quantized",
    ),
    "bitsandbytes": (
        lambda f: edit(f, "config.json", quantization_config={"load_in_4bit": True}),
        "quantized",
    ),
    "int8 under a plain name": (with_dtype(torch.int8), "quantized"),
    "uint8 under a plain name": (with_dtype(torch.uint8), "quantized"),
    "FP8": (with_dtype(torch.float8_e4m3fn), "quantized"),
    "packed": (
        spoil_weights(
            lambda w: w.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(2, 2).int()})
        ),
        "quantized",
    ),
    "an adapter beside its base": (
        lambda f: edit(f, "adapter_config.json", peft_type="LORA"),
        "adapter: merge it first",
    ),
    "an adapter alone": (adapter_only, "adapter: merge it first"),
    "an index without weight_map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        "it lacks 'weight_map'",
    ),
    "an index of the wrong type": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
        "model.safetensors.index.json",
    ),
    "weight_map leaves the folder": (
        lambda f: edit(f, "model.safetensors.index.json", weight_map={"a": "../a.safetensors"}),
        "outside",
    ),
    "weight_map is absolute": (
        lambda f: edit(f, "model.safetensors.index.json", weight_map={"a": "/etc/hostname"}),
        "outside",
    ),
    "NaN": (spoil_weights(lambda w: w["model.norm.weight"].fill_(float("nan"))), "not finite"),
    "inf": (spoil_weights(lambda w: w["model.norm.weight"].fill_(float("inf"))), "not finite"),
    "sliding windows": (lambda f: edit(f, "config.json", use_sliding_window=True), "sliding"),
    "yarn": (
        lambda f: edit(f, "config.json", rope_scaling={"type": "yarn", "mrope_section": [2, 2, 2]}),
        "rope scaling",
    ),
    "sections that do not fit": (
        lambda f: edit(
            f, "config.json", rope_scaling={"type": "mrope", "mrope_section": [1, 1, 1]}
        ),
        "mrope_section",
    ),
    "heads of the wrong type": (
        lambda f: edit(f, "config.json", num_attention_heads="4"),
        "config",
    ),
    "no heads": (lambda f: edit(f, "config.json", num_attention_heads=0), "config"),
    "another activation": (lambda f: edit(f, "config.json", hidden_act="gelu"), "hidden_act"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "generation config of the wrong type": (
        lambda f: edit(f, "generation_config.json", repetition_penalty="much"),
        "repetition_penalty",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_one_line_that_says_why(tokenizer, tmp_path, case):
    spoil, named = REFUSED[case]
    random_model(small_config(tokenizer)).save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        VLM.from_pretrained(tmp_path)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_numbers_too_large_for_the_asked_type_are_told(tokenizer, tmp_path):
    model = random_model(small_config(tokenizer))
    model.model.norm.weight.data[0] = 1e6  # float16 ends at 65,504
    model.save_pretrained(tmp_path)
    assert VLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.norm.weight[0] > 9e5
    with pytest.raises(UserError, match="not finite"):
        VLM.from_pretrained(tmp_path, dtype=torch.float16)


LOADING = """
import re, sys
from pathlib import Path
import torch
from vlm import VLM

def memory(name):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", status)[1])

for turn in range(2):  # the first loads libraries too
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    VLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
    peak = memory("VmHWM") - before
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's")
def test_memory_peaks_at_the_weights_and_a_little(tmp_path):
    """With an embedding table that is the share of the model that it is at 3 B, in bfloat16."""
    sizes = {"vocab_size": 12000, "num_hidden_layers": 16, "hidden_size": 768}
    sizes |= {"intermediate_size": 2688, "mrope_section": (16, 24, 24)}
    config = VLMConfig(**sizes, vision_config=VisionConfig(out_hidden_size=768))
    with torch.device("meta"):
        model = VLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model.save_pretrained(tmp_path)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 200e6
    # in a process of its own, so that no freed memory is reused
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert 0.9 * size < int(done.stdout) < 1.15 * size


def test_a_copied_model_is_the_model(tokenizer, tmp_path):
    model = random_model(small_config(tokenizer))
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "policy.safetensors").write_text("another's")
    index = tmp_path / "one" / "model.safetensors.index.json"
    wanted = read_json(index)["weight_map"]
    index.unlink()  # as for small models on the hub
    copy_model(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "two" / "policy.safetensors").exists()
    assert read_json(tmp_path / "two" / index.name)["weight_map"] == wanted
    again = VLM.from_pretrained(tmp_path / "two")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
