"""Sizes, durations, counts and tables, for people."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipelines.console import visible

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


def format_count(number: int, one: str, many: str | None = None) -> str:
    """Write how many there are of something: 1 shard, 2 shards, 1,234 classes."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def format_table(rows: Sequence[Sequence[str]], *, align: str = "") -> str:
    """Lay rows out in columns, with two spaces between them.

    Args:
        rows: The cells, as many in each row, which are made `visible`.
        align: For each column "<" or ">", left or right; those that are not named are left.

    Returns:
        A line for each row.
    """
    shown = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    columns = list(zip(align.ljust(len(widths), "<"), widths, strict=True))
    return "\n".join(
        "  ".join(
            f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True)
        ).rstrip()
        for row in shown
    )
