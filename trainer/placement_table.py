"""Candidates for a placement as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.planner import Candidate

_GIB = 2**30
_SHORT = {"gradients": "grads", "activations": "activ.", "reduction": "reduce"}


def placement_table(
    shown: Sequence[Candidate], *, chosen: Candidate | None = None, left_out: int = 0
) -> str:
    """Render one row for each candidate: GiB of a rank by part, ms of a step by part, images/s.

    Args:
        shown: The candidates, at least one.
        chosen: The one to mark.
        left_out: How many more there are.
    """
    offload = any(one.memory.host for one in shown)
    head = ["", "placement", "ZeRO"]
    head += [_SHORT.get(name, name) for name in shown[0].memory.parts]
    head += ["GiB", *(["host"] if offload else []), "fits"]
    head += [_SHORT.get(name, name) for name in _times(shown[0], offload)]
    head += ["ms", "images/s"]
    rows = [head]
    for one in shown:
        row = ["*" if one == chosen else "", str(one.placement), str(one.zero_stage or "-")]
        row += [f"{value / _GIB:.2f}" for value in one.memory.parts.values()]
        row += [f"{one.memory.total / _GIB:.2f}"]
        row += [f"{one.memory.host / _GIB:.2f}"] if offload else []
        row += ["yes" if one.fits else "no"]
        row += [f"{1000 * value:.1f}" for value in _times(one, offload).values()]
        row += [f"{1000 * one.time.total:.1f}", f"{one.images_per_second:,.0f}"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if left_out:
        lines.append(f"… and {left_out} more (--all)")
    return "\n".join(lines)


def as_json(one: Candidate) -> dict[str, Any]:
    """Return a candidate as plain values: bytes and seconds."""
    return {
        "placement": {str(k): ranks for k, ranks in one.placement.sharded.items()},
        "zero_stage": one.zero_stage,
        "bytes_per_rank": {
            **one.memory.parts,
            "total": one.memory.total,
            "host": one.memory.host,
        },
        "fits": one.fits,
        "seconds_per_step": {**one.time.parts, "total": one.time.total},
        "images_per_second": one.images_per_second,
    }


def _times(one: Candidate, offload: bool) -> dict[str, float]:
    return {name: value for name, value in one.time.parts.items() if offload or name != "offload"}
