"""What a perturbation changes in a scene, and what it leaves alone."""

import numpy as np
import pytest

import cli
from data.env import PERTURBATIONS, TabletopEnv
from data.tasks import TASKS


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_perturbation_changes_what_it_says_and_no_more(perturbation):
    plain, changed = (
        TabletopEnv("panda", "StackCube"),
        TabletopEnv("panda", "StackCube", perturbation=perturbation),
    )
    (before, told), (seen, new) = plain.reset(3), changed.reset(3)
    again = changed.reset(3)[0]
    assert all(
        np.array_equal(seen["images"][view], again["images"][view]) for view in seen["images"]
    ) and np.array_equal(seen["state"], again["state"])
    assert (
        not np.array_equal(seen["images"]["front"], before["images"]["front"])
        and seen["instruction"] == before["instruction"]
    )
    assert np.array_equal(
        plain.reset(3)[0]["images"]["front"], before["images"]["front"]
    )  # the shared model is as it was
    moved = {
        name: np.subtract(new["layout"][name][0], told["layout"][name][0])
        for name in told["layout"]
    }
    if perturbation == "outside":
        assert np.allclose(moved["cubeA"], moved["cubeB"]) and moved["cubeA"][2] == 0
        drawn = np.array(
            [
                TASKS["StackCube"].spawn(plain.robot, np.random.default_rng(seed))["cubeA"][0]
                for seed in range(2000)
            ]
        )
        beyond = np.maximum(
            drawn.min(0) - new["layout"]["cubeA"][0], new["layout"]["cubeA"][0] - drawn.max(0)
        )[:2].max()
        assert 0.015 < beyond < 0.025
    else:
        assert all((shift == 0).all() for shift in moved.values())
    difference = np.abs(seen["state"] - before["state"])
    assert difference.max() == 0 if perturbation != "noise" else 0 < difference.max() < 0.03
    if perturbation == "camera":
        shift = changed.model.camera("front").pos - plain.model.camera("front").pos
        turn = 2 * np.arccos(
            abs(changed.model.camera("front").quat @ plain.model.camera("front").quat)
        )
        assert np.isclose(np.linalg.norm(shift), 0.02) and np.isclose(
            np.degrees(turn), 3, atol=1e-3
        )
    if perturbation == "distractor":
        cube = new["layout"]["clutter0"][0]
        assert all(
            np.hypot(*np.subtract(cube, place)[:2]) >= 0.1 for place, _ in told["layout"].values()
        )


def test_demonstrations_vary_in_light_camera_and_clutter_and_evaluation_does_not():
    plain, varied = TabletopEnv("xarm6", "PickCube"), TabletopEnv("xarm6", "PickCube", varied="all")
    shifts, crowded, alike = [], 0, 0
    for seed in range(30):
        before, told = plain.reset(seed)
        seen, new = varied.reset(seed)
        shifts.append(
            np.linalg.norm(varied.model.camera("front").pos - plain.model.camera("front").pos)
        )
        crowded += "clutter0" in new["layout"]
        assert varied.position("clutter0")[2] == (0.02 if "clutter0" in new["layout"] else -0.5)
        assert {name: place for name, place in new["layout"].items() if name != "clutter0"} == told[
            "layout"
        ] and seen["instruction"] == before["instruction"]
        alike += np.array_equal(seen["images"]["front"], before["images"]["front"])
    assert (
        max(shifts) < 0.026
        and 8 < sum(shift > 0 for shift in shifts) < 22
        and 3 < crowded < 16
        and 0 < alike < 12
    )
    again = plain.reset(0)[0]["images"]["front"]
    assert np.array_equal(again, TabletopEnv("xarm6", "PickCube").reset(0)[0]["images"]["front"])


def test_an_arm_stops_at_the_distractor():
    env = TabletopEnv("panda", "PushCube", render=False, perturbation="distractor")
    env.reset(0)
    env.place("clutter0", env.data.geom_xpos[env.pads[0][0]])
    env.step(np.append(env.data.ctrl[:7], 0.04))
    assert any(env.model.geom("clutter0").id in contact.geom for contact in env.data.contact)


def test_an_unknown_perturbation_is_told():
    with pytest.raises(cli.UserError, match="unknown perturbation 'cam'.*lighting"):
        TabletopEnv("panda", "StackCube", perturbation="cam")
