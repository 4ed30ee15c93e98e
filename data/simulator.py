"""MuJoCo, imported so that a machine without OpenGL can do everything but draw.

`import mujoco` loads the GL library that MUJOCO_GL names and fails where it is missing. Here it is
imported with none, and the library is loaded with the first picture. Whatever simulates takes
`mujoco` from this file. Runs with mujoco 3.3 to 4.0.
"""

import importlib
import os
import sys

import numpy as np

from cli import UserError, run


def load():
    """Import mujoco without any GL. UserError if it is not there, or two versions lie over it."""
    asked = os.environ.get("MUJOCO_GL")  # by the user, for Camera
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

# kinds of what a pixel may show; plain numbers, as numpy compares with the enum itself in Python
GEOM = int(mujoco.mjtObj.mjOBJ_GEOM)
SITE = int(mujoco.mjtObj.mjOBJ_SITE)


class Camera:
    """Draws the views of one model, in 3 ms each. The GL is opened with the first picture."""

    def __init__(self, model):
        self.model = model
        self.renderers = {}  # {size: one that draws size x size pixels}

    def draw(self, data, view, size, pretty=False, segmentation=False):
        """(size, size, 3) uint8, or with `segmentation` (size, size) geom ids, -1 for the sky.

        `pretty` adds shadows, for people. UserError where there is no GL.
        """
        if segmentation:
            ids, kinds = self.segment(data, view, size)
            return np.where(kinds == GEOM, ids, -1)
        return self.aim(data, view, size, pretty).render().copy()

    def segment(self, data, view, size):
        """Ids of what each pixel shows and their kinds, each (size, size): geoms, sites and the like."""
        renderer = self.aim(data, view, size)
        renderer.enable_segmentation_rendering()
        both = renderer.render()
        renderer.disable_segmentation_rendering()
        return both[..., 0], both[..., 1]

    def aim(self, data, view, size, pretty=False):
        """The renderer of this size, about to draw the view."""
        if size not in self.renderers:
            self.renderers[size] = open_renderer(self.model, size)
        renderer = self.renderers[size]
        renderer.update_scene(data, view)
        flags = renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = pretty
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = pretty
        return renderer

    def close(self):
        """Free the GL's memory."""
        for renderer in self.renderers.values():
            renderer.close()
        self.renderers = {}


def open_renderer(model, size):
    """mujoco's Renderer, with the GL loaded. UserError if there is none, with what to install."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # no display is needed
    try:
        rendering = sys.modules[mujoco.Renderer.__module__]  # its place depends on the version
        if not hasattr(rendering.gl_context, "GLContext"):
            importlib.reload(rendering.gl_context)  # with the GL this time
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
    """Merge corners of drawn meshes that share a cube of `cell` (m) of space, in place.

    Without a GPU a picture costs as much as it has triangles, and scanned things have far more of
    them than a small picture has pixels. Only what cannot be touched changes: physics stay as they
    are. To be called before a Camera is made.
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
        # what has become a line or a point goes, the rest moves up
        start = model.mesh_faceadr[mesh]
        now = cube[model.mesh_face[start : start + model.mesh_facenum[mesh]]]  # (F, 3)
        now.sort(axis=1)
        whole = (now[:, 0] < now[:, 1]) & (now[:, 1] < now[:, 2])
        # of two triangles with the same corners one is enough
        _, unlike = np.unique(now, axis=0, return_index=True)
        kept = np.sort(unlike[whole[unlike]])
        for array in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord):
            array[start : start + len(kept)] = array[start + kept]
        model.mesh_facenum[mesh] = len(kept)
