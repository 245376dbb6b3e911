"""Messages between all ranks, over the hosts' network and never over the GPUs'.

They are bytes: nothing that another rank sent is unpickled.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# A rank may wait for another whose store is slow; that one is dead shows in its closed connection.
_PATIENCE = timedelta(days=1)


class HostGroup:
    """All ranks of the run, as one of them sees them.

    Each has a process group of its own, so two may be used from two threads at a time. Making one
    is a collective call, and so is every method.

    Attributes:
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self) -> None:
        self._group = (
            dist.new_group(backend="gloo", timeout=_PATIENCE) if dist.is_initialized() else None
        )
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        self.world_size = 1 if self._group is None else dist.get_world_size(self._group)

    def least(self, value: int) -> int:
        """Return the least of all ranks' values."""
        least = torch.tensor([value])
        if self._group is not None:
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group)
        return int(least)

    def broadcast(self, data: bytes, *, source: int) -> bytes:
        """Return what rank `source` gives; the others' data is not looked at."""
        if self._group is None:
            return data
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=source, group=self._group)
        if self.rank == source:
            message = _tensor(data)
        else:
            message = torch.empty(int(size), dtype=torch.uint8)
        if len(message):
            dist.broadcast(message, src=source, group=self._group)
        return data if self.rank == source else _bytes(message)

    def collect(self, data: bytes) -> list[bytes]:
        """Return every rank's data, in rank order, on the first rank, and nothing on the others.

        The first rank receives one after the other in its real size: the collective gather would
        pad all to the largest.
        """
        if self._group is None:
            return [data]
        size = torch.tensor([len(data)])
        if self.rank > 0:
            dist.gather(size, dst=0, group=self._group)
            if data:
                dist.send(_tensor(data), dst=0, group=self._group)
            return []
        sizes = [torch.empty_like(size) for _ in range(self.world_size)]
        dist.gather(size, sizes, dst=0, group=self._group)
        collected = [data]
        for rank in range(1, self.world_size):
            message = torch.empty(int(sizes[rank]), dtype=torch.uint8)
            if len(message):
                dist.recv(message, src=rank, group=self._group)
            collected.append(_bytes(message))
        return collected


def _tensor(data: bytes) -> Tensor:
    # torch wants memory that it could write to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


def _bytes(message: Tensor) -> bytes:
    return bytes(message.numpy().tobytes())
