"""Sizes in bytes, for people."""

from __future__ import annotations

import math

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def format_bytes(size: float) -> str:
    """Write a size for people: 16 B, 1.5 KiB, 123 MiB."""
    if size < 1024:
        return f"{size:.0f} B"
    power = min(int(math.log2(size)) // 10, len(_UNITS))
    value = size / 1024**power
    return f"{value:.{0 if value >= 100 else 1}f} {_UNITS[power - 1]}"
