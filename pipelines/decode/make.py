"""The decoder that a name chooses."""

from typing import Any, Literal

from pipelines.decode.contract import DecodeConfig, Decoder, LatentDecodeConfig
from pipelines.errors import DataError

DecoderName = Literal["dali", "pillow"]


def make_decoder(
    name: DecoderName, config: DecodeConfig | LatentDecodeConfig, *, device: str
) -> Decoder[Any]:
    """Make the decoder of that name.

    Args:
        name: "dali", or "pillow", the slow reference.
        config: What images, or latents, are made into.
        device: "cpu" or "cuda:N".
    """
    if name == "dali":
        from pipelines.decode.dali import DaliDecoder, DaliLatentDecoder

        if isinstance(config, LatentDecodeConfig):
            return DaliLatentDecoder(config, device=device)
        return DaliDecoder(config, device=device)
    if name == "pillow":
        from pipelines.decode.cpu import LatentDecoder, PillowDecoder

        if isinstance(config, LatentDecodeConfig):
            return LatentDecoder(config, device=device)
        return PillowDecoder(config, device=device)
    raise DataError(f"There is no decoder {name!r}; choose 'dali' or 'pillow'.")
