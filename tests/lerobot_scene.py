"""Content of the datasets in tests/fixtures/lerobot, so that tests know every number and image."""

import numpy as np

LENGTHS = (12, 9, 15)  # frames of the episodes
FPS = 10
CAMERAS = ("top", "wrist")
NAMES = ["shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos"]
NAMES += ["wrist_flex.pos", "wrist_roll.pos", "gripper.pos"]
TASKS = ["Put the brick into the box", "Open the drawer", "Put the brick into the box"]


def picture(episode, t, camera):
    """(48, 64, 3) uint8: a bright brick that moves to the right, 3 pixels a frame."""
    image = np.full((48, 64, 3), (40, 90, 140), np.uint8)
    image[..., 0] += 60 * CAMERAS.index(camera)
    image[..., 2] -= 40 * episode
    left = 4 + 3 * t
    top = 8 + 6 * CAMERAS.index(camera)
    image[top : top + 16, left : left + 12] = (250, 240 - 20 * episode, 120)
    return image


def numbers(episode):
    """state and action (L, 6) float32: a random walk, and its next position."""
    draws = np.random.default_rng(episode)
    steps = draws.normal(0, 2, (LENGTHS[episode] + 1, 6))
    walk = np.cumsum(steps, 0).astype(np.float32)
    return walk[:-1], walk[1:]
