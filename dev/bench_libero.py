"""Rendering in LIBERO: its package's own renderer and ours, in turns. For dev/bench.py.

Both render 128 x 128 pixels of the front and the wrist camera; the package uses its defaults:
reflections, four samples per pixel, all triangles. Times are CPU time, because without a GPU
rendering may use several threads.
"""

import numpy as np
from robosuite.utils.binding_utils import MjRenderContextOffscreen

from data.env import IMAGE_SIZE
from data.libero import CAMERAS, TASKS, LiberoEnv, make_inner
from dev.drawing import milliseconds

SCENES = ("object-0", "spatial-4")
SAMPLES = 4  # per pixel: mujoco's default


def package_renderer(task):
    """A function that renders both views like the package, in an environment of its own."""
    inner, _ = make_inner(TASKS[task])
    inner.reset()
    inner.sim.model.vis.quality.offsamples = SAMPLES
    context = MjRenderContextOffscreen(inner.sim, 0)
    context.vopt.geomgroup[0] = 0
    cameras = [inner.sim.model.camera_name2id(CAMERAS[view]) for view in ("front", "wrist")]

    def draw():
        for camera in cameras:
            context.gl_ctx.make_current()
            context.render(width=IMAGE_SIZE, height=IMAGE_SIZE, camera_id=camera)
            context.read_pixels(IMAGE_SIZE, IMAGE_SIZE, depth=False)

    return draw


def measure(rounds):
    """For each scene a row like those of bench.compare: one image, the mean of both views."""
    rows = []
    for scene in SCENES:
        env = LiberoEnv(scene)
        env.reset(1)
        jobs = (env.observe, package_renderer(scene))
        times = [[milliseconds(job) / 2 for job in jobs] for _ in range(rounds + 1)]
        ours, theirs = np.array(times[1:]).T  # without the first round, which opens GL
        row = {"what": f"a picture of LIBERO's {scene}", "ms": round(float(np.median(ours)), 2)}
        row |= {"rounds": rounds, "against_ms": round(float(np.median(theirs)), 2)}
        row["times_as_fast"] = round(float(np.median(theirs / ours)), 3)
        rows.append(row)
    return rows
