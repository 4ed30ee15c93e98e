"""Random numbers of the simulator: what each stream is for, and what each range of seeds is for.

A seed names an episode. Everything random in it comes from a stream of its own, so that changing
the light never changes the layout, and one more draw here moves nothing there.
"""

import numpy as np

STREAMS = {
    # where things lie, how the arm rests, which wording: one stream a task
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
    "command": 27,  # in which words a command is given
    "metaworld": 29,  # goals and places of a Meta-World task; its number comes behind
    "libero": 31,  # where things lie in a LIBERO task; its number comes behind
    "disturbance": 7,  # of the joint targets that the expert executes
    "appearance": 9,  # light and table top of demonstrations
    "camera": 13,  # place of the front camera and one more cube, in demonstrations
    "perturbation": 15,  # of an evaluation
    "sensor": 17,  # noise on pixels and state, in an evaluation
    # These two share numbers with others, which never meet them in one episode. Numbers must not
    # change: they are what makes the recorded demonstrations and scenes reproducible.
    "takeover": 11,  # when the expert takes over from a policy, in corrections
    "scene": 11,  # what is asked, posed and drawn in a scene of Stage I
    "wording": 13,  # in which words a file of scenes is asked
}

# Demonstrations take seeds below the first of these, corrections those from there on, evaluations
# what lies beyond the second: no policy has seen a layout on which it is tested.
FIRST_CORRECTION = 500_000
FIRST_EVALUATION = 1_000_000
FIRST_TOLD = 7_000_000  # scenes in which a policy is told one thing, then another
FIRST_VALIDATION = 2_000_000  # scenes of Stage I that only validation asks about


def rng(seed, stream, *more):
    """numpy Generator of one of STREAMS in the episode `seed`; more numbers give more streams."""
    return np.random.default_rng([seed, STREAMS[stream], *more])
