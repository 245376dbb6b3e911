"""The nodes of the connected Ray cluster: what they have, what of it is free, who answers."""

import socket
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from cluster.capacity import Node

_ANSWER_TIMEOUT_S = 5.0


def live_nodes() -> tuple[Node, ...]:
    """The live nodes, each with all that it has."""
    return tuple(_node(record, record["Resources"]) for record in ray.nodes() if record["Alive"])


def free_nodes() -> tuple[Node, ...]:
    """The nodes that answer, each with what is free on it.

    Ray itself counts a node as alive for many seconds after it was lost.
    """
    free = available_resources_per_node()
    return tuple(
        _node(record, free[record["NodeID"]])
        for record in ray.nodes()
        if record["Alive"]
        and record["NodeID"] in free
        and answers(f"{record['NodeManagerAddress']}:{record['NodeManagerPort']}")
    )


def answers(address: str) -> bool:
    """Whether anything listens at `host:port`. Ray itself would go on trying for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_TIMEOUT_S).close()
    except (OSError, ValueError):
        return False
    return True


def _node(record: dict[str, Any], amounts: dict[str, float]) -> Node:
    return Node(
        id=record["NodeID"],
        address=record["NodeManagerAddress"],
        cpus=amounts.get("CPU", 0),
        gpus=amounts.get("GPU", 0),
    )
