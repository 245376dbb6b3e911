"""The extractors of an evaluation, alike on all ranks, of weights that the first one finds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from trainer.config.job import FeatureConfig, FeatureName
from trainer.errors import is_user_error
from trainer.evaluation.features import FeatureExtractor, RandomConvFeatures
from trainer.evaluation.inception import PUBLISHED, InceptionFeatures
from trainer.evaluation.learned_features import LearnedConvFeatures
from trainer.evaluation.vision import CLIP_PUBLISHED, ClipFeatures, DinoFeatures, ModuleFeatures
from trainer.evaluation.weights import WeightsFile
from trainer.host_group import HostGroup
from trainer.storage.store import StoreConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LARGE_BYTES = 5 * 2**30  # DINOv2's largest has 1.1e9 weights


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
    config: FeatureConfig,
    store: StoreConfig,
    learn: Callable[[], LearnedConvFeatures],
) -> FeatureExtractor:
    """Build an extractor on all ranks; a collective call.

    Args:
        name: Which one.
        ranks: Those that extract.
        channels: Channels of the images.
        config: Where weights are; the first rank reads them.
        store: How to reach an object store.
        learn: Trains "learned_conv", or reads it where it is kept, on the first rank.

    Raises:
        MissingWeights: The weights cannot be had.
        ConfigError: There is no such module.
    """
    if name == "random_conv":
        return RandomConvFeatures(channels)
    if name == "learned_conv":
        return LearnedConvFeatures.from_bytes(find_on_first(ranks, lambda: learn().to_bytes()))
    weights, data = _weights(name, config), b""
    if not (name == "module" and weights.place is None):
        data = find_on_first(ranks, lambda: weights.read(store))
    return run_on_all(ranks, lambda: _made(name, config, data, weights))


def check_features(config: FeatureConfig, store: StoreConfig | None = None) -> None:
    """Find out before a run whether its extractor can be built after it.

    Raises:
        MissingWeights: The weights cannot be had.
        ConfigError: There is no such module.
    """
    if config.name in ("random_conv", "learned_conv"):
        return
    weights, data = _weights(config.name, config), b""
    if not (config.name == "module" and weights.place is None):
        data = weights.read(store or StoreConfig())
    _made(config.name, config, data, weights)


def _weights(name: FeatureName, config: FeatureConfig) -> WeightsFile:
    if name == "inception":
        return WeightsFile(network=name, place=config.inception_weights, published=PUBLISHED)
    if name == "clip":
        return WeightsFile(network=name, place=config.clip_weights, published=CLIP_PUBLISHED)
    place = config.dinov2_weights if name == "dinov2" else config.module_weights
    return WeightsFile(network=name, place=place, max_bytes=_LARGE_BYTES)


def _made(
    name: FeatureName, config: FeatureConfig, data: bytes, weights: WeightsFile
) -> FeatureExtractor:
    made: FeatureExtractor
    if name == "inception":
        made = InceptionFeatures(data, weights=weights)
    elif name == "clip":
        made = ClipFeatures(data, weights=weights)
    elif name == "dinov2":
        made = DinoFeatures(data, weights=weights)
    else:
        made = ModuleFeatures(config.module or "", data=data or None, weights=weights)
    logger.info("the weights of %s have the SHA-256 %s", name, made.digest)
    return made
