"""People's own data, general instructions and the balance of questions: both shapes mean the same, bad records are told, answers cannot be guessed."""
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cli import UserError
from nano import instructions as general
from data.conversations import Chats, load_media, normalise
from nano.questions import CATEGORIES, HELD_OUT, WORDINGS, Asker, equalise
from train_sft import Mixture, SFTConfig, make_batch, read_row, read_rows
from processor import Processor, train_tokenizer
from vlm import PRESETS, VLM

MESSAGES = {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is this?"}]}, {"role": "assistant", "content": "A cup."},
                         {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}]}
SHAREGPT = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cup."},
                                                {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]}


@pytest.fixture
def folder(tmp_path):
    for i, (name, size) in enumerate((("a.png", (40, 30)), ("b.png", (64, 64)), ("frames/1.png", (56, 56)), ("frames/2.png", (56, 56)), ("frames/3.png", (56, 56)))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(tmp_path / name)
    stills = [Image.open(tmp_path / f"frames/{i}.png") for i in (1, 2, 3)]
    stills[0].save(tmp_path / "film.gif", save_all=True, append_images=stills[1:])
    (tmp_path / "broken.png").write_bytes((tmp_path / "b.png").read_bytes()[:200])
    return tmp_path


def write(path, *records):
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def test_both_shapes_mean_the_same(folder):
    one, two = Chats(write(folder / "m.jsonl", MESSAGES, SHAREGPT))
    assert one["messages"] == two["messages"] and one["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    assert [m["content"] for m in one["messages"] if m["role"] == "assistant"] == ["A cup.", "Yes."]
    (kind, picture), = one["media"]
    assert kind == "image" and picture.size == (40, 30)


def test_places_of_pictures_and_videos():
    talk = lambda text, **files: normalise({"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}], **files})
    messages, media = talk("see <video> and <image>!", image="i.png", videos=["v.gif"])
    assert [item["type"] for item in messages[0]["content"]] == ["text", "video", "text", "image", "text"] and media == [("video", "v.gif"), ("image", "i.png")]
    messages, media = talk("What is this?", images=["1.png", "2.png"])                       # no place named: they come first
    assert [item["type"] for item in messages[0]["content"]] == ["image", "image", "text"] and media == [("image", "1.png"), ("image", "2.png")]
    later = {"image": "i.png", "conversations": [{"from": who, "value": text} for who, text in (("human", "Hello"), ("gpt", "Hi"), ("human", "<image>\nWhat is this?"), ("gpt", "A cup."))]}
    messages, media = normalise(later)                                                       # a place in a later question is a place
    assert messages[0]["content"] == [{"type": "text", "text": "Hello"}] and messages[2]["content"][0] == {"type": "image"} and media == [("image", "i.png")]
    for text, files, word in (("<image>", {}, "more <image> places"), ("<image>", {"images": ["1", "2"]}, "1 more pictures")):
        with pytest.raises(ValueError, match=word):
            talk(text, **files)


@pytest.mark.parametrize("video", ["film.gif", "frames"])
def test_a_conversation_with_a_picture_and_a_video_trains(folder, video):
    chats = Chats(write(folder / "v.jsonl", {"conversations": [{"from": "human", "value": "<image><video>What?"}, {"from": "gpt", "value": "Noise."}], "image": "a.png", "video": video}))
    tokenizer = train_tokenizer([*chats.texts(), "system user assistant"] * 3, 280)
    config, cfg = PRESETS["nano"].for_tokenizer(tokenizer), SFTConfig(dense_weight=0)
    batch = make_batch([read_row(chats, 0, 0, cfg)], Processor(tokenizer), cfg)
    assert batch["video_grid_thw"].tolist()[0][0] == 2 and batch["image_grid_thw"].shape == (1, 3)               # three frames, two to a patch
    from train_sft import INPUTS
    assert VLM(config)(**{name: batch[name] for name in INPUTS if name in batch}).logits.isfinite().all()


BAD = [("{", "line 2"), ([1], "no JSON object"), ({"text": "hello"}, "neither"), ({"messages": [{"role": "user", "content": "Hello?"}]}, "no answer"),
       ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"), ({"messages": [{"role": "user", "content": [{"type": "sound", "sound": "x"}]}]}, "unknown content"),
       ({**SHAREGPT, "image": "missing.png"}, "missing.png is not there"), ({**SHAREGPT, "image": "../out.png"}, "outside"), ({**SHAREGPT, "image": "/etc/hostname"}, "outside"),
       ({**SHAREGPT, "image": "m.jsonl"}, "cannot identify image"), ({**SHAREGPT, "image": []}, "more <image> places")]


@pytest.mark.parametrize("record, word", BAD)
def test_bad_records_are_told_with_their_line(folder, record, word, capsys):
    path = write(folder / "m.jsonl", MESSAGES, record, SHAREGPT)
    with pytest.raises(UserError, match=word) as told:
        Chats(path)
    assert "m.jsonl, line 2" in str(told.value) and "--on_bad skip" in str(told.value)
    chats = Chats(path, on_bad="skip")
    assert len(chats) == 2 and chats.skipped == 1 and "1 of 3" in capsys.readouterr().out


def test_huge_pictures_are_bad_records_and_frames_play_by_number(folder, capsys):
    for name, size in (("large.png", (9000, 8000)), ("bomb.png", (20000, 10000))):
        Image.new("1", size).save(folder / name)
    path = write(folder / "m.jsonl", SHAREGPT, {**SHAREGPT, "image": "large.png"}, {**SHAREGPT, "image": "bomb.png"})
    with pytest.raises(UserError, match="line 2: .*shrink it first; .*line 3: .*shrink it first"):
        Chats(path)
    assert len(Chats(path, on_bad="skip")) == 1 and "2 of 3" in capsys.readouterr().out
    (folder / "many").mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "many" / f"{i}.png")
    assert [frame.getpixel((0, 0))[0] for frame in load_media("video", folder / "many")] == list(range(12))


def test_a_picture_that_breaks_off_is_told_when_it_is_read(folder):
    chats = Chats(write(folder / "m.jsonl", {**SHAREGPT, "image": "broken.png"}))
    with pytest.raises(UserError, match="m.jsonl, line 1.*broken.png"):
        chats[0]
    with pytest.raises(UserError, match="no conversations"):
        Chats(write(folder / "empty.jsonl"))
    with pytest.raises(UserError, match="nowhere"):
        Chats(folder / "nowhere.jsonl")


def test_skip_leaves_out_what_breaks_only_when_read(folder, capsys):
    broken = write(folder / "m.jsonl", {**SHAREGPT, "image": "broken.png"}, SHAREGPT)
    cfg = SFTConfig(data=str(broken), on_bad="skip", dense_weight=0)
    mixture = Mixture(cfg)
    rows = [(0, mixture.sources[0], 0), (1, mixture.sources[0], 1)]
    read = read_rows(rows, mixture, cfg) + read_rows(rows, mixture, cfg)
    assert [len(talks[0]) for talks, _, _ in read] == [1, 4, 1, 4]                   # nothing is asked about a grey picture
    assert capsys.readouterr().out.count("m.jsonl, line 1") == 1
    with pytest.raises(UserError, match="m.jsonl, line 1"):
        read_rows(rows, mixture, SFTConfig(data=str(broken), dense_weight=0))


def test_general_instructions_are_right_and_probes_are_new(tmp_path):
    general.make(general.GeneralConfig(rows=600, probes=120, pictures=9, out=str(tmp_path)))
    train, probes = (Chats(tmp_path / f"{name}.jsonl") for name in ("train", "probes"))
    asked = [{json.dumps(json.loads(line)["messages"][0]) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()} for name in ("train", "probes")]
    assert len(train) == 600 and len(probes) == 120 and not asked[0] & asked[1]
    lines = [json.loads(line) for line in (tmp_path / "probes.jsonl").read_text().splitlines()]
    assert Counter(line["kind"] for line in lines) == dict.fromkeys(general.KINDS, 20) and 0.3 < np.mean([line["held_out"] for line in lines]) < 0.7
    for messages in (chats.records[i][1] for chats in (train, probes) for i in range(len(chats))):
        text, answer = messages[0]["content"][-1]["text"], messages[1]["content"]
        if " + " in text:
            a, b = (int(word) for word in text.replace("?", "").replace(".", "").split() if word.isdigit())
            assert int(answer) == a + b
        if "A) " in text:
            before, options = text.split("A) ")
            listed = dict(option.split(") ") for option in re.split(" (?=[B-F][)])", "A) " + options))
            taken, _, last = answer.rpartition(": ")                           # "words: letter", the letter alone, or the words alone
            letter = last if last in listed else next(name for name in listed if re.search(rf"\b{name}\b", before))
            assert (listed[letter] if last in listed else letter) in before and listed[letter] == (taken or (listed[last] if last in listed else answer))
        if "numbers" in text:
            numbers = [int(n) for n in answer.split(", ")]
            assert numbers == sorted(numbers) and sorted(numbers) == sorted(int(n) for n in text.rstrip(".").split(": ")[1].split(", "))


def test_every_question_has_ten_wordings_of_one_meaning():
    for name, wordings in WORDINGS.items():
        assert len(wordings) == len(set(wordings)) >= 8 + HELD_OUT
        places = {tuple(sorted(set(part.split("}")[0] for part in wording.split("{")[1:]))) for wording in wordings}
        counts = {max(len(place), 1 + max((int(p) for p in place if p.isdigit()), default=-1)) if place else wording.count("{}") for place, wording in zip(places, wordings)}
        assert len(counts) <= 2
        words = [set(re.findall("[a-z]+", wording.lower())) for wording in wordings]
        assert set.union(*words[-HELD_OUT:]) <= set.union(*words[:-HELD_OUT]), name            # a new sentence, but no new word
    assert len(CATEGORIES) == 17


def test_answers_are_balanced_whatever_is_usual():
    rng = np.random.default_rng(0)
    asker, given = Asker(rng), Counter()
    for _ in range(2000):
        question = asker.yes_no("existence", rng.random() < 0.9, ("red cube",))                      # nine of ten scenes have one
        if question:
            given[question["answer"]] += 1
    assert abs(given["yes"] - given["no"]) <= 1 and given["no"] > 100
    letters, seen = Counter(), Counter()
    for _ in range(600):
        question = asker.closed("past", str(rng.choice(["a", "b", "c"], p=[0.7, 0.2, 0.1])), ["a", "b", "c"])
        if question and question["form"] == "choice":
            word, letter = question["answer"].split(": ")
            letters[letter] += 1
            assert f"{letter}) {word}" in question["question"] and question["chance"] == 1 / 3
        elif question:
            seen[question["answer"]] += 1
    for counts in (letters, seen):                                                                   # a third each, though "a" is right seven times of ten
        assert len(counts) == 3 and all(0.2 < count / counts.total() < 0.47 for count in counts.values())


def test_yes_and_no_are_as_many_to_whatever_reads_alike():
    question = lambda about, answer: {"category": "existence", "about": about, "answer": answer}
    scenes = [[question("peg", "yes"), {"category": "point", "answer": "x"}], [question("peg", "yes"), question("bin", "no")], [question("peg", "no")]]
    assert equalise(scenes) == [scenes[0], [], scenes[2]]


def test_held_out_wordings_are_never_asked_in_training():
    texts = [{Asker(np.random.default_rng(seed), held_out).ask("point", "x", ("peg", "front"))["question"] for seed in range(60)} for held_out in (False, True)]
    assert len(texts[0]) == 8 and len(texts[1]) == HELD_OUT and not texts[0] & texts[1]
