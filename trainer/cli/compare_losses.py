"""The command that tells whether two runs have the same losses, and where they part."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from pipelines.addresses import find_path_fault
from pipelines.command import CommandParser, Outcome, command_parser, run
from pipelines.formats import format_table
from trainer.config import paths
from trainer.errors import is_user_error
from trainer.metrics.curves import Curves, CurvesError, Difference, differences, read_curves
from trainer.metrics.mlflow_backend import run_curves, tracking_uri
from trainer.metrics.tracker import TrackingConfig

_DESCRIPTION = """\
Compare the loss curves of two runs, image by image.

  python -m trainer.compare_losses run:digits run:digits-again
  python -m trainer.compare_losses run:before run:after@http://127.0.0.1:5000 --tolerance 1e-6
  python -m trainer.compare_losses tests/golden/losses/two_scales.json now.json

Each side is a JSON file of curves, run:NAME for the newest MLflow run of that name, or
run:NAME@TRACKING_URI for one that is tracked elsewhere than in $LAPFLOW_HOME (~/lapflow)."""

_EPILOG = """\
exit codes: 0 both have the same points and agree at them within the tolerance, 1 they do not,
2 they cannot be compared: one is missing, or they hold different metrics. Points that only one side
has, because it stopped early or logged less often, count as a difference; --common-points passes
over them."""

_DIFFERENT = 1
_RUN = "run:"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(_parser().parse_args, _compare, arguments, is_refusal=is_user_error)


def _compare(options: argparse.Namespace) -> Outcome:
    a, b = (
        _choose(_read(source, experiment=options.experiment), options.metrics, source)
        for source in (options.a, options.b)
    )
    found = differences(a, b, tolerance=options.tolerance)
    same = agree(found, only_common=options.common_points)
    return Outcome(
        describe(found, tolerance=options.tolerance, only_common=options.common_points),
        {"same": same, "tolerance": options.tolerance, "metrics": found},
        0 if same else _DIFFERENT,
    )


def agree(found: Sequence[Difference], *, only_common: bool = False) -> bool:
    """Tell whether all metrics have the same points and agree at them within the tolerance.

    Args:
        found: The differences.
        only_common: Let either side have points that the other lacks.
    """
    return all(one.first_at is None and (only_common or not one.unmatched) for one in found)


def describe(found: Sequence[Difference], *, tolerance: float, only_common: bool = False) -> str:
    """Render differences for a terminal: a line for each metric, and the verdict.

    Args:
        found: The differences.
        tolerance: Relative difference up to which values agree.
        only_common: Whether points that one side lacks are passed over.
    """
    rows = []
    for one in found:
        missing = f", {one.unmatched} more on one side only" if one.unmatched else ""
        parts = [f"{one.points} points{missing}"]
        parts.append(f"largest relative difference {one.largest:.3g} at {one.largest_at:,} images")
        if one.first_at is not None and one.first is not None:
            a, b = one.first
            parts.append(f"first apart at {one.first_at:,} images: {a!r} and {b!r}")
        rows.append((one.metric, "; ".join(parts)))
    verdict = _verdict(found, tolerance=tolerance, only_common=only_common)
    return f"{format_table(rows)}\n{verdict}"


def _verdict(found: Sequence[Difference], *, tolerance: float, only_common: bool) -> str:
    apart = [one.first_at for one in found if one.first_at is not None]
    alone = sum(one.unmatched for one in found)
    same = "the same, " + ("bit for bit" if tolerance == 0 else f"within {tolerance:g}")
    if apart:
        return f"DIFFERENT from {min(apart):,} images on"
    if alone and not only_common:
        return (
            f"DIFFERENT: {alone} points are on one side only; at the others they are {same} "
            "(--common-points asks for no more)"
        )
    return f"{same}, at the points that both have" if alone else same


def _read(source: str, *, experiment: str) -> Curves:
    if not source.startswith(_RUN):
        if fault := find_path_fault(source):
            raise CurvesError(f"{fault} Runs that are tracked are run:NAME or run:NAME@URI.")
        return read_curves(Path(source).expanduser())
    name, _, uri = source.removeprefix(_RUN).partition("@")
    tracking = TrackingConfig(uri=uri or None, experiment=experiment)
    tracked_at = tracking_uri(tracking, str(paths.home_folder(None)))
    return run_curves(tracked_at, experiment=experiment, run=name)


def _choose(curves: Curves, patterns: str, source: str) -> Curves:
    wanted = patterns.split(",")
    chosen = {
        name: curve
        for name, curve in curves.items()
        if any(fnmatch(name, pattern) for pattern in wanted)
    }
    if not chosen:
        raise CurvesError(
            f"{source} has no metric that matches --metrics {patterns}; it has {sorted(curves)}."
        )
    return chosen


def _parser() -> CommandParser:
    parser = command_parser("trainer.compare_losses", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("a", metavar="A", help="FILE.json, run:NAME or run:NAME@TRACKING_URI")
    parser.add_argument("b", metavar="B", help="likewise")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=0.0,
        help="relative difference up to which values agree; default 0, the same bits",
    )
    parser.add_argument(
        "--metrics",
        default="loss/*",
        help="names to compare, with * as a wildcard and commas between; default loss/*",
    )
    parser.add_argument(
        "--common-points",
        action="store_true",
        help="compare where both have a value, and pass over points that only one side has",
    )
    parser.add_argument("--experiment", default="lapflow", help="MLflow experiment of the runs")
    return parser


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 1")
    return value
