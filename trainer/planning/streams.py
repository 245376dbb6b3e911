"""The work of one pass, forward and backward, in the order in which streams of a GPU do it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeAlias

from cluster.hardware import HardwareConfig
from cluster.placement import Placement
from trainer.planning.exchange import Bundle, Leg, block_legs, bundles, modulation_legs
from trainer.planning.workload import Workload

LATENCY_S = 20e-6
"""Start of a collective between GPUs of a node, which small messages wait for."""

QKV, MIX, MLP = range(3)
"""The parts of a block: queries, keys and values; attention and what is behind it; the MLP."""


class Travel(NamedTuple):
    """Collectives that follow one another.

    Attributes:
        link: Seconds that they have the link between the GPUs of a node for, alone.
        start: Seconds that their starts take, in which the link is free.
    """

    link: float = 0.0
    start: float = 0.0

    @property
    def seconds(self) -> float:
        """How long they take, alone."""
        return self.link + self.start


def join(travels: Iterable[Travel]) -> Travel:
    """Put collectives one after another."""
    link, start = 0.0, 0.0
    for each in travels:
        link += each.link
        start += each.start
    return Travel(link, start)


NOTHING = Travel()
_NONE = (NOTHING,) * 4


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What one stream does in a block, and beside the blocks; all times in seconds.

    Attributes:
        compute: Forward pass of a block: queries, keys and values; attention with the projection
            behind it; MLP. The backward pass takes twice as long.
        again: What is computed again of it in the backward pass.
        forward: Collectives of a block but the first: before and after the first part, before and
            after the last one.
        repeated: The same, where recomputation repeats them.
        backward: The backward pass's: before and after the last part, before and after the first.
        begin: Collectives before the first block, of the forward pass.
        end: Those after it, of the backward pass.
    """

    compute: tuple[float, float, float] = (0.0, 0.0, 0.0)
    again: tuple[float, float, float] = (0.0, 0.0, 0.0)
    forward: tuple[Travel, ...] = _NONE
    repeated: tuple[Travel, ...] = _NONE
    backward: tuple[Travel, ...] = _NONE
    begin: Travel = NOTHING
    end: Travel = NOTHING

    def __add__(self, other: "Stream") -> "Stream":
        """Do the work of both in one stream."""
        return Stream(
            compute=_add(self.compute, other.compute),
            again=_add(self.again, other.again),
            forward=_side_by_side(self.forward, other.forward),
            repeated=_side_by_side(self.repeated, other.repeated),
            backward=_side_by_side(self.backward, other.backward),
            begin=join((self.begin, other.begin)),
            end=join((self.end, other.end)),
        )

    @cached_property
    def forward_block(self) -> tuple[float, Travel]:
        """Compute, in seconds, and collectives in a block of the forward pass."""
        return sum(self.compute), join(self.forward)

    @cached_property
    def backward_block(self) -> tuple[float, Travel]:
        """The same of the backward pass, recomputation included."""
        return 2 * sum(self.compute) + sum(self.again), join((*self.backward, *self.repeated))


class Transfer(NamedTuple):
    """Weights or gradients that travel beside the work of the streams.

    Attributes:
        block: The block whose weights they are, or after whose backward pass they begin; of
            gradients, -1 when all of it is over.
        link: Seconds that they have the link between the GPUs of a node for, alone.
        network: Seconds of the network between nodes, as far as that is not the same.
        start: Seconds before that, in which nothing is taken.
    """

    block: int
    link: float
    network: float
    start: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Forward and backward pass of a micro-batch.

    Attributes:
        depth: Number of blocks.
        coarse: The stream of the scales that go ahead of the finest; None where there is one.
        finest: The stream of the finest scale, or of all.
        reductions: Gradients that are reduced beside the backward pass, in their order.
        weights: Those that are gathered beside the forward pass, of a block while the one before it
            computes; none, or those of every block, and then there is one stream.
    """

    depth: int
    coarse: Stream | None
    finest: Stream
    reductions: tuple[Transfer, ...] = ()
    weights: tuple[Transfer, ...] = ()

    @property
    def streams(self) -> list[Stream]:
        """The streams, the one that comes first at the GPU first."""
        return [self.finest] if self.coarse is None else [self.coarse, self.finest]

    @property
    def compute(self) -> float:
        """Seconds of the GPU."""
        return self.depth * sum(
            stream.forward_block[0] + stream.backward_block[0] for stream in self.streams
        )

    @property
    def without_exchange(self) -> "Pass":
        """The same with nothing to exchange."""
        bare = [Stream(compute=each.compute, again=each.again) for each in self.streams]
        return replace(self, coarse=bare[0] if self.coarse else None, finest=bare[-1])


Part: TypeAlias = tuple[tuple[float, Travel], ...]
"""Seconds of the GPU, each followed by collectives."""


def backward_parts(stream: Stream) -> tuple[Part, Part]:
    """What a stream does in a block of the backward pass.

    Returns:
        What it does up to the gradient of keys and values; and the rest.
    """
    (qkv, mixing, mlp), (qkv_again, mixing_again, mlp_again) = stream.compute, stream.again
    before = (
        (0.0, stream.repeated[2]),
        (mixing_again + mlp_again, join((stream.repeated[3], stream.backward[0]))),
        (2 * mlp, stream.backward[1]),
        (2 * mixing, NOTHING),
    )
    after = (
        (0.0, stream.repeated[0]),
        (qkv_again, join((stream.repeated[1], stream.backward[2]))),
        (2 * qkv, stream.backward[3]),
    )
    return before, after


def forward_part(stream: Stream) -> Part:
    """What a stream does in a block of the forward pass, but for its first collective."""
    qkv, mixing, mlp = stream.compute
    return ((qkv, stream.forward[1]), (mixing, stream.forward[2]), (mlp, stream.forward[3]))


def without_travel(part: Part) -> Part:
    """The same in a block that is whole on every rank."""
    return tuple((seconds, NOTHING) for seconds, _ in part)


def lay_out(
    workload: Workload,
    placement: Placement,
    hardware: HardwareConfig,
    *,
    overlap: bool,
    beside: Stream | None = None,
    reductions: tuple[Transfer, ...] = (),
    weights: tuple[Transfer, ...] = (),
) -> Pass:
    """Lay out the work of a pass in streams.

    Where the finest scale is sharded too, all is in one stream: its exchange would wait for that of
    coarse scales, whose link and communicators it shares.

    Args:
        workload: The step.
        placement: Where the experts are.
        hardware: What it runs on.
        overlap: Whether the finest scale has a stream of its own.
        beside: What coarse scales do beside what the placement asks for.
        reductions: What is reduced beside the backward pass.
        weights: What is gathered beside the forward pass.
    """
    every = bundles(workload, placement)
    coarse, finest = (
        _stream(workload, tuple(one for one in every if one.ahead == ahead), hardware, ahead=ahead)
        for ahead in (True, False)
    )
    if beside is not None:
        coarse += beside
    has_two = overlap and workload.coarse_ahead and len(workload.scales) > 1
    has_two = has_two and placement.ranks[-1] == 1
    return Pass(
        depth=workload.depth,
        coarse=coarse if has_two else None,
        finest=finest if has_two else coarse + finest,
        reductions=reductions,
        weights=weights,
    )


@lru_cache(maxsize=256)
def _stream(
    workload: Workload, own: tuple[Bundle, ...], hardware: HardwareConfig, *, ahead: bool
) -> Stream:
    """The stream of the scales that go ahead, or of the others; `own` are its bundles.

    Many placements have one of the two in common.
    """
    last = len(workload.scales) - 1
    rate = 1e9 * hardware.node_link_gb_per_s
    images = [load.images for load in workload.scales]
    stream = Stream()
    for position in range(last + 1):
        if (workload.coarse_ahead and position < last) == ahead:
            stream += _compute(workload, position, hardware)
    for bundle in own:
        if workload.depth > 1:
            legs = block_legs(workload, bundle, images)
            stream += Stream(
                forward=_travel(legs.forward, rate),
                repeated=_travel(legs.again, rate) or _NONE,
                backward=_travel(legs.backward, rate),
            )
    begin, end = modulation_legs(workload, own, images)
    return replace(stream, begin=join(_travel(begin, rate)), end=join(_travel(end, rate)))


def _compute(workload: Workload, position: int, hardware: HardwareConfig) -> Stream:
    """What one scale computes in a block; what it computes beside them is spread over them."""
    load, d = workload.scales[position], workload.width
    second = load.images * 2 / (1e12 * hardware.matmul_tflops)
    qkv, mlp = load.tokens * 3 * d * d, load.tokens * 2 * d * workload.hidden
    mixing = load.multiply_adds / workload.depth - qkv - mlp
    repeated = load.expert_multiply_adds / workload.depth - qkv - mlp
    again = (qkv, repeated, mlp) if load.activation_checkpointing else (0, 0, 0)
    return Stream(
        compute=(qkv * second, mixing * second, mlp * second),
        again=(again[QKV] * second, again[MIX] * second, again[MLP] * second),
    )


def _travel(legs: Sequence[Leg], rate: float) -> tuple[Travel, ...]:
    return tuple(Travel(leg.sent / rate, LATENCY_S) for leg in legs)


def _add(
    one: tuple[float, float, float], other: tuple[float, float, float]
) -> tuple[float, float, float]:
    return one[QKV] + other[QKV], one[MIX] + other[MIX], one[MLP] + other[MLP]


def _side_by_side(one: tuple[Travel, ...], other: tuple[Travel, ...]) -> tuple[Travel, ...]:
    return tuple(join(pair) for pair in zip(one, other, strict=True))
