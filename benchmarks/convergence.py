"""One training of one and of two scales on small pictures, at the same cost, as far as it takes."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import command, comparison
from benchmarks.command import positive
from models.transformer.cost import training_flops
from pipelines.command import CommandParser
from pipelines.console import say, say_error
from pipelines.formats import format_duration
from pipelines.ingest.__main__ import main as ingest
from trainer.checkpoint.reader import CheckpointReader
from trainer.config import paths
from trainer.config.composition import compose_job
from trainer.planning.placing import model_shape
from trainer.storage.open import open_store

_DESCRIPTION = """\
Trains two scales on a folder of pictures for half of the time, and one scale as long as costs the
same FLOPs. Both go through `python -m trainer.launch` with one worker, on a GPU where there is one.
Then it measures both alike (`benchmarks.comparison`) and says where their grids are. The folder has
one folder of pictures for each class, such as CIFAR-10's.

  python -m benchmarks.convergence cifar10/ --minutes 15 --output convergence
  python -m benchmarks.convergence cifar10/ --minutes 4 --output try model.depth=4"""

_ON_GPU = (
    *("model.depth=12", "model.width=384", "model.heads=6", "train.global_batch=256"),
    *("engine.precision=bf16", "optim.learning_rate=3.0e-4", "train.ema.decay=0.999"),
)
_ENDLESS = 10**9
_STOP_S, _LIMIT_S = 300.0, 7200.0


class ArmFailed(RuntimeError):
    """A training did not come to its end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure and compare; return the exit code."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    shards = options.output / "shards"
    classes = _count_classes(options.images)
    if classes == 0:  # before the training, at whose end guidance would be refused
        parser.error(
            f"{options.images} holds no folder of pictures; give a folder that has one for each "
            "class, such as cifar10/ with cifar10/cat/"
        )
    took_in = ["image-folder", options.images, shards, "--image-size", options.image_size]
    if code := ingest([*map(str, took_in), "--encoding", "png", "--hold-out", "0.1"]):
        return code
    words = [
        *("+exp=cifar10", f"data.prefix={shards}", f"data.image_size={options.image_size}"),
        *(f"data.classes={classes}", "cluster.backend=local", "cluster.workers=1"),
        *(_ON_GPU if torch.cuda.is_available() else ()),
        *options.settings,
    ]
    two = [*words, "flow=two_scales", "run=two-scales"]
    one = [*words, "flow=one_scale", "run=one-scale"]
    try:
        images = train_for(two, seconds=30 * options.minutes, home=options.output)
        train_to(two, images, home=options.output)
        train_to(one, images_of_cost(one, two, images), home=options.output)
    except ArmFailed as error:
        say_error(error)
        return 1
    runs = options.output / "store/runs"
    arms = ("--arm", "one scale", runs / "one-scale", "--arm", "two scales", runs / "two-scales")
    ended = [*map(str, arms), "--home", str(options.output), "--output", str(options.output)]
    return comparison.main([*ended, "--samples", str(options.samples), "--guidance", "1.5"])


def _count_classes(folder: Path) -> int:
    return sum(each.is_dir() for each in folder.iterdir()) if folder.is_dir() else 0


def images_of_cost(words: Sequence[str], other: Sequence[str], images: int) -> int:
    """Return how many images a job trains on for what another one costs with so many.

    Args:
        words: Settings of the job.
        other: Settings of the other one.
        images: Images of the other one.
    """
    job, reference = compose_job(list(words)), compose_job(list(other))
    ratio = training_flops(model_shape(reference)) / training_flops(model_shape(job))
    batch = job.train.global_batch
    return max(1, round(images * ratio / batch)) * batch


def train_for(words: Sequence[str], *, seconds: float, home: Path) -> int:
    """Train for so long and save; return how many images that were.

    Raises:
        ArmFailed: Nothing is saved.
    """
    from tests.support.job import job

    with job(*words, f"train.total_images={_ENDLESS}", home=home) as running:
        try:
            running.wait(seconds)
        except subprocess.TimeoutExpired:
            running.signal(signal.SIGINT)
            running.wait(_STOP_S)
    chosen = compose_job([*words, f"home={home}"])
    store = open_store(paths.runs_uri(chosen), chosen.store)
    newest = CheckpointReader(store, run=chosen.run).newest_valid()
    if newest is None:
        raise ArmFailed(f"{words[-1]} saved nothing in {seconds:.0f} s:\n{running.output}")
    return newest.images


def train_to(words: Sequence[str], images: int, *, home: Path) -> None:
    """Train until so many images, and measure.

    Raises:
        ArmFailed: It ended with another exit code than 0.
    """
    from tests.support.job import job

    began = time.monotonic()
    with job(*words, f"train.total_images={images}", home=home) as running:
        code = running.wait(_LIMIT_S)
    if code:
        raise ArmFailed(f"{' '.join(words)} ended with exit code {code}:\n{running.output}")
    taken = format_duration(time.monotonic() - began)
    say(f"{words[-1]}: {images:,} images, the last launch took {taken}")
    for line in running.output.splitlines():
        if line.startswith(("sample grid", "Fréchet distance")):
            say(f"  {' '.join(line.split())}")


def _parser() -> argparse.ArgumentParser:
    made = CommandParser(
        prog="python -m benchmarks.convergence",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("images", type=Path, help="folder with a folder of pictures for each class")
    made.add_argument("--output", type=Path, required=True, help="folder for runs and results")
    made.add_argument("--minutes", type=float, default=15.0, help="of both trainings; default 15")
    made.add_argument("--image-size", type=positive, default=32, help="default 32")
    made.add_argument("--samples", type=positive, default=1000, help="to measure; default 1000")
    made.add_argument("settings", nargs="*", help="more settings of both runs, as key=value")
    return made


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
