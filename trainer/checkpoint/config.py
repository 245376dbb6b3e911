"""How often a run is saved, how it waits for its store, and how much of it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often a run is saved, how it waits for its store, and how much of it is kept.

    Attributes:
        interval_images: Images from one checkpoint to the next; what a failure costs at most. 0 is
            never.
        keep_last: Newest valid checkpoints to keep; with 1 there is nothing to fall back to.
        keep_every_images: Keep for good the first checkpoint at or after each multiple of this; 0
            keeps none.
        keep_best: Checkpoints of the lowest measured Fréchet distance to keep.
        when_busy: If a save is due while the last one is still on its way: "wait" for that one, or
            "skip" the new one.
        patience_s: Seconds for which a failing store is tried again before a save is given up;
            training goes on, until a next save waits for this one, and afterwards.
        grace_s: Seconds that a run which was asked to stop may take to save its last state.
    """

    interval_images: int = 500_000
    keep_last: int = 3
    keep_every_images: int = 0
    keep_best: int = 0
    when_busy: Literal["wait", "skip"] = "wait"
    patience_s: float = 900.0
    grace_s: float = 120.0

    def __post_init__(self) -> None:
        for name, meaning in (
            ("interval_images", "0 (never) or more"),
            ("keep_every_images", "0 (none) or more"),
            ("keep_best", "0 (none) or more"),
            ("patience_s", "0 (one try) or more seconds"),
            ("grace_s", "0 or more seconds"),
        ):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"checkpoint.{name}={value} must be {meaning}")
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={self.keep_last} must be at least 1")
