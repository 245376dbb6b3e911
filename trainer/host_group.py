"""Messages between all ranks, over the hosts' network and never over the GPUs'.

They are bytes: nothing that another rank sent is unpickled.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.process_group import prove_peers

# A rank may wait for another whose store is slow, or which measures for hours; that one is dead
# shows in its closed connection.
_PATIENCE = timedelta(days=365)


class HostGroup:
    """All ranks of the run, as one of them sees them.

    Each has a process group of its own, so two may be used from two threads at a time. Making one
    is a collective call, and so is every method but `send` and `receive`.

    Args:
        alone: Speak to nobody, whatever process group there is.

    Attributes:
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self._group = None
        if dist.is_initialized() and not alone:
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            prove_peers()
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        self.world_size = 1 if self._group is None else dist.get_world_size(self._group)

    def reduce_min(self, value: int) -> int:
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

    def gather(self, data: bytes) -> list[bytes]:
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
        received = (
            self._receive_bytes(rank, int(sizes[rank])) for rank in range(1, self.world_size)
        )
        return [data, *received]

    def send(self, data: bytes, *, to: int) -> None:
        """Give one rank data, which it has to `receive` before this returns."""
        dist.send(torch.tensor([len(data)]), dst=to, group=self._group)
        if data:
            dist.send(_tensor(data), dst=to, group=self._group)

    def receive(self, source: int) -> bytes:
        """Return what another rank sends to this one."""
        size = torch.tensor([0])
        dist.recv(size, src=source, group=self._group)
        return self._receive_bytes(source, int(size))

    def _receive_bytes(self, source: int, size: int) -> bytes:
        message = torch.empty(size, dtype=torch.uint8)
        if size:
            dist.recv(message, src=source, group=self._group)
        return _bytes(message)


def _tensor(data: bytes) -> Tensor:
    # torch wants memory that it could write to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


def _bytes(message: Tensor) -> bytes:
    return bytes(message.numpy().tobytes())
