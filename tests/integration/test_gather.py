"""Samples and metrics on real gloo ranks: every rank gets the same, and one process would too."""

import threading
from typing import Any

import pytest
import torch

from cluster.contract import ClusterConfig
from cluster.launcher import run
from tests.support import gather_worker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked_ranks")]

SAMPLERS = [
    {"solver": "heun", "steps": 5, "guidance_scale": 2.0},
    {"solver": "ab2", "steps": 5},
    {"solver": "dopri5"},
]


def on_ranks(worker: Any, ranks: int, payload: dict[str, Any]) -> list[Any]:
    told: list[Any] = []
    config = ClusterConfig(backend="local", workers=ranks, gpus_per_worker=0)
    run(config, worker, payload, on_message=told.append, stop=threading.Event())
    return told


def test_samples_do_not_depend_on_batch_size_or_number_of_ranks():
    draws = {
        (ranks, batch): on_ranks(
            gather_worker.samples, ranks, {"images": 13, "batch": batch, "samplers": SAMPLERS}
        )
        for ranks, batch in ((1, 13), (1, 2), (2, 1))
    }
    for index, sampler in enumerate(SAMPLERS):
        reference = draws[1, 13][index]
        assert len(reference["images"]) == 13
        for told in draws.values():
            ranks = len(told) // len(SAMPLERS)
            for rank in range(ranks):
                mine = [message for message in told if message["rank"] == rank][index]
                assert mine["evaluations"] == pytest.approx(reference["evaluations"], rel=1e-12)
                torch.testing.assert_close(
                    torch.tensor(mine["images"]),
                    torch.tensor(reference["images"]),
                    rtol=1e-6,
                    atol=1e-6,
                    msg=lambda m, s=sampler: f"{s}: {m}",
                )


def test_metrics_are_reduced_over_ranks_as_declared():
    first, second = on_ranks(gather_worker.metrics, 2, {})
    assert first["values"] == second["values"]
    assert first["values"] == {
        "mean": 2.5,
        "weighted": 10.0 * 2 / 3,
        "empty here": 7.0,
        "sum": 3.0,
        "max": -1.0,
        "bin 0": (1 * 2.0 + 3 * 3.0) / 4,
    }
