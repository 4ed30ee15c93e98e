"""Find problems in a LeRobotDataset before a night is spent on training.

`check` prints a table with a line per question: the first problem found, and how many more there
are. It also draws a contact sheet, for what no program sees: the wrong camera, a hand in the way.
Nothing is repaired. The bounds below tell a person where to look twice; they are not laws.

L frames of an episode, S and A numbers of state and action.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

from cli import UserError
from data.lerobot_read import names_of
from files import atomic

STILL = 0.02  # of a dimension's range in the dataset: less is not movement
IDLE = 1.0  # s without movement at the beginning
OFF = 0.1  # of a frame: tolerance for timestamps
FLAT = 1e-6  # a dimension that never changes by more is constant
EDGE = 0.005  # of a dimension's range: values this close to an end are at that end
OFTEN = 0.4  # of all frames at one end
BOTH = 0.1  # of all frames at the other end too: then it is a gripper, which opens and closes
LATE = 0.5  # s by which an action may precede the movement
TOGETHER = 0.3  # smallest correlation between changes of action and state
BLACK = 10.0  # of 255, mean of an image
FROZEN = 0.5  # of 255: images are the same if every pixel differs by less
FEW = 10  # episodes with one instruction
THUMB = 32  # pixels; side of the thumbnails that are compared
ROWS = 12  # episodes in the contact sheet
MOMENTS = 4  # images per camera and episode
TILE = 96  # pixels; height of an image in the contact sheet

# in the order of the printed table
QUESTIONS = (
    "numbers that are missing",
    "dropped or repeated frames",
    "timestamps not at the fps",
    "videos that do not match",
    "no instruction",
    "idle beginning",
    "black camera",
    "frozen camera",
    "constant number",
    "number at its limit",
    "action and movement",
    "few episodes",
)


# ---- one episode's numbers


def dropped_frames(recording):
    """What is wrong with the frame numbers; "" if they are 0, 1, 2 ..."""
    steps = np.diff(recording.frame)
    if recording.frame[0] != 0:
        return f"begins with frame {recording.frame[0]}"
    for place in np.flatnonzero(steps != 1)[:1]:
        return f"frame {recording.frame[place + 1]} follows {recording.frame[place]}"
    return ""


def late_frames(recording, fps):
    """Where a timestamp differs from frame number / fps; "" if nowhere."""
    off = np.abs(recording.timestamp * fps - recording.frame)
    for place in np.flatnonzero(~(off <= OFF))[:1]:
        return f"frame {recording.frame[place]} at {recording.timestamp[place]:.3f} s"
    return ""


def holes(recording):
    """Where a value of state or action is not finite; "" if nowhere."""
    for name in ("state", "action"):
        for frame, number in np.argwhere(~np.isfinite(getattr(recording, name)))[:1]:
            return f"{name} {number} at frame {frame}"
    return ""


def wordless(recording):
    """The first frame without an instruction, or the instructions if there are several; else ""."""
    for frame, task in enumerate(recording.tasks):
        if not (isinstance(task, str) and task.strip()):
            return f"frame {frame}"
    others = set(recording.tasks) - {recording.tasks[0]}
    return f"several in one episode: {', '.join(sorted(others))}" if others else ""


def first_movement(state, span):
    """The first frame (of L) whose state differs from that of frame 0; L if there is none."""
    moved = np.abs(state - state[0]) > STILL * span + FLAT
    frames = np.flatnonzero(moved.any(1))
    return int(frames[0]) if len(frames) else len(state)


# ---- one episode's images


def longest_freeze(thumbs, state, span):
    """(first frame, frames) of the longest time in which the image froze while the robot moved.

    thumbs (L, THUMB, THUMB).
    """
    same = np.abs(np.diff(thumbs, axis=0)).max((1, 2)) < FROZEN  # (L - 1,)
    # frames where the image changes, and both ends
    changes = np.flatnonzero(~same) + 1
    borders = [0, *changes, len(thumbs)]  # a video that never changes is one span
    best = (0, 0)
    for start, stop in pairwise(borders):
        if stop - start > best[1] and first_movement(state[start:stop], span) < stop - start:
            best = (start, stop - start)
    return best


def look(dataset, recording, entry, moments):
    """({camera: thumbs (L, THUMB, THUMB)}, {camera: images at some moments})."""
    thumbs = {}
    shown = {}
    for camera in dataset.cameras:
        small = []
        shown[camera] = []
        for t, pixels in enumerate(dataset.pictures(entry, camera, recording.timestamp)):
            picture = Image.fromarray(pixels)
            grey = picture.convert("L").resize((THUMB, THUMB), Image.Resampling.BOX)
            small.append(np.asarray(grey, np.float32))
            if t in moments:
                width = max(1, round(picture.width * TILE / picture.height))
                shown[camera].append(picture.resize((width, TILE)))
        thumbs[camera] = np.stack(small)
    return thumbs, shown


def camera_faults(thumbs, recording, span, fps):
    """{question: what is wrong with one of the cameras}."""
    found = {}
    for camera, small in thumbs.items():
        # even a single dark frame: a loose cable, or a video that starts before the camera
        dark = np.flatnonzero(small.mean((1, 2)) < BLACK)
        if len(dark):
            found["black camera"] = f"{camera}, {len(dark)} frames from {dark[0]} on"
        start, frames = longest_freeze(small, recording.state, span)
        if frames > IDLE * fps:
            found["frozen camera"] = f"{camera}, {frames} frames from {start} on"
    return found


# ---- all episodes together


def label(names, number):
    """The name of a dimension in the dataset, or its index."""
    return names[number] if number < len(names) else f"number {number}"


def number_faults(values, names, what):
    """[(question, what is wrong)] for all values (frames, n) of state or action."""
    found = []
    low = values.min(0)
    high = values.max(0)
    span = high - low
    # a dimension that stays at one end is a joint at its stop, or a clipped command
    for number in range(values.shape[1]):
        name = f"{what} {label(names, number)}"
        if not span[number] > FLAT:
            found.append(("constant number", f"{name} is always {low[number]:g}"))
            continue
        at_low = (values[:, number] < low[number] + EDGE * span[number]).mean()
        at_high = (values[:, number] > high[number] - EDGE * span[number]).mean()
        if max(at_low, at_high) > OFTEN and min(at_low, at_high) < BOTH:
            limit = f"{low[number]:g}" if at_low > at_high else f"{high[number]:g}"
            share = f"{100 * max(at_low, at_high):.0f}% of all frames"
            found.append(("number at its limit", f"{name} is {limit} in {share}"))
    return found


def common_numbers(state_names, action_names, sizes):
    """[(index in the state, in the action)] of dims with the same name; by index without names."""
    if not state_names and not action_names and sizes[0] == sizes[1]:
        return [(i, i) for i in range(sizes[0])]
    # a state often has more: velocities, or the pose of the hand
    both = [name for name in action_names if name in state_names]
    return [(state_names.index(name), action_names.index(name)) for name in both]


def best_lag(recordings, pairs, fps):
    """(frames by which actions precede movement, the correlation there); negative: they follow it.

    Correlates frame-to-frame changes of action and state, at lags of up to a second either way.
    """
    farthest = round(fps)
    # summed over all episodes: a single short one would decide by chance
    products = np.zeros(2 * farthest + 1)
    squares = np.zeros((2 * farthest + 1, 2))
    states, actions = zip(*pairs)
    everything = np.concatenate([recording.state[:, states] for recording in recordings])
    scale = everything.std(0) + FLAT  # so that degrees and m count equally
    for recording in recordings:
        moved = np.diff(recording.state[:, states], axis=0) / scale
        asked = np.diff(recording.action[:, actions], axis=0) / scale
        for place, lag in enumerate(range(-farthest, farthest + 1)):
            if abs(lag) >= len(moved):  # the episode is too short
                continue
            # (L - 1 - |lag|, n) each
            later = moved[max(0, lag) : len(moved) + min(0, lag)]
            before = asked[max(0, -lag) : len(asked) + min(0, -lag)]
            products[place] += (later * before).sum()
            squares[place] += (later**2).sum(), (before**2).sum()
    correlation = products / np.sqrt(squares.prod(1) + FLAT)
    best = int(correlation.argmax())
    return best - farthest, float(correlation[best])


def action_faults(dataset, recordings):
    """How well actions and movements agree: (text, is it bad?)."""
    state_names = names_of(dataset.features[dataset.state])
    action_names = names_of(dataset.features[dataset.action])
    sizes = recordings[0].state.shape[1], recordings[0].action.shape[1]
    pairs = common_numbers(state_names, action_names, sizes)
    recordings = [recording for recording in recordings if not holes(recording)]
    if not pairs or not recordings:
        return "not compared: no common names, or no complete episode", False
    lag, correlation = best_lag(recordings, pairs, dataset.fps)
    how = f"correlation {correlation:.2f}"
    # a joint target changes with its angle; a relative action is itself the change
    if correlation < TOGETHER:
        return f"they hardly correlate, {how}: are actions relative?", True
    states, actions = map(list, zip(*pairs))
    if all(np.array_equal(r.state[:, states], r.action[:, actions]) for r in recordings):
        return "each action is the state of its own frame: nothing to learn", True
    time = f"{abs(lag)} frames ({abs(lag) / dataset.fps:.2f} s)"
    if lag < 0:
        return f"actions come {time} after the movement, {how}", True
    return f"actions come {time} before the movement, {how}", lag > LATE * dataset.fps


# ---- the whole dataset


def ask_numbers(dataset, recordings, faults):
    """Append to faults {question: [(episode or None, what)]} what state, action and words show.

    Returns a text about how well actions and movements agree.
    """
    for recording in recordings:
        for question, what in (
            ("numbers that are missing", holes(recording)),
            ("dropped or repeated frames", dropped_frames(recording)),
            ("timestamps not at the fps", late_frames(recording, dataset.fps)),
            ("no instruction", wordless(recording)),
        ):
            if what:
                faults[question].append((recording.index, what))
    for name, kind in ((dataset.state, "state"), (dataset.action, "action")):
        values = np.concatenate([getattr(recording, kind) for recording in recordings])
        whole = values[np.isfinite(values).all(1)]
        for question, what in number_faults(whole, names_of(dataset.features[name]), name):
            faults[question].append((None, what))
    # also reported if it is fine: the number is worth knowing
    text, bad = action_faults(dataset, recordings)
    if bad:
        faults["action and movement"].append((None, text))
    # a policy rarely learns an instruction that it saw only once
    counts = Counter(recording.tasks[0] for recording in recordings)
    for task, count in counts.items():
        if count < FEW:
            faults["few episodes"].append((None, f"{count} of {task!r}"))
    return text


def ask_pictures(dataset, recordings, faults, sheet_episodes):
    """The same for the cameras. Returns {episode: {camera: images for the sheet}}."""
    states = np.concatenate([recording.state for recording in recordings])
    span = np.nanmax(states, 0) - np.nanmin(states, 0)
    shown = {}
    for entry, recording in zip(dataset.entries, recordings, strict=True):
        idle = first_movement(recording.state, span) / dataset.fps
        if idle > IDLE:
            faults["idle beginning"].append((entry.index, f"{idle:.1f} s"))
        moments = set()
        if entry.index in sheet_episodes:
            moments = set(np.linspace(0, entry.length - 1, MOMENTS).astype(int).tolist())
        # one broken video should not keep us from checking the others
        try:
            dataset.check_clips(entry, dataset.cameras)
            thumbs, tiles = look(dataset, recording, entry, moments)
        except UserError as error:
            faults["videos that do not match"].append((entry.index, str(error)))
            continue
        for question, what in camera_faults(thumbs, recording, span, dataset.fps).items():
            faults[question].append((entry.index, what))
        if moments:
            shown[entry.index] = tiles
    return shown


def draw_sheet(shown, path):
    """One row per episode: some moments of each camera, side by side."""
    rows = []
    for episode, tiles in shown.items():
        row = [np.asarray(picture) for pictures in tiles.values() for picture in pictures]
        strip = Image.fromarray(np.hstack(row))
        ImageDraw.Draw(strip).text((4, 2), f"episode {episode}", fill="yellow")
        rows.append(np.asarray(strip))
    width = max(row.shape[1] for row in rows)  # short episodes have fewer moments
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    with atomic(path) as temporary:
        Image.fromarray(np.vstack(padded)).save(temporary, "PNG")


def check(dataset, sheet):
    """Print a summary of a Dataset and its possible problems, and draw the contact sheet.

    Returns {question: [(episode, or None for all, what)]}. UserError if its numbers cannot be read.
    """
    print("\n".join(dataset.describe()))
    missing = dataset.missing_files(dataset.cameras)
    if missing:
        print(f"{len(missing)} files are missing, the first is {missing[0]}")
        dataset.entries = [entry for entry in dataset.entries if entry.data not in missing]
        if not dataset.entries:
            raise UserError(f"{dataset.folder}: no episode has its data file")
    # spread over the dataset: people change the scene in the course of a day
    places = np.linspace(0, len(dataset.entries) - 1, min(ROWS, len(dataset.entries)))
    chosen = {dataset.entries[int(place)].index for place in places}
    recordings = [dataset.recording(entry) for entry in dataset.entries]
    faults = {question: [] for question in QUESTIONS}
    together = ask_numbers(dataset, recordings, faults)
    shown = ask_pictures(dataset, recordings, faults, chosen)
    for question, found in faults.items():
        line = "-"
        if found:
            episode, what = found[0]
            where = "" if episode is None else f"episode {episode}: "
            line = f"{where}{what}" + (f", and {len(found) - 1} more" if found[1:] else "")
        elif question == "action and movement":
            line = f"- ({together})"
        print(f"{question:26}{line}")
    if shown:
        draw_sheet(shown, sheet)
        print(f"drew {len(shown)} episodes into {sheet}")
    return faults
