"""The production decoder of images: one DALI graph from encoded bytes to Laplacian bands.

On a GPU decoding is DALI's "mixed" kind and the bands never visit the host; without one the same
graph runs on the processor.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, types

from pipelines.augment import CropParams, SampleKey
from pipelines.batch import Bands
from pipelines.decode.contract import DecodeConfig, Decoder
from pipelines.decode.dali_bands import PipelinePool, gpu_number, outputs_on, split_graph
from pipelines.encoded import as_png, pixels, read_image
from pipelines.errors import UndecodableImageError


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
        self._gpu = gpu_number(device)
        self._outputs = outputs_on(self._gpu)
        self._pipelines = PipelinePool(gpu=self._gpu, threads=config.decode_threads)

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
        return split_graph(
            images, channels=config.channels, size=config.image_size, scales=config.scales
        )
