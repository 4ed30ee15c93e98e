"""Your own data: conversations about pictures and videos, in the shapes that people have.

A file is JSON lines, a record a line, or one JSON list of records. A record is one of

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"},
                                               {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cup."}]}               Hugging Face, OpenAI
    {"messages": [{"role": "user", "content": "<image>What is this?"}, ...],
     "images": ["a.jpg"]}                                                LLaMA-Factory, ms-swift
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                         {"from": "gpt", "value": "A cup."}]}    LLaVA, ShareGPT
    {"images": ["a.jpg"], "questions": [{"question": "What is this?", "answer": "A cup."}, ...]}

The last is this project's own: questions about the same pictures, each as if asked alone, with the
pictures before it. "videos" and <video> go beside "images" and <image>, "system" beside all. Each
picture has one place, and each place one picture; LLaVA's texts may have none, then pictures come
before the first question. A picture is a path below the file's folder (which may hold links), a
file:// or data: URI, or {"path", "url", "bytes"}; a video is a folder of pictures, a GIF or WebP,
a film, or a list of pictures. What else a record holds stays in `Row.record`.
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

ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "gpt": "assistant"}  # in any case
LOADERS = {"image": load_image, "video": load_video}  # of the kinds of media
# A place in a text: LLaVA's tag, Qwen's three tokens, Qwen 1's path. ms-swift's tags for boxes are
# known here to be refused: nothing would be put in.
PLACE = re.compile(
    r"<(?:\|vision_start\|><\|)?(image|video|bbox|ref-object|img>.+?</img)"
    r"(?:_pad\|><\|vision_end\|)?>\n*"
)
# What a record or a message, and what a picture or video may ask for and would not get.
UNREAD = re.compile(r"audios?|tools|tool_calls")
UNREAD_OF_MEDIA = re.compile(r"\w+_pixels|resized_\w+|\w*frames|video_(start|end)|fps")
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
        self.records = []  # (place in the file, dict): pictures stay on the disk
        bad = []
        entries = read_entries(self.path)
        for place, entry in tqdm(entries, desc=f"checking {self.path.name}", delay=2):
            try:
                # whatever is wrong in there is wrong with the record
                with reading(f"{path}, {place}"):
                    record = json.loads(entry) if isinstance(entry, str) else entry
                    for _, source in read_record(record)[1]:
                        self.find(source)
                self.records.append((place, record))
            except UserError as error:
                bad.append(one_line(error, longest=200))  # so that five of them fit a message
        self.skipped = len(bad)
        about = f"{len(bad)} of {len(entries)} records are bad: {'; '.join(bad[:MOST_TOLD])}"
        if bad and on_bad == "refuse":
            advice = "JSON lines in UTF-8 wanted: mend them, or leave them out with --on_bad skip"
            raise UserError(f"{about}; {advice}")
        if bad:
            print(f"left out: {about}")
        if not self.records:
            raise UserError(f"{path} holds no conversations")

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
            media = [(kind, LOADERS[kind](self.find(source))) for kind, source in sources]
        return Row(conversations, media, record)

    def find(self, source):
        """The file that a source means, or its bytes, or a list of these. UserError if none."""
        if isinstance(source, list):
            return [self.find(frame) for frame in source]
        for root in self.roots:
            path = locate(str(source), root)
            # no header is read here: a million pictures on a network's disk take an hour
            if isinstance(path, BytesIO) or path.exists():
                return path
        raise UserError(f"{source} is not there")


# ---- from a file to records


def read_entries(path):
    """[("line 12", JSON)] of JSON lines, or [("record 12", content)] of one JSON list."""
    # bytes that are no UTF-8 become lone surrogates, for which only their record is refused
    text = read_text(path, errors="surrogateescape")
    unit = "line"
    # splitlines would also split at what JSON strings may hold; files put together with `cat` have
    # byte order marks in the middle
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
    refuse_unread(record)
    conversations = []
    for turns in read_turns(record):  # one conversation, but for questions
        messages = [read_message(turn) for turn in turns]
        conversations.append(messages)
        questions = [message["content"] for message in messages if message["role"] == "user"]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        # where nothing is asked, pictures alone are shown
        if not "".join(answers).strip() and record.get("questions") != []:
            raise ValueError("it has no answer")
        media = place_media(record, questions)
    return conversations, media


def place_media(record, questions):
    """[(kind, source)] of the places in questions' contents, those beside them put in their turn."""
    places = [item for content in questions for item in content if "text" not in item]
    files = {kind: listed(record, kind) for kind in LOADERS}
    # what questions share must be the same to the last picture
    if places and not record.get("messages") and not record.get("conversations"):
        raise ValueError("its pictures come before each question: leave <image> out")
    # LLaMA-Factory refuses what LLaVA lets pass
    if questions and not places and not record.get("messages"):
        places = [{"type": kind} for kind in files for _ in files[kind]]
        questions[0][:0] = places
    for place in places:
        if "source" not in place:  # nor did the content item name it
            left = files.get(place["type"])
            if not left:
                raise ValueError(f"it has more <{place['type']}> than it names")
            place["source"] = left.pop(0)
    if any(files.values()):
        raise ValueError("it names more pictures or videos than its questions have places for")
    return [(place["type"], place.pop("source")) for place in places]


def refuse_unread(item, names=UNREAD):
    """Errors for what would be learned otherwise than it is meant."""
    if not isinstance(item, dict):
        raise TypeError(f"{str(item)[:60]!r} is no JSON object")
    for key, value in item.items():
        # films are seen at two frames a second anyway
        if value and names.fullmatch(key) and (key, value) != ("fps", 2):
            raise ValueError(f"{key!r} is not obeyed here: take it out")


def read_turns(record):
    """A record's conversations [[{"role", "content"}, ...], ...], whatever its shape."""
    before = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    # tables fill the columns of other shapes with nulls, and write lists as strings
    turns = record.get("messages") or record.get("conversations")
    if turns:
        return [before + (json.loads(turns) if isinstance(turns, str) else turns)]
    if "questions" not in record:
        raise ValueError('it has neither "messages" nor "conversations" nor "questions"')
    conversations = []
    for entry in record["questions"]:
        question = {"role": "user", "content": entry["question"]}
        answer = {"role": "assistant", "content": entry["answer"]}
        conversations.append([*before, question, answer])
    return conversations or [[{"role": "user", "content": ""}]]  # pictures alone


def listed(record, kind):
    """The sources beside a record's texts; rows of text alone may have "" or null there."""
    entries = record.get(kind) or record.get(f"{kind}s") or []
    entries = entries if isinstance(entries, list) else [entries]
    return [find_source(entry, kind) for entry in entries if entry]


def find_source(item, kind):
    """The path or URI in a content item or its like, a list of them, or None without."""
    while isinstance(item, dict):  # {"image_url": {"url": ...}}, {"image": {"path": ...}}
        encoded = item.get("bytes") or item.get("base64")
        if encoded:
            return f"data:;base64,{encoded}"
        keys = (kind, f"{kind}_url", "url", "path")
        item = next((item[key] for key in keys if item.get(key)), None)
    if kind == "video" and isinstance(item, list):  # its frames
        return [find_source(frame, "image") for frame in item]
    return item and str(item)


def read_message(turn):
    """A chat message. Its places for media have a "source" if they name their own."""
    refuse_unread(turn)
    name = str(turn.get("role") or turn.get("from")).lower()
    role = SHAREGPT.get(name, name)
    if role not in ROLES:
        raise ValueError(f"unknown role {name!r}, choose from: {', '.join((*ROLES, *SHAREGPT))}")
    # people mix the words of the two shapes
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    items = []
    for item in content if isinstance(content, list) else [content]:
        items += read_item(item)
    if role == "user":
        return {"role": role, "content": items}
    # the model writes answers, and it writes no pictures
    for item in items:
        if "text" not in item:
            raise ValueError(f"a message of {name!r} holds <{item['type']}>: only questions may")
    message = {"role": role, "content": "".join(item["text"] for item in items)}
    if turn.get("weight") == 0 or turn.get("loss") is False:  # OpenAI's, ms-swift's
        message["learn"] = False
    return message


def read_item(item):
    """A text, or an item of a content list, as content items of a chat message."""
    item = {"type": "text", "text": item} if isinstance(item, str) else item
    if not isinstance(item, dict):
        raise TypeError("a message has no text")
    kind = str(item.get("type")).removesuffix("_url")  # OpenAI's image_url
    if kind in LOADERS:
        refuse_unread(item, UNREAD_OF_MEDIA)
        source = find_source(item, kind)
        return [{"type": kind, "source": source} if source else {"type": kind}]
    if kind != "text" or not isinstance(item.get("text"), str):
        raise ValueError(f"unknown content {item}: text, image and video are known")
    item["text"].encode()  # fails for half an emoji, and for what was no UTF-8
    items = []
    for i, part in enumerate(PLACE.split(item["text"])):
        if i % 2 == 0:  # text between two places
            items += [{"type": "text", "text": part}] if part else []
        elif part.startswith("img>"):
            items.append({"type": "image", "source": part[4:-5]})
        else:
            items.append({"type": part})
    return items
