"""Metrics recorded as device tensors with a declared reduction, reduced over ranks when flushed.

Recording never waits for the device; the flush, every so many updates, is the only place where
values travel between ranks and to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["mean", "sum", "max"]


@dataclass(kw_only=True)
class _Running:
    """What was recorded so far: numbers stay on the host, tensors on the device."""

    reduction: Reduction
    total: Tensor | float
    weight: Tensor | float


class MetricBuffer:
    """Accumulates values between flushes; every rank must record the same names.

    Args:
        device: Where values are accumulated.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._running: dict[tuple[str, ...], _Running] = {}

    def record(
        self,
        name: str,
        value: Tensor | float,
        *,
        reduction: Reduction = "mean",
        weight: float = 1.0,
    ) -> None:
        """Add one value to a metric.

        Args:
            name: Metric name.
            value: A scalar; a tensor stays on its device.
            reduction: How values combine, over time and over ranks.
            weight: How much the value counts in a mean; a mean of total weight 0 is left out.

        Raises:
            ValueError: If the metric was recorded with another reduction before.
        """
        if isinstance(value, Tensor):
            value = self._kept(value).reshape(1)
        self._add((name,), value, weight, reduction)

    def record_each(self, names: Sequence[str], values: Tensor, *, weights: Tensor) -> None:
        """Add one value to each of several means, in a few operations on the device.

        Args:
            names: Metric names; the same ones in the same order every time.
            values: One value for each, [n].
            weights: How much each counts, [n]; a mean of total weight 0 is left out.
        """
        self._add(tuple(names), self._kept(values), self._kept(weights), "mean")

    def flush(self) -> dict[str, float]:
        """Reduce over ranks, empty the buffer, and return values by name (a collective call)."""
        values: dict[str, float] = {}
        for reduction in ("mean", "sum", "max"):
            # In the same order on every rank.
            groups = sorted(
                names for names, entry in self._running.items() if entry.reduction == reduction
            )
            if not groups:
                continue
            names = [name for group in groups for name in group]
            running = [(len(group), self._running[group]) for group in groups]
            totals = [self._vector(entry.total, length) for length, entry in running]
            if reduction != "mean":
                values.update(zip(names, self._over_ranks(totals, reduction), strict=True))
                continue
            weights = [self._vector(entry.weight, length) for length, entry in running]
            sums = self._over_ranks([*totals, *weights], "sum")
            values.update(
                (name, total / weight)
                for name, total, weight in zip(
                    names, sums[: len(names)], sums[len(names) :], strict=True
                )
                if weight
            )
        self._running.clear()
        return values

    def _add(
        self,
        names: tuple[str, ...],
        value: Tensor | float,
        weight: Tensor | float,
        reduction: Reduction,
    ) -> None:
        if reduction == "mean":
            value = value * weight
        known = self._running.get(names)
        if known is None:
            self._running[names] = _Running(reduction=reduction, total=value, weight=weight)
            return
        if known.reduction != reduction:
            raise ValueError(
                f"metric {names[0]} is reduced by {known.reduction}, not by {reduction}"
            )
        known.weight = known.weight + weight
        known.total = _larger(known.total, value) if reduction == "max" else known.total + value

    def _kept(self, tensor: Tensor) -> Tensor:
        # A copy, for whoever recorded it may write into it later.
        return tensor.detach().to(self._device, torch.float64, copy=True)

    def _vector(self, value: Tensor | float, length: int) -> Tensor:
        if isinstance(value, Tensor):
            return value
        return torch.full((length,), value, dtype=torch.float64, device=self._device)

    def _over_ranks(self, vectors: Sequence[Tensor], reduction: str) -> list[float]:
        joined = torch.cat(tuple(vectors))
        if dist.is_initialized():
            operation = dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM
            dist.all_reduce(joined, op=operation)
        return [float(value) for value in joined.tolist()]


def _larger(first: Tensor | float, second: Tensor | float) -> Tensor | float:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return torch.maximum(*(torch.as_tensor(x, dtype=torch.float64) for x in (first, second)))
    return max(first, second)
