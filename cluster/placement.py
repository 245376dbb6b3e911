"""Where the experts of each scale are: on every rank, or in shards over neighbouring ranks."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product


class PlacementError(ValueError):
    """A placement that cannot work, with numbers and the nearest one that can."""


@dataclass(frozen=True)
class Placement:
    """Over how many ranks each scale's experts are sharded.

    E consecutive ranks, from a multiple of E on, are an expert group: each holds 1/E of the scale's
    experts, rank r shard r mod E, and computes with it for the tokens of the whole group.

    Attributes:
        ranks: E of every scale, coarse to fine; 1 where every rank holds the experts whole.
    """

    ranks: tuple[int, ...]

    @classmethod
    def of(cls, sharded: Mapping[int, int], *, scales: int) -> "Placement":
        """Make a placement of {scale: E}; scales that are not named are replicated.

        Args:
            sharded: E by scale, in the paper's numbering (0 is the finest).
            scales: Number of scales, K.

        Raises:
            PlacementError: A scale does not exist, or E is less than 1.
        """
        stray = {k: ranks for k, ranks in sharded.items() if k not in range(scales) or ranks < 1}
        if stray:
            kept = {k: ranks for k, ranks in sharded.items() if k not in stray}
            raise PlacementError(
                f"placement={_entries(sharded)} has {_entries(stray)}, but the scales are 0 "
                f"(finest) to {scales - 1} and each is sharded over at least 1 rank; without that "
                f"it is {cls.of(kept, scales=scales)}"
            )
        return cls(tuple(sharded.get(k, 1) for k in reversed(range(scales))))

    @property
    def sharded(self) -> dict[int, int]:
        """E of the scales that are sharded, by the paper's number, coarse to fine."""
        finest = len(self.ranks) - 1
        return {finest - i: ranks for i, ranks in enumerate(self.ranks) if ranks > 1}

    @property
    def unit(self) -> int:
        """How many consecutive ranks must share a node, so that no expert group spans two."""
        return math.lcm(*self.ranks)

    def __str__(self) -> str:
        return _entries(self.sharded) if self.sharded else "replicated"


def expert_group(rank: int, ranks: int) -> range:
    """Ranks that hold the shards of a scale sharded over `ranks`, `rank` among them."""
    first = rank - rank % ranks
    return range(first, first + ranks)


def replica_ranks(rank: int, ranks: int, world_size: int) -> range:
    """Ranks that hold the same shard as `rank`: they reduce its gradients among themselves."""
    return range(rank % ranks, world_size, ranks)


def check_placement(
    placement: Placement,
    *,
    width: int,
    hidden: int,
    world_size: int,
    ranks_per_node: int,
    tied: Collection[int] = (),
) -> None:
    """Refuse a placement that a model or a cluster cannot hold.

    The number of heads need not be a multiple of E: attention is local, every rank has all heads of
    its own images.

    Args:
        placement: E of every scale.
        width: Width of a token.
        hidden: Width of the MLP's hidden layer.
        world_size: Number of ranks.
        ranks_per_node: How many of them are on one node.
        tied: Scales that share weights.

    Raises:
        PlacementError: With the numbers and the nearest placement that works.
    """
    reasons = []
    for k, ranks in placement.sharded.items():
        for name, size in (
            ("the width of", width),
            ("the MLP's hidden width of", hidden),
            ("the number of ranks, which is", world_size),
        ):
            if size % ranks:
                reasons.append(f"scale {k}'s E={ranks} does not divide {name} {size}")
    if ranks_per_node % placement.unit:
        reasons.append(
            f"{placement.unit} consecutive ranks would have to share a node, which has "
            f"{ranks_per_node}: expert groups must not span nodes"
        )
    if len({placement.sharded.get(k, 1) for k in tied}) > 1:
        reasons.append(f"scales {_join(tied)} share weights, so they must have the same E")
    if reasons:
        nearest = _nearest(
            placement,
            possible=possible_ranks(
                width=width, hidden=hidden, world_size=world_size, ranks_per_node=ranks_per_node
            ),
            tied=tied,
        )
        raise PlacementError(
            f"placement={placement} cannot work: {'; '.join(reasons)}. The nearest that does is "
            f"{nearest}"
        )


def possible_ranks(
    *, width: int, hidden: int, world_size: int, ranks_per_node: int
) -> tuple[int, ...]:
    """List every E that a scale can have; the groups of any two of them nest in a node."""
    common = math.gcd(width, hidden, world_size, ranks_per_node)
    return tuple(ranks for ranks in range(1, common + 1) if common % ranks == 0)


def possible_placements(
    scales: int, *, possible: Collection[int], tied: Collection[int] = ()
) -> list[Placement]:
    """List all placements of E's that are possible, with the same E for scales that are tied."""
    finest = scales - 1
    every = map(Placement, product(possible, repeat=scales))
    return [p for p in every if len({p.ranks[finest - k] for k in tied}) <= 1]


def _nearest(
    placement: Placement, *, possible: Collection[int], tied: Collection[int]
) -> Placement:
    """Find the placement that changes the sizes of shards by the smallest factors."""

    def distance(other: Placement) -> tuple[float, int]:
        factors = (abs(math.log(a / b)) for a, b in zip(other.ranks, placement.ranks, strict=True))
        return sum(factors), sum(other.ranks)

    return min(
        possible_placements(len(placement.ranks), possible=possible, tied=tied), key=distance
    )


def _entries(ranks: Mapping[int, int]) -> str:
    # As it is written on a command line, in quotes: engine.placement={2:4,1:2}
    return "{" + ",".join(f"{k}:{count}" for k, count in ranks.items()) + "}"


def _join(scales: Collection[int]) -> str:
    return " and ".join(map(str, sorted(scales)))
