"""Workers as plain processes of this machine, without Ray: for tests, debugging and notebooks.

A worker that dies or raises fails the run and its peers are ended: nothing is started again.
Everything listens on the loopback interface. A Ctrl-C in the terminal reaches the caller alone,
since the workers ignore SIGINT and SIGTERM; they end with their caller, however it ends. On the CPU
they are forks of a process that has imported what they need (`cluster.warm_start`).
"""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from cluster import warm_start
from cluster.assignment import oversubscription_warning
from cluster.contract import (
    Caller,
    ClusterConfig,
    ClusterTooSmall,
    Level,
    Line,
    Message,
    Outcome,
    Payload,
    Worker,
    WorkerContext,
)
from cluster.failure import Failure, exit_failure, root_cause, run_worker
from cluster.node_check import NodeCheck, check_this_machine
from cluster.process_group import RankInfo, Rendezvous, join, new_secret
from cluster.scratch import make_scratch

_TICK_S = 0.1
_PEER_GRACE_S = 1.0
"""How long the first failure waits for others, one of which may be its cause."""
_EXIT_GRACE_S = 10.0
"""How long a worker that returned may take to end its process."""


def prepare(config: ClusterConfig, warm_up: Callable[[], None]) -> None:
    """Begins to import what workers need, where they can start as forks."""
    if config.gpus_per_worker == 0 or not _may_have_gpus():
        warm_start.start(warm_up, threads=config.cpus_per_worker)


def _may_have_gpus() -> bool:
    """Whether a driver of GPUs is there; torch, which knows for sure, takes a second to ask."""
    devices = Path("/dev")
    drivers = ("kfd", "dxg")  # of AMD, and of Windows below WSL
    return any(devices.glob("nvidia*")) or any((devices / name).exists() for name in drivers)


def run(
    config: ClusterConfig,
    worker: Worker,
    payload: Payload,
    caller: Caller,
    *,
    check: NodeCheck | None = None,
    warm_up: Callable[[], None] | None = None,
) -> Outcome:
    """Runs the worker in `config.workers` processes; see `cluster.launcher.run`."""
    devices = _devices(config)
    if check is not None and config.preflight_s > 0:
        gpus = sum(device != "cpu" for device in devices)
        check_this_machine(check, workers=config.workers, gpus=gpus, report=caller.report)
    if "cpu" in devices and (word := oversubscription_warning(config, cores=os.cpu_count() or 1)):
        caller.report(word)
    environment = None
    if warm_up is not None and set(devices) == {"cpu"}:
        warm_start.start(warm_up, threads=config.cpus_per_worker)
        environment = dict(os.environ)
    with _processes(config, devices, worker, payload, environment) as processes:
        stopped = _monitor(processes, caller)
    return Outcome(status="stopped" if stopped else "finished")


def _monitor(processes: dict[Connection, BaseProcess], caller: Caller) -> bool:
    """Passes messages and the stop on until every worker returned; True if a stop was asked."""
    running = dict(zip(processes, range(len(processes)), strict=True))
    failures: list[Failure] = []
    deadline = float("inf")
    stopped = False
    while running and time.monotonic() < deadline:
        # Not stop.wait(): the event may be set by a signal handler that interrupts this very
        # thread, and would then wait for the lock that wait() holds.
        if caller.stop.is_set() and not stopped:
            stopped = True
            for channel in running:
                _ask_to_stop(channel)
        readable = wait(list(running), timeout=_TICK_S)
        for channel in [channel for channel in running if channel in readable]:
            try:
                event: Message | Failure | Line | None = channel.recv()
            except (EOFError, OSError):
                rank = running[channel]
                processes[channel].join(_PEER_GRACE_S)
                event = exit_failure(rank, 0, processes[channel].exitcode)
            if isinstance(event, dict):
                caller.on_message(event)
                continue
            if isinstance(event, Line):
                caller.listener.take(event)
                continue
            del running[channel]
            if event is not None:
                failures.append(event)
                deadline = min(deadline, time.monotonic() + _PEER_GRACE_S)
    if failures:
        raise root_cause(failures).error()
    return stopped


def _ask_to_stop(channel: Connection) -> None:
    # A worker that just died is found when its channel is read.
    with suppress(OSError):
        channel.send("stop")


@contextmanager
def _processes(
    config: ClusterConfig,
    devices: list[str],
    worker: Worker,
    payload: Payload,
    environment: Mapping[str, str] | None,
) -> Iterator[dict[Connection, BaseProcess]]:
    """Starts the workers, in the order of ranks and keyed by channel; ends them after the block.

    With the variables of an environment they are forks.
    """
    context: SpawnContext | ForkServerContext
    if environment is None:
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("forkserver")
    processes: dict[Connection, BaseProcess] = {}
    scratch = make_scratch(config.scratch_dir)
    rendezvous = Rendezvous(
        place=str(scratch / "rendezvous"),
        timeout_s=config.start_timeout_s,
        secret=new_secret(),
    )
    try:
        with warm_start.block_interrupts():
            for rank, device in enumerate(devices):
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(
                    target=_main,
                    kwargs={
                        "rank_info": RankInfo(
                            rank=rank,
                            world_size=config.workers,
                            local_rank=rank,
                            local_world_size=config.workers,
                        ),
                        "rendezvous": rendezvous,
                        "device": device,
                        "threads": config.cpus_per_worker,
                        "worker": worker,
                        "payload": payload,
                        "channel": theirs,
                        "environment": environment,
                    },
                    name=f"worker-{rank}",
                )
                process.start()
                processes[ours] = process
                theirs.close()
        yield processes
        for process in processes.values():
            process.join(_EXIT_GRACE_S)
    finally:
        for channel, process in processes.items():
            # The number of a fork that has ended may be another process's by now.
            if process.is_alive():
                process.kill()
            process.join()
            channel.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _devices(config: ClusterConfig) -> list[str]:
    if config.gpus_per_worker == 0:
        return ["cpu"] * config.workers
    import torch

    gpus = torch.cuda.device_count()
    if config.gpus_per_worker == "auto" and gpus == 0:
        return ["cpu"] * config.workers
    if gpus < config.workers:
        raise ClusterTooSmall(
            f"{config.workers} workers with one GPU each do not fit on this machine, which has "
            f"{gpus} GPUs. Set cluster.workers lower, or cluster.gpus_per_worker=0 to run on the "
            "CPU."
        )
    return [f"cuda:{index}" for index in range(config.workers)]


def _main(
    *,
    rank_info: RankInfo,
    rendezvous: Rendezvous,
    device: str,
    threads: int,
    worker: Worker,
    payload: Payload,
    channel: Connection,
    environment: Mapping[str, str] | None,
) -> None:
    """A worker's process."""
    if environment is not None:
        warm_start.become(environment)
    # `ray job stop` and service managers signal every process; the caller decides what it means.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop = threading.Event()
    threading.Thread(target=_listen_for_stop, args=(channel, stop), daemon=True).start()
    sending = threading.Lock()

    def send(event: Message | Failure | Line | None) -> None:
        with sending:
            channel.send(event)

    def log(level: Level, text: str) -> None:
        send(Line(rank=rank_info.rank, node="", attempt=0, level=level, text=text))

    context = WorkerContext(
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        local_rank=rank_info.local_rank,
        local_world_size=rank_info.local_world_size,
        attempt=0,
        device=device,
        stop_requested=stop.is_set,
        report=send,
        log=log,
    )

    def enter(context: WorkerContext, payload: Payload) -> None:
        join(rank_info, rendezvous, device=device, threads=threads)
        worker(context, payload)

    send(run_worker(enter, context, payload))


def _listen_for_stop(channel: Connection, stop: threading.Event) -> None:
    """Waits for the stop request; ends the process when the caller's is gone."""
    try:
        while channel.recv() == "stop":
            stop.set()
    except (EOFError, OSError):
        os._exit(1)
