"""The one door to the cluster: runs a worker on many processes, by Ray or without it."""

import os
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType

from cluster.assignment import require_whole_groups
from cluster.contract import (
    Caller,
    ClusterConfig,
    Line,
    Listener,
    LostWorkers,
    Message,
    Outcome,
    Payload,
    Worker,
)
from cluster.node_check import NodeCheck
from cluster.tested import TESTED_RAY, require_tested


def _say_nothing(_line: str) -> None:
    """Stand in for a caller's lines."""


def prepare(config: ClusterConfig, warm_up: Callable[[], None]) -> None:
    """Begins what `run` will need and can be begun before all is checked; does not wait for it.

    Args:
        config: Where, and how many.
        warm_up: As for `run`.
    """
    if config.backend == "local":
        from cluster import local

        local.prepare(config, warm_up)


def run(
    config: ClusterConfig,
    worker: Worker,
    payload: Payload,
    *,
    on_message: Callable[[Message], None],
    stop: threading.Event,
    report: Callable[[str], None] = _say_nothing,
    listener: Listener | None = None,
    group_size: int = 1,
    fewer: Mapping[int, int] = MappingProxyType({}),
    check: NodeCheck | None = None,
    warm_up: Callable[[], None] | None = None,
) -> Outcome:
    """Runs `worker(context, payload)` on `config.workers` processes and waits for all of them.

    With `fewer` it goes on with fewer processes where nodes are lost, and takes more again later.
    Each time all of them are started anew, and `context.world_size` tells how many they are.

    Args:
        config: Where, and how many.
        worker: An importable function; see `cluster.contract`.
        payload: Plain data for every worker.
        on_message: Called in this thread with each message of a worker. It may raise, to end all.
        stop: Set it to ask the workers to stop; they end when they choose to. An exception that a
            signal handler raises here ends them at once.
        report: Called in this thread with lines for a person. While there is no room for the
            workers, the last one about them says "waiting for room", or "waiting up to" so long.
        listener: Takes each line that a worker logs, and on Ray each other that its process writes,
            also the last ones of a process that was killed. None has `report` take them.
        group_size: How many consecutive ranks always share a node; divides `config.workers`.
        fewer: Ray only. Numbers of processes that will do, and the group size of each.
        check: What to look for on each node before any worker is placed on it.
        warm_up: An importable function that imports what workers need. Spares call it ahead, and
            so does what workers of one machine are forked from.

    Returns:
        How the run ended.

    Raises:
        WorkerRefused: A worker raised a ValueError; the message is its own.
        WorkerFailed: A worker died or raised, and the budget of restarts is spent.
        ClusterConfigError: The workers are no whole number of groups of `group_size`.
        ClusterTooSmall: The workers, or groups that share a node, do not fit on the cluster.
        UnfitNodes: The workers do not fit on those nodes that can train.
        ClusterUnavailable: The cluster cannot be reached or was lost.
        UntestedVersion: Ray is to be used, in a version that its use was not tested with.
    """
    caller = Caller(
        on_message=on_message, stop=stop, report=report, listener=listener or _Reporter(report)
    )
    sizes = {**fewer, config.workers: group_size}
    return _run(config, worker, payload, caller, sizes, check=check, warm_up=warm_up)


def _run(
    config: ClusterConfig,
    worker: Worker,
    payload: Payload,
    caller: Caller,
    group_sizes: Mapping[int, int],
    *,
    check: NodeCheck | None,
    warm_up: Callable[[], None] | None,
) -> Outcome:
    for workers, size in group_sizes.items():
        require_whole_groups(workers, size)
    if config.backend == "local":
        from cluster import local  # one machine: everything shares a node

        return local.run(config, worker, payload, caller, check=check, warm_up=warm_up)
    require_tested("ray", TESTED_RAY)  # before its private parts are imported
    # Under `uv run` Ray would have uv make the environment anew for every worker, on every node.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    from cluster import ray_train

    return ray_train.run(
        config, worker, payload, caller, group_sizes=group_sizes, check=check, warm_up=warm_up
    )


class _Reporter:
    """Has lines of workers told as those of the cluster are."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report

    def take(self, line: Line) -> None:
        self._report(str(line))

    def lose(self, lost: LostWorkers) -> None:
        """The cluster's own line tells that."""
