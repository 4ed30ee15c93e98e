"""Your own data: JSON lines of conversations with pictures and videos, in the two shapes that people have.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "A cup."}]}                                                     content may be a plain string too
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cup."}]}       LLaVA, ShareGPT

"images", "video" and "videos" beside "image"; <video> beside <image>; a video is a folder of pictures, a GIF or WebP, or a film that ffmpeg can play.
Paths start at the file's own folder and may not leave it. A bad record is told with its file and line: with on_bad="refuse" all of them at once, as an
error; with "skip" they are counted and left out. Pictures whose body is broken and films that do not play are met when they are read.
"""
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageSequence

from cli import UserError
from data.media import load_image, open_image
from processor import ImageConfig, smart_resize

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
MOST_TOLD = 5                    # bad records that an error names


def normalise(record):
    """(messages as `tokenizer.chat` takes them, [(kind, path)] of pictures and videos in their order); ValueError says what is wrong."""
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    if "messages" in record:
        turns = [(turn.get("role"), turn.get("content")) for turn in record["messages"]]
        files = []
    elif "conversations" in record:
        turns = [(turn.get("from"), turn.get("value")) for turn in record["conversations"]]
        listed = lambda kind: [record[kind]] if isinstance(record.get(kind), str) else list(record.get(kind) or record.get(f"{kind}s") or [])
        files = {"image": listed("image"), "video": listed("video")}
        asked = [i for i, (role, text) in enumerate(turns) if ROLES.get(role) == "user" and isinstance(text, str)]
        if asked and not any(f"<{kind}>" in turns[i][1] for i in asked for kind in files):              # no place for them: before the first question
            role, text = turns[asked[0]]
            turns[asked[0]] = role, "".join(f"<{kind}>" * len(paths) for kind, paths in files.items()) + text
    else:
        raise ValueError("it has neither \"messages\" nor \"conversations\"")
    messages, media = [], []
    for role, content in turns:
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}, choose from: {', '.join(ROLES)}")
        if isinstance(content, str):
            content = split(content, files, media) if files and ROLES[role] == "user" else [{"type": "text", "text": content}]
        elif isinstance(content, list):
            content = [one(item, media) for item in content]
        else:
            raise ValueError(f"a message of {role!r} has no content")
        messages.append({"role": ROLES[role], "content": content})
    if files and any(files.values()):
        raise ValueError(f"it names {sum(map(len, files.values()))} more pictures or videos than <image> and <video> places in its text")
    for message in messages:
        if message["role"] == "assistant":
            if any(item["type"] != "text" for item in message["content"]):
                raise ValueError("an answer holds a picture or video")
            message["content"] = "".join(item.get("text", "") for item in message["content"])
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise ValueError("it has no answer")
    return messages, media


def one(item, media):
    """A content item of a chat message, its picture or video moved to `media`."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return {"type": "text", "text": item["text"]}
    if kind in ("image", "video") and isinstance(item.get(kind), str):
        media.append((kind, item[kind]))
        return {"type": kind}
    raise ValueError(f"unknown content {json.dumps(item)[:60]}: text, image and video are known, the last two as a path")


def split(text, files, media):
    """LLaVA's text with <image> and <video> in it, as content items; its pictures move from `files` to `media`."""
    items = []
    while text:
        found = min(((text.find(f"<{kind}>"), kind) for kind in files if f"<{kind}>" in text), default=None)
        before, text = (text, "") if found is None else (text[:found[0]], text[found[0] + len(found[1]) + 2:].lstrip("\n"))
        if before:
            items.append({"type": "text", "text": before})
        if found is not None:
            if not files[found[1]]:
                raise ValueError(f"its text has more <{found[1]}> places than it names {found[1]}s")
            media.append((found[1], files[found[1]].pop(0)))
            items.append({"type": found[1]})
    return items


def load_media(kind, path):
    """A picture (PIL), or a video's frames [PIL]: of films like MP4 two a second, which takes the program ffmpeg. UserError if it cannot be read."""
    if kind == "image":
        return load_image(path)
    if not path.is_dir() and path.suffix.lower() not in (".gif", ".webp"):
        return load_film(path)
    if path.is_dir():
        numbers = lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]            # 2.png comes before 10.png
        frames = [load_image(file) for file in sorted(path.iterdir(), key=numbers) if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    else:
        try:
            with Image.open(path) as film:
                frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(film)]
        except Exception as error:                   # Pillow raises whatever its readers raise
            raise UserError(f"cannot play {path} ({type(error).__name__})") from None
    if not frames:
        raise UserError(f"no pictures in {path}")
    return frames


def load_film(path):
    if shutil.which("ffmpeg") is None:
        raise UserError(f"cannot play {path} without the program ffmpeg: install it (`apt-get install ffmpeg`), or cut films into folders of pictures, two a second")
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(["ffmpeg", "-v", "error", "-i", str(path), "-vf", "fps=2", f"{folder}/%06d.png"], capture_output=True, text=True)
        if made.returncode or not any(Path(folder).iterdir()):
            raise UserError(f"cannot play {path}: ffmpeg says {(made.stderr.strip().splitlines() or ['nothing, and makes no pictures'])[-1]}")
        return load_media("video", Path(folder))


class Chats:
    """The records of a JSON lines file: chats[i] -> {"messages", "media": [("image", PIL) | ("video", [PIL])]}."""

    def __init__(self, path, on_bad="refuse"):
        self.path, self.records, bad = Path(path), [], []
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")              # splitlines would also split at what JSON strings may hold
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        root = self.path.resolve().parent
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                messages, media = normalise(json.loads(line))
                paths = [(kind, (root / name).resolve()) for kind, name in media]
                for (kind, name), (_, found) in zip(media, paths):
                    if not found.is_relative_to(root):
                        raise ValueError(f"{name} lies outside {self.path.parent}")
                    if not found.exists():
                        raise ValueError(f"{name} is not there")
                    if kind == "image":
                        with open_image(found) as picture:               # its header; a broken body is told when it is read
                            smart_resize(picture.height, picture.width, ImageConfig())
                self.records.append((number, messages, paths))
            except (ValueError, OSError, TypeError, AttributeError, UserError) as error:
                bad.append(f"{path}, line {number}: {error}")
        if bad and on_bad == "refuse":
            more = f", and {len(bad) - MOST_TOLD} more" if len(bad) > MOST_TOLD else ""
            raise UserError("; ".join(bad[:MOST_TOLD]) + more + "; mend them, or leave them out with --on_bad skip")
        if bad:
            print(f"{path}: {len(bad)} of {len(bad) + len(self.records)} records left out; the first: {bad[0]}")
        if not self.records:
            raise UserError(f"{path} holds no conversations")
        self.skipped = len(bad)

    def texts(self):
        """Every string of the conversations, for a tokenizer."""
        for _, messages, _ in self.records:
            for message in messages:
                yield from [message["content"]] if isinstance(message["content"], str) else [item["text"] for item in message["content"] if item["type"] == "text"]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        number, messages, media = self.records[i]
        try:
            return {"messages": messages, "media": [(kind, load_media(kind, path)) for kind, path in media]}
        except UserError as error:
            raise UserError(f"{self.path}, line {number}: {error}") from None
