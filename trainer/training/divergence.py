"""Training that has diverged: told by losses that are no numbers, and what to do about it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.clock import due
from trainer.engine.optimizer import OptimConfig
from trainer.training.hooks import UpdateReport

_STRAY_UPDATES = 1
"""One update with such a loss may be a stray batch; a second one in a row is a state."""


class Diverged(ValueError):
    """Training has diverged.

    A ValueError, because the settings are at fault: started again, the run would repeat itself to
    the bit.
    """


class LossWatch:
    """Counts the updates in a row whose loss was not finite on any rank; ends the run in time.

    Args:
        device: Where losses are.
        interval_images: How often the run may be ended; 0 is at its end alone.
        total_images: Length of the run.
        patience_updates: So many updates in a row may pass, however short the interval is.
        optim: The optimizer's settings, for the advice.
        precision: The engine's precision, for the advice.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        interval_images: int,
        total_images: int,
        patience_updates: int,
        optim: OptimConfig,
        precision: str,
    ) -> None:
        self._interval_images = interval_images
        self._total_images = total_images
        self._patience_updates = patience_updates
        self._optim = optim
        self._precision = precision
        self._finite = torch.zeros((), dtype=torch.bool, device=device)
        self._lost = torch.zeros((), dtype=torch.int64, device=device)
        self._interval_updates = 0

    def record(self, loss: Tensor) -> None:
        """Look at the loss of one micro-batch, without waiting for it."""
        self._finite = self._finite | torch.isfinite(loss.detach())

    def after_update(self, report: UpdateReport) -> None:
        """Count the update; a collective call when the interval is due or the run complete.

        Raises:
            Diverged: No loss of the interval was finite.
        """
        self._lost = torch.where(self._finite, 0, self._lost + 1)
        self._finite = torch.zeros_like(self._finite)
        self._interval_updates += 1
        last = report.images >= self._total_images
        if not last and not due(report.images_before, report.images, self._interval_images):
            return
        lost, interval = self.nonfinite_updates(), self._interval_updates
        self._interval_updates = 0
        whole = lost >= interval and lost > self._patience_updates
        if whole or (last and lost > _STRAY_UPDATES):
            raise self.divergence_error(
                f"the loss was not finite in the last {lost} updates, up to {report.images:,} "
                "images"
            )

    def nonfinite_updates(self) -> int:
        """Return how many updates in a row, up to now, had no finite loss; a collective call."""
        if dist.is_initialized():
            dist.all_reduce(self._lost, op=dist.ReduceOp.MIN)
        return int(self._lost.item())

    def is_diverging(self) -> bool:
        """Tell whether this is no state to keep; a collective call."""
        return self.nonfinite_updates() > _STRAY_UPDATES

    def divergence_error(self, what: str) -> Diverged:
        """Return the error for a run that diverged, with the advice that its settings leave open.

        Args:
            what: What was seen, as a clause.
        """
        optim = self._optim
        advice = [f"lower optim.learning_rate={optim.learning_rate:g}"]
        if optim.warmup_images == 0:
            advice.append("set optim.warmup_images")
        if optim.clip_norm > 0:
            advice.append(f"lower optim.clip_norm={optim.clip_norm:g}")
        else:
            advice.append("set optim.clip_norm")
        if self._precision != "fp32":
            advice.append("use engine.precision=fp32")
        return Diverged(
            f"{what}: training has diverged, and would again with these settings; "
            f"{', '.join(advice[:-1])} or {advice[-1]}. Checkpoints of before the loss rose are "
            "good: begin another run=NAME from one of them with resume=URI resume_changed=true"
        )
