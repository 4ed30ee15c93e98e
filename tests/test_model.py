"""model.py keeps its promises: what is saved is what is loaded, a chunk depends on what it should and on nothing else, mistakes are told in one line."""
import json
import shutil

import numpy as np
import pytest
import torch

from cli import UserError
from model import BLM, load_training
from policy import Policy, PolicyConfig
from processor import ImageConfig, Processor, train_tokenizer
from vlm import VLM, VisionConfig, VLMConfig

CORPUS = ["push the cube to the goal", "Where is the red cube?", '{"point_2d": [41, 57]}', "system\nYou are a helpful assistant.\nuser\nassistant\n"] * 3
ROBOTS = {"panda": (17, 8), "widowx": (16, 7)}


def small_blm(seed=0, policy=True):
    """Random weights, of a size at which pictures and words matter."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CORPUS, vocab_size=300)
    vision = VisionConfig(depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=24, patch_size=8, window_size=32, fullatt_block_indexes=[1])
    vlm = VLM(VLMConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, mrope_section=(2, 2, 2),
                        vision_config=vision).for_tokenizer(tokenizer))
    made = Policy(PolicyConfig(intent_layer=2, num_intent_queries=4, max_condition_tokens=96, hidden_size=16, num_layers=4, num_heads=2, action_horizon=4,
                               num_future_tokens=2, future_layer=3), 24, ROBOTS)
    for parameter in [*vlm.parameters(), *made.parameters()]:
        parameter.data = (parameter + 0.2 * torch.randn_like(parameter)).half().float()          # what float16 holds exactly
    for robot in range(2):
        made.normalizer.fit(robot, torch.randn(30, 17), torch.randn(30, 4, 8))
    images = ImageConfig(patch_size=8, min_pixels=32 * 32, max_pixels=32 * 32)
    return BLM(vlm, Processor(tokenizer, images), made if policy else None, {"sft": {"stage": "sft", "step": 7}})


def observation(robot="panda", seed=0):
    rng = np.random.default_rng(seed)
    pictures = {view: rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for view in ("front", "wrist")}
    return {"images": pictures, "state": rng.normal(size=ROBOTS[robot][0]).astype(np.float32), "instruction": "push the cube to the goal"}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    blm, seen = small_blm(), observation()
    blm.save_pretrained(tmp_path, dtype=torch.float16)
    again = BLM.from_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "policy.json", "policy.safetensors", "preprocessor_config.json",
                                                             "tokenizer.json", "tokenizer_config.json", "training.json"]
    for name, tensor in blm.policy.state_dict().items():
        assert torch.equal(tensor, again.policy.state_dict()[name]) and again.policy.state_dict()[name].dtype == tensor.dtype, name
    assert np.array_equal(blm.act(seen, "panda"), again.act(seen, "panda"))
    assert blm.answer([seen["images"]["front"]], "Where is the red cube?", max_new_tokens=8) == again.answer([seen["images"]["front"]], "Where is the red cube?", max_new_tokens=8)
    assert again.training == {"sft": {"stage": "sft", "step": 7}}
    described = json.loads((tmp_path / "policy.json").read_text())["embodiments"]["widowx"]
    assert sum(size for _, size, _ in described["state"]) == 16 and sum(size for _, size, _ in described["action"]) == 7


def test_act_has_the_robots_shape_and_obeys_temperature_and_seed():
    blm = small_blm()
    for robot, (_, action_dim) in ROBOTS.items():
        seen = observation(robot)
        chunk, sampled = blm.act(seen, robot), blm.act(seen, robot, temperature=1.0, seed=[5, 0])
        assert chunk.shape == sampled.shape == (4, action_dim) and chunk.dtype == sampled.dtype == np.float32 and np.isfinite(chunk).all()
        assert np.array_equal(chunk, blm.act(seen, robot)) and np.array_equal(chunk, blm.act(seen, robot, seed=1))
        assert np.array_equal(sampled, blm.act(seen, robot, temperature=1.0, seed=[5, 0])) and not np.array_equal(sampled, chunk)
        assert not np.array_equal(sampled, blm.act(seen, robot, temperature=1.0, seed=[5, 1]))


def test_act_looks_at_everything():
    blm, seen = small_blm(), observation()
    chunk, other = blm.act(seen, "panda"), observation(seed=1)
    for changed in ({**seen, "images": {**seen["images"], "front": other["images"]["front"]}}, {**seen, "images": {**seen["images"], "wrist": other["images"]["wrist"]}},
                    {**seen, "images": {"front": seen["images"]["wrist"], "wrist": seen["images"]["front"]}}, {**seen, "instruction": "Where is the red cube?"},
                    {**seen, "state": other["state"]}):
        assert np.abs(blm.act(changed, "panda") - chunk).max() > 1e-4


def test_blocks_behind_k_do_not_run():
    blm, seen = small_blm(), observation()
    chunk = blm.act(seen, "panda")
    blm.vlm.model.layers[2].register_forward_pre_hook(lambda *_: pytest.fail("block 3 of k = 2"))
    assert np.array_equal(blm.act(seen, "panda"), chunk)


def test_intents_of_a_batch_equal_those_of_one():
    blm, pictures = small_blm(), [list(observation(seed=i)["images"].values()) for i in range(3)]
    texts = ["push", "push the cube to the goal", "Where is the red cube?"]
    hidden, mask = blm.intent_states(pictures, texts)
    for i in range(3):
        alone, own = blm.intent_states(pictures[i:i + 1], texts[i:i + 1])
        assert own.all() and mask[i].sum() == own.sum()
        assert torch.allclose(hidden[i, mask[i]], alone[0], atol=1e-4)


def test_a_language_model_alone_answers_but_does_not_act(tmp_path):
    small_blm(policy=False).save_pretrained(tmp_path)
    blm = BLM.from_pretrained(tmp_path)
    assert isinstance(blm.answer([], "Where is the red cube?", max_new_tokens=4), str)
    with pytest.raises(UserError, match="python train_policy.py"):
        blm.act(observation(), "panda")


def test_mistakes_in_an_observation_are_told():
    blm, seen = small_blm(), observation()
    front = seen["images"]["front"]
    for changes, word in (({"state": seen["state"][:5]}, "17 numbers"), ({"state": seen["state"] * np.nan}, "not finite"), ({"instruction": " "}, "instruction is empty"),
                          ({"images": {"front": front}}, "lacks the wrist"), ({"images": {"front": front, "wrist": front / 255}}, "wrist picture must be uint8"),
                          ({"images": {"front": front[..., 0], "wrist": front}}, "front picture")):
        with pytest.raises(UserError, match=word):
            blm.act({**seen, **changes}, "panda")
    with pytest.raises(UserError, match="lacks state"):
        blm.act({name: value for name, value in seen.items() if name != "state"}, "panda")
    with pytest.raises(UserError, match="did you mean panda"):
        blm.act(seen, "pandas")
    with pytest.raises(UserError, match="question is empty"):
        blm.answer([front], "  ")


def test_broken_folders_are_told(tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        BLM.from_pretrained(tmp_path / "nowhere")
    good, bad = tmp_path / "good", tmp_path / "bad"
    small_blm().save_pretrained(good)

    def broken(word, change):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        change(bad)
        with pytest.raises(UserError, match=word) as told:
            BLM.from_pretrained(bad)
        assert "\n" not in str(told.value)

    for name in ("config.json", "model.safetensors", "tokenizer.json", "policy.json", "policy.safetensors"):
        broken(name, lambda folder: (folder / name).unlink())
    for name in ("model.safetensors", "policy.safetensors"):
        broken(name, lambda folder: (folder / name).write_bytes((good / name).read_bytes()[:-100]))
        broken(name, lambda folder: (folder / name).write_bytes(b"no tensors here"))
    broken("policy.json is not a policy", lambda folder: (folder / "policy.json").write_text('{"version": 1}'))
    broken("policy.json is not JSON", lambda folder: (folder / "policy.json").write_text("{"))
    broken("format version None", lambda folder: (folder / "policy.json").write_text("{}"))
    broken("missing", lambda folder: shutil.copy(good / "model.safetensors", folder / "policy.safetensors"))      # foreign weights
    broken("trained on another language model", lambda folder: small_blm(seed=1).vlm.save_pretrained(folder))


def test_stages_keep_their_records(tmp_path):
    assert load_training(tmp_path) == {}
    (tmp_path / "training.json").write_text('{"stage": "sft", "step": 5}')
    assert load_training(tmp_path) == {"sft": {"stage": "sft", "step": 5}}
