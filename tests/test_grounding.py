"""Auxiliary heads of Stage I learn what is in the image, for what is asked, and nothing else."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file
from squares import write_squares

from checkpoint import VisionConfig, VLMConfig
from cli import UserError
from data.conversations import Row
from nano.grounding import RIGHT, ROLES, UNKNOWN, C, Grounding, Scene, option_tokens
from nano.scenes import CLASSES, Scenes
from processor import Processor, train_tokenizer
from train_sft import INPUTS
from vlm import VLM

TINY = VLMConfig(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    mrope_section=(4, 4, 4),
    vision_config=VisionConfig(
        depth=2,
        hidden_size=48,
        intermediate_size=96,
        num_heads=2,
        out_hidden_size=48,
        fullatt_block_indexes=[1],
    ),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Scenes(str(write_squares(tmp_path_factory.mktemp("squares"))))


@pytest.fixture(scope="module")
def processor(corpus):
    return Processor(train_tokenizer([*corpus.texts(), "A) B) C) peg bin target: "], 300))


def heads_of(processor, **changes):
    torch.manual_seed(0)
    return Grounding(TINY.for_tokenizer(processor.tokenizer), processor.tokenizer, 2, **changes)


def batch_of(rows, processor, **changes):
    batch = processor.pack(rows)
    return batch | heads_of(processor, **changes).targets(rows, batch)


def forward(batch, heads, processor):
    """(VLMOutput of a new model, losses, their sum)."""
    torch.manual_seed(1)
    model = VLM(TINY.for_tokenizer(processor.tokenizer))
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    if heads.pictures_only:
        out = model(**inputs, num_layers=heads.intent_layer)
    else:
        out = model(**inputs, logits_at=F.pad(batch["labels"][:, 1:] >= 0, (0, 1)))
    losses = heads.losses(out, batch, [max(1.0, share) for share in heads.count(batch)])
    return out, losses


def picture(patches, opening=0.0, **objects):
    """The grounding of a picture: patches {(row, column): label}; objects in pixels and m."""
    letters = ["A"] * 64
    for (row, column), label in patches.items():
        letters[8 * row + column] = chr(ord("A") + CLASSES.index(label))
    return {"patches": "".join(letters), "objects": objects, "opening": opening}


def row_of(question, grounding, processor):
    """(batch, numbers of each token that learns, ids of the text) for a row with one question."""
    content = [{"type": "image"} for _ in grounding]
    content.append({"type": "text", "text": question["question"]})
    answer = {"role": "assistant", "content": question["answer"]}
    media = [("image", np.zeros((128, 128, 3), np.uint8))] * len(grounding)
    record = {"questions": [question], "grounding": grounding}
    row = Row([[{"role": "user", "content": content}, answer]], media, record)
    batch = batch_of([row], processor)
    return batch, batch["answer_number"].numpy(), batch["input_ids"][0].tolist()


def command_row(roles, places, points=()):
    """A row of one picture with a command before it."""
    text = {"type": "text", "text": "bin"}
    media = [("image", np.zeros((128, 128, 3), np.uint8))]
    command = {"roles": [roles], "places": places, "points": points}
    message = {"role": "user", "content": [text, {"type": "image"}]}
    return Row([[message]], media, {"commands": [command]})


def test_places_are_where_the_centers_lead(corpus, processor):
    row = corpus.row(3)
    batch = batch_of([row], processor)
    places = batch["patch_place"].view(-1, 64, 5)
    near = places[..., 0].isfinite()
    assert near.sum() == len(row.media) and torch.equal(near.flatten(), batch["patch_class"] > 0)
    for view, patch in near.nonzero().tolist():
        x, y, depth = row.record["grounding"][view]["objects"]["red cube"]
        offset = (x / 16 - patch % 8 - 0.5, y / 16 - patch // 8 - 0.5)
        expected = (*offset, 10 * depth - 6, x / 16 - 4, y / 16 - 4)
        assert np.allclose(places[view, patch], expected, atol=1e-5)


def test_tokens_of_an_answer_know_what_it_depends_on_and_only_they(corpus, processor):
    rows = [corpus.row(3), corpus.row(4)]
    batch = batch_of(rows, processor)
    tokens = batch["answer_token"]
    learned = (batch["labels"][0, 1:] >= 0).nonzero()[:, 0]  # where answers are predicted from
    assert torch.equal(tokens, learned)
    answers = (tokens.diff(prepend=torch.tensor([-9])) > 1).cumsum(0)
    assert answers.max() == 6
    for number, row in ((2, rows[0]), (5, rows[1])):  # "where", the second of three
        place = row.record["questions"][1]["place"]
        mine = batch["answer_number"][answers == number]
        assert len(mine) > 3 and np.allclose(mine[:, :2], np.array(place) / 16 - 4)
        weights = batch["answer_weight"][answers == number]
        assert torch.allclose(weights, torch.tensor(len(mine) ** -0.5))


SCENE = [
    picture({(1, 2): "peg", (7, 0): "target"}, 0.0, gripper=[88, 72, 0.7], peg=[48, 24, 0.7],
            target=[1600, 120, 0.6]),
    picture({(4, 4): "gripper"}, 1.0, gripper=[72, 72, 0.6]),
]  # fmt: skip


@pytest.mark.parametrize("listed", [False, True])
def test_an_answer_knows_places_of_gripper_and_things(processor, listed):
    question = {"question": "What is near?", "answer": "peg", "form": "words"}
    question |= {"labels": ["target", "peg"], "place": "peg"}
    if listed:
        question |= {"answer": "peg: B", "form": "choice", "options": ["target", "peg"]}
        question["question"] += " A) target B) peg"
    batch, numbers, ids = row_of(question, SCENE, processor)
    tokens = batch["answer_token"].tolist()
    answer = [i for i, token in enumerate(tokens) if batch["labels"][0, token + 1] >= 0]
    for i in answer:
        places = numbers[i, 4:40].reshape(4, 3, 3)  # pictures; gripper, two things; x, y, depth
        assert np.allclose(places[:2, 0], [[1.5, 0.5, 1], [0.5, 0.5, 0]], atol=1e-5)
        assert np.isnan(places[2:]).all() and np.isnan(places[0, 1]).all()  # its center is far away
        assert np.allclose(places[0, 2], [-1, -2.5, 1], atol=1e-5)
        assert numbers[i, 40:42].tolist() == [0, 1] and np.isnan(numbers[i, 42:]).all()
        assert numbers[i, :2].tolist() == [-1, -2.5] and np.isnan(numbers[i, RIGHT])
    options = [i for i in range(len(tokens)) if i not in answer]
    assert len(options) == (2 if listed else 0)
    for i, start, right, letter in zip(options, "tp", (-1, 1), (-2, -1)):
        assert processor.tokenizer.decode(ids[tokens[i] :]).strip().startswith(start)
        assert numbers[i, 2:4].tolist() == [right, letter] and batch["answer_weight"][i] == 1
        assert numbers[i, :2].tolist() == [-1, -2.5] if right > 0 else np.isnan(numbers[i, 0])


def test_in_a_clip_an_answer_knows_how_far_the_gripper_moves():
    still = picture({}, 1.0, gripper=[72, 104, 0.6])
    moved = picture({}, 0.25, gripper=[72, 72, 0.6])  # two patches up
    moments = Scene([still, moved, moved], 3).moments(["peg"])
    assert moments[36:39].tolist() == [1, 0.25, 0.25]
    assert np.allclose(moments[[40, 41, 43]], [2**0.5, 2**0.5, 0])
    assert np.isnan(moments[[39, 42, 44, 45]]).all()
    assert np.isnan(Scene([still, moved], 2).moments(["peg"])[40:]).all()  # two cameras


def test_the_first_token_that_tells_an_option_from_the_others(processor):
    encode = processor.tokenizer.encode
    ids = list(encode("Which? A) the red cube B) the peg C) the bin"))
    tokens = option_tokens(ids, ["the red cube", "the peg", "the bin"], processor.tokenizer)
    for token, text in zip(tokens, ("red cube", "peg", "bin")):
        assert processor.tokenizer.decode(ids[token:]).strip().startswith(text[0])
    same = option_tokens(list(encode("Which? A) peg B) peg")), ["peg", "peg"], processor.tokenizer)
    assert len(same) == 2


def test_blind_rows_and_others_teach_no_patches(corpus, processor):
    row = corpus.row(3)
    row.record = {**row.record, "grounding": None}
    other = Row([[{"role": "user", "content": "Hi"}]], [], {"messages": []})
    batch = batch_of([row, other], processor)
    assert (batch["patch_class"] == UNKNOWN).all() and batch["patch_place"].isnan().all()
    assert batch["answer_number"][:, 4:].isnan().all()  # but the words' own targets remain
    heads = heads_of(processor)
    _, losses = forward(batch, heads, processor)
    assert losses["patches_llm"] == 0 and losses["patches_vit"] == 0 and losses["answers"] > 0
    batch = batch_of([other], processor)
    out, losses = forward(batch, heads, processor)
    assert list(losses) == heads.names and all(loss == 0 for loss in losses.values())
    assert heads.figures(out, batch) == {}


def test_centers_behind_the_camera_do_not_reach_the_loss(corpus, processor):
    def loss_with(far):
        rows = [corpus.row(0), corpus.row(1)]
        rows[1].record = deepcopy(rows[1].record)
        for picture in rows[1].record["grounding"]:
            picture["objects"]["green cube"][0] += 16 * far
        batch = batch_of(rows, processor, pictures_only=True)
        _, losses = forward(batch, heads_of(processor, pictures_only=True), processor)
        return float((losses["patches_vit"] + losses["patches_llm"]).detach())

    assert loss_with(500.0) == loss_with(-9.0) != loss_with(0.0)


def test_the_token_head_lays_its_patches_where_the_pixels_are(processor):
    heads = heads_of(processor)
    torch.nn.init.zeros_(heads.llm[1].bias)
    hidden = torch.zeros(1, 32, 48)  # image tokens of two pictures, 4 x 4 each
    hidden[0, 16 + 4 * 1 + 2] = torch.linspace(-1, 1, 48)  # second picture, row 1, column 2

    out = SimpleNamespace(hidden_states=[0, 0, hidden], patch_features=torch.zeros(128, 48))
    ids = torch.full((1, 32), heads.image_token)
    classes, places = heads.read_patches(out, {"input_ids": ids})["llm"]
    assert classes.shape == (128, len(CLASSES)) and places.shape == (128, 5)
    read = torch.cat([classes, places], 1)
    hit = (read - read[0]).abs().sum(-1).view(2, 8, 8) > 1e-6
    assert hit.nonzero().tolist() == [[1, 2, 4], [1, 2, 5], [1, 3, 4], [1, 3, 5]]


def test_every_head_learns_and_shares_of_a_step_add_up(corpus, processor):
    rows = [corpus.row(i) for i in range(4)]
    points = [[0.1, 0.0, 0.02], [-0.1, 0.2, 0.3]]
    rows.append(command_row("B" + "A" * 62 + "C", [[8, 8, 0.6], [120, 120, 0.7]], points))
    heads = heads_of(processor)
    totals = heads.count(batch_of(rows, processor))
    sums = []
    for parts in ([rows], [rows[:1], rows[1:]]):
        heads.zero_grad()
        batches = [batch_of(part, processor) for part in parts]
        shares = [heads.count(batch) for batch in batches]
        assert np.allclose(np.sum(shares, axis=0), totals)
        losses = []
        for batch in batches:
            out, _ = forward(batch, heads, processor)
            losses.append(sum(heads.losses(out, batch, [max(1.0, t) for t in totals]).values()))
        sum(losses).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in heads.parameters())
        sums.append(float(sum(losses).detach()))
    assert np.isclose(*sums)
    figures = heads.figures(out, batch)
    assert {name for name, values in figures.items() if len(values) == 0} == {"option_accuracy"}


def test_pictures_of_another_size_are_told(processor):
    row = Row([[{"role": "user", "content": [{"type": "image"}]}]], [], {})
    row.media = [("image", np.zeros((64, 256, 3), np.uint8))]
    with pytest.raises(UserError, match="8 x 8 patches"):
        batch_of([row], processor)


@pytest.mark.parametrize("name", ["nano", "base", "listen"])
def test_shipped_heads_load(name, processor):
    folder = ROOT / "weights" / name
    heads = Grounding(VLM.from_pretrained(folder).config, processor.tokenizer, intent_layer=3)
    stored = load_file(folder / "heads.safetensors")
    heads.load(stored)
    known = stored["vit.1.bias"]
    assert torch.equal(heads.vit[1].bias[: len(known) - 3], known[:-3])
    assert torch.equal(heads.vit[1].bias[-3:], known[-3:])


def test_a_head_that_knew_pictures_alone_keeps_what_it_knew(processor):
    heads = heads_of(processor)
    old = torch.arange(6.0)
    heads.load({"place.1.bias": old})
    assert torch.equal(heads.place[1].bias.view(2, 6)[:, :3], old.view(2, 3))


def test_patches_know_their_role_in_a_command_and_other_rows_teach_none(corpus, processor):
    letters = ["A"] * 64
    letters[9] = "B"
    letters[20] = "C"
    rows = [corpus.row(2), command_row("".join(letters), [[24, 24, 0.6], None])]
    batch = batch_of(rows, processor)
    roles = batch["patch_role"].view(-1, 64)
    assert (roles[:-1] == UNKNOWN).all()
    assert roles[-1].nonzero()[:, 0].tolist() == [9, 20]
    assert roles[-1, [9, 20]].tolist() == [1, 2]
    places = batch["command_place"]
    assert places[0].isnan().all() and places[1, 1].isnan().all()
    # x, y and depth in the image; the position in the robot's frame is unknown
    place = torch.tensor([24 / 16 - 4, 24 / 16 - 4, 0.0])
    assert torch.allclose(places[1, 0, :3], place, atol=1e-5) and places[1, 0, 3:].isnan().all()
    known = command_row("".join(letters), [[24, 24, 0.6], None], [[0.1, -0.2, 0.02], None])
    places = batch_of([known], processor)["command_place"][0]
    assert torch.allclose(places[0, 3:], torch.tensor([1.0, -2.0, 0.2]))  # decimeters
    assert places[1].isnan().all()
    # the last token of a row has seen all of it
    lengths = [sum(own) for own in batch["segments"]]
    assert batch["last_token"].tolist() == (np.cumsum(lengths) - 1).tolist()
    _, losses = forward(batch, heads_of(processor), processor)
    assert losses["commands"] > 0
    _, losses = forward(batch_of(rows[:1], processor), heads_of(processor), processor)
    assert losses["commands"] == 0


def test_commands_that_share_pictures_teach_as_rows_of_their_own(corpus, processor):
    one = command_row("B" + "A" * 63, [[8, 8, 0.6], None])
    other = command_row("A" * 63 + "C", [[24, 24, 0.6], [8, 8, 0.7]])
    other.conversations[0][0]["content"][0]["text"] = "a bin, please"
    commands = one.record["commands"] + other.record["commands"]
    both = Row(one.conversations + other.conversations, one.media, {"commands": commands})
    heads = heads_of(processor)
    results = []
    for rows in ([corpus.row(2), both, corpus.row(3)], [corpus.row(2), one, other, corpus.row(3)]):
        batch = batch_of(rows, processor)
        _, losses = forward(batch, heads, processor)
        results.append((len(batch["pixel_values"]), losses))
    (few, shared), (many, alone) = results
    assert few == many - 64  # the ViT sees the picture once
    for name, loss in shared.items():
        assert torch.allclose(loss, alone[name], atol=1e-5), name


def test_heads_that_knew_fewer_things_are_taken_over(processor):
    heads = heads_of(processor)
    old = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    before = deepcopy(old)
    old = {name: tensor for name, tensor in old.items() if not name.startswith(("role", "place"))}
    for name in ("vit.1.weight", "vit.1.bias", "llm.1.weight", "llm.1.bias"):
        places = 3 if name.startswith("vit") else 5
        own = old[name].unflatten(0, (1 if places == 3 else 4, -1))
        old[name] = 2 * torch.cat([own[:, :4], own[:, -places:]], 1).flatten(0, 1)
    heads.load(old)
    for name, places in (("vit.1.bias", 3), ("llm.1.weight", 5)):
        groups = 1 if places == 3 else 4
        new = heads.state_dict()[name].unflatten(0, (groups, C + places))
        was = before[name].unflatten(0, (groups, C + places))
        assert torch.equal(new[:, :4], 2 * was[:, :4])
        assert torch.equal(new[:, 4:C], was[:, 4:C])
        assert torch.equal(new[:, C:], 2 * was[:, C:])
    assert heads.role[1].out_features == 4 * ROLES
