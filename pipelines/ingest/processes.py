"""Processes that share the work of an ingest or of a verification."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.queues import SimpleQueue
from threading import Thread

from pipelines.console import attach_warnings
from pipelines.errors import BrokenIngestError


@contextmanager
def spawn(
    workers: int, *, begin: Callable[[int], None] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """Start processes, and end them with the block: after a failure, without what is not begun.

    Args:
        workers: How many.
        begin: Called in each of them before all else, with its number from 0; it is pickled.

    Raises:
        BrokenIngestError: One of them died.
    """
    # Spawned, because a process that has threads must not be forked.
    context = get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(workers):
        numbers.put(number)
    pool = ProcessPoolExecutor(workers, context, initializer=_enter, initargs=(begin, numbers))
    # The first task starts all of them. Until they have entered, Ctrl-C must wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise BrokenIngestError(
            "A process that worked on shards died, perhaps for want of memory. Run the same "
            "command again, with fewer --workers if it happens again."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _enter(begin: Callable[[int], None] | None, numbers: "SimpleQueue[int]") -> None:
    _end_with_parent()
    attach_warnings()
    # Ctrl-C reaches every process of a terminal. The one that started these says what there is to
    # say; these leave without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if begin is not None:
        begin(numbers.get())


def _end_with_parent() -> None:
    """See to it that this process leaves when the one that started it is killed."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
