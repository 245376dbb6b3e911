"""Sampling speed: batch sizes, precision, graphs, batched segments, and shared coarse scales."""

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from benchmarks.workload import Latents, fill
from models.axes import Bands, VelocityModel
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler import sample
from models.flow.sampler_config import SamplerConfig, nfe_per_segment
from models.transformer.cost import ModelShape, multiply_adds, varied_multiply_adds
from models.transformer.lapflow import LapFlowTransformer
from trainer.evaluation.config import Precision
from trainer.evaluation.graphs import CudaRecorder, GraphedNetwork
from trainer.evaluation.precision import products_in

_CLASSES = 1000
_WAYS = ("fp32", "bf16", "fp32 compiled", "bf16 compiled")
_GPU_WAYS = ("tf32", "tf32 graphs", "bf16 graphs")
_DESCRIPTION = """\
Images per second of the sampler. bf16 is the network cast to bfloat16 with float32 states. Compiled
networks have static shapes, one graph for each number of active scales, and run as CUDA graphs on a
GPU; compiling is not timed. `graphs` are those of `trainer.sample graphs=true`, on a GPU alone, as
tf32 is. With --share-coarse N, `shared` draws as many images of N variations for each layout; the
speed-up by formula is that of their multiply-adds. Where there are more images than --finest-batch,
`segments` draws them with that many to a network call when all scales are active and more in the
coarse segments, against `chunks`, which draws the same images in batches of that size from start to
end.

  python -m benchmarks.sampling
  python -m benchmarks.sampling --batches 16 --ways fp32 --scales 3 --share-coarse 8
  python -m benchmarks.sampling --size XL/2 --scales 3 --steps 20 --guidance 1.5 --device cuda"""


class Drawing:
    """Draws a batch of images with one network.

    Args:
        network: The network.
        flow: Its flow.
        config: Solver and steps.
        latents: How many images, and their shape.
        device: Where to draw.
        finest_batch: Images in one network call when all scales are active; None takes all.
        chunk: Draw in batches of this size from start to end; None takes all images at once.
        precision: What the network computes in.
        share_coarse: How many images are variations of one layout.
    """

    def __init__(
        self,
        network: VelocityModel,
        *,
        flow: Flow,
        config: SamplerConfig,
        latents: Latents,
        device: torch.device,
        finest_batch: int | None = None,
        chunk: int | None = None,
        precision: Precision = "fp32",
        share_coarse: int = 1,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        numbers = flow.noise_size(channels=latents.channels, image_size=latents.size)
        self._network = network
        self._flow = flow
        self._config = config
        self._latents = latents
        self._noise = torch.randn(latents.batch, numbers, generator=generator, device=device)
        self._labels = torch.arange(latents.batch, device=device) % _CLASSES
        self._finest_batch = finest_batch
        self._chunk = chunk or latents.batch
        self._precision = precision
        self._share_coarse = share_coarse

    def __call__(self) -> Tensor:
        """Draw the images."""
        batches = zip(
            torch.split(self._noise, self._chunk),
            torch.split(self._labels, self._chunk),
            strict=True,
        )
        with products_in(self._precision, self._noise.device):
            return torch.cat([self._draw(noise, labels) for noise, labels in batches])

    def _draw(self, noise: Tensor, labels: Tensor) -> Tensor:
        return sample(
            self._network,
            flow=self._flow,
            config=self._config,
            noise=noise,
            labels=labels,
            channels=self._latents.channels,
            image_size=self._latents.size,
            null_label=_CLASSES,
            finest_batch=self._finest_batch,
            share_coarse=self._share_coarse,
        ).images


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = _parse(arguments)
    setting = command.setting("sampling", options)
    device, ways = setting.device, options.ways.split(",")
    torch.manual_seed(0)
    with device:
        network = LapFlowTransformer(
            command.sizes(options),
            scales=options.scales,
            channels=options.channels,
            image_size=options.image_size,
            classes=_CLASSES,
        ).eval()
    fill(network)
    networks = {"fp32": network, "tf32": network, "bf16": copy.deepcopy(network).bfloat16()}
    for images in options.batches:
        if any(way.endswith("compiled") for way in ways):
            # Graphs of other batch sizes would count against the limit of graphs for one network.
            torch.compiler.reset()
        works = _works(options, networks, ways, images=images, device=device)
        stopwatch = stopwatch_of(device, processor=options.processor_time)
        timings = interleave(works, rounds=options.rounds, stopwatch=stopwatch)
        for timing in timings:
            setting.report.add(
                batch=images,
                way=timing.name,
                minimum_s=timing.minimum,
                spread=timing.spread,
                images_per_s=images / timing.minimum,
                speedup=1 / timing.ratio,
                by_formula=_by_formula(options) if timing.name == "shared" else None,
            )
    setting.deliver()
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.parser("sampling", description=_DESCRIPTION, rounds=3)
    command.add_size(parser, size="tiny", depth=None, batch=None)
    command.add_processor_time(parser)
    parser.add_argument("--batches", type=command.whole_numbers, default=(1, 16, 128))
    parser.add_argument("--scales", type=command.positive, default=2, metavar="K")
    parser.add_argument("--solver", choices=["euler", "midpoint", "heun", "ab2"], default="heun")
    parser.add_argument("--steps", type=command.positive, default=4)
    parser.add_argument("--guidance", type=float, default=1.0, help="scale; default 1, none")
    parser.add_argument("--finest-batch", type=command.positive, default=16)
    parser.add_argument("--share-coarse", type=command.positive, default=1, metavar="N")
    parser.add_argument(
        "--ways",
        default=",".join(_WAYS),
        help=f"of {', '.join((*_WAYS, *_GPU_WAYS))}; default those that a processor has too",
    )
    options = parser.parse_args(arguments)
    ways = options.ways.split(",")
    if unknown := set(ways) - {*_WAYS, *_GPU_WAYS}:
        parser.error(f"--ways {sorted(unknown)} are unknown; there are {(*_WAYS, *_GPU_WAYS)}")
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    if not on_gpu and (absent := set(ways) & {*_GPU_WAYS}):
        parser.error(f"--ways {sorted(absent)} need a GPU")
    if uneven := [each for each in options.batches if each % options.share_coarse]:
        parser.error(f"--batches {uneven} are no whole layouts of {options.share_coarse} images")
    return options


def _works(
    options: argparse.Namespace,
    networks: Mapping[str, LapFlowTransformer],
    ways: Sequence[str],
    *,
    images: int,
    device: torch.device,
) -> dict[str, Drawing]:
    """What draws so many images, by name."""

    def draw(way: str, **how: int) -> Drawing:
        precision = cast(Precision, way.partition(" ")[0])
        return Drawing(
            _network(networks, way),
            flow=Flow(FlowConfig(scales=options.scales)),
            config=_sampler(options),
            latents=Latents(batch=images, channels=options.channels, size=options.image_size),
            device=device,
            precision=precision,
            **how,
        )

    works = {way: draw(way) for way in ways}
    if options.share_coarse > 1:
        works["shared"] = draw(ways[0], share_coarse=options.share_coarse)
    if images > options.finest_batch:
        works["chunks"] = draw(ways[0], chunk=options.finest_batch)
        works["segments"] = draw(ways[0], finest_batch=options.finest_batch)
    return works


def _sampler(options: argparse.Namespace) -> SamplerConfig:
    return SamplerConfig(
        solver=options.solver, steps=options.steps, guidance_scale=options.guidance
    )


def _by_formula(options: argparse.Namespace) -> float:
    """The speed-up of sharing if time were in proportion to multiply-adds."""
    shape = ModelShape.of(
        command.sizes(options),
        scales=options.scales,
        channels=options.channels,
        image_size=options.image_size,
        classes=_CLASSES,
    )
    *coarse, finest = nfe_per_segment(_sampler(options), FlowConfig(scales=options.scales).stages)
    before = sum(
        calls * multiply_adds(shape, active=active) for active, calls in enumerate(coarse, 1)
    )
    shared = finest * varied_multiply_adds(shape, variations=options.share_coarse)
    alone = before + finest * multiply_adds(shape)
    return float(alone / (before / options.share_coarse + shared))


def _network(networks: Mapping[str, LapFlowTransformer], way: str) -> VelocityModel:
    precision, _, how = way.partition(" ")
    network = networks[precision]
    if how == "graphs":
        return GraphedNetwork(network, CudaRecorder())
    return _compile(network) if how == "compiled" else network


def _compile(network: LapFlowTransformer) -> VelocityModel:
    """Compile for static shapes; on CUDA into graphs, whose outputs the next call overwrites."""
    on_cuda = next(network.parameters()).is_cuda
    graph = torch.compile(network, dynamic=False, mode="reduce-overhead" if on_cuda else "default")

    def velocity(states: Bands, time: Tensor, labels: Tensor) -> Bands:
        if on_cuda:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # What a CUDA graph returns is overwritten by its next run.
        return tuple(band.clone() if on_cuda else band for band in graph(states, time, labels))

    return velocity


if __name__ == "__main__":
    sys.exit(command.run_guarded(main))
