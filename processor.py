"""Pixels and words to tensors: Qwen2.5-VL's image processor, tokenizer and chat template.

    pictures, videos ─► process_media ─► vision inputs and their grids (t, h, w) ─┐
    messages ─► chat (a place for every token of a picture) ◄─────────────────────┘
                 └─► collate ─► a padded batch (prompt), or rows end to end (pack) ─► vlm.py

Text is only ever text: special tokens that a user types are not obeyed. tests/test_processor.py
compares with transformers' image processor and `apply_chat_template`.

Letters as in vlm.py: B batch, L tokens, P patches of all pictures, p side of a patch (pixels),
m patches a token merges along a side, t h w a picture's grid in frames and patches.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from cli import UserError
from data.media import to_rgb
from files import atomic, find_folder, read_json, read_text, reading, write_json

# ---- pixels and patches


@dataclass
class ImageConfig:
    """How pictures become patches. Names are those of the hub's preprocessor_config.json."""

    patch_size: int = 16  # p, pixels
    merge_size: int = 2  # m
    temporal_patch_size: int = 2  # frames in a patch; a still picture is shown twice
    min_pixels: int = 128 * 128  # smaller pictures are enlarged, larger ones shrunk
    max_pixels: int = 128 * 128
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of red, green, blue in 0..1
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        self.image_mean = tuple(self.image_mean)
        self.image_std = tuple(self.image_std)
        assert 0 < self.min_pixels <= self.max_pixels, "min_pixels is larger than max_pixels"

    @classmethod
    def from_pretrained(cls, folder):
        """Of a model folder, as transformers reads it.

        transformers 4 writes min_pixels and max_pixels into preprocessor_config.json; 5 writes
        size {shortest_edge, longest_edge} there, or below "image_processor" into
        processor_config.json. Whatever is left out comes from config.json, or is the class's.
        """
        # a whole processor goes before the older file, as in transformers
        path = Path(folder) / "processor_config.json"
        content = read_json(path).get("image_processor") if path.exists() else None
        if content is None:
            path = Path(folder) / "preprocessor_config.json"
            content = read_json(path) if path.exists() else {}
        model = read_json(Path(folder) / "config.json")
        with reading(path):
            # patches are cut as the ViT wants them
            vision = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
            vision |= model.get("vision_config") or {}
            sizes = {
                "patch_size": vision["patch_size"],
                "merge_size": vision["spatial_merge_size"],
                "temporal_patch_size": vision["temporal_patch_size"],
            }
            limits = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 1280}  # the class's
            size = dict(content.get("size") or {})
            size["min_pixels"] = size.get("shortest_edge", size.get("min_pixels"))
            size["max_pixels"] = size.get("longest_edge", size.get("max_pixels"))
            # what stands last is right; config.json has limits where an older nanoBLM wrote it
            fields = {**sizes, **limits}
            names = [field.name for field in dataclasses.fields(cls)]
            for source in (model, size, content):
                fields |= {name: source[name] for name in names if source.get(name) is not None}
            fits = sizes.items() <= fields.items()
            assert fits, "patch_size or merge_size differs from config.json's"
            return cls(**fields)

    def save_pretrained(self, folder):
        """Write preprocessor_config.json, for all versions."""
        kind = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        }
        edges = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        content = {**kind, **dataclasses.asdict(self), "size": edges}
        write_json(Path(folder) / "preprocessor_config.json", content)


def smart_resize(height, width, config):
    """Qwen2-VL's target size (height, width): multiples of p m, area within the limits.

    UserError on slivers.
    """
    factor = config.patch_size * config.merge_size
    low, high = sorted((height, width))
    if low < 2 or high > 200 * low:
        needed = "sides of at least 2 pixels, one at most 200 times the other"
        raise UserError(f"a picture of {width}x{height} pixels is too thin: {needed}")
    rows = round(height / factor) * factor
    columns = round(width / factor) * factor
    # both sides by one factor, to the multiple that stays within the limit
    if rows * columns > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def resize(image, config):
    """A picture as `to_rgb` takes it to uint8 (height, width, 3) of `smart_resize`'s size."""
    image = to_rgb(image)
    pixels = np.asarray(image)
    rows, columns = smart_resize(*pixels.shape[:2], config)
    if (rows, columns) == pixels.shape[:2]:
        return pixels
    picture = Image.fromarray(pixels)
    picture = picture.resize((columns, rows), Image.Resampling.BICUBIC)  # PIL: width first
    return np.asarray(picture)


def process_images(images, config):
    """Pictures to pixel_values (P, 3*2*p*p) float32 and image_grid_thw (n, 3).

    PIL pictures or uint8 (height, width, 3) arrays, of any sizes; as Hugging Face's processor.
    """
    p, m = config.patch_size, config.merge_size
    mean = np.float32(config.image_mean).reshape(3, 1, 1)
    std = np.float32(config.image_std).reshape(3, 1, 1)
    resized = [resize(image, config) for image in images]
    values, grids = [], []
    # neighbors of one size in one pass: in training that is all of them
    for (height, width, _), group in groupby(resized, key=np.shape):
        pixels = np.stack(list(group))  # (n, height, width, 3)
        # m x m neighbors after one another, as the merger takes them
        order = "n (h a p) (w b q) c -> (n h w a b) c p q"
        patches = rearrange(pixels, order, a=m, b=m, p=p, q=p)
        patches = (patches.astype(np.float32) / np.float32(255) - mean) / std
        # a still picture is shown in every frame of its patch
        frames = patches[:, :, None].repeat(config.temporal_patch_size, axis=2)
        values.append(frames.reshape(len(frames), -1))  # (patches, 3*2*p*p)
        grids += [[1, height // p, width // p]] * len(pixels)
    return torch.from_numpy(np.concatenate(values)), torch.tensor(grids)


def process_videos(videos, config):
    """Videos, lists of frames, to pixel_values_videos (P, 3*2*p*p) and video_grid_thw (n, 3).

    Two frames share a patch; an odd one at the end is shown twice. Hugging Face's processor also
    picks frames and limits the pixels of a whole video: here the caller picks (two a second is
    what Qwen saw), and every frame has a picture's limits. UserError if frames differ in size.
    """
    frames = config.temporal_patch_size
    values, grids = [], []
    for video in videos:
        odd = -len(video) % frames
        pixels, grid = process_images([*video, *[video[-1]] * odd], config)
        if (grid != grid[0]).any():
            raise UserError("the frames of a video must have one size")
        t = len(grid) // frames
        grids.append([t, *grid[0, 1:].tolist()])
        # every frame came as a still picture, shown `frames` times: one of these is enough
        pixels = rearrange(pixels, "(t f n) (c g q) -> g t n c f q", t=t, f=frames, c=3, g=frames)
        values.append(rearrange(pixels[0], "t n c f q -> (t n) (c f q)"))
    return torch.cat(values), torch.tensor(grids)


def process_media(media, config):
    """[("image" | "video", what)] to vision inputs and the grids (t, h, w), in this order."""
    images = [what for kind, what in media if kind == "image"]
    videos = [what for kind, what in media if kind == "video"]
    inputs = {}
    if images:
        inputs["pixel_values"], inputs["image_grid_thw"] = process_images(images, config)
    if videos:
        inputs["pixel_values_videos"], inputs["video_grid_thw"] = process_videos(videos, config)
    # each kind has its own tensor of grids: back to one list
    grids = {
        "image": iter(inputs.get("image_grid_thw", ())),
        "video": iter(inputs.get("video_grid_thw", ())),
    }
    return inputs, [next(grids[kind]).tolist() for kind, _ in media]


# ---- words

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"  # digits one by one
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",  # padding
    "<|im_start|>",  # a message begins
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",  # a picture or video begins
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",  # a place for one token of a picture
    "<|video_pad|>",
)
# what an answer says of places: tokens there, and text wherever else somebody writes them
GROUNDING = re.compile(r"(<\|(?:object_ref|box|quad)_(?:start|end)\|>)")
SYSTEM_PROMPT = "You are a helpful assistant."
# `chat` below in Jinja, for the tools that read a checkpoint's tokenizer_config.json
CHAT_TEMPLATE = (
    """{%- if messages[0]['role'] != 'system' %}<|im_start|>system
"""
    + SYSTEM_PROMPT
    + """<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}
{%- else %}{%- for item in message['content'] %}
{%- if item['type'] in ('image', 'video') %}<|vision_start|><|{{ item['type'] }}_pad|><|vision_end|>{% else %}{{ item['text'] }}{% endif %}
{%- endfor %}{%- endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
)


class Tokenizer:
    """Byte-level BPE from a tokenizer.json.

    Text is only ever text: "<|im_end|>" typed by a user becomes its characters, not the token.
    """

    def __init__(self, fast):
        self.fast = fast
        self.fast.encode_special_tokens = True  # the library's name for "as plain text"
        self.special = {token: fast.token_to_id(token) for token in SPECIAL_TOKENS}
        self.encode = lru_cache(maxsize=1 << 16)(self.encode)  # training repeats its phrases
        missing = [token for token, i in self.special.items() if i is None]
        if missing:
            raise UserError(f"the tokenizer lacks Qwen's special tokens, first {missing[0]}")

    def __len__(self):
        return self.fast.get_vocab_size()

    def encode(self, text):
        """Token ids of a text, a tuple; half a surrogate pair becomes a question mark."""
        return tuple(self.fast.encode(printable(text), add_special_tokens=False).ids)

    def decode(self, ids):
        """Text of token ids, special tokens left out."""
        return self.fast.decode(list(ids), skip_special_tokens=True)

    @classmethod
    def from_pretrained(cls, path_or_repo_id):
        path = find_folder(path_or_repo_id) / "tokenizer.json"
        with reading(path):
            text = read_text(path)
            try:
                return cls(FastTokenizer.from_str(text))
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 (the library raises no other)
                raise UserError(f"cannot read the tokenizer {path}: {error}") from None

    def save_pretrained(self, folder):
        """Write tokenizer.json, and tokenizer_config.json for transformers and vLLM."""
        with atomic(Path(folder) / "tokenizer.json") as path:
            path.write_text(self.fast.to_str(pretty=True), encoding="utf-8")
        about = {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
        }
        write_json(Path(folder) / "tokenizer_config.json", about)


def printable(text):
    return text.encode(errors="replace").decode()


def train_tokenizer(texts, vocab_size=1024):
    """A Tokenizer with Qwen's rules, learned from an iterable of strings.

    vocab_size byte-level pieces, Qwen's special tokens behind them.
    """
    fast = FastTokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    fast.decoder = decoders.ByteLevel()
    # NFC, words and digits apart, bytes: as in Qwen's tokenizer.json
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # so nothing is unknown
        show_progress=False,
    )
    fast.train_from_iterator(map(printable, texts), trainer)
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    fast.add_special_tokens(special)
    return Tokenizer(fast)


def chat(tokenizer, messages, grids=(), merge_size=2, generate=True):
    """Qwen2.5-VL's chat template: input_ids and labels, two lists of L.

    messages [{"role": "system" | "user" | "assistant", "content": str or a list of {"type":
    "image"}, {"type": "video"} and {"type": "text", "text": str}}]; pictures take their grids in
    order. labels are -100 except on answers and their <|im_end|>, without those that have "learn":
    False. generate=True ends with the assistant's header, ready to generate.
    """
    special = tokenizer.special
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    grids = iter(grids)
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
    ids, labels = [], []

    def add(tokens, learn=False):
        ids.extend(tokens)
        labels.extend(tokens if learn else [-100] * len(tokens))

    for message in messages:
        answer = message["role"] == "assistant"
        learn = answer and message.get("learn", True)
        text = message["role"] + "\n"  # waits for what follows: BPE may merge across
        add([start])
        if answer:  # but not into an answer: generation starts behind the header
            add(tokenizer.encode(text))
            text = ""
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        for item in content:
            if item["type"] == "text":
                text += item["text"]
                continue
            # every token of a picture has its place, between a start and an end
            t, h, w = next(grids)
            pads = [special[f"<|{item['type']}_pad|>"]] * (t * h * w // merge_size**2)
            add(tokenizer.encode(text))
            add([special["<|vision_start|>"], *pads, special["<|vision_end|>"]])
            text = ""
        for i, part in enumerate(GROUNDING.split(text) if answer else [text]):
            add([special[part]] if i % 2 else tokenizer.encode(part), learn)
        add([end], learn)
        add(tokenizer.encode("\n"))
    if generate:  # the answer's header, for the model to go on
        add([start, *tokenizer.encode("assistant\n")])
    assert next(grids, None) is None, "more pictures than places for them in the messages"
    return ids, labels


def share_stem(tokenizer, conversations, grids, merge_size):
    """Conversations about the same pictures as one text: (ids, labels, lengths).

    All up to the last picture is there once, the stem; each goes on from it as a branch, and none
    sees another. lengths [stem, branch, branch, ...], or [L] of a conversation that is alone.
    """
    texts = [chat(tokenizer, messages, grids, merge_size, False) for messages in conversations]
    ids, labels = texts[0]
    if len(texts) == 1:  # no branch, so no mask
        return ids, labels, [len(ids)]
    picture_end = tokenizer.special["<|vision_end|>"]
    if picture_end in ids:
        stem = len(ids) - ids[::-1].index(picture_end)
    else:  # text alone shares the system's
        stem = ids.index(tokenizer.special["<|im_end|>"]) + 1
    ids, labels, lengths = ids[:stem], labels[:stem], [stem]
    for own_ids, own_labels in texts:  # the first one too: a stem and its branches
        ids = ids + own_ids[stem:]
        labels = labels + own_labels[stem:]
        lengths.append(len(own_ids) - stem)
    return ids, labels, lengths


def collate(rows, pad_id, side="left"):
    """[(input_ids, labels)] to input_ids, attention_mask and labels (B, L), padded on one side.

    Left for generation; right for all else, where causal attention then needs no mask.
    """
    L = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.full((len(rows), L), pad_id),
        "attention_mask": torch.zeros(len(rows), L, dtype=torch.long),
        "labels": torch.full((len(rows), L), -100),
    }
    for b, (ids, labels) in enumerate(rows):
        start = L - len(ids) if side == "left" else 0
        place = slice(start, start + len(ids))
        batch["input_ids"][b, place] = torch.tensor(ids)
        batch["attention_mask"][b, place] = 1
        batch["labels"][b, place] = torch.tensor(labels)
    return batch


# ---- both


class Processor:
    """What turns pictures and words into a VLM's inputs: a Tokenizer and an ImageConfig."""

    def __init__(self, tokenizer, image=None):
        self.tokenizer = tokenizer
        self.image = image or ImageConfig()

    @classmethod
    def from_pretrained(cls, path_or_repo_id):
        """Of a model folder or on the hub. UserError on what is missing or broken."""
        folder = find_folder(path_or_repo_id)
        return cls(Tokenizer.from_pretrained(folder), ImageConfig.from_pretrained(folder))

    def save_pretrained(self, folder):
        """Write tokenizer.json, tokenizer_config.json and preprocessor_config.json."""
        self.tokenizer.save_pretrained(folder)
        self.image.save_pretrained(folder)

    def prompt(self, images, texts, side="right"):
        """Pictures and a text for each row, as user turns that wait for an answer: model inputs.

        images: a list a row, of pictures and of videos (lists of frames). Padded on one side.
        """
        media = []
        for item in chain.from_iterable(images):
            media.append(("video" if isinstance(item, list) else "image", item))
        inputs, grids = process_media(media, self.image)
        rows = []
        start = 0
        for row, text in zip(images, texts, strict=True):
            own = slice(start, start + len(row))
            content = [{"type": kind} for kind, _ in media[own]]
            content.append({"type": "text", "text": text})
            message = {"role": "user", "content": content}
            rows.append(chat(self.tokenizer, [message], grids[own], self.image.merge_size))
            start += len(row)
        padded = collate(rows, self.tokenizer.special["<|endoftext|>"], side)
        padded.pop("labels")  # there is nothing to learn in a question
        return {**padded, **inputs}

    def pack(self, rows):
        """Rows end to end: input_ids and labels (1, L), vision inputs, and `segments`.

        A row has `media` [("image" | "video", what)] and `conversations`, each about all of them.
        segments: [stem, branch, ...] or [L] of each row, as `VLM.forward` takes them.
        """
        media = chain.from_iterable(row.media for row in rows)
        batch, grids = process_media(list(media), self.image)
        grids = iter(grids)  # row after row
        ids, labels, segments = [], [], []
        for row in rows:
            own = [next(grids) for _ in row.media]
            text = share_stem(self.tokenizer, row.conversations, own, self.image.merge_size)
            ids += text[0]
            labels += text[1]
            segments.append(text[2])
        tensors = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        return {**batch, **tensors, "segments": segments}
