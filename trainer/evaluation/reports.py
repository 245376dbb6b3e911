"""Reports of evaluations, written at a run's end or by a later measurement; and read again."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field

from pipelines.documents import DocumentError, parse_json, seal, unseal, validate_as
from trainer.checkpoint import layout
from trainer.config.job import EvalConfig
from trainer.evaluation.figures import Distance, LabelAgreement, Measures, Nearness, RealFigures
from trainer.metrics.tracker import by_protocol
from trainer.storage.errors import MissingObject
from trainer.storage.kept import read_sealed
from trainer.storage.store import Store, check_key

logger = logging.getLogger(__name__)


RESIZE_FILTER = "linear, antialiased"
"""By which the decoders bring pictures to the size of the data set."""


class NothingMeasured(ValueError):
    """A report has no figures of what is asked for."""


def evaluation_key(run: str, images: int, name: str) -> str:
    """Return the store key of one result of an evaluation."""
    return f"{run}/evaluation/{images:012d}/{name}"


def reference_kind(reference: str) -> str:
    """Return "test", "train" or "file", of which a digest says more than its place."""
    return reference if reference in ("test", "train") else "file"


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
        held_out_index: SHA-256 of the reference: of the index of its images, or of its file.
        reference: What distances are measured to: "test", "train" or "file".
        compared: Most images of a set that are compared pair by pair.
        labels: How often each class is drawn: "in turn" is equally often.
        resize: By which filter the data set's pictures were brought to size. An extractor's own
            filter is the extractor's.
        precision: What the network computed in, see `trainer.evaluation.config`; empty in
            reports of older versions, which do not tell.
    """

    attempt: str
    weights: str
    samples: int
    seed: int
    sampler: Mapping[str, Any]
    extractors: Mapping[str, str]
    held_out_index: str
    reference: str = "test"
    compared: int = 0
    labels: str = "in turn"
    resize: str = RESIZE_FILTER
    precision: str = ""

    @property
    def name(self) -> str:
        """Short digest, the name of the report's folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def protocol(self, features: str, *, any_seed: bool = False) -> str:
        """Return a digest of all that two figures of one extractor must have in common to compare.

        That is everything but the checkpoint, other extractors and, with `any_seed`, the seed.
        """
        known = {features: self.extractors.get(features)}
        told = {**asdict(self), "attempt": "", "extractors": known}
        if any_seed:
            del told["seed"]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


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
        real_images: Real images that the samples were compared with; 0 where only statistics of
            them are stored.
        unusable_real_images: Real images that could not be read or decoded.
        network_evaluations: Network evaluations per sample; a guided pair counts as two.
        distances: One for each extractor; none where there are too few held-out images.
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
        """Return the figures of one extractor.

        Raises:
            NothingMeasured: There are none.
        """
        for each in self.distances:
            if each.features == features:
                return each
        raise NothingMeasured(f"{self.checkpoint} has no figures in the features of {features}")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the figures at a run's end were made of, beside the settings.

    Attributes:
        run: Name of the run.
        attempt: The random name of the checkpoint that was measured.
        held_out_index: SHA-256 of the reference: of the index of its images, or of its file.
        extractor: SHA-256 of the extractor's weights; empty where the code decides them.
        precision: What the network computed in; empty in reports of older versions.
    """

    run: str
    attempt: str
    held_out_index: str
    extractor: str
    precision: str = ""


class GoodputPoint(NamedTuple):
    """The share of a run's time that went into steps which count, when it had lasted so long."""

    images: Annotated[int, Field(ge=0)]
    wall_s: Annotated[float, Field(ge=0)]
    goodput: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """What the time of all launches of a run went into.

    Attributes:
        seconds: For each kind, as the tracker shows them.
        curve: The goodput in the course of the run.
    """

    seconds: dict[str, Annotated[float, Field(ge=0)]]
    curve: tuple[GoodputPoint, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(_Report):
    """Figures of the end of a run, beside those of where it began.

    Attributes:
        images: Images the weights had been trained on.
        samples: Generated images measured.
        features: Name of the feature extractor; distances of different extractors do not compare.
        frechet: Samples against held-out real images; lower is better. None where there are too
            few of these.
        frechet_untrained: The same for the untrained model: where training started.
        diversity, nearest, more, real, held_out_accuracy: See `Distance`.
        network_evaluations: Network evaluations per image as counted; a guided pair counts as two.
        segment_evaluations: The same in each segment, from noise to data.
        settings: The evaluation's configuration.
        origin: What else decides the figures.
        labels: What a classifier of real images reads in the samples; None when not asked for.
        real_images: Held-out real images measured; None in reports of older versions.
        unusable_real_images: Held-out real images that could not be read or decoded.
        time: What the run's time went into. The launch adds it when all is over; None before.
    """

    images: int
    samples: int
    features: str
    frechet: float | None
    frechet_untrained: float | None
    network_evaluations: float
    segment_evaluations: tuple[float, ...]
    settings: dict[str, Any]
    origin: Origin
    diversity: float | None = None
    nearest: Nearness | None = None
    more: Measures | None = None
    real: RealFigures | None = None
    held_out_accuracy: float | None = None
    labels: LabelAgreement | None = None
    real_images: int | None = None
    unusable_real_images: int = 0
    time: RunTime | None = None

    @classmethod
    def of(
        cls,
        config: EvalConfig,
        *,
        images: int,
        origin: Origin,
        reached: Distance | None,
        frechet_untrained: float | None,
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
        told = reached or Distance(features=config.features.name, frechet=math.nan)
        return cls(
            images=images,
            samples=config.samples,
            features=told.features,
            frechet=None if reached is None else reached.frechet,
            frechet_untrained=frechet_untrained,
            diversity=told.diversity,
            nearest=told.nearest,
            more=told.more,
            real=told.real,
            held_out_accuracy=told.held_out_accuracy,
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
        """The distance, as a report of a checkpoint has it; none where there is none."""
        if self.frechet is None:
            return ()
        return (
            Distance(
                features=self.features,
                frechet=self.frechet,
                diversity=self.diversity,
                nearest=self.nearest,
                more=self.more,
                real=self.real,
                held_out_accuracy=self.held_out_accuracy,
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
            reference=reference_kind(self.settings.get("reference", EvalConfig.reference)),
            compared=self.settings.get("compared", 0),
            precision=self.origin.precision,
        )

    def metrics(self) -> dict[str, float]:
        """Return the figures under the names the tracker shows."""
        values = {
            "eval/network_evaluations": self.network_evaluations,
            "reference/unusable_real_images": float(self.unusable_real_images),
        }
        for distance in self.distances:
            values |= distance.metrics()
        if self.frechet_untrained is not None:
            values[f"reference/frechet_{self.features}_untrained"] = self.frechet_untrained
        if self.labels is not None:
            values["eval/label_agreement"] = self.labels.samples
            values["reference/classifier_held_out_accuracy"] = self.labels.held_out
        return values

    def points(self) -> dict[str, float]:
        """Return the figures as `metrics` does, by names that tell the protocol."""
        return by_protocol(self.metrics(), self.measurement.protocol(self.features))


class MeasuredDistance(NamedTuple):
    """One Fréchet distance of a checkpoint."""

    report: str
    """Key of the report that tells it."""
    measurement: Measurement
    """How it was measured."""
    distance: Distance
    """What was."""


def read_distances(
    store: Store, run: str, images: int, *, keys: Iterable[str], attempts: Collection[str] | None
) -> list[MeasuredDistance]:
    """Read what the reports of a checkpoint tell: see `read_reports`."""
    return distances_of(read_reports(store, run, images, keys=keys, attempts=attempts))


def distances_of(
    reports: Mapping[str, EvaluationReport | CheckpointReport],
) -> list[MeasuredDistance]:
    """Return the distances that reports tell, in their order."""
    return [
        MeasuredDistance(key, report.measurement, each)
        for key, report in reports.items()
        for each in report.distances
    ]


def read_reports(
    store: Store, run: str, images: int, *, keys: Iterable[str], attempts: Collection[str] | None
) -> dict[str, EvaluationReport | CheckpointReport]:
    """Read the run's own report, of its end, and those of later measurements.

    Args:
        store: Where runs are kept.
        run: Name of the run.
        images: Images of the checkpoint.
        keys: Keys of the store, at least those of the checkpoint's evaluations.
        attempts: The checkpoint's own attempts; others' reports are of one that it has replaced.
            None takes all, as of a checkpoint that was deleted after it was measured.

    Returns:
        The reports by their keys, in the order of these. A report that is damaged is passed over
        with a warning that names it.

    Raises:
        StoreError: The store fails, which does not mean that nothing was measured.
    """
    found = {}
    for key in _reports(run, images, keys):
        try:
            report = _report(read_sealed(store, key))
            if attempts is None or report.measurement.attempt in attempts:
                found[key] = report
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


def _report(values: Mapping[str, Any]) -> EvaluationReport | CheckpointReport:
    if "measurement" in values:
        return validate_as(CheckpointReport, values)
    return validate_as(EvaluationReport, values)


def frechet_scores(store: Store, run: str, features: str) -> dict[int, float]:
    """Read the Fréchet distances of a run's checkpoints by one extractor: see `read_scores`."""
    return read_scores(store, run).get(features, {})


def read_scores(store: Store, run: str) -> dict[str, dict[int, float]]:
    """Read the Fréchet distances of the EMA weights of a run's checkpoints.

    Distances compare only where they were measured alike. So of each extractor the measurements of
    one protocol count: of that by which most checkpoints were measured, of equal ones that of most
    samples, then the last by its report's name. Of the same checkpoint the last report by name
    counts.

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
    found: defaultdict[str, dict[str, _Curve]] = defaultdict(dict)
    for images, attempts in sorted(_attempts(run, keys).items()):
        for report, measurement, distance in read_distances(
            store, run, images, keys=sorted(keys), attempts=attempts
        ):
            if measurement.weights == "ema":
                features = distance.features
                curve = found[features].setdefault(
                    measurement.protocol(features), _Curve(measurement.samples, {})
                )
                # Reports come in the order of their names.
                curve.measured[images] = (report, distance.frechet)
    return {
        features: max(curves.values(), key=_Curve.rank).distances
        for features, curves in sorted(found.items())
    }


class _Curve(NamedTuple):
    """Distances by one extractor and one protocol."""

    samples: int
    measured: dict[int, tuple[str, float]]
    """By images, with the report."""

    def rank(self) -> tuple[int, int, str]:
        """Return what decides between curves."""
        return len(self.measured), self.samples, max(report for report, _ in self.measured.values())

    @property
    def distances(self) -> dict[int, float]:
        """The distances by images."""
        return {images: frechet for images, (_, frechet) in self.measured.items()}


def _attempts(run: str, keys: Mapping[str, int]) -> dict[int, set[str]]:
    """Return the attempts that lie in the folder of each committed checkpoint."""
    attempts: defaultdict[int, set[str]] = defaultdict(set)
    for key in keys:
        images = layout.images_of(run, key)
        if images is not None and layout.manifest_key(run, images) in keys:
            attempts[images].add(key.removeprefix(layout.checkpoint_key(run, images)).split("/")[1])
    return attempts
