"""Images that cannot be decoded, found before training does."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.decode.contract import DecodeConfig
from pipelines.decode.make import DecoderName, make_decoder
from pipelines.encoded import read_image
from pipelines.errors import BadSampleError, UndecodableImageError

_BATCH_PIXELS = 1 << 25  # 96 MiB of RGB that are decoded at a time


class DamageCheck:
    """Decodes images as training does, on the processor, and each of them whole.

    Args:
        decoder: The decoder that trains.
    """

    def __init__(self, decoder: DecoderName = "dali") -> None:
        config = DecodeConfig(image_size=1, scales=1, decode_threads=1, whole=True)
        self._decoder = make_decoder(decoder, config, device="cpu")

    def problems(self, samples: Sequence[bytes]) -> dict[int, str]:
        """Say what is wrong with each image that cannot be decoded, by its place."""
        problems: dict[int, str] = {}
        batch: dict[int, Any] = {}
        total = 0
        for place, sample in enumerate(samples):
            try:
                width, height = read_image(sample).upright_size
                prepared = self._decoder.prepare(sample, None)
            except BadSampleError as error:
                problems[place] = str(error)
                continue
            if batch and total + width * height > _BATCH_PIXELS:
                problems |= self._decoded(batch)
                batch, total = {}, 0
            batch[place] = prepared
            total += width * height
        if batch:
            problems |= self._decoded(batch)
        return problems

    def _decoded(self, batch: Mapping[int, Any]) -> dict[int, str]:
        try:
            self._decoder.decode(list(batch.values()))
        except UndecodableImageError as error:
            places = list(batch)
            return {places[index]: error.reason for index in error.indices}
        return {}
