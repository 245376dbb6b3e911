"""Plain values that go between ranks, over the hosts' network and never over the GPUs'."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

# A rank may wait for another whose store is slow, or which measures for hours; that one is dead
# shows in its closed connection.
_PATIENCE = timedelta(days=365)


class Gathering:
    """Returns every rank's value, in rank order, on every rank.

    Each has a process group of its own, so two may be used from two threads at a time. Making one
    is a collective call.

    Args:
        alone: Speak to nobody, whatever process group there is.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self._group = (
            dist.new_group(backend="gloo", timeout=_PATIENCE)
            if dist.is_initialized() and not alone
            else None
        )

    @property
    def rank(self) -> int:
        """This rank."""
        return 0 if self._group is None else dist.get_rank(self._group)

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return 1 if self._group is None else dist.get_world_size(self._group)

    def __call__(self, value: object) -> list[object]:
        """Gather; every rank calls it."""
        if self._group is None:
            return [value]
        everyone: list[object] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def hand_over(self, value: object) -> None:
        """Give the first rank a value, which it has to `receive` before this returns."""
        dist.send_object_list([value], dst=0, group=self._group)

    def receive(self, source: int) -> Any:
        """Return what another rank hands over to this one, the first."""
        held: list[Any] = [None]
        dist.recv_object_list(held, src=source, group=self._group)
        return held[0]
