"""Sampling speed: batch sizes, precision, compiled graphs, and batched segments."""

import copy
import sys
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.interleaved import interleave, stopwatch_of
from benchmarks.workload import Latents, fill
from models.axes import Bands, VelocityModel
from models.flow.config import FlowConfig
from models.flow.flow import Flow
from models.flow.sampler import sample
from models.flow.sampler_config import SamplerConfig
from models.transformer.lapflow import LapFlowTransformer

_CLASSES = 1000
_WAYS = ("fp32", "bf16", "fp32 compiled", "bf16 compiled")
_DESCRIPTION = """\
Images per second of the sampler. bf16 is the network cast to bfloat16 with float32 states. Compiled
networks have static shapes, one graph for each number of active scales, and run as CUDA graphs on a
GPU; compiling is not timed. Where there are more images than --finest-batch, `segments` draws them
with that many to a network call when all scales are active and more in the coarse segments, against
`chunks`, which draws the same images in batches of that size from start to end.

  python -m benchmarks.sampling
  python -m benchmarks.sampling --size XL/2 --depth 28 --scales 3 --steps 40 --device cuda"""


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

    def __call__(self) -> Tensor:
        """Draw the images."""
        return torch.cat(
            [
                sample(
                    self._network,
                    flow=self._flow,
                    config=self._config,
                    noise=noise,
                    labels=labels,
                    channels=self._latents.channels,
                    image_size=self._latents.size,
                    null_label=_CLASSES,
                    finest_batch=self._finest_batch,
                ).images
                for noise, labels in zip(
                    torch.split(self._noise, self._chunk),
                    torch.split(self._labels, self._chunk),
                    strict=True,
                )
            ]
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = command.parser("sampling", description=_DESCRIPTION, rounds=3)
    command.add_size(parser, size="tiny", depth=None, batch=None)
    parser.add_argument("--batches", type=command.whole_numbers, default=(1, 16, 128))
    parser.add_argument("--scales", type=command.positive, default=2, metavar="K")
    parser.add_argument("--solver", choices=["euler", "midpoint", "heun", "ab2"], default="heun")
    parser.add_argument("--steps", type=command.positive, default=4)
    parser.add_argument("--finest-batch", type=command.positive, default=16)
    parser.add_argument(
        "--ways", default=",".join(_WAYS), help=f"of {', '.join(_WAYS)}; default all"
    )
    options = parser.parse_args(arguments)
    ways = options.ways.split(",")
    if unknown := set(ways) - set(_WAYS):
        parser.error(f"--ways {sorted(unknown)} are unknown; there are {', '.join(_WAYS)}")
    setting = command.setting("sampling", options)
    device = setting.device
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
    networks = {"fp32": network, "bf16": copy.deepcopy(network).bfloat16()}
    for images in options.batches:
        if any(way.endswith("compiled") for way in ways):
            # Graphs of other batch sizes would count against the limit of graphs for one network.
            torch.compiler.reset()
        draw = partial(
            Drawing,
            flow=Flow(FlowConfig(scales=options.scales)),
            config=SamplerConfig(solver=options.solver, steps=options.steps),
            latents=Latents(batch=images, channels=options.channels, size=options.image_size),
            device=device,
        )
        works = {way: draw(_network(networks, way)) for way in ways}
        if images > options.finest_batch:
            plain = _network(networks, ways[0])
            works["chunks"] = draw(plain, chunk=options.finest_batch)
            works["segments"] = draw(plain, finest_batch=options.finest_batch)
        timings = interleave(works, rounds=options.rounds, stopwatch=stopwatch_of(device))
        for timing in timings:
            setting.report.add(
                batch=images,
                way=timing.name,
                minimum_s=timing.minimum,
                spread=timing.spread,
                images_per_s=images / timing.minimum,
                speedup=1 / timing.ratio,
            )
    setting.deliver()
    return 0


def _network(networks: Mapping[str, LapFlowTransformer], way: str) -> VelocityModel:
    precision, _, compiled = way.partition(" ")
    return _compile(networks[precision]) if compiled else networks[precision]


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
