"""Metrics recorded as device tensors with a declared reduction, reduced over ranks when flushed.

Recording never waits for the device; the flush, every so many updates, is the only place where
values travel between ranks and to the host.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["mean", "sum", "max"]


class MetricBuffer:
    """Accumulates values between flushes; every rank must record the same names.

    Args:
        device: Where values are accumulated.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._totals: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._reductions: dict[str, Reduction] = {}

    def record(self, name: str, value: Tensor | float, *, reduction: Reduction = "mean") -> None:
        """Add one value to a metric.

        Args:
            name: Metric name.
            value: A scalar; a tensor stays on its device.
            reduction: How values combine, over time and over ranks.

        Raises:
            ValueError: If the metric was recorded with another reduction before.
        """
        known = self._reductions.setdefault(name, reduction)
        if known != reduction:
            raise ValueError(f"metric {name} is reduced by {known}, not by {reduction}")
        scalar = torch.as_tensor(value, dtype=torch.float64).detach().to(self._device)
        if name not in self._totals:
            self._totals[name], self._counts[name] = scalar.clone(), 1
            return
        self._counts[name] += 1
        total = self._totals[name]
        self._totals[name] = torch.maximum(total, scalar) if reduction == "max" else total + scalar

    def flush(self) -> dict[str, float]:
        """Reduce over ranks, empty the buffer, and return values by name (a collective call)."""
        values: dict[str, float] = {}
        for reduction in ("mean", "sum", "max"):
            names = sorted(name for name in self._totals if self._reductions[name] == reduction)
            if not names:
                continue
            stacked = torch.stack([self._totals[name] for name in names])
            if reduction == "mean":
                stacked /= torch.tensor([self._counts[name] for name in names], device=self._device)
            values.update(zip(names, self._over_ranks(stacked, reduction).tolist(), strict=True))
        self._totals.clear()
        self._counts.clear()
        self._reductions.clear()
        return values

    def _over_ranks(self, stacked: Tensor, reduction: str) -> Tensor:
        if not dist.is_initialized():
            return stacked
        operation = dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM
        dist.all_reduce(stacked, op=operation)
        return stacked / dist.get_world_size() if reduction == "mean" else stacked
