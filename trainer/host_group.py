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
        """Return the least of all ranks' values.

        By way of the first rank: gloo's own reduction goes around all ranks twice, one after the
        other, which with a thousand of them are two thousand times the network's delay.
        """
        if self._group is None:
            return value
        least = torch.tensor([value])
        given = [torch.empty_like(least) for _ in range(self.world_size if self.rank == 0 else 0)]
        dist.gather(least, given or None, dst=0, group=self._group)
        if given:
            least = torch.stack(given).min(dim=0).values
        dist.broadcast(least, src=0, group=self._group)
        return int(least)

    def reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum of all ranks' whole numbers, which are given on the host."""
        total = values.clone()
        if self._group is not None:
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self._group)
        return total

    def reduce_least(self, values: Tensor) -> Tensor:
        """Return the least of all ranks' numbers, place by place; they are given on the host."""
        least = values.clone()
        if self._group is not None:
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._group)
        return least

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

    def first_mistake(self, mistake: str) -> str:
        """Return what went wrong on the first rank that tells something; "" where none does."""
        mistaken = self.reduce_min(self.rank if mistake else self.world_size)
        if mistaken == self.world_size:
            return ""
        return self.broadcast(mistake.encode(errors="replace"), source=mistaken).decode()

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
