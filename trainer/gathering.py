"""Gathering small plain values from all ranks, over the hosts' network and never over the GPUs'."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

# A rank may wait for another whose store is slow; that one is dead shows in its closed connection.
_PATIENCE = timedelta(days=1)


class Gathering:
    """Returns every rank's value, in rank order, on every rank.

    Each has a process group of its own, so two may be used from two threads at a time. Making one
    is a collective call.
    """

    def __init__(self) -> None:
        self._group = (
            dist.new_group(backend="gloo", timeout=_PATIENCE) if dist.is_initialized() else None
        )

    def __call__(self, value: object) -> list[object]:
        """Gather; every rank calls it."""
        if self._group is None:
            return [value]
        everyone: list[object] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone
