"""The run's clock: progress is counted in images, so a changed batch size moves no schedule."""

from __future__ import annotations

import math


def due(before_images: int, after_images: int, interval_images: int) -> bool:
    """Tell whether a multiple of the interval lies in (before, after].

    Args:
        before_images: Images seen before the update.
        after_images: Images seen after it.
        interval_images: The interval; 0 means never.

    Returns:
        True when something that happens every `interval_images` images happens now.
    """
    if interval_images <= 0:
        return False
    return before_images // interval_images < after_images // interval_images


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
