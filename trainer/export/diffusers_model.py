"""The network as a model of diffusers, which loads it from an exported folder.

The folder holds settings and weights only; all code that runs is this project's and diffusers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from models.flow.config import FlowConfig
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer
from trainer.config.reading import from_dict


class LapFlowTransformer2DModel(LapFlowTransformer, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """`LapFlowTransformer` with diffusers' ways to load, save, cast and move a model.

    Parameters have the same names and the forward pass is the same. `torch_dtype` casts the
    weights; states and times stay in float32, and so do the velocities.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        transformer: Mapping[str, Any],
        flow: Mapping[str, Any],
        in_channels: int,
        sample_size: int,
        num_classes: int,
        label_dropout: float | None = None,
        latents: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the network with fresh weights; the arguments become `config`.

        Args:
            transformer: Settings of `TransformerConfig`.
            flow: Settings of `FlowConfig`: the flow that the weights are trained for, which has
                the number of scales.
            in_channels: Channels of what the flow works on, images or latents.
            sample_size: Its height and width.
            num_classes: Number of classes; label `num_classes` is the null label.
            label_dropout: Share of labels that training replaced by the null label; 0 leaves
                nothing to guide by.
            latents: For a flow on latents, what makes images of them: `factor`, pixels for one
                element; `scale` and `shift`, where they are not the autoencoder's own; and the
                autoencoder's `sha256`.

        Raises:
            ConfigError: A setting is unknown or cannot be used.
            TransformerConfigError: The sizes do not fit each other.
        """
        super().__init__(
            from_dict(TransformerConfig, transformer, path="transformer."),
            scales=from_dict(FlowConfig, flow, path="flow.").scales,
            channels=in_channels,
            image_size=sample_size,
            classes=num_classes,
        )
