"""How busy each node is, under the names that MLflow has for it.

MLflow's own monitor counts its samples instead of images, ends for good at the first call that the
server does not answer, and tells what it sees to nobody but the server.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import psutil
import torch

from trainer.metrics.buffer import MetricBuffer

_NODE = (
    "cpu_utilization_percentage",
    "system_memory_usage_percentage",
    "network_receive_megabytes_per_s",
    "network_transmit_megabytes_per_s",
)
_DEVICE = ("gpu_utilization_percentage", "gpu_power_usage_watts")


class NodeUse:
    """Looks at the node that a rank is on: its first rank at the node, every rank at its device.

    Args:
        rank: This rank.
        local_rank: This rank among those of its node.
        world_size: Number of ranks.
        device: What it computes on.
        now: Monotonic clock in seconds.
    """

    def __init__(
        self,
        *,
        rank: int,
        local_rank: int,
        world_size: int,
        device: torch.device,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = rank - local_rank
        self._is_first = local_rank == 0
        self._device = device if device.type == "cuda" and _can_be_seen(device) else None
        self._now = now
        kinds = (*_NODE, *_DEVICE) if device.type == "cuda" else _NODE
        self._kinds = len(kinds)
        # Every rank must record the same names; those that are no node have no weight.
        self._names = [f"system/node_{node}/{kind}" for node in range(world_size) for kind in kinds]
        self._before = (now(), *_traffic())
        psutil.cpu_percent()  # from now on

    def record(self, metrics: MetricBuffer) -> None:
        """Record what was used since the last call."""
        values = torch.zeros(len(self._names), dtype=torch.float64)
        weights = torch.zeros_like(values)
        at = self._node * self._kinds
        if self._is_first:
            values[at : at + len(_NODE)] = torch.tensor(self._look_at_node(), dtype=torch.float64)
            weights[at : at + len(_NODE)] = 1.0
        if self._device is not None:
            begin = at + len(_NODE)
            seen = torch.tensor(_look_at_device(self._device), dtype=torch.float64)
            values[begin : begin + len(_DEVICE)] = seen.nan_to_num()
            weights[begin : begin + len(_DEVICE)] = seen.isfinite().double()
        metrics.record_each(self._names, values, weights=weights)

    def _look_at_node(self) -> tuple[float, float, float, float]:
        before_s, received_before, sent_before = self._before
        self._before = now_s, received, sent = (self._now(), *_traffic())
        elapsed_s = max(now_s - before_s, 1e-3)
        return (
            psutil.cpu_percent(),
            psutil.virtual_memory().percent,
            (received - received_before) / elapsed_s / 1e6,
            (sent - sent_before) / elapsed_s / 1e6,
        )


def _traffic() -> tuple[int, int]:
    counted = psutil.net_io_counters()
    return (0, 0) if counted is None else (counted.bytes_recv, counted.bytes_sent)


def _can_be_seen(device: torch.device) -> bool:
    return any(math.isfinite(value) for value in _look_at_device(device))


def _look_at_device(device: torch.device) -> tuple[float, float]:
    """Return what the driver tells, in percent and watts; NaN where it tells nothing."""
    try:
        return float(torch.cuda.utilization(device)), torch.cuda.power_draw(device) / 1000
    except (ModuleNotFoundError, RuntimeError):  # no pynvml, or a device that is not measured
        return math.nan, math.nan
