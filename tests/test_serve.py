"""A policy server: openpi's wire format, chunks equal to `act`'s, one line for every mistake, and
no client that can harm another.
"""

import asyncio
import contextlib
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from conftest import ROOT
from test_model import small_blm

reason = "wants requirements-serve.txt"
msgpack = pytest.importorskip("msgpack", reason=reason)
pytest.importorskip("websockets.asyncio.server", reason=reason)

import websockets.exceptions
from websockets.sync.client import connect

import cli
import client
import serve
from cli import UserError
from client import RemotePolicy, connected
from data.env import TabletopEnv
from data.expert import Demonstration
from data.record import write_episode
from embodiment import Embodiment
from model import BLM
from rollout import rollout
from wire import MAX_CONTAINERS, pack, require_extras, unpack

rng = np.random.default_rng(0)
FRONT, WRIST = rng.integers(0, 255, (2, 128, 128, 3), dtype=np.uint8)
STATE = np.linspace(-0.5, 0.5, 16)
WORDS = "push the red cube"
OURS = {"images": {"front": FRONT, "wrist": WRIST}, "state": STATE, "instruction": WORDS}
LIBERO = {
    "observation/image": FRONT,
    "observation/wrist_image": WRIST,
    "observation/state": STATE,
    "prompt": WORDS,
}
DROID = {
    "observation/exterior_image_1_left": FRONT,
    "observation/wrist_image_left": WRIST,
    "observation/joint_position": STATE[:15],
    "observation/gripper_position": STATE[15:],
    "prompt": WORDS.encode(),
}
CAMERAS = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
ALOHA = {"images": dict.fromkeys(CAMERAS, FRONT.transpose(2, 0, 1)), "state": STATE}
ALOHA["images"]["cam_right_wrist"] = WRIST.transpose(2, 0, 1)


# ---- the wire

ARRAYS = [
    np.arange(12).reshape(3, 4).astype(dtype)
    for dtype in ("?", "u1", "i1", "u2", "<i8", "f2", "<f4", "f8", ">f4")
]
ARRAYS += [np.asfortranarray(ARRAYS[0]), ARRAYS[-1].T, ARRAYS[-1][::-1, ::2]]
ARRAYS += [np.array(2.5), np.zeros((0, 3), np.uint8), np.zeros((4, 0, 2))]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str} {a.shape} {a.strides}")
def test_arrays_survive_the_wire(array):
    back = unpack(pack({"x": array}))["x"]
    assert back.dtype == array.dtype and back.shape == array.shape
    assert (back == array).all()


def test_scalars_texts_and_containers_survive_the_wire():
    scalars = {"f": np.float32(0.1), "i": np.int64(-3), "b": np.bool_(True), "u": np.uint8(7)}
    back = unpack(pack(scalars))
    assert back == scalars and all(type(back[name]) is type(scalars[name]) for name in scalars)
    plain = {"d": {"e": [1, 2.5, None, True]}, "t": "ä\n", "raw": b"\0"}
    assert unpack(pack(plain)) == plain


def test_an_array_is_openpis_map():
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    bare = msgpack.unpackb(pack({"x": array, "y": np.float32(0.5)}))
    data = np.ascontiguousarray(array).tobytes()
    wanted = {b"__ndarray__": True, b"data": data, b"dtype": "<f4", b"shape": [3, 2]}
    assert bare["x"] == wanted
    assert bare["y"] == {b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"}


def test_an_array_that_came_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        unpack(pack({"x": np.zeros(3)}))["x"][0] = 1


ODD = [np.array([{}]), np.zeros(2, "i4,i4"), np.zeros(2, complex), np.zeros(2, "M8[s]"), object()]


@pytest.mark.parametrize("value", [*ODD, np.array(["a"]), 2**70], ids=repr)
def test_what_is_no_number_is_not_packed(value):
    with pytest.raises(UserError, match="cannot be packed"):
        pack({"x": value})


def array_map(**changes):
    parts = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2], **changes}
    return {key.encode(): value for key, value in parts.items()}


LIES = [array_map(dtype=name) for name in ("|O", "O", "<U2", "|V8", "i4,i4", "<c8", "<M8[s]", 7)]
LIES += [array_map(shape=shape) for shape in ([3], [-1], [2, -1], [2.0], [2**40, 2**40], "2", 2)]
LIES += [array_map(data="12345678"), array_map(data=[0] * 8), array_map(data=bytes(7))]
LIES += [{b"__ndarray__": True}, {b"__npgeneric__": True, b"dtype": "<f4", b"data": [1]}]
LIES += [{b"__npgeneric__": True, b"dtype": "|i1", b"data": 1000}]
LIES += [{b"__npgeneric__": True, b"dtype": "|O", b"data": 1}]


@pytest.mark.parametrize("lie", LIES, ids=repr)
def test_a_lying_array_is_one_line(lie):
    with pytest.raises(UserError, match="cannot read the message"):
        unpack(msgpack.packb({"x": lie}))


MESSAGES = {
    "text": "text frame",
    b"": "one msgpack map",
    b"junk": "one msgpack map",
    pack({"x": 1})[:-1]: "one msgpack map",
    pack({"x": 1}) + b"\0": "one msgpack map",
    pack([1, 2]): "it is a list",
    msgpack.packb({1: 2}): "one msgpack map",
    pickle.dumps({"x": 1}): "one msgpack map",
    b"\x91" * 100_000: "one msgpack map",  # lists in lists
    pack({"x": [{} for _ in range(MAX_CONTAINERS)]}): "more than 256 lists and maps",
    b"\x81\xa1x\xdc\xff\xff" + b"\xc0" * 65535: "exceeds",  # a list of 65535 times nothing
    b"\xdf\xff\xff\xff\xff": "one msgpack map",  # a map that says it has 4 billion keys
}


@pytest.mark.parametrize("data", MESSAGES, ids=[f"{data[:12]!r}" for data in MESSAGES])
def test_a_message_that_is_none_is_one_line(data):
    with pytest.raises(UserError, match=MESSAGES[data]) as error:
        unpack(data)
    assert len(str(error.value)) < 400


# ---- a server in this process


@pytest.fixture(scope="module")
def blm():
    return BLM.from_pretrained(ROOT / "weights" / "nano")


@contextlib.contextmanager
def served(blm, **changes):
    """(server, its address) for as long as the block runs, in a thread."""
    config = serve.ServeConfig(port=0, **{"keys": str(ROOT / serve.KEY_MAPS), **changes})
    server = serve.PolicyServer(blm, config)
    listener = serve.bind(config.host, config.port)
    host, port = listener.getsockname()
    loop = asyncio.new_event_loop()
    task = loop.create_task(server.run(listener))

    def work():
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        wait_for(lambda: answers(host, port))
        yield server, f"ws://{host}:{port}"
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
        server.worker.shutdown()
        assert not thread.is_alive()


def answers(host, port):
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
        return True


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def address(blm):
    with served(blm, max_message=1, max_picture=200) as (_, address):
        yield address


def ask(address, message):
    """The reply to an observation or to raw data: a dict, or (code, text) of a refusal."""
    with connect(address, compression=None, proxy=None) as connection:
        connection.recv()
        connection.send(pack(message) if isinstance(message, dict) else message)
        reply = connection.recv()
        if not isinstance(reply, str):
            return unpack(reply)
        with pytest.raises(websockets.exceptions.ConnectionClosedError) as closed:
            connection.recv()
        return closed.value.rcvd.code, reply


def test_a_client_is_told_first_what_the_policy_is(address, blm):
    with connected(address) as policy:
        told = policy.metadata
    policy = blm.policy
    assert told["action_horizon"] == policy.config.action_horizon == 16
    assert told["action_dim"] == 7 and told["robot"] == "widowx"
    assert told["image_resolution"] == [128, 128] and told["cameras"] == ["front", "wrist"]
    for name, robot in told["robots"].items():
        assert Embodiment(**robot) == policy.embodiments[name]
    assert told["control_hz"] == 20 and "finger target (m)" in told["action"]
    assert set(told["observation_keys"]) == {"nanoblm", "libero", "droid", "aloha"}


FAMILIES = {"nanoblm": OURS, "libero": LIBERO, "droid": DROID, "aloha": {**ALOHA, "prompt": WORDS}}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunk_is_what_act_returns(family, address, blm):
    reply = ask(address, FAMILIES[family])
    assert set(reply) == {"actions", "server_timing"}
    assert reply["actions"].dtype == np.float32
    assert np.array_equal(reply["actions"], blm.act(OURS, "widowx"))
    assert 0 < reply["server_timing"]["infer_ms"] < 60_000


@pytest.mark.parametrize(
    "gripper", [np.float64(0.5), np.array(0.5), 0.5, [0.5], np.array([[0.5]])], ids=repr
)
def test_a_gripper_may_be_a_bare_number(gripper, address, blm):
    reply = ask(address, {**DROID, "observation/gripper_position": gripper})
    assert np.array_equal(reply["actions"], blm.act(OURS, "widowx"))


def test_an_observation_may_name_its_robot(address, blm):
    state = np.zeros(17)
    reply = ask(address, {**LIBERO, "observation/state": state, "robot": "panda"})
    assert np.array_equal(reply["actions"], blm.act({**OURS, "state": state}, "panda"))


def test_an_instruction_of_the_server_stands_in_for_one_that_is_missing(blm):
    with served(blm, instruction=WORDS) as (_, address):
        assert np.array_equal(ask(address, ALOHA)["actions"], blm.act(OURS, "widowx"))
        other = ask(address, {**ALOHA, "prompt": "stack the cubes"})["actions"]
    assert np.array_equal(other, blm.act({**OURS, "instruction": "stack the cubes"}, "widowx"))


def test_a_robot_is_served_with_its_own_cameras():
    top = Embodiment(6, 6, views=("top",), control_hz=30, state="six joints (degrees)")
    arms = Embodiment(14, 14, views=("cam_high", "cam_left_wrist", "cam_right_wrist"))
    blm = small_blm(robots={"so101": top, "aloha": arms})
    seen = {"images": {"top": FRONT}, "state": np.zeros(6), "instruction": WORDS}
    three = {view: np.roll(FRONT, 20 * i, 0) for i, view in enumerate(arms.views)}
    with served(blm, robot="so101") as (_, address):
        with connected(address) as policy:
            told = policy.metadata
            assert told["cameras"] == ["top"] and told["state"] == "six joints (degrees)"
            assert told["control_hz"] == 30 and told["robots"]["aloha"]["views"] == list(arms.views)
            assert set(told["observation_keys"]) == {"nanoblm", "aloha"}  # the others have no top
            assert np.array_equal(policy.act(seen, "so101"), blm.act(seen, "so101"))
            # openpi's ALOHA client sends four cameras, of which this robot has three
            wide = {"images": {**three, "cam_low": FRONT}, "state": np.zeros(14), "prompt": WORDS}
            chunk = blm.act({**wide, "instruction": WORDS}, "aloha")
            assert np.array_equal(policy.act(wide, "aloha"), chunk)
        code, words = ask(address, OURS)
        assert code == 1011 and "lacks images/top" in words and "images/front" in words


def test_a_family_that_lacks_a_camera_of_the_robot_is_passed_over(tmp_path):
    maps = serve.load_key_maps(ROOT / serve.KEY_MAPS)
    assert set(serve.families_of(maps, "widowx", ("front", "wrist"))) == set(maps)
    images = serve.families_of(maps, "one", ("wrist",))["libero"]["images"]
    assert images == {"wrist": "observation/wrist_image"}
    del maps["nanoblm"], maps["aloha"]
    with pytest.raises(UserError, match="no family in --keys has all cameras of so101: top"):
        serve.families_of(maps, "so101", ("top",))


def test_recordings_stand_in_for_a_robot(address, blm, tmp_path, monkeypatch, capsys):
    shown = Demonstration(
        states=np.zeros((14, 16), np.float32),
        actions=np.zeros((14, 7), np.float32),
        phases=["push"] * 14,
        images=[{"front": FRONT, "wrist": WRIST}] * 14,
        success=True,
        instruction=WORDS,
    )
    about = {"robot": "widowx", "task": "PushCube", "seed": 0, "noise": 0.0}
    write_episode(tmp_path / "widowx-PushCube-0.safetensors", shown, about)
    monkeypatch.setattr(sys, "argv", ["client.py", "--data", str(tmp_path), "--server", address])
    client.main()
    said = capsys.readouterr().out
    assert "widowx-PushCube-0.safetensors: 2 chunks, mean error of each number: 0." in said


def test_from_the_second_reply_on_the_time_of_the_one_before_is_told(address):
    with connect(address, compression=None, proxy=None) as connection:
        connection.recv()
        timings = []
        for _ in range(2):
            connection.send(pack(OURS))
            timings.append(unpack(connection.recv())["server_timing"])
    assert set(timings[0]) == {"infer_ms"}
    assert timings[1]["prev_total_ms"] > timings[0]["infer_ms"]


def without(observation, name):
    return {key: value for key, value in observation.items() if key != name}


NAN = np.where(np.arange(16) == 3, np.nan, STATE)
REFUSED = [
    (without(LIBERO, "observation/wrist_image"), r"lacks observation/wrist_image \(libero\); it has: obs"),
    (without(DROID, "observation/gripper_position"), r"lacks observation/gripper_position \(droid\)"),
    (without(ALOHA, "state"), r"lacks state, prompt \(aloha\); it has: images/cam_high"),
    ({**OURS, "images": {"front": FRONT}}, r"lacks images/wrist \(nanoblm\)"),
    ({**OURS, "images": FRONT}, "lacks images/front, images/wrist"),
    ({**OURS, "state": None}, "lacks state"),
    ({}, "it has: nothing"),
    ({**LIBERO, "observation/state": NAN}, "the state is not finite.*nan.*state: observation/state"),
    ({**LIBERO, "observation/state": np.zeros(8)}, r"shape \(8,\).*16 numbers"),
    ({**LIBERO, "observation/state": np.zeros((2, 16))}, r"shape \(2, 16\)"),
    ({**LIBERO, "observation/state": "rest"}, "cannot read the observation"),
    ({**DROID, "observation/joint_position": "rest"}, "cannot read the observation"),
    ({**DROID, "observation/joint_position": np.zeros((3, 5))}, "cannot read the state"),
    ({**LIBERO, "observation/image": FRONT.astype(np.float32)}, "front picture.*0..1.*observation/image"),
    ({**LIBERO, "observation/image": FRONT.astype(np.int64)}, r"front picture.*int64 \(128, 128, 3\)"),
    ({**LIBERO, "observation/wrist_image": FRONT[..., 0]}, r"wrist picture.*uint8 \(128, 128\)"),
    ({**LIBERO, "observation/image": FRONT[:0]}, "too thin"),
    ({**LIBERO, "observation/image": b"\xff\xd8"}, "front picture: a picture must"),
    ({**LIBERO, "observation/image": np.zeros((201, 9, 3), np.uint8)}, "longer than 200 pixels"),
    ({**LIBERO, "observation/image": [[1], [1, 2]]}, "cannot read the front picture"),
    ({**LIBERO, "prompt": ""}, "instruction"),
    ({**LIBERO, "prompt": np.zeros(2)}, "instruction is array"),
    ({**LIBERO, "prompt": 3}, "instruction is 3"),
    ({**LIBERO, "prompt": "push " * 100}, "tokens is longer"),
    ({**LIBERO, "prompt": "push " * 1000}, "5000 characters"),
    ({**LIBERO, "robot": "widowz"}, "unknown robot 'widowz'.*did you mean widowx"),
    ({**LIBERO, "robot": ["widowx"]}, "unknown robot"),
    ("push the cube", "text frame"),
    (b"junk", "cannot read the message"),
]  # fmt: skip


@pytest.mark.parametrize("message, says", REFUSED, ids=[says for _, says in REFUSED])
def test_a_wrong_observation_is_one_line_and_code_1011(message, says, address):
    code, told = ask(address, message)
    assert code == 1011 and "\n" not in told and "Traceback" not in told
    assert re.search(says, told), told
    assert len(told) < 600


def test_a_message_beyond_the_limit_closes_with_1009(address):
    with connect(address, compression=None, proxy=None) as connection:
        connection.recv()
        with pytest.raises(websockets.exceptions.ConnectionClosedError) as closed:
            connection.send(bytes(2**21))
            connection.recv()
    assert closed.value.rcvd.code == 1009


def test_many_clients_each_get_their_own_chunk(address, blm):
    states = [np.full(16, i / 10) for i in range(4)]
    wanted = [blm.act({**OURS, "state": state}, "widowx") for state in states]
    failed = []

    def drive(i):
        try:
            with connected(address) as policy:
                for _ in range(3):
                    got = policy.act({**OURS, "state": states[i]}, "widowx")
                    assert np.array_equal(got, wanted[i])
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=drive, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_the_simulated_arm_does_the_same_through_the_server(address, blm):
    env = TabletopEnv("widowx", "PickCube", render=False)
    alone = rollout(blm, env, 1_000_001, max_steps=30)
    with connected(address) as policy:
        served = rollout(policy, env, 1_000_001, max_steps=30)
    for result in (alone, served):
        del result["act_s"]
    assert served == alone


# ---- guests that misbehave


class Slow:
    """Replaces blm.act: every call waits for `go`, and is counted."""

    def __init__(self, blm):
        self.act = blm.act
        self.calls = 0
        self.go = threading.Event()

    def __call__(self, observation, robot):
        self.calls += 1
        assert self.go.wait(30)
        return self.act(observation, robot)


@pytest.fixture
def slow(blm, monkeypatch):
    """(Slow, server, address), whose policy is busy until `go` is set."""
    slow = Slow(blm)
    slow.go.set()  # for the warm-up
    monkeypatch.setattr(blm, "act", slow)
    with served(blm) as (server, address):
        slow.go.clear()
        slow.calls = 0
        yield slow, server, address
        slow.go.set()


def http(address, **headers):
    """(status, text) of a GET."""
    request = urllib.request.Request(address.replace("ws:", "http:"), headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_is_told_while_the_policy_is_busy(slow):
    slow, _, address = slow
    with connect(address, compression=None, proxy=None) as connection:
        connection.recv()
        connection.send(pack(OURS))
        wait_for(lambda: slow.calls == 1)
        assert http(f"{address}/healthz") == (200, "OK\n")
        assert connection.ping().wait(10)  # keepalive goes on, so nobody hangs up
        slow.go.set()
        assert unpack(connection.recv())["actions"].shape == (16, 7)


def test_who_leaves_while_it_waits_costs_nothing(slow):
    slow, server, address = slow
    first, second, third = [connect(address, compression=None, proxy=None) for _ in range(3)]
    with first, second, third:
        for connection in (first, second, third):
            connection.recv()
            connection.send(pack(OURS))
            wait_for(lambda: slow.calls == 1)
            time.sleep(0.1)  # the next one is queued after it
        # one in the middle of its chunk and one that waits: both vanish silently
        for gone in (first, second):
            gone.socket.shutdown(socket.SHUT_RDWR)
        time.sleep(0.2)
        slow.go.set()
        assert unpack(third.recv())["actions"].shape == (16, 7)
    wait_for(lambda: server.clients == 0)
    assert slow.calls == 2  # the first and the third


def test_a_client_that_answers_no_ping_is_let_go(blm, monkeypatch):
    monkeypatch.setattr(serve, "PING_INTERVAL", 0.1)
    monkeypatch.setattr(serve, "PING_TIMEOUT", 0.2)
    monkeypatch.setattr(serve, "CLOSE_TIMEOUT", 0.2)
    with served(blm) as (server, address):
        host, port = address.removeprefix("ws://").split(":")
        with socket.create_connection((host, int(port))) as dead:
            key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
            upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\n"
            dead.sendall(f"GET / HTTP/1.1\r\nHost: x\r\n{upgrade}{key}\r\n".encode())
            wait_for(lambda: server.clients == 1)
            wait_for(lambda: server.clients == 0)
        assert ask(address, OURS)["actions"].shape == (16, 7)


def test_a_mistake_of_ours_ends_one_connection_only(blm, monkeypatch, capfd):
    act = blm.act

    def broken(observation, robot):
        if observation["instruction"] == "break":
            raise ZeroDivisionError("a bug")
        return act(observation, robot)

    monkeypatch.setattr(blm, "act", broken)
    with served(blm) as (_, address):
        code, told = ask(address, {**OURS, "instruction": "break"})
        assert code == 1011 and "ZeroDivisionError" in told and "File" not in told
        assert ask(address, OURS)["actions"].shape == (16, 7)
    assert "a bug" in capfd.readouterr().err


def test_only_who_knows_the_key_comes_in(blm, tmp_path):
    path = tmp_path / "key"
    path.write_text("open sesame\n")
    with served(blm, api_key_file=str(path)) as (_, address):
        assert http(f"{address}/healthz") == (200, "OK\n")
        for wrong in ("", "open", "open sesame2", "schlüssel".encode().decode("latin-1")):
            with pytest.raises(UserError, match="401"), connected(address, wrong):
                pass
        with connected(address, "open sesame") as policy:
            assert policy.act(OURS, "widowx").shape == (16, 7)


@pytest.mark.parametrize("origin", ["http://evil.example", "https://127.0.0.1", "null"])
def test_web_pages_do_not_come_in(origin, address):
    with pytest.raises(websockets.exceptions.InvalidStatus, match="403"):
        connect(address, origin=origin, proxy=None)


def test_one_client_too_many_is_turned_away(blm, monkeypatch):
    monkeypatch.setattr(serve, "MAX_CLIENTS", 1)
    with served(blm) as (server, address):
        with connected(address), pytest.raises(UserError, match="503"), connected(address):
            pass
        wait_for(lambda: server.clients == 0)
        assert ask(address, OURS)["actions"].shape == (16, 7)


def test_what_a_client_writes_does_not_steer_the_terminal(address, capsys):
    ask(address, {**OURS, "\x1b[31mred\nline": 1})
    assert "not read: ?[31mred line" in capsys.readouterr().out


# ---- the command line


def call(module, flags, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module.__name__, *flags])
    with pytest.raises(SystemExit) as stop:
        cli.run(module.main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "module, flags, says",
    [
        (serve, "--port 70000", "cannot listen on 127.0.0.1:70000"),
        (serve, "--port -1", "--port -1"),
        (serve, "--host no.such.host.invalid", "cannot listen on no.such.host.invalid:8000"),
        (serve, "--host 192.0.2.1", "cannot listen on 192.0.2.1:8000"),
        (serve, "--port {taken}", "cannot listen on 127.0.0.1:{taken}: .*in use.*--port"),
        (serve, "--api_key_file {tmp}/nowhere --port 0", "nowhere"),
        (serve, "--api_key_file {tmp}/empty --port 0", "must hold one line"),
        (serve, "--keys {tmp}/empty --port 0", "empty is not JSON"),
        (serve, "--keys {tmp}/keys --port 0", "mine must have cameras, state"),
        (serve, "--max_message 0", "--max_message 0"),
        (serve, "--robot widowz --port 0", "unknown robot 'widowz'.*did you mean widowx"),
        (serve, "--weights {tmp}/nowhere --port 0", "nowhere"),
        (client, "--server ws://127.0.0.1:1 --out {tmp}", "ws://127.0.0.1:1: .*refused.*serve.py"),
        (client, "--server here --out {tmp}", "here"),
        (client, "--task Juggle", "unknown task"),
        (client, "--episodes 0", "--episodes 0"),
    ],
)
def test_a_mistake_is_one_line(module, flags, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").write_text("")
    (tmp_path / "keys").write_text('{"mine": {"front": "a"}}')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"tmp": tmp_path, "taken": taken.getsockname()[1]}
        words = flags.format(**names).split()
        code, told = call(module, words, monkeypatch, capsys)
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in told, told
    assert re.search(says.format(**names), lines[0]), lines[0]


@pytest.mark.parametrize("missing", ["msgpack", "websockets.asyncio.server"])
def test_missing_extras_are_one_line(missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match="pip install -r requirements-serve.txt"):
        require_extras()
    code, told = call(serve, [], monkeypatch, capsys)
    assert code == 2 and "requirements-serve.txt" in told


def test_ctrl_c_says_goodbye_to_everybody():
    # a shell lets what it starts in the background ignore Ctrl-C, and children inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    words = [sys.executable, "serve.py", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    signal.signal(signal.SIGINT, before)
    address = None
    for line in process.stdout:
        if "ws://" in line:
            address = line.split()[2].rstrip(";")
            break
    with connect(address, compression=None, proxy=None) as connection:
        assert RemotePolicy(connection).act(OURS, "widowx").shape == (16, 7)
        process.send_signal(signal.SIGINT)
        with pytest.raises(websockets.exceptions.ConnectionClosedOK) as closed:
            connection.recv()
    assert closed.value.rcvd.code == 1001
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and told == "stopped\n"
