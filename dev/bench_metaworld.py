"""Rendering in Meta-World: its package's own renderer and ours, in turns. For dev/bench.py.

Ours renders its two views of 128 x 128; the package's renders the whole front camera at that size
and at its default of 480 x 480, with its defaults: shadows, reflections and four samples per pixel.
Times are CPU time, because without a GPU rendering may use several threads.
"""

import numpy as np

from data.metaworld import CAMERA_POSITION, MetaWorldEnv, make_inner
from dev.drawing import milliseconds

TASK = "drawer-open"
SIZES = (128, 480)  # pixels, sides of the package's images


def package_renderer(size):
    """A function that renders like the package, in an environment of its own."""
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    inner = make_inner(TASK)
    inner.np_random = np.random.default_rng(1)
    inner.reset()
    inner.model.camera("corner2").pos[:] = CAMERA_POSITION
    shape = {"width": size, "height": size, "camera_name": "corner2"}
    renderer = MujocoRenderer(inner.model, inner.data, **shape)
    return lambda: renderer.render("rgb_array")


def measure(rounds):
    """For each size a row as in bench.compare: one image of ours, the mean of both views."""
    env = MetaWorldEnv(TASK)
    env.reset(1)
    jobs = [env.observe, *map(package_renderer, SIZES)]
    times = np.array([[milliseconds(job) for job in jobs] for _ in range(rounds + 1)])
    times = times[1:]  # without the first round, which opens GL
    ours = times[:, 0] / 2  # an observation has two images
    rows = []
    for size, theirs in zip(SIZES, times[:, 1:].T):
        row = {"what": f"a picture of Meta-World, beside {size} x {size}"}
        row |= {"ms": round(float(np.median(ours)), 2), "rounds": rounds}
        row["against_ms"] = round(float(np.median(theirs)), 2)
        row["times_as_fast"] = round(float(np.median(theirs / ours)), 3)
        rows.append(row)
    return rows
