"""Run jobs in several processes: each result as it arrives, errors in one line."""

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
    """In a worker: exit at once when the parent process is gone, even if it was killed."""
    parent = multiprocessing.parent_process()  # its pipe closes even on a kill

    def watch():
        parent.join()
        os._exit(1)  # in a thread sys.exit would end only that thread

    threading.Thread(target=watch, daemon=True).start()


def run_jobs(function, jobs, workers):
    """Yield function(job) for every job, as they finish, from `workers` processes.

    Each process has one thread. UserError if a worker is killed, for instance for lack of memory.
    Ctrl-C, an error, or a caller that stops early ends the workers, whatever they are doing.
    """
    # inherited by the workers; without it each of them would use every core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")  # fork would copy GL contexts and threads
    others = set(multiprocessing.active_children())
    jobs = iter(jobs)
    running = set()
    with ProcessPoolExecutor(workers, context, initializer=end_with_parent) as pool:
        try:
            # Workers start while Ctrl-C is blocked and inherit that, so only this process handles
            # it.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            running = {pool.submit(function, job) for job in islice(jobs, 2 * workers)}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            # Submit only a few jobs ahead: the pool finishes all it has, even if the caller is
            # gone.
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                # results first, then errors
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    yield future.result()
                running |= {pool.submit(function, job) for job in islice(jobs, len(done))}
        except BrokenProcessPool:
            raise UserError(
                "a worker was killed, probably out of memory: "
                "run the same command again, with fewer --workers"
            ) from None
        finally:
            if running:  # nobody will use the remaining results
                for process in set(multiprocessing.active_children()) - others:
                    process.terminate()


def in_order(results, count):
    """All `count` results (number, ...) of episodes, sorted by number, with a progress bar."""
    done = tqdm(results, total=count, unit="episode")
    return sorted(done, key=lambda result: result[0])  # which finished first must not matter
