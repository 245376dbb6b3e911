"""What the tests of samples and metrics over ranks run on every rank."""

from __future__ import annotations

from typing import Any

import torch

from cluster.contract import WorkerContext
from models.axes import Bands
from models.codec import IdentityCodec
from models.flow.flow import Flow, FlowConfig
from models.flow.sampler_config import SamplerConfig
from trainer.evaluate.samples import ImageShape, draw
from trainer.metrics.buffer import MetricBuffer


class Mild(torch.nn.Module):
    """A velocity that couples scales, pixels, time and label, and is smooth in time."""

    def forward(self, states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        coarse = states[0].mean(dim=(2, 3), keepdim=True)
        waves = torch.sin(3 * time + labels)[:, None, None, None]
        return tuple(
            torch.tanh(state.roll(1, dims=3)) + waves * (coarse - state) for state in states
        )


def samples(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Draw the same images with every sampler; each rank tells what it got."""
    for sampler in payload["samplers"]:
        drawn = draw(
            Mild(),
            flow=Flow(FlowConfig(scales=2)),
            config=SamplerConfig(**sampler),
            shape=ImageShape(channels=1, size=8, classes=3),
            codec=IdentityCodec(),
            labels=torch.arange(payload["images"]) % 3,
            seed=5,
            batch=payload["batch"],
            device=torch.device("cpu"),
        )
        told = {"images": drawn.images.tolist(), "evaluations": list(drawn.evaluations)}
        context.tell({"rank": context.rank, **told})


def metrics(context: WorkerContext, _payload: dict[str, Any]) -> None:
    """Record rank-dependent values and tell what the flush makes of them."""
    buffer, rank = MetricBuffer("cpu"), context.rank
    buffer.record("mean", 1.0 + rank)
    buffer.record("mean", torch.tensor(3.0 + rank))
    buffer.record("weighted", 10.0 * rank, weight=rank + 1)
    buffer.record("empty here", 7.0, weight=rank)
    buffer.record("empty", 7.0, weight=0)
    buffer.record("sum", 1.0 + rank, reduction="sum")
    buffer.record("max", -1.0 - rank, reduction="max")
    buffer.record_each(
        ["bin 0", "bin 1"],
        torch.tensor([2.0 + rank, 5.0]),
        weights=torch.tensor([1.0 + 2 * rank, 0.0]),
    )
    context.tell({"rank": rank, "values": buffer.flush()})
