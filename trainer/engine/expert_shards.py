"""Expert shards: a placement applied to a model, so that each rank holds 1/E of an expert.

A linear layer is partitioned by its outputs: every rank of the group computes its part of them for
the images of all E ranks, and each rank gets all outputs of its own images back. The MLP is
partitioned by its hidden units, so its two layers need one exchange before and one after. Attention
is untouched: a rank has all heads of its own images.

The ranks of an expert group pass tokens around in three ways. Each is a linear map over the group,
and its backward pass is its transpose: gathering and summing are each other's, and all-to-all is
its own.

The first dimension of a weight is the one that is partitioned. So a shard is one slice of the
flattened parameter, and checkpoints of different placements are cut from the same whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cluster.placement import Placement, expert_group, replica_ranks
from models.transformer.experts import InputMajorLinear
from trainer.engine.protocol import BuildModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchange:
    """One rank's place in its expert group.

    Attributes:
        ranks: Number of ranks in the group, E.
        index: This rank's place in it, which is also the part of each expert that it holds.
        group: The process group of these ranks; None where nothing is exchanged, as on the meta
            device.
        replica_group: The process group of all ranks that hold the same parts, one of each expert
            group.
    """

    ranks: int
    index: int
    group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None

    def gather(self, own: Tensor) -> Tensor:
        """Collect what every rank has for its own images.

        Args:
            own: This rank's images, shape [b, ...]; the shape is the same on all ranks.

        Returns:
            All ranks' images, shape [E b, ...], in the order of ranks.
        """
        gathered: Tensor = _Gather.apply(own, self)  # type: ignore[no-untyped-call]
        return gathered

    def all_to_all(self, parts: Tensor) -> Tensor:
        """Give every rank the parts of its own images that all ranks computed.

        Args:
            parts: Some of the features of all ranks' images, shape [E b, ..., f].

        Returns:
            All features of this rank's images, shape [b, ..., E f].
        """
        exchanged: Tensor = _AllToAll.apply(parts, self)  # type: ignore[no-untyped-call]
        return exchanged

    def sum(self, terms: Tensor) -> Tensor:
        """Add up all ranks' terms, each rank those of its own images.

        Args:
            terms: One term for all ranks' images, shape [E b, ...].

        Returns:
            The sums for this rank's images, shape [b, ...].
        """
        summed: Tensor = _Sum.apply(terms, self)  # type: ignore[no-untyped-call]
        return summed

    def all_gather(self, own: Tensor) -> Tensor:
        """Gather without a gradient; see `gather`."""
        out = own.new_empty(self.ranks * own.shape[0], *own.shape[1:])
        dist.all_gather_single(out, own.contiguous(), group=self.group)
        return out

    def reduce_scatter(self, terms: Tensor) -> Tensor:
        """Sum without a gradient; see `sum`."""
        out = terms.new_empty(terms.shape[0] // self.ranks, *terms.shape[1:])
        dist.reduce_scatter_single(out, terms.contiguous(), group=self.group)
        return out

    def all_to_all_chunks(self, chunks: Tensor) -> Tensor:
        """Send the i-th of E equal chunks of the first dimension to rank i, for its chunks."""
        out = torch.empty_like(chunks, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, chunks.contiguous(), group=self.group)
        return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.all_gather(own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.reduce_scatter(gradients[0]), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.reduce_scatter(terms)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.all_gather(gradients[0]), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        # Chunk j that comes back holds rank j's features of this rank's images.
        received = exchange.all_to_all_chunks(parts)
        return rearrange(received, "(rank b) ... f -> b ... (rank f)", rank=exchange.ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        exchange: Exchange = ctx.exchange
        by_rank = rearrange(gradients[0], "b ... (rank f) -> (rank b) ... f", rank=exchange.ranks)
        return exchange.all_to_all_chunks(by_rank), None


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
