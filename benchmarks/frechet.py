"""Time of the Fréchet distance beside torch-fidelity's, and memory of the sums it is made of."""

import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from trainer.evaluation.feature_sets import FeatureSet, spread_evenly
from trainer.evaluation.frechet import FeatureStatistics, frechet_distance
from trainer.evaluation.layout import Layout

_LAYOUT = Layout(spatial=2023, logits=1008)
_COMPARED = 5000
_AT_ONCE = 256
_DESCRIPTION = """\
Seconds of one Fréchet distance between statistics of 2,048 features, as `trainer.evaluate` computes
it (`ours`) and as torch-fidelity does, for covariances of full rank and of few images; and, with
--images, the peak memory of a process that takes so many images' values of Inception's size.

  python -m benchmarks.frechet --processor-time
  python -m benchmarks.frechet --images 5000,50000"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("frechet", description=_DESCRIPTION, rounds=3)
    parser.add_argument("--features", type=command.positive, default=2048)
    parser.add_argument(
        "--images", type=command.whole_numbers, default=(), help="measure memory instead"
    )
    command.add_processor_time(parser)
    options = parser.parse_args(arguments)
    options.device = "cpu"
    setting = command.setting("frechet", options)
    if options.images:
        context = multiprocessing.get_context("spawn")
        for images in options.images:
            with context.Pool(1) as pool:
                setting.report.add(images=images, peak_mib=pool.apply(_peak_mib, (images,)))
        setting.deliver()
        return 0
    for name, images in (("full rank", 2 * options.features), ("few images", 500)):
        one, two = (_statistics(images, options.features, seed) for seed in (1, 2))
        works: dict[str, Callable[[], object]] = {
            "torch-fidelity": partial(_fidelity, one, two),
            "ours": partial(frechet_distance, one, two),
        }
        stopwatch = stopwatch_of(setting.device, processor=options.processor_time)
        timings = interleave(works, rounds=options.rounds, stopwatch=stopwatch)
        distances = {"torch-fidelity": _fidelity(one, two), "ours": frechet_distance(one, two)}
        for timing in timings:
            setting.report.add(
                covariances=name,
                way=timing.name,
                minimum_s=timing.minimum,
                spread=timing.spread,
                of_fidelity=timing.ratio,
                distance=distances[timing.name],
            )
    setting.deliver()
    return 0


def _statistics(images: int, features: int, seed: int) -> FeatureStatistics:
    """Statistics of features whose variances fall off as those of a network do."""
    generator = np.random.default_rng(seed)
    spread = 1 / np.sqrt(np.arange(1, features + 1))
    drawn = np.abs(generator.normal(size=(images, features)) * spread) + seed * 0.01
    return FeatureStatistics(mean=drawn.mean(0), covariance=np.cov(drawn, rowvar=False))


def _fidelity(one: FeatureStatistics, two: FeatureStatistics) -> float:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    told: list[dict[str, NDArray[np.float64]]] = [
        {"mu": each.mean, "sigma": each.covariance} for each in (one, two)
    ]
    return float(fid_statistics_to_metric(*told, verbose=False)[KEY_METRIC_FID])


def _peak_mib(images: int) -> float:
    """Take so many images' values, and return the most memory that this process has had."""
    generator = torch.Generator().manual_seed(0)
    taken = FeatureSet(classes=1000, kept=spread_evenly(images, _COMPARED), layout=_LAYOUT)
    width = 2048 + _LAYOUT.spatial + _LAYOUT.logits
    for first in range(0, images, _AT_ONCE):
        indices = torch.arange(first, min(first + _AT_ONCE, images))
        taken.take(torch.rand(len(indices), width, generator=generator), indices % 1000, indices)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
