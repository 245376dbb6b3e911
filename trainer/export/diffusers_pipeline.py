"""Sampling as diffusers' users expect it: a pipeline around an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import (
    DiffusionPipeline,
    ImagePipelineOutput,
)
from torch import Tensor

from models.codec import AutoencoderKlCodec
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler import sample
from models.flow.sampler_config import SamplerConfig
from trainer.config.job import check_guidance
from trainer.config.reading import ConfigError, from_dict
from trainer.export.diffusers_model import LapFlowTransformer2DModel

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
OutputType: TypeAlias = Literal["pil", "np", "pt", "latent"]


class LapFlowPipeline(DiffusionPipeline):
    """Draws images of classes.

    Args:
        transformer: The network, which also tells its flow.
        vae: For a network on latents, the autoencoder that its training used; without it the
            latents can be drawn, but no images.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(
        self, transformer: LapFlowTransformer2DModel, vae: AutoencoderKL | None = None
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int],
        num_inference_steps: int = 40,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        *,
        solver: Literal["euler", "midpoint", "heun", "ab2", "dopri5"] = "heun",
        guidance_interval: tuple[float, float] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw one image for each label.

        Args:
            class_labels: The classes.
            num_inference_steps: Steps over the whole time axis; "dopri5" chooses its own.
            guidance_scale: Classifier-free guidance scale; 1 is no guidance.
            generator: Source of the noise, one for all images or one for each.
            solver: See `SamplerConfig`.
            guidance_interval: First and last time at which guidance acts; None means always.
            output_type: "pil" images, or their values in [0, 1] as "np" [n, h, w, c] or "pt"
                [n, c, h, w]; "latent" is what the flow works on, before it is decoded.
            return_dict: False gives a tuple.

        Returns:
            `ImagePipelineOutput`, whose `images` they are.

        Raises:
            ConfigError: A class is unknown, guidance asks for a null label that was never trained,
                or latents cannot be decoded for want of `vae`.
            SamplerConfigError: A setting of the sampler is out of range.
            SolverError: "dopri5" comes to no end with this network.
        """
        config = self.transformer.config
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        beyond = [label for label in labels if not 0 <= label < config.num_classes]
        if beyond or not labels:
            raise ConfigError(
                f"class_labels={class_labels} must be one or more of 0 … {config.num_classes - 1}"
            )
        if output_type != "latent" and config.latents is not None and self.vae is None:
            raise ConfigError(
                "this model draws latents: give the autoencoder of its training as vae=…, or set "
                "output_type='latent'"
            )
        if config.label_dropout is not None:  # models exported before do not say
            check_guidance(guidance_scale, label_dropout=config.label_dropout, key="guidance_scale")
        sampler = SamplerConfig(
            solver=solver,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
        )
        images: Any = self._sample(labels, sampler, generator)
        if output_type != "latent":
            images = self._convert(self._decode(images), output_type)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(self, labels: list[int], sampler: SamplerConfig, generator: Generators) -> Tensor:
        """Sample what the flow works on."""
        config, device = self.transformer.config, self._execution_device
        flow = Flow(from_dict(FlowConfig, config.flow, path="flow."))
        shape = {"channels": config.in_channels, "image_size": config.sample_size}
        noise_size = flow.noise_size(**shape)
        return sample(
            self.transformer,
            flow=flow,
            config=sampler,
            noise=_noise(len(labels), noise_size, generator=generator, device=device),
            labels=torch.tensor(labels, device=device),
            null_label=config.num_classes,
            **shape,
        ).images

    def _decode(self, drawn: Tensor) -> Tensor:
        """Make images in [-1, 1] of what the flow works on."""
        latents = self.transformer.config.latents
        if latents is None:
            return drawn
        codec = AutoencoderKlCodec(self.vae, scale=latents["scale"], shift=latents["shift"])
        codec.image_channels(drawn.shape[1])
        return codec.decode(drawn.to(self.vae.dtype)).float()

    def _convert(self, images: Tensor, output_type: OutputType) -> Any:
        values = (images / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return values
        array = values.permute(0, 2, 3, 1).numpy()
        if output_type == "np":
            return array
        return self.numpy_to_pil(array)  # type: ignore[no-untyped-call]


def _noise(count: int, size: int, *, generator: Generators, device: torch.device) -> Tensor:
    """Draw standard normal numbers [count, size] where each generator is."""
    if isinstance(generator, list):
        if len(generator) != count:
            raise ConfigError(
                f"generator has {len(generator)} generators for {count} images; give one for each"
            )
        return torch.cat([_noise(1, size, generator=one, device=device) for one in generator])
    place = device if generator is None else generator.device
    return torch.randn(count, size, generator=generator, device=place).to(device)
