"""Qwen2.5-VL from scratch: pixels and token ids in, new tokens or the hidden states of block k out. The digital half of BLM.

    picture ─► patches ─► ViT (windows, a few global blocks) ─► merger (2x2 patches = 1 token) ─┐
    text ─► tokenizer.py ─► token ids ──► embedding ──────────── <|image_pad|> replaced by ◄─────┘
                                            └─► LLM blocks 1..k ─► H_k (B, L, D): what the policy reads
                                                └─► blocks k+1..n ─► norm ─► logits: what a user reads

Weights and configuration carry the names of the hub checkpoints (Qwen/Qwen2.5-VL-3B-Instruct and its sisters), which load unchanged; `nano` is
the same architecture at 5 M parameters. Sources: Qwen2.5-VL report (arXiv 2502.13923), M-RoPE of Qwen2-VL (arXiv 2409.12191), and the behaviour of
Hugging Face transformers, which tests/test_vlm.py compares with.

Letters: B batch, L tokens of a sequence, S keys (past and new), D width, H heads, G key/value heads, d width of a head, V vocabulary,
P patches of all images, p patch side (pixels), m patches a token merges along a side, t h w an image's grid in frames and patches.
Order of patches: `pixel_values` has them as Hugging Face does, m x m neighbours after one another, so that the merger is a reshape.
"Vision inputs" are any of pixel_values (P, 3*2*p*p), image_grid_thw (n, 3), pixel_values_videos, video_grid_thw and second_per_grid_ts (n,).
"""
import dataclasses
import math
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, chain, groupby, takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from cli import UserError
from files import atomic, find_folder, read_json, write_json
from processor import CLIP_MEAN, CLIP_STD

# ---- configuration


@dataclass
class VisionConfig:
    """The ViT. Field names and meanings are Hugging Face's."""
    depth: int = 4
    hidden_size: int = 192
    intermediate_size: int = 384
    num_heads: int = 6
    out_hidden_size: int = 192           # the LLM's width
    patch_size: int = 16                 # pixels
    spatial_merge_size: int = 2          # m
    temporal_patch_size: int = 2         # frames in a patch; a still picture is shown twice
    window_size: int = 64                # pixels: blocks not listed below attend inside squares of this side
    fullatt_block_indexes: tuple = (1, 3)
    tokens_per_second: int = 2           # temporal positions a second of video

    def __post_init__(self):
        self.fullatt_block_indexes = tuple(self.fullatt_block_indexes)
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(f"vision hidden_size {self.hidden_size} must be a multiple of 4 x num_heads {self.num_heads}")   # rotary pairs


@dataclass
class VLMConfig:
    """The LLM, the special tokens and the ViT. Defaults are `nano`; token ids belong to the tokenizer (`for_tokenizer`)."""
    vocab_size: int = 1038
    hidden_size: int = 192
    intermediate_size: int = 384
    num_hidden_layers: int = 7
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    mrope_section: tuple = (4, 6, 6)     # rotary pairs of a head for time, row, column
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 4096
    bos_token_id: int = 1024             # <|endoftext|>: also the padding
    eos_token_id: int = 1026             # <|im_end|>
    vision_start_token_id: int = 1033
    vision_end_token_id: int = 1034
    image_token_id: int = 1036
    video_token_id: int = 1037
    min_pixels: int = 128 * 128          # smaller pictures are enlarged, larger ones shrunk
    max_pixels: int = 128 * 128
    vision_config: VisionConfig = field(default_factory=VisionConfig)

    def __post_init__(self):
        self.mrope_section = tuple(self.mrope_section)
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}, "
                            f"and that of num_key_value_heads {self.num_key_value_heads}")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise UserError(f"mrope_section {list(self.mrope_section)} must sum to half the head's width {self.head_dim}")
        if self.vision_config.out_hidden_size != self.hidden_size:
            raise UserError(f"the ViT's out_hidden_size {self.vision_config.out_hidden_size} must equal the LLM's hidden_size {self.hidden_size}")

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    def for_tokenizer(self, tokenizer):
        """A copy with this Tokenizer's vocabulary and special tokens."""
        ids = {name: tokenizer.special[token] for name, token in SPECIAL_FIELDS.items()}
        return dataclasses.replace(self, vocab_size=len(tokenizer), **ids)

    @classmethod
    def from_dict(cls, found):
        """From a parsed config.json, flat as on the hub or nested as transformers 5 writes it. UserError on what this file does not do."""
        text = {**found, **found.get("text_config", {})}
        text["tie_word_embeddings"] = found.get("tie_word_embeddings", False) or found.get("text_config", {}).get("tie_word_embeddings", False)
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        text = {**text, "mrope_section": rope.get("mrope_section"), "rope_theta": rope.get("rope_theta", text.get("rope_theta"))}
        if found.get("model_type") != "qwen2_5_vl":
            raise UserError(f"model_type is {found.get('model_type')!r}, not 'qwen2_5_vl'")
        if rope.get("rope_type", rope.get("type", "default")) not in ("default", "mrope") or text.get("use_sliding_window"):
            raise UserError("rope scaling and sliding windows are not supported: take a checkpoint without them")
        made = {}
        for which, source in ((VisionConfig, found.get("vision_config", {})), (cls, text)):
            known = {f.name: source[f.name] for f in dataclasses.fields(which) if source.get(f.name) is not None and f.name != "vision_config"}
            known = {**QWEN_PIXELS, **known, **made} if which is cls else known
            missing = {f.name for f in dataclasses.fields(which)} - known.keys()
            if missing:
                raise UserError(f"{'vision_config' if which is VisionConfig else 'the text side'} lacks {', '.join(sorted(missing))}")
            made = {"vision_config": which(**known)} if which is VisionConfig else which(**known)
        return made

    def to_dict(self):
        """What goes into config.json: the hub's flat layout, which transformers reads too."""
        flat = dataclasses.asdict(self)
        flat["rope_scaling"] = {"type": "mrope", "mrope_section": list(flat.pop("mrope_section"))}
        vision = {**flat.pop("vision_config"), "model_type": "qwen2_5_vl", "in_chans": 3, "hidden_act": "silu"}
        kind = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "hidden_act": "silu"}
        return {**kind, **flat, "vision_config": vision}

    def processor_dict(self):
        """What goes into preprocessor_config.json: how the hub's processors make `pixel_values`."""
        vision = self.vision_config
        return {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor", "min_pixels": self.min_pixels,
                "max_pixels": self.max_pixels, "patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size,
                "merge_size": vision.spatial_merge_size, "image_mean": CLIP_MEAN.tolist(), "image_std": CLIP_STD.tolist()}


QWEN_PIXELS = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16384}     # the hub's preprocessor_config.json
SPECIAL_FIELDS = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>", "vision_start_token_id": "<|vision_start|>",
                  "vision_end_token_id": "<|vision_end|>", "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
PRESETS = {"nano": VLMConfig()}


# ---- blocks that both sides share

class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x, weight, eps):
    """x (..., D) over its root mean square, times weight (D,)."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    if torch.is_grad_enabled():
        return NormOnCPU.apply(x, weight, eps)
    return (x * inverse_rms(x, eps)).mul_(weight)


def inverse_rms(x, eps):
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(constant(eps), size, size, value=1 / x.shape[-1]).rsqrt_()


@lru_cache
def constant(number):
    with torch.inference_mode(False):                                            # kept for training too
        return torch.tensor(number)


class NormOnCPU(torch.autograd.Function):
    """RMSNorm's y = n w with n = x / rms(x). On a CPU torch strings eight operations together, and more for the gradient; this takes half the time."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = inverse_rms(x, eps)
        normal = x * inverse
        ctx.save_for_backward(weight, normal, inverse)
        return normal * weight

    @staticmethod
    def backward(ctx, grad):
        weight, normal, inverse = ctx.saved_tensors
        inner = grad * weight
        along = (inner * normal).mean(-1, keepdim=True)                          # what only changes the length of x is lost
        return inner.addcmul_(normal, along, value=-1).mul_(inverse), (grad * normal).flatten(0, -2).sum(0), None


def attend(q, k, v, mask=None, **how):
    """`scaled_dot_product_attention` of q (..., H, L, d) and k, v (..., G, S, d), to (..., H, L, d); on a CPU always in float32, whose
    gradient takes a quarter (100 tokens) to nine tenths (450) of bfloat16's time there."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, **how)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **how).to(q.dtype)


def compute(block, checkpointing, *inputs):
    """A block's output; with checkpointing nothing in between is kept, and the backward pass computes it again."""
    return checkpoint(block, *inputs, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else block(*inputs)


class MLP(nn.Module):
    def __init__(self, width, inner, bias):
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=bias)               # the hub's gate_proj and up_proj in one product: `FUSED`
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def rotate(x, cos, sin):
    y, (a, b) = torch.empty_like(x), x.chunk(2, dim=-1)
    left, right = y.chunk(2, dim=-1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return y


class Rotary(torch.autograd.Function):
    """`rotate` with its gradient, the rotation back: two passes over memory instead of the five that autograd would write down."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotary.apply(grad, cos, -sin), None, None


def apply_rotary(x, cos, sin):
    """Rotate pairs (i, i + d/2) of the last axis of x (..., d); cos and sin (..., d/2)."""
    return Rotary.apply(x, cos, sin) if torch.is_grad_enabled() else rotate(x, cos, sin)


# ---- ViT

@lru_cache(maxsize=256)
def frame_plan(h, w, m, window):
    """Where the patches of one h x w frame go for window attention.

    order (h w,): at each place of the windowed sequence, the patch's index in pixel_values; windows one after another, equal sizes adjacent.
    raster (h w,): the same places as row * w + column. sizes: patches of each window. `window` is a window's side in merged tokens.
    """
    row, column = np.divmod(np.arange(h // m * (w // m)), w // m)                # of merged tokens
    _, which, size = np.unique(row // window * w + column // window, return_inverse=True, return_counts=True)
    tokens = np.lexsort((which, size[which]))
    order = tokens[:, None] * m * m + np.arange(m * m)
    down, right = np.divmod(np.arange(m * m), m)
    raster = (row[tokens, None] * m + down) * w + column[tokens, None] * m + right
    return order.reshape(-1), raster.reshape(-1), (np.sort(size) * m * m).tolist()


def vision_plan(grids, vision):
    """For images [(t, h, w)]: order, raster (P,), row and column (2, P) in windowed order, and the runs (count, patches) of windows and frames."""
    m, window = vision.spatial_merge_size, vision.window_size // vision.spatial_merge_size // vision.patch_size
    frames = list(chain.from_iterable([(h, w)] * t for t, h, w in grids))
    plans = [frame_plan(h, w, m, window) for h, w in frames]
    starts = np.cumsum([0] + [h * w for h, w in frames[:-1]])
    order = np.concatenate([plan[0] + start for plan, start in zip(plans, starts)])
    raster = np.concatenate([plan[1] + start for plan, start in zip(plans, starts)])
    rows_columns = np.concatenate([np.stack(np.divmod(plan[1], w)) for plan, (_, w) in zip(plans, frames)], axis=1)
    windows, whole = chain.from_iterable(plan[2] for plan in plans), (h * w for h, w in frames)
    runs = [[(len(list(equal)), size) for size, equal in groupby(sizes)] for sizes in (windows, whole)]
    return torch.from_numpy(order), torch.from_numpy(raster), torch.from_numpy(rows_columns), *runs


class VisionAttention(nn.Module):
    """Attention inside each window (or frame). x (P, D) in windowed order; runs [(count, patches)]: equal groups go through SDPA as one batch."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, runs):
        qkv = rearrange(self.qkv(x), "P (three H d) -> P three H d", three=3, H=self.num_heads)
        q, k = apply_rotary(qkv[:, :2], cos, sin).unbind(1)
        parts = [[rearrange(part, "(n l) H d -> n H l d", l=size) for (_, size), part in zip(runs, tensor.split([n * size for n, size in runs]))]
                 for tensor in (q, k, qkv[:, 2])]
        y = [rearrange(attend(*group), "n H l d -> (n l) (H d)") for group in zip(*parts)]
        return self.proj(torch.cat(y) if len(y) > 1 else y[0])


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, 1e-6)
        self.attn = VisionAttention(config)
        self.norm2 = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x, cos, sin, runs):
        x = x + self.attn(self.norm1(x), cos, sin, runs)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A Conv3d whose stride is its kernel is a linear layer on flattened patches; the Conv3d only gives the weight its hub shape (D, 3, 2, p, p)."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, pixel_values):
        dtype = self.proj.weight.dtype
        return F.linear(pixel_values.to(dtype), self.proj.weight.flatten(1)).to(dtype)               # autocast: what blocks add to stays in float32


class PatchMerger(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_q = RMSNorm(config.hidden_size, 1e-6)
        self.width = config.hidden_size * config.spatial_merge_size ** 2
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size))

    def forward(self, x):
        return self.mlp(self.ln_q(x).view(-1, self.width))


class VisionTransformer(nn.Module):
    checkpointing = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixel_values, image_grid_thw):
        """pixel_values (P, 3*2*p*p), image_grid_thw (n, 3) to tokens (P / m², D of the LLM) and patch features (P, D), both in reading order."""
        config = self.config
        order, raster, rows_columns, windows, frames = vision_plan([tuple(grid) for grid in image_grid_thw.tolist()], config)
        order, raster, rows_columns = (index.to(pixel_values.device) for index in (order, raster, rows_columns))
        half = config.hidden_size // config.num_heads // 2                       # half of a head turns with the row, half with the column
        inverse = 10000.0 ** (-torch.arange(0, half, 2, device=pixel_values.device, dtype=torch.float32) / half)
        angles = (rows_columns[..., None] * inverse).permute(1, 0, 2).flatten(1)[:, None, None]       # (P, 1, 1, d/2): for [q, k] and heads
        x = self.patch_embed(pixel_values[order])
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, block in enumerate(self.blocks):
            x = compute(block, self.checkpointing, x, cos, sin, frames if i in config.fullatt_block_indexes else windows)
        m2 = config.spatial_merge_size ** 2
        back = torch.argsort(order[::m2] // m2)                                  # of merged tokens, from windows to reading order
        return self.merger(x)[back], x[torch.argsort(raster)]


# ---- LLM

def mrope_positions(input_ids, attention_mask, config, image_grid_thw=None, video_grid_thw=None, second_per_grid_ts=None):
    """M-RoPE positions (3, B, L): time, row, column. Text counts on all three alike; a picture's tokens all start at the next position and count along
    their own axis; the text behind goes on at the largest position + 1. Grid frames of a video are tokens_per_second x second_per_grid_ts apart.

    Grids are taken in reading order of the batch; padding (attention_mask 0) gets 0. ValueError if they do not fit the text. As transformers 4 and
    vLLM have it; transformers 5 goes on behind a video at start + max(h, w) / m, which for a long one is before its end.
    """
    ids = input_ids.cpu().numpy()
    real = np.ones_like(ids, bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
    images, videos = (iter([] if grid is None else grid.tolist()) for grid in (image_grid_thw, video_grid_thw))
    seconds = iter([] if second_per_grid_ts is None else np.asarray(second_per_grid_ts, np.float64).tolist())
    m, vision_ids = config.vision_config.spatial_merge_size, (config.image_token_id, config.video_token_id)
    positions = np.zeros((3, *ids.shape), np.int64)
    for b, row in enumerate(ids):
        row, parts, at, start = row[real[b]], [], 0, 0                           # at: token reached, start: its position
        seen = np.flatnonzero(np.isin(row, vision_ids))
        while len(seen):
            moving = row[seen[0]] == config.video_token_id
            text, (t, h, w) = seen[0] - at, next(videos if moving else images, (0, 0, 0))
            tokens = t * (h // m) * (w // m)
            if not t or len(seen) < tokens or row[seen[tokens - 1]] != row[seen[0]]:
                raise ValueError(f"row {b} has {len(seen)} places left for image or video tokens, the next picture has {tokens}")
            axes = np.indices((t, h // m, w // m)).reshape(3, -1)
            axes[0] = axes[0] * config.vision_config.tokens_per_second * (next(seconds, 1.0) if moving else 0)
            parts += [np.broadcast_to(np.arange(start, start + text), (3, text)), axes + start + text]
            at, start, seen = seen[0] + tokens, max(p.max() for p in parts if p.size) + 1, seen[tokens:]
        parts.append(np.broadcast_to(np.arange(start, start + len(row) - at), (3, len(row) - at)))
        positions[:, b, real[b]] = np.concatenate(parts, axis=1)
    return torch.from_numpy(positions).to(input_ids.device)


@lru_cache(maxsize=16)
def rotary_tables(head_dim, theta, sections, device):
    """Of each rotary pair of a head: its axis (d/2,), 0 time, 1 row, 2 column, and its frequency (d/2,)."""
    with torch.inference_mode(False):                                            # kept for training too
        pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
        return torch.repeat_interleave(torch.arange(3), torch.tensor(sections)).to(device), theta ** (-pairs / head_dim)


def attention_mask_for(real):
    """None where SDPA needs no mask but causal, as with padding on the right: no real token looks ahead. Else (B, 1, L, L), True where a query may look.
    real (B, L) or None."""
    if real is None or not (real[:, :-1] < real[:, 1:]).any():
        return None
    token = torch.arange(real.shape[1], device=real.device)
    mask = (token <= token[:, None])[None, None]
    return mask & real.bool()[:, None, None] | (token == token[:, None])         # a padded query sees itself: no empty rows, no NaN


def branch_mask(lengths, device):
    """A text of a stem and its branches, lengths [stem, branch, branch, ...]: (L, L) bool, True where a token may look, which is back to the stem and into
    its own branch. None where causal says it all."""
    if len(lengths) < 3:
        return None
    branch = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return torch.ones(len(branch), len(branch), dtype=torch.bool, device=device).tril() & ((branch == 0) | (branch == branch[:, None]))


class Cache:
    """Keys and values of the tokens so far: a buffer (B, 2 G, `size`, d) a layer, keys first; and where the next token of each row stands."""

    def __init__(self, size):
        self.size, self.length, self.layers, self.next_position = size, 0, [], None

    def begin(self, k, v):
        """Take a layer's keys and values (B, G, L, d) of the prompt; `length` is set by whoever runs all layers."""
        buffer = k.new_empty(k.shape[0], 2 * k.shape[1], self.size, k.shape[3])
        torch.cat((k, v), dim=1, out=buffer[:, :, :k.shape[2]])
        self.layers.append(buffer)


class Attention(nn.Module):
    """Grouped-query self-attention with M-RoPE. x (B, L, D), cos and sin (B, 1, L, d/2), mask (B or 1, 1, L, S) or None: see attention_mask_for.

    segments: [(length, mask)] of texts that share the row and do not see each other, or None; a mask (L, L) as in branch_mask.
    """

    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)      # the hub's q_proj, k_proj, v_proj: `FUSED`
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache, segments=None):
        qkv = self.qkv_proj(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)         # (B, H + 2 G, L, d)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q, k = apply_rotary(qk, cos, sin).split((self.heads, self.kv_heads), dim=1)          # q (B, H, L, d); k and v (B, G, L, d)
        if cache is not None:
            cache.begin(k, v)
        if segments is None:
            y = attend(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        else:                                                                                # no mask is as fast as none, and no padding is computed
            parts = zip(*(tensor.split([length for length, _ in segments], dim=2) for tensor in (q, k, v)))
            y = torch.cat([attend(*part, m, is_causal=m is None, enable_gqa=True) for part, (_, m) in zip(parts, segments)], dim=2)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x, *where):
        x = x + self.self_attn(self.input_layernorm(x), *where)
        return x + self.mlp(self.post_attention_layernorm(x))

    def weights(self):
        """All of them, in the order in which `VLM.step` uses them."""
        attention, mlp = self.self_attn, self.mlp
        return (self.input_layernorm.weight, attention.qkv_proj.weight, attention.qkv_proj.bias, attention.o_proj.weight,
                self.post_attention_layernorm.weight, mlp.gate_up_proj.weight, mlp.down_proj.weight)


class TextModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


# ---- the model

@dataclass
class VLMOutput:
    logits: torch.Tensor | None            # (B, L, V), or (n, V) for the n places of `logits_at`; None with num_layers
    hidden_states: list                    # (B, L, D) each: [k] behind block k of those that ran, [0] the embeddings; all before the final norm
    patch_features: torch.Tensor | None    # (P, D of the ViT) behind its last block, images in order, row by row
    last_hidden_state: torch.Tensor | None = None      # (B, L, D) or (n, D) behind the final norm: what the logits are read from


class VLM(nn.Module):
    checkpointing = False                                                        # training computes blocks again instead of keeping what is inside

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config.vision_config)
        self.model = TextModel(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(initialise)

    def rotary(self, positions):
        """cos and sin (B, 1, L, d/2) of positions (3, B, L): a head's rotary pairs are shared out among time, row and column."""
        axis, frequency = rotary_tables(self.config.head_dim, self.config.rope_theta, self.config.mrope_section, positions.device)
        angles = positions[axis].movedim(0, -1)[:, None] * frequency                                                        # (B, 1, L, d/2)
        dtype = self.model.norm.weight.dtype
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def step_rotary(self, positions):
        """[(cos (B, H + 2 G, 1, d/2), sin (B, H + 2 G, 2, d/2))] for `step` of text at positions (B, n): values are turned by an angle of zero."""
        turned, kept = self.config.num_attention_heads + self.config.num_key_value_heads, self.config.num_key_value_heads
        cos, sin = (torch.cat((part.expand(-1, turned, -1, -1), torch.full_like(part, still).expand(-1, kept, -1, -1)), dim=1)
                    for part, still in zip(self.rotary(positions.expand(3, -1, -1)), (1, 0)))            # (B, H + 2 G, n, d/2)
        return list(zip(cos[:, :, :, None].unbind(2), torch.stack((-sin, sin), dim=3).unbind(2)))

    def look(self, x, input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw):
        """Embeddings (B, L, D) with what the ViT makes of images and videos in their places, and its patch features (P, D of the ViT), images first."""
        pairs = [pair for pair in ((pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw)) if pair[0] is not None]
        tokens, features = self.visual(*(torch.cat(both) for both in zip(*pairs)))
        images = 0 if pixel_values is None else len(pixel_values) // self.config.vision_config.spatial_merge_size ** 2
        for token_id, some in ((self.config.image_token_id, tokens[:images]), (self.config.video_token_id, tokens[images:])):
            places = input_ids == token_id
            if int(places.sum()) != len(some):
                raise ValueError(f"the text has {int(places.sum())} places for tokens of images or videos, the pictures make {len(some)}")
            x = x.masked_scatter(places[..., None], some.to(x.dtype)) if len(some) else x
        return x, features

    def forward(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None, pixel_values_videos=None, video_grid_thw=None,
                second_per_grid_ts=None, num_layers=None, logits_at=None, cache=None, segments=None):
        """input_ids (B, L), attention_mask (B, L) 1 on real tokens, vision inputs, to a VLMOutput.

        num_layers=k runs the first k blocks only (no logits). logits_at (B, L) bool: logits of these places only. An empty cache is filled for `step`.
        segments: of each text packed into one row (B = 1) its length, [L]; or [stem, branch, branch, ...], each branch going on where the stem ends, as if
        it were alone. No text sees another, no branch another. ValueError if pictures do not fill the places that the text has for them.
        """
        texts = input_ids if segments is None else pad_sequence(input_ids[0].split([sum(lengths) for lengths in segments]), batch_first=True, padding_value=-1)
        real = attention_mask if segments is None else (texts >= 0).int()
        position_ids = mrope_positions(texts, real, self.config, image_grid_thw, video_grid_thw, second_per_grid_ts)
        if segments is not None:                                                 # a branch does not count those before it
            before = [n for stem, *branches in segments for n in (0, *(accumulate(branches[:-1], initial=0) if branches else ()))]
            before = torch.repeat_interleave(torch.tensor(before), torch.tensor([n for lengths in segments for n in lengths])).to(texts.device)
            position_ids = (position_ids[:, texts >= 0] - before)[:, None]
        x, patch_features = self.model.embed_tokens(input_ids), None
        if pixel_values is not None or pixel_values_videos is not None:
            x, patch_features = self.look(x, input_ids, pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        segments = segments and [(sum(lengths), branch_mask(lengths, x.device)) for lengths in segments]
        (cos, sin), mask, hidden = self.rotary(position_ids), attention_mask_for(attention_mask), [x]
        for layer in self.model.layers[:num_layers]:
            hidden.append(compute(layer, self.checkpointing, hidden[-1], cos, sin, mask, cache, segments))
        if cache is not None:
            cache.length, cache.next_position = input_ids.shape[1], position_ids.amax(dim=(0, 2)) + 1
        if num_layers is not None:
            return VLMOutput(None, hidden, patch_features)
        chosen = self.model.norm(hidden[-1] if logits_at is None else hidden[-1][logits_at])
        return VLMOutput(self.head(chosen), hidden, patch_features, chosen)

    def step(self, tokens, cos, sin, mask, cache, weights):
        """Logits (B, V) behind one more token (B,) of each row, whose keys and values join the cache. cos and sin from `step_rotary`, mask (B, 1, 1, S), True
        where it may look, or None; weights: each layer's.

        A token of a small model costs what its calls cost, so they are few and plain: one rotation for queries, keys and (by nothing) values, no modules.
        """
        heads, kv_heads, d, eps = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim, self.config.rms_norm_eps
        x, at = self.model.embed_tokens(tokens), cache.length
        for own, past in zip(weights, cache.layers):
            if hasattr(own[0], "full_tensor"):                                   # sharded: one layer at a time is whole
                own = [weight.full_tensor().to(x.dtype) for weight in own]
            norm, qkv, bias, out, mlp_norm, gate_up, down = own
            y = F.linear(rms_norm(x, norm, eps), qkv, bias).view(len(x), -1, 2, d // 2)
            q, kv = torch.addcmul(y * cos, y.flip(2), sin).view(len(x), -1, d).split((heads, 2 * kv_heads), dim=1)
            past.select(2, at).copy_(kv)
            k, v = past.narrow(2, 0, at + 1).split(kv_heads, dim=1)
            q = q.view(len(x), kv_heads, -1, d)                                  # all that look at the same keys
            x = torch.addmm(x, F.scaled_dot_product_attention(q, k, v, mask).flatten(1), out.t())
            gate, up = F.linear(rms_norm(x, mlp_norm, eps), gate_up).chunk(2, dim=-1)
            x = torch.addmm(x, F.silu(gate) * up, down.t())
        cache.length += 1
        return self.head(self.model.norm(x))

    def head(self, x):
        return F.linear(x, (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight)

    @torch.inference_mode()
    def generate(self, input_ids, attention_mask=None, pixel_values=None, image_grid_thw=None, max_new_tokens=128, temperature=0.0, top_p=1.0, seed=None,
                 stop_token_ids=None, stream=None, **videos):
        """Continue left-padded prompts (B, L) with their vision inputs until a stop token: a list of B lists of token ids, the stop not among them.

        temperature 0 takes the likeliest token; else the smallest set of tokens with probability top_p is drawn from, reproducibly with a seed.
        stop_token_ids: <|im_end|> and <|endoftext|> unless given. stream(ids), a list of B, is called for every step; rows that are done repeat a stop.
        """
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("generation needs padding on the left")
        config, (B, L), device = self.config, input_ids.shape, input_ids.device
        stops, cache = stop_token_ids or (config.eos_token_id, config.bos_token_id), Cache(L + max_new_tokens)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        last = torch.zeros_like(input_ids, dtype=torch.bool)
        last[:, -1] = True
        logits = self(input_ids, attention_mask, pixel_values, image_grid_thw, **videos, logits_at=last, cache=cache).logits      # (B, V)
        padded = attention_mask is not None and not attention_mask.all()
        mask = F.pad(attention_mask, (0, max_new_tokens), value=1).bool()[:, None, None] if padded else None
        turns = self.step_rotary(cache.next_position[:, None] + torch.arange(max_new_tokens, device=device))
        weights, made = [layer.weights() for layer in self.model.layers], []
        for i in range(max_new_tokens):
            token = logits.argmax(-1) if temperature == 0 else draw(logits / temperature, top_p, generator)
            made.append([stops[0] if made and made[-1][row] in stops else id for row, id in enumerate(token.tolist())])
            if stream is not None:
                stream(made[-1])
            if i + 1 == max_new_tokens or all(id in stops for id in made[-1]):
                break
            logits = self.step(token, *turns[i], None if mask is None else mask[..., :cache.length + 1], cache, weights)
        return [list(takewhile(lambda id: id not in stops, row)) for row in zip(*made)]

    @classmethod
    def from_pretrained(cls, path_or_repo_id, device="cpu", dtype=torch.float32):
        """The model in a folder (config.json and model.safetensors, one or in shards) or on the hub. UserError on what is missing or broken."""
        folder = find_folder(path_or_repo_id)
        config = load_config(folder)
        with torch.device("meta"):                                               # shapes only: 7 B random numbers would be thrown away
            model = cls(config)
        load_weights(model, weight_files(folder), device, dtype)
        return model.eval()

    def save_pretrained(self, folder, dtype=None, weights=None):
        """Write config.json, preprocessor_config.json, model.safetensors and its index, each whole or not at all; dtype float16 halves the file; weights {name: tensor}
        stand for the model's own.

        transformers and vLLM load the folder as it is, with the tokenizer's files beside.
        """
        weights = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in hub_weights(weights or self.state_dict(), self.config).items()}
        write_json(Path(folder) / "config.json", {**self.config.to_dict(), "dtype": str(dtype or self.model.norm.weight.dtype).removeprefix("torch.")})
        write_json(Path(folder) / "preprocessor_config.json", self.config.processor_dict())
        with atomic(Path(folder) / "model.safetensors") as path:
            save_file(weights, path, metadata={"format": "pt"})
        # vLLM reads every safetensors file that no index leaves out, policy.safetensors too
        write_json(Path(folder) / "model.safetensors.index.json", {"metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
                                                                    "weight_map": dict.fromkeys(weights, "model.safetensors")})


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}      # one product here, tensors of their own on the hub


def hub_parts(name, rows, config):
    """[(hub's name, rows)] of the hub's tensors that ours of this name holds one below the other."""
    *module, layer, kind = name.split(".")
    if layer not in FUSED:
        return [(name, rows)]
    kv = config.num_key_value_heads * config.head_dim
    return [(".".join([*module, part, kind]), size) for part, size in zip(FUSED[layer], (rows - 2 * kv, kv, kv) if layer == "qkv_proj" else (rows // 2, rows // 2))]


def hub_weights(weights, config):
    """{our name: tensor} under the hub's names."""
    made = {}
    for name, tensor in weights.items():
        names, sizes = zip(*hub_parts(name, len(tensor), config))
        made |= zip(names, tensor.split(sizes))
    return made


def initialise(module):
    """Qwen's initializer: normal of deviation 0.02, biases zero, norms one."""
    if isinstance(module, (nn.Linear, nn.Conv3d, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)


def draw(logits, top_p, generator):
    probability, token = logits.float().softmax(-1).sort(-1, descending=True)
    probability[probability.cumsum(-1) - probability >= top_p] = 0               # the likeliest always stays
    return token.gather(-1, torch.multinomial(probability, 1, generator=generator))[:, 0]


# ---- loading

def load_config(folder):
    """VLMConfig of a folder; pixel limits come from preprocessor_config.json where the folder has one, as on the hub."""
    path, processor = Path(folder) / "config.json", Path(folder) / "preprocessor_config.json"
    found = read_json(path)
    limits = {name: value for name, value in read_json(processor).items() if name in QWEN_PIXELS} if processor.exists() else {}
    try:
        return VLMConfig.from_dict({**found, **limits})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} has a value of the wrong type: {error}") from None


def stored_dtype(folder):
    """The type that a model folder's config.json names for its weights; float16 if it names none that training keeps."""
    found = read_json(Path(folder) / "config.json")
    name = found.get("dtype") or found.get("torch_dtype")
    return getattr(torch, name) if name in ("float32", "bfloat16") else torch.float16


def weight_files(folder):
    index = Path(folder) / "model.safetensors.index.json"
    if not index.exists():
        return [Path(folder) / "model.safetensors"]
    return [Path(folder) / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]


def load_weights(model, paths, device="cpu", dtype=torch.float32):
    """Put the safetensors files `paths` into `model`: every name and every shape must match, so nothing is left at random.

    Tensors are copied one by one, each from a mapping of its own: what was read of the file is let go of at once, and memory peaks at the weights and
    one tensor.
    """
    own, found, filled, wanted = model.state_dict(), {}, set(), {}               # wanted {hub's name: (our name, first row, shape)}
    for name, tensor in own.items():
        first = 0
        for part, rows in hub_parts(name, len(tensor), model.config):
            wanted[part], first = (name, first, [rows, *tensor.shape[1:]]), first + rows
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
            if "lm_head.weight" not in wanted:
                shapes.pop("lm_head.weight", None)                               # tied: some savers store the embedding twice
            for name, shape in shapes.items():
                if name not in wanted:
                    raise UserError(f"{path} does not fit config.json: unexpected tensor {name}")
                ours, first, fits = wanted[name]
                if fits != shape:
                    raise UserError(f"{path} does not fit config.json: {name} has shape {shape}, wanted {fits}")
                if ours not in found:
                    found[ours] = torch.empty(own[ours].shape, dtype=dtype, device=device)
                with safe_open(path, "pt") as file:
                    found[ours][first:first + shape[0]] = file.get_tensor(name)
                filled.add(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read weights {path}: {getattr(error, 'strerror', None) or error}; is the file complete?") from None
    missing = sorted(wanted.keys() - filled)
    if missing:
        raise UserError(f"{paths[0].parent} does not fit config.json: {len(missing)} tensors missing, first {missing[0]}")
    model.load_state_dict(found, assign=True)
