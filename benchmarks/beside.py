"""Training steps while another process measures a checkpoint, against the same steps alone.

Cores of one processor share its clock and its power, so one that works slows another whatever it
works on. Therefore a third candidate has the other core multiply matrices that never leave its own
first cache: what a measurement costs beyond that is its own.
"""

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
The same updates alone, beside a process that multiplies matrices in the first cache of its own
core, and beside one with a core or a GPU of its own that draws and measures samples, as with
eval.during.where=beside. `slower` is by how much of a step alone, `slower_than_busy` by how much of
one beside the multiplications: what the two share but a processor's clock.

  python -m benchmarks.beside --threads 1
  python -m benchmarks.beside --device cuda --neighbour cuda:1"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("beside", description=_DESCRIPTION, rounds=15)
    command.add_size(parser, size="B/2", depth=2, batch=8)
    parser.add_argument("--updates", type=command.positive, default=5, help="of a turn; default 5")
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

    with (
        _neighbour(_multiply_for_ever) as busy,
        _neighbour(_measure_for_ever, options, neighbour) as measuring,
    ):

        def beside(*working: int) -> Callable[[], object]:
            def turn() -> None:
                for process in (busy, measuring):
                    os.kill(process, signal.SIGCONT if process in working else signal.SIGSTOP)
                updates()

            return turn

        timings = interleave(
            {"alone": beside(), "beside busy": beside(busy), "beside measuring": beside(measuring)},
            rounds=options.rounds,
            stopwatch=stopwatch_of(setting.device),
        )
    alone, among_busy, _ = timings
    for timing in timings:
        setting.report.add(
            steps=timing.name,
            update_s=timing.minimum / options.updates,
            spread=timing.spread,
            slower=timing.minimum / alone.minimum - 1,
            slower_than_busy=timing.minimum / among_busy.minimum - 1,
        )
    setting.deliver()
    return 0


@contextmanager
def _neighbour(work: Callable[..., None], *arguments: object) -> Iterator[int]:
    """Run a process beside for the length of a `with` block, once it is at work."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.recv()
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join()


def _multiply_for_ever(begun: Connection) -> None:
    torch.set_num_threads(1)
    # Three of them take 27 of the 32 KiB and more that first caches have.
    left, right, product = (torch.rand(48, 48) for _ in range(3))
    torch.mm(left, right, out=product)
    begun.send("busy")
    while True:
        torch.mm(left, right, out=product)


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
