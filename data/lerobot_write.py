"""Our episodes as a LeRobotDataset v3.0, which lerobot loads, edits and trains on.

One data file, a row group an episode; films of all episodes of a camera end to end, a new one when
one is full. Pictures become H.264 with a key picture every second one, so that any is found fast;
with --no-video they stay the JPEG files that they are, in the rows, and nothing is lost.
Two columns of text hold what lerobot has no place for: PHASE and HEADER, which `import` reads back.
Statistics are computed from all numbers of the dataset: lerobot's own quantiles are averages of
those of the episodes. Source: lerobot 0.4.4, lerobot/datasets.

L frames of an episode, S and A numbers of state and action.
"""

import json
from dataclasses import asdict
from fractions import Fraction

import numpy as np
from tqdm import tqdm

from cli import UserError, choose
from data.lerobot_read import HEADER, PHASE, extra
from data.record import load_episodes
from data.robots import get_robot
from files import atomic_folder, write_json

FILM_BYTES = 200_000_000  # of an mp4, lerobot's own limit
CHUNK = "chunk-000/file-{:03d}"  # a chunk is 1,000 files: more than there will be
PIXELS = "yuv444p"  # with 4:2:0 the shipped policy's joint targets are off by 1.7 times as much
CODEC = {"crf": "18", "g": "2", "bf": "0"}  # bf 0: a picture's time is its number / fps
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
STRIDE = 10  # frames between those whose pixels count for the statistics
SCALARS = {  # a column of numbers each
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


# ---- what the numbers are called


def names_in(episode):
    """(names of the state's S numbers, of the action's A); [] where nobody said."""
    about = episode.about
    # imported: as its dataset called them
    if "dataset" in about:
        return about["state_names"], about["action_names"]
    # another simulator's: they are described in words, not named one by one
    if "env" in about:
        return [], []
    robot = get_robot(episode.robot)
    # the unit behind the dot, for info.json has no place for it
    joints = [f"{robot.model.joint(i).name}.rad" for i in range(robot.dof)]
    fingers = [*joints, "finger.m"]
    places = [f"tcp_{axis}.m" for axis in "xyz"]
    turns = [f"tcp_{column}_axis_{axis}" for column in "xy" for axis in "xyz"]
    return [*fingers, *places, *turns], fingers


# ---- films


class Film:
    """The films of one camera, written picture after picture; `clips` [(file, start, stop)]."""

    def __init__(self, folder, fps):
        self.folder = folder
        self.fps = Fraction(fps).limit_denominator(1000)
        self.number = -1  # of the file
        self.open_next()

    def open_next(self):
        av = extra("av")
        self.number += 1
        self.frames = 0
        self.bytes = 0
        path = self.folder / f"{CHUNK.format(self.number)}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = av.open(str(path), "w")
        # H.264, though lerobot's default is AV1: every decoder has it
        self.stream = self.file.add_stream("libx264", rate=self.fps, options=CODEC)
        # color at full resolution: objects are a few pixels wide
        self.stream.pix_fmt = PIXELS

    def add(self, picture):
        av = extra("av")
        # the encoder opens with the first picture
        if not self.frames:
            self.stream.height, self.stream.width = picture.shape[:2]
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        # whole numbers of 1 / fps: lerobot wants a picture within 0.1 ms of its row
        frame.pts = self.frames
        frame.time_base = 1 / self.fps
        self.write(self.stream.encode(frame))
        self.frames += 1

    def write(self, packets):
        for packet in packets:
            self.bytes += packet.size
            self.file.mux(packet)

    def close(self):
        # what the encoder still holds back
        self.write(self.stream.encode())
        self.file.close()

    def make_room(self):
        """Go on in another file if this one is full; called between episodes."""
        # an episode is never split: its row names one file
        if self.bytes > FILM_BYTES:
            self.close()
            self.open_next()


# ---- statistics


def statistics(values):
    """{name: list} of values (n, d), each of d numbers: what lerobot keeps of a feature."""
    # double: sums over millions of pixels
    values = np.asarray(values, np.float64)
    table = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
    }
    # of all numbers, not the mean of the episodes' quantiles
    for quantile in QUANTILES:
        table[f"q{100 * quantile:02.0f}"] = np.quantile(values, quantile, axis=0)
    return {name: part.tolist() for name, part in table.items()} | {"count": [len(values)]}


def all_statistics(samples):
    """{feature: statistics} of {feature: values (n, d)}; pixels (n, 3) as lerobot shapes them."""
    table = {}
    for feature, values in samples.items():
        table[feature] = statistics(values)
        if feature.startswith("observation.images."):  # a number a color: (3, 1, 1)
            for name in table[feature].keys() - {"count"}:
                table[feature][name] = [[[number]] for number in table[feature][name]]
    return table


def pixels_of(pictures):
    """(n, 3) in 0..1: every fourth pixel each way of some pictures."""
    return np.concatenate([picture[::4, ::4].reshape(-1, 3) for picture in pictures]) / 255


# ---- tables


def header_of(episode):
    """What training depends on beside rows and words, as JSON: the same in each of its rows.

    Not in meta/episodes, where lerobot's own tools drop columns that they do not know.
    """
    header = {
        "scene": episode.scene,
        "command": episode.command,
        "task": episode.task,
        "seed": episode.seed,
        "embodiment": asdict(episode.embodiment),
        "noise": episode.about.get("noise"),
        "maker": episode.about.get("maker", "expert"),  # older episodes do not name theirs
    }
    return json.dumps(header)


def data_columns(episode, number, first, task_index, fps):
    """{feature: (L,) or (L, n)}: an episode's rows; first is the number of its first row."""
    frames = np.arange(len(episode))
    # in the order in which lerobot writes them
    return {
        "observation.state": episode.state,
        "action": episode.action,
        PHASE: np.array(episode.phases),
        HEADER: np.full(len(frames), header_of(episode)),
        "timestamp": (frames / fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(len(frames), number),
        "index": first + frames,
        "task_index": np.full(len(frames), task_index),
    }


def picture_columns(cameras, episode):
    """{camera: its pictures, files as they are}: the columns of cameras that are no films."""
    columns = {camera: [] for camera in cameras}
    for t in range(len(episode)):
        # lerobot makes them PNG, and reads what PIL reads
        for camera, body in zip(cameras, episode.jpegs(t), strict=True):
            columns[camera].append({"bytes": body, "path": f"frame-{t:06d}.jpg"})
    return columns


def to_table(columns):
    """Columns as an arrow table: (L, n) becomes lists of n, (L,) and (L, 1) plain numbers."""
    arrow = extra("pyarrow")
    arrays = {}
    for name, values in columns.items():
        # of pictures: arrow finds the type that lerobot expects, bytes and path
        if isinstance(values, list):
            arrays[name] = arrow.array(values)
            continue
        flat = arrow.array(values.ravel())  # (L n,)
        width = values.size // len(values)
        # lerobot reads a feature of shape (1,) as a plain number
        arrays[name] = flat if width == 1 else arrow.FixedSizeListArray.from_arrays(flat, width)
    return arrow.table(arrays)


def write_tasks(path, sentences):
    """The sentences in the order of their task_index, as pandas writes a table with them as index.

    lerobot looks a frame's sentence up by row number, not by task_index: the two must be the same.
    """
    arrow = extra("pyarrow")
    index = "__index_level_0__"  # pandas' name for an index without one
    keys = ("name", "field_name", "pandas_type", "numpy_type", "metadata")
    number = dict(zip(keys, ("task_index", "task_index", "int64", "int64", None)))
    sentence = dict(zip(keys, (None, index, "unicode", "object", None)))
    # without this pandas would number the rows, and lerobot take a number for the sentence
    about = {"index_columns": [index], "column_indexes": [], "columns": [number, sentence]}
    # row i is task i
    table = arrow.table({"task_index": range(len(sentences)), index: sentences})
    table = table.replace_schema_metadata({"pandas": json.dumps(about)})
    extra("pyarrow.parquet").write_table(table, path)


def camera_feature(picture, fps, video):
    """What info.json says of a camera with such pictures."""
    height, width, _ = picture.shape
    names = ["height", "width", "channels"]
    feature = {"dtype": "image", "shape": [height, width, 3], "names": names}
    # 0.6.1 says more of the encoder, and does without
    if not video:
        return feature
    about = {
        "video.fps": fps,
        "video.height": height,
        "video.width": width,
        "video.channels": 3,
        "video.codec": "h264",
        "video.pix_fmt": PIXELS,
        "video.is_depth_map": False,
        "has_audio": False,
    }
    return feature | {"dtype": "video", "info": about}


def feature_table(episode, fps, video):
    """What info.json says of each feature."""
    state_names, action_names = names_in(episode)
    state = {"dtype": "float32", "shape": [episode.state.shape[1]], "names": state_names or None}
    action = {"dtype": "float32", "shape": [episode.action.shape[1]], "names": action_names or None}
    features = {"observation.state": state, "action": action}
    for view, picture in zip(episode.embodiment.views, episode.images(0), strict=True):
        features[f"observation.images.{view}"] = camera_feature(picture, fps, video)
    # lerobot hands them on as they are, and makes no statistics of them
    for name in (PHASE, HEADER):
        features[name] = {"dtype": "string", "shape": [1], "names": None}
    scalars = {name: {"dtype": t, "shape": [1], "names": None} for name, t in SCALARS.items()}
    return features | scalars


# ---- the dataset


def chosen_episodes(folder, robot):
    """The episodes of one robot, all alike. UserError if there are several robots, sizes or rates."""
    episodes = load_episodes(folder)
    # the shapes in info.json are those of all episodes
    robots = sorted({episode.robot for episode in episodes})
    if len(robots) > 1 and not robot:
        advice = "a LeRobotDataset has one: choose it with --robot"
        raise UserError(f"{folder} holds episodes of {', '.join(robots)}; {advice}")
    robot = choose(robot or robots[0], robots, "robot")
    episodes = [episode for episode in episodes if episode.robot == robot]
    first = shape_of(episodes[0])
    for episode in episodes:
        if shape_of(episode) != first:
            raise UserError(
                f"{episode.path}: {shape_of(episode)}, not {first} as the first episode"
            )
    return episodes


def shape_of(episode):
    """In words, what must be the same in all episodes of a dataset."""
    sizes = [picture.shape[0] for picture in episode.images(0)]
    return f"{episode.embodiment.shape()}, pictures of {sizes} pixels"


def sample_pixels(cameras, episode):
    """{camera: pixels (n, 3)} for the statistics."""
    kept = {camera: [] for camera in cameras}
    # neighbors look alike
    for t in range(0, len(episode), STRIDE):
        for camera, picture in zip(cameras, episode.images(t), strict=True):
            kept[camera].append(picture)
    return {camera: pixels_of(pictures) for camera, pictures in kept.items()}


def film_episode(films, episode):
    """Append an episode to {camera: Film}; what its row says of films."""
    starts = {}
    # where it begins, now that it is known in which file
    for camera, film in films.items():
        film.make_room()
        starts[camera] = film.frames
    for t in range(len(episode)):
        for film, picture in zip(films.values(), episode.images(t), strict=True):
            film.add(picture)
    row = {}
    for camera, film in films.items():
        prefix = f"videos/{camera}"
        # a camera's own, which may differ from the data's and the other camera's
        row[f"{prefix}/chunk_index"] = 0
        row[f"{prefix}/file_index"] = film.number
        row[f"{prefix}/from_timestamp"] = float(starts[camera] / film.fps)
        row[f"{prefix}/to_timestamp"] = float(film.frames / film.fps)
    return row


def write_rows(out, episodes, fps, video):
    """Data and films of all episodes: (rows of meta/episodes, {feature: [values of each]})."""
    # task_index is a sentence's place here
    sentences = list(dict.fromkeys(episode.instruction for episode in episodes))
    cameras = [f"observation.images.{view}" for view in episodes[0].embodiment.views]
    filmed = cameras if video else []
    films = {camera: Film(out / "videos" / camera, fps) for camera in filmed}
    path = out / "data" / f"{CHUNK.format(0)}.parquet"
    path.parent.mkdir(parents=True)
    rows = []
    samples = {}
    first = 0  # row of the dataset
    writer = None
    for number, episode in enumerate(tqdm(episodes, unit="episode")):
        task_index = sentences.index(episode.instruction)
        columns = data_columns(episode, number, first, task_index, fps)
        pictures = {} if video else picture_columns(cameras, episode)
        table = to_table(columns | pictures)
        # the schema is the first episode's
        writer = writer or extra("pyarrow.parquet").ParquetWriter(path, table.schema)
        writer.write_table(table)
        # words have no statistics
        numbers = {name: values for name, values in columns.items() if values.dtype.kind != "U"}
        own = {name: values.reshape(len(episode), -1) for name, values in numbers.items()}
        own |= sample_pixels(cameras, episode)
        clips = film_episode(films, episode) if video else {}
        row = {
            "episode_index": number,
            "tasks": [episode.instruction],
            "length": len(episode),
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": first,
            "dataset_to_index": first + len(episode),
            **clips,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        # lerobot merges and edits datasets by these
        for feature, table in all_statistics(own).items():
            row |= {f"stats/{feature}/{name}": values for name, values in table.items()}
        rows.append(row)
        for feature, values in own.items():
            samples.setdefault(feature, []).append(values)
        first += len(episode)
    writer.close()
    for film in films.values():
        film.close()
    return rows, samples, sentences


def export(folder, out, robot="", video=True):
    """Write the episodes of `folder` as a LeRobotDataset v3.0 into the new folder `out`.

    robot: which, if there are several; video: films, which are small, or pictures as they are.
    It appears whole or not at all. UserError if the episodes are not of one robot, size and rate.
    """
    arrow = extra("pyarrow")
    episodes = chosen_episodes(folder, robot)
    fps = episodes[0].embodiment.control_hz
    fps = int(fps) if fps == int(fps) else fps  # lerobot's info.json has an integer
    with atomic_folder(out) as new:
        meta = new / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        rows, samples, sentences = write_rows(new, episodes, fps, video)
        write_tasks(meta / "tasks.parquet", sentences)
        table = arrow.Table.from_pylist(rows)
        extra("pyarrow.parquet").write_table(
            table, meta / "episodes" / f"{CHUNK.format(0)}.parquet"
        )
        whole = {feature: np.concatenate(parts) for feature, parts in samples.items()}
        write_json(meta / "stats.json", all_statistics(whole))
        info = {
            "codebase_version": "v3.0",
            "robot_type": episodes[0].robot,
            "total_episodes": len(episodes),
            "total_frames": sum(map(len, episodes)),
            "total_tasks": len(sentences),
            "chunks_size": 1000,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": FILM_BYTES // 1_000_000,
            "fps": fps,
            "splits": {"train": f"0:{len(episodes)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": feature_table(episodes[0], fps, video),
        }
        # last, as lerobot does: a folder without it is no dataset
        write_json(meta / "info.json", info)
    print(
        f"{len(episodes)} episodes of {episodes[0].robot}, {len(sentences)} instructions, in {out}"
    )
