"""What a model computes and holds. Analytic: no model is built.

Notation: d width, L depth, N_k tokens of scale k, A_k keys that a token of scale k sees. A
multiply-add is one multiplication and one addition, 2 FLOPs; training takes about 6 FLOPs for each
multiply-add of the forward pass. What it takes to hold is in ``models.transformer.cost``.

How it is spread over ranks, and what that takes, is in ``trainer.planning``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from itertools import accumulate

from models.flow.stages import Stages, default_critical_times
from models.transformer.config import Part, TransformerConfig, check_image

_TIME_FREQUENCIES = 256


class CostError(ValueError):
    """A question about costs that has no answer."""


@dataclass(frozen=True, kw_only=True)
class ModelShape(TransformerConfig):
    """All sizes of a model that its cost depends on: a transformer and what it is built for.

    Attributes:
        scales: Number of scales, K.
        channels: Channels of the images or latents.
        image_size: Height and width of the images or latents.
        classes: Number of classes, without the null label.

    Raises:
        TransformerConfigError: A size is not positive, or sizes do not fit each other.
    """

    scales: int
    channels: int
    image_size: int
    classes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_image(
            self,
            scales=self.scales,
            channels=self.channels,
            image_size=self.image_size,
            classes=self.classes,
        )

    @classmethod
    def of(
        cls,
        config: TransformerConfig,
        *,
        scales: int,
        channels: int,
        image_size: int,
        classes: int,
    ) -> "ModelShape":
        """Join a transformer's sizes and those of what it is built for."""
        return cls(
            **{field.name: getattr(config, field.name) for field in fields(TransformerConfig)},
            scales=scales,
            channels=channels,
            image_size=image_size,
            classes=classes,
        )

    @property
    def patches(self) -> tuple[int, ...]:
        """Patches of each scale, coarse to fine."""
        return tuple(
            ((self.image_size >> k) // self.patch_size) ** 2 for k in reversed(range(self.scales))
        )

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each scale, coarse to fine: its patches, and on the coarsest class tokens."""
        coarsest, *finer = self.patches
        return (coarsest + self.class_tokens, *finer)

    def keys(self, active: int) -> tuple[int, ...]:
        """Keys that a token of each active scale sees, coarse to fine."""
        tokens = self.tokens[:active]
        if self.attention == "own_scale":
            return tokens
        return (sum(tokens),) * active if self.attention == "full" else tuple(accumulate(tokens))

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
        shared: Time embedding, label table and positions of class tokens.
        per_scale: Each scale's own weights, coarse to fine; what some scales share counts for the
            coarsest of them.
    """

    shared: int
    per_scale: tuple[int, ...]

    @property
    def total(self) -> int:
        """All scales and what they share."""
        return self.shared + sum(self.per_scale)


def parameters(shape: ModelShape) -> Parameters:
    """Count the parameters: for mlp_ratio 4, 18 d^2 + 15 d for each block and scale."""
    d = shape.width
    counts = _part_parameters(shape)
    per_scale = tuple(
        sum(count for part, count in counts.items() if shape.ties.owner(k, part) == k)
        for k in reversed(range(shape.scales))
    )
    time_and_label = _TIME_FREQUENCIES * d + d + d * d + d + (shape.classes + 1) * d
    return Parameters(shared=time_and_label + shape.class_tokens * d, per_scale=per_scale)


def multiply_adds(shape: ModelShape, *, active: int | None = None) -> int:
    """Count the multiply-adds of matrix products in the forward pass of one image.

    Args:
        shape: The model.
        active: Number of active scales, the coarsest ones; None means all.

    Raises:
        CostError: ``active`` is not between 1 and the number of scales.
    """
    d, hidden, patch = shape.width, shape.mlp_width, shape.patch_elements
    active = check_active(shape, active)
    modulations = 1 if shape.modulation == "shared" else shape.depth
    total = _TIME_FREQUENCIES * d + d * d
    for patches, tokens, keys in zip(
        shape.patches[:active], shape.tokens[:active], shape.keys(active), strict=True
    ):
        products = tokens * (4 * d * d + 2 * d * hidden) + 2 * tokens * keys * d
        total += shape.depth * products + modulations * 6 * d * d
        total += 2 * patches * patch * d + 2 * d * d
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


def varied_multiply_adds(shape: ModelShape, *, variations: int) -> float:
    """Count the multiply-adds for one of several images that share all scales but the finest.

    It is a forward pass with all scales active, in which coarse scales are computed once for all
    the variations.

    Args:
        shape: The model.
        variations: How many images share their coarse scales.

    Raises:
        CostError: There is no coarse scale, or it depends on the finest.
    """
    if shape.scales < 2 or shape.attention == "full":
        raise CostError(
            f"images of a model with scales={shape.scales} and attention={shape.attention} share "
            "nothing: that takes a coarse scale which does not see the finest."
        )
    coarse = multiply_adds(shape, active=shape.scales - 1)
    return multiply_adds(shape) - coarse + coarse / variations


def training_multiply_adds(shape: ModelShape) -> float:
    """Average the forward multiply-adds of a training image: every stage has an equal share.

    A backward pass takes twice as many again.
    """
    return sum(multiply_adds(shape, active=a) for a in range(1, shape.scales + 1)) / shape.scales


def training_flops(shape: ModelShape) -> float:
    """Average the FLOPs of an image's forward and backward pass: 6 for each multiply-add."""
    return 6 * training_multiply_adds(shape)


def check_active(shape: ModelShape, active: int | None) -> int:
    """Return the number of active scales, all by default.

    Raises:
        CostError: ``active`` is not between 1 and the number of scales.
    """
    if active is None:
        return shape.scales
    if not 1 <= active <= shape.scales:
        raise CostError(f"active={active} must be between 1 and the model's {shape.scales} scales.")
    return active


def _part_parameters(shape: ModelShape) -> Mapping[Part, int]:
    """Parameters of each part of one scale, over all blocks."""
    d, hidden, patch = shape.width, shape.mlp_width, shape.patch_elements
    head_norms = 2 * (d // shape.heads) if shape.qk_norm else 0
    modulation = 6 * d * d + 6 * d
    return {
        "embedding": patch * d + d,
        "attention": shape.depth * (4 * d * d + 4 * d + head_norms),
        "mlp": shape.depth * (2 * d * hidden + hidden + d),
        "modulation": (
            modulation + shape.depth * 6 * d
            if shape.modulation == "shared"
            else shape.depth * modulation
        ),
        "output": d * patch + patch + 2 * d * d + 2 * d,
    }


def activation_elements(
    shape: ModelShape, *, active: int | None = None, checkpointed: Collection[int] = ()
) -> tuple[int, ...]:
    """Estimate the numbers that one image's forward pass keeps on each scale.

    In widths: 12 for each token and block, for the inputs and outputs of norms, projections and
    attention, and 2 MLP widths around the activation; 2 for each key of a scale that joins its keys
    and values to those of coarser ones (with full attention 1 for each token, whose result is cut
    up); 3 for each token in the last layer; and in every block the image's modulation, 6 and 2
    where it scales. A scale whose experts are recomputed keeps 5 instead of 12 and no MLP widths:
    the block's tokens, and what attention takes and gives; and 6 of modulation. What is left out
    grows neither with the tokens nor with the blocks.

    Args:
        shape: The model.
        active: Number of active scales, the coarsest ones; None means all.
        checkpointed: Scales, in the paper's numbering, whose experts are recomputed.

    Returns:
        Numbers by active scale, coarse to fine.

    Raises:
        CostError: ``active`` is not between 1 and the number of scales.
    """
    active = check_active(shape, active)
    kept = []
    for position, (tokens, keys) in enumerate(
        zip(shape.tokens[:active], shape.keys(active), strict=True)
    ):
        again = shape.scales - 1 - position in checkpointed
        block = tokens * (5 * shape.width if again else 12 * shape.width + 2 * shape.mlp_width)
        if shape.attention == "causal" and position:
            block += 2 * keys * shape.width
        elif shape.attention == "full":
            block += tokens * shape.width
        block += (6 if again else 8) * shape.width
        kept.append(shape.depth * block + 3 * tokens * shape.width)
    return tuple(kept)


def partitioned_parameters(shape: ModelShape) -> tuple[Mapping[Part, int], ...]:
    """Count a scale's parameters that are divided when its experts are sharded.

    They are, in every block but the first, the modulation of the block, queries, keys and values,
    and the MLP. What some scales share counts for the coarsest of them.

    Returns:
        Counts by part, of each scale, coarse to fine.
    """
    d, hidden, blocks = shape.width, shape.mlp_width, shape.depth - 1
    divided: dict[Part, int] = {
        "attention": blocks * (3 * d * d + 3 * d),
        "mlp": blocks * (2 * d * hidden + hidden + d),
        "modulation": 0 if shape.modulation == "shared" else blocks * (6 * d * d + 6 * d),
    }
    return tuple(
        {part: count if shape.ties.owner(k, part) == k else 0 for part, count in divided.items()}
        for k in reversed(range(shape.scales))
    )
