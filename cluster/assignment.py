"""Which node each rank goes to, and whether all fit: decisions alone, no effects."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.contract import ClusterConfig, ClusterConfigError, ClusterTooSmall


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


@dataclass(frozen=True, kw_only=True)
class WorkerGroupSpec:
    """The workers of a run and what they need.

    Attributes:
        workers: Number of ranks, a multiple of `group_size`.
        group_size: How many consecutive ranks share a node: a group.
        cpus: Cores of one worker.
        gpus: GPUs of one worker.
    """

    workers: int
    group_size: int
    cpus: int
    gpus: int

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.workers // self.group_size

    def groups_that_fit(self, *nodes: Node) -> int:
        """How many of such groups the nodes hold; none spans two of them."""
        return sum(
            workers_that_fit([node], cpus=self.cpus, gpus=self.gpus) // self.group_size
            for node in nodes
        )


def sizes_that_fit(sizes: Iterable[WorkerGroupSpec], nodes: Sequence[Node]) -> set[int]:
    """For which numbers of workers there is room."""
    return {spec.workers for spec in sizes if spec.groups_that_fit(*nodes) >= spec.groups}


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


def require_room(config: ClusterConfig, nodes: Sequence[Node], *, workers: int, gpus: int) -> None:
    """Refuses a cluster that could not hold so many workers even if it were idle.

    Raises:
        ClusterTooSmall: With what is needed and what is there.
    """
    room = workers_that_fit(nodes, cpus=config.cpus_per_worker, gpus=gpus)
    if room >= workers:
        return
    needed = format_resources(workers * config.cpus_per_worker, workers * gpus)
    there = format_resources(sum(n.cpus for n in nodes), sum(n.gpus for n in nodes))
    raise ClusterTooSmall(
        f"{workers} workers do not fit on the cluster: they need {needed} "
        f"({format_resources(config.cpus_per_worker, gpus)} each, none spanning two nodes), and "
        f"the cluster has {there} on {len(nodes)} node(s), room for {room}. Set cluster.workers, "
        "cluster.cpus_per_worker or cluster.gpus_per_worker lower, or add nodes."
    )


def oversubscription_warning(config: ClusterConfig, *, cores: int) -> str | None:
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


def require_whole_groups(workers: int, group_size: int) -> None:
    """Refuses workers that are no whole number of groups.

    Raises:
        ClusterConfigError: With both numbers.
    """
    if group_size < 1:
        raise ClusterConfigError(
            f"group_size is {group_size}; it must be a whole number of at least 1."
        )
    if workers % group_size:
        raise ClusterConfigError(
            f"cluster.workers is {workers}, which is no multiple of {group_size}: so many "
            "consecutive workers must share a node. Set cluster.workers to a multiple of it, or "
            "use smaller expert groups (engine.placement)."
        )


def assign_nodes(spec: WorkerGroupSpec, nodes: Sequence[Node]) -> tuple[str, ...]:
    """Puts the groups on as few nodes as can hold them, those with room for most first.

    Args:
        spec: The workers.
        nodes: What there is for them; of equal nodes the earlier is taken.

    Returns:
        The id of each rank's node. The ranks of one node are consecutive.

    Raises:
        ClusterTooSmall: With how many groups each node holds and how many are needed.
    """
    room = {node.id: spec.groups_that_fit(node) for node in nodes}
    if sum(room.values()) < spec.groups:
        per_group = format_resources(spec.group_size * spec.cpus, spec.group_size * spec.gpus)
        listing = "; ".join(
            f"{node.address} has {format_resources(node.cpus, node.gpus)}, room for {room[node.id]}"
            for node in nodes
        )
        raise ClusterTooSmall(
            f"{spec.groups} groups of {spec.group_size} workers do not fit on the cluster: "
            f"each needs {per_group} on one node, and there is room for {sum(room.values())} "
            f"({listing}). Use smaller expert groups (engine.placement), set cluster.workers or "
            "cluster.cpus_per_worker lower, or add nodes."
        )
    assigned: list[str] = []
    for node in sorted(nodes, key=lambda node: room[node.id], reverse=True):
        assigned += [node.id] * room[node.id] * spec.group_size
    return tuple(assigned[: spec.workers])


def require_same_node(nodes: Sequence[str], group_size: int) -> None:
    """Checks where the ranks ended up.

    Args:
        nodes: The id of each rank's node.
        group_size: How many consecutive ranks share a node.

    Raises:
        RuntimeError: With the ranks that were torn apart and their nodes.
    """
    for first in range(0, len(nodes), group_size):
        group = nodes[first : first + group_size]
        if len(set(group)) > 1:
            raise RuntimeError(
                f"Ranks {first} to {first + len(group) - 1} must share a node, but run on "
                f"{', '.join(group)}: this version of Ray numbers its workers in another way."
            )


def format_resources(cpus: float, gpus: float) -> str:
    """The amounts in words, GPUs only where there are some."""
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
