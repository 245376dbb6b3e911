"""The extractors of an evaluation, alike on all ranks, of weights that the first one finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from trainer.config.job import FeatureName
from trainer.errors import is_user_error
from trainer.evaluation.features import (
    FeatureExtractor,
    InceptionFeatures,
    RandomConvFeatures,
    read_inception,
)
from trainer.evaluation.learned_features import LearnedConvFeatures
from trainer.host_group import HostGroup

T = TypeVar("T")


class Unmeasurable(ValueError):
    """The samples cannot be measured, for a reason that a user can mend; raised on all ranks."""


def run_on_all(ranks: HostGroup, step: Callable[[], T]) -> T:
    """Do something on every rank; a user's mistake on one is raised on all.

    Args:
        ranks: Those that do it.
        step: What to do.

    Raises:
        Unmeasurable: Some rank made a mistake; in a process by itself it is raised as it is.
    """
    mistake = ""
    try:
        done = step()
    except ValueError as error:
        if not is_user_error(error) or ranks.world_size == 1:
            raise
        mistake = str(error) or type(error).__name__
    if told := ranks.first_mistake(mistake):
        raise Unmeasurable(told)
    return done


def find_on_first(ranks: HostGroup, step: Callable[[], bytes]) -> bytes:
    """Let the first rank find something, and return it on all; a collective call.

    Raises:
        Unmeasurable: It made a mistake; see `run_on_all`.
    """
    found = run_on_all(ranks, lambda: step() if ranks.rank == 0 else b"")
    return ranks.broadcast(found, source=0)


def build_extractor(
    name: FeatureName,
    *,
    ranks: HostGroup,
    channels: int,
    inception_weights: str | None,
    learn: Callable[[], LearnedConvFeatures],
) -> FeatureExtractor:
    """Build an extractor on all ranks; a collective call.

    Args:
        name: Which one.
        ranks: Those that extract.
        channels: Channels of the images.
        inception_weights: Local file of the first rank for "inception"; None downloads it.
        learn: Trains "learned_conv", or reads it where it is kept, on the first rank.

    Raises:
        MissingWeights: Inception's weights cannot be had.
    """
    if name == "random_conv":
        return RandomConvFeatures(channels)
    if name == "learned_conv":
        return LearnedConvFeatures.from_bytes(find_on_first(ranks, lambda: learn().to_bytes()))
    data = find_on_first(ranks, lambda: read_inception(inception_weights))
    return run_on_all(ranks, lambda: InceptionFeatures(data, weights=inception_weights))
