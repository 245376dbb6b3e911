"""What one training step asks of every rank, and what a placement costs, by formula.

Bytes on every rank, time of a step, and the exchange of experts' tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from cluster.hardware import HardwareConfig
from cluster.placement import Placement

_FULL_BYTES = 4
# Start of a collective between GPUs of a node, which small messages wait for.
_LATENCY_S = 20e-6


@dataclass(frozen=True, kw_only=True)
class ScaleLoad:
    """One scale's share of a training step.

    Attributes:
        parameters: Weights of the scale's own; what scales share counts for the coarsest of them.
        unpartitioned: Those of them that every rank keeps whole though the scale is sharded: what
            is no layer's, such as the norms of queries and keys.
        last_projection: Those of the last projection, which is whole where E does not divide the
            numbers of a patch.
        tokens: Tokens of an image.
        patches: Patches of an image: its tokens but for class tokens.
        images: Images of a rank's micro-batch that carry the scale, on average.
        max_images: The same at most.
        multiply_adds: Of a forward pass, for each image that carries the scale.
        expert_multiply_adds: Those of them that are computed again where activations are
            recomputed.
        activations: Numbers that an image keeps for the backward pass, as the scale is configured.
        block_activations: Numbers that an image keeps in one block without recomputation.
        activation_checkpointing: Whether the experts compute again what they would keep.
    """

    parameters: int
    unpartitioned: int
    last_projection: int
    tokens: int
    patches: int
    images: float
    max_images: int
    multiply_adds: int
    expert_multiply_adds: int
    activations: int
    block_activations: int
    activation_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step of one model on every rank.

    Attributes:
        scales: Coarse to fine.
        shared_parameters: Weights that belong to no scale.
        width: Width of a token, d.
        hidden: Width of the MLP's hidden layer.
        depth: Number of blocks.
        patch_elements: Numbers in a patch, p*p*c.
        shared_modulation: Whether a scale's modulation is computed once for all blocks.
        head_norms: Whether queries and keys are normalised.
        tied: Scales that share weights.
        world_size: Number of ranks.
        images: Images of a rank's micro-batch.
        grad_accum_steps: Micro-batches of a step.
        element_bytes: Bytes of a weight and an activation: 2 for bf16, 4 for fp32.
        gradient_bytes: Bytes of a gradient where those of a step are kept.
        offload: Whether moments, fp32 weights and EMA are in host memory.
        bucket_elements: Gradients that are reduced together (DeepSpeed's reduce_bucket_size).
        reduces_in_backward: Whether gradients are reduced while the backward pass goes on
            (DeepSpeed's overlap_comm); None is its default, with ZeRO-3 alone.
        overlaps_exchange: Whether coarse scales' tokens travel while the finest scale computes.
        kept_parameters: Gathered weights that ZeRO-3 keeps from the forward to the backward pass:
            the larger of DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance.
    """

    scales: tuple[ScaleLoad, ...]
    shared_parameters: int
    width: int
    hidden: int
    depth: int
    patch_elements: int
    shared_modulation: bool = False
    head_norms: bool = False
    tied: tuple[int, ...] = ()
    world_size: int
    images: int
    grad_accum_steps: int = 1
    element_bytes: int = 2
    gradient_bytes: int = 2
    offload: bool = False
    bucket_elements: int = 500_000_000
    reduces_in_backward: bool | None = None
    overlaps_exchange: bool = False
    kept_parameters: int = 1_000_000_000

    def hides_reduction(self, zero_stage: int) -> bool:
        """Whether the backward pass hides the reduction of gradients with a ZeRO stage."""
        if self.reduces_in_backward is None:
            return zero_stage == 3
        return self.reduces_in_backward and zero_stage > 0

    def gathers(self, placement: Placement) -> float:
        """How often ZeRO-3 gathers a weight in one pass: once, or for the backward pass again."""
        held = sum(weights for weights, _ in self.shards(placement))
        return 2 - min(1.0, self.kept_parameters / held)

    def shards(self, placement: Placement) -> list[tuple[int, int]]:
        """Weights that a rank holds with ZeRO 0 to 2, and over how many steps of E they repeat.

        Returns:
            Pairs (weights on a rank, E): those of all ranks first, with E = 1, then each sharded
            scale's own shard, which ranks r, r + E, r + 2 E, … hold.
        """
        everywhere, shards = self.shared_parameters, []
        for load, ranks in zip(self.scales, placement.ranks, strict=True):
            whole = load.parameters if ranks == 1 else load.unpartitioned
            if ranks > 1 and self.patch_elements % ranks:
                whole += load.last_projection
            everywhere += whole
            if ranks > 1:
                shards.append(((load.parameters - whole) // ranks, ranks))
        return [(everywhere, 1), *shards]


@dataclass(frozen=True)
class Collectives:
    """Collectives of one kind that an expert group makes for one scale in one pass.

    Attributes:
        calls: How many.
        bytes_per_image: What leaves a rank for each of its images.
    """

    calls: int = 0
    bytes_per_image: int = 0


KINDS = ("all_gather", "all_to_all", "reduce_scatter")
"""The kinds of collectives that expert groups exchange tokens with."""


def exchange(workload: Workload, load: ScaleLoad, ranks: int) -> dict[str, Collectives]:
    """Count what a rank sends for one scale in the forward and backward pass of a micro-batch.

    To gather x numbers of an image, (E - 1) x leave its rank; to return x numbers, of which each
    rank of the group has made 1/E, (E - 1) x / E leave a rank for each of its own images, as the
    other ranks' images are equally many. For n tokens and m patches, a block's forward pass takes

    - modulation: all-gather of d, all-to-all of 6 d (once for all blocks if it is shared);
    - queries, keys and values: all-gather of n d, all-to-all of 3 n d;
    - projection behind attention: all-gather of n d, all-to-all of n d;
    - MLP: all-gather of n d, reduce-scatter back to n d, as much as the gather;

    and beside the blocks

    - patches: all-gather of m p p c, all-to-all of m d;
    - last layer: all-gather of d, all-to-all of 2 d; all-gather of m d and all-to-all of m p p c,
      unless the last projection is whole.

    The backward pass mirrors the forward pass, with reduce-scatter for all-gather and the reverse;
    only the patches need no gradient. Recomputation repeats the forward pass of the blocks but for
    the modulation, and for returning queries, keys and values, from which only their norms would
    keep anything.

    Args:
        workload: The step.
        load: The scale.
        ranks: E.

    Returns:
        For each kind of collective, its calls and bytes; zeros where E is 1.
    """
    if ranks == 1:
        return {kind: Collectives() for kind in KINDS}
    d, depth = workload.width, workload.depth
    block, last = load.tokens * d, load.patches * d
    patches = load.patches * workload.patch_elements
    modulations = 1 if workload.shared_modulation else depth
    partitioned = workload.patch_elements % ranks == 0
    again = depth if load.activation_checkpointing else 0
    # Numbers of one image: gathered, and of those with a gradient; returned; scattered.
    gathered = 3 * depth * block + (modulations + 1) * d + partitioned * last
    returned = 4 * depth * block + (6 * modulations + 2) * d + last + partitioned * patches
    scattered = depth * block
    gathers = 3 * depth + modulations + 1 + partitioned
    returns = 2 * depth + modulations + 2 + partitioned
    returned_again = again * (4 if workload.head_norms else 1) * block
    sent = (ranks - 1) * workload.element_bytes
    return {
        "all_gather": Collectives(
            1 + gathers + depth + 3 * again,
            sent * (patches + gathered + scattered + 3 * again * block),
        ),
        "all_to_all": Collectives(
            2 * returns + again * (2 if workload.head_norms else 1),
            sent * (2 * returned + returned_again) // ranks,
        ),
        "reduce_scatter": Collectives(
            depth + gathers + again, sent * (scattered + gathered + again * block)
        ),
    }


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
    totals = dict.fromkeys(KINDS, 0)
    for load, ranks, count in zip(workload.scales, placement.ranks, images, strict=True):
        for kind, sent in exchange(workload, load, ranks).items():
            totals[kind] += count * sent.bytes_per_image
    return totals


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
