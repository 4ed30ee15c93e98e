"""Import MuJoCo so that a machine without OpenGL can do everything but render.

`import mujoco` loads the GL library that MUJOCO_GL names, and fails if it is missing. Here it is
imported without one, and the library is loaded with the first image. All simulation code imports
`mujoco` from this file. Works with mujoco 3.3 to 4.0.
"""

import importlib
import os
import sys

import numpy as np

from cli import UserError, run


def load():
    """Import mujoco without GL. UserError if it is missing, or two versions are mixed up."""
    asked = os.environ.get("MUJOCO_GL")  # the user's setting, for Camera
    os.environ["MUJOCO_GL"] = "disable"
    try:
        import mujoco  # noqa: F401
    except (ImportError, AttributeError, OSError) as error:
        raise UserError(
            f"mujoco does not import ({error}); a 3.x upgraded in place to 4.0 is left broken: "
            "type `pip uninstall -y mujoco mujoco-core mujoco-studio`, then `pip install mujoco`"
        ) from None
    finally:
        del os.environ["MUJOCO_GL"]
        if asked is not None:
            os.environ["MUJOCO_GL"] = asked


run(load)  # scripts import this file before their own `run`
import mujoco

# kinds of objects in a segmentation; plain ints, because numpy compares the enum in slow Python
GEOM = int(mujoco.mjtObj.mjOBJ_GEOM)
SITE = int(mujoco.mjtObj.mjOBJ_SITE)


class Camera:
    """Renders the views of a model, in 3 ms each. GL is opened with the first image."""

    def __init__(self, model):
        self.model = model
        self.renderers = {}  # {size: renderer of size x size pixels}

    def draw(self, data, view, size, pretty=False, segmentation=False):
        """(size, size, 3) uint8, or with `segmentation` (size, size) geom ids, -1 for the sky.

        `pretty` adds shadows, for people. UserError without GL.
        """
        if segmentation:
            ids, kinds = self.segment(data, view, size)
            return np.where(kinds == GEOM, ids, -1)
        return self.aim(data, view, size, pretty).render().copy()

    def segment(self, data, view, size):
        """Ids and kinds of what each pixel shows, (size, size) each: geoms, sites and so on."""
        renderer = self.aim(data, view, size)
        renderer.enable_segmentation_rendering()
        both = renderer.render()
        renderer.disable_segmentation_rendering()
        return both[..., 0], both[..., 1]

    def aim(self, data, view, size, pretty=False):
        """The renderer of this size, ready to draw the view."""
        if size not in self.renderers:
            self.renderers[size] = open_renderer(self.model, size)
        renderer = self.renderers[size]
        renderer.update_scene(data, view)
        flags = renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = pretty
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = pretty
        return renderer

    def close(self):
        """Free GL memory."""
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers = {}


def open_renderer(model, size):
    """mujoco's Renderer, with GL loaded. UserError if there is none, saying what to install."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # needs no display
    try:
        rendering = sys.modules[mujoco.Renderer.__module__]  # its module depends on the version
        if not hasattr(rendering.gl_context, "GLContext"):
            importlib.reload(rendering.gl_context)  # now with GL
            importlib.reload(rendering)
        return rendering.Renderer(model, size, size)
    except Exception as error:  # noqa: BLE001, EGL, OSMesa and GLFW each raise their own
        backend = os.environ.get("MUJOCO_GL", "unset")
        raise UserError(
            f"cannot draw with MUJOCO_GL={backend} ({type(error).__name__}: {error}); on Debian "
            "or Ubuntu set MUJOCO_GL=egl after `apt-get install libegl1 libgl1-mesa-dri`, or "
            "MUJOCO_GL=osmesa after `apt-get install libosmesa6`"
        ) from None


def coarsen(model, cell):
    """Merge vertices of visual meshes within each cube of side `cell` (m), in place.

    Without a GPU an image costs as much as it has triangles, and scanned objects have far more than
    a small image has pixels. Meshes that collide are not changed, so the physics stays the same.
    Call it before creating a Camera.
    """
    touched = (model.geom_contype | model.geom_conaffinity) != 0
    meshes = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH.value
    solid = set(model.geom_dataid[meshes & touched].tolist())
    for mesh in set(model.geom_dataid[meshes].tolist()) - solid:
        first = model.mesh_vertadr[mesh]
        corners = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]  # (V, 3)
        _, cube = np.unique(np.floor(corners / cell), axis=0, return_inverse=True)  # (V,)
        inside = np.bincount(cube)
        middles = [np.bincount(cube, axis) / inside for axis in corners.T]
        corners[:] = np.column_stack(middles)[cube]
        # drop triangles that became lines or points; the others move up
        start = model.mesh_faceadr[mesh]
        now = cube[model.mesh_face[start : start + model.mesh_facenum[mesh]]]  # (F, 3)
        now.sort(axis=1)
        whole = (now[:, 0] < now[:, 1]) & (now[:, 1] < now[:, 2])
        # of triangles with the same corners keep one
        _, unlike = np.unique(now, axis=0, return_index=True)
        kept = np.sort(unlike[whole[unlike]])
        for array in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord):
            array[start : start + len(kept)] = array[start + kept]
        model.mesh_facenum[mesh] = len(kept)
