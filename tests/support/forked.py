"""Processes that start in milliseconds: forks of a server that has imported what they need.

A process that imports torch, DeepSpeed and MLflow works for five seconds before its first line. The
server does it once; what a fork gets of its caller (variables, folder, output) is what a process
started by itself would get. One thing differs: all forks have the server's seed of string hashes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

forked = multiprocessing.get_context("forkserver")
"""Of the server; it starts with the first process."""
# The second of them lets streaming, the third one, load.
PRELOADED = (
    "tests.support.cpu_rank",
    *("tests.support.shard_reader", "streaming", "boto3"),
    *("tests.support.engine_worker", "trainer.training.worker", "deepspeed", "torch._dynamo"),
    *("deepspeed.runtime.engine", "deepspeed.compile.inductor", "nvidia.dali.fn"),
    *(
        "mlflow.store.tracking.sqlalchemy_store",
        "sqlalchemy.dialects.sqlite",
        "alembic.command",
    ),
)
forked.set_forkserver_preload([*PRELOADED])


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[None]:
    """Have the ranks of the backend "local" start as forks: for tests of what they do then."""
    with ranks_by_fork():
        yield


@contextmanager
def ranks_by_fork() -> Iterator[None]:
    """Do so for the length of a `with` block."""
    with pytest.MonkeyPatch.context() as patch:
        context = SimpleNamespace(Pipe=forked.Pipe, Process=_process)
        start_methods = SimpleNamespace(get_context=lambda method: context)
        patch.setattr("cluster.local.multiprocessing", start_methods)
        patch.setattr("cluster.warm_start.start", lambda *_, **__: None)  # this one has started
        yield


def _process(*, target: Callable[..., None], kwargs: Mapping[str, Any], name: str) -> BaseProcess:
    output = [_Descriptor(1), _Descriptor(2)]
    return forked.Process(target=_begin, args=(dict(os.environ), output, target, kwargs), name=name)


def _begin(
    environment: Mapping[str, str],
    output: list[_Descriptor],
    target: Callable[..., None],
    kwargs: Mapping[str, Any],
) -> None:
    for descriptor in output:
        descriptor.take()
    os.environ.clear()
    os.environ.update(environment)
    # As it is in processes that `cluster.local` starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Forks that draw from numpy's global generator shall not draw the same.
    np.random.seed()
    target(**kwargs)


class _Descriptor:
    """An open file of the caller that becomes the one of that number in the process."""

    def __init__(self, number: int, copy: Any = None) -> None:
        self._number = number
        self._copy = copy

    def __reduce__(self) -> tuple[type[_Descriptor], tuple[int, Any]]:
        return _Descriptor, (self._number, DupFd(self._number))

    def take(self) -> None:
        os.dup2(self._copy.detach(), self._number)
