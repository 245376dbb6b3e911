"""The evaluation of one set of weights: figures beside the references they need."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.documents import parse_json, sealed, typed, unsealed
from trainer.config.evaluation import EvalConfig
from trainer.evaluation.frechet import DistanceToReal
from trainer.evaluation.learned_features import LabelAgreement


def evaluation_key(run: str, images: int, name: str) -> str:
    """Return the store key of one result of an evaluation."""
    return f"{run}/evaluation/{images:012d}/{name}"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the figures at a run's end were made of, beside the settings.

    Attributes:
        run: Name of the run.
        attempt: The random name of the checkpoint that was measured.
        held_out_index: SHA-256 of the index of the real images.
        extractor: SHA-256 of the extractor's weights; empty where the code decides them.
    """

    run: str
    attempt: str
    held_out_index: str
    extractor: str


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
            generator could reach with so few images; None where there are too few for halves.
        gap_closed: Share of the way from untrained to real halves, 1 is all of it; None without
            these.
        network_evaluations: Network evaluations per image as counted; a guided pair counts as two.
        segment_evaluations: The same in each segment, from noise to data.
        settings: The evaluation's configuration.
        origin: What else decides the figures.
        labels: What a classifier of real images reads in the samples; None when not asked for.
        real_images: Held-out real images measured; None in reports of older versions.
        unusable_real_images: Held-out real images that could not be read or decoded.
    """

    images: int
    samples: int
    features: str
    frechet: float
    frechet_untrained: float
    frechet_real_halves: float | None
    gap_closed: float | None
    network_evaluations: float
    segment_evaluations: tuple[float, ...]
    settings: dict[str, Any]
    origin: Origin
    labels: LabelAgreement | None = None
    real_images: int | None = None
    unusable_real_images: int = 0

    @classmethod
    def of(
        cls,
        config: EvalConfig,
        *,
        images: int,
        origin: Origin,
        distance: DistanceToReal,
        stored_real_images: int,
        frechet: float,
        frechet_untrained: float,
        segment_evaluations: tuple[float, ...],
        labels: LabelAgreement | None,
    ) -> EvaluationReport:
        """Put figures beside the references they need.

        Args:
            config: What was measured.
            images: Images the weights had been trained on.
            origin: What else decides the figures.
            distance: What measured.
            stored_real_images: Held-out real images, those that cannot be used among them.
            frechet: Distance of the samples.
            frechet_untrained: Distance of those drawn the same way from the initial weights.
            segment_evaluations: Network evaluations per sample in each segment.
            labels: What a classifier of real images reads in the samples.
        """
        halves = distance.between_halves
        gap = None
        if halves is not None:
            way = frechet_untrained - halves
            gap = (frechet_untrained - frechet) / way if way > 0 else 0.0
        return cls(
            images=images,
            samples=config.samples,
            features=config.features.name,
            frechet=frechet,
            frechet_untrained=frechet_untrained,
            frechet_real_halves=halves,
            gap_closed=gap,
            network_evaluations=sum(segment_evaluations),
            segment_evaluations=segment_evaluations,
            # As JSON would hold them, so that a report read back compares equal.
            settings=parse_json(json.dumps(asdict(config)).encode()),
            origin=origin,
            labels=labels,
            real_images=distance.real_images,
            unusable_real_images=stored_real_images - distance.real_images,
        )

    def to_json(self) -> bytes:
        """Return the report as JSON that carries its own checksum."""
        return json.dumps(sealed(asdict(self)), indent=2).encode()

    @classmethod
    def from_json(cls, data: bytes) -> EvaluationReport:
        """Rebuild a report from `to_json`.

        Raises:
            DocumentError: It is damaged.
        """
        return typed(cls, unsealed(parse_json(data)))

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names the tracker shows."""
        values = {
            f"eval/frechet_{self.features}": self.frechet,
            f"eval/frechet_{self.features}_untrained": self.frechet_untrained,
            "eval/network_evaluations": self.network_evaluations,
            "eval/unusable_real_images": float(self.unusable_real_images),
        }
        if self.frechet_real_halves is not None and self.gap_closed is not None:
            values[f"eval/frechet_{self.features}_real_halves"] = self.frechet_real_halves
            values["eval/gap_closed"] = self.gap_closed
        if self.labels is not None:
            values["eval/label_agreement"] = self.labels.samples
            values["eval/classifier_held_out_accuracy"] = self.labels.held_out
        return values
