"""The command that lists, verifies, exports and prunes the checkpoints of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from trainer.checkpoint_command.exporting import ExportConfig, export_chosen_checkpoint
from trainer.checkpoint_command.listing import ListConfig, list_checkpoints
from trainer.checkpoint_command.pruning import PruneConfig, prune_checkpoints
from trainer.checkpoint_command.verifying import VerifyConfig, verify_checkpoints
from trainer.command import Subcommand, run_subcommands

_MODULE = "trainer.checkpoints"
_RUN = "~/lapflow/store/runs/digits"
_DESCRIPTION = f"""\
Look at the checkpoints of a run, verify, export and prune them.

  python -m {_MODULE} list {_RUN}
  python -m {_MODULE} verify s3://bucket/runs/NAME store.endpoint_url=http://HOST:PORT
  python -m {_MODULE} export {_RUN} output=digits-weights
  python -m {_MODULE} prune {_RUN} keep_last=2 keep_every_images=1000000

exit codes: 0 done, 1 verify found damage, 2 the settings or the store cannot be used"""
_LIST = f"""\
List the checkpoints of a run: what is there, what is whole as far as can be told without reading
it, why it is kept, and which one a run resumes from.

  python -m {_MODULE} list {_RUN}
  python -m {_MODULE} list {_RUN} keep_every_images=1000000 keep_best=2 features=inception
  python -m {_MODULE} list {_RUN} --json

A run does not record what it keeps: give keep_last, keep_every_images and keep_best as it was
launched, to see what stays at its next save. Distances are those of features=EXTRACTOR; without it,
of the extractor that most checkpoints were measured with."""
_VERIFY = f"""\
Read every byte of all checkpoints of a run, or of one, and compare it with the manifest.

  python -m {_MODULE} verify {_RUN}
  python -m {_MODULE} verify {_RUN}/checkpoints/000000256000

exit codes: 0 all are whole, 1 one is damaged, 2 they cannot be read"""
_EXPORT = f"""\
Write the weights of a checkpoint, of a run its newest valid one, for other programs.

  python -m {_MODULE} export {_RUN} output=digits-weights
  python -m {_MODULE} export {_RUN} output=digits-weights choose=256000 weights=both
  python -m {_MODULE} export {_RUN} output=digits.safetensors file=safetensors"""
_PRUNE = f"""\
Show what can be deleted, and why the rest stays; delete it with yes=true.

  python -m {_MODULE} prune {_RUN} keep_last=1
  python -m {_MODULE} prune {_RUN} keep_last=1 keep_best=2 features=inception yes=true

The newest valid checkpoint is never deleted, nor what may belong to a save under way. Whether a
checkpoint is valid is told without reading it: run verify first where that is not enough."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    commands: dict[str, Subcommand[Any]] = {
        "list": Subcommand(
            kind=ListConfig,
            make=list_checkpoints,
            summary="what is there, what is whole, why it is kept, what a run resumes from",
            description=_LIST,
            example=_RUN,
        ),
        "verify": Subcommand(
            kind=VerifyConfig,
            make=verify_checkpoints,
            summary="read every byte and compare it with the manifest",
            description=_VERIFY,
            example=_RUN,
        ),
        "export": Subcommand(
            kind=ExportConfig,
            make=export_chosen_checkpoint,
            summary="write the weights for other programs",
            description=_EXPORT,
            example=f"{_RUN} output=digits-weights",
        ),
        "prune": Subcommand(
            kind=PruneConfig,
            make=prune_checkpoints,
            summary="show what can be deleted, or delete it",
            description=_PRUNE,
            example=_RUN,
        ),
    }
    return run_subcommands(commands, module=_MODULE, description=_DESCRIPTION, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
