"""What nodes use is told once for each node, by the rank that is its first."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.node_use import NodeUse

CPU = torch.device("cpu")


def recorded(monkeypatch, *, rank, local_rank, world_size=4):
    monkeypatch.setattr(psutil, "cpu_percent", lambda: 25.0)
    traffic = iter([(0, 0), (30_000_000, 10_000_000)])

    def count():
        received, sent = next(traffic)
        return SimpleNamespace(bytes_recv=received, bytes_sent=sent)

    monkeypatch.setattr(psutil, "net_io_counters", count)
    clock = iter([10.0, 15.0])
    use = NodeUse(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        device=CPU,
        now=lambda: next(clock),
    )
    metrics = MetricBuffer("cpu")
    use.record(metrics)
    state = metrics.state()
    return state, metrics.flush()


def test_a_node_is_named_by_its_first_rank_and_told_by_it(monkeypatch):
    names, told = recorded(monkeypatch, rank=2, local_rank=0)
    assert told.pop("system/node_2/system_memory_usage_percentage") == pytest.approx(
        psutil.virtual_memory().percent, abs=20
    )
    assert told == {
        "system/node_2/cpu_utilization_percentage": 25.0,
        "system/node_2/network_receive_megabytes_per_s": 6.0,
        "system/node_2/network_transmit_megabytes_per_s": 2.0,
    }
    other_names, nothing = recorded(monkeypatch, rank=3, local_rank=1)
    assert nothing == {}
    assert list(other_names) == list(names)  # or their sums would not be over the same
