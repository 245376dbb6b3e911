"""Expert shards: a placement applied to a model, so that each rank holds 1/E of an expert.

A linear layer is partitioned by its outputs: every rank of the group computes its part of them for
the images of all E ranks, and each rank gets all outputs of its own images back. The MLP is
partitioned by its hidden units, so its two layers need one exchange before and one after. Attention
is untouched: a rank has all heads of its own images.

The first dimension of a weight is the one that is partitioned. So a shard is one slice of the
flattened parameter, and checkpoints of different placements are cut from the same whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.placement import Placement, expert_group, replica_ranks
from models.transformer.experts import InputMajorLinear
from trainer.engine.exchange import Exchange
from trainer.engine.protocol import BuildModel


class ExpertShard(nn.Module):
    """This rank's part of a linear layer of an expert.

    Args:
        layer: The whole layer; its weight and bias are partitioned along their first dimension.
        exchange: The group that holds its parts.
    """

    def __init__(self, layer: nn.Linear | InputMajorLinear, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange
        self.weight = self._part(layer.weight)
        self.bias = self._part(layer.bias)

    def _part(self, whole: Tensor) -> nn.Parameter:
        assert whole.shape[0] % self.exchange.ranks == 0  # `check_placement` has seen to it
        part = whole.detach().chunk(self.exchange.ranks)[self.exchange.index]
        return nn.Parameter(part.clone())


class OutputShard(ExpertShard):
    """Some of the outputs of a layer, for all images of the group; dealt back to their ranks."""

    def forward(self, own: Tensor) -> Tensor:
        """Map [b, ..., inputs] to [b, ..., outputs]."""
        gathered = self.exchange.gather(own)
        return self.exchange.all_to_all(F.linear(gathered, self.weight, self.bias))


class HiddenShard(ExpertShard):
    """Some of an MLP's hidden units, for all images of the group."""

    def forward(self, own: Tensor) -> Tensor:
        """Map [b, ..., inputs] to [E b, ..., hidden / E]."""
        return F.linear(self.exchange.gather(own), self.weight, self.bias)


class HiddenOutputShard(ExpertShard):
    """What some of an MLP's hidden units add to its output; summed for each rank's own images."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [E b, ..., hidden / E] to [b, ..., outputs]."""
        # Each rank adds its own part of the bias, and the sum over ranks is the whole one.
        own = self.bias.shape[0]
        before = self.exchange.index * own
        after = (self.exchange.ranks - 1) * own - before
        return self.exchange.sum(hidden @ self.weight + F.pad(self.bias, (before, after)))


_SHARDS: Mapping[str, type[ExpertShard]] = {
    "qkv": OutputShard,
    "projection": OutputShard,
    "modulation": OutputShard,
    "mlp_hidden": HiddenShard,
    "mlp_output": HiddenOutputShard,
}
"""The layers of experts that are partitioned, by the names they have in `models.transformer`."""


@dataclass(frozen=True, kw_only=True)
class ExpertShards:
    """Partitions the experts of a model, part by part as it is built.

    Attributes:
        exchanges: For each sharded scale, in the paper's numbering, this rank's expert group.
    """

    exchanges: Mapping[int, Exchange]

    @classmethod
    def of(cls, placement: Placement) -> ExpertShards:
        """Form the expert groups of a placement; a collective call of all ranks."""
        formed = {size: _form_groups(size) for size in sorted(set(placement.sharded.values()))}
        return cls(exchanges={k: formed[size] for k, size in placement.sharded.items()})

    @property
    def sizes(self) -> list[int]:
        """The group sizes that occur, each once."""
        return sorted({exchange.ranks for exchange in self.exchanges.values()})

    def partition(self, part: nn.Module) -> None:
        """Replace the sharded layers of one part of a model by this rank's shards, in place."""
        # By id, for a reference would keep each whole layer until all are partitioned.
        partitioned: dict[int, ExpertShard] = {}
        for by_scale in [module for module in part.modules() if isinstance(module, nn.ModuleDict)]:
            for k, exchange in self.exchanges.items():
                if (name := f"scale{k}") not in by_scale:
                    continue
                expert = by_scale[name]
                if isinstance(expert, nn.Linear):
                    by_scale[name] = OutputShard(expert, exchange)
                    continue
                for layer_name, kind in _SHARDS.items():
                    layer = getattr(expert, layer_name, None)
                    if not isinstance(layer, nn.Linear | InputMajorLinear):
                        continue
                    if id(layer) not in partitioned:
                        if layer_name == "projection" and layer.weight.shape[0] % exchange.ranks:
                            # The last one: a patch may have fewer numbers than there are ranks.
                            continue
                        partitioned[id(layer)] = kind(layer, exchange)
                    _replace(expert, layer_name, partitioned[id(layer)])


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
