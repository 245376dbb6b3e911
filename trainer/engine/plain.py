"""The reference engine: everything replicated, gradients averaged by all-reduce, AdamW of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engine.adamw import adamw, moments_of
from trainer.engine.protocol import EngineConfig, UpdateOutcome
from trainer.schedule import OptimConfig
from trainer.state import Fragment


class PlainEngine:
    """Replicated training in plain torch; what the other engines are held against.

    Args:
        model: The model, with the same weights on every rank, on its device.
        config: Engine settings; only fp32 is supported here.
        optim: Optimizer settings.
        accumulation: Forward passes per update.

    Raises:
        ValueError: If a precision other than fp32 is asked for.
    """

    def __init__(
        self, model: nn.Module, *, config: EngineConfig, optim: OptimConfig, accumulation: int
    ) -> None:
        if config.precision != "fp32":
            raise ValueError(
                f"engine.precision={config.precision} is not available with engine.kind=plain, "
                "the fp32 reference; use engine.kind=zero or engine.precision=fp32"
            )
        self._model = model
        self._clip_norm = optim.clip_norm
        self._accumulation = accumulation
        self._named = dict(model.named_parameters())
        self._ema = {name: p.detach().clone() for name, p in self._named.items()}
        self._optimizer = adamw(self._named.values(), optim)

    def __call__(
        self, states: tuple[Tensor, ...], time: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        """Run the model."""
        velocities: tuple[Tensor, ...] = self._model(states, time, labels)
        return velocities

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add one micro-batch's gradient."""
        (loss / self._accumulation).backward()  # type: ignore[no-untyped-call]

    def update(self, *, learning_rate: float, ema_decay: float) -> UpdateOutcome:
        """Average gradients over ranks, clip, apply AdamW, follow with the EMA."""
        gradients = [self._gradient(parameter) for parameter in self._named.values()]
        if dist.is_initialized():
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient.div_(dist.get_world_size())
        norm = nn.utils.get_total_norm(gradients)
        finite = bool(torch.isfinite(norm))
        if finite:
            if self._clip_norm > 0:
                nn.utils.clip_grads_with_norm_(self._named.values(), self._clip_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
            with torch.no_grad():
                for name, parameter in self._named.items():
                    self._ema[name].lerp_(parameter, 1.0 - ema_decay)
        self._optimizer.zero_grad(set_to_none=True)
        return UpdateOutcome(applied=finite, gradient_norm=float(norm) if finite else float("inf"))

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """The accumulated gradient; zero, not nothing, for weights that were not used.

        AdamW passes over a parameter without a gradient, decay included, while sharded engines,
        whose gradients are one flat tensor, give it zeros.
        """
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def fragments(self) -> Sequence[Fragment]:
        """Return each whole parameter as one fragment; every rank holds all of them."""
        result = []
        for name, parameter in self._named.items():
            moments = moments_of(self._optimizer, parameter)
            tensors = {
                "master": parameter.detach().view(-1),
                "exp_avg": moments["exp_avg"].view(-1),
                "exp_avg_sq": moments["exp_avg_sq"].view(-1),
                "ema": self._ema[name].view(-1),
            }
            result.append(
                Fragment(name=name, start=0, shape=tuple(parameter.shape), tensors=tensors)
            )
        return result

    def load_fragments(self, updates: int) -> None:
        """Set the optimizer's step count; weights and moments were overwritten in place."""
        for parameter in self._named.values():
            moments_of(self._optimizer, parameter)["step"].fill_(updates)

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        """Swap the EMA in for the length of the block."""
        kept = {name: p.detach().clone() for name, p in self._named.items()}
        try:
            self._copy(self._ema)
            yield self._model
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        for name, parameter in self._named.items():
            parameter.copy_(source[name])
