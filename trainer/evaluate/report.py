"""The evaluation of one set of weights: figures beside the references they need."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.flow.sampler_config import SamplerConfig
from trainer.evaluate.classifier import LabelAgreement, label_agreement
from trainer.evaluate.distance import DistanceToReal
from trainer.evaluate.features import FeatureConfig, feature_extractor
from trainer.evaluate.learned_features import LabelledImages


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is sampled and measured.

    Attributes:
        samples: Images drawn for the final figures; classes in equal parts.
        batch: Images in one network call on one rank when all scales are active; a segment with
            fewer tokens takes more.
        seed: Seed of the samples' noise.
        sampler: Solver, steps and guidance.
        features: Feature extractor of the Fréchet distance.
        classifier: Train a classifier on the real images and let it read the samples; meant for
            small images, which it holds in memory.
        grid_interval_images: How often a sample grid is drawn during training; 0 is never.
        grid_columns: Images per class in a grid.
        grid_classes: Classes shown in a grid, from the first.
    """

    samples: int = 1000
    batch: int = 125
    seed: int = 1
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    classifier: bool = False
    grid_interval_images: int = 0
    grid_columns: int = 10
    grid_classes: int = 10


def evaluation_key(run: str, images: int, name: str) -> str:
    """Return the store key of one result of an evaluation."""
    return f"{run}/evaluation/{images:012d}/{name}"


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Figures of one evaluation.

    Attributes:
        images: Images the weights had been trained on.
        samples: Generated images measured.
        features: Name of the feature extractor; distances of different extractors do not compare.
        frechet: Samples against held-out real images; lower is better.
        frechet_untrained: The same for the untrained model: where training started.
        frechet_real_halves: One half of the held-out real images against the other: what a perfect
            generator could reach with so few images.
        gap_closed: Share of the way from untrained to real halves, 1 is all of it.
        network_evaluations: Network evaluations per image as counted; a guided pair counts as two.
        segment_evaluations: The same in each segment, from noise to data.
        settings: The evaluation's configuration.
        labels: What a classifier of real images reads in the samples; None when not asked for.
    """

    images: int
    samples: int
    features: str
    frechet: float
    frechet_untrained: float
    frechet_real_halves: float
    gap_closed: float
    network_evaluations: float
    segment_evaluations: tuple[float, ...]
    settings: dict[str, Any]
    labels: LabelAgreement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationReport:
        """Rebuild a report from `to_dict`."""
        labels = values.get("labels")
        # Reports of older versions told the total alone.
        segments = tuple(values.get("segment_evaluations", ()))
        return cls(
            **{
                **values,
                "labels": LabelAgreement(**labels) if labels else None,
                "segment_evaluations": segments,
            }
        )

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names the tracker shows."""
        values = {
            f"eval/frechet_{self.features}": self.frechet,
            f"eval/frechet_{self.features}_untrained": self.frechet_untrained,
            f"eval/frechet_{self.features}_real_halves": self.frechet_real_halves,
            "eval/gap_closed": self.gap_closed,
            "eval/network_evaluations": self.network_evaluations,
        }
        if self.labels is not None:
            values["eval/label_agreement"] = self.labels.samples
            values["eval/classifier_held_out_accuracy"] = self.labels.held_out
        return values


def evaluate(
    config: EvalConfig,
    *,
    images: int,
    device: torch.device,
    samples: tuple[Tensor, Tensor],
    untrained: Tensor,
    held_out: Callable[[], LabelledImages],
    train: Callable[[], LabelledImages],
    segment_evaluations: tuple[float, ...],
) -> EvaluationReport:
    """Measure samples against held-out real images.

    Args:
        config: What to measure.
        images: Images the weights had been trained on.
        device: Where features are extracted.
        samples: Generated images [n, c, h, w] and requested labels [n].
        untrained: Images drawn the same way from the initial weights.
        held_out: Gives batches of real images the model has never seen, and their labels.
        train: Gives batches of the training images; read only for what learns from them.
        segment_evaluations: Network evaluations per sample in each segment.

    Returns:
        The figures.
    """
    extractor = feature_extractor(
        config.features, channels=samples[0].shape[1], train=train, held_out=held_out
    )

    distance = DistanceToReal(
        extractor, (real for real, _ in held_out()), device=device, batch=config.batch
    )
    reached, start, floor = distance(samples[0]), distance(untrained), distance.between_halves
    labels = None
    if config.classifier:
        labels = label_agreement(
            train=_joined(train()), held_out=_joined(held_out()), samples=samples
        )
    return EvaluationReport(
        images=images,
        samples=len(samples[0]),
        features=config.features.name,
        frechet=reached,
        frechet_untrained=start,
        frechet_real_halves=floor,
        gap_closed=(start - reached) / (start - floor) if start > floor else 0.0,
        network_evaluations=sum(segment_evaluations),
        segment_evaluations=segment_evaluations,
        # As JSON would hold them, so that a report read back compares equal.
        settings=json.loads(json.dumps(asdict(config))),
        labels=labels,
    )


def _joined(batches: LabelledImages) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)
