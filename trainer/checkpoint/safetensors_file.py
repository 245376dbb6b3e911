"""The safetensors file that slices of parameters make."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

from trainer.checkpoint.layout import tensor_key
from trainer.checkpoint.manifest import BYTES_PER_ELEMENT
from trainer.checkpoint.slices import Span

_LENGTH_BYTES = 8
# Of the first value: copies to places off a cache line take a fourth longer.
_ALIGNMENT = 64


def safetensors_header(
    shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the length of the JSON text in 8 bytes, and the text.

    Equal arguments make equal bytes; safetensors' own writer shuffles the metadata.

    Args:
        shapes: Shape of each float32 tensor by its name; they lie one after the other.
        metadata: What else the file tells; None leaves it out.
    """
    sizes = (BYTES_PER_ELEMENT * math.prod(shape) for shape in shapes.values())
    bounds = pairwise(accumulate(sizes, initial=0))
    contents: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    for (name, shape), place in zip(shapes.items(), bounds, strict=True):
        contents[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": place}
    text = json.dumps(contents, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def first_elements(spans: Mapping[str, Span]) -> dict[str, int]:
    """Return where each slice begins among the values of one kind, in elements."""
    stops = accumulate(span.numel for span in spans.values())
    return {
        name: stop - span.numel for (name, span), stop in zip(spans.items(), stops, strict=True)
    }


def header(spans: Mapping[str, Span], kinds: Sequence[str]) -> bytes:
    """Return the first bytes of the file, after which the slices lie, kind by kind.

    Args:
        spans: The slice of each parameter, in the order of the file.
        kinds: The kinds of values of each, in the order of the file.
    """
    return safetensors_header(
        {
            tensor_key(kind, name, span.start): (span.numel,)
            for kind in kinds
            for name, span in spans.items()
        }
    )
