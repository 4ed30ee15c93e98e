"""Your own data: conversations about images and videos, in the common formats.

A file is JSON lines, one record per line, or one JSON list of records. A record is one of

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cup."}]}               Hugging Face, OpenAI
    {"messages": [{"role": "user", "content": "<image>What is this?"}, ...],
     "images": ["a.jpg"]}                                                LLaMA-Factory, ms-swift
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                         {"from": "gpt", "value": "A cup."}]}    LLaVA, ShareGPT
    {"images": ["a.jpg"], "questions": [{"question": "What is this?", "answer": "A cup."}, ...]}

The last is this project's own: independent questions about the same images, which come before each
of them. "videos" and <video> work like "images" and <image>; all formats may have "system". There
must be as many placeholders as images; LLaVA's texts may have none, in which case the images come
before the first question. An image is a path below the file's folder (which may contain links), a
file:// or data: URI, or {"path", "url", "bytes"}; a video is a folder of images, a GIF or WebP, a
video file, or a list of images. Everything else in a record stays in `Row.record`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from cli import UserError, one_line
from data.media import load_image, load_video, locate
from files import read_text, reading

# of both conventions: people mix them
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
LOADERS = {"image": load_image, "video": load_video}  # for each kind of media
# A placeholder in a text: LLaVA's tag, Qwen's three tokens, Qwen 1's path. ms-swift's tags for
# boxes are matched in order to refuse them: nothing would be filled in.
PLACE = re.compile(
    r"<(?:\|vision_start\|><\|)?(image|video|bbox|ref-object|img>.+?(?=</img))"
    r"(?:</img|_pad\|><\|vision_end\|)?>\n*"
)
# Options of a record, a message, an image or a video that would not be honored here.
UNREAD = re.compile(r"audios?|tools|tool_calls")
UNREAD_OF_MEDIA = re.compile(r"\w+_pixels|resized_\w+|\w*frames|video_(start|end)|fps")
MOST_CHARACTERS = 100_000  # in the texts of a row
MOST_TOLD = 5  # bad records that an error message names


@dataclass
class Row:
    """A training row: conversations about the same images, independent of each other.

    conversations [[message, ...], ...] as `processor.chat` takes them; media [("image", PIL) |
    ("video", [PIL])] in the order of their placeholders; record, the dict in the file.
    """

    conversations: list
    media: list
    record: dict


class Conversations:
    """The records of a file; `row(i)` reads the images of one.

    The structure of the records, and whether their images exist, is checked at once; images are
    decoded when their row is read. on_bad "refuse": bad records raise a UserError that names them;
    "skip": they are counted and left out.
    """

    def __init__(self, path, on_bad="refuse"):
        self.path = Path(path)
        self.records = []  # (place in the file, dict): images stay on disk
        bad = []
        entries = read_entries(self.path)
        for place, entry in tqdm(entries, desc=f"checking {self.path.name}", delay=2):
            try:
                # any error in this block is an error in the record
                with reading(f"{path}, {place}"):
                    record = json.loads(entry) if isinstance(entry, str) else entry
                    # do not read image headers: for a million images on a network disk that takes
                    # an hour
                    for _, source in read_record(record)[1]:
                        locate(source, self.path.parent)
                self.records.append((place, record))
            except UserError as error:
                bad.append(one_line(error, longest=200))  # so that five of them fit into a message
        if bad:
            about = f"{len(bad)} of {len(entries)} records are bad: {'; '.join(bad[:MOST_TOLD])}"
            if on_bad == "refuse":
                raise UserError(
                    f"{about}; expected JSON lines in UTF-8: "
                    "fix them, or skip them with --on_bad skip"
                )
            print(f"left out: {about}")
        if not self.records:
            raise UserError(f"{path} holds no conversations")

    def __len__(self):
        return len(self.records)

    def name(self, i):
        """A row in words, to find it in the file: "mine.jsonl, line 12"."""
        return f"{self.path}, {self.records[i][0]}"

    def texts(self):
        """All texts of the conversations, for training a tokenizer."""
        for _, record in self.records:
            for messages in read_record(record)[0]:
                for message in messages:
                    content = message["content"]
                    if message["role"] == "user":
                        content = "".join(item.get("text", "") for item in content)
                    yield content

    def row(self, i, rng=None):
        """Row i. UserError with file, line and image if one cannot be read."""
        record = self.records[i][1]
        with reading(self.name(i)):
            conversations, sources = read_record(record)
            # longer ones would exhaust the memory before anyone sees why
            assert len(str(conversations)) < MOST_CHARACTERS, (
                "it is too long: split the conversation"
            )
            media = [
                (kind, LOADERS[kind](locate(source, self.path.parent))) for kind, source in sources
            ]
        return Row(conversations, media, record)


# ---- from a file to records


def read_entries(path):
    """[("line 12", JSON)] of JSON lines, or [("record 12", content)] of one JSON list."""
    # invalid UTF-8 becomes lone surrogates, so that only its own record is refused
    text = read_text(path, errors="surrogateescape")
    unit = "line"
    # splitlines would also split at characters that JSON strings may contain; files joined with
    # `cat` have byte order marks in the middle
    entries = [line.strip(" \t\r\ufeff") for line in text.split("\n")]
    if text.lstrip().startswith("["):
        unit = "record"
        with reading(path, "JSON lines wanted, or one JSON list"):
            entries = json.loads(text)
    return [(f"{unit} {n}", entry) for n, entry in enumerate(entries, start=1) if entry != ""]


def read_record(record):
    """(conversations, [(kind, source)] of their media) of a record. Errors say what is wrong.

    A source is a path, a URI, or a list of them: the frames of a video.
    """
    refuse_unread(record, UNREAD)
    # tables fill columns that a record does not use with nulls
    turns = record.get("messages") or record.get("conversations")
    talks = [turns] if turns else [read_question(entry) for entry in record.get("questions") or []]
    assert talks, 'it has neither "messages" nor "conversations" nor "questions"'
    before = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    conversations = []
    for turns in talks:
        left = {kind: listed(record, kind) for kind in LOADERS}
        media = []
        messages = [read_message(turn, left, media) for turn in [*before, *turns]]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert "".join(answers).strip(), "it has no answer"
        questions = [message["content"] for message in messages if message["role"] == "user"]
        # LLaVA allows this, LLaMA-Factory does not
        if questions and not media and not record.get("messages"):
            media = [(kind, left[kind].pop(0)) for kind in LOADERS for _ in list(left[kind])]
            questions[0][:0] = [{"type": kind} for kind, _ in media]
        assert not any(left.values()), "it has more images or videos than placeholders"
        conversations.append(messages)
    return conversations, media


def read_question(entry):
    """The turns for one of a record's questions."""
    # the part before the question must be the same for all of them
    placed = PLACE.search(entry["question"])
    assert not placed, "its pictures come before each question: leave <image> out"
    question = {"role": "user", "content": entry["question"]}
    return [question, {"role": "assistant", "content": entry["answer"]}]


def refuse_unread(item, names):
    """Raise on options that would silently be ignored."""
    assert isinstance(item, dict), f"{item!r} is neither a string nor a JSON object"
    for key, value in item.items():
        # videos are sampled at two frames per second anyway
        asked = value and names.fullmatch(key) and (key, value) != ("fps", 2)
        assert not asked, f"{key!r} is not supported: remove it"


def listed(record, kind):
    """The media sources next to a record's texts; text-only rows may have "" or null there."""
    entries = as_list(record.get(kind) or record.get(f"{kind}s"))
    return list(filter(None, [find_source(entry, kind) for entry in entries]))


def as_list(entry):
    """Files hold either a list or its single entry."""
    return entry if isinstance(entry, list) else [entry]


def find_source(item, kind):
    """The path or URI in a content item or the like, a list of them, or None if there is none."""
    if kind == "video" and isinstance(item, list):  # a list of frames
        return [find_source(frame, "image") for frame in item]
    if not isinstance(item, dict):
        return item and str(item)
    encoded = item.get("bytes") or item.get("base64")
    if encoded:
        return f"data:;base64,{encoded}"
    # {"image_url": {"url": ...}}, {"image": {"path": ...}}
    found = [item[key] for key in (kind, f"{kind}_url", "url", "path") if item.get(key)]
    return find_source(found[0], kind) if found else None


def read_message(turn, left, media):
    """A chat message. Appends its media to `media`; placeholders take theirs from `left`."""
    refuse_unread(turn, UNREAD)
    name = str(turn.get("role") or turn.get("from")).lower()
    assert name in ROLES, f"unknown role {name!r}, none of {[*ROLES]}"
    role = ROLES[name]
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    items = []
    for kind, what in [part for item in as_list(content) for part in read_item(item)]:
        items.append({"type": kind})
        if kind == "text":
            items[-1][kind] = what
            continue
        # answers are generated, and the model generates no images
        assert role == "user", f"a message of {name!r} holds <{kind}>: only questions may"
        assert what or left.get(kind), f"it has more <{kind}> placeholders than {kind} entries"
        media.append((kind, what or left[kind].pop(0)))
    if role == "user":
        return {"role": role, "content": items}
    return {
        "role": role,
        "content": "".join(item["text"] for item in items),
        # the keys of OpenAI and ms-swift
        "learn": turn.get("weight") != 0 and turn.get("loss") is not False,
    }


def read_item(item):
    """Yield ("text", text) and (kind, source) for a text, or for an item of a content list."""
    item = {"type": "text", "text": item} if isinstance(item, str) else item
    refuse_unread(item, UNREAD_OF_MEDIA)
    kind = str(item.get("type")).removesuffix("_url")  # OpenAI's image_url
    if kind in LOADERS:
        yield kind, find_source(item, kind)
        return
    text = kind == "text" and item.get("text")
    assert isinstance(text, str), f"unknown content {item}: text, image and video are known"
    text.encode()  # fails on unpaired surrogates: half an emoji, or bytes that were not UTF-8
    for i, part in enumerate(PLACE.split(text)):
        if i % 2 == 1:  # a placeholder
            name, _, source = part.partition(">")  # only Qwen 1's <img> contains the path
            yield name.replace("img", "image"), source
        elif part:
            yield "text", part
