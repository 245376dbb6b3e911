"""The command that draws samples from any checkpoint: a grid, or a set of any size."""

from __future__ import annotations

from functools import partial

from pipelines.command import Outcome
from trainer.cli.command import run_command
from trainer.cli.drawing_config import SampleConfig

_EXAMPLE = "checkpoint=~/lapflow/store/runs/digits"
_DESCRIPTION = f"""\
Draw samples from a checkpoint, or from a run's newest one: a grid, a film of how they come into
being, what lies between two seeds, or n=N of them into a folder.

  python -m trainer.sample {_EXAMPLE}
  python -m trainer.sample checkpoint=s3://bucket/runs/NAME/checkpoints/000001280000 \\
      store.endpoint_url=http://HOST:PORT classes=[207,360] columns=4 sampler.guidance_scale=4
  python -m trainer.sample {_EXAMPLE} film=true
  python -m trainer.sample {_EXAMPLE} interpolate=3:5
  python -m trainer.sample {_EXAMPLE} share_coarse=8   8 variations of a layout
  python -m trainer.sample {_EXAMPLE} n=50000 format=npz \\
      output=s3://bucket/samples cluster.backend=ray cluster.workers=8

Run the same command again and a set that was interrupted goes on."""


def draw(config: SampleConfig) -> Outcome:
    """Draw what is asked for, and answer where it was written.

    Raises:
        ConfigError: For a class or weights the checkpoint does not have, guidance without a trained
            null label, a device that cannot be used, or an output that cannot be written or holds
            something else.
        AutoencoderError: If the autoencoder of its latents cannot be had.
        CheckpointError: If the checkpoint is missing or damaged, or a store fails.
        SolverError: If a solver that chooses its own steps comes to no end.
    """
    # Not for those who ask for help: drawing needs torch.
    if config.n is None:
        from trainer.cli.sample_picture import draw_picture

        return draw_picture(config)
    from trainer.cli.sample_set import draw_set

    return draw_set(config, config.n)


main = partial(
    run_command,
    SampleConfig,
    draw,
    module="trainer.sample",
    description=_DESCRIPTION,
    example=_EXAMPLE,
)
"""Runs the command, given its words or none for the process's own, and returns its exit code."""
