"""Positions of patches and tokens, rotary angles, and attention masks: for vlm.py.

    vision_plan        grids of images ─► patches sorted into windows, their rows and columns
    near_rows          rows and columns ─► nearby rows of Qwen3-VL's learned position table
    mrope_positions    token ids and grids ─► time, row and column of every token
    pair_axes          which of the three each rotary pair of a head rotates with
    patch_angles, text_angles    by what angle
    padding_mask, branch_mask    what a token may attend to, where causal attention is not enough

Sources: M-RoPE of Qwen2-VL (arXiv 2409.12191), window attention of Qwen2.5-VL (arXiv 2502.13923).
Letters: B batch, L tokens of a sequence, P patches of all images, m patches along each side of a
token, t h w an image's grid in frames and patches.
"""

import math
from itertools import groupby, pairwise, repeat

import numpy as np
import torch


def vision_plan(grids, vision):
    """Sort the patches of images [(t, h, w)] so that those of each window are contiguous.

    Frames keep their order, and windows of equal size are adjacent. Returns tensors: order (P,),
    the patch's index in pixel_values; raster (P,), its index in reading order; and places (P, 2),
    its row and column in the frame; then [(count, patches)] of the windows and of the frames.
    """
    m = vision.spatial_merge_size
    side = vision.window_size // vision.patch_size // m * m  # side of a window, in patches
    parts = []
    frames = []
    start = 0
    for t, h, w in grids:
        # in pixel_values the m x m patches of a token are consecutive
        place = np.arange(h * w).reshape(h // m, m, w // m, m)
        place = place.swapaxes(1, 2).ravel()  # index in reading order, within the frame
        rows, columns = np.divmod(place, w)
        windows = rows // side * w + columns // side
        for _ in range(t):
            number = np.full(h * w, len(frames))  # index of the frame
            parts.append((start + place, rows, columns, start + windows, number))
            frames.append(h * w)
            start += h * w

    raster, rows, columns, windows, frame = np.concatenate(parts, axis=1)
    _, window, sizes = np.unique(windows, return_inverse=True, return_counts=True)
    order = np.lexsort((window, sizes[window], frame))  # by frame, then size, then window
    first = np.flatnonzero(np.diff(window[order], prepend=-1))  # where each window begins
    lengths = np.diff(first, append=start)
    places = np.stack((rows, columns), axis=1)
    sorted_parts = [order, raster[order], places[order]]
    tensors = [torch.from_numpy(part) for part in sorted_parts]
    return *tensors, adjacent(lengths.tolist()), adjacent(frames)


def adjacent(sizes):
    """Run lengths: [4, 4, 2] to [(2, 4), (1, 2)]."""
    groups = []
    for size, equal in groupby(sizes):
        groups.append((len(list(equal)), size))
    return groups


def near_rows(places, sizes, number):
    """The four entries near each patch in a square table of `number`: indices and weights, (P, 4).

    places (P, 2): a patch's row and column, sizes (P, 2): of its frame. The table is stretched over
    the frame so that the corners coincide.
    """
    side = math.isqrt(number)
    place = places * (side - 1) / (sizes - 1).clamp(min=1)  # (P, 2) float32
    before = place.floor()
    behind = (before + 1).clamp(max=side - 1)
    rows, columns = torch.stack((before, behind), dim=2).long().unbind(1)  # (P, 2) each
    share = place - before  # weight of the later row or column
    down, across = torch.stack((1 - share, share), dim=2).unbind(1)
    indices = rows[:, :, None] * side + columns[:, None]  # (P, 2, 2)
    shares = down[:, :, None] * across[:, None]
    return indices.flatten(1), shares.flatten(1)


def patch_angles(places, vision):
    """(P, d/2) rotation angles of the rotary pairs in a head of the ViT; places (P, 2)."""
    # half of the pairs rotate with the row, the other half with the column
    half = vision.hidden_size // vision.num_heads // 2
    pairs = torch.arange(0, half, 2, device=places.device)
    frequency = 10000.0 ** (-pairs / half)
    angles = places[:, :, None] * frequency  # (P, 2, d/4)
    return angles.flatten(1)


def text_angles(positions, config):
    """(B, L, d/2) rotation angles of the rotary pairs in a head of the LLM; positions (3, B, L)."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequency = config.rope_theta ** (-pairs / config.head_dim)  # (d/2,)
    axes = torch.tensor(pair_axes(config), device=positions.device)
    return positions.movedim(0, -1).index_select(-1, axes) * frequency


def pair_axes(config):
    """For each rotary pair of a head the axis that it rotates with: 0 time, 1 row, 2 column."""
    sections = config.mrope_section
    axes = np.repeat((0, 1, 2), sections)  # one section after another
    if config.qwen3:  # interleaved: time, row, column ...; the remaining pairs are time
        axes[:] = 0
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = axis
    return axes.tolist()


def mrope_positions(
    input_ids,
    attention_mask,
    config,
    image_grid_thw=None,
    video_grid_thw=None,
    second_per_grid_ts=None,
    segments=None,
):
    """M-RoPE positions (3, B, L): time, row, column; padding (attention_mask 0) gets 0.

    Grids are used in reading order. Frames of a video are tokens_per_second x second_per_grid_ts
    apart; for Qwen3-VL they are separate images with their times as text in between. A branch of
    `segments` continues where its stem ends. ValueError if the grids do not fit the text. This
    matches transformers 4 and vLLM; transformers 5 continues after a video at start +
    max(h, w) / m, which for a long video is before its end.
    """
    ids = input_ids.cpu().numpy()  # a loop over tokens, too small for a GPU
    if config.qwen3 and video_grid_thw is not None:
        video_grid_thw = video_grid_thw.repeat_interleave(video_grid_thw[:, 0], dim=0)
        video_grid_thw[:, 0] = 1
        second_per_grid_ts = None
    images = iter([] if image_grid_thw is None else image_grid_thw.tolist())
    videos = iter([] if video_grid_thw is None else video_grid_thw.tolist())
    seconds = repeat(1.0) if second_per_grid_ts is None else map(float, second_per_grid_ts)
    # by the token id of their placeholders
    grids = {config.image_token_id: images, config.video_token_id: videos}

    texts = []  # (row, which of its tokens, lengths of a stem and its branches)
    if segments is None:
        real = np.ones_like(ids) if attention_mask is None else attention_mask.cpu().numpy()
        texts = [(b, kept, []) for b, kept in enumerate(real > 0)]
    start = 0
    for lengths in segments or ():
        stop = start + sum(lengths)
        texts.append((0, slice(start, stop), lengths))
        start = stop

    positions = np.zeros((3, *ids.shape), np.int64)
    for b, own, lengths in texts:
        text = text_positions(ids[b, own], grids, seconds, config)
        ends = np.cumsum(lengths)
        # a branch continues where the stem ends, as if the branches before it were not there
        for before, end in pairwise(ends[:-1]):
            text[:, end:] -= end - before
        positions[:, b, own] = text
    positions = torch.from_numpy(positions)
    return positions.to(input_ids.device)


def text_positions(ids, grids, seconds, config):
    """Positions (3, L) of one text, an array of ids without padding.

    Text has the same position on all three axes. The tokens of an image all start at the next
    position and count along their own axis; the text after them continues at the largest position
    + 1. grids {token id: iterator of (t, h, w)}; seconds: iterator over seconds per grid frame, one
    per video.
    """
    vision = config.vision_config
    m = vision.spatial_merge_size
    positions = np.tile(np.arange(len(ids)), (3, 1))
    is_vision = np.isin(ids, list(grids))
    at = 0  # the loop jumps from image to image
    while is_vision[at:].any():
        at += is_vision[at:].argmax()
        t, h, w = next(grids[ids[at]], (0, 0, 0))
        axes = np.indices((t, h // m, w // m))
        axes = axes.reshape(3, -1)  # frame, row, column of each token
        tokens = axes.shape[1]
        end = at + tokens
        fitting = (ids[at:end] == ids[at]).sum()
        if not tokens or fitting < tokens:
            raise ValueError(f"too few placeholders left for an image of {tokens} tokens")
        if ids[at] == config.video_token_id:
            axes[0] = axes[0] * vision.tokens_per_second * next(seconds)  # rounded down
        positions[:, at:end] = positions[0, at] + axes
        # an image advances the text by its longest side, however many tokens it has
        positions[:, end:] += axes.max() + 1 - tokens
        at = end
    return positions


def padding_mask(real):
    """(B, 1, L, L), True where a query may attend; real (B, L) 1 on real tokens, or None.

    None if causal attention needs no mask: with padding on the right no real token sees it.
    """
    if real is None or not (real[:, :-1] < real[:, 1:]).any():
        return None
    L = real.shape[1]
    ones = torch.ones(L, L, dtype=torch.bool, device=real.device)
    causal = ones.tril()
    itself = causal & causal.T  # so that no row is empty, which would give NaN
    return causal & real.bool()[:, None, None] | itself


def branch_mask(lengths, device):
    """(L, L), True where a token may attend: to earlier tokens of the stem and of its own branch.

    lengths [stem, branch, branch, ...]. None if causal attention needs no mask.
    """
    if len(lengths) < 3:
        return None
    number = np.repeat(np.arange(len(lengths)), lengths)
    branch = torch.from_numpy(number).to(device)  # (L,), 0 for the stem
    sees = (branch == 0) | (branch == branch[:, None])
    return sees.tril()
