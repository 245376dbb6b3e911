"""What it costs to draw a set of samples, beside the bare loop of network calls."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from benchmarks.workload import fill
from cluster.contract import Message, WorkerContext
from models.codec import IdentityCodec
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler_config import SamplerConfig
from models.transformer.lapflow import LapFlowTransformer
from trainer.config.reading import to_dict
from trainer.config.shapes import ImageShape
from trainer.evaluation.config import FormatName
from trainer.evaluation.drawing import PartDrawer
from trainer.evaluation.sample_formats import FORMATS
from trainer.evaluation.sample_set import SamplePlan, SampleSet
from trainer.evaluation.samples import ImageSampler
from trainer.storage.open import open_store
from trainer.storage.store import StoreConfig

_CLASSES = 1000
_DESCRIPTION = """\
Images per second of one worker of `trainer.sample n=…`: noise drawn image by image, pixels made,
encoded and written durably into a folder while the next part is drawn, in each format; against
`bare`, which calls the solver on noise that is there and does nothing with the images.

  python -m benchmarks.sample_sets
  python -m benchmarks.sample_sets --size B/2 --depth 12 --image-size 64 --device cuda"""


class Sets:
    """Draws the same samples barely, or as a set in a fresh folder.

    Args:
        sampler: Decides the samples.
        model: Velocity model.
        count: How many.
        part: How many in a part.
        folder: Where sets go.
    """

    def __init__(
        self,
        sampler: ImageSampler,
        model: LapFlowTransformer,
        *,
        count: int,
        part: int,
        folder: str,
    ) -> None:
        self._sampler, self._model = sampler, model
        self._count, self._part = count, part
        self._folder = folder
        self._noise = sampler.noise(first=0, count=count)
        self._labels = torch.arange(count) % _CLASSES

    def bare(self) -> Tensor:
        """Call the solver batch by batch."""
        size = self._sampler.batch
        for first in range(0, self._count, size):
            batch = slice(first, first + size)
            drawn = self._sampler.from_noise(self._model, self._noise[batch], self._labels[batch])
        return drawn.images

    def kept(self, form: FormatName) -> None:
        """Draw and keep all parts as a worker does."""
        plan = SamplePlan(
            run="benchmark",
            images=0,
            attempt="",
            weights="ema",
            sampler=to_dict(self._sampler.sampler),
            seed=self._sampler.seed,
            batch=self._sampler.batch,
            classes=tuple(range(_CLASSES)),
            samples=self._count,
            part_samples=self._part,
            format=form,
        )
        with tempfile.TemporaryDirectory(dir=self._folder) as place:
            samples = SampleSet(open_store(place, StoreConfig()), plan)
            samples.claim()
            told: list[Message] = []
            context = WorkerContext(
                rank=0,
                world_size=1,
                local_rank=0,
                local_world_size=1,
                attempt=0,
                device=str(self._sampler.device),
                stop_requested=lambda: False,
                report=told.append,
            )
            drawer = PartDrawer(context, self._sampler, self._model, plan, samples)
            drawer.draw(range(plan.parts))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("sample_sets", description=_DESCRIPTION, rounds=3)
    command.add_size(parser, size="tiny", depth=None, batch=16)
    command.add_processor_time(parser)
    parser.set_defaults(channels=3)
    parser.add_argument("--samples", type=command.positive, default=64)
    parser.add_argument("--part", type=command.positive, default=32, help="samples in a part")
    parser.add_argument("--scales", type=command.positive, default=2, metavar="K")
    parser.add_argument("--steps", type=command.positive, default=20)
    parser.add_argument("--folder", type=Path, help="where sets go; default the temporary one")
    options = parser.parse_args(arguments)
    setting = command.setting("sample_sets", options)
    torch.manual_seed(0)
    with setting.device:
        network = LapFlowTransformer(
            command.sizes(options),
            scales=options.scales,
            channels=options.channels,
            image_size=options.image_size,
            classes=_CLASSES,
        ).eval()
    fill(network)
    sampler = ImageSampler(
        flow=Flow(FlowConfig(scales=options.scales)),
        sampler=SamplerConfig(steps=options.steps),
        shape=ImageShape(channels=options.channels, size=options.image_size, classes=_CLASSES),
        codec=IdentityCodec(),
        seed=1,
        batch=options.batch,
        device=setting.device,
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sets = Sets(sampler, network, count=options.samples, part=options.part, folder=folder)
        works: dict[str, Callable[[], object]] = {"bare": sets.bare}
        works.update((form, partial(sets.kept, form)) for form in FORMATS)
        stopwatch = stopwatch_of(setting.device, processor=options.processor_time)
        timings = interleave(works, rounds=options.rounds, stopwatch=stopwatch)
    for timing in timings:
        setting.report.add(
            way=timing.name,
            minimum_s=timing.minimum,
            spread=timing.spread,
            images_per_s=options.samples / timing.minimum,
            of_bare=1 / timing.ratio,
        )
    setting.deliver()
    return 0


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
