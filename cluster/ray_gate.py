"""Which nodes of a joined cluster may get workers: those that were looked at, and are fit.

Runs in the driver. It has each node look at itself (`cluster.node_check`), all at once, before the
first workers start, and each that comes later before any worker is placed on it. The controller
learns by the mailbox which nodes are admitted. Unfit ones are left out where the others have room
for the workers, and looked at again now and then, for somebody may mend them.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.assignment import Node, WorkerGroupSpec, sizes_that_fit
from cluster.contract import Payload
from cluster.node_check import (
    Judgement,
    NodeCheck,
    NodePlace,
    Sight,
    UnfitNodes,
    report_warnings,
)
from cluster.ray_mailbox import Mailbox
from cluster.ray_nodes import live_nodes, node_doors

_TICK_S = 0.1
_LOOK_S = 1.0
"""How often it looks for nodes that have come."""
_AGAIN_S = 60.0
"""After how long an unfit node is looked at again."""


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A node that was asked and has not answered.

    Attributes:
        node: Its id.
        place: What it was told.
        peer: The id of the node that it is to reach.
        at_s: When, by this machine's clock, in seconds since 1970.
        until_s: When it counts as silent, on a monotonic clock.
    """

    node: str
    place: NodePlace
    peer: str
    at_s: float
    until_s: float


class NodeGate:
    """Looks at nodes, and says which are fit.

    Args:
        check: What to look for.
        sizes: The workers; of each number of them that will do.
        mailbox: Takes which nodes are admitted.
        patience_s: How long a node may take to answer.
        report: Takes lines for a person.
    """

    def __init__(
        self,
        check: NodeCheck,
        sizes: Sequence[WorkerGroupSpec],
        mailbox: Mailbox,
        *,
        patience_s: float,
        report: Callable[[str], None],
    ) -> None:
        self._check = check
        self._sizes = sizes
        self._mailbox = mailbox
        self._patience_s = patience_s
        self._report = report
        self._asked: dict[Any, _Asked] = {}
        self._sights: dict[str, Sight] = {}
        self._fit: set[str] = set()
        self._unfit: dict[str, tuple[str, ...]] = {}
        self._seen_s: dict[str, float] = {}
        self._looked_s = 0.0
        self._reference: Sight | None = None

    def open(self, nodes: Sequence[Node], stop: threading.Event) -> tuple[Node, ...] | None:
        """Looks at all nodes that could have a worker.

        Args:
            nodes: The live nodes, each with all that it has.
            stop: Ends the wait for them.

        Returns:
            Those that are fit; None if a stop was asked for.

        Raises:
            UnfitNodes: They have no room for the workers.
        """
        here = ray.get_runtime_context().get_node_id()
        asked = sorted(self._able(nodes), key=lambda node: (node.id != here, node.address))
        self._ask(asked)
        sights: dict[str, Sight] = {}
        while len(sights) < len(asked):
            if stop.is_set():
                return None
            sights |= self._collect(_TICK_S)
        ordered = [sights[node.id] for node in asked]
        judgement = self._take(ordered)
        self._reference = next((one for one in ordered if one.node in self._fit), None)
        if len(ordered) > 1:
            for line in judgement.table.splitlines():
                self._report(line)
        report_warnings(judgement, sorted(self._fit), self._report)
        fit = tuple(node for node in asked if node.id in self._fit)
        faults = [fault for one in ordered for fault in judgement.unfit.get(one.node, ())]
        if not sizes_that_fit(self._sizes, fit):
            raise UnfitNodes(_refusal(faults, asked, fit, self._sizes[0]))
        for fault in faults:
            self._report(f"warning: no worker goes to {fault}")
        return fit

    @property
    def left_out(self) -> int:
        """How many nodes are not fit."""
        return len(self._unfit)

    def is_fit(self, node: str) -> bool:
        """Whether a node may get workers."""
        return node in self._fit

    def look(self) -> None:
        """Looks at nodes that have come meanwhile; to be called often, and does not wait."""
        # Ray's control server may be away for a while: what it would tell is told later.
        with contextlib.suppress(ray.exceptions.RayError, RuntimeError):
            self._look_for_others()
            if self._asked and (sights := self._collect(0)):
                self._admit_later(list(sights.values()))

    def _look_for_others(self) -> None:
        now = time.monotonic()
        if now - self._looked_s < _LOOK_S:
            return
        self._looked_s = now
        asked = {one.node for one in self._asked.values()}
        self._ask(
            [
                node
                for node in self._able(live_nodes())
                if node.id not in self._fit | asked
                and now - self._seen_s.get(node.id, float("-inf")) >= _AGAIN_S
            ]
        )

    def _admit_later(self, sights: Sequence[Sight]) -> None:
        known = {one.node: self._unfit.get(one.node) for one in sights}
        judgement = self._take(sights)
        for sight in sights:
            faults = judgement.unfit.get(sight.node, ())
            if not faults:
                self._report(f"{sight.place.address} has come, and is fit for workers")
            elif faults != known[sight.node]:
                for fault in faults:
                    self._report(f"warning: no worker goes to {fault}")
        report_warnings(judgement, sorted(self._fit.intersection(known)), self._report)

    def _able(self, nodes: Sequence[Node]) -> list[Node]:
        """Those that could have a worker, or rather a group of them."""
        return [node for node in nodes if self._workers(node) > 0]

    def _workers(self, node: Node) -> int:
        return max(
            min(spec.workers, spec.groups_that_fit(node) * spec.group_size) for spec in self._sizes
        )

    def _ask(self, nodes: Sequence[Node]) -> None:
        if not nodes:
            return
        doors = node_doors()
        # Each is to reach the next one of all that there are, and the last the first.
        ring = [*nodes, *(node for node in self._able(live_nodes()) if node.id in self._fit)]
        task = ray.remote(num_cpus=0, max_retries=0)(_look)
        for index, node in enumerate(nodes):
            peer = ring[(index + 1) % len(ring)]
            place = NodePlace(
                address=node.address,
                workers=self._workers(node),
                gpus=int(node.gpus) if self._sizes[0].gpus else 0,
                peer=doors.get(peer.id, "") if peer.id != node.id else "",
            )
            pinned = task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            )
            self._asked[pinned.remote(self._check.look, place, self._check.payload)] = _Asked(
                node=node.id,
                place=place,
                peer=peer.id,
                at_s=time.time(),
                until_s=time.monotonic() + self._patience_s,
            )

    def _collect(self, timeout_s: float) -> dict[str, Sight]:
        """The sights that have come, of nodes that answer, that failed to, and that were silent."""
        calls = list(self._asked)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=timeout_s, fetch_local=False)
        now = time.monotonic()
        silent = {call for call, asked in self._asked.items() if now > asked.until_s}
        sights = {}
        for call in {*ready, *silent}:
            asked = self._asked.pop(call)
            sights[asked.node] = self._sight(call, asked, is_silent=call not in ready)
        return sights

    def _sight(self, call: Any, asked: _Asked, *, is_silent: bool) -> Sight:
        if is_silent:
            ray.cancel(call, force=True)
            text = f"it has not answered for {self._patience_s:g} s (cluster.preflight_s)"
            return Sight(node=asked.node, place=asked.place, report=None, error=text)
        try:
            report, clock_s = ray.get(call)
        except ray.exceptions.RayError as error:
            return Sight(node=asked.node, place=asked.place, report=None, error=_reason(error))
        # Of its time is known that it lies between the question and the answer.
        ahead_s = max(0.0, clock_s - time.time()) + min(0.0, clock_s - asked.at_s)
        return Sight(
            node=asked.node, place=asked.place, report=report, ahead_s=ahead_s, peer=asked.peer
        )

    def _take(self, sights: Sequence[Sight]) -> Judgement:
        """Judges sights and admits the nodes that are fit."""
        compared = [] if self._reference is None else [self._reference]
        judgement = self._check.judge([*compared, *sights])
        for sight in sights:
            self._seen_s[sight.node] = time.monotonic()
            if faults := judgement.unfit.get(sight.node):
                self._unfit[sight.node] = faults
            else:
                self._unfit.pop(sight.node, None)
                self._fit.add(sight.node)
        self._mailbox.admit(frozenset(self._fit))
        return judgement


def _look(
    look: Callable[[NodePlace, Payload], Payload], place: NodePlace, payload: Payload
) -> tuple[Payload, float]:
    """Looks, on the node; also gives the time there."""
    return look(place, payload), time.time()


def _reason(error: ray.exceptions.RayError) -> str:
    """Why a node did not answer, in one clause."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ImportError):
        return (
            f"it does not find this process's code ({cause}): start the launch in the directory of "
            "the code, which all nodes have, or by `ray job submit --working-dir .`"
        )
    text = " ".join(str(error if cause is None else cause).split())[:300]
    return f"it could not be looked at: {type(cause or error).__name__}: {text}"


def _refusal(
    faults: Sequence[str], asked: Sequence[Node], fit: Sequence[Node], spec: WorkerGroupSpec
) -> str:
    if len(asked) == 1:
        return f"The only node cannot train this run: {'; '.join(faults)}."
    room = spec.groups_that_fit(*fit) * spec.group_size
    return (
        f"{len(asked)} nodes cannot train together: {'; '.join(faults)}. The others have room for "
        f"{room} of {spec.workers} workers."
    )
