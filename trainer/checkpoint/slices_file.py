"""The safetensors file that slices of parameters make: its header, and what lies where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from trainer.checkpoint.layout import tensor_key
from trainer.checkpoint.manifest import BYTES_PER_ELEMENT
from trainer.checkpoint.spans import Span

LENGTH_BYTES = 8
_ALIGNMENT = 8


def first_elements(spans: Mapping[str, Span]) -> dict[str, int]:
    """Return where each slice begins among the values of one kind, in elements."""
    stops = accumulate(span.numel for span in spans.values())
    return {
        name: stop - span.numel for (name, span), stop in zip(spans.items(), stops, strict=True)
    }


def header(spans: Mapping[str, Span], kinds: Sequence[str]) -> bytes:
    """Return the first bytes of the file: the length of the JSON text in 8 bytes, and the text.

    Args:
        spans: The slice of each parameter, in the order of the file.
        kinds: The kinds of values of each, in the order of the file.
    """
    text = json.dumps(contents(spans, kinds), separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def contents(spans: Mapping[str, Span], kinds: Sequence[str]) -> dict[str, Any]:
    """Return what the header says: type, shape and place of each tensor, by its name."""
    first = first_elements(spans)
    per_kind = sum(span.numel for span in spans.values())
    return {
        tensor_key(kind, name, span.start): {
            "dtype": "F32",
            "shape": [span.numel],
            "data_offsets": [
                BYTES_PER_ELEMENT * (number * per_kind + first[name]),
                BYTES_PER_ELEMENT * (number * per_kind + first[name] + span.numel),
            ],
        }
        for number, kind in enumerate(kinds)
        for name, span in spans.items()
    }
