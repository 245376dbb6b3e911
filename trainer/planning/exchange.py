"""The collectives in which expert groups exchange tokens in one training step, by formula."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

from cluster.placement import Placement
from trainer.planning.workload import Workload

Kind: TypeAlias = Literal["all_gather", "all_to_all", "reduce_scatter"]

KINDS: tuple[Kind, ...] = get_args(Kind)
"""The kinds of collectives that expert groups exchange tokens with."""


class Bundle(NamedTuple):
    """Scales whose tokens travel side by side, in the same collectives.

    Attributes:
        ranks: E of all of them.
        positions: The scales, by their places coarse to fine.
        ahead: Whether they go ahead of the finest scale.
        recomputed: Whether their experts are recomputed.
    """

    ranks: int
    positions: tuple[int, ...]
    ahead: bool
    recomputed: bool


def bundles(workload: Workload, placement: Placement) -> list[Bundle]:
    """Tell which scales travel together: those with the same E, of neighbours recomputed alike.

    The finest scale goes through a block after the others, and so alone, unless all depend on one
    another.
    """
    finest = len(placement.ranks) - 1
    members: dict[tuple[bool, int, int], list[int]] = {}
    run, before = 0, None
    for position, (load, ranks) in enumerate(zip(workload.scales, placement.ranks, strict=True)):
        ahead = workload.coarse_ahead and position < finest
        alike = (ahead, load.activation_checkpointing)
        run, before = run + (alike != before), alike
        if ranks > 1:
            members.setdefault((ahead, run, ranks), []).append(position)
    return [
        Bundle(ranks, tuple(own), ahead, workload.scales[own[0]].activation_checkpointing)
        for (ahead, _, ranks), own in members.items()
    ]


class Leg(NamedTuple):
    """One collective.

    Attributes:
        kind: What it is.
        sent: Bytes that leave a rank.
    """

    kind: Kind
    sent: float


class Legs(NamedTuple):
    """The collectives of a bundle in one block, in their order.

    Attributes:
        forward: To gather tokens, to return queries, keys and values; to gather the MLP's tokens,
            to sum its outputs.
        again: Those of them that recomputation repeats.
        backward: To gather the gradient of the MLP's outputs, to sum that of its inputs; to deal
            the gradient of queries, keys and values, to sum that of the tokens.
    """

    forward: tuple[Leg, ...]
    again: tuple[Leg, ...]
    backward: tuple[Leg, ...]


def block_legs(workload: Workload, bundle: Bundle, images: Sequence[float]) -> Legs:
    """Count what a rank sends for a bundle in each block but the first, which is whole.

    To gather x numbers, (E - 1) x leave a rank, and as many to sum x; to return x numbers, of
    which each rank of the group has made 1/E, (E - 1) x / E. For T tokens of a rank, all scales
    together, the forward pass gathers T d, returns 3 T d, gathers T d and sums T d. The backward
    pass gathers T d and sums T d, returns 3 T d and sums T d. What the forward pass gathered is
    gathered again in the same two collectives, 2 T d, unless it was kept.

    Args:
        workload: The step.
        bundle: The scales.
        images: Images of a rank that carry each scale, coarse to fine.
    """
    tokens = sum(images[i] * workload.scales[i].tokens for i in bundle.positions)
    once = (bundle.ranks - 1) * workload.element_bytes * workload.width * tokens
    returned, regathered = 3 * once / bundle.ranks, once if workload.regathers else 0
    forward = (
        Leg("all_gather", once),
        Leg("all_to_all", returned),
        Leg("all_gather", once),
        Leg("reduce_scatter", once),
    )
    backward = (
        Leg("all_gather", once + regathered),
        Leg("reduce_scatter", once),
        Leg("all_to_all", returned + regathered),
        Leg("reduce_scatter", once),
    )
    return Legs(forward, forward if bundle.recomputed else (), backward)


def modulation_legs(
    workload: Workload, own: Sequence[Bundle], images: Sequence[float]
) -> tuple[tuple[Leg, ...], tuple[Leg, ...]]:
    """Count what a rank sends for the modulation of all blocks but the first, once in a pass.

    The forward pass gathers the condition of the images and returns (L - 1) 6 d numbers of each
    image and scale; the backward pass returns as many and sums the condition's gradient. Modulation
    that all blocks share is whole.

    Args:
        workload: The step.
        own: The bundles that go ahead of the finest scale, or the others.
        images: Images of a rank that carry each scale, coarse to fine.

    Returns:
        Collectives of the forward and of the backward pass.
    """
    forward: list[Leg] = []
    backward: list[Leg] = []
    blocks = 0 if workload.shared_modulation else workload.depth - 1
    together: dict[int, list[float]] = {}
    for bundle in own:
        carried = together.setdefault(bundle.ranks, [])
        carried.extend(images[position] for position in bundle.positions)
    for ranks, carried in together.items():
        if blocks:
            once = (ranks - 1) * workload.element_bytes * workload.width
            returned = Leg("all_to_all", once * 6 * blocks * sum(carried) / ranks)
            forward += [Leg("all_gather", once * max(carried)), returned]
            backward += [returned, Leg("reduce_scatter", once * max(carried))]
    return tuple(forward), tuple(backward)


def all_legs(
    workload: Workload, placement: Placement, images: Sequence[float]
) -> Iterator[tuple[Leg, int]]:
    """List every collective of expert groups in one pass, and how often it occurs."""
    every = bundles(workload, placement)
    if workload.depth > 1:
        for bundle in every:
            for leg in (leg for legs in block_legs(workload, bundle, images) for leg in legs):
                yield leg, workload.depth - 1
    for ahead in (True, False):
        own = [bundle for bundle in every if bundle.ahead == ahead]
        for direction in modulation_legs(workload, own, images):
            for leg in direction:
                yield leg, 1


def exchange_calls(workload: Workload, placement: Placement) -> dict[str, int]:
    """Count the collectives of expert groups in the forward and backward pass of a micro-batch."""
    calls: dict[str, int] = dict.fromkeys(KINDS, 0)
    for leg, times in all_legs(workload, placement, [1] * len(workload.scales)):
        calls[leg.kind] += times
    return calls


def exchange_bytes(
    workload: Workload, placement: Placement, *, images: Sequence[int]
) -> dict[str, int]:
    """Count the bytes that leave a rank in one training step to exchange tokens of experts.

    Args:
        workload: The step.
        placement: Where the experts are.
        images: Images of a rank that carry each scale in the whole step, coarse to fine.

    Returns:
        Bytes by kind of collective: exact, as sent by an implementation that sends to each of the
        other ranks of the group what it needs.
    """
    totals: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for leg, times in all_legs(workload, placement, images):
        totals[leg.kind] += times * leg.sent
    return {kind: round(sent) for kind, sent in totals.items()}
