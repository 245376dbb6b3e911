"""Decay of the exponential moving average of the weights."""

from dataclasses import dataclass


class EmaConfigError(ValueError):
    """A decay outside [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How fast the average forgets.

    Attributes:
        decay: Share of the average that an update keeps.
        warmup: Start with a small decay, so that the first average is not the initial weights.

    Raises:
        EmaConfigError: ``decay`` is outside [0, 1).
    """

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise EmaConfigError(f"decay={self.decay} must lie in [0, 1); usual is 0.9999.")


def ema_decay(update: int, *, decay: float, warmup: bool) -> float:
    """Decay to use at one update.

    Args:
        update: Number of updates before this one.
        decay: Decay in the long run.
        warmup: Whether to ramp up as ``(1 + update) / (10 + update)``.

    Returns:
        The share of the average to keep.
    """
    return min(decay, (1 + update) / (10 + update)) if warmup else decay
