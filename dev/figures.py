"""Figures, each from a result file, a log or the shipped weights.

    python -m dev.figures success      success in every cell, as a heat map
    python -m dev.figures digital      accuracy by category, with chance and noise for images
    python -m dev.figures told         which of a scene's commands is done, with the controls
    python -m dev.figures replay       predicted and recorded actions, a panel per joint and robot
    python -m dev.figures losses       losses over the steps of a training, from its log.jsonl
    python -m dev.figures intent       where the intent queries attend in both images
    python -m dev.figures denoising    noise becoming a chunk of joint targets in four Euler steps
    python -m dev.figures mosaic       an episode of every robot and task at once, as a GIF

Needs requirements-dev.txt.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from unittest import mock

import matplotlib

matplotlib.use("agg")  # needs no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from cli import UserError, choose, parse, run
from data.env import CONTROL_HZ, VIEWS, TabletopEnv
from data.tasks import TASKS
from files import atomic, read_json, read_text, reading
from model import BLM
from policy import Attention
from rollout import robots_of, rollout, save_gif

SEED = 1_000_001  # layout of the scenes shown
COLORS = {"chance": "#bbbbbb", "blind": "#d08770", "base": "#e0b84c", "model": "#4c8c5c"}
TOLD = {
    "done": ("commands done", "#4c8c5c"),
    "pairs": ("both of a scene", "#8fb996"),
    "new_combination": ("never trained", "#e0b84c"),
    "neutral": ("told nothing useful", "#bbbbbb"),
    "other": ("did the other one", "#d08770"),
}
LOSSES = ("loss", "answer", "flow", "future")
TILE = 144  # pixels, side of a tile in the mosaic
SMOOTH = 0.02  # width of the running mean, as a share of the run


@dataclass
class FigureConfig:
    source: str = (
        ""  # result file or log; default results/<figure>.json, for losses out/*/log.jsonl
    )
    weights: str = "weights/nano"  # model folder, for intent, denoising and mosaic
    out: str = ""  # image file; default assets/<figure>.png, for the mosaic .gif


# ---- from result files


def success(config):
    """The table of cells: red is 0%, green 100%; below each rate its 95% interval."""
    path = config.source or "results/physical.json"
    with reading(path, "make it with `python eval.py physical`"):
        cells = read_json(path)["cells"]
        tasks = list(next(iter(cells.values())))
        rates = np.array([[row[task]["success"] for task in tasks] for row in cells.values()])
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(cells) + 0.6))
    axes.imshow(rates, cmap="RdYlGn", vmin=-0.1, vmax=1.2, aspect="auto")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(cells)), cells)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for i, row in enumerate(cells.values()):
        for j, task in enumerate(tasks):
            low, high = row[task]["interval"]
            text = f"{100 * row[task]['success']:.0f}\n"
            axes.text(j, i + 0.12, text, ha="center", va="center", fontsize=12)
            axes.text(j, i + 0.27, f"{100 * low:.0f} to {100 * high:.0f}", ha="center", fontsize=7)
    return figure


def digital(config):
    """Bars for each category of every file; those of the model have the 95% interval."""
    path = config.source or "results/digital.json"
    with reading(path, "make it with `python eval.py digital`"):
        rows = {}
        for table in read_json(path)["files"].values():
            rows |= table["categories"]
        names = [name for name in COLORS if any(name in row for row in rows.values())]
        intervals = np.array([row["interval"] for row in rows.values()]).T
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(rows) + 0.8))
    places = np.arange(len(rows))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        rates = np.array([row.get(name, 0.0) for row in rows.values()])
        error = None
        if name == "model":
            error = np.clip([rates - intervals[0], intervals[1] - rates], 0, 1)
        axes.barh(places + i * height, rates, height, xerr=error, color=COLORS[name], label=name)
    axes.set_yticks(places + 0.4 - height / 2, rows)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("right")
    axes.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return figure


def told(config):
    """Bars for each family of scenes: commands and pairs done, then the controls."""
    path = config.source or "results/told.json"
    with reading(path, "make it with `python eval.py told`"):
        families = read_json(path)["families"]
        rates = {
            name: [[figures[bar][key] for bar in TOLD] for figures in families.values()]
            for name, key in (("rate", "rate"), ("interval", "interval"))
        }
    heights = np.array(rates["rate"], float)  # (families, bars)
    ends = np.array(rates["interval"])  # (families, bars, 2)
    figure, axes = plt.subplots(figsize=(9, 3.2))
    width = 0.8 / len(TOLD)
    for i, (bar, (label, color)) in enumerate(TOLD.items()):
        error = np.abs(ends[:, i].T - heights[:, i])
        places = np.arange(len(families)) + i * width
        axes.bar(places, heights[:, i], width, yerr=error, color=color, label=label)
    axes.set_xticks(np.arange(len(families)) + 0.4 - width / 2, families)
    axes.set_ylim(0, 1)
    axes.legend(ncols=len(TOLD), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return figure


def replay(config):
    """A row of panels per robot: the recorded actions, and the policy's chunks, concatenated."""
    path = config.source or "results/replay.json"
    with reading(path, "make it with `python eval.py replay`"):
        robots = read_json(path)["robots"]
        most = max(len(robot["joints"]) for robot in robots.values())
    size = (2.2 * most, 2.0 * len(robots))
    figure, grid = plt.subplots(
        len(robots), most, figsize=size, squeeze=False, layout="constrained"
    )
    for row, (name, robot) in zip(grid, robots.items()):
        recorded = np.array(robot["recorded"])  # (L, A)
        predicted = np.concatenate(robot["chunks"])
        for axes in row[len(robot["joints"]) :]:
            axes.axis("off")
        for i, (axes, joint, unit) in enumerate(zip(row, robot["joints"], robot["units"])):
            axes.plot(recorded[:, i], color="#bbbbbb", label="recorded")
            axes.plot(predicted[:, i], color=COLORS["model"], label="predicted")
            axes.set_title(joint, fontsize=8)
            axes.set_ylabel(unit, fontsize=7)
            axes.tick_params(labelsize=7)
        row[0].set_xlabel(f"control steps of {name}", fontsize=7)
    grid[0, 0].legend(fontsize=6, frameon=False)
    return figure


def losses(config):
    """A panel per log: losses and their running means, on a logarithmic scale."""
    logs = config.source.split(",")
    if not config.source:
        logs = sorted(Path("out").glob("*/log.jsonl"))
    if not logs:
        raise UserError("no out/*/log.jsonl here: name a log with --source, or train first")
    figure, panels = plt.subplots(1, len(logs), figsize=(4.5 * len(logs), 3), squeeze=False)
    for axes, path in zip(panels[0], logs):
        with reading(path):
            lines = [json.loads(line) for line in read_text(path).splitlines()]
        for name in LOSSES:
            points = [(line["step"], line[name]) for line in lines if line.get(name, 0) > 0]
            if not points:
                continue
            steps, values = np.array(points).T
            width = max(1, int(SMOOTH * len(steps)))
            mean = np.convolve(values, np.ones(width) / width, "valid")
            drawn = axes.plot(steps[width - 1 :], mean, label=name)
            axes.plot(steps, values, color=drawn[0].get_color(), alpha=0.2, linewidth=0.5)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_title(Path(path).parent.name)
        axes.legend(frameon=False)
    return figure


# ---- from weights


def look(config, robot, task):
    """(model, an observation of a scene)."""
    blm = BLM.from_pretrained(config.weights)
    env = TabletopEnv(robot, task)
    observation, _ = env.reset(SEED)
    env.close()
    return blm, observation


@torch.no_grad()
def attention_to_patches(blm, observation):
    """Attention of the intent queries, per view: (rows, columns) of merged patches; sums to 1.

    The mean over queries, heads and the Perceiver's layers.
    """
    pictures = [observation["images"][view] for view in VIEWS]
    k = blm.policy.config.intent_layer
    instruction = observation["instruction"]
    hidden, mask = blm.intent_states([pictures], [instruction], k)
    weights = []

    def watch(attention, inputs):
        x, (keys, _), _ = inputs
        B, N, D = x.shape
        heads = keys.shape[1]
        q = attention.query(x).view(B, N, heads, D // heads).transpose(1, 2)  # (B, H, N, d)
        scores = q @ keys.transpose(2, 3) / (D // heads) ** 0.5  # (B, H, N, L)
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        weights.append(scores.softmax(-1).mean((0, 1, 2)))  # (L,)

    layers = [part for part in blm.policy.perceiver.modules() if isinstance(part, Attention)]
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    blm.policy.intent(hidden, mask)
    for hook in hooks:
        hook.remove()

    prompt = blm.processor.prompt([pictures], [instruction])
    shown = prompt["input_ids"][0] == blm.vlm.config.image_token_id
    places = torch.stack(weights).mean(0)[shown.nonzero()[:, 0]]
    places = places / places.sum()  # leave out attention to words and separators
    merge = blm.processor.image.merge_size
    maps = []
    for grid in prompt["image_grid_thw"].tolist():
        rows, columns = grid[1] // merge, grid[2] // merge
        maps.append(places[: rows * columns].view(rows, columns).numpy())
        places = places[rows * columns :]
    return maps


def intent(config):
    """Both images of three scenes, brighter where the intent queries attend."""
    scenes = [("panda", "StackCube"), ("xarm7", "LiftPegUpright"), ("widowx", "PlaceSphere")]
    figure, panels = plt.subplots(2, len(scenes), figsize=(2.6 * len(scenes), 5.4))
    for column, (robot, task) in enumerate(scenes):
        blm, observation = look(config, robot, task)
        maps = attention_to_patches(blm, observation)
        top = max(part.max() for part in maps)
        for axes, view, part in zip(panels[:, column], VIEWS, maps):
            picture = observation["images"][view]
            scale = picture.shape[0] // part.shape[0]
            light = np.kron(part / top, np.ones((scale, scale)))[..., None]
            axes.imshow((picture * (0.2 + 0.8 * light)).astype(np.uint8))
            axes.set_title(f"{view}: {part.sum():.0%}", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
        panels[1, column].set_xlabel(fill(observation["instruction"], 32), fontsize=8)
    return figure


def denoising(config):
    """Joint targets over a chunk, from noise to the result of `act`."""
    robot = "widowx"
    blm, observation = look(config, robot, "PickCube")
    policy = blm.policy
    states = []
    sampled = policy.velocity

    def watch(noised, *rest):
        states.append(noised)
        return sampled(noised, *rest)

    with mock.patch.object(policy, "velocity", watch):
        chunk = blm.act(observation, robot, temperature=1.0, seed=0)
    row = torch.tensor([list(policy.embodiments).index(robot)])
    state = torch.zeros(1, policy.state_dim)
    state[0, : len(observation["state"])] = torch.as_tensor(observation["state"])
    chunks = [policy.normalizer.unnormalize(noised, state, row)[0].numpy() for noised in states]
    chunks.append(chunk)
    joints = policy.normalizer.relative_mask[row[0]].nonzero()[:, 0].tolist()
    seconds = np.arange(1, len(chunk) + 1) / CONTROL_HZ
    figure, panels = plt.subplots(1, len(chunks), figsize=(2 * len(chunks), 2.6), sharey=True)
    for step, (axes, part) in enumerate(zip(panels, chunks)):
        axes.plot(seconds, part[:, joints], linewidth=1)
        axes.set_title(f"tau = {step / (len(chunks) - 1):.2f}")
        axes.set_xlabel("s")
    panels[0].set_ylabel("joint targets, rad")
    return figure


def mosaic(config):
    """One episode of every robot (rows) and task (columns), side by side: frames for a GIF.

    A bar below a finished tile: green for success, red for failure.
    """
    blm = BLM.from_pretrained(config.weights)
    robots = robots_of(blm, "all")
    tiles = []
    for robot in robots:
        for task in TASKS:
            env = TabletopEnv(robot, task, render=False, wordings="held_out")
            result = rollout(blm, env, SEED, frame_size=TILE)
            env.close()
            print(f"{robot:8s}{task:16s}{result['reason'] or 'success'}")
            *pictures, last = result["frames"]
            last = last.copy()  # copy: the renderer reuses its memory
            last[-5:] = (0, 130, 0) if result["success"] else (180, 0, 0)
            tiles.append([*pictures, last])
    frames = []
    for i in range(max(map(len, tiles))):
        now = [pictures[min(i, len(pictures) - 1)] for pictures in tiles]  # finished tiles wait
        grid = np.stack(now).reshape(len(robots), len(TASKS), TILE, TILE, 3)
        grid = grid.swapaxes(1, 2).reshape(len(robots) * TILE, len(TASKS) * TILE, 3)
        frames.append(Image.fromarray(grid))
    return frames


FIGURES = {
    f.__name__: f for f in (success, digital, told, replay, losses, intent, denoising, mosaic)
}


def main():
    name = sys.argv[1] if sys.argv[1:] else ""
    if name in ("-h", "--help"):
        print(__doc__)
        return
    draw = FIGURES[choose(name, FIGURES, "figure")]
    config = parse(FigureConfig, description=__doc__.split("\n")[0], argv=sys.argv[2:])
    suffix = ".gif" if name == "mosaic" else ".png"
    out = Path(config.out or f"assets/{name}{suffix}")
    figure = draw(config)
    if name == "mosaic":
        save_gif(out, figure)
    else:
        with atomic(out) as temporary:
            figure.savefig(temporary, dpi=100, bbox_inches="tight")
        plt.close(figure)
    print(f"drawn in {out}")


if __name__ == "__main__":
    run(main)
