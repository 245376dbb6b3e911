"""What model a checkpoint's weights belong to, as its manifest says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from models.flow.flow import FlowConfig
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from trainer.autoencoder.codec import CodecConfig
from trainer.checkpoint.errors import CheckpointMismatch
from trainer.checkpoint.manifest import Manifest
from trainer.config.reading import from_dict, to_dict
from trainer.config.shapes import ImageShape
from trainer.evaluation.own_settings import label_dropout
from trainer.evaluation.trained_model import recorded_codec, recorded_shape


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Everything but the weights.

    Attributes:
        transformer: The network.
        flow: The flow it was trained with.
        shape: Shape of what the flow works on.
        codec: How images become that.
        autoencoder_sha256: Digest of the autoencoder; None in pixel space.
        label_dropout: Share of labels that training replaced by the null label; without it there is
            nothing to guide by.
    """

    transformer: TransformerConfig
    flow: FlowConfig
    shape: ImageShape
    codec: CodecConfig
    autoencoder_sha256: str | None
    label_dropout: float

    @classmethod
    def of(cls, manifest: Manifest) -> ModelDescription:
        """Read the description of a checkpoint.

        Raises:
            ConfigError: It has settings that this version does not know.
            CheckpointMismatch: Its parameters are not those of the model that it describes.
        """
        science = manifest.science
        description = cls(
            transformer=from_dict(TransformerConfig, science["model"], path="model."),
            flow=from_dict(FlowConfig, science["flow"], path="flow."),
            shape=recorded_shape(science),
            codec=recorded_codec(science),
            autoencoder_sha256=science.get("autoencoder", {}).get("sha256"),
            label_dropout=label_dropout(science),
        )
        wanted = description._parameters()
        if wanted != manifest.parameters:
            odd = {*wanted.items()} ^ {*manifest.parameters.items()}
            raise CheckpointMismatch(
                f"The checkpoint of {manifest.run} after {manifest.images} images does not hold "
                f"the parameters of the model that it describes, such as {min(odd)[0]}: use the "
                "version of the code that saved it."
            )
        return description

    @property
    def on_latents(self) -> bool:
        """Whether the flow works on latents of an autoencoder."""
        return self.codec.kind != "identity"

    def arguments(self) -> dict[str, Any]:
        """Return what `LapFlowTransformer2DModel` is built from, as JSON values."""
        return {
            "transformer": to_dict(self.transformer),
            "flow": to_dict(self.flow),
            "in_channels": self.shape.channels,
            "sample_size": self.shape.size,
            "num_classes": self.shape.classes,
            "label_dropout": self.label_dropout,
            "latents": self._latents(),
        }

    def _latents(self) -> dict[str, Any] | None:
        # Where the autoencoder was is nobody's business outside; which one it is, everybody's.
        if not self.on_latents:
            return None
        return {
            "factor": self.codec.factor,
            "scale": self.codec.scale,
            "shift": self.codec.shift,
            "sha256": self.autoencoder_sha256,
        }

    def _parameters(self) -> Mapping[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = LapFlowTransformer(
                self.transformer,
                scales=self.flow.scales,
                channels=self.shape.channels,
                image_size=self.shape.size,
                classes=self.shape.classes,
            )
        return {name: tuple(value.shape) for name, value in model.named_parameters()}
