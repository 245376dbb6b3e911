"""Bands out of a DALI graph: how it splits, and how its outputs become tensors.

A 2 x 2 mean is the sum of four slices, added in the order in which torch adds them, so that bands
are those of `models.pyramid` to the bit; a linear resize by one half is the mean of two means and
rounds otherwise. (Strided slices would be the obvious way and give wrong data in DALI 2.4.)
Nearest-neighbour resizes copy values, so adding the bands up again gives the image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
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


def split_graph(images: Any, *, channels: int, size: int, scales: int) -> list[Any]:
    """Split a node of float images into Laplacian bands, coarse to fine.

    Args:
        images: Node of images in CHW layout.
        channels: Their channels.
        size: Their height and width.
        scales: Number of bands.
    """
    bands = []
    for _ in range(scales - 1):
        coarse = _halve(images, channels=channels, size=size)
        nearest = fn.resize(
            coarse, size=[size, size], interp_type=types.INTERP_NN, dtype=types.FLOAT
        )
        bands.append(images - nearest)
        images, size = coarse, size // 2
    return [images, *reversed(bands)]


def _halve(images: Any, *, channels: int, size: int) -> Any:
    half = size // 2
    # Slices have at most four dimensions, so channels and rows share one.
    blocks = fn.reshape(images, shape=[channels * half, 2, half, 2], layout="ABCD")
    first, *others = (
        fn.slice(blocks, start=[row, column], shape=[1, 1], axes=[1, 3])
        for row in (0, 1)
        for column in (0, 1)
    )
    mean = sum(others, start=first) * np.float32(0.25)
    return fn.reshape(mean, shape=[channels, half, half], layout="CHW")


class PipelinePool:
    """Pipelines that make one batch for each call of `run`, for `outputs_on`; built when needed.

    Args:
        gpu: Number of the GPU; None runs on the host.
        threads: Threads that work for each of them.
    """

    def __init__(self, *, gpu: int | None, threads: int) -> None:
        self._gpu = gpu
        self._threads = threads
        self._capacity = 0
        self._built: dict[object, Any] = {}

    def get(self, graph: Callable[[], Sequence[Any]], *, kind: object, batch: int) -> Any:
        """Give the pipeline of a kind.

        Args:
            graph: Defines the pipelines of this kind and returns their outputs.
            kind: What tells the graphs of one pool apart.
            batch: Samples it must take.
        """
        if batch > self._capacity:
            self._capacity = batch
            self._built.clear()
        if kind not in self._built:
            self._built[kind] = self._build(graph)
        return self._built[kind]

    def drop(self, kind: object) -> None:
        """Forget a pipeline that has failed, which DALI then calls invalid."""
        self._built.pop(kind, None)

    def _build(self, graph: Callable[[], Sequence[Any]]) -> Any:
        pipeline = Pipeline(
            batch_size=self._capacity,
            num_threads=self._threads,
            device_id=self._gpu,
            prefetch_queue_depth=1,
            exec_pipelined=False,
            exec_async=False,
            # Outputs in memory of their own, which is not used again while somebody holds it.
            exec_dynamic=self._gpu is None,
        )
        with pipeline:
            pipeline.set_outputs(*graph())
        pipeline.build()
        return pipeline


def outputs_on(gpu: int | None) -> Outputs:
    """Make what turns the outputs of a pool's pipelines into tensors, on that GPU or the host."""
    return _on_host if gpu is None else _GpuOutputs(gpu)


def _on_host(outputs: Sequence[Any]) -> Bands:
    """Hand out a pipeline's outputs as they are, without a copy."""
    return tuple(from_dlpack(output.as_tensor()) for output in outputs)


class _GpuOutputs:
    """Copies of a pipeline's outputs, without waiting for the work queued by the training loop.

    DALI does not know when that work has read a buffer, and would fill it again too early. The
    copies run on a stream of their own. Their memory is declared as used by the stream that was
    current when the decoder was made, so that it is not handed out again too early.
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
