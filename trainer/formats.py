"""Sizes and durations, for people."""

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


def format_duration(seconds: float) -> str:
    """Write a duration for people: 45s, 3m05s, 2h07m, and ∞ for one that has no end."""
    if math.isinf(seconds):
        return "∞"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
