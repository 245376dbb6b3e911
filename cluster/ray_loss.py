"""A failure of the workers, and what is found out about it: the cause, the node, where to look."""

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import PurePath
from typing import Any

import ray

from cluster.failure import Failure, WorkerFailed, is_of_lost_peer, root_cause, root_causes
from cluster.ray_leaving import Leave
from cluster.ray_mailbox import Broken, Seat
from cluster.ray_nodes import are_reachable
from cluster.recovery import FaultKind

_PEER_GRACE_S = 1.5
"""How long a failure waits for those of other workers, one of which may be its cause."""
_NAMED = 4
"""So many workers that did not come are named."""
_ANSWER_S = 10.0
"""How long it waits to know whether nodes answer."""


class Loss:
    """A failure of an attempt, and what is found out about it.

    Args:
        broken: What the controller tells.
        seats: Where the workers ran.
        leave: Why they were asked to leave; None if they were not.
        reads: What is read of what workers wrote that died.

    Attributes:
        broken: What the controller tells.
        died: The ranks whose process ended.
    """

    def __init__(
        self,
        broken: Broken,
        seats: Sequence[Seat],
        leave: Leave | None = None,
        *,
        reads: Sequence[Future[Any]] = (),
    ) -> None:
        self.broken = broken
        self.died = tuple(
            one.rank for one in broken.failures if one.kind == "died" and one.rank < len(seats)
        )
        self._seats = seats
        self._leave = leave
        self._reads = reads
        self._began_s = time.monotonic()
        pool = ThreadPoolExecutor(1, thread_name_prefix="loss")
        # All nodes: Ray notices late that one is gone, and then the others' failures come first.
        self._answers = pool.submit(answering, {seat.node for seat in seats})
        pool.shutdown(wait=False)

    def is_known(self, failures: Sequence[Failure], left: Collection[int]) -> bool:
        """Whether the cause is found out, or enough time was spent on it.

        Args:
            failures: What the workers of the attempt told.
            left: The ranks that returned as they were asked to.
        """
        passed = time.monotonic() - self._began_s
        asking = not self._answers.done()
        told = {one.rank for one in (*failures, *self.broken.failures)}.union(left)
        told.update(rank for rank in range(len(self._seats)) if self._has_lost_node(rank))
        waiting = self.broken.kind == "workers" and len(told) < len(self._seats)
        return not (asking and passed < _ANSWER_S) and not (waiting and passed < _PEER_GRACE_S)

    def has_spoken(self, *, timeout_s: float = 0.0) -> bool:
        """Whether the last words of all that died have been read, as far as they can be had.

        Args:
            timeout_s: How long to wait for them.
        """
        return not wait(self._reads, timeout=timeout_s).not_done

    def _has_lost_node(self, rank: int) -> bool:
        known = self._answers.done() and self._answers.exception() is None
        return known and self._seats[rank].node not in self._answers.result()

    def failures(self, told: Sequence[Failure], left: Collection[int]) -> list[Failure]:
        """All failures of the attempt, those first that the workers themselves told."""
        if self.broken.kind == "start":
            return []  # what was told is of the attempt before
        known = {one.rank for one in told}.union(left)
        failures = [*told, *(one for one in self.broken.failures if one.rank not in known)]
        known.update(one.rank for one in failures)
        silent = [rank for rank in range(len(self._seats)) if rank not in known]
        return failures + [
            Failure(rank=rank, attempt=-1, kind="died", text="was lost with its node")
            for rank in silent
            if self._has_lost_node(rank)
        ]

    @property
    def kind(self) -> FaultKind:
        """What happened, in the terms of the policy."""
        if self.broken.kind == "start":
            return "start"
        if self._leave is not None:
            return self._leave.kind
        if any(self._has_lost_node(rank) for rank in range(len(self._seats))):
            return "node"
        return "crash"

    def describe(self, failures: Sequence[Failure]) -> str:
        """The cause in words, with rank and node."""
        if not failures:
            if self._leave is None:
                return self.broken.text + self._absentees()
            return f"all workers left, since {self._leave.reason}"
        root = root_cause(failures)
        more = f", {len(failures) - 1} more with it" if len(failures) > 1 else ""
        late = f", when {self._leave.reason}" if self._leave is not None else ""
        return f"{self._place(root.rank)} {_how(root)}{more}{late}"

    def _absentees(self) -> str:
        absent = self.broken.absent
        if not absent:
            return ""
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        return f": {', '.join(map(self._place, absent[:_NAMED]))}{more}"

    def _place(self, rank: int) -> str:
        if rank >= len(self._seats):
            return f"worker {rank}"
        gone = " (the node does not answer)" if self._has_lost_node(rank) else ""
        return f"worker {rank} on {self._seats[rank].address}{gone}"

    def origin(self, failures: Sequence[Failure]) -> Seat | None:
        """A worker on the node where it began.

        None if it began on several nodes, or with all workers, or if each only lost another. Of a
        start that was waited for in vain, a worker that did not come.
        """
        roots = root_causes(failures) if failures else []
        ranks = {one.rank for one in roots if not is_of_lost_peer(one)}.union(self.broken.absent)
        seats = [self._seats[rank] for rank in ranks if rank < len(self._seats)]
        is_one = len({seat.node for seat in seats}) == 1 and len(seats) < len(self._seats)
        return seats[0] if is_one else None

    def first_of_nodes(self) -> list[int]:
        """The ranks that died, of each node one."""
        nodes = {self._seats[rank].node: rank for rank in sorted(self.died, reverse=True)}
        return sorted(nodes.values())

    def place_of_logs(self, rank: int) -> str:
        """Where Ray keeps its logs of a worker and its node, as a sentence; "" if unknown."""
        seat = self._seats[rank] if rank < len(self._seats) else None
        if seat is None or not seat.output:
            return ""
        files = " and ".join(dict.fromkeys(PurePath(path).name for path in seat.output))
        folder = PurePath(seat.output[0]).parent
        return f"Ray's logs of it are in {folder} on {seat.address}: {files}, and raylet.out."

    def error(self, failures: Sequence[Failure], *, reason: str) -> WorkerFailed:
        """What to raise if the run is given up.

        Args:
            failures: All of the attempt.
            reason: Why the workers are not started again.
        """
        if failures:
            root = root_cause(failures)
            return root.error(hint=self.place_of_logs(root.rank))
        if self.broken.kind == "workers" and self._leave is not None:
            why = self._leave.reason
            return WorkerFailed(f"All workers left, since {why}. They do not start again: {reason}")
        return WorkerFailed(f"The workers could not be run: {self.broken.text}{self._absentees()}")


def _how(failure: Failure) -> str:
    text = " ".join(failure.text.split())[:300].rstrip(".")
    if failure.kind == "refused":
        return f"refused the run: {text}"
    return f"failed with {text}" if failure.kind == "raised" else text


def answering(nodes: Collection[str]) -> set[str]:
    """Those of the nodes that answer; takes seconds where one does not."""
    if not nodes:
        return set()
    records = [one for one in ray.nodes() if one["NodeID"] in nodes and one["Alive"]]
    reached = are_reachable(
        [f"{one['NodeManagerAddress']}:{one['NodeManagerPort']}" for one in records]
    )
    return {one["NodeID"] for one, does in zip(records, reached, strict=True) if does}
