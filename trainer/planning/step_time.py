"""Time of a training step, by formula, and by simulating the queues of a GPU.

Both stand on the same work, laid out by ``trainer.planning.streams``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

from cluster.hardware import HardwareConfig
from cluster.placement import Placement
from trainer.planning.device_work import encoding_seconds, launching_seconds, update_seconds
from trainer.planning.streams import (
    LATENCY_S,
    MIX,
    MLP,
    QKV,
    Part,
    Pass,
    Stream,
    Transfer,
    backward_parts,
    forward_part,
    join,
    lay_out,
)
from trainer.planning.workload import FULL_BYTES, Workload


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one training step, what overlaps taken off.

    Attributes:
        compute: Matrix products.
        reduction: Gradients reduced and weights gathered, as far as nothing hides it.
        exchange: Tokens exchanged by expert groups, as far as nothing hides it.
        offload: What goes to host memory and back, and the update there, as far as nothing hides
            it.
        update: The update on the device, at the rate of its memory.
        encoding: Images that are encoded in the step.
        launching: What the host takes to launch the kernels of the passes, beyond the seconds of
            their products: equally long for all placements.
    """

    compute: float
    reduction: float
    exchange: float
    offload: float = 0.0
    update: float = 0.0
    encoding: float = 0.0
    launching: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return vars(self)

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def busy(self) -> float:
        """Seconds of the step where launching kernels takes no time."""
        return self.total - self.launching


Timing = Callable[[Pass], tuple[float, float]]
"""How long the forward and the backward pass take."""


@lru_cache(maxsize=64)
def step_time(
    workload: Workload,
    placement: Placement,
    *,
    zero_stage: int,
    hardware: HardwareConfig,
    timing: Timing | None = None,
    beside: Stream | None = None,
) -> StepTime:
    """Predict the time of one training step.

    Compute is 6 FLOPs for each multiply-add, 2 of them the forward pass's, and 2 more where it is
    recomputed. Norms and activations do not count; the update and more stand in `device_work`.

    What overlaps: the reduction of gradients with the backward pass it belongs to, where
    `workload.hides_reduction`; with `workload.overlaps_exchange`, and not with stage 3, what coarse
    scales exchange with what the finest scale computes, and the reverse; the weights that stage 3
    gathers for a block of the forward pass with the block before it; and an EMA on the host with
    all passes. Whatever travels at the same time shares the link. The rest waits: weights that are
    gathered after an update, or again for the backward pass.

    Args:
        workload: The training step.
        placement: Where the experts are.
        zero_stage: 0 (no ZeRO) to 3.
        hardware: What it runs on.
        timing: Tells how long a pass takes; None is the formula, `pass_seconds`.
        beside: What coarse scales do beside what the placement asks for.
    """
    timing, steps = timing or pass_seconds, workload.grad_accum_steps
    hidden, reducing = workload.hides_reduction(zero_stage), steps if zero_stage >= 2 else 1
    shards = Shards.of(workload, placement)
    reduced = _reductions(workload, shards, hardware, zero_stage)
    passes = lay_out(
        workload,
        placement,
        hardware,
        overlap=workload.overlaps_exchange and zero_stage < 3,
        beside=beside,
        reductions=reduced if hidden else (),
        weights=_weights(workload, shards, hardware) if zero_stage == 3 else (),
    )
    compute = steps * passes.compute
    seconds = partial(_passes_seconds, timing=timing, steps=steps, reducing=reducing)
    with_exchange = without = seconds(passes)
    if placement.sharded or beside:
        without = seconds(passes.without_exchange)
    waiting = _waiting_seconds(workload, placement, hardware, zero_stage)
    if not hidden:  # the first message's latency is not seen beside the rest
        waiting += reducing * sum(_unshared(each) - LATENCY_S for each in reduced)
    passes_s = max(compute, without, with_exchange)
    return StepTime(
        compute=compute,
        reduction=max(0.0, without - compute) + waiting,
        exchange=max(0.0, with_exchange - max(compute, without)),
        offload=_host_seconds(workload, placement, hardware, hidden=passes_s),
        update=update_seconds(workload, placement, zero_stage=zero_stage, hardware=hardware),
        encoding=encoding_seconds(workload, hardware),
        launching=max(0.0, launching_seconds(workload, hardware) - compute),
    )


def _waiting_seconds(
    workload: Workload, placement: Placement, hardware: HardwareConfig, zero_stage: int
) -> float:
    """Weights that are gathered while nothing else is done: updated ones, or again by stage 3."""
    ring = _ring_seconds(workload, Shards.of(workload, placement), hardware)
    if zero_stage < 3:
        return ring if zero_stage else 0.0
    again = (workload.weight_gathers(placement) - 1) * ring + 2 * (workload.depth + 2) * LATENCY_S
    return workload.grad_accum_steps * again


def _passes_seconds(passes: Pass, timing: Timing, *, steps: int, reducing: int) -> float:
    """All micro-batches of a step, some of which reduce gradients."""
    seconds = reducing * sum(timing(passes))
    if reducing < steps:
        bare = Pass(depth=passes.depth, coarse=passes.coarse, finest=passes.finest)
        seconds += (steps - reducing) * sum(timing(bare))
    return seconds


@lru_cache(maxsize=64)
def pass_seconds(work: Pass) -> tuple[float, float]:
    """Time of one pass by formula; see ``trainer.planning.queues`` for what it stands for.

    Coarse scales have the GPU first, so the finest scale has it whenever they do not compute: what
    it has done by some time is that time less what they have computed. They never wait in the
    forward pass. In the backward pass each block of theirs waits for the finest scale's.

    Returns:
        Seconds of the forward pass, and of the backward pass with all of its reductions.
    """
    return _forward_seconds(work), _backward_seconds(work)


def least_pass_seconds(work: Pass) -> tuple[float, float]:
    """Seconds that `pass_seconds` says at least, without going through blocks.

    The GPU does all work, coarse scales do theirs in turn, and what travels beside them does so one
    after the other.

    Returns:
        Seconds of the forward pass, and of the backward pass with all of its reductions.
    """
    first, blocks = work.streams[0], work.depth - 1
    compute, travel = first.forward_block
    busy = work.depth * sum(each.forward_block[0] for each in work.streams)
    chain = first.begin.seconds + work.depth * compute + blocks * travel.seconds
    fetched = sum(_unshared(each) for each in work.weights)
    forward = max(busy, chain, fetched + (compute if work.weights else 0.0))
    compute, travel = first.backward_block
    busy = work.depth * sum(each.backward_block[0] for each in work.streams)
    chain = work.depth * compute + blocks * travel.seconds + first.end.seconds
    backward = max(busy, chain)
    if work.reductions:
        begins = work.reductions[0].block
        before = (work.depth - begins) * (compute + travel.seconds) if begins > 0 else backward
        backward = max(backward, before + sum(_unshared(each) for each in work.reductions))
    return forward, backward


def _unshared(transfer: Transfer) -> float:
    """Seconds of a transfer with nothing else on its way."""
    return transfer.start + transfer.link + transfer.network


def _forward_seconds(work: Pass) -> float:
    first = work.streams[0]
    compute, travel = first.forward_block
    chain = first.begin.seconds + work.depth * compute + (work.depth - 1) * travel.seconds
    if work.coarse is None:
        return _gathering_seconds(work) if work.weights else chain
    finest = work.finest.compute
    busy = work.depth * (compute + sum(finest)) + max(0.0, first.begin.seconds - finest[QKV])
    # When the last keys are there, the finest scale has the rest of its last block to do.
    after = join(first.forward[2:]).seconds if work.depth > 1 else 0.0
    return max(busy, chain + max(0.0, finest[MIX] + finest[MLP] - after))


def _gathering_seconds(work: Pass) -> float:
    """The forward pass where each block waits for its weights, on their way since the last one."""
    stream, under_way = work.finest, _UnderWay()
    under_way.begin(work.weights[0])
    now = under_way.work_beside([(stream.begin.start, stream.begin.link)])
    part = ((0.0, stream.forward[0]), *forward_part(stream))
    legs = {whole: _spread(part, whole=whole) for whole in (True, False)}
    for block in range(work.depth):
        now += under_way.left
        under_way = _UnderWay()
        if block + 1 < work.depth:
            under_way.begin(work.weights[block + 1])
        now += under_way.work_beside(legs[block == 0])
    return now


def _backward_seconds(work: Pass) -> float:
    first, follows = work.streams[0], work.coarse is not None
    led, after_gradient = 0.0, 0.0
    if follows:
        led, _ = work.finest.backward_block
        after_gradient = 2 * work.finest.compute[QKV] + work.finest.again[QKV]
    waiting = {each.block: each for each in work.reductions}
    under_way = _UnderWay()

    def begin(block: int) -> None:
        if block in waiting:
            under_way.begin(waiting.pop(block))

    now, computed = 0.0, 0.0
    parts = backward_parts(first)
    seconds = [sum(each for each, _ in part) for part in parts]
    legs = {whole: [_spread(part, whole=whole) for part in parts] for whole in (True, False)}
    for block in reversed(range(work.depth)):
        before, after = legs[block == 0]
        now += under_way.work_beside(before)
        computed += seconds[0]
        if follows:
            ready = computed + (work.depth - block) * led - after_gradient
            # Only with the rest of the last block of the finest scale is its bucket full.
            full = max(now, ready - led + after_gradient)
            under_way.drain(full - now)
            begin(block + 1)
            under_way.drain(max(0.0, ready - full))
            now = max(full, ready)
        now += under_way.work_beside(after)
        computed += seconds[1]
        if now - computed >= (work.depth - block) * led:
            begin(block)
    ready = max(now + first.end.seconds, computed + work.depth * led)
    under_way.drain(ready - now)
    begin(-1)
    return ready + under_way.left


def _spread(part: Part, *, whole: bool) -> list[tuple[float, float]]:
    """Seconds of work during which the link is free, each with those of the link after it."""
    legs, free = [], 0.0
    for seconds, travel in part:
        free += seconds
        if not whole:
            free += travel.start
            if travel.link:
                legs.append((free, travel.link))
                free = 0.0
    return [*legs, (free, 0.0)]


class _UnderWay:
    """Weights or gradients that are under way, one after the other."""

    def __init__(self) -> None:
        self._links: list[float] = []
        self._networks: list[float] = []

    @property
    def left(self) -> float:
        """Seconds that are left, alone."""
        return sum(self._links) + sum(self._networks)

    def begin(self, transfer: Transfer) -> None:
        """Begin one when those before it are done."""
        self._links.append(transfer.start + transfer.link)
        self._networks.append(transfer.network)

    def work_beside(self, legs: list[tuple[float, float]]) -> float:
        """Do work, and exchange, in turn; return how long it takes."""
        taken = 0.0
        for seconds, link in legs:
            taken += seconds
            if self._links:
                self.drain(seconds)
                taken += self._meet(link)
            else:
                taken += link
        return taken

    def drain(self, seconds: float) -> None:
        """Let time go by in which nothing else is on the link."""
        links, networks = self._links, self._networks
        while links:
            if seconds < links[0]:
                links[0] -= seconds
                return
            seconds -= links[0]
            links[0] = 0.0
            if seconds < networks[0]:
                networks[0] -= seconds
                return
            seconds -= networks[0]
            del links[0], networks[0]

    def _meet(self, seconds: float) -> float:
        """Exchange for so many seconds of the link; return how long it takes."""
        taken = 0.0
        links, networks = self._links, self._networks
        while links:
            if seconds < links[0]:
                links[0] -= seconds
                return taken + 2 * seconds
            taken += 2 * links[0]
            seconds -= links[0]
            links[0] = 0.0
            if seconds < networks[0]:
                networks[0] -= seconds
                return taken + seconds
            taken += networks[0]
            seconds -= networks[0]
            del links[0], networks[0]
        return taken + seconds


class Shards(NamedTuple):
    """Weights that a rank holds, and over how many steps of E they repeat.

    Attributes:
        every: `Workload.shards`.
        modulation: `Workload.modulation_shards`.
    """

    every: tuple[tuple[int, int], ...]
    modulation: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, workload: Workload, placement: Placement) -> Shards:
        """What a placement leaves on a rank."""
        return cls(tuple(workload.shards(placement)), tuple(workload.modulation_shards(placement)))


@lru_cache(maxsize=64)
def _weights(workload: Workload, shards: Shards, hardware: HardwareConfig) -> tuple[Transfer, ...]:
    """Weights that stage 3 gathers for the forward pass, block by block."""
    (_, first), (_, other) = (
        _transfer(workload, shards, hardware, first=each, rings=1) for each in (True, False)
    )
    return first, *(other._replace(block=block) for block in range(1, workload.depth))


@lru_cache(maxsize=64)
def _reductions(
    workload: Workload, shards: Shards, hardware: HardwareConfig, zero_stage: int
) -> tuple[Transfer, ...]:
    """Gradients of one pass, bucket by bucket, from the last block to the first.

    Stage 0 all-reduces gradients. Stages 1 and 2 send each to the rank that keeps it, or with
    state in host memory all-reduce them too; stage 3 reduce-scatters them. No stage knows another
    way with another backend. A bucket that is kept by several ranks is sent in as many messages.
    """
    rings = 1 if zero_stage == 3 else 2
    if workload.reduces_to_owners and zero_stage in (1, 2):
        rings = 0
    kept = sum(weights * ranks / workload.world_size for weights, ranks in shards.every)
    first, other = (
        _transfer(workload, shards, hardware, first=each, rings=rings) for each in (True, False)
    )
    found: list[Transfer] = []
    numbers, link, network = 0.0, 0.0, 0.0
    for block in reversed(range(workload.depth)):
        own, transfer = other if block else first
        numbers, link, network = numbers + own, link + transfer.link, network + transfer.network
        if block == 0 or numbers >= workload.bucket_elements:
            # A bucket begins and ends anywhere among those that a rank keeps.
            owners = 1 if rings else min(workload.world_size, 1 + numbers / kept)
            found.append(Transfer(block or -1, link, network, owners * LATENCY_S))
            numbers, link, network = 0.0, 0.0, 0.0
    return tuple(found)


def _transfer(
    workload: Workload, shards: Shards, hardware: HardwareConfig, *, first: bool, rings: int
) -> tuple[float, Transfer]:
    """Send the weights of a block, or their gradients, on rings; on none to one rank each.

    Returns:
        How many they are, and how long it takes.
    """
    numbers, link, network = 0.0, 0.0, 0.0
    for weights, ranks in _block_shards(workload, shards, first=first):
        replicas = workload.world_size // ranks
        share = rings * (replicas - 1) / replicas if rings else min(1, replicas - 1)
        seconds = share * weights * workload.element_bytes / _rate(workload, ranks, hardware)
        numbers += weights
        if ranks < hardware.ranks_per_node(workload.world_size):
            link += seconds
        else:
            # Of each ring no two ranks are in one node, unless there is but one.
            network += seconds
    return numbers, Transfer(0, link, network, LATENCY_S)


def _block_shards(
    workload: Workload, shards: Shards, *, first: bool
) -> Iterator[tuple[float, int]]:
    """Weights of a block on a rank, and E; what is in no block counts for the first.

    So does the modulation of sharded scales, which is made for all blocks ahead of the first.
    """
    # Of one block alone the first is all there is.
    blocks = max(1, workload.depth - 1)
    whole, _ = shards.every[0]
    first_whole = workload.shared_parameters + sum(
        load.parameters / workload.depth for load in workload.scales
    )
    if first:
        yield min(first_whole, whole), 1
        yield from shards.modulation
        return
    yield (whole - first_whole) / blocks, 1
    for (weights, ranks), (ahead, _) in zip(shards.every[1:], shards.modulation, strict=True):
        yield (weights - ahead) / blocks, ranks


def _ring_seconds(workload: Workload, shards: Shards, hardware: HardwareConfig) -> float:
    """One ring over all weights of a rank: an all-gather, a reduce-scatter, half an all-reduce.

    Of n ranks that hold B bytes each, (n - 1)/n B leave a rank.
    """
    seconds = 0.0
    for weights, ranks in shards.every:
        replicas = workload.world_size // ranks
        leaving = (replicas - 1) / replicas * weights * workload.element_bytes
        seconds += leaving / _rate(workload, ranks, hardware)
    return seconds


def _rate(workload: Workload, ranks: int, hardware: HardwareConfig) -> float:
    """Bytes a second of a ring over the ranks that hold the same shard.

    A ring inside a node is as fast as its links. One over several nodes enters and leaves each of
    them once, through the network ports of those of its ranks that are there, but not faster than
    links in the node.
    """
    ranks_per_node = hardware.ranks_per_node(workload.world_size)
    rate = hardware.node_link_gb_per_s
    if workload.world_size > ranks_per_node:
        rate = min(rate, hardware.network_gb_per_s * max(1, ranks_per_node // ranks))
    return 1e9 * rate


def _host_seconds(
    workload: Workload, placement: Placement, hardware: HardwareConfig, *, hidden: float
) -> float:
    """What host memory adds to a step.

    Offloaded state: gradients out and weights in, and moments, fp32 weights and EMA read and
    written once. An update on the host is as fast as its memory, of which a GPU's share is taken to
    be as fast as the GPU's link to it. An EMA alone comes and goes at the same time, while
    `hidden` seconds of passes go on.
    """
    split, rate = workload.split(placement), 1e9 * hardware.host_link_gb_per_s
    if workload.offload:
        state = FULL_BYTES * (3 + workload.averages)
        moved = workload.gradient_bytes + workload.element_bytes + 2 * state
        return split * moved / rate
    averages = split * FULL_BYTES * workload.averages
    return max(0.0, averages / rate - hidden) if workload.ema_on_host else 0.0
