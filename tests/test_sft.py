"""Stage I keeps its promises: answers alone are learned, it overfits, resuming is bit-exact, two processes equal one, dense stops at block k."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nano import grounding as dense
import train_sft
import trainer
from cli import UserError
from conftest import last_state, spawn_two
from model import BLM
from policy import Policy, PolicyConfig
from nano.grounding import DenseHeads
from train_sft import LoRA, Mixture, SFTConfig, add_lora, make_batch, merged, read_row, train
from processor import Processor, Tokenizer, chat, collate, share_stem, train_tokenizer
from vlm import PRESETS, VLM, VisionConfig, VLMConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


class Corpus:
    """Twelve scenes with one coloured square each, of the corpus's own shapes."""
    num_classes = 4

    def __init__(self, folder="", split="train", categories="all"):
        pass

    def validation(self):
        return self

    def texts(self):
        return [text for i in range(len(self)) for turn in self[i]["turns"] for text in turn]

    def __len__(self):
        return 12

    def __getitem__(self, i):
        views, name = 1 + i % 2, list(COLOURS)[i % 3]
        row, column = i * 5 % 8, i * 3 % 8
        images = np.full((views, 128, 128, 3), 128, np.uint8)
        images[:, row * 16:row * 16 + 16, column * 16:column * 16 + 16] = COLOURS[name]
        classes, offsets = np.zeros((views, 8, 8), np.int64), np.zeros((views, 8, 8, 3), np.float32)
        classes[:, row, column], offsets[:, row, column] = 1 + i % 3, (0.2, -0.3, 0.05 * (i % 3))
        point = json.dumps({"point_2d": [column * 16 + 8, row * 16 + 8], "label": f"{name} cube"})
        turns = [("What do you see?", f"a {name} cube"), (f"Point to the {name} cube.", point), ("Is it red?", "yes" if name == "red" else "no")]
        return {"images": list(images), "turns": turns, "often": [9, 9, 1], "things": [], "patch_class": classes, "patch_offset": offsets, "gripper": np.zeros((views, 4), np.float32)}


TINY = VLMConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, mrope_section=(4, 4, 4),
                 vision_config=VisionConfig(depth=2, hidden_size=48, intermediate_size=96, num_heads=2, out_hidden_size=48,
                                            fullatt_block_indexes=[1]))


def patch(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    for name, value in (("Corpus", Corpus), ("ensure", lambda folder: None)):
        monkeypatch.setattr(train_sft.corpora, name, value)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    patch(monkeypatch)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(out, **changes):
    flags = {"model": "tiny", "steps": 6, "batch_size": 4, "warmup": 2, "intent_layer": 2, "vocab_size": 300, "eval_every": 100, "eval_rows": 4,
             "point_scenes": 2, "save_every": 3, "device": "cpu", "dense_steps": 2, "data": "corpus", "backbone": ""}
    return SFTConfig(**{**flags, "out": str(out), **changes})


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Corpus().texts(), 300)


def batch_of(rows, tokenizer, cfg, dense_only=False, corpus=None):
    """make_batch of (number, scene) pairs of the corpus."""
    return make_batch([read_row(corpus or Corpus(), number, scene, cfg, dense_only) for number, scene in rows], Processor(tokenizer), cfg)


def test_labels_cover_answers_and_their_end_only(tokenizer):
    corpus, cfg = Corpus(), SFTConfig(questions=2)
    batch = batch_of([(5, 0), (6, 1)], tokenizer, cfg)
    for scene, ids, labels in zip((0, 1), *(batch[name][0].split([sum(lengths) for lengths in batch["segments"]]) for name in ("input_ids", "labels"))):
        text = tokenizer.fast.decode(ids.tolist(), skip_special_tokens=False)
        learned = tokenizer.fast.decode([i for i in labels.tolist() if i >= 0], skip_special_tokens=False).split("<|im_end|>")[:-1]
        asked = [(question, answer) for question, answer in corpus[scene]["turns"] if question in text]
        assert len(learned) == 2 == len(asked) and set(learned) == {answer for _, answer in asked}
        assert ((labels == -100) | (labels == ids)).all()
        assert (ids == tokenizer.special["<|image_pad|>"]).sum() == 16 * len(corpus[scene]["images"])
    assert len(batch["patch_class"]) == len(batch["pixel_values"]) == 64 * 3


def test_rows_of_a_step_depend_on_seed_and_step_alone(tokenizer):
    mixture, other = (Mixture(SFTConfig(data="corpus", seed=seed)) for seed in (3, 4))
    rows = [mixture.rows_of_step(step, 5) for step in range(12)]
    assert rows[7] == mixture.rows_of_step(7, 5) != other.rows_of_step(7, 5)
    order = [scene for step in rows for _, _, scene in step]
    assert all(sorted(order[i:i + 12]) == list(range(12)) for i in range(0, 60, 12))        # each epoch has each scene once
    assert order[:12] != order[12:24]
    a, b, c = (batch_of([(number, 0)], tokenizer, SFTConfig(questions=2))["input_ids"].tolist() for number in (0, 0, 12))
    assert a == b != c                                                                       # other questions in another epoch
    asked = [read_row(Corpus(), number, 0, SFTConfig(questions=1))[0][0][0]["content"][-1]["text"] for number in range(300)]
    assert 0.75 < asked.count("Is it red?") / 300 < 0.9                                      # nine times as rare as either of the others: 9 in 11


def chats_file(path, n, **more):
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": "Repeat: " + i * "!"}, {"role": "assistant", "content": str(i)}], **more}) + "\n" for i in range(n)))
    return path


def test_a_mixture_holds_its_weights(tmp_path):
    chats_file(tmp_path / "mine.jsonl", 120)
    mixture = Mixture(SFTConfig(data=f"corpus:3, {tmp_path / 'mine.jsonl'}:1"))
    rows = [row for step in range(40) for row in mixture.rows_of_step(step, 10)]
    assert [sum(source == 1 for _, source, _ in rows[i:i + 100]) for i in range(0, 400, 100)] == [25] * 4
    seen = [index for _, source, index in rows if source == 1]
    assert len(seen) == 100 == len(set(seen)) and not {0, 50, 100} & set(seen)              # one in fifty is for validation
    assert list(mixture.validation(1)[1]) == [0, 50, 100]
    assert all(source == 0 for _, source, _ in mixture.rows_of_step(0, 100, dense_only=True))
    with pytest.raises(UserError, match="mine.jsonl:1 has no row in 100"):                  # and none that rounding would lose
        Mixture(SFTConfig(data=f"corpus:300,{tmp_path / 'mine.jsonl'}:1"))


def test_packing_changes_nothing(tokenizer, tmp_path):
    """The same conversations padded, each in a line of its own with its own pictures: the same loss and gradients."""
    torch.manual_seed(0)
    cfg, model = SFTConfig(dense_weight=0), VLM(TINY.for_tokenizer(tokenizer))
    chats_file(tmp_path / "mine.jsonl", 3)
    mixture = Mixture(SFTConfig(data=f"corpus:1,{tmp_path / 'mine.jsonl'}:1"))
    rows = [read_row(mixture.sources[source], number, index, cfg) for number, source, index in mixture.rows_of_step(0, 6)]
    packed = make_batch(rows, Processor(tokenizer), cfg)
    assert {len(lengths) for lengths in packed["segments"]} == {1, 4}                        # a stem and three questions, or a text alone
    alone = [make_batch([([messages], media, None)], Processor(tokenizer), cfg) for talks, media, _ in rows for messages in talks]
    lines = [[batch[name][0].tolist() for name in ("input_ids", "labels")] for batch in alone]
    padded = {**collate(lines, model.config.bos_token_id, side="right"),
              **{name: torch.cat([batch[name] for batch in alone if name in batch]) for name in ("pixel_values", "image_grid_thw")}}
    found = []
    for batch in (packed, padded):
        model.zero_grad()
        loss = train_sft.losses(model, None, batch, train_sft.count([batch]), cfg, False)["loss"]
        loss.backward()
        found.append((float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert abs(found[0][0] - found[1][0]) < 1e-5 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0][1], found[1][1]))


def test_lora_starts_as_nothing_trains_alone_and_is_merged_when_saved(tmp_path):
    train(config(tmp_path / "base", steps=2))
    train(config(tmp_path / "tuned", backbone=str(tmp_path / "base"), lora_rank=2, steps=3, train="merger", dense_weight=0.0, dense_steps=0, lr=1e-2))
    base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned"))
    assert base.keys() == tuned.keys()
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert moved and all(name.startswith("visual.merger") or name.endswith("_proj.weight") and name.startswith("model.layers") for name in moved)
    model, tokenizer = VLM.from_pretrained(tmp_path / "base"), Tokenizer.from_pretrained(tmp_path / "base")
    batch = batch_of([(0, 1)], tokenizer, SFTConfig())
    inputs = {name: batch[name] for name in train_sft.INPUTS if name in batch}
    before = model(**inputs).logits
    add_lora(model, 2)
    assert torch.equal(model(**inputs).logits, before)
    for module in model.modules():
        if isinstance(module, LoRA):
            torch.nn.init.normal_(module.b, std=0.1)
    changed = model(**inputs).logits
    plain = VLM(model.config)
    plain.load_state_dict(merged(model.state_dict()))
    assert torch.allclose(plain(**inputs).logits, changed, atol=1e-5) and not torch.allclose(changed, before, atol=1e-3)
    said = [each.generate(torch.arange(5)[None], max_new_tokens=6, stop_token_ids=[-1]) for each in (model, plain)]
    assert said[0] == said[1]


def test_only_the_chosen_parts_are_trained(tmp_path):
    train(config(tmp_path / "base", steps=2))
    for parts, prefixes in (("vision", ("visual.patch", "visual.blocks")), ("merger", ("visual.merger",)), ("llm", ("model.",))):
        train(config(tmp_path / parts, backbone=str(tmp_path / "base"), train=parts, steps=2, dense_steps=0))
        base, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("base", parts))
        moved = {name for name in base if not torch.equal(base[name], tuned[name])}
        assert moved and all(name.startswith(prefixes) for name in moved), (parts, moved)
    with pytest.raises(UserError, match="unknown part 'eyes'"):
        train(config(tmp_path / "none", train="eyes"))


def test_places_are_where_the_offsets_lead(tokenizer):
    batch = batch_of([(0, 3)], tokenizer, SFTConfig(), dense_only=True)
    places, scene = batch["patch_place"].view(-1, 8, 8, 5), Corpus()[3]
    for view, row, column in zip(*np.nonzero(scene["patch_class"])):
        x, y = column + 0.5 + scene["patch_offset"][view, row, column, 0], row + 0.5 + scene["patch_offset"][view, row, column, 1]
        assert np.allclose(places[view, row, column, 3:], (x - 4, y - 4), atol=1e-5)             # patches from the picture's centre


def test_tokens_of_an_answer_know_what_it_depends_on_and_only_they(tokenizer):
    batch = batch_of([(None, 3), (None, 4)], tokenizer, SFTConfig())
    rows = zip((3, 4), *(batch[name][0].split([sum(lengths) for lengths in batch["segments"]]) for name in ("labels", "answer_place", "answer_place_weight")))
    for scene, labels, places, weights in rows:
        learned = torch.nn.functional.pad(labels[1:] >= 0, (0, 1))                                   # where answers are predicted from
        number = (learned & ~torch.nn.functional.pad(learned, (1, 0))[:-1]).cumsum(0)                # 1, 2, 3: what, where, is it red
        about = learned & (number == 2)
        assert about.sum() > 3 and places[~learned].isnan().all() and torch.equal(weights > 0, learned)
        assert torch.allclose(weights[about], about.sum() ** -0.5)
        assert np.allclose(places[about][:, :2], (scene * 3 % 8 + 0.5 - 4, scene * 5 % 8 + 0.5 - 4))          # patches from the picture's centre
    gripper, peg, target = (train_sft.corpora.CLASSES.index(name) for name in ("gripper", "peg", "target"))
    scene = {**Corpus()[0], "things": [], "patch_class": np.zeros((2, 8, 8), np.int64), "patch_offset": np.zeros((2, 8, 8, 3), np.float32),
             "gripper": np.array([[1.5, 0.5, 1, 0], [0.5, 0.5, 0, 1]], np.float32)}
    scene["patch_class"][0, 1, 2], scene["patch_class"][1, 4, 4], scene["patch_class"][0, 7, 0] = peg, gripper, target
    scene["patch_offset"][0, 1, 2], scene["patch_offset"][0, 7, 0, 0] = (0.5, 0, 0.1), 99                    # the target's centre is far outside

    def known(*turns):
        talks = train_sft.conversations(2, turns)
        ids, labels, lengths = share_stem(tokenizer, talks, [(1, 8, 8)] * 2, 2)
        places, weights = dense.answer_places(ids, labels, lengths, (talks, [("image", image) for image in scene["images"] * 2], scene), tokenizer, 16)
        return ids, [p - 1 for p, label in enumerate(labels) if label >= 0], places, weights

    for asked, reply, own in (("Is the target left of the peg?", "yes", None), ("What is near? A) target B) peg", "peg: B", (-1, -2.5)), ("What is near?", "peg", (-1, -2.5))):
        for turns in ([(asked, reply)], [("Where is the bin?", "there"), (asked, reply)]):
            _, read_from, places, *_ = known(*turns)
            found = places[read_from[-2]]
            numbers = found[4:40].reshape(4, 3, 3)                                                   # pictures; gripper, first and second thing; x, y, depth
            assert numbers[:2, 0].tolist() == [[1.5, 0.5, 1], [0.5, 0.5, 0]] and numbers[2:].isnan().all() and found[2].isnan()
            assert found[:2].isnan().all() if own is None else found[:2].tolist() == list(own)
            if own is None:
                assert numbers[0, 1].isnan().all() and numbers[0, 2].tolist() == [-1, -2.5, 1]
    ids, read_from, places, weights = known(("Where is the bin?", "there"), ("What is near? A) the target B) the peg", "the peg: B"))
    tell = places[:, 2].isfinite().nonzero()[:, 0].tolist()
    assert len(tell) == 2 and not set(tell) & set(read_from) and all(tokenizer.decode(ids[p:]).strip().startswith(name) for p, name in zip(tell, "tp"))
    assert places[tell, 2:4].tolist() == [[-1, -2], [1, -1]] and weights[tell].tolist() == [1, 1] and places[tell[0], :2].isnan().all() and places[tell[1], :2].tolist() == [-1, -2.5]
    assert dense.place_in('{"bbox_2d": [10, 20, 30, 60], "label": "bin"}').tolist() == [20, 40]
    clip = {**scene, "things": ["peg"], "gripper": np.array([[0.5, 2.5, 0, 1], [0.5, 0.5, 0, 0.25]], np.float32)}
    moments = dense.moments(clip, dense.object_places(clip), ["peg"])
    assert moments[36:38].tolist() == [1, 0.25] and np.isclose(moments[40], 2 ** 0.5) and np.isnan(moments[[38, 39, *range(41, 46)]]).all()      # two patches up
    assert np.isnan(dense.moments({**clip, "things": []}, dense.object_places(clip), ["peg"])[40:]).all()
    for text in ("yes", "63, 100", '{"point_2d": [63], "label": "peg"}', '{"point_2d": [1, 2, 3]}'):
        assert dense.place_in(text) is None


def test_blind_rows_show_noise_and_tell_nothing_of_it(tokenizer):
    corpus, rows = Corpus(), [(number, 3) for number in range(40)]
    assert all((train_sft.read_row(corpus, None, 3, SFTConfig(blind=1.0))[1][0][1] == corpus[3]["images"][0]).all() for _ in range(3))         # figures never are
    noisy = [not np.array_equal(train_sft.read_row(corpus, number, index, SFTConfig(blind=0.5))[1][0][1], corpus[3]["images"][0]) for number, index in rows]
    assert 10 < sum(noisy) < 30
    batch = batch_of(rows[:2], tokenizer, SFTConfig(blind=1.0))
    assert (batch["labels"] >= 0).any() and (batch["patch_class"] == -100).all() and not batch["patch_located"].any() and batch["answer_place"][..., 4:].isnan().all()
    model, heads, cfg = VLM(TINY.for_tokenizer(tokenizer)), DenseHeads(TINY, 4), SFTConfig(intent_layer=2)
    found = train_sft.losses(model, heads, batch, train_sft.count([batch]), cfg, False)
    assert found["dense_llm"] == 0 and found["answer"] > 0 and torch.isfinite(found["loss"])


def test_options_are_found_where_an_answer_ends_in_a_letter(tokenizer):
    def found(question, answer):
        ids, labels = chat(tokenizer, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], generate=False)
        return [(option.text, option.right) for option in dense.options(ids, labels, tokenizer)]

    for answer in ("C", "bin: C"):
        assert found("Which? A) the red cube B) peg C) bin", answer) == [("the red cube", False), ("peg", False), ("bin", True)]
    for question, answer in (("Which? A) red B) peg", "peg"), ("Which?", "B"), ("Which? A) red B) peg", "B) peg")):
        assert found(question, answer) == []


def test_centres_behind_the_camera_do_not_reach_the_loss(tokenizer):
    model, heads, cfg = VLM(TINY.for_tokenizer(tokenizer)), DenseHeads(TINY, 4), SFTConfig(intent_layer=2)

    def loss_with(offset):
        class Moved(Corpus):
            def __getitem__(self, i):
                scene = super().__getitem__(i)
                scene["patch_offset"][..., 0] += offset * i
                return scene

        batch = batch_of([(0, 0), (1, 1)], tokenizer, cfg, dense_only=True, corpus=Moved())
        return float(train_sft.losses(model, heads, batch, train_sft.count([batch]), cfg, True)["loss"].detach())

    assert loss_with(500.0) == loss_with(-9.0) != loss_with(0.0)


def test_token_head_lays_its_patches_where_the_pixels_are():
    heads = DenseHeads(TINY, num_classes=4)
    for part in heads.llm:                                          # token features straight to each patch
        torch.nn.init.zeros_(part.bias)
    tokens = torch.zeros(2 * 4 * 6, 48)
    tokens[24 + 6 * 1 + 4] = torch.linspace(-1, 1, 48)                                       # second picture, token row 1, column 4 of 4 x 6
    _, (shown, place) = heads(torch.zeros(2 * 8 * 12, 48), tokens, (1, 8, 12))
    assert shown.shape == (192, 4) and place.shape == (192, 5)
    hit = torch.cat([shown, place], 1).abs().sum(-1).view(2, 8, 12).nonzero().tolist()
    assert hit == [[1, 2, 8], [1, 2, 9], [1, 3, 8], [1, 3, 9]]


def test_overfits_a_few_scenes_and_the_folder_answers(tmp_path):
    figures = train(config(tmp_path, steps=600, batch_size=6, lr=5e-3, eval_rows=12, point_scenes=12, warmup=10, save_every=600,
                           dense_steps=60))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    answers = [line["answer"] for line in log if "answer" in line]
    assert answers[-1] < 0.15 * answers[0] and log[-1]["dense_llm"] < 0.2 * log[0]["dense_llm"]
    assert figures["exact_words"] > 0.6 and figures["object_accuracy_llm"] > 0.9 and figures["point_parsed"] == 1
    model, tokenizer = VLM.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == model.config.vocab_size
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["figures"] == figures and record["step"] == 600 and "command" in record and record["seed"] == 0
    assert not any("head" in name for name in load_file(tmp_path / "model.safetensors"))
    assert np.asarray(Image.open(tmp_path / "loss.png")).std() > 5


def test_resume_is_bit_exact(tmp_path, monkeypatch):
    train(config(tmp_path / "whole"))
    save = trainer.Run.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Run, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "parts"))
    monkeypatch.setattr(trainer.Run, "save", save)
    with pytest.raises(UserError, match="--lr"):
        train(config(tmp_path / "parts", resume=True, lr=5e-4))
    with pytest.raises(UserError, match="--resume"):
        train(config(tmp_path / "parts"))
    older = trainer.checkpoints(tmp_path / "parts")[-1]
    kept = older.read_bytes()
    with safe_open(older, "pt") as file:
        save_file({name: file.get_tensor(name) for name in file.keys() if not name.endswith("momentum_buffer")}, older, file.metadata())
    with pytest.raises(UserError, match="older trainer"):
        train(config(tmp_path / "parts", resume=True))
    older.write_bytes(kept)
    train(config(tmp_path / "parts", resume=True))
    whole, parts = (last_state(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and any(name.startswith("optimizer") for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_it_learns_in_bfloat16_as_in_float32(tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        train(config(tmp_path / dtype, dtype=dtype, steps=20, lr=1e-3))
        losses.append([json.loads(line)["loss"] for line in (tmp_path / dtype / "log.jsonl").read_text().splitlines()])
    assert losses[0] != losses[1] and np.allclose(*losses, rtol=0.05) and np.mean(losses[1][-4:]) < 0.8 * np.mean(losses[1][2:6])         # two were dense alone


def test_dense_stage_stops_at_block_k_and_micro_batches_change_nothing(tmp_path):
    states = [last_state(cfg.out) for cfg in (config(tmp_path / "a", steps=2, dense_steps=2, save_every=2),
              config(tmp_path / "b", steps=2, dense_steps=2, micro_batch=1)) if train(cfg) is not None]
    torch.manual_seed(0)
    frame = "system\nYou are a helpful assistant.\nuser\nassistant\n"
    fresh = VLM(TINY.for_tokenizer(train_tokenizer([*Corpus().texts(), *[frame] * 1000], 300))).state_dict()
    moved = {name for name in fresh if not torch.equal(fresh[name], states[0][f"model.{name}"])}
    assert any(name.startswith("visual.blocks.0") for name in moved) and any(name.startswith("model.layers.1") for name in moved)
    assert not any(name.startswith("model.layers.2") for name in moved) and "model.norm.weight" not in moved
    for name in fresh:
        torch.testing.assert_close(states[0][f"model.{name}"], states[1][f"model.{name}"], atol=2e-4, rtol=0)       # Adam's first steps are signs


def test_backbone_starts_from_its_weights_without_a_dense_stage(tmp_path):
    train(config(tmp_path / "first", steps=2))
    train(config(tmp_path / "second", backbone=str(tmp_path / "first"), steps=1, lr=0.0, weight_decay=0.0, dense_steps=0))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    VLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "hub", torch.bfloat16)              # a file keeps its type
    (tmp_path / "first" / "tokenizer.json").rename(tmp_path / "hub" / "tokenizer.json")
    train(config(tmp_path / "from_hub", backbone=str(tmp_path / "hub"), steps=1, dense_steps=0))
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "from_hub" / "model.safetensors").values())
    assert "answer" in json.loads((tmp_path / "second" / "log.jsonl").read_text().splitlines()[0])
    with pytest.raises(UserError, match="blocks 1 to 3"):
        train(config(tmp_path / "third", intent_layer=4))


def one_of_two(out):
    patch(pytest.MonkeyPatch())
    train(config(out, steps=2))
    train(config(out + "-next", backbone=out, steps=1, dense_steps=0))             # the stage behind it, in the same processes


def test_two_processes_equal_one(tmp_path):
    train(config(tmp_path / "one", steps=2))
    spawn_two(one_of_two, str(tmp_path / "two"))
    assert json.loads((tmp_path / "two-next" / "training.json").read_text())["started_from"]["step"] == 2
    one, two = (last_state(tmp_path / name) for name in ("one", "two"))
    for name in one:
        if name.startswith("model."):
            torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=0)
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["loss"] for name in ("one", "two")]
    assert abs(losses[0] - losses[1]) < 1e-4


def test_one_command_trains_the_stages_that_are_missing(tmp_path, monkeypatch, capsys):
    out = {name: str(tmp_path / name) for name in ("first", "second", "third")}
    stages = {"third": config(out["third"], backbone=out["second"], steps=2, dense_steps=0), "second": config(out["second"], backbone=out["first"], steps=1, dense_steps=0),
              "first": config(out["first"], steps=1)}
    for name in ("STAGES", "PRESETS"):
        monkeypatch.setattr(train_sft, name, stages)
    monkeypatch.setattr(sys, "argv", ["train_sft.py"])
    train(stages["first"])
    before = (tmp_path / "first" / "log.jsonl").stat().st_mtime_ns
    train_sft.main()
    assert f"stages to train: {out['second']}, {out['third']}" in capsys.readouterr().out
    about = json.loads((tmp_path / "third" / "training.json").read_text())
    assert (about["step"], about["started_from"]["step"], about["started_from"]["started_from"]["config"]["out"]) == (2, 1, out["first"])
    assert (tmp_path / "first" / "log.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="already holds a training run"):
        train_sft.main()
    shutil.rmtree(tmp_path / "third")
    stages["second"].steps, path = 3, tmp_path / "second" / "training.json"                          # as if it had been stopped in the second
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 3}))
    monkeypatch.setattr(sys, "argv", ["train_sft.py", "--resume"])
    train_sft.main()
    assert json.loads(path.read_text())["step"] == 3 and train_sft.finished(out["third"])
    shutil.rmtree(tmp_path / "third")                                                                # as if it had been stopped between two
    train_sft.main()
    assert train_sft.finished(out["third"])


def test_a_policy_comes_along_while_what_it_reads_is_frozen(tmp_path):
    train(config(tmp_path / "base", steps=1))
    blm = BLM.from_pretrained(tmp_path / "base")
    blm.policy = Policy(PolicyConfig(intent_layer=2, hidden_size=48, num_heads=2), TINY.hidden_size, {"widowx": (16, 7)})
    blm.save_policy(tmp_path / "base")
    for blocks, comes in ((2, True), (1, False)):
        out = tmp_path / str(blocks)
        train(config(out, backbone=str(tmp_path / "base"), frozen_blocks=blocks, dense_weight=0.0, dense_steps=0, steps=2, lr=1e-2))
        after = BLM.from_pretrained(out)
        assert (after.policy is not None) == comes
        assert not torch.equal(after.vlm.model.layers[2].mlp.down_proj.weight, blm.vlm.model.layers[2].mlp.down_proj.weight)
    assert load_file(tmp_path / "2" / "policy.safetensors").keys() == load_file(tmp_path / "base" / "policy.safetensors").keys()
