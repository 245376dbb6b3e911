"""AdamW as every engine builds it, and access to its moments before and after the first step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trainer.schedule import OptimConfig


def adamw(
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]], optim: OptimConfig
) -> torch.optim.AdamW:
    """Build torch's AdamW, fused on GPUs and in host memory, from settings that engines share."""
    return torch.optim.AdamW(
        parameters,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter, creating the zeros that its first step would create."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if "exp_avg" not in state:
        state["step"] = torch.tensor(0.0, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter.detach())
        state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
    return state
