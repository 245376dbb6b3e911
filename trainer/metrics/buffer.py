"""Metrics recorded as device tensors with a declared reduction, reduced over ranks when flushed.

Recording never waits for the device. Values travel between ranks and to the host only at a flush,
every so many updates, and when a checkpoint takes along what was recorded since the last one.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
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


@dataclass(kw_only=True)
class _Reduced:
    """What was reduced over ranks so far."""

    reduction: Reduction
    total: float
    weight: float

    @property
    def value(self) -> float | None:
        """The metric; None for a mean of nothing."""
        if self.reduction != "mean":
            return self.total
        return self.total / self.weight if self.weight else None


class MetricBuffer:
    """Accumulates values between flushes; every rank must record the same names.

    Args:
        device: Where values are accumulated.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._running: dict[tuple[str, ...], _Running] = {}
        self._reduced: dict[str, _Reduced] = {}

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
            value = self._copy_of(value).reshape(1)
        self._add((name,), value, weight, reduction)

    def record_each(self, names: Sequence[str], values: Tensor, *, weights: Tensor) -> None:
        """Add one value to each of several means, in a few operations on the device.

        Args:
            names: Metric names; the same ones in the same order every time.
            values: One value for each, [n].
            weights: How much each counts, [n]; a mean of total weight 0 is left out.
        """
        self._add(tuple(names), self._copy_of(values), self._copy_of(weights), "mean")

    def flush(self) -> dict[str, float]:
        """Reduce over ranks, empty the buffer, and return values by name (a collective call)."""
        self._reduce()
        values = {
            name: entry.value for name, entry in self._reduced.items() if entry.value is not None
        }
        self._reduced.clear()
        return values

    def state(self) -> dict[str, list[str]]:
        """Return what was recorded since the last flush, as JSON values (a collective call).

        The same on all ranks: from here on it counts as reduced, so that a run which is restored
        from it flushes the same bits as the one that goes on.
        """
        self._reduce()
        return {
            name: [entry.reduction, entry.total.hex(), entry.weight.hex()]
            for name, entry in self._reduced.items()
        }

    def load_state(self, state: Mapping[str, Sequence[str]]) -> None:
        """Take up what `state` returned, on every rank.

        Raises:
            ValueError: It is something else.
        """
        for name, entry in state.items():
            reduction, total, weight = entry
            if reduction not in typing.get_args(Reduction):
                raise ValueError(f"metric {name} is reduced by {reduction!r}, which is unknown")
            self._reduced[name] = _Reduced(
                reduction=typing.cast(Reduction, reduction),
                total=float.fromhex(total),
                weight=float.fromhex(weight),
            )

    def _reduce(self) -> None:
        """Reduces what was recorded over ranks, and adds it to what was before."""
        for reduction in typing.get_args(Reduction):
            # In the same order on every rank.
            groups = sorted(
                names for names, entry in self._running.items() if entry.reduction == reduction
            )
            if not groups:
                continue
            running = [(len(group), self._running[group]) for group in groups]
            totals = [self._vector(entry.total, length) for length, entry in running]
            weights = [self._vector(entry.weight, length) for length, entry in running]
            names = [name for group in groups for name in group]
            if reduction == "max":
                reduced = [*self._over_ranks(totals, "max"), *(0.0 for _ in names)]
            else:
                reduced = self._over_ranks([*totals, *weights], "sum")
            for name, total, weight in zip(
                names, reduced[: len(names)], reduced[len(names) :], strict=True
            ):
                self._reduce_one(name, _Reduced(reduction=reduction, total=total, weight=weight))
        self._running.clear()

    def _reduce_one(self, name: str, new: _Reduced) -> None:
        known = self._reduced.get(name)
        if known is None:
            self._reduced[name] = new
        elif new.reduction == "max":
            known.total = max(known.total, new.total)
        else:
            known.total += new.total
            known.weight += new.weight

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

    def _copy_of(self, tensor: Tensor) -> Tensor:
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
