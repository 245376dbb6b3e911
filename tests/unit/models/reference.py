"""An independent LapFlow network: one dense masked attention over all tokens, plain formulas."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.axes import Bands
from models.transformer.config import TransformerConfig
from models.transformer.lapflow import LapFlowTransformer


def tiny_model(*, scales: int, image_size: int = 16, **options: Any) -> LapFlowTransformer:
    """A small network in float64 whose every weight is random, the zero-initialised ones too."""
    config = tiny_config(**options)
    model = LapFlowTransformer(
        config, scales=scales, channels=2, image_size=image_size, classes=5
    ).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(0.25 * noise)
    return model


def tiny_config(**options: Any) -> TransformerConfig:
    return TransformerConfig(depth=2, width=24, heads=3, **options)


def tiny_states(*, scales: int, batches: list[int], image_size: int = 16) -> Bands:
    generator = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(
            batch, 2, image_size >> k, image_size >> k, generator=generator, dtype=torch.float64
        )
        for k, batch in zip(reversed(range(scales)), batches, strict=False)
    )


def reference_forward(
    model: LapFlowTransformer,
    states: Bands,
    time: Tensor,
    labels: Tensor,
    *,
    config: TransformerConfig,
) -> Bands:
    """What the network should return for states that all hold the whole batch."""
    weights = dict(model.state_dict())
    heads, width, ties = config.heads, config.width, config.ties
    active = [len(model.patch_embed) - 1 - position for position in range(len(states))]

    def owner(k: int, part: str) -> str:
        return f"scale{max(ties.scales) if k in ties.scales and part in ties.parts else k}"

    def apply(prefix: str, x: Tensor) -> Tensor:
        return x @ weights[f"{prefix}.weight"].T + weights[f"{prefix}.bias"]

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    exponents = torch.arange(128, dtype=time.dtype) / 128
    angles = 1000 * time[:, None] * 10_000**-exponents
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    vector = apply("time_embed.output", F.silu(apply("time_embed.hidden", waves)))
    label = weights["label_embed.table.weight"][labels]
    condition = F.silu(vector + label)[:, None]

    tokens, owners, grids = [], [], []
    for k, state in zip(active, states, strict=True):
        prefix = f"patch_embed.{owner(k, 'embedding')}.projection"
        kernel = weights[f"{prefix}.weight"].reshape(width, -1, 2, 2)
        patches = F.conv2d(state, kernel, weights[f"{prefix}.bias"], stride=2)
        grid = patches.shape[-1]
        spacing = 2**k if config.positions == "aligned" else 1
        embedded = patches.flatten(2).transpose(1, 2) + reference_positions(grid, width, spacing)
        if config.class_tokens and k == active[0]:
            learned = weights["class_tokens.positions"].expand(len(time), -1, -1)
            embedded = torch.cat([label[:, None] + learned, embedded], dim=1)
        tokens.append(embedded)
        owners += [k] * embedded.shape[1]
        grids.append(grid)
    sizes = [x.shape[1] for x in tokens]
    scale_of = torch.tensor(owners)
    query_scale, key_scale = scale_of[:, None], scale_of[None, :]
    sees = {
        "causal": key_scale >= query_scale,
        "full": key_scale >= 0,
        "own_scale": key_scale == query_scale,
    }[config.attention].expand(len(owners), len(owners))

    def modulations(layer: int, k: int) -> tuple[Tensor, ...]:
        who = owner(k, "modulation")
        prefix = f"blocks.{layer}.experts.{who}.modulation"
        if config.modulation == "shared":
            made = apply(f"modulation.{who}", condition) + weights[f"{prefix}.offset"]
        else:
            made = apply(prefix, condition)
        return made.chunk(6, dim=-1)

    for layer in range(config.depth):
        attention = [f"blocks.{layer}.experts.{owner(k, 'attention')}" for k in active]
        mlp = [f"blocks.{layer}.experts.{owner(k, 'mlp')}" for k in active]
        mods = [modulations(layer, k) for k in active]
        qkv = torch.cat(
            [
                apply(f"{p}.qkv", norm(x) * (1 + mod[1]) + mod[0])
                for p, x, mod in zip(attention, tokens, mods, strict=True)
            ],
            dim=1,
        )
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        if config.qk_norm:
            q = _rms(q, [weights[f"{p}.query_norm.weight"] for p in attention], sizes)
            k = _rms(k, [weights[f"{p}.key_norm.weight"] for p in attention], sizes)
        logits = (q @ k.transpose(-1, -2)) / math.sqrt(width // heads)
        mixed = logits.masked_fill(~sees, -torch.inf).softmax(-1) @ v
        parts = mixed.transpose(1, 2).flatten(2).split(sizes, dim=1)
        after = []
        for pa, pm, x, part, mod in zip(attention, mlp, tokens, parts, mods, strict=True):
            attended = x + mod[2] * apply(f"{pa}.projection", part)
            hidden = apply(f"{pm}.mlp_hidden", norm(attended) * (1 + mod[4]) + mod[3])
            active_hidden = F.gelu(hidden, approximate="tanh")
            weight, bias = weights[f"{pm}.mlp_output.weight"], weights[f"{pm}.mlp_output.bias"]
            after.append(attended + mod[5] * (active_hidden @ weight + bias))
        tokens = after

    outputs = []
    for k, x, grid in zip(active, tokens, grids, strict=True):
        prefix = f"final.{owner(k, 'output')}"
        shift, scale = apply(f"{prefix}.modulation", condition).chunk(2, dim=-1)
        patches = apply(f"{prefix}.projection", norm(x[:, -grid * grid :]) * (1 + scale) + shift)
        folded = F.fold(patches.transpose(1, 2), output_size=2 * grid, kernel_size=2, stride=2)
        outputs.append(folded)
    return tuple(outputs)


def reference_positions(grid: int, width: int, spacing: int = 1) -> Tensor:
    """Positions by the book, one number at a time, rounded to float32 as the network's are."""
    quarter = width // 4
    table = torch.empty(grid * grid, width, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                rate = 10_000 ** (-i / quarter)
                # The middle of the patches that the token covers, in patches of the finest grid.
                across = column * spacing + (spacing - 1) / 2
                down = row * spacing + (spacing - 1) / 2
                token = table[row * grid + column]
                token[i] = math.sin(across * rate)
                token[quarter + i] = math.cos(across * rate)
                token[2 * quarter + i] = math.sin(down * rate)
                token[3 * quarter + i] = math.cos(down * rate)
    return table.float().double()


def _rms(x: Tensor, gains: list[Tensor], sizes: list[int]) -> Tensor:
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return unit * torch.cat([g.expand(n, -1) for g, n in zip(gains, sizes, strict=True)])
