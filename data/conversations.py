"""Your own data: conversations about pictures and videos, in the shapes that people have.

A file is JSON lines, a record a line, or one JSON list of records. A record is one of

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cup."}]}               Hugging Face, OpenAI
    {"messages": [{"role": "user", "content": "<image>What is this?"}, ...],
     "images": ["a.jpg"]}                                                LLaMA-Factory, ms-swift
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                         {"from": "gpt", "value": "A cup."}]}    LLaVA, ShareGPT
    {"instruction": "<image>What is this?", "output": "A cup.", "images": ["a.jpg"]}      Alpaca
    {"query": "<image>What is this?", "response": "A cup.", "images": ["a.jpg"]}        ms-swift
    {"images": ["a.jpg"], "questions": [{"question": "What is this?", "answer": "A cup."}, ...]}

The last is this project's own: questions about the same pictures, each as if asked alone. "videos"
and <video> go beside "images" and <image>, "system" beside all. Each picture has one place and each
place one picture; where texts have none at all, pictures come before the question ("messages"
must say where). A picture is a path below the file's folder, which may hold links, a file:// or
data: URI, or {"path", "url", "bytes"}; a video is a folder of pictures, a GIF or WebP, a film, or
in a content list a list of pictures. What else a record holds stays in `Row.record`.
"""

import json
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from tqdm import tqdm

from cli import UserError, one_line
from data.media import load_image, load_video, locate
from files import read_text, reading

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"chatgpt": "assistant", "model": "assistant", "system": "system"}
KINDS = ("image", "video")
# a place in a text: LLaVA's tag, Qwen 1's path; those of ms-swift that are not filled are refused
PLACE = re.compile(r"<(image|video|bbox|ref-object|img>.+?</img)>\n*")
QWEN_PLACE = re.compile(r"<\|vision_start\|><\|(image|video)_pad\|><\|vision_end\|>")
# what asks for another answer or picture than would be trained on, and the value that changes none
UNREAD = dict.fromkeys(("audio", "audios", "tools", "tool_calls", "min_pixels", "max_pixels"))
UNREAD |= dict.fromkeys(("total_pixels", "resized_height", "resized_width", "nframes"))
UNREAD |= {"video_start": 0, "video_end": None, "fps": 2}
MOST_TOLD = 5  # bad records that an error names


@dataclass
class Row:
    """A row of training: conversations about the same pictures, none seeing another.

    conversations [[message, ...], ...] as `processor.chat` takes them; media in the order of
    their places [("image", PIL) | ("video", [PIL])]; record, the dict in the file.
    """

    conversations: list
    media: list
    record: dict


class Conversations:
    """The records of a file; `row(i)` reads the pictures of one.

    A record's structure, and whether its pictures are there, is checked at once; what they show,
    when the row is read. on_bad "refuse": bad records are a UserError that names them; "skip":
    they are left out, and counted in `skipped`.
    """

    def __init__(self, path, on_bad="refuse"):
        self.path = Path(path)
        # a file that is itself a link may have its pictures at either end
        self.roots = (self.path.parent, self.path.resolve().parent)
        self.records = []  # (place in the file, dict)
        bad = []
        entries = read_entries(self.path)
        for place, entry in tqdm(entries, desc=f"checking {self.path.name}", delay=2):
            try:
                with reading(f"{path}, {place}"):
                    record = json.loads(entry) if isinstance(entry, str) else entry
                    for _, source in read_record(record)[1]:
                        self.find(source)
                self.records.append((place, record))
            except UserError as error:
                bad.append(one_line(error, longest=200))
        if bad and on_bad == "refuse":
            more = f", and {len(bad) - MOST_TOLD} more" if len(bad) > MOST_TOLD else ""
            advice = "JSON lines in UTF-8 wanted: mend them, or leave them out with --on_bad skip"
            raise UserError(f"{'; '.join(bad[:MOST_TOLD])}{more}; {advice}")
        if bad:
            print(f"{path}: {len(bad)} of {len(entries)} records left out; the first: {bad[0]}")
        if not self.records:
            raise UserError(f"{path} holds no conversations")
        self.skipped = len(bad)

    def __len__(self):
        return len(self.records)

    def name(self, i):
        """A row in words, for whoever looks for it: "mine.jsonl, line 12"."""
        return f"{self.path}, {self.records[i][0]}"

    def texts(self):
        """Every text of the conversations, for a tokenizer."""
        for _, record in self.records:
            for messages in read_record(record)[0]:
                for message in messages:
                    content = message["content"]
                    items = [{"text": content}] if isinstance(content, str) else content
                    yield from (item["text"] for item in items if "text" in item)

    def row(self, i, rng=None):
        """The Row i. UserError that names file, line and picture if one cannot be read."""
        record = self.records[i][1]
        with reading(self.name(i)):
            conversations, sources = read_record(record)
            media = [(kind, self.load(kind, source)) for kind, source in sources]
        return Row(conversations, media, record)

    def find(self, source):
        """The file that a source means, or its bytes, or a list of these. UserError if none."""
        if isinstance(source, list):
            return [self.find(frame) for frame in source]
        for root in self.roots:
            path = locate(str(source).replace("\\", "/"), root)  # Windows' paths
            if isinstance(path, BytesIO) or path.exists():
                return path
        raise UserError(f"{source} is not there")

    def load(self, kind, source):
        """A picture (PIL), or a video's frames [PIL]. UserError if they cannot be shown."""
        found = self.find(source)
        if kind == "image":
            frames = [load_image(found)]
        else:
            frames = list(map(load_image, found)) if isinstance(found, list) else load_video(found)
        width, height = frames[0].size
        if any(frame.size != (width, height) for frame in frames):
            raise UserError(f"the frames of {source} must have one size")
        if min(width, height) < 2 or max(width, height) > 200 * min(width, height):
            raise UserError(f"{source} is too thin: {width}x{height} pixels")
        return frames[0] if kind == "image" else frames


# ---- from a file to records


def read_entries(path):
    """[("line 12", JSON)] of JSON lines, or [("record 12", content)] of one JSON list."""
    # bytes that are no UTF-8 become lone surrogates, for which only their record is refused
    text = read_text(path, errors="surrogateescape")
    if text.lstrip().startswith("["):
        with reading(path, "JSON lines wanted, or one JSON list"):
            return [(f"record {n}", record) for n, record in enumerate(json.loads(text), start=1)]
    # splitlines would also split at what JSON strings may hold
    lines = enumerate(text.split("\n"), start=1)
    return [(f"line {n}", line) for n, line in lines if line.strip()]


def read_record(record):
    """(conversations, [(kind, source)] of their media) of a record. Errors say what is wrong.

    A source is a path, a URI, or a list of them: the frames of a video.
    """
    if not isinstance(record, dict):
        raise TypeError("it is no JSON object")
    refuse_unread(record)
    conversations = []
    for turns in read_turns(record):
        messages = [read_message(turn) for turn in turns]
        questions = [message["content"] for message in messages if message["role"] == "user"]
        files = {kind: listed(record, kind) for kind in KINDS}
        places = [item for content in questions for item in content if item["type"] in KINDS]
        if questions and not places and "messages" not in record:
            places = [{"type": kind} for kind in KINDS for _ in files[kind]]
            questions[0][:0] = places
        for kind, names in files.items():
            unnamed = [place for place in places if place["type"] == kind and "source" not in place]
            if len(unnamed) != len(names):
                raise ValueError(f"it names {len(names)} {kind}s for {len(unnamed)} places")
            for place, name in zip(unnamed, names, strict=True):
                place["source"] = name
        media = [(place["type"], place.pop("source")) for place in places]
        conversations.append(messages)
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not "".join(answers).strip() and record.get("questions") != []:
            raise ValueError("it has no answer")
    return conversations, media


def refuse_unread(item):
    """ValueError for what a record, a message or a picture asks for and would not get."""
    for key in UNREAD.keys() & item.keys():
        if item[key] and item[key] != UNREAD[key]:
            raise ValueError(f"{key!r} is not obeyed here: take it out")


def read_turns(record):
    """A record's conversations [[{"role", "content"}, ...], ...], whatever its shape."""
    before = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    turns = record.get("messages") or record.get("conversations")
    if turns:
        return [before + (json.loads(turns) if isinstance(turns, str) else turns)]
    for question, answer in (("instruction", "output"), ("query", "response")):
        if question in record:
            asked = "\n".join(filter(None, (record[question], record.get("input"))))
            pairs = [*(record.get("history") or []), (asked, record[answer])]
            return [before + pair_turns(pairs)]
    if "questions" not in record:
        raise ValueError('it has neither "messages" nor "conversations" nor "questions"')
    pairs = [(entry["question"], entry["answer"]) for entry in record["questions"]]
    return [before + pair_turns([pair]) for pair in pairs] or [[{"role": "user", "content": ""}]]


def pair_turns(pairs):
    turns = []
    for question, answer in pairs:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    return turns


def listed(record, kind):
    """The sources beside a record's texts; rows of text alone may have "" or null there."""
    entries = record.get(kind) or record.get(f"{kind}s") or []
    entries = entries if isinstance(entries, list) else [entries]
    return [find_source(entry, kind) for entry in entries if entry]


def find_source(item, kind):
    """The path or URI in a content item or its like, a list of them, or None without."""
    while isinstance(item, dict):
        encoded = item.get("bytes") or item.get("base64")
        if encoded:
            return f"data:;base64,{encoded}"
        keys = (kind, f"{kind}_url", "url", "path")
        item = next((item[key] for key in keys if item.get(key)), None)
    if kind == "video" and isinstance(item, list):
        return [find_source(frame, "image") for frame in item]
    return item


def read_message(turn):
    """A chat message. Its places for media have a "source" if they name their own."""
    refuse_unread(turn)
    name = turn.get("role") or turn.get("from")
    role = ROLES.get(str(name).lower())
    if role is None:
        raise ValueError(f"unknown role {name!r}, choose from: {', '.join(ROLES)}")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    items = []
    for item in content if isinstance(content, list) else [content]:
        items += read_item(item)
    if role == "user":
        return {"role": role, "content": items}
    if any(item["type"] in KINDS for item in items):
        raise ValueError(f"a message of {name!r} holds a picture or video, as only questions may")
    message = {"role": role, "content": "".join(item["text"] for item in items)}
    if turn.get("weight") == 0 or turn.get("loss") is False:  # OpenAI's and ms-swift's
        message["learn"] = False
    return message


def read_item(item):
    """A text, or an item of a content list, as content items of a chat message."""
    item = {"type": "text", "text": item} if isinstance(item, str) else item
    if not isinstance(item, dict):
        raise TypeError("a message has no text")
    kind = str(item.get("type")).removesuffix("_url")
    if kind in KINDS:
        refuse_unread(item)
        source = find_source(item, kind)
        return [{"type": kind, "source": source} if source else {"type": kind}]
    if kind != "text" or not isinstance(item.get("text"), str):
        raise ValueError(f"unknown content {item}: text, image and video are known")
    item["text"].encode()  # half an emoji, or no UTF-8
    items = []
    for i, part in enumerate(PLACE.split(QWEN_PLACE.sub(r"<\1>", item["text"]))):
        if i % 2 == 0:  # between two places
            items += [{"type": "text", "text": part}] if part else []
        elif part.startswith("img>"):
            items.append({"type": "image", "source": part[4:-5]})
        elif part in KINDS:
            items.append({"type": part})
        else:
            raise ValueError(f"nothing here stands for <{part}>: write it out")
    return items
