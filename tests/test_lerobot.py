"""LeRobotDatasets: lerobot's are read exactly, ours are read back, and faults are named."""

import json
import re
import shutil
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import lerobot_scene as scene
import numpy as np
import pytest
import torch
from PIL import Image

from cli import UserError, parse, run
from data.expert import Demonstration
from data.record import Episode, load_episodes, write_episode
from embodiment import Embodiment

pa = pytest.importorskip("pyarrow", reason="pip install -r requirements-lerobot.txt")
pq = pytest.importorskip("pyarrow.parquet", reason="pip install -r requirements-lerobot.txt")
pytest.importorskip("av", minversion="18", reason="pip install -r requirements-lerobot.txt")

from data import lerobot_check, lerobot_read
from data.lerobot import ImportFlags, as_kept, find_relative, import_dataset, main
from data.lerobot_check import check
from data.lerobot_read import Clip, Dataset, Recording, film_pictures, find_dataset, names_of
from data.lerobot_write import export

FIXTURES = Path(__file__).parent / "fixtures" / "lerobot"
ALL = ("v30_av1", "v30_h264", "v30_image", "v21", "v061_av1", "v061_h264", "v061_image")
TOP, WRIST = (f"observation.images.{camera}" for camera in scene.CAMERAS)
CAMERAS = f"front={TOP},wrist={WRIST}"


def run_import(folder, out, *flags, cameras=CAMERAS):
    import_dataset(folder, out, parse(ImportFlags, argv=["--cameras", cameras, *flags]))
    return load_episodes(out)


def edit(path, **changes):
    """Rewrite columns of a parquet file: {name: function of its list of values}."""
    table = pq.read_table(path, partitioning=None)
    for name, change in changes.items():
        place = table.schema.get_field_index(name)
        field = table.schema.field(name)
        table = table.set_column(
            place, field, pa.array(change(table[name].to_pylist()), field.type)
        )
    pq.write_table(table, path)


def edit_info(folder, **changes):
    path = folder / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copied(tmp_path):
    """A function that copies a fixture, for tests to modify."""

    def copy(name):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        return tmp_path / name

    return copy


def data_file(folder):
    return next(folder.glob("data/*/*.parquet"))


def episodes_file(folder):
    return next(folder.glob("meta/episodes/*/*.parquet"))


def at(place, value):
    """A change of one value of a column."""

    def change(values):
        values[place] = value
        return values

    return change


# ---- what lerobot wrote


@pytest.mark.parametrize("name", ALL)
def test_every_number_and_picture_of_lerobots_own_datasets_is_right(name):
    dataset = Dataset(FIXTURES / name)
    assert [entry.length for entry in dataset.entries] == list(scene.LENGTHS)
    for entry in dataset.entries:
        recording = dataset.recording(entry)
        state, action = scene.numbers(entry.index)
        assert np.array_equal(recording.state, state)
        assert np.array_equal(recording.action, action)
        assert recording.tasks == [scene.TASKS[entry.index]] * entry.length
        for camera in scene.CAMERAS:
            key = f"observation.images.{camera}"
            pictures = list(dataset.pictures(entry, key, recording.timestamp))
            assert len(pictures) == entry.length
            for t, seen in enumerate(pictures):
                true = [scene.picture(entry.index, u, camera) for u in range(entry.length)]
                errors = [np.abs(seen.astype(float) - one).mean() for one in true]
                assert np.argmin(errors) == t and errors[t] < (
                    0.01 if name.endswith("image") else 4
                )


def test_a_camera_has_files_of_its_own():
    clips = [entry.clips for entry in Dataset(FIXTURES / "v30_h264").entries]
    assert [clip[TOP].path.stem for clip in clips] == ["file-000", "file-000", "file-001"]
    assert [clip[WRIST].path.stem for clip in clips] == ["file-000", "file-001", "file-002"]
    # in one camera's video the second episode follows the first, in the other's it is alone
    assert clips[1][TOP].start == pytest.approx(1.2) and clips[1][WRIST].start == 0


@pytest.mark.parametrize("name", ALL)
def test_an_import_keeps_numbers_words_and_the_middle_of_the_pictures(name, tmp_path, capsys):
    episodes = run_import(FIXTURES / name, tmp_path / "mine")
    assert [len(episode) for episode in episodes] == list(scene.LENGTHS)
    for i, episode in enumerate(episodes):
        state, action = scene.numbers(i)
        assert episode.robot == "so101_follower" and episode.scene == name
        assert episode.task == episode.instruction == scene.TASKS[i]
        assert np.array_equal(episode.state, state) and np.array_equal(episode.action, action)
        for camera, seen in zip(scene.CAMERAS, episode.images(5), strict=True):
            true = scene.picture(i, 5, camera)[:, 8:56]  # 64 wide: 8 columns at each side go
            assert np.abs(seen.astype(float) - true).mean() < 6
    assert episodes[0].about["state_names"] == scene.NAMES and episodes[0].about["fps"] == 10
    printed = capsys.readouterr().out
    assert "action, 6 numbers: shoulder_pan.pos" in printed
    assert "not read: next.reward, observation.touch" in printed
    assert ("language_events" in printed) == (name in ("v061_av1", "v061_image"))


def test_pictures_are_shrunk_and_robots_and_tasks_renamed_if_asked(tmp_path):
    flags = ["--size", "32", "--robot", "so-101", "--task", "tidy up", "--episodes", "1:"]
    episodes = run_import(FIXTURES / "v30_image", tmp_path / "mine", *flags)
    assert [episode.seed for episode in episodes] == [1, 2]
    assert {episode.instruction for episode in episodes} == {"tidy up"}
    assert {episode.robot for episode in episodes} == {"so-101"}
    assert episodes[0].images(0)[0].shape == (32, 32, 3)


@pytest.mark.parametrize("views", [["top"], ["hand", "top"], ["top", "hand", "again"]])
def test_one_to_three_cameras_come_in_under_their_names_and_in_their_order(views, tmp_path):
    sources = {"top": TOP, "hand": WRIST, "again": TOP}
    cameras = ",".join(f"{view}={sources[view]}" for view in views)
    episode = run_import(FIXTURES / "v30_image", tmp_path / "mine", cameras=cameras)[1]
    assert episode.embodiment.views == tuple(views)
    seen = episode.observation(3)["images"]
    assert list(seen) == views
    for view, picture in seen.items():
        true = scene.picture(1, 3, sources[view].rpartition(".")[2])[:, 8:56]
        assert np.abs(picture.astype(float) - true).mean() < 6
    # and out again
    export(tmp_path / "mine", tmp_path / "v3")
    assert Dataset(tmp_path / "v3").cameras == [f"observation.images.{view}" for view in views]


# ---- what other datasets look like


def test_language_columns_are_passed_over(copied, tmp_path, capsys):
    folder = copied("v30_image")
    path = data_file(folder)
    table = pq.read_table(path, partitioning=None)
    note = {"role": "user", "content": "now", "style": None, "timestamp": 0.0, "camera": None}
    table = table.append_column("language_persistent", pa.array([[note]] * len(table)))
    pq.write_table(table, path)
    info = json.loads((folder / "meta/info.json").read_text())
    language = {"dtype": "language", "shape": [1], "names": None}
    edit_info(folder, features=info["features"] | {"language_persistent": language})
    assert len(run_import(folder, tmp_path / "mine")) == 3
    assert "language_persistent" in capsys.readouterr().out


@pytest.mark.parametrize("index", ["__index_level_0__", "task", "sentence"])
def test_sentences_are_joined_by_task_index(index, copied):
    folder = copied("v30_image")
    # not in the order of the index, and the table of episodes does not list it
    tasks = {"task_index": [1, 0], index: [scene.TASKS[1], scene.TASKS[0]]}
    pq.write_table(pa.table(tasks), folder / "meta/tasks.parquet")
    table = pq.read_table(episodes_file(folder), partitioning=None)
    pq.write_table(table.drop_columns(["tasks"]), episodes_file(folder))
    dataset = Dataset(folder)
    assert [dataset.recording(e).tasks[0] for e in dataset.entries] == scene.TASKS


def test_no_statistics_are_needed(copied, tmp_path):
    folder = copied("v30_image")
    (folder / "meta/stats.json").unlink()
    table = pq.read_table(episodes_file(folder), partitioning=None)
    kept = [name for name in table.column_names if not name.startswith("stats/")]
    pq.write_table(table.select(kept), episodes_file(folder))
    assert len(run_import(folder, tmp_path / "mine")) == 3


def test_a_feature_of_shape_1_is_a_column_of_plain_numbers(tmp_path):
    flags = ["--state", "next.reward", "--action", "next.reward"]
    episode = run_import(FIXTURES / "v30_image", tmp_path / "mine", *flags)[0]
    assert np.array_equal(episode.state, np.arange(12)[:, None])


@pytest.mark.parametrize(
    "names, read",
    [
        (None, []),
        (["a", "b"], ["a", "b"]),
        ({"motors": ["a", "b"]}, ["a", "b"]),
        ({"left": ["a"], "right": ["b"]}, ["a", "b"]),
        ({"a": 0, "b": 1}, ["a", "b"]),
        ([["a", "b"]], ["a", "b"]),
    ],
)
def test_names_are_read_in_every_shape_they_come_in(names, read):
    assert names_of({"names": names}) == read


def test_names_that_are_not_given_are_not_guessed(copied):
    folder = copied("v21")
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    features["action"]["names"] = None
    edit_info(folder, features=features, codebase_version="v2.0")
    lines = Dataset(folder).describe()
    assert "action, 6 numbers: it does not name them" in lines and "v2.0" in lines[0]


def test_a_part_of_a_download_is_enough_for_its_episodes(copied, tmp_path):
    folder = copied("v30_h264")
    (folder / f"videos/{WRIST}/chunk-000/file-002.mp4").unlink()
    with pytest.raises(UserError, match="file-002.mp4 does not exist.*--episodes"):
        run_import(folder, tmp_path / "mine")
    assert len(run_import(folder, tmp_path / "mine", "--episodes", ":2")) == 2


def test_a_hub_name_is_fetched_without_the_films_of_other_cameras(monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(FIXTURES / "v21")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert find_dataset("someone/bricks", [TOP]) == FIXTURES / "v21"
    assert asked["name"] == "someone/bricks" and asked["repo_type"] == "dataset"
    assert f"videos/*{TOP}/*" in asked["allow_patterns"] and "meta/*" in asked["allow_patterns"]


def test_what_to_install_is_said():
    with pytest.raises(UserError, match="pip install -r requirements-lerobot.txt"):
        lerobot_read.extra("no_such_package")


# ---- which picture


def film_of(path, times, size=16):
    """A video whose k-th image has brightness 10 k, at times in ms."""
    import av

    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=1000, options={"crf": "1", "bf": "0", "g": "2"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for k, time in enumerate(times):
            picture = np.full((size, size, 3), 10 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = time
            frame.time_base = Fraction(1, 1000)
            film.mux(stream.encode(frame))
        film.mux(stream.encode())


def numbers_in(clip, timestamps):
    return [round(float(p.mean()) / 10) for p in film_pictures(clip, timestamps, 10)]


def test_the_nearest_picture_is_taken(tmp_path):
    path = tmp_path / "a.mp4"
    film_of(path, [0, 100, 200, 340, 400, 500, 600])
    whole = Clip(path, 0.0, None)
    assert numbers_in(whole, [0.0, 0.1, 0.2, 0.3]) == [0, 1, 2, 3]
    assert numbers_in(whole, [0.04, 0.16, 0.41]) == [0, 2, 4]
    assert numbers_in(Clip(path, 0.4, None), [0.0, 0.1, 0.2]) == [4, 5, 6]


@pytest.mark.parametrize(
    "start, stop, timestamps, says",
    [
        (0.0, None, [0.0, 0.265], "no picture at 0.265 s: the nearest is at 0.2"),
        (0.0, None, [0.5, 0.6, 0.7], "no picture at 0.700 s"),
        # its neighbor in the video belongs to another episode
        (0.2, 0.5, [0.0, 0.2, 0.3], "no picture at 0.500 s: the nearest is at 0.4"),
        (0.4, 0.7, [-0.06], "no picture at 0.340 s: the nearest is at 0.4"),
        (0.0, None, [0.1, 0.1], "timestamps do not increase"),
        (3.0, None, [0.0], "no picture"),
    ],
)
def test_a_picture_of_another_time_is_never_taken(start, stop, timestamps, says, tmp_path):
    path = tmp_path / "a.mp4"
    film_of(path, [0, 100, 200, 340, 400, 500, 600])
    with pytest.raises(UserError, match=says):
        numbers_in(Clip(path, start, stop), timestamps)


# ---- which numbers are targets


def arms(n=400):
    """state (n, 3) of a slow movement, and its values one step later."""
    path = np.cumsum(np.random.default_rng(0).normal(size=(n + 1, 3)), 0)
    return path[:-1], path[1:]


NAMES = ["pan.pos", "lift.pos", "gripper.pos"]


def test_targets_are_found_by_name_and_grippers_left_out():
    state, target = arms()
    assert find_relative(state, target, NAMES, NAMES) == [0, 1, -1]
    order = [2, 1, 0]
    other = [NAMES[i] for i in order]
    assert find_relative(state, target[:, order], NAMES, other) == [-1, 1, 0]
    # a name that the state does not have, and an action with more numbers than the state
    assert find_relative(state, target, ["pan.pos", "x", "y"], NAMES) == [0, -1, -1]
    assert find_relative(state[:, :1], target, NAMES[:1], NAMES) == [0, -1, -1]


def test_without_names_targets_stand_in_the_same_place():
    state, target = arms()
    assert find_relative(state, target, [], []) == [0, 1, -1]
    assert find_relative(state[:, :1], target, [], []) == [0, -1, -1]
    assert find_relative(state, target[:, :2], NAMES, []) == [0, -1]
    assert find_relative(state, target, ["motor"] * 3, ["motor"] * 3) == [0, 1, -1]


def test_deltas_and_other_units_are_no_targets_whatever_they_are_called():
    state, target = arms()
    assert find_relative(state, target - state, NAMES, NAMES) == [-1, -1, -1]
    assert find_relative(state, np.degrees(target), NAMES, NAMES) == [-1, -1, -1]
    assert find_relative(state, 0 * target, NAMES, NAMES) == [-1, -1, -1]


def test_an_import_says_and_keeps_what_is_relative(copied, tmp_path, capsys):
    episode = run_import(FIXTURES / "v30_h264", tmp_path / "targets")[0]
    assert episode.embodiment.relative == (0, 1, 2, 3, 4, -1)
    assert "shoulder_pan.pos" in episode.embodiment.state
    printed = capsys.readouterr().out
    assert "wrist_roll.pos; as they are: gripper.pos" in printed
    folder = copied("v30_h264")
    edit(
        data_file(folder),
        action=lambda rows: [[*np.sin(row), 0.5] for row in np.array(rows)[:, :5]],
    )
    episode = run_import(folder, tmp_path / "deltas")[0]
    assert episode.embodiment.relative == (-1,) * 6
    assert "learned relative to the state: none; as they are: shoulder" in capsys.readouterr().out


# ---- what cannot be imported


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def leave_by_path(folder):
    path = json.loads((folder / "meta/info.json").read_text())["video_path"]
    edit_info(folder, video_path=f"../../{path}")


def later(values):
    return [value + 0.2 for value in values]


FAULTS = {
    "no info": ("v30_h264", lambda f: (f / "meta/info.json").unlink(), "info.json.*LeRobotDataset"),
    "version": ("v21", lambda f: edit_info(f, codebase_version="v1.6"), "info.json.*'v1.6'.*v3.0"),
    "no data": ("v30_h264", lambda f: data_file(f).unlink(), "file-000.parquet does not exist"),
    "no tasks": ("v30_h264", lambda f: (f / "meta/tasks.parquet").unlink(), "tasks.parquet"),
    "no episodes": ("v30_h264", lambda f: episodes_file(f).unlink(), "lists no episodes"),
    "no lines": ("v21", lambda f: (f / "meta/episodes.jsonl").unlink(), "episodes.jsonl"),
    "broken line": (
        "v21",
        lambda f: (f / "meta/tasks.jsonl").write_text('{"task_index": 0}'),
        "tasks.jsonl.*lacks 'task'",
    ),
    "fewer than promised": (
        "v30_h264",
        lambda f: edit_info(f, total_episodes=4),
        "info.json.*4 episodes, but 3",
    ),
    "cut parquet": ("v30_image", lambda f: truncated(data_file(f)), "file-000.parquet"),
    "cut film": (
        "v21",
        lambda f: truncated(f / f"videos/chunk-000/{TOP}/episode_000001.mp4"),
        "episode 1: .*episode_000001.mp4",
    ),
    "dropped pictures": (
        "v30_h264",
        lambda f: edit(episodes_file(f), **{f"videos/{TOP}/to_timestamp": at(1, 2.0)}),
        "episode 1: .*file-000.mp4.*8 pictures.*9 rows",
    ),
    "short film of v2": (
        "v21",
        lambda f: shutil.copy(
            f / f"videos/chunk-000/{TOP}/episode_000001.mp4",
            f / f"videos/chunk-000/{TOP}/episode_000002.mp4",
        ),
        "episode 2: .*episode_000002.mp4.*9 pictures.*15 rows",
    ),
    "shifted times": (
        "v30_h264",
        lambda f: edit(data_file(f), timestamp=later),
        "episode 0: .*no picture at 1.2",
    ),
    "film leaves the folder": ("v30_h264", leave_by_path, "is outside"),
    "picture leaves the folder": (
        "v30_image",
        lambda f: edit(data_file(f), **{TOP: at(14, {"bytes": None, "path": "../../../x.png"})}),
        "episode 1: .*is outside",
    ),
    "no picture": ("v30_image", lambda f: edit(data_file(f), **{TOP: at(14, None)}), "episode 1: "),
    "NaN": (
        "v30_h264",
        lambda f: edit(data_file(f), **{"observation.state": at(15, [1, 2, np.nan, 4, 5, 6])}),
        "episode 1: .*file-000.parquet: state at frame 3 holds nan",
    ),
    "no number": (
        "v30_h264",
        lambda f: edit(data_file(f), action=at(2, [1, 2, None, 4, 5, 6])),
        "episode 0: .*action at frame 2 holds nan",
    ),
    "ticks": (
        "v30_h264",
        lambda f: edit(data_file(f), action=at(2, [1, 2, 2048, 4, 5, 6])),
        "holds 2048.0; it must be below 1000",
    ),
    "fewer rows": (
        "v30_h264",
        lambda f: edit(data_file(f), episode_index=at(20, 2)),
        "episode 1: .*8 rows, not 9",
    ),
    "no instruction": (
        "v30_h264",
        lambda f: edit(data_file(f), task_index=at(13, 7)),
        "episode 1: .*frame 1 has no instruction; give one with --task",
    ),
    "two instructions": (
        "v30_h264",
        lambda f: edit(data_file(f), task_index=at(13, 0)),
        "episode 1: .*'Open the drawer', but 'Put the brick.* at frame 1",
    ),
    "no robot": ("v30_h264", lambda f: edit_info(f, robot_type=None), "--robot"),
    "strange robot": ("v30_h264", lambda f: edit_info(f, robot_type="../x"), "--robot"),
}


@pytest.mark.parametrize("name, spoil, says", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_in_one_line_and_nothing_is_written(name, spoil, says, copied, tmp_path):
    folder = copied(name)
    spoil(folder)
    with pytest.raises(UserError, match=says) as caught:
        run_import(folder, tmp_path / "mine")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "cameras, says",
    [
        (f"front={TOP},wrist=wirst", f"unknown camera 'wirst', choose from: {TOP}, {WRIST}"),
        (f"front={TOP},wrist={WRIST},front={WRIST}", "names front twice"),
        (f"a={TOP},b={TOP},c={TOP},d={WRIST}", "names 4: at most 3; the cameras are"),
        (f"state={TOP}", "--cameras state=.*not a valid camera name"),
        (f"../x={TOP}", "not a valid camera name"),
        (TOP, "front=...,wrist=..."),
    ],
)
def test_cameras_are_named_exactly(cameras, says, tmp_path):
    with pytest.raises(UserError, match=says):
        run_import(FIXTURES / "v21", tmp_path / "mine", cameras=cameras)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--state", "observation.stat"], "did you mean observation.state"),
        (["--episodes", "5"], "START:STOP"),
        (["--episodes", "7:"], "there are 3"),
        (["--size", "4"], "from 16 to 1024"),
    ],
)
def test_wrong_flags_are_told(flags, says, tmp_path):
    with pytest.raises(UserError, match=says):
        run_import(FIXTURES / "v21", tmp_path / "mine", *flags)
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        ("", "unknown command '', choose from: check, import, export"),
        ("imprt", "did you mean import"),
        ("import onlyone --cameras front=a,wrist=b", "data.lerobot import FOLDER OUT"),
        ("check nowhere", "nowhere: there is no such folder"),
        ("import {fixture} {tmp}/mine", f"front=...,wrist=.*the cameras are {TOP}"),
        ("import {fixture} {tmp}/mine --camera x", "did you mean --cameras"),
    ],
)
def test_a_wrong_command_ends_in_one_line(words, says, tmp_path, monkeypatch, capsys):
    words = words.format(fixture=FIXTURES / "v21", tmp=tmp_path)
    monkeypatch.setattr("sys.argv", ["lerobot.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        run(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(says, said) and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="already exists"):
        run_import(FIXTURES / "v21", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


# ---- what we write


def demonstration(seed, length=12, size=64):
    """A slow video of large patches, which a codec preserves well, and arbitrary numbers."""
    draws = np.random.default_rng(seed)
    patches = draws.integers(30, 150, (2, size // 32, size // 32, 3), dtype=np.uint8)
    pictures = patches.repeat(32, 1).repeat(32, 2)
    return Demonstration(
        states=draws.normal(size=(length, 16)).astype(np.float32),
        actions=draws.normal(size=(length, 7)).astype(np.float32),
        phases=["reach"] * length,
        images=[
            {"front": pictures[0] + 6 * (t % 12), "wrist": pictures[1] + 8 * (t % 12)}
            for t in range(length)
        ],
        success=True,
        instruction=["push it", "lift it"][seed % 2],
    )


@pytest.fixture
def demos(tmp_path):
    """A folder of three episodes of one robot."""
    for seed in range(3):
        about = {"robot": "widowx", "task": "PushCube", "seed": seed, "noise": 0}
        path = tmp_path / "demos" / f"widowx-PushCube-{seed}.safetensors"
        write_episode(path, demonstration(seed, 10 + seed), about)
    return tmp_path / "demos"


def test_an_export_reads_back(demos, tmp_path):
    export(demos, tmp_path / "v3")
    cameras = "front=observation.images.front,wrist=observation.images.wrist"
    back = run_import(tmp_path / "v3", tmp_path / "back", cameras=cameras)
    for ours, theirs in zip(load_episodes(demos), back, strict=True):
        assert np.array_equal(ours.state, theirs.state)
        assert np.array_equal(ours.action, theirs.action)
        assert ours.instruction == theirs.instruction and theirs.robot == "widowx"
        for t in range(len(ours)):
            for one, other in zip(ours.images(t), theirs.images(t), strict=True):
                assert np.abs(one.astype(float) - other).mean() < 4


BACK = "front=observation.images.front,wrist=observation.images.wrist"


def played_twice(folder):
    """Episodes of families and of a task, where no number moves enough to guess `relative`."""
    for scene_name, seed, command in [
        ("which_cube", 7, 0),
        ("which_cube", 7, 1),
        ("which_cube", 9, 0),
        ("which_cube", 9, 1),
        ("PushCube", 4, 0),
        ("PushCube", 11, 0),
    ]:
        about = {"robot": "widowx", "scene": scene_name, "command": command, "seed": seed}
        about |= {"task": "PickCube", "noise": 0.015, "maker": "expert"}
        demonstrated = demonstration(seed + command, 30 + seed)
        demonstrated.phases = ["reach"] * 20 + ["grasp"] * (10 + seed)
        demonstrated.actions[:, 2] = 0.5
        write_episode(folder / f"{scene_name}-{seed}-{command}.safetensors", demonstrated, about)


def losses_of(episodes, steps=3):
    """Losses of training steps on episodes with hidden states made from the images."""
    from data.demonstrations import Demonstrations, frames_of
    from policy import PRESETS, Policy
    from train_policy import TrainConfig, make_batch

    hidden = []
    for episode in episodes:
        pictures = [np.concatenate(episode.images(t)) for t in frames_of(episode)]
        patches = np.stack(pictures)[:, ::16, :4, 0].astype(np.float16)  # (frames, 8, 4)
        hidden.append(np.tile(patches / 255, 2))
    demos = Demonstrations(episodes, hidden, 16, 4)
    torch.manual_seed(0)
    policy = Policy(PRESETS["nano"], 8, demos.embodiments)
    demos.fit_statistics(policy.normalizer)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    cfg = TrainConfig(batch_size=8)
    seen = []
    for step in range(steps):
        losses = policy(*make_batch(demos, policy, cfg, step))
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({name: loss.item() for name, loss in losses.items()})
    return seen


def test_an_export_without_films_trains_the_same_policy_to_the_bit(tmp_path):
    played_twice(tmp_path / "demos")
    export(tmp_path / "demos", tmp_path / "v3", video=False)
    back = run_import(tmp_path / "v3", tmp_path / "back", cameras=BACK)
    direct = load_episodes(tmp_path / "demos")
    # in the same order: which rows a step has depends on it
    for ours, theirs in zip(direct, back, strict=True):
        for name in ("robot", "scene", "command", "task", "seed", "instruction", "phases"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.embodiment == theirs.embodiment
        assert theirs.about["maker"] == "expert" and theirs.about["noise"] == 0.015
        for name in ("state", "action", "offset"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one.dtype == other.dtype and np.array_equal(one, other), name
        for t in range(len(ours)):
            assert ours.jpegs(t) == theirs.jpegs(t)
    assert losses_of(direct) == losses_of(back)


def test_films_keep_the_color_of_every_pixel(tmp_path):
    from data.lerobot_write import Film

    # stripes one pixel wide, of one brightness, and an odd number of pixels
    stripes = np.full((33, 33, 3), (200, 60, 60), np.uint8)
    stripes[:, ::2] = (60, 130, 60)
    film = Film(tmp_path, 20)
    for _ in range(4):
        film.add(stripes)
    film.close()
    clip = Clip(tmp_path / "chunk-000/file-000.mp4", 0.0, None)
    seen = next(film_pictures(clip, [0.0], 20))
    assert np.abs(seen.astype(float) - stripes).mean() < 6


def test_films_keep_all_but_the_pictures(tmp_path):
    played_twice(tmp_path / "demos")
    export(tmp_path / "demos", tmp_path / "v3")
    back = run_import(tmp_path / "v3", tmp_path / "back", cameras=BACK)
    for ours, theirs in zip(load_episodes(tmp_path / "demos"), back, strict=True):
        for name in ("scene", "command", "seed", "instruction", "phases", "embodiment"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert np.array_equal(ours.state, theirs.state)


def test_an_export_under_other_names_or_cameras_is_another_robot(demos, tmp_path):
    export(demos, tmp_path / "v3", video=False)
    cameras = "hand=observation.images.wrist"
    episode = run_import(tmp_path / "v3", tmp_path / "a", "--robot", "mine", cameras=cameras)[1]
    assert episode.robot == "mine" and episode.embodiment.views == ("hand",)
    assert episode.seed == 1 and episode.phases[0] == "reach"
    small = run_import(tmp_path / "v3", tmp_path / "b", "--size", "32", cameras=BACK)[0]
    assert small.images(0)[0].shape == (32, 32, 3)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "not JSON"),
        ('{"scene": "a"}', "lacks 'command'"),
        (None, "file-000.parquet"),
        ("seed", "count from 0"),
        ("embodiment", "cameras"),
    ],
)
def test_a_header_that_cannot_be_is_refused(text, says, demos, tmp_path):
    export(demos, tmp_path / "v3", video=False)

    def spoil(values):
        header = json.loads(values[0])
        if text == "seed":
            header["seed"] = -1
        if text == "embodiment":
            header["embodiment"]["views"] = []
        spoilt = json.dumps(header) if text in ("seed", "embodiment") else text
        return [spoilt] * len(values)

    edit(data_file(tmp_path / "v3"), **{lerobot_read.HEADER: spoil})
    with pytest.raises(UserError, match=f"episode 0: .*{says}"):
        run_import(tmp_path / "v3", tmp_path / "back", cameras=BACK)
    assert not (tmp_path / "back").exists()


def test_other_simulators_episodes_come_back_too(tmp_path):
    numbers = Embodiment(16, 7, relative=(-1,) * 7, control_hz=10, state="a", action="b")
    about = {"robot": "sawyer", "task": "door-open", "scene": "door-open", "seed": 3}
    about |= {"command": 0, "noise": 0, "maker": "expert", "env": "metaworld"}
    about["embodiment"] = vars(numbers)
    for seed in (3, 5):
        path = tmp_path / "demos" / f"{seed}.safetensors"
        write_episode(path, demonstration(seed), about | {"seed": seed})
    export(tmp_path / "demos", tmp_path / "v3", video=False)
    back = run_import(tmp_path / "v3", tmp_path / "back", cameras=BACK)
    assert [(e.scene, e.seed, e.embodiment) for e in back] == [
        ("door-open", 3, numbers),
        ("door-open", 5, numbers),
    ]


def test_only_plain_square_color_jpegs_stay_as_they_are():
    def encoded(mode="RGB", size=(48, 48), kind="JPEG", **options):
        body = BytesIO()
        Image.new(mode, size, 90).save(body, kind, **options)
        return body.getvalue()

    plain = encoded()
    assert as_kept(plain, 48) is plain
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    others = [encoded("L"), encoded(size=(64, 48)), encoded(kind="PNG"), encoded(exif=exif)]
    for body in others:
        assert as_kept(body, 48).shape == (48, 48, 3)
    assert as_kept(plain, 32).shape == (32, 32, 3)
    with pytest.raises(UserError):
        as_kept(plain[:-100], 48)


def test_an_export_names_numbers_and_instructions_as_lerobot_looks_them_up(demos, tmp_path):
    export(demos, tmp_path / "v3")
    info = json.loads((tmp_path / "v3/meta/info.json").read_text())
    state = info["features"]["observation.state"]
    assert state["shape"] == [16] and state["names"][:2] == ["joint1.rad", "joint2.rad"]
    assert state["names"][6] == "finger.m" and len(state["names"]) == 16
    assert info["total_frames"] == 33 and info["fps"] == 20
    tasks = pq.read_table(tmp_path / "v3/meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["__index_level_0__"]
    # by row number: the two must be the same
    assert tasks["task_index"].to_pylist() == [0, 1]
    assert tasks["__index_level_0__"].to_pylist() == ["push it", "lift it"]
    rows = pq.read_table(data_file(tmp_path / "v3"), partitioning=None)
    assert rows["task_index"].to_pylist() == [0] * 10 + [1] * 11 + [0] * 12
    assert rows["index"].to_pylist() == list(range(33))


def test_exported_quantiles_are_those_of_all_numbers(demos, tmp_path):
    export(demos, tmp_path / "v3")
    stats = json.loads((tmp_path / "v3/meta/stats.json").read_text())
    states = np.concatenate([episode.state for episode in load_episodes(demos)])
    assert np.allclose(stats["observation.state"]["q99"], np.quantile(states, 0.99, axis=0))
    assert np.allclose(stats["observation.state"]["std"], states.std(0), atol=1e-5)
    assert stats["observation.state"]["count"] == [33]
    front = stats["observation.images.front"]["mean"]
    assert np.shape(front) == (3, 1, 1) and 0 < np.min(front) < np.max(front) < 1


def test_films_go_on_in_another_file_when_one_is_full(demos, tmp_path, monkeypatch):
    monkeypatch.setattr("data.lerobot_write.FILM_BYTES", 1)
    export(demos, tmp_path / "v3")
    dataset = Dataset(tmp_path / "v3")
    films = [entry.clips["observation.images.front"] for entry in dataset.entries]
    assert [film.path.stem for film in films] == ["file-000", "file-001", "file-002"]
    assert [film.start for film in films] == [0, 0, 0]
    for entry in dataset.entries:
        dataset.check_clips(entry, dataset.cameras)


def test_an_imported_dataset_can_be_exported(tmp_path):
    run_import(FIXTURES / "v30_image", tmp_path / "mine")
    export(tmp_path / "mine", tmp_path / "v3")
    dataset = Dataset(tmp_path / "v3")
    assert dataset.fps == 10 and dataset.robot == "so101_follower"
    assert names_of(dataset.features["action"]) == scene.NAMES


def test_an_export_is_of_one_robot_and_size(demos, tmp_path):
    about = {"robot": "xarm6", "task": "PushCube", "seed": 0, "noise": 0}
    other = demos / "xarm6-PushCube-0.safetensors"
    write_episode(other, demonstration(0), about)
    with pytest.raises(UserError, match="widowx, xarm6.*--robot"):
        export(demos, tmp_path / "v3")
    write_episode(other, demonstration(0, size=32), about | {"robot": "widowx"})
    with pytest.raises(UserError, match="xarm6-PushCube-0.*pictures"):
        export(demos, tmp_path / "v3")
    assert not (tmp_path / "v3").exists()


# ---- check, before a night of training


def recording(state, action=None, fps=10, **changes):
    state = np.asarray(state, float).reshape(len(state), -1)
    frames = np.arange(len(state))
    values = {"timestamp": frames / fps, "frame": frames, "tasks": ["go"] * len(state)}
    action = state if action is None else np.asarray(action, float).reshape(len(state), -1)
    words = {"phases": ["teleoperation"] * len(state), "header": {}}
    return Recording(0, state, action, **{**values, **words, **changes})


def walk(length, numbers=2, seed=0):
    return np.cumsum(np.random.default_rng(seed).normal(size=(length, numbers)), 0)


def test_dropped_and_doubled_frames_and_times_are_found():
    good = recording(walk(5))
    assert lerobot_check.dropped_frames(good) == lerobot_check.late_frames(good, 10) == ""
    gap = recording(walk(4), frame=np.array([0, 1, 3, 4]))
    assert lerobot_check.dropped_frames(gap) == "frame 3 follows 1"
    double = recording(walk(4), frame=np.array([0, 1, 1, 2]))
    assert lerobot_check.dropped_frames(double) == "frame 1 follows 1"
    late = recording(walk(4), timestamp=np.array([0, 0.1, 0.23, 0.3]))
    assert lerobot_check.late_frames(late, 10) == "frame 2 at 0.230 s"


def test_the_first_movement_is_found():
    state = np.zeros((30, 2))
    state[12:, 1] = 5
    assert lerobot_check.first_movement(state, np.array([1.0, 5.0])) == 12
    assert lerobot_check.first_movement(state[:12], np.array([1.0, 5.0])) == 12


@pytest.mark.parametrize("lag", [-3, 0, 1, 4])
def test_how_far_actions_lead_is_found(lag):
    path = walk(60, 2)
    frames = slice(10, 50)
    state = path[frames]
    action = path[10 + lag : 50 + lag]
    found, correlation = lerobot_check.best_lag([recording(state, action)], [(0, 0), (1, 1)], 10)
    assert found == lag and correlation > 0.8


def test_constant_numbers_and_numbers_at_a_limit_are_found():
    values = walk(100, 4)
    values[:, 1] = 0.5
    values[:60, 2] = values[:, 2].max() + 1
    values[:, 3] = np.arange(100) % 2  # a gripper that opens and closes
    found = lerobot_check.number_faults(values, ["a", "b", "c", "d"], "state")
    assert [question for question, _ in found] == ["constant number", "number at its limit"]
    assert found[0][1] == "state b is always 0.5" and "state c is" in found[1][1]


def test_a_camera_that_stands_still_while_the_robot_moves_is_found():
    draws = np.random.default_rng(0)
    thumbs = draws.uniform(0, 255, (40, 8, 8)).astype(np.float32)
    thumbs[10:30] = thumbs[10]
    moving = walk(40)
    span = np.ptp(moving, axis=0)
    assert lerobot_check.longest_freeze(thumbs, moving, span) == (10, 20)
    moving[10:30] = moving[10]  # the camera freezes
    assert lerobot_check.longest_freeze(thumbs, moving, span)[1] < 3
    dark = lerobot_check.camera_faults({"top": 0 * thumbs}, recording(walk(40)), span, 10)
    assert dark == {
        "black camera": "top, 40 frames from 0 on",
        "frozen camera": "top, 40 frames from 0 on",
    }


@pytest.mark.parametrize("name", ["v30_h264", "v061_av1", "v061_image"])
def test_check_finds_nothing_wrong_with_a_good_dataset_but_its_size(name, tmp_path, capsys):
    faults = check(Dataset(FIXTURES / name), tmp_path / "sheet.png")
    assert [question for question, found in faults.items() if found] == ["few episodes"]
    printed = capsys.readouterr().out
    assert "actions come 1 frames (0.10 s) before the movement" in printed
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (2 * 4 * 128, 3 * 96)  # two cameras, four moments, three episodes


def test_check_tells_all_that_is_wrong_at_once(copied, tmp_path, capsys):
    folder = copied("v30_h264")
    edit(
        data_file(folder),
        task_index=at(13, 7),
        frame_index=at(3, 2),
        timestamp=at(25, 0.46),
        action=at(30, [1, 2, None, 4, 5, 6]),
    )
    truncated(folder / f"videos/{TOP}/chunk-000/file-001.mp4")
    faults = check(Dataset(folder), tmp_path / "sheet.png")
    assert faults["dropped or repeated frames"] == [(0, "frame 2 follows 2")]
    assert faults["no instruction"] == [(1, "frame 1")]
    assert faults["timestamps not at the fps"] == [
        (0, "frame 2 at 0.300 s"),
        (2, "frame 4 at 0.460 s"),
    ]
    assert faults["numbers that are missing"] == [(2, "action 2 at frame 9")]
    assert [episode for episode, _ in faults["videos that do not match"]] == [2]
    assert len(capsys.readouterr().out.splitlines()) == 6 + 12 + 1


# ---- training on it


def test_an_imported_robot_trains_and_its_fixed_gripper_stays_finite(tmp_path):
    """A new embodiment beside the shipped ones; their layers do not move."""
    from data.demonstrations import Demonstrations, frames_of, select_episodes
    from policy import PRESETS, Policy

    episodes = run_import(FIXTURES / "v30_image", tmp_path / "mine")
    for episode in episodes:
        episode.state[:, 5] = episode.action[:, 5] = 0.7
    path = tmp_path / "mine"
    config = SimpleNamespace(robots="all", tasks="v30_image", data=path, demonstrations=0)
    assert len(select_episodes(config, {"widowx": Embodiment(16, 7)})) == 3
    hidden = [np.zeros((len(frames_of(episode)), 4, 8), np.float16) for episode in episodes]
    for known in ({}, {"widowx": Embodiment(16, 7)}):
        demos = Demonstrations(episodes, hidden, 16, 4, known)
        assert demos.embodiments == known | {"so101_follower": episodes[0].embodiment}
        policy = Policy(PRESETS["nano"], 8, demos.embodiments)
        demos.fit_statistics(policy.normalizer)
        batch = demos.batch(np.arange(4)) | policy.draw(4)
        losses = policy(batch)
        assert all(loss.isfinite() for loss in losses.values()) and losses["flow"] < 20


def test_episodes_of_other_robots_say_where_they_come_from(tmp_path, demos):
    path = next(demos.glob("*.safetensors"))
    write_episode(path, demonstration(0), {"robot": "r2d2", "task": "PushCube", "seed": 0})
    with pytest.raises(UserError, match="unknown robot 'r2d2'"):
        Episode(path)
