"""What a model holds during training: bytes of state and activations on each rank. Analytic."""

import math
from dataclasses import dataclass
from typing import Literal

from models.cost import CostError, ModelShape, checked_active, parameters

_FULL_BYTES = 4
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes that one rank holds during training.

    Attributes:
        weights: Weights of the forward pass.
        gradients: Gradients.
        optimizer: Two AdamW moments, and the float32 master weights where they are a copy.
        ema: Moving average of the weights, in float32.
        activations: Estimate of what the forward pass keeps for the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


def state_bytes(
    shape: ModelShape,
    *,
    zero_stage: int,
    world_size: int,
    precision: Literal["fp32", "bf16"],
    images_per_rank: int = 0,
    stratified: bool = True,
) -> StateBytes:
    """Predict the bytes on each rank with DeepSpeed ZeRO and AdamW.

    Stage 1 splits optimizer state and moving average over the ranks, stage 2 the gradients too,
    stage 3 the weights too. Stages 1 to 3 keep float32 master weights beside the forward pass's in
    either precision; stage 0 only in bf16. Communication buffers and the allocator's waste are not
    counted.

    Args:
        shape: The model.
        zero_stage: 0 to 3.
        world_size: Number of ranks.
        precision: Of weights, gradients and activations.
        images_per_rank: Images of one micro-batch.
        stratified: Whether the images are dealt out evenly to the stages; otherwise all of them
            may be at the stage that carries every scale.

    Raises:
        CostError: An argument is out of range.
    """
    if zero_stage not in range(4) or world_size < 1 or images_per_rank < 0:
        raise CostError(
            f"zero_stage={zero_stage} must be 0 to 3, world_size={world_size} at least 1 and "
            f"images_per_rank={images_per_rank} not negative."
        )
    if precision not in _ELEMENT_BYTES:
        raise CostError(f"precision={precision!r} is unknown; use one of {list(_ELEMENT_BYTES)}.")
    whole = parameters(shape).total
    part = math.ceil(whole / world_size)
    element = _ELEMENT_BYTES[precision]
    stateful = part if zero_stage >= 1 else whole
    copies = 2 if precision == "fp32" and zero_stage == 0 else 3
    stages = range(1, shape.scales + 1) if stratified else [shape.scales]
    kept = sum(activation_elements(shape, active=active) for active in stages) / len(stages)
    return StateBytes(
        weights=element * (part if zero_stage >= 3 else whole),
        gradients=element * (part if zero_stage >= 2 else whole),
        optimizer=_FULL_BYTES * copies * stateful,
        ema=_FULL_BYTES * stateful,
        activations=math.ceil(element * images_per_rank * kept),
    )


def activation_elements(shape: ModelShape, *, active: int | None = None) -> int:
    """Estimate the numbers that one image's forward pass keeps, without recomputation.

    In widths: 12 for each token and block, for the inputs and outputs of norms, projections and
    attention, and 2 MLP widths around the activation; 2 for each key of a scale that joins its keys
    and values to those of coarser ones (with full attention 1 for each token, whose result is cut
    up); 3 for each token in the last layer. What does not grow with the tokens is left out.

    Args:
        shape: The model.
        active: Number of active scales, the coarsest ones; None means all.

    Raises:
        CostError: ``active`` is not between 1 and the number of scales.
    """
    active = checked_active(shape, active)
    tokens = sum(shape.tokens[:active])
    block = tokens * (12 * shape.width + 2 * shape.mlp_width)
    if shape.attention == "causal":
        block += 2 * sum(shape.keys(active)[1:]) * shape.width
    elif shape.attention == "full":
        block += tokens * shape.width
    return shape.depth * block + 3 * tokens * shape.width
