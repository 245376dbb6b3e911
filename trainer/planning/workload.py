"""What one training step asks of every rank, in plain numbers; and the exchange of its experts."""

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.placement import Placement


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
