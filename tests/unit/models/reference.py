"""An independent LapFlow network: one dense masked attention over all tokens, plain formulas."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.axes import Bands
from models.transformer.lapflow import LapFlowTransformer, TransformerConfig


def tiny_model(*, scales: int, qk_norm: bool = False, image_size: int = 16) -> LapFlowTransformer:
    """A small network in float64 whose every weight is random, the zero-initialised ones too."""
    config = TransformerConfig(depth=2, width=24, heads=3, qk_norm=qk_norm)
    model = LapFlowTransformer(
        config, scales=scales, channels=2, image_size=image_size, classes=5
    ).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.3 * noise)
    return model


def tiny_states(*, scales: int, batches: list[int], image_size: int = 16) -> Bands:
    generator = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(
            batch, 2, image_size >> k, image_size >> k, generator=generator, dtype=torch.float64
        )
        for k, batch in zip(reversed(range(scales)), batches, strict=False)
    )


def reference_forward(
    model: LapFlowTransformer, states: Bands, time: Tensor, labels: Tensor, *, heads: int
) -> Bands:
    """What the network should return for states that all hold the whole batch."""
    weights = dict(model.state_dict())
    scales = len(model.patch_embed)
    names = [f"scale{k}" for k in reversed(range(scales))][: len(states)]
    width = weights["label_embed.table.weight"].shape[1]

    def apply(prefix: str, x: Tensor) -> Tensor:
        return x @ weights[f"{prefix}.weight"].T + weights[f"{prefix}.bias"]

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    exponents = torch.arange(128, dtype=time.dtype) / 128
    angles = 1000 * time[:, None] * 10_000**-exponents
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    vector = apply("time_embed.output", F.silu(apply("time_embed.hidden", waves)))
    condition = F.silu(vector + weights["label_embed.table.weight"][labels])[:, None]

    tokens, owners, grids = [], [], []
    for index, (name, state) in enumerate(zip(names, states, strict=True)):
        kernel = weights[f"patch_embed.{name}.projection.weight"].reshape(width, -1, 2, 2)
        patches = F.conv2d(state, kernel, weights[f"patch_embed.{name}.projection.bias"], stride=2)
        grid = patches.shape[-1]
        embedded = patches.flatten(2).transpose(1, 2)
        tokens.append(embedded + reference_positions(grid, width))
        owners += [index] * grid**2
        grids.append(grid)
    sizes = [grid**2 for grid in grids]
    owner = torch.tensor(owners)
    mask = owner[:, None] >= owner[None, :]

    for layer in range(len(model.blocks)):
        prefixes = [f"blocks.{layer}.experts.{name}" for name in names]
        mods = [apply(f"{p}.modulation", condition).chunk(6, dim=-1) for p in prefixes]
        qkv = torch.cat(
            [
                apply(f"{p}.qkv", norm(x) * (1 + mod[1]) + mod[0])
                for p, x, mod in zip(prefixes, tokens, mods, strict=True)
            ],
            dim=1,
        )
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        if f"{prefixes[0]}.query_norm.weight" in weights:
            q = _rms(q, [weights[f"{p}.query_norm.weight"] for p in prefixes], sizes)
            k = _rms(k, [weights[f"{p}.key_norm.weight"] for p in prefixes], sizes)
        logits = (q @ k.transpose(-1, -2)) / math.sqrt(width // heads)
        mixed = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        parts = mixed.transpose(1, 2).flatten(2).split(sizes, dim=1)
        after = []
        for p, x, part, mod in zip(prefixes, tokens, parts, mods, strict=True):
            attended = x + mod[2] * apply(f"{p}.projection", part)
            hidden = apply(f"{p}.mlp_hidden", norm(attended) * (1 + mod[4]) + mod[3])
            after.append(
                attended + mod[5] * apply(f"{p}.mlp_output", F.gelu(hidden, approximate="tanh"))
            )
        tokens = after

    outputs = []
    for name, x, grid in zip(names, tokens, grids, strict=True):
        shift, scale = apply(f"final.{name}.modulation", condition).chunk(2, dim=-1)
        patches = apply(f"final.{name}.projection", norm(x) * (1 + scale) + shift)
        folded = F.fold(patches.transpose(1, 2), output_size=2 * grid, kernel_size=2, stride=2)
        outputs.append(folded)
    return tuple(outputs)


def reference_positions(grid: int, width: int) -> Tensor:
    """Positions by the book, one number at a time, rounded to float32 as the network's are."""
    quarter = width // 4
    table = torch.empty(grid * grid, width, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                rate = 10_000 ** (-i / quarter)
                token = table[row * grid + column]
                token[i] = math.sin(column * rate)
                token[quarter + i] = math.cos(column * rate)
                token[2 * quarter + i] = math.sin(row * rate)
                token[3 * quarter + i] = math.cos(row * rate)
    return table.float().double()


def _rms(x: Tensor, gains: list[Tensor], sizes: list[int]) -> Tensor:
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return unit * torch.cat([g.expand(n, -1) for g, n in zip(gains, sizes, strict=True)])
