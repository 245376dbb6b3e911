"""What a model holds during training, in numbers rather than bytes. Analytic.

How it is spread over ranks, and what that takes, is in ``cluster.prediction``.
"""

from collections.abc import Collection

from models.cost import ModelShape, checked_active


def activation_elements(
    shape: ModelShape, *, active: int | None = None, recomputed: Collection[int] = ()
) -> tuple[int, ...]:
    """Estimate the numbers that one image's forward pass keeps on each scale.

    In widths: 12 for each token and block, for the inputs and outputs of norms, projections and
    attention, and 2 MLP widths around the activation; 2 for each key of a scale that joins its keys
    and values to those of coarser ones (with full attention 1 for each token, whose result is cut
    up); 3 for each token in the last layer. A scale whose experts are recomputed keeps 5 instead of
    12 and no MLP widths: the block's tokens, and what attention takes and gives. What does not grow
    with the tokens is left out.

    Args:
        shape: The model.
        active: Number of active scales, the coarsest ones; None means all.
        recomputed: Scales, in the paper's numbering, whose experts are recomputed.

    Returns:
        Numbers by active scale, coarse to fine.

    Raises:
        CostError: ``active`` is not between 1 and the number of scales.
    """
    active = checked_active(shape, active)
    kept = []
    for position, (tokens, keys) in enumerate(
        zip(shape.tokens[:active], shape.keys(active), strict=True)
    ):
        again = shape.scales - 1 - position in recomputed
        block = tokens * (5 * shape.width if again else 12 * shape.width + 2 * shape.mlp_width)
        if shape.attention == "causal" and position:
            block += 2 * keys * shape.width
        elif shape.attention == "full":
            block += tokens * shape.width
        kept.append(shape.depth * block + 3 * tokens * shape.width)
    return tuple(kept)


def undivided_parameters(shape: ModelShape) -> tuple[int, ...]:
    """Count a scale's parameters that stay whole when its experts are sharded.

    They are no layers' weights: the gains of the norms of queries and keys, and the offsets of
    shared modulation. What some scales share counts for the coarsest of them.

    Returns:
        Counts by scale, coarse to fine.
    """
    counts = []
    for k in reversed(range(shape.scales)):
        count = 0
        if shape.qk_norm and shape.ties.owner(k, "attention") == k:
            count += 2 * (shape.width // shape.heads)
        if shape.modulation == "shared" and shape.ties.owner(k, "modulation") == k:
            count += 6 * shape.width
        counts.append(shape.depth * count)
    return tuple(counts)


def last_projection_parameters(shape: ModelShape) -> tuple[int, ...]:
    """Count the parameters of each scale's projection of tokens to patches, coarse to fine.

    What some scales share counts for the coarsest of them.
    """
    count = shape.patch_elements * (shape.width + 1)
    return tuple(
        count if shape.ties.owner(k, "output") == k else 0 for k in reversed(range(shape.scales))
    )
