"""Qwen2.5-VL and Qwen3-VL: pixels and token ids in, new tokens or hidden states of block k out.

    image ─► patches ─► ViT (windows, a few global blocks) ─► merger (2x2 patches = 1 token) ─┐
    text ─► processor.py ─► token ids ──► embedding ──────────── <|image_pad|> replaced by ◄───┘
                                            └─► LLM blocks 1..k ─► H_k (B, L, D): for the policy
                                                └─► blocks k+1..n ─► norm ─► logits: for answers

Only the network is here: processor.py makes its inputs, checkpoint.py has its sizes and reads its
weights, positions.py computes the positions of patches and tokens.

What Qwen3-VL (2B to 32B, and Cosmos-Reason2) does differently, wherever the code checks `qwen3`:

    ViT        attends to whole frames only; LayerNorm, an MLP without a gate, learned positions
    deepstack  some of its blocks have mergers too: their tokens are added after LLM blocks 1, 2...
    attention  queries and keys are normalized; no biases
    M-RoPE     pairs are interleaved over time, row, column; a video's times are in the text

Field and tensor names are those of the hub's checkpoints (Qwen/Qwen2.5-VL-3B-Instruct and its
siblings); `nano` is Qwen2.5-VL with 5 M parameters. Sources: Qwen2.5-VL (arXiv 2502.13923),
Qwen3-VL (arXiv 2511.21631), M-RoPE of Qwen2-VL (arXiv 2409.12191), and the behavior of Hugging Face
transformers, which tests/test_vlm.py and tests/test_qwen3.py compare with.

Letters: B batch, L tokens of a sequence, S keys (past and new), D width, H heads, G key/value
heads, d width of a head, V vocabulary, P patches of all images, p side of a patch (pixels),
m patches along each side of a token, t h w an image's grid in frames and patches.
Vision inputs are pixel_values (P, 3*2*p*p) and image_grid_thw (n, 3), pixel_values_videos,
video_grid_thw and second_per_grid_ts (n,). Patches are ordered as in Hugging Face's processor:
m x m neighbors are consecutive, so that the merger is a reshape.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from checkpoint import VLMConfig, load_weights, read_generation_config, save_model
from files import find_folder, reading
from positions import (
    branch_mask,
    mrope_positions,
    near_rows,
    padding_mask,
    patch_angles,
    text_angles,
    vision_plan,
)

PRESETS = {"nano": VLMConfig()}

# ---- blocks shared by the ViT and the LLM


def attend(q, k, v, mask=None, **options):
    """Scaled dot-product attention of q (..., H, L, d) and k, v (..., G, S, d)."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    # in float32 on a CPU: its gradient takes a quarter (100 tokens) to nine tenths (450) of the
    # time in bfloat16
    with torch.autocast("cpu", enabled=False):
        wide = [part.float() for part in (q, k, v)]
        y = F.scaled_dot_product_attention(*wide, mask, **options)
    return y.bfloat16()


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.floor = torch.tensor(eps, device="cpu")  # for addcmul, which does not accept a number

    def forward(self, x):
        """x (..., D) divided by its root mean square, times the weight (D,)."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # torch's own takes eight operations on a CPU, this takes five
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean = torch.addcmul(self.floor, length, length, value=1 / x.shape[-1])
        return x * mean.rsqrt_() * self.weight


def cos_sin(angles, dtype):
    """cos (..., 1, d/2) and sin (..., 2, d/2) for `apply_rotary`, from angles (..., d/2)."""
    cos = angles.cos()[..., None, :]
    sin = angles.sin()
    sin = torch.stack((-sin, sin), dim=-2)
    return cos.to(dtype), sin.to(dtype)


def apply_rotary(x, cos, sin):
    """Rotate pairs (i, i + d/2) of the last axis of x (..., d)."""
    pairs = x.unflatten(-1, (2, -1))  # (..., 2, d/2)
    turned = torch.addcmul(pairs * cos, pairs.flip(-2), sin)
    return turned.flatten(-2).to(x.dtype)  # under autocast x has fewer bits than cos


def compute(block, checkpointing, *inputs):
    """A block's output; with checkpointing it is recomputed in the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class MLP(nn.Module):
    """SwiGLU. The hub's gate_proj and up_proj are stacked in one matrix."""

    def __init__(self, width, inner, bias):
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


# ---- ViT


def vision_norm(config, width):
    return nn.LayerNorm(width, 1e-6) if config.qwen3 else RMSNorm(width, 1e-6)


def vision_mlp(config):
    """SwiGLU, or the two layers of Qwen3-VL."""
    sizes = (config.hidden_size, config.intermediate_size)
    if not config.qwen3:
        return MLP(*sizes, bias=True)
    parts = {"linear_fc1": nn.Linear(*sizes), "act_fn": nn.GELU("tanh")}
    parts["linear_fc2"] = nn.Linear(*reversed(sizes))
    return nn.Sequential(OrderedDict(parts))


class VisionAttention(nn.Module):
    """Attention within each window. x (P, D) in windowed order, cos and sin (P, 1, 1, d/2).

    groups [(count, patches)]: windows of equal size go through SDPA as one batch.
    """

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, groups):
        qkv = self.qkv(x)
        qkv = qkv.view(len(x), 3, self.num_heads, -1)  # (P, 3, H, d)
        qk, v = qkv.split((2, 1), dim=1)
        qk = apply_rotary(qk, cos, sin)
        q, k = qk.unbind(1)
        v = v[:, 0]
        sizes = [count * length for count, length in groups]
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes))
        outputs = []
        for part, shape in zip(parts, groups):
            # (count, H, length, d) each
            windows = [t.unflatten(0, shape).transpose(1, 2) for t in part]
            y = attend(*windows)
            y = y.transpose(1, 2).flatten(0, 1)
            outputs.append(y.flatten(1))  # (patches, D)
        return self.proj(torch.cat(outputs))


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = vision_norm(config, config.hidden_size)
        self.attn = VisionAttention(config)
        self.norm2 = vision_norm(config, config.hidden_size)
        self.mlp = vision_mlp(config)

    def forward(self, x, *where):
        x = x + self.attn(self.norm1(x), *where)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A linear layer on flattened patches; the Conv3d gives its weight the hub's shape."""

    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(3, config.hidden_size, kernel, stride=kernel, bias=config.qwen3)

    def forward(self, pixel_values):
        weight = self.proj.weight.flatten(1)  # (D, 3*2*p*p)
        x = F.linear(pixel_values.to(weight.dtype), weight, self.proj.bias)
        return x.to(weight.dtype)  # under autocast too: the residual stream stays in float32


class PatchMerger(nn.Module):
    """m x m neighboring patches (P, D) to one token of the LLM's width.

    A deep one (deepstack) normalizes all m x m patches together.
    """

    def __init__(self, config, deep=False):
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = vision_norm(config, self.width if deep else config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width),
            nn.GELU(),
            nn.Linear(self.width, config.out_hidden_size),
        )

    def forward(self, x):
        x = self.ln_q(x.view(-1, *self.ln_q.weight.shape))
        return self.mlp(x.view(-1, self.width))


class VisionTransformer(nn.Module):
    checkpointing = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        if config.qwen3:
            self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.merger = PatchMerger(config)
        deep = [PatchMerger(config, deep=True) for _ in config.deepstack_visual_indexes]
        self.deepstack_merger_list = nn.ModuleList(deep)

    def forward(self, pixel_values, grid_thw):
        """pixel_values (P, 3*2*p*p) and grid_thw (n, 3) to tokens, patch features and deep tokens.

        tokens (P / m², D of the LLM), features (P, D of the ViT), then the tokens of each deepstack
        merger, all in reading order.
        """
        config = self.config
        *plan, windows, frames = vision_plan(grid_thw.tolist(), config)
        order, raster, places = (index.to(pixel_values.device) for index in plan)
        x = self.patch_embed(pixel_values[order])
        if config.qwen3:
            sizes = grid_thw[:, 1:].repeat_interleave(grid_thw.prod(1), dim=0)  # (P, 2)
            rows, shares = near_rows(places, sizes[order], config.num_position_embeddings)
            learned = self.pos_embed(rows) * shares[..., None]  # (P, 4, D)
            x = x + learned.sum(1).to(x.dtype)
        angles = patch_angles(places, config)[:, None, None]  # for queries, keys and all heads
        cos, sin = cos_sin(angles, x.dtype)
        deep = []
        for i, block in enumerate(self.blocks):
            # most blocks attend only within a window
            groups = frames if i in config.fullatt_block_indexes else windows
            x = compute(block, self.checkpointing, x, cos, sin, groups)
            if i in config.deepstack_visual_indexes:
                number = config.deepstack_visual_indexes.index(i)
                deep.append(self.deepstack_merger_list[number](x))
        # from windowed order back to reading order
        m2 = config.spatial_merge_size**2
        back = torch.argsort(order[::m2])
        tokens = self.merger(x)[back]
        return tokens, x[torch.argsort(raster)], *(part[back] for part in deep)


# ---- LLM


class Cache:
    """Keys and values of the first `length` tokens, with room for `size`.

    layers: a buffer (B, 2 G, size, d) each, keys first. turns: cos and sin of the tokens to come.
    """

    def __init__(self, size):
        self.size = size
        self.length = 0  # tokens in the cache
        self.layers = []
        self.turns = None


class Attention(nn.Module):
    """Grouped-query self-attention with M-RoPE: x (B, L, D), cos and sin from `cos_sin`.

    segments [(length, mask)] of texts that share the row but do not attend to each other; a mask is
    (B or 1, 1, length, length), True where a query may attend, or None for causal.
    """

    def __init__(self, config, index):
        super().__init__()
        self.index = index  # of this layer
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        # the hub's q_proj, k_proj and v_proj are stacked in one matrix
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=not config.qwen3)
        width = self.heads * self.head_dim
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.normed = config.qwen3
        if self.normed:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def turn(self, qk, cos, sin):
        """Queries and keys (B, H + G, L, d) rotated to their positions."""
        if self.normed:
            wide = qk.to(self.q_norm.weight.dtype)  # under autocast
            q, k = wide.split((self.heads, self.kv_heads), dim=1)
            wide = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
            qk = wide.to(qk.dtype)
        return apply_rotary(qk, cos, sin)

    def forward(self, x, cos, sin, segments, cache):
        if cache is not None and cache.length:
            mask = segments[0][1]
            return self.step(x, cos, sin, mask, cache)
        B, L, _ = x.shape
        qkv = self.qkv_proj(x)
        qkv = qkv.view(B, L, -1, self.head_dim)
        qkv = qkv.transpose(1, 2)  # (B, H + 2 G, L, d)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        qk = self.turn(qk, cos, sin)
        q, k = qk.split((self.heads, self.kv_heads), dim=1)
        if cache is not None:
            # allocate room for the tokens to come, so that nothing is copied again
            prompt = torch.cat((k, v), dim=1)
            cache.layers.append(F.pad(prompt, (0, 0, 0, cache.size - L)))
        # each text separately: causal attention without a mask is fast, and nothing is padded
        lengths = [length for length, _ in segments]
        parts = zip(*(part.split(lengths, dim=2) for part in (q, k, v)))
        outputs = []
        for text, (_, mask) in zip(parts, segments):
            y = attend(*text, mask, is_causal=mask is None, enable_gqa=True)
            outputs.append(y)  # (B, H, length, d)
        y = torch.cat(outputs, dim=2).transpose(1, 2)
        return self.o_proj(y.flatten(2))

    def step(self, x, cos, sin, mask, cache):
        """`forward` for one more token per row, x (B, D), mask (B, 1, 1, S) or None."""
        qkv = self.qkv_proj(x)
        qkv = qkv.view(len(x), -1, 1, self.head_dim)  # (B, H + 2 G, 1, d)
        qk = qkv[:, : self.heads + self.kv_heads]  # rotated in place
        qk.copy_(self.turn(qk, cos, sin))
        # append its keys and values to the cache
        buffer = cache.layers[self.index]
        buffer.narrow(2, cache.length, 1).copy_(qkv[:, self.heads :])
        past = buffer.narrow(2, 0, cache.length + 1)
        k, v = past.chunk(2, dim=1)  # (B, G, S, d)
        # queries that share keys are grouped, so that no keys are repeated
        q = qkv[:, : self.heads, 0]
        q = q.unflatten(1, (self.kv_heads, -1))  # (B, G, H / G, d)
        y = attend(q, k, v, mask)
        return self.o_proj(y.flatten(1))


class DecoderLayer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x, *where):
        x = x + self.self_attn(self.input_layernorm(x), *where)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def repeat_images(parts, grids, index):
    """Tokens of n images (P, D), with grids (n, 3), to those of the images at index (m,)."""
    areas = grids.prod(1)
    size = int(areas.sum()) // len(parts)  # patches in a token
    images = parts.split((areas // size).tolist())
    return torch.cat([images[i] for i in index.tolist()])


# ---- the model


@dataclass
class VLMOutput:
    logits: torch.Tensor | None  # (B, L, V), or (n, V) for n positions; None with num_layers
    hidden_states: list  # (B, L, D) each: [k] after block k, [0] the embeddings; before the norm
    patch_features: torch.Tensor | None  # (P, D of the ViT), images first, in reading order
    last_hidden_state: torch.Tensor | None = None  # after the norm: the input of the head


class VLM(nn.Module):
    checkpointing = False  # in training: recompute blocks instead of keeping their activations

    def __init__(self, config):
        super().__init__()
        self.config = config
        # as in generation_config.json: the defaults of `generate`
        stops = [config.eos_token_id, config.bos_token_id]
        self.generation_config = {"eos_token_id": stops, "repetition_penalty": 1.0}
        self.visual = VisionTransformer(config.vision_config)
        self.model = TextModel(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(initialize)

    def rotary(self, positions):
        """cos and sin of positions (3, B, L), for all heads."""
        angles = text_angles(positions, self.config)
        return cos_sin(angles[:, None], self.model.norm.weight.dtype)

    def see(self, x, input_ids, media):
        """Run the ViT, and put its tokens into the embeddings x (B, L, D).

        media: [(placeholder token, pixels, grids, index)] of images and of videos; index (m,) says
        which of them each place of the text shows, None that each is shown once. Returns x, the
        patch features (None without images), and deep: what is added after the first LLM blocks,
        (B, L, D) each, 0 at text.
        """
        features = []
        filled = [x, *(torch.zeros_like(x) for _ in self.visual.deepstack_merger_list)]
        for token_id, pixels, grids, index in media:
            if pixels is None:
                continue
            parts = self.visual(pixels, grids)
            if index is not None:
                parts = [repeat_images(part, grids, index) for part in parts]
            tokens, seen, *deep = parts
            features.append(seen)
            places = (input_ids == token_id)[..., None]  # (B, L, 1)
            number = int(places.sum())
            if number != len(tokens):
                raise ValueError(
                    f"the text has {number} placeholders, the images give {len(tokens)} tokens"
                )
            parts = zip(filled, (tokens, *deep))
            filled = [part.masked_scatter(places, new.to(x.dtype)) for part, new in parts]
        if not features:
            return x, None, []
        return filled[0], torch.cat(features), filled[1:]

    def forward(
        self,
        input_ids,
        attention_mask=None,
        pixel_values=None,
        image_grid_thw=None,
        pixel_values_videos=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        num_layers=None,
        logits_at=None,
        segments=None,
        image_index=None,
        cache=None,
    ):
        """input_ids (B, L), attention_mask (B, L) 1 on real tokens, vision inputs, to a VLMOutput.

        num_layers=k runs only the first k blocks (no logits). logits_at: an index into (B, L), to
        compute logits only there. segments: the lengths of texts packed into one row (B = 1), each
        [L] or [stem, branch, branch, ...]; each branch continues where the stem ends, as if it were
        alone. image_index (m,): which image each place of the texts shows, if texts share images;
        None if each is shown once, in order. An empty cache is filled for `step`. ValueError if the
        images' tokens do not fill their placeholders in the text.
        """
        config = self.config
        shown = image_grid_thw if image_index is None else image_grid_thw[image_index]
        grids = (shown, video_grid_thw, second_per_grid_ts)
        position_ids = mrope_positions(input_ids, attention_mask, config, *grids, segments)
        images = (config.image_token_id, pixel_values, image_grid_thw, image_index)
        videos = (config.video_token_id, pixel_values_videos, video_grid_thw, None)
        x = self.model.embed_tokens(input_ids)
        x, patch_features, deep = self.see(x, input_ids, [images, videos])
        if segments is None:  # the whole row is one text
            masked = [(input_ids.shape[1], padding_mask(attention_mask))]
        else:
            masked = [(sum(lengths), branch_mask(lengths, x.device)) for lengths in segments]
        cos, sin = self.rotary(position_ids)
        hidden = [x]
        for i, layer in enumerate(self.model.layers[:num_layers]):
            x = compute(layer, self.checkpointing, x, cos, sin, masked, cache)
            if i < len(deep):
                x = x + deep[i]
            hidden.append(x)
        if cache is not None:
            # text continues after the largest position of its row
            cache.length = input_ids.shape[1]
            largest = position_ids.amax(dim=(0, 2))  # (B,)
            ahead = torch.arange(cache.size - cache.length, device=x.device)
            positions = largest[:, None] + 1 + ahead
            turns = self.rotary(positions.expand(3, -1, -1))
            cache.turns = zip(*(part.split(1, dim=2) for part in turns))
        if num_layers is not None:
            return VLMOutput(None, hidden, patch_features)
        last = self.model.norm(x if logits_at is None else x[logits_at])
        return VLMOutput(self.head(last), hidden, patch_features, last)

    def head(self, x):
        layer = self.lm_head or self.model.embed_tokens
        return F.linear(x, layer.weight)

    def step(self, tokens, mask, cache):
        """Append one more text token per row (B,) to the cache. Logits (B, V) for the next one.

        mask (B, 1, 1, S), True where it may attend, or None.
        """
        x = self.model.embed_tokens(tokens)
        cos, sin = next(cache.turns)
        for layer in self.model.layers:
            x = layer(x, cos, sin, [(1, mask)], cache)
        cache.length += 1
        return self.head(self.model.norm(x))

    @torch.inference_mode()
    def generate(
        self,
        input_ids,
        attention_mask=None,
        max_new_tokens=128,
        temperature=0.0,
        seed=None,
        stop_token_ids=None,
        repetition_penalty=None,
        **vision,
    ):
        """Continue left-padded prompts (B, L): B lists of token ids, each up to its stop token.

        temperature 0 takes the most likely token; otherwise one is sampled, reproducibly with a
        seed. Stop tokens and the penalty on earlier tokens (arXiv 1909.05858) default to those of
        the generation config.
        """
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if not real[:, -1].all():
            raise ValueError("generation needs padding on the left")
        stops = stop_token_ids or self.generation_config["eos_token_id"]
        penalty = repetition_penalty or self.generation_config["repetition_penalty"]
        generator = None
        if seed is not None:
            generator = torch.Generator(input_ids.device).manual_seed(seed)
        B, L = input_ids.shape
        used = real.new_zeros(B, self.config.vocab_size)
        used.scatter_add_(1, input_ids, real)  # how often each token has occurred
        padded = not real.all()  # without padding nothing is masked, which is faster
        sees = F.pad(real, (0, max_new_tokens), value=1).bool()
        sees = sees[:, None, None]  # (B, 1, 1, S)

        cache = Cache(L + max_new_tokens)
        last = (slice(None), -1)
        out = self(input_ids, attention_mask, **vision, logits_at=last, cache=cache)
        logits = out.logits  # (B, V)
        rows = [[] for _ in range(B)]
        running = range(B)  # rows that have not stopped yet
        for i in range(max_new_tokens):
            if penalty != 1.0:
                lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
                logits = torch.where(used > 0, lowered, logits)
            token = logits.argmax(-1)  # (B,)
            if temperature > 0:
                probability = (logits.float() / temperature).softmax(-1)
                token = torch.multinomial(probability, 1, generator=generator)[:, 0]
            ids = token.tolist()
            running = [b for b in running if ids[b] not in stops]
            for b in running:
                rows[b].append(ids[b])
            if not running or i + 1 == max_new_tokens:
                break
            used.scatter_(1, token[:, None], 1)
            mask = sees[..., : L + i + 1] if padded else None
            logits = self.step(token, mask, cache)
        return rows

    @classmethod
    def from_pretrained(cls, path_or_repo_id, device="cpu", dtype=torch.float32):
        """The model in a folder or on the hub, as checkpoint.py reads it.

        UserError if anything is missing, broken or another architecture.
        """
        folder = find_folder(path_or_repo_id)
        config = VLMConfig.from_pretrained(folder)
        with reading(folder / "config.json"), torch.device("meta"):
            model = cls(config)  # only shapes: drawing 7 B random numbers would be a waste
        model.generation_config = read_generation_config(folder, config)
        load_weights(model, folder, device, dtype)
        return model.eval()

    def save_pretrained(self, folder, dtype=None, weights=None):
        """Write the folder, in `dtype`; weights {name: tensor} replace the model's own."""
        save_model(self, folder, dtype, weights or self.state_dict())


def initialize(module):
    """Qwen's initializer: normal with standard deviation 0.02, biases zero, norms one."""
    if isinstance(module, (nn.Linear, nn.Conv3d, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
