"""Memory of the host: when the C library gives freed blocks back to the system."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h
_LIMIT_BYTES = 4 << 20


def return_large_blocks() -> None:
    """Have blocks from 4 MiB on go back to the system when they are freed.

    glibc raises that limit, up to 32 MiB, each time such a block is freed, and from then on takes
    blocks below it from the heap, which batches of images cut into pieces: the memory of a loader
    that decodes on the host doubled over 12,000 images (docs/benchmarks.md). Other C libraries do
    not know the setting and need none. MALLOC_MMAP_THRESHOLD_ in the environment goes first.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LIMIT_BYTES)
