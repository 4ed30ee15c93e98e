"""The data engine. MuJoCo reads MUJOCO_GL when it is first imported, so the headless choice is made here, before any module of this package."""
import os
import sys

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")
