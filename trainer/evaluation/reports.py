"""Reports of evaluations, written at a run's end or by a later measurement; and read again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

from pipelines.documents import DocumentError, parse_json, seal, unseal, validate_as
from trainer.checkpoint import layout
from trainer.config.job import EvalConfig
from trainer.evaluation.learned_features import LabelAgreement
from trainer.storage.errors import MissingObject
from trainer.storage.kept import read_sealed
from trainer.storage.store import Store, check_key

logger = logging.getLogger(__name__)


def evaluation_key(run: str, images: int, name: str) -> str:
    """Return the store key of one result of an evaluation."""
    return f"{run}/evaluation/{images:012d}/{name}"


@dataclass(frozen=True, kw_only=True)
class Distance:
    """One extractor's Fréchet distance with what it has to be compared with.

    Attributes:
        features: Name of the extractor; distances of different extractors do not compare.
        frechet: Samples against held-out real images; lower is better.
        frechet_real_halves: One half of the held-out real images against the other: what a perfect
            generator could reach with so few images; None where there were too few for halves.
        held_out_accuracy: For "learned_conv": fraction of held-out images its classifier reads
            right.
    """

    features: str
    frechet: float
    frechet_real_halves: float | None
    held_out_accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Everything that decides a report: equal measurements of one checkpoint give equal figures.

    Attributes:
        attempt: The checkpoint's own random name.
        weights: "ema" or "master".
        samples: Images sampled, classes in equal parts.
        seed: Seed of their noise.
        sampler: Solver, steps and guidance.
        extractors: Name of each extractor and, where it has weights of its own, their SHA-256.
        held_out_index: SHA-256 of the index of the real images.
    """

    attempt: str
    weights: str
    samples: int
    seed: int
    sampler: Mapping[str, Any]
    extractors: Mapping[str, str]
    held_out_index: str

    @property
    def name(self) -> str:
        """Short digest, the name of the report's folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class _Report:
    """A document that carries its own checksum."""

    def to_json(self) -> bytes:
        """Return the report as sealed JSON."""
        return json.dumps(seal(asdict(self)), indent=2).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Rebuild a report from `to_json`.

        Raises:
            DocumentError: It is damaged.
        """
        return validate_as(cls, unseal(parse_json(data)))


@dataclass(frozen=True, kw_only=True)
class CheckpointReport(_Report):
    """Figures of one checkpoint.

    Attributes:
        checkpoint: Its URI.
        run: Name of its run.
        images: Images its weights were trained on.
        real_images: Held-out images that the samples were compared with.
        unusable_real_images: Held-out images that could not be read or decoded.
        network_evaluations: Network evaluations per sample; a guided pair counts as two.
        distances: One for each extractor.
        measurement: How it was measured.
    """

    checkpoint: str
    run: str
    images: int
    real_images: int
    network_evaluations: float
    distances: tuple[Distance, ...]
    measurement: Measurement
    unusable_real_images: int = 0

    def is_of(self, run: str, images: int, measurement: Measurement) -> bool:
        """Tell whether it is what this measurement of that checkpoint gives."""
        return (self.run, self.images, self.measurement.name) == (run, images, measurement.name)

    def distance(self, features: str) -> Distance:
        """Return the figures of one extractor."""
        (found,) = (each for each in self.distances if each.features == features)
        return found


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
class EvaluationReport(_Report):
    """Figures of the end of a run, beside those of where it began.

    Attributes:
        images: Images the weights had been trained on.
        samples: Generated images measured.
        features: Name of the feature extractor; distances of different extractors do not compare.
        frechet: Samples against held-out real images; lower is better.
        frechet_untrained: The same for the untrained model: where training started.
        frechet_real_halves: See `Distance`.
        gap_closed: Fraction of the way from untrained to real halves, 1 is all of it; None without
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
        reached: Distance,
        frechet_untrained: float,
        nfe: tuple[float, ...],
        labels: LabelAgreement | None,
        real_images: int,
        unusable_real_images: int,
    ) -> EvaluationReport:
        """Put figures beside the references they need.

        `reached` is the distance of the samples, `frechet_untrained` that of those sampled the same
        way from the initial weights, and `nfe` has the network evaluations per sample in each
        segment. The others go into the report as they are.
        """
        halves = reached.frechet_real_halves
        gap = None
        if halves is not None:
            way = frechet_untrained - halves
            gap = (frechet_untrained - reached.frechet) / way if way > 0 else 0.0
        return cls(
            images=images,
            samples=config.samples,
            features=reached.features,
            frechet=reached.frechet,
            frechet_untrained=frechet_untrained,
            frechet_real_halves=halves,
            gap_closed=gap,
            network_evaluations=sum(nfe),
            segment_evaluations=nfe,
            # As JSON would hold them, so that a report read back compares equal.
            settings=parse_json(json.dumps(asdict(config)).encode()),
            origin=origin,
            labels=labels,
            real_images=real_images,
            unusable_real_images=unusable_real_images,
        )

    @property
    def distances(self) -> tuple[Distance, ...]:
        """The distance, as a report of a checkpoint has it."""
        return (
            Distance(
                features=self.features,
                frechet=self.frechet,
                frechet_real_halves=self.frechet_real_halves,
            ),
        )

    @property
    def measurement(self) -> Measurement:
        """How it was measured, as far as its settings tell."""
        sampler = self.settings.get("sampler")
        return Measurement(
            attempt=self.origin.attempt,
            weights="ema",
            samples=self.samples,
            seed=self.settings.get("seed", EvalConfig.seed),
            sampler=sampler if isinstance(sampler, Mapping) else {},
            extractors={self.features: self.origin.extractor},
            held_out_index=self.origin.held_out_index,
        )

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


class MeasuredDistance(NamedTuple):
    """One Fréchet distance of a checkpoint."""

    report: str
    """Key of the report that tells it."""
    measurement: Measurement
    """How it was measured."""
    distance: Distance
    """What was."""


def read_distances(
    store: Store, run: str, images: int, *, keys: Iterable[str], attempts: Collection[str]
) -> list[MeasuredDistance]:
    """Read the run's own report, of its end, and those of later measurements.

    Args:
        store: Where runs are kept.
        run: Name of the run.
        images: Images of the checkpoint.
        keys: Keys of the store, at least those of the checkpoint's evaluations.
        attempts: The checkpoint's own attempts; others' reports are of one that it has replaced.

    Returns:
        The distances, in the order of the keys. A report that is damaged is passed over with a
        warning that names it.

    Raises:
        StoreError: The store fails, which does not mean that nothing was measured.
    """
    found: list[MeasuredDistance] = []
    for key in _reports(run, images, keys):
        try:
            found += _distances(key, read_sealed(store, key), attempts)
        except MissingObject:
            continue  # deleted since the listing
        except DocumentError as error:
            logger.warning(
                "passing over the report %s, which cannot be believed: %s; measure that "
                "checkpoint again, with the command that did",
                store.uri(key),
                error,
            )
    return found


def _reports(run: str, images: int, keys: Iterable[str]) -> list[str]:
    """Return the keys of what the run, and what `python -m trainer.evaluate`, has written."""
    folder = evaluation_key(run, images, "")
    return [
        key
        for key in keys
        if key.startswith(folder)
        and key.endswith("/report.json")
        and key.removeprefix(folder).count("/") <= 1
    ]


def _distances(
    key: str, values: Mapping[str, Any], attempts: Collection[str]
) -> list[MeasuredDistance]:
    later = "measurement" in values
    report = (
        validate_as(CheckpointReport, values) if later else validate_as(EvaluationReport, values)
    )
    measurement = report.measurement
    if measurement.attempt not in attempts:
        return []
    return [MeasuredDistance(key, measurement, each) for each in report.distances]


def frechet_scores(store: Store, run: str, features: str) -> dict[int, float]:
    """Read the Fréchet distances of a run's checkpoints by one extractor: see `read_scores`."""
    return read_scores(store, run).get(features, {})


def read_scores(store: Store, run: str) -> dict[str, dict[int, float]]:
    """Read the Fréchet distances of the EMA weights of a run's checkpoints.

    Where one was measured several times, the measurement with most samples counts, and of equal
    ones the last by name. Distances fall with the number of samples, so checkpoints compare only
    where they were measured alike, which is the user's to see to.

    Args:
        store: Where runs are kept.
        run: Name of the run.

    Returns:
        For each extractor the distances by images, of checkpoints that exist. A report that makes
        no sense is passed over with a warning that names it.

    Raises:
        StoreError: The store fails, which does not mean that nothing was measured.
    """
    keys = store.list(f"{check_key(run)}/")
    found: defaultdict[str, dict[int, tuple[int, str, float]]] = defaultdict(dict)
    for images, attempts in sorted(_attempts(run, keys).items()):
        for report, measurement, distance in read_distances(
            store, run, images, keys=keys, attempts=attempts
        ):
            if measurement.weights == "ema":
                by_images = found[distance.features]
                measured = (measurement.samples, report, distance.frechet)
                by_images[images] = max(by_images.get(images, measured), measured)
    return {
        features: {images: frechet for images, (_, _, frechet) in by_images.items()}
        for features, by_images in sorted(found.items())
    }


def _attempts(run: str, keys: Mapping[str, int]) -> dict[int, set[str]]:
    """Return the attempts that lie in the folder of each committed checkpoint."""
    attempts: defaultdict[int, set[str]] = defaultdict(set)
    for key in keys:
        images = layout.images_of(run, key)
        if images is not None and layout.manifest_key(run, images) in keys:
            attempts[images].add(key.removeprefix(layout.checkpoint_key(run, images)).split("/")[1])
    return attempts
