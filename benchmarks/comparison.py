r"""One honest comparison of trained runs: Fréchet distance against images seen and against cost.

Every checkpoint of every run is measured by `trainer.evaluation.checkpoints` in the same way: the
same noise, classes, sampler, extractors and number of samples. What is measured already is read
back, so the command can be stopped, and repeated while the runs still train. The runs of an arm may
differ in their seed alone, and all runs must have been trained on the same images.

    python -m benchmarks.comparison --output comparison \
        --arm "one scale" RUNS/one-0 RUNS/one-1 --arm "two scales" RUNS/two-0 RUNS/two-1

writes comparison.json, comparison.md and comparison.png. The cost is that of training by formula:
6 FLOPs for each multiply-add of the forward pass (2 forward, 4 backward), averaged over the stages
in the shares in which they are trained.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from benchmarks.command import positive
from benchmarks.comparison_picture import draw_picture
from models.flow.sampler_config import SamplerConfig
from models.transformer.cost import training_multiply_adds
from pipelines.command import CommandParser
from pipelines.console import say_error
from trainer.config.job import FeatureName, difference, fingerprinted
from trainer.errors import is_user_error
from trainer.evaluation.checkpoints import evaluate_checkpoints
from trainer.evaluation.choice import open_checkpoint
from trainer.evaluation.config import CheckpointEvaluationConfig, RealImagesConfig, SamplerChoice
from trainer.evaluation.figures import RealFigures
from trainer.evaluation.model_record import ModelRecord
from trainer.evaluation.reports import CheckpointReport
from trainer.storage.errors import CheckpointError
from trainer.storage.store import StoreConfig

FLOPS_PER_MULTIPLY_ADD = 6


class UnlikeRuns(ValueError):
    """Runs that a comparison must not put beside each other."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: What the picture calls them.
        runs: The reports of each run's checkpoints, oldest first.
        science: Settings of the first run.
        training_flops_per_image: Forward and backward pass, by formula.
    """

    name: str
    runs: Mapping[str, Sequence[CheckpointReport]]
    science: Mapping[str, Any]
    training_flops_per_image: float

    def curve(self, run: str, features: str) -> list[tuple[int, float]]:
        """Images seen and distance at each checkpoint of a run."""
        return [(each.images, each.distance(features).frechet) for each in self.runs[run]]

    def mean(self, features: str) -> list[tuple[int, float]]:
        """Mean over the runs at every checkpoint that all of them have."""
        curves = [dict(self.curve(run, features)) for run in self.runs]
        common = sorted(set.intersection(*(set(curve) for curve in curves)))
        return [(images, fmean(curve[images] for curve in curves)) for images in common]

    def teraflops(self, images: float) -> float:
        """Training cost so far, in units of 10^12 operations."""
        return images * self.training_flops_per_image / 1e12


def measure_arm(name: str, runs: Sequence[str], config: CheckpointEvaluationConfig) -> Arm:
    """Measure all checkpoints of an arm's runs.

    Raises:
        UnlikeRuns: If the runs differ in more than their seed.
    """
    reports: dict[str, Sequence[CheckpointReport]] = {}
    manifests = []
    for run in runs:
        found = evaluate_checkpoints(
            replace(config, checkpoint=run, checkpoints="all"), report=print
        )
        reports[run] = found
        manifests.append(open_checkpoint(found[0].checkpoint, config.store)[2])
    for run, manifest in zip(runs, manifests, strict=True):
        if changes := _changes(manifests[0].science, manifest.science):
            raise UnlikeRuns(
                f"the runs of arm {name!r} must differ in their seed alone, but between {runs[0]} "
                f"and {run} there is {'; '.join(changes)}"
            )
    return Arm(
        name=name,
        runs=reports,
        science=manifests[0].science,
        training_flops_per_image=FLOPS_PER_MULTIPLY_ADD
        * training_multiply_adds(ModelRecord.of(manifests[0]).sizes),
    )


def check_alike(arms: Sequence[Arm]) -> None:
    """Refuse arms that were trained on different images, or measured otherwise.

    Raises:
        UnlikeRuns: If they were.
    """
    for arm in arms[1:]:
        if arm.science["data_set"] != arms[0].science["data_set"]:
            raise UnlikeRuns(
                f"arms {arms[0].name!r} and {arm.name!r} were trained on different images; compare "
                "runs of one data set"
            )
    _check_protocols([report for arm in arms for each in arm.runs.values() for report in each])


def _check_protocols(reports: Sequence[CheckpointReport]) -> None:
    first = reports[0].measurement
    for features in first.extractors:
        for report in reports:
            if report.measurement.protocol(features) != first.protocol(features):
                raise UnlikeRuns(
                    f"{report.checkpoint} was measured with {features} by another protocol than "
                    f"{reports[0].checkpoint} ({report.measurement} instead of {first}); measure "
                    "both on one machine, to the same reference"
                )


def as_markdown(arms: Sequence[Arm]) -> str:
    """Render the conditions and one table for each extractor."""
    first = next(iter(arms[0].runs.values()))[-1]
    asked = first.measurement
    lines = [
        f"{asked.samples:,} samples ({asked.weights}, noise seed {asked.seed}, the same for all) "
        f"against {first.real_images:,} held-out images; sampler "
        + ", ".join(f"{key}={value}" for key, value in asked.sampler.items())
        + ".",
        "",
    ]
    for arm in arms[1:]:
        changes = _changes(arms[0].science, arm.science) or ["nothing"]
        lines += [f"{arm.name} differs from {arms[0].name} in {'; '.join(changes)}.", ""]
    for arm in arms:
        evaluations = next(iter(arm.runs.values()))[-1].network_evaluations
        lines.append(
            f"- {arm.name}: {arm.training_flops_per_image / 1e9:.3f} GFLOP of training an image, "
            f"{evaluations:g} network evaluations a sample, runs of {len(arm.runs)} seeds"
        )
    for distance in first.distances:
        accuracy = distance.held_out_accuracy
        reads = "" if accuracy is None else f"; its classifier reads {accuracy:.1%} of held-out"
        lines += [
            "",
            f"Fréchet distance with `{distance.features}`, mean over seeds (each seed); real "
            f"training images in the place of samples: {_format(distance.real)}{reads}.",
            "",
            "| images | " + " | ".join(f"{arm.name} | TFLOP" for arm in arms) + " |",
            "| --- |" + " --- | --- |" * len(arms),
        ]
        means = [dict(arm.mean(distance.features)) for arm in arms]
        for images in sorted(set.intersection(*(set(mean) for mean in means))):
            cells = [
                f"{mean[images]:.4f} ({_each(arm, distance.features, images)}) "
                f"| {arm.teraflops(images):.1f}"
                for arm, mean in zip(arms, means, strict=True)
            ]
            lines.append(f"| {images:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def as_json(arms: Sequence[Arm]) -> str:
    """Render everything that was measured."""
    return json.dumps(
        [
            {
                "arm": arm.name,
                "training_flops_per_image": arm.training_flops_per_image,
                "science": arm.science,
                "runs": {
                    run: [asdict(report) for report in reports] for run, reports in arm.runs.items()
                },
            }
            for arm in arms
        ],
        indent=1,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if short := [arm[0] for arm in options.arm if len(arm) == 1]:
        parser.error(f"--arm {short[0]}: give a name and then the URI of at least one run")
    try:
        config = CheckpointEvaluationConfig(
            checkpoint="",
            samples=options.samples,
            batch=options.batch,
            seed=options.seed,
            weights=options.weights,
            # All of it, or each run would keep what it has of its own.
            sampler=SamplerChoice(
                **asdict(
                    SamplerConfig(
                        solver=options.solver,
                        steps=options.steps,
                        guidance_scale=options.guidance,
                        guidance_interval=(0.0, 1.0),
                    )
                )
            ),
            features=tuple(options.features),
            data=RealImagesConfig(prefix=options.data_prefix),
            output=options.evaluations,
            home=options.home,
            device=options.device,
            store=StoreConfig(endpoint_url=options.endpoint_url),
        )
        arms = [measure_arm(name, runs, config) for name, *runs in options.arm]
        check_alike(arms)
    except (CheckpointError, ValueError) as error:
        if not is_user_error(error) and not isinstance(error, CheckpointError | UnlikeRuns):
            raise
        say_error(error)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "comparison.json").write_text(as_json(arms))
    (options.output / "comparison.md").write_text(as_markdown(arms))
    draw_picture(arms, options.features, options.output / "comparison.png")
    print(as_markdown(arms))
    return 0


def _format(real: RealFigures | None) -> str:
    return "not measured" if real is None else f"{real.frechet:.4f}"


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Settings that differ, the seed aside."""
    found = difference(fingerprinted(before), fingerprinted(after))
    return [change for change in found if not change.startswith("train.seed:")]


def _each(arm: Arm, features: str, images: int) -> str:
    return ", ".join(f"{dict(arm.curve(run, features))[images]:.4f}" for run in arm.runs)


def _parser() -> argparse.ArgumentParser:
    made = CommandParser(
        prog="python -m benchmarks.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--arm",
        action="append",
        nargs="+",
        required=True,
        metavar="NAME RUN",
        help="a name and the URIs of runs that differ in their seed; give it once for each arm",
    )
    made.add_argument("--output", type=Path, required=True, help="folder for the results")
    made.add_argument(
        "--evaluations", help="folder or s3:// prefix for the reports; default the runs' own"
    )
    made.add_argument("--data-prefix", help="the data set's shards, if not in the runs' store")
    made.add_argument(
        "--features",
        nargs="+",
        choices=get_args(FeatureName),
        default=["learned_conv", "random_conv"],
        help="extractors",
    )
    made.add_argument("--endpoint-url", help="S3 service of the runs, other than AWS")
    made.add_argument("--samples", type=positive, default=1000)
    made.add_argument("--batch", type=positive, default=125)
    made.add_argument("--seed", type=int, default=1, help="of the noise, the same for all")
    made.add_argument("--weights", choices=["ema", "master"], default="ema")
    made.add_argument("--solver", default="heun")
    made.add_argument("--steps", type=positive, default=10)
    made.add_argument("--guidance", type=float, default=1.0, help="scale; 1 is none")
    made.add_argument("--device", default="auto")
    made.add_argument("--home", help="folder for caches; default $LAPFLOW_HOME or ~/lapflow")
    return made


if __name__ == "__main__":
    sys.exit(main())
