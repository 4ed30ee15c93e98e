"""Pixels and words to tensors: image processor, tokenizer and chat template of both Qwens.

    images, videos ─► process_media ─► vision inputs and their grids (t, h, w) ─┐
    messages ─► chat (a placeholder for every image token) ◄────────────────────┘
                 └─► collate ─► a padded batch (prompt), or packed rows (pack) ─► vlm.py

User text stays text: special tokens typed by a user have no effect. tests/test_processor.py
compares with transformers' image processor and `apply_chat_template`. Qwen3-VL's template has no
default system message, and writes a video as its frames, each after its time.

Letters as in vlm.py: B batch, L tokens, P patches of all images, p side of a patch (pixels),
m patches along each side of a token, t h w an image's grid in frames and patches.
"""

import dataclasses
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from torch.nn.utils.rnn import pad_sequence

from checkpoint import VISION_DEFAULTS, known
from cli import UserError
from data.media import FRAMES_A_SECOND, to_rgb
from files import atomic, find_folder, read_json, read_text, reading, write_json

# ---- pixels and patches


@dataclass
class ImageConfig:
    """How images become patches. Names are those of the hub's preprocessor_config.json."""

    patch_size: int = 16  # p, pixels
    merge_size: int = 2  # m
    temporal_patch_size: int = 2  # frames in a patch; a still image is shown twice
    min_pixels: int = 128 * 128  # smaller images are enlarged, larger ones shrunk
    max_pixels: int = 128 * 128
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, for red, green, blue in 0..1
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        self.image_mean = tuple(self.image_mean)
        self.image_std = tuple(self.image_std)
        assert 0 < self.min_pixels <= self.max_pixels, "min_pixels is larger than max_pixels"

    @classmethod
    def from_pretrained(cls, folder):
        """The settings in a model folder, read as transformers reads them.

        transformers 4 writes min_pixels and max_pixels to preprocessor_config.json; 5 writes
        size {shortest_edge, longest_edge} there, or under "image_processor" in
        processor_config.json. Anything left out comes from config.json or has the class default.
        """
        # processor_config.json takes precedence over the older file, as in transformers
        path = Path(folder) / "processor_config.json"
        content = read_json(path).get("image_processor") if path.exists() else None
        if content is None:
            path = Path(folder) / "preprocessor_config.json"
            content = read_json(path) if path.exists() else {}
        model = read_json(Path(folder) / "config.json")
        with reading(path):
            # the patch sizes that the ViT expects
            kind = "qwen3_vl" if model.get("model_type") == "qwen3_vl" else "qwen2_5_vl"
            vision = VISION_DEFAULTS[kind] | (model.get("vision_config") or {})
            sizes = {
                "patch_size": vision["patch_size"],
                "merge_size": vision["spatial_merge_size"],
                "temporal_patch_size": vision["temporal_patch_size"],
            }
            size = content.get("size") or {}
            # files older than both versions do not mention pixels
            limits = {
                "min_pixels": size.get("shortest_edge", 56 * 56),  # otherwise the class default
                "max_pixels": size.get("longest_edge", 28 * 28 * 1280),
            }
            # later sources override earlier ones
            fields = {**sizes, **limits}
            for source in (size, content):
                named = {name: source.get(name) for name in cls.__dataclass_fields__}
                fields |= known(named)
            fits = sizes.items() <= fields.items()
            assert fits, "patch_size or merge_size differs from config.json's"
            return cls(**fields)

    def save_pretrained(self, folder, qwen3=False):
        """Write preprocessor_config.json, readable by all versions."""
        kind = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen3VLProcessor" if qwen3 else "Qwen2_5_VLProcessor",
        }
        edges = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        content = {**kind, **dataclasses.asdict(self), "size": edges}
        write_json(Path(folder) / "preprocessor_config.json", content)


def smart_resize(height, width, config):
    """Qwen2-VL's target size (height, width): multiples of p m, area within the limits.

    UserError on images that are too thin.
    """
    factor = config.patch_size * config.merge_size
    low, high = sorted((height, width))
    if low < 2 or high > 200 * low:
        needed = "sides of at least 2 pixels, one at most 200 times the other"
        raise UserError(f"a picture of {width}x{height} pixels is too thin: {needed}")
    sides = np.array([height, width])
    tokens = np.round(sides / factor)  # the nearest multiple, separately for each side
    pixels = tokens.prod() * factor**2
    # scale both sides by one factor, and round so that the area stays within the limit
    if pixels > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        tokens = np.floor(sides / shrink / factor).clip(1)
    elif pixels < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        tokens = np.ceil(sides * grow / factor)
    rows, columns = tokens * factor
    return int(rows), int(columns)


def resize(image, config):
    """Whatever `to_rgb` accepts to uint8 (height, width, 3) of the size from `smart_resize`."""
    pixels = np.asarray(to_rgb(image))
    rows, columns = smart_resize(*pixels.shape[:2], config)
    picture = Image.fromarray(pixels)
    picture = picture.resize((columns, rows), Image.Resampling.BICUBIC)  # PIL: width first
    return np.asarray(picture)


def process_images(images, config):
    """Images to pixel_values (P, 3*2*p*p) float32 and image_grid_thw (n, 3).

    PIL images or uint8 (height, width, 3) arrays, of any size, as in Hugging Face's processor.
    """
    # a still image fills every frame of its patches, like a video's odd last frame
    return process_videos([[image] for image in images], config)


def process_videos(videos, config):
    """Videos, lists of frames, to pixel_values_videos (P, 3*2*p*p) and video_grid_thw (n, 3).

    Two frames share a patch; an odd one at the end is shown twice. Hugging Face's processor also
    samples frames and limits the pixels of a whole video; here the caller samples (Qwen was trained
    on two per second), and every frame has the limits of an image. UserError if frames differ in
    size.
    """
    p = config.patch_size
    m = config.merge_size
    frames = config.temporal_patch_size
    mean = np.float32(config.image_mean)[:, None]
    std = np.float32(config.image_std)[:, None]
    values = []
    grids = []
    for video in videos:
        # resize first: until here every frame may have its own size
        resized = [resize(frame, config) for frame in video]
        if len(set(map(np.shape, resized))) > 1:
            raise UserError("the frames of a video must all have the same size")
        odd = -len(video) % frames  # frames missing in the last patches
        pixels = np.stack([*resized, *resized[-1:] * odd])  # (frames, height, width, 3)
        # m x m neighbors are consecutive, as the merger expects
        order = "(t f) (h a p) (w b q) c -> (t h w a b) c (f p q)"
        patches = rearrange(pixels, order, f=frames, a=m, b=m, p=p, q=p)
        patches = patches / np.float32(255)
        patches -= mean  # in place: a step has many images
        patches /= std
        values.append(patches.reshape(len(patches), -1))  # (patches, 3*2*p*p)
        grids.append([len(pixels) // frames, pixels.shape[1] // p, pixels.shape[2] // p])
    return torch.from_numpy(np.concatenate(values)), torch.tensor(grids)


# the names of Qwen2.5-VL's inputs, in transformers and in vlm.py
VISION_INPUTS = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


def process_media(media, config):
    """[("image" | "video", what)] to vision inputs and the grids (t, h, w), in this order.

    After a video's three numbers come the seconds of its grid frames.
    """
    parts = defaultdict(list)
    order = []
    for kind, what in media:
        # one by one: each kind has its own tensors, but the grids keep the order of the text
        tensors = process_videos([what if kind == "video" else [what]], config)
        for name, tensor in zip(VISION_INPUTS[kind], tensors):
            parts[name].append(tensor)
        grid = tensors[1][0].tolist()
        if kind == "video":
            grid += frame_seconds(len(what), config.temporal_patch_size)
        order.append(grid)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}, order


def frame_seconds(count, together):
    """The middle (s) of each group of `together` frames of a video with two frames per second."""
    seconds = []
    for first in range(0, count, together):
        last = min(first + together, count) - 1  # an odd last frame is shown twice, at its own time
        seconds.append((first + last) / 2 / FRAMES_A_SECOND)
    return seconds


# ---- words

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"  # each digit separately
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",  # padding
    "<|im_start|>",  # start of a message
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",  # start of an image or video
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",  # placeholder for one image token
    "<|video_pad|>",
)
# markers of places: special tokens in answers, plain text anywhere else
GROUNDING = re.compile(r"(<\|(?:object_ref|box|quad)_(?:start|end)\|>)")
SYSTEM_PROMPT = "You are a helpful assistant."
# `chat` below as Jinja, for tools that read a checkpoint's tokenizer_config.json
QWEN3_TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}
{%- else %}{%- for item in message['content'] %}
{%- if item['type'] in ('image', 'video') %}<|vision_start|><|{{ item['type'] }}_pad|><|vision_end|>{% else %}{{ item['text'] }}{% endif %}
{%- endfor %}{%- endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHAT_TEMPLATE = (
    """{%- if messages[0]['role'] != 'system' %}<|im_start|>system
"""
    + SYSTEM_PROMPT
    + """<|im_end|>
{% endif %}
"""
    + QWEN3_TEMPLATE
)


class Tokenizer:
    """Byte-level BPE from a tokenizer.json.

    User text stays text: "<|im_end|>" typed by a user is encoded as characters, not as the token.
    qwen3: `chat` follows Qwen3-VL's template.
    """

    def __init__(self, fast, qwen3=False):
        self.fast = fast
        self.qwen3 = qwen3
        self.fast.encode_special_tokens = True  # the library's name for "as plain text"
        self.special = {token: fast.token_to_id(token) for token in SPECIAL_TOKENS}
        # without them, a model would be trained that never stops
        assert None not in self.special.values(), "the tokenizer lacks Qwen's special tokens"
        self.encode = lru_cache(maxsize=1 << 16)(self.encode)  # training data repeats its phrases

    def __len__(self):
        return self.fast.get_vocab_size()

    def encode(self, text):
        """Token ids of a text, as a tuple; an unpaired surrogate becomes a question mark."""
        return tuple(self.fast.encode(printable(text), add_special_tokens=False).ids)

    def decode(self, ids):
        """The text of token ids, without special tokens."""
        return self.fast.decode(list(ids), skip_special_tokens=True)

    @classmethod
    def from_pretrained(cls, path_or_repo_id):
        path = find_folder(path_or_repo_id) / "tokenizer.json"
        model = path.with_name("config.json")  # missing next to a tokenizer alone
        kind = read_json(model).get("model_type") if model.exists() else None
        with reading(path):
            return cls(FastTokenizer.from_str(read_text(path)), kind == "qwen3_vl")

    def save_pretrained(self, folder):
        """Write tokenizer.json, and tokenizer_config.json for transformers and vLLM."""
        with atomic(Path(folder) / "tokenizer.json") as path:
            path.write_text(self.fast.to_str(pretty=True), encoding="utf-8")
        about = {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": QWEN3_TEMPLATE if self.qwen3 else CHAT_TEMPLATE,
        }
        write_json(Path(folder) / "tokenizer_config.json", about)


def printable(text):
    return text.encode(errors="replace").decode()


def train_tokenizer(texts, vocab_size=1024):
    """Train a Tokenizer with Qwen's rules on an iterable of strings.

    It has vocab_size byte-level pieces, followed by Qwen's special tokens.
    """
    fast = FastTokenizer(models.BPE())
    # NFC, words and digits split, bytes: as in Qwen's tokenizer.json
    fast.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # so no text is unknown
        show_progress=False,
    )
    fast.train_from_iterator(map(printable, texts), trainer)
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    fast.add_special_tokens(special)
    return Tokenizer(fast)


def chat(tokenizer, messages, grids=(), merge_size=2, generate=True):
    """The chat template of the tokenizer's model: input_ids and labels, two lists of L.

    messages [{"role": "system" | "user" | "assistant", "content": str or a list of {"type":
    "image"}, {"type": "video"} and {"type": "text", "text": str}}]; images use up the grids in
    order, as `process_media` returns them. labels are -100 except on answers and their <|im_end|>,
    without answers that have "learn": False. generate=True ends with the assistant's header, ready
    to generate.
    """
    special = tokenizer.special
    start = [special["<|im_start|>"]]
    grids = iter(grids)
    if not tokenizer.qwen3 and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
    ids = []
    labels = []

    def add(piece, learn=False):
        """Append a text, or the ids of special tokens."""
        tokens = tokenizer.encode(piece) if isinstance(piece, str) else piece
        ids.extend(tokens)
        labels.extend(tokens if learn else [-100] * len(tokens))

    for message in messages:
        answer = message["role"] == "assistant"
        learn = answer and message.get("learn", True)
        text = message["role"] + "\n"  # not encoded yet: BPE may merge it with what follows
        add(start)
        if answer:  # but not with an answer: generation starts right after the header
            add(text)
            text = ""
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        for item in content:
            if item["type"] == "text":
                text += item["text"]
                continue
            t, h, w, *seconds = next(grids)
            pad = special[f"<|{item['type']}_pad|>"]
            frames = [("", t)]  # all frames together
            if tokenizer.qwen3 and item["type"] == "video":
                # a grid without seconds would get no placeholders
                assert len(seconds) == t, "a video's grid needs the seconds of its frames"
                frames = [(f"<{second:.1f} seconds>", 1) for second in seconds]
            # one placeholder for every image token, between a start and an end token
            for time, count in frames:
                pads = [pad] * (count * h * w // merge_size**2)
                add(text + time)
                add([special["<|vision_start|>"], *pads, special["<|vision_end|>"]])
                text = ""
        for i, part in enumerate(GROUNDING.split(text) if answer else [text]):
            add([special[part]] if i % 2 else part, learn)
        add([special["<|im_end|>"]], learn)
        add("\n")
    if generate:  # the header of the answer that the model generates
        add(start)
        add("assistant\n")
    return ids, labels


def collate(rows, pad_id, side="left"):
    """Rows of ids to input_ids and attention_mask (B, L), padded on one side.

    Left for generation; right otherwise, where causal attention then needs no mask.
    """
    # the mask is padded like the ids, so both end at the same positions
    rows = [torch.tensor(row) for row in rows]
    real = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, True, pad_id, side),
        "attention_mask": pad_sequence(real, True, 0, side),
    }


# ---- both


class Processor:
    """Turns images and words into a VLM's inputs: a Tokenizer and an ImageConfig."""

    def __init__(self, tokenizer, image=None):
        self.tokenizer = tokenizer
        self.image = image or ImageConfig()

    @classmethod
    def from_pretrained(cls, path_or_repo_id):
        """From a model folder or the hub. UserError if anything is missing or broken."""
        folder = find_folder(path_or_repo_id)
        return cls(Tokenizer.from_pretrained(folder), ImageConfig.from_pretrained(folder))

    def save_pretrained(self, folder):
        """Write tokenizer.json, tokenizer_config.json and preprocessor_config.json."""
        self.tokenizer.save_pretrained(folder)
        self.image.save_pretrained(folder, self.tokenizer.qwen3)

    def prompt(self, images, texts, side="right", text_first=False):
        """Images and a text per row, as user turns that await an answer, to model inputs.

        images: for each row a list of images and of videos (lists of frames). Padded on one side.
        text_first: the text comes before the images, so that the hidden states of the images depend
        on it.
        """
        kinds = []
        for row in images:  # a list is a video
            kinds.append([("video" if isinstance(item, list) else "image") for item in row])
        media = zip(chain(*kinds), chain(*images))
        inputs, grids = process_media(media, self.image)
        grids = iter(grids)  # row by row
        rows = []
        for row, text in zip(kinds, texts, strict=True):
            content = [{"type": kind} for kind in row]
            content.insert(0 if text_first else len(row), {"type": "text", "text": text})
            messages = [{"role": "user", "content": content}]
            rows.append(chat(self.tokenizer, messages, grids, self.image.merge_size)[0])
        padded = collate(rows, self.tokenizer.special["<|endoftext|>"], side)
        return {**padded, **inputs}

    def stem(self, texts):
        """How many tokens a row's texts [(ids, labels)] share: up to the last image, if any."""
        special = self.tokenizer.special
        first = texts[0][0]
        ends = [i for i, token in enumerate(first) if token == special["<|vision_end|>"]]
        if ends:
            return ends[-1] + 1
        # text only: the system message, or without one the words that all begin with
        shared = len(commonprefix([text for text, _ in texts]))
        return min(shared, first.index(special["<|im_end|>"]) + 1)

    def pack(self, rows):
        """Concatenated rows: input_ids and labels (1, L), vision inputs, and `segments`.

        A row has `media` [("image" | "video", what)] and `conversations`, each about all of the
        media. What its conversations share at the beginning, up to the last image, is included
        once, as the stem; each conversation continues from it as a branch, and no branch sees
        another. Conversations that differ before an image share no stem, only the images, which
        the ViT then sees once: image_index says which image each place shows. segments: [stem,
        branch, ...] of each row, or of each such conversation, as `VLM.forward` takes them.
        """
        media = chain.from_iterable(row.media for row in rows)
        batch, grids = process_media(media, self.image)
        grids = iter(grids)  # row by row
        ids = []
        labels = []
        segments = []
        image_index = []
        images = 0  # of the rows so far
        for row in rows:
            own = [next(grids) for _ in row.media]
            kinds = [kind for kind, _ in row.media]
            shown = list(range(images, images + kinds.count("image")))
            images += len(shown)
            # write each as if it were alone, then cut it after the stem
            about = (own, self.image.merge_size, False)
            texts = [chat(self.tokenizer, messages, *about) for messages in row.conversations]
            stem = self.stem(texts)
            if any(text[:stem] != texts[0][0][:stem] for text, _ in texts):
                assert "video" not in kinds, "words before a video: one conversation a row"
                groups = [[text] for text in texts]
            else:
                groups = [texts]
            for group in groups:
                image_index += shown
                first, first_labels = group[0]
                stem = self.stem(group)
                ids += first[:stem]
                labels += first_labels[:stem]
                lengths = [stem]
                # the first one too: a stem and all its branches
                for text, learned in group:
                    ids += text[stem:]
                    labels += learned[stem:]
                    lengths.append(len(text) - stem)
                segments.append(lengths)
        tensors = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        if len(image_index) > images:
            tensors["image_index"] = torch.tensor(image_index)
        return {**batch, **tensors, "segments": segments}
