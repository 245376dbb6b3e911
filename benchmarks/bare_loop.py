"""Training as it is written for one experiment: what the product's own loop is held against."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.axes import Bands, VelocityModel
from models.flow.objective import Objective
from trainer.config.job import TrainConfig
from trainer.engine.optimizer import OptimConfig, adamw


class BareLoop:
    """Forward and backward pass, AdamW and an average of the weights, and nothing else.

    Args:
        network: Has its weights, on its device.
        velocity: Calls it; None if it is called as it is.
        objective: The flow-matching loss.
        batches: Bands and labels, one after the other, over and over.
        noise_size: Normal numbers an image needs.
        null_label: Label index that stands for "no class".
        precision: "bf16" computes under autocast; weights stay float32.
        updates: Updates of one call.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        velocity: VelocityModel | None = None,
        objective: Objective,
        batches: Sequence[tuple[Bands, Tensor]],
        noise_size: int,
        null_label: int,
        precision: str,
        updates: int,
    ) -> None:
        self.network, self._velocity = network, velocity or network
        self._objective, self._batches = objective, batches
        self._noise_size, self._bf16, self._updates = noise_size, precision == "bf16", updates
        self._null_label, self._config = null_label, TrainConfig()
        self._weights: list[Tensor] = list(network.parameters())
        self._average = [weight.detach().clone() for weight in self._weights]
        self._adamw = adamw(self._weights, OptimConfig())
        self._done = 0

    def __call__(self) -> None:
        """Train some updates."""
        for _ in range(self._updates):
            bands, labels = self._batches[self._done % len(self._batches)]
            device, count = labels.device, len(labels)
            dropped = torch.rand(count, device=device) < self._config.label_dropout
            with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                loss = self._objective(
                    self._velocity,
                    bands=bands,
                    labels=labels.masked_fill(dropped, self._null_label),
                    uniforms=torch.rand(count, device=device),
                    noise=torch.randn(count, self._noise_size, device=device),
                ).total
            loss.backward()  # type: ignore[no-untyped-call]
            self._adamw.step()
            self._adamw.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._weights, 1 - self._config.ema.decay)
            self._done += 1
