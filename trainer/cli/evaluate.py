"""The command `python -m trainer.evaluate`, which measures checkpoints after the fact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from pipelines.command import Outcome
from pipelines.console import say
from pipelines.formats import format_table
from trainer.cli.command import run_command
from trainer.evaluation.checkpoints import (
    CheckpointEvaluationConfig,
    UnwrittenReport,
    evaluate_checkpoints,
)
from trainer.evaluation.measures import Distance
from trainer.evaluation.reports import CheckpointReport

_FAILED = 1
_EXAMPLE = "checkpoint=~/lapflow/store/runs/digits"
_DESCRIPTION = f"""\
Draw samples from a checkpoint and measure their Fréchet distance to held-out real images.

  python -m trainer.evaluate {_EXAMPLE}            its newest checkpoint
  python -m trainer.evaluate {_EXAMPLE} checkpoints=all
  python -m trainer.evaluate checkpoint=s3://bucket/runs/NAME/checkpoints/000001280000 \\
      store.endpoint_url=http://HOST:PORT samples=10000 features=[random_conv,learned_conv] \\
      sampler.solver=heun sampler.steps=20

Reports and grids are written below the run's evaluation/ folder, or below output=FOLDER."""


def _measure(config: CheckpointEvaluationConfig) -> Outcome:
    try:
        reports = evaluate_checkpoints(config, report=say)
    except UnwrittenReport as error:
        return Outcome(table(error.reports), {"reports": error.reports}, _FAILED, f"{error}")
    return Outcome(table(reports), {"reports": reports})


def table(reports: Sequence[CheckpointReport]) -> str:
    """Lay reports out for a terminal, one line for each checkpoint and extractor."""
    further = _shown(reports)
    head = (
        *("run", "images", "weights", "extractor", "sampler", "guidance", "NFE", "n"),
        "reference",
        *("Fréchet", "real"),
        *(each.head for each in further),
        *("diversity", "real", "nearest", "real", "close"),
        "extractor's accuracy",
    )
    rows = [
        (
            *(report.run, f"{report.images:,}", report.measurement.weights, distance.features),
            *_sampling(report.measurement.sampler),
            f"{report.network_evaluations:g}",
            f"{report.measurement.samples:,}",
            report.measurement.reference,
            f"{distance.frechet:.4f}",
            _or_nothing(None if distance.real is None else distance.real.frechet, ".4f"),
            *(_or_nothing(each.of(distance), ".4g") for each in further),
            *_beside_real(distance),
            _or_nothing(distance.held_out_accuracy, ".1%"),
        )
        for report in reports
        for distance in report.distances
    ]
    return format_table([head, *rows])


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


def _sampling(settings: Mapping[str, Any]) -> tuple[str, str]:
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
