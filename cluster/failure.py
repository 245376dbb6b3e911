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
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|tcpstore|"
    r"runtimeerror: wait timeout|wait timeout after|"
    r"dist(backend|network|store)error",
    re.IGNORECASE,
)
"""What an exception says whose only cause is that another worker is gone."""


STOOD_STILL = 75
"""Of a worker that ended itself: EX_TEMPFAIL, as a try again may help."""
_EXITS = {STOOD_STILL: "stood still, or was out of its driver's reach, and ended itself"}
_SIGNALS: dict[int, str] = {
    signal.SIGKILL: "by hand, or by the kernel because memory ran out",
    signal.SIGTERM: "by hand, or because its node is shut down",
}


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
        images: After how many images of the run, if the worker could tell.
    """

    rank: int
    attempt: int
    kind: Literal["died", "refused", "raised"]
    text: str
    traceback_tail: str = ""
    images: int | None = None

    def error(self, *, hint: str = "") -> WorkerFailed:
        """The exception to raise for this failure in the caller's process.

        Args:
            hint: Where to look, unless the worker refused.
        """
        if self.kind == "refused":
            return WorkerRefused(self.text, traceback_tail=self.traceback_tail)
        message = f"Worker {self.rank} {'failed with ' if self.kind == 'raised' else ''}{self.text}"
        message += f" {hint}" if hint else ""
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
    how = "ended, and left no exit code" if exit_code is None else describe_exit(exit_code)
    return Failure(rank=rank, attempt=attempt, kind="died", text=f"{how}.")


def describe_exit(code: int) -> str:
    """What a process's exit code says, as a clause without its subject.

    Args:
        code: Negative, or 128 more, for a signal's number.
    """
    number = -code if code < 0 else code - 128
    if not 0 < number < signal.NSIG:
        return f"{_EXITS.get(code, 'ended')} with exit code {code}"
    told = f"was ended by {_signal_name(number)}"
    told += f" (exit code {code})" if code > 0 else ""
    why = _SIGNALS.get(number)
    return f"{told}: {why}" if why else told


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between SIGRTMIN and SIGRTMAX
        return f"signal {number}"


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The failure to report out of those of one attempt, given in the order of their arrival."""
    return root_causes(failures)[0]


def root_causes(failures: Sequence[Failure]) -> list[Failure]:
    """The failures of one attempt that no other of them explains, in the order given.

    When a worker goes, its peers fail in their collectives moments later or sooner: a refusal or a
    death explains them, and an exception that does not speak of a lost peer explains one that does.
    """

    def weight(failure: Failure) -> int:
        if failure.kind != "raised":
            return 0 if failure.kind == "refused" else 1
        return 3 if is_of_lost_peer(failure) else 2

    least = min(map(weight, failures))
    return [failure for failure in failures if weight(failure) == least]


def is_of_lost_peer(failure: Failure) -> bool:
    """Whether another worker's end explains a failure, as far as its words tell."""
    return failure.kind == "raised" and _LOST_PEER.search(failure.text) is not None
