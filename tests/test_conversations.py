"""People's own data: every shape of record means what it says, or one line tells why not."""

import base64
import copy
import io
import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from cli import UserError
from data.conversations import Conversations
from processor import Processor, chat, train_tokenizer
from train_sft import INPUTS, SFTConfig, read_row
from vlm import PRESETS, VLM

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
COLORS = {"a.png": RED, "b.png": GREEN, "deep/c.png": BLUE}


def png(color, size=(8, 6)):
    body = io.BytesIO()
    Image.new("RGB", size, color).save(body, "png")
    return base64.b64encode(body.getvalue()).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("mine")
    for name, color in COLORS.items():
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), color).save(root / name)
    (root / "frames").mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / "frames" / f"{i}.png")
    stills = [Image.new("RGB", (8, 8), color) for color in (RED, GREEN, BLUE)]
    stills[0].save(root / "film.gif", save_all=True, append_images=stills[1:])
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (8, 6), GREEN).save(elsewhere / "far.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "far.png").symlink_to(elsewhere / "far.png")
    (root / "two words.png").symlink_to(root / "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(root / "whole.png")
    (root / "broken.png").write_bytes((root / "whole.png").read_bytes()[:200])
    Image.new("RGB", (3000, 8)).save(root / "sliver.png")
    Image.new("RGB", (1, 1)).save(root / "dot.png")
    Image.new("1", (9000, 8000)).save(root / "large.png")
    Image.new("1", (20000, 10000)).save(root / "bomb.png")
    return root


def write(path, *records):
    """A file of JSON lines; a record may also be the line itself."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def open_one(folder, record, name="m.jsonl"):
    return Conversations(write(folder / name, record)).row(0)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def image(**named):
    return {"type": "image", **named}


def text(words):
    return {"type": "text", "text": words}


def messages(*contents, **beside):
    """A record of Hugging Face's shape: a question, an answer, a question, ..."""
    turns = [(user, assistant)[i % 2](content) for i, content in enumerate(contents)]
    return {"messages": turns, **beside}


def sharegpt(*values, **beside):
    """A record of LLaVA's shape."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"conversations": turns, **beside}


def ours(*pairs, **beside):
    questions = [{"question": question, "answer": answer} for question, answer in pairs]
    return {"questions": questions, **beside}


def told(row):
    """A row in one string a conversation: I and V are its pictures and videos."""
    lines = []
    for conversation in row.conversations:
        line = []
        for message in conversation:
            content = message["content"]
            if not isinstance(content, str):
                marks = {"image": "I", "video": "V"}
                content = "|".join(item.get("text", marks.get(item["type"])) for item in content)
            line.append(f"{message['role'][0]}:{content}")
        lines.append(" ".join(line))
    return lines


def shown(row):
    """The colors of a row's pictures, and lists of them for its videos."""
    colors = []
    for kind, what in row.media:
        pixels = [frame.getpixel((0, 0)) for frame in (what if kind == "video" else [what])]
        colors.append(pixels if kind == "video" else pixels[0])
    return colors


A = ["u:I|What? a:Red."]  # what most records below say, about one red picture
URI = f"data:image/png;base64,{png(BLUE)}"
GOOD = {
    # the four shapes
    "messages": (messages([image(image="a.png"), text("What?")], "Red."), A, [RED]),
    "answer as a list": (
        messages([image(image="a.png"), text("What?")], [text("Re"), text("d.")]),
        A,
        [RED],
    ),
    "llava": (sharegpt("<image>\nWhat?", "Red.", image="a.png"), A, [RED]),
    "llava, images": (sharegpt("<image>\nWhat?", "Red.", images=["a.png"]), A, [RED]),
    "llava, a list of one": (sharegpt("<image>What?", "Red.", image=["a.png"]), A, [RED]),
    "swift": (messages("<image>What?", "Red.", images=["a.png"]), A, [RED]),
    "swift, one name": (messages("<image>What?", "Red.", images="a.png"), A, [RED]),
    "swift, image": (messages("<image>What?", "Red.", image="a.png"), A, [RED]),
    "ours": (ours(("What?", "Red."), images=["a.png"]), A, [RED]),
    "ours, two questions": (
        ours(("What?", "Red."), ("Sure?", "Yes."), images=["a.png"]),
        [*A, "u:I|Sure? a:Yes."],
        [RED],
    ),
    "content lists and images beside": (
        {"messages": [user([image(), text("What?")]), assistant("Red.")], "images": ["a.png"]},
        A,
        [RED],
    ),
    "places of both kinds": (
        messages([text("<image>And"), image(image="b.png")], "Hm.", images=["a.png"]),
        ["u:I|And|I a:Hm."],
        [RED, GREEN],
    ),
    # mixtures of the shapes' words
    "conversations with role and content": (
        {"conversations": messages("<image>What?", "Red.")["messages"], "image": "a.png"},
        A,
        [RED],
    ),
    "messages with from and value": (
        {"messages": sharegpt("<image>What?", "Red.")["conversations"], "images": ["a.png"]},
        A,
        [RED],
    ),
    "roles in capitals": (
        {"conversations": [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Hello"}]},
        ["u:Hi a:Hello"],
        [],
    ),
    "nulls of a table": (
        {
            "messages": None,
            "conversations": [
                {"from": "human", "value": "<image>What?", "role": None, "content": None},
                {"from": "gpt", "value": "Red.", "role": None, "content": None},
            ],
            "image": "a.png",
            "videos": None,
            "system": None,
            "tools": None,
            "fps": 30,
        },
        A,
        [RED],
    ),
    "nulls of a content list": (
        messages(
            [image(text=None, image="a.png"), {**text("What?"), "image": None, "max_pixels": None}],
            [{**text("Red."), "image": None}],
        ),
        A,
        [RED],
    ),
    # texts
    "several turns": (messages("Hi", "Hello", "You?", "Fine"), ["u:Hi a:Hello u:You? a:Fine"], []),
    "a question at the end": (messages("Hi", "Hello", "You?"), ["u:Hi a:Hello u:You?"], []),
    "system field": (
        sharegpt("<image>Quoi?", "Rouge.", images=["a.png"], system="In French."),
        ["s:In French. u:I|Quoi? a:Rouge."],
        [RED],
    ),
    "system field of messages": (
        messages("Hi", "Hello", system="Short."),
        ["s:Short. u:Hi a:Hello"],
        [],
    ),
    "system field of ours": (ours(("Hi", "Hello"), system="Short."), ["s:Short. u:Hi a:Hello"], []),
    "system field, empty": (sharegpt("Hi", "Hello", system=""), ["u:Hi a:Hello"], []),
    "system turn": (
        {"messages": [{"role": "system", "content": "Short."}, user("Hi"), assistant("Hello")]},
        ["s:Short. u:Hi a:Hello"],
        [],
    ),
    "system turn, empty": (
        {"messages": [{"role": "system", "content": ""}, user("Hi"), assistant("Hello")]},
        ["s: u:Hi a:Hello"],
        [],
    ),
    "grounding tokens in an answer": (
        messages("Where?", "<|box_start|>(1,2),(3,4)<|box_end|>"),
        ["u:Where? a:<|box_start|>(1,2),(3,4)<|box_end|>"],
        [],
    ),
    "line ends that are no lines' ends": (
        messages("a\u2028b\x85c", "\u00e9"),
        ["u:a\u2028b\x85c a:\u00e9"],
        [],
    ),
    "a whole emoji": (
        r'{"messages": [{"role": "user", "content": "\ud83d\ude00"}, {"role": "assistant", "content": "x"}]}',
        ["u:\U0001f600 a:x"],
        [],
    ),
    "keys that nobody reads": (
        {**messages("Hi", "Hello"), "id": 7, "score": float("nan"), "weight": 0.5},
        ["u:Hi a:Hello"],
        [],
    ),
    # places
    "two pictures": (
        sharegpt("1: <image>\n2: <image>\nSame?", "No.", image=["a.png", "b.png"]),
        ["u:1: |I|2: |I|Same? a:No."],
        [RED, GREEN],
    ),
    "a later question": (
        sharegpt("Hello", "Hi", "<image>\nWhat?", "Red.", image="a.png"),
        ["u:Hello a:Hi u:I|What? a:Red."],
        [RED],
    ),
    "no place in LLaVA's shape": (
        sharegpt("What?", "Red.", images=["a.png", "b.png"]),
        ["u:I|I|What? a:Red."],
        [RED, GREEN],
    ),
    "picture and video": (
        sharegpt("See <video> and <image>!", "Yes.", image="a.png", videos=["film.gif"]),
        ["u:See |V| and |I|! a:Yes."],
        [[RED, GREEN, BLUE], RED],
    ),
    "videos of swift": (
        messages("<video>What?", "Hm.", videos=["film.gif"]),
        ["u:V|What? a:Hm."],
        [[RED, GREEN, BLUE]],
    ),
    "videos of ours": (
        ours(("What?", "Hm."), videos=["film.gif"]),
        ["u:V|What? a:Hm."],
        [[RED, GREEN, BLUE]],
    ),
    "Qwen's tokens": (
        sharegpt("<|vision_start|><|image_pad|><|vision_end|>What?", "Red.", image="a.png"),
        A,
        [RED],
    ),
    "Qwen 1": (
        messages("Picture 1: <img>a.png</img>\nWhat?", "Red."),
        ["u:Picture 1: |I|What? a:Red."],
        [RED],
    ),
    # where pictures are
    "a link to a file": (sharegpt("<image>What?", "Red.", image="far.png"), A, [GREEN]),
    "a linked folder": (sharegpt("<image>What?", "Red.", image="linked/far.png"), A, [GREEN]),
    "a folder below": (sharegpt("<image>What?", "Red.", image="deep/c.png"), A, [BLUE]),
    "up and down": (sharegpt("<image>What?", "Red.", image="deep/../a.png"), A, [RED]),
    "Windows": (sharegpt("<image>What?", "Red.", image="deep\\c.png"), A, [BLUE]),
    "file://": (messages([image(image="file://a.png"), text("What?")], "Red."), A, [RED]),
    "file:// with a space": (
        messages("<image>What?", "Red.", images=["file://two%20words.png"]),
        A,
        [RED],
    ),
    "file:///": ("FILE_URI", A, [RED]),
    "an absolute path inside": ("ABSOLUTE", A, [RED]),
    "data:": (messages([image(image=URI), text("What?")], "Red."), A, [BLUE]),
    "data: beside": (messages("<image>What?", "Red.", images=[URI]), A, [BLUE]),
    "image_url": (
        messages([{"type": "image_url", "image_url": {"url": URI}}, text("What?")], "Red."),
        A,
        [BLUE],
    ),
    "image_url of a file": (
        messages(
            [{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, text("What?")],
            "Red.",
        ),
        A,
        [RED],
    ),
    "image_url, a string": (
        messages([{"type": "image_url", "image_url": "a.png"}, text("What?")], "Red."),
        A,
        [RED],
    ),
    "path": (messages([image(path="a.png"), text("What?")], "Red."), A, [RED]),
    "url": (messages([image(url="a.png"), text("What?")], "Red."), A, [RED]),
    "base64": (messages([image(base64=png(BLUE)), text("What?")], "Red."), A, [BLUE]),
    "path and bytes": (
        messages("<image>What?", "Red.", images=[{"path": None, "bytes": png(BLUE)}]),
        A,
        [BLUE],
    ),
    "path and no bytes": (
        messages("<image>What?", "Red.", images=[{"path": "a.png", "bytes": None}]),
        A,
        [RED],
    ),
    "one dict": (sharegpt("<image>What?", "Red.", image={"path": "a.png"}), A, [RED]),
    "image empty": (sharegpt("Hi", "Hello", image=""), ["u:Hi a:Hello"], []),
    "image null": (sharegpt("Hi", "Hello", image=None), ["u:Hi a:Hello"], []),
    "images empty": (messages("Hi", "Hello", images=[], videos=[]), ["u:Hi a:Hello"], []),
    "images of nothing": (messages("Hi", "Hello", images=["", None]), ["u:Hi a:Hello"], []),
    # videos
    "a list of frames": (
        messages([{"type": "video", "video": ["a.png", "b.png"], "fps": 2}, text("What?")], "Hm."),
        ["u:V|What? a:Hm."],
        [[RED, GREEN]],
    ),
    "frames of one": (
        messages([{"type": "video", "video": ["a.png"]}], "Hm."),
        ["u:V a:Hm."],
        [[RED]],
    ),
    "frames as dicts": (
        messages([{"type": "video", "video": [{"path": "a.png"}, {"url": URI}]}], "Hm."),
        ["u:V a:Hm."],
        [[RED, BLUE]],
    ),
    "frames beside": (
        messages("<video>", "Hm.", videos=[["a.png", "b.png"]]),
        ["u:V a:Hm."],
        [[RED, GREEN]],
    ),
    "video_url": (
        messages([{"type": "video_url", "video_url": {"url": "film.gif"}}], "Hm."),
        ["u:V a:Hm."],
        [[RED, GREEN, BLUE]],
    ),
    "a folder of frames": (
        sharegpt("<video>", "Hm.", video="frames"),
        ["u:V a:Hm."],
        [[(i, 0, 0) for i in range(12)]],
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_records_mean_what_they_say(folder, case):
    record, words, colors = GOOD[case]
    paths = {"FILE_URI": (folder / "a.png").as_uri(), "ABSOLUTE": str(folder / "a.png")}
    if record in paths.values() or isinstance(record, str) and record in paths:
        record = sharegpt("<image>What?", "Red.", image=paths[record])
    row = open_one(folder, record)
    assert told(row) == words
    assert shown(row) == colors


BAD = {
    # no record
    "no JSON": ("{", "line 2 is not JSON.*expected JSON lines"),
    "a list": ("[1]", "nor a JSON object"),
    "a number": ("7", "nor a JSON object"),
    "null": ("null", "nor a JSON object"),
    "deep": ("[" * 100_000, "line 2"),
    "other keys": ({"text": "hello"}, 'neither "messages"'),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, 'neither "messages"'),
    "no messages": ({"messages": []}, 'neither "messages"'),
    "messages as a string": (
        {"messages": json.dumps(messages("Hi", "Hello")["messages"])},
        "nor a JSON object",
    ),
    "nothing asked": ({"images": ["a.png"], "questions": []}, 'neither "messages"'),
    "messages are a word": ({"messages": "hello"}, "line 2"),
    "a message is a word": ({"messages": ["hello"]}, "line 2"),
    "questions are words": ({"questions": ["hello"]}, "line 2"),
    # turns
    "no answer": (messages("Hello?"), "no answer"),
    "an empty answer": (messages("Hello?", " "), "no answer"),
    "one question without an answer": (ours(("Hi", "Hello"), ("Hi", "")), "no answer"),
    "a question without its field": ({"questions": [{"question": "Hi"}]}, "lacks 'answer'"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
    "a tool": (
        {"messages": [user("Hi"), {"role": "tool", "content": "{}"}, assistant("Hello")]},
        "unknown role 'tool'",
    ),
    "a call": (
        {"messages": [user("Hi"), {**assistant("Hello"), "tool_calls": [{"id": 1}]}]},
        "'tool_calls' is not",
    ),
    "no role": ({"messages": [{"content": "x"}]}, "unknown role"),
    "content null": (messages(None, "x"), "neither a string"),
    "content a number": (messages("How many?", 3), "neither a string"),
    "content a dict": (messages({"a": 1}, "x"), "unknown content"),
    "text a number": (messages([{"type": "text", "text": 3}], "x"), "unknown content"),
    "text null": (messages([{"type": "text", "text": None}], "x"), "unknown content"),
    "a sound": (messages([{"type": "sound", "sound": "x"}], "x"), "unknown content"),
    "sounds beside": (messages("Hi", "x", audios=["a.wav"]), "'audios' is not"),
    "tools": (messages("Hi", "x", tools='[{"name": "f"}]'), "'tools' is not"),
    "half an emoji": (
        r'{"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "x"}]}',
        "surrogates",
    ),
    "half an emoji in an answer": (messages("Hi", "\ud83d"), "surrogates"),
    "half an emoji in a path": (sharegpt("<image>", "x", image="\ud83d.png"), "line 2"),
    # places
    "a place without a picture": (messages("<image>What?", "x"), "more <image> placeholders"),
    "in LLaVA's shape": (sharegpt("<image>What?", "x"), "more <image> placeholders"),
    "in ours": (ours(("<image>What?", "x"), images=["a.png"]), "leave <image> out"),
    "Qwen 1 in ours": (ours(("<img>a.png</img>What?", "x")), "leave <image> out"),
    "an empty list": (sharegpt("<image>What?", "x", image=[]), "more <image> placeholders"),
    "an empty name": (sharegpt("<image>What?", "x", image=""), "more <image> placeholders"),
    "a video place": (messages("<video>What?", "x", images=["a.png"]), "more <video> placeholders"),
    "a place in a later question": (
        sharegpt("<image>A?", "x", "Is <image> a tag?", "y", image="a.png"),
        "more <image> placeholders",
    ),
    "more places": (sharegpt("<image><image>", "x", image="a.png"), "more <image> placeholders"),
    "more images or videos": (
        sharegpt("<image>", "x", images=["a.png", "b.png"]),
        "more images or videos",
    ),
    "more pictures, messages": (
        messages("<image>", "x", images=["a.png", "b.png"]),
        "more images or videos",
    ),
    "no place in messages": (messages("What?", "x", images=["a.png"]), "more images or videos"),
    "no place in messages, video": (
        messages("What?", "x", videos=["film.gif"]),
        "more images or videos",
    ),
    "a place in one question of two": (
        ours(("Hi", "x"), ("<image><image>", "y"), images=["a.png"]),
        "leave <image> out",
    ),
    "in an answer": (messages("Hi", "<image>", images=["a.png"]), "'assistant' holds <image>"),
    "in an answer's list": (
        messages("Hi", [image(image="a.png"), text("x")]),
        "'assistant' holds <image>",
    ),
    "in a system text": (messages("Hi", "x", system="<image>"), "'system' holds <image>"),
    "an item without a path": (messages([image()], "x"), "more <image> placeholders"),
    "an image without a path": (messages([image(image=None)], "x"), "more <image> placeholders"),
    "an image of two": (
        messages([image(image=["a.png", "b.png"])], "x"),
        "does not exist",
    ),
    "boxes of swift": (
        messages("<image>Find <ref-object>", "<bbox>", images=["a.png"], objects={"ref": ["x"]}),
        "more <ref-object> placeholders",
    ),
    "boxes in a question": (
        messages("<image>What is in <bbox>?", "x", images=["a.png"]),
        "more <bbox> placeholders",
    ),
    # wishes
    "max_pixels": (messages([image(image="a.png", max_pixels=50176)], "x"), "'max_pixels' is not"),
    "min_pixels": (messages([image(image="a.png", min_pixels=50176)], "x"), "'min_pixels' is not"),
    "resized_height": (
        messages([image(image="a.png", resized_height=280)], "x"),
        "'resized_height' is not",
    ),
    "fps": (messages([{"type": "video", "video": "film.gif", "fps": 1.0}], "x"), "'fps' is not"),
    # where pictures are
    "missing": (sharegpt("<image>", "x", image="missing.png"), "missing.png does not exist"),
    "missing, swift": (
        messages("<image>", "x", images=["missing.png"]),
        "missing.png does not exist",
    ),
    "missing, item": (messages([image(image="missing.png")], "x"), "missing.png does not exist"),
    "missing, ours": (ours(("Hi", "x"), images=["missing.png"]), "missing.png does not exist"),
    "missing, Qwen 1": (messages("<img>missing.png</img>", "x"), "missing.png does not exist"),
    "missing frame": (
        messages([{"type": "video", "video": ["a.png", "missing.png"]}], "x"),
        "missing.png does not exist",
    ),
    "missing video": (
        messages("<video>", "x", videos=["missing.mp4"]),
        "missing.mp4 does not exist",
    ),
    "missing file://": (
        messages([image(image="file://missing.png")], "x"),
        "missing.png does not exist",
    ),
    "outside": (sharegpt("<image>", "x", image="../out.png"), "outside"),
    "outside, Windows": (sharegpt("<image>", "x", image="..\\out.png"), "outside"),
    "outside, absolute": (sharegpt("<image>", "x", image="/etc/hostname"), "outside"),
    "outside, file://": (sharegpt("<image>", "x", image="file:///etc/hostname"), "outside"),
    "outside, frame": (messages([{"type": "video", "video": ["/etc/hostname"]}], "x"), "outside"),
    "outside, item": (messages([image(path="/etc/hostname")], "x"), "outside"),
    "the net": (messages([image(image="https://example.org/a.jpg")], "x"), "a.jpg does not exist"),
    "a number for a path": (sharegpt("<image>", "x", image=7), "7 does not exist"),
    "nothing in a dict": (
        sharegpt("<image>", "x", image={"path": None}),
        "more <image> placeholders",
    ),
    "a long name": (
        sharegpt("<image>", "x", image="a" * 5000),
        "line 2.*aaa\\.\\.\\.aaa|line 2: File name too long",
    ),
    "a zero byte": (sharegpt("<image>", "x", image="a\0.png"), "line 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_records_are_told_with_their_line(folder, case, capsys):
    record, word = BAD[case]
    path = write(folder / "m.jsonl", messages("Hi", "Hello"), record, messages("Hi", "You"))
    with pytest.raises(UserError, match=word) as error:
        Conversations(path)
    assert "m.jsonl, line 2" in str(error.value) and "--on_bad skip" in str(error.value)
    assert len(str(error.value)) < 1100
    rows = Conversations(path, on_bad="skip")
    assert [told(rows.row(i)) for i in range(len(rows))] == [["u:Hi a:Hello"], ["u:Hi a:You"]]
    assert [rows.name(i) for i in range(2)] == [f"{path}, line 1", f"{path}, line 3"]
    assert "1 of 3" in capsys.readouterr().out


UNREADABLE = {
    "breaks off": ("image", "broken.png", "broken.png"),
    "no picture": ("image", "m.jsonl", "m.jsonl"),
    "a folder": ("image", "deep", "deep"),
    "a sliver": ("image", "sliver.png", "sliver.png: 3000x8 pixels"),
    "a dot": ("image", "dot.png", "dot.png: 1x1 pixels"),
    "large": ("image", "large.png", "large.png.*shrink it first"),
    "a bomb": ("image", "bomb.png", "bomb.png.*shrink it first"),
    "data that is none": ("image", "data:image/png;base64,aGFsbG8=", "picture"),
    "frames of two sizes": ("video", ["a.png", "whole.png"], "the same size"),
    "too many frames": ("video", ["a.png"] * 800, "longer than 768 frames"),
    "no frames": ("video", "deep/empty", "no pictures"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_a_picture_holds_is_told_when_its_row_is_read(folder, case):
    kind, source, word = UNREADABLE[case]
    (folder / "deep" / "empty").mkdir(exist_ok=True)
    record = messages([{"type": kind, kind: source}, text("What?")], "x")
    rows = Conversations(write(folder / "m.jsonl", messages("Hi", "Hello"), record))
    with pytest.raises(UserError, match=f"m.jsonl, line 2.*{word}") as error:
        rows.row(1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1100


TWO = [sharegpt("<image>\nWhat?", "Red.", image="a.png"), messages("Hi", "Hello")]
LINES = "\n".join(map(json.dumps, TWO)) + "\n"
FILES = {
    "lines": ("m.jsonl", LINES, "line"),
    "without a last line end": ("m.jsonl", LINES.strip(), "line"),
    "upper case": ("m.JSONL", LINES, "line"),
    "another suffix": ("m.txt", LINES, "line"),
    "a byte order mark": ("m.jsonl", "\ufeff" + LINES, "line"),
    "a byte order mark in the middle": ("m.jsonl", LINES.replace("\n", "\n\ufeff", 1), "line"),
    "Windows": ("m.jsonl", LINES.replace("\n", "\r\n"), "line"),
    "a list": ("m.json", json.dumps(TWO), "record"),
    "a list in .jsonl": ("m.jsonl", json.dumps(TWO), "record"),
    "a pretty list": ("m.json", "\n" + json.dumps(TWO, indent=2), "record"),
    "a list with a byte order mark": ("m.json", "\ufeff" + json.dumps(TWO, indent="\t"), "record"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_every_make_are_read(folder, case):
    name, content, unit = FILES[case]
    (folder / name).write_bytes(content.encode())
    rows = Conversations(folder / name)
    assert [told(rows.row(i)) for i in range(len(rows))] == [A, ["u:Hi a:Hello"]]
    assert [rows.name(i) for i in range(2)] == [f"{folder / name}, {unit} {n}" for n in (1, 2)]


NO_FILES = {
    "empty": (b"", "no conversations"),
    "blank": (b"\n \n", "no conversations"),
    "a list of none": (b"[]", "no conversations"),
    "deep": (b"[" * 100_000, "n.jsonl.*JSON lines wanted"),
    "a list that breaks off": (json.dumps(TWO).encode()[:-5], "not JSON.*JSON lines wanted"),
    "one pretty record": (json.dumps(TWO[0], indent=2).encode(), "line 1 is not JSON.*JSON lines"),
    "Latin-1": (
        json.dumps(messages("Où?", "Là"), ensure_ascii=False).encode("latin1"),
        "line 1.*UTF-8",
    ),
    "UTF-16": (LINES.encode("utf-16"), "line 1.*UTF-8"),
    "a picture": (bytes(range(256)), "line 1.*JSON lines"),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_files_that_hold_none_are_told(folder, case):
    content, word = NO_FILES[case]
    (folder / "n.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=word) as error:
        Conversations(folder / "n.jsonl")
    assert "n.jsonl" in str(error.value)


def test_files_that_are_none_are_told(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (folder / "nowhere.jsonl", folder, tmp_path / "pipe.jsonl"):
        with pytest.raises(UserError, match=path.name):
            Conversations(path)


def test_the_first_five_bad_records_are_told_and_all_are_counted(folder):
    path = write(folder / "m.jsonl", messages("Hi", "Hello"), *["{"] * 8)
    with pytest.raises(UserError, match="8 of 9 records.*line 2.*line 6") as error:
        Conversations(path)
    assert "line 7" not in str(error.value)


def test_a_list_names_its_bad_record(folder):
    (folder / "m.json").write_text(json.dumps([*TWO, {"messages": []}], indent=1))
    with pytest.raises(UserError, match="m.json, record 3"):
        Conversations(folder / "m.json")


def test_pictures_lie_beside_the_file_or_beside_a_link_to_it(folder, tmp_path):
    path = write(folder / "m.jsonl", sharegpt("<image>What?", "Red.", image="a.png"))
    assert shown(Conversations(path).row(0)) == [RED]
    (tmp_path / "link.jsonl").symlink_to(path)
    Image.new("RGB", (8, 6), BLUE).save(tmp_path / "a.png")  # as in a hub's snapshot
    assert shown(Conversations(tmp_path / "link.jsonl").row(0)) == [BLUE]


def test_answers_of_no_weight_are_not_learned(folder):
    bad = {**assistant("Bad"), "weight": 0}
    worse = {"from": "gpt", "value": "Worse", "loss": False}
    good = {**assistant("Good"), "weight": 1, "loss": None}
    row = open_one(folder, {"messages": [user("Hi"), bad, user("Again"), worse, user("Hm"), good]})
    answers = [message for message in row.conversations[0] if message["role"] == "assistant"]
    assert [answer.get("learn", True) for answer in answers] == [False, False, True]


def test_what_is_learned_of_a_record(folder):
    """Qwen's tokens for places are tokens in answers alone; answers of no weight teach nothing."""
    asked = "<image>Where is <|object_ref_start|>it<|object_ref_end|>?<|im_end|>"
    answer = "<|object_ref_start|>it<|object_ref_end|><|box_start|>(1,2)<|box_end|><|im_start|>"
    bad = {**assistant("<|box_start|>"), "weight": 0}
    record = {"messages": [user(asked), bad, user("And?"), assistant(answer)], "images": ["a.png"]}
    talk = open_one(folder, record).conversations[0]
    tokenizer = train_tokenizer([asked, answer] * 3, 280)
    ids, labels = chat(tokenizer, talk, [(1, 2, 2)], generate=False)
    counts = {token: ids.count(number) for token, number in tokenizer.special.items()}
    assert counts["<|object_ref_start|>"] == counts["<|object_ref_end|>"] == 1
    assert counts["<|box_start|>"] == 2 and counts["<|box_end|>"] == 1
    assert counts["<|im_start|>"] == counts["<|im_end|>"] == 5
    learned = [label for label in labels if label != -100]
    assert tokenizer.fast.decode(learned, skip_special_tokens=False) == answer + "<|im_end|>"


@pytest.mark.parametrize("beside", [{}, {"images": ["a.png"]}, {"videos": ["film.gif"]}])
def test_questions_of_a_record_are_packed_as_if_asked_alone(folder, beside):
    pairs = [("What?", "Red."), ("What is it?", "A peg."), ("Sure?", "Yes.")]
    row = open_one(folder, ours(*pairs, **beside))
    processor = Processor(
        train_tokenizer(["What is it? Red. A peg. Sure? Yes. system user"] * 3, 280)
    )
    batch = processor.pack([row])
    (lengths,) = batch["segments"]
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert sum(lengths) == len(ids) and len(lengths) == 4
    start = lengths[0]
    for pair, length in zip(pairs, lengths[1:], strict=True):
        alone = processor.pack([open_one(folder, ours(pair, **beside))])
        part = slice(start, start + length)
        assert ids[: lengths[0]] + ids[part] == alone["input_ids"][0].tolist()
        assert labels[: lengths[0]] + labels[part] == alone["labels"][0].tolist()
        start += length


def test_what_else_a_record_holds_stays_in_it(folder):
    record = {**ours(("What?", "Red."), images=["a.png"]), "grounding": [[1, 2]], "seed": 7}
    record["questions"][0] |= {"category": "color", "chance": 0.5}
    assert open_one(folder, record).record == record


def test_every_text_is_learned_by_the_tokenizer(folder):
    path = write(
        folder / "m.jsonl",
        ours(("One?", "Two."), ("Three?", "Four."), images=["a.png"], system="Zero."),
    )
    words = ["Zero.", "One?", "Two.", "Zero.", "Three?", "Four."]
    assert list(Conversations(path).texts()) == words


def test_twenty_thousand_records_are_ready_at_once_and_no_picture_is_opened(folder, monkeypatch):
    monkeypatch.setattr("data.conversations.LOADERS", {"image": None, "video": None})
    monkeypatch.setattr(Image, "open", None)
    records = [
        sharegpt(f"<image>\nWhat is {i}?", "It is red.", image="a.png") for i in range(20_000)
    ]
    path = write(folder / "many.jsonl", *records)
    start = time.process_time()
    rows = Conversations(path)
    seconds = time.process_time() - start
    path.unlink()
    assert len(rows) == 20_000 and seconds < 4  # about one here; 13 with every header opened


def test_skip_leaves_out_what_breaks_only_when_read(folder, capsys):
    record = sharegpt("<image>What?", "x", image="broken.png")
    rows = Conversations(write(folder / "m.jsonl", record, messages("Hi", "Hello")))
    skip = SFTConfig(on_bad="skip")
    lengths = [len(read_row(rows, i, None, skip).conversations[0]) for i in (0, 1, 0, 1)]
    assert lengths == [1, 2, 1, 2]  # nothing is asked about a grey picture
    assert capsys.readouterr().out.count("m.jsonl, line 1") == 1
    with pytest.raises(UserError, match="m.jsonl, line 1"):
        read_row(rows, 0, None, SFTConfig())


@pytest.mark.parametrize("video", ["film.gif", "frames"])
def test_a_conversation_with_a_picture_and_a_video_trains(folder, video):
    record = sharegpt("<image><video>What?", "Noise.", image="whole.png", video=video)
    rows = Conversations(write(folder / "v.jsonl", record))
    tokenizer = train_tokenizer([*rows.texts(), "system user assistant"] * 3, 280)
    batch = Processor(tokenizer).pack([rows.row(0)])
    frames = {"film.gif": 3, "frames": 12}[video]
    assert batch["video_grid_thw"].tolist()[0][0] == -(-frames // 2)  # two to a patch
    assert batch["image_grid_thw"].shape == (1, 3)
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    assert VLM(PRESETS["nano"].for_tokenizer(tokenizer))(**inputs).logits.isfinite().all()


# ---- anything else


VALUES = (
    None,
    True,
    0,
    -1,
    2.5,
    1e300,
    "",
    "a.png",
    "<image>",
    "\ud83d",
    "../x",
    [],
    {},
    [[]],
    [None],
)
VALUES += (
    {"type": "image"},
    {"path": "a.png"},
    ["a.png", 7],
    "data:,x",
    "https://x",
    "\0",
    "a" * 300,
)


def mutate(value, rng):
    """A copy of a JSON value with one of its parts replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    parts = []

    def walk(node):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            parts.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(value)
    node, key = parts[rng.integers(len(parts))]
    other = VALUES[rng.integers(len(VALUES))]
    kind = rng.integers(4)
    if kind == 1:
        del node[key]
    elif kind == 2 and isinstance(node, dict):
        node[str(rng.choice(["images", "system", "type", "content", "from", "video", "fps"]))] = (
            other
        )
    elif kind == 3 and isinstance(node, list):
        node.insert(int(key), copy.deepcopy(node[key]))
    else:
        node[key] = copy.deepcopy(other)
    return value


def test_any_json_is_read_or_told(folder):
    rng = np.random.default_rng(0)
    seeds = [record for record, *_ in GOOD.values() if isinstance(record, dict)]
    read = 0
    for n in range(600):
        record = mutate(seeds[n % len(seeds)], rng)
        if rng.random() < 0.3:
            record = mutate(record, rng) if record else record
        path = write(folder / "fuzz.jsonl", record)
        try:
            row = Conversations(path).row(0)
        except UserError as error:
            assert "fuzz.jsonl" in str(error) and "\n" not in str(error)
            continue
        read += 1
        for conversation in row.conversations:  # each names every picture once, in order
            content = [item for m in conversation if m["role"] == "user" for item in m["content"]]
            kinds = [item["type"] for item in content if item["type"] != "text"]
            assert kinds == [kind for kind, _ in row.media]
            assert all(isinstance(m["content"], str) for m in conversation if m["role"] != "user")
    assert 100 < read < 500


def test_a_text_without_end_is_told_before_it_fills_the_memory(folder):
    rows = Conversations(write(folder / "long.jsonl", messages("Hi", "word " * 50_000)))
    with pytest.raises(UserError, match="long.jsonl, line 1.*too long"):
        rows.row(0)
