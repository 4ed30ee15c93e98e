"""What serve.py adds to `BLM.act`, and how it bears clients that never pause.

    OMP_WAIT_POLICY=PASSIVE python -m dev.bench --only serve --rounds 200 --seconds 60

The server is a process of its own on this machine, so what is added is packing, the loopback and
the turns of its threads; a network comes on top.
"""

import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np

from cli import UserError
from client import connected
from dev import bench_side
from model import BLM
from wire import require_extras

ROOT = Path(__file__).parent.parent
CLIENTS = 8  # at a time
ROBOT = "widowx"


@contextmanager
def serving(device, environment):
    """(address, process number) of a server for as long as the block runs."""
    # port 0 is any free one; the server prints which
    words = ["serve.py", "--port", "0", "--robot", ROBOT, "--device", device]
    pipes = {"stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, **pipes)
    try:
        for line in process.stdout:
            if found := re.search(r"ws://\S+\d", line):
                break
        else:
            raise UserError("the server ended: see above")
        yield found[0], process.pid
    finally:
        # it has nothing to save
        process.terminate()
        process.wait()


def memory(pid):
    """MiB that a process holds; NaN where the system does not tell."""
    # the kernel's own count, which other systems keep elsewhere
    status = Path(f"/proc/{pid}/status")
    text = status.read_text() if status.exists() else "VmRSS: nan"
    return round(float(re.search(r"VmRSS:\s+(\S+)", text)[1]) / 1024, 1)


def milliseconds(act, observation):
    start = time.perf_counter()
    act(observation, ROBOT)
    return 1000 * (time.perf_counter() - start)


def added(address, blm, observation, rounds):
    """A row: a chunk through the server beside `act` in this process, taking turns."""
    # side by side, so that whatever else the machine does meets both
    with connected(address) as policy:
        sides = (policy.act, blm.act)
        times = []
        for _ in range(rounds + 1):
            times.append([milliseconds(act, observation) for act in sides])
    served, alone = np.array(times[1:]).T  # (rounds,) each; the first round is slower
    # medians of differences and ratios of neighbors, as everywhere in dev/bench.py
    return {
        "what": "serve",
        "ms": round(float(np.median(served)), 2),
        "rounds": rounds,
        "against_ms": round(float(np.median(alone)), 2),
        "times_as_fast": round(float(np.median(alone / served)), 3),
        "added_ms": round(float(np.median(served - alone)), 2),
    }


def load(address, pid, observation, seconds):
    """A row: CLIENTS that ask again as soon as they are answered, and the server's memory."""
    times = []
    errors = []
    end = time.perf_counter() + seconds

    def client():
        try:
            with connected(address) as policy:
                expected = policy.act(observation, ROBOT)  # (T, dof + 1)
                # no pause: there is always somebody who waits
                while time.perf_counter() < end:
                    start = time.perf_counter()
                    chunk = policy.act(observation, ROBOT)
                    times.append(1000 * (time.perf_counter() - start))
                    assert (chunk == expected).all(), "another chunk for the same observation"
        except (UserError, AssertionError) as error:
            errors.append(str(error))

    # a chunk takes so much longer than packing that one process can be all clients
    threads = [Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 10)  # what everybody needs is there
    held = memory(pid)
    for thread in threads:
        thread.join()
    # a leak of one message a call would be 100 MB in 1,000 calls
    return {
        "what": f"serve, {CLIENTS} clients",
        "ms": round(float(np.median(times)), 2),
        "p99_ms": round(float(np.quantile(times, 0.99)), 2),
        "seconds": seconds,
        "calls": len(times),
        "errors": errors,
        "memory_mib": [held, memory(pid)],
    }


def measure(config, environment):
    """Both rows, as config (a BenchConfig) asks for them."""
    require_extras()
    # the same weights in both processes
    blm = BLM.from_pretrained("weights/nano", config.device)
    observation = bench_side.observation(bench_side.STATE_DIM)
    rows = []
    with serving(config.device, environment) as (address, pid):
        rows.append(added(address, blm, observation, config.rounds))
        print(rows[-1], flush=True)
        rows.append(load(address, pid, observation, config.seconds))
        print(rows[-1], flush=True)
    return rows
