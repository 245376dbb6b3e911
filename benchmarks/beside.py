"""Training steps while another process measures a checkpoint, against the same steps alone."""

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import torch

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from benchmarks.workload import Latents, TrainingWork, fill
from models.codec import IdentityCodec
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler_config import SamplerConfig
from models.transformer.lapflow import LapFlowTransformer
from trainer.config.shapes import ImageShape
from trainer.evaluation.features import RandomConvFeatures
from trainer.evaluation.samples import ImageSampler

_CLASSES = 10
_DESCRIPTION = """\
The same updates alone, and while a process with a core or a GPU of its own draws and measures
samples, as with eval.during.where=beside. `slower` is by how much of a step.

  python -m benchmarks.beside --threads 1
  python -m benchmarks.beside --device cuda --neighbour cuda:1"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("beside", description=_DESCRIPTION, rounds=7)
    command.add_size(parser, size="B/2", depth=2, batch=8)
    parser.add_argument("--updates", type=command.positive, default=20, help="default 20")
    parser.add_argument("--neighbour", help="device of the process beside; default cpu, or cuda:1")
    options = parser.parse_args(arguments)
    setting = command.setting("beside", options)
    neighbour = options.neighbour or ("cuda:1" if setting.device.type == "cuda" else "cpu")
    if neighbour.startswith("cuda") and torch.cuda.device_count() < 2:
        parser.error(f"--neighbour {neighbour} needs a second GPU; --neighbour cpu does without")
    work = TrainingWork(
        command.sizes(options),
        scales=2,
        latents=Latents(batch=options.batch, channels=options.channels, size=options.image_size),
        device=setting.device,
    )

    def updates() -> None:
        for _ in range(options.updates):
            work()

    with _neighbour(options, neighbour) as process:

        def alone() -> None:
            os.kill(process, signal.SIGSTOP)
            updates()

        def beside() -> None:
            os.kill(process, signal.SIGCONT)
            updates()

        candidates: dict[str, Callable[[], object]] = {"alone": alone, "beside": beside}
        timings = interleave(
            candidates, rounds=options.rounds, stopwatch=stopwatch_of(setting.device)
        )
    for timing in timings:
        setting.report.add(
            steps=timing.name,
            update_s=timing.minimum / options.updates,
            spread=timing.spread,
            slower=timing.ratio - 1,
        )
    setting.deliver()
    return 0


@contextmanager
def _neighbour(options: argparse.Namespace, device: str) -> Iterator[int]:
    """Run the process beside for the length of a `with` block, once it has measured something."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure_for_ever, args=(options, device, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.recv()
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join()


def _measure_for_ever(options: argparse.Namespace, name: str, begun: Connection) -> None:
    torch.set_num_threads(1)
    device = torch.device(name)
    with device:
        network = LapFlowTransformer(
            command.sizes(options),
            scales=2,
            channels=options.channels,
            image_size=options.image_size,
            classes=_CLASSES,
        ).eval()
    fill(network)
    sampler = ImageSampler(
        flow=Flow(FlowConfig(scales=2)),
        sampler=SamplerConfig(steps=4),
        shape=ImageShape(channels=options.channels, size=options.image_size, classes=_CLASSES),
        codec=IdentityCodec(),
        seed=1,
        batch=options.batch,
        device=device,
    )
    extractor = RandomConvFeatures(options.channels)
    labels = torch.arange(options.batch) % _CLASSES
    while True:
        block = sampler.block(network, labels, first=0, size=options.batch)
        extractor(block.images)
        if not begun.closed:
            begun.send("measured")
            begun.close()


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
