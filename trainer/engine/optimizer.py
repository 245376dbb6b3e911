"""The optimizer of all engines: AdamW, and its schedule over images seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipelines.domains import Checked

if TYPE_CHECKING:  # who only has settings read waits for no torch
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Checked):
    """AdamW as DiT and SiT use it; constant learning rate by default.

    Attributes:
        learning_rate: Peak learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        epsilon: Added to the denominator.
        weight_decay: Decoupled weight decay.
        clip_norm: Largest global gradient norm; 0 switches clipping off.
        warmup_images: Images over which the rate rises linearly from 0.
        decay: What follows the warm-up: "constant", or "cosine" down to `final_ratio`.
        final_ratio: Rate at the end of the run as a share of the peak.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    warmup_images: Annotated[int, Field(ge=0)] = 0
    decay: Literal["constant", "cosine"] = "constant"
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0


def learning_rate(config: OptimConfig, *, images: int, total_images: int) -> float:
    """Return the learning rate of the update that starts after `images` images."""
    if images < config.warmup_images:
        return config.learning_rate * (images + 1) / config.warmup_images
    if config.decay == "constant":
        return config.learning_rate
    span = max(1, total_images - config.warmup_images)
    progress = min(1.0, (images - config.warmup_images) / span)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_ratio + (1.0 - config.final_ratio) * cosine)


def adamw(
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]], optim: OptimConfig
) -> torch.optim.AdamW:
    """Build torch's AdamW, fused on GPUs and in host memory, from settings that engines share."""
    import torch

    spare_compiler()
    return torch.optim.AdamW(
        parameters,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def spare_compiler() -> None:
    """Keep the first optimizer of a process from importing torch's compiler, half a second's work.

    Torch asks the compiler to leave some methods of optimizers alone, at their first call. Nothing
    that is compiled here calls them, so they stand for their own versions that are left alone.
    """
    from torch.optim import Optimizer

    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None:
            vars(method).setdefault("__dynamo_disable", method)


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter, creating the zeros that its first step would create."""
    import torch

    state: dict[str, Tensor] = optimizer.state[parameter]
    if "exp_avg" not in state:
        state["step"] = torch.tensor(0.0, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter.detach())
        state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
    return state
