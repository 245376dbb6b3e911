"""One transformer block: an expert for each scale around one shared attention."""

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from models.transformer.attention import ATTENTIONS
from models.transformer.config import TransformerConfig
from models.transformer.experts import BlockExpert, Tokens, per_scale
from models.transformer.ties import tie_blocks


class Block(nn.Module):
    """Mixture-of-Transformers block with adaLN-Zero conditioning."""

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
        experts = [cast(BlockExpert, e) for e in list(self.experts.values())[: len(tokens)]]
        modulations = [
            expert.modulate(condition)
            for expert, condition in zip(experts, conditions, strict=True)
        ]
        projected = [
            expert.attention_inputs(x, for_attention)
            for expert, x, (for_attention, _) in zip(experts, tokens, modulations, strict=True)
        ]
        queries, keys, values = zip(*projected, strict=True)
        gathered = self._attention(queries, keys, values)
        outputs = []
        for expert, x, mixed, (for_attention, for_mlp) in zip(
            experts, tokens, gathered, modulations, strict=True
        ):
            attended = expert.attention_output(x, mixed, for_attention)
            outputs.append(expert.feed_forward(attended, for_mlp))
        return tuple(outputs)
