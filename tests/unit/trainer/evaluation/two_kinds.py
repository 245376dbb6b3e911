"""Pictures of two kinds, which a small classifier learns to tell apart."""

import torch


def two_kinds(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left halves that are brighter than right ones, or darker."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    step = torch.cat([torch.full((4,), 0.5), torch.full((4,), -0.5)])
    sign = (2 * labels - 1).float()[:, None, None, None]
    noise = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    return (sign * step + noise).clamp(-1, 1), labels
