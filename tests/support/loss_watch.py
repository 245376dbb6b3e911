"""A watch over losses for tests that are not about it."""

from __future__ import annotations

import torch

from trainer.engine.optimizer import OptimConfig
from trainer.training.hooks import LossWatch


def watch(optim: OptimConfig | None = None, **changes: int | str) -> LossWatch:
    """Return one that may end a run at its end alone, unless told otherwise."""
    settings: dict[str, int | str] = {
        "interval_images": 0,
        "total_images": 10**9,
        "patience_updates": 10,
        "precision": "fp32",
    }
    return LossWatch(
        torch.device("cpu"),
        optim=optim or OptimConfig(),
        **(settings | changes),  # type: ignore[arg-type]
    )
