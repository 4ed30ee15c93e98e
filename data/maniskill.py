"""ManiSkill's six tasks of the Panda, after which the tabletop's are made, in their own simulator.

ManiSkill moves the arm and the things, and draws; our own model of the same scene (data/env.py)
follows it after every control step. So a policy reads the same numbers as of the tabletop's `panda`,
weights of either drive both, and the tabletop's expert (data/expert.py) plans here too.

From the package (mani-skill 3.0.1): starts, physics, the joints' controller at 20 Hz, looks, success.
Ours: cameras, sentences, 200 control steps. Needs `pip install --no-deps -r
requirements-maniskill.txt`, and a Vulkan device even where nothing is drawn: docs/MANISKILL.md.
"""

import numpy as np

from data import tasks
from data.demonstrations import FRAME_STRIDE
from data.env import IMAGE_SIZE, TabletopEnv
from data.environments import Task
from data.robots import get_robot
from data.seeds import FIRST_EVALUATION
from data.simulator import mujoco
from embodiment import CONTROL_HZ, Embodiment
from files import reading

INSTALL = (
    "`pip install --no-deps -r requirements-maniskill.txt`, and Vulkan: NVIDIA's, or lavapipe of "
    "Mesa 25, see docs/MANISKILL.md"
)
with reading("mani_skill", INSTALL):
    import sapien
    import torch
    from mani_skill import logger
    from mani_skill.envs.tasks import tabletop

logger.setLevel("ERROR")  # its tasks warn of how they build their own scenes
PACKAGES = ("mani_skill", "sapien")
HZ = CONTROL_HZ
ROBOT = get_robot("panda")
# Of each task, what the package calls our bodies. Those that never move have a place alone.
NAMES = {
    "PickCube": {"cube": "cube", "goal": "goal_site"},
    "PushCube": {"cube": "obj", "goal": "goal_region"},
    "PullCube": {"cube": "obj", "goal": "goal_region"},
    "StackCube": {"cubeA": "cubeA", "cubeB": "cubeB"},
    "PlaceSphere": {"sphere": "obj", "bin": "bin"},
    "LiftPegUpright": {"peg": "peg"},
}
# what the package's finger target of -1 and of 1 mean, m
FINGER_LOW = -0.01
FINGER_HIGH = 0.04


TASKS = {
    name: Task(name, "panda", tasks.MAX_STEPS, tasks.TASKS[name].held_out[0]) for name in NAMES
}


def make_inner(task):
    """The package's own environment, which observes nothing by itself and shows PickCube's goal."""
    with reading("mani_skill", INSTALL):
        inner = getattr(tabletop, f"{task}Env")(
            robot_uids="panda",
            obs_mode="none",
            reward_mode="none",
            control_mode="pd_joint_pos",
            sim_backend="physx_cpu",
            render_backend="gpu" if torch.cuda.is_available() else "cpu",
        )
    # its own policies are told where the goal is, ours have to see it
    inner._hidden_objects.clear()
    return inner


class ManiSkillEnv(TabletopEnv):
    """One task; what it has to have is in data/environments.py.

    blind=True shows noise, ours=True our own pictures of where ManiSkill's things are. Instructions
    are of the held-out wordings for an evaluation's seeds, else of those of training.
    """

    embodiment = Embodiment(ROBOT.state_dim, ROBOT.action_dim)

    def __init__(self, task="PickCube", render=True, blind=False, ours=False):
        super().__init__(ROBOT.name, task, render)
        self.blind = blind
        self.ours = ours
        self.inner = make_inner(task)
        self.hand = self.inner.agent.robot
        self.scene_of_pictures = self.inner.scene.sub_scenes[0]
        self.cameras = {}  # {size: one that is put where a view is}
        self.seen = {}  # {view: the last picture}

    # ---- its physics instead of ours

    def reset(self, seed=0, instruction=None, command=0):
        """The start that the package makes of `seed`."""
        self.wordings = "held_out" if seed >= FIRST_EVALUATION else "seen"
        return super().reset(seed, instruction, command)

    def lay_out(self, seed, layout, rng):
        _, info = self.inner.reset(seed=seed)
        self.done = bool(info["success"])
        self.data.ctrl[:] = [*self.joints()[: self.robot.dof], FINGER_HIGH]
        self.follow()

    def drive(self, target, finger):
        """As the tabletop's, but that the servos' targets jump: the package's controller."""
        middle = (FINGER_HIGH + FINGER_LOW) / 2
        half = (FINGER_HIGH - FINGER_LOW) / 2
        *_, info = self.inner.step(np.append(target, (finger - middle) / half))
        self.done = bool(info["success"])
        self.data.ctrl[:] = [*target, finger]
        self.follow()

    def joints(self):
        """(9,): the arm's, rad, and both fingers', m."""
        return self.hand.get_qpos()[0].numpy()

    def follow(self):
        """Put our arm and objects at ManiSkill's poses."""
        joints = self.joints()
        self.data.qpos[: len(joints)] = joints
        for name in NAMES[self.scene]:
            pose = self.actor(name).pose.raw_pose[0].numpy()  # position, quaternion w x y z
            body = self.model.body(name)
            if body.mocapid[0] >= 0:  # its flat goals are cylinders on edge, ours lie
                self.data.mocap_pos[body.mocapid] = pose[:3]
            else:
                self.data.joint(body.jntadr[0]).qpos[:] = pose
        mujoco.mj_forward(self.model, self.data)

    def forward(self):
        """As the tabletop's, and put ManiSkill's arm and objects at our poses, at rest."""
        super().forward()
        joints = self.data.qpos[: len(self.joints())]
        self.hand.set_qpos(joints)
        self.hand.set_qvel(np.zeros_like(joints))
        for name in NAMES[self.scene]:
            body = self.model.body(name)
            if body.mocapid[0] < 0:  # goals and the bin never move
                pose = self.data.joint(body.jntadr[0]).qpos
                self.actor(name).set_pose(sapien.Pose(pose[:3], pose[3:]))
        self.done = bool(self.inner.evaluate()["success"])

    def actor(self, name):
        """The package's object for a body of ours."""
        return getattr(self.inner, NAMES[self.scene][name])

    def succeeded(self):
        return self.done

    def grasped(self, name):
        return bool(self.inner.agent.is_grasping(self.actor(name)))

    # ---- its pictures instead of ours

    def observe(self, render=None):
        """As the tabletop's; demonstrations have new pictures at the steps that training reads alone.

        Drawing is what costs. A policy that looks asks with render=True.
        """
        if render is None and self.render and self.steps % FRAME_STRIDE:
            return super().observe(render=False) | {"images": self.seen}
        observation = super().observe(render)
        self.seen = observation["images"]
        return observation

    def draw(self, view, size=IMAGE_SIZE, pretty=False, segmentation=False):
        """(size, size, 3) uint8 of a camera of ours: "front", "wrist", or "render" for people.

        segmentation: (size, size) geom ids of our own model instead, which has the same poses.
        """
        if segmentation or self.ours:
            return super().draw(view, size, pretty=pretty, segmentation=segmentation)
        if self.blind:
            return self.sensor.integers(0, 256, (size, size, 3), np.uint8)
        if size not in self.cameras:
            self.cameras[size] = self.scene_of_pictures.add_camera(
                f"ours {size}", size, size, fovy=1.0, near=0.01, far=100.0
            )
        camera = self.cameras[size]
        camera.set_fovy(np.radians(self.model.camera(view).fovy[0]), compute_x=True)
        # MuJoCo's cameras look along -z with y up, SAPIEN's along x with z up
        place = np.eye(4)
        right, up, back = self.data.camera(view).xmat.reshape(3, 3).T
        place[:3, :3] = np.column_stack([-back, -right, up])
        place[:3, 3] = self.data.camera(view).xpos
        camera.entity.set_pose(sapien.Pose(place))
        self.scene_of_pictures.update_render()
        camera.take_picture()
        return camera.get_picture("Color")[..., :3].copy()

    def close(self):
        super().close()
        self.inner.close()


ENVIRONMENT = ManiSkillEnv
