"""Text to token ids and back: Qwen's byte-level BPE, read from tokenizer.json or learned from a corpus, and its chat template in plain Python.

    messages ─► chat ─► input_ids and labels of a conversation, a place for every token of its pictures ─► collate ─► a padded batch for vlm.py

Text is only ever text: special tokens that a user types are not obeyed. tests/test_vlm.py compares with transformers' `apply_chat_template`.
"""
import math
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer as FastTokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cli import UserError
from files import atomic, find_folder, write_json

QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")   # digits one by one
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
                  "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
SYSTEM_PROMPT = "You are a helpful assistant."
# `chat` below in Jinja, for the tools that read a checkpoint's tokenizer_config.json
CHAT_TEMPLATE = """{%- if messages[0]['role'] != 'system' %}<|im_start|>system
""" + SYSTEM_PROMPT + """<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}
{%- else %}{%- for item in message['content'] %}
{%- if item['type'] in ('image', 'video') %}<|vision_start|><|{{ item['type'] }}_pad|><|vision_end|>{% else %}{{ item['text'] }}{% endif %}
{%- endfor %}{%- endif %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Tokenizer:
    """Byte-level BPE from a tokenizer.json. Text is only ever text: "<|im_end|>" typed by a user becomes its characters, not the token."""

    def __init__(self, fast):
        self.fast = fast
        self.fast.encode_special_tokens = True                                   # the library's name for "as plain text"
        self.special = {token: fast.token_to_id(token) for token in SPECIAL_TOKENS}
        self.encode = lru_cache(maxsize=1 << 16)(self.encode)                    # training repeats its phrases
        absent = [token for token, i in self.special.items() if i is None]
        if absent:
            raise UserError(f"the tokenizer lacks Qwen's special tokens, first {absent[0]}")

    def __len__(self):
        return self.fast.get_vocab_size()

    def encode(self, text):
        return tuple(self.fast.encode(text, add_special_tokens=False).ids)

    def decode(self, ids):
        """Text of token ids, special tokens left out."""
        return self.fast.decode(list(ids), skip_special_tokens=True)

    @classmethod
    def from_pretrained(cls, path_or_repo_id):
        path = find_folder(path_or_repo_id) / "tokenizer.json"
        try:
            return cls(FastTokenizer.from_str(path.read_text(encoding="utf-8")))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:                                               # the library raises bare Exception
            raise UserError(f"cannot read the tokenizer {path}: {getattr(error, 'strerror', None) or error}") from None

    def save_pretrained(self, folder):
        """Write tokenizer.json, and tokenizer_config.json for transformers and vLLM, each whole or not at all."""
        with atomic(Path(folder) / "tokenizer.json") as path:
            path.write_text(self.fast.to_str(pretty=True), encoding="utf-8")
        write_json(Path(folder) / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                                                            "chat_template": CHAT_TEMPLATE})


def train_tokenizer(texts, vocab_size=1024):
    """A Tokenizer with Qwen's rules, learned from an iterable of strings: vocab_size byte-level pieces, Qwen's special tokens behind them."""
    fast = FastTokenizer(models.BPE())
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())                       # all 256 bytes: nothing is ever unknown
    fast.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False))
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return Tokenizer(fast)


def chat(tokenizer, messages, image_grid_thw=(), merge_size=2, answer=True):
    """Qwen2.5-VL's chat template: input_ids and labels, two lists of L; labels are -100 except on assistant answers and their <|im_end|>.

    messages [{"role": "system" | "user" | "assistant", "content": str or [{"type": "image"} | {"type": "video"} | {"type": "text", "text": str}]}];
    images take their grids in order. answer=True ends with the assistant's header, ready to generate.
    """
    start, end, grids = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"], iter(image_grid_thw)
    if not messages or messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
    ids, labels = [], []

    def add(tokens, learn=False):
        ids.extend(tokens)
        labels.extend(tokens if learn else [-100] * len(tokens))

    for message in messages:
        content, learn = message["content"], message["role"] == "assistant"
        text = message["role"] + "\n"                                            # waits for what follows: BPE may merge across
        add([start])
        if learn:                                                                # but not into an answer: generation starts after the header
            add(tokenizer.encode(text))
            text = ""
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item["type"] == "text":
                text += item["text"]
                continue
            t, h, w = map(int, next(grids))
            add(tokenizer.encode(text))
            pads = [tokenizer.special[f"<|{item['type']}_pad|>"]] * (t * h * w // merge_size ** 2)
            add([tokenizer.special["<|vision_start|>"], *pads, tokenizer.special["<|vision_end|>"]])
            text = ""
        add(tokenizer.encode(text), learn)
        add([end], learn)
        add(tokenizer.encode("\n"))
    if answer:
        add([start, *tokenizer.encode("assistant\n")])
    assert next(grids, None) is None, "more images than places for them in the messages"
    return ids, labels


def collate(rows, pad_id, side="left"):
    """Lists of (input_ids, labels) to input_ids, attention_mask and labels (B, L): left for generation, right for all else (no mask needed there)."""
    length = max(len(ids) for ids, _ in rows)
    batch = {"input_ids": np.full((len(rows), length), pad_id), "attention_mask": np.zeros((len(rows), length), np.int64),
             "labels": np.full((len(rows), length), -100)}
    for b, (ids, labels) in enumerate(rows):
        place = slice(length - len(ids), length) if side == "left" else slice(len(ids))
        batch["input_ids"][b, place], batch["attention_mask"][b, place], batch["labels"][b, place] = ids, 1, labels
    return {name: torch.from_numpy(array) for name, array in batch.items()}


# ---- pixels and patches

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
def smart_resize(height, width, config):
    """Qwen2-VL's target size: sides that are multiples of p m, area within [min_pixels, max_pixels], aspect kept. UserError on slivers."""
    factor = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    if min(height, width) < 2 or max(height, width) / min(height, width) > 200:
        raise UserError(f"a picture of {width}x{height} pixels is too thin: sides of at least 2 pixels, one at most 200 times the other")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > config.max_pixels:
        shrink = math.sqrt(height * width / config.max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < config.min_pixels:
        grow = math.sqrt(config.min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def resize(image, config):
    if not isinstance(image, Image.Image) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
        raise UserError(f"a picture must be PIL or uint8 (height, width, 3), not {image.dtype} {image.shape}")
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)
    rows, columns = smart_resize(height, width, config)
    if (rows, columns) == (height, width):
        return np.asarray(image if isinstance(image, np.ndarray) else image.convert("RGB"))
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image.convert("RGB")
    return np.asarray(picture.resize((columns, rows), Image.Resampling.BICUBIC))


def process_images(images, config):
    """PIL images or uint8 (height, width, 3) arrays to pixel_values (P, 3*2*p*p) float32 and image_grid_thw (n, 3), as Hugging Face's processor."""
    vision = config.vision_config
    p, m, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    grids, values = [], []
    for _, group in groupby((resize(image, config) for image in images), key=lambda pixels: pixels.shape):
        group = np.stack(list(group))                                            # (n, height, width, 3): training has one size, so one pass
        patches = rearrange(group, "n (h a p) (w b q) c -> (n h w a b) c p q", a=m, b=m, p=p, q=p).astype(np.float32)
        patches = (patches / np.float32(255) - CLIP_MEAN[:, None, None]) / CLIP_STD[:, None, None]
        values.append(np.broadcast_to(patches[:, :, None], (*patches.shape[:2], frames, p, p)).reshape(len(patches), -1))
        grids += [[1, group.shape[1] // p, group.shape[2] // p]] * len(group)
    return torch.from_numpy(np.concatenate(values)), torch.tensor(grids)


def process_videos(videos, config):
    """Videos, each a list of frames as `process_images` takes them, to pixel_values_videos (P, 3*2*p*p) and video_grid_thw (n, 3).

    Two frames share a patch; an odd one at the end is shown twice. Hugging Face's processor also picks frames and limits the pixels of a whole video:
    here the caller picks (two a second is what Qwen saw), and every frame has an image's limits.
    """
    frames, grids, values = config.vision_config.temporal_patch_size, [], []
    for video in videos:
        video = [*video, *[video[-1]] * (-len(video) % frames)]
        pixels, grid = process_images(video, config)
        if len({tuple(row) for row in grid.tolist()}) > 1:
            raise UserError("the frames of a video must have one size")
        grids.append([len(video) // frames, *grid[0, 1:].tolist()])
        still = rearrange(pixels, "(t f n) (c g q) -> t f n c g q", f=frames, t=len(video) // frames, c=3, g=frames)[..., 0, :]
        values.append(rearrange(still, "t f n c q -> (t n) (c f q)"))
    return torch.cat(values), torch.tensor(grids)


def process_media(media, config):
    """Pictures and videos [("image" | "video", what)] to the vision inputs of a forward pass, and the grids (t, h, w) of each, in the order of `media`."""
    inputs, grids = {}, {}
    for kind, suffix, process in (("image", "", process_images), ("video", "_videos", process_videos)):
        some = [what for which, what in media if which == kind]
        if some:
            inputs[f"pixel_values{suffix}"], inputs[f"{kind}_grid_thw"] = process(some, config)
            grids[kind] = iter(inputs[f"{kind}_grid_thw"].tolist())
    return inputs, [next(grids[kind]) for kind, _ in media]


