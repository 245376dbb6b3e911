"""One transformer block: an expert for each scale around one shared attention."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

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
from models.transformer.config import AttentionKind, TransformerConfig
from models.transformer.experts import (
    BlockExpert,
    ExpertLayers,
    Modulation,
    Tokens,
    per_scale,
    tie_blocks,
)


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


def scales_ahead(kind: AttentionKind, active: int) -> int:
    """Count the active scales that go through the blocks ahead of the finest one.

    Args:
        kind: What tokens see; with "full" coarse scales wait for the finest.
        active: Number of active scales.
    """
    return 0 if kind == "full" else active - 1


def scales_at_once(
    kind: AttentionKind, *, scales: int, checkpointed: Collection[int] = ()
) -> list[tuple[int, ...]]:
    """List the scales whose layers a block may apply at once, each set of them coarse to fine.

    They are neighbours that go through it together, and that all compute again or all keep.

    Args:
        kind: What tokens see.
        scales: Number of scales, K; any number of them may be active, from the coarsest on.
        checkpointed: Scales, in the paper's numbering, that compute again.
    """
    numbers = range(scales - 1, -1, -1)
    found: dict[tuple[int, ...], None] = {}
    for active in range(1, scales + 1):
        ahead = scales_ahead(kind, active)
        for part in (numbers[:ahead], numbers[ahead:active]):
            for _, run in groupby(part, lambda k: k in checkpointed):
                found[tuple(run)] = None
    return list(found)


class _Lane(NamedTuple):
    """One scale's way through a block."""

    scale: int
    tokens: Tokens
    for_attention: Modulation
    for_mlp: Modulation


class Block(nn.Module):
    """Mixture-of-Transformers block with adaLN-Zero conditioning.

    Args:
        config: Sizes of the transformer.
        scales: Number of scales, K.
        number: The block's place among all, from 0.

    Attributes:
        kind: What tokens see.
        checkpointed: Scales, in the paper's numbering, whose experts compute again in the backward
            pass what they would otherwise keep from the forward pass.
        streams: Where work is queued.
        layers: Applies the layers of the experts; may be replaced by what applies them otherwise.
    """

    checkpointed: Collection[int] = ()
    streams = Streams()
    layers: ExpertLayers

    def __init__(self, config: TransformerConfig, *, scales: int, number: int) -> None:
        super().__init__()
        self.number = number
        self.experts = per_scale(scales, lambda _: BlockExpert(config))
        tie_blocks(self.experts, config.ties)
        self.layers = ExpertLayers(self.experts)
        self.kind = config.attention
        self._attention = ATTENTIONS[config.attention]

    def forward(
        self, tokens: tuple[Tokens, ...], conditions: tuple[Float[Tensor, "_b _c"], ...]
    ) -> tuple[Tokens, ...]:
        """Transform the tokens of the active scales.

        Args:
            tokens: Tokens of the active scales, coarse to fine.
            conditions: What each scale's modulation is made from, for the images of its tokens.
        """
        lanes = range(len(tokens))
        ahead = scales_ahead(self.kind, len(tokens))
        if not ahead:
            together = self._lanes(lanes, tokens, conditions)
            queries, keys, values = self._project(together)
            return self._outputs(together, self._attention(queries, keys, values))
        with self.streams.coarse():
            before = self._lanes(lanes[:ahead], tokens, conditions)
            queries, keys, values = self._project(before)
        last = self._lanes(lanes[ahead:], tokens, conditions)
        (query,), (key,), (value,) = self._project(last)
        if self.kind == "causal":
            # The finest scale waits for what is queued by now, and needs no more than these.
            self.streams.join((*keys, *values))
        with self.streams.coarse():
            coarse = self._outputs(before, self._attention(queries, keys, values))
        mixed = finest_attention(self.kind, query, (*keys, key), (*values, value))
        return (*coarse, *self._outputs(last, (mixed,)))

    def _lanes(
        self, positions: Iterable[int], tokens: tuple[Tokens, ...], conditions: tuple[Tensor, ...]
    ) -> list[_Lane]:
        lanes = []
        for position in positions:
            k = len(self.experts) - 1 - position
            modulation = self.layers.modulation(k, conditions[position])
            parts = modulation.unsqueeze(1).chunk(6, dim=-1)
            halves = Modulation(*parts[:3]), Modulation(*parts[3:])
            lanes.append(_Lane(k, tokens[position], *halves))
        return lanes

    def _project(self, lanes: Sequence[_Lane]) -> tuple[tuple[HeadTokens, ...], ...]:
        """Queries, keys and values, each of all lanes."""
        return tuple(zip(*self._compute(self._attention_inputs, lanes), strict=True))

    def _outputs(self, lanes: Sequence[_Lane], gathered: Gathered) -> tuple[Tokens, ...]:
        """What attention gathered and the MLPs' outputs added to the tokens of all lanes."""
        return tuple(self._compute(self._feed_forward, lanes, gathered))

    def _attention_inputs(
        self, lanes: Sequence[_Lane]
    ) -> list[tuple[HeadTokens, HeadTokens, HeadTokens]]:
        scales, tokens, for_attention, _ = zip(*lanes, strict=True)
        return self.layers.attention_inputs(scales, tokens, for_attention)

    def _feed_forward(self, lanes: Sequence[_Lane], gathered: Gathered) -> list[Tokens]:
        scales, tokens, for_attention, for_mlp = zip(*lanes, strict=True)
        return self.layers.feed_forward(scales, tokens, gathered, for_attention, for_mlp)

    def _compute(
        self,
        compute: Callable[..., list[T]],
        lanes: Sequence[_Lane],
        *inputs: Sequence[Tensor],
    ) -> list[T]:
        """Call a function of lanes, once for each run of neighbours that keep alike.

        For the backward pass a lane keeps what it needs there, or its inputs, to compute that
        again.
        """
        results: list[T] = []
        for again, run in groupby(
            zip(lanes, *inputs, strict=True), lambda each: each[0].scale in self.checkpointed
        ):
            arguments: list[Any] = list(zip(*run, strict=True))
            if again and torch.is_grad_enabled():
                # Nothing here draws random numbers.
                results += checkpoint(
                    compute, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                results += compute(*arguments)
        return results
