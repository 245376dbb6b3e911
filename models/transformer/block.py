"""One transformer block: an expert for each scale around one shared attention."""

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.transformer.attention import (
    ATTENTIONS,
    Gathered,
    HeadTokens,
    finest_attention,
)
from models.transformer.config import TransformerConfig
from models.transformer.experts import BlockExpert, Modulation, Tokens, per_scale, tie_blocks


class Streams:
    """Two queues of work, one for coarse scales and the caller's own for the finest.

    Coarse scales never wait for finer ones, so a device that works off several queues at a time can
    compute the finest scale while coarse scales exchange tokens. Here both are one queue, and all
    work is done in the order in which it is asked for.
    """

    def fork(self, tensors: Iterable[Tensor]) -> None:
        """Let the coarse queue use what the caller's queue has made so far."""

    def coarse(self) -> AbstractContextManager[None]:
        """Queue the work of a `with` block for coarse scales."""
        return nullcontext()

    def join(self, tensors: Iterable[Tensor]) -> None:
        """Let the caller's queue use what the coarse queue has made so far."""


T = TypeVar("T")


class _Lane(NamedTuple):
    """One scale's way through a block."""

    scale: int
    expert: BlockExpert
    tokens: Tokens
    modulation: tuple[Modulation, Modulation]


class Block(nn.Module):
    """Mixture-of-Transformers block with adaLN-Zero conditioning.

    Attributes:
        checkpointed: Scales, in the paper's numbering, whose experts compute again in the backward
            pass what they would otherwise keep from the forward pass.
        streams: Where work is queued.
    """

    checkpointed: Collection[int] = ()
    streams = Streams()

    def __init__(self, config: TransformerConfig, *, scales: int) -> None:
        super().__init__()
        self.experts = per_scale(scales, lambda _: BlockExpert(config))
        tie_blocks(self.experts, config.ties)
        self._kind = config.attention
        self._attention = ATTENTIONS[config.attention]

    def forward(
        self, tokens: tuple[Tokens, ...], conditions: tuple[Float[Tensor, "_b _c"], ...]
    ) -> tuple[Tokens, ...]:
        """Transform the tokens of the active scales.

        Args:
            tokens: Tokens of the active scales, coarse to fine.
            conditions: What each scale's modulation is made from, for the images of its tokens.
        """
        if self._kind == "full" or len(tokens) == 1:
            lanes = self._lanes(range(len(tokens)), tokens, conditions)
            queries, keys, values = self._project(lanes)
            return self._outputs(lanes, self._attention(queries, keys, values))
        *before, last = range(len(tokens))
        with self.streams.coarse():
            lanes = self._lanes(before, tokens, conditions)
            queries, keys, values = self._project(lanes)
            coarse = self._outputs(lanes, self._attention(queries, keys, values))
        finest = self._lanes([last], tokens, conditions)
        (query,), (key,), (value,) = self._project(finest)
        self.streams.join((*keys, *values))
        mixed = finest_attention(self._kind, query, (*keys, key), (*values, value))
        return (*coarse, *self._outputs(finest, (mixed,)))

    def _lanes(
        self, positions: Iterable[int], tokens: tuple[Tokens, ...], conditions: tuple[Tensor, ...]
    ) -> list[_Lane]:
        lanes = []
        for position in positions:
            k = len(self.experts) - 1 - position
            expert = cast(BlockExpert, self.experts[f"scale{k}"])
            lanes.append(_Lane(k, expert, tokens[position], expert.modulate(conditions[position])))
        return lanes

    def _project(self, lanes: list[_Lane]) -> tuple[tuple[HeadTokens, ...], ...]:
        """Queries, keys and values, each of all lanes."""
        projected = [
            self._compute(lane.scale, lane.expert.attention_inputs, lane.tokens, lane.modulation[0])
            for lane in lanes
        ]
        return tuple(zip(*projected, strict=True))

    def _outputs(self, lanes: list[_Lane], gathered: Gathered) -> tuple[Tokens, ...]:
        return tuple(
            self._compute(lane.scale, lane.expert.output, lane.tokens, mixed, *lane.modulation)
            for lane, mixed in zip(lanes, gathered, strict=True)
        )

    def _compute(self, scale: int, compute: Callable[..., T], *inputs: object) -> T:
        """Call an expert, keeping for the backward pass what it needs or only its inputs."""
        if scale not in self.checkpointed or not torch.is_grad_enabled():
            return compute(*inputs)
        # Nothing here draws random numbers.
        outputs = checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return cast(T, outputs)
