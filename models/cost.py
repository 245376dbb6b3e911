"""What a model costs: parameters, multiply-adds, and bytes on each rank. Analytic, without torch.

Notation: d width, L depth, N_k tokens of scale k, A_k keys that a token of scale k sees (its own
scale's and all coarser ones'). A multiply-add is one multiplication and one addition, 2 FLOPs;
training takes about 6 FLOPs for each multiply-add of the forward pass.
"""

import math
from dataclasses import dataclass
from typing import Literal

from models.flow.stages import Stages, default_critical_times

_TIME_FREQUENCIES = 256
_FULL_BYTES = 4
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


class CostError(ValueError):
    """A question about costs that has no answer."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """All sizes of a model that its cost depends on.

    Attributes:
        depth: Number of blocks, L.
        width: Width of a token, d.
        heads: Attention heads.
        patch_size: Side of a patch.
        scales: Number of scales, K.
        channels: Channels of the images or latents.
        image_size: Height and width of the images or latents.
        classes: Number of classes, without the null label.
        mlp_ratio: Width of the MLP's hidden layer, in widths.
        qk_norm: Whether queries and keys have norms with learned gains.
    """

    depth: int
    width: int
    heads: int
    patch_size: int
    scales: int
    channels: int
    image_size: int
    classes: int
    mlp_ratio: float = 4.0
    qk_norm: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each scale, coarse to fine."""
        return tuple(
            ((self.image_size >> k) // self.patch_size) ** 2 for k in reversed(range(self.scales))
        )

    @property
    def keys(self) -> tuple[int, ...]:
        """Keys that a token of each scale sees, coarse to fine."""
        tokens = self.tokens
        return tuple(sum(tokens[: position + 1]) for position in range(self.scales))

    @property
    def mlp_width(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.width * self.mlp_ratio)

    @property
    def patch_elements(self) -> int:
        """Numbers in one patch."""
        return self.patch_size**2 * self.channels


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameter counts.

    Attributes:
        shared: Time embedding and label table.
        per_scale: Each scale's own weights; the same for every scale.
        total: All scales and what they share.
    """

    shared: int
    per_scale: int
    total: int


def parameters(shape: ModelShape) -> Parameters:
    """Count the parameters: for mlp_ratio 4, 18 d^2 + 15 d for each block and scale."""
    d, hidden, patch = shape.width, shape.mlp_width, shape.patch_elements
    attention = 4 * d * d + 4 * d + (2 * (d // shape.heads) if shape.qk_norm else 0)
    mlp = 2 * d * hidden + hidden + d
    modulation = 6 * d * d + 6 * d
    embed = patch * d + d
    final = d * patch + patch + 2 * d * d + 2 * d
    per_scale = shape.depth * (attention + mlp + modulation) + embed + final
    shared = _TIME_FREQUENCIES * d + d + d * d + d + (shape.classes + 1) * d
    return Parameters(shared=shared, per_scale=per_scale, total=shared + shape.scales * per_scale)


def multiply_adds(shape: ModelShape, *, active: int | None = None) -> int:
    """Count the multiply-adds of matrix products in the forward pass of one image.

    Args:
        shape: The model.
        active: Number of active scales, the coarsest ones; None means all.

    Raises:
        CostError: ``active`` is not between 1 and the number of scales.
    """
    d, hidden, patch = shape.width, shape.mlp_width, shape.patch_elements
    active = _checked_active(shape, active)
    total = _TIME_FREQUENCIES * d + d * d
    for tokens, keys in zip(shape.tokens[:active], shape.keys[:active], strict=True):
        products = tokens * (4 * d * d + 2 * d * hidden) + 2 * tokens * keys * d
        total += shape.depth * (products + 6 * d * d) + 2 * tokens * patch * d + 2 * d * d
    return total


def average_multiply_adds(
    shape: ModelShape, *, critical_times: tuple[float, ...] | None = None
) -> float:
    """Average the multiply-adds of a forward pass over the time axis, as sampling spends them.

    Args:
        shape: The model.
        critical_times: T_1 > ... > T_{K-1}; None takes the defaults for K scales.

    Raises:
        CostError: The number of times does not fit the number of scales.
        StagesError: The times do not decrease strictly inside (0, 1).
    """
    stages = Stages(
        default_critical_times(shape.scales) if critical_times is None else critical_times
    )
    if stages.scales != shape.scales:
        raise CostError(
            f"critical_times={critical_times} are for {stages.scales} scales, but the model has "
            f"{shape.scales}: give {shape.scales - 1} times."
        )
    return sum(
        (segment.end - segment.start) * multiply_adds(shape, active=segment.active)
        for segment in stages.segments
    )


def attention_pairs(shape: ModelShape, *, active: int | None = None, dense: bool = False) -> int:
    """Count the query-key pairs that one attention layer computes for one image.

    Args:
        shape: The model.
        active: Number of active scales, the coarsest ones; None means all.
        dense: Count what a masked attention over all tokens computes, instead of the prefixes.

    Raises:
        CostError: ``active`` is not between 1 and the number of scales.
    """
    active = _checked_active(shape, active)
    if dense:
        return shape.keys[active - 1] ** 2
    return sum(
        tokens * keys
        for tokens, keys in zip(shape.tokens[:active], shape.keys[:active], strict=True)
    )


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
        images_per_rank: Images of one micro-batch, dealt out evenly to the stages.

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
    return StateBytes(
        weights=element * (part if zero_stage >= 3 else whole),
        gradients=element * (part if zero_stage >= 2 else whole),
        optimizer=_FULL_BYTES * copies * stateful,
        ema=_FULL_BYTES * stateful,
        activations=element * _activation_elements(shape, images=images_per_rank),
    )


def _activation_elements(shape: ModelShape, *, images: int) -> int:
    """Numbers kept for the backward pass, without recomputation.

    In widths: 12 for each token and block, for the inputs and outputs of norms, projections and
    attention, and 2 MLP widths around the activation; 2 for each key of a scale that joins its keys
    and values to those of coarser ones; 3 for each token in the last layer. The scale at position
    p is carried by (K - p) of K images. What does not grow with the tokens is left out.
    """
    total = 0.0
    for position, (tokens, keys) in enumerate(zip(shape.tokens, shape.keys, strict=True)):
        share = (shape.scales - position) / shape.scales
        joined = 2 * keys * shape.width if position else 0
        block = tokens * (12 * shape.width + 2 * shape.mlp_width) + joined
        total += share * images * (shape.depth * block + 3 * tokens * shape.width)
    return math.ceil(total)


def _checked_active(shape: ModelShape, active: int | None) -> int:
    if active is None:
        return shape.scales
    if not 1 <= active <= shape.scales:
        raise CostError(f"active={active} must be between 1 and the model's {shape.scales} scales.")
    return active
