"""What a block computes at once, and on which queue."""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from models.transformer.block import Block, Streams, scales_at_once
from models.transformer.config import AttentionKind, TransformerConfig
from models.transformer.experts import ExpertLayers, Modulation
from models.transformer.lapflow import LapFlowTransformer

SCALES = 3
KINDS: tuple[AttentionKind, ...] = ("causal", "own_scale", "full")


class ListedLayers(ExpertLayers):
    """Lists the scales that are computed at once."""

    def __init__(self, block: Block, asked: set[tuple[int, ...]]) -> None:
        super().__init__(block.experts)
        self.asked = asked

    def attention_inputs(
        self, scales: Sequence[int], tokens: Sequence[Tensor], modulations: Sequence[Modulation]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        self.asked.add(tuple(scales))
        return super().attention_inputs(scales, tokens, modulations)

    def feed_forward(self, scales: Sequence[int], *given: Any) -> list[Tensor]:
        self.asked.add(tuple(scales))
        return super().feed_forward(scales, *given)


class ListedStreams(Streams):
    """Lists how many tensors are handed to the coarse queue and back."""

    def __init__(self) -> None:
        self.handed: list[tuple[str, int]] = []

    def fork(self, tensors: Iterable[Tensor]) -> None:
        self.handed.append(("fork", len(list(tensors))))

    def join(self, tensors: Iterable[Tensor]) -> None:
        self.handed.append(("join", len(list(tensors))))


def build(kind: AttentionKind) -> LapFlowTransformer:
    return LapFlowTransformer(
        TransformerConfig(depth=1, width=8, heads=1, attention=kind),
        scales=SCALES,
        channels=1,
        image_size=8,
        classes=2,
    )


def run(model: LapFlowTransformer, *, active: int) -> None:
    states = tuple(torch.zeros(1, 1, 8 >> k, 8 >> k) for k in (2, 1, 0)[:active])
    model(states, torch.zeros(1), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize(
    ("kind", "checkpointed"),
    list(product(KINDS, [each for n in range(3) for each in combinations(range(SCALES), n)])),
)
def test_the_scales_at_once_are_those_that_a_block_asks_for(
    kind: AttentionKind, checkpointed: tuple[int, ...]
) -> None:
    model = build(kind)
    model.checkpoint_activations(checkpointed)
    block = cast(Block, model.blocks[0])
    block.layers = ListedLayers(block, asked := set())
    for active in range(1, SCALES + 1):
        run(model, active=active)
    listed = scales_at_once(kind, scales=SCALES, checkpointed=checkpointed)
    assert set(listed) == asked
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize(
    ("kind", "active", "handed"),
    [
        # Tokens and conditions; of each coarse scale keys and values; tokens.
        ("causal", 3, [("fork", 4), ("join", 4), ("join", 2)]),
        ("causal", 2, [("fork", 2), ("join", 2), ("join", 1)]),
        ("own_scale", 3, [("fork", 4), ("join", 2)]),
        ("causal", 1, []),
        ("full", 3, []),
    ],
)
def test_queues_wait_for_one_another_only_where_coarse_scales_go_ahead(
    kind: AttentionKind, active: int, handed: list[tuple[str, int]]
) -> None:
    model, streams = build(kind), ListedStreams()
    model.queue(streams)
    run(model, active=active)
    assert streams.handed == handed
