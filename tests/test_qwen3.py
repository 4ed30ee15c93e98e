"""Qwen3-VL keeps the promises of Qwen2.5-VL: it matches transformers, from file to policy."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import test_train_policy
import test_train_sft
import torch
from small import (
    SHAPES,
    picture,
    qwen3_config,
    qwen3_processor,
    random_model,
    small_config,
    small_tokenizer,
    token_types,
)
from test_train_policy import small_sizes  # noqa: F401
from test_vlm import by_formula

from checkpoint import (
    HIDDEN_ACT,
    VisionConfig,
    VLMConfig,
    backbone_hash,
    config_fields,
    folder_hash,
    hub_weights,
    read_config,
    stored_dtype,
)
from cli import UserError
from model import BLM
from positions import mrope_positions, pair_axes
from processor import QWEN3_TEMPLATE, ImageConfig, Processor, chat, process_images
from train_sft import PRESETS
from vlm import VLM, Cache

VIDEO = [picture(32, 48, seed) for seed in range(3, 6)]  # an odd number of frames
# a frame has more rows than the position table, or fewer
CASES = {
    "text": ([[]], ["Where is the red cube?"]),
    "image": ([[picture(48, 96)]], ["Where?"]),
    "video": ([[VIDEO]], ["What happens?"]),
    "batch": (
        [[picture(48, 96), VIDEO, picture(80, 32, 1)], [], [picture(112, 80, 2)]],
        ["Is it left of the sphere?", "Where is the red cube?", "Pick up the cube."],
    ),
}


@pytest.fixture(scope="module")
def processor():
    return qwen3_processor()


@pytest.fixture(scope="module")
def model(processor):
    return random_model(qwen3_config(processor.tokenizer))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, processor):
    """{shape: (our model, the same one that transformers loads from our folder, the folder)}"""
    transformers = pytest.importorskip("transformers", reason="parity: pip install transformers")
    pairs = {}
    for shape, changes in SHAPES.items():
        folder = tmp_path_factory.mktemp("qwen3")
        ours = random_model(qwen3_config(processor.tokenizer, **changes))
        ours.save_pretrained(folder)
        theirs, report = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        pairs[shape] = ours, theirs.eval(), folder
    return pairs


def run_theirs(theirs, batch, config):
    """(logits, the input of each block, the output of the last norm).

    transformers records hidden states before the deep tokens are added.
    """
    read = []
    layers = theirs.model.language_model.layers
    hooks = [layer.register_forward_pre_hook(lambda _, x: read.append(x[0])) for layer in layers]
    types = token_types(batch, config)
    out = theirs(**batch, mm_token_type_ids=types, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return out.logits, read, out.hidden_states[-1]


def near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_hidden_states_match_transformers(reference, processor, shape, case, side):
    ours, theirs, _ = reference[shape]
    assert (ours.lm_head is None) == shape.startswith("tied")
    batch = processor.prompt(*CASES[case], side)
    real = batch["attention_mask"].bool()
    logits, read, last = run_theirs(theirs, batch, ours.config)
    found = ours(**batch)
    for k, expected in enumerate(read):
        near(found.hidden_states[k][real], expected[real])
    near(found.last_hidden_state[real], last[real])
    near(found.logits[real], logits[real])
    assert logits.std() > 0.1  # the comparison is of numbers, not of zeros


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation_matches_transformers(reference, processor, case):
    ours, theirs, _ = reference["tied, grouped"]
    batch = processor.prompt(*CASES[case], "left")
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    types = token_types(batch, ours.config)
    expected = theirs.generate(**batch, mm_token_type_ids=types, **options)
    found = ours.generate(**batch, max_new_tokens=12, stop_token_ids=[-1])
    assert found == expected[:, batch["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def test_tokens_of_all_mergers_match_transformers(reference):
    ours, theirs, _ = reference["tied, grouped"]
    images = [picture(48, 96), picture(80, 112, 1), picture(64, 64, 2)]
    values, grids = process_images(images, qwen3_processor().image)
    values = torch.cat([values, torch.randn(2 * 6 * 10, values.shape[1])])  # a video too
    grids = torch.cat([grids, torch.tensor([[2, 6, 10]])])
    tokens, features, *deep = ours.visual(values, grids)
    expected = theirs.model.visual(values, grid_thw=grids)
    assert len(features) == len(values) and len(deep) == len(expected.deepstack_features) == 2
    near(tokens, expected.pooler_output)
    for found, wanted in zip(deep, expected.deepstack_features):
        near(found, wanted)


def test_positions_match_transformers(reference, processor):
    ours, theirs, _ = reference["tied, grouped"]
    batch = processor.prompt(*CASES["batch"], "left")
    grids = {name: batch[name] for name in ("image_grid_thw", "video_grid_thw")}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    types = token_types(batch, ours.config)
    expected = theirs.model.get_rope_index(ids, types, attention_mask=mask, **grids)[0]
    assert torch.equal(mrope_positions(ids, mask, ours.config, **grids), expected)
    assert batch["video_grid_thw"].tolist() == [[2, 4, 6]]  # and is not changed


# last token's first four logits; transformers 5.24 gives the same to 1e-4
GOLDEN = [0.5159, -1.7280, 1.4733, 0.0322]


@torch.no_grad()
def test_golden_values(processor):
    model = by_formula(qwen3_config(processor.tokenizer))
    wave = 128 + 100 * np.sin(np.arange(48 * 80 * 3) * 0.013)
    image = wave.astype(np.uint8).reshape(48, 80, 3)
    video = [image[:32, :48], image[16:, :48], image[:32, 32:]]
    logits = model(**processor.prompt([[image, video]], ["Where?"])).logits[0, -1, :4]
    assert np.allclose(logits, GOLDEN, atol=2e-4), logits


def test_pairs_take_turns_as_in_the_released_models():
    axes = pair_axes(SimpleNamespace(qwen3=True, mrope_section=(24, 20, 20)))
    assert axes == [0, 1, 2] * 20 + [0] * 4


@torch.no_grad()
def test_cached_equals_uncached_and_padding_moves_nothing(model, processor):
    batch = processor.prompt(*CASES["batch"], "left")
    whole = model(**batch)
    cache = Cache(batch["input_ids"].shape[1] + 3)
    model(**batch, cache=cache)
    extra = torch.randint(0, 250, (3, 3))
    longer = dict(batch, input_ids=torch.cat([batch["input_ids"], extra], 1))
    longer["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(extra)], 1)
    real = longer["attention_mask"].bool()[:, None, None]
    parts = [model.step(extra[:, i], real[..., : cache.length + 1], cache) for i in range(3)]
    torch.testing.assert_close(torch.stack(parts, 1), model(**longer).logits[:, -3:])

    for b, (media, text) in enumerate(zip(*CASES["batch"])):
        alone = model(**processor.prompt([media], [text])).logits[0, -1]
        torch.testing.assert_close(alone, whole.logits[b, -1])


@torch.no_grad()
def test_packed_equal_alone(model, processor):
    """Two questions of a row share its images; text-only ones share their beginning."""
    rows = []
    expected = []  # of every question, where its answer begins
    for media, text in zip(*CASES["batch"]):
        kinds = ["video" if isinstance(item, list) else "image" for item in media]
        talks = []
        for question in (text, text[:9] + "?"):
            content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": question}]
            answer = {"role": "assistant", "content": "left of it"}
            talks.append([{"role": "user", "content": content}, answer])
            alone = model(**processor.prompt([media], [question]))
            expected.append(alone.logits[0, -1])
        rows.append(SimpleNamespace(conversations=talks, media=list(zip(kinds, media))))
    batch = processor.pack(rows)
    learned = batch.pop("labels")[0] >= 0
    first = learned.int().diff().eq(1).nonzero()[:, 0]  # the token before each answer
    torch.testing.assert_close(model(**batch).logits[0, first], torch.stack(expected))


@torch.no_grad()
def test_first_k_blocks_equal_hidden_states_of_the_full_run(model, processor):
    batch = processor.prompt(*CASES["batch"])
    full = model(**batch)
    for k in (1, 2, 3):  # the first two have deep tokens behind them
        first = model(**batch, num_layers=k)
        assert torch.equal(first.hidden_states[k], full.hidden_states[k])


def test_every_parameter_gets_gradient(model, processor):
    for parameter in model.parameters():
        parameter.grad = None
    model(**processor.prompt(*CASES["batch"])).logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients.values())
    names = set(hub_weights(gradients, model.config))
    assert "visual.deepstack_merger_list.1.linear_fc1.weight" in names
    assert {"visual.pos_embed.weight", "visual.merger.norm.bias"} <= names


@torch.no_grad()
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_is_near(model, processor, how):
    batch = processor.prompt(*CASES["batch"], "left")
    real = batch["attention_mask"].bool()
    expected = model(**batch).logits[real]
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**batch).logits[real]
    else:
        half = random_model(model.config).to(torch.bfloat16)
        found = half(**batch).logits[real]
        assert half.generate(**batch, max_new_tokens=3, stop_token_ids=[-1])
    assert (found.float() - expected).abs().mean() < 0.05 * expected.std()


# ---- folders


@torch.no_grad()
def test_what_transformers_saves_loads(reference, processor, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, theirs, folder = reference["untied, multi-head"]
    theirs.save_pretrained(tmp_path / "whole")
    again = VLM.from_pretrained(tmp_path / "whole")
    assert again.config == ours.config == VLM.from_pretrained(folder).config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    # in bfloat16 and in shards, tied
    shards = tmp_path / "shards"
    ours, theirs, _ = reference["tied, grouped"]
    kind = transformers.Qwen3VLForConditionalGeneration
    half = kind.from_pretrained(reference["tied, grouped"][2], dtype=torch.bfloat16)
    half.save_pretrained(shards, max_shard_size="40KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    batch = processor.prompt(*CASES["batch"], "left")
    real = batch["attention_mask"].bool()
    theirs = kind.from_pretrained(shards, dtype=torch.float32).eval()
    again = VLM.from_pretrained(shards)
    near(again(**batch).logits[real], run_theirs(theirs, batch, ours.config)[0][real])


def hub_config(hidden, inner, layers, heads, tied, vision):
    """What config.json of Qwen/Qwen3-VL-*-Instruct says."""
    width, depth, wide, deep = vision
    text = {
        "model_type": "qwen3_vl_text",
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "tie_word_embeddings": tied,
        "vocab_size": 151936,
    }
    order = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    text["rope_scaling"] = order
    vision = {
        "model_type": "qwen3_vl",
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": wide,
        "num_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "out_hidden_size": hidden,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": deep,
    }
    ids = {"image_token_id": 151655, "video_token_id": 151656}
    ids |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653}
    about = {"model_type": "qwen3_vl", "tie_word_embeddings": tied, **ids}
    return {**about, "text_config": text, "vision_config": vision}


SMALL_VIT = (1024, 24, 4096, [5, 11, 17])
LARGE_VIT = (1152, 27, 4304, [8, 16, 24])
RELEASED = {
    "2B, and Cosmos-Reason2": ((2048, 6144, 28, 16, True, SMALL_VIT), 2.1e9),
    "4B": ((2560, 9728, 36, 32, True, SMALL_VIT), 4.4e9),
    "8B": ((4096, 12288, 36, 32, False, LARGE_VIT), 8.8e9),
    "32B": ((5120, 25600, 64, 64, False, LARGE_VIT), 33.4e9),
}


@pytest.mark.parametrize("size", RELEASED)
def test_released_configs_make_the_same_tensors_as_in_transformers(tmp_path, size):
    transformers = pytest.importorskip("transformers")
    sizes, parameters = RELEASED[size]
    (tmp_path / "config.json").write_text(json.dumps(hub_config(*sizes)))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    fields = read_config(tmp_path)
    vision = VisionConfig(**fields.pop("vision_config"))
    with torch.device("meta"):
        ours = VLM(VLMConfig(**fields, vision_config=vision))
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        theirs = transformers.Qwen3VLForConditionalGeneration(config)
    expected = {}
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("model.").replace("language_model.", "model.")
        if name != "lm_head.weight" or ours.lm_head is not None:
            expected[name] = tensor.shape
    found = hub_weights(ours.state_dict(), ours.config)
    assert {name: tensor.shape for name, tensor in found.items()} == expected
    assert abs(sum(p.numel() for p in ours.parameters()) / parameters - 1) < 0.03
    assert stored_dtype(tmp_path) == torch.bfloat16


def test_fields_of_the_other_architecture_are_in_no_file_and_no_hash(model):
    old = config_fields(small_config(small_tokenizer()))
    added = {"model_type", "head_dim", "num_position_embeddings", "deepstack_visual_indexes"}
    assert not added & {*old, *old["vision_config"]}
    new = config_fields(model.config)["vision_config"]
    assert not {"window_size", "fullatt_block_indexes", "tokens_per_second"} & {*new}


REFUSED = {
    "experts": ({"model_type": "qwen3_vl_moe"}, "qwen3_vl_moe"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "another activation": ({"vision_config": {"hidden_act": "quick_gelu"}}, HIDDEN_ACT["qwen3_vl"]),
    "no table": ({"vision_config": {"num_position_embeddings": 0}}, "num_position_embeddings"),
    "sections": ({"rope_scaling": {"mrope_section": [24, 20, 20]}}, "mrope_section"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_one_line_that_says_why(model, tmp_path, case):
    changes, named = REFUSED[case]
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["vision_config"] |= changes.get("vision_config", {})
    content["model_type"] = changes.get("model_type", content["model_type"])
    content["text_config"] |= {k: v for k, v in changes.items() if k != "vision_config"}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=named):
        VLM.from_pretrained(tmp_path)


# ---- pixels and words


def test_a_video_is_written_as_timed_frames(processor):
    transformers = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
    ids = processor.prompt([[VIDEO]], ["Why?"])["input_ids"][0].tolist()
    found = processor.tokenizer.fast.decode(ids, skip_special_tokens=False)
    timing = transformers.Qwen3VLProcessor._calculate_timestamps
    frame = "<|vision_start|>" + 6 * "<|video_pad|>" + "<|vision_end|>"
    timed = [f"<{second:.1f} seconds>{frame}" for second in timing(None, [0, 1, 2], 2)]
    start = "<|im_start|>user\n"
    assert found == start + "".join(timed) + "Why?<|im_end|>\n<|im_start|>assistant\n"
    assert "<0.2 seconds>" in found and "<1.0 seconds>" in found


def test_chat_matches_the_template_and_has_no_system_message_of_its_own(processor):
    jinja2 = pytest.importorskip("jinja2", reason="renders the hub's template")
    content = [{"type": "image"}, {"type": "text", "text": "\n Where is 12 red?"}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "left"}]
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(QWEN3_TEMPLATE)
    for messages in (talk, [{"role": "system", "content": "Be brief."}, *talk], talk[:1]):
        ids, labels = chat(processor.tokenizer, messages, [(1, 2, 2)])
        text = template.render(messages=messages, add_generation_prompt=True)
        assert processor.tokenizer.fast.decode(ids, skip_special_tokens=False) == text
        answer = "left" if len(messages) > 1 else ""
        assert processor.tokenizer.decode([i for i in labels if i >= 0]) == answer


def test_a_saved_processor_is_read_here_and_by_transformers(model, processor, tmp_path):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path)
    assert again.image == processor.image and again.tokenizer.qwen3
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    values, grids = process_images([picture(70, 90)], again.image)
    expected = theirs(images=[picture(70, 90)], return_tensors="pt")
    assert torch.equal(grids, expected["image_grid_thw"])
    torch.testing.assert_close(values, expected["pixel_values"], atol=1e-5, rtol=0)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": "user", "content": "Where is the red cube?"}]
    found = words.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert found == chat(again.tokenizer, talk)[0]


def test_image_settings_of_the_hub_are_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    del content["vision_config"]["patch_size"]  # 16 is the class's
    path.write_text(json.dumps(content))
    settings = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16}
    half = [0.5, 0.5, 0.5]
    settings |= {"temporal_patch_size": 2, "merge_size": 2, "image_mean": half, "image_std": half}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    expected = ImageConfig(16, 2, 2, 256 * 256, 4096 * 4096, half, half)
    assert ImageConfig.from_pretrained(tmp_path) == expected


# ---- training


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """rows.jsonl with its pictures, demos/, and a tiny Qwen3-VL in base/."""
    folder = tmp_path_factory.mktemp("training")
    test_train_sft.write_rows(folder)
    rng = np.random.default_rng(0)
    (folder / "demos").mkdir()
    for seed in range(3):
        for robot in test_train_policy.SIZES:
            where = (folder / "demos", robot, "PickCube", seed)
            test_train_policy.write_random_episode(*where, rng)
    torch.manual_seed(0)
    vlm = VLM(qwen3_config(processor.tokenizer))
    vlm.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return folder


@pytest.mark.parametrize("rank", [0, 2])
def test_train_sft_learns_and_its_folder_loads_in_transformers(folder, tmp_path, rank):
    transformers = pytest.importorskip("transformers")
    changes = {"steps": 12, "eval_every": 6, "lora_rank": rank, "checkpointing": True, "lr": 5e-2}
    cfg = test_train_sft.settings(folder, tmp_path, **changes)
    test_train_sft.train(cfg)
    losses = [line["loss"] for line in test_train_sft.log_of(tmp_path)]
    assert losses[-1] < losses[0] - 0.1
    before = VLM.from_pretrained(folder / "base").state_dict()
    after = VLM.from_pretrained(tmp_path).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"visual.pos_embed.weight", "model.layers.3.self_attn.qkv_proj.weight"} <= moved
    assert "visual.deepstack_merger_list.0.mlp.0.weight" in moved
    assert ("model.layers.0.self_attn.q_norm.weight" in moved) == (rank == 0)
    kind = transformers.Qwen3VLForConditionalGeneration
    _, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    blm = BLM.from_pretrained(tmp_path)
    replies = blm.answers([[picture(48, 96)], [VIDEO]], ["What?", "Why?"], max_new_tokens=4)
    assert len(replies) == 2


def test_train_policy_makes_a_policy_on_it(folder, tmp_path):
    cfg = test_train_policy.settings(folder, tmp_path, backbone=str(folder / "base"))
    figures = test_train_policy.train(cfg)
    assert all(np.isfinite(value) for value in figures.values())
    blm = BLM.from_pretrained(tmp_path)  # the policy's hash is this backbone's
    episode = test_train_policy.load_episodes(folder / "demos")[0]
    seen = test_train_policy.observation(episode)
    assert blm.act(seen, episode.robot).shape == (4, 8)


def test_the_preset_names_a_released_model():
    assert PRESETS["qwen3"].backbone == "Qwen/Qwen3-VL-2B-Instruct"


def test_a_folder_has_the_hash_of_its_model(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    for k in (1, 4):
        found = folder_hash(tmp_path, model.config, processor, k)
        assert found == backbone_hash(model, processor, k)
