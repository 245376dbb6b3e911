"""The production decoder of latents: one DALI graph from stored moments to Laplacian bands."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from nvidia.dali import fn, types

from pipelines.augment import SampleKey
from pipelines.batch import Bands
from pipelines.decode.contract import Decoder, DrawnLatent, LatentDecodeConfig
from pipelines.decode.dali_bands import PipelinePool, gpu_number, outputs_on, split_graph


class DaliLatentDecoder(Decoder[DrawnLatent]):
    """Draws, scales and splits latents with DALI; see `contract.Decoder`.

    Args:
        config: What latents are made into.
        device: "cpu" or "cuda:N".
    """

    def __init__(self, config: LatentDecodeConfig, *, device: str) -> None:
        self._config = config
        self._gpu = gpu_number(device)
        self._outputs = outputs_on(self._gpu)
        self._pipelines = PipelinePool(gpu=self._gpu, threads=config.decode_threads)

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
        return split_graph(
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
