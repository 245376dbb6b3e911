"""What was measured of one checkpoint, as JSON and as a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.console import visible
from pipelines.documents import parse_json, sealed, typed, unsealed


@dataclass(frozen=True, kw_only=True)
class Distance:
    """One extractor's Fréchet distance with what it has to be compared with.

    Attributes:
        features: Name of the extractor; distances of different extractors do not compare.
        frechet: Samples against held-out real images; lower is better.
        frechet_real_halves: One half of the held-out real images against the other; None where
            there were too few for halves.
        held_out_accuracy: For "learned_conv": share of held-out images its classifier reads right.
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
        samples: Samples drawn, classes in equal parts.
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
class CheckpointReport:
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

    def to_json(self) -> bytes:
        """Return the report as JSON that carries its own checksum."""
        return json.dumps(sealed(asdict(self)), indent=2).encode()

    @classmethod
    def from_json(cls, data: bytes) -> CheckpointReport:
        """Rebuild a report from `to_json`.

        Raises:
            DocumentError: It is damaged.
        """
        return typed(cls, unsealed(parse_json(data)))

    def is_of(self, run: str, images: int, measurement: Measurement) -> bool:
        """Tell whether it is what this measurement of that checkpoint gives."""
        return (self.run, self.images, self.measurement.name) == (run, images, measurement.name)

    def distance(self, features: str) -> Distance:
        """Return the figures of one extractor."""
        (found,) = (each for each in self.distances if each.features == features)
        return found


def table(reports: Sequence[CheckpointReport]) -> str:
    """Lay reports out for a terminal, one line for each checkpoint and extractor."""
    head = (
        *("run", "images", "weights", "extractor", "sampler", "guidance", "NFE", "n"),
        *("Fréchet", "real halves", "extractor's accuracy"),
    )
    rows = [
        (
            *(report.run, f"{report.images:,}", report.measurement.weights, distance.features),
            *_sampling(report.measurement.sampler),
            f"{report.network_evaluations:g}",
            f"{report.measurement.samples:,}",
            f"{distance.frechet:.4f}",
            _or_nothing(distance.frechet_real_halves, ".4f"),
            _or_nothing(distance.held_out_accuracy, ".1%"),
        )
        for report in reports
        for distance in report.distances
    ]
    shown = [tuple(map(visible, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *shown, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *shown)
    ]
    return "\n".join(lines)


def _sampling(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return solver with steps, and guidance with the times at which it acts."""
    solver = f"{settings['solver']}"
    steps = "" if solver == "dopri5" else f" {settings['steps']}"
    scale, interval = settings["guidance_scale"], settings["guidance_interval"]
    if scale == 1:
        return f"{solver}{steps}", "none"
    return f"{solver}{steps}", f"{scale:g}" + ("" if interval is None else f" in {interval}")


def _or_nothing(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
