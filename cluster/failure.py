"""Failures of workers: recorded where they happen, told apart where they are raised."""

import re
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.contract import Payload, Worker, WorkerContext
from cluster.process_group import leave

TRACEBACK_LINES = 25
"""How much of a worker's traceback is passed on."""

_LOST_PEER = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|tcpstore|dist(backend|network)error",
    re.IGNORECASE,
)
"""What an exception says whose only cause is that another worker is gone."""


class WorkerFailed(RuntimeError):
    """A worker died or raised, and the run cannot go on.

    Attributes:
        traceback_tail: The end of the worker's traceback; empty if its process died.
    """

    def __init__(self, message: str, *, traceback_tail: str = "") -> None:
        super().__init__(message)
        self.traceback_tail = traceback_tail


class WorkerRefused(WorkerFailed, ValueError):
    """A worker raised a ValueError: a mistake in what it was given, which no restart can cure."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One worker's failure, small enough to travel.

    Attributes:
        rank: The worker.
        attempt: The attempt it belonged to.
        kind: `died` (its process ended), `refused` (it raised a ValueError) or `raised`.
        text: The exception's message, headed by its type unless the worker refused.
        traceback_tail: The end of its traceback.
    """

    rank: int
    attempt: int
    kind: Literal["died", "refused", "raised"]
    text: str
    traceback_tail: str = ""

    def error(self) -> WorkerFailed:
        """The exception to raise for this failure in the caller's process."""
        if self.kind == "refused":
            return WorkerRefused(self.text, traceback_tail=self.traceback_tail)
        message = f"Worker {self.rank} {'failed with ' if self.kind == 'raised' else ''}{self.text}"
        if self.traceback_tail:
            message = f"{message}\n{self.traceback_tail}"
        return WorkerFailed(message, traceback_tail=self.traceback_tail)


def run_worker(worker: Worker, context: WorkerContext, payload: Payload) -> Failure | None:
    """Calls the worker and leaves the process group.

    Returns:
        None, or what went wrong: every exception ends here, so that no backend has to unpickle one.
    """
    try:
        worker(context, payload)
        leave()
    except BaseException as error:
        text = str(error) or type(error).__name__
        refused = isinstance(error, ValueError)
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
        return Failure(
            rank=context.rank,
            attempt=context.attempt,
            kind="refused" if refused else "raised",
            text=text if refused else f"{type(error).__name__}: {text}",
            traceback_tail="\n".join(lines[-TRACEBACK_LINES:]),
        )
    return None


def exit_failure(rank: int, attempt: int, exit_code: int | None) -> Failure:
    """The failure of a worker whose process ended; a negative code is a signal's number."""
    how = f"ended with exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        how = f"was ended by {_signal_name(-exit_code)}"
    if exit_code == -signal.SIGKILL:
        how += " (by hand, or by the kernel because memory ran out)"
    return Failure(rank=rank, attempt=attempt, kind="died", text=f"{how}.")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between SIGRTMIN and SIGRTMAX
        return f"signal {number}"


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The failure to report out of those of one attempt, given in the order of their arrival.

    When a worker goes, its peers fail in their collectives moments later or sooner: a refusal or a
    death explains them, and an exception that does not speak of a lost peer explains one that does.
    """

    def weight(failure: Failure) -> int:
        if failure.kind != "raised":
            return 0 if failure.kind == "refused" else 1
        return 3 if _LOST_PEER.search(failure.text) else 2

    return min(failures, key=weight)
