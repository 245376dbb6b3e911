"""A whole job on latents encoded before, in steady state, against the bare step of its network."""

import argparse
import contextlib
import gc
import io
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from benchmarks.training_loop import Subject, bare_loop

_DESCRIPTION = """\
Digits are enlarged, encoded once by a small autoencoder with random weights, and trained on by
`python -m trainer.launch` with one worker: shards, loader, engine, hooks, MLflow, checkpoints. Its
fastest interval, without the first one, is set against `benchmarks.bare_loop` on batches in memory,
which is timed before and after. Target: at least 0.97 of the bare loop's images/s.

  python -m benchmarks.whole_job --size XL/2 --depth 28 --batch 96 --precision bf16 --device cuda"""

_FACTOR = 8  # pixels of an image for one element of its latent
_RATE = r'"images_per_s": ([\d.e+]+)'
_LIMIT_S = 600.0
_UPDATES = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("whole_job", description=_DESCRIPTION, rounds=5)
    command.add_size(parser, size="S/2", depth=4, batch=12)
    parser.add_argument("--scales", type=command.positive, default=2, metavar="K", help="default 2")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--intervals", type=command.positive, default=4, help=f"of {_UPDATES} updates; default 4"
    )
    parser.add_argument("settings", nargs="*", help="more settings of the job, as key=value")
    options = parser.parse_args(arguments)
    # So that the job ends with this command.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    setting = command.setting("whole_job", options)
    options.updates = _UPDATES
    with tempfile.TemporaryDirectory(prefix="whole-job-") as place:
        _encode(Path(place), pixels=_FACTOR * options.image_size)
        before = _bare_images_per_s(options, setting.device)
        job = _images_per_s(options, Path(place), on_gpu=setting.device.type == "cuda")
        after = _bare_images_per_s(options, setting.device)
    bare = max(before, after)
    # Where these are far apart, the machine was busy, and the ratio says nothing.
    setting.report.add(
        bare_images_per_s=bare,
        before_over_after=before / after,
        job_images_per_s=job,
        update_s=options.batch / job,
        speed=job / bare,
    )
    setting.deliver()
    return 0


def _bare_images_per_s(options: argparse.Namespace, device: torch.device) -> float:
    """Time the bare loop, and leave the device's memory to the job."""
    bare = bare_loop(Subject(options, scales=options.scales, device=device))
    (timing,) = interleave({"bare": bare}, rounds=options.rounds, stopwatch=stopwatch_of(device))
    del bare
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return float(options.updates * options.batch / timing.minimum)


def _encode(place: Path, *, pixels: int) -> None:
    """Write latents of the digits, and the autoencoder that made them."""
    from pipelines.ingest.digits import ensure_digits
    from tests.support.autoencoder import saved_autoencoder
    from trainer.cli.latents import main as encode

    ensure_digits(str(place / "digits"))
    saved_autoencoder(place / "autoencoder", channels=3)
    words = [place / "digits", place / "latents", "--autoencoder", place / "autoencoder"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = encode([*map(str, words), "--image-size", str(pixels)])
    if code:
        sys.exit(f"error: the latents could not be made, exit code {code}")


def _images_per_s(options: argparse.Namespace, place: Path, *, on_gpu: bool) -> float:
    """Train a job until it has had its intervals, and return the speed of the fastest."""
    from tests.support.job import job

    config = command.sizes(options)
    words = (
        *("+exp=digits", "data.prepare=none", f"data.prefix={place}/latents"),
        *("data.space=latent", f"data.image_size={options.image_size}", "data.channels=4"),
        *("codec.kind=autoencoder_kl", f"codec.source={place}/autoencoder"),
        *(f"model.{name}={getattr(config, name)}" for name in ("depth", "width", "heads")),
        *(f"model.patch_size={config.patch_size}", f"flow.scales={options.scales}"),
        *("flow.critical_times=null", f"train.global_batch={options.batch}"),
        *("train.total_images=100000000", "checkpoint.interval_images=0"),
        *(f"runtime.log_interval_images={_UPDATES * options.batch}", "eval.classifier=false"),
        *("eval.grid_interval_images=0", f"engine.precision={options.precision}"),
        *("cluster.backend=local", "cluster.workers=1", f"cluster.gpus_per_worker={int(on_gpu)}"),
        *options.settings,
        "--events",
    )
    with job(*words, home=place / "home") as launched:
        launched.wait_for(rf"(?s)(?:{_RATE}.*?){{{options.intervals + 1}}}", _LIMIT_S)
        rates = [float(rate) for rate in re.findall(_RATE, launched.output)]
    return max(rates[1:])


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
