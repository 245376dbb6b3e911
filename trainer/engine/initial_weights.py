"""The weights that training began with, drawn once more."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from torch import Tensor, nn

from trainer.engine.expert_shards import ExpertShards
from trainer.engine.protocol import BuildModel


def draw_initial_weights(
    build_model: BuildModel, shards: ExpertShards, take: Callable[[int, Tensor], object]
) -> None:
    """Draw a model's initial weights; no more than one of its parts is in memory at a time.

    Args:
        build_model: Builds the model.
        shards: Divides its experts as they are divided in the engine.
        take: Called with the number of each parameter, in the order of the model's parameters, and
            its initial value as this rank holds it.
    """
    numbers = count()

    def settle(part: nn.Module) -> None:
        shards.divide(part)
        for parameter in part.parameters():
            take(next(numbers), parameter.detach())
            parameter.data = parameter.new_empty(0)

    build_model(settle)
