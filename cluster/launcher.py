"""The one door to the cluster: runs a worker on many processes, by Ray or without it."""

import threading
from collections.abc import Callable

from cluster.contract import ClusterConfig, Message, Outcome, Payload, Worker


def run(
    config: ClusterConfig,
    worker: Worker,
    payload: Payload,
    *,
    on_message: Callable[[Message], None],
    stop: threading.Event,
) -> Outcome:
    """Runs `worker(context, payload)` on `config.workers` processes and waits for all of them.

    Args:
        config: Where, and how many.
        worker: An importable function; see `cluster.contract`.
        payload: Plain data for every worker.
        on_message: Called in this thread with each message that a worker tells. What it raises ends
            the run.
        stop: Set it (from a signal handler, say) to ask the workers to stop; they learn of it
            within 0.3 s and end when they choose to. An exception that a signal handler raises
            here, such as KeyboardInterrupt, ends the workers at once.

    Returns:
        How the run ended.

    Raises:
        WorkerRefused: A worker raised a ValueError; the message is its own.
        WorkerFailed: A worker died or raised, and the budget of restarts is spent.
        ClusterTooSmall: The workers do not fit on the cluster.
        ClusterUnavailable: The cluster cannot be reached or was lost.
    """
    if config.backend == "local":
        from cluster import local

        return local.run(config, worker, payload, on_message=on_message, stop=stop)
    from cluster import ray_train

    return ray_train.run(config, worker, payload, on_message=on_message, stop=stop)
