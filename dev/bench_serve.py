"""What serve.py adds to the time of `BLM.act`, and how it handles clients that never pause.

    OMP_WAIT_POLICY=PASSIVE python -m dev.bench --only serve --rounds 200 --seconds 60

The server is a separate process on this machine, so it adds encoding, the loopback interface and
thread switches; a real network adds to that.
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
CLIENTS = 8  # at the same time
ROBOT = "widowx"


@contextmanager
def serving(device, environment):
    """(address, process id) of a server, for the duration of the block."""
    # port 0 is any free one; the server prints which it is
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
    """Memory of a process in MiB; NaN where the system does not provide it."""
    # the kernel's own count, which only Linux keeps here
    status = Path(f"/proc/{pid}/status")
    text = status.read_text() if status.exists() else "VmRSS: nan"
    return round(float(re.search(r"VmRSS:\s+(\S+)", text)[1]) / 1024, 1)


def milliseconds(act, observation):
    start = time.perf_counter()
    act(observation, ROBOT)
    return 1000 * (time.perf_counter() - start)


def added(address, blm, observation, rounds):
    """A row: a chunk through the server and from `act` in this process, in turns."""
    # in turns, so that other load on the machine affects both
    with connected(address) as policy:
        sides = (policy.act, blm.act)
        times = []
        for _ in range(rounds + 1):
            times.append([milliseconds(act, observation) for act in sides])
    served, alone = np.array(times[1:]).T  # (rounds,) each; the first round is slower
    # medians of differences and of ratios of adjacent times, as everywhere in dev/bench.py
    return {
        "what": "serve",
        "ms": round(float(np.median(served)), 2),
        "rounds": rounds,
        "against_ms": round(float(np.median(alone)), 2),
        "times_as_fast": round(float(np.median(alone / served)), 3),
        "added_ms": round(float(np.median(served - alone)), 2),
    }


def load(address, pid, observation, seconds):
    """A row: CLIENTS that send the next request at once, and the server's memory."""
    times = []
    errors = []
    end = time.perf_counter() + seconds

    def client():
        try:
            with connected(address) as policy:
                expected = policy.act(observation, ROBOT)  # (T, dof + 1)
                # without a pause, so that some client is always waiting
                while time.perf_counter() < end:
                    start = time.perf_counter()
                    chunk = policy.act(observation, ROBOT)
                    times.append(1000 * (time.perf_counter() - start))
                    assert (chunk == expected).all(), "another chunk for the same observation"
        except (UserError, AssertionError) as error:
            errors.append(str(error))

    # a chunk takes so much longer than encoding that one process can be all clients
    threads = [Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 10)  # by now everything has been allocated
    held = memory(pid)
    for thread in threads:
        thread.join()
    # a leak of one message per call would be 100 MB in 1,000 calls
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
    """Both rows, for config (a BenchConfig)."""
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
