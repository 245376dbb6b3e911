"""Every command's settings, for tests that hold them all to something."""

from collections.abc import Callable
from typing import Any

from trainer.cli.checkpoints import ExportConfig, PruneConfig, VerifyConfig
from trainer.cli.drawing_config import InpaintConfig, SampleConfig
from trainer.cli.report import ReportConfig
from trainer.cli.run_handle import RetentionSettings
from trainer.cli.track import ShipConfig
from trainer.cli.ui import UiConfig
from trainer.config.job import JobConfig
from trainer.config.settings import Setting, settings_of
from trainer.errors import is_user_error
from trainer.evaluation.config import CheckpointEvaluationConfig

GIVEN: dict[type[Any], dict[str, Any]] = {
    JobConfig: {},
    SampleConfig: {"checkpoint": "/runs/a"},
    InpaintConfig: {"checkpoint": "/runs/a", "image": "/i.png", "mask": "/m.png", "label": 3},
    CheckpointEvaluationConfig: {"checkpoint": "/runs/a"},
    ExportConfig: {"uri": "/runs/a", "output": "/out"},
    RetentionSettings: {"uri": "/runs/a"},
    PruneConfig: {"uri": "/runs/a"},
    VerifyConfig: {"uri": "/runs/a"},
    UiConfig: {},
    ShipConfig: {"uri": "/runs/a"},
    ReportConfig: {},
}
"""The configuration of each command, and what must be given of it."""


def leaves(kind: type[Any]) -> list[Setting]:
    """The settings of a configuration, without its groups."""
    return [setting for setting in settings_of(kind) if not setting.is_group]


def refusal(call: Callable[[], Any]) -> str | None:
    """Why something is refused; None if it is not. What is no user's mistake goes through."""
    try:
        call()
    except ValueError as error:
        if not is_user_error(error):
            raise
        return str(error)
    return None
