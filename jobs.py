"""Work for several processes: the result of each job as it comes, errors in one line."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from tqdm import tqdm

from cli import UserError


def end_with_parent():
    """In a worker: leave at once when the process that asks is gone, even if it was killed."""
    parent = multiprocessing.parent_process()  # its end is a pipe's, which no kill prevents

    def watch():
        parent.join()
        os._exit(1)  # from a thread: sys.exit would end only that

    threading.Thread(target=watch, daemon=True).start()


def run_jobs(function, jobs, workers):
    """Yield function(job) of every job, in the order in which they end, from `workers` processes.

    Each has one thread. UserError if a worker is killed, as by a system that is out of memory.
    Ctrl-C, an error or a reader that stops early ends the workers, whatever they are doing.
    """
    # inherited by the workers, who would otherwise take every core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")  # a fork would copy GL contexts and threads
    others = set(multiprocessing.active_children())
    jobs = iter(jobs)
    running = set()
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        try:
            # Workers start while Ctrl-C is blocked, and inherit that: it is left to this process.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            running = {pool.submit(function, job) for job in islice(jobs, 2 * workers)}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            # Only a few jobs wait in the pool: it would finish all that it has, whoever leaves.
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                # what is done first, then what went wrong
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    yield future.result()
                running |= {pool.submit(function, job) for job in islice(jobs, len(done))}
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, perhaps for want of memory: "
                "start the same command again, with fewer --workers"
            ) from None
        finally:
            if running:  # nobody waits for the rest
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()


def in_order(results, count):
    """The `count` results of episodes, (number, ...) each, as a list sorted by number; with a bar."""
    done = tqdm(results, total=count, unit="episode")
    return sorted(done, key=lambda result: result[0])  # which job ended first must not matter
