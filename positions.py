"""Where patches and tokens stand, how far they turn, and which tokens see each other: for vlm.py.

    vision_plan        grids of pictures ─► patches sorted into windows, their rows and columns
    near_rows          rows and columns ─► where they lie in Qwen3-VL's learned table of places
    mrope_positions    token ids and grids ─► time, row and column of every token
    pair_axes          which of the three each rotary pair of a head turns with
    patch_angles, text_angles    and by how much
    padding_mask, branch_mask    what a token may look at, where causal attention is not enough

Sources: M-RoPE of Qwen2-VL (arXiv 2409.12191), window attention of Qwen2.5-VL (arXiv 2502.13923).
Letters: B batch, L tokens of a sequence, P patches of all pictures, m patches that a token merges
along a side, t h w a picture's grid in frames and patches.
"""

import math
from itertools import groupby, pairwise, repeat

import numpy as np
import torch


def vision_plan(grids, vision):
    """How the patches of pictures [(t, h, w)] are sorted so that each window's lie together.

    Frames stay after one another, and windows of equal size are neighbors. Returns tensors: order
    (P,), the patch's index in pixel_values; raster (P,), its place in reading order; and places
    (P, 2), its row and column in the frame; then [(count, patches)] of windows and of frames.
    """
    m = vision.spatial_merge_size
    side = vision.window_size // vision.patch_size // m * m  # of a window, in patches
    parts = []
    frames = []
    start = 0
    for t, h, w in grids:
        # pixel_values has the m x m patches of a token after one another
        place = np.arange(h * w).reshape(h // m, m, w // m, m)
        place = place.swapaxes(1, 2).ravel()  # in reading order, within the frame
        rows, columns = np.divmod(place, w)
        windows = rows // side * w + columns // side
        for _ in range(t):
            number = np.full(h * w, len(frames))  # of the frame
            parts.append((start + place, rows, columns, start + windows, number))
            frames.append(h * w)
            start += h * w

    raster, rows, columns, windows, frame = np.concatenate(parts, axis=1)
    _, window, sizes = np.unique(windows, return_inverse=True, return_counts=True)
    order = np.lexsort((window, sizes[window], frame))  # by frame, then size, then window
    first = np.flatnonzero(np.diff(window[order], prepend=-1))  # where a window begins
    lengths = np.diff(first, append=start)
    places = np.stack((rows, columns), axis=1)
    sorted_parts = [order, raster[order], places[order]]
    tensors = [torch.from_numpy(part) for part in sorted_parts]
    return *tensors, adjacent(lengths.tolist()), adjacent(frames)


def adjacent(sizes):
    """Equal neighbors counted: [4, 4, 2] to [(2, 4), (1, 2)]."""
    groups = []
    for size, equal in groupby(sizes):
        groups.append((len(list(equal)), size))
    return groups


def near_rows(places, sizes, number):
    """The four rows near each patch in a square table of so many: indices and shares, (P, 4) each.

    places (P, 2): a patch's row and column, sizes (P, 2): of its frame, over which the table is
    stretched, corners on corners.
    """
    side = math.isqrt(number)
    place = places * (side - 1) / (sizes - 1).clamp(min=1)  # (P, 2) float32
    before = place.floor()
    behind = (before + 1).clamp(max=side - 1)
    rows, columns = torch.stack((before, behind), dim=2).long().unbind(1)  # (P, 2) each
    share = place - before  # of what is behind
    down, across = torch.stack((1 - share, share), dim=2).unbind(1)
    indices = rows[:, :, None] * side + columns[:, None]  # (P, 2, 2)
    shares = down[:, :, None] * across[:, None]
    return indices.flatten(1), shares.flatten(1)


def patch_angles(places, vision):
    """(P, d/2) by how much each rotary pair of a head of the ViT turns; places (P, 2)."""
    # half of the pairs turn with the row, the other half with the column
    half = vision.hidden_size // vision.num_heads // 2
    pairs = torch.arange(0, half, 2, device=places.device)
    frequency = 10000.0 ** (-pairs / half)
    angles = places[:, :, None] * frequency  # (P, 2, d/4)
    return angles.flatten(1)


def text_angles(positions, config):
    """(B, L, d/2) by how much each rotary pair of a head of the LLM turns; positions (3, B, L)."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device)
    frequency = config.rope_theta ** (-pairs / config.head_dim)  # (d/2,)
    axes = torch.tensor(pair_axes(config), device=positions.device)
    return positions.movedim(0, -1).index_select(-1, axes) * frequency


def pair_axes(config):
    """[0, 1 or 2] for each rotary pair of a head: it turns with the time, the row or the column."""
    sections = config.mrope_section
    axes = np.repeat((0, 1, 2), sections)  # one section after another
    if config.qwen3:  # they take turns: time, row, column, and time has what is left over
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

    Grids are taken in reading order; a video's frames are tokens_per_second x second_per_grid_ts
    apart; Qwen3-VL's are pictures behind one another, with their seconds between them in words. A
    branch of `segments` goes on where its stem ends. ValueError if the grids do not fit the text.
    As transformers 4 and vLLM have it; transformers 5 goes on behind a video at start +
    max(h, w) / m, for a long one before its end.
    """
    ids = input_ids.cpu().numpy()  # a walk over tokens, too small for a GPU
    if config.qwen3 and video_grid_thw is not None:
        video_grid_thw = video_grid_thw.repeat_interleave(video_grid_thw[:, 0], dim=0)
        video_grid_thw[:, 0] = 1
        second_per_grid_ts = None
    images = iter([] if image_grid_thw is None else image_grid_thw.tolist())
    videos = iter([] if video_grid_thw is None else video_grid_thw.tolist())
    seconds = repeat(1.0) if second_per_grid_ts is None else map(float, second_per_grid_ts)
    # by the token that holds their places
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
        # a branch goes on where the stem ends: it does not count those before it
        for before, end in pairwise(ends[:-1]):
            text[:, end:] -= end - before
        positions[:, b, own] = text
    positions = torch.from_numpy(positions)
    return positions.to(input_ids.device)


def text_positions(ids, grids, seconds, config):
    """Positions (3, L) of one text, an array of ids without padding.

    Text counts on all three axes alike. A picture's tokens all start at the next position and
    count along their own axis; the text behind goes on at the largest position + 1. grids
    {token id: iterator of (t, h, w)}, seconds: iterator, of a grid frame of each video.
    """
    vision = config.vision_config
    m = vision.spatial_merge_size
    positions = np.tile(np.arange(len(ids)), (3, 1))
    is_vision = np.isin(ids, list(grids))
    at = 0  # the walk goes from picture to picture
    while is_vision[at:].any():
        at += is_vision[at:].argmax()
        t, h, w = next(grids[ids[at]], (0, 0, 0))
        axes = np.indices((t, h // m, w // m))
        axes = axes.reshape(3, -1)  # of each token: frame, row, column
        tokens = axes.shape[1]
        end = at + tokens
        fitting = (ids[at:end] == ids[at]).sum()
        if not tokens or fitting < tokens:
            raise ValueError(f"the text has too few places left for a picture of {tokens} tokens")
        if ids[at] == config.video_token_id:
            axes[0] = axes[0] * vision.tokens_per_second * next(seconds)  # rounded down
        positions[:, at:end] = positions[0, at] + axes
        # a picture is as long as its longest side, whatever its tokens
        positions[:, end:] += axes.max() + 1 - tokens
        at = end
    return positions


def padding_mask(real):
    """(B, 1, L, L), True where a query may look; real (B, L) 1 on real tokens, or None.

    None where causal attention needs no mask: with padding on the right no real token sees it.
    """
    if real is None or not (real[:, :-1] < real[:, 1:]).any():
        return None
    L = real.shape[1]
    ones = torch.ones(L, L, dtype=torch.bool, device=real.device)
    causal = ones.tril()
    itself = causal & causal.T  # no empty rows, so no NaN
    return causal & real.bool()[:, None, None] | itself


def branch_mask(lengths, device):
    """(L, L), True where a token may look: back to the stem and into its own branch.

    lengths [stem, branch, branch, ...]. None where causal attention needs no mask.
    """
    if len(lengths) < 3:
        return None
    number = np.repeat(np.arange(len(lengths)), lengths)
    branch = torch.from_numpy(number).to(device)  # (L,), 0 for the stem
    sees = (branch == 0) | (branch == branch[:, None])
    return sees.tril()
