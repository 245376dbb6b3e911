"""An agreement of all ranks to stop, so that none waits for one that has left.

A stop request reaches ranks at different moments. The vote of one update is started without
waiting and read after the next, over a process group of the host: it costs the step nothing and
never synchronises with the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from cluster.process_group import prove_peers


class StopVote:
    """Asks every rank once per update; all get the same answer.

    Args:
        requested: Tells whether this rank was asked to stop.
    """

    def __init__(self, requested: Callable[[], bool]) -> None:
        self._requested = requested
        self._group = None
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
            prove_peers()
        self._flag = torch.zeros(1)
        self._pending: dist.Work | None = None

    def __call__(self) -> bool:
        """Return whether any rank wanted to stop one update ago, and start the next vote."""
        if self._group is None:
            return self._requested()
        agreed = False
        if self._pending is not None:
            self._pending.wait()
            agreed = bool(self._flag.item())
        if not agreed:
            self._flag = torch.tensor([float(self._requested())])
            self._pending = dist.all_reduce(
                self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
            )
        return agreed

    def finish(self) -> None:
        """Complete the vote under way, so that no collective outlives the loop."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
