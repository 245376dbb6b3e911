"""The command that draws a grid of samples from any checkpoint.

The checkpoint's own manifest says what model it holds, so nothing else has to be configured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from models.flow.flow import Flow, FlowConfig
from models.flow.sampler import SamplerConfig
from models.transformer.lapflow import LapFlowTransformer, TransformerConfig
from trainer.checkpoint.content import load_weights
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.store import StoreConfig
from trainer.composition import settings
from trainer.evaluate.grid import grid_png
from trainer.evaluate.samples import ImageShape, draw
from trainer.mistakes import is_users_mistake
from trainer.resume import open_checkpoint
from trainer.schema import ConfigError, DataConfig, from_dict

_DESCRIPTION = """\
Draw a grid of samples from a checkpoint.

  python -m trainer.sample checkpoint=~/lapflow/store/runs/digits/checkpoints/000000256000
  python -m trainer.sample checkpoint=s3://bucket/runs/NAME/checkpoints/000001280000 \\
      store.endpoint_url=http://HOST:PORT classes=[207,360] columns=4 sampler.guidance_scale=4"""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What to draw.

    Attributes:
        checkpoint: URI of the checkpoint.
        output: PNG file to write.
        weights: "ema", or "master" for the weights without averaging.
        classes: Classes to draw, one row each; None draws the first ten.
        columns: Images per class.
        seed: Seed of the noise.
        batch: Images per solver run.
        device: "auto" takes a GPU when there is one.
        sampler: Solver, steps and guidance.
        store: How to reach the store.
    """

    checkpoint: str
    output: str = "samples.png"
    weights: Literal["ema", "master"] = "ema"
    classes: tuple[int, ...] | None = None
    columns: int = 10
    seed: int = 1
    batch: int = 64
    device: str = "auto"
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(guidance_scale=1.5))
    store: StoreConfig = field(default_factory=StoreConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, or 2 for settings or a checkpoint that cannot be used.
    """
    options = _parser().parse_args(arguments)
    try:
        path = draw_grid(from_dict(SampleConfig, settings(SampleConfig, options.overrides)))
    except (CheckpointError, ValueError) as error:
        if not is_users_mistake(error) and not isinstance(error, CheckpointError):
            raise
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{path}\n")
    return 0


def draw_grid(config: SampleConfig) -> Path:
    """Draw the grid and return where it was written.

    Raises:
        ConfigError: For a class or weights the checkpoint does not have, or an output that cannot
            be written.
        CheckpointError: If the checkpoint is missing or damaged.
    """
    name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name if config.device == "auto" else config.device)
    store, _, manifest = open_checkpoint(config.checkpoint, config.store)
    data = from_dict(DataConfig, manifest.science["data"])
    flow = Flow(from_dict(FlowConfig, manifest.science["flow"]))
    model = _model(manifest, data)
    model.load_state_dict(load_weights(store, manifest, config.weights))
    classes = config.classes or tuple(range(min(10, data.classes)))
    beyond = [label for label in classes if not 0 <= label < data.classes]
    if beyond:
        raise ConfigError(f"classes={beyond} are not among 0 … {data.classes - 1}")
    images = draw(
        model.to(device).eval(),
        flow=flow,
        config=config.sampler,
        shape=ImageShape(channels=data.channels, size=data.image_size, classes=data.classes),
        labels=torch.tensor(classes).repeat_interleave(config.columns),
        seed=config.seed,
        batch=config.batch,
        device=device,
    )
    output = Path(config.output).expanduser()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(grid_png(images, columns=config.columns))
    except OSError as error:
        raise ConfigError(f"output={config.output} cannot be written: {error}") from error
    return output


def _model(manifest: Manifest, data: DataConfig) -> LapFlowTransformer:
    flow = from_dict(FlowConfig, manifest.science["flow"])
    return LapFlowTransformer(
        from_dict(TransformerConfig, manifest.science["model"]),
        scales=flow.scales,
        channels=data.channels,
        image_size=data.image_size,
        classes=data.classes,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.sample",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings: " + ", ".join(SampleConfig.__annotations__),
    )
    parser.add_argument("overrides", nargs="+", metavar="key=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
