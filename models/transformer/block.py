"""One transformer block: an expert for each scale around one shared attention."""

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from models.transformer.attention import prefix_attention
from models.transformer.experts import BlockExpert, Tokens, per_scale


class Block(nn.Module):
    """Mixture-of-Transformers block with adaLN-Zero conditioning."""

    def __init__(
        self, *, scales: int, width: int, heads: int, mlp_ratio: float, qk_norm: bool
    ) -> None:
        super().__init__()
        self.experts = per_scale(
            scales,
            lambda _: BlockExpert(width=width, heads=heads, mlp_ratio=mlp_ratio, qk_norm=qk_norm),
        )

    def forward(
        self, tokens: tuple[Tokens, ...], condition: Float[Tensor, "_b d"]
    ) -> tuple[Tokens, ...]:
        """Transform the tokens of the active scales.

        Args:
            tokens: Tokens of the active scales, coarse to fine.
            condition: Activated conditioning vector of each image of the batch.
        """
        experts = [cast(BlockExpert, e) for e in list(self.experts.values())[: len(tokens)]]
        modulations = [
            expert.modulate(condition[: x.shape[0]])
            for expert, x in zip(experts, tokens, strict=True)
        ]
        projected = [
            expert.attention_inputs(x, for_attention)
            for expert, x, (for_attention, _) in zip(experts, tokens, modulations, strict=True)
        ]
        queries, keys, values = zip(*projected, strict=True)
        gathered = prefix_attention(queries, keys, values)
        outputs = []
        for expert, x, mixed, (for_attention, for_mlp) in zip(
            experts, tokens, gathered, modulations, strict=True
        ):
            attended = expert.attention_output(x, mixed, for_attention)
            outputs.append(expert.feed_forward(attended, for_mlp))
        return tuple(outputs)
