"""Prefix attention is dense attention under the block-causal mask."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.transformer.attention import prefix_attention

QUICK = settings(max_examples=40, deadline=None)

Shapes = tuple[list[tuple[int, int]], int, int, int]


@st.composite
def shapes(draw: st.DrawFn) -> Shapes:
    """(images, tokens) of each scale with falling images; heads; width of a head; seed."""
    scales = draw(st.integers(1, 4))
    images = sorted(draw(st.lists(st.integers(1, 4), min_size=scales, max_size=scales)))[::-1]
    tokens = draw(st.lists(st.integers(1, 9), min_size=scales, max_size=scales))
    sizes = list(zip(images, tokens, strict=True))
    return sizes, draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(0, 2**32))


def draw_qkv(shape: Shapes) -> list[tuple[torch.Tensor, ...]]:
    sizes, heads, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(
            torch.randn(b, n, heads, width, generator=generator, dtype=torch.float64)
            for b, n in sizes
        )
        for _ in range(3)
    ]


@QUICK
@given(shapes())
def test_equals_dense_masked_attention_of_each_image(shape: Shapes) -> None:
    sizes = shape[0]
    queries, keys, values = draw_qkv(shape)
    got = prefix_attention(queries, keys, values)
    for image in range(sizes[0][0]):
        carried = [p for p, (images, _) in enumerate(sizes) if images > image]
        owner = torch.cat([torch.full((sizes[p][1],), p) for p in carried])
        q, k, v = (
            torch.cat([part[p][image] for p in carried]).transpose(0, 1)
            for part in (queries, keys, values)
        )
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=owner[:, None] >= owner[None, :])
        expected = dense.transpose(0, 1).flatten(1).split([sizes[p][1] for p in carried])
        for p, want in zip(carried, expected, strict=True):
            torch.testing.assert_close(got[p][image], want, rtol=1e-12, atol=1e-12)


@QUICK
@given(shapes(), st.integers(0, 3))
def test_finer_tokens_do_not_touch_a_bit_of_coarser_ones(shape: Shapes, kept: int) -> None:
    queries, keys, values = draw_qkv(shape)
    kept = min(kept, len(queries))
    whole = prefix_attention(queries, keys, values)
    dropped = prefix_attention(queries[:kept], keys[:kept], values[:kept])
    altered = prefix_attention(
        queries,
        keys[:kept] + tuple(k + 5 for k in keys[kept:]),
        values[:kept] + tuple(v - 3 for v in values[kept:]),
    )
    for position in range(kept):
        assert torch.equal(dropped[position], whole[position])
        assert torch.equal(altered[position], whole[position])
    for position in range(kept, len(queries)):
        assert not torch.equal(altered[position], whole[position])
