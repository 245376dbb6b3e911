"""The plan against a sharded model: what it holds, keeps, and asks its expert groups to send."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.placement import Placement
from models.transformer.lapflow import LapFlowTransformer
from tests.unit.models.kept import kept_bytes
from trainer.config.job import JobConfig
from trainer.config.reading import from_dict
from trainer.engine.exchange import Exchange
from trainer.engine.expert_shards import ExpertShards
from trainer.engine.protocol import EngineConfig
from trainer.planning.exchange import exchange_bytes, exchange_calls
from trainer.planning.memory import rank_memory
from trainer.planning.placing import workload

SCALES, SIZE, CHANNELS, WORKERS, IMAGES = 3, 16, 2, 4, 6
MODELS: tuple[dict[str, Any], ...] = (
    {},
    {"qk_norm": True},
    {"class_tokens": 3},
    {"modulation": "shared"},
    {"attention": "full", "mlp_ratio": 2.0},
)


@dataclass(frozen=True, kw_only=True, eq=False)
class CountedExchange(Exchange):
    """A group whose other ranks have the same images, so that nothing needs to be sent."""

    sent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def gather(self, own: Tensor, *, keep: bool = False) -> Tensor:
        self._count("all_gather", (self.ranks - 1) * own.nbytes)
        shape = (self.ranks, *own.shape)
        out = own.new_empty(shape) if keep else self.buffers.take("receive", shape, own)
        return out.copy_(own.expand(shape))

    def sum(self, terms: Tensor) -> Tensor:
        self._count("reduce_scatter", terms.nbytes // self.ranks * (self.ranks - 1))
        return terms.sum(0)

    def all_to_all(self, chunks: Tensor) -> Tensor:
        self._count("all_to_all", chunks.nbytes // self.ranks * (self.ranks - 1))
        return self.buffers.take("receive", chunks.shape, chunks).copy_(chunks)

    def _count(self, kind: str, size: int) -> None:
        self.sent[kind] += size
        self.calls[kind] += 1

    @property
    def buffer_bytes(self) -> int:
        """What it keeps to send from and to receive into."""
        return sum(kept.nbytes for kept in self.buffers._kept.values())


def job(
    model: dict[str, Any], checkpointed: tuple[int, ...] = (), *, regather: bool = True
) -> JobConfig:
    values = {
        "model": {"depth": 2, "width": 16, "heads": 4, "patch_size": 2, **model},
        "flow": {"scales": SCALES, "critical_times": (0.67, 0.33)},
        "data": {"image_size": SIZE, "channels": CHANNELS, "classes": 5},
        "train": {"global_batch": WORKERS * IMAGES},
        "cluster": {"workers": WORKERS},
    }
    made = from_dict(JobConfig, values)
    assert made.engine == EngineConfig()
    engine = {"activation_checkpointing": checkpointed, "regather_tokens": regather}
    return from_dict(JobConfig, {**values, "engine": engine})


def sharded(
    made: JobConfig, placement: Placement
) -> tuple[LapFlowTransformer, dict[int, CountedExchange]]:
    """Build a model as one rank holds it, and its expert groups by their sizes."""
    groups = {
        size: CountedExchange(ranks=size, index=0, group=None, replica_group=None)
        for size in placement.ranks
    }
    exchanges = {k: groups[size] for k, size in placement.sharded.items()}
    shards = ExpertShards(exchanges=exchanges, regather=made.engine.regathers)
    network = LapFlowTransformer(
        made.model,
        scales=SCALES,
        channels=CHANNELS,
        image_size=SIZE,
        classes=5,
        on_built=shards.partition,
    )
    network.checkpoint_activations(made.engine.recomputed)
    shards.join(network)
    return network, groups


def pass_once(network: LapFlowTransformer) -> list[int]:
    """Run the forward and backward pass of one micro-batch; return the images of each scale."""
    images = [IMAGES * (k + 1) // SCALES for k in (2, 1, 0)]
    states = tuple(
        torch.randn(count, CHANNELS, SIZE >> k, SIZE >> k)
        for count, k in zip(images, (2, 1, 0), strict=True)
    )
    outputs = network(states, torch.rand(IMAGES), torch.zeros(IMAGES, dtype=torch.long))
    sum(output.square().sum() for output in outputs).backward()
    return images


@pytest.mark.parametrize("regather", [True, False])
@pytest.mark.parametrize("checkpointed", [(), (2, 0)])
@pytest.mark.parametrize(
    ("model", "ranks"),
    [
        *product(MODELS, [(2, 1, 4), (4, 4, 4), (16, 16, 1)]),
        ({"ties": {"scales": (0, 1, 2)}}, (4, 4, 4)),
    ],
    ids=str,
)
def test_planned_bytes_are_the_bytes_that_are_sent(
    model: dict[str, Any], ranks: tuple[int, ...], checkpointed: tuple[int, ...], regather: bool
) -> None:
    made, placement = job(model, checkpointed, regather=regather), Placement(ranks)
    network, groups = sharded(made, placement)
    images = pass_once(network)
    work = workload(made)
    assert [load.max_images for load in work.scales] == images
    sent = sum((one.sent for one in groups.values()), Counter())
    assert sent == Counter(exchange_bytes(work, placement, images=images))
    calls = sum((one.calls for one in groups.values()), Counter())
    assert calls == Counter(exchange_calls(work, placement))


@pytest.mark.parametrize(
    # Scales that are not recomputed alike travel apart, but their modulation is made at once.
    ("regather", "checkpointed"),
    [(True, ()), (False, ()), (True, (2,))],
)
@pytest.mark.parametrize("model", [*MODELS, {"depth": 9}], ids=str)
@pytest.mark.parametrize("ranks", [(2, 1, 4), (4, 4, 4), (16, 16, 1)])
def test_buffers_of_groups_are_as_large_as_planned(
    model: dict[str, Any], ranks: tuple[int, ...], regather: bool, checkpointed: tuple[int, ...]
) -> None:
    made, placement = job(model, checkpointed, regather=regather), Placement(ranks)
    network, groups = sharded(made, placement)
    pass_once(network)
    kept = sum(one.buffer_bytes for one in groups.values())
    # Without ZeRO there are no others.
    assert rank_memory(workload(made), placement, zero_stage=0).buffers == kept


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 1, 4), (4, 4, 4), (16, 1, 1)])
def test_a_rank_holds_the_weights_that_are_planned(
    model: dict[str, Any], ranks: tuple[int, ...]
) -> None:
    made, placement = job(model), Placement(ranks)
    network, _ = sharded(made, placement)
    held = sum(parameter.numel() for parameter in network.parameters())
    assert held == sum(weights for weights, _ in workload(made).shards(placement))


@pytest.mark.slow
@pytest.mark.parametrize("regather", [True, False])
@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 1, 4), (4, 4, 4), (8, 8, 1)])
def test_a_sharded_model_keeps_what_is_planned(ranks: tuple[int, ...], regather: bool) -> None:
    made, placement = job({"depth": 6, "width": 64}, regather=regather), Placement(ranks)
    network, groups = sharded(made, placement)
    kept = kept_bytes(network, [6, 4, 2], channels=CHANNELS, size=SIZE)
    kept -= sum(one.buffer_bytes for one in groups.values())
    planned = rank_memory(workload(made), placement, zero_stage=0)
    assert planned.activations == pytest.approx(kept, rel=0.02)
