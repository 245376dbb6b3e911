"""Attention over the tokens of several scales, without a mask.

In the paper's block-causal attention a scale sees itself and the coarser scales. With tokens
ordered coarse to fine, those are a prefix, so one plain attention call for each scale does what one
masked call over all tokens would, without the work that the mask throws away and on every fast
kernel. The two ablations of the paper need no mask either.

In all of them image ``i`` of a scale is image ``i`` of every coarser scale; a finer scale may hold
fewer images. But with full attention, it may also hold a multiple of them, so that several images
see the same coarser tokens (``models.axes.to_images``). Arguments and results are tuples over the
scales, coarse to fine; results hold heads side by side.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.transformer.config import AttentionKind, TransformerConfigError

HeadTokens = Float[Tensor, "_b _n _heads _e"]
"""Queries, keys or values of one scale."""

Gathered = tuple[Float[Tensor, "_b _n _d"], ...]
"""For each scale what its tokens gathered."""


def prefix_attention(
    queries: tuple[HeadTokens, ...],
    keys: tuple[HeadTokens, ...],
    values: tuple[HeadTokens, ...],
) -> Gathered:
    """Attend from each scale to itself and all coarser scales (the paper's causal mask)."""
    return tuple(
        _attend(query, _prefix(keys[: position + 1]), _prefix(values[: position + 1]))
        for position, query in enumerate(queries)
    )


def own_scale_attention(
    queries: tuple[HeadTokens, ...],
    keys: tuple[HeadTokens, ...],
    values: tuple[HeadTokens, ...],
) -> Gathered:
    """Attend from each scale to itself alone (the paper's ablation without exchange)."""
    return tuple(_attend(*scale) for scale in zip(queries, keys, values, strict=True))


def full_attention(
    queries: tuple[HeadTokens, ...],
    keys: tuple[HeadTokens, ...],
    values: tuple[HeadTokens, ...],
) -> Gathered:
    """Attend from each scale to all scales that the image carries (the ablation without a mask).

    Images that carry the same scales are neighbours, so there is one call for each number of them.

    Raises:
        TransformerConfigError: Images share coarser scales, which here depend on the finest.
    """
    tokens = [query.shape[1] for query in queries]
    batches = [query.shape[0] for query in queries]
    if max(batches) > batches[0]:
        raise TransformerConfigError(
            f"with attention=full coarse scales see the finest, so {max(batches)} images cannot "
            f"share those of {batches[0]}; draw each image with coarse scales of its own"
        )
    gathered: list[list[Tensor]] = [[] for _ in queries]
    # From the images that carry all scales, the first of the batch, to those with the coarsest.
    for first, last in pairwise((0, *reversed(batches))):
        if first == last:
            continue
        carried = sum(batch > first for batch in batches)
        joined = [
            torch.cat([part[first:last] for part in parts[:carried]], dim=1)
            for parts in (queries, keys, values)
        ]
        mixed = torch.split(_attend(*joined), tokens[:carried], dim=1)
        for scale, part in zip(gathered, mixed, strict=False):
            scale.append(part)
    return tuple(torch.cat(parts) for parts in gathered)


ATTENTIONS: Mapping[AttentionKind, Callable[..., Gathered]] = {
    "causal": prefix_attention,
    "full": full_attention,
    "own_scale": own_scale_attention,
}


def finest_attention(
    kind: AttentionKind,
    query: HeadTokens,
    keys: tuple[HeadTokens, ...],
    values: tuple[HeadTokens, ...],
) -> Float[Tensor, "_b _n _d"]:
    """Attend from the finest scale alone, as the attention of a kind does among all scales.

    Args:
        kind: "causal" or "own_scale": with "full" coarser scales depend on the finest.
        query: Queries of the finest scale.
        keys: Keys of all scales.
        values: Values of all scales.
    """
    if kind == "own_scale":
        return _attend(query, keys[-1], values[-1])
    return _attend(query, _prefix(keys), _prefix(values))


def _attend(query: HeadTokens, key: HeadTokens, value: HeadTokens) -> Float[Tensor, "_b _n _d"]:
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return mixed.transpose(1, 2).flatten(2)


def _prefix(scales: tuple[HeadTokens, ...]) -> HeadTokens:
    """Join the tokens of all scales, for the images that the last one holds."""
    if len(scales) == 1:
        return scales[0]
    images, layouts = scales[-1].shape[0], scales[0].shape[0]
    if images <= layouts:
        return torch.cat([tokens[:images] for tokens in scales], dim=1)
    variations = images // layouts
    # Copied once: what several images share is read where it is.
    parts = [_of_layouts(tokens, layouts, variations) for tokens in scales]
    return torch.cat(parts, dim=2).flatten(0, 1)


def _of_layouts(tokens: HeadTokens, layouts: int, variations: int) -> Tensor:
    """View tokens as ``[layouts, variations, n, heads, e]``."""
    if tokens.shape[0] == layouts:
        return tokens.unsqueeze(1).expand(-1, variations, -1, -1, -1)
    return tokens.view(layouts, variations, *tokens.shape[1:])
