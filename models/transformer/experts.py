"""The experts: each scale's own weights, which is all but attention, time and labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from models.axes import Band
from models.transformer.attention import HeadTokens
from models.transformer.config import Part, Ties, TransformerConfig

_BLOCK_PARTS: Mapping[Part, tuple[str, ...]] = {
    "attention": ("qkv", "query_norm", "key_norm", "projection"),
    "mlp": ("mlp_hidden", "mlp_output"),
    "modulation": ("modulation",),
}
_EMBEDDING_PARTS: Mapping[Part, tuple[str, ...]] = {"embedding": ("projection",)}
_OUTPUT_PARTS: Mapping[Part, tuple[str, ...]] = {"output": ("modulation", "projection")}


def tie_blocks(experts: nn.ModuleDict, ties: Ties) -> None:
    """Tie the experts of one block."""
    _tie(experts, ties, _BLOCK_PARTS)


def tie_embeddings(experts: nn.ModuleDict, ties: Ties) -> None:
    """Tie the patch embeddings; each scale keeps its own positions."""
    _tie(experts, ties, _EMBEDDING_PARTS)


def tie_outputs(experts: nn.ModuleDict, ties: Ties) -> None:
    """Tie the last layers."""
    _tie(experts, ties, _OUTPUT_PARTS)


def _tie(experts: nn.ModuleDict, ties: Ties, parts: Mapping[Part, tuple[str, ...]]) -> None:
    for k in range(len(experts)):
        for part, names in parts.items():
            owner = ties.owner(k, part)
            if owner != k:
                for name in names:
                    _borrow(experts[f"scale{k}"], name, experts[f"scale{owner}"])


def _borrow(borrower: nn.Module, name: str, lender: nn.Module) -> None:
    """Let a module use a part of another.

    The part is not registered with the borrower, so that every parameter has one name: optimizers,
    checkpoints and counts see it once.
    """
    delattr(borrower, name)
    object.__setattr__(borrower, name, getattr(lender, name))


Tokens = Float[Tensor, "_b _n d"]
_EPS = 1e-6


def linear(inputs: int, outputs: int, *, std: float | None = None) -> nn.Linear:
    """Linear layer with zero bias and weights drawn Xavier-uniform, or normal with ``std``."""
    layer = nn.Linear(inputs, outputs)
    if std is None:
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """Linear layer that starts as zero, for modulation and output (adaLN-Zero)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class InputMajorLinear(nn.Module):
    """Linear layer whose weight is ``[inputs, outputs]``: an input's weights are one row.

    Every weight of an expert can be divided along its first dimension, so that a shard of an
    expert's hidden units is one slice of each flattened weight.

    Args:
        inputs: Width of the input.
        outputs: Width of the output.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, vectors: Float[Tensor, "*_batch inputs"]) -> Float[Tensor, "*_batch outputs"]:
        """Multiply by the weight and add the bias."""
        return vectors @ self.weight + self.bias


def per_scale(scales: int, build: Callable[[int], nn.Module]) -> nn.ModuleDict:
    """Build one module for each scale, named by the paper's k (0 is the finest).

    Args:
        scales: Number of scales, K.
        build: Makes the module of scale k.

    Returns:
        ``scale{K-1}`` ... ``scale0``, in the order coarse to fine.
    """
    return nn.ModuleDict({f"scale{k}": build(k) for k in reversed(range(scales))})


def modulated_norm(
    tokens: Tokens, shift: Float[Tensor, "_b 1 d"], scale: Float[Tensor, "_b 1 d"]
) -> Tokens:
    """Normalise the tokens, then scale them by ``1 + scale`` and shift them."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=_EPS)
    return torch.addcmul(shift, normed, 1 + scale)


class Modulation(NamedTuple):
    """What the condition does to one half of a block, each ``[b, 1, d]``."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def norm(self, tokens: Tokens) -> Tokens:
        """Normalise the half's tokens, scale and shift them."""
        return modulated_norm(tokens, self.shift, self.scale)


class Offset(nn.Module):
    """Adds a learned vector that starts as zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(width))

    def forward(self, vectors: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        """Add the offset."""
        return vectors + self.offset


class BlockExpert(nn.Module):
    """One scale's weights in one block: modulation, attention projections and MLP."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        hidden = int(width * config.mlp_ratio)
        self.heads = config.heads
        shared = config.modulation == "shared"
        self.modulation = Offset(6 * width) if shared else zero_linear(width, 6 * width)
        self.qkv = linear(width, 3 * width)
        self.query_norm = self._head_norm(config)
        self.key_norm = self._head_norm(config)
        self.projection = linear(width, width)
        self.mlp_hidden = linear(width, hidden)
        self.mlp_output = InputMajorLinear(hidden, width)

    def heads_of(
        self, qkv: Float[Tensor, "_b _n _d3"]
    ) -> tuple[HeadTokens, HeadTokens, HeadTokens]:
        """Cut what queries, keys and values are projected to into heads, and norm the first two."""
        # Side by side in the last dimensions, so that the backward pass joins the three gradients
        # as the projection wants them and has nothing to copy.
        query, key, value = qkv.reshape(*qkv.shape[:2], 3, self.heads, -1).unbind(2)
        return self.query_norm(query), self.key_norm(key), value

    def attention_inputs(
        self, tokens: Tokens, modulation: Modulation
    ) -> tuple[HeadTokens, HeadTokens, HeadTokens]:
        """Make queries, keys and values of the scale's tokens."""
        return self.heads_of(self.qkv(modulation.norm(tokens)))

    def mlp_inputs(
        self, tokens: Tokens, gathered: Tokens, for_attention: Modulation, for_mlp: Modulation
    ) -> tuple[Tokens, Tokens]:
        """Add what attention gathered to the tokens; return them and what the MLP is given."""
        tokens = torch.addcmul(tokens, for_attention.gate, self.projection(gathered))
        return tokens, for_mlp.norm(tokens)

    def feed_forward(
        self, tokens: Tokens, gathered: Tokens, for_attention: Modulation, for_mlp: Modulation
    ) -> Tokens:
        """Add what attention gathered, and then the MLP's output, to the tokens."""
        tokens, normed = self.mlp_inputs(tokens, gathered, for_attention, for_mlp)
        return torch.addcmul(tokens, for_mlp.gate, self.mlp(normed))

    def mlp(self, tokens: Tokens) -> Tokens:
        """Apply the MLP."""
        hidden = F.gelu(self.mlp_hidden(tokens), approximate="tanh")
        output: Tensor = self.mlp_output(hidden)
        return output

    @staticmethod
    def _head_norm(config: TransformerConfig) -> nn.Module:
        if config.qk_norm:
            return nn.RMSNorm(config.width // config.heads, eps=_EPS)
        return nn.Identity()


class Regions(NamedTuple):
    """What is computed of one scale between two attentions; compiled functions may stand for it."""

    attention_inputs: Callable[..., tuple[HeadTokens, HeadTokens, HeadTokens]] = (
        BlockExpert.attention_inputs
    )
    feed_forward: Callable[..., Tokens] = BlockExpert.feed_forward
    mlp_inputs: Callable[..., tuple[Tokens, Tokens]] = BlockExpert.mlp_inputs
    norm: Callable[[Modulation, Tokens], Tokens] = Modulation.norm


class ExpertLayers:
    """Applies layers of a block's experts, each to what its own scale has, one after the other.

    Whoever divides experts over ranks gives a block layers that do it for several scales at once.

    Args:
        experts: The block's experts by name, ``scale{k}``.

    Attributes:
        regions: How the layers of one scale are computed.
    """

    regions = Regions()

    def __init__(self, experts: nn.ModuleDict) -> None:
        self._experts = [cast(BlockExpert, experts[f"scale{k}"]) for k in range(len(experts))]

    def modulation(self, scale: int, condition: Float[Tensor, "b _c"]) -> Float[Tensor, "b _d6"]:
        """Turn what the block is given for a scale's images into the six modulations of each."""
        modulation: Tensor = self._experts[scale].modulation(condition)
        return modulation

    def attention_inputs(
        self, scales: Sequence[int], tokens: Sequence[Tokens], modulations: Sequence[Modulation]
    ) -> list[tuple[HeadTokens, HeadTokens, HeadTokens]]:
        """Make queries, keys and values of each scale's tokens, [b, n, d]."""
        compute = self.regions.attention_inputs
        return [
            compute(self._experts[k], own, modulation)
            for k, own, modulation in zip(scales, tokens, modulations, strict=True)
        ]

    def feed_forward(
        self,
        scales: Sequence[int],
        tokens: Sequence[Tokens],
        gathered: Sequence[Tokens],
        for_attention: Sequence[Modulation],
        for_mlp: Sequence[Modulation],
    ) -> list[Tokens]:
        """Add what attention gathered, and the MLP's output, to each scale's tokens."""
        compute = self.regions.feed_forward
        return [
            compute(self._experts[k], *own)
            for k, *own in zip(scales, tokens, gathered, for_attention, for_mlp, strict=True)
        ]


class FinalExpert(nn.Module):
    """One scale's last layer: modulated norm and the projection of tokens back to a band."""

    def __init__(self, *, patch_size: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.modulation = zero_linear(width, 2 * width)
        self.projection = zero_linear(width, patch_size**2 * channels)

    def forward(self, tokens: Float[Tensor, "b n d"], condition: Float[Tensor, "b d"]) -> Band:
        """Project the tokens of a square grid to a band."""
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        patches: Tensor = self.projection(modulated_norm(tokens, shift, scale))
        grid = round(tokens.shape[1] ** 0.5)
        p = self.patch_size
        return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=grid, p=p, q=p)
