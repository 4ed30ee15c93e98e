#!/usr/bin/env bash
# av 18.1.0 (15.1.0 is the same), whose wheel brings SVT-AV1, the default video encoder of lerobot.
# Expected: an encoder's threads inherit the priority of whoever starts it, so that `nice -n 19`
#           keeps a recorder or a converter out of the way of a control loop or a training.
# Seen:     started by root, as in most containers, its threads are real-time ones (SCHED_FIFO). They
#           come before every normal process, nice or not, a control loop or a training among them.
#           Encode as another user, or set the policy back once the encoder is open
#           (chrt -a -o -p 0 <pid>).
# Source:   this run; SVT-AV1 raises the policy of the threads it creates where it may.
set -euo pipefail
if [ "$(id -u)" != 0 ]; then
    echo "only root may have real-time threads: nothing to see as another user"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q av==18.1.0 numpy
cd "$folder"
nice -n 19 venv/bin/python - <<'PYTHON'
import os

import av
import numpy as np

FIELD = 40  # "policy" in /proc/<pid>/stat, counted behind the name in brackets


def policies():
    found = []
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/stat") as file:
            found.append(int(file.read().rpartition(")")[2].split()[FIELD - 2]))
    return found


before = policies()
container = av.open("film.mp4", "w")
stream = container.add_stream("libsvtav1", rate=10, options={"preset": "12"})
stream.width = stream.height = 128
stream.pix_fmt = "yuv420p"
for _ in range(5):
    frame = av.VideoFrame.from_ndarray(np.zeros((128, 128, 3), np.uint8), format="rgb24")
    container.mux(stream.encode(frame))
during = policies()
real_time = during.count(os.SCHED_FIFO)
print(f"{len(before)} threads before, {before.count(os.SCHED_FIFO)} of them real-time;", end=" ")
print(f"{len(during)} with the encoder open, {real_time} of them real-time")
container.mux(stream.encode())
container.close()
assert before.count(os.SCHED_FIFO) == 0
assert real_time > 0, "no real-time threads now: this finding is out of date"
PYTHON
