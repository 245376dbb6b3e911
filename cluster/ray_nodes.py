"""The nodes of the connected Ray cluster: what they have, what of it is free, who answers."""

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from cluster.capacity import Node

_ANSWER_TIMEOUT_S = 5.0
_MOST_AT_ONCE = 128


def live_nodes() -> tuple[Node, ...]:
    """The live nodes, each with all that it has."""
    return tuple(_node(record, record["Resources"]) for record in ray.nodes() if record["Alive"])


def free_nodes() -> tuple[Node, ...]:
    """The nodes that answer, each with what is free on it.

    Ray itself counts a node as alive for many seconds after it was lost.
    """
    free = available_resources_per_node()
    records = [one for one in ray.nodes() if one["Alive"] and one["NodeID"] in free]
    answer = all_answer(
        [f"{one['NodeManagerAddress']}:{one['NodeManagerPort']}" for one in records]
    )
    return tuple(
        _node(record, free[record["NodeID"]])
        for record, does in zip(records, answer, strict=True)
        if does
    )


def all_answer(addresses: Sequence[str]) -> list[bool]:
    """Whether each address answers; asked all at once, for each that does not takes seconds."""
    if not addresses:
        return []
    with ThreadPoolExecutor(min(len(addresses), _MOST_AT_ONCE)) as pool:
        return list(pool.map(answers, addresses))


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
