"""Expert shards: a placement applied to a model, so that each rank holds 1/E of an expert.

Of every block but the first the largest layers are divided: those of the MLP, of queries, keys and
values, and of modulation. The first block is whole on every rank, for nothing runs ahead of it that
could hide its exchanges. So is the projection behind attention, whose exchanges cost more than its
weights do, and so are the layers before and behind the blocks.

The first dimension of a weight is the one that is partitioned. So a shard is one slice of the
flattened parameter, and checkpoints of different placements are cut from the same whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.placement import Placement, expert_group, replica_ranks
from models.transformer.block import Block, scales_at_once
from models.transformer.experts import InputMajorLinear
from models.transformer.lapflow import LapFlowTransformer
from trainer.engine.exchange import Exchange
from trainer.engine.expert_layers import ExpertShard, ModulationAhead, ShardedLayers
from trainer.engine.protocol import BuildModel

_DIVIDED = ("modulation", "qkv", "mlp_hidden", "mlp_output")
"""The layers of a block's experts that are partitioned."""


@dataclass(frozen=True, kw_only=True)
class ExpertShards:
    """Partitions the experts of a model, part by part as it is built, and has them applied jointly.

    Attributes:
        exchanges: For each sharded scale, in the paper's numbering, coarse to fine, this rank's
            expert group.
        regather: Whether tokens are gathered again in the backward pass, or kept as gathered.
    """

    exchanges: Mapping[int, Exchange]
    regather: bool = True

    @classmethod
    def of(cls, placement: Placement, *, regather: bool = True) -> ExpertShards:
        """Form the expert groups of a placement; a collective call of all ranks."""
        formed = {size: _form_groups(size) for size in sorted(set(placement.sharded.values()))}
        exchanges = {k: formed[size] for k, size in placement.sharded.items()}
        return cls(exchanges=exchanges, regather=regather)

    def partition(self, part: nn.Module) -> None:
        """Replace the layers of a block by this rank's shards, in place; other parts stay whole."""
        if not isinstance(part, Block) or part.number == 0:
            return
        # By id, for a reference would keep each whole layer until all are partitioned.
        partitioned: dict[int, ExpertShard] = {}
        for k, exchange in self.exchanges.items():
            expert = part.experts[f"scale{k}"]
            for name in _DIVIDED:
                layer = getattr(expert, name)
                # The offsets of shared modulation are no layer.
                if isinstance(layer, nn.Linear | InputMajorLinear):
                    if id(layer) not in partitioned:
                        partitioned[id(layer)] = ExpertShard(layer, exchange)
                    _replace(expert, name, partitioned[id(layer)])

    @contextmanager
    def passing_buffers(self) -> Iterator[None]:
        """Let a `with` block exchange other numbers of tokens than training.

        Buffers that have grown for them are not kept.
        """
        try:
            yield
        finally:
            for exchange in self.exchanges.values():
                exchange.buffers.release()

    def join(self, model: LapFlowTransformer) -> None:
        """Let a partitioned model apply the shards of several scales at once.

        Args:
            model: Has been told what it recomputes.
        """
        first, *blocks = (cast(Block, block) for block in model.blocks)
        if not self.exchanges or not blocks:
            return
        kind, scales = first.kind, len(first.experts)
        at_once = scales_at_once(kind, scales=scales, checkpointed=first.checkpointed)
        for block in blocks:
            block.layers = ShardedLayers(
                block.experts, self.exchanges, at_once=at_once, regather=self.regather
            )
        if isinstance(first.experts["scale0"].modulation, nn.Linear):
            model.block_conditions = ModulationAhead(
                [block.experts for block in blocks],
                self.exchanges,
                at_once=scales_at_once(kind, scales=scales),
            )


def _replace(expert: nn.Module, name: str, shard: ExpertShard) -> None:
    """Put a shard in the place of a layer, which a tied expert borrows without owning it."""
    if name in dict(expert.named_children()):
        setattr(expert, name, shard)
    else:
        object.__setattr__(expert, name, shard)


def _form_groups(size: int) -> Exchange:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    experts = [expert_group(first, size) for first in range(0, world_size, size)]
    replicas = [replica_ranks(index, size, world_size) for index in range(size)]
    return Exchange(
        ranks=size, index=rank % size, group=_own_group(experts), replica_group=_own_group(replicas)
    )


def _own_group(members: Sequence[range]) -> dist.ProcessGroup:
    """Form several groups, as all ranks must, and return the one this rank is in."""
    formed = {ranks: dist.new_group(list(ranks)) for ranks in members}
    own: dist.ProcessGroup = next(formed[ranks] for ranks in members if dist.get_rank() in ranks)
    return own


def shards_of(model: nn.Module) -> dict[str, Exchange]:
    """Return the expert groups of the parameters that this rank holds parts of, by their names."""
    return {
        f"{prefix}.{name}": module.exchange
        for prefix, module in model.named_modules()
        if isinstance(module, ExpertShard)
        for name, _ in module.named_parameters()
    }


def whole_shape(part: torch.Size, exchange: Exchange | None) -> tuple[int, ...]:
    """Return the shape of a whole parameter, from that of this rank's part of it."""
    return tuple(part) if exchange is None else (part[0] * exchange.ranks, *part[1:])


def draw_initial_weights(
    build_model: BuildModel, shards: ExpertShards, take: Callable[[int, Tensor], object]
) -> None:
    """Draw a model's initial weights; no more than one of its parts is in memory at a time.

    Args:
        build_model: Builds the model.
        shards: Partitions its experts as they are partitioned in the engine.
        take: Called with the number of each parameter, in the order of the model's parameters, and
            its initial value as this rank holds it.
    """
    numbers = count()

    def on_built(part: nn.Module) -> None:
        shards.partition(part)
        for parameter in part.parameters():
            take(next(numbers), parameter.detach())
            parameter.data = parameter.new_empty(0)

    build_model(on_built)
