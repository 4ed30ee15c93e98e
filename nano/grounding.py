"""Dense supervision, of use to Stage I's training alone: what the network is asked beside the words of answers, in every picture and at every answer.

A model of 5 M parameters that starts from nothing hardly learns to see from sparse words. So linear heads read

* what each 16-pixel patch shows and where that object's centre is: one from the ViT, one from the hidden states of block k, which is what the policy will
  read. Rotary positions tell a patch only where others are; the second head also asks for the place in the picture, which is what coordinates in answers are.
* from the tokens of an answer, the places that it depends on, of the gripper and of what is asked about, in each picture, how far the gripper is opened and
  has moved from one picture to another: digits follow soon after, and comparisons, which hardly come by themselves. Asked at the top and two blocks below, so
  that these have something to compare.
* from each option of a choice, its letter and whether it is the answer.

Letters: L tokens of all rows, V pictures, P patches of the pictures that have dense targets, C classes, m patches a token merges along a side.
"""
import re
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from cli import UserError
from nano import scenes as corpora
from data.env import VIEWS
from nano.questions import LETTERS

LOSSES = ("dense_vit", "dense_llm", "answer_place")      # the first two need no text
NOTHING_WEIGHT = 0.25                        # most patches show nothing
PLACE_SCALE = (1.0, 1.0, 10.0, 1.0, 1.0)     # patches, patches, decimetres, patches, patches: errors of like size
LARGEST_OFFSET = 4.0                         # patches: a centre beside or behind the camera projects to hundreds, and one such row would drown a step
MOST_PICTURES = 4                            # of a scene
PAIRS = tuple(combinations(range(MOST_PICTURES), 2))
ANSWER_PARTS = (2, 2, MOST_PICTURES * 3 * 3, MOST_PICTURES, len(PAIRS))      # numbers that an answer's tokens learn: x, y of its own place; of an option, right (1)
                                             # or wrong (-1), and letter; x, y, depth of the gripper and of two things in each picture; the gripper's opening
                                             # there; the root of its way from each picture to each later one
RIGHT = 2                                    # where among them
ANSWER_PLACE_WEIGHT = 0.3                    # of each part, beside the words' own loss; at 1 they drown them


# ---- targets

def patch_targets(scenes, grid):
    """Corpus scenes whose pictures have the grid (t, h, w) to patch_class (P,); patch_place (P, 5), the object's centre from the patch's (x, y in patches,
    depth in m) and from the picture's (x, y in patches); patch_located (P,), True where that is to be learned."""
    classes = np.concatenate([scene["patch_class"] for scene in scenes])                       # (V, h, w)
    if classes.shape[1:] != tuple(grid[1:]):
        raise UserError(f"the corpus describes {classes.shape[1]} x {classes.shape[2]} patches a picture, this model has {grid[1]} x {grid[2]}: add --dense_weight 0")
    offsets = np.concatenate([scene["patch_offset"] for scene in scenes])
    located = (classes > 0) & (np.abs(offsets[..., :2]).max(-1) <= LARGEST_OFFSET)
    return {"patch_class": torch.from_numpy(classes).flatten(), "patch_place": torch.from_numpy(picture_places(offsets)).flatten(0, 2), "patch_located": torch.from_numpy(located).flatten()}


def answer_targets(texts, rows, tokenizer, patch):
    """Packed rows, and (input_ids, labels, lengths) of each, to what `answer_places` knows of all: answer_place (1, L, sum of ANSWER_PARTS),
    answer_place_weight (1, L)."""
    known = [answer_places(*text, row, tokenizer, patch) for text, row in zip(texts, rows)]
    return {name: torch.cat(parts)[None] for name, parts in zip(("answer_place", "answer_place_weight"), zip(*known))}


def answer_places(ids, labels, lengths, row, tokenizer, patch):
    """A row and what `branched` made of it, to what its tokens shall know, (L, sum of ANSWER_PARTS), NaN where there is nothing; and how much each token
    counts, (L,).

    Tokens that an answer's are predicted from: the place of what it points at or names, in patches from the picture's centre, and what `moments` knows of each
    of up to four pictures. The first token that tells an option from the others: the same, with the place of what that option names, whether it is the answer,
    and its letter (-2 for A, -1 for B, ...).
    """
    talks, media, scene = row
    learned = F.pad(torch.tensor(labels)[1:] >= 0, (0, 1))
    places, weights, listed = torch.full((len(ids), sum(ANSWER_PARTS)), torch.nan), torch.zeros(len(ids)), options(ids, labels, tokenizer)
    weights[learned] = answer_weights(learned[None])
    for option in listed:
        places[option.place, RIGHT:RIGHT + 2], weights[option.place] = torch.tensor((1.0 if option.right else -1.0, LETTERS.index(option.letter) - 2.0)), 1
    if scene is None or not learned.any():
        return places, weights
    shown, end = object_places(scene), len(ids) - sum(lengths[-len(talks):])
    where = lambda text: shown[0, corpora.CLASSES.index(named(text)[0]), :2] if named(text) and len(shown) <= len(VIEWS) else (np.nan, np.nan)
    for (asked, answered), length in zip(talks, lengths[-len(talks):]):
        begin, end = end, end + length
        choices = [option for option in listed if begin <= option.place < end]
        tokens = [begin + i for i in learned[begin:end].nonzero()[:, 0].tolist()]
        things = (scene["things"] or named(asked["content"][-1]["text"].partition(" A) ")[0]))[:2]
        places[tokens + [option.place for option in choices], sum(ANSWER_PARTS[:2]):] = torch.from_numpy(moments(scene, shown, things))
        for option in choices:
            places[option.place, :2] = torch.tensor(where(option.text))
            if option.right:
                places[tokens, :2] = places[option.place, :2]
        if not choices:
            reply, (height, width) = answered["content"], media[0][1].shape[:2]
            pointed = place_in(reply)
            places[tokens, :2] = torch.tensor(where(reply) if pointed is None else (pointed - (width / 2, height / 2)) / patch, dtype=torch.float32)
    return places, weights


def moments(scene, shown, things):
    """The last three of ANSWER_PARTS, in a row, of a scene with `object_places` shown: where the gripper and `things`, two labels, are in each picture, how far it
    is opened, and, in a clip, how far it moves."""
    numbers, number = np.full((MOST_PICTURES, 3, 3), np.nan, np.float32), min(len(shown), MOST_PICTURES)
    numbers[:number, 0] = scene["gripper"][:number, :3]
    for i, name in enumerate(things, start=1):
        numbers[:number, i] = shown[:number, corpora.CLASSES.index(name)]
    opening = np.full(MOST_PICTURES, np.nan, np.float32)
    opening[:number] = scene["gripper"][:number, 3]
    ways = [np.linalg.norm(numbers[b, 0] - numbers[a, 0]) ** 0.5 if scene["things"] else np.nan for a, b in PAIRS]         # two cameras do not see one move
    return np.concatenate([numbers.ravel(), opening, np.array(ways, np.float32)])


class Option(NamedTuple):
    """One of the options of a question: the place of the first token that tells it from the others, its text, whether it is the answer, and its letter."""
    place: int
    text: str
    right: bool
    letter: str


def options(ids, labels, tokenizer):
    """The Options "A) ... B) ..." of all questions whose answer ends in a letter, in a row's tokens."""
    letters, bracket, close = letter_tokens(tokenizer)
    marks, found = [], []
    for i, token in enumerate(ids):
        if token == close and marks and labels[i] < 0:                                               # the question ends
            reply = next((j for j in range(i, len(ids)) if labels[j] == close), i) - 1
            spans = [range(mark + 2, end) for mark, end in zip(marks, [*marks[1:], i])]
            if ids[reply] in letters and labels[reply] >= 0 and all(spans):
                for mark, span in zip(marks, spans):
                    others = {ids[j] for other in spans if other != span for j in other}
                    place = next((j for j in span if ids[j] not in others), span[0])
                    found.append(Option(place, tokenizer.decode([ids[j] for j in span]).strip(), letters[ids[mark]] == letters[ids[reply]], letters[ids[mark]]))
            marks = []
        elif token in letters and ids[i + 1] == bracket and labels[i] < 0:
            marks.append(i)
    return found


@lru_cache(maxsize=2)
def letter_tokens(tokenizer):
    """{token: letter} of the letters before options, and the tokens of the bracket behind them and of a message's end."""
    spelled = [(tokenizer.encode(space + letter), letter) for letter in LETTERS for space in ("", " ")]
    return {ids[0]: letter for ids, letter in spelled if len(ids) == 1}, tokenizer.encode("A)")[-1], tokenizer.special["<|im_end|>"]


def picture_places(offsets):
    """(V, h, w, 3) offsets of objects from their patches' centres, with depth (m), to (V, h, w, 5): the same, then x and y in patches from the picture's centre."""
    rows_columns = np.indices(offsets.shape[1:3], np.float32) + 0.5
    lattice = np.stack([rows_columns[1] - offsets.shape[2] / 2, rows_columns[0] - offsets.shape[1] / 2], -1)
    return np.concatenate([offsets, offsets[..., :2] + lattice], -1)


def object_places(scene):
    """(V, C, 3) from a scene's dense targets: each object's centre in each picture, x and y in patches from the picture's centre, depth in decimetres minus 6;
    NaN where it does not show, or its centre is far outside."""
    classes, offsets = scene["patch_class"], scene["patch_offset"]
    located, found = (classes > 0) & (np.abs(offsets[..., :2]).max(-1) <= LARGEST_OFFSET), picture_places(offsets) * PLACE_SCALE
    places = np.full((len(classes), max(len(corpora.CLASSES), classes.max() + 1), 3), np.nan, np.float32)
    places[np.nonzero(located)[0], classes[located]] = found[located][:, [3, 4, 2]]
    return places


def named(text):
    """The objects that a text names, in order."""
    return re.findall("|".join(sorted(corpora.LABELS, key=len, reverse=True)), text)


def place_in(text):
    """(x, y) pixels of the first point, or of the centre of the first box, in an answer; None without."""
    found = re.search(r'"(?:point|bbox)_2d": \[(\d+(?:, \d+){1,3})\]', text)
    numbers = [] if found is None else [int(n) for n in found[1].split(", ")]
    return np.array(numbers, np.float32).reshape(-1, 2).mean(0) if len(numbers) in (2, 4) else None


def begins(learned):
    """(B, L) bool, True on answer tokens, to True on the first of each answer."""
    return learned & ~F.pad(learned, (1, 0))[:, :-1]


def answer_weights(learned):
    """(B, L) bool of answer tokens to (n,) of those: one over the root of their answer's length, as InternVL 2.5 (arXiv 2412.05271), or a box's thirty tokens
    would drown a colour's two."""
    number = begins(learned)[learned].cumsum(0) - 1
    return torch.bincount(number)[number] ** -0.5


# ---- heads and losses

class DenseHeads(nn.Module):
    """Linear layers: on the ViT's patches, on block k's image tokens (m x m patches each), and two on tokens of answers and options; `guess` calls them."""

    def __init__(self, config, num_classes):
        super().__init__()
        self.merge, self.num_classes = config.vision_config.spatial_merge_size, num_classes
        vision, text = config.vision_config.hidden_size, config.hidden_size
        self.vit = nn.Sequential(nn.LayerNorm(vision), nn.Linear(vision, num_classes + 3))
        self.llm = nn.Sequential(nn.LayerNorm(text), nn.Linear(text, self.merge ** 2 * (num_classes + 5)))
        self.answer = nn.ModuleList(nn.Sequential(nn.LayerNorm(text), nn.Linear(text, sum(ANSWER_PARTS))) for _ in range(2))

    def forward(self, patch_features, token_features, grid):
        """(P, D of the ViT) and (P / m², D) of pictures of one size, grid (t, h, w), to classes and places of each patch in raster order:
        [(P, C), (P, 3)] by the ViT, [(P, C), (P, 5)] by block k."""
        m, h, w = self.merge, grid[1] // self.merge, grid[2] // self.merge
        tokens = rearrange(self.llm(token_features), "(n h w) (a b c) -> (n h a w b) c", a=m, b=m, h=h, w=w)
        return [guess.tensor_split([self.num_classes], dim=1) for guess in (self.vit(patch_features), tokens)]


class Guesses(NamedTuple):
    """What the heads make of a batch; None for what it has no targets for."""
    patches: list | None           # what DenseHeads returns
    answers: list | None           # (m, sum of ANSWER_PARTS) of the m tokens with an answer_place_weight, from two blocks below the top and from there


def guess(model, heads, batch, out, intent_layer):
    """Guesses from a VLMOutput, of k blocks only (no answers then) or of all."""
    patches = answers = None
    if "patch_class" in batch:
        number = len(batch["patch_class"])
        tokens = out.hidden_states[intent_layer][batch["input_ids"] == model.config.image_token_id][:number // heads.merge ** 2]
        patches = heads(out.patch_features[:number], tokens, batch["image_grid_thw"][0].tolist())
    if "answer_place" in batch and out.logits is not None:
        chosen, below = batch["answer_place_weight"] > 0, out.hidden_states[max(intent_layer, model.config.num_hidden_layers - 2)]
        answers = [head(hidden[chosen]) for head, hidden in zip(heads.answer, (below, out.hidden_states[-1]))]
    return Guesses(patches, answers)


def count(batch):
    """What `losses` of a step are divided by, this batch's share: patches by weight, patches with a place, for each of ANSWER_PARTS the tokens that have it, by
    weight."""
    shown, located = batch.get("patch_class", torch.zeros(0)), batch.get("patch_located", torch.zeros(0))
    placed = [0.0] * len(ANSWER_PARTS)
    if "answer_place" in batch:
        placed = [float((batch["answer_place_weight"] * part.isfinite().any(-1)).sum()) for part in batch["answer_place"].split(ANSWER_PARTS, -1)]
    return [float((shown > 0).sum() + NOTHING_WEIGHT * (shown == 0).sum()), float(located.sum()), *placed]


def losses(heads, batch, guesses, totals):
    """A batch's share of a step's losses, by name: classes' cross-entropy + smooth L1 of places, twice; smooth L1 of what answers and options know, logistic of
    right and wrong, each part a mean."""
    found = {}
    if guesses.patches:
        located, weight = batch["patch_located"], torch.ones(heads.num_classes, device=batch["patch_class"].device)
        weight[0] = NOTHING_WEIGHT
        truth = batch["patch_place"][located] * torch.tensor(PLACE_SCALE, device=weight.device)
        for name, (shown, place) in zip(LOSSES, guesses.patches):
            what = F.cross_entropy(shown, batch["patch_class"], weight, reduction="sum") / totals[0]
            where = F.smooth_l1_loss(place[located], truth[:, :place.shape[1]], reduction="sum", beta=0.1) / totals[1]
            found[name] = what + where
    if guesses.answers:
        chosen = batch["answer_place_weight"] > 0
        truth, weight = batch["answer_place"][chosen], batch["answer_place_weight"][chosen]
        known, error = truth.isfinite(), 0
        for place in guesses.answers:
            aim = torch.where(known, truth, place)
            far = F.smooth_l1_loss(place, aim, reduction="none", beta=0.1)
            unsure = known * F.softplus(-place * aim)                                                # logistic: half a hint is worth something, which L1 denies
            error = error + torch.cat([far[:, :RIGHT], unsure[:, RIGHT:RIGHT + 1], far[:, RIGHT + 1:]], dim=1)
        parts = [part.sum(-1) / there.sum(-1).clamp(min=1) for part, there in zip(error.split(ANSWER_PARTS, -1), known.split(ANSWER_PARTS, -1))]
        found["answer_place"] = ANSWER_PLACE_WEIGHT * sum(weight @ part / total for part, total in zip(parts, totals[2:]))
    return found


def errors(batch, guesses, kind, patch):
    """[(figure's name, values)] of a validation batch: shares that are right, errors in pixels and cm. kind: of the rows, for the names; patch: pixels."""
    found = []
    if guesses.answers:
        chosen = batch["answer_place_weight"] > 0
        truth, place = batch["answer_place"][chosen], guesses.answers[-1]
        error, option = (place - truth)[:, :2].norm(dim=-1) * patch, truth[:, RIGHT].isfinite()
        found += [("answer_place_error_px", error[error.isfinite()]), (f"option_{kind}", (place[option, RIGHT].sign() == truth[option, RIGHT]).float())]
    if guesses.patches:
        shows, located = batch["patch_class"] > 0, batch["patch_located"]
        for name, (shown, place) in zip(("vit", "llm"), guesses.patches):
            hit, size = shown.argmax(-1) == batch["patch_class"], place.shape[1]
            error = place[located] / torch.tensor(PLACE_SCALE[:size], device=place.device) - batch["patch_place"][located, :size]
            found += [(f"patch_accuracy_{name}", hit.float()), (f"object_accuracy_{name}", hit[shows].float()), (f"centre_error_px_{name}", error[:, :2].norm(dim=-1) * patch),
                      (f"depth_error_cm_{name}", error[:, 2].abs() * 100)] + [(f"place_error_px_{name}", error[:, 3:].norm(dim=-1) * patch)] * (size > 3)
    return found
