"""Drawing in Meta-World: its package's own renderer and the adapter's, taking turns. For dev/bench.py.

Both draw the arm at work on one task, 128 x 128; the package with its defaults, which are shadows,
reflections and four samples a pixel. Times are CPU time: renderers without a GPU use several threads.
"""

import time

import numpy as np

from data.metaworld import CAMERA_POSITION, MetaWorldEnv, make_inner

TASK = "drawer-open"
PICTURES = 10  # in a turn


def milliseconds(job):
    start = time.process_time()
    for _ in range(PICTURES):
        job()
    return 1000 * (time.process_time() - start) / PICTURES


def measure(rounds):
    """A row as of bench.compare for each of the adapter's views and the two together."""
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    ours = MetaWorldEnv(TASK)
    ours.reset(1)
    # an environment of its own: the adapter changes cameras and quality of its model
    theirs = make_inner(TASK)
    theirs.np_random = np.random.default_rng(1)
    theirs.reset()
    theirs.model.camera("corner2").pos[:] = CAMERA_POSITION
    shape = {"width": 128, "height": 128, "camera_name": "corner2"}
    renderer = MujocoRenderer(theirs.model, theirs.data, **shape)
    jobs = {
        "metaworld front": lambda: ours.draw("front"),
        "metaworld wrist": lambda: ours.draw("wrist"),
    }
    times = {name: [] for name in jobs}
    their_times = []
    for _ in range(rounds + 1):
        their_times.append(milliseconds(lambda: renderer.render("rgb_array")))
        for name, job in jobs.items():
            times[name].append(milliseconds(job))
    their_times = np.array(their_times[1:])  # the first round opens the GL
    times = {name: np.array(values[1:]) for name, values in times.items()}
    times["metaworld, mean of both"] = sum(times.values()) / len(jobs)
    rows = []
    for name, values in times.items():
        row = {"what": name, "ms": round(float(np.median(values)), 2), "rounds": rounds}
        row["against_ms"] = round(float(np.median(their_times)), 2)
        row["times_as_fast"] = round(float(np.median(their_times / values)), 3)
        rows.append(row)
    return rows
