"""What a placement costs: bytes on every rank and time of a step, by formula."""

import math
from dataclasses import dataclass, fields

from cluster.hardware import HardwareConfig
from cluster.placement import Placement
from trainer.planning.workload import Workload, exchange

_FULL_BYTES = 4
# Start of a collective between GPUs of a node, which small messages wait for.
_LATENCY_S = 20e-6


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes that one rank holds.

    Attributes:
        weights: Weights of the forward pass.
        gradients: Gradients.
        optimizer: Two AdamW moments, and the float32 master weights where they are a copy.
        ema: Moving average of the weights, in float32.
        activations: Estimate of what the forward pass keeps for the backward pass.
        buffers: What collectives send from and receive into.
        host: Optimizer state and moving average in host memory, where they are offloaded.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    buffers: int
    host: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes on the device by part."""
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "host"}

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts.values())


def rank_memory(workload: Workload, placement: Placement, *, zero_stage: int) -> RankMemory:
    """Predict the bytes on each rank, with AdamW.

    ZeRO 1 splits optimizer state and moving average over the ranks that hold the same weights,
    ZeRO 2 the gradients too, ZeRO 3 the weights too. ZeRO 1 adds gradients up whole over several
    micro-batches; with one they are reduced as they come and kept split. Of a sharded scale N/E
    ranks hold each 1/E, so what is split is 1/N of it whatever E is: sharding a scale saves weights
    and whole gradients, not optimizer state. ZeRO keeps float32 master weights in either precision,
    stage 0 only in bf16.

    A sharded scale keeps the group's tokens at the input of three projections of a block, and at
    most twice as much is under way in an exchange. ZeRO 1 to 3 reduce through whole buckets of
    their own, however few the gradients are. The allocator's waste, and the update's own working
    memory, which is needed when activations are gone, are not counted.

    Args:
        workload: The training step.
        placement: Where the experts are.
        zero_stage: 0 (no ZeRO) to 3.
    """
    element = workload.element_bytes
    shards = workload.shards(placement)
    held = sum(weights for weights, _ in shards)
    split = sum(math.ceil(weights * ranks / workload.world_size) for weights, ranks in shards)
    stateful = split if zero_stage >= 1 else held
    adds_up_split = zero_stage >= 2 or (zero_stage == 1 and workload.grad_accum_steps == 1)
    copies = 2 if element == _FULL_BYTES and zero_stage == 0 else 3
    optimizer, ema = _FULL_BYTES * copies * stateful, _FULL_BYTES * stateful
    buffers = _exchange_buffers(workload, placement)
    if zero_stage >= 1:
        # The second is filled while the first is under way; ZeRO-3 does with one.
        buckets = 2 if workload.hides_reduction(zero_stage) and zero_stage < 3 else 1
        # What ZeRO-1 reduces has been added up; the others reduce each micro-batch's own.
        reduced = workload.gradient_bytes if zero_stage == 1 else element
        buffers += buckets * reduced * workload.bucket_elements
    if zero_stage == 3:
        buffers += element * min(held, max(workload.kept_parameters, held // workload.depth))
    return RankMemory(
        weights=element * (split if zero_stage >= 3 else held),
        gradients=workload.gradient_bytes * (split if adds_up_split else held),
        optimizer=0 if workload.offload else optimizer,
        ema=0 if workload.offload else ema,
        activations=element * _activations(workload, placement),
        buffers=buffers,
        host=optimizer + ema if workload.offload else 0,
    )


def _activations(workload: Workload, placement: Placement) -> int:
    """Numbers kept for the backward pass, and in it for the one block that is recomputed."""
    kept, again = 0, 0
    for load, ranks in zip(workload.scales, placement.ranks, strict=True):
        # The group's tokens instead of its own before attention and MLP; behind attention beside
        # its own, which attention keeps.
        gathered = (3 * ranks - 2) * load.tokens * workload.width if ranks > 1 else 0
        kept += load.max_images * load.activations
        if load.activation_checkpointing:
            again = max(again, load.max_images * (load.block_activations + gathered))
        else:
            kept += load.max_images * workload.depth * gathered
    return kept + again


def _exchange_buffers(workload: Workload, placement: Placement) -> int:
    """Bytes under way in the largest exchange: the group's tokens and the gradients of as many."""
    return max(
        2 * ranks * load.max_images * load.tokens * workload.width * workload.element_bytes
        if ranks > 1
        else 0
        for load, ranks in zip(workload.scales, placement.ranks, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one training step, what overlaps taken off.

    Attributes:
        compute: Matrix products.
        reduction: Gradients reduced and weights gathered, as far as nothing hides it.
        exchange: Tokens exchanged by expert groups.
        offload: Gradients to host memory, the update there, and weights back.
    """

    compute: float
    reduction: float
    exchange: float
    offload: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return vars(self)

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())


def step_time(
    workload: Workload, placement: Placement, *, zero_stage: int, hardware: HardwareConfig
) -> StepTime:
    """Predict the time of one training step.

    Compute is 6 FLOPs for each multiply-add of the forward pass, 2 more for those that are
    recomputed; 2 of 6 are the forward pass's. Only matrix products count: not norms, the update on
    the device, or an autoencoder that encodes images on the way.

    What overlaps: the reduction of gradients with the backward pass it belongs to, where
    `workload.hides_reduction`; with `workload.overlaps_exchange`, and not with stage 3, the
    exchange of coarse scales with the finest scale's compute. The rest waits: the exchange, and the
    gathering of weights, though stage 3 prefetches some of them.

    Args:
        workload: The training step.
        placement: Where the experts are.
        zero_stage: 0 (no ZeRO) to 3.
        hardware: What it runs on.
    """
    flops = 1e12 * hardware.matmul_tflops
    steps = workload.grad_accum_steps
    forward = sum(load.images * load.multiply_adds for load in workload.scales) * 2 / flops
    again = sum(
        load.images * load.expert_multiply_adds
        for load in workload.scales
        if load.activation_checkpointing
    )
    backward = 2 * forward + 2 * again / flops
    finest = workload.scales[-1].images * workload.scales[-1].multiply_adds * 6 / flops
    sent = [
        _exchange_seconds(workload, position, ranks, hardware)
        for position, ranks in enumerate(placement.ranks)
    ]
    overlap = workload.overlaps_exchange and zero_stage < 3
    coarse = max(0.0, sum(sent[:-1]) - (finest if overlap else 0.0))
    hidden = backward if workload.hides_reduction(zero_stage) else 0.0
    return StepTime(
        compute=steps * (forward + backward),
        reduction=_reduction_seconds(workload, placement, hardware, zero_stage, hidden),
        exchange=steps * (coarse + sent[-1]),
        offload=_offload_seconds(workload, placement, hardware) if workload.offload else 0.0,
    )


def _reduction_seconds(
    workload: Workload,
    placement: Placement,
    hardware: HardwareConfig,
    zero_stage: int,
    hidden: float,
) -> float:
    """Time to reduce gradients and gather weights; `hidden` seconds of each reduction cost nothing.

    Stages 0 to 2 all-reduce gradients, as DeepSpeed does by default, stage 2 in every micro-batch;
    stages 1 and 2 gather the updated weights. Stage 3 gathers weights for the forward pass, those
    that it may not keep for the backward pass again, and reduce-scatters gradients.
    """
    ring = _ring_seconds(workload, placement, hardware)
    steps = workload.grad_accum_steps
    if zero_stage == 3:
        calls = 3 * (workload.depth + 2) * _LATENCY_S
        gathers = workload.gathers(placement)
        return steps * (gathers * ring + max(0.0, ring - hidden) + calls)
    reducing = steps if zero_stage == 2 else 1
    updated = ring if zero_stage else 0.0
    return reducing * max(0.0, 2 * ring - hidden) + updated


def _ring_seconds(workload: Workload, placement: Placement, hardware: HardwareConfig) -> float:
    """One ring over all weights of a rank: an all-gather, a reduce-scatter, half an all-reduce.

    Of n ranks that hold B bytes each, (n - 1)/n B leave a rank. A ring inside a node is as fast as
    its links. One over several nodes enters and leaves each of them once, through the network ports
    of those of its ranks that are there, but not faster than links in the node.
    """
    seconds = 0.0
    ranks_per_node = hardware.ranks_per_node(workload.world_size)
    for weights, ranks in workload.shards(placement):
        replicas = workload.world_size // ranks
        rate = hardware.node_link_gb_per_s
        if workload.world_size > ranks_per_node:
            rate = min(rate, hardware.network_gb_per_s * max(1, ranks_per_node // ranks))
        leaving = (replicas - 1) / replicas * weights * workload.element_bytes
        seconds += leaving / (1e9 * rate)
    return seconds


def _exchange_seconds(
    workload: Workload, position: int, ranks: int, hardware: HardwareConfig
) -> float:
    """A scale's exchange in one pass; expert groups are inside a node."""
    load = workload.scales[position]
    sent = exchange(workload, load, ranks).values()
    leaving = load.images * sum(kind.bytes_per_image for kind in sent)
    calls = sum(kind.calls for kind in sent)
    return leaving / (1e9 * hardware.node_link_gb_per_s) + calls * _LATENCY_S


def _offload_seconds(workload: Workload, placement: Placement, hardware: HardwareConfig) -> float:
    """Gradients out and weights in, and moments, fp32 weights and EMA read and written once.

    An update on the host is as fast as its memory, of which a GPU's share is taken to be as fast
    as the GPU's link to it.
    """
    split = sum(
        math.ceil(weights * ranks / workload.world_size)
        for weights, ranks in workload.shards(placement)
    )
    moved = workload.gradient_bytes + workload.element_bytes + 2 * 4 * _FULL_BYTES
    return split * moved / (1e9 * hardware.host_link_gb_per_s)
