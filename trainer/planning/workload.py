"""What one training step asks of every rank: weights, tokens, and how it is done."""

import math
from dataclasses import dataclass

from cluster.placement import Placement

FULL_BYTES = 4
"""Bytes of a float32 number, in which ZeRO keeps what it updates."""

_KEPT_BY_NEAR_LIMITS = 0.85
"""Of the weights, where ZeRO-3 may keep more than all of them, but not twice as many.

Counted on ranks, it gathers 1.14 to 1.2 times then: what is over before it has looked ahead as far
as the backward pass is let go (docs/log.md, 2026-11-30).
"""


@dataclass(frozen=True, kw_only=True)
class ScaleLoad:
    """One scale's share of a training step.

    Attributes:
        parameters: Weights of the scale's own; what scales share counts for the coarsest of them.
        unpartitioned: Those of them that every rank keeps whole though the scale is sharded: the
            first block, projections behind attention, the embedding and the last layer.
        modulation: Those of the others that make the modulation of blocks. Where the scale is
            sharded they do so for all blocks at once, so that their gradients come last.
        tokens: Tokens of an image.
        images: Images of a rank's micro-batch that carry the scale, on average.
        max_images: The same at most.
        multiply_adds: Of a forward pass, for each image that carries the scale.
        expert_multiply_adds: Those of them that are computed again where activations are
            recomputed.
        activations: Numbers that an image keeps for the backward pass.
        recomputed_activations: Those that it keeps where the experts are recomputed.
        block_activations: Those of one block, without recomputation.
        activation_checkpointing: Whether the experts compute again what they would keep.
    """

    parameters: int
    unpartitioned: int
    modulation: int = 0
    tokens: int
    images: float
    max_images: int
    multiply_adds: int
    expert_multiply_adds: int
    activations: int
    recomputed_activations: int
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
        shared_modulation: Whether a scale's modulation is computed once for all blocks.
        coarse_ahead: Whether coarse scales do without finer ones, as with causal attention, so that
            they go through a block before the finest.
        tied: Scales that share weights.
        world_size: Number of ranks.
        images: Images of a rank's micro-batch.
        grad_accum_steps: Micro-batches of a step.
        element_bytes: Bytes of a weight and an activation: 2 for bf16, 4 for fp32.
        gradient_bytes: Bytes of a gradient where those of a step are kept.
        offload: Whether moments, fp32 weights and EMA are in host memory.
        ema_on_host: Whether the EMA is there, and follows beside the next passes.
        averages: How many moving averages of the weights are kept.
        bucket_elements: Gradients that are reduced together (DeepSpeed's reduce_bucket_size).
        reduces_in_backward: Whether gradients are reduced while the backward pass goes on
            (DeepSpeed's overlap_comm); None is its default, with ZeRO-3 alone.
        reduces_to_owners: Whether ZeRO 1 and 2 send a gradient to the rank that keeps it, and not
            to all (DeepSpeed's use_multi_rank_bucket_allreduce, off): half the bytes.
        overlaps_exchange: Whether coarse scales' tokens travel while the finest scale computes.
        regathers: Whether what was gathered is gathered again for the backward pass, not kept.
        kept_parameters: Weights that ZeRO-3 may keep from the forward to the backward pass,
            DeepSpeed's stage3_max_reuse_distance. (stage3_max_live_parameters only bounds what is
            gathered ahead.)
        encoder_flops: Of an autoencoder that encodes each image in the step; 0 for none.
        encodes_in_fp32: Whether it does so in float32, without TF32.
        launches: Kernels of a forward and a backward pass without recomputation; 0 where nobody
            has counted them.
    """

    scales: tuple[ScaleLoad, ...]
    shared_parameters: int
    width: int
    hidden: int
    depth: int
    shared_modulation: bool = False
    coarse_ahead: bool = True
    tied: tuple[int, ...] = ()
    world_size: int
    images: int
    grad_accum_steps: int = 1
    element_bytes: int = 2
    gradient_bytes: int = 2
    offload: bool = False
    ema_on_host: bool = False
    averages: int = 1
    bucket_elements: int = 500_000_000
    reduces_in_backward: bool | None = None
    reduces_to_owners: bool = False
    overlaps_exchange: bool = False
    regathers: bool = True
    kept_parameters: int = 1_000_000_000
    encoder_flops: float = 0.0
    encodes_in_fp32: bool = True
    launches: int = 0

    def hides_reduction(self, zero_stage: int) -> bool:
        """Whether the backward pass hides the reduction of gradients with a ZeRO stage."""
        if self.reduces_in_backward is None:
            return zero_stage == 3
        return self.reduces_in_backward and zero_stage > 0

    def split(self, placement: Placement) -> int:
        """Weights of which ZeRO leaves a rank the state: each over the ranks that hold it."""
        return sum(
            math.ceil(weights * ranks / self.world_size)
            for weights, ranks in self.shards(placement)
        )

    def weight_gathers(self, placement: Placement) -> float:
        """How often ZeRO-3 gathers a weight in one pass: once, or for the backward pass again.

        What it may keep is counted from a weight's use to its next one, in both passes: it keeps
        all for sure if that is twice the weights.
        """
        held = sum(weights for weights, _ in self.shards(placement))
        if self.kept_parameters >= 2 * held:
            return 1.0
        return 2 - min(_KEPT_BY_NEAR_LIMITS, self.kept_parameters / held)

    def shards(self, placement: Placement) -> list[tuple[int, int]]:
        """Weights that a rank holds with ZeRO 0 to 2, and over how many steps of E they repeat.

        Returns:
            Pairs (weights on a rank, E): those of all ranks first, with E = 1, then each sharded
            scale's own shard, which ranks r, r + E, r + 2 E, … hold.
        """
        everywhere, shards = self.shared_parameters, []
        for load, ranks in zip(self.scales, placement.ranks, strict=True):
            whole = load.parameters if ranks == 1 else load.unpartitioned
            everywhere += whole
            if ranks > 1:
                shards.append(((load.parameters - whole) // ranks, ranks))
        return [(everywhere, 1), *shards]

    def modulation_shards(self, placement: Placement) -> list[tuple[int, int]]:
        """The weights of modulation in each sharded scale's own shard, as in `shards`."""
        sharded = zip(self.scales, placement.ranks, strict=True)
        return [(load.modulation // ranks, ranks) for load, ranks in sharded if ranks > 1]
