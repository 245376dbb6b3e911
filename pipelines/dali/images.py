"""The production decoder of images: one DALI graph from encoded bytes to Laplacian bands.

On a GPU decoding is DALI's "mixed" kind and the bands never visit the host; without one the same
graph runs on the processor.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types

from pipelines.batch import Bands
from pipelines.dali.bands import gpu_number, outputs_on, split_graph
from pipelines.decode import DecodeConfig
from pipelines.encoded import BadImageError, as_png, is_plain, open_image, pixels, upright_size
from pipelines.errors import UndecodableImageError
from pipelines.sample_key import SampleKey
from pipelines.view import View, view_of


class _Encoded(NamedTuple):
    """An image that DALI can read, its size in pixels when upright, and what is shown of it."""

    data: NDArray[np.uint8]
    width: int
    height: int
    view: View


class DaliDecoder:
    """Decodes with DALI; see `pipelines.decode.Decoder` for the contract.

    Args:
        config: What images are made into.
        device: "cpu" or "cuda:N".
    """

    def __init__(self, config: DecodeConfig, *, device: str) -> None:
        self._config = config
        self._gpu = gpu_number(device)
        self._outputs = outputs_on(self._gpu)
        self._capacity = 0
        self._pipelines: dict[bool, Any] = {}

    def __call__(self, images: Sequence[bytes], keys: Sequence[SampleKey] | None = None) -> Bands:
        """Decode a batch."""
        prepared = []
        bad: dict[int, str] = {}
        for place, data in enumerate(images):
            own = None if keys is None else keys[place]
            try:
                prepared.append(self._prepare(data, own))
            except BadImageError as error:
                bad[place] = str(error)
        if bad:
            raise UndecodableImageError(list(bad), next(iter(bad.values())))
        try:
            return self._run(prepared)
        except RuntimeError as error:
            # The batch is lost and DALI names no image, so each one is tried by itself.
            culprits = [
                place for place, image in enumerate(prepared) if not self._can_decode(image)
            ]
            if not culprits:
                raise
            raise UndecodableImageError(culprits, "its data is damaged") from error

    def _prepare(self, data: bytes, key: SampleKey | None) -> _Encoded:
        """Check an image, and rewrite one that decoders may differ on."""
        header = open_image(data)
        width, height = upright_size(header)
        if not is_plain(header, data, channels=self._config.channels):
            data = as_png(pixels(header, channels=self._config.channels))
        view = view_of(self._config.augment, width=width, height=height, key=key)
        return _Encoded(np.frombuffer(data, dtype=np.uint8), width, height, view)

    def _can_decode(self, image: _Encoded) -> bool:
        try:
            self._run([image])
        except RuntimeError:
            return False
        return True

    def _run(self, images: Sequence[_Encoded]) -> Bands:
        size = self._config.image_size
        resize = any((image.width, image.height) != (size, size) for image in images)
        views = [image.view for image in images]
        inputs: dict[str, Any] = {"encoded": [image.data for image in images]}
        # An image of the right size may be shown in part, too.
        resize |= any((view.width, view.height) != (size, size) for view in views)
        if resize:
            inputs["anchor"] = [np.array([view.top, view.left], np.int32) for view in views]
            inputs["shape"] = [np.array([view.height, view.width], np.int32) for view in views]
        if self._config.augment.flip:
            inputs["mirror"] = [np.array(view.mirrored, np.int32) for view in views]
        if len(images) > self._capacity:
            self._capacity = len(images)
            self._pipelines.clear()
        if resize not in self._pipelines:
            self._pipelines[resize] = self._build(resize=resize)
        try:
            return self._outputs(self._pipelines[resize].run(**inputs))
        except RuntimeError:
            # DALI calls a pipeline that has failed invalid.
            del self._pipelines[resize]
            raise

    def _build(self, *, resize: bool) -> Any:
        pipeline = Pipeline(
            batch_size=self._capacity,
            num_threads=self._config.decode_threads,
            device_id=self._gpu,
            prefetch_queue_depth=1,
            exec_pipelined=False,
            exec_async=False,
        )
        with pipeline:
            pipeline.set_outputs(*self._graph(resize=resize))
        pipeline.build()
        return pipeline

    def _graph(self, *, resize: bool) -> list[Any]:
        config = self._config
        images = fn.decoders.image(
            fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
            device="cpu" if self._gpu is None else "mixed",
            output_type=types.GRAY if config.channels == 1 else types.RGB,
            adjust_orientation=True,
        )
        if resize:
            anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            images = fn.slice(images, anchor, shape, axes=(0, 1))
            images = fn.resize(
                images,
                size=[config.image_size, config.image_size],
                interp_type=types.INTERP_LINEAR,
                antialias=True,
                dtype=types.FLOAT,
            )
        middle = [127.5] * config.channels
        mirror = (
            fn.external_source(name="mirror", dtype=types.INT32, ndim=0)
            if config.augment.flip
            else 0
        )
        images = fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, mean=middle, std=middle, mirror=mirror
        )
        return split_graph(images, size=config.image_size, scales=config.scales)
