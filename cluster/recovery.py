"""What follows a fault: decisions alone, no effects, and no clock but the one that faults carry.

A run has two budgets. Failures in a row are bounded by `cluster.max_failures`, losses that were
announced by `cluster.max_preemptions`. Each new checkpoint of the run gives one back to both, so a
month of single faults never ends a run, while one that gets no further does soon. A start that
fails is charged to neither: it is tried again until `cluster.room_timeout_s` have passed without
workers. Failing again after the very same images is no fault of the cluster, and ends the run
after `cluster.max_failures_in_place` times. A node on which `cluster.max_failures_of_node` failures
in a row began, and none elsewhere meanwhile, is avoided as long as others suffice. To this a start
counts that a node's workers did not come to. Where more workers than trained before make no update,
as many as did start again, and no more are taken: that is charged to nothing.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from cluster.contract import ClusterConfig

_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 300.0

FaultKind: TypeAlias = Literal["crash", "node", "start", "preemption", "resize"]
"""A worker died or raised; a node was lost with its workers; the workers could not be started; the
workers left because a node is being taken away, or because there is room for more of them."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why the workers have to be started again.

    Attributes:
        kind: What happened.
        at_s: When, on a monotonic clock.
        images: After how many images of the run; None if none of this attempt was trained.
        blur_images: How far apart these may be told where two faults come at the same update: one
            rank may have ended it, and the driver is told now and then.
        saves: How many times the run has saved more images than ever before.
        node: On which node it began; None if that is not known.
        workers: How many there were; 0 if they were not there yet.
        proven: How many there were when an update was last made; 0 before the first.
    """

    kind: FaultKind
    at_s: float
    images: int | None = None
    blur_images: int = 0
    saves: int = 0
    node: str | None = None
    workers: int = 0
    proven: int = 0


@dataclass(frozen=True, kw_only=True)
class History:
    """What earlier faults have used up.

    Attributes:
        failures: Crashes and lost nodes, less what new checkpoints gave back.
        preemptions: Announced losses, likewise.
        saves: `Fault.saves` of the last fault.
        in_place: How many crashes in a row came after the same images.
        images: After which.
        starts: How many starts in a row have failed.
        starting_s: When the first of these failed.
        node: On which node the last failure began.
        of_node: How many failures in a row began there.
        avoided: The nodes that are avoided.
    """

    failures: int = 0
    preemptions: int = 0
    saves: int = 0
    in_place: int = 0
    images: int | None = None
    starts: int = 0
    starting_s: float = 0.0
    node: str | None = None
    of_node: int = 0
    avoided: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do after a fault.

    Attributes:
        action: Start the workers again, or give the run up.
        wait_s: How long to wait before.
        reason: In words, with the setting that decides.
        avoids: The node that is avoided from now on; None if there is no new one.
        most: No more workers than these are started from now on; None if that does not change.
    """

    action: Literal["retry", "stop"]
    reason: str
    wait_s: float = 0.0
    avoids: str | None = None
    most: int | None = None


def decide(history: History, fault: Fault, config: ClusterConfig) -> tuple[History, Decision]:
    """Decides what follows a fault.

    Args:
        history: What was returned for the fault before; a new one for the first.
        fault: What happened.
        config: The budgets.

    Returns:
        What to give with the next fault, and the decision.
    """
    healed = max(0, fault.saves - history.saves)
    history = replace(
        history,
        failures=max(0, history.failures - healed),
        preemptions=max(0, history.preemptions - healed),
        saves=max(fault.saves, history.saves),
        in_place=0 if healed else history.in_place,
    )
    if _has_outgrown(fault):
        return replace(history, starts=0), Decision(
            action="retry",
            reason=f"no update was made with {fault.workers} workers",
            most=fault.proven,
        )
    if fault.kind == "start":
        return _after_start(history, fault, config)
    history = replace(history, starts=0)
    if fault.kind == "resize":
        return history, Decision(action="retry", reason="there is room for more of them")
    if fault.kind == "preemption":
        return _after_preemption(history, config)
    return _after_failure(history, fault, config)


def _has_outgrown(fault: Fault) -> bool:
    """Whether more workers than trained before failed, and had made no update."""
    if fault.kind in ("preemption", "resize"):
        return False
    return fault.workers > fault.proven > 0 and fault.images is None


def _after_start(history: History, fault: Fault, config: ClusterConfig) -> tuple[History, Decision]:
    since = history.starting_s if history.starts else fault.at_s
    history = replace(history, starts=history.starts + 1, starting_s=since)
    history, avoids = _blame(history, fault, config)
    passed = fault.at_s - since
    if passed >= config.room_timeout_s:
        return history, Decision(
            action="stop",
            reason=f"no start has succeeded for {passed:.0f} s "
            f"(cluster.room_timeout_s={config.room_timeout_s:g})",
        )
    return history, Decision(
        action="retry",
        reason=f"failed starts are not counted for {config.room_timeout_s:g} s "
        "(cluster.room_timeout_s)",
        wait_s=_wait_s(history.starts + 1),
        avoids=avoids,
    )


def _after_preemption(history: History, config: ClusterConfig) -> tuple[History, Decision]:
    history = replace(history, preemptions=history.preemptions + 1)
    return history, _spend(
        history.preemptions,
        config.max_preemptions,
        of="announced losses",
        setting="cluster.max_preemptions",
    )


def _after_failure(
    history: History, fault: Fault, config: ClusterConfig
) -> tuple[History, Decision]:
    if fault.kind == "crash":
        before = history.in_place if _is_in_place(history, fault) else 0
        in_place = 0 if fault.images is None else before + 1
        history = replace(history, in_place=in_place, images=fault.images)
    history = replace(history, failures=history.failures + 1)
    history, avoids = _blame(history, fault, config)
    if fault.kind == "crash" and history.in_place >= config.max_failures_in_place > 0:
        return history, Decision(
            action="stop",
            reason=f"it is failure {history.in_place} in a row after the same {fault.images:,} "
            f"images (cluster.max_failures_in_place={config.max_failures_in_place}), so the cause "
            "is in the run and not in the cluster",
        )
    decision = _spend(
        history.failures, config.max_failures, of="failures", setting="cluster.max_failures"
    )
    return history, replace(decision, avoids=avoids)


def _is_in_place(history: History, fault: Fault) -> bool:
    """Whether a crash came at the update of the one before."""
    if history.images is None or fault.images is None:
        return False
    return abs(fault.images - history.images) <= fault.blur_images


def _blame(history: History, fault: Fault, config: ClusterConfig) -> tuple[History, str | None]:
    """Counts a failure against the node where it began; gives the node if it is one too many."""
    node = fault.node
    if node is None:
        return history, None
    of_node = history.of_node + 1 if node == history.node else 1
    history = replace(history, node=node, of_node=of_node)
    if not 0 < config.max_failures_of_node <= of_node or node in history.avoided:
        return history, None
    return replace(history, avoided=history.avoided | {node}), node


def readmit(history: History) -> History:
    """Avoids no node any more, since the others did not suffice."""
    return replace(history, node=None, of_node=0, avoided=frozenset())


def _spend(spent: int, allowed: int, *, of: str, setting: str) -> Decision:
    if spent > allowed:
        return Decision(
            action="stop",
            reason=f"{setting}={allowed} {of} are spent, and no new checkpoint gave one back",
        )
    return Decision(
        action="retry",
        reason=f"{spent} of {allowed} {of} ({setting}; each new checkpoint gives one back)",
        wait_s=_wait_s(spent),
    )


def _wait_s(spent: int) -> float:
    """Nothing for the first, since speed counts; then twice as long each time."""
    return 0.0 if spent <= 1 else min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(spent - 2, 16))


def must_readmit(
    fitting: Collection[int], ever: Collection[int], *, waited_s: float, patience_s: float
) -> bool:
    """Decides whether nodes that are avoided have to be used.

    Args:
        fitting: For which numbers of workers the other nodes have room.
        ever: For which they would, were they idle.
        waited_s: How long room on them has been waited for.
        patience_s: How long that is worth it.
    """
    return not fitting and (not ever or waited_s >= patience_s)


def choose_workers(
    allowed: Sequence[int],
    fitting: Collection[int],
    *,
    wanted: int,
    waited_s: float,
    patience_s: float,
) -> int | None:
    """Decides how many workers to start.

    Args:
        allowed: With how many the run can be trained.
        fitting: For which of these there is room.
        wanted: How many there were before, or are to be now.
        waited_s: How long more room has been waited for.
        patience_s: How long that is worth it.

    Returns:
        As many as fit, if these are no fewer than wanted, or if more did not come; None to wait.
    """
    most = max((count for count in allowed if count in fitting), default=None)
    if most is None or (most < wanted and waited_s < patience_s):
        return None
    return most
