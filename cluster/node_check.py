"""A look at nodes before workers are placed on them: what is asked of each, and what came of it.

What there is to see, and what of it makes a node unfit, is the caller's to say (`NodeCheck`). Who
asks the nodes is `cluster.ray_gate`; where this machine is the only one, this process looks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.contract import Payload


class UnfitNodes(ValueError):
    """Without nodes that cannot take part in the run there is no room for its workers."""


@dataclass(frozen=True, kw_only=True)
class NodePlace:
    """A node, as it is told of itself before it looks.

    Attributes:
        address: As the other nodes know it; "" where there are no others.
        workers: How many workers it may get.
        gpus: How many GPUs it counts as having.
        peer: `host:port` of another node, which it is to reach; "" for none.
    """

    address: str
    workers: int
    gpus: int
    peer: str = ""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What came of a look at a node.

    Attributes:
        node: Names the node among those of the cluster.
        place: What it was told.
        report: What it saw of itself; None if it did not answer.
        error: Why it did not.
        ahead_s: By how many seconds at least its clock is ahead of the caller's; negative if it
            is behind.
        peer: Names the node behind `place.peer`.
    """

    node: str
    place: NodePlace
    report: Payload | None
    error: str = ""
    ahead_s: float = 0.0
    peer: str = ""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What is made of sights.

    Attributes:
        unfit: Why nodes cannot take part: clauses that name the node, by the node's id.
        warnings: What else is amiss, likewise.
        table: All nodes that answered, a line each.
    """

    unfit: Mapping[str, tuple[str, ...]]
    warnings: Mapping[str, tuple[str, ...]]
    table: str


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """What to look for on each node.

    Attributes:
        look: Looks at the node that it is called on: an importable function, whose module loads
            fast, for nobody trains before it has come back.
        payload: What it needs.
        judge: Judges sights, in the caller's process. It may compare nodes with the first of them
            that answered, so where some come later, that of one that is fit is given first.
    """

    look: Callable[[NodePlace, Payload], Payload]
    payload: Payload
    judge: Callable[[Sequence[Sight]], Judgement]


def check_this_machine(
    check: NodeCheck, *, workers: int, gpus: int, report: Callable[[str], None]
) -> None:
    """Look at this machine, which is to have all of the workers.

    Args:
        check: What to look for.
        workers: How many they are.
        gpus: How many GPUs they take together.
        report: Takes a line for each thing that is amiss.

    Raises:
        UnfitNodes: It cannot train this run.
    """
    place = NodePlace(address="", workers=workers, gpus=gpus)
    sight = Sight(node="here", place=place, report=check.look(place, check.payload))
    judgement = check.judge([sight])
    report_warnings(judgement, [sight.node], report)
    if faults := judgement.unfit.get(sight.node):
        raise UnfitNodes(f"This machine cannot train this run: {'; '.join(faults)}.")


def report_warnings(
    judgement: Judgement, nodes: Sequence[str], report: Callable[[str], None]
) -> None:
    """Tell what is amiss on nodes that can take part all the same."""
    for node in nodes:
        for text in judgement.warnings.get(node, ()):
            report(f"warning: {text}")
