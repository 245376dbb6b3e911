"""Embeddings: patches with their positions, time, and label."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.axes import Band
from models.transformer.experts import linear

_FREQUENCIES = 256
_LONGEST_PERIOD = 10_000.0


def sincos_positions(grid: int, width: int, *, spacing: int = 1) -> Float[Tensor, "n d"]:
    """Fixed 2-D positions of a square grid of tokens, row by row.

    A quarter of the width each holds the sine and cosine of the column and of the row.

    Args:
        grid: Tokens along a side.
        width: Width of a token; divisible by 4.
        spacing: Distance of neighbouring tokens, in patches of a finer grid that covers the same
            image. A token lies in the middle of the patches it covers.
    """
    steps = (torch.arange(grid, dtype=torch.float64) + 0.5) * spacing - 0.5
    rates = _LONGEST_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = steps[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = waves.expand(grid, grid, -1)
    rows = columns.transpose(0, 1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


class PatchEmbed(nn.Module):
    """Band of one scale to tokens: patches, projected, plus positions.

    Args:
        patch_size: Side of a patch.
        channels: Channels of the band.
        grid: Patches along a side of the band.
        width: Width of a token.
        spacing: Distance of neighbouring patches in the unit of positions.
    """

    positions: Tensor

    def __init__(
        self, *, patch_size: int, channels: int, grid: int, width: int, spacing: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = linear(patch_size**2 * channels, width)
        positions = sincos_positions(grid, width, spacing=spacing)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, band: Band) -> Float[Tensor, "_b n d"]:
        """Embed a band, in the precision of the weights."""
        p = self.patch_size
        patches = rearrange(band, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        precision = self.projection.weight.dtype
        tokens: Tensor = self.projection(patches.to(precision))
        # Whoever casts the weights may leave the buffers as they are; DeepSpeed does.
        return tokens + self.positions.to(precision)


class TimeEmbed(nn.Module):
    """Time to a conditioning vector: 256 sinusoids of 1000 t and a two-layer MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = linear(_FREQUENCIES, width, std=0.02)
        self.output = linear(width, width, std=0.02)

    def forward(self, time: Float[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """Embed one time for each image."""
        # In at least float32, and not in a buffer that a cast of the module would round: at
        # 1000 t a rate with eight bits is off by radians.
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        half = torch.arange(_FREQUENCIES // 2, device=time.device, dtype=time.dtype)
        rates = torch.exp(half * (-math.log(_LONGEST_PERIOD) / (_FREQUENCIES // 2)))
        angles = 1000 * time[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        hidden = F.silu(self.hidden(waves.to(self.hidden.weight.dtype)))
        embedded: Tensor = self.output(hidden)
        return embedded


class LabelEmbed(nn.Module):
    """Table of class vectors; the last row is the null label that guidance uses."""

    def __init__(self, *, classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Int[Tensor, "b"]) -> Float[Tensor, "b d"]:
        """Look up one vector for each image."""
        embedded: Tensor = self.table(labels)
        return embedded


class ClassTokens(nn.Module):
    """In-context class tokens: a label's vector once for each of some learned positions."""

    def __init__(self, *, count: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(count, width))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, label: Float[Tensor, "b d"]) -> Float[Tensor, "b count d"]:
        """Make the tokens of each image."""
        return label[:, None] + self.positions
