"""Two queues of a GPU: coarse scales beside the finest one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.transformer.block import Streams


class CudaStreams(Streams):
    """The caller's stream on a GPU, and one more for coarse scales.

    The backward pass follows by itself: autograd runs each operation on the stream of its forward
    pass, and waits where a gradient passes from one stream to the other.

    Args:
        device: The GPU of the model; the caller's stream is the current one there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # What coarse scales compute is waited for by their exchange, and that by everything.
        self._coarse = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def fork(self, tensors: Iterable[Tensor]) -> None:
        """Let the coarse stream use what the caller's stream has made so far."""
        self._coarse.wait_stream(torch.cuda.current_stream(self._device))
        _share(tensors, self._coarse)

    @contextmanager
    def coarse(self) -> Iterator[None]:
        """Queue the work of a `with` block on the coarse stream."""
        with torch.cuda.stream(self._coarse):
            yield

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Let the caller's stream use what the coarse stream has made so far."""
        own = torch.cuda.current_stream(self._device)
        own.wait_stream(self._coarse)
        _share(tensors, own)


def _share(tensors: Iterable[Tensor], user: torch.cuda.Stream) -> None:
    for tensor in tensors:
        # Or the allocator would give its memory away when its own stream is done with it.
        tensor.record_stream(user)
