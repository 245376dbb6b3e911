"""Layers of experts that are divided over ranks, put in the place of the whole ones.

A rank holds shards of layers. Of the scales that a block computes at once (`scales_at_once`), those
of one expert group are joined: one layer applies the shards of all of them, so that their tokens
travel together. How, is in `trainer.engine.joint_functions`.

Modulation depends on the condition alone, so that of all blocks is made at once too, ahead of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.transformer.experts import ExpertLayers, InputMajorLinear, Modulation
from trainer.engine.exchange import Exchange
from trainer.engine.joint_functions import MlpFunction, ModulationFunction, ProjectionFunction

T = TypeVar("T")


class ExpertShard(nn.Module):
    """This rank's part of a linear layer of an expert; `JointLayer` applies it.

    Args:
        layer: The whole layer; its weight and bias are partitioned along their first dimension.
        exchange: The group that holds its parts.
    """

    def __init__(self, layer: nn.Linear | InputMajorLinear, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange
        self.weight = self._part(layer.weight)
        self.bias = self._part(layer.bias)

    def _part(self, whole: Tensor) -> nn.Parameter:
        assert whole.shape[0] % self.exchange.ranks == 0  # `check_placement` has seen to it
        part = whole.detach().chunk(self.exchange.ranks)[self.exchange.index]
        return nn.Parameter(part.clone())


class JointLayer(nn.Module):
    """Applies shards of several experts at once. It has no weights of its own.

    Args:
        shards: The shards, all of one expert group.
        regather: Whether tokens are gathered again in the backward pass, or kept as gathered.
    """

    def __init__(self, shards: Sequence[ExpertShard], *, regather: bool = True) -> None:
        super().__init__()
        # In a tuple, for as children they would have a second name.
        self._shards = tuple(shards)
        self._exchange, self._regather = shards[0].exchange, regather

    @property
    def borrowed(self) -> list[nn.Parameter]:
        """What it uses of the shards: the weights of all of them, then the biases."""
        weights = [shard.weight for shard in self._shards]
        return weights + [shard.bias for shard in self._shards]

    def _over_rows(
        self, function: type[torch.autograd.Function], tokens: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        rows = [own.flatten(0, 1) for own in tokens]
        outputs = function.apply(  # type: ignore[no-untyped-call]
            self._exchange, self._regather, *rows, *self.borrowed
        )
        return tuple(
            output.unflatten(0, own.shape[:2]) for output, own in zip(outputs, tokens, strict=True)
        )


class JointProjection(JointLayer):
    """Queries, keys and values of each scale."""

    def forward(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Map each scale's [b, n, d] to [b, n, 3 d]."""
        return self._over_rows(ProjectionFunction, tokens)


class JointMlp(JointLayer):
    """The MLP of each scale; its shards are those of all first layers, then of all second ones."""

    def forward(self, *tokens: Tensor) -> tuple[Tensor, ...]:
        """Map each scale's [b, n, d] to the same."""
        return self._over_rows(MlpFunction, tokens)


class JointModulation(JointLayer):
    """The modulation of each scale in several blocks; its shards are in the order of blocks."""

    def forward(self, *conditions: Tensor) -> tuple[Tensor, ...]:
        """Map each scale's [b, d] to [b, 6 d], for one block after another.

        The conditions of a scale are the first ones of the scale before it.
        """
        images = [len(condition) for condition in conditions]
        outputs: tuple[Tensor, ...] = ModulationFunction.apply(  # type: ignore[no-untyped-call]
            self._exchange, images, conditions[0], *self.borrowed
        )
        return outputs


class ShardedLayers(nn.Module, ExpertLayers):
    """Applies the layers of a block's experts, those of one expert group at once.

    Args:
        experts: The block's experts, by name; those of sharded scales have shards for layers.
        exchanges: For each sharded scale its group.
        at_once: The scales that the block may compute at once.
        regather: Whether tokens are gathered again in the backward pass, or kept as gathered.
    """

    def __init__(
        self,
        experts: nn.ModuleDict,
        exchanges: Mapping[int, Exchange],
        *,
        at_once: Iterable[Sequence[int]],
        regather: bool,
    ) -> None:
        nn.Module.__init__(self)
        ExpertLayers.__init__(self, experts)
        self._exchanges = exchanges
        self._projections, self._mlps = nn.ModuleDict(), nn.ModuleDict()
        for members in _joined(at_once, exchanges):
            own: list[Any] = [self._experts[k] for k in members]
            qkv = [expert.qkv for expert in own]
            mlp = [expert.mlp_hidden for expert in own] + [expert.mlp_output for expert in own]
            self._projections[_name(members)] = JointProjection(qkv, regather=regather)
            self._mlps[_name(members)] = JointMlp(mlp, regather=regather)

    def modulation(self, scale: int, condition: Tensor) -> Tensor:
        """Turn what the block is given into modulation; `ModulationAhead` may have done so."""
        if isinstance(self._experts[scale].modulation, ExpertShard):
            return condition
        return super().modulation(scale, condition)

    def attention_inputs(
        self, scales: Sequence[int], tokens: Sequence[Tensor], modulations: Sequence[Modulation]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Make queries, keys and values of each scale's tokens."""
        return self._by_group(
            self._joint_inputs, super().attention_inputs, scales, tokens, modulations
        )

    def feed_forward(
        self,
        scales: Sequence[int],
        tokens: Sequence[Tensor],
        gathered: Sequence[Tensor],
        for_attention: Sequence[Modulation],
        for_mlp: Sequence[Modulation],
    ) -> list[Tensor]:
        """Add what attention gathered, and the MLP's output, to each scale's tokens."""
        given = (tokens, gathered, for_attention, for_mlp)
        return self._by_group(self._joint_feed_forward, super().feed_forward, scales, *given)

    def _joint_inputs(
        self, scales: Sequence[int], tokens: Sequence[Tensor], modulations: Sequence[Modulation]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        normed = map(self.regions.norm, modulations, tokens)
        projected = self._projections[_name(scales)](*normed)
        return [self._experts[k].heads_of(qkv) for k, qkv in zip(scales, projected, strict=True)]

    def _joint_feed_forward(self, scales: Sequence[int], *given: Sequence[Any]) -> list[Tensor]:
        experts = [self._experts[k] for k in scales]
        tokens, normed = zip(*map(self.regions.mlp_inputs, experts, *given), strict=True)
        outputs = self._mlps[_name(scales)](*normed)
        gates = [modulation.gate for modulation in given[-1]]
        return list(map(torch.addcmul, tokens, gates, outputs))

    def _by_group(
        self,
        joint: Callable[..., list[T]],
        one_by_one: Callable[..., list[T]],
        scales: Sequence[int],
        *given: Sequence[Any],
    ) -> list[T]:
        """Call one function for the scales of each expert group, another for those of none."""
        own = dict(zip(scales, zip(*given, strict=True), strict=True))
        made: dict[int, T] = {}
        for exchange, members in _grouped(scales, self._exchanges):
            compute = joint if exchange else one_by_one
            made.update(
                zip(
                    members,
                    compute(members, *zip(*(own[k] for k in members), strict=True)),
                    strict=True,
                )
            )
        return [made[k] for k in scales]


class ModulationAhead(nn.Module):
    """Makes the modulation of sharded scales for all blocks at once, ahead of them.

    Args:
        experts: The experts by name, of each block with shards; the first block has none.
        exchanges: For each sharded scale its group.
        at_once: The scales whose modulation may be asked for at once.
    """

    def __init__(
        self,
        experts: Sequence[nn.ModuleDict],
        exchanges: Mapping[int, Exchange],
        *,
        at_once: Iterable[Sequence[int]],
    ) -> None:
        super().__init__()
        self._blocks, self._exchanges = len(experts), exchanges
        self._joint = nn.ModuleDict()
        for members in _joined(at_once, exchanges):
            shards: list[Any] = [
                block[f"scale{k}"].modulation for block in experts for k in members
            ]
            self._joint[_name(members)] = JointModulation(shards)

    def forward(
        self, scales: Sequence[int], conditions: tuple[Tensor, ...]
    ) -> list[tuple[Tensor, ...]]:
        """Make what each block is given: conditions, [b, d], or for its shards outputs, [b, 6 d].

        Args:
            scales: Some of the active scales, coarse to fine.
            conditions: Of each of them, the first ones of the scale before it.
        """
        own = dict(zip(scales, conditions, strict=True))
        blocks = [own.copy() for _ in range(self._blocks)]
        for exchange, members in _grouped(scales, self._exchanges):
            if exchange:
                outputs = self._joint[_name(members)](*(own[k] for k in members))
                for number, block in enumerate(blocks):
                    made = outputs[number * len(members) :][: len(members)]
                    block.update(zip(members, made, strict=True))
        return [conditions, *(tuple(block.values()) for block in blocks)]


def _joined(
    at_once: Iterable[Sequence[int]], exchanges: Mapping[int, Exchange]
) -> Iterable[tuple[int, ...]]:
    """Tell which scales are applied by one layer: those at once that share a group, each once."""
    return {
        tuple(members): None
        for scales in at_once
        for exchange, members in _grouped(scales, exchanges)
        if exchange
    }


def _grouped(
    scales: Iterable[int], exchanges: Mapping[int, Exchange]
) -> Iterable[tuple[Exchange | None, list[int]]]:
    """Sort scales by their group; those that are not sharded have none."""
    groups: dict[Exchange | None, list[int]] = {}
    for k in scales:
        groups.setdefault(exchanges.get(k), []).append(k)
    return groups.items()


def _name(scales: Iterable[int]) -> str:
    return "_".join(f"scale{k}" for k in scales)
