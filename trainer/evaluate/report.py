"""The evaluation of one set of weights: figures beside the references they need."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.flow.sampler import SamplerConfig
from trainer import rng
from trainer.evaluate.classifier import LabelAgreement, label_agreement
from trainer.evaluate.features import FeatureConfig, feature_extractor
from trainer.evaluate.frechet import FeatureStatistics, frechet_distance

LabelledImages = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is sampled and measured.

    Attributes:
        samples: Images drawn for the final figures; classes in equal parts.
        batch: Images per solver run and rank.
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
        network_evaluations: Network calls per image; a guided pair counts as two.
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
    network_evaluations: int
    settings: dict[str, Any]
    labels: LabelAgreement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationReport:
        """Rebuild a report from `to_dict`."""
        labels = values.get("labels")
        return cls(**{**values, "labels": LabelAgreement(**labels) if labels else None})

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names the tracker shows."""
        values = {
            f"eval/frechet_{self.features}": self.frechet,
            f"eval/frechet_{self.features}_untrained": self.frechet_untrained,
            f"eval/frechet_{self.features}_real_halves": self.frechet_real_halves,
            "eval/gap_closed": self.gap_closed,
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
    network_evaluations: int,
) -> EvaluationReport:
    """Measure samples against held-out real images.

    Args:
        config: What to measure.
        images: Images the weights had been trained on.
        device: Where features are extracted.
        samples: Generated images [n, c, h, w] and requested labels [n].
        untrained: Images drawn the same way from the initial weights.
        held_out: Gives batches of real images the model has never seen, and their labels.
        train: Gives batches of the training images; read only for the classifier.
        network_evaluations: Network calls per sample.

    Returns:
        The figures.
    """
    extractor = feature_extractor(config.features, channels=samples[0].shape[1])

    def extract(part: Tensor) -> NDArray[np.float32]:
        features: NDArray[np.float32] = extractor(part.to(device)).cpu().numpy()
        return features

    real = np.concatenate([extract(batch) for batch, _ in held_out()])
    order = torch.randperm(
        len(real), generator=torch.Generator().manual_seed(rng.derived_seed(0, "real halves"))
    ).numpy()
    half = len(real) // 2
    reference = FeatureStatistics.of(real)

    def distance(generated: Tensor) -> float:
        return frechet_distance(_statistics(extract, generated, config.batch), reference)

    reached, start = distance(samples[0]), distance(untrained)
    floor = frechet_distance(
        FeatureStatistics.of(real[order[:half]]), FeatureStatistics.of(real[order[half:]])
    )
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
        network_evaluations=network_evaluations,
        # As JSON would hold them, so that a report read back compares equal.
        settings=json.loads(json.dumps(asdict(config))),
        labels=labels,
    )


def _statistics(
    extract: Callable[[Tensor], NDArray[np.float32]], images: Tensor, batch: int
) -> FeatureStatistics:
    # Samples are measured as the 8-bit pictures that people and other tools would see.
    seen = ((images * 127.5 + 127.5).round().clamp(0, 255) - 127.5) / 127.5
    return FeatureStatistics.of(
        np.concatenate([extract(part) for part in torch.split(seen, batch)])
    )


def _joined(batches: LabelledImages) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)
