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

import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from cluster.assignment import (
    WorkerGroupSpec,
    assign_nodes,
    format_resources,
    gpus_per_worker,
    oversubscription_warning,
    require_room,
)
from cluster.contract import (
    Caller,
    ClusterConfig,
    ClusterTooSmall,
    ClusterUnavailable,
    Outcome,
    Payload,
    Worker,
)
from cluster.failure import Failure, WorkerFailed, root_cause
from cluster.ray_mailbox import Finished, Mailbox, Note, Started, open_mailbox
from cluster.ray_nodes import NodePinning, empty_selectors, free_nodes
from cluster.ray_session import Session, session
from cluster.ray_worker import RendezvousConfig, work

_TICK_S = 0.1
"""How often the driver looks for events and a stop request."""
_TIDY_UP_S = 30.0
"""What Ray Train gets to end by itself once the workers have: on a busy machine more than seconds.
Ray may abort a process of which a thread still calls it when its cluster is gone."""
_CLOSE_S = 5.0
"""What Ray Train's thread gets to end after the connection was closed under it."""

_log = logging.getLogger(__name__)


def run(
    config: ClusterConfig,
    worker: Worker,
    payload: Payload,
    caller: Caller,
    *,
    group_size: int,
) -> Outcome:
    """Runs the worker on `config.workers` Ray Train workers; see `cluster.launcher.run`."""
    with (
        contextlib.ExitStack() as at_last,
        session(config, caller.report) as connected,
        _environment(config, connected),
    ):
        gpus = gpus_per_worker(config, connected.nodes)
        require_room(config, connected.nodes, gpus=gpus)
        if (
            connected.private
            and gpus == 0
            and (word := oversubscription_warning(config, cores=os.cpu_count() or 1))
        ):
            caller.report(word)
        spec = WorkerGroupSpec(
            workers=config.workers,
            group_size=group_size,
            cpus=config.cpus_per_worker,
            gpus=gpus,
        )
        # Only to refuse groups that even the idle cluster could not hold: each start assigns anew.
        assign_nodes(spec, connected.nodes)
        if not _wait_for_room(config, spec, caller):
            return Outcome(status="stopped")
        mailbox = open_mailbox(config)
        loop = _loop(worker, payload, mailbox, gpu=gpus > 0)
        fit = TrainThread(_trainer(config, spec, loop, mailbox, connected))
        fit.start()
        caller.report(f"workers: waiting for {config.workers} of them to load and to meet")
        # If Ray Train is not done in the block, its thread ends once the connection is closed.
        at_last.callback(fit.join, _CLOSE_S)
        return RunMonitor(config, mailbox, fit, caller).run()


def _loop(worker: Worker, payload: Payload, mailbox: Mailbox, *, gpu: bool) -> Callable[[], None]:
    # A closure and not Ray Train's train_loop_config: the controller would unpickle that, and
    # import the worker's module with all that it needs.
    def loop() -> None:
        work(worker, payload, mailbox, gpu=gpu)

    return loop


def _trainer(
    config: ClusterConfig,
    spec: WorkerGroupSpec,
    loop: Callable[[], None],
    mailbox: Mailbox,
    connected: Session,
) -> DataParallelTrainer:
    per_worker: dict[str, float] = {"CPU": config.cpus_per_worker}
    if spec.gpus:
        per_worker["GPU"] = spec.gpus
    # Workers of which each may be anywhere are left to Ray.
    pinned = spec.group_size > 1
    pinning = NodePinning(spec, timeout_s=config.start_timeout_s, report=mailbox.report_line)
    return DataParallelTrainer(
        loop,
        backend_config=RendezvousConfig(
            gpu=spec.gpus > 0,
            threads=config.cpus_per_worker,
            timeout_s=config.start_timeout_s,
            scratch=str(connected.scratch) if connected.private else None,
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=spec.gpus > 0,
            resources_per_worker=per_worker,
            label_selector=empty_selectors(config.workers) if pinned else None,
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(connected.scratch),
            failure_config=ray.train.FailureConfig(
                max_failures=config.max_failures, controller_failure_limit=config.max_failures
            ),
            callbacks=[pinning] if pinned else None,
        ),
    )


def _wait_for_room(config: ClusterConfig, spec: WorkerGroupSpec, caller: Caller) -> bool:
    """Waits until what the workers need is free; False if a stop was asked meanwhile."""
    cpus, gpus = spec.workers * spec.cpus, spec.workers * spec.gpus
    deadline = time.monotonic() + config.start_timeout_s
    last = ""
    while not caller.stop.is_set():
        free = ray.available_resources()
        enough = free.get("CPU", 0) >= cpus and free.get("GPU", 0) >= gpus
        now = f"{format_resources(free.get('CPU', 0), free.get('GPU', 0))} are free"
        if spec.group_size > 1:
            groups = spec.groups_that_fit(*free_nodes())
            enough = groups >= spec.groups
            now += f", in which {groups} of {spec.groups} groups that share a node fit"
        if enough:
            return True
        if time.monotonic() > deadline:
            raise ClusterTooSmall(
                f"The workers need {format_resources(cpus, gpus)}, and after "
                f"{config.start_timeout_s:g} s only {now}: other jobs hold the rest of "
                "the cluster. Wait for them, ask for less (cluster.workers, "
                "cluster.cpus_per_worker), or raise cluster.start_timeout_s."
            )
        if now != last:
            caller.report(
                f"waiting up to {config.start_timeout_s:g} s (cluster.start_timeout_s) for "
                f"{format_resources(cpus, gpus)}: {now}, other jobs hold the rest of the cluster"
            )
            last = now
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
        caller: Who started the run.
    """

    def __init__(
        self,
        config: ClusterConfig,
        mailbox: Mailbox,
        fit: TrainThread,
        caller: Caller,
    ) -> None:
        self._config = config
        self._mailbox = mailbox
        self._fit = fit
        self._caller = caller
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
                if self._caller.stop.is_set() and not stopped:
                    stopped = True
                    self._mailbox.ask_to_stop()
                self._handle_events()
                if stopped and self._attempt < 0:
                    return Outcome(status="stopped")
                time.sleep(_TICK_S)
            self._handle_events()
        except ray.exceptions.RayError as error:
            raise ClusterUnavailable(
                f"The run lost Ray, or Ray could not load it: {_last_line(error)}\nWhere a module "
                "is missing, the workers do not find this process's code: start it in the "
                "directory of the code, or by `ray job submit --working-dir .`."
            ) from error
        if len(self._ended) == self._config.workers:
            # All returned: what Ray Train still has to tidy up cannot fail the run any more.
            self._fit.join(_TIDY_UP_S)
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
                    self._caller.report(text)
                case Finished(attempt, rank):
                    if attempt == self._attempt:
                        self._ended.add(rank)
                case Failure(kind="refused"):
                    raise event.error()
                case Failure():
                    self._failures.append(event)
                    _log.warning("Worker %d failed: %s", event.rank, event.text)
                case _:
                    self._caller.on_message(event)

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
