"""The header is one that safetensors reads, and tells where each tensor lies."""

from __future__ import annotations

import math
import struct

from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from trainer.checkpoint.objects import safetensors_header

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
    st.lists(st.integers(0, 4), max_size=3),
    max_size=4,
)


@given(shapes=SHAPES, metadata=st.none() | st.just({"run": "ü", "images": "7"}))
def test_tensors_lie_one_after_the_other(
    shapes: dict[str, list[int]], metadata: dict[str, str] | None
) -> None:
    header = safetensors_header(shapes, metadata)
    assert len(header) % 8 == 0
    total = sum(math.prod(shape) for shape in shapes.values())
    values = struct.pack(f"<{total}f", *range(total))
    found = load(header + values)
    assert {name: list(each.shape) for name, each in found.items()} == shapes
    assert [x for name in shapes for x in found[name].flatten().tolist()] == list(range(total))


def test_the_bytes_are_these() -> None:
    text = b'{"__metadata__":{"run":"a"},"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    text += b" " * (-(8 + len(text)) % 64)
    found = safetensors_header({"w": (2, 3)}, {"run": "a"})
    assert found == struct.pack("<Q", len(text)) + text
    text = b'{"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    text += b'"a":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}'
    text += b" " * (-(8 + len(text)) % 64)
    assert safetensors_header({"b": (1,), "a": ()}) == struct.pack("<Q", len(text)) + text
