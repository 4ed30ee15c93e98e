"""Import, check and export LeRobotDatasets.

    python -m data.lerobot check FOLDER             a table of possible problems, and a contact sheet
    python -m data.lerobot import FOLDER out/mine --cameras front=observation.images.top,wrist=...
    python -m data.lerobot export out/demos out/nanoblm-v3

FOLDER is a folder, or user/name on the hub; versions 2.0, 2.1 and 3.0 are read, 3.0 is written.
`import` decodes every image once and writes episodes in the format of data/record.py, so that
training never decodes video. An export with --no-video can be imported again without any change,
and training on it gives the same policy bit for bit. Needs `pip install -r
requirements-lerobot.txt`.

Not supported: more than three cameras (choose three), several instructions in one episode, values
of 1,000 and above.
"""

import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from cli import UserError, choose, parse, run
from data.expert import Demonstration
from data.lerobot_check import check
from data.lerobot_read import Dataset, find_dataset, names_of
from data.lerobot_write import export
from data.media import load_image, middle_square, open_image
from data.record import LARGEST, embodiment_of, write_episode
from embodiment import MOST_VIEWS, VIEW_NAME, Embodiment
from files import atomic_folder, reading

GRIPPER = "gripper|finger|jaw"  # in the name of a state or action dimension


@dataclass
class ImportFlags:
    cameras: str = ""  # NAME=CAMERA,...: one to three cameras, and their names for the policy
    robot: str = ""  # name of the robot; empty: the name in the dataset
    task: str = ""  # one instruction for all episodes; empty: those in the dataset
    size: int = 224  # largest image side in pixels; weights/nano shrinks images to 128
    episodes: str = ""  # START:STOP, a range of episodes; empty: all
    state: str = "observation.state"  # feature to use as state
    action: str = "action"  # feature to use as action


@dataclass
class CheckFlags:
    sheet: str = ""  # file for the contact sheet; empty: FOLDER.png
    state: str = "observation.state"  # feature to use as state
    action: str = "action"  # feature to use as action


@dataclass
class ExportFlags:
    robot: str = ""  # which robot, if there are episodes of several
    video: bool = True  # off: images as they are, without loss, at several times the size


# ---- importing


def camera_map(text, cameras):
    """{name: camera} from "front=...,wrist=...", in this order. UserError lists the cameras."""
    have = f"the cameras are {', '.join(cameras) or 'none'}"
    chosen = {}
    for part in text.split(","):
        view, equals, camera = part.strip().partition("=")
        # without a name we would have to guess
        if not equals:
            raise UserError(f"--cameras front=...,wrist=... says which is which; {have}")
        # observations use these keys for other things
        if not re.fullmatch(VIEW_NAME, view) or view in ("state", "instruction"):
            raise UserError(f"--cameras {view}=...: not a valid camera name; try front or wrist")
        if view in chosen:
            raise UserError(f"--cameras names {view} twice")
        chosen[view] = choose(camera, cameras, "camera")
    if len(chosen) > MOST_VIEWS:
        raise UserError(f"--cameras names {len(chosen)}: at most {MOST_VIEWS}; {have}")
    return chosen


def to_picture(pixels, size):
    """The central square of (height, width, 3) uint8, as in `BLM.act`, at most `size` wide."""
    square = middle_square(pixels)
    # never enlarged: the processor does that, and it would waste disk space
    if len(square) <= size:
        return square
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))


def as_kept(body, size):
    """An encoded image as `write_episode` takes it: its own bytes if possible, else an array."""
    pixels = np.asarray(load_image(BytesIO(body)))
    height, width, _ = pixels.shape
    with open_image(BytesIO(body)) as image:
        # EXIF may contain a rotation
        plain = (image.format, image.mode) == ("JPEG", "RGB") and not image.getexif()
    # re-encoding loses quality: our own exports come back unchanged
    if plain and height == width <= size:
        return body
    return to_picture(pixels, size)


def import_pictures(dataset, entry, camera, times, size):
    """Yield a camera's images of an episode as `write_episode` takes them."""
    if camera in entry.clips:
        for pixels in dataset.pictures(entry, camera, times):
            yield to_picture(pixels, size)
        return
    for body in dataset.encoded(entry, camera):
        with reading(entry.data):
            yield as_kept(body, size)


@contextmanager
def of_episode(entry):
    """Add the episode to the message of any UserError in the block."""
    try:
        yield
    except UserError as error:
        raise UserError(f"episode {entry.index}: {error}") from None


def check_numbers(entry, recording):
    """UserError at the first implausible value: not finite, or not below LARGEST."""
    for name in ("state", "action"):
        values = getattr(recording, name)
        strange = np.argwhere(~(np.abs(values) < LARGEST))  # NaN fails this too
        for frame, number in strange:  # the first is enough
            said = f"{name} at frame {frame} holds {values[frame, number]}"
            raise UserError(f"{entry.data}: {said}; it must be below {LARGEST:g}")


def instruction_of(entry, recording, given):
    """The only instruction of an episode, or `given` if that is not empty."""
    # an explicit --task wins
    if given:
        return given
    # each frame's own task_index counts: the episode table may list nothing, or too much
    for frame, sentence in enumerate(recording.tasks):
        if not (isinstance(sentence, str) and sentence.strip()):
            raise UserError(f"{entry.data}: frame {frame} has no instruction; give one with --task")
        # our episodes have one instruction, and the hidden states depend on it
        if sentence != recording.tasks[0]:
            both = f"{recording.tasks[0]!r}, but {sentence!r} at frame {frame}"
            raise UserError(f"{entry.data}: the instruction is {both}: give one with --task")
    return recording.tasks[0].strip()


def read_recordings(dataset):
    """The Recording of each Entry. UserError names the episode with an implausible value."""
    recordings = []
    for entry in dataset.entries:
        with of_episode(entry):
            recording = dataset.recording(entry)
            check_numbers(entry, recording)
        recordings.append(recording)
    return recordings


def find_relative(state, action, state_names, action_names):
    """Which action dims are targets for which state dims: see Embodiment.relative.

    state (n, S) and action (n, A) of all frames. A target has the same name as its state dimension
    (or, without names, the same index) and stays close to it: subtracting the state must remove
    more than half of the action's variance. Deltas and other units fail this test. Grippers are
    excluded: the gap between target and position tells that something is held.
    """
    S = state.shape[1]
    A = action.shape[1]
    # duplicate names do not identify a dimension
    named = len(set(state_names)) == S and len(set(action_names)) == A
    if named:
        places = {name: j for j, name in enumerate(state_names)}
        pairs = [places.get(name, -1) for name in action_names]
        grippers = [i for i, name in enumerate(action_names) if re.search(GRIPPER, name.lower())]
    else:
        pairs = [i if i < S else -1 for i in range(A)]
        grippers = [A - 1]  # it is almost always the last one
    relative = []
    for i, j in enumerate(pairs):
        near = j >= 0 and np.var(action[:, i] - state[:, j]) < np.var(action[:, i]) / 2
        relative.append(j if near and i not in grippers else -1)
    return relative


def describe_targets(relative, names):
    """A line for the user: which action dims are learned relative to the state."""
    names = names or [f"number {i}" for i in range(len(relative))]
    targets = []
    others = []
    for name, index in zip(names, relative, strict=True):
        kind = targets if index >= 0 else others
        kind.append(name)
    said = f"learned relative to the state: {', '.join(targets) or 'none'}"
    return f"{said}; as they are: {', '.join(others) or 'none'}"


def demonstration_of(dataset, entry, recording, views, flags):
    """The Demonstration of an Entry; its images are decoded lazily."""
    instruction = instruction_of(entry, recording, flags.task)
    dataset.check_clips(entry, views.values())

    # one frame of all cameras at a time: an hour of images does not fit into memory
    def images():
        times = recording.timestamp
        cameras = views.values()
        films = [import_pictures(dataset, entry, camera, times, flags.size) for camera in cameras]
        for pictures in zip(*films, strict=True):
            yield dict(zip(views, pictures, strict=True))

    return Demonstration(
        states=recording.state.astype(np.float32),  # (L, S)
        actions=recording.action.astype(np.float32),  # (L, A)
        phases=recording.phases,
        images=images(),
        success=True,
        instruction=instruction,
    )


def header_of(entry, recording, about):
    """The header of an episode that was exported from here, or {} for other datasets.

    UserError if its values are invalid.
    """
    header = dict(recording.header)
    if not header:
        return {}
    with reading(entry.data):
        embodiment = Embodiment(**header["embodiment"])
        words = [header["scene"], header["task"]]
        assert all(isinstance(word, str) and word for word in words), f"scene and task are {words}"
        assert min(header["seed"], header["command"]) >= 0, "seeds and commands count from 0"
    # the import selected other cameras or dims, so this is no longer the same robot
    shape = embodiment_of(about, recording.state.shape[1], recording.action.shape[1]).shape()
    if embodiment.shape() != shape:
        del header["embodiment"]
    return header


def robot_name(given, dataset):
    """The name of the embodiment."""
    name = given or dataset.robot
    # lerobot's converters write "unknown"
    if not name or name == "unknown":
        raise UserError(f"{dataset.about} does not name the robot: name it with --robot")
    # no "/": a dataset must not choose where we write; no leading dot: hidden files are skipped
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"the robot's name {name!r} is used in file names: choose another with --robot"
        )
    return name


def chosen_entries(dataset, text):
    """The entries with an index in "START:STOP"; all if it is empty."""
    if not text:
        return dataset.entries
    span = re.fullmatch(r"(\d*):(\d*)", text)
    if not span:
        raise UserError(f"--episodes {text}: type START:STOP, such as 0:50, or :10")
    # like a Python slice: without STOP to the end
    start = int(span[1] or 0)
    stop = int(span[2] or len(dataset.entries))
    chosen = [entry for entry in dataset.entries if start <= entry.index < stop]
    if not chosen:
        raise UserError(f"--episodes {text}: there are {len(dataset.entries)}, counted from 0")
    return chosen


def about_dataset(source, dataset, robot, name, views):
    """The header fields that all episodes share; "relative" is added later."""
    # "dataset" tells data/record.py that robot and task are not the simulator's
    return {
        "robot": robot,
        "scene": name,
        "command": 0,
        "noise": 0.0,
        "maker": "lerobot",
        "dataset": str(source),
        "fps": dataset.fps,
        "cameras": views,
        "state_names": names_of(dataset.features[dataset.state]),
        "action_names": names_of(dataset.features[dataset.action]),
    }


def import_dataset(source, out, flags):
    """Write an episode file for each episode of a LeRobotDataset to the new folder `out`.

    source: a folder, or user/name on the hub; flags: ImportFlags.

    The folder appears whole or not at all. UserError names file and episode.
    """
    # before the map is checked: do not download videos of cameras that are not used
    named = [part.partition("=")[2].strip() for part in flags.cameras.split(",")]
    folder = find_dataset(source, [camera for camera in named if camera])
    dataset = Dataset(folder, flags.state, flags.action)
    print("\n".join(dataset.describe()))
    dataset.entries = chosen_entries(dataset, flags.episodes)
    views = camera_map(flags.cameras, dataset.cameras)
    robot = robot_name(flags.robot, dataset)
    if not 16 <= flags.size <= 1024:
        raise UserError(f"--size {flags.size}: from 16 to 1024 pixels")
    # checked before any work, because lerobot can download single episodes
    missing = dataset.missing_files(views.values())
    if missing:
        advice = "download the rest, or take a part with --episodes START:STOP"
        raise UserError(f"{missing[0]} does not exist ({len(missing)} files are missing): {advice}")
    # a folder in the hub's cache is named by a hash
    here = Path(source).is_dir()
    name = folder.resolve().name if here else source.rpartition("/")[2]
    name = re.sub(r"[^\w.-]", "_", name)
    about = about_dataset(source, dataset, robot, name, views)
    names = about["state_names"], about["action_names"]
    recordings = read_recordings(dataset)
    # check before any work that all episodes can be one robot's
    with reading(dataset.about):
        state = np.concatenate([recording.state for recording in recordings])
        action = np.concatenate([recording.action for recording in recordings])
        about["relative"] = find_relative(state, action, *names)
        embodiment_of(about, state.shape[1], action.shape[1])
    # for our own exports each header says what is relative
    ours = recordings[0].header
    known = "exported here: seeds, scenes, commands, phases and what is relative come back"
    print(known if ours else describe_targets(about["relative"], about["action_names"]))
    with atomic_folder(out) as new:
        entries = zip(dataset.entries, recordings, strict=True)
        for entry, recording in tqdm(entries, total=len(recordings), unit="episode"):
            with of_episode(entry):
                demonstration = demonstration_of(dataset, entry, recording, views, flags)
                # the seed sorts the episodes, and so decides which are held out
                own = {"task": demonstration.instruction, "seed": entry.index}
                own |= header_of(entry, recording, about)
                path = new / f"{robot}-{name}-{entry.index:06d}.safetensors"
                write_episode(path, demonstration, about | own)
    print(f"{len(dataset.entries)} episodes of {robot} in {out}; train on them:")
    print(f"python train_policy.py --data {out} --start weights/nano --out out/{robot}")


# ---- the command line

# {command: (its flags, the folders that come before them)}
COMMANDS = {
    "check": (CheckFlags, ["FOLDER"]),
    "import": (ImportFlags, ["FOLDER", "OUT"]),
    "export": (ExportFlags, ["EPISODES", "OUT"]),
}


def main():
    what = sys.argv[1] if sys.argv[1:] else ""
    if what in ("-h", "--help"):
        print(f"{__doc__}\npython -m data.lerobot <command> --help lists the flags")
        return
    flags_class, places = COMMANDS[choose(what, COMMANDS, "command")]
    argv = sys.argv[2:]
    # folders first, so that the value of a flag is not taken for one
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    folders = argv[:count]
    flags = parse(flags_class, description=__doc__.split("\n")[0], argv=argv[count:])
    if count != len(places):
        raise UserError(f"type python -m data.lerobot {what} {' '.join(places)}, then the flags")
    if what == "import":
        import_dataset(*folders, flags)
    elif what == "export":
        export(*folders, flags.robot, flags.video)
    else:
        # all cameras: the check should tell which of them are usable
        dataset = Dataset(find_dataset(folders[0]), flags.state, flags.action)
        check(dataset, flags.sheet or f"{dataset.folder}.png")


if __name__ == "__main__":
    run(main)
