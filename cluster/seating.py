"""Which node each rank goes to when some ranks must share one: the decision alone, no effects."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.capacity import Node, resources, workers_that_fit
from cluster.contract import ClusterConfigError, ClusterTooSmall


@dataclass(frozen=True, kw_only=True)
class Party:
    """The workers of a run and what they need.

    Attributes:
        workers: Number of ranks, a multiple of `kept_together`.
        kept_together: How many consecutive ranks share a node: a group.
        cpus: Cores of one worker.
        gpus: GPUs of one worker.
    """

    workers: int
    kept_together: int
    cpus: int
    gpus: int

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.workers // self.kept_together

    def groups_that_fit(self, *nodes: Node) -> int:
        """How many of such groups the nodes hold; none spans two of them."""
        return sum(
            workers_that_fit([node], cpus=self.cpus, gpus=self.gpus) // self.kept_together
            for node in nodes
        )


def require_whole_groups(workers: int, kept_together: int) -> None:
    """Refuses workers that are no whole number of groups.

    Raises:
        ClusterConfigError: With both numbers.
    """
    if kept_together < 1:
        raise ClusterConfigError(
            f"kept_together is {kept_together}; it must be a whole number of at least 1."
        )
    if workers % kept_together:
        raise ClusterConfigError(
            f"cluster.workers is {workers}, which is no multiple of {kept_together}: so many "
            "consecutive workers must share a node. Set cluster.workers to a multiple of it, or "
            "use smaller expert groups (engine.placement)."
        )


def seat(party: Party, nodes: Sequence[Node]) -> tuple[str, ...]:
    """Seats the groups on as few nodes as can hold them, those with room for most first.

    Args:
        party: The workers.
        nodes: What there is for them; of equal nodes the earlier is taken.

    Returns:
        The id of each rank's node. The ranks of one node are consecutive.

    Raises:
        ClusterTooSmall: With how many groups each node holds and how many are needed.
    """
    room = {node.id: party.groups_that_fit(node) for node in nodes}
    if sum(room.values()) < party.groups:
        per_group = resources(party.kept_together * party.cpus, party.kept_together * party.gpus)
        listing = "; ".join(
            f"{node.address} has {resources(node.cpus, node.gpus)}, room for {room[node.id]}"
            for node in nodes
        )
        raise ClusterTooSmall(
            f"{party.groups} groups of {party.kept_together} workers do not fit on the cluster: "
            f"each needs {per_group} on one node, and there is room for {sum(room.values())} "
            f"({listing}). Use smaller expert groups (engine.placement), set cluster.workers or "
            "cluster.cpus_per_worker lower, or add nodes."
        )
    seats: list[str] = []
    for node in sorted(nodes, key=lambda node: room[node.id], reverse=True):
        seats += [node.id] * room[node.id] * party.kept_together
    return tuple(seats[: party.workers])


def require_seated_together(nodes: Sequence[str], kept_together: int) -> None:
    """Checks where the ranks ended up.

    Args:
        nodes: The id of each rank's node.
        kept_together: How many consecutive ranks share a node.

    Raises:
        RuntimeError: With the ranks that were torn apart and their nodes.
    """
    for first in range(0, len(nodes), kept_together):
        group = nodes[first : first + kept_together]
        if len(set(group)) > 1:
            raise RuntimeError(
                f"Ranks {first} to {first + len(group) - 1} must share a node, but run on "
                f"{', '.join(group)}: this version of Ray numbers its workers in another way."
            )
