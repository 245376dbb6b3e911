"""Training work on synthetic latents: one model, one batch, one update at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.pyramid import split
from models.transformer.config import TransformerConfig
from models.transformer.cost import ModelShape, training_multiply_adds
from models.transformer.lapflow import LapFlowTransformer

_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The images of a benchmark.

    Attributes:
        batch: Images in a batch.
        channels: Channels.
        size: Height and width.
    """

    batch: int
    channels: int
    size: int


class TrainingWork:
    """One training update of a fresh LapFlow model on a fixed random batch.

    Args:
        config: Sizes of the transformer.
        scales: Number of scales, K.
        latents: The batch; its size must be a multiple of `scales`.
        device: Where to train.
        precision: "bf16" runs the network under autocast; weights stay float32.
        optimizer: Apply AdamW after each backward pass.
        compiled: Compile the network with static shapes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        scales: int,
        latents: Latents,
        device: torch.device,
        precision: str = "fp32",
        optimizer: bool = False,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        flow = Flow(FlowConfig(scales=scales))
        self._objective = Objective(flow)
        self._batch = latents.batch
        self._device = device
        self._bf16 = precision == "bf16"
        with device:
            self.model = LapFlowTransformer(
                config,
                scales=scales,
                channels=latents.channels,
                image_size=latents.size,
                classes=_CLASSES,
            )
            images = torch.randn(latents.batch, latents.channels, latents.size, latents.size)
            self._bands = split(images, scales)
            self._labels = torch.randint(_CLASSES, (latents.batch,))
            self._uniforms = torch.rand(latents.batch)
            noise = flow.noise_size(channels=latents.channels, image_size=latents.size)
            self._noise = torch.randn(latents.batch, noise)
        fill(self.model)
        self._network = torch.compile(self.model, dynamic=False) if compiled else self.model
        self._adamw = (
            torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.0)
            if optimizer
            else None
        )
        shape = ModelShape.of(
            config,
            scales=scales,
            channels=latents.channels,
            image_size=latents.size,
            classes=_CLASSES,
        )
        self.multiply_adds = training_multiply_adds(shape)
        """Multiply-adds of one image's forward pass, averaged over the stages of training."""

    def __call__(self) -> Tensor:
        """Train on the fixed batch; return the loss."""
        return self.update(self._bands, self._labels)

    def update(self, bands: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Run forward, backward and, if there is one, the optimizer; return the loss.

        Args:
            bands: Bands of a batch as large as the fixed one, coarse to fine.
            labels: Their classes.
        """
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            report = self._objective(
                self._network,
                bands=bands,
                labels=labels,
                uniforms=self._uniforms,
                noise=self._noise,
            )
        report.total.backward()  # type: ignore[no-untyped-call]
        if self._adamw is not None:
            self._adamw.step()
        return report.total.detach()


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Fill the weights that start as zero, so that no kernel meets numbers that are all zero."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
