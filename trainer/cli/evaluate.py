"""The command `python -m trainer.evaluate`, which measures checkpoints after the fact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from pipelines.command import Outcome
from pipelines.console import say
from pipelines.formats import format_table
from trainer.cli.command import run_command
from trainer.evaluation.config import CheckpointEvaluationConfig
from trainer.evaluation.figures import Distance
from trainer.evaluation.reports import CheckpointReport
from trainer.evaluation.spread import MeasuredSet, Spread, spreads
from trainer.storage.checkpoint_uri import parse_checkpoint_uri
from trainer.storage.store import StoreConfig

_FAILED = 1
_EXAMPLE = "checkpoint=~/lapflow/store/runs/digits"
_DESCRIPTION = f"""\
Draw samples from a checkpoint and measure their Fréchet distance to held-out real images.

  python -m trainer.evaluate {_EXAMPLE}            its newest checkpoint
  python -m trainer.evaluate {_EXAMPLE} checkpoints=all
  python -m trainer.evaluate {_EXAMPLE} seeds=3    mean and spread
  python -m trainer.evaluate {_EXAMPLE} precision=[fp32,bf16]   and how much they differ
  python -m trainer.evaluate checkpoint=s3://bucket/runs/NAME/checkpoints/000001280000 \\
      store.endpoint_url=http://HOST:PORT samples=10000 features=[random_conv,learned_conv] \\
      sampler.solver=heun sampler.steps=20

Reports and grids are written below the run's evaluation/ folder, or below output=FOLDER."""


def _measure(config: CheckpointEvaluationConfig) -> Outcome:
    # Not for those who ask for help, nor for who lays figures out: it needs torch.
    from trainer.evaluation.checkpoints import UnwrittenReport, evaluate_checkpoints

    try:
        reports = evaluate_checkpoints(config, report=say)
    except UnwrittenReport as error:
        return Outcome(table(error.reports), {"reports": error.reports}, _FAILED, f"{error}")
    tables = [table(reports)]
    values: dict[str, Any] = {"reports": reports}
    if len(config.precisions) > 1:
        differences = differences_of_precision(reports)
        tables.append(precision_table(differences))
        values["precisions"] = [each._asdict() for each in differences]
    if config.seeds > 1 or config.runs:
        over_seeds = spreads(_sets(reports, config.store))
        tables.append(spread_table(over_seeds))
        values["spreads"] = [each.told() for each in over_seeds]
    return Outcome("\n\n".join(tables), values)


def _sets(reports: Sequence[CheckpointReport], config: StoreConfig) -> list[MeasuredSet]:
    """Return the sets of samples with the settings of their runs."""
    from trainer.evaluation.choice import open_checkpoint

    science = {
        uri: open_checkpoint(uri, config)[2].science
        for uri in {report.checkpoint for report in reports}
    }
    return [
        MeasuredSet(
            run=parse_checkpoint_uri(report.checkpoint).run_uri,
            images=report.images,
            science=science[report.checkpoint],
            measurement=report.measurement,
            distance=distance,
        )
        for report in reports
        for distance in report.distances
    ]


def table(reports: Sequence[CheckpointReport]) -> str:
    """Lay reports out for a terminal, one line for each checkpoint, and a table for each protocol.

    The seeds of sets of samples may differ, and are named then.
    """
    seeds = {report.measurement.seed for report in reports}
    further = _shown(reports)
    head = (
        *("run", "images", *["seed"] * (len(seeds) > 1)),
        *("weights", "drawn in", "extractor", "sampler", "guidance", "NFE", "n", "reference"),
        *("Fréchet", "real", *(each.head for each in further)),
        *("diversity", "real", "nearest", "real", "close", "extractor's accuracy"),
    )
    tables: dict[str, list[tuple[str, ...]]] = {}
    for report in reports:
        for distance in report.distances:
            measurement = report.measurement
            protocol = measurement.protocol(distance.features, any_seed=True)
            row = (
                *(report.run, f"{report.images:,}", *[f"{measurement.seed}"] * (len(seeds) > 1)),
                *(measurement.weights, measurement.precision, distance.features),
                *sampling_words(measurement.sampler),
                f"{report.network_evaluations:g}",
                f"{measurement.samples:,}",
                measurement.reference,
                f"{distance.frechet:.4f}",
                _or_nothing(None if distance.real is None else distance.real.frechet, ".4f"),
                *(_or_nothing(each.of(distance), ".4g") for each in further),
                *_beside_real(distance),
                _or_nothing(distance.held_out_accuracy, ".1%"),
            )
            tables.setdefault(protocol, [head]).append(row)
    return "\n\n".join(map(format_table, tables.values() or [[head]]))


class PrecisionDifference(NamedTuple):
    """What another precision changes of a checkpoint's distance, of the same noise and classes."""

    run: str
    images: int
    seed: int
    features: str
    of: str
    """The precision that was asked for first."""
    frechet: float
    """The distance in it."""
    to: str
    """The other precision."""
    other: float
    """The distance in that."""

    @property
    def change(self) -> float:
        """The change, as a share of the distance; 0 where both are 0."""
        return (self.other - self.frechet) / self.frechet if self.frechet else 0.0


def differences_of_precision(reports: Sequence[CheckpointReport]) -> list[PrecisionDifference]:
    """Put each set of samples beside the one that was drawn of the same noise before it.

    Args:
        reports: Those of several precisions, each checkpoint's in the order that was asked for.
    """
    first: dict[tuple[object, ...], tuple[str, float]] = {}
    found = []
    for report in reports:
        precision, seed = report.measurement.precision, report.measurement.seed
        for distance in report.distances:
            place = (report.checkpoint, seed, distance.features)
            of, frechet = first.setdefault(place, (precision, distance.frechet))
            if of != precision:
                found.append(
                    PrecisionDifference(
                        *(report.run, report.images, seed, distance.features),
                        *(of, frechet, precision, distance.frechet),
                    )
                )
    return found


def precision_table(differences: Sequence[PrecisionDifference]) -> str:
    """Lay out what precisions change, one line for each set of samples."""
    head = ("run", "images", "seed", "extractor", "drawn in", "Fréchet", "then in", "Fréchet", "")
    rows = [
        (
            *(each.run, f"{each.images:,}", f"{each.seed}", each.features),
            *(each.of, f"{each.frechet:.4f}", each.to, f"{each.other:.4f}"),
            f"{each.change:+.2%}",
        )
        for each in differences
    ]
    return format_table([head, *rows])


def spread_table(over_seeds: Sequence[Spread]) -> str:
    """Lay figures out over seeds, one line for each, and a table for each protocol."""
    several = len({each.measurement.precision for each in over_seeds}) > 1
    head = (
        *("runs", "images", *["drawn in"] * several, "figure", "mean"),
        *("± sampling", "seeds", "± training", "runs"),
    )
    tables: dict[str, list[tuple[str, ...]]] = {}
    for each in over_seeds:
        rows = tables.setdefault(each.protocol, [head])
        for name, figure in each.figures.items():
            rows.append(
                (
                    *(named(each.runs), f"{each.images:,}"),
                    *([each.measurement.precision] * several),
                    name.removeprefix("eval/"),
                    f"{figure.mean:.4g}",
                    *(_or_nothing(figure.sampling, ".2g"), f"{len(each.seeds)}"),
                    *(_or_nothing(figure.training, ".2g"), f"{len(each.runs)}"),
                )
            )
    return "\n\n".join(map(format_table, tables.values()))


def named(runs: Sequence[str]) -> str:
    """Name a run, or the first of several."""
    first = runs[0].rpartition("/")[2]
    return first if len(runs) == 1 else f"{first} and {len(runs) - 1} more"


class _Column(NamedTuple):
    """A figure beside the Fréchet distance."""

    head: str
    name: str
    is_real: bool = False

    def of(self, distance: Distance) -> float | None:
        told = distance.real if self.is_real else distance
        value: float | None = getattr(told.more, self.name) if told and told.more else None
        return value


_FURTHER = (
    _Column("spatial", "spatial_frechet"),
    _Column("IS", "inception_score"),
    _Column("kernel", "kernel_distance"),
    _Column("precision", "precision"),
    _Column("recall", "recall"),
    _Column("sliced", "sliced_wasserstein"),
    _Column("real", "sliced_wasserstein", is_real=True),
)


def _shown(reports: Sequence[CheckpointReport]) -> list[_Column]:
    """Return the columns of which some report has a figure."""
    distances = [distance for report in reports for distance in report.distances]
    return [
        each for each in _FURTHER if any(each.of(distance) is not None for distance in distances)
    ]


def sampling_words(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return solver with steps, and guidance with the times at which it acts."""
    solver = f"{settings['solver']}"
    steps = "" if solver == "dopri5" else f" {settings['steps']}"
    scale, interval = settings["guidance_scale"], settings["guidance_interval"]
    if scale == 1:
        return f"{solver}{steps}", "none"
    return f"{solver}{steps}", f"{scale:g}" + ("" if interval is None else f" in {interval}")


def _beside_real(distance: Distance) -> tuple[str, ...]:
    """Return variety and nearness of samples beside those of real images."""
    real, nearest = distance.real, distance.nearest
    return (
        _or_nothing(distance.diversity, ".4g"),
        _or_nothing(None if real is None else real.diversity, ".4g"),
        _or_nothing(None if nearest is None else nearest.mean, ".4g"),
        _or_nothing(None if real is None else real.nearest.mean, ".4g"),
        _or_nothing(None if nearest is None else nearest.close_share, ".1%"),
    )


def _or_nothing(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


main = partial(
    run_command,
    CheckpointEvaluationConfig,
    _measure,
    module="trainer.evaluate",
    description=_DESCRIPTION,
    example=_EXAMPLE,
)
"""Runs the command, given its words or none for the process's own, and returns its exit code."""
