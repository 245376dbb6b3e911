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
        precision: "bf16" computes with copies of the weights, which float32 masters update.
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
        self.masters: list[Tensor] = [*self._weights]
        if self._bf16:
            self.masters = [weight.detach().clone() for weight in self._weights]
            for weight in self._weights:
                weight.data = weight.data.bfloat16()
        self._average = [master.detach().clone() for master in self.masters]
        self._adamw = adamw(self.masters, OptimConfig())
        self._done = 0

    def __call__(self) -> None:
        """Train some updates."""
        for _ in range(self._updates):
            bands, labels = self._batches[self._done % len(self._batches)]
            device, count = labels.device, len(labels)
            dropped = torch.rand(count, device=device) < self._config.label_dropout
            loss = self._objective(
                self._in_bf16 if self._bf16 else self._velocity,
                bands=bands,
                labels=labels.masked_fill(dropped, self._null_label),
                uniforms=torch.rand(count, device=device),
                noise=torch.randn(count, self._noise_size, device=device),
            ).total
            loss.backward()  # type: ignore[no-untyped-call]
            self._update()
            self._done += 1

    def _in_bf16(self, states: Bands, time: Tensor, labels: Tensor) -> Bands:
        velocities = self._velocity(tuple(state.bfloat16() for state in states), time, labels)
        return tuple(velocity.float() for velocity in velocities)

    @torch.no_grad()
    def _update(self) -> None:
        if self._bf16:
            gradients = [torch.empty_like(master) for master in self.masters]
            left = [weight.grad for weight in self._weights if weight.grad is not None]
            torch._foreach_copy_(gradients, left)
            for master, weight, gradient in zip(
                self.masters, self._weights, gradients, strict=True
            ):
                master.grad, weight.grad = gradient, None
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        if self._bf16:
            torch._foreach_copy_(self._weights, self.masters)
        torch._foreach_lerp_(self._average, self.masters, 1 - self._config.ema.decay)
