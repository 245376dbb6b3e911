"""What ranks compute together with divided layers, forward and backward, for several scales.

A layer is divided by its outputs: every rank of a group computes its part of them for the images of
all E ranks, and each rank gets all outputs of its own images back. The MLP is divided by its hidden
units, so its two layers need one exchange before and one after.

Scales travel together: the rows of what is sent are the tokens of one scale after those of another,
in buffers that are used again. Of what is gathered in the forward pass a rank keeps its own tokens.
In the backward pass they are gathered again, with the gradients that travel there anyway. So a
block takes eight exchanges, however many scales there are:

- forward: gather tokens; deal queries, keys and values (all-to-all); gather the MLP's tokens; sum
  its outputs (reduce-scatter).
- backward: gather the gradients of the MLP's outputs, and its tokens; sum the gradients of these;
  deal the gradients of queries, keys and values, and their tokens; sum the gradients of these.

Modulation takes two exchanges forward and two backward, for all blocks at once.

The functions take and return rows, [rows, features], one tensor for each scale; d is the width of a
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.engine.exchange import Exchange

Gradients: TypeAlias = tuple[Tensor | None, ...]
"""One for each argument of a forward pass; those that are no tensors have none."""


class ProjectionFunction(torch.autograd.Function):
    """Each scale's queries, keys and values: rows of d to rows of 3 d."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, regather: bool, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply the shards, and get all outputs of this rank's rows.

        Args:
            ctx: Keeps what the backward pass needs.
            exchange: The expert group.
            regather: Whether to keep this rank's tokens and gather them again, or all of them.
            inputs: Each scale's rows, then its weight, then its bias.
        """
        tokens, weights, biases = _cut(inputs, 3)
        rows = [len(own) for own in tokens]
        gathered = exchange.gather(_pack(exchange, tokens), keep=not regather)
        chunks = exchange.chunks(sum(rows), len(biases[0]), like=gathered)
        for own, weight, bias, out in zip(
            _split(gathered, rows), weights, biases, _split(chunks, rows), strict=True
        ):
            _multiply(own, weight.t(), bias=bias, out=out)
        ctx.exchange, ctx.regather = exchange, regather
        ctx.save_for_backward(*weights, *(tokens if regather else [gathered]))
        return _split(_join_features(exchange.all_to_all(chunks)), rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        """Return the gradients of the scales' rows, weights and biases."""
        exchange, saved = ctx.exchange, ctx.saved_tensors
        weights, kept = saved[: len(gradients)], saved[len(gradients) :]
        outputs, width = weights[0].shape
        rows = [len(own) for own in gradients]
        parts = [_cut_features(own, exchange.ranks) for own in gradients]
        again = [kept] if ctx.regather else []
        chunks = exchange.chunks(sum(rows), outputs + width * len(again), like=parts[0])
        dealt = exchange.all_to_all(_fill(chunks, parts, *again))
        gathered = dealt[..., outputs:] if again else kept[0]
        terms = exchange.chunks(sum(rows), width, like=dealt)
        found = [
            _linear_backward(gradient, own, weight, out=out)
            for gradient, own, weight, out in zip(
                _split(dealt[..., :outputs], rows),
                _split(gathered, rows),
                weights,
                _split(terms, rows),
                strict=True,
            )
        ]
        of_rows = _split(exchange.sum(terms), rows)
        return (None, None, *of_rows, *chain(*zip(*found, strict=True)))


class MlpFunction(torch.autograd.Function):
    """Each scale's MLP: rows of d to rows of d.

    The activation is computed again in the backward pass, from what went into it.
    """

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, regather: bool, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply the shards, and add up what all ranks' hidden units make of this rank's rows.

        Args:
            ctx: Keeps what the backward pass needs.
            exchange: The expert group.
            regather: Whether to keep this rank's tokens and gather them again, or all of them.
            inputs: Each scale's rows, then the weight of its first layer, then of its second, then
                the bias of its first layer, then of its second.
        """
        tokens, weights, weights_out, biases, biases_out = _cut(inputs, 5)
        rows = [len(own) for own in tokens]
        gathered = exchange.gather(_pack(exchange, tokens), keep=not regather)
        terms = exchange.chunks(sum(rows), gathered.shape[-1], like=gathered)
        hidden = [
            F.linear(own, weight, bias)
            for own, weight, bias in zip(_split(gathered, rows), weights, biases, strict=True)
        ]
        for own, weight, bias, out in zip(
            hidden, weights_out, biases_out, _split(terms, rows), strict=True
        ):
            # Each rank adds its own part of the bias, and the sum over ranks is the whole one.
            first = exchange.index * len(bias)
            whole = F.pad(bias, (first, out.shape[-1] - first - len(bias)))
            _multiply(F.gelu(own, approximate="tanh"), weight, bias=whole, out=out)
        ctx.exchange, ctx.regather = exchange, regather
        kept = tokens if regather else [gathered]
        ctx.save_for_backward(*weights, *weights_out, *hidden, *kept)
        return _split(exchange.sum(terms), rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        """Return the gradients of the scales' rows, weights and biases."""
        exchange, saved, scales = ctx.exchange, ctx.saved_tensors, len(gradients)
        weights, weights_out, hidden = _cut(saved[: 3 * scales], 3)
        kept = saved[3 * scales :]
        rows, width = [len(own) for own in gradients], gradients[0].shape[-1]
        again = [kept] if ctx.regather else []
        gathered = exchange.gather(_pack(exchange, gradients, *again))
        terms = exchange.chunks(sum(rows), width, like=gathered)
        found = []
        for gradient, own, weight, weight_out, before, out in zip(
            _split(gathered[..., :width], rows),
            _split(gathered[..., width:] if again else kept[0], rows),
            weights,
            weights_out,
            hidden,
            _split(terms, rows),
            strict=True,
        ):
            of_weight_out = _outer(F.gelu(before, approximate="tanh"), gradient)
            of_bias_out = gradient.chunk(exchange.ranks, dim=-1)[exchange.index].sum((0, 1))
            of_hidden = torch.ops.aten.gelu_backward(
                gradient @ weight_out.t(), before, approximate="tanh"
            )
            of_weight, of_bias = _linear_backward(of_hidden, own, weight, out=out)
            found.append((of_weight, of_weight_out, of_bias, of_bias_out))
        of_rows = _split(exchange.sum(terms), rows)
        return (None, None, *of_rows, *chain(*zip(*found, strict=True)))


class ModulationFunction(torch.autograd.Function):
    """Modulation of several blocks: conditions, rows of d, to rows of 6 d."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, images: Sequence[int], condition: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Apply the shards, and get all outputs of this rank's images, for one block after another.

        Args:
            ctx: Keeps what the backward pass needs.
            exchange: The expert group.
            images: How many of the conditions, the first ones, are each scale's.
            condition: The conditions.
            inputs: Each block's and scale's weight, then its bias.
        """
        weights, biases = _cut(inputs, 2)
        rows = [*images] * (len(weights) // len(images))
        gathered = exchange.gather(condition, keep=True)
        chunks = exchange.chunks(sum(rows), len(biases[0]), like=gathered)
        for count, weight, bias, out in zip(
            rows, weights, biases, _split(chunks, rows), strict=True
        ):
            _multiply(gathered[:, :count], weight.t(), bias=bias, out=out)
        ctx.exchange = exchange
        ctx.save_for_backward(gathered, *weights)
        return _split(_join_features(exchange.all_to_all(chunks)), rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        """Return the gradients of the conditions, and of weights and biases."""
        exchange, (gathered, *weights) = ctx.exchange, ctx.saved_tensors
        rows = [len(own) for own in gradients]
        parts = [_cut_features(own, exchange.ranks) for own in gradients]
        chunks = exchange.chunks(sum(rows), len(weights[0]), like=gathered)
        dealt = exchange.all_to_all(_fill(chunks, parts))
        terms = exchange.chunks(*gathered.shape[1:], like=gathered).zero_()
        found = []
        for gradient, weight in zip(_split(dealt, rows), weights, strict=True):
            images = gradient.shape[1]
            found.append((_outer(gradient, gathered[:, :images]), gradient.sum((0, 1))))
            added_up = terms[:, :images]
            _multiply(gradient, weight, bias=added_up, out=added_up)
        return (None, None, exchange.sum(terms), *chain(*zip(*found, strict=True)))


def _linear_backward(
    gradient: Tensor, inputs: Tensor, weight: Tensor, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a linear layer's weight and bias, and leave that of its inputs."""
    _multiply(gradient, weight, out=out)
    return _outer(gradient, inputs), gradient.sum((0, 1))


def _multiply(vectors: Tensor, matrix: Tensor, *, bias: Tensor | None = None, out: Tensor) -> None:
    """Multiply all ranks' rows, [E, rows, i], by a matrix, [i, o], where the result is wanted."""
    same = matrix.expand(len(vectors), -1, -1)
    if bias is None:
        torch.bmm(vectors, same, out=out)
    else:
        torch.baddbmm(bias, vectors, same, out=out)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Add up the outer products of all ranks' rows, [E, rows, i] and [E, rows, o], to [i, o]."""
    return left.flatten(0, 1).t() @ right.flatten(0, 1)


def _cut(tensors: Sequence[Tensor], parts: int) -> list[Sequence[Tensor]]:
    """Cut a sequence into equal parts."""
    each = len(tensors) // parts
    return [tensors[start : start + each] for start in range(0, len(tensors), each)]


def _split(joined: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
    """Split [..., rows, f] into each scale's rows."""
    return torch.split(joined, list(rows), dim=-2)


def _pack(exchange: Exchange, *columns: Sequence[Tensor]) -> Tensor:
    """Put each scale's rows, [rows, f], into one tensor to send; one alone is as it is."""
    if len(columns) == len(columns[0]) == 1:
        return columns[0][0]
    shape = sum(len(own) for own in columns[0]), sum(each[0].shape[-1] for each in columns)
    return _fill(exchange.buffers.take("send", shape, like=columns[0][0]), *columns)


def _fill(packed: Tensor, *columns: Sequence[Tensor]) -> Tensor:
    """Fill [..., rows, f] with columns side by side, each of them one scale's rows after another's.

    What has no dimension for ranks is the same for all of them.
    """
    widths = [each[0].shape[-1] for each in columns]
    for part, column in zip(torch.split(packed, widths, dim=-1), columns, strict=True):
        places = _split(part, [own.shape[-2] for own in column])
        for place, own in zip(places, column, strict=True):
            place.copy_(own)
    return packed


def _cut_features(whole: Tensor, ranks: int) -> Tensor:
    """Cut [rows, E f] into each rank's features, [E, rows, f]."""
    return whole.view(len(whole), ranks, -1).transpose(0, 1)


def _join_features(dealt: Tensor) -> Tensor:
    """Join each rank's features, [E, rows, f], to [rows, E f], in memory of their own."""
    return dealt.transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(1)
