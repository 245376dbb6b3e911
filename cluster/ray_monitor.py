"""The driver's side of a run on Ray: waits for the workers and makes sense of how they ended."""

import logging
import threading
import time
from collections.abc import Callable

import ray
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from cluster.contract import ClusterConfig, ClusterUnavailable, Message, Outcome
from cluster.failure import Failure, WorkerFailed, root_cause
from cluster.ray_mailbox import Finished, Mailbox, Note, Started

TICK_S = 0.1
"""How often the driver looks for events and a stop request."""
TIDY_UP_S = 30.0
"""What Ray Train gets to end by itself once the workers have: on a busy machine more than seconds.
Ray may abort a process of which a thread still calls it when its cluster is gone."""
CLOSE_S = 5.0
"""What Ray Train's thread gets to end after the connection was closed under it."""

_log = logging.getLogger(__name__)


class TrainThread(threading.Thread):
    """Runs Ray Train, whose call blocks, beside the thread that gets the signals.

    Attributes:
        error: What it ended with; None while it runs, and if it went well.
    """

    def __init__(self, trainer: DataParallelTrainer) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        """The thread's work."""
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error


class RunMonitor:
    """Passes events and the stop on until the workers are done.

    Args:
        config: The run's.
        mailbox: What lies between the driver and the workers.
        fit: Ray Train, started.
        on_message: The caller's.
        stop: The caller's.
        report: The caller's.
    """

    def __init__(
        self,
        config: ClusterConfig,
        mailbox: Mailbox,
        fit: TrainThread,
        *,
        on_message: Callable[[Message], None],
        stop: threading.Event,
        report: Callable[[str], None],
    ) -> None:
        self._config = config
        self._mailbox = mailbox
        self._fit = fit
        self._on_message = on_message
        self._stop = stop
        self._report = report
        self._attempt = -1
        self._ended: set[int] = set()
        self._failures: list[Failure] = []

    def run(self) -> Outcome:
        """Waits for the workers.

        Returns:
            How the run ended.

        Raises:
            WorkerRefused: A worker raised a ValueError.
            WorkerFailed: Ray Train gave up.
            ClusterUnavailable: Ray was lost.
        """
        stopped = False
        try:
            while self._fit.is_alive() and len(self._ended) < self._config.workers:
                # Not stop.wait(): the event may be set by a signal handler that interrupts this
                # very thread, and would then wait for the lock that wait() holds.
                if self._stop.is_set() and not stopped:
                    stopped = True
                    self._mailbox.ask_to_stop()
                self._handle_events()
                if stopped and self._attempt < 0:
                    return Outcome(status="stopped")
                time.sleep(TICK_S)
            self._handle_events()
        except ray.exceptions.RayError as error:
            raise ClusterUnavailable(
                f"The run lost Ray, or Ray could not load it: {_last_line(error)}\nWhere a module "
                "is missing, the workers do not find this process's code: start it in the "
                "directory of the code, or by `ray job submit --working-dir .`."
            ) from error
        if len(self._ended) == self._config.workers:
            # All returned: what Ray Train still has to tidy up cannot fail the run any more.
            self._fit.join(TIDY_UP_S)
        elif self._fit.error is not None:
            raise self._error(self._fit.error)
        return Outcome(status="stopped" if stopped else "finished", restarts=max(self._attempt, 0))

    def _handle_events(self) -> None:
        for event in self._mailbox.fetch():
            match event:
                case Started(attempt):
                    self._attempt, self._ended = attempt, set()
                    if attempt > 0:
                        _log.warning(
                            "The workers were started again (%d of at most %d restarts).",
                            attempt,
                            self._config.max_failures,
                        )
                case Note(text):
                    self._report(text)
                case Finished(attempt, rank):
                    if attempt == self._attempt:
                        self._ended.add(rank)
                case Failure(kind="refused"):
                    raise event.error()
                case Failure():
                    self._failures.append(event)
                    _log.warning("Worker %d failed: %s", event.rank, event.text)
                case _:
                    self._on_message(event)

    def _error(self, error: BaseException) -> Exception:
        """What to raise for the error that Ray Train ended with."""
        failures = [failure for failure in self._failures if failure.attempt == self._attempt]
        if isinstance(error, WorkerGroupError):
            reported = {failure.rank for failure in failures}
            failures += [
                _unreported_failure(rank, self._attempt, cause)
                for rank, cause in error.worker_failures.items()
                if rank not in reported
            ]
            if failures:
                return root_cause(failures).error()
        if isinstance(error, TrainingFailedError):
            return WorkerFailed(f"The workers could not be run: {error}")
        return ClusterUnavailable(f"Ray failed: {error}")


def _unreported_failure(rank: int, attempt: int, error: BaseException) -> Failure:
    """The failure of a worker that could not tell it itself."""
    cause = getattr(error, "health_check_failure", error)
    if isinstance(cause, ray.exceptions.RayActorError):
        text = "was lost with its process or its node (killed by hand, or because memory ran out)"
        return Failure(rank=rank, attempt=attempt, kind="died", text=f"{text}: {_line(cause)}")
    return Failure(
        rank=rank, attempt=attempt, kind="raised", text=f"{type(cause).__name__}: {_line(cause)}"
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
