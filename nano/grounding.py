"""Auxiliary targets of nano's Stage I, besides the answers: in every image and at every answer.

A model of 5 M parameters that starts from scratch hardly learns to see from the few words of the
answers. So linear heads, which exist only in training, predict

* what each patch shows and where that object's center is: from the ViT, and from the hidden states
  of block k, which the policy will read. Rotary positions tell a patch only where others are
  relative to it; the second head also predicts its position in the image, which answers need.
* from the tokens of an answer, what it depends on: where the gripper and the objects in question
  are in each image, how far the gripper is open, how far it moves from one image to another. Digits
  follow soon after, and so do comparisons, which are hardly learned otherwise. Predicted at the top
  and two blocks below, so that those two blocks have something to compare.
* from each option of a choice, its letter and whether it is the answer.
* from the hidden states of block k, if a command precedes the images (commands.py), which patches
  show the object to move and its destination; from the last token, the positions of both.

Input: rows whose records have "grounding" (scenes.py) and questions (questions.py). A place is x
and y in patches from the image's center, and depth in decimeters minus 6, so that errors are of
similar size. NaN marks what is unknown, which is left out of the losses. Letters: P patches of all
images, C classes, N tokens of answers and options.
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from cli import UserError
from data.env import VIEWS
from nano.questions import LETTERS
from nano.scenes import CLASSES, GRID, PATCH

C = len(CLASSES)
NOTHING_WEIGHT = 0.25  # most patches show nothing
UNKNOWN = -100  # class that is left out of the loss
LARGEST_OFFSET = 4.0  # patches: centers beside or behind the camera project to hundreds
PICTURES = 4  # most images in a scene
PAIRS = list(itertools.combinations(range(PICTURES), 2))
# The numbers that a token predicts: x, y of what its answer or option refers to; for an option
# whether it is right (1) or wrong (-1), and its letter; places of the gripper and of two objects in
# each image; the gripper's opening there; the square root of its motion from each image to each
# later one.
PARTS = [2, 2, PICTURES * 3 * 3, PICTURES, len(PAIRS)]
NUMBERS = sum(PARTS)
RIGHT = 2  # index among them
LETTER = 3  # -2 for A, and so on
MOMENTS = 4  # from this index on
ANSWER_WEIGHT = 0.3  # for each part, relative to the answer's loss; with 1 they dominate it
L1 = {"beta": 0.1}  # a tenth of a patch, or a centimeter, is close enough for the square
CELLS = itertools.product(range(GRID), repeat=2)
ROW_TARGETS = ("patch_class", "patch_place", "patch_role", "last_token", "command_place")
ANSWER_TARGETS = ("answer_token", "answer_number", "answer_weight")
ROLES = 3  # of a patch for a command: neither, object to move, destination
LATTICE = np.array([(x + 0.5, y + 0.5) for y, x in CELLS]) - GRID / 2  # (64, 2), patch positions


# ---- targets


def to_place(numbers):
    """x, y in pixels, and depth in m if given, as a place."""
    x, y, *depth = numbers
    place = [x / PATCH - GRID / 2, y / PATCH - GRID / 2]
    return place + [10 * meters - 6 for meters in depth]  # 0.6 m is the middle of the scene


def to_classes(letters):
    """[0 for A, 1 for B, ...], the classes of patches."""
    return [ord(letter) - ord("A") for letter in letters]


class Scene:
    """The grounding of a record as arrays; all NaN without one.

    classes (V, 64), what patches show; offsets (V, 64, 5), for each patch the center of what it
    shows, relative to the patch, and the place of that center; gripper (PICTURES, 3) and opening
    (PICTURES,), visible or not; centers (PICTURES, C, 3), places of objects that are visible near
    their center.
    """

    def __init__(self, grounding, V):
        self.clip = V > len(VIEWS)  # four moments from one camera, not one moment from two
        self.classes = np.full((PICTURES, GRID**2), UNKNOWN)
        self.opening = np.full(PICTURES, np.nan)
        centers = np.full((PICTURES, C, 3), np.nan)
        for v, picture in enumerate(grounding or []):
            self.classes[v] = to_classes(picture["patches"])
            self.opening[v] = picture["opening"]
            for label, numbers in picture["objects"].items():
                centers[v, CLASSES.index(label)] = to_place(numbers)
        known = self.classes.clip(0)  # a valid index even where the class is unknown
        center = np.take_along_axis(centers, known[..., None], axis=1)  # (PICTURES, 64, 3)
        offset = center[..., :2] - LATTICE
        # NaN is not near
        near = np.abs(offset).max(-1) <= LARGEST_OFFSET
        depth_first = np.roll(center, 1, axis=-1)
        offsets = np.concatenate([offset, depth_first], axis=-1)
        offsets[~near] = np.nan
        self.offsets = offsets[:V]
        self.gripper = centers[:, 1].clip(-GRID, GRID)  # it may be outside the image
        # only of objects that some patch shows
        self.centers = np.full_like(centers, np.nan)
        v, _ = np.nonzero(near)
        self.centers[v, known[near]] = center[near]
        self.classes = self.classes[:V]

    def moments(self, labels):
        """The last three of PARTS, for an answer about `labels`."""
        places = np.full((PICTURES, 3, 3), np.nan)  # of gripper, first and second object
        places[:, 0] = self.gripper
        for i, label in enumerate(labels[:2], start=1):
            places[:, i] = self.centers[:, CLASSES.index(label)]
        ways = np.full(len(PAIRS), np.nan)
        if self.clip:  # two cameras show no motion
            steps = [self.gripper[b] - self.gripper[a] for a, b in PAIRS]
            ways = np.linalg.norm(steps, axis=1) ** 0.5  # the root: small motions count more
        return np.concatenate([places.ravel(), self.opening, ways])

    def find(self, place):
        """x and y of a label in the first image, or of [x, y] in pixels."""
        if isinstance(place, list):
            return to_place(place)
        return self.centers[0, CLASSES.index(place or "nothing"), :2]  # "nothing" is nowhere: NaN


def option_tokens(ids, options, tokenizer):
    """For each option the index in ids of the first token that tells it from the others."""
    spans = []
    for letter, option in zip(LETTERS, options):
        head = tokenizer.encode(f" {letter})")
        # BPE pieces start at the space, letter and bracket, so the question has the same tokens
        text = list(tokenizer.encode(f" {letter}) {option}"))
        start = 0
        while ids[start : start + len(text)] != text:
            start += 1
            assert start < len(ids), f"the question lacks {letter}) {option}"
        spans.append(range(start + len(head), start + len(text)))
    tokens = []
    for span in spans:
        others = [ids[i] for other in spans if other is not span for i in other]
        telling = [i for i in span if ids[i] not in others]
        first = (telling or span)[0]  # two options may be equal
        tokens.append(first)
    return tokens


def question_targets(question, scene, ids, labels, tokenizer):
    """(tokens, numbers (N, NUMBERS), weights) for a question with these ids and labels.

    First the tokens that predict the answer, then one token of each option of a choice.
    """
    tokens = [i - 1 for i, label in enumerate(labels) if label >= 0]  # token i predicts i + 1
    count = len(tokens)
    # one over the root of the answer's length, as for its loss: a box would outweigh a color
    weights = [count**-0.5] * count
    options = question["options"] if question["form"] == "choice" else []
    tokens += option_tokens(ids, options, tokenizer)
    weights += [1.0] * len(options)
    numbers = np.full((len(tokens), NUMBERS), np.nan)
    numbers[:count, :RIGHT] = scene.find(question.get("place"))
    for i, option in enumerate(options):
        row = numbers[count + i]
        if option in CLASSES:
            row[:RIGHT] = scene.find(option)
        right = question["answer"].endswith(LETTERS[i])
        row[RIGHT] = 1 if right else -1
        row[LETTER] = i - 2
    numbers[:, MOMENTS:] = scene.moments(question.get("labels", []))
    return tokens, numbers, weights


def command_targets(command, V):
    """(roles (V, 64), places (2, 6)) of a row's command; unknown and NaN for a row without one.

    The last three numbers of a place are its position in the robot's frame, in decimeters: the
    front camera is not always at the same place, and the motion must not depend on it.
    """
    roles = np.full((V, GRID**2), UNKNOWN)
    places = np.full((2, 6), np.nan)
    if command:
        for v, letters in enumerate(command["roles"]):
            roles[v] = to_classes(letters)
        for i, place in enumerate(command["places"]):
            places[i, :3] = to_place(place) if place else np.nan
        for i, point in enumerate(command.get("points", [])):  # older scenes have none
            places[i, 3:] = 10 * np.array(point) if point else np.nan
    return roles, places


def end_to_end(names, parts):
    """{name: tensor} from tuples of arrays, concatenated by position in the tuple."""
    tensors = {}
    for name, arrays in zip(names, zip(*parts)):
        tensor = torch.from_numpy(np.concatenate(arrays))
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


# ---- heads and losses


def weight_of(classes):
    """Total weight of patches with these classes."""
    return (classes > 0).sum() + NOTHING_WEIGHT * (classes == 0).sum()


def what_and_where(classes, places, true_classes, true_places, totals):
    """Cross-entropy of patch classes, and smooth L1 of the known places."""
    weight = torch.ones(classes.shape[1], device=classes.device)
    weight[0] = NOTHING_WEIGHT
    what = F.cross_entropy(classes, true_classes, weight, reduction="sum")
    known = true_places.isfinite()
    where = F.smooth_l1_loss(places[known], true_places[known], **L1, reduction="sum")
    return what / totals[0] + where / totals[1]


def pixels_between(places, true_places):
    """(n,) distances in pixels between predicted and known places."""
    ways = places[..., :2] - true_places[..., :2]
    pixels = ways.norm(dim=-1) * PATCH
    return pixels[pixels.isfinite()]


class Grounding(nn.Module):
    """Heads on the ViT's patches, on block k's image tokens, and on tokens of answers and options.

    They need the first k = intent_layer blocks, and all blocks where rows have answers. With
    pictures_only no row has any.
    """

    def __init__(self, config, tokenizer, intent_layer, pictures_only=False):
        super().__init__()
        self.tokenizer = tokenizer
        self.image_token = config.image_token_id
        self.merge = config.vision_config.spatial_merge_size
        self.intent_layer = intent_layer
        self.pictures_only = pictures_only
        self.names = ["patches_vit", "patches_llm", "commands"]
        if not pictures_only:
            self.names.append("answers")
        # a block that still has blocks above it for comparisons
        self.below = max(intent_layer, config.num_hidden_layers - 2)

        def head(width, numbers):
            return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, numbers))

        # both predict relative places; only block k also predicts places in the image
        self.vit = head(config.vision_config.hidden_size, C + 3)
        self.llm = head(config.hidden_size, self.merge**2 * (C + 5))
        self.role = head(config.hidden_size, self.merge**2 * ROLES)
        self.place = head(config.hidden_size, 2 * 6)
        self.answer = nn.ModuleList([head(config.hidden_size, NUMBERS) for _ in range(2)])

    def load(self, tensors):
        """Load the heads of an earlier stage, which may know fewer classes and no commands.

        The rest keeps its random weights: new classes are only ever appended.
        """
        weights = self.state_dict()
        for name, tensor in tensors.items():
            new = weights[name]
            if tensor.shape == new.shape:
                new.copy_(tensor)
                continue
            if name.startswith("place."):  # earlier stages had only places in the image
                new.unflatten(0, (2, 6))[:, :3] = tensor.unflatten(0, (2, 3))
                continue
            places = 3 if name.startswith("vit") else 5  # numbers after the classes
            groups = 1 if name.startswith("vit") else self.merge**2
            old = tensor.unflatten(0, (groups, -1))
            new = new.unflatten(0, (groups, -1))  # a view
            known = old.shape[1] - places
            new[:, :known] = old[:, :known]
            new[:, -places:] = old[:, -places:]

    def targets(self, rows, batch):
        """Targets for packed rows.

        patch_class (P,), patch_place (P, 5), of which the ViT predicts three, and patch_role (P,);
        last_token (rows,) and command_place (rows, 2, 6); answer_token (N,), answer_number
        (N, NUMBERS) and answer_weight (N,).
        """
        grids = batch.get("image_grid_thw", torch.zeros(0))
        if any(grid != [1, GRID, GRID] for grid in grids.tolist()):
            raise UserError(f"these heads need pictures of {GRID} x {GRID} patches")
        ids = batch["input_ids"][0].tolist()
        labels = batch["labels"][0].tolist()
        found = []  # for each row, or for each of its commands
        answers = [(np.zeros(0, int), np.zeros((0, NUMBERS)), np.zeros(0))]  # for each question
        stop = 0  # end of a row among the packed tokens
        segments = iter(batch["segments"])
        for row in rows:
            V = len(row.media)
            scene = Scene(row.record.get("grounding"), V)
            classes = scene.classes.ravel()
            offsets = scene.offsets.reshape(-1, 5)
            for command in row.record.get("commands") or [None]:
                lengths = next(segments)
                roles, places = command_targets(command, V)
                stop += sum(lengths)
                found.append((classes, offsets, roles.ravel(), [stop - 1], [places]))
            questions = row.record.get("questions", [])
            lengths = lengths[len(lengths) - len(questions) :]  # without the stem
            start = stop - sum(lengths)
            for question, length in zip(questions, lengths):
                own = slice(start, start + length)
                text = (ids[own], labels[own], self.tokenizer)
                tokens, numbers, weights = question_targets(question, scene, *text)
                answers.append((start + np.array(tokens), numbers, weights))
                start += length
        return {**end_to_end(ROW_TARGETS, found), **end_to_end(ANSWER_TARGETS, answers)}

    def count(self, batch):
        """The divisors of the losses.

        Weighted patches, patches near the center of what they show, weighted patches for a command,
        numbers in its places, and for each of PARTS the weighted tokens that predict it.
        """
        shares = [
            weight_of(batch["patch_class"]),
            batch["patch_place"][:, 0].isfinite().sum(),
            weight_of(batch["patch_role"]),
            batch["command_place"].isfinite().sum(),
        ]
        for part in batch["answer_number"].split(PARTS, 1):
            learns = part.isfinite().any(1)
            shares.append(batch["answer_weight"][learns].sum())
        return list(map(float, shares))

    def to_patches(self, tokens):
        """Numbers for image tokens (P / m², m² c) as numbers for their patches (P, c)."""
        m = self.merge
        sizes = {"a": m, "b": m, "h": GRID // m, "w": GRID // m}
        return rearrange(tokens, "(n h w) (a b c) -> (n h a w b) c", **sizes)

    def read_patches(self, out, batch):
        """{"vit", "llm"}: classes (P, C) and places (P, 3 or 5) of all patches in reading order."""
        if out.patch_features is None:  # text-only rows
            return {}
        images = batch["input_ids"] == self.image_token
        hidden = out.hidden_states[self.intent_layer]
        tokens = self.llm(hidden[images])  # (P / m², m² (C + 5))
        return {
            "vit": self.vit(out.patch_features).tensor_split([C], 1),
            "llm": self.to_patches(tokens).tensor_split([C], 1),
        }

    def read_answers(self, out, batch):
        """[(N, NUMBERS)] from two blocks below the top and from the top."""
        if out.logits is None or not len(batch["answer_token"]):
            return []
        hidden = out.hidden_states[self.below], out.hidden_states[-1]
        return [head(h[0, batch["answer_token"]]) for head, h in zip(self.answer, hidden)]

    def read_commands(self, out, batch):
        """Roles of patches (P, ROLES), and places (rows, 2, 6) from the last tokens."""
        hidden = out.hidden_states[self.intent_layer]
        images = batch["input_ids"] == self.image_token
        roles = self.role(hidden[images])
        places = self.place(hidden[0, batch["last_token"]])
        return self.to_patches(roles), places.unflatten(1, (2, 6))

    def losses(self, out, batch, totals):
        """A batch's shares of the step's losses, by name.

        Cross-entropy of classes and smooth L1 of places, from the ViT and from block k; smooth L1
        of what answers and options predict, logistic loss for right and wrong.
        """
        # zero if there is nothing to learn: all processes must return the same names
        losses = dict.fromkeys(self.names, out.hidden_states[0].new_zeros(()))
        if out.patch_features is not None:
            truth = batch["patch_role"], batch["command_place"]
            read = self.read_commands(out, batch)
            losses["commands"] = what_and_where(*read, *truth, totals[2:])
        for name, read in self.read_patches(out, batch).items():
            _, places = read
            truth = batch["patch_class"], batch["patch_place"][:, : places.shape[1]]
            losses[f"patches_{name}"] = what_and_where(*read, *truth, totals)
        known = batch["answer_number"].isfinite()
        truth = batch["answer_number"].nan_to_num()
        for read in self.read_answers(out, batch):
            error = F.smooth_l1_loss(read, truth, **L1, reduction="none")  # (N, NUMBERS)
            # logistic: L1 would not reward a partial hint
            error[:, RIGHT] = F.softplus(-read[:, RIGHT] * truth[:, RIGHT])
            error = error * known
            parts = zip(error.split(PARTS, 1), known.split(PARTS, 1), totals[4:])
            for part, there, total in parts:
                mean = part.sum(1) / there.sum(1).clamp(min=1)  # (N,)
                share = (mean * batch["answer_weight"]).sum() / total
                losses["answers"] = losses["answers"] + ANSWER_WEIGHT * share
        return losses

    def figures(self, out, batch):
        """Figures for validation rows: accuracies, and errors in pixels; {name: values}."""
        figures = {}
        shows = batch["patch_class"] > 0
        for name, (classes, places) in self.read_patches(out, batch).items():
            hit = classes.argmax(1) == batch["patch_class"]
            figures[f"center_error_px_{name}"] = pixels_between(places, batch["patch_place"])
            figures[f"object_accuracy_{name}"] = hit[shows].float()
        if out.patch_features is not None:
            roles, places = self.read_commands(out, batch)
            hit = roles.argmax(1) == batch["patch_role"]
            meant = batch["patch_role"] > 0
            figures["role_accuracy"] = hit[meant].float()
            figures["command_error_px"] = pixels_between(places, batch["command_place"])
            far = (places - batch["command_place"])[..., 3:].norm(dim=-1) * 10
            figures["command_error_cm"] = far[far.isfinite()]
        for read in self.read_answers(out, batch)[1:]:  # only the head at the top
            truth = batch["answer_number"]
            figures["answer_error_px"] = pixels_between(read, truth)
            option = truth[:, RIGHT].isfinite()
            right = read[option, RIGHT] * truth[option, RIGHT] > 0
            figures["option_accuracy"] = right.float()
        return figures
