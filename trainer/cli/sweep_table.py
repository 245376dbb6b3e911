"""What a sweep comes to: tables of its complete runs, one for each protocol of measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from models.transformer.cost import training_multiply_adds
from pipelines.console import visible
from pipelines.formats import format_table
from trainer.checkpoint.reader import CheckpointReader
from trainer.cli.evaluate import named, sampling_words
from trainer.config import paths
from trainer.config.sweeps import SEED, SweepPoint
from trainer.evaluation.model_record import ModelRecord
from trainer.evaluation.reports import evaluation_key, read_distances
from trainer.evaluation.spread import MeasuredSet, Spread, spreads
from trainer.storage.open import open_store


@dataclass(frozen=True, kw_only=True)
class SweepTable:
    """Figures of one protocol.

    Attributes:
        heading: How they were measured.
        head: What the columns are.
        rows: One for each training; runs that differ in their seed alone share one.
        absent: Complete runs that were not measured so.
        figures: The same for programs.
    """

    heading: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    absent: tuple[str, ...]
    figures: tuple[Spread, ...]


class RunResults(NamedTuple):
    """What a complete run has come to."""

    point: SweepPoint
    """The run."""
    measured: list[MeasuredSet]
    """Sets of samples of its end."""
    multiply_adds: float
    """Of training on one image, by formula: those of the forward pass."""


def read_results(point: SweepPoint) -> RunResults:
    """Read what was measured of a complete run, at its end.

    Raises:
        CheckpointError: A checkpoint makes no sense, or the store fails.
    """
    job = point.job
    store = open_store(paths.runs_uri(job), job.store)
    manifest = CheckpointReader(store, run=job.run).newest_valid()
    if manifest is None:
        return RunResults(point, [], 0.0)
    keys = sorted(store.list(evaluation_key(job.run, manifest.images, "")))
    found = read_distances(store, job.run, manifest.images, keys=keys, attempts={manifest.attempt})
    sets = [
        MeasuredSet(
            run=job.run,
            images=manifest.images,
            science=manifest.science,
            measurement=each.measurement,
            distance=each.distance,
        )
        for each in found
    ]
    return RunResults(point, sets, training_multiply_adds(ModelRecord.of(manifest).sizes))


def tables_of(results: Sequence[RunResults]) -> list[SweepTable]:
    """Lay out what complete runs have come to, the tables of most rows first."""
    protocols: dict[str, list[Spread]] = {}
    for each in spreads([one for result in results for one in _in_arm(result)]):
        protocols.setdefault(each.protocol, []).append(each)
    by_run = {result.point.job.run: result for result in results}
    tables = [_table(each, by_run) for each in protocols.values()]
    return sorted(tables, key=lambda table: -len(table.rows))


def _in_arm(result: RunResults) -> list[MeasuredSet]:
    """Keep runs apart that differ in more than their seed, also where that is no science."""
    arm = {key: value for key, value in result.point.varied.items() if key != SEED}
    return [replace(each, arm=arm) for each in result.measured]


def _table(figures: Sequence[Spread], by_run: Mapping[str, RunResults]) -> SweepTable:
    keys = [key for key in next(iter(by_run.values())).point.varied if key != SEED]
    first = figures[0].measurement
    solver, guidance = sampling_words(first.sampler)
    known = {run for each in figures for run in each.runs}
    names = {name: None for each in figures for name in each.figures}
    further = [name for name in names if "/frechet_" not in name]
    rows = []
    for each in figures:
        run = by_run[each.runs[0]]
        (real, *_) = (one.distance.real for one in run.measured if one.protocol == each.protocol)
        figure = each.frechet
        rows.append(
            (
                *((run.point.varied[key] for key in keys) if keys else (named(each.runs),)),
                f"{each.images:,}",
                f"{run.multiply_adds / 1e9:.3g}",
                f"{figure.mean:.4f}",
                "" if figure.sampling is None else f"{figure.sampling:.2g}",
                "" if figure.training is None else f"{figure.training:.2g}",
                f"{len(each.runs)}",
                "" if real is None else f"{real.frechet:.4f}",
                *(
                    f"{each.figures[name].mean:.4g}" if name in each.figures else ""
                    for name in further
                ),
            )
        )
    return SweepTable(
        heading=f"{figures[0].features}, {first.samples:,} samples ({first.weights}), to "
        f"{first.reference}; {solver}, guidance {guidance}",
        head=(
            *(keys or ("run",)),
            *("images", "GMAC", "Fréchet", "± sampling", "± training", "runs", "real"),
            *(
                name.removeprefix("eval/").removeprefix(f"{figures[0].features}_").replace("_", " ")
                for name in further
            ),
        ),
        rows=tuple(rows),
        absent=tuple(run for run in by_run if run not in known),
        figures=tuple(figures),
    )


def as_text(tables: Sequence[SweepTable]) -> str:
    """Lay tables out for a terminal."""
    return "\n\n".join(
        f"{visible(table.heading)}\n{format_table([table.head, *table.rows])}{_absent(table)}"
        for table in tables
    )


def as_markdown(tables: Sequence[SweepTable]) -> str:
    """Lay tables out for pages."""
    return "\n\n".join(
        f"{as_cell(table.heading)}\n\n"
        + "\n".join(
            f"| {' | '.join(map(as_cell, row))} |"
            for row in (table.head, ["---"] * len(table.head), *table.rows)
        )
        + _absent(table)
        for table in tables
    )


def _absent(table: SweepTable) -> str:
    return f"\n\nnot measured so: {visible(', '.join(table.absent))}" if table.absent else ""


def as_cell(text: str) -> str:
    """Have Markdown show a text as it is."""
    return "".join(f"\\{each}" if each in "\\`*_[]<>|#!" else each for each in visible(text))
