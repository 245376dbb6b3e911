"""What a GPU's driver tells of it is among what its node uses."""

import pytest
import torch

from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.node_use import NodeUse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_device_is_told_where_its_driver_can_be_asked():
    pytest.importorskip("pynvml")
    device = torch.device("cuda:0")
    metrics = MetricBuffer(device)
    NodeUse(rank=0, local_rank=0, world_size=1, device=device).record(metrics)
    told = metrics.flush()
    assert 0 <= told["system/node_0/gpu_utilization_percentage"] <= 100
    assert told["system/node_0/gpu_power_usage_watts"] > 10
