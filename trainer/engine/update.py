"""One update of fp32 weights: AdamW and the averages, without the host waiting for the device.

A gradient that is not finite must change nothing. Whether one is, the device finds out when it has
the norm, and it is the device that then leaves weights, moments and averages as they are. The host
queues the same work either way, and learns what came of it when it asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.ema import EmaConfig
from trainer.engine.ema import MovingAverages
from trainer.engine.optimizer import OptimConfig
from trainer.engine.protocol import UpdateOutcome


class FlatAdamW:
    """AdamW on a list of tensors in one call, which the device applies or not.

    Args:
        weights: Float32 tensors, changed in place.
        first: First moments, as many of the same shapes.
        second: Second moments.
        steps: Updates applied so far, float32 0-D: one for all weights.
        optim: Settings.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        *,
        steps: Tensor,
        optim: OptimConfig,
    ) -> None:
        self._weights, self._first, self._second = list(weights), list(first), list(second)
        self._steps, self._optim = steps, optim

    @torch.no_grad()
    def step(
        self, gradients: Sequence[Tensor], *, rate: float, divisor: Tensor | None, finite: Tensor
    ) -> None:
        """Apply one update, or none.

        Args:
            gradients: Float32, one for each weight; divided in place where there is a divisor.
            rate: Learning rate.
            divisor: What the gradients are divided by as they are read; None is 1.
            finite: Bool, 0-D, on the device: where it is false, nothing changes.
        """
        self._steps.add_(finite)
        torch._fused_adamw_(
            self._weights,
            list(gradients),
            self._first,
            self._second,
            [],
            [self._steps] * len(self._weights),
            lr=rate,
            beta1=self._optim.beta1,
            beta2=self._optim.beta2,
            weight_decay=self._optim.weight_decay,
            eps=self._optim.epsilon,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=torch.logical_not(finite).to(torch.float32),
        )


class MasterUpdate:
    """AdamW on fp32 weights, and averages that follow them.

    Args:
        optimizer: Updates the weights.
        masters: Those weights as the averages see them: perhaps joined to fewer tensors.
        optim: Optimizer settings, for the largest norm.
        ema: Decays of the averages, and where they are kept.
    """

    def __init__(
        self,
        optimizer: FlatAdamW,
        masters: Sequence[Tensor],
        *,
        optim: OptimConfig,
        ema: EmaConfig,
    ) -> None:
        self._optimizer, self._masters = optimizer, list(masters)
        self._clip_norm = optim.clip_norm
        self.averages = MovingAverages(self._masters, config=ema)

    def divisor(self, norm: Tensor, *, ranks: int = 1) -> Tensor | None:
        """What gradients are divided by: by ranks that they are sums over, and to clip them.

        Args:
            norm: Of their mean over ranks, 0-D.
            ranks: Number of ranks.

        Returns:
            Float32, 0-D; None where it is 1 whatever the norm is.
        """
        if self._clip_norm > 0:
            return ((norm + 1e-6) / self._clip_norm).clamp(min=1.0) * ranks
        return torch.full_like(norm, float(ranks)) if ranks > 1 else None

    def apply(
        self,
        gradients: Sequence[Tensor],
        norm: Tensor,
        *,
        divisor: Tensor | None,
        learning_rate: float,
        ema_decays: Sequence[float] | Tensor,
    ) -> UpdateOutcome:
        """Apply an update, if its norm is finite.

        Args:
            gradients: Float32, one for each weight of the optimizer.
            norm: Global norm of the gradient, before clipping, alike on all ranks.
            divisor: What `gradients` have yet to be divided by.
            learning_rate: Of this update.
            ema_decays: Of this update, one for each average.
        """
        finite = torch.isfinite(norm)
        self.averages.join()
        self._optimizer.step(gradients, rate=learning_rate, divisor=divisor, finite=finite)
        decays = torch.as_tensor(ema_decays, dtype=torch.float64, device=norm.device)
        # An average that keeps all of itself stays as it is.
        self.averages.follow(self._masters, decays=torch.where(finite, decays, 1.0))
        return UpdateOutcome(
            applied=finite, gradient_norm=torch.where(finite, norm, float("inf")).detach()
        )
