"""The command that fills in what is missing of a picture, with the model of any checkpoint."""

from __future__ import annotations

from functools import partial

from pipelines.command import Outcome
from trainer.cli.command import run_command
from trainer.cli.drawing_config import InpaintConfig

_EXAMPLE = "checkpoint=~/lapflow/store/runs/digits image=photo.png mask=mask.png label=3"
_DESCRIPTION = f"""\
Fill in what is missing of a picture: where the mask is white the picture is kept, where it is black
the model of a checkpoint draws. The output shows the picture, the mask and the results in a row.

  python -m trainer.inpaint {_EXAMPLE}"""


def fill_in(config: InpaintConfig) -> Outcome:
    """Draw the results beside the picture and its mask, and answer where they were written.

    Raises:
        ConfigError: For a picture or mask that does not fit, a class that the model does not have,
            guidance without a trained null label, or an output that cannot be written.
        InpaintError: For a solver that chooses its own steps, or ``repeats`` below 1.
        AutoencoderError: If the autoencoder of the checkpoint's latents cannot be had.
        CheckpointError: If the checkpoint is missing or damaged.
    """
    # Not for those who ask for help: drawing needs torch.
    from trainer.cli.inpainting import draw_missing

    return draw_missing(config)


main = partial(
    run_command,
    InpaintConfig,
    fill_in,
    module="trainer.inpaint",
    description=_DESCRIPTION,
    example=_EXAMPLE,
)
"""Runs the command, given its words or none for the process's own, and returns its exit code."""
