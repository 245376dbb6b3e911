"""Exponential moving averages of the weights: how fast they forget, and where they are kept."""

from dataclasses import dataclass
from typing import Literal, get_args

EmaDevice = Literal["device", "host"]


class EmaConfigError(ValueError):
    """A decay outside [0, 1), or an unknown place."""


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How fast averages forget, and where they are kept.

    Attributes:
        decay: Share of the average that an update keeps.
        decays: Those of further averages, to choose from later; `decay` itself may be among them.
        warmup: Start with a small decay, so that the first average is not the initial weights.
        device: "device" keeps it beside the weights. "host" keeps it in page-locked host memory,
            and updates it beside the next forward pass, to the same bits. Where the weights are in
            host memory, on CPUs or with `engine.offload_optimizer`, both are the same.

    Raises:
        EmaConfigError: A decay is outside [0, 1), or ``device`` is unknown.
    """

    decay: float = 0.9999
    decays: tuple[float, ...] = ()
    warmup: bool = True
    device: EmaDevice = "device"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise EmaConfigError(f"decay={self.decay} must lie in [0, 1); usual is 0.9999.")
        if beyond := [decay for decay in self.decays if not 0 <= decay < 1]:
            raise EmaConfigError(f"decays={beyond} must lie in [0, 1); usual are 0.999 and 0.9999.")
        if self.device not in (known := get_args(EmaDevice)):
            raise EmaConfigError(f"device={self.device!r} is unknown; use one of {sorted(known)}.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of all averages: "ema" is that of ``decay``, and "ema_0.999" a further one."""
        return tuple(ema_kind(decay, main=self.decay) for decay in self.long_decays)

    def decays_at(self, update: int) -> tuple[float, ...]:
        """Decays to use at one update, in the order of ``kinds``.

        Args:
            update: Number of updates before this one.
        """
        return tuple(
            ema_decay(update, decay=decay, warmup=self.warmup) for decay in self.long_decays
        )

    @property
    def long_decays(self) -> tuple[float, ...]:
        """Decays in the long run, in the order of ``kinds``."""
        return tuple(dict.fromkeys((self.decay, *self.decays)))


def ema_kind(decay: float, *, main: float) -> str:
    """Name the average of a decay, beside the one of ``main``."""
    return "ema" if decay == main else f"ema_{decay!r}"


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
