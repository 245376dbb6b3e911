"""The policy by which Ray Train's controller starts workers: where nodes that answer have room.

Ray's own lets a start wait for nodes that are gone, and takes any number of workers.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import (
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.config import ScalingConfig

from cluster.assignment import Node, WorkerGroupSpec, format_resources, sizes_that_fit
from cluster.ray_mailbox import Mailbox
from cluster.ray_nodes import avoiding, free_nodes, live_nodes
from cluster.recovery import choose_workers, must_readmit

_LOOK_S = 0.5
"""How often the controller looks for room."""


class RoomPolicy(FixedScalingPolicy):  # type: ignore[misc]
    """Starts the workers once nodes that answer have room for them.

    Args:
        scaling_config: Ray Train's.
        sizes: The workers; of each number of them that will do.
        mailbox: Takes what is lacking.
        patience_s: How long a start waits for more of them.
        may_grow: Whether nodes can be asked for, by an actor that is started for it.
    """

    def __init__(
        self,
        scaling_config: ScalingConfig,
        sizes: Sequence[WorkerGroupSpec],
        mailbox: Mailbox,
        *,
        patience_s: float,
        may_grow: bool,
    ) -> None:
        super().__init__(scaling_config)
        self._may_grow = may_grow
        self._sizes = {spec.workers: spec for spec in sizes}
        self._mailbox = mailbox
        self._patience_s = patience_s
        self._wanted = self._most = max(self._sizes)
        self._avoided: frozenset[str] = frozenset()
        self._barred: frozenset[str] = frozenset()
        self._left_out: frozenset[str] = frozenset()
        self._since_s: float | None = None

    def on_controller_start_worker_group(
        self, *, scaling_config: ScalingConfig, num_workers: int
    ) -> dict[str, str] | None:
        """Has no worker start on nodes that are avoided, are not admitted, or do not answer.

        Ray itself takes a node that is gone for alive, and for the place of workers, for up to a
        minute.
        """
        return avoiding(self._left_out) or None

    def after_controller_start(self, train_run_context: Any) -> None:
        """Asks for nodes, where that can help."""
        if self._may_grow:
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if self._may_grow:
            super()._maybe_send_resource_request()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Decides to start the workers, or, after a while, to look again."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        if self._since_s is None:
            self._since_s = now
            self._wanted = self._mailbox.wanted() or self._wanted
            self._most = self._mailbox.most() or max(self._sizes)
            self._avoided = self._mailbox.avoided()
        try:
            nodes = self._free_nodes(now - self._since_s)
            alive = {node.id for node in live_nodes()}
        except (ray.exceptions.RayError, RuntimeError) as error:
            # An error of this policy would end the run.
            self._mailbox.tell_lacking(f"Ray does not tell what is free: {one_line(error)}")
            time.sleep(_LOOK_S)
            return NoopDecision()
        workers = choose_workers(
            tuple(size for size in self._sizes if size <= self._most),
            sizes_that_fit(self._sizes.values(), nodes),
            wanted=self._wanted,
            waited_s=now - self._since_s,
            patience_s=self._patience_s,
        )
        if workers is None:
            text = describe_room(self._sizes[self._wanted], nodes)
            if self._barred:
                text += f"; {len(self._barred)} more unfit or not yet looked at"
            self._mailbox.tell_lacking(text)
            time.sleep(_LOOK_S)
            return NoopDecision()
        self._since_s = None
        self._left_out = frozenset(alive.difference(node.id for node in nodes))
        return ResizeDecision(
            num_workers=workers,
            resources_per_worker=self.scaling_config._resources_per_worker_not_none,
        )

    def _free_nodes(self, waited_s: float) -> tuple[Node, ...]:
        """What is free on nodes that are to be used."""
        admitted = self._mailbox.admitted()
        free = free_nodes()
        if admitted is None and not self._avoided:
            return free
        live = live_nodes()
        if admitted is not None:
            self._barred = frozenset(node.id for node in live if node.id not in admitted)
            free, live = (
                tuple(node for node in nodes if node.id in admitted) for nodes in (free, live)
            )
        if not self._avoided:
            return free
        sizes = [spec for size, spec in self._sizes.items() if size <= self._most]
        others = [node for node in free if node.id not in self._avoided]
        idle = [node for node in live if node.id not in self._avoided]
        if not must_readmit(
            sizes_that_fit(sizes, others),
            sizes_that_fit(sizes, idle),
            waited_s=waited_s,
            patience_s=self._patience_s,
        ):
            return tuple(others)
        self._avoided = frozenset()
        self._mailbox.readmit()
        return free


def describe_room(spec: WorkerGroupSpec, nodes: tuple[Node, ...]) -> str:
    """What there is for the workers, node by node as far as a line goes."""
    room = spec.groups_that_fit(*nodes) * spec.group_size
    answer = "1 node answers" if len(nodes) == 1 else f"{len(nodes)} nodes answer"
    listing = [f"{node.address} has {format_resources(node.cpus, node.gpus)}" for node in nodes]
    more = f", and {len(listing) - 4} more" if len(listing) > 4 else ""
    free = f" ({', '.join(listing[:4])}{more} free)" if listing else ""
    return f"waiting for room for {spec.workers} workers: {answer}{free}, room for {room}"


def one_line(error: BaseException) -> str:
    """What an error says, in one line that is not too long."""
    return " ".join(str(error).split())[:500]
