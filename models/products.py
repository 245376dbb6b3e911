"""How a GPU multiplies matrices of float32, for the time of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Say how a GPU multiplies matrices and convolves in float32, whatever was said before.

    It holds for all threads of the process, and is put back in the end.

    Args:
        device: Where the block computes; on a processor nothing changes.
        tf32: Round factors to 10 bits of mantissa, for speed.
    """
    if device.type != "cuda":
        yield
        return
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before
