"""What the tests of samples and metrics over ranks run on every rank."""

from __future__ import annotations

import hashlib
import math
import time
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from cluster.contract import WorkerContext
from cluster.process_group import shake_hands
from models.axes import Bands
from models.codec import IdentityCodec
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler import SolverError
from models.flow.sampler_config import SamplerConfig
from models.transformer.config import TransformerConfig
from trainer.config.job import DataConfig, FeatureConfig, JobConfig
from trainer.config.shapes import ImageShape
from trainer.data.splits import open_split
from trainer.evaluation.features import RandomConvFeatures
from trainer.evaluation.layout import Layout
from trainer.evaluation.reference import EvalReference
from trainer.evaluation.samples import ImageSampler
from trainer.evaluation.taken import TakenSamples
from trainer.host_group import HostGroup
from trainer.metrics.buffer import MetricBuffer


class Mild(torch.nn.Module):
    """A velocity that couples scales, pixels, time and label, and is smooth in time."""

    calls = 0

    def forward(self, states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
        self.calls += 1
        coarse = states[0].mean(dim=(2, 3), keepdim=True)
        waves = torch.sin(3 * time + labels)[:, None, None, None]
        return tuple(
            torch.tanh(state.roll(1, dims=3)) + waves * (coarse - state) for state in states
        )


def samples(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Draw the same images with every sampler; each rank tells what it got."""
    ranks = HostGroup()
    for sampler in payload["samplers"]:
        drawn = _image_sampler(payload["batch"], sampler).all(
            Mild(), torch.arange(payload["images"]) % 3, ranks=ranks
        )
        told = {"images": drawn.images.tolist(), "evaluations": list(drawn.nfe)}
        context.report({"rank": context.rank, **told})


def left_early(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Leave after some blocks on the first rank; tell how often each called the model."""
    ranks = HostGroup()
    model = Mild()
    image_sampler = _image_sampler(1, {"solver": "euler", "steps": 2})
    with closing(
        image_sampler.blocks(model, torch.zeros(9, dtype=torch.int64), ranks=ranks)
    ) as blocks:
        for number, _ in enumerate(blocks, 1):
            if number == payload["blocks"]:
                break
    ranks.reduce_min(0)  # all are here again
    context.report({"rank": context.rank, "calls": model.calls})


def unsolvable(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Draw one image after the other, one of which no solver comes to an end with."""
    ranks = HostGroup()

    class Broken(Mild):
        def forward(self, states: Bands, time: torch.Tensor, labels: torch.Tensor) -> Bands:
            factor = math.nan if labels.any() else 1.0
            return tuple(factor * state for state in super().forward(states, time, labels))

    labels = (torch.arange(payload["images"]) == payload["unsolvable"]).long()
    said = "nothing"
    try:
        _image_sampler(1, {"solver": "dopri5"}).all(Broken(), labels, ranks=ranks)
    except SolverError as error:
        said = str(error)
    ranks.reduce_min(0)  # all are here again
    context.report({"rank": context.rank, "said": said})


def slow_first(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Take longer over a block, on the first rank, than any collective of the training may."""
    ranks = HostGroup()
    _set_pg_timeout(timedelta(seconds=0.5))
    for _ in _image_sampler(1, {"solver": "euler", "steps": 2}).blocks(
        Mild(), torch.zeros(payload["blocks"], dtype=torch.int64), ranks=ranks
    ):
        time.sleep(1.5)
    ranks.reduce_min(0)  # all are here again
    _set_pg_timeout(timedelta(minutes=5))
    context.report({"rank": context.rank})


def _image_sampler(batch: int, sampler: dict[str, Any]) -> ImageSampler:
    return ImageSampler(
        flow=Flow(FlowConfig(scales=2)),
        sampler=SamplerConfig(**sampler),
        shape=ImageShape(channels=1, size=8, classes=3),
        codec=IdentityCodec(),
        seed=5,
        batch=batch,
        device=torch.device("cpu"),
    )


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
    context.report({"rank": rank, "values": buffer.flush()})


def messages(context: WorkerContext, _payload: dict[str, Any]) -> None:
    """Send bytes of every size between the ranks; each tells the lengths and what it got."""
    group, rank = HostGroup(), context.rank
    mine = bytes([rank]) * (0, 1, 100_000)[rank]
    collected = group.gather(mine)
    broadcast = [
        group.broadcast(mine, source=source) == bytes([source]) * (0, 1, 100_000)[source]
        for source in range(3)
    ]
    sent = b""
    if rank == 0:
        sent = group.receive(2) + group.receive(1)
    else:
        group.send(mine, to=0)
    context.report(
        {
            "rank": rank,
            "least": group.reduce_min(7 - rank),
            "sent": [len(sent), *set(sent)],
            "broadcast": broadcast,
            "collected": [[len(each), *set(each)] for each in collected],
        }
    )


def stranger(context: WorkerContext, _payload: dict[str, Any]) -> None:
    """Speak gloo's language perfectly on the last rank, and not know the secret."""
    secret = b"the run's" if context.rank == 0 else b"a guess"
    group = dist.new_group(backend="gloo")
    shake_hands(group, secret, timeout=timedelta(seconds=60))


class _Parted(RandomConvFeatures):
    layout = Layout(spatial=20, logits=4)


def measured(context: WorkerContext, payload: dict[str, Any]) -> None:
    """Measure samples against a small data set; each rank tells all figures."""
    job = JobConfig(
        data=DataConfig(prefix=payload["prefix"], image_size=8, channels=1, classes=3),
        model=TransformerConfig(depth=1, width=16, heads=2),
        home=payload["home"],
    )
    ranks = HostGroup()
    reference = EvalReference(
        job=job,
        context=context,
        ranks=ranks,
        trained_on=open_split(job, "train").digest,
        features=("random_conv", "learned_conv"),
        weights=FeatureConfig(),
        samples=payload["images"],
        compared=payload.get("compared", 5_000),
    )
    # As Inception has them: spatial features, and logits that classes are read from.
    reference.extractors["random_conv"] = _Parted(1)
    sampler = _image_sampler(payload["batch"], {"solver": "euler", "steps": 4})
    labels = torch.arange(payload["images"]) % 3
    taken = TakenSamples(picture_bytes=64, max_bytes=64 * 9, shown=[payload["images"] - 1])
    found = reference.measure(sampler, Mild(), labels, keep=taken)
    pictures = ranks.rank == 0 and hashlib.sha256(b"".join(taken.npz())).hexdigest()
    context.report(
        {
            "rank": context.rank,
            "figures": [asdict(each) for each in found.distances],
            "nfe": list(found.nfe),
            "real_images": [reference.real_images, reference.unusable_real_images],
            "pictures": pictures,
        }
    )
