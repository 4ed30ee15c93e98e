"""train_sft.py keeps its promises: answers alone are learned, packing changes nothing, resuming is bit-exact."""

import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import killed_again_and_again, last_state, log_of, spawn_two
from PIL import Image
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import train_sft
import trainer
from checkpoint import VisionConfig, VLMConfig
from cli import UserError
from data.conversations import Conversations
from data.mixture import Mixture, Source, open_sources
from embodiment import Embodiment
from model import BLM
from policy import Policy, PolicyConfig
from processor import ImageConfig, Processor, collate, train_tokenizer
from train_sft import LoRA, SFTConfig, add_lora, merge_lora
from vlm import VLM

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
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


def write_rows(folder):
    """Twelve pictures with one colored square each, three questions about every one."""
    lines = []
    for i in range(12):
        name = list(COLORS)[i % 3]
        row, column = i * 5 % 8, i * 3 % 8
        pixels = np.full((128, 128, 3), 128, np.uint8)
        pixels[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = COLORS[name]
        Image.fromarray(pixels).save(folder / f"{i}.png")
        place = json.dumps({"point_2d": [column * 16 + 8, row * 16 + 8], "label": name})
        questions = [
            {"question": "What do you see?", "answer": f"a {name} cube"},
            {"question": f"Point to the {name} cube.", "answer": place},
            {"question": "Is it red?", "answer": "yes" if name == "red" else "no"},
        ]
        lines.append({"images": [f"{i}.png"] * (1 + i % 2), "questions": questions})
    write_lines(folder / "rows.jsonl", lines)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_texts(path, count):
    """Rows without pictures."""
    records = []
    for i in range(count):
        turns = [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": str(i)}]
        records.append({"messages": turns})
    return write_lines(path, records)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """rows.jsonl with its pictures, texts.jsonl, and a tiny untrained model in base/."""
    folder = tmp_path_factory.mktemp("stage1")
    write_rows(folder)
    write_texts(folder / "texts.jsonl", 20)
    texts = list(Conversations(folder / "rows.jsonl").texts())
    tokenizer = train_tokenizer(
        [*texts, *["system\nYou are a helpful assistant.\nuser\n"] * 50], 300
    )
    torch.manual_seed(0)
    VLM(TINY.for_tokenizer(tokenizer)).save_pretrained(folder / "base", torch.float32)
    Processor(tokenizer, ImageConfig()).save_pretrained(folder / "base")
    return folder


def settings(folder, out, **changes):
    flags = {"data": str(folder / "rows.jsonl"), "backbone": str(folder / "base"), "out": str(out)}
    flags |= {"steps": 6, "batch_size": 4, "eval_every": 3, "device": "cpu", "lr": 2e-3}
    return SFTConfig(**{**flags, **changes})


def train(cfg):
    train_sft.check(cfg)
    sources = open_sources(cfg.data, cfg.on_bad)
    model = VLM.from_pretrained(cfg.backbone)
    return train_sft.train(cfg, model, Processor.from_pretrained(cfg.backbone), sources)


def test_labels_cover_answers_and_their_end_only(folder):
    processor = Processor.from_pretrained(folder / "base")
    rows = Conversations(folder / "rows.jsonl")
    batch = processor.pack([rows.row(0), rows.row(1)])
    lengths = [sum(segments) for segments in batch["segments"]]
    decode = processor.tokenizer.fast.decode
    for i, ids, labels in zip(
        (0, 1), batch["input_ids"][0].split(lengths), batch["labels"][0].split(lengths)
    ):
        learned = decode([t for t in labels.tolist() if t >= 0], skip_special_tokens=False)
        answers = [question["answer"] for question in rows.row(i).record["questions"]]
        assert learned.split("<|im_end|>")[:-1] == answers
        assert ((labels == -100) | (labels == ids)).all()
        pads = (ids == processor.tokenizer.special["<|image_pad|>"]).sum()
        assert pads == 16 * (1 + i % 2)


def test_rows_of_a_step_depend_on_seed_and_step_alone(folder):
    sources = open_sources(str(folder / "rows.jsonl"), "refuse")
    mixture, other = Mixture(sources, 3), Mixture(sources, 4)
    rows = [mixture.rows_of_step(step, 5) for step in range(12)]
    assert rows[7] == mixture.rows_of_step(7, 5) != other.rows_of_step(7, 5)
    order = [index for step in rows for _, _, index in step]
    for epoch in range(0, 60, 12):  # each epoch has each row once
        assert sorted(order[epoch : epoch + 12]) == list(range(12))
    assert order[:12] != order[12:24]


def test_a_mixture_holds_its_weights(folder, tmp_path):
    texts = write_texts(tmp_path / "mine.jsonl", 120)
    mixture = Mixture(open_sources(f"{folder / 'rows.jsonl'}:3, {texts}:1", "refuse"), 0)
    rows = [row for step in range(40) for row in mixture.rows_of_step(step, 10)]
    for start in range(0, 400, 100):
        assert sum(source == 1 for _, source, _ in rows[start : start + 100]) == 25
    seen = [index for _, source, index in rows if source == 1]
    assert len(seen) == 100 == len(set(seen)) and not {0, 50, 100} & set(seen)
    assert [*mixture.sources[1].val_index] == [0, 50, 100]  # one in fifty is for validation
    with pytest.raises(UserError, match="mine has no row in 100"):  # rounding must not drop one
        Mixture(open_sources(f"{folder / 'rows.jsonl'}:300,{texts}:1", "refuse"), 0)
    with pytest.raises(UserError, match="must not all be zero"):
        Mixture(open_sources(f"{texts}:0", "refuse"), 0)


def test_a_val_file_beside_train_is_for_validation(folder, tmp_path):
    (tmp_path / "corpus").mkdir()
    train_path = write_texts(tmp_path / "corpus" / "train.jsonl", 60)
    write_texts(tmp_path / "corpus" / "val.jsonl", 7)
    (source,) = open_sources(train_path, "refuse")
    assert source.name == "corpus" and len(source.train_index) == 60 and len(source.val_index) == 7


def gradients(model, batch):
    model.zero_grad()
    loss = train_sft.compute_losses(model, None, batch, train_sft.count([batch], None))["loss"]
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), grads


def test_packing_changes_nothing(folder):
    """The same conversations padded, each with its own pictures: the same loss and gradients."""
    processor = Processor.from_pretrained(folder / "base")
    model = VLM.from_pretrained(folder / "base")
    data = f"{folder / 'rows.jsonl'}:1,{folder / 'texts.jsonl'}:1"
    mixture = Mixture(open_sources(data, "refuse"), 0)
    rows = []
    for _, source, index in mixture.rows_of_step(0, 6):
        rows.append(mixture.sources[source].rows.row(index))
    packed = processor.pack(rows)
    assert {len(lengths) for lengths in packed["segments"]} == {2, 4}  # a stem, three questions
    alone = []
    for row in rows:
        for messages in row.conversations:
            alone.append(processor.pack([train_sft.Row([messages], row.media, {})]))
    lines = [batch["input_ids"][0].tolist() for batch in alone]
    padded = collate(lines, model.config.bos_token_id, side="right") | {"segments": None}
    labels = [batch["labels"][0] for batch in alone]
    padded["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
    for name in ("pixel_values", "image_grid_thw"):
        padded[name] = torch.cat([batch[name] for batch in alone if name in batch])
    one, other = gradients(model, packed), gradients(model, padded)
    assert abs(one[0] - other[0]) < 1e-5
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one[1], other[1]))


def test_conversations_with_words_before_their_pictures_share_only_those(folder):
    processor = Processor.from_pretrained(folder / "base")
    model = VLM.from_pretrained(folder / "base")
    rows = Conversations(folder / "rows.jsonl")
    media = rows.row(0).media + rows.row(1).media
    conversations = []
    for words in ("take the left one", "which is red?", "put it back"):
        pictures = [{"type": kind} for kind, _ in media]
        content = [{"type": "text", "text": words}, *pictures]
        answer = {"role": "assistant", "content": words[:4]}
        conversations.append([{"role": "user", "content": content}, answer])
    together = [train_sft.Row(conversations, media, {}), rows.row(2)]
    alone = [train_sft.Row([messages], media, {}) for messages in conversations]
    shared, apart = processor.pack(together), processor.pack([*alone, rows.row(2)])
    assert shared["input_ids"].tolist() == apart["input_ids"].tolist()
    assert len(shared["pixel_values"]) < len(apart["pixel_values"])
    one, other = gradients(model, shared), gradients(model, apart)
    assert abs(one[0] - other[0]) < 1e-5
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one[1], other[1]))


def test_padding_of_a_packed_row_changes_nothing(folder):
    processor = Processor.from_pretrained(folder / "base")
    model = VLM.from_pretrained(folder / "base")
    rows = Conversations(folder / "rows.jsonl")
    rows = [rows.row(i) for i in range(3)]
    packed = processor.pack(rows)
    padded = train_sft.make_batch(rows, processor, None, settings(folder, folder / "unused"))
    lengths = [batch["input_ids"].shape[1] for batch in (packed, padded)]
    assert lengths[0] < lengths[1] and lengths[1] % train_sft.PACKED == 0
    one, other = gradients(model, packed), gradients(model, padded)
    assert abs(one[0] - other[0]) < 1e-6
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one[1], other[1]))


def test_micro_batches_change_nothing(folder, tmp_path):
    train(settings(folder, tmp_path / "one", steps=2))
    train(settings(folder, tmp_path / "four", steps=2, micro_batch=1))
    one, four = last_state(tmp_path / "one"), last_state(tmp_path / "four")
    for name in one:
        if name.startswith("model."):  # AdamW's first steps are signs
            torch.testing.assert_close(one[name], four[name], atol=2e-4, rtol=0)


def test_lora_starts_as_nothing_trains_alone_and_is_merged_when_saved(folder, tmp_path):
    changes = {"lora_rank": 2, "steps": 3, "train": "merger", "lr": 1e-1}
    train(settings(folder, tmp_path / "tuned", **changes))
    base = load_file(folder / "base" / "model.safetensors")
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert base.keys() == tuned.keys()
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    lora = {name for name in moved if name.startswith("model.layers")}
    assert lora and all(name.endswith("_proj.weight") for name in lora)
    assert all(name.startswith("visual.merger") for name in moved - lora)
    model = VLM.from_pretrained(folder / "base")
    ids = torch.arange(12)[None]
    before = model(ids).logits
    add_lora(model, 2)
    assert torch.equal(model(ids).logits, before)
    for module in model.modules():
        if isinstance(module, LoRA):
            torch.nn.init.normal_(module.b, std=0.1)
    changed = model(ids).logits
    plain = VLM(model.config).eval()
    plain.load_state_dict(merge_lora(model.state_dict()))
    assert torch.allclose(plain(ids).logits, changed, atol=1e-5)
    assert not torch.allclose(changed, before, atol=1e-3)
    options = {"max_new_tokens": 6, "stop_token_ids": [-1]}
    assert model.generate(ids, **options) == plain.generate(ids, **options)


@pytest.mark.parametrize(
    "parts, prefixes",
    [
        ("vision", ("visual.patch", "visual.blocks")),
        ("merger", ("visual.merger",)),
        ("llm", ("model.",)),
    ],
)
def test_only_the_named_parts_are_trained(folder, tmp_path, parts, prefixes):
    train(settings(folder, tmp_path, train=parts, steps=2))
    base = load_file(folder / "base" / "model.safetensors")
    tuned = load_file(tmp_path / "model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert moved and all(name.startswith(prefixes) for name in moved)


def test_overfits_a_few_pictures_and_the_folder_answers(folder, tmp_path):
    figures = train(settings(folder, tmp_path, steps=180, batch_size=6, lr=1e-2, eval_every=180))
    log = log_of(tmp_path)
    assert log[-1]["answer"] < 0.2 * log[0]["answer"]
    record = json.loads((tmp_path / "training.json").read_text())["sft"]
    assert record["figures"] == figures and record["step"] == 180 and record["seed"] == 0
    blm = BLM.from_pretrained(tmp_path)
    rows = Conversations(folder / "rows.jsonl")
    right = 0
    for i in range(12):
        row = rows.row(i)
        reply = blm.answer([picture for _, picture in row.media], "Is it red?", max_new_tokens=4)
        right += reply == row.record["questions"][2]["answer"]
    assert right >= 10


def test_validation_counts_exact_answers(folder, tmp_path):
    path = write_texts(tmp_path / "many.jsonl", 100)
    figures = train(settings(folder, tmp_path / "out", data=path, steps=2))
    assert {"answer_loss", "exact_many"} <= figures.keys() and 0 <= figures["exact_many"] <= 1


def test_resume_is_bit_exact(folder, tmp_path, monkeypatch):
    train(settings(folder, tmp_path / "whole"))
    rate = trainer.learning_rate

    def interrupt(step, cfg, warmup):
        if step == 5:
            raise KeyboardInterrupt
        return rate(step, cfg, warmup)

    monkeypatch.setattr(trainer, "learning_rate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(settings(folder, tmp_path / "parts"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="--lr 0.002, not 0.0005"):
        train(settings(folder, tmp_path / "parts", resume=True, lr=5e-4))
    with pytest.raises(UserError, match="--resume"):
        train(settings(folder, tmp_path / "parts"))
    train(settings(folder, tmp_path / "parts", resume=True))
    whole, parts = last_state(tmp_path / "whole"), last_state(tmp_path / "parts")
    assert whole.keys() == parts.keys() and any(name.startswith("optimizer") for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def killed_run(folder, out, moment):
    """One life of a run that is killed when it makes the batch of step `moment`."""
    make = train_sft.batches_of_step

    def deadly(mixture, processor, auxiliary, cfg, step):
        if step == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(mixture, processor, auxiliary, cfg, step)

    train_sft.batches_of_step = deadly
    resume = bool(trainer.checkpoints(out))
    train(settings(folder, out, steps=24, resume=resume))


def test_killed_at_ten_moments_it_ends_with_the_same_bits(folder, tmp_path):
    train(settings(folder, tmp_path / "whole", steps=24))
    moments = sorted(np.random.default_rng(0).choice(np.arange(1, 23), 10, replace=False).tolist())
    killed_again_and_again(killed_run, moments, folder, tmp_path / "killed")
    train(settings(folder, tmp_path / "killed", steps=24, resume=True))
    whole, killed = last_state(tmp_path / "whole"), last_state(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    losses = [[line["loss"] for line in log_of(tmp_path / run)] for run in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 24


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(folder, tmp_path, number, monkeypatch, capsys):
    train(settings(folder, tmp_path / "whole", eval_every=100))
    rate = trainer.learning_rate

    def signalled(step, cfg, warmup):
        if step == 3:
            os.kill(os.getpid(), number)
        return rate(step, cfg, warmup)

    monkeypatch.setattr(trainer, "learning_rate", signalled)
    with pytest.raises(SystemExit) as stopped:
        train(settings(folder, tmp_path / "parts", eval_every=100))
    monkeypatch.undo()
    assert stopped.value.code == 128 + number
    assert "stopped at step 4" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(settings(folder, tmp_path / "parts", eval_every=100, resume=True))
    whole, parts = last_state(tmp_path / "whole"), last_state(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_it_learns_in_bfloat16_as_in_float32(folder, tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        train(settings(folder, tmp_path / dtype, dtype=dtype, steps=20, lr=1e-2))
        losses.append([line["loss"] for line in log_of(tmp_path / dtype)])
    assert losses[0] != losses[1] and np.allclose(*losses, rtol=0.05)
    assert np.mean(losses[1][-4:]) < 0.9 * np.mean(losses[1][:4])


def two_processes(folder, out, changes):
    train(settings(folder, out, **changes))


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_equal_one(folder, tmp_path, fsdp):
    """Rows mostly without pictures: a process's share of a step may have none."""
    data = f"{folder / 'rows.jsonl'}:1,{folder / 'texts.jsonl'}:2"
    changes = {"data": data, "steps": 12, "eval_every": 12}
    train(settings(folder, tmp_path / "one", **changes))
    spawn_two(two_processes, folder, tmp_path / "two", {**changes, "fsdp": fsdp})
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 12
    for a, b in zip(one, two):
        assert abs(a["loss"] - b["loss"]) <= 2e-5 * max(1, a["loss"])
    mine = load_file(tmp_path / "one" / "model.safetensors")
    assert mine.keys() == load_file(tmp_path / "two" / "model.safetensors").keys()


def run_main(argv):
    sys.argv = ["train_sft.py", *argv]
    train_sft.main()


def test_the_script_runs_under_torchrun(folder, tmp_path):
    argv = ["--data", str(folder / "rows.jsonl"), "--backbone", str(folder / "base")]
    argv += ["--out", str(tmp_path / "out"), "--steps", "2", "--batch_size", "4"]
    spawn_two(run_main, [*argv, "--device", "cpu"])
    assert VLM.from_pretrained(tmp_path / "out").config.hidden_size == 48


def test_shards_go_on_where_one_process_was_and_back(folder, tmp_path):
    changes = {"steps": 12, "eval_every": 12, "lr": 1e-3}
    train(settings(folder, tmp_path / "one", **changes))
    out = tmp_path / "mixed"
    # the rate must not depend on --steps here: all of it is warmup
    spawn_two(two_processes, folder, out, {**changes, "steps": 4, "fsdp": True})
    train(settings(folder, out, **changes | {"steps": 8}, resume=True))
    spawn_two(two_processes, folder, out, {**changes, "fsdp": True, "resume": True})
    one, mixed = log_of(tmp_path / "one"), log_of(out)
    assert len(one) == len(mixed) == 12
    for a, b in zip(one, mixed):
        assert abs(a["loss"] - b["loss"]) < 1e-4


def test_a_policy_comes_along_while_what_it_reads_is_frozen(folder, tmp_path):
    blm = BLM.from_pretrained(folder / "base")
    config = PolicyConfig(intent_layer=2, hidden_size=48, num_heads=2)
    blm.policy = Policy(config, TINY.hidden_size, {"widowx": Embodiment(16, 7)})
    blm.policy.normalizer.fitted[:] = True
    blm.save_pretrained(tmp_path / "base", torch.float32)
    for blocks in (2, 1):
        cfg = settings(folder, tmp_path / str(blocks), backbone=str(tmp_path / "base"), steps=2)
        cfg.frozen_blocks = blocks
        cfg.lr = 0.1
        train(cfg)
        after = BLM.from_pretrained(tmp_path / str(blocks))
        assert (after.policy is not None) == (blocks == 2)
        before = blm.vlm.model.layers[2].mlp.down_proj.weight
        assert not torch.equal(after.vlm.model.layers[2].mlp.down_proj.weight, before)


def test_a_file_keeps_its_type(folder, tmp_path):
    VLM.from_pretrained(folder / "base").save_pretrained(tmp_path / "hub", torch.bfloat16)
    Processor.from_pretrained(folder / "base").save_pretrained(tmp_path / "hub")
    train(settings(folder, tmp_path / "out", backbone=str(tmp_path / "hub"), steps=1))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())


def test_a_broken_picture_ends_the_run_or_is_left_out(folder, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    Image.open(folder / "1.png").save(tmp_path / "whole.png")
    questions = [{"question": "Is it red?", "answer": "no"}]
    records = [{"images": [name], "questions": questions} for name in ("cut.png", "whole.png")]
    data = write_lines(tmp_path / "mine.jsonl", records)
    with pytest.raises(UserError, match="mine.jsonl, line 1.*cut.png"):
        train(settings(folder, tmp_path / "refused", data=data))
    train(settings(folder, tmp_path / "skipped", data=data, on_bad="skip", steps=2))
    assert "left out" in capsys.readouterr().out
    assert all(np.isfinite(line["loss"]) for line in log_of(tmp_path / "skipped"))


class BadLoss(torch.nn.Module):
    """An auxiliary module whose loss is NaN at some steps."""

    intent_layer = 1
    pictures_only = False

    def __init__(self, bad):
        super().__init__()
        self.bad = set(bad)
        self.calls = 0
        self.weight = torch.nn.Parameter(torch.ones(1))

    def targets(self, rows, batch):
        return {}

    def count(self, batch):
        return []

    def figures(self, out, batch):
        return {}

    def losses(self, out, batch, totals):
        self.calls += 1
        bad = float("nan") if self.calls - 1 in self.bad else 0.0
        return {"bad": (self.weight * bad).sum()}


def train_with(cfg, auxiliary):
    sources = open_sources(cfg.data, cfg.on_bad)
    processor = Processor.from_pretrained(cfg.backbone)
    return train_sft.train(cfg, VLM.from_pretrained(cfg.backbone), processor, sources, auxiliary)


def test_a_step_without_a_number_is_skipped_and_its_rows_named(folder, tmp_path, capsys):
    train_with(settings(folder, tmp_path / "skips", eval_every=100), BadLoss([2, 4]))
    assert capsys.readouterr().out.count("step skipped") == 2
    assert all(tensor.isfinite().all() for tensor in last_state(tmp_path / "skips").values())
    with pytest.raises(UserError, match="10 consecutive steps.*rows.jsonl, line.*smaller --lr"):
        train_with(settings(folder, tmp_path / "never", steps=40), BadLoss(range(40)))


def test_gradient_checkpointing_changes_no_gradient(folder):
    model = VLM.from_pretrained(folder / "base").train()
    ids = torch.arange(12)[None]
    gradients = []
    for again in (False, True):
        model.checkpointing = model.visual.checkpointing = again
        model.zero_grad()
        F.cross_entropy(model(ids).logits[0], ids[0]).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_source_of_few_rows_is_not_validated(folder):
    source = Source("few", Conversations(folder / "texts.jsonl"))
    assert not source.val_index and len(source.train_index) == 20
