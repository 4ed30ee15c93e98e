"""The arms, one MJCF file each in data/arms/, and their kinematics.

The tool frame (TCP) has z along the approach direction and y along the closing axis; its origin is
between the fingertips. Both vectors below are in the robot's base frame, in this order:

    state  (S = dof + 10)  joint angles (dof) rad | travel of a finger 1 m | TCP position 3 m |
                           first two columns of the TCP rotation 6
    action (A = dof + 1)   joint targets (dof) rad | finger target 1 m, below zero squeezes

To add an arm is to add a file: data/add_robot.py makes it from your own MJCF.
"""

from functools import cache
from pathlib import Path

import numpy as np

from cli import choose
from data.simulator import mujoco
from files import reading, whole_files

ARMS = Path(__file__).parent / "arms"
SHIPPED = ("panda", "xarm6", "xarm7", "widowx")  # tables and scene seeds depend on this order
FILES = [path.stem for path in whole_files(ARMS, "*.xml")]
ROBOTS = tuple(dict.fromkeys([*SHIPPED, *FILES]))

# Custom numbers in each arm's file, which explains them: rad, rad/s, m, kg, N.
NUMBERS = (
    "home",
    "velocity_limit",
    "reach",
    "spawn_distance",
    "spawn_half_size",
    "max_goal_height",
    "scale",
    "cube_half",
    "cube_mass",
    "goal_radius",
    "grasp_force",
)

# The finger target for "closed", m: 10 mm beyond contact, as in ManiSkill, so that a held cube is
# squeezed with 30 N. For stiffer turning jaws `find_fingers` computes the target for the same
# force.
SQUEEZE = -0.01
FORCE = 30.0  # N
LEAN = 0.25  # rad, largest sideways lean of the hand, for an arm of five joints


class Robot:
    """One arm: its compiled model, and the numbers in its file. UserError if the file is broken.

    Of NUMBERS, home and velocity_limit are (dof,), reach is (2,), the others are scalars.
    """

    def __init__(self, name, path):
        self.name = name
        self.path = Path(path)
        with reading(path, "delete it, or make it again with data.add_robot"):
            spec = mujoco.MjSpec.from_file(str(path))
            self.model = spec.compile()
            # values that MJCF has no field for are in the file's custom section
            self.display_name = spec.text("display_name").data
            for field in NUMBERS:
                numbers = self.model.numeric(field).data
                setattr(self, field, numbers if len(numbers) > 1 else numbers[0])
            # derived values
            self.dof = len(self.home)
            self.state_dim = self.dof + 10
            self.action_dim = self.dof + 1
            self.joint_range = self.model.jnt_range[: self.dof]  # (dof, 2) rad
            self.find_fingers()

    def find_fingers(self):
        """Set how far the fingers open, how stiff they are, and where they close."""
        self.jaws = None  # for jaws that turn (data/add_jaws.py): openings m, controls, angles rad
        self.squeeze = SQUEEZE  # m, the target that squeezes a held object
        self.fist = 0.0  # m along the closing axis, from the tool's position to the closed fingers
        names = [self.model.numeric(i).name for i in range(self.model.nnumeric)]
        numbers = {name: self.model.numeric(name).data for name in names}
        if "jaw_openings" in names:
            openings = numbers["jaw_openings"]
            angles = numbers["jaw_angles"].reshape(len(openings), -1)
            self.jaws = (openings, numbers["jaw_controls"], angles)
            self.travel = openings[-1]
            self.finger_kp = numbers["jaw_stiffness"][0]
            self.squeeze = max(SQUEEZE, 0.02 - FORCE / self.finger_kp)  # for a cube, half its side
            self.fist = numbers["jaw_fist"][0]
        else:
            self.travel = self.model.joint("left_finger").range[1]  # m, of each finger
            # N/m, of each finger: the last servo drives both
            self.finger_kp = self.model.actuator_gainprm[self.dof, 0] / 2

    def clip(self, action):
        """The action (A,) clipped to the arm's joint and finger limits."""
        low, high = self.joint_range.T
        return np.clip(action, [*low, SQUEEZE], [*high, self.travel])

    # ---- one number gives the opening; for jaws that turn it is not a joint position

    def finger_control(self, finger):
        """The control of the fingers' servo for a target (m)."""
        if self.jaws is None:
            return finger
        openings, controls, _ = self.jaws
        return np.interp(finger, openings, controls)

    def finger_joints(self, opening):
        """The positions of all finger joints at an opening (m)."""
        if self.jaws is None:
            return [opening, opening]
        openings, _, angles = self.jaws
        return [np.interp(opening, openings, angle) for angle in angles.T]

    def opening(self, qpos):
        """m, from a scene's qpos, in which the finger joints follow the arm's."""
        if self.jaws is None:
            return qpos[self.dof]
        openings, _, angles = self.jaws
        # the joint that turns most is the most precise
        joint = np.ptp(angles, axis=0).argmax()
        rising = np.sign(angles[-1, joint] - angles[0, joint])
        angle = rising * qpos[self.dof + joint]
        return max(0.0, np.interp(angle, rising * angles[:, joint], openings))


@cache
def get_robot(name):
    """The Robot called `name`, or the one in the arm file `name`. UserError lists the names."""
    if name.endswith(".xml"):
        return Robot(name, name)
    return Robot(name, ARMS / f"{choose(name, ROBOTS, 'robot')}.xml")


class Kinematics:
    """Forward and inverse kinematics of one arm in its base frame, computed by MuJoCo."""

    def __init__(self, robot):
        self.robot = robot
        self.model = robot.model
        self.data = mujoco.MjData(self.model)
        self.tcp = self.data.site("tcp")

    def forward(self, qpos):
        """TCP position (3,) m and rotation (3, 3) at joint angles qpos (dof,) rad."""
        self.data.qpos[: self.robot.dof] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        return self.tcp.xpos.copy(), self.tcp.xmat.reshape(3, 3).copy()

    def solve_ik(self, position, rotation, start):
        """qpos (dof,) rad within the limits that reaches a TCP pose; None if none is found.

        To 0.2 mm and 1 mrad. Damped least squares from `start` (dof,), with joints clamped; a
        seventh joint is pulled toward `start` in the null space. An arm of five joints cannot
        control the sideways lean of the hand, so any lean up to LEAN is accepted.
        """
        dof = self.robot.dof
        low, high = self.robot.joint_range.T
        # a start outside the limits could lead to a solution outside them
        q = np.clip(start, low, high)
        jac = np.zeros((6, self.model.nv))
        quat = np.empty(4)
        error = np.empty(6)  # remaining error, in the base frame
        exact = np.repeat([2e-4, 1e-3], 3)
        for _ in range(80):
            at, turned = self.forward(q)
            error[:3] = position - at
            mujoco.mju_mat2Quat(quat, (rotation @ turned.T).ravel())
            mujoco.mju_quat2Vel(error[3:], quat, 1.0)
            if (np.abs(error) < exact).all():
                return q
            mujoco.mj_comPos(self.model, self.data)
            mujoco.mj_jacSite(self.model, self.data, jac[:3], jac[3:], self.tcp.id)
            J = jac[:, :dof]  # (6, dof), without the finger columns
            missing = error
            if dof == 5:
                turns = turns_in_place(J)
                missing = np.append(error[:3], turns @ error[3:])
                J = np.vstack([J[:3], turns @ J[3:]])
                leans = np.linalg.norm(error[3:]) < LEAN
                if leans and (np.abs(missing) < exact[:5]).all():
                    return q
            # damping keeps the step small near a singularity
            inverse = J.T @ np.linalg.inv(J @ J.T + 1e-4 * np.eye(len(J)))
            step = inverse @ missing
            if dof > 6:  # motion that does not move the tool
                still = np.eye(dof) - inverse @ J
                step += still @ (0.1 * (start - q))
            longest = np.abs(step).max() + 1e-9  # rad; steps are limited to 0.4
            q = np.clip(q + step * min(1.0, 0.4 / longest), low, high)
        return None


def turns_in_place(J):
    """(2, 3): axes about which five joints can turn the tool in place. J (6, 5) is its Jacobian."""
    _, _, directions = np.linalg.svd(J[:3])
    axes, _ = np.linalg.qr(J[3:] @ directions[3:].T)  # of motion that does not move the tool
    return axes.T


@cache
def get_kinematics(name):
    """The Kinematics of the arm called `name`."""
    return Kinematics(get_robot(name))
