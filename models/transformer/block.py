"""One transformer block: an expert for each scale around one shared attention."""

from collections.abc import Callable, Collection
from typing import TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.transformer.attention import ATTENTIONS
from models.transformer.config import TransformerConfig
from models.transformer.experts import BlockExpert, Tokens, per_scale
from models.transformer.ties import tie_blocks

T = TypeVar("T")


class Block(nn.Module):
    """Mixture-of-Transformers block with adaLN-Zero conditioning.

    Attributes:
        recomputed: Scales, in the paper's numbering, whose experts compute again in the backward
            pass what they would otherwise keep from the forward pass.
    """

    recomputed: Collection[int] = ()

    def __init__(self, config: TransformerConfig, *, scales: int) -> None:
        super().__init__()
        self.experts = per_scale(scales, lambda _: BlockExpert(config))
        tie_blocks(self.experts, config.ties)
        self._attention = ATTENTIONS[config.attention]

    def forward(
        self, tokens: tuple[Tokens, ...], conditions: tuple[Float[Tensor, "_b _c"], ...]
    ) -> tuple[Tokens, ...]:
        """Transform the tokens of the active scales.

        Args:
            tokens: Tokens of the active scales, coarse to fine.
            conditions: What each scale's modulation is made from, for the images of its tokens.
        """
        lanes = [
            (k, cast(BlockExpert, self.experts[f"scale{k}"]), x, condition)
            for k, x, condition in zip(
                reversed(range(len(self.experts))), tokens, conditions, strict=False
            )
        ]
        modulations = [expert.modulate(condition) for _, expert, _, condition in lanes]
        projected = [
            self._kept(k, expert.attention_inputs, x, for_attention)
            for (k, expert, x, _), (for_attention, _) in zip(lanes, modulations, strict=True)
        ]
        queries, keys, values = zip(*projected, strict=True)
        gathered = self._attention(queries, keys, values)
        return tuple(
            self._kept(k, expert.output, x, mixed, *modulation)
            for (k, expert, x, _), mixed, modulation in zip(
                lanes, gathered, modulations, strict=True
            )
        )

    def _kept(self, scale: int, compute: Callable[..., T], *inputs: object) -> T:
        """Call an expert, keeping for the backward pass what it needs or only its inputs."""
        if scale not in self.recomputed or not torch.is_grad_enabled():
            return compute(*inputs)
        # Nothing here draws random numbers.
        outputs = checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return cast(T, outputs)
