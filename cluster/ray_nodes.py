"""The nodes of the connected Ray cluster, and which rank goes to which of them.

Ray Train makes one placement group of all workers and numbers them by the order of its bundles,
node after node. `cluster.assignment` gives each bundle a node in the same order, so its ranks
are Ray Train's. Nodes are assigned anew whenever the workers are started: one may have been lost.
"""

import socket
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from cluster.assignment import Node, WorkerGroupSpec, assign_nodes, require_same_node
from cluster.contract import ClusterTooSmall

_ANSWER_TIMEOUT_S = 5.0
_MAX_AT_ONCE = 512
_NODE_ID = "ray.io/node-id"
"""A label that Ray gives every node."""
_LOOK_S = 0.5
"""How often it looks whether there is room yet."""


def live_nodes() -> tuple[Node, ...]:
    """The live nodes, each with all that it has."""
    return tuple(_node(record, record["Resources"]) for record in ray.nodes() if record["Alive"])


def free_nodes() -> tuple[Node, ...]:
    """The nodes that answer and stay, each with what is free on it.

    Ray itself counts a node as alive for many seconds after it was lost.
    """
    free = available_resources_per_node()
    leaving = draining_nodes()
    records = [
        one
        for one in ray.nodes()
        if one["Alive"] and one["NodeID"] in free and one["NodeID"] not in leaving
    ]
    answer = are_reachable(
        [f"{one['NodeManagerAddress']}:{one['NodeManagerPort']}" for one in records]
    )
    return tuple(
        _node(record, free[record["NodeID"]])
        for record, does in zip(records, answer, strict=True)
        if does
    )


def node_doors() -> dict[str, str]:
    """Where each live node listens, as `host:port`, by its id."""
    return {
        one["NodeID"]: f"{one['NodeManagerAddress']}:{one['NodeManagerPort']}"
        for one in ray.nodes()
        if one["Alive"]
    }


def draining_nodes() -> dict[str, float | None]:
    """The nodes that will be taken away: in how many seconds by this machine's clock, if known."""
    told: dict[str, int] = state.get_draining_nodes()
    now = time.time()
    return {node: at_ms / 1000 - now if at_ms else None for node, at_ms in told.items()}


def are_reachable(addresses: Sequence[str]) -> list[bool]:
    """Whether each address answers; asked all at once, for each that does not takes seconds."""
    if not addresses:
        return []
    with ThreadPoolExecutor(min(len(addresses), _MAX_AT_ONCE)) as pool:
        return list(pool.map(is_reachable, addresses))


def is_reachable(address: str) -> bool:
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


def avoiding(nodes: Collection[str]) -> dict[str, str]:
    """A label selector of all nodes but these."""
    # Without spaces, which Ray would take for a part of the id behind them.
    return {_NODE_ID: f"!in({','.join(sorted(nodes))})"} if nodes else {}


def empty_selectors(workers: int) -> list[dict[str, str]]:
    """The label selectors of `ScalingConfig` that `NodePinning` fills in."""
    return [{} for _ in range(workers)]


class NodePinning(WorkerGroupCallback):  # type: ignore[misc]
    """Pins the workers before each start, and checks their numbers after it.

    Args:
        sizes: The workers; of each number of them that will do.
        timeout_s: How long a start waits for room.
        report: Takes a line when it has to wait.
        meanwhile: Is called now and then while it waits; what it raises ends the wait.
    """

    def __init__(
        self,
        *sizes: WorkerGroupSpec,
        timeout_s: float,
        report: Callable[[str], None],
        meanwhile: Callable[[], None],
    ) -> None:
        self._sizes = {spec.workers: spec for spec in sizes}
        self._timeout_s = timeout_s
        self._report = report
        self._meanwhile = meanwhile

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """Assigns the nodes, once there is room, and writes them into the bundles' selectors.

        Raises:
            WorkerGroupStartupFailedError: There was no room in time; Ray Train may try again.
        """
        # These copies were made for this start, and the placement group is made from them next.
        selectors = worker_group_context.label_selector
        # What a node must not be, `RoomPolicy` has written there.
        avoided = selectors[0].get(_NODE_ID, "")
        nodes = self._assign(self._sizes[len(selectors)], avoided)
        for selector, node in zip(selectors, nodes, strict=True):
            selector[_NODE_ID] = node

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Checks that Ray Train numbered the workers as they were assigned.

        Raises:
            RuntimeError: It did not.
        """
        # In the order of ranks.
        nodes = [worker.metadata.node_id for worker in worker_group.get_workers()]
        require_same_node(nodes, self._sizes[len(nodes)].group_size)

    def _assign(self, spec: WorkerGroupSpec, avoided: str) -> tuple[str, ...]:
        deadline = time.monotonic() + self._timeout_s
        last = ""
        while True:
            try:
                return assign_nodes(spec, [node for node in free_nodes() if node.id not in avoided])
            except ClusterTooSmall as error:
                # What the workers of the last attempt held becomes free only gradually.
                if time.monotonic() > deadline:
                    raise WorkerGroupStartupFailedError(
                        f"After {self._timeout_s:g} s there is no room. {error}"
                    ) from error
                if str(error) != last:
                    last = str(error)
                    self._report(f"waiting up to {self._timeout_s:g} s for room: {last}")
            self._meanwhile()
            time.sleep(_LOOK_S)
