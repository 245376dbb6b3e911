"""Exchange inside an expert group: the ranks that hold one expert in parts pass tokens around.

All three ways are linear maps over the group, and each one's backward pass is its transpose:
gathering and summing are each other's, dealing is its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor


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
