"""A policy server: `BLM.act` over openpi's websocket protocol, for robots on other machines.

    python serve.py --robot widowx                      on this machine only, at port 8000
    python serve.py --host 0.0.0.0 --api_key_file key   for other machines, which need the key

    client                                 server
       ── connects ──────────────────────────►
       ◄── metadata of the policy, a message ──
       ── an observation, a message ─────────►  queued
       ◄── {"actions": (T, dof + 1) float32, "server_timing": {"infer_ms", "prev_total_ms"}} ──
       ◄── or a text that says what was wrong; the connection then closes with code 1011 ──

Messages are encoded as in wire.py. Clients use different keys for the parts of an observation;
data/observation_keys.json maps them. GET /healthz answers "OK" even while the policy is computing.
Source of the protocol: openpi at 15a9616, src/openpi/serving/websocket_policy_server.py.

The event loop only does I/O. One worker thread decodes, acts on and answers one message after
another, so a slow or vanished client holds up nobody but itself.
"""

import asyncio
import hmac
import ipaddress
import logging
import socket
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus

import numpy as np

from cli import UserError, at_least, choose, one_line, parse, pick_device, run
from files import read_json, read_text, reading
from wire import pack, require_extras, unpack

KEY_MAPS = "data/observation_keys.json"
ANY = "{camera}"  # in a key: replaced by the name of each camera
MAX_CLIENTS = 16  # at a time; each may hold one or two messages in memory
MAX_INSTRUCTION = 1000  # characters: the tokenizer caches every text that it has seen
PING_INTERVAL = 20  # s
PING_TIMEOUT = 60  # s; a client that loads a simulator may not answer within the usual 20
CLOSE_TIMEOUT = 2  # s for a client to close its end


@dataclass
class ServeConfig:
    weights: str = "weights/nano"  # model folder
    robot: str = "widowx"  # the robot of observations that do not name one
    instruction: str = ""  # for observations without one; openpi's ALOHA client sends none
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is reachable from other machines
    port: int = 8000  # 0: any free port
    api_key_file: str = ""  # text file with the key that clients must send
    keys: str = KEY_MAPS  # JSON file that maps clients' names of observation keys
    max_message: int = 32  # MiB; larger messages close the connection with code 1009
    max_picture: int = 4096  # pixels on the longer side
    device: str = "auto"  # auto, cpu, cuda or mps


# ---- what clients send


def load_key_maps(path):
    """{family: {camera: key, ..., "instruction": key, "state": [key]}} in a file.

    The camera ANY covers those that are not listed; in its key ANY is replaced by their names.
    """
    maps = read_json(path)
    for family, keys in maps.items():
        with reading(path, f"{KEY_MAPS} is an example"):
            for name in ("state", "instruction"):
                assert name in keys, f"{family} must have cameras, state and instruction"
            assert len(keys) > 2, f"{family} has no cameras"
            state = keys["state"]
            assert isinstance(state, list) and state, f"the state of {family} is not a list of keys"
            for name, key in keys.items():
                parts = state if name == "state" else [key]
                for part in parts:
                    assert isinstance(part, str), f"{part!r} of {family} is not a string"
    return maps


def families_of(key_maps, robot, views):
    """{family: {"images": {camera: key}, "state": [key], "instruction": key}}.

    Only families with a key for every camera of the robot. UserError if there are none.
    """
    families = {}
    for family, keys in key_maps.items():
        others = keys.get(ANY, "")
        images = {view: keys.get(view) or others.replace(ANY, view) for view in views}
        if all(images.values()):
            own = {"state": keys["state"], "instruction": keys["instruction"]}
            families[family] = {"images": images, **own}
    if not families:
        cameras = ", ".join(views)
        raise UserError(f"no family in --keys has all cameras of {robot}: {cameras}")
    return families


def find(observation, key):
    """observation["a/b"], or else observation["a"]["b"]; None if neither exists."""
    if key in observation:
        return observation[key]
    group, _, rest = key.partition("/")
    inner = observation.get(group)
    return find(inner, rest) if rest and isinstance(inner, dict) else None


def names(observation, above=""):
    """All keys of an observation, those of nested dicts as "a/b"."""
    found = []
    for key, value in observation.items():
        name = f"{above}{key}"
        found += names(value, f"{name}/") if isinstance(value, dict) else [name]
    return found


def recognize(observation, families, instruction=""):
    """(family, its keys): the first of `families_of` whose keys are all in the observation.

    If there is none, the UserError lists what the closest family lacks. With an instruction given,
    the key for it may be missing.
    """
    reads = {}
    lacks = {}
    for family, keys in families.items():
        reads[family] = [*keys["images"].values(), *keys["state"], keys["instruction"]]
        needed = reads[family][:-1] if instruction else reads[family]
        lacks[family] = [key for key in needed if find(observation, key) is None]
    family = min(lacks, key=lambda name: len(lacks[name]))
    if lacks[family]:
        there = ", ".join(names(observation)) or "nothing"
        missing = ", ".join(lacks[family])
        raise UserError(f"the observation lacks {missing} ({family}); it has: {there}")
    return family, reads[family]


def translate(observation, keys, instruction="", max_picture=4096):
    """An observation with a family's keys, as `BLM.act` takes it. UserError on oversized parts."""
    from model import to_array

    images = {}
    for view, key in keys["images"].items():
        picture = find(observation, key)
        with reading(f"the {view} picture"):  # fails for nested lists of unequal lengths
            shape = np.shape(picture)
        # check the size before the image is copied on its way to the model
        if max(shape, default=0) > max_picture:
            limit = f"is longer than {max_picture} pixels: shrink it first"
            raise UserError(f"{key}, shape {shape}, {limit}")
        images[view] = picture
    parts = [find(observation, key) for key in keys["state"]]
    state = parts[0]
    if len(parts) > 1:  # joints and gripper separately; the gripper may be a bare number
        with reading("the state", f"it is {', '.join(keys['state'])} end to end"):
            state = np.concatenate([np.atleast_1d(to_array(part, 1)) for part in parts])
    text = find(observation, keys["instruction"])
    if text is None:
        text = instruction
    if isinstance(text, bytes):  # as in datasets of TensorFlow
        text = text.decode(errors="replace")
    if isinstance(text, str) and len(text) > MAX_INSTRUCTION:
        raise UserError(f"an instruction of {len(text)} characters: at most {MAX_INSTRUCTION}")
    return {"images": images, "state": state, "instruction": text}


# ---- the server


class PolicyServer:
    """Serves blm (a BLM with a policy) to every client; config a ServeConfig.

    UserError on an unknown robot, a broken file of keys, an empty API key.
    """

    def __init__(self, blm, config):
        self.blm = blm
        self.config = config
        self.robot = choose(config.robot, blm.require_policy().embodiments, "robot")
        self.key_maps = load_key_maps(config.keys)
        self.families(self.robot)
        self.api_key = read_api_key(config.api_key_file)
        self.hello = pack(self.metadata())
        self.clients = 0
        # one thread: the model computes one chunk at a time, and torch keeps threads for each
        # caller
        self.worker = ThreadPoolExecutor(1)

    def families(self, robot):
        """`families_of` the given robot. UserError if it is unknown."""
        embodiments = self.blm.policy.embodiments
        views = embodiments[choose(robot, embodiments, "robot")].views
        return families_of(self.key_maps, robot, views)

    def metadata(self):
        """The first message to a client."""
        from data.env import IMAGE_SIZE
        from processor import smart_resize

        policy = self.blm.policy
        robots = {name: asdict(robot) for name, robot in policy.embodiments.items()}
        own = robots[self.robot]
        # larger images are shrunk anyway, so sending them only takes longer
        size = smart_resize(IMAGE_SIZE, IMAGE_SIZE, self.blm.processor.image)
        return {
            "action_horizon": policy.config.action_horizon,
            "action_dim": own["action_dim"],
            "image_resolution": size,
            "cameras": own["views"],
            "robots": robots,
            "robot": self.robot,
            "control_hz": own["control_hz"],
            "state": own["state"],
            "action": own["action"],
            "observation_keys": self.families(self.robot),
        }

    def warm_up(self):
        """Compute one chunk and discard it: the first takes longer."""
        robot = self.blm.policy.embodiments[self.robot]
        images = dict.fromkeys(robot.views, np.zeros((128, 128, 3), np.uint8))
        observation = {"images": images, "state": np.zeros(robot.state_dim)}
        self.blm.act({**observation, "instruction": "warm up"}, self.robot)

    # ---- in the worker thread

    def answer(self, connection, message, previous_ms):
        """The reply to a message: bytes, or a text that says what is wrong with it."""
        if connection.close_code is not None:  # disconnected while it waited
            return b""
        try:
            return self.act(unpack(message), previous_ms)
        except UserError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001, one client's error must not stop the others
            traceback.print_exc()
            return f"the server failed ({type(error).__name__}); its own output says where"

    def act(self, observation, previous_ms):
        """The reply to an observation; previous_ms: time of the last one, None for the first."""
        instruction = self.config.instruction
        robot = observation.get("robot", self.robot)
        families = self.families(robot)
        family, read = recognize(observation, families, instruction)
        # once per client, so that a camera that is not used does not go unnoticed
        if previous_ms is None:
            unread = [name for name in names(observation) if name not in (*read, "robot")]
            more = f"; not read: {', '.join(unread[:20])}" if unread else ""
            say(f"observations of the family {family}{more}")
        keys = families[family]
        observed = translate(observation, keys, instruction, self.config.max_picture)
        start = time.perf_counter()
        try:
            chunk = self.blm.act(observed, robot)  # (T, dof + 1)
        except UserError as error:
            where = [f"{view}: {key}" for view, key in keys["images"].items()]
            where.append(f"state: {'+'.join(keys['state'])}")
            raise UserError(f"{error} ({robot}; {', '.join(where)})") from None
        timing = {"infer_ms": 1000 * (time.perf_counter() - start)}
        if previous_ms is not None:
            timing["prev_total_ms"] = previous_ms
        # clients index every array by time, so there must be no others
        return pack({"actions": chunk, "server_timing": timing})

    # ---- in the event loop

    def admit(self, connection, request):
        """Called before the handshake: a reply to /healthz, a refusal, or None to accept."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        # any web page open in a browser could otherwise connect to ports of this machine
        origin = request.headers.get("Origin", "")
        if origin.startswith("http") or origin == "null":
            return connection.respond(HTTPStatus.FORBIDDEN, "web pages may not connect\n")
        if self.api_key:
            sent = request.headers.get("Authorization", "").encode(errors="replace")
            # in constant time, so that timing does not reveal how much of the key is right
            if not hmac.compare_digest(sent, f"Api-Key {self.api_key}".encode()):
                return connection.respond(HTTPStatus.UNAUTHORIZED, "wrong or no API key\n")
        if self.clients >= MAX_CLIENTS:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many clients\n")
        return None

    async def talk(self, connection):
        """Everything between one client's arrival and its departure."""
        from websockets.exceptions import ConnectionClosed

        # there is no address if the client has gone already
        who = ":".join(map(str, (connection.remote_address or ["nobody"])[:2]))
        say(f"{who} connected")
        self.clients += 1
        loop = asyncio.get_running_loop()
        previous_ms = None
        why = ""
        try:
            await connection.send(self.hello)
            async for message in connection:
                start = time.perf_counter()
                job = (self.answer, connection, message, previous_ms)
                reply = await loop.run_in_executor(self.worker, *job)
                await connection.send(reply)
                if isinstance(reply, str):
                    why = f": {reply}"
                    await connection.close(1011, "the text before this says why")
                    break
                previous_ms = 1000 * (time.perf_counter() - start)
        except ConnectionClosed as closed:
            why = f": {closed}"
        finally:
            self.clients -= 1
            say(f"{who} disconnected{why}")

    async def run(self, listener):
        """Serve at a socket of `bind` until cancelled. UserError if another program took it."""
        from websockets.asyncio.server import serve

        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.worker, self.warm_up)
        # its logger prints a page for every port scan and lost connection
        logger = logging.getLogger("websockets.server")
        logger.setLevel(logging.CRITICAL)
        host, port = listener.getsockname()[:2]
        address = f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"
        # per client
        limits = {
            "max_size": self.config.max_message * 2**20,
            "max_queue": 1,  # queued messages in memory; the rest wait at the client
            "ping_interval": PING_INTERVAL,
            "ping_timeout": PING_TIMEOUT,
            "close_timeout": CLOSE_TIMEOUT,
            "compression": None,  # camera images hardly compress
        }
        with listening(host, port):
            async with serve(self.talk, sock=listener, process_request=self.admit, **limits):
                say(f"{self.robot} at {address}; Ctrl-C stops the server")
                await asyncio.Future()  # until cancelled


def say(text):
    """Print a line for the operator; text from clients must not control the terminal."""
    print("".join(c if c.isprintable() else "?" for c in one_line(text)), flush=True)


def read_api_key(path):
    """The key in a file, or "" without a file. UserError unless it is a line of printable ASCII."""
    key = read_text(path).strip() if path else ""
    if path and not (key and key.isascii() and key.isprintable()):
        raise UserError(f"{path} must hold one line of ASCII: the key")
    return key


@contextmanager
def listening(host, port):
    """Turn an error with an address into a UserError."""
    try:
        yield
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "choose another --host or --port"
        raise UserError(f"cannot listen on {host}:{port}: {reason}; {advice}") from None


def bind(host, port):
    """A socket that holds the address, and refuses connections until the server listens on it."""
    with listening(host, port):
        if port > 65535:  # the C library would silently take it modulo 65536
            raise OverflowError("ports end at 65535")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        holder = socket.socket(family, kind, protocol)
        # otherwise the port stays in use for a minute after a server stops
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(address)
    return holder


def main():
    config = parse(ServeConfig, description="Serve a policy over openpi's websocket protocol.")
    require_extras()
    at_least(config, 0, "port")
    at_least(config, 1, "max_message", "max_picture")
    # check everything possible before the weights are loaded
    load_key_maps(config.keys)
    key = read_api_key(config.api_key_file)
    # bind now: clients that come too early should be refused at once, not left waiting
    listener = bind(config.host, config.port)
    if not key and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        print("note: anyone who can reach this port can use it; require a key with --api_key_file")

    from model import BLM  # slow to load

    blm = BLM.from_pretrained(config.weights, pick_device(config.device))
    asyncio.run(PolicyServer(blm, config).run(listener))


if __name__ == "__main__":
    run(main)
