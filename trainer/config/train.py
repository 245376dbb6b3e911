"""How long a run trains, and on what batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from models.ema import EmaConfig
from pipelines.domains import Checked


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Checked):
    """What one training run is, apart from model, data and optimizer.

    Attributes:
        seed: Seed of every random stream and of the initial weights.
        total_images: Length of the run; an image seen twice counts twice.
        global_batch: Images per update over all ranks.
        label_dropout: Share of labels replaced by the null label, which guidance needs.
        ema: The weights' moving average.
        max_skipped_updates: Updates in a row that may be skipped for a non-finite gradient before
            the run stops.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    total_images: Annotated[int, Field(ge=1)] = 1_000_000
    global_batch: Annotated[int, Field(ge=1)] = 256
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    ema: EmaConfig = field(default_factory=EmaConfig)
    max_skipped_updates: Annotated[int, Field(ge=0)] = 10
