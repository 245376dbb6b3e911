"""What a run carries from one update to the next: counters, and each rank's fp32 shard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Fragment:
    """The slice of one parameter that a rank holds, as live views of its fp32 shard.

    Attributes:
        name: The parameter's name in the model.
        start: Where the slice begins in the flattened parameter, in elements.
        shape: Shape of the whole parameter.
        tensors: 1-D float32 views of equal length, by kind: "master" (the weights), "exp_avg",
            "exp_avg_sq", "ema". Writing into them changes the run.

    Raises:
        ValueError: The tensors are not such views, or reach outside the parameter.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        described = {
            kind: (tuple(tensor.shape), tensor.dtype) for kind, tensor in self.tensors.items()
        }
        if set(described.values()) != {((self.numel,), torch.float32)}:
            raise ValueError(
                f"the fragment of {self.name} must hold 1-D float32 tensors of one length, "
                f"got {described}"
            )
        whole = math.prod(self.shape)
        if self.start < 0 or self.start + self.numel > whole:
            raise ValueError(
                f"the fragment of {self.name} covers elements {self.start} to "
                f"{self.start + self.numel}, but shape {self.shape} has {whole}"
            )

    @property
    def numel(self) -> int:
        """Length of the slice in elements."""
        return next((tensor.numel() for tensor in self.tensors.values()), 0)


@dataclass(kw_only=True)
class TrainState:
    """The run's counters; the loop advances them in place.

    Attributes:
        images: Images seen, over all ranks; the run's clock.
        updates: Optimizer updates applied.
        skipped_updates: Updates skipped because a gradient was not finite.
    """

    images: int = 0
    updates: int = 0
    skipped_updates: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the counters as plain JSON values."""
        return asdict(self)
