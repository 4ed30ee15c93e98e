"""Write our episodes as a LeRobotDataset v3.0, which lerobot loads, edits and trains on.

One data file, with one row group per episode; for each camera one video of all episodes in a row,
and a new one when the last is full. Images become H.264 with every second one a keyframe, for fast
random access; with --no-video they stay the JPEG files that they are, in the rows, without loss.
Two text columns hold what lerobot has no place for: PHASE and HEADER, which `import` reads back.
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

FILM_BYTES = 200_000_000  # per mp4, lerobot's own limit
CHUNK = "chunk-000/file-{:03d}"  # a chunk is 1,000 files, more than there will be
PIXELS = "yuv444p"  # 4:2:0 would make the shipped policy's joint targets err by 1.7 times as much
CODEC = {"crf": "18", "g": "2", "bf": "0"}  # bf 0: an image's time is its number / fps
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
STRIDE = 10  # frames between those whose pixels are sampled for the statistics
SCALARS = {  # one number per column
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


# ---- names of the numbers


def names_in(episode):
    """(names of the state's S numbers, of the action's A); [] if unknown."""
    about = episode.about
    # imported: the dataset's own names
    if "dataset" in about:
        return about["state_names"], about["action_names"]
    # another simulator's: described in words, not named one by one
    if "env" in about:
        return [], []
    robot = get_robot(episode.robot)
    # with the unit as suffix, because info.json has no field for it
    joints = [f"{robot.model.joint(i).name}.rad" for i in range(robot.dof)]
    fingers = [*joints, "finger.m"]
    places = [f"tcp_{axis}.m" for axis in "xyz"]
    turns = [f"tcp_{column}_axis_{axis}" for column in "xy" for axis in "xyz"]
    return [*fingers, *places, *turns], fingers


# ---- videos


class Film:
    """The videos of one camera, written image by image, in as many files as needed."""

    def __init__(self, folder, fps):
        self.folder = folder
        self.fps = Fraction(fps).limit_denominator(1000)
        self.number = -1  # number of the current file
        self.open_next()

    def open_next(self):
        av = extra("av")
        self.number += 1
        self.frames = 0
        self.bytes = 0
        path = self.folder / f"{CHUNK.format(self.number)}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = av.open(str(path), "w")
        # H.264, although lerobot's default is AV1: every decoder supports it
        self.stream = self.file.add_stream("libx264", rate=self.fps, options=CODEC)
        # color at full resolution, because objects are only a few pixels wide
        self.stream.pix_fmt = PIXELS

    def add(self, picture):
        av = extra("av")
        # the encoder opens with the first image
        if not self.frames:
            self.stream.height, self.stream.width = picture.shape[:2]
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        # whole multiples of 1 / fps: lerobot requires an image within 0.1 ms of its row
        frame.pts = self.frames
        frame.time_base = 1 / self.fps
        self.write(self.stream.encode(frame))
        self.frames += 1

    def write(self, packets):
        for packet in packets:
            self.bytes += packet.size
            self.file.mux(packet)

    def close(self):
        # flush the encoder
        self.write(self.stream.encode())
        self.file.close()

    def make_room(self):
        """Continue in a new file if this one is full; called between episodes."""
        # an episode is never split: its row names a single file
        if self.bytes > FILM_BYTES:
            self.close()
            self.open_next()


# ---- statistics


def statistics(values):
    """{name: list} for values (n, d), each of d numbers: lerobot's statistics of a feature."""
    # in double precision: sums over millions of pixels
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
    """{feature: statistics} of {feature: values (n, d)}; pixels (n, 3) in lerobot's shape."""
    table = {}
    for feature, values in samples.items():
        table[feature] = statistics(values)
        if feature.startswith("observation.images."):  # one number per color: (3, 1, 1)
            for name in table[feature].keys() - {"count"}:
                table[feature][name] = [[[number]] for number in table[feature][name]]
    return table


def pixels_of(pictures):
    """(n, 3) in 0..1: every fourth pixel in both directions of some images."""
    return np.concatenate([picture[::4, ::4].reshape(-1, 3) for picture in pictures]) / 255


# ---- tables


def header_of(episode):
    """What training depends on besides rows and words, as JSON, to be repeated in every row.

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
    """{feature: (L,) or (L, n)}: an episode's rows; first is the index of its first row."""
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
    """{camera: its encoded images}: the columns of cameras that are not stored as video."""
    columns = {camera: [] for camera in cameras}
    for t in range(len(episode)):
        # lerobot writes PNG, but reads whatever PIL reads
        for camera, body in zip(cameras, episode.jpegs(t), strict=True):
            columns[camera].append({"bytes": body, "path": f"frame-{t:06d}.jpg"})
    return columns


def to_table(columns):
    """Columns as an arrow table: (L, n) becomes lists of n, (L,) and (L, 1) plain numbers."""
    arrow = extra("pyarrow")
    arrays = {}
    for name, values in columns.items():
        # images: arrow infers the type that lerobot expects, bytes and path
        if isinstance(values, list):
            arrays[name] = arrow.array(values)
            continue
        flat = arrow.array(values.ravel())  # (L n,)
        width = values.size // len(values)
        # lerobot reads a feature of shape (1,) as a plain number
        arrays[name] = flat if width == 1 else arrow.FixedSizeListArray.from_arrays(flat, width)
    return arrow.table(arrays)


def write_tasks(path, sentences):
    """Write the sentences in the order of their task_index, as a pandas table with them as index.

    lerobot looks up a frame's sentence by row number, not by task_index: the two must be the same.
    """
    arrow = extra("pyarrow")
    index = "__index_level_0__"  # pandas' name for an unnamed index
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
    """The entry of info.json for a camera with images like this one."""
    height, width, _ = picture.shape
    names = ["height", "width", "channels"]
    feature = {"dtype": "image", "shape": [height, width, 3], "names": names}
    # 0.6.1 stores more about the encoder, but does not need it
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
    """The entries of info.json for all features."""
    state_names, action_names = names_in(episode)
    state = {"dtype": "float32", "shape": [episode.state.shape[1]], "names": state_names or None}
    action = {"dtype": "float32", "shape": [episode.action.shape[1]], "names": action_names or None}
    features = {"observation.state": state, "action": action}
    for view, picture in zip(episode.embodiment.views, episode.images(0), strict=True):
        features[f"observation.images.{view}"] = camera_feature(picture, fps, video)
    # lerobot passes these on unchanged, and computes no statistics for them
    for name in (PHASE, HEADER):
        features[name] = {"dtype": "string", "shape": [1], "names": None}
    scalars = {name: {"dtype": t, "shape": [1], "names": None} for name, t in SCALARS.items()}
    return features | scalars


# ---- the dataset


def chosen_episodes(folder, robot):
    """The episodes of one robot, all alike. UserError if robots, sizes or rates differ."""
    episodes = load_episodes(folder)
    # info.json has one shape for all episodes
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
    """What must be the same in all episodes of a dataset, in words."""
    sizes = [picture.shape[0] for picture in episode.images(0)]
    return f"{episode.embodiment.shape()}, pictures of {sizes} pixels"


def sample_pixels(cameras, episode):
    """{camera: pixels (n, 3)} for the statistics."""
    kept = {camera: [] for camera in cameras}
    # neighboring frames look alike
    for t in range(0, len(episode), STRIDE):
        for camera, picture in zip(cameras, episode.images(t), strict=True):
            kept[camera].append(picture)
    return {camera: pixels_of(pictures) for camera, pictures in kept.items()}


def film_episode(films, episode):
    """Append an episode to {camera: Film}. Returns the video columns of its row."""
    starts = {}
    # note where it starts, after choosing the file
    for camera, film in films.items():
        film.make_room()
        starts[camera] = film.frames
    for t in range(len(episode)):
        for film, picture in zip(films.values(), episode.images(t), strict=True):
            film.add(picture)
    row = {}
    for camera, film in films.items():
        prefix = f"videos/{camera}"
        # each camera's own, which may differ from the data's and the other camera's
        row[f"{prefix}/chunk_index"] = 0
        row[f"{prefix}/file_index"] = film.number
        row[f"{prefix}/from_timestamp"] = float(starts[camera] / film.fps)
        row[f"{prefix}/to_timestamp"] = float(film.frames / film.fps)
    return row


def write_rows(out, episodes, fps, video):
    """Write data and videos: (rows of meta/episodes, {feature: [values of each]}, sentences)."""
    # task_index is a sentence's index here
    sentences = list(dict.fromkeys(episode.instruction for episode in episodes))
    cameras = [f"observation.images.{view}" for view in episodes[0].embodiment.views]
    filmed = cameras if video else []
    films = {camera: Film(out / "videos" / camera, fps) for camera in filmed}
    path = out / "data" / f"{CHUNK.format(0)}.parquet"
    path.parent.mkdir(parents=True)
    rows = []
    samples = {}
    first = 0  # dataset index of the episode's first row
    writer = None
    for number, episode in enumerate(tqdm(episodes, unit="episode")):
        task_index = sentences.index(episode.instruction)
        columns = data_columns(episode, number, first, task_index, fps)
        pictures = {} if video else picture_columns(cameras, episode)
        table = to_table(columns | pictures)
        # all episodes have the schema of the first
        writer = writer or extra("pyarrow.parquet").ParquetWriter(path, table.schema)
        writer.write_table(table)
        # text has no statistics
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
        # lerobot needs these to merge and edit datasets
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
    """Write the episodes of `folder` as a LeRobotDataset v3.0 to the new folder `out`.

    robot: which one, if there are several; video: small videos, or images as they are.
    The folder appears whole or not at all. UserError if robots, sizes or rates differ.
    """
    arrow = extra("pyarrow")
    episodes = chosen_episodes(folder, robot)
    fps = episodes[0].embodiment.control_hz
    fps = int(fps) if fps == int(fps) else fps  # an integer in lerobot's info.json
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
        # written last, as in lerobot: a folder without it is not a dataset
        write_json(meta / "info.json", info)
    print(
        f"{len(episodes)} episodes of {episodes[0].robot}, {len(sentences)} instructions, in {out}"
    )
