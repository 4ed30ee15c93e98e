"""CPU time of rendering, for the benches of other simulators."""

import time

PICTURES = 10  # per turn


def milliseconds(job):
    """CPU time in ms of one call of a job, averaged over PICTURES calls."""
    start = time.process_time()
    for _ in range(PICTURES):
        job()
    return 1000 * (time.process_time() - start) / PICTURES
