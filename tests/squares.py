"""Twelve scenes with one colored square each, as nano/scenes.py writes them: for tests."""

import json

import numpy as np
from PIL import Image

from nano.scenes import CLASSES, checksum

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def questions_of(i):
    """Three questions about scene i: two of one kind, and one that is nine times rarer."""
    label = f"{list(COLORS)[i % 3]} cube"
    place = [i * 3 % 8 * 16 + 8, i * 5 % 8 * 16 + 8]
    point = json.dumps({"point_2d": place, "label": label})
    same = {"chance": 0.0, "held_out": False, "labels": [label]}
    truth = "yes" if i % 3 == 0 else "no"
    return [
        {"question": "What do you see?", "answer": f"a {label}", "category": "existence", "form": "words"},
        {"question": f"Point to the {label}.", "answer": point, "category": "point", "form": "point", "place": place},
        {"question": "Is it red?", "answer": truth, "category": "attribute", "form": "yes/no", "about": "red"},
    ], same  # fmt: skip


def scene_of(i):
    """(images, record) of scene i: the square fills one patch, its center is slightly off."""
    label = f"{list(COLORS)[i % 3]} cube"
    row, column = i * 5 % 8, i * 3 % 8
    image = np.full((128, 128, 3), 128, np.uint8)
    image[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = COLORS[label.split()[0]]
    patches = ["A"] * 64
    patches[row * 8 + column] = chr(ord("A") + CLASSES.index(label))
    center = [16 * (column + 0.5 + 0.2), 16 * (row + 0.5 - 0.3), 0.6 + 0.05 * (i % 3)]
    grounding = {
        "patches": "".join(patches),
        "objects": {"gripper": [64.0, 64.0, 0.6], label: center},
        "opening": 0.0,
    }
    questions, same = questions_of(i)
    views = 1 + i % 2
    record = {
        "images": [f"train/{i}-{view}.png" for view in range(views)],
        "questions": [question | same for question in questions],
        "grounding": [grounding] * views,
        "robot": "panda",
        "task": "PickCube",
    }
    return [image] * views, record


def write_squares(folder, count=12):
    """A folder of scenes; those of validation are the same."""
    lines = []
    for i in range(count):
        images, record = scene_of(i)
        lines.append(json.dumps(record) + "\n")
        for name, image in zip(record["images"], images):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / name)
    return write_lines(folder, lines)


def write_lines(folder, lines):
    """These lines as both splits of a folder of scenes, with their checksums."""
    made = {"scenes": len(lines), "seed": 0, "checksums": {}}
    for split in ("train", "val"):
        path = folder / f"{split}.jsonl"
        path.write_text("".join(lines))
        made["checksums"][path.name] = checksum(path)
    (folder / "made.json").write_text(json.dumps(made))
    return folder
