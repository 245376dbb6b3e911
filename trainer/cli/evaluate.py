"""The command `python -m trainer.evaluate`, which measures checkpoints after the fact."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.console import say, say_error
from trainer.cli.command import Outcome, run_command
from trainer.evaluation.checkpoint_report import table
from trainer.evaluation.checkpoints import (
    CheckpointEvaluationConfig,
    UnwrittenReport,
    evaluate_checkpoints,
)

_FAILED = 1
_EXAMPLE = "checkpoint=~/lapflow/store/runs/digits"
_DESCRIPTION = f"""\
Draw samples from a checkpoint and measure their Fréchet distance to held-out real images.

  python -m trainer.evaluate {_EXAMPLE}            its newest checkpoint
  python -m trainer.evaluate {_EXAMPLE} checkpoints=all
  python -m trainer.evaluate checkpoint=s3://bucket/runs/NAME/checkpoints/000001280000 \\
      store.endpoint_url=http://HOST:PORT samples=10000 features=[random_conv,learned_conv] \\
      sampler.solver=heun sampler.steps=20

Reports and grids are written below the run's evaluation/ folder, or below output=FOLDER."""


def main(arguments: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(
        CheckpointEvaluationConfig,
        _measured,
        module="trainer.evaluate",
        description=_DESCRIPTION,
        example=_EXAMPLE,
        arguments=arguments,
        prog=prog,
    )


def _measured(config: CheckpointEvaluationConfig) -> Outcome:
    try:
        return Outcome(table(evaluate_checkpoints(config, tell=say)))
    except UnwrittenReport as error:
        say_error(error)
        return Outcome(table(error.reports), _FAILED)
