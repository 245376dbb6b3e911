"""Imported by the server of forks, so that no try imports or composes for the first time."""

import alembic.command  # noqa: F401
import einops  # noqa: F401
import mlflow.tracking.client  # noqa: F401
import nvidia.dali.fn  # noqa: F401

import cluster.launcher  # noqa: F401
import tests.fuzz.kinds  # noqa: F401
import trainer.cli.ending
import trainer.training.preflight  # noqa: F401
from tests.fuzz.material import SETTINGS
from trainer.config.composition import compose_job

compose_job([*SETTINGS, "home=/nowhere"])
