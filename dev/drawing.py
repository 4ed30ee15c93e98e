"""CPU time of drawing, for the benches of other people's simulators."""

import time

PICTURES = 10  # in a turn


def milliseconds(job):
    """ms of CPU time that one of PICTURES calls of a job takes."""
    start = time.process_time()
    for _ in range(PICTURES):
        job()
    return 1000 * (time.process_time() - start) / PICTURES
