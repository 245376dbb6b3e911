"""Bands out of a DALI graph: how it splits, and how its outputs become tensors.

2 x 2 means are linear resizes by one half without antialiasing, which DALI computes exactly;
nearest-neighbour resizes copy values, so adding the bands up again gives the image. (Strided slices
would be the obvious alternative and give wrong data in DALI 2.4.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipelines.batch import Bands
from pipelines.errors import DataError

Outputs = Callable[[Sequence[Any]], Bands]


def gpu_number(device: str) -> int | None:
    """Number of the GPU that "cuda:N" names; None for "cpu".

    Raises:
        DataError: DALI does not work on such a device.
    """
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise DataError(f"DALI decodes on 'cpu' or 'cuda:N', not on {device!r}.")
    return (place.index or 0) if place.type == "cuda" else None


def split_graph(images: Any, *, size: int, scales: int) -> list[Any]:
    """Split a node of float images into Laplacian bands, coarse to fine.

    Args:
        images: Node of images in HWC or CHW layout.
        size: Their height and width.
        scales: Number of bands.
    """
    bands = []
    for _ in range(scales - 1):
        coarse = _resize(images, size // 2, types.INTERP_LINEAR)
        bands.append(images - _resize(coarse, size, types.INTERP_NN))
        images, size = coarse, size // 2
    return [images, *reversed(bands)]


def _resize(images: Any, size: int, interpolation: Any) -> Any:
    return fn.resize(
        images, size=[size, size], interp_type=interpolation, antialias=False, dtype=types.FLOAT
    )


def outputs_on(gpu: int | None) -> Outputs:
    """Make what turns a pipeline's outputs into tensors, on that GPU or the host (None)."""
    return _HostOutputs() if gpu is None else _GpuOutputs(gpu)


class _HostOutputs:
    """Copies a pipeline's outputs, which DALI will overwrite, into tensors of their own."""

    def __call__(self, outputs: Sequence[Any]) -> Bands:
        return tuple(torch.from_numpy(np.array(output.as_array())) for output in outputs)


class _GpuOutputs:
    """The same on a GPU, without waiting for the work queued by the training loop.

    The copies run on a stream of their own. Their memory is declared as used by the stream that
    was current when the decoder was made, so that it is not handed out again too early.
    """

    def __init__(self, index: int) -> None:
        self._consumer = torch.cuda.current_stream(index)
        self._stream = torch.cuda.Stream(index)  # type: ignore[no-untyped-call]

    def __call__(self, outputs: Sequence[Any]) -> Bands:
        with torch.cuda.stream(self._stream):
            bands = tuple(self._copy(output) for output in outputs)
        self._stream.synchronize()
        return bands

    def _copy(self, output: Any) -> Tensor:
        copy: Tensor = from_dlpack(output.as_tensor()).clone()
        copy.record_stream(self._consumer)
        return copy
