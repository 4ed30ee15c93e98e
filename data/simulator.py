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


class Camera:
    """Draws the views of one model, size x size pixels, in 3 ms each. The GL is opened here.

    UserError if there is none, with what to install.
    """

    def __init__(self, model, size):
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # no display is needed
        try:
            rendering = sys.modules[mujoco.Renderer.__module__]  # its place depends on the version
            if not hasattr(rendering.gl_context, "GLContext"):
                importlib.reload(rendering.gl_context)  # with the GL this time
                importlib.reload(rendering)
            self.renderer = rendering.Renderer(model, size, size)
        except Exception as error:  # noqa: BLE001, EGL, OSMesa and GLFW each raise their own
            backend = os.environ.get("MUJOCO_GL", "unset")
            raise UserError(
                f"cannot draw with MUJOCO_GL={backend} ({type(error).__name__}: {error}); on Debian "
                "or Ubuntu set MUJOCO_GL=egl after `apt-get install libegl1 libgl1-mesa-dri`, or "
                "MUJOCO_GL=osmesa after `apt-get install libosmesa6`"
            ) from None

    def draw(self, data, view, pretty=False, segmentation=False):
        """(size, size, 3) uint8, or with `segmentation` (size, size) geom ids, -1 for the sky.

        `pretty` adds shadows, for people.
        """
        self.renderer.update_scene(data, view)
        flags = self.renderer.scene.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = pretty
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = pretty
        if not segmentation:
            return self.renderer.render().copy()
        # the ids, and the kinds of what has them: sites and the like have ids of their own
        self.renderer.enable_segmentation_rendering()
        ids = self.renderer.render()
        self.renderer.disable_segmentation_rendering()
        geom = int(mujoco.mjtObj.mjOBJ_GEOM)  # numpy compares with the enum itself in Python
        return np.where(ids[..., 1] == geom, ids[..., 0], -1)

    def close(self):
        """Free the GL's memory; a picture after this is an error."""
        self.renderer.close()


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
        first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        corners = model.mesh_vert[first : first + count]  # (V, 3)
        _, cube = np.unique(np.floor(corners / cell), axis=0, return_inverse=True)  # (V,)
        inside = np.bincount(cube)
        middles = [np.bincount(cube, axis) / inside for axis in corners.T]
        corners[:] = np.column_stack(middles)[cube]
        # what has become a line or a point goes, the rest moves up
        start, faces = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        now = cube[model.mesh_face[start : start + faces]]  # (F, 3)
        now.sort(axis=1)
        whole = (now[:, 0] < now[:, 1]) & (now[:, 1] < now[:, 2])
        # of two triangles with the same corners one is enough
        _, unlike = np.unique(now, axis=0, return_index=True)
        kept = np.sort(unlike[whole[unlike]])
        for array in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord):
            array[start : start + len(kept)] = array[start + kept]
        model.mesh_facenum[mesh] = len(kept)
