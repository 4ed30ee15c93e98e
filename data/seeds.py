"""Random numbers of the simulator: the purpose of each stream and of each range of seeds.

A seed names an episode. Everything random in it has a stream of its own, so that changing the light
never changes the layout, and an additional draw in one place moves nothing elsewhere.
"""

import numpy as np

STREAMS = {
    # layout, rest pose and wording: one stream per task
    "PickCube": 0,
    "PushCube": 1,
    "PullCube": 2,
    "StackCube": 3,
    "PlaceSphere": 4,
    "LiftPegUpright": 5,
    "which_cube": 21,
    "which_way": 22,
    "which_stack": 23,
    "which_bin": 24,
    "peg_or_cube": 25,
    "mixed": 26,
    "command": 27,  # wording of a command
    "metaworld": 29,  # goals and positions of a Meta-World task, whose number is appended
    "libero": 31,  # layout of a LIBERO task, whose number is appended
    "disturbance": 7,  # of the joint targets that the expert executes
    "appearance": 9,  # light and tabletop in demonstrations
    "camera": 13,  # pose of the front camera and an extra cube, in demonstrations
    "perturbation": 15,  # in an evaluation
    "sensor": 17,  # noise on pixels and state, in an evaluation
    # The following share numbers with others that never occur in the same episode. Numbers must not
    # change: recorded demonstrations and scenes could not be reproduced.
    "takeover": 11,  # when the expert takes over from a policy, for corrections
    "scene": 11,  # questions, poses and looks of a Stage I scene
    "wording": 13,  # wordings in a file of scenes
}

# Demonstrations use seeds below the first of these, corrections those from there on, evaluations
# those from the second on: no policy has seen a layout on which it is evaluated.
FIRST_CORRECTION = 500_000
FIRST_EVALUATION = 1_000_000
FIRST_TOLD = 7_000_000  # scenes for eval.py told: one layout, different commands
FIRST_VALIDATION = 2_000_000  # scenes of Stage I that are only for validation


def rng(seed, stream, *more):
    """A numpy Generator for one of STREAMS in episode `seed`; more numbers give more streams."""
    return np.random.default_rng([seed, STREAMS[stream], *more])
