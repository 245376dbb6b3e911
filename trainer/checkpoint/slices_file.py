"""The safetensors file that slices of parameters make: its header, and what lies where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from trainer.checkpoint.layout import tensor_key
from trainer.checkpoint.safetensors_header import safetensors_header
from trainer.checkpoint.spans import Span


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
