"""Workers by Ray Train: placed on one or many nodes, and started again when one of them is lost.

Ray Train's controller starts the workers and watches them (`cluster.ray_controller`). After a
failure it asks the driver, which decides (`cluster.ray_monitor`, `cluster.recovery`), and starts
all of them again. Messages and requests go through an actor of our own (`cluster.ray_mailbox`);
Ray Train's checkpoints are not used.

`ray job stop` sends the driver SIGTERM and, three seconds later, SIGKILL, whereupon Ray ends the
workers. A last step that takes longer needs `RAY_JOB_STOP_WAIT_TIME_S` in the environment of `ray
start` on the head node. What listens where is told in `cluster.ray_session`.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import ray
import ray.train

from cluster.assignment import (
    WorkerGroupSpec,
    assign_nodes,
    gpus_per_worker,
    oversubscription_warning,
    require_room,
)
from cluster.contract import (
    Beside,
    Caller,
    ClusterConfig,
    ClusterTooSmall,
    Outcome,
    Payload,
    Worker,
    has_spares,
)
from cluster.node_check import NodeCheck, check_this_machine
from cluster.ray_beside import RayBeside
from cluster.ray_controller import Trainer, require_wanted
from cluster.ray_gate import NodeGate
from cluster.ray_leaving import LeaveWatch
from cluster.ray_mailbox import Mailbox, open_mailbox
from cluster.ray_monitor import RunMonitor
from cluster.ray_nodes import NodePinning, empty_selectors, free_nodes
from cluster.ray_output import OutputLog
from cluster.ray_room import describe_room
from cluster.ray_session import Session, session
from cluster.ray_spares import SpareKeeper, spare_environment
from cluster.ray_wait import Wait, with_time
from cluster.ray_worker import RendezvousConfig, work

_TICK_S = 0.1
"""How often the driver looks for room and a stop request."""
_CLOSE_S = 20.0
"""What Ray Train's thread gets to end once it is given up."""

_log = logging.getLogger(__name__)


def run(
    config: ClusterConfig,
    worker: Worker,
    payload: Payload,
    caller: Caller,
    *,
    group_sizes: Mapping[int, int],
    check: NodeCheck | None = None,
    warm_up: Callable[[], None] | None = None,
) -> Outcome:
    """Runs the worker on Ray Train workers; see `cluster.launcher.run`.

    Args:
        config: Where.
        worker: The worker.
        payload: For each of them.
        caller: Who started the run.
        group_sizes: With how many of them it can run, and how many share a node then.
        check: What to look for on each node.
        warm_up: What spare processes do ahead.
    """
    with (
        session(config, caller.report) as connected,
        _environment(config, connected),
        contextlib.ExitStack() as at_last,
    ):
        gpus = gpus_per_worker(config, connected.nodes)
        require_room(config, connected.nodes, workers=min(group_sizes), gpus=gpus)
        if (
            connected.private
            and gpus == 0
            and (word := oversubscription_warning(config, cores=os.cpu_count() or 1))
        ):
            caller.report(word)
        sizes = [
            WorkerGroupSpec(
                workers=workers, group_size=group_size, cpus=config.cpus_per_worker, gpus=gpus
            )
            for workers, group_size in sorted(group_sizes.items())
        ]
        # Only to refuse groups that even the idle cluster could not hold: each start assigns anew.
        assign_nodes(sizes[0], connected.nodes)
        mailbox = open_mailbox(config)
        gate = _open_gate(config, check, sizes, connected, mailbox=mailbox, caller=caller)
        if not _wait_for_room(config, sizes[0], caller, gate):
            return Outcome(status="stopped")
        beside = RayBeside(config, gpus_per_worker=gpus)
        loop = _loop(worker, payload, mailbox, gpu=gpus > 0, beside=beside)
        fit = TrainThread(_trainer(config, sizes, loop, mailbox, connected, warm_up=warm_up))
        at_last.callback(fit.close)
        fit.start()
        number = " to ".join(map(str, sorted({sizes[0].workers, sizes[-1].workers})))
        caller.report(f"workers: waiting for {number} of them to load and to meet")
        here = ray.get_runtime_context().get_node_id()
        # Nobody takes a private cluster's only node away and leaves this process.
        watch = None if connected.private else _leave_watch(config, sizes, gate, home=here)
        output = OutputLog(caller.listener.take, here=here, names_nodes=not connected.private)
        return RunMonitor(config, mailbox, fit, caller, watch=watch, output=output, gate=gate).run()


def _open_gate(
    config: ClusterConfig,
    check: NodeCheck | None,
    sizes: Sequence[WorkerGroupSpec],
    connected: Session,
    *,
    mailbox: Mailbox,
    caller: Caller,
) -> NodeGate | None:
    """Looks at the nodes, unless a stop is asked for meanwhile."""
    if check is None or config.preflight_s == 0:
        return None
    if connected.private:
        gpus = sizes[0].gpus * config.workers
        check_this_machine(check, workers=config.workers, gpus=gpus, report=caller.report)
        return None
    gate = NodeGate(check, sizes, mailbox, patience_s=config.preflight_s, report=caller.report)
    gate.open(connected.nodes, caller.stop)
    return gate


def _leave_watch(
    config: ClusterConfig, sizes: Sequence[WorkerGroupSpec], gate: NodeGate | None, *, home: str
) -> LeaveWatch:
    if gate is None:
        return LeaveWatch(sizes, home=home, grow=config.grow)
    return LeaveWatch(sizes, home=home, grow=config.grow, is_fit=gate.is_fit)


def _loop(
    worker: Worker, payload: Payload, mailbox: Mailbox, *, gpu: bool, beside: Beside
) -> Callable[[], None]:
    # A closure and not Ray Train's train_loop_config: the controller would unpickle that, and
    # import the worker's module with all that it needs.
    def loop() -> None:
        work(worker, payload, mailbox, gpu=gpu, beside=beside)

    return loop


def _trainer(
    config: ClusterConfig,
    sizes: Sequence[WorkerGroupSpec],
    loop: Callable[[], None],
    mailbox: Mailbox,
    connected: Session,
    *,
    warm_up: Callable[[], None] | None,
) -> Trainer:
    per_worker: dict[str, float] = {"CPU": config.cpus_per_worker}
    if sizes[0].gpus:
        per_worker["GPU"] = sizes[0].gpus
    # Workers of which each may be anywhere are left to Ray.
    pinned = any(spec.group_size > 1 for spec in sizes)
    callbacks: list[NodePinning | SpareKeeper] = []
    abandoned = threading.Event()
    if pinned:
        callbacks.append(
            NodePinning(
                *sizes,
                timeout_s=config.start_timeout_s,
                report=mailbox.report_line,
                meanwhile=partial(require_wanted, abandoned),
            )
        )
    environment = None
    if warm_up is not None and has_spares(config, private=connected.private):
        gpu, threads = sizes[0].gpus > 0, config.cpus_per_worker
        environment = spare_environment(warm_up, gpu=gpu, threads=threads)
        callbacks.append(SpareKeeper(sizes[-1], mailbox.report_line))
    return Trainer(
        loop,
        backend_config=RendezvousConfig(
            gpu=sizes[0].gpus > 0,
            threads=config.cpus_per_worker,
            timeout_s=config.start_timeout_s,
            scratch=str(connected.scratch) if connected.private else None,
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.workers,
            use_gpu=sizes[0].gpus > 0,
            resources_per_worker=per_worker,
            label_selector=empty_selectors(config.workers) if pinned else None,
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(connected.scratch),
            worker_runtime_env=environment,
        ),
        sizes=sizes,
        patience_s=config.shrink_after_s,
        may_grow=not connected.private,
        mailbox=mailbox,
        abandoned=abandoned,
        callbacks=callbacks,
    )


def _wait_for_room(
    config: ClusterConfig, spec: WorkerGroupSpec, caller: Caller, gate: NodeGate | None
) -> bool:
    """Waits until what the workers need is free; False if a stop was asked meanwhile."""
    limit = f"{config.start_timeout_s:g} s (cluster.start_timeout_s)"
    deadline = time.monotonic() + config.start_timeout_s
    wait = Wait(lambda text: caller.report(with_time(f"{text}, up to {limit}")))
    while not caller.stop.is_set():
        if gate is not None:
            gate.look()
        nodes = tuple(node for node in free_nodes() if gate is None or gate.is_fit(node.id))
        if spec.groups_that_fit(*nodes) >= spec.groups:
            return True
        lacking = describe_room(spec, nodes)
        if gate is not None and gate.left_out:
            lacking += f"; {gate.left_out} more unfit"
        if time.monotonic() > deadline:
            raise ClusterTooSmall(
                f"The workers found no room within {limit}: {lacking}. Wait for other jobs, look "
                "at nodes that do not answer, ask for less (cluster.workers, "
                "cluster.cpus_per_worker), or raise cluster.start_timeout_s."
            )
        wait.note(lacking)
        wait.look()
        time.sleep(_TICK_S)
    return False


@contextlib.contextmanager
def _environment(config: ClusterConfig, connected: Session) -> Iterator[None]:
    """Ray Train's settings, which it takes from the driver's environment; the user's own stay."""
    settings = {
        # Each look is a call to every worker, on whose cores it is answered.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": f"{max(1.0, config.workers / 500):g}",
        # A worker process that stands still this long counts as dead (Ray's default is 600).
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": f"{config.start_timeout_s:g}",
        # It would write each line that is printed twice: once as printed, and once as logged.
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        # It would take the driver's own log over, and print its lines there.
        "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
        # Workers stay in the directory of the code.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # The driver watches for nodes that are taken away, and has all workers leave.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    if connected.private:
        # Nobody collects metrics of a private cluster, and they cost a process.
        settings |= {"RAY_TRAIN_METRICS_ENABLED": "0"}
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

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        """The thread's work."""
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error

    def close(self) -> None:
        """End Ray Train if it is still at work.

        No thread may be left waiting when the connection is closed: Ray aborts the whole process if
        another one is opened then.
        """
        if not self.is_alive():
            return
        deadline = time.monotonic() + _CLOSE_S

        def abandon() -> None:
            # Again and again: the workers may just be about to be asked for.
            while self.is_alive() and time.monotonic() < deadline:
                with contextlib.suppress(Exception):  # what ended the run is told, and not this
                    self._trainer.abandon()
                self.join(_TICK_S)

        # A thread of its own, for Ray that is away lets each call wait.
        threading.Thread(target=abandon, name="abandon", daemon=True).start()
        self.join(_CLOSE_S)
