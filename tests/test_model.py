"""model.py keeps its promises: what is saved is what is loaded, a chunk depends on what it should
and on nothing else, mistakes give one line.
"""

import copy
import dataclasses
import json
import random
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoint import VisionConfig, VLMConfig, backbone_hash
from cli import UserError
from embodiment import Embodiment
from model import BLM, load_training
from policy import Policy, PolicyConfig
from processor import ImageConfig, Processor, train_tokenizer
from vlm import VLM

CORPUS = [
    "push the cube to the goal",
    "Where is the red cube?",
    '{"point_2d": [41, 57]}',
    "system\nYou are a helpful assistant.\nuser\nassistant\n",
] * 3
ROBOTS = {"panda": Embodiment(17, 8), "widowx": Embodiment(16, 7)}


def small_blm(seed=0, policy=True, corpus=CORPUS, robots=ROBOTS):
    """Random weights, large enough that images and words matter."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(corpus, vocab_size=300)
    vision = VisionConfig(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        out_hidden_size=24,
        patch_size=8,
        window_size=32,
        fullatt_block_indexes=[1],
    )
    config = VLMConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        mrope_section=(2, 2, 2),
        vision_config=vision,
    )
    vlm = VLM(config.for_tokenizer(tokenizer))
    config = PolicyConfig(
        intent_layer=2,
        num_intent_queries=4,
        max_condition_tokens=96,
        hidden_size=16,
        num_layers=4,
        num_heads=2,
        action_horizon=4,
        num_future_tokens=2,
        future_layer=3,
    )
    actor = Policy(config, 24, robots)
    for parameter in [*vlm.parameters(), *actor.parameters()]:
        noisy = parameter + 0.2 * torch.randn_like(parameter)
        parameter.data = noisy.half().float()  # what float16 holds exactly
    for robot in range(len(robots)):
        numbers = torch.randn(30, actor.state_dim), torch.randn(30, 4, actor.action_dim)
        actor.normalizer.fit(robot, *numbers)
    image = ImageConfig(patch_size=8, min_pixels=32 * 32, max_pixels=32 * 32)
    training = {"sft": {"stage": "sft", "step": 7}}
    return BLM(vlm, Processor(tokenizer, image), actor if policy else None, training)


def observation(robot="panda", seed=0):
    rng = np.random.default_rng(seed)
    pictures = {}
    for view in ("front", "wrist"):
        pictures[view] = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return {
        "images": pictures,
        "state": rng.normal(size=ROBOTS[robot].state_dim).astype(np.float32),
        "instruction": "push the cube to the goal",
    }


@pytest.fixture(scope="module")
def blm():
    return small_blm()


@pytest.fixture(scope="module")
def good(blm, tmp_path_factory):
    """A whole model folder."""
    folder = tmp_path_factory.mktemp("good")
    blm.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it, to be broken."""
    return shutil.copytree(good, tmp_path / "copy")


def refusal(call, *arguments, **named):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as told:
        call(*arguments, **named)
    assert "\n" not in str(told.value) and len(str(told.value)) < 1100
    return str(told.value)


# ---- the folder


def test_what_is_saved_is_what_is_loaded(blm, tmp_path):
    seen = observation()
    blm.save_pretrained(tmp_path, dtype=torch.float16)
    again = BLM.from_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "model.safetensors.index.json"} < files
    assert {"policy.json", "policy.safetensors", "training.json"} < files
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} < files
    loaded = again.policy.state_dict()
    for name, tensor in blm.policy.state_dict().items():
        assert torch.equal(tensor, loaded[name]) and loaded[name].dtype == tensor.dtype, name
    assert np.array_equal(blm.act(seen, "panda"), again.act(seen, "panda"))
    asked = [seen["images"]["front"]], "Where is the red cube?"
    assert blm.answer(*asked, max_new_tokens=8) == again.answer(*asked, max_new_tokens=8)
    assert again.training == {"sft": {"stage": "sft", "step": 7}}
    about = json.loads((tmp_path / "policy.json").read_text())
    widowx = about["embodiments"]["widowx"]
    assert widowx["index"] == 1 and widowx["state_dim"] == 16 and widowx["action_dim"] == 7
    assert widowx["views"] == ["front", "wrist"] and widowx["control_hz"] == 20
    assert widowx["relative"] == [0, 1, 2, 3, 4, 5, -1]
    assert "rad" in widowx["state"] and "finger target (m)" in widowx["action"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_policy_loads_in_any_type(folder, dtype):
    chunk = BLM.from_pretrained(folder).act(observation(), "panda")
    blm = BLM.from_pretrained(folder, dtype=dtype)
    assert blm.vlm.model.norm.weight.dtype == dtype
    assert next(blm.policy.parameters()).dtype == torch.float32
    assert np.abs(blm.act(observation(), "panda") - chunk).max() < 0.3
    blm.save_pretrained(folder / "again")
    small_blm().save_pretrained(folder / "cast", dtype)
    for name in ("again", "cast"):
        BLM.from_pretrained(folder / name)


def test_each_robot_keeps_its_own_cameras(tmp_path):
    robots = {
        "arm": Embodiment(6, 6, views=("top",), control_hz=30, state="joints (degrees)"),
        "aloha": Embodiment(14, 16, views=("high", "left", "right"), relative=(-1,) * 16),
    }
    blm = small_blm(robots=robots)
    blm.save_pretrained(tmp_path)
    again = BLM.from_pretrained(tmp_path)
    assert again.policy.embodiments == robots
    for robot, embodiment in robots.items():
        images = dict.fromkeys(embodiment.views, observation()["images"]["front"])
        seen = {**observation(), "images": images, "state": np.zeros(embodiment.state_dim)}
        chunk = blm.act(seen, robot)
        assert chunk.shape == (4, embodiment.action_dim)
        assert np.array_equal(again.act(seen, robot), chunk)
    told = refusal(blm.act, {**observation(), "state": np.zeros(6)}, "arm")
    assert "lacks 'top'" in told and '{"images": {"top"}' in told and "joints (degrees)" in told


def test_the_shipped_policy_loads_and_acts():
    blm = BLM.from_pretrained(ROOT / "weights" / "nano", dtype=torch.bfloat16)
    for robot, embodiment in blm.policy.embodiments.items():
        assert embodiment.views == ("front", "wrist") and embodiment.control_hz == 20
        assert embodiment.relative == (*range(embodiment.action_dim - 1), -1)
        seen = {**observation(), "state": np.zeros(embodiment.state_dim)}
        assert blm.act(seen, robot).shape == (16, embodiment.action_dim)


def test_a_language_model_alone_answers_but_does_not_act(tmp_path):
    small_blm(policy=False).save_pretrained(tmp_path)
    blm = BLM.from_pretrained(tmp_path)
    assert isinstance(blm.answer([], "Where is the red cube?", max_new_tokens=4), str)
    assert "python train_policy.py" in refusal(blm.act, observation(), "panda")


def test_stages_keep_their_records(tmp_path):
    assert load_training(tmp_path) == {}
    (tmp_path / "training.json").write_text('{"sft": {"stage": "sft", "step": 5}}')
    assert load_training(tmp_path) == {"sft": {"stage": "sft", "step": 5}}
    # the record of the model that training started from is kept too
    assert load_training(ROOT / "weights" / "base")["sft"]["stage"] == "sft"


def test_the_order_of_robots_in_the_file_does_not_matter(good, folder):
    path = folder / "policy.json"
    about = json.loads(path.read_text())
    about["embodiments"] = dict(reversed(about["embodiments"].items()))
    path.write_text(json.dumps(about))
    for robot in ROBOTS:
        seen = observation(robot)
        chunk = BLM.from_pretrained(good).act(seen, robot)
        assert np.array_equal(BLM.from_pretrained(folder).act(seen, robot), chunk)
    assert list(BLM.from_pretrained(folder).policy.embodiments) == list(ROBOTS)


def test_a_policy_belongs_to_what_it_was_trained_on(blm, folder):
    of = backbone_hash(blm.vlm, blm.processor, 2)
    tuned = small_blm()
    tuned.vlm.model.layers[2].mlp.down_proj.weight.data += 1  # behind block k = 2
    assert backbone_hash(tuned.vlm, tuned.processor, 2) == of
    assert backbone_hash(tuned.vlm, tuned.processor, 3) != backbone_hash(blm.vlm, blm.processor, 3)
    tuned.vlm.model.layers[1].mlp.down_proj.weight.data += 1
    assert backbone_hash(tuned.vlm, tuned.processor, 2) != of
    words = small_blm(corpus=["another text altogether, as long as this"])
    words.vlm = blm.vlm
    assert backbone_hash(words.vlm, words.processor, 2) != of

    def larger(folder):
        path = folder / "preprocessor_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({**settings, "max_pixels": 64 * 64}))

    for change in (
        lambda folder: small_blm(seed=1).vlm.save_pretrained(folder),
        lambda folder: words.processor.tokenizer.save_pretrained(folder),
        larger,
    ):
        shutil.copytree(folder, folder / "other")
        change(folder / "other")
        assert "another language model" in refusal(BLM.from_pretrained, folder / "other")
        shutil.rmtree(folder / "other")


FILES = ["config.json", "model.safetensors", "tokenizer.json", "policy.json", "policy.safetensors"]


@pytest.mark.parametrize("name", FILES)
def test_a_folder_without_a_file_is_told(folder, name):
    (folder / name).unlink()
    assert name in refusal(BLM.from_pretrained, folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"no such thing", b"\xff\xfe\0", b"[]", b'{"a": NaN}'])
def test_a_broken_file_is_told(folder, name, content):
    (folder / name).write_bytes(content)
    assert name in refusal(BLM.from_pretrained, folder)


@pytest.mark.parametrize("name", ["model.safetensors", "policy.safetensors"])
def test_a_file_that_ends_too_soon_is_told(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])
    assert name in refusal(BLM.from_pretrained, folder)


def test_no_folder_is_told(tmp_path):
    assert "no model folder" in refusal(BLM.from_pretrained, tmp_path / "nowhere")


WEIGHTS = [
    ("perceiver.queries", torch.nan, "queries holds numbers that are not finite"),
    ("modulation.bias", torch.inf, "modulation.bias holds numbers that are not finite"),
    ("normalizer.action_mean", torch.nan, "action_mean holds numbers that are not finite"),
    ("normalizer.state_std", torch.nan, "state_std holds"),
    ("normalizer.state_std", 0.0, "state_std is not positive"),
    ("normalizer.action_std", -1.0, "action_std is not positive"),
    ("normalizer.fitted", False, "a robot has no statistics"),
    ("queries", 0.0, "does not fit policy.json.*queries"),  # unknown
    ("perceiver.queries", None, "does not fit policy.json.*perceiver.queries"),  # missing
]


@pytest.mark.parametrize("name, value, word", WEIGHTS)
def test_weights_that_are_none_are_refused(folder, name, value, word):
    tensors = load_file(folder / "policy.safetensors")
    tensor = tensors.pop(name, torch.zeros(3))
    if value is not None:
        tensors[name] = tensor.index_fill(0, torch.tensor([1]), value)
    save_file(tensors, folder / "policy.safetensors")
    told = refusal(BLM.from_pretrained, folder)
    assert "policy.safetensors" in told
    assert all(part in told for part in word.split(".*")), told


def test_weights_of_another_shape_are_refused(folder):
    path = folder / "policy.safetensors"
    tensors = load_file(path)
    tensors["perceiver.queries"] = torch.zeros(5, 16)
    save_file(tensors, path)
    assert "perceiver.queries" in refusal(BLM.from_pretrained, folder)
    shutil.copy(folder / "model.safetensors", path)
    assert "does not fit policy.json" in refusal(BLM.from_pretrained, folder)


def places(content, path=()):
    """Every place in nested JSON."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


ODD = [None, True, -1, 0, 1.5, 10**9, 10**18, float("nan"), 1e308, "", "panda", [], {}, [1], "gone"]


def test_a_changed_description_loads_or_is_told(folder):
    """Whatever policy.json holds: one line, or a policy that acts or says why not."""
    path = folder / "policy.json"
    text = path.read_text()
    rng = random.Random(0)
    cases = [(place, value) for place in places(json.loads(text)) for value in ODD]
    refused = 0
    for place, value in rng.sample(cases, 150):
        about = json.loads(text)
        part = about
        for key in place[:-1]:
            part = part[key]
        if value == "gone":
            del part[place[-1]]
        else:
            part[place[-1]] = value
        path.write_text(json.dumps(about))
        try:
            BLM.from_pretrained(folder)
        except UserError as error:
            assert "policy" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 130


def robot(**changes):
    """A description whose only robot has these fields."""
    return {"embodiments": {"panda": {"index": 0, "state_dim": 17, "action_dim": 8, **changes}}}


DESCRIPTIONS = [
    ({"version": 1}, "format version 1"),
    ({"version": None}, "format version None"),
    ({"version": 4, "views": ["wrist", "front"]}, "views"),
    ({"embodiments": {"panda": {"state_dim": 17, "action_dim": 8}}}, "lacks 'index'"),
    ({"embodiments": {"panda": {"index": 1, "state_dim": 17, "action_dim": 8}}}, "index"),
    (robot(state_dim=-1), "panda: state_dim is -1"),
    (robot(action_dim=0), "action_dim is 0"),
    (robot(views=[]), "0 cameras"),
    (robot(views=["a", "b", "c", "d"]), "4 cameras"),
    (robot(views=["top", "top"]), "two cameras have the same name"),
    (robot(views=["top", "../x"]), "camera called '../x'"),
    (robot(relative=[0, 1]), "one entry per action dimension"),
    (robot(relative=[0, 1, 2, 3, 4, 5, 6, 17]), "relative to 17"),
    (robot(relative=[0, 1, 2, 3, 4, 5, 5, -1]), "relative to the same one"),
    (robot(control_hz=0), "control_hz is 0"),
    (robot(state=""), "state is ''"),
    (robot(color="red"), "color"),
    ({"config": {}}, "sizes are missing"),
    ({"config": {"blind": True}}, "blind"),
    ({"backbone": "0" * 16}, "another language model"),
]


@pytest.mark.parametrize("changes, word", DESCRIPTIONS, ids=[word for _, word in DESCRIPTIONS])
def test_mistakes_in_a_description_are_told(folder, changes, word):
    path = folder / "policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    told = refusal(BLM.from_pretrained, folder)
    assert word in told and "python train_policy.py" in told


@pytest.mark.parametrize("version", [2, 3, 4])
def test_older_policies_act_as_before(folder, version):
    blm = BLM.from_pretrained(folder)
    path = folder / "policy.json"
    about = json.loads(path.read_text())
    if version < 4:
        del about["config"]["text_first"]
    # now stored per robot, then once for all
    about["views"] = ["front", "wrist"]
    for robot in about["embodiments"].values():
        for name in ("views", "relative", "control_hz", "state", "action"):
            del robot[name]
    path.write_text(json.dumps({**about, "version": version}))
    if version == 2:  # it had no waypoint head
        for name in ("num_waypoints", "waypoint_loss_weight"):
            del about["config"][name]
        path.write_text(json.dumps({**about, "version": version}))
        weights = load_file(folder / "policy.safetensors")
        kept = {name: weights[name] for name in weights if not name.startswith("waypoint_head")}
        save_file(kept, folder / "policy.safetensors")
    old = BLM.from_pretrained(folder)
    assert np.array_equal(
        old.act(observation("widowx"), "widowx"), blm.act(observation("widowx"), "widowx")
    )


def test_a_policy_may_read_the_instruction_first(blm):
    seen = observation("widowx")
    chunk = blm.act(seen, "widowx")
    reads_words_first = copy.deepcopy(blm)
    reads_words_first.policy = Policy(
        dataclasses.replace(blm.policy.config, text_first=True),
        blm.policy.condition_size,
        blm.policy.embodiments,
    )
    reads_words_first.policy.load_state_dict(blm.policy.state_dict())
    assert not np.array_equal(reads_words_first.act(seen, "widowx"), chunk)
    assert np.array_equal(blm.act(seen, "widowx"), chunk)


def test_a_policy_that_numbered_patches_behind_the_words_is_refused(folder):
    path = folder / "policy.json"
    about = json.loads(path.read_text())
    about["config"]["text_first"] = True
    path.write_text(json.dumps({**about, "version": 4}))
    assert "from its beginning" in refusal(BLM.from_pretrained, folder)


# ---- acting


def test_act_has_the_robots_shape_and_obeys_temperature_and_seed(blm):
    for robot, embodiment in ROBOTS.items():
        seen = observation(robot)
        chunk = blm.act(seen, robot)
        sampled = blm.act(seen, robot, temperature=1.0, seed=[5, 0])
        assert chunk.shape == sampled.shape == (4, embodiment.action_dim)
        assert chunk.dtype == sampled.dtype == np.float32 and np.isfinite(chunk).all()
        assert np.array_equal(chunk, blm.act(seen, robot))
        assert np.array_equal(chunk, blm.act(seen, robot, seed=1))
        assert np.array_equal(sampled, blm.act(seen, robot, temperature=1.0, seed=[5, 0]))
        assert not np.array_equal(sampled, chunk)
        assert not np.array_equal(sampled, blm.act(seen, robot, temperature=1.0, seed=[5, 1]))


def test_act_looks_at_everything(blm):
    seen = observation()
    chunk = blm.act(seen, "panda")
    other = observation(seed=1)
    front = {**seen["images"], "front": other["images"]["front"]}
    wrist = {**seen["images"], "wrist": other["images"]["wrist"]}
    swapped = {"front": seen["images"]["wrist"], "wrist": seen["images"]["front"]}
    for changed in (
        {**seen, "images": front},
        {**seen, "images": wrist},
        {**seen, "images": swapped},
        {**seen, "instruction": "Where is the red cube?"},
        {**seen, "state": other["state"]},
    ):
        assert np.abs(blm.act(changed, "panda") - chunk).max() > 1e-4


def test_blocks_behind_k_do_not_run():
    blm, seen = small_blm(), observation()
    chunk = blm.act(seen, "panda")
    last = blm.vlm.model.layers[2]
    last.register_forward_pre_hook(lambda *_: pytest.fail("block 3 of k = 2"))
    assert np.array_equal(blm.act(seen, "panda"), chunk)


def test_intents_of_a_batch_equal_those_of_one(blm):
    pictures = [list(observation(seed=i)["images"].values()) for i in range(3)]
    texts = ["push", "push the cube to the goal", "Where is the red cube?"]
    hidden, mask = blm.intent_states(pictures, texts)
    for i in range(3):
        alone, own = blm.intent_states(pictures[i : i + 1], texts[i : i + 1])
        assert own.all() and mask[i].sum() == own.sum()
        assert torch.allclose(hidden[i, mask[i]], alone[0], atol=1e-4)


def transparent(picture):
    """Opaque, but with a transparent frame of another color where `picture` is white."""
    alpha = np.full((*picture.shape[:2], 1), 255, np.uint8)
    rgba = np.concatenate([picture, alpha], axis=2)
    rgba[:4] = (10, 200, 30, 0)
    return Image.fromarray(rgba, "RGBA")


PICTURES = {
    "read-only": lambda v: np.frombuffer(v.tobytes(), np.uint8).reshape(v.shape),
    "torch": lambda v: torch.from_numpy(v.copy()),
    "torch with gradient": lambda v: torch.tensor(v / 255, requires_grad=True),
    "torch float CHW": lambda v: torch.from_numpy(v.copy()).permute(2, 0, 1).float() / 255,
    "torch float CHW, batch": lambda v: torch.from_numpy(v.copy()).permute(2, 0, 1)[None] / 255,
    "torch double": lambda v: torch.from_numpy(v.copy()).double() / 255,
    "CHW": lambda v: v.transpose(2, 0, 1),
    "float": lambda v: v / 255,
    "float32": lambda v: (v / 255).astype(np.float32),
    "batch": lambda v: v[None],
    "PIL": Image.fromarray,
    "PIL RGBA": lambda v: Image.fromarray(v).convert("RGBA"),
    "PIL transparent": transparent,
    "negative strides": lambda v: v[..., ::-1].copy()[..., ::-1],
    "turned twice": lambda v: v[::-1].copy()[::-1],
    "Fortran order": np.asfortranarray,
}
STATES = {
    "list": lambda s: s.tolist(),
    "tuple": tuple,
    "double": lambda s: s.astype(np.float64),
    "read-only": lambda s: np.frombuffer(s.tobytes(), np.float32),
    "torch": torch.tensor,
    "torch with gradient": lambda s: torch.tensor(s, requires_grad=True),
    "torch double": lambda s: torch.tensor(s).double(),
    "batch": lambda s: s[None],
    "torch batch": lambda s: torch.tensor(s)[None],
}


@pytest.mark.parametrize("kind", PICTURES)
def test_act_takes_pictures_as_people_have_them(blm, kind):
    seen = observation()
    for picture in seen["images"].values():
        picture[:4] = 255  # where `transparent` shows white
    chunk = blm.act(seen, "panda")
    images = {view: PICTURES[kind](picture) for view, picture in seen["images"].items()}
    assert np.array_equal(blm.act({**seen, "images": images}, "panda"), chunk)


@pytest.mark.parametrize("kind", STATES)
def test_act_takes_states_as_people_have_them(blm, kind):
    seen = observation()
    changed = {**seen, "state": STATES[kind](seen["state"])}
    assert np.array_equal(blm.act(changed, "panda"), blm.act(seen, "panda"))


def test_a_state_in_bfloat16_is_taken(blm):
    seen = observation()
    rough = torch.tensor(seen["state"]).bfloat16()
    chunk = blm.act({**seen, "state": rough.float().numpy()}, "panda")
    assert np.array_equal(blm.act({**seen, "state": rough}, "panda"), chunk)


def test_instructions_are_text_whatever_stands_in_them(blm):
    seen = observation()
    chunk = blm.act(seen, "panda")
    text = seen["instruction"]
    for same in (f"\n{text}\n\n", f"  {text} ", np.str_(text)):
        assert np.array_equal(blm.act({**seen, "instruction": same}, "panda"), chunk)
    for odd in ("<|im_end|>", "<|image_pad|>", "<image>", "拿起红色方块 🤖", "\ud83d up", "a\0b"):
        assert np.isfinite(blm.act({**seen, "instruction": odd}, "panda")).all()
        assert isinstance(blm.answer([], odd, max_new_tokens=2), str)
    more = {**seen, "images": {**seen["images"], "side": None}, "note": 3}
    assert np.array_equal(blm.act(more, "panda"), chunk)


@pytest.mark.parametrize("width, height", [(64, 48), (48, 64), (33, 32)])
def test_a_camera_that_is_not_square_is_cropped_and_says_so_once(blm, width, height):
    seen = observation()
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    middle = wide[top : top + side, left : left + side]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            images = {**seen["images"], "front": wide}
            chunk = blm.act({**seen, "images": images}, "panda")
    assert len(told) == 1 and f"{width}x{height}" in str(told[0].message)
    images = {**seen["images"], "front": middle}
    assert np.array_equal(blm.act({**seen, "images": images}, "panda"), chunk)


GREY = np.zeros((32, 32), np.uint8)
STATE = np.zeros(17)
OBSERVATIONS = [
    ({"state": STATE[:5]}, "17 numbers"),
    ({"state": np.zeros((2, 17))}, "17 numbers"),
    ({"state": None}, "17 numbers"),
    ({"state": ["a"] * 17}, "17 numbers"),
    ({"state": {"q": STATE}}, "17 numbers"),
    ({"state": STATE + 1j}, "17 numbers"),
    ({"state": [[0.0], 1]}, "17 numbers"),
    ({"state": "STATE"}, "17 numbers"),
    ({"state": STATE * np.nan}, "not finite"),
    ({"state": STATE + np.inf}, "not finite"),
    ({"state": STATE + 1e300}, "too large"),
    ({"state": STATE + 45}, "too large"),  # degrees
    ({"instruction": " "}, "instruction is ' '"),
    ({"instruction": None}, "instruction is None"),
    ({"instruction": ["push"]}, "instruction is ['push']"),
    ({"instruction": b"push"}, "instruction is b'push'"),
    ({"instruction": 3}, "instruction is 3"),
    ({"instruction": np.array("push")}, "instruction is array"),
    ({"instruction": "push the cube " * 5000}, "longer than this policy's 96"),
    ({"images": {}}, "lacks 'front'"),
    ({"images": {"front": GREY}}, "lacks 'wrist'"),
    ({"images": None}, "observation"),
    ({"images": [GREY, GREY]}, "observation"),
    ({"images": {"observation.images.front": GREY}}, "lacks 'front'"),
]
FRONTS = [
    (GREY, "front picture"),
    (None, "front picture"),
    ("front.png", "front picture"),
    ([[1, 2]], "front picture"),
    (np.zeros((32, 32, 3), np.int64), "front picture"),
    (np.zeros((32, 32, 4), np.uint8), "front picture"),
    (np.zeros((2, 32, 32, 3), np.uint8), "front picture"),
    (np.full((32, 32, 3), 255.0), "front picture: a picture of floats must lie in 0..1"),
    (np.full((32, 32, 3), -0.1), "0..1"),
    (np.full((32, 32, 3), np.nan), "0..1"),
    (np.zeros((0, 0, 3), np.uint8), "too thin"),
    (np.zeros((0, 0, 3)), "front picture"),
    (np.zeros((1, 1, 3), np.uint8), "too thin"),
    (torch.zeros(3, 3), "front picture"),
]


@pytest.mark.parametrize("changes, word", OBSERVATIONS, ids=lambda value: str(value)[:40])
def test_mistakes_in_an_observation_are_told(blm, changes, word):
    assert word in refusal(blm.act, {**observation(), **changes}, "panda")


def test_a_robot_trained_in_degrees_acts_in_degrees(blm):
    seen = observation()
    assert "too large" in refusal(blm.act, {**seen, "state": STATE + 170}, "panda")
    usual = blm.policy.normalizer.state_std
    before = usual.clone()
    usual.fill_(60.0)
    blm.act({**seen, "state": STATE + 170}, "panda")
    for state in (STATE + 1000, STATE * np.nan):
        assert "too large" in refusal(blm.act, {**seen, "state": state}, "panda")
    usual.copy_(before)


@pytest.mark.parametrize("front, word", FRONTS, ids=lambda value: str(value)[:20])
def test_mistakes_in_a_picture_are_told(blm, front, word):
    seen = observation()
    images = {**seen["images"], "front": front}
    assert word in refusal(blm.act, {**seen, "images": images}, "panda")


@pytest.mark.parametrize("name", ["images", "state", "instruction"])
def test_what_an_observation_lacks_is_told(blm, name):
    seen = observation()
    del seen[name]
    assert f"lacks '{name}'" in refusal(blm.act, seen, "panda")


@pytest.mark.parametrize("what", [None, [], "push", 3, [1, 2, 3]])
def test_what_is_no_observation_is_told(blm, what):
    assert "the observation" in refusal(blm.act, what, "panda")


@pytest.mark.parametrize("robot", ["pandas", "Panda"])
def test_a_robot_that_is_nearly_one_is_told(blm, robot):
    assert "did you mean panda" in refusal(blm.act, observation(), robot)


@pytest.mark.parametrize("robot", ["", None, 0, ["panda"], b"panda"])
def test_what_is_no_robot_is_told(blm, robot):
    assert "unknown robot" in refusal(blm.act, observation(), robot)


@pytest.mark.parametrize("question", ["  ", "", None, ["Where?"], b"Where?", 3])
def test_what_is_no_question_is_told(blm, question):
    assert "the question is" in refusal(blm.answer, [], question)


@pytest.mark.parametrize("seed, temperature", [(-1, 1.0), ("a", 1.0), (1.5, 1.0), (1, "hot")])
def test_a_seed_or_temperature_that_is_none_is_told(blm, seed, temperature):
    told = refusal(blm.act, observation(), "panda", temperature=temperature, seed=seed)
    assert "temperature and seed" in told


def test_a_long_instruction_is_refused_before_the_network_runs():
    blm, seen = small_blm(), observation()
    blm.vlm.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    told = refusal(blm.act, {**seen, "instruction": "push the cube " * 90}, "panda")
    assert "shorten the instruction" in told


def test_act_never_returns_nan():
    blm, seen = small_blm(), observation()
    assert "not finite" in refusal(blm.act, seen, "panda", temperature=float("nan"))
    blm.policy.out_norm.register_forward_hook(lambda _, __, out: out * torch.nan)
    assert "not finite" in refusal(blm.act, seen, "panda")
