"""Two CUDA streams: coarse scales, their exchange included, beside the finest scale's compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.transformer.streams import Streams


class CudaStreams(Streams):
    """The current stream, and one more for coarse scales.

    The backward pass follows by itself: autograd runs each operation on the stream of its forward
    pass, and waits where a gradient passes from one stream to the other.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._coarse = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def fork(self, tensors: Iterable[Tensor]) -> None:
        """Let the coarse stream use what the current stream has made so far."""
        self._coarse.wait_stream(torch.cuda.current_stream())
        self._share(tensors, self._coarse)

    @contextmanager
    def coarse(self) -> Iterator[None]:
        """Queue the work of a `with` block on the coarse stream."""
        with torch.cuda.stream(self._coarse):
            yield

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Let the current stream use what the coarse stream has made so far."""
        current = torch.cuda.current_stream()
        current.wait_stream(self._coarse)
        self._share(tensors, current)

    def _share(self, tensors: Iterable[Tensor], user: torch.cuda.Stream) -> None:
        for tensor in tensors:
            # Or the allocator would give its memory away when its own stream is done with it.
            tensor.record_stream(user)
