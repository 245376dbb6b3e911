"""Block-causal attention over scales without a mask.

A scale sees itself and the coarser scales. With tokens ordered coarse to fine, those are a prefix,
so one plain attention call for each scale does what one masked call over all tokens would, without
the work that the mask throws away and on every fast kernel.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

HeadTokens = Float[Tensor, "_b _n _heads _e"]
"""Queries, keys or values of one scale."""


def prefix_attention(
    queries: tuple[HeadTokens, ...],
    keys: tuple[HeadTokens, ...],
    values: tuple[HeadTokens, ...],
) -> tuple[Float[Tensor, "_b _n _d"], ...]:
    """Attend from each scale to itself and all coarser scales.

    Args:
        queries: For each scale, coarse to fine. Image ``i`` of a scale is image ``i`` of every
            coarser scale; a finer scale may hold fewer images.
        keys: Keys, of the same shapes.
        values: Values, of the same shapes.

    Returns:
        For each scale what its tokens gathered, heads side by side.
    """
    mixed = []
    for position, query in enumerate(queries):
        seen_keys = _prefix(keys[: position + 1])
        seen_values = _prefix(values[: position + 1])
        gathered = F.scaled_dot_product_attention(
            query.transpose(1, 2), seen_keys.transpose(1, 2), seen_values.transpose(1, 2)
        )
        mixed.append(gathered.transpose(1, 2).flatten(2))
    return tuple(mixed)


def _prefix(scales: tuple[HeadTokens, ...]) -> HeadTokens:
    """Join the tokens of all scales, for the images that the last one holds."""
    if len(scales) == 1:
        return scales[0]
    images = scales[-1].shape[0]
    return torch.cat([tokens[:images] for tokens in scales], dim=1)
