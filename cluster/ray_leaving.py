"""When all workers are to save and leave: a node goes, or one has come.

They are started again, unless the driver's own node goes, which nothing outlives.

Runs in the driver, which asks Ray's control server a little every few seconds.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import ray

from cluster.assignment import Node, WorkerGroupSpec, sizes_that_fit
from cluster.ray_mailbox import Seat
from cluster.ray_nodes import draining_nodes, free_nodes

_DRAIN_LOOK_S = 2.0
"""How often it looks for nodes that will be taken away."""
_ROOM_LOOK_S = 10.0
"""How often it looks for room for more workers."""
_MARGIN_S = 3.0
"""What is left, of the time until a node goes, for the processes to end."""


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Why all workers are to leave.

    Attributes:
        kind: In the terms of the policy.
        reason: In words.
        grace_s: How long they have; None if nothing hurries.
        workers: How many are to be started instead; None for as many as now.
    """

    kind: Literal["preemption", "resize"]
    reason: str
    grace_s: float | None = None
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class End:
    """Why the run is to be saved and to end.

    Attributes:
        reason: In words.
        grace_s: How long it has; None if that is not known.
    """

    reason: str
    grace_s: float | None = None


class LeaveWatch:
    """Looks for reasons to leave.

    Args:
        sizes: The workers; of each number of them that will do.
        home: Ray's name of the driver's own node.
        grow: When to take more workers, as `cluster.grow`.
        is_fit: Whether workers may go to the node of an id.
    """

    def __init__(
        self,
        sizes: Sequence[WorkerGroupSpec],
        *,
        home: str,
        grow: Literal["checkpoint", "now", "never"],
        is_fit: Callable[[str], bool] = lambda _node: True,
    ) -> None:
        self._sizes = {spec.workers: spec for spec in sizes}
        self._home = home
        self._grow = grow
        self._is_fit = is_fit
        self._drain_looked_s = 0.0
        self._going: dict[str, float | None] = {}
        self._room_looked_s = 0.0
        self._search: Future[tuple[Node, ...]] | None = None
        self._saves: int | None = None
        self._avoided: frozenset[str] = frozenset()

    def avoid(self, nodes: frozenset[str]) -> None:
        """Takes no workers on these nodes, and on any other, from now on."""
        self._avoided = nodes

    def stop_growing(self) -> None:
        """Takes no more workers from now on."""
        self._grow = "never"

    def look_home(self) -> End | None:
        """Gives why the run is to end, if the driver's own node goes; to be called often."""
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
            return end_of_draining(self._home, self._draining())
        return None

    def look(self, seats: Sequence[Seat], *, saves: int) -> Leave | None:
        """Gives a reason to leave, if there is one now; to be called often.

        Args:
            seats: Where the workers run.
            saves: How many times the run has saved more than before.
        """
        if not seats:
            return None
        # Ray's control server may be away for a while: what it would tell is told later.
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
            return self._look(seats, saves)
        return None

    def _look(self, seats: Sequence[Seat], saves: int) -> Leave | None:
        if leave := leave_of_draining(seats, self._draining()):
            return leave
        if self._grow == "never" or len(seats) >= max(self._sizes):
            return None
        return self._look_for_room(seats, saves, time.monotonic())

    def _draining(self) -> dict[str, float | None]:
        """The nodes that will be taken away, by a look of some seconds ago, and when by now."""
        now = time.monotonic()
        if now - self._drain_looked_s >= _DRAIN_LOOK_S:
            self._drain_looked_s, self._going = now, {}
            self._going = draining_nodes()
        passed_s = now - self._drain_looked_s
        return {
            node: None if left_s is None else left_s - passed_s
            for node, left_s in self._going.items()
        }

    def _look_for_room(self, seats: Sequence[Seat], saves: int, now: float) -> Leave | None:
        # In a thread, since a node that does not answer takes seconds.
        if self._search is None:
            if now - self._room_looked_s >= _ROOM_LOOK_S:
                pool = ThreadPoolExecutor(1, thread_name_prefix="room")
                self._search = pool.submit(free_nodes)
                pool.shutdown(wait=False)
            return None
        if not self._search.done():
            return None
        search, self._search, self._room_looked_s = self._search, None, now
        free = [
            node
            for node in search.result()
            if node.id not in self._avoided and self._is_fit(node.id)
        ]
        own = [seat.node for seat in seats]
        nodes = with_own(free, own, self._sizes[len(seats)])
        most = max(sizes_that_fit(self._sizes.values(), nodes), default=0)
        if most <= len(seats):
            self._saves = None
            return None
        self._saves = saves if self._saves is None else self._saves
        if self._grow == "checkpoint" and saves <= self._saves:
            return None
        self._saves = None
        return Leave(kind="resize", reason=f"there is room for {most} of them", workers=most)


def leave_of_draining(seats: Sequence[Seat], going: dict[str, float | None]) -> Leave | None:
    """The reason to leave, if a node of the workers goes.

    Args:
        seats: Where the workers run.
        going: The nodes that go, and in how many seconds, if that is known. A time that is over
            tells that clocks differ, and no more.
    """
    ranks = [rank for rank, seat in enumerate(seats) if seat.node in going]
    if not ranks:
        return None
    place = ", ".join(sorted({seats[rank].address for rank in ranks}))
    when, grace_s = _in_time([going[seats[rank].node] for rank in ranks])
    return Leave(
        kind="preemption",
        reason=f"{place} ({format_ranks(ranks)}) is taken away{when}",
        grace_s=grace_s,
    )


def end_of_draining(home: str, going: dict[str, float | None]) -> End | None:
    """The reason to end, if the driver's own node goes, with ranks or without.

    Args:
        home: Ray's name of that node.
        going: As `leave_of_draining` takes it.
    """
    if home not in going:
        return None
    when, grace_s = _in_time([going[home]])
    return End(reason=f"the node of this launch is taken away{when}", grace_s=grace_s)


def _in_time(told_s: Sequence[float | None]) -> tuple[str, float | None]:
    """When the first goes, in words, and how long is left to end before it does."""
    known = [left_s for left_s in told_s if left_s is not None and left_s > 0]
    if not known:
        return "", None
    return f" in {min(known):.0f} s", max(1.0, min(known) - _MARGIN_S)


def with_own(free: Sequence[Node], own: Sequence[str], spec: WorkerGroupSpec) -> tuple[Node, ...]:
    """What nodes would have free, had the workers left.

    Args:
        free: What is free on each now.
        own: The node of each worker.
        spec: What a worker has.
    """
    return tuple(
        replace(
            node,
            cpus=node.cpus + own.count(node.id) * spec.cpus,
            gpus=node.gpus + own.count(node.id) * spec.gpus,
        )
        for node in free
    )


def format_ranks(ranks: Sequence[int]) -> str:
    """Ranks in words, a whole row of them by its ends."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
