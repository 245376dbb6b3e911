"""Workers that start as forks of a process which has imported what they need.

Imports take longer than all else of a start, and are the same for each worker. So a server imports
once, beside the caller's own checks, and forks a worker for each request (multiprocessing's
"forkserver"). Only workers that compute on the CPU start so: nobody promises that a GPU can be used
in a fork of a process whose libraries have looked at it.

The server has one thread while it forks, apart from those that libraries keep and stop themselves
around a fork. It ends with the caller and the workers. It ignores Ctrl-C and SIGTERM like them,
since it alone can tell the caller how a worker ended.
"""

import atexit
import gc
import importlib
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

_WHAT = "LAPFLOW_WARM_UP"
"""Tells the server what to call; it takes that away again."""
_LOOK_S = 0.1
"""How often the server looks for its caller while it imports."""


def start(warm_up: Callable[[], None], *, threads: int) -> None:
    """Starts the server, unless it runs; does not wait for what it imports.

    One that runs serves other workers too, whatever it was started for: they import the rest, and
    have a number of threads of their own.

    Args:
        warm_up: An importable function that imports what workers need.
        threads: Compute threads of a worker.
    """
    forkserver.set_forkserver_preload([__name__])
    # What `cluster.process_group.join` sets before torch and DeepSpeed are imported there.
    variables = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    what = f"{warm_up.__module__}:{warm_up.__qualname__}"
    with _variables(variables | {_WHAT: what}), block_interrupts():
        forkserver.ensure_running()


def become(environment: Mapping[str, str]) -> None:
    """Makes a fork what a process of its own would be.

    Args:
        environment: The caller's, as it is now.
    """
    os.environ.clear()
    os.environ.update(environment)
    import numpy as np

    # Python's own generator does so at a fork, and torch's has a fixed seed in every process.
    np.random.seed()


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Blocks SIGINT in this thread, so that processes started meanwhile are born deaf to it."""
    # Python starts this process of its own together with the first one, and then unblocks SIGINT.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _variables(added: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of this process for the length of the block."""
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _load(what: str) -> None:
    """Calls a function by its name; what it raises is only told, for workers will meet it too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    module, _, function = what.partition(":")
    gc.disable()  # imports make no garbage
    with _ending_with_caller():
        try:
            getattr(importlib.import_module(module), function)()
        except Exception:
            traceback.print_exc()
    gc.freeze()  # pages that nobody writes to are shared
    gc.enable()
    atexit.register(os._exit, 0)  # to take all of it apart would take a second; forks have no part


@contextmanager
def _ending_with_caller() -> Iterator[None]:
    """Ends this process at once if its caller does in a `with` block: a refusal waits for nothing.

    Later the server itself finds out.
    """
    caller, over = os.getppid(), threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_S):
            if os.getppid() != caller:
                os._exit(0)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()  # one thread alone may be there at a fork


if _what := os.environ.pop(_WHAT, ""):  # in the server alone
    _load(_what)
