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
from trainer.engine.expert_shards import Exchange, ExpertShards
from trainer.engine.protocol import EngineConfig
from trainer.planning.placing import workload
from trainer.planning.prediction import KINDS, exchange, exchange_bytes, rank_memory

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

    def all_gather(self, own: Tensor) -> Tensor:
        self._count("all_gather", (self.ranks - 1) * own.nbytes)
        return torch.cat([own] * self.ranks)

    def reduce_scatter(self, terms: Tensor) -> Tensor:
        self._count("reduce_scatter", terms.nbytes // self.ranks * (self.ranks - 1))
        return terms.unflatten(0, (self.ranks, -1)).sum(0)

    def all_to_all_chunks(self, chunks: Tensor) -> Tensor:
        self._count("all_to_all", chunks.nbytes // self.ranks * (self.ranks - 1))
        return chunks.clone()

    def _count(self, kind: str, size: int) -> None:
        self.sent[kind] += size
        self.calls[kind] += 1


def job(model: dict[str, Any], checkpointed: tuple[int, ...]) -> JobConfig:
    values = {
        "model": {"depth": 2, "width": 16, "heads": 4, "patch_size": 2, **model},
        "flow": {"scales": SCALES, "critical_times": (0.67, 0.33)},
        "data": {"image_size": SIZE, "channels": CHANNELS, "classes": 5},
        "train": {"global_batch": WORKERS * IMAGES},
        "cluster": {"workers": WORKERS},
    }
    made = from_dict(JobConfig, values)
    assert made.engine == EngineConfig()
    return from_dict(JobConfig, {**values, "engine": {"activation_checkpointing": checkpointed}})


def sharded(
    made: JobConfig, placement: Placement
) -> tuple[LapFlowTransformer, dict[int, CountedExchange]]:
    exchanges = {
        k: CountedExchange(ranks=size, index=0, group=None, replica_group=None)
        for k, size in placement.sharded.items()
    }
    network = LapFlowTransformer(
        made.model,
        scales=SCALES,
        channels=CHANNELS,
        image_size=SIZE,
        classes=5,
        on_built=ExpertShards(exchanges=exchanges).partition,
    )
    network.checkpoint_activations(made.engine.activation_checkpointing)
    return network, exchanges


@pytest.mark.parametrize("checkpointed", [(), (2, 0)])
@pytest.mark.parametrize(
    ("model", "ranks"),
    [
        # 16 ranks do not divide the 8 numbers of a patch.
        *product(MODELS, [(2, 1, 4), (4, 4, 4), (16, 1, 1)]),
        ({"ties": {"scales": (0, 1, 2)}}, (4, 4, 4)),
    ],
    ids=str,
)
def test_planned_bytes_are_the_bytes_that_are_sent(
    model: dict[str, Any], ranks: tuple[int, ...], checkpointed: tuple[int, ...]
) -> None:
    made, placement = job(model, checkpointed), Placement(ranks)
    network, exchanges = sharded(made, placement)
    images = [IMAGES * (k + 1) // SCALES for k in (2, 1, 0)]
    states = tuple(
        torch.randn(count, CHANNELS, SIZE >> k, SIZE >> k)
        for count, k in zip(images, (2, 1, 0), strict=True)
    )
    outputs = network(states, torch.rand(IMAGES), torch.zeros(IMAGES, dtype=torch.long))
    sum(output.square().sum() for output in outputs).backward()

    work = workload(made)
    assert [load.max_images for load in work.scales] == images
    sent = sum((one.sent for one in exchanges.values()), Counter())
    assert sent == Counter(exchange_bytes(work, placement, images=images))
    # Of tied scales one group's calls may be another scale's, so they are compared in all.
    calls = sum((one.calls for one in exchanges.values()), Counter())
    planned = [
        exchange(work, load, size) for load, size in zip(work.scales, placement.ranks, strict=True)
    ]
    assert calls == {kind: sum(one[kind].calls for one in planned) for kind in KINDS}


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 1, 4), (4, 4, 4), (16, 1, 1)])
def test_a_rank_holds_the_weights_that_are_planned(
    model: dict[str, Any], ranks: tuple[int, ...]
) -> None:
    made, placement = job(model, ()), Placement(ranks)
    network, _ = sharded(made, placement)
    held = sum(parameter.numel() for parameter in network.parameters())
    assert held == sum(weights for weights, _ in workload(made).shards(placement))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [(2, 1, 4), (4, 4, 4), (8, 2, 1)])
def test_a_sharded_model_keeps_what_is_planned(ranks: tuple[int, ...]) -> None:
    made, placement = job({"depth": 6, "width": 64}, ()), Placement(ranks)
    network, _ = sharded(made, placement)
    kept = kept_bytes(network, [6, 4, 2], channels=CHANNELS, size=SIZE)
    planned = rank_memory(workload(made), placement, zero_stage=0)
    assert planned.activations == pytest.approx(kept, rel=0.05)
