"""Host memory that a GPU copies from and into."""

from __future__ import annotations

import logging
import weakref
from contextlib import suppress

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def host_buffer(size: int, *, page_locked: bool) -> Tensor:
    """Return host memory that the system has really given, as bytes.

    Keep this tensor itself for as long as its views are used: its pages are unlocked when it goes.

    Args:
        size: Number of bytes.
        page_locked: Lock its pages in place, so that a GPU copies faster and while the host goes
            on; torch's own pinned memory is rounded up to a power of two.
    """
    # The system gives memory when it is first written: now, and not while training waits.
    buffer = torch.empty(size, dtype=torch.uint8).zero_()
    if not page_locked:
        return buffer
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    failed = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if failed:
        # CUDA reports it once more, to whoever launches the next kernel: not to training.
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        logger.warning(
            "%.1f GiB of host memory cannot be page-locked (CUDA error %d), so training waits "
            "longer for copies between it and the GPU",
            buffer.nbytes / 1024**3,
            failed,
        )
    else:
        weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
    return buffer
