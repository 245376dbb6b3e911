"""Training by engine, loop, hooks and metrics, against a bare torch loop and diffusers' DiT."""

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import command
from benchmarks.bare_loop import BareLoop
from benchmarks.interleaved import interleave, stopwatch_of
from benchmarks.workload import fill
from cluster.hardware import peak_tflops
from cluster.placement import Placement
from models.axes import Bands
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.objective import Objective
from models.pyramid import split
from models.transformer.cost import ModelShape, training_flops
from models.transformer.lapflow import LapFlowTransformer, OnBuilt, no_op
from pipelines.loading.loader import Batch, Cursor, Loader
from trainer.config.job import TrainConfig
from trainer.engine.build import build_engine
from trainer.engine.optimizer import OptimConfig
from trainer.engine.protocol import EngineConfig
from trainer.metrics.buffer import MetricBuffer
from trainer.metrics.node_use import NodeUse
from trainer.metrics.tracker import Tracker
from trainer.state import TrainState
from trainer.training.goodput import TimeTeller
from trainer.training.hooks import Hook, LossWatch, Progress
from trainer.training.loop import StopVote, train
from trainer.training.phases import PhaseClock
from trainer.training.speed import Load, Throughput
from trainer.training.step import TrainStep

_DESCRIPTION = """\
Updates of `trainer.training.loop.train`, with the plain engine, AdamW, EMA, hooks and metrics that
are told once in a round, beside the same network in `benchmarks.bare_loop`, and for K = 1 beside
the DiT of diffusers at equal width and depth in that loop. Batches lie in memory. `ratio` is to the
bare loop of the same K.

  python -m benchmarks.training_loop
  python -m benchmarks.training_loop --size XL/2 --depth 28 --batch 96 --scales 1,2 \\
      --against bare --compile blocks --precision bf16"""

_CLASSES = 1000
_BATCHES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("training_loop", description=_DESCRIPTION, rounds=7)
    command.add_size(parser, size="S/2", depth=4, batch=12)
    parser.add_argument("--scales", type=command.whole_numbers, default=(1, 2, 3), metavar="K,K")
    parser.add_argument("--updates", type=command.positive, default=2, help="of a round; default 2")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", choices=["off", "blocks"], default="off")
    parser.add_argument(
        "--against",
        choices=["all", "bare", "none"],
        default="all",
        help="all is the bare loop and, for K = 1, diffusers' DiT; none where memory is short",
    )
    options = parser.parse_args(arguments)
    if any(options.batch % scales for scales in options.scales):
        parser.error(f"--batch {options.batch} must be a multiple of every K in {options.scales}")
    setting = command.setting("training_loop", options)
    for scales in options.scales:
        _measure(Subject(options, scales=scales, device=setting.device), setting.report)
        gc.collect()
    setting.deliver()
    return 0


@dataclass(frozen=True)
class Subject:
    """What is trained: sizes, flow and data, alike for all candidates.

    Attributes:
        options: The command's.
        scales: Number of scales, K.
        device: Where it is trained.
    """

    options: argparse.Namespace
    scales: int
    device: torch.device

    @property
    def flow(self) -> Flow:
        """The flow over so many scales."""
        return Flow(FlowConfig(scales=self.scales))

    @property
    def sizes(self) -> dict[str, int]:
        """What a model is built for."""
        given = self.options
        return {"channels": given.channels, "image_size": given.image_size, "classes": _CLASSES}

    @property
    def shape(self) -> ModelShape:
        """All sizes of the model."""
        return ModelShape.of(command.sizes(self.options), scales=self.scales, **self.sizes)

    @property
    def noise_size(self) -> int:
        """Normal numbers of an image."""
        given = self.options
        return self.flow.noise_size(channels=given.channels, image_size=given.image_size)

    def model(self, on_built: OnBuilt = no_op) -> LapFlowTransformer:
        """Build the network."""

        def filled(part: nn.Module) -> None:
            fill(part)
            on_built(part)

        torch.manual_seed(0)
        config = command.sizes(self.options)
        return LapFlowTransformer(config, scales=self.scales, on_built=filled, **self.sizes)

    def batches(self) -> list[tuple[Bands, Tensor]]:
        """Make a few batches on the device."""
        given, found = self.options, []
        generator = torch.Generator().manual_seed(1)
        for _ in range(_BATCHES):
            size = (given.batch, given.channels, given.image_size, given.image_size)
            images = torch.randn(size, generator=generator).to(self.device)
            labels = torch.randint(_CLASSES, (given.batch,), generator=generator)
            found.append((split(images, self.scales), labels.to(self.device)))
        return found


class Looped:
    """The product: some updates of its loop in each call, and one progress line.

    Args:
        subject: What is trained.
    """

    def __init__(self, subject: Subject) -> None:
        given, device = subject.options, subject.device
        config = TrainConfig(global_batch=given.batch, total_images=10**9)
        optim, metrics = OptimConfig(), MetricBuffer(device)
        self._interval = given.updates * given.batch
        engine = build_engine(
            subject.model,
            config=EngineConfig(kind="plain", precision=given.precision, compile=given.compile),
            placement=Placement.of({}, scales=subject.scales),
            optim=optim,
            ema=config.ema,
            micro_batch=given.batch,
            rank_batch=given.batch,
            world_size=1,
            device=device,
        )
        watch = LossWatch(
            device,
            interval_images=self._interval,
            total_images=config.total_images,
            patience_updates=config.max_skipped_updates,
            optim=optim,
            precision=given.precision,
        )
        self._step = TrainStep(
            engine=engine,
            objective=Objective(subject.flow),
            config=config,
            optim=optim,
            metrics=metrics,
            noise_size=subject.noise_size,
            null_label=_CLASSES,
            micro_batch=given.batch,
            device=device,
            watch=watch,
        )
        self.told: list[Mapping[str, object]] = []
        self._state = TrainState()
        self._hooks = [*self._passive(subject, metrics), watch]
        self._loader = InMemory(subject.batches())

    def _passive(self, subject: Subject, metrics: MetricBuffer) -> list[Hook]:
        return [
            TimeTeller(PhaseClock(), lambda _: None, attempt=0),
            Progress(
                metrics=metrics,
                tracker=Tracker(),
                report=self.told.append,
                interval_images=self._interval,
                total_images=10**9,
                throughput=Throughput(0),
                load=Load.of(subject.shape, devices=1, device=subject.device),
                rank=0,
                node=NodeUse(rank=0, local_rank=0, world_size=1, device=subject.device),
            ),
        ]

    def __call__(self) -> None:
        """Train some updates."""
        train(
            self._state,
            loader=cast(Loader, self._loader),
            step=self._step,
            hooks=self._hooks,
            stop=StopVote(lambda: False),
            total_images=self._state.images + self._interval,
            rank=0,
            advance=lambda _: None,
        )


class InMemory:
    """Batches that are there, as the loader gives them.

    Args:
        batches: Bands and labels, one after the other, over and over.
    """

    data_wait_s = 0.0

    def __init__(self, batches: Sequence[tuple[Bands, Tensor]]) -> None:
        self._batches = batches

    def batches(self, cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        """Yield batches from a place in the run on."""
        while True:
            size = len(self._batches[0][1])
            bands, labels = self._batches[cursor.images // size % len(self._batches)]
            cursor = replace(cursor, images=cursor.images + size)
            ids = torch.arange(size)
            batch = Batch(bands=bands, labels=labels, sample_ids=ids, skipped=0)
            yield batch, cursor


def _dit(subject: Subject) -> BareLoop:
    from diffusers import DiTTransformer2DModel

    config, make = command.sizes(subject.options), cast(Any, DiTTransformer2DModel)
    model = make(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=subject.options.channels,
        num_layers=config.depth,
        sample_size=subject.options.image_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=_CLASSES,
        norm_eps=1e-6,
    ).to(subject.device)
    fill(model)

    def velocity(states: Bands, time: Tensor, labels: Tensor) -> Bands:
        (state,) = states
        return (model(state, timestep=1000 * time, class_labels=labels).sample,)

    return bare_loop(subject, model, velocity)


def bare_loop(subject: Subject, network: nn.Module | None = None, velocity: Any = None) -> BareLoop:
    """Make the bare loop of a subject.

    Args:
        subject: What is trained.
        network: Another network than the subject's.
        velocity: Calls it; None if it is called as it is.
    """
    return BareLoop(
        network or subject.model().to(subject.device),
        velocity=velocity,
        objective=Objective(subject.flow),
        batches=subject.batches(),
        noise_size=subject.noise_size,
        null_label=_CLASSES,
        precision=subject.options.precision,
        updates=subject.options.updates,
    )


def _measure(subject: Subject, report: command.Report) -> None:
    given = subject.options
    candidates: dict[str, Callable[[], object]] = {}
    if given.against != "none":
        candidates["bare"] = bare_loop(subject)
    candidates["loop"] = Looped(subject)
    if given.against == "all" and subject.scales == 1:
        candidates["diffusers' DiT"] = _dit(subject)
    stopwatch = stopwatch_of(subject.device)
    timings = interleave(candidates, rounds=given.rounds, stopwatch=stopwatch, warmup=2)
    flops = training_flops(subject.shape)
    on_gpu = subject.device.type == "cuda"
    peak = peak_tflops(torch.cuda.get_device_name(subject.device)) if on_gpu else None
    for timing in timings:
        images_per_s = given.updates * given.batch / timing.minimum
        tflops = images_per_s * flops / 1e12
        report.add(
            scales=subject.scales,
            who=timing.name,
            update_s=timing.minimum / given.updates,
            spread=timing.spread,
            images_per_s=images_per_s,
            ratio=timing.ratio,
            tflops=tflops,
            mfu=tflops / peak if peak else None,
        )


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
