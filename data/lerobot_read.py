"""Read a LeRobotDataset from its folder: numbers and images of one episode at a time.

    dataset = Dataset(find_dataset("user/name"))       v3.0, or v2.0 and v2.1
    for entry in dataset.entries:                      one Entry per episode
        recording = dataset.recording(entry)           state (L, S), action (L, A), timestamp (L,)
        for picture in dataset.pictures(entry, camera, recording.timestamp): (h, w, 3) uint8

Layout of v3.0: meta/info.json; meta/tasks.parquet, with the sentence as index and its task_index;
meta/episodes/*/*.parquet, one row per episode; data/*/*.parquet, one row per frame, many episodes
per file; videos/<camera>/*/*.mp4, many episodes per video, and not the same ones as in a data file.
In v2 the metadata are JSON lines, and every episode has its own parquet file and a video per
camera. Source: lerobot 0.4.4 and 0.6.1, lerobot/datasets.

Names and units of the numbers are what info.json says under `names`, which is often nothing.
L frames of an episode, S and A numbers of state and action; times in s.
"""

import importlib
import json
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np

from cli import UserError, choose
from data.media import load_image
from files import find_or_fetch, inside, read_json, read_text, reading, whole_files

VERSIONS = ("v2.0", "v2.1", "v3.0")
# columns that are not features of the robot
INDEX = ("timestamp", "frame_index", "episode_index", "task_index")
ADVICE = "is the download complete?"
# text columns in our own exports: what each frame does, and the episode's header as JSON
PHASE = "nanoblm.phase"
HEADER = "nanoblm.episode"
KEPT = ("scene", "command", "task", "seed", "embodiment", "noise", "maker")  # fields of the header


@dataclass
class Clip:
    """Where a camera's images of one episode are; stop is None for a whole video file."""

    path: Path
    start: float
    stop: float | None


@dataclass
class Entry:
    """An episode in the metadata; clips {camera: Clip}, only for cameras stored as videos."""

    index: int
    length: int
    data: Path
    clips: dict


@dataclass
class Recording:
    """An episode's numbers: state (L, S), action (L, A) float64, timestamp (L,), frame (L,) int.

    tasks: L sentences, None where the dataset has none for the frame's task_index.
    phases: L words; header: fields KEPT of an exported episode's header, {} for other datasets.
    """

    index: int
    state: np.ndarray
    action: np.ndarray
    timestamp: np.ndarray
    frame: np.ndarray
    tasks: list
    phases: list
    header: dict


def extra(module):
    """A module of requirements-lerobot.txt. UserError says how to install it."""
    package = module.partition(".")[0]
    with reading(
        f"a LeRobotDataset without {package}", "`pip install -r requirements-lerobot.txt`"
    ):
        return importlib.import_module(module)


def find_dataset(source, cameras=()):
    """The folder `source`, or a dataset downloaded from the hub, with videos of these cameras only.

    UserError if there is neither.
    """
    # both layouts: videos/<camera>/chunk-000/ and videos/chunk-000/<camera>/
    films = [f"videos/*{camera}/*" for camera in cameras] or ["videos/*"]
    # the newest revision, not lerobot's tag for a format: older formats are read too
    patterns = ["meta/*", "data/*", "images/*", *films]
    return find_or_fetch(source, repo_type="dataset", allow_patterns=patterns)


def names_of(feature):
    """The names of a feature's numbers, [] if there are none: a list, or a dict of lists."""
    names = feature.get("names") or []
    # {"motors": [...]}, or a dict whose keys are the names
    if isinstance(names, dict):
        lists = [part for part in names.values() if isinstance(part, list)]
        names = list(chain(*lists)) or list(names)
    if len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    # no names are better than wrong ones
    fits = len(names) == np.prod(feature.get("shape", len(names)))
    return [str(name) for name in names] if fits else []


def read_lines(path):
    """The objects of a file of JSON lines."""
    with reading(path, ADVICE):
        return [json.loads(line) for line in read_text(path).splitlines() if line.strip()]


def read_table(path, columns=None, episode=None):
    """Columns of a parquet file as an arrow table; only one episode, if its index is given."""
    parquet = extra("pyarrow.parquet")
    # lerobot writes one row group per episode, so the others are not read
    rows = None if episode is None else [("episode_index", "=", episode)]
    with reading(path, ADVICE):
        there = parquet.read_schema(path).names
        lacking = [name for name in columns or () if name not in there]
        assert not lacking, f"it lacks the column {', '.join(lacking)}"
        # partitioning None: folder names are not columns
        return parquet.read_table(path, columns=columns, filters=rows, partitioning=None)


class Dataset:
    """The metadata. UserError if they are missing, of an unknown version, or contradictory.

    folder, version, fps, robot (its robot_type or ""), features, cameras [name], tasks {task_index:
    sentence}, entries [Entry]. state, action: names of the features to use as such.
    """

    def __init__(self, folder, state="observation.state", action="action"):
        self.folder = Path(folder)
        self.about = self.folder / "meta" / "info.json"
        if not self.folder.is_dir():
            raise UserError(f"{folder}: there is no such folder, and a hub name is user/name")
        info = self.info = read_json(
            self.about, "is this a LeRobotDataset, and the download complete?"
        )
        with reading(self.about):
            self.version = choose(info["codebase_version"], VERSIONS, "version of LeRobotDataset")
            self.fps = float(info["fps"])
            assert 0 < self.fps < 1000, f"fps is {info['fps']}"
            self.robot = info.get("robot_type") or ""  # null in many datasets
            self.features = info["features"]
            numbers = [name for name in self.features if self.features[name]["dtype"][:3] != "str"]
            # exact names only: a similar one may hold the gripper alone
            self.state = choose(state, numbers, "feature")
            self.action = choose(action, numbers, "feature")
            self.ours = [name for name in (PHASE, HEADER) if name in self.features]
            kinds = {name: feature["dtype"] for name, feature in self.features.items()}
            self.cameras = [name for name, kind in kinds.items() if kind in ("image", "video")]
            self.films = [name for name in self.cameras if kinds[name] == "video"]
        # v2.1 differs from v2.0 only in its statistics, which are not used here
        self.old = self.version != "v3.0"
        self.tasks = self.read_tasks()
        self.entries = self.read_old_entries() if self.old else self.read_entries()
        with reading(self.about, ADVICE):
            # an interrupted download leaves only the first files of a table
            there = [entry.index for entry in self.entries]
            promised = info.get("total_episodes", len(there))
            assert promised == len(there) > 0, f"{promised} episodes, but {len(there)} are listed"
            assert len(set(there)) == len(there), "an episode is listed twice"
        self.opened = None, None  # path and table of the last data file

    # ---- metadata

    def read_tasks(self):
        if self.old:
            path = self.folder / "meta" / "tasks.jsonl"
            with reading(path, ADVICE):
                return {int(row["task_index"]): row["task"] for row in read_lines(path)}
        path = self.folder / "meta" / "tasks.parquet"
        table = read_table(path)
        with reading(path, ADVICE):
            # the sentence is the pandas index, which only some versions name
            others = [name for name in table.column_names if name != "task_index"]
            # other converters write an additional column "task"
            named = [name for name in ("task", "__index_level_0__") if name in others]
            sentences = table[(named or others)[0]].to_pylist()
            return dict(zip(table["task_index"].to_pylist(), sentences, strict=True))

    def place(self, template, **indices):
        """The path from a template in info.json, which must not leave the folder."""
        # templates come from others and could name any file
        with reading(self.about):
            return inside(self.folder, self.info[template].format(**indices))

    def read_entries(self):
        """Entries of v3.0: each camera has its own chunk and file, as do the data."""
        folder = self.folder / "meta" / "episodes"
        entries = []
        for path in whole_files(folder, "*/*.parquet"):
            parquet = extra("pyarrow.parquet")
            with reading(path, ADVICE):
                names = parquet.read_schema(path).names
            # statistics have hundreds of columns, and a file can be large
            columns = [name for name in names if not name.startswith("stats/")]
            for row in read_table(path, columns).to_pylist():
                with reading(path, ADVICE):
                    clips = {camera: self.clip(row, camera) for camera in self.films}
                    data = self.place("data_path", **indices_of(row, "data"))
                    index = int(row["episode_index"])
                    entries.append(Entry(index, int(row["length"]), data, clips))
        if not entries:
            raise UserError(f"{folder} lists no episodes: {ADVICE}")
        return sorted(entries, key=lambda entry: entry.index)

    def clip(self, row, camera):
        prefix = f"videos/{camera}"
        path = self.place("video_path", video_key=camera, **indices_of(row, prefix))
        # s in the video, which holds other episodes before and after
        start = float(row[f"{prefix}/from_timestamp"])
        stop = float(row[f"{prefix}/to_timestamp"])
        return Clip(path, start, stop)

    def read_old_entries(self):
        """Entries of v2: every episode has its own files."""
        path = self.folder / "meta" / "episodes.jsonl"
        entries = []
        for row in read_lines(path):
            with reading(path, ADVICE):
                index = int(row["episode_index"])
                # 1,000 episodes per folder, whatever they contain
                chunk = index // int(self.info["chunks_size"])
                indices = {"episode_chunk": chunk, "episode_index": index}
                clips = {}
                for camera in self.films:
                    film = self.place("video_path", video_key=camera, **indices)
                    clips[camera] = Clip(film, 0.0, None)
                data = self.place("data_path", **indices)
                entries.append(Entry(index, int(row["length"]), data, clips))
        return sorted(entries, key=lambda entry: entry.index)

    def describe(self):
        """A summary for people, with the names that the dataset itself gives."""
        frames = sum(entry.length for entry in self.entries)
        size = f"{len(self.entries)} episodes, {frames:,} frames at {self.fps:g} fps"
        lines = [
            f"{self.folder}: LeRobotDataset {self.version}, {self.robot or 'no robot'}, {size}"
        ]
        for name in (self.state, self.action):
            names = names_of(self.features[name])
            count = int(np.prod(self.features[name]["shape"]))
            said = ", ".join(names) or "it does not name them"
            lines.append(f"{name}, {count} numbers: {said}")
        for camera in self.cameras:
            feature = self.features[camera]
            lines.append(f"{camera}, {feature['dtype']} {'x'.join(map(str, feature['shape']))}")
        used = {self.state, self.action, *self.cameras, *INDEX, "index", *self.ours}
        # such as rewards, and the language columns since lerobot 0.6
        unused = [name for name in self.features if name not in used]
        return [*lines, f"not read: {', '.join(unused)}"] if unused else lines

    # ---- an episode

    def missing_files(self, cameras):
        """Files in the metadata that do not exist, for these cameras and for the numbers."""
        paths = [entry.data for entry in self.entries]
        for camera in cameras:
            paths += [entry.clips[camera].path for entry in self.entries if camera in entry.clips]
        return [path for path in dict.fromkeys(paths) if not path.is_file()]

    def check_clips(self, entry, cameras):
        """UserError if a video has more or fewer images of the episode than there are rows.

        lerobot's recorder can drop images but keep their rows, which shifts all later ones.
        """
        for camera in cameras:
            clip = entry.clips.get(camera)
            if clip is None:  # images are in the rows themselves
                continue
            if clip.stop is None:  # v2: the video is the episode
                frames = film_frames(clip) or entry.length
            else:
                frames = (clip.stop - clip.start) * self.fps
            if abs(frames - entry.length) > 0.5:
                differ = f"{frames:.4g} pictures of {camera}, {entry.length} rows of numbers"
                raise UserError(f"{clip.path}: {differ}: were frames dropped? {ADVICE}")

    def recording(self, entry):
        """The Recording of an Entry. UserError if columns or rows are missing or not numeric."""
        if self.opened[0] != entry.data:
            # without images, which may be in the same file and are read one episode at a time
            wanted = [self.state, self.action, *INDEX, *self.ours]
            self.opened = entry.data, read_table(entry.data, list(dict.fromkeys(wanted)))
        table = self.opened[1]
        with reading(entry.data):
            # by index, not by dataset_from_index, which after a merge counts through all files
            rows = np.flatnonzero(table["episode_index"].to_numpy() == entry.index)
            own = table.take(rows)
            assert len(own) == entry.length, (
                f"{len(own)} rows, not {entry.length} as the metadata say"
            )
            # looked up by task_index: rows of tasks.parquet are in any order
            tasks = [self.tasks.get(index) for index in own["task_index"].to_pylist()]
            return Recording(
                entry.index,
                matrix(own[self.state]),
                matrix(own[self.action]),
                matrix(own["timestamp"])[:, 0],
                matrix(own["frame_index"])[:, 0].astype(int),
                tasks,
                *self.own_words(own),
            )

    def own_words(self, rows):
        """(phases, header) from an episode's rows, for its Recording."""
        # other datasets do not tell the phases
        phases = ["teleoperation"] * len(rows)
        if PHASE in self.ours:
            phases = rows[PHASE].to_pylist()
            assert all(isinstance(phase, str) for phase in phases), f"{PHASE} does not hold strings"
        if HEADER not in self.ours:
            return phases, {}
        # the same in every row
        header = json.loads(rows[HEADER][0].as_py())
        return phases, {name: header[name] for name in KEPT}

    def pictures(self, entry, camera, timestamps):
        """Yield a camera's image (height, width, 3) uint8 for each of an episode's timestamps (L,).

        UserError if one is missing, or none is within half a frame of its time.
        """
        if camera in entry.clips:
            clip = entry.clips[camera]
            yield from film_pictures(clip, timestamps, self.fps)
            return
        for body in self.encoded(entry, camera):
            with reading(entry.data):
                yield np.asarray(load_image(BytesIO(body)))

    def encoded(self, entry, camera):
        """Yield the encoded images, in bytes, of a camera that is not stored as video."""
        cells = read_table(entry.data, [camera], entry.index)[camera]
        assert len(cells) == entry.length
        for cell in cells:
            with reading(entry.data):
                # nearly always bytes; a path must stay inside the folder
                picture = cell.as_py()  # {"bytes": an encoded image or None, "path": its file}
                yield picture["bytes"] or inside(self.folder, picture["path"]).read_bytes()


def indices_of(row, prefix):
    """chunk_index and file_index in a row of meta/episodes: for the data, or for a camera."""
    return {name: int(row[f"{prefix}/{name}"]) for name in ("chunk_index", "file_index")}


def matrix(column):
    """An arrow column of numbers or lists of numbers as (L, n) float64; missing ones are NaN."""
    # None becomes NaN; lists of different lengths raise an error
    values = np.array(column.to_pylist(), np.float64)
    return values.reshape(len(values), -1)  # a feature of shape (1,) is a column of plain numbers


def film_pictures(clip, timestamps, fps):
    """Yield the images of a Clip nearest to timestamps (L,), s after its start, in order.

    UserError if the nearest is more than half a frame away, or the timestamps do not increase.
    """
    av = extra("av")
    times = clip.start + np.asarray(timestamps)
    half = 0.5 / fps
    # swscale's fast conversion from YUV to RGB, the default, is darker by one or two levels of 255
    ways = av.video.reformatter.Interpolation
    exact = ways.BICUBIC | ways.ACCURATE_RND | ways.FULL_CHR_H_INT | ways.FULL_CHR_H_INP
    waiting = list(times[::-1])  # the next one is last

    def at_time(frame):
        time = waiting.pop()
        off = abs(frame.time - time)
        assert off <= half, f"no picture at {time:.3f} s: the nearest is at {frame.time:.3f} s"
        return frame.to_ndarray(format="rgb24", interpolation=exact)

    with reading(clip.path, ADVICE), av.open(str(clip.path)) as film:
        assert (np.diff(times) > 0).all(), "the episode's timestamps do not increase"
        stream = film.streams.video[0]
        stream.thread_type = "AUTO"  # decode frames and slices in parallel
        # seek to the keyframe before the first image, with room for rounding
        film.seek(int(max(0.0, times[0] - half) / stream.time_base), stream=stream)
        last = None
        for frame in film.decode(stream):
            # the video holds other episodes before and after
            if frame.time < clip.start - half:
                continue
            if clip.stop is not None and frame.time > clip.stop - half:
                break
            # times that are closer to the previous image than to this one
            while last and waiting and waiting[-1] - last.time < frame.time - waiting[-1]:
                yield at_time(last)
            if not waiting:  # the rest belongs to other episodes
                return
            last = frame
        assert last is not None, f"no pictures from {times[0]:.3f} s on"
        while waiting:
            yield at_time(last)


def film_frames(clip):
    """The number of images in a whole video, from its header; 0 if it does not say."""
    av = extra("av")
    with reading(clip.path, ADVICE), av.open(str(clip.path)) as film:
        return film.streams.video[0].frames
