"""Workers by Ray Train: placed on one or many nodes, and started again when one of them is lost.

The driver only waits: Ray Train's controller starts the workers, watches them and restarts the
whole group after a failure, up to `ClusterConfig.max_failures` times. Messages and the stop request
go through an actor of our own (`cluster.ray_mailbox`); Ray Train's checkpoints are not used.

`ray job stop` sends the driver SIGTERM and, three seconds later, SIGKILL, whereupon Ray ends the
workers. A last step that takes longer needs `RAY_JOB_STOP_WAIT_TIME_S` in the environment of `ray
start` on the head node. What listens where is told in `cluster.ray_session`.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from cluster.capacity import gpus_per_worker, require_room, resources
from cluster.contract import (
    ClusterConfig,
    ClusterTooSmall,
    ClusterUnavailable,
    Message,
    Outcome,
    Payload,
    Worker,
    WorkerContext,
)
from cluster.failure import Failure, WorkerFailed, attend, root_cause
from cluster.ray_mailbox import Begun, Ended, open_mailbox
from cluster.ray_rendezvous import RendezvousConfig, device
from cluster.ray_session import Session, session

_TICK_S = 0.1
"""How often the driver looks for news and a stop request."""
_HEAR_S = 0.15
"""How often each worker asks for it."""
_TIDY_UP_S = 5.0
"""What Ray Train gets to end by itself after the workers returned."""

_log = logging.getLogger(__name__)


def run(
    config: ClusterConfig,
    worker: Worker,
    payload: Payload,
    *,
    on_message: Callable[[Message], None],
    stop: threading.Event,
) -> Outcome:
    """Runs the worker on `config.workers` Ray Train workers; see `cluster.launcher.run`."""
    with session(config) as connected, _environment(config, connected):
        gpus = gpus_per_worker(config, connected.nodes)
        require_room(config, connected.nodes, gpus=gpus)
        if not _wait_for_room(config, gpus, stop):
            return Outcome(status="stopped")
        mailbox = open_mailbox()
        fit = _Fit(
            _trainer(config, worker, payload, mailbox=mailbox, gpus=gpus, scratch=connected.scratch)
        )
        fit.start()
        return _Watch(config, mailbox, fit, on_message=on_message, stop=stop).run()


def _trainer(
    config: ClusterConfig,
    worker: Worker,
    payload: Payload,
    *,
    mailbox: Any,
    gpus: int,
    scratch: Path,
) -> DataParallelTrainer:
    # A closure and not train_loop_config: the controller would unpickle that, and import the
    # worker's module with all that it needs.
    def loop() -> None:
        _work(worker, payload, mailbox, gpu=gpus > 0)

    per_worker: dict[str, float] = {"CPU": config.cpus_per_worker}
    if gpus:
        per_worker["GPU"] = gpus
    return DataParallelTrainer(
        loop,
        backend_config=RendezvousConfig(
            gpu=gpus > 0, threads=config.cpus_per_worker, timeout_s=config.start_timeout_s
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers, use_gpu=gpus > 0, resources_per_worker=per_worker
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(scratch),
            failure_config=ray.train.FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=config.max_failures
            ),
        ),
    )


class _Fit(threading.Thread):
    """Runs Ray Train, whose call blocks, beside the thread that gets the signals."""

    def __init__(self, trainer: DataParallelTrainer) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error


class _Watch:
    """The driver's side of a run: passes news and the stop on until the workers are done."""

    def __init__(
        self,
        config: ClusterConfig,
        mailbox: Any,
        fit: _Fit,
        *,
        on_message: Callable[[Message], None],
        stop: threading.Event,
    ) -> None:
        self._config = config
        self._mailbox = mailbox
        self._fit = fit
        self._on_message = on_message
        self._stop = stop
        self._attempt = -1
        self._ended: set[int] = set()
        self._failures: list[Failure] = []

    def run(self) -> Outcome:
        stopped = False
        try:
            while self._fit.is_alive() and len(self._ended) < self._config.workers:
                # Not stop.wait(): the event may be set by a signal handler that interrupts this
                # very thread, and would then wait for the lock that wait() holds.
                if self._stop.is_set() and not stopped:
                    stopped = True
                    ray.get(self._mailbox.ask_to_stop.remote())
                self._take_news()
                if stopped and self._attempt < 0:
                    return Outcome(status="stopped")
                time.sleep(_TICK_S)
            self._take_news()
        except ray.exceptions.RayError as error:
            raise ClusterUnavailable(f"The connection to Ray was lost: {error}") from error
        if len(self._ended) == self._config.workers:
            # All returned, so that whatever Ray Train still has to tidy up is no matter of the
            # run's.
            self._fit.join(_TIDY_UP_S)
        elif self._fit.error is not None:
            raise self._error(self._fit.error)
        return Outcome(status="stopped" if stopped else "finished", restarts=self._attempt)

    def _take_news(self) -> None:
        for news in ray.get(self._mailbox.fetch.remote()):
            match news:
                case Begun(attempt):
                    self._attempt, self._ended = attempt, set()
                    if attempt > 0:
                        _log.warning(
                            "The workers were started again (%d of at most %d restarts).",
                            attempt,
                            self._config.max_failures,
                        )
                case Ended(attempt, rank):
                    if attempt == self._attempt:
                        self._ended.add(rank)
                case Failure(kind="refused"):
                    raise news.error()
                case Failure():
                    self._failures.append(news)
                    _log.warning("Worker %d failed: %s", news.rank, news.text)
                case _:
                    self._on_message(news)

    def _error(self, error: BaseException) -> Exception:
        """What to raise for the error that Ray Train ended with."""
        failures = [failure for failure in self._failures if failure.attempt == self._attempt]
        if isinstance(error, WorkerGroupError):
            told = {failure.rank for failure in failures}
            failures += [
                _untold(rank, self._attempt, cause)
                for rank, cause in error.worker_failures.items()
                if rank not in told
            ]
            if failures:
                return root_cause(failures).error()
        if isinstance(error, TrainingFailedError):
            return WorkerFailed(f"The workers could not be run: {error}")
        return ClusterUnavailable(f"Ray failed: {error}")


def _untold(rank: int, attempt: int, error: BaseException) -> Failure:
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


def _wait_for_room(config: ClusterConfig, gpus: int, stop: threading.Event) -> bool:
    """Waits until what the workers need is free; False if a stop was asked meanwhile."""
    cpus, gpus = config.workers * config.cpus_per_worker, config.workers * gpus
    deadline = time.monotonic() + config.start_timeout_s
    waiting = False
    while not stop.is_set():
        free = ray.available_resources()
        if free.get("CPU", 0) >= cpus and free.get("GPU", 0) >= gpus:
            return True
        now = f"{resources(free.get('CPU', 0), free.get('GPU', 0))} are free"
        if time.monotonic() > deadline:
            raise ClusterTooSmall(
                f"The workers need {resources(cpus, gpus)}, and after {config.start_timeout_s:g} s "
                f"only {now}: other jobs hold the rest of the cluster. Wait for them, ask for less "
                "(cluster.workers, cluster.cpus_per_worker), or raise cluster.start_timeout_s."
            )
        if not waiting:
            _log.info("Waiting for %s; %s.", resources(cpus, gpus), now)
            waiting = True
        time.sleep(_TICK_S)
    return False


@contextlib.contextmanager
def _environment(config: ClusterConfig, connected: Session) -> Iterator[None]:
    """Ray Train's settings, which it takes from the driver's environment; the user's own stay."""
    settings = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        # A worker process that stands still this long counts as dead (Ray's default is 600).
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{config.start_timeout_s:g}",
        # Workers stay in the directory of the code.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    if connected.private:
        # Nobody collects metrics of a private cluster or preempts its one node; each costs a
        # process.
        settings |= {"RAY_TRAIN_METRICS_ENABLED": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _work(worker: Worker, payload: Payload, mailbox: Any, *, gpu: bool) -> None:
    """A worker's side of a run."""
    place = ray.train.get_context()
    rank = place.get_world_rank()
    attempt = ray.train.collective.broadcast_from_rank_zero(
        ray.get(mailbox.begin.remote()) if rank == 0 else None
    )
    stop = threading.Event()
    threading.Thread(target=_hear, args=(mailbox, stop), name="hear", daemon=True).start()
    context = WorkerContext(
        rank=rank,
        world_size=place.get_world_size(),
        local_rank=place.get_local_rank(),
        local_world_size=place.get_local_world_size(),
        attempt=attempt,
        device=device(gpu=gpu),
        stop_requested=stop.is_set,
        tell=mailbox.put.remote,
    )
    failure = attend(worker, context, payload)
    # The answer comes after all messages before it, and with it this process may end.
    ray.get(mailbox.put.remote(failure or Ended(attempt, rank)))
    # A refusal is the driver's to raise: here it would be retried.
    if failure is not None and failure.kind != "refused":
        raise RuntimeError(failure.text)


def _hear(mailbox: Any, stop: threading.Event) -> None:
    """Sets `stop` soon after the driver asked for it."""
    while not ray.get(mailbox.stop_asked.remote()):
        time.sleep(_HEAR_S)
    stop.set()
