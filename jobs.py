"""Work for several processes: the result of each job as it comes, errors in one line."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from cli import UserError


def start_worker():
    """Ctrl-C is left to the process that asks; a worker ends with its parent, even if killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def run_jobs(function, jobs, workers):
    """Yield function(job) of every job, in the order in which they end, from `workers` processes.

    Each has one thread. UserError if a worker is killed, as by a system that is out of memory.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        futures = []
        try:
            for job in jobs:
                futures.append(pool.submit(function, job))
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, perhaps for want of memory: try fewer --workers; "
                "what is done is kept, so start the same command again"
            ) from None
        finally:
            for future in futures:
                future.cancel()


def pool(workers):  # TEMPORARY: until every caller uses run_jobs
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return multiprocessing.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def this_process():  # TEMPORARY
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
