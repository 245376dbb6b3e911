"""The one door to the cluster: runs a worker on many processes, by Ray or without it."""

import threading
from collections.abc import Callable

from cluster.assignment import require_whole_groups
from cluster.contract import Caller, ClusterConfig, Message, Outcome, Payload, Worker
from cluster.tested import TESTED_RAY, require_tested


def _say_nothing(_line: str) -> None:
    """Stand in for a caller's lines."""


def run(
    config: ClusterConfig,
    worker: Worker,
    payload: Payload,
    *,
    on_message: Callable[[Message], None],
    stop: threading.Event,
    report: Callable[[str], None] = _say_nothing,
    group_size: int = 1,
) -> Outcome:
    """Runs `worker(context, payload)` on `config.workers` processes and waits for all of them.

    Args:
        config: Where, and how many.
        worker: An importable function; see `cluster.contract`.
        payload: Plain data for every worker.
        on_message: Called in this thread with each message that a worker tells. What it raises ends
            the run.
        stop: Set it (from a signal handler, say) to ask the workers to stop; they learn of it
            at once and end when they choose to. An exception that a signal handler raises
            here, such as KeyboardInterrupt, ends the workers at once.
        report: Called in this thread with lines for a person: what the cluster does before the
            workers can tell, what is waited for, and what is amiss.
        group_size: How many consecutive ranks (0 to g-1, g to 2g-1, …) always share a node; it
            divides `config.workers`.

    Returns:
        How the run ended.

    Raises:
        WorkerRefused: A worker raised a ValueError; the message is its own.
        WorkerFailed: A worker died or raised, and the budget of restarts is spent.
        ClusterConfigError: The workers are no whole number of groups of `group_size`.
        ClusterTooSmall: The workers, or the groups of them that share a node, do not fit on the
            cluster.
        ClusterUnavailable: The cluster cannot be reached or was lost.
        UntestedVersion: Ray is to be used, in a version that its use was not tested with.
    """
    require_whole_groups(config.workers, group_size)
    caller = Caller(on_message=on_message, stop=stop, report=report)
    if config.backend == "local":
        # One machine: everything shares a node.
        from cluster import local

        return local.run(config, worker, payload, caller)
    require_tested("ray", TESTED_RAY)  # before its private parts are imported
    from cluster import ray_train

    return ray_train.run(config, worker, payload, caller, group_size=group_size)
