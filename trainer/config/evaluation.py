"""How the samples of a run are drawn and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from models.flow.sampler_config import SamplerConfig
from pipelines.domains import Checked
from trainer.config.reading import ConfigError

FeatureName = Literal["random_conv", "learned_conv", "inception"]


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(Checked):
    """Which features measure distance.

    Attributes:
        name: "random_conv", "learned_conv" or "inception".
        inception_weights: Local file of the FID Inception weights
            (pt_inception-2015-12-05-6726825d.pth); None downloads them when online.
    """

    name: FeatureName = "random_conv"
    inception_weights: str | None = field(default=None, metadata={"place": "path"})


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Checked):
    """What is sampled and measured.

    Attributes:
        samples: Images drawn for the final figures; classes in equal parts.
        batch: Most images in one network call on one rank. Ranks draw whole batches, so as many
            batches as ranks, or a multiple, keep all of them busy.
        seed: Seed of the samples' noise.
        sampler: Solver, steps and guidance.
        features: Feature extractor of the Fréchet distance.
        classifier: Train a classifier on the real images and let it read the samples; meant for
            small images, which it holds in memory.
        grid_interval_images: How often a sample grid is drawn during training; 0 is never.
        grid_columns: Images per class in a grid.
        grid_classes: Classes shown in a grid, from the first; at most all that there are.
    """

    samples: Annotated[int, Field(ge=2)] = 1000
    batch: Annotated[int, Field(ge=1)] = 125
    seed: Annotated[int, Field(ge=0)] = 1
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    classifier: bool = False
    grid_interval_images: Annotated[int, Field(ge=0)] = 0
    grid_columns: Annotated[int, Field(ge=1)] = 10
    grid_classes: Annotated[int, Field(ge=1)] = 10


def check_guidance(scale: float, *, label_dropout: float, key: str) -> None:
    """Refuse guidance by a null label that was never trained, whose row is as it was drawn.

    Args:
        scale: Guidance scale.
        label_dropout: Share of the labels that training replaces by the null label.
        key: What the scale is called where it was asked for.

    Raises:
        ConfigError: If the scale is not 1 and no label is ever replaced.
    """
    if scale != 1.0 and label_dropout == 0.0:
        raise ConfigError(
            f"{key}={scale} needs a null label, which train.label_dropout=0 never trains; set "
            f"{key}=1, or train with train.label_dropout=0.1"
        )
