"""The production decoders: DALI graphs from encoded bytes, or stored moments, to Laplacian bands.

On a GPU decoding is DALI's "mixed" kind and the bands never visit the host; without one the same
graph runs on the processor.

A 2 x 2 mean is the sum of four slices, added in the order in which torch adds them, so that bands
are those of `models.pyramid` to the bit; a linear resize by one half is the mean of two means and
rounds otherwise. (Strided slices would be the obvious way and give wrong data in DALI 2.4.)
Nearest-neighbour resizes copy values, so adding the bands up again gives the image.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pipelines.augment import CropParams, SampleKey
from pipelines.decode.contract import Bands, DecodeConfig, Decoder, DrawnLatent, LatentDecodeConfig
from pipelines.encoded import as_png, pixels, read_image
from pipelines.errors import DataError, UndecodableImageError


class _Encoded(NamedTuple):
    """An image that DALI can read, its size in pixels when upright, and what is shown of it."""

    data: NDArray[np.uint8]
    width: int
    height: int
    crop: CropParams


class _LostBatchError(Exception):
    """DALI failed in a batch, because of an image or for another reason."""

    def __init__(self, cause: RuntimeError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class DaliDecoder(Decoder[_Encoded]):
    """Decodes with DALI; see `contract.Decoder`.

    Args:
        config: What images are made into.
        device: "cpu" or "cuda:N".
    """

    def __init__(self, config: DecodeConfig, *, device: str) -> None:
        self._config = config
        self._gpu = _gpu_number(device)
        self._outputs = _outputs_on(self._gpu)
        self._pipelines = _PipelinePool(gpu=self._gpu, threads=config.decode_threads)

    def prepare(self, sample: bytes, key: SampleKey | None) -> _Encoded:
        """Check an image, rewrite one that decoders may differ on, and choose its crop."""
        image = read_image(sample)
        width, height = image.upright_size
        data, channels = image.data, self._config.channels
        if not image.is_plain(channels=channels):
            data = as_png(pixels(image, channels=channels))
        crop = self._config.crop(width=width, height=height, key=key)
        return _Encoded(np.frombuffer(data, dtype=np.uint8), width, height, crop)

    def decode(self, prepared: Sequence[_Encoded]) -> Bands:
        """Decode a batch."""
        try:
            return self._outputs(self._run(prepared))
        except _LostBatchError as error:
            # DALI names no image, so each one is tried by itself.
            culprits = [
                place for place, image in enumerate(prepared) if not self._can_decode(image)
            ]
            # If nothing can be decoded any more, it is not the images.
            if not culprits or not self._can_decode(self._sound_image()):
                raise error.cause from None
            raise UndecodableImageError(culprits, "its data is damaged") from error

    def _sound_image(self) -> _Encoded:
        size, channels = self._config.image_size, self._config.channels
        return self.prepare(as_png(np.zeros((size, size, channels), np.uint8)), None)

    def _can_decode(self, image: _Encoded) -> bool:
        try:
            self._run([image])
        except _LostBatchError:
            return False
        return True

    def _run(self, images: Sequence[_Encoded]) -> Sequence[Any]:
        """Run the pipeline that fits a batch.

        Raises:
            _LostBatchError: It failed.
        """
        size = self._config.image_size
        crops = [image.crop for image in images]
        whole = (0, 0, size, size, size, size)
        # Whether anything is cut off or resized.
        changed = any(
            (crop.left, crop.top, crop.width, crop.height, image.width, image.height) != whole
            for image, crop in zip(images, crops, strict=True)
        )
        inputs: dict[str, Any] = {"encoded": [image.data for image in images]}
        if changed:
            inputs["anchor"] = np.array([(crop.top, crop.left) for crop in crops], np.int32)
            inputs["shape"] = np.array([(crop.height, crop.width) for crop in crops], np.int32)
        if self._config.augment.flip:
            inputs["mirror"] = np.array([crop.mirrored for crop in crops], np.int32)
        pipeline = self._pipelines.get(
            partial(self._graph, changed=changed), kind=changed, batch=len(images)
        )
        try:
            outputs: Sequence[Any] = pipeline.run(**inputs)
        except RuntimeError as error:
            self._pipelines.drop(changed)
            raise _LostBatchError(error) from error
        return outputs

    def _graph(self, *, changed: bool) -> list[Any]:
        config = self._config
        # Not copied: the caller holds the bytes until `run` returns.
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        settings = {
            "device": "cpu" if self._gpu is None else "mixed",
            "output_type": types.GRAY if config.channels == 1 else types.RGB,
            "adjust_orientation": True,
            # By default the decoding engine gets a share of each batch and the other cores the
            # rest, and the two round differently: pixels would depend on an image's neighbours.
            "hw_decoder_load": 1.0,
            # Chroma as libjpeg fills it in, so that a processor and a GPU train on the same pixels.
            "jpeg_fancy_upsampling": True,
        }
        if changed:
            anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            images = fn.resize(
                fn.decoders.image_slice(encoded, anchor, shape, axes=(0, 1), **settings),
                size=[config.image_size, config.image_size],
                interp_type=types.INTERP_LINEAR,
                antialias=True,
                dtype=types.FLOAT,
            )
        else:
            images = fn.decoders.image(encoded, **settings)
        middle = [127.5] * config.channels
        mirror = (
            fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            if config.augment.flip
            else 0
        )
        images = fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, mean=middle, std=middle, mirror=mirror
        )
        return _split(
            images, channels=config.channels, size=config.image_size, scales=config.scales
        )


class DaliLatentDecoder(Decoder[DrawnLatent]):
    """Draws, scales and splits latents with DALI; see `contract.Decoder`.

    Args:
        config: What latents are made into.
        device: "cpu" or "cuda:N".
    """

    def __init__(self, config: LatentDecodeConfig, *, device: str) -> None:
        self._config = config
        self._gpu = _gpu_number(device)
        self._outputs = _outputs_on(self._gpu)
        self._pipelines = _PipelinePool(gpu=self._gpu, threads=config.decode_threads)

    def prepare(self, sample: bytes, key: SampleKey | None) -> DrawnLatent:
        """Look up the moments of a latent, and draw the numbers it is sampled by."""
        return self._config.draw(sample, key)

    def decode(self, prepared: Sequence[DrawnLatent]) -> Bands:
        """Sample, scale and split a batch."""
        inputs: dict[str, Any] = {"mean": np.stack([latent.moments.mean for latent in prepared])}
        normals = [latent.normals for latent in prepared if latent.normals is not None]
        if sampled := bool(normals):
            inputs["std"] = np.stack([latent.moments.std for latent in prepared])
            inputs["normals"] = np.stack(normals)
        pipeline = self._pipelines.get(
            partial(self._graph, sampled=sampled), kind=sampled, batch=len(prepared)
        )
        return self._outputs(pipeline.run(**inputs))

    def _graph(self, *, sampled: bool) -> list[Any]:
        config = self._config
        latents = self._input("mean", config.format.dtype)
        if sampled:
            std = self._input("std", config.format.dtype)
            latents += std * self._input("normals", "float32")
        latents = (latents - config.shift) * config.scale
        return _split(
            latents,
            channels=config.format.channels,
            size=config.format.size,
            scales=config.scales,
        )

    def _input(self, name: str, dtype: str) -> Any:
        kind = types.FLOAT16 if dtype == "float16" else types.FLOAT
        stored = fn.external_source(name=name, dtype=kind, ndim=3, layout="CHW")
        on_device = stored if self._gpu is None else stored.gpu()
        return fn.cast(on_device, dtype=types.FLOAT)


_Outputs = Callable[[Sequence[Any]], Bands]


def _gpu_number(device: str) -> int | None:
    """Number of the GPU that "cuda:N" names; None for "cpu".

    Raises:
        DataError: DALI does not work on such a device.
    """
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise DataError(f"DALI decodes on 'cpu' or 'cuda:N', not on {device!r}.")
    return (place.index or 0) if place.type == "cuda" else None


def _split(images: Any, *, channels: int, size: int, scales: int) -> list[Any]:
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


class _PipelinePool:
    """Pipelines that make one batch for each call of `run`, for `_outputs_on`; built when needed.

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


def _outputs_on(gpu: int | None) -> _Outputs:
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
