"""Whether a cluster can hold the workers: counting, no effects."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.contract import ClusterConfig, ClusterTooSmall


@dataclass(frozen=True, kw_only=True)
class Node:
    """What one node offers.

    Attributes:
        id: Names it among the nodes of a cluster.
        address: Names it to a reader.
        cpus: Cores, all of them or those that are free.
        gpus: GPUs, likewise.
    """

    id: str
    address: str
    cpus: float
    gpus: float


def gpus_per_worker(config: ClusterConfig, nodes: Sequence[Node]) -> int:
    """The GPUs of one worker: as configured, or for `auto` 1 where there is any GPU at all."""
    if config.gpus_per_worker == "auto":
        return 1 if any(node.gpus >= 1 for node in nodes) else 0
    return config.gpus_per_worker


def workers_that_fit(nodes: Sequence[Node], *, cpus: int, gpus: int) -> int:
    """How many workers of `cpus` cores and `gpus` GPUs the nodes hold; none spans two of them."""
    return sum(
        int(min(node.cpus // cpus, node.gpus // gpus if gpus else float("inf"))) for node in nodes
    )


def require_room(config: ClusterConfig, nodes: Sequence[Node], *, gpus: int) -> None:
    """Refuses a cluster that could not hold the workers even if it were idle.

    Raises:
        ClusterTooSmall: With what is needed and what is there.
    """
    room = workers_that_fit(nodes, cpus=config.cpus_per_worker, gpus=gpus)
    if room >= config.workers:
        return
    raise ClusterTooSmall(
        f"{config.workers} workers do not fit on the cluster: they need "
        f"{resources(config.workers * config.cpus_per_worker, config.workers * gpus)} "
        f"({resources(config.cpus_per_worker, gpus)} each, none spanning two nodes), and the "
        f"cluster has {resources(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes))} on "
        f"{len(nodes)} node(s), room for {room}. Set cluster.workers, cluster.cpus_per_worker or "
        "cluster.gpus_per_worker lower, or add nodes."
    )


def crowding(config: ClusterConfig, *, cores: int) -> str | None:
    """A word on processor workers that have to share this machine's cores, if they have to."""
    wanted = config.workers * config.cpus_per_worker
    if wanted <= cores:
        return None
    return (
        f"warning: cluster.workers={config.workers} with cluster.cpus_per_worker="
        f"{config.cpus_per_worker} want {wanted} cores, and this machine has {cores}: the workers "
        "share them and wait for each other, and each needs memory of its own. "
        f"cluster.workers={max(1, cores // config.cpus_per_worker)} is faster here."
    )


def resources(cpus: float, gpus: float) -> str:
    """The amounts in words, GPUs only where there are some."""
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
