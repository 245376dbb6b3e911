"""Workers by Ray Train: placed on one or many nodes, and started again when one of them is lost.

The driver only waits: Ray Train's controller starts the workers, watches them and restarts the
whole group after a failure, up to `ClusterConfig.max_failures` times. Messages and the stop request
go through an actor of our own (`cluster.ray_mailbox`); Ray Train's checkpoints are not used.

`ray job stop` sends the driver SIGTERM and, three seconds later, SIGKILL, whereupon Ray ends the
workers. A last step that takes longer needs `RAY_JOB_STOP_WAIT_TIME_S` in the environment of `ray
start` on the head node. What listens where is told in `cluster.ray_session`.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from cluster.assignment import (
    WorkerGroupSpec,
    assign_nodes,
    format_resources,
    gpus_per_worker,
    oversubscription_warning,
    require_room,
)
from cluster.contract import ClusterConfig, ClusterTooSmall, Message, Outcome, Payload, Worker
from cluster.ray_mailbox import Mailbox, open_mailbox
from cluster.ray_monitor import CLOSE_S, TICK_S, RunMonitor, TrainThread
from cluster.ray_nodes import NodePinning, empty_selectors, free_nodes
from cluster.ray_session import Session, session
from cluster.ray_worker import RendezvousConfig, work


def run(
    config: ClusterConfig,
    worker: Worker,
    payload: Payload,
    *,
    on_message: Callable[[Message], None],
    stop: threading.Event,
    report: Callable[[str], None],
    group_size: int,
) -> Outcome:
    """Runs the worker on `config.workers` Ray Train workers; see `cluster.launcher.run`."""
    with (
        contextlib.ExitStack() as at_last,
        session(config, report) as connected,
        _environment(config, connected),
    ):
        gpus = gpus_per_worker(config, connected.nodes)
        require_room(config, connected.nodes, gpus=gpus)
        if (
            connected.private
            and gpus == 0
            and (word := oversubscription_warning(config, cores=os.cpu_count() or 1))
        ):
            report(word)
        spec = WorkerGroupSpec(
            workers=config.workers,
            group_size=group_size,
            cpus=config.cpus_per_worker,
            gpus=gpus,
        )
        # Only to refuse groups that even the idle cluster could not hold: each start assigns anew.
        assign_nodes(spec, connected.nodes)
        if not _wait_for_room(config, spec, stop, report):
            return Outcome(status="stopped")
        mailbox = open_mailbox(config)
        loop = _loop(worker, payload, mailbox, gpu=gpus > 0)
        fit = TrainThread(_trainer(config, spec, loop, mailbox, connected))
        fit.start()
        report(f"workers: waiting for {config.workers} of them to load and to meet")
        # If Ray Train is not done in the block, its thread ends once the connection is closed.
        at_last.callback(fit.join, CLOSE_S)
        return RunMonitor(
            config, mailbox, fit, on_message=on_message, stop=stop, report=report
        ).run()


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


def _wait_for_room(
    config: ClusterConfig,
    spec: WorkerGroupSpec,
    stop: threading.Event,
    report: Callable[[str], None],
) -> bool:
    """Waits until what the workers need is free; False if a stop was asked meanwhile."""
    cpus, gpus = spec.workers * spec.cpus, spec.workers * spec.gpus
    deadline = time.monotonic() + config.start_timeout_s
    last = ""
    while not stop.is_set():
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
            report(
                f"waiting up to {config.start_timeout_s:g} s (cluster.start_timeout_s) for "
                f"{format_resources(cpus, gpus)}: {now}, other jobs hold the rest of the cluster"
            )
            last = now
        time.sleep(TICK_S)
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
