"""How often a run is saved, how it waits for its store, and how much of it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from pipelines.domains import Checked


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Checked):
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

    interval_images: Annotated[int, Field(ge=0)] = 500_000
    keep_last: Annotated[int, Field(ge=1)] = 3
    keep_every_images: Annotated[int, Field(ge=0)] = 0
    keep_best: Annotated[int, Field(ge=0)] = 0
    when_busy: Literal["wait", "skip"] = "wait"
    patience_s: Annotated[float, Field(ge=0)] = 900.0
    grace_s: Annotated[float, Field(ge=0)] = 120.0
