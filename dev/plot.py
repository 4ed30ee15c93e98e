"""Pictures of results, for people who would rather look than read: drawn with Pillow, since nothing else is installed."""
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from files import atomic

COLOURS = ("#4c8c5c", "#c8553d", "#3d6fb4", "#b8860b", "#7d5ba6", "#555555")


def save(image, path):
    with atomic(path) as temporary:
        image.save(temporary)


def curves(log, path, wide=900, high=420, left=70, smooth=0.05):
    """The losses of a log.jsonl over its steps, on a logarithmic scale: thin as they came, thick as a running mean over `smooth` of the run."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    names = [name for name in ("loss", "answer", "flow", "dense_llm", "future") if sum(name in line for line in lines) > 1]
    series = {name: np.array([(line["step"], line[name]) for line in lines if 0 < line.get(name, 0) < math.inf]) for name in names}
    series = {name: points for name, points in series.items() if len(points) > 1}
    image = Image.new("RGB", (wide, high), "white")
    if series:
        draw, last = ImageDraw.Draw(image), max(points[-1, 0] for points in series.values())
        low, high_ = (f(np.log10(points[:, 1]).__getattribute__(g)() for points in series.values()) for f, g in ((min, "min"), (max, "max")))
        x = lambda step: left + (wide - left - 20) * step / last
        y = lambda value: 20 + (high - 60) * (high_ - np.log10(value)) / max(high_ - low, 1e-6)
        for tick in np.linspace(low, high_, 5):
            draw.line((left, y(10 ** tick), wide - 20, y(10 ** tick)), fill="#dddddd")
            draw.text((left - 8, y(10 ** tick)), f"{10 ** tick:.3g}", fill="black", anchor="rm", font_size=13)
        for tick in np.linspace(0, last, 6):
            draw.text((x(tick), high - 34), f"{tick:.0f}", fill="black", anchor="mt", font_size=13)
        for i, (name, points) in enumerate(series.items()):
            window = max(1, int(smooth * len(points)))
            mean = np.convolve(points[:, 1], np.ones(window) / window, "valid")
            draw.line([(x(s), y(v)) for s, v in points], fill=COLOURS[i], width=1)
            draw.line([(x(s), y(v)) for s, v in zip(points[window - 1:, 0], mean)], fill=COLOURS[i], width=3)
            draw.text((left + 120 * i, high - 18), name, fill=COLOURS[i], anchor="lm", font_size=15)
    save(image, path)


def heat_map(result, path, wide=118, high=44, left=84):
    """The table as a picture (PNG): red is 0%, green 100%; below each figure its 95% interval."""
    rows = result["cells"]
    tasks = list(next(iter(rows.values())))
    image = Image.new("RGB", (left + wide * len(tasks), high * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(image)
    for j, task in enumerate(tasks):
        draw.text((left + wide * (j + 0.5), high / 2), task, fill="black", anchor="mm", font_size=14)
    for i, (robot, row) in enumerate(rows.items(), start=1):
        draw.text((left / 2, high * (i + 0.5)), robot, fill="black", anchor="mm", font_size=14)
        for j, cell in enumerate(row.values()):
            x, y, p = left + wide * j, high * i, cell["success"]
            shade = tuple(int(a + (b - a) * q) for q in [2 * p if p < 0.5 else 2 * p - 1]
                          for a, b in zip(*(((215, 90, 80), (250, 235, 170)) if p < 0.5 else ((250, 235, 170), (90, 170, 100)))))
            draw.rectangle((x + 1, y + 1, x + wide - 2, y + high - 2), fill=shade)
            draw.text((x + wide / 2, y + 15), f"{100 * p:.0f}", fill="black", anchor="mm", font_size=16)
            draw.text((x + wide / 2, y + 32), "{:.0f} to {:.0f}".format(*(100 * x for x in cell["interval"])), fill="black", anchor="mm", font_size=11)
    save(image, path)


def bars(result, path, wide=900, row=44, left=110):
    """The digital table as a picture (PNG): a group of bars a category, the model's with its 95% interval."""
    colours = {"chance": "#bbbbbb", "blind": "#d08770", "base": "#e0b84c", "no_replay": "#3d6fb4", "model": "#4c8c5c"}
    names = [name for name in colours if name == "model" or f"{name}_mean" in result]
    image = Image.new("RGB", (wide, row * len(result["categories"]) + 40), "white")
    draw, x = ImageDraw.Draw(image), lambda p: left + p * (wide - left - 20)
    for i, name in enumerate(names):
        draw.text((left + 110 * i, 12), name, fill=colours[name], font_size=16)
    for i, (category, values) in enumerate(result["categories"].items()):
        top, each = 40 + row * i, (row - 6) / len(names)
        draw.text((left - 8, top + row / 2 - 3), category, fill="black", anchor="rm", font_size=14)
        for j, name in enumerate(names):
            draw.rectangle((left, top + each * j, x(values[name]), top + each * (j + 1) - 2), fill=colours[name])
        low, high = map(x, values["interval"])
        draw.line((low, top + each * (len(names) - 0.5) - 1, high, top + each * (len(names) - 0.5) - 1), fill="black", width=2)
    save(image, path)
