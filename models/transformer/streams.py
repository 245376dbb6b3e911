"""Where the work of the scales is queued: coarse scales may run ahead of the finest one."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor


class Streams:
    """Two queues of work, one for coarse scales and the caller's own for the finest.

    Coarse scales never wait for finer ones, so a device that works off several queues at a time can
    compute the finest scale while coarse scales exchange tokens. Here both are one queue, and all
    work is done in the order in which it is asked for.
    """

    def fork(self, tensors: Iterable[Tensor]) -> None:
        """Let the coarse queue use what the caller's queue has made so far."""

    def coarse(self) -> AbstractContextManager[None]:
        """Queue the work of a `with` block for coarse scales."""
        return nullcontext()

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Let the caller's queue use what the coarse queue has made so far."""
