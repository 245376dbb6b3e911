"""The exchange of tokens within an expert group: three collectives, and the memory they use.

Ranks of a group pass tokens around in three ways, each a linear map over the group. Gathering and
summing are each other's transpose, and all-to-all is its own. So what is gathered in a forward pass
has its gradients summed in the backward pass.

Buffers are ``[E, rows, features]``, one chunk for each rank of the group. The rows of a chunk are
the tokens of several scales, one scale after the other, so that all of them travel at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


class Buffers:
    """Memory that collectives send from and receive into, kept from one exchange to the next.

    There is one set, whichever CUDA stream exchanges. Each scale has its turn on the coarse stream
    or, where it is the finest active one, on the caller's; the next to take waits for the one
    before.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], Tensor] = {}
        self._user: torch.cuda.Stream | None = None

    def take(self, purpose: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return memory that holds nothing; what was taken for the same purpose is lost.

        Args:
            purpose: What it is for; what is needed at the same time has different purposes.
            shape: Shape of the tensor.
            like: A tensor of the same type, on the same device.
        """
        if like.is_cuda:
            self._hand_over(torch.cuda.current_stream(like.device))
        key = (purpose, like.dtype, like.device)
        numel = math.prod(shape)
        if key not in self._kept or self._kept[key].numel() < numel:
            # What is too small is let go before the next is made.
            self._kept.pop(key, None)
            self._kept[key] = like.new_empty(numel)
        return self._kept[key][:numel].view(*shape)

    def release(self) -> None:
        """Give all of it back; what is taken next is made anew."""
        self._kept.clear()

    def _hand_over(self, user: torch.cuda.Stream) -> None:
        """Let a stream use what the one before it has used so far."""
        before, self._user = self._user, user
        if before is not None and before != user:
            user.wait_stream(before)
            for kept in self._kept.values():
                # Or the allocator would give it away when the stream that made it is done.
                kept.record_stream(user)


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
        buffers: What is sent from and received into.
    """

    ranks: int
    index: int
    group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None
    buffers: Buffers = field(default_factory=Buffers)

    def chunks(self, rows: int, features: int, *, like: Tensor) -> Tensor:
        """Return memory for what is sent next, [E, rows, features]: a chunk for each rank."""
        return self.buffers.take("send", (self.ranks, rows, features), like)

    def gather(self, own: Tensor, *, keep: bool = False) -> Tensor:
        """Collect what every rank has for its own images.

        Args:
            own: This rank's rows, shape [rows, f]; the shape is the same on all ranks.
            keep: Whether the result outlives the next exchange.

        Returns:
            All ranks' rows, shape [E, rows, f], in the order of ranks.
        """
        shape = (self.ranks, *own.shape)
        out = own.new_empty(shape) if keep else self.buffers.take("receive", shape, own)
        dist.all_gather_single(out.flatten(0, 1), own.contiguous(), group=self.group)
        return out

    def all_to_all(self, chunks: Tensor) -> Tensor:
        """Send chunk i to rank i of the group, for its chunk of this rank's number.

        Args:
            chunks: What each rank gets, shape [E, rows, f].

        Returns:
            What each rank sent, in the same shape; it does not outlive the next exchange.
        """
        out = self.buffers.take("receive", chunks.shape, chunks)
        dist.all_to_all_single(out, chunks.contiguous(), group=self.group)
        return out

    def sum(self, terms: Tensor) -> Tensor:
        """Add up all ranks' terms, each rank those of its own images.

        Args:
            terms: One term for every rank's rows, shape [E, rows, f].

        Returns:
            The sums for this rank's rows, shape [rows, f].
        """
        out = terms.new_empty(terms.shape[1:])
        dist.reduce_scatter_single(out, terms.flatten(0, 1).contiguous(), group=self.group)
        return out
